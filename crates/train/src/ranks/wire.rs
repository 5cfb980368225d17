//! The protocol between ranks: a greeting as a line of JSON, then frames.

use serde::{Deserialize, Serialize};
use std::io::{self, Error, ErrorKind, Read, Write};

/// Begins a greeting, which distinguishes a rank from a stray connection.
const MAGIC: &str = "suasion-ranks 1 ";
/// The longest greeting.
const LINE: usize = 1 << 16;
/// The longest frame; values are sent in blocks of 4 MiB, and an evaluation's losses at once.
const FRAME: u32 = 1 << 30;

/// The first message of a rank to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    /// Version of the program.
    pub(super) suasion: String,
    /// The token of the run.
    pub(super) token: String,
    pub(super) rank: usize,
    pub(super) ranks: usize,
    /// The port on which it listens for ranks of higher numbers.
    pub(super) port: u16,
}

/// What the first rank answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// All ranks are there: their addresses by rank; that of the first is empty.
    Peers(Vec<String>),
    /// The connection is refused, with the reason.
    Refused(String),
}

/// Writes a greeting or an answer.
pub(super) fn say(to: &mut impl Write, what: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_string(what)?;
    to.write_all(format!("{MAGIC}{text}\n").as_bytes())
}

/// Reads a greeting or an answer. Nothing after its line is read.
pub(super) fn hear<T: for<'a> Deserialize<'a>>(from: &mut impl Read) -> io::Result<T> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    loop {
        from.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            break;
        }
        line.push(byte[0]);
        let begun = line.len().min(MAGIC.len());
        if line[..begun] != MAGIC.as_bytes()[..begun] || line.len() > LINE {
            return Err(Error::new(ErrorKind::InvalidData, "no greeting of a rank"));
        }
    }
    let text = line.get(MAGIC.len()..).unwrap_or_default();
    serde_json::from_slice(text).map_err(|error| Error::new(ErrorKind::InvalidData, error))
}

/// A frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A message of [`Collective::send`](suasion_engine::Collective::send).
    Message(Vec<u8>),
    /// The sender is alive.
    Beat,
    /// The sender has done its part.
    Bye,
    /// The run has failed, and why.
    Failed(String),
}

const MESSAGE: u8 = 0;
const BEAT: u8 = 1;
const BYE: u8 = 2;
const FAILED: u8 = 3;

/// Writes a frame.
pub(super) fn write(to: &mut impl Write, frame: &Frame) -> io::Result<()> {
    match frame {
        Frame::Message(message) => write_message(to, message),
        Frame::Beat => write_frame(to, BEAT, &[]),
        Frame::Bye => write_frame(to, BYE, &[]),
        Frame::Failed(text) => write_frame(to, FAILED, text.as_bytes()),
    }
}

/// Writes [`Frame::Message`].
pub(super) fn write_message(to: &mut impl Write, message: &[u8]) -> io::Result<()> {
    write_frame(to, MESSAGE, message)
}

fn write_frame(to: &mut impl Write, kind: u8, content: &[u8]) -> io::Result<()> {
    let len = u32::try_from(content.len()).ok().filter(|len| *len <= FRAME);
    let len = len.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a message of more than 1 GiB"))?;
    // A short frame is written at once, so that it is one packet.
    let mut head = vec![kind];
    head.extend(len.to_le_bytes());
    if content.len() <= 1 << 16 {
        head.extend(content);
        return to.write_all(&head);
    }
    to.write_all(&head)?;
    to.write_all(content)
}

/// Reads a frame.
pub(super) fn read(from: &mut impl Read) -> io::Result<Frame> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let [kind, len @ ..] = head;
    let len = u32::from_le_bytes(len);
    if kind > FAILED || len > FRAME {
        return Err(Error::new(ErrorKind::InvalidData, "no frame of a rank"));
    }
    let mut content = Vec::new();
    // Memory grows with what arrives, whatever length a broken peer announces.
    if from.take(u64::from(len)).read_to_end(&mut content)? < len as usize {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(match kind {
        MESSAGE => Frame::Message(content),
        BEAT => Frame::Beat,
        BYE => Frame::Bye,
        _ => Frame::Failed(String::from_utf8_lossy(&content).into_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_greetings_come_back() {
        let frames = [
            Frame::Message(vec![7; 100_000]),
            Frame::Message(Vec::new()),
            Frame::Beat,
            Frame::Bye,
            Frame::Failed("rank 1: disk full".into()),
        ];
        let mut bytes = Vec::new();
        let hello = Hello { suasion: "1".into(), token: "é".into(), rank: 1, ranks: 2, port: 9 };
        say(&mut bytes, &hello).unwrap();
        frames.iter().for_each(|frame| write(&mut bytes, frame).unwrap());
        let mut from = bytes.as_slice();
        assert_eq!(hear::<Hello>(&mut from).unwrap(), hello);
        for frame in &frames {
            assert_eq!(read(&mut from).unwrap(), *frame);
        }
        assert_eq!(read(&mut from).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        // Truncated anywhere, it is an error and not a panic.
        for end in 0..bytes.len().min(400) {
            let mut cut = &bytes[..end];
            if hear::<Hello>(&mut cut).is_ok() {
                assert!(read(&mut cut).is_err());
            }
        }
    }

    #[test]
    fn a_stray_connection_is_told_from_a_rank() {
        for text in ["GET / HTTP/1.1\r\n\r\n", "\n", "suasion-ranks 1 {}\n", "suasion-ranks 2 {}\n"] {
            assert!(hear::<Hello>(&mut text.as_bytes()).is_err(), "{text:?}");
        }
        let long = MAGIC.to_string() + &"x".repeat(LINE + 1);
        assert!(hear::<Hello>(&mut long.as_bytes()).is_err());
        assert!(read(&mut &[9, 0, 0, 0, 0][..]).is_err());
        assert!(read(&mut &[MESSAGE, 255, 255, 255, 255][..]).is_err());
    }
}

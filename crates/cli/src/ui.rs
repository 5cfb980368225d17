//! Output: results on stdout, progress and logs on stderr, colour on terminals only. Control characters of
//! messages, which may come from file names and from data, are printed as visible signs.

use crate::failure::{Exit, Failures, Outcome};
use clap::ValueEnum;
use std::fmt::Display;
use std::io::{self, BufWriter, IsTerminal, Write};
use suasion_data::Level;
use suasion_data::report::{printable, visible};
use unicode_width::UnicodeWidthChar;

/// `--color`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Everywhere.
    Always,
    /// Nowhere.
    Never,
}

/// Where and how this process prints.
#[derive(Clone, Debug)]
pub struct Ui {
    /// Results as JSON.
    pub json: bool,
    /// No progress and no notes; errors and warnings remain.
    pub quiet: bool,
    /// Colour on stdout.
    pub color: bool,
    /// Colour on stderr.
    pub color_err: bool,
    /// Columns of stdout; 80 where it is not a terminal.
    pub width: usize,
    /// Stderr is a terminal: progress may overwrite its line.
    pub live: bool,
    /// The number of this rank, where it is not the first, which prints for all: errors alone are printed, with it.
    pub rank: Option<usize>,
}

impl Ui {
    /// From the flags, the environment and the kinds of the streams.
    pub fn new(json: bool, quiet: bool, choice: ColorChoice) -> Ui {
        let allowed = |terminal: bool| match choice {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            // no-color.org: present and not empty. A dumb terminal prints escape sequences as text.
            ColorChoice::Auto => {
                terminal
                    && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
                    && std::env::var_os("TERM").is_none_or(|v| v != "dumb")
            }
        };
        let terminal = io::stdout().is_terminal();
        let width =
            if terminal { terminal_size::terminal_size().map(|(w, _)| usize::from(w.0)) } else { None };
        Ui {
            json,
            quiet,
            color: allowed(terminal),
            color_err: allowed(io::stderr().is_terminal()),
            width: width.unwrap_or(80).max(20),
            live: io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|v| v != "dumb"),
            rank: None,
        }
    }

    /// The same for a rank of a run.
    pub fn of_rank(self, rank: Option<usize>) -> Ui {
        match rank {
            None | Some(0) => self,
            Some(_) => Ui { quiet: true, live: false, rank, ..self },
        }
    }

    /// Logs text on stderr, unless quiet.
    pub fn log(&self, text: impl Display) {
        self.hang(0, text);
    }

    /// As [`Ui::log`]; on a terminal, lines after the first are `indent` columns in.
    pub fn hang(&self, indent: usize, text: impl Display) {
        if !self.quiet {
            self.say("", "", indent, &text.to_string());
        }
    }

    /// Writes a label in a colour, where there is one, and text on stderr: on a terminal, in lines of its width.
    fn say(&self, label: &str, sgr: &str, indent: usize, text: &str) {
        let mut text = printable(text);
        let colon = if label.is_empty() { "" } else { ": " };
        if self.live {
            text = wrap_after(label.len() + colon.len(), indent, &text, self.columns());
        }
        let label = if label.is_empty() { String::new() } else { self.paint_err(sgr, label) };
        // In one piece: ranks share a terminal. A closed stderr must not stop a training run.
        let _ = io::stderr().write_all(format!("{label}{colon}{text}\n").as_bytes());
    }

    /// Columns of the terminal on stderr without the last, at which some terminals wrap; 79 if it is not a terminal.
    pub fn columns(&self) -> usize {
        let size = terminal_size::terminal_size_of(io::stderr());
        size.map_or(80, |(width, _)| usize::from(width.0)).max(20) - 1
    }

    /// Logs a line about the output above it on stdout, with an empty line between the two on a terminal.
    pub fn note(&self, line: impl Display) {
        let gap = if self.live { "\n" } else { "" };
        self.log(format_args!("{gap}{line}"));
    }

    /// Replaces the updating line (terminals only); empty text removes it.
    pub fn overwrite(&self, line: &str) {
        if self.quiet || !self.live {
            return;
        }
        let columns = self.columns();
        let mut fitting = String::new();
        let mut used = 0;
        for character in visible(line).chars() {
            used += character.width().unwrap_or(0);
            if used > columns {
                break;
            }
            fitting.push(character);
        }
        let mut stderr = io::stderr().lock();
        let _ = write!(stderr, "\r\x1b[2K{fitting}");
        let _ = stderr.flush();
    }

    /// Prints a warning, also when quiet.
    pub fn warn(&self, message: impl Display) {
        if self.rank.is_some() {
            return;
        }
        self.say("warning", "33", 0, &message.to_string());
    }

    /// Prints a finding, `indent` columns in: errors and warnings by their names, also when quiet.
    pub fn finding(&self, level: Level, indent: usize, text: impl Display) {
        if self.rank.is_some() {
            return;
        }
        let (label, sgr) = match level {
            Level::Error => ("error", "1;31"),
            Level::Warning => ("warning", "33"),
            Level::Note => return self.hang(indent, format_args!("{:indent$}{text}", "")),
        };
        let indent = if self.quiet { 0 } else { indent };
        self.say(&format!("{:indent$}{label}", ""), sgr, indent, &text.to_string());
    }

    /// Text in an SGR colour, where stderr has colour.
    pub fn paint_err(&self, sgr: &str, text: &str) -> String {
        if self.color_err { format!("\x1b[{sgr}m{text}\x1b[0m") } else { text.to_string() }
    }

    /// Stdout, locked and buffered: flush it, so that a full disk or a closed pipe is an error and not a
    /// panic.
    pub fn out(&self) -> BufWriter<io::StdoutLock<'static>> {
        BufWriter::new(io::stdout().lock())
    }

    /// Prints a result as one JSON document.
    pub fn print_json(&self, value: &impl serde::Serialize) -> anyhow::Result<()> {
        let mut out = Controls { out: self.out(), lead: false };
        serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
        writeln!(out)?;
        out.flush()?;
        Ok(())
    }

    /// Prints an error as `error[TAG]: ..` and `help: ..`, and returns the exit code.
    pub fn report(&self, error: &anyhow::Error) -> Exit {
        // `suasion verify … | head`: the reader has closed the pipe, which is not an error. I/O errors
        // without a path are those of stdout.
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            return Exit::Done;
        }
        if let Some(Failures(failures)) = error.downcast_ref() {
            for failure in failures {
                self.print_error(failure.tag, failure, failure.help.as_deref());
            }
            return failures.first().map_or(Exit::Usage, |failure| failure.exit);
        }
        let Outcome { tag, help, exit } = Outcome::of(error);
        self.print_error(tag, error, help.as_deref());
        exit
    }

    fn print_error(&self, tag: &str, error: impl Display, help: Option<&str>) {
        let rank = self.rank.map(|rank| format!("[rank {rank}] ")).unwrap_or_default();
        self.say(&format!("{rank}error[{tag}]"), "1;31", 0, &error.to_string());
        // The first rank prints the help, unless it is the one that is lost.
        if let Some(help) = help.filter(|_| self.rank.is_none() || tag == "E-RANK") {
            self.say("help", "1;36", 0, help);
        }
    }
}

/// Writes JSON with the control characters that JSON allows in strings (DEL and U+0080 to U+009F) as `\u` escapes: a
/// terminal obeys some of them.
struct Controls<W> {
    out: W,
    /// The last byte was 0xC2, the first of two that are a control character or another one.
    lead: bool,
}

impl<W: Write> Write for Controls<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut plain = 0;
        for (i, &byte) in bytes.iter().enumerate() {
            let lead = std::mem::replace(&mut self.lead, byte == 0xC2);
            if !lead && byte != 0x7F && byte != 0xC2 {
                continue;
            }
            // The bytes before this one, without a pending lead byte.
            self.out.write_all(&bytes[plain..i])?;
            plain = i + 1;
            match (lead, byte) {
                (_, 0x7F) => self.out.write_all(b"\\u007f")?,
                (true, 0x80..=0x9F) => write!(self.out, "\\u{byte:04x}")?,
                (true, _) => self.out.write_all(&[0xC2, byte])?,
                (false, _) => {}
            }
        }
        self.out.write_all(&bytes[plain..])?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Text in lines of at most `width` columns, broken at spaces; its own line ends are kept. A word that is wider than
/// a line is kept whole, except in scripts written without spaces.
pub fn wrap(text: &str, width: usize) -> String {
    wrap_after(0, 0, text, width)
}

/// As [`wrap`], if `first` columns of the first line are taken, and continuation lines start `indent`
/// columns in.
fn wrap_after(first: usize, indent: usize, text: &str, width: usize) -> String {
    let wide = |text: &str| text.chars().any(|c| c.width() == Some(2));
    let line = |(number, line): (usize, &str)| {
        let taken = " ".repeat(if number == 0 { first } else { 0 });
        // The indentation of a line is kept in its continuation.
        let own = line.len() - line.trim_start_matches(' ').len();
        let hang = " ".repeat(indent.max(own).min(width / 2));
        let options = textwrap::Options::new(width)
            .initial_indent(&taken)
            .subsequent_indent(&hang)
            .break_words(wide(line))
            .wrap_algorithm(textwrap::WrapAlgorithm::FirstFit)
            .word_separator(textwrap::WordSeparator::AsciiSpace)
            .word_splitter(textwrap::WordSplitter::NoHyphenation);
        textwrap::fill(line, options).split_off(taken.len())
    };
    text.split('\n').enumerate().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_of_json_are_escaped() {
        let value = serde_json::json!({"\u{9b}a": "x\u{7f}\u{9b}31mé\u{a0}\u{80}ü\u{1b}"});
        let text = serde_json::to_vec(&value).unwrap();
        for size in 1..text.len() {
            let mut out = Controls { out: Vec::new(), lead: false };
            text.chunks(size).for_each(|chunk| out.write_all(chunk).unwrap());
            let out = String::from_utf8(out.out).unwrap();
            assert!(!out.chars().any(char::is_control), "{out:?}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&out).unwrap(), value);
        }
    }

    #[test]
    fn wrapping_keeps_words_and_columns() {
        assert_eq!(wrap("one two three", 8), "one two\nthree");
        assert_eq!(wrap("a abcdefgh b", 3), "a\nabcdefgh\nb");
        assert_eq!(wrap("a\n\nb c", 80), "a\n\nb c");
        assert_eq!(wrap("電車電車", 5), "電車\n電車");
        // Help texts are indented; lines are not broken at hyphens, which paths and flags contain.
        assert_eq!(wrap("help:\n  a --long-flag", 8), "help:\n  a\n  --long-flag");
        assert_eq!(wrap_after(9, 0, "one two three", 12), "one\ntwo three");
        assert_eq!(wrap_after(7, 2, "one two three", 12), "one\n  two three");
    }
}

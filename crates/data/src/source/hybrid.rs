//! The hybrid of run-length encoding and bit packing in which Parquet stores levels and dictionary indices:
//! <https://parquet.apache.org/docs/file-format/data-pages/encodings/#RLE>.

use arrow_buffer::Buffer;
use parquet::errors::{ParquetError, Result};

/// Numbers of up to 32 bits, decoded on demand.
pub(super) struct Hybrid {
    bytes: Buffer,
    /// The byte after the current run.
    at: usize,
    /// Number of bits per value.
    width: u32,
    run: Run,
}

/// The rest of a run.
enum Run {
    /// The same number, with the remaining count.
    Same(u32, usize),
    /// Packed numbers: the bit offset of the next, and the remaining count.
    Packed(usize, usize),
}

impl Hybrid {
    /// # Errors
    /// A message if numbers would have more than 32 bits.
    pub fn new(bytes: Buffer, width: u32) -> Result<Hybrid> {
        if width > u32::BITS {
            return Err(ParquetError::General(format!("numbers of {width} bits")));
        }
        Ok(Hybrid { bytes, at: 0, width, run: Run::Same(0, 0) })
    }

    /// Decodes `n` numbers: passes each run of equal numbers to `push`, with its length.
    ///
    /// # Errors
    /// A message if there are fewer, or if one has more bits than allowed.
    pub fn take(&mut self, mut n: usize, mut push: impl FnMut(u32, usize)) -> Result<()> {
        while n > 0 {
            let count = match &mut self.run {
                Run::Same(_, 0) | Run::Packed(_, 0) => {
                    self.run = self.next()?;
                    continue;
                }
                Run::Same(number, left) => {
                    let count = n.min(*left);
                    *left -= count;
                    push(*number, count);
                    count
                }
                Run::Packed(bit, left) => {
                    let count = n.min(*left);
                    *left -= count;
                    for _ in 0..count {
                        push(number(&self.bytes, *bit, self.width), 1);
                        *bit += self.width as usize;
                    }
                    count
                }
            };
            n -= count;
        }
        Ok(())
    }

    /// Reads the header of the next run: its length, and in the lowest bit whether it is packed.
    fn next(&mut self) -> Result<Run> {
        let ends = || ParquetError::General("numbers end early".into());
        let mut head = 0u64;
        for shift in (0..u32::BITS).step_by(7) {
            let byte = *self.bytes.get(self.at).ok_or_else(ends)?;
            self.at += 1;
            head |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let (length, width) = ((head >> 1) as usize, self.width as usize);
        let at = self.at;
        if head & 1 == 1 {
            // Groups of 8 numbers; the last group may lack bytes that no number needs.
            let all = (length * width).min(self.bytes.len() - at);
            self.at += all;
            let numbers = (all * 8).checked_div(width).unwrap_or(length * 8);
            return Ok(Run::Packed(at * 8, numbers));
        }
        self.at += width.div_ceil(8);
        let number = number(self.bytes.get(..self.at).ok_or_else(ends)?, at * 8, (self.at - at) as u32 * 8);
        if u64::from(number) >> width != 0 {
            return Err(ParquetError::General(format!("the number {number} has more than {width} bits")));
        }
        Ok(Run::Same(number, length))
    }
}

/// The number of `width` bits at a bit offset; bits beyond the end are 0.
fn number(bytes: &[u8], bit: usize, width: u32) -> u32 {
    let bytes = &bytes[(bit / 8).min(bytes.len())..];
    let mut word = [0; 8];
    let there = bytes.len().min(8);
    word[..there].copy_from_slice(&bytes[..there]);
    (u64::from_le_bytes(word) >> (bit % 8) & ((1 << width) - 1)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(bytes: &[u8], width: u32, n: usize) -> Result<Vec<u32>> {
        let mut hybrid = Hybrid::new(Buffer::from(bytes), width)?;
        let mut out = Vec::new();
        // First three numbers, then the rest, so that a run is continued in the middle.
        hybrid.take(n.min(3), |number, count| out.resize(out.len() + count, number))?;
        hybrid.take(n.saturating_sub(3), |number, count| out.resize(out.len() + count, number))?;
        Ok(out)
    }

    #[test]
    fn the_examples_of_the_format_are_decoded() {
        // The format's documentation packs 0 to 7, at three bits each, into these three bytes; 3 is the header of
        // one group.
        let packed = [3, 0b1000_1000, 0b1100_0110, 0b1111_1010];
        assert_eq!(numbers(&packed, 3, 8).unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
        // A run of 100 has the header 200, in two bytes of seven bits; its number follows in one byte.
        let both = [[200, 1, 4].as_slice(), &packed].concat();
        let expected: Vec<u32> = std::iter::repeat_n(4, 100).chain(0..8).collect();
        assert_eq!(numbers(&both, 3, 108).unwrap(), expected);
        // Numbers with a width of 0 bits are 0; with 20 bits they take three bytes in a run.
        assert_eq!(numbers(&[200, 1], 0, 100).unwrap(), [0; 100]);
        assert_eq!(numbers(&[8, 0xff, 0xff, 0x0f], 20, 4).unwrap(), [0xf_ffff; 4]);
    }

    #[test]
    fn damaged_numbers_are_errors() {
        // Fewer numbers than requested; a number that is too large; a header without an end; more than 32 bits.
        for (bytes, width) in [
            (&[2, 1][..], 1),
            (&[4, 2], 1),
            (&[0x80], 1),
            (&[], 1),
            (&[0, 0, 0], 1),
            (&[3], 3),
            (&[2, 1], 33),
        ] {
            assert!(numbers(bytes, width, 9).is_err(), "{bytes:?}");
        }
    }
}

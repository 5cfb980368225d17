//! Finds the end of a JSON value by brackets and strings alone.

/// State of a scan over JSON bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Scan {
    pub depth: usize,
    pub in_string: bool,
    pub escaped: bool,
}

impl Scan {
    pub fn step(&mut self, byte: u8) {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
    }
}

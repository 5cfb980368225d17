//! Hand-written pre-tokenizers of byte-level BPE, which split text into pieces before merging.
//!
//! The library runs these regular expressions with Oniguruma, which takes most of its time on English. A few
//! expressions cover nearly every published model, and all have the same structure: runs of letters, digits,
//! punctuation or white space, some with one character before them. [`Pretokeniser::of`] recognises an
//! expression by its exact text only; all others are left to the library.
//!
//! Every expression here matches at every position of every text. So a text is the sequence of its matches,
//! and a piece does not depend on the text before it. tokens/equality.rs compares the pieces with the
//! library's, for every code point and on random text.

use regex_syntax::hir::{Class, HirKind};
use std::sync::LazyLock;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

/// A supported expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pretokeniser {
    /// GPT-2: ` ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+`, contractions in lower case.
    Gpt2,
    /// GPT-4 (`cl100k`), Llama-3 and Qwen2: any one character before letters, at most `digits` digits.
    Cl100k { digits: usize },
    /// GPT-4o (`o200k`): words also end between a lower-case and an upper-case letter. `contractions` belong
    /// to the word before them; Tekken (Mistral Nemo) has none.
    O200k { digits: usize, contractions: bool },
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The same as tiktoken writes it.
const GPT2_SHORT: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As tiktoken writes it. The possessive quantifiers make no difference, since the next class never matches
/// what they took; and `\s*[\r\n]` ends at the last line break of the white space, as `\s*[\r\n]+` does.
const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

// Classes of characters, one bit each. Punctuation, symbols, marks and unassigned characters are in none of
// the first three.
const LETTER: u8 = 1;
const DIGIT: u8 = 2;
const SPACE: u8 = 4;
const LINE_BREAK: u8 = 8;
/// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`, which starts a word of `o200k`.
const UPPER: u8 = 16;
/// `[\p{Ll}\p{Lm}\p{Lo}\p{M}]`, which continues it.
const LOWER: u8 = 32;

/// All supported expressions, for tests.
#[cfg(test)]
pub(super) const KNOWN: [&str; 7] = [GPT2, GPT2_SHORT, LLAMA3, QWEN2, CL100K, O200K, TEKKEN];

impl Pretokeniser {
    /// The expression of a pre-tokenizer that only splits by it and encodes bytes as characters; and whether
    /// digits ([`char::is_numeric`]) are split off first, as in StarCoder and SmolLM.
    pub fn of(pre_tokenizer: &PreTokenizerWrapper) -> Option<(Pretokeniser, bool)> {
        let gpt2 = |bytes: &ByteLevel| !bytes.add_prefix_space && bytes.use_regex;
        let bytes_only = |bytes: &ByteLevel| !bytes.add_prefix_space && !bytes.use_regex;
        match pre_tokenizer {
            PreTokenizerWrapper::ByteLevel(bytes) if gpt2(bytes) => Some((Pretokeniser::Gpt2, false)),
            PreTokenizerWrapper::Sequence(sequence) => match sequence.as_ref() {
                [PreTokenizerWrapper::Split(split), PreTokenizerWrapper::ByteLevel(bytes)]
                    if bytes_only(bytes) =>
                {
                    Pretokeniser::of_split(split).map(|pretokeniser| (pretokeniser, false))
                }
                [PreTokenizerWrapper::Digits(digits), PreTokenizerWrapper::ByteLevel(bytes)]
                    if digits.individual_digits && gpt2(bytes) =>
                {
                    Some((Pretokeniser::Gpt2, true))
                }
                _ => None,
            },
            _ => None,
        }
    }

    fn of_split(split: &Split) -> Option<Pretokeniser> {
        // Matches cover the text, so dropping the text between them drops nothing.
        let isolated = match split.behavior {
            SplitDelimiterBehavior::Isolated => true,
            SplitDelimiterBehavior::Removed => split.invert,
            _ => false,
        };
        let SplitPattern::Regex(regex) = &split.pattern else { return None };
        match regex.as_str() {
            _ if !isolated => None,
            GPT2 | GPT2_SHORT => Some(Pretokeniser::Gpt2),
            LLAMA3 | CL100K => Some(Pretokeniser::Cl100k { digits: 3 }),
            QWEN2 => Some(Pretokeniser::Cl100k { digits: 1 }),
            O200K => Some(Pretokeniser::O200k { digits: 3, contractions: true }),
            TEKKEN => Some(Pretokeniser::O200k { digits: 1, contractions: false }),
            _ => None,
        }
    }

    /// The end of the piece that starts at byte `at`, which must be before the end of the text.
    #[inline]
    pub fn piece_end(self, text: &str, at: usize) -> usize {
        let text = Text(text);
        match self {
            Pretokeniser::Gpt2 => text.gpt2(at),
            Pretokeniser::Cl100k { digits } => text.cl100k(at, digits),
            Pretokeniser::O200k { digits, contractions } => text.o200k(at, digits, contractions),
        }
    }
}

/// A text with the classes of its characters.
#[derive(Clone, Copy)]
struct Text<'a>(&'a str);

impl Text<'_> {
    /// The classes and the length of the character at a byte; 0 and 0 at the end of the text.
    #[inline]
    fn at(self, at: usize) -> (u8, usize) {
        match self.0.as_bytes().get(at) {
            Some(&byte) if byte < 0x80 => (ASCII[byte as usize], 1),
            Some(_) => beyond_ascii(self.0, at),
            None => (0, 0),
        }
    }

    fn byte(self, at: usize) -> Option<u8> {
        self.0.as_bytes().get(at).copied()
    }

    /// The end of the run of characters from `at` that have one of `classes`.
    #[inline]
    fn run(self, mut at: usize, classes: u8) -> usize {
        loop {
            let (class, length) = self.at(at);
            if class & classes == 0 {
                return at;
            }
            at += length;
        }
    }

    /// `[^\s\p{L}\p{N}]*`
    #[inline]
    fn symbols(self, mut at: usize) -> usize {
        loop {
            let (class, length) = self.at(at);
            if length == 0 || class & (LETTER | DIGIT | SPACE) != 0 {
                return at;
            }
            at += length;
        }
    }

    fn is_symbol(self, at: usize) -> bool {
        let (class, length) = self.at(at);
        length > 0 && class & (LETTER | DIGIT | SPACE) == 0
    }

    /// `\p{N}{1,limit}`, starting at a digit.
    #[inline]
    fn digits(self, mut at: usize, limit: usize) -> usize {
        for _ in 0..limit {
            let (class, length) = self.at(at);
            if class & DIGIT == 0 {
                break;
            }
            at += length;
        }
        at
    }

    /// `\s+(?!\S)|\s+`: white space, without its last character if other text follows. With `lines`,
    /// `\s*[\r\n]+` comes first: white space up to its last line break.
    #[inline]
    fn white_space(self, start: usize, lines: bool) -> usize {
        let (mut at, mut last, mut line) = (start, start, None);
        loop {
            let (class, length) = self.at(at);
            if class & SPACE == 0 {
                break;
            }
            last = at;
            at += length;
            if class & LINE_BREAK != 0 {
                line = Some(at);
            }
        }
        match line {
            Some(end) if lines => end,
            _ if at == self.0.len() || last == start => at,
            _ => last,
        }
    }

    /// The end of `'s|'t|'re|'ve|'m|'ll|'d` at `at`, if it matches. Ignoring case, `'ſ` is `'s`.
    #[inline]
    fn contraction(self, at: usize, any_case: bool) -> Option<usize> {
        if self.byte(at) != Some(b'\'') {
            return None;
        }
        let letter = |at: usize| match self.byte(at) {
            Some(byte) if any_case => byte.to_ascii_lowercase(),
            byte => byte.unwrap_or(0),
        };
        match (letter(at + 1), letter(at + 2)) {
            (b's' | b't' | b'm' | b'd', _) => Some(at + 2),
            (b'r' | b'v', b'e') | (b'l', b'l') => Some(at + 3),
            _ if any_case && self.0.as_bytes()[at + 1..].starts_with("ſ".as_bytes()) => Some(at + 3),
            _ => None,
        }
    }

    #[inline]
    fn gpt2(self, start: usize) -> usize {
        if let Some(end) = self.contraction(start, false) {
            return end;
        }
        // After the optional space the next character decides, unless it is white space too.
        let mut at = start;
        let (mut class, mut length) = self.at(at);
        if self.byte(at) == Some(b' ') {
            let (next, next_length) = self.at(at + 1);
            if next_length > 0 && next & SPACE == 0 {
                (at, class, length) = (at + 1, next, next_length);
            }
        }
        match class {
            _ if class & LETTER != 0 => self.run(at + length, LETTER),
            _ if class & DIGIT != 0 => self.run(at + length, DIGIT),
            _ if class & SPACE != 0 => self.white_space(start, false),
            _ => self.symbols(at + length),
        }
    }

    #[inline]
    fn cl100k(self, start: usize, digits: usize) -> usize {
        if let Some(end) = self.contraction(start, true) {
            return end;
        }
        let (class, length) = self.at(start);
        let next = start + length;
        if class & LETTER != 0 {
            return self.run(next, LETTER);
        }
        if class & DIGIT != 0 {
            return self.digits(start, digits);
        }
        if class & LINE_BREAK == 0 {
            let (class, length) = self.at(next);
            if class & LETTER != 0 {
                return self.run(next + length, LETTER);
            }
        }
        self.symbols_or_space(start, class, next, b"\r\n")
    }

    /// ` ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`, with which all newer expressions end. `tail`:
    /// the characters that may follow symbols.
    #[inline]
    fn symbols_or_space(self, start: usize, class: u8, next: usize, tail: &[u8]) -> usize {
        let spaced = self.byte(start) == Some(b' ') && self.is_symbol(next);
        if class & SPACE != 0 && !spaced {
            return self.white_space(start, true);
        }
        let mut at = self.symbols(next);
        while self.byte(at).is_some_and(|byte| tail.contains(&byte)) {
            at += 1;
        }
        at
    }

    #[inline]
    fn o200k(self, start: usize, digits: usize, contractions: bool) -> usize {
        let (class, length) = self.at(start);
        let next = start + length;
        if class & DIGIT != 0 {
            return self.digits(start, digits);
        }
        // The optional first character is tried first, and left out if no word follows it; only a mark can be
        // either.
        let mut word = None;
        if class & (LETTER | LINE_BREAK) == 0 {
            word = self.lower_word(next);
        }
        if word.is_none() && class & (UPPER | LOWER) != 0 {
            word = self.lower_word(start);
        }
        if word.is_none() {
            // No lower-case letter: the second alternative, capitals only.
            let from = if class & LETTER != 0 { start } else { next };
            if class & LINE_BREAK == 0 && self.at(from).0 & UPPER != 0 {
                word = Some(self.run(from, UPPER));
            }
        }
        match word {
            Some(end) if contractions => self.contraction(end, true).unwrap_or(end),
            Some(end) => end,
            None => self.symbols_or_space(start, class, next, b"\r\n/"),
        }
    }

    /// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+`. If no lower-case letter follows the
    /// capitals, they are backtracked to the last character that is in both classes.
    #[inline]
    fn lower_word(self, start: usize) -> Option<usize> {
        let (mut at, mut both) = (start, None);
        loop {
            let (class, length) = self.at(at);
            if class & UPPER == 0 {
                break;
            }
            at += length;
            if class & LOWER != 0 {
                both = Some(at);
            }
        }
        let end = self.run(at, LOWER);
        if end > at { Some(end) } else { both }
    }
}

const ASCII: [u8; 128] = {
    let mut classes = [0; 128];
    let mut at = 0;
    while at < 128 {
        classes[at] = match at as u8 {
            b'a'..=b'z' => LETTER | LOWER,
            b'A'..=b'Z' => LETTER | UPPER,
            b'0'..=b'9' => DIGIT,
            b'\r' | b'\n' => SPACE | LINE_BREAK,
            b'\t' | 0x0B | 0x0C | b' ' => SPACE,
            _ => 0,
        };
        at += 1;
    }
    classes
};

#[inline]
fn beyond_ascii(text: &str, at: usize) -> (u8, usize) {
    let Some(character) = text[at..].chars().next() else { return (0, 0) };
    (CLASSES[character as usize], character.len_utf8())
}

/// The classes of all code points, from the tables of regex-syntax: Unicode 16, as in Oniguruma. A table of
/// one byte per code point is the fastest look-up, as a text touches few of its pages; building it takes 0.4
/// ms.
static CLASSES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut classes = vec![0; 0x11_0000];
    let bits = [
        (r"\p{L}", LETTER),
        (r"\p{N}", DIGIT),
        (r"\s", SPACE),
        (r"[\r\n]", LINE_BREAK),
        (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", UPPER),
        (r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", LOWER),
    ];
    for (class, bit) in bits {
        let hir = regex_syntax::parse(class).expect("a class");
        let HirKind::Class(Class::Unicode(class)) = hir.kind() else { unreachable!("a Unicode class") };
        for range in class.ranges() {
            for code in &mut classes[range.start() as usize..=range.end() as usize] {
                *code |= bit;
            }
        }
    }
    classes
});

//! Fuzzing of parsers within a test: inputs are damaged from a seed, in the ways in which files get damaged.
//!
//! A test runs a few hundred inputs, always the same. With `SUASION_FUZZ_SECONDS` it runs for that long, from a seed
//! that depends on the clock, and prints the number of inputs; an input that panics is saved in the temporary folder.

use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Number of inputs without `SUASION_FUZZ_SECONDS`.
const FEW: u64 = 300;

/// With `SUASION_FUZZ_SECONDS`, an input that takes longer counts as a hang.
const LONG: Duration = Duration::from_secs(20);

/// A stream of pseudo-random numbers (SplitMix64).
pub struct Numbers(pub u64);

impl Numbers {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.draw() % n as u64) as usize
    }
}

/// Byte strings that text formats often mishandle.
const WORDS: [&[u8]; 28] = [
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"true",
    b"-",
    b"1e999",
    b"-0.0",
    b"99999999999999999999",
    b"\\u0000",
    b"\\ud800",
    b"\\",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"{{",
    b"}}",
    b"{%",
    b"%}",
    b"{#",
    b"{% for x in y %}",
    b"\xf0\x9f\x99\x82",
];

/// The input with one or a few faults: bits, bytes, cuts, insertions, repetitions, lengths, another input's bytes.
pub fn damaged(input: &[u8], other: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut data = input.to_vec();
    for _ in 0..[1, 1, 1, 2, 6][numbers.below(5)] {
        let at = numbers.below(data.len() + 1);
        match numbers.below(9) {
            0 if at < data.len() => data[at] ^= 1 << numbers.below(8),
            1 if at < data.len() => data[at] = numbers.below(256) as u8,
            2 => data.truncate(at),
            3 => drop(data.drain(at..data.len().min(at + 1 + numbers.below(40)))),
            4 => drop(data.splice(at..at, WORDS[numbers.below(WORDS.len())].iter().copied())),
            5 => {
                let end = data.len().min(at + 1 + numbers.below(100));
                let copy = data[at..end].repeat(1 + numbers.below(3));
                data.splice(at..at, copy);
            }
            6 if data.len() >= 8 => {
                let at = at.min(data.len() - 8);
                let value = [0u64, 1, u64::MAX, 1 << 31, 1 << 32, 1 << 62, 255, 65536][numbers.below(8)];
                data[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            7 if !other.is_empty() => {
                let from = numbers.below(other.len());
                let to = other.len().min(from + 1 + numbers.below(200));
                data.splice(at..at, other[from..to].iter().copied());
            }
            8 => {
                let depth = 1 + numbers.below(2000);
                let bracket = [b'[', b'{', b'('][numbers.below(3)];
                data.splice(at..at, std::iter::repeat_n(bracket, depth));
            }
            _ => {}
        }
    }
    data
}

/// A parser of untrusted bytes, run on damaged inputs by the tests and by the fuzzer in `fuzz/`.
pub trait Parser {
    /// Its name.
    const NAME: &'static str;

    /// Number of kinds of input; the first byte of an input selects one. A single kind needs no such byte.
    const KINDS: usize = 1;

    /// Valid inputs, with their kinds.
    fn seeds() -> Vec<(usize, Vec<u8>)>;

    /// Everything that it needs besides its input, created once.
    fn new() -> Self;

    /// Reads an input. Errors are fine, panics are not.
    fn parse(&mut self, kind: usize, bytes: &[u8]);
}

/// The valid inputs of a parser, in the form that [`parse`] takes.
pub fn inputs<P: Parser>() -> Vec<Vec<u8>> {
    let marked = |(kind, bytes): (usize, Vec<u8>)| match P::KINDS {
        1 => bytes,
        _ => [&[kind as u8][..], &bytes].concat(),
    };
    P::seeds().into_iter().map(marked).collect()
}

/// Parses an input, after its byte for the kind.
pub fn parse<P: Parser>(parser: &mut P, bytes: &[u8]) {
    match (P::KINDS, bytes.split_first()) {
        (1, _) => parser.parse(0, bytes),
        (kinds, Some((kind, rest))) => parser.parse(usize::from(*kind) % kinds, rest),
        (_, None) => {}
    }
}

/// Two parsers combined, under the first one's name.
pub struct Both<A, B>(A, B);

impl<A: Parser, B: Parser> Parser for Both<A, B> {
    const NAME: &'static str = A::NAME;
    const KINDS: usize = A::KINDS + B::KINDS;

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        let second = B::seeds().into_iter().map(|(kind, bytes)| (kind + A::KINDS, bytes));
        A::seeds().into_iter().chain(second).collect()
    }

    fn new() -> Self {
        Both(A::new(), B::new())
    }

    fn parse(&mut self, kind: usize, bytes: &[u8]) {
        match kind.checked_sub(A::KINDS) {
            None => self.0.parse(kind, bytes),
            Some(kind) => self.1.parse(kind, bytes),
        }
    }
}

/// Consumes a result: it only matters that it was reached.
pub fn reached<T, E: Debug>(result: Result<T, E>) {
    let _ = format!("{:?}", result.err());
}

/// Runs a parser on damaged versions of its valid inputs.
///
/// # Panics
/// If the parser panics or takes very long; the input is saved.
pub fn run<P: Parser>() {
    let (name, inputs, mut parser) = (P::NAME, inputs::<P>(), P::new());
    let seconds = std::env::var("SUASION_FUZZ_SECONDS").ok().and_then(|text| text.parse::<u64>().ok());
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64);
    let mut numbers = Numbers(seconds.map_or(1, |_| clock()));
    let started = Instant::now();
    let mut runs = 0u64;
    while seconds.map_or(runs < FEW, |seconds| started.elapsed().as_secs() < seconds) {
        let (one, other) = (numbers.below(inputs.len()), numbers.below(inputs.len()));
        let data = damaged(&inputs[one], &inputs[other], &mut numbers);
        let began = Instant::now();
        let panicked = catch_unwind(AssertUnwindSafe(|| parse(&mut parser, &data))).is_err();
        let hung = seconds.is_some() && began.elapsed() > LONG;
        if panicked || hung {
            let path = std::env::temp_dir().join(format!("suasion-fuzz-{name}-{runs}"));
            let kept = std::fs::write(&path, &data);
            let what = if panicked { "panics" } else { "takes very long" };
            panic!("{name}: an input {what}: {} ({kept:?})", path.display());
        }
        runs += 1;
    }
    if seconds.is_some() {
        eprintln!("fuzzed {name}: {runs} inputs in {} s", started.elapsed().as_secs());
    }
}

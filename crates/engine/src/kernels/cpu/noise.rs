//! Dropout and noise, element by element. No mask is stored: the random words are a function of an element's position.

use super::super::random::{Draw, Dropout, GROUP, symmetric};
use super::ROWS;
use super::simd::vectorized;
use rayon::prelude::*;

/// See [`super::Backend::dropout`].
pub(super) fn dropout(x: &mut [f32], width: usize, dropout: Dropout) {
    let rows = x.par_chunks_mut(width).enumerate().with_min_len(ROWS);
    rows.for_each(|(row, x)| drop_row(x, 0, row as u64, dropout));
}

/// See [`super::Backend::add_noise`].
pub(super) fn add_noise(x: &mut [f32], sizes: &[f32], width: usize, draw: Draw) {
    let rows = x.par_chunks_mut(width).zip(sizes).enumerate().with_min_len(ROWS);
    rows.for_each(|(row, (x, size))| shake_row(x, row as u64, *size, draw));
}

vectorized! {
    /// Applies dropout to part of a row: `x` holds its columns from `first` on.
    pub(super) fn drop_row(x: &mut [f32], first: usize, row: u64, dropout: Dropout) {
        // Compared as 32-bit words, so a rate of 1 is handled by `kept`, which is then 0.
        let (limit, kept) = (dropout.limit().min(u64::from(u32::MAX)) as u32, dropout.kept());
        each(x, first, row, dropout.draw, |x, word| *x *= if word < limit { 0.0 } else { kept });
    }
}

vectorized! {
    /// `x += size · u` with `u` uniform in [−1, 1).
    fn shake_row(x: &mut [f32], row: u64, size: f32, draw: Draw) {
        each(x, 0, row, draw, |x, word| *x += size * symmetric(word));
    }
}

/// Calls `f` with each element and its random word.
#[inline(always)]
fn each(x: &mut [f32], first: usize, row: u64, draw: Draw, f: impl Fn(&mut f32, u32)) {
    let (mut x, mut at) = (x, first);
    while !x.is_empty() {
        let words = draw.group(row, at / GROUP);
        let skipped = at % GROUP;
        let count = (GROUP - skipped).min(x.len());
        let (now, rest) = x.split_at_mut(count);
        for (x, word) in now.iter_mut().zip(&words[skipped..]) {
            f(x, *word);
        }
        (x, at) = (rest, at + count);
    }
}

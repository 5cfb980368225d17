//! Random numbers that this crate defines, so that a seed gives the same run in every release. Only the
//! ChaCha8 key stream, a published function, comes from a library.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng};

/// The use of the numbers. It is part of the key, so that one seed gives independent streams.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    Shuffle,
    Sampling,
    Bootstrap,
    Noise,
}

pub(crate) struct Rng(ChaCha8Rng);

impl Rng {
    /// The key is the seed in little-endian order, then the purpose in ASCII, then zeros. `stream` is
    /// ChaCha's nonce.
    pub(crate) fn new(seed: u64, purpose: Purpose, stream: u64) -> Rng {
        let name: &[u8] = match purpose {
            Purpose::Shuffle => b"suasion shuffle",
            Purpose::Sampling => b"suasion sampling",
            Purpose::Bootstrap => b"suasion bootstrap",
            Purpose::Noise => b"suasion noise",
        };
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..8 + name.len()].copy_from_slice(name);
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(stream);
        Rng(rng)
    }

    /// A uniform integer in `0..n`: Lemire's multiplication with rejection (arXiv 1805.10941, algorithm 5) on
    /// 64-bit draws.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "the range is empty");
        let mut product = u128::from(self.0.next_u64()) * u128::from(n);
        if (product as u64) < n {
            let threshold = n.wrapping_neg() % n;
            while (product as u64) < threshold {
                product = u128::from(self.0.next_u64()) * u128::from(n);
            }
        }
        (product >> 64) as u64
    }

    /// A draw of 64 bits.
    pub(crate) fn word(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number in `[0, 1)`: the top 53 bits of a draw.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_integers_are_unbiased() {
        // With n = 3·2^62 a plain modulo would give the lower third of the values half of all draws.
        let n = 3u64 << 62;
        let mut rng = Rng::new(1, Purpose::Shuffle, 0);
        let low = (0..30_000).filter(|_| rng.below(n) < (1u64 << 62)).count() as f64 / 30_000.0;
        assert!((low - 1.0 / 3.0).abs() < 0.012, "share of the lower third: {low}");
        let mut seen = [0u32; 7];
        (0..70_000).for_each(|_| seen[rng.below(7) as usize] += 1);
        assert!(seen.iter().all(|&n| (9_600..10_400).contains(&n)), "{seen:?}");
    }

    #[test]
    fn purposes_and_streams_differ() {
        let first = |purpose, stream| Rng::new(9, purpose, stream).below(u64::MAX);
        let all = [first(Purpose::Shuffle, 0), first(Purpose::Shuffle, 1), first(Purpose::Sampling, 0)];
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
        assert_eq!(first(Purpose::Shuffle, 0), all[0]);
    }
}

//! A pseudorandom order that needs no memory.

use xxhash_rust::xxh3::xxh3_64_with_seed;

const ROUNDS: u64 = 4;

/// A permutation of `0..len`: a Feistel network over the next power of four, walked until it
/// stays below `len` (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
pub(super) struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; ROUNDS as usize],
}

impl Permutation {
    /// The permutation number `index` of `seed`.
    pub fn new(len: u64, seed: u64, index: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let key = |round: u64| {
            let bytes = [index.to_le_bytes(), round.to_le_bytes()].concat();
            xxh3_64_with_seed(&bytes, seed)
        };
        Self {
            len,
            half_bits: bits.div_ceil(2).max(1),
            keys: std::array::from_fn(|round| key(round as u64)),
        }
    }

    /// The number at `position`, which must be below `len`.
    pub fn get(&self, position: u64) -> u64 {
        debug_assert!(position < self.len);
        let mut value = self.encrypt(position);
        while value >= self.len {
            value = self.encrypt(value);
        }
        value
    }

    fn encrypt(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            let hash = xxh3_64_with_seed(&right.to_le_bytes(), key);
            (left, right) = (right, left ^ (hash & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(len: u64, seed: u64, index: u64) -> Vec<u64> {
        let permutation = Permutation::new(len, seed, index);
        (0..len).map(|position| permutation.get(position)).collect()
    }

    proptest::proptest! {
        #[test]
        fn holds_every_number_once(len in 1_u64..2000, seed: u64, index: u64) {
            let mut order = order(len, seed, index);
            order.sort_unstable();
            proptest::prop_assert_eq!(order, (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn differs_by_seed_and_index_and_mixes() {
        let n = 10_000;
        let base = order(n, 1, 0);
        assert_eq!(base, order(n, 1, 0));
        for other in [order(n, 2, 0), order(n, 1, 1)] {
            let equal = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(equal < 10, "{equal} of {n} places are equal");
        }
        // Rank correlation with the identity, of standard deviation 1/sqrt(n) = 0.01.
        let mean = (n - 1) as f64 / 2.0;
        let covariance: f64 = base
            .iter()
            .enumerate()
            .map(|(i, &value)| (i as f64 - mean) * (value as f64 - mean))
            .sum();
        let variance: f64 = (0..n).map(|i| (i as f64 - mean).powi(2)).sum();
        assert!((covariance / variance).abs() < 0.05);
    }
}

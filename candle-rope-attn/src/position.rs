//! Tables of position encodings, shared by every device: cosines and sines of RoPE, and the bias
//! of each distance.

use std::sync::{Arc, Mutex, PoisonError};

use crate::spec::{PositionEncoding, RelativeBias, Rope, RopePairing};

/// Cosines and sines of the angles `position * inv_freq[i]`, each `[positions, head_dim / 2]`.
#[derive(Debug)]
pub(crate) struct RopeTable {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl RopeTable {
    fn new(inv_freq: &[f32], positions: usize) -> Self {
        // f32 angles would be off by 1e-4 radians at position 2000.
        let angles = (0..positions).flat_map(|position| {
            inv_freq
                .iter()
                .map(move |&f| position as f64 * f64::from(f))
        });
        let (sin, cos) = angles
            .map(|angle| (angle.sin() as f32, angle.cos() as f32))
            .unzip();
        Self { cos, sin }
    }

    /// The table of `rope` for at least so many positions. Layers and steps share it.
    pub fn cached(rope: &Rope, positions: usize) -> Arc<Self> {
        static CACHE: Mutex<RopeCache> = Mutex::new(RopeCache(Vec::new()));
        let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
        cache.get(&rope.inv_freq, positions)
    }
}

/// The longest table so far of each list of frequencies; those used last are at the end.
struct RopeCache(Vec<(Vec<f32>, Arc<RopeTable>)>);

impl RopeCache {
    /// Frequencies in use at a time.
    const CAPACITY: usize = 16;

    fn get(&mut self, inv_freq: &[f32], positions: usize) -> Arc<RopeTable> {
        let found = self.0.iter().position(|(key, _)| key == inv_freq);
        let table = found
            .map(|at| self.0.remove(at).1)
            .filter(|table| table.cos.len() >= positions * inv_freq.len())
            .unwrap_or_else(|| Arc::new(RopeTable::new(inv_freq, positions.next_power_of_two())));
        if self.0.len() == Self::CAPACITY {
            self.0.remove(0);
        }
        self.0.push((inv_freq.to_vec(), table.clone()));
        table
    }
}

/// Rotates rows on the CPU.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    table: Arc<RopeTable>,
    half: usize,
    pairing: RopePairing,
}

/// Which way to turn: gradients turn backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Forward,
    Backward,
}

impl Rotation {
    /// For positions below `positions`.
    pub fn new(rope: &Rope, positions: usize) -> Self {
        Self {
            table: RopeTable::cached(rope, positions),
            half: rope.inv_freq.len(),
            pairing: rope.pairing,
        }
    }

    /// Turns one head's row `[head_dim]` in place.
    pub fn apply(&self, row: &mut [f32], position: usize, turn: Turn) {
        let angles = position * self.half..(position + 1) * self.half;
        let sign = match turn {
            Turn::Forward => 1.0,
            Turn::Backward => -1.0,
        };
        let angles = self.table.cos[angles.clone()]
            .iter()
            .zip(&self.table.sin[angles]);
        let rotate = |x0: &mut f32, x1: &mut f32, cos: f32, sin: f32| {
            (*x0, *x1) = (*x0 * cos - *x1 * sin, *x0 * sin + *x1 * cos);
        };
        match self.pairing {
            RopePairing::HalfSplit => {
                let (first, second) = row.split_at_mut(self.half);
                for ((x0, x1), (&cos, &sin)) in first.iter_mut().zip(second).zip(angles) {
                    rotate(x0, x1, cos, sign * sin);
                }
            }
            RopePairing::Interleaved => {
                for ([x0, x1], (&cos, &sin)) in row.as_chunks_mut().0.iter_mut().zip(angles) {
                    rotate(x0, x1, cos, sign * sin);
                }
            }
        }
    }
}

/// The bias of every distance `key - query` between positions below `seqlen`:
/// `[num_heads, 2 * seqlen - 1]`, distance 0 in the middle.
#[derive(Debug, Clone)]
pub(crate) struct BiasTable {
    pub values: Vec<f32>,
    pub seqlen: usize,
}

impl BiasTable {
    /// None for encodings without a bias. `weight` is that of a [`RelativeBias`].
    pub fn new(
        position: &PositionEncoding,
        weight: Option<&[f32]>,
        num_heads: usize,
        seqlen: usize,
    ) -> Option<Self> {
        let values = match (position, weight) {
            (PositionEncoding::Alibi(alibi), _) => (alibi.slopes.iter())
                .flat_map(|&slope| {
                    distances(seqlen).map(move |distance| -slope * distance.unsigned_abs() as f32)
                })
                .collect(),
            (PositionEncoding::RelativeBias(bias), Some(weight)) => (0..num_heads)
                .flat_map(|head| {
                    distances(seqlen).map(move |d| weight[bias.bucket(d) * num_heads + head])
                })
                .collect(),
            _ => return None,
        };
        Some(Self { values, seqlen })
    }

    /// The table of each head.
    pub fn heads(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(table_len(self.seqlen))
    }
}

/// Gradient of the weight `[num_buckets, num_heads]` from the table's, `[num_heads, 2 * seqlen - 1]`.
pub(crate) fn fold_bias_gradient(
    bias: &RelativeBias,
    table: &[f64],
    num_heads: usize,
    seqlen: usize,
) -> Vec<f32> {
    let mut weight = vec![0.0; bias.num_buckets * num_heads];
    for (head, table) in table.chunks_exact(table_len(seqlen)).enumerate() {
        for (distance, gradient) in distances(seqlen).zip(table) {
            weight[bias.bucket(distance) * num_heads + head] += gradient;
        }
    }
    weight.into_iter().map(|gradient| gradient as f32).collect()
}

/// Every distance between positions below `seqlen`, ascending.
pub(crate) fn distances(seqlen: usize) -> std::ops::RangeInclusive<i64> {
    let last = seqlen as i64 - 1;
    -last..=last
}

/// Number of these distances, 1 for no position at all.
pub(crate) fn table_len(seqlen: usize) -> usize {
    (2 * seqlen).max(2) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_grow_and_are_shared() {
        let mut cache = RopeCache(Vec::new());
        let inv_freq = [0.125, 0.0625];
        let table = cache.get(&inv_freq, 3);
        assert!(Arc::ptr_eq(&table, &cache.get(&inv_freq, 4)));
        let longer = cache.get(&inv_freq, 5);
        assert_eq!(longer.cos[..8], table.cos[..8]);
        assert_eq!(longer.sin[9], (4.0f64 * 0.0625).sin() as f32);
        assert!(Arc::ptr_eq(&longer, &cache.get(&inv_freq, 3)));
    }

    #[test]
    fn the_table_unused_for_longest_leaves_a_full_cache() {
        let mut cache = RopeCache(Vec::new());
        let mut get = |i: usize, positions| cache.get(&[i as f32], positions);
        let tables: Vec<_> = (0..RopeCache::CAPACITY).map(|i| get(i, 1)).collect();
        // A longer table takes the place of its shorter one.
        get(0, 100);
        assert!(Arc::ptr_eq(&tables[1], &get(1, 1)));
        get(RopeCache::CAPACITY, 1);
        assert!(Arc::ptr_eq(&tables[1], &get(1, 1)));
        assert!(!Arc::ptr_eq(&tables[2], &get(2, 1)));
    }

    #[test]
    fn a_turn_back_undoes_a_turn() {
        for pairing in [RopePairing::HalfSplit, RopePairing::Interleaved] {
            let rotation = Rotation::new(&Rope::from_inv_freq(vec![0.7, 0.3], pairing), 6);
            let mut row = [1.0, 2.0, 3.0, 4.0];
            rotation.apply(&mut row, 5, Turn::Forward);
            assert!((row[0] - 1.0).abs() > 0.5);
            rotation.apply(&mut row, 5, Turn::Backward);
            for (x, expected) in row.iter().zip([1.0, 2.0, 3.0, 4.0]) {
                assert!((x - expected).abs() < 1e-6);
            }
        }
    }
}

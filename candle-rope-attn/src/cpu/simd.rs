//! Vector loops over blocks of scores.
//!
//! A block is `[keys, width]`, one row a key and one column a query, so that every loop runs along
//! contiguous queries and no sum crosses lanes. `width` is a multiple of [`LANES`]. The loops are
//! plain Rust that the compiler vectorises.

use crate::ops::cpu::vectorized;
use crate::philox::DropoutMask;

/// Columns that the loops handle at a time.
pub(super) const LANES: usize = 16;

type Lanes = [f32; LANES];

fn lanes(row: &[f32]) -> &[Lanes] {
    row.as_chunks().0
}

fn lanes_mut(row: &mut [f32]) -> &mut [Lanes] {
    row.as_chunks_mut().0
}

/// `2^x` to 2e-7 relative, 0 below -126, NaN of NaN. Not for x above 127.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    // 1.5 * 2^23: a sum with it has the nearest integer to x in its low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x + ROUND;
    let fraction = x - (rounded - ROUND);
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1f32.to_bits()));
    // Coefficients of Cephes' exp2f.
    let polynomial = [
        1.339_887_4e-3,
        9.618_437e-3,
        5.550_332_5e-2,
        2.402_264_8e-1,
        6.931_472e-1,
        1.0,
    ]
    .into_iter()
    .fold(1.535_336_2e-4, |sum: f32, c| sum.mul_add(fraction, c));
    if x < -126.0 { 0.0 } else { polynomial * power }
}

/// Running softmax of the columns of the blocks seen so far.
pub(super) struct OnlineSoftmax {
    /// Largest score of each query, in log2 units.
    max: Vec<f32>,
    /// Sum of `2^(score - max)` of each query.
    sum: Vec<f32>,
    /// Factor that the last block brought to earlier sums.
    rescale: Vec<f32>,
}

impl OnlineSoftmax {
    pub fn new(width: usize) -> Self {
        Self {
            max: vec![f32::NEG_INFINITY; width],
            sum: vec![0.0; width],
            rescale: vec![0.0; width],
        }
    }

    /// Takes in a block of scores (log2 units, -inf = masked) and replaces them by
    /// `2^(score - max)`.
    pub fn update(&mut self, scores: &mut [f32]) {
        let width = self.max.len();
        let (max, sum) = (lanes_mut(&mut self.max), lanes_mut(&mut self.sum));
        let rescale = lanes_mut(&mut self.rescale);
        vectorized(
            #[inline(always)]
            || {
                rescale.copy_from_slice(max);
                for row in scores.chunks_exact(width) {
                    for (max, scores) in max.iter_mut().zip(lanes(row)) {
                        for i in 0..LANES {
                            max[i] = if scores[i] > max[i] {
                                scores[i]
                            } else {
                                max[i]
                            };
                        }
                    }
                }
                for ((max, sum), rescale) in max.iter().zip(&mut *sum).zip(rescale) {
                    for i in 0..LANES {
                        rescale[i] = exp2(rescale[i] - or_zero(max[i]));
                        sum[i] *= rescale[i];
                    }
                }
                for row in scores.chunks_exact_mut(width) {
                    for ((max, sum), scores) in max.iter().zip(&mut *sum).zip(lanes_mut(row)) {
                        for i in 0..LANES {
                            scores[i] = exp2(scores[i] - or_zero(max[i]));
                            sum[i] += scores[i];
                        }
                    }
                }
            },
        );
    }

    /// What each column of sums is divided by in the end, inverted; 0 where no key was seen.
    pub fn normalizers(&self) -> Vec<f32> {
        let invert = |&sum: &f32| if sum == 0.0 { 0.0 } else { 1.0 / sum };
        self.sum.iter().map(invert).collect()
    }

    /// Each query's log-sum-exp in log2 units, -inf where no key was seen.
    pub fn lse(&self) -> Vec<f32> {
        let columns = self.max.iter().zip(&self.sum);
        columns.map(|(max, sum)| max + sum.log2()).collect()
    }

    /// Multiplies each column of `[rows, width]` sums by the factor of the last block.
    pub fn rescale(&self, sums: &mut [f32]) {
        scale_columns(sums, &self.rescale);
    }
}

/// 0 in place of -inf, the maximum of a query that has seen no key, so that `-inf - max` is no NaN.
#[inline(always)]
fn or_zero(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// Multiplies row by row with `factors`.
pub(super) fn scale_columns(block: &mut [f32], factors: &[f32]) {
    vectorized(
        #[inline(always)]
        || {
            for row in block.chunks_exact_mut(factors.len()) {
                for (x, factor) in row.iter_mut().zip(factors) {
                    *x *= factor;
                }
            }
        },
    );
}

/// Adds a row to another.
pub(super) fn add(sums: &mut [f32], row: &[f32]) {
    vectorized(
        #[inline(always)]
        || {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += x;
            }
        },
    );
}

/// Adds to each row of scores the part of `bias` that begins at the row's place.
pub(super) fn add_bias(
    scores: &mut [f32],
    width: usize,
    bias: &[f32],
    places: impl Iterator<Item = usize>,
) {
    vectorized(
        #[inline(always)]
        || {
            for (scores, place) in scores.chunks_exact_mut(width).zip(places) {
                for (score, bias) in scores.iter_mut().zip(&bias[place..]) {
                    *score += bias;
                }
            }
        },
    );
}

/// The transpose of [`add_bias`]: adds each row to the part of `d_bias` at the row's place.
pub(super) fn add_bias_gradient(
    d_scores: &[f32],
    width: usize,
    d_bias: &mut [f32],
    places: impl Iterator<Item = usize>,
) {
    vectorized(
        #[inline(always)]
        || {
            for (d_scores, place) in d_scores.chunks_exact(width).zip(places) {
                for (sum, d_score) in d_bias[place..].iter_mut().zip(d_scores) {
                    *sum += d_score;
                }
            }
        },
    );
}

/// What dropout multiplies the probabilities of one head and block of queries with.
pub(super) struct DropoutFactors {
    mask: Option<DropoutMask>,
    place: [usize; 2],
    first_query: usize,
    width: usize,
    /// Of four neighbouring keys, which share a block of random words.
    rows: Vec<f32>,
    key_group: Option<usize>,
}

impl DropoutFactors {
    /// Without a mask every factor is 1.
    pub fn new(
        mask: Option<DropoutMask>,
        place: [usize; 2],
        first_query: usize,
        width: usize,
    ) -> Self {
        Self {
            mask,
            place,
            first_query,
            width,
            rows: vec![1.0; 4 * width],
            key_group: None,
        }
    }

    /// The factors of a key, one a query.
    #[inline(always)]
    fn row(&mut self, key: usize) -> &[f32] {
        if let Some(mask) = self.mask
            && self.key_group != Some(key / 4)
        {
            self.key_group = Some(key / 4);
            for first in (0..self.width).step_by(LANES) {
                let keeps = mask.keeps::<LANES>(self.place, self.first_query + first, key / 4);
                for (row, keeps) in self.rows.chunks_exact_mut(self.width).zip(keeps) {
                    for (factor, keep) in row[first..].iter_mut().zip(keeps) {
                        *factor = if keep { mask.scale } else { 0.0 };
                    }
                }
            }
        }
        &self.rows[key % 4 * self.width..][..self.width]
    }

    /// Applies dropout to a block of probabilities.
    pub fn apply(&mut self, probabilities: &mut [f32], keys: &[usize]) {
        if self.mask.is_none() {
            return;
        }
        let rows = probabilities.chunks_exact_mut(self.width).zip(keys);
        vectorized(
            #[inline(always)]
            || {
                for (row, &key) in rows {
                    for (p, factor) in row.iter_mut().zip(self.row(key)) {
                        *p *= factor;
                    }
                }
            },
        );
    }
}

/// The backward pass through dropout and softmax of a block.
pub(super) struct SoftmaxBackward<'a> {
    /// Positions of the block's keys.
    pub keys: &'a [usize],
    /// One entry a query, in log2 units.
    pub lse: &'a [f32],
    /// One entry a query: the sum over keys of probability times gradient.
    pub delta: &'a [f32],
    pub dropout: &'a mut DropoutFactors,
}

impl SoftmaxBackward<'_> {
    /// Takes scores to the dropped-out probabilities that multiplied v, and the gradients of those
    /// to the gradients of the scores.
    pub fn run(self, scores: &mut [f32], gradients: &mut [f32]) {
        let width = self.lse.len();
        let (lse, delta) = (lanes(self.lse), lanes(self.delta));
        let rows = (scores.chunks_exact_mut(width)).zip(gradients.chunks_exact_mut(width));
        vectorized(
            #[inline(always)]
            || {
                for ((scores, gradients), &key) in rows.zip(self.keys) {
                    let columns = lanes_mut(scores).iter_mut().zip(lanes_mut(gradients));
                    let queries = lse.iter().zip(delta).zip(lanes(self.dropout.row(key)));
                    for ((score, gradient), ((lse, delta), factor)) in columns.zip(queries) {
                        for i in 0..LANES {
                            let p = exp2(score[i] - lse[i]);
                            gradient[i] = p * (gradient[i] * factor[i] - delta[i]);
                            score[i] = p * factor[i];
                        }
                    }
                }
            },
        );
    }
}

/// The transpose of a `[rows, columns]` matrix.
pub(super) fn transpose(matrix: &[f32], columns: usize) -> Vec<f32> {
    let rows = matrix.len() / columns;
    let mut out = vec![0.0; matrix.len()];
    // A cache line of each output row at a time.
    for first in (0..rows).step_by(LANES) {
        let last = rows.min(first + LANES);
        for (column, out) in out.chunks_exact_mut(rows).enumerate() {
            for (row, out) in (first..last).zip(&mut out[first..last]) {
                *out = matrix[row * columns + column];
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp2_is_accurate() {
        let worst = (0..200_000)
            .map(|i| -126.0 + i as f32 * (252.0 / 200_000.0))
            .map(|x| (f64::from(exp2(x)) / f64::from(x).exp2() - 1.0).abs())
            .fold(0.0, f64::max);
        assert!(worst < 2e-7, "{worst:e}");
    }

    #[test]
    fn exp2_at_its_limits() {
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp2(-1e30), 0.0);
        assert!(exp2(f32::NAN).is_nan());
    }
}

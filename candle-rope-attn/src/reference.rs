//! Attention and its gradients in f64 and plain loops: what every kernel is tested against.
//!
//! Tensors are row-major `[tokens, num_heads, head_dim]`, where `[batch, seqlen]` inputs have
//! their batch rows end to end. Memory is linear in the length, time is not spared.

use std::ops::Range;

use crate::philox::DropoutMask;
use crate::spec::{AttentionSpec, Dropout, PositionEncoding, Rope, RopePairing, Sequences};

/// The tensors of a call.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[tokens, num_heads, head_dim]`.
    pub q: &'a [f64],
    /// `[tokens, num_heads, head_dim]`.
    pub k: &'a [f64],
    /// `[tokens, num_heads, head_dim]`.
    pub v: &'a [f64],
    /// `[num_buckets, num_heads]` with [`PositionEncoding::RelativeBias`], else empty.
    pub weight: &'a [f64],
}

/// Result of [`forward`].
#[derive(Debug, Clone)]
pub struct Output {
    /// `[tokens, num_heads, head_dim]`.
    pub out: Vec<f64>,
    /// Log-sum-exp of each row's scores, `[tokens, num_heads]`; -inf where it sees no key.
    pub lse: Vec<f64>,
}

/// Result of [`backward`], in the shapes of [`Inputs`].
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Gradient of q.
    pub dq: Vec<f64>,
    /// Gradient of k.
    pub dk: Vec<f64>,
    /// Gradient of v.
    pub dv: Vec<f64>,
    /// Gradient of the relative bias weight.
    pub dweight: Vec<f64>,
}

/// Attention of valid inputs; `batch` is the number of rows of `[batch, seqlen]` inputs and not
/// used with [`Sequences::CuSeqlens`].
pub fn forward(
    spec: &AttentionSpec,
    sequences: &Sequences,
    batch: usize,
    inputs: Inputs<'_>,
) -> Output {
    let problem = Problem::new(spec, sequences, batch, inputs);
    let mut output = Output {
        out: vec![0.0; inputs.q.len()],
        lse: vec![f64::NEG_INFINITY; inputs.q.len() / spec.head_dim],
    };
    problem.for_each_row(|row| {
        output.lse[row.query_row] = row.lse;
        let out = &mut output.out[row.query_features()];
        for key in &row.keys {
            let v = &inputs.v[row.features(key.row)];
            for (out, v) in out.iter_mut().zip(v) {
                *out += key.probability * key.dropout_factor * v;
            }
        }
    });
    output
}

/// Gradients of a function of the output, from its gradient `d_out` there.
pub fn backward(
    spec: &AttentionSpec,
    sequences: &Sequences,
    batch: usize,
    inputs: Inputs<'_>,
    d_out: &[f64],
) -> Gradients {
    let problem = Problem::new(spec, sequences, batch, inputs);
    let mut dq = vec![0.0; inputs.q.len()];
    let mut dk = dq.clone();
    let mut dv = dq.clone();
    let mut dweight = vec![0.0; inputs.weight.len()];
    let scale = f64::from(spec.softmax_scale);
    problem.for_each_row(|row| {
        let query = row.query_features();
        let d_out = &d_out[query.clone()];
        let d_probability = |key: &Key| {
            let v = &inputs.v[row.features(key.row)];
            key.dropout_factor * dot(d_out, v)
        };
        let delta: f64 = (row.keys.iter())
            .map(|key| key.probability * d_probability(key))
            .sum();
        for key in &row.keys {
            let d_score = key.probability * (d_probability(key) - delta);
            if let PositionEncoding::RelativeBias(bias) = &spec.position {
                dweight[bias.bucket(key.distance) * spec.num_heads + row.head] += d_score;
            }
            for (i, feature) in row.features(key.row).enumerate() {
                dv[feature] += key.probability * key.dropout_factor * d_out[i];
                dq[query.start + i] += scale * d_score * problem.k[feature];
                dk[feature] += scale * d_score * problem.q[query.start + i];
            }
        }
    });
    Gradients {
        dq: problem.rotated(dq, -1.0),
        dk: problem.rotated(dk, -1.0),
        dv,
        dweight,
    }
}

/// Whether dropout keeps element (sequence, head, query, key), see [`Dropout`].
pub fn keeps(dropout: Dropout, sequence: usize, head: usize, query: usize, key: usize) -> bool {
    DropoutMask::new(dropout).keeps::<1>([sequence, head], query, key / 4)[key % 4][0]
}

/// Turns rows `[tokens, num_heads, head_dim]` by RoPE, or back with `sign` -1, given the position
/// of each token.
pub fn rotate(rope: &Rope, num_heads: usize, x: &mut [f64], sign: f64, positions: &[usize]) {
    let half = rope.inv_freq.len();
    for (row, x) in x.chunks_exact_mut(2 * half).enumerate() {
        let position = positions[row / num_heads] as f64;
        for (i, &inv_freq) in rope.inv_freq.iter().enumerate() {
            let (first, second) = match rope.pairing {
                RopePairing::HalfSplit => (i, i + half),
                RopePairing::Interleaved => (2 * i, 2 * i + 1),
            };
            let (sin, cos) = (sign * position * f64::from(inv_freq)).sin_cos();
            let (x0, x1) = (x[first], x[second]);
            x[first] = x0 * cos - x1 * sin;
            x[second] = x0 * sin + x1 * cos;
        }
    }
}

/// A call with q and k rotated.
struct Problem<'a> {
    spec: &'a AttentionSpec,
    sequences: &'a Sequences,
    /// Tokens of each sequence.
    bounds: Vec<Range<usize>>,
    q: Vec<f64>,
    k: Vec<f64>,
    weight: &'a [f64],
}

/// One query of one head, and the keys that it sees.
struct Row {
    head: usize,
    head_dim: usize,
    /// Row of the query in `[tokens, num_heads]`.
    query_row: usize,
    keys: Vec<Key>,
    lse: f64,
}

struct Key {
    /// Its row in `[tokens, num_heads]`.
    row: usize,
    /// Its position less that of the query.
    distance: i64,
    probability: f64,
    /// 1 without dropout.
    dropout_factor: f64,
}

impl Row {
    fn features(&self, row: usize) -> Range<usize> {
        row * self.head_dim..(row + 1) * self.head_dim
    }

    fn query_features(&self) -> Range<usize> {
        self.features(self.query_row)
    }
}

impl<'a> Problem<'a> {
    fn new(
        spec: &'a AttentionSpec,
        sequences: &'a Sequences,
        batch: usize,
        inputs: Inputs<'a>,
    ) -> Self {
        let tokens = inputs.q.len() / (spec.num_heads * spec.head_dim);
        let bounds = match sequences {
            Sequences::CuSeqlens(bounds) => bounds.windows(2).map(|b| b[0]..b[1]).collect(),
            _ => (0..batch)
                .map(|b| b * (tokens / batch)..(b + 1) * (tokens / batch))
                .collect(),
        };
        let mut problem = Self {
            spec,
            sequences,
            bounds,
            q: Vec::new(),
            k: Vec::new(),
            weight: inputs.weight,
        };
        problem.q = problem.rotated(inputs.q.to_vec(), 1.0);
        problem.k = problem.rotated(inputs.k.to_vec(), 1.0);
        problem
    }

    /// Rows turned by RoPE (back with `sign` -1), if that is the encoding.
    fn rotated(&self, mut rows: Vec<f64>, sign: f64) -> Vec<f64> {
        if let PositionEncoding::Rope(rope) = &self.spec.position {
            let positions: Vec<usize> = self.bounds.iter().flat_map(|b| 0..b.len()).collect();
            rotate(rope, self.spec.num_heads, &mut rows, sign, &positions);
        }
        rows
    }

    fn for_each_row(&self, mut f: impl FnMut(Row)) {
        for (sequence, tokens) in self.bounds.iter().enumerate() {
            for head in 0..self.spec.num_heads {
                for query in 0..tokens.len() {
                    f(self.row(sequence, tokens, head, query));
                }
            }
        }
    }

    fn row(&self, sequence: usize, tokens: &Range<usize>, head: usize, query: usize) -> Row {
        let &AttentionSpec {
            num_heads,
            head_dim,
            softmax_scale,
            ..
        } = self.spec;
        let mut row = Row {
            head,
            head_dim,
            query_row: (tokens.start + query) * num_heads + head,
            keys: Vec::new(),
            lse: f64::NEG_INFINITY,
        };
        let mut scores = Vec::new();
        for key in 0..tokens.len() {
            if !self.sees(query, key) || !self.takes_part(sequence, tokens.len(), key) {
                continue;
            }
            let key_row = (tokens.start + key) * num_heads + head;
            let distance = key as i64 - query as i64;
            let q = &self.q[row.query_features()];
            let k = &self.k[row.features(key_row)];
            scores.push(f64::from(softmax_scale) * dot(q, k) + self.bias(head, distance));
            row.keys.push(Key {
                row: key_row,
                distance,
                probability: 0.0,
                dropout_factor: self.dropout_factor(sequence, head, query, key),
            });
        }
        if scores.is_empty() {
            return row;
        }
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        for (key, score) in row.keys.iter_mut().zip(scores) {
            key.probability = (score - max).exp() / sum;
        }
        row.lse = max + sum.ln();
        row
    }

    /// Causality and window.
    fn sees(&self, query: usize, key: usize) -> bool {
        let window = self.spec.window;
        let left = window.and_then(|w| w.left).unwrap_or(usize::MAX);
        let right = window.and_then(|w| w.right).unwrap_or(usize::MAX);
        if key > query {
            !self.spec.causal && key - query <= right
        } else {
            query - key <= left
        }
    }

    /// Padding.
    fn takes_part(&self, sequence: usize, seqlen: usize, key: usize) -> bool {
        match self.sequences {
            Sequences::Dense | Sequences::CuSeqlens(_) => true,
            Sequences::KeyLens(lens) => key < lens[sequence],
            Sequences::KeyMask(mask) => mask[sequence * seqlen + key],
        }
    }

    fn bias(&self, head: usize, distance: i64) -> f64 {
        match &self.spec.position {
            PositionEncoding::None | PositionEncoding::Rope(_) => 0.0,
            PositionEncoding::Alibi(alibi) => {
                -f64::from(alibi.slopes[head]) * distance.unsigned_abs() as f64
            }
            PositionEncoding::RelativeBias(bias) => {
                self.weight[bias.bucket(distance) * self.spec.num_heads + head]
            }
        }
    }

    fn dropout_factor(&self, sequence: usize, head: usize, query: usize, key: usize) -> f64 {
        match self.spec.dropout {
            None => 1.0,
            Some(dropout) if keeps(dropout, sequence, head, query, key) => {
                1.0 / (1.0 - f64::from(dropout.p))
            }
            Some(_) => 0.0,
        }
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

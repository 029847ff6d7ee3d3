//! The backward pass of one head of one sequence.

use std::ops::Range;

use rayon::prelude::*;

use super::head::{Head, KEY_BLOCK, QUERY_BLOCK, QueryBlock};
use super::matrix::{Matrix, Sum, matmul};
use super::rows::{Rows, RowsMut};
use super::simd::{self, DropoutFactors, SoftmaxBackward};
use crate::element::Element;
use crate::position::Turn;
use crate::spec::PositionEncoding;

/// A head is split into chunks of keys, each with a dq of its own: at least so many keys a chunk,
/// and at most so many chunks.
const MIN_KEY_CHUNK: usize = 1024;
const MAX_KEY_CHUNKS: usize = 8;

/// What the backward pass reads besides q, k and v.
pub(super) struct Saved<'a, T> {
    pub out: Rows<'a, T>,
    pub d_out: Rows<'a, T>,
    /// In log2 units, see [`Batch::lse_view`](crate::batch::Batch::lse_view).
    pub lse: Rows<'a, f32>,
}

impl<T: Element> Saved<'_, T> {
    /// The log-sum-exp of each column of a block.
    fn lse(&self, head: &Head<T>, block: QueryBlock) -> Vec<f32> {
        let start = self.lse.view.row(head.sequence, block.first, head.head);
        // Rows that see no key have scores of -inf, which any finite number leaves so.
        let finite = |&lse: &f32| if lse == f32::NEG_INFINITY { 0.0 } else { lse };
        let mut lse: Vec<f32> = self.lse.data[start..][..block.len]
            .iter()
            .map(finite)
            .collect();
        // Probabilities of 0 in columns of padding.
        lse.resize(block.width, f32::INFINITY);
        lse
    }
}

/// Gradients from a chunk of the keys. Those of rows that RoPE turns are not yet turned back.
struct ChunkGradients {
    keys: Range<usize>,
    /// `[len, head_dim]`, the share of these keys.
    dq: Vec<f32>,
    /// `[keys, head_dim]`.
    dk: Vec<f32>,
    /// `[keys, head_dim]`.
    dv: Vec<f32>,
    /// `[2 * len - 1]`, reversed as [`Attention::bias`](super::Attention); empty unless the bias is
    /// learned.
    d_bias: Vec<f32>,
}

impl<T: Element> Head<'_, T> {
    /// Writes the head's gradients and returns that of its bias, `[2 * len - 1]`, reversed.
    pub fn backward(&self, saved: &Saved<T>, [dq, dk, dv]: [RowsMut<T>; 3]) -> Vec<f32> {
        let positions = 0..self.sequence.len;
        let chunks: Vec<ChunkGradients> = (self.key_chunks().into_par_iter())
            .map(|keys| {
                let mut chunk = self.chunk_backward(keys, saved);
                let positions = || self.keys[chunk.keys.clone()].iter().copied();
                self.rotate(&mut chunk.dk, positions(), Turn::Backward);
                self.store(&chunk.dk, positions(), dk);
                self.store(&chunk.dv, positions(), dv);
                chunk
            })
            .collect();
        let Some(mut sum) = chunks.into_iter().reduce(|mut sum, chunk| {
            simd::add(&mut sum.dq, &chunk.dq);
            simd::add(&mut sum.d_bias, &chunk.d_bias);
            sum
        }) else {
            return Vec::new();
        };
        self.rotate(&mut sum.dq, positions.clone(), Turn::Backward);
        self.store(&sum.dq, positions, dq);
        sum.d_bias
    }

    fn key_chunks(&self) -> Vec<Range<usize>> {
        let chunk = (self.keys.len().div_ceil(MAX_KEY_CHUNKS)).max(MIN_KEY_CHUNK);
        (0..self.keys.len())
            .step_by(chunk)
            .map(|begin| begin..self.keys.len().min(begin + chunk))
            .collect()
    }

    fn chunk_backward(&self, keys: Range<usize>, saved: &Saved<T>) -> ChunkGradients {
        let head_dim = self.head_dim();
        let learned_bias = matches!(self.call.spec.position, PositionEncoding::RelativeBias(_));
        let distances = if learned_bias {
            2 * self.sequence.len - 1
        } else {
            0
        };
        let mut gradients = ChunkGradients {
            dq: Vec::with_capacity(self.sequence.len * head_dim),
            dk: vec![0.0; keys.len() * head_dim],
            dv: vec![0.0; keys.len() * head_dim],
            d_bias: vec![0.0; distances],
            keys,
        };
        let mut scores = vec![0.0; KEY_BLOCK.min(gradients.keys.len()) * QUERY_BLOCK];
        let mut d_scores = scores.clone();
        for block in self.query_blocks() {
            let mut queries = Queries::new(self, block, saved);
            for keys in self.key_blocks(block, gradients.keys.clone()) {
                let len = keys.len() * block.width;
                let (p, ds) = (&mut scores[..len], &mut d_scores[..len]);
                queries.softmax_backward(self, &keys, p, ds);
                queries.add_gradients(self, &keys, p, ds, &mut gradients);
            }
            let dq = simd::transpose(&queries.dqt, block.width);
            gradients.dq.extend_from_slice(&dq[..block.len * head_dim]);
        }
        gradients
    }
}

/// A block of queries in the backward pass.
struct Queries {
    block: QueryBlock,
    /// `[width, head_dim]`, rotated.
    q: Vec<f32>,
    /// `[head_dim, width]`, rotated.
    qt: Vec<f32>,
    /// `[width, head_dim]`.
    d_out: Vec<f32>,
    /// `[head_dim, width]`.
    d_outt: Vec<f32>,
    /// `[width]`, in log2 units.
    lse: Vec<f32>,
    /// `[width]`: the dot product of each row of the output with its gradient.
    delta: Vec<f32>,
    dropout: DropoutFactors,
    /// `[head_dim, width]`: the gradient of `qt` so far.
    dqt: Vec<f32>,
}

impl Queries {
    fn new<T: Element>(head: &Head<T>, block: QueryBlock, saved: &Saved<T>) -> Self {
        let head_dim = head.head_dim();
        let q = head.load_queries(block);
        let d_out = head.load_block(&saved.d_out, block);
        let out = head.load_block(&saved.out, block);
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum();
        let delta = out.chunks_exact(head_dim).zip(d_out.chunks_exact(head_dim));
        Self {
            qt: simd::transpose(&q, head_dim),
            d_outt: simd::transpose(&d_out, head_dim),
            delta: delta.map(|(out, d_out)| dot(out, d_out)).collect(),
            lse: saved.lse(head, block),
            dropout: head.dropout_factors(block),
            dqt: vec![0.0; head_dim * block.width],
            block,
            q,
            d_out,
        }
    }

    /// Computes the probabilities `[keys, width]` that multiplied v, and the gradients of the
    /// scores.
    fn softmax_backward<T: Element>(
        &mut self,
        head: &Head<T>,
        keys: &Range<usize>,
        probabilities: &mut [f32],
        d_scores: &mut [f32],
    ) {
        head.scores(self.block, keys, &self.qt, probabilities);
        let v = Matrix::new(head.rows(&head.v, keys), head.head_dim());
        let d_outt = Matrix::new(&self.d_outt, self.block.width);
        matmul(d_scores, v, d_outt, 1.0, Sum::Overwrite);
        let softmax = SoftmaxBackward {
            keys: &head.keys[keys.clone()],
            lse: &self.lse,
            delta: &self.delta,
            dropout: &mut self.dropout,
        };
        softmax.run(probabilities, d_scores);
    }

    fn add_gradients<T: Element>(
        &mut self,
        head: &Head<T>,
        keys: &Range<usize>,
        probabilities: &[f32],
        d_scores: &[f32],
        gradients: &mut ChunkGradients,
    ) {
        let (head_dim, width) = (head.head_dim(), self.block.width);
        let scale = head.call.spec.softmax_scale;
        if !gradients.d_bias.is_empty() {
            let places = head.bias_places(self.block, &head.keys[keys.clone()]);
            simd::add_bias_gradient(d_scores, width, &mut gradients.d_bias, places);
        }
        let first = gradients.keys.start;
        let rows = (keys.start - first) * head_dim..(keys.end - first) * head_dim;
        let p = Matrix::new(probabilities, width);
        let ds = Matrix::new(d_scores, width);
        let k = Matrix::new(head.rows(&head.k, keys), head_dim);
        let q = Matrix::new(&self.q, head_dim);
        let d_out = Matrix::new(&self.d_out, head_dim);
        matmul(&mut gradients.dv[rows.clone()], p, d_out, 1.0, Sum::Add);
        matmul(&mut gradients.dk[rows], ds, q, scale, Sum::Add);
        matmul(&mut self.dqt, k.transposed(), ds, scale, Sum::Add);
    }
}

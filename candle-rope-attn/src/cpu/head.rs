//! The forward pass of one head of one sequence, and what the backward pass shares with it.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::Attention;
use super::matrix::{Matrix, Sum, matmul};
use super::rows::{Rows, RowsMut};
use super::simd::{self, DropoutFactors, LANES, OnlineSoftmax};
use crate::batch::Sequence;
use crate::element::Element;
use crate::position::Turn;

/// Queries and keys of a block of scores; two blocks and their operands fit a 1 MiB L2 cache.
pub(super) const QUERY_BLOCK: usize = 128;
pub(super) const KEY_BLOCK: usize = 256;

/// Neighbouring queries of a head.
#[derive(Clone, Copy)]
pub(super) struct QueryBlock {
    pub first: usize,
    pub len: usize,
    /// Columns of its blocks of scores: `len` in whole [`LANES`].
    pub width: usize,
}

impl QueryBlock {
    pub fn positions(&self) -> Range<usize> {
        self.first..self.first + self.len
    }
}

/// One head of one sequence.
pub(super) struct Head<'a, T> {
    pub call: &'a Attention<'a, T>,
    pub sequence: Sequence,
    pub head: usize,
    /// Positions of the keys, ascending.
    pub keys: Vec<usize>,
    /// `[keys, head_dim]`, rotated.
    pub k: Vec<f32>,
    /// `[keys, head_dim]`.
    pub v: Vec<f32>,
    /// See [`Attention::bias`]; `[2 * len - 1]`.
    bias: Option<&'a [f32]>,
}

impl<'a, T: Element> Head<'a, T> {
    pub fn new(call: &'a Attention<'a, T>, sequence: Sequence, head: usize) -> Self {
        let keys = call.batch.key_positions(sequence);
        let bias = call.bias.as_ref().map(|tables| {
            let unused = call.batch.seqlen - sequence.len;
            &tables[head][unused..][..2 * sequence.len - 1]
        });
        let mut this = Self {
            call,
            sequence,
            head,
            keys,
            k: Vec::new(),
            v: Vec::new(),
            bias,
        };
        let mut k = this.load(&call.k, this.keys.iter().copied());
        this.rotate(&mut k, this.keys.iter().copied(), Turn::Forward);
        this.k = k;
        this.v = this.load(&call.v, this.keys.iter().copied());
        this
    }

    pub fn head_dim(&self) -> usize {
        self.call.spec.head_dim
    }

    /// The rows at `positions`, `[positions, head_dim]`.
    pub fn load(
        &self,
        rows: &Rows<T>,
        positions: impl ExactSizeIterator<Item = usize>,
    ) -> Vec<f32> {
        let head_dim = self.head_dim();
        let mut out = vec![0.0; positions.len() * head_dim];
        for (out, position) in out.chunks_exact_mut(head_dim).zip(positions) {
            let start = rows.view.row(self.sequence, position, self.head);
            T::load(&rows.data[start..][..head_dim], out);
        }
        out
    }

    /// The rows of a block, padded with zeros to `[width, head_dim]`.
    pub fn load_block(&self, rows: &Rows<T>, block: QueryBlock) -> Vec<f32> {
        let mut out = self.load(rows, block.positions());
        out.resize(block.width * self.head_dim(), 0.0);
        out
    }

    /// The queries of a block, rotated and padded to `[width, head_dim]`.
    pub fn load_queries(&self, block: QueryBlock) -> Vec<f32> {
        let mut q = self.load_block(&self.call.q, block);
        self.rotate(&mut q, block.positions(), Turn::Forward);
        q
    }

    /// Turns rows by RoPE, if that is the encoding.
    pub fn rotate(&self, rows: &mut [f32], positions: impl Iterator<Item = usize>, turn: Turn) {
        if let Some(rotation) = &self.call.rotation {
            for (row, position) in rows.chunks_exact_mut(self.head_dim()).zip(positions) {
                rotation.apply(row, position, turn);
            }
        }
    }

    /// Rounds and writes rows `[positions, head_dim]`.
    pub fn store(&self, rows: &[f32], positions: impl Iterator<Item = usize>, out: RowsMut<T>) {
        for (row, position) in rows.chunks_exact(self.head_dim()).zip(positions) {
            // SAFETY: a row belongs to one head of one sequence, and there to the one task that
            // has its query block (o), its key chunk (dk, dv), or the whole head (dq).
            unsafe { out.store(self.sequence, position, self.head, row) };
        }
    }

    pub fn query_blocks(&self) -> Vec<QueryBlock> {
        (0..self.sequence.len)
            .step_by(QUERY_BLOCK)
            .map(|first| {
                let len = QUERY_BLOCK.min(self.sequence.len - first);
                let width = len.next_multiple_of(LANES);
                QueryBlock { first, len, width }
            })
            .collect()
    }

    /// How many positions before and after its own a query sees.
    fn limits(&self) -> (usize, usize) {
        let window = self.call.spec.window;
        let left = window.and_then(|w| w.left).unwrap_or(usize::MAX);
        let right = window.and_then(|w| w.right).unwrap_or(usize::MAX);
        (left, if self.call.spec.causal { 0 } else { right })
    }

    /// Indices of the keys that some query of the block sees, in blocks.
    pub fn key_blocks(
        &self,
        block: QueryBlock,
        chunk: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> {
        let (left, right) = self.limits();
        let first = block.first.saturating_sub(left);
        let last = (block.first + block.len - 1).saturating_add(right);
        let begin = self
            .keys
            .partition_point(|&key| key < first)
            .max(chunk.start);
        let end = self.keys.partition_point(|&key| key <= last).min(chunk.end);
        (begin..end)
            .step_by(KEY_BLOCK)
            .map(move |begin| begin..end.min(begin + KEY_BLOCK))
    }

    /// Scores `[keys, width]` of a block in log2 units, -inf where a query does not see the key.
    /// `qt` are the block's queries `[head_dim, width]`.
    pub fn scores(&self, block: QueryBlock, keys: &Range<usize>, qt: &[f32], out: &mut [f32]) {
        let head_dim = self.head_dim();
        let k = Matrix::new(self.rows(&self.k, keys), head_dim);
        let scale = self.call.spec.softmax_scale * LOG2_E;
        matmul(out, k, Matrix::new(qt, block.width), scale, Sum::Overwrite);
        let keys = &self.keys[keys.clone()];
        if let Some(bias) = self.bias {
            simd::add_bias(out, block.width, bias, self.bias_places(block, keys));
        }
        let (left, right) = self.limits();
        if (left, right) != (usize::MAX, usize::MAX) {
            let column = |position: usize| position.saturating_sub(block.first).min(block.width);
            for (row, &key) in out.chunks_exact_mut(block.width).zip(keys) {
                row[..column(key.saturating_sub(right))].fill(f32::NEG_INFINITY);
                row[column(key.saturating_add(left).saturating_add(1))..].fill(f32::NEG_INFINITY);
            }
        }
    }

    /// Where the biases of each key begin for the queries of a block.
    pub fn bias_places(&self, block: QueryBlock, keys: &[usize]) -> impl Iterator<Item = usize> {
        let last = block.first + self.sequence.len - 1;
        keys.iter().map(move |key| last - key)
    }

    /// The rows of some keys in a `[keys, head_dim]` matrix.
    pub fn rows<'m>(&self, matrix: &'m [f32], keys: &Range<usize>) -> &'m [f32] {
        &matrix[keys.start * self.head_dim()..keys.end * self.head_dim()]
    }

    pub fn dropout_factors(&self, block: QueryBlock) -> DropoutFactors {
        let place = [self.sequence.index, self.head];
        DropoutFactors::new(self.call.dropout, place, block.first, block.width)
    }

    pub fn forward(&self, block: QueryBlock, out: RowsMut<T>, lse: RowsMut<f32>) {
        let (head_dim, width) = (self.head_dim(), block.width);
        let qt = simd::transpose(&self.load_queries(block), head_dim);

        let mut softmax = OnlineSoftmax::new(width);
        let mut dropout = self.dropout_factors(block);
        let mut scores = vec![0.0; KEY_BLOCK.min(self.keys.len()) * width];
        let mut ot = vec![0.0; head_dim * width];
        for keys in self.key_blocks(block, 0..self.keys.len()) {
            let scores = &mut scores[..keys.len() * width];
            self.scores(block, &keys, &qt, scores);
            softmax.update(scores);
            softmax.rescale(&mut ot);
            dropout.apply(scores, &self.keys[keys.clone()]);
            let vt = Matrix::new(self.rows(&self.v, &keys), head_dim).transposed();
            matmul(&mut ot, vt, Matrix::new(scores, width), 1.0, Sum::Add);
        }
        simd::scale_columns(&mut ot, &softmax.normalizers());
        self.store(&simd::transpose(&ot, width), block.positions(), out);
        let values = softmax.lse();
        // SAFETY: one task has this query block.
        unsafe { lse.store(self.sequence, block.first, self.head, &values[..block.len]) };
    }
}

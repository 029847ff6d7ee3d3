//! Attention on the CPU, flash style: blocks of scores, an online softmax, and nothing kept that
//! grows with the square of the length.
//!
//! Everything is computed in f32. A head's rows are copied out of the strided tensors, rotated by
//! RoPE on the way, and keys that padding masks are left out, so that no inner loop knows of
//! either. Scores are transposed, `[keys, queries]`: the softmax then runs along contiguous
//! queries, and all products find their operands as `gemm` wants them. Scores and log-sum-exp are
//! in log2 units.
//!
//! Work is split by shape alone and sums have a fixed order, so results have the same bits for any
//! number of threads.

mod simd;

use std::f32::consts::LOG2_E;
use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use crate::batch::{Batch, Sequence, View};
use crate::element::Element;
use crate::philox::DropoutMask;
use crate::position::{BiasTable, Rotation, Turn, fold_bias_gradient, table_len};
use crate::spec::{AttentionSpec, PositionEncoding};
use simd::{DropoutFactors, LANES, OnlineSoftmax, SoftmaxBackward};

/// Queries and keys of a block of scores; two blocks and their operands fit a 1 MiB L2 cache.
const QUERY_BLOCK: usize = 128;
const KEY_BLOCK: usize = 256;

/// The backward pass of a head is split into chunks of keys, each with a dq of its own: at least
/// so many keys a chunk, and at most so many chunks.
const MIN_KEY_CHUNK: usize = 1024;
const MAX_KEY_CHUNKS: usize = 8;

/// The rows of a tensor.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    pub data: &'a [T],
    pub view: View,
}

/// The rows of a tensor that tasks write, each its own.
#[derive(Clone, Copy)]
pub(crate) struct RowsMut<'a, T> {
    pub data: &'a SharedMut<'a, T>,
    pub view: View,
}

/// A slice whose parts several tasks write.
pub(crate) struct SharedMut<'a, T> {
    data: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]`, only accessed by `RowsMut::store`, whose callers keep rows apart.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub fn new(data: &'a mut [T]) -> Self {
        Self {
            data: data.as_mut_ptr(),
            len: data.len(),
            lifetime: PhantomData,
        }
    }
}

impl<T: Element> RowsMut<'_, T> {
    /// Rounds and writes the values from a row's beginning on.
    ///
    /// # Safety
    /// Nothing else accesses these elements meanwhile.
    unsafe fn store(&self, sequence: Sequence, row: usize, head: usize, values: &[f32]) {
        let start = self.view.row(sequence, row, head);
        assert!(start + values.len() <= self.data.len);
        // SAFETY: in bounds as asserted; exclusive as the caller promises.
        let out =
            unsafe { std::slice::from_raw_parts_mut(self.data.data.add(start), values.len()) };
        T::store(values, out);
    }
}

/// What all heads of a call share.
pub(crate) struct Attention<'a, T> {
    spec: &'a AttentionSpec,
    batch: &'a Batch,
    q: Rows<'a, T>,
    k: Rows<'a, T>,
    v: Rows<'a, T>,
    rotation: Option<Rotation>,
    /// Each head's [`BiasTable`] in log2 units and reversed, by `query - key`: the biases of
    /// neighbouring queries then lie side by side.
    bias: Option<Vec<Vec<f32>>>,
    dropout: Option<DropoutMask>,
}

impl<'a, T: Element> Attention<'a, T> {
    /// `weight` is that of [`PositionEncoding::RelativeBias`], `[num_buckets, num_heads]`.
    pub fn new(
        spec: &'a AttentionSpec,
        batch: &'a Batch,
        [q, k, v]: [Rows<'a, T>; 3],
        weight: Option<&[f32]>,
    ) -> Self {
        let rotation = match &spec.position {
            PositionEncoding::Rope(rope) => Some(Rotation::new(rope, batch.seqlen)),
            _ => None,
        };
        let bias = BiasTable::new(&spec.position, weight, spec.num_heads, batch.seqlen);
        let reverse = |table: &[f32]| table.iter().rev().map(|x| x * LOG2_E).collect();
        Self {
            spec,
            batch,
            q,
            k,
            v,
            rotation,
            bias: bias.map(|bias| bias.heads().map(reverse).collect()),
            dropout: spec.dropout.map(DropoutMask::new),
        }
    }

    /// Writes the attention of every row, and its log-sum-exp in log2 units
    /// (see [`Batch::lse_view`]).
    pub fn forward(&self, out: RowsMut<T>, lse: Option<RowsMut<f32>>) {
        self.heads().for_each(|head| {
            head.query_blocks()
                .into_par_iter()
                .for_each(|block| head.forward(block, out, lse));
        });
    }

    /// Writes the gradients of q, k and v from that of the output, and returns the gradient of
    /// the weight of [`PositionEncoding::RelativeBias`]. Rows of masked keys are not written: the
    /// gradients must start as zeros.
    pub fn backward(&self, saved: &Saved<T>, gradients: [RowsMut<T>; 3]) -> Option<Vec<f32>> {
        let d_biases: Vec<(usize, Vec<f32>)> = self
            .heads()
            .map(|head| (head.head, head.backward(saved, gradients)))
            .collect();
        let PositionEncoding::RelativeBias(bias) = &self.spec.position else {
            return None;
        };
        let seqlen = self.batch.seqlen;
        let mut tables = vec![0.0; self.spec.num_heads * table_len(seqlen)];
        for (head, d_bias) in d_biases {
            let table = &mut tables[head * table_len(seqlen)..][..table_len(seqlen)];
            // A shorter sequence has the distances in the middle.
            let unused = (table.len() - d_bias.len()) / 2;
            for (sum, x) in table[unused..].iter_mut().zip(d_bias.iter().rev()) {
                *sum += f64::from(*x);
            }
        }
        let (num_heads, tables) = (self.spec.num_heads, &tables);
        Some(fold_bias_gradient(bias, tables, num_heads, seqlen))
    }

    /// Every head of every sequence.
    fn heads(&self) -> impl ParallelIterator<Item = Head<'_, T>> {
        let num_heads = self.spec.num_heads;
        let sequences: Vec<_> = self.batch.iter().filter(|s| s.len > 0).collect();
        (0..sequences.len() * num_heads)
            .into_par_iter()
            .map(move |i| Head::new(self, sequences[i / num_heads], i % num_heads))
    }
}

/// What the backward pass reads besides q, k and v.
pub(crate) struct Saved<'a, T> {
    pub out: Rows<'a, T>,
    pub d_out: Rows<'a, T>,
    /// What [`Attention::forward`] wrote.
    pub lse: Rows<'a, f32>,
}

/// Neighbouring queries of a head.
#[derive(Clone, Copy)]
struct QueryBlock {
    first: usize,
    len: usize,
    /// Columns of its blocks of scores: `len` in whole [`LANES`].
    width: usize,
}

impl QueryBlock {
    fn positions(&self) -> Range<usize> {
        self.first..self.first + self.len
    }
}

/// One head of one sequence.
struct Head<'a, T> {
    call: &'a Attention<'a, T>,
    sequence: Sequence,
    head: usize,
    /// Positions of the keys, ascending.
    keys: Vec<usize>,
    /// `[keys, head_dim]`, rotated.
    k: Vec<f32>,
    /// `[keys, head_dim]`.
    v: Vec<f32>,
    /// See [`Attention::bias`]; `[2 * len - 1]`.
    bias: Option<&'a [f32]>,
}

/// dq and the gradient of the bias from a chunk of the keys.
struct Partial {
    /// `[len, head_dim]`, not yet turned back.
    dq: Vec<f32>,
    /// `[2 * len - 1]`, reversed as [`Attention::bias`]; empty unless the bias is learned.
    d_bias: Vec<f32>,
}

impl<'a, T: Element> Head<'a, T> {
    fn new(call: &'a Attention<'a, T>, sequence: Sequence, head: usize) -> Self {
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

    fn head_dim(&self) -> usize {
        self.call.spec.head_dim
    }

    /// The rows at `positions`, `[positions, head_dim]`.
    fn load(&self, rows: &Rows<T>, positions: impl ExactSizeIterator<Item = usize>) -> Vec<f32> {
        let head_dim = self.head_dim();
        let mut out = vec![0.0; positions.len() * head_dim];
        for (out, position) in out.chunks_exact_mut(head_dim).zip(positions) {
            let start = rows.view.row(self.sequence, position, self.head);
            T::load(&rows.data[start..][..head_dim], out);
        }
        out
    }

    /// The rows of a block, padded with zeros to `[width, head_dim]`.
    fn load_block(&self, rows: &Rows<T>, block: QueryBlock) -> Vec<f32> {
        let mut out = self.load(rows, block.positions());
        out.resize(block.width * self.head_dim(), 0.0);
        out
    }

    /// Turns rows by RoPE, if that is the encoding.
    fn rotate(&self, rows: &mut [f32], positions: impl Iterator<Item = usize>, turn: Turn) {
        if let Some(rotation) = &self.call.rotation {
            for (row, position) in rows.chunks_exact_mut(self.head_dim()).zip(positions) {
                rotation.apply(row, position, turn);
            }
        }
    }

    /// Rounds and writes rows `[positions, head_dim]`.
    fn store(&self, rows: &[f32], positions: impl Iterator<Item = usize>, out: RowsMut<T>) {
        for (row, position) in rows.chunks_exact(self.head_dim()).zip(positions) {
            // SAFETY: a row belongs to one head of one sequence, and there to the one task that
            // has its query block (o), its key chunk (dk, dv), or the whole head (dq).
            unsafe { out.store(self.sequence, position, self.head, row) };
        }
    }

    fn query_blocks(&self) -> Vec<QueryBlock> {
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
    fn key_blocks(
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
    fn scores(&self, block: QueryBlock, keys: Range<usize>, qt: &[f32], out: &mut [f32]) {
        let head_dim = self.head_dim();
        let k = Matrix::new(self.rows(&self.k, &keys), head_dim);
        let scale = self.call.spec.softmax_scale * LOG2_E;
        matmul(out, k, Matrix::new(qt, block.width), scale, Sum::Overwrite);
        let keys = &self.keys[keys];
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
    fn bias_places(&self, block: QueryBlock, keys: &[usize]) -> impl Iterator<Item = usize> {
        let last = block.first + self.sequence.len - 1;
        keys.iter().map(move |key| last - key)
    }

    /// The rows of some keys in a `[keys, head_dim]` matrix.
    fn rows<'m>(&self, matrix: &'m [f32], keys: &Range<usize>) -> &'m [f32] {
        &matrix[keys.start * self.head_dim()..keys.end * self.head_dim()]
    }

    fn dropout_factors(&self, block: QueryBlock) -> DropoutFactors {
        let place = [self.sequence.index, self.head];
        DropoutFactors::new(self.call.dropout, place, block.first, block.width)
    }

    fn forward(&self, block: QueryBlock, out: RowsMut<T>, lse: Option<RowsMut<f32>>) {
        let (head_dim, width) = (self.head_dim(), block.width);
        let mut q = self.load_block(&self.call.q, block);
        self.rotate(&mut q, block.positions(), Turn::Forward);
        let qt = simd::transpose(&q, head_dim);

        let mut softmax = OnlineSoftmax::new(width);
        let mut dropout = self.dropout_factors(block);
        let mut scores = vec![0.0; KEY_BLOCK.min(self.keys.len()) * width];
        let mut ot = vec![0.0; head_dim * width];
        for keys in self.key_blocks(block, 0..self.keys.len()) {
            let scores = &mut scores[..keys.len() * width];
            self.scores(block, keys.clone(), &qt, scores);
            softmax.update(scores);
            softmax.rescale(&mut ot);
            dropout.apply(scores, &self.keys[keys.clone()]);
            let vt = Matrix::new(self.rows(&self.v, &keys), head_dim).transposed();
            matmul(&mut ot, vt, Matrix::new(scores, width), 1.0, Sum::Add);
        }
        simd::scale_columns(&mut ot, &softmax.normalizers());
        self.store(&simd::transpose(&ot, width), block.positions(), out);
        if let Some(lse) = lse {
            let values = softmax.lse();
            // SAFETY: one task has this query block.
            unsafe { lse.store(self.sequence, block.first, self.head, &values[..block.len]) };
        }
    }

    /// Writes the head's gradients and returns that of its bias, `[2 * len - 1]`, reversed.
    fn backward(&self, saved: &Saved<T>, [dq, dk, dv]: [RowsMut<T>; 3]) -> Vec<f32> {
        let chunk = (self.keys.len().div_ceil(MAX_KEY_CHUNKS)).max(MIN_KEY_CHUNK);
        let chunks: Vec<Range<usize>> = (0..self.keys.len())
            .step_by(chunk)
            .map(|begin| begin..self.keys.len().min(begin + chunk))
            .collect();
        let partials: Vec<Partial> = chunks
            .into_par_iter()
            .map(|chunk| self.chunk_backward(chunk, saved, dk, dv))
            .collect();
        let mut partials = partials.into_iter();
        let Some(mut sum) = partials.next() else {
            return Vec::new();
        };
        for partial in partials {
            simd::add(&mut sum.dq, &partial.dq);
            simd::add(&mut sum.d_bias, &partial.d_bias);
        }
        self.rotate(&mut sum.dq, 0..self.sequence.len, Turn::Backward);
        self.store(&sum.dq, 0..self.sequence.len, dq);
        sum.d_bias
    }

    /// Writes dk and dv of a chunk of the keys.
    fn chunk_backward(
        &self,
        chunk: Range<usize>,
        saved: &Saved<T>,
        dk_out: RowsMut<T>,
        dv_out: RowsMut<T>,
    ) -> Partial {
        let (head_dim, scale) = (self.head_dim(), self.call.spec.softmax_scale);
        let learned_bias = matches!(self.call.spec.position, PositionEncoding::RelativeBias(_));
        let mut d_bias = vec![
            0.0;
            if learned_bias {
                2 * self.sequence.len - 1
            } else {
                0
            }
        ];
        let mut dq = Vec::with_capacity(self.sequence.len * head_dim);
        let mut dk = vec![0.0; chunk.len() * head_dim];
        let mut dv = vec![0.0; chunk.len() * head_dim];
        let mut scores = vec![0.0; KEY_BLOCK.min(chunk.len()) * QUERY_BLOCK];
        let mut d_scores = scores.clone();

        for block in self.query_blocks() {
            let width = block.width;
            let queries = BackwardQueries::new(self, block, saved);
            let mut dropout = self.dropout_factors(block);
            let mut dqt = vec![0.0; head_dim * width];
            for keys in self.key_blocks(block, chunk.clone()) {
                let positions = &self.keys[keys.clone()];
                let k = Matrix::new(self.rows(&self.k, &keys), head_dim);
                let v = Matrix::new(self.rows(&self.v, &keys), head_dim);
                let p = &mut scores[..keys.len() * width];
                let ds = &mut d_scores[..keys.len() * width];
                self.scores(block, keys.clone(), &queries.qt, p);
                matmul(
                    ds,
                    v,
                    Matrix::new(&queries.d_outt, width),
                    1.0,
                    Sum::Overwrite,
                );
                let softmax = SoftmaxBackward {
                    scores: p,
                    gradients: ds,
                    keys: positions,
                    lse: &queries.lse,
                    delta: &queries.delta,
                    dropout: &mut dropout,
                };
                softmax.run();
                if learned_bias {
                    let places = self.bias_places(block, positions);
                    simd::add_bias_gradient(ds, width, &mut d_bias, places);
                }
                let (p, ds) = (Matrix::new(p, width), Matrix::new(ds, width));
                let in_chunk =
                    (keys.start - chunk.start) * head_dim..(keys.end - chunk.start) * head_dim;
                let d_out = Matrix::new(&queries.d_out, head_dim);
                matmul(&mut dv[in_chunk.clone()], p, d_out, 1.0, Sum::Add);
                let q = Matrix::new(&queries.q, head_dim);
                matmul(&mut dk[in_chunk], ds, q, scale, Sum::Add);
                matmul(&mut dqt, k.transposed(), ds, scale, Sum::Add);
            }
            let rows = simd::transpose(&dqt, width);
            dq.extend_from_slice(&rows[..block.len * head_dim]);
        }
        let positions = || self.keys[chunk.clone()].iter().copied();
        self.rotate(&mut dk, positions(), Turn::Backward);
        self.store(&dk, positions(), dk_out);
        self.store(&dv, positions(), dv_out);
        Partial { dq, d_bias }
    }
}

/// What the backward pass needs of a block of queries.
struct BackwardQueries {
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
}

impl BackwardQueries {
    fn new<T: Element>(head: &Head<T>, block: QueryBlock, saved: &Saved<T>) -> Self {
        let head_dim = head.head_dim();
        let mut q = head.load_block(&head.call.q, block);
        head.rotate(&mut q, block.positions(), Turn::Forward);
        let d_out = head.load_block(&saved.d_out, block);
        let out = head.load_block(&saved.out, block);
        let delta = (out.chunks_exact(head_dim))
            .zip(d_out.chunks_exact(head_dim))
            .map(|(out, d_out)| out.iter().zip(d_out).map(|(x, y)| x * y).sum())
            .collect();
        let lse_start = saved.lse.view.row(head.sequence, block.first, head.head);
        // Columns of padding get +inf, and so probabilities of 0. Rows that see no key have -inf
        // scores, which any finite number leaves so.
        let mut lse = vec![f32::INFINITY; block.width];
        for (lse, &saved) in lse
            .iter_mut()
            .zip(&saved.lse.data[lse_start..][..block.len])
        {
            *lse = if saved == f32::NEG_INFINITY {
                0.0
            } else {
                saved
            };
        }
        Self {
            qt: simd::transpose(&q, head_dim),
            d_outt: simd::transpose(&d_out, head_dim),
            q,
            d_out,
            lse,
            delta,
        }
    }
}

/// A strided matrix.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major, with all of `data`.
    fn new(data: &'a [f32], columns: usize) -> Self {
        let rows = data.len() / columns;
        assert_eq!(data.len(), rows * columns);
        Self {
            data,
            rows,
            columns,
            row_stride: columns,
            column_stride: 1,
        }
    }

    fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// What a product does with the old values.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sum {
    Overwrite,
    Add,
}

/// `out = scale * a * b`, or `out += scale * a * b`; `out` is row-major.
fn matmul(out: &mut [f32], a: Matrix, b: Matrix, scale: f32, sum: Sum) {
    assert_eq!(a.columns, b.rows);
    assert_eq!(out.len(), a.rows * b.columns);
    // SAFETY: the sizes of the three matrices agree, and each lies within its slice: `Matrix::new`
    // checked two of them, the line above the third.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            b.columns as isize,
            sum == Sum::Add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

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

mod backward;
mod head;
mod matrix;
mod rows;
mod simd;

use std::f32::consts::LOG2_E;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Device, Layout, Result, Tensor, WithDType};
use rayon::prelude::*;

use crate::batch::{Batch, View, qkv_views};
use crate::element::Element;
use crate::op::AttentionGradients;
use crate::operand::Locked;
use crate::ops::cpu::{with_element, zeros};
use crate::philox::DropoutMask;
use crate::position::{BiasTable, Rotation, fold_bias_gradient, table_len};
use crate::spec::{AttentionSpec, PositionEncoding};
use backward::Saved;
use head::Head;
use rows::{Rows, RowsMut, SharedMut};

/// Output of a call and the log-sum-exp of its rows (see [`Batch::lse_view`]) in log2 units.
///
/// `inputs` are q, k and v, or one packed tensor; `weight` is that of
/// [`PositionEncoding::RelativeBias`].
pub(crate) fn forward(
    spec: &AttentionSpec,
    batch: &Batch,
    inputs: &[(&CpuStorage, &Layout)],
    weight: Option<&CpuStorage>,
    out_layout: &Layout,
) -> Result<(CpuStorage, Vec<f32>)> {
    let mut lse = vec![0.0; batch.total_tokens * spec.num_heads];
    let lse_rows = RowsMut {
        data: &SharedMut::new(&mut lse),
        view: batch.lse_view(spec.num_heads),
    };
    let out = with_element!(inputs[0].0.dtype(), T => {
        let call = Attention::<T>::new(spec, batch, inputs, weight)?;
        let mut out = zeros::<T>(out_layout.shape().elem_count());
        let out_rows = RowsMut {
            data: &SharedMut::new(&mut out),
            view: View::new(out_layout),
        };
        call.forward(out_rows, lse_rows);
        T::to_cpu_storage_owned(out)
    });
    Ok((out, lse))
}

/// Gradients of `inputs` and `weight`, which are as in [`forward`], from the output, its gradient
/// and the log-sum-exp.
pub(crate) fn backward(
    spec: &AttentionSpec,
    batch: &Batch,
    inputs: &[&Tensor],
    weight: Option<&Tensor>,
    saved: [&Tensor; 3],
) -> Result<AttentionGradients> {
    with_element!(inputs[0].dtype(), T => backward_in::<T>(spec, batch, inputs, weight, saved))
}

fn backward_in<T: Element>(
    spec: &AttentionSpec,
    batch: &Batch,
    inputs: &[&Tensor],
    weight: Option<&Tensor>,
    saved: [&Tensor; 3],
) -> Result<AttentionGradients> {
    let locked: Vec<_> = (inputs.iter().copied().chain(weight))
        .map(Locked::new)
        .collect();
    let storages = (locked.iter())
        .map(|x| x.operand()?.cpu())
        .collect::<Result<Vec<_>>>()?;
    let (storages, weight_storage) = storages.split_at(inputs.len());
    let weight_storage = weight_storage.first().map(|(weight, _)| *weight);
    let call = Attention::<T>::new(spec, batch, storages, weight_storage)?;

    let [out, d_out, lse] = saved.map(Locked::new);
    let (out, out_layout) = out.operand()?.cpu()?;
    let (d_out, d_out_layout) = d_out.operand()?.cpu()?;
    let (lse, _) = lse.operand()?.cpu()?;
    let saved = Saved {
        out: Rows::new(out, View::new(out_layout))?,
        d_out: Rows::new(d_out, View::new(d_out_layout))?,
        lse: Rows::new(lse, batch.lse_view(spec.num_heads))?,
    };

    let mut gradients: Vec<Vec<T>> = inputs.iter().map(|x| zeros(x.elem_count())).collect();
    let shared: Vec<_> = gradients.iter_mut().map(|x| SharedMut::new(x)).collect();
    let layout = Layout::contiguous(inputs[0].shape());
    let rows = qkv_views(&vec![&layout; inputs.len()]).map(|(input, view)| RowsMut {
        data: &shared[input],
        view,
    });
    let d_weight = call.backward(&saved, rows);
    Ok(AttentionGradients {
        inputs: (gradients.into_iter().zip(inputs))
            .map(|(gradient, x)| Tensor::from_vec(gradient, x.shape(), &Device::Cpu))
            .collect::<Result<_>>()?,
        weight: (d_weight.zip(weight))
            .map(|(gradient, weight)| Tensor::from_vec(gradient, weight.shape(), &Device::Cpu))
            .transpose()?,
        column_sums: None,
    })
}

/// What all heads of a call share.
struct Attention<'a, T> {
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
    fn new(
        spec: &'a AttentionSpec,
        batch: &'a Batch,
        inputs: &[(&'a CpuStorage, &Layout)],
        weight: Option<&CpuStorage>,
    ) -> Result<Self> {
        let layouts: Vec<_> = inputs.iter().map(|(_, layout)| *layout).collect();
        let [q, k, v] = qkv_views(&layouts).map(|(input, view)| Rows::new(inputs[input].0, view));
        let rotation = match &spec.position {
            PositionEncoding::Rope(rope) => Some(Rotation::new(rope, batch.seqlen)),
            _ => None,
        };
        let weight = weight.map(f32::cpu_storage_as_slice).transpose()?;
        let bias = BiasTable::new(&spec.position, weight, spec.num_heads, batch.seqlen);
        let reverse = |table: &[f32]| table.iter().rev().map(|x| x * LOG2_E).collect();
        Ok(Self {
            spec,
            batch,
            q: q?,
            k: k?,
            v: v?,
            rotation,
            bias: bias.map(|bias| bias.heads().map(reverse).collect()),
            dropout: spec.dropout.map(DropoutMask::new),
        })
    }

    fn forward(&self, out: RowsMut<T>, lse: RowsMut<f32>) {
        self.heads().for_each(|head| {
            head.query_blocks()
                .into_par_iter()
                .for_each(|block| head.forward(block, out, lse));
        });
    }

    /// Writes the gradients of q, k and v, and returns that of the weight. Rows of masked keys are
    /// not written: the gradients must start as zeros.
    fn backward(&self, saved: &Saved<T>, gradients: [RowsMut<T>; 3]) -> Option<Vec<f32>> {
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

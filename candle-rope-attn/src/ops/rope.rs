//! Rotary position embedding as an operation of its own.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{with_element, zeros};
use crate::batch::{Batch, Sequence, View};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Element, check_dtype};
use crate::op::contiguous_rows;
use crate::position::{Rotation, Turn};
use crate::spec::{Rope, Sequences};
use crate::tape;

/// Rotates every head of every row of `x` by the row's position in its sequence, as
/// [`PositionEncoding::Rope`](crate::PositionEncoding::Rope) does inside attention.
///
/// `x` is `[batch, seqlen, num_heads, head_dim]`, or `[total_tokens, num_heads, head_dim]` with
/// [`Sequences::CuSeqlens`], F32, BF16 or F16; so is the result. Key padding changes nothing.
/// The last axis should be contiguous (a copy is made otherwise); the others may have any stride.
///
/// # Errors
/// When `sequences` or `rope` does not fit the shape of `x`, on another dtype, or on a GPU when
/// `head_dim` is above [`AttentionSpec::MAX_HEAD_DIM`](crate::AttentionSpec::MAX_HEAD_DIM).
pub fn rope(x: &Tensor, rope: &Rope, sequences: &Sequences) -> Result<Tensor> {
    check_dtype("rope", x.dtype())?;
    let batch = match x.dims() {
        [tokens @ .., _, head_dim] if *head_dim == rope.head_dim() => {
            Batch::new("rope", sequences, tokens)?
        }
        dims => bail!(
            "rope: {} inverse frequencies fit rows of width {}, got shape {dims:?}; pass head_dim / 2 frequencies",
            rope.inv_freq.len(),
            rope.head_dim()
        ),
    };
    let rotate = Rotate {
        rope: rope.clone(),
        batch,
        turn: Turn::Forward,
    };
    tape::apply1(rotate, &contiguous_rows(x)?)
}

#[derive(Clone)]
struct Rotate {
    rope: Rope,
    batch: Batch,
    turn: Turn,
}

impl Rotate {
    fn cpu<T: Element>(&self, x: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        let x = T::cpu_storage_as_slice(x)?;
        let view = View::new(layout);
        let rotation = Rotation::new(&self.rope, self.batch.seqlen);
        let head_dim = self.rope.head_dim();
        let num_heads = layout.dims()[layout.dims().len() - 2];
        let tokens: Vec<(Sequence, usize)> = (self.batch.iter())
            .flat_map(|sequence| (0..sequence.len).map(move |position| (sequence, position)))
            .collect();
        let mut out = zeros::<T>(layout.shape().elem_count());
        out.par_chunks_exact_mut((num_heads * head_dim).max(1))
            .zip(tokens)
            .for_each_init(
                || vec![0.0; head_dim],
                |row, (out, (sequence, position))| {
                    for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
                        let start = view.row(sequence, position, head);
                        T::load(&x[start..][..head_dim], row);
                        rotation.apply(row, position, self.turn);
                        T::store(row, out);
                    }
                },
            );
        Ok(T::to_cpu_storage_owned(out))
    }
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = with_element!(x.dtype(), T => self.cpu::<T>(x, layout)?);
        Ok((out, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::rope::rotate(&self.rope, &self.batch, self.turn, x, layout)
    }

    /// A rotation's transpose turns back.
    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let back = Self {
            turn: Turn::Backward,
            ..self.clone()
        };
        Ok(Some(contiguous_rows(gradient)?.apply_op1_no_bwd(&back)?))
    }
}

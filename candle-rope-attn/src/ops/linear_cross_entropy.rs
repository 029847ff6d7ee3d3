//! Cross-entropy of a dense layer's result.

use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};

use super::cpu::values;
use super::cross_entropy::{check_labels, cross_entropy_in_place};
use super::linear::{ColumnSum, Linear, dense};
use super::product::scaled_product;
use super::{cast, cross_entropy, linear, plain};
use crate::operand::{Locked, Operand};
use crate::tape;

/// About the bytes of the logits that exist at a time. With less, the gradient of the weight is read and
/// written more often, and the products are too small for a large GPU: `cuda/README.md` has times.
const CHUNK_BYTES: usize = 320 << 20;

/// Rows of a chunk are a multiple of these, so that chunks are aligned and of few sizes.
const ROWS: usize = 64;

/// [`cross_entropy`] of [`linear`]: the mean over the rows, in nats; an f32 scalar.
///
/// x is `[n, in]`, weight `[vocab, in]` and bias `[vocab]`, as of [`linear`]; labels are u32 `[n]`.
/// On a [`Tape`](super::Tape) some 320 MiB of the logits `[n, vocab]` exist at a time. As in Liger
/// Kernel (Hsu et al. 2024, <https://arxiv.org/abs/2410.10989>), the forward pass turns those of a chunk
/// of rows into their gradient, and that into its part of the gradients of the arguments, summed in
/// f32; the backward pass scales these, unless the gradient of the loss is 1. A loss that is never
/// differentiated costs as much as one that is.
///
/// # Errors
/// As [`linear`] and [`cross_entropy`].
pub fn linear_cross_entropy(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    labels: &Tensor,
) -> Result<Tensor> {
    let layer = Linear::new(x, weight, bias, None)?;
    if !layer.records() {
        return cross_entropy(&linear(x, weight, bias)?, labels);
    }
    let op = "linear_cross_entropy";
    if x.rank() != 2 || x.elem_count() == 0 {
        bail!(
            "{op}: got x of shape {:?}, expected [n, in] with at least one row; skip batches without labels",
            x.dims()
        )
    }
    super::check_dtype(op, "labels", labels, DType::U32)?;
    super::check_shape(op, "labels", labels, &[x.dim(0)?], "the rows of x")?;
    let layer = match layer.needs_f32() {
        true => layer.in_f32()?,
        false => layer,
    };
    record(layer, &labels.contiguous()?)
}

fn record(layer: Linear, labels: &Tensor) -> Result<Tensor> {
    let (rows, vocab) = (layer.x.dim(0)?, layer.weight.dim(0)?);
    if let Operand::Cpu(labels, layout) = Locked::new(labels).operand()? {
        check_labels(values(labels, layout)?, vocab)?;
    }
    let bytes = rows * vocab * layer.x.dtype().size_in_bytes();
    let step = rows
        .div_ceil(bytes.div_ceil(CHUNK_BYTES))
        .next_multiple_of(ROWS);
    let mut parts = Parts::default();
    for start in (0..rows).step_by(step) {
        parts.add_chunk(&layer, labels, start..rows.min(start + step))?;
    }
    let losses = Tensor::cat(&parts.losses, 0)?.to_dtype(DType::F64)?;
    let loss = tape::variable(&losses.mean_all()?.to_dtype(DType::F32)?)?;
    tape::push("linear_cross_entropy", &loss, move |grad, gradients| {
        if !parts.dx.is_empty() {
            let dx = grad.scale(Tensor::cat(&parts.dx, 0)?)?;
            gradients.add(&layer.x, cast(&dx, layer.x.dtype())?)?;
        }
        let rest = [
            (Some(&layer.weight), parts.d_weight),
            (layer.bias.as_ref(), parts.d_bias),
        ];
        for (input, d_input) in rest {
            if let (Some(input), Some(d_input)) = (input, d_input) {
                gradients.add(input, grad.scale(d_input)?)?;
            }
        }
        Ok(())
    });
    Ok(loss)
}

/// What the chunks give: each some rows, or a part of a sum. Gradients are of the mean loss.
#[derive(Default)]
struct Parts {
    losses: Vec<Tensor>,
    dx: Vec<Tensor>,
    d_weight: Option<Tensor>,
    d_bias: Option<Tensor>,
}

impl Parts {
    fn add_chunk(&mut self, layer: &Linear, labels: &Tensor, rows: Range<usize>) -> Result<()> {
        let scale = 1.0 / layer.x.dim(0)? as f32;
        let (weight, vocab) = (layer.weight.detach(), layer.weight.dim(0)?);
        let x = layer.x.detach().narrow(0, rows.start, rows.len())?;
        let labels = labels.narrow(0, rows.start, rows.len())?;

        let bias_locked = layer.bias.as_ref().map(Locked::new);
        let bias = bias_locked.as_ref().map(Locked::operand).transpose()?;
        let locked = (Locked::new(&x), Locked::new(&weight));
        let mut logits = dense(locked.0.operand()?, locked.1.operand()?, bias, None)?;
        drop((locked, bias_locked));
        let losses = cross_entropy_in_place(&mut logits, &labels, vocab)?;
        self.losses.push(losses);

        // Of the sum of the losses: small numbers would be lost in f16.
        let d_logits = plain(logits, (rows.len(), vocab));
        let gradient = |matrices, transposed, add| {
            scaled_product(scale, matrices, transposed, add, DType::F32)
        };
        if layer.x.track_op() {
            self.dx
                .push(gradient([&d_logits, &weight], [false, false], None)?);
        }
        if layer.weight.track_op() {
            let before = self.d_weight.take();
            let sum = gradient([&d_logits, &x], [true, false], before.as_ref())?;
            self.d_weight = Some(sum);
        }
        if layer.bias.as_ref().is_some_and(Tensor::track_op) {
            let sum = (d_logits.apply_op1_no_bwd(&ColumnSum)? * f64::from(scale))?;
            self.d_bias = Some(match self.d_bias.take() {
                Some(before) => (before + sum)?,
                None => sum,
            });
        }
        Ok(())
    }
}

//! Cross-entropy of a softmax with its labels.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape};
use candle_core::{Storage, Tensor, WithDType, bail};
use rayon::prelude::*;

use super::Saved;
use super::cpu::{exp, max, sum, values, vectorized, with_element, zeros};
#[cfg(feature = "cuda")]
use crate::cuda::ops as cuda;
use crate::element::{Element, check_dtype};
use crate::operand::Locked;
use crate::tape;

/// Label of rows without loss and gradient.
pub const IGNORED: u32 = u32::MAX;

/// Mean of `ln(sum(exp(logits[i]))) - logits[i, labels[i]]` over the rows, in nats; an f32 scalar.
///
/// logits are `[n, vocab]` in f32, bf16 or f16, computed with in f32; labels are u32 `[n]`. Rows labelled
/// [`IGNORED`] count in the mean with a loss of 0. Only the log-sum-exp of each row is kept for the backward pass.
///
/// # Errors
/// When a dtype or shape is another, there are no rows, or a label is not below `vocab`. On a GPU,
/// where that would have to be waited for, such a label makes the loss NaN instead.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let op = "cross_entropy";
    check_dtype(op, logits.dtype())?;
    super::check_dtype(op, "labels", labels, DType::U32)?;
    if logits.rank() != 2 || logits.elem_count() == 0 {
        bail!(
            "{op}: got logits of shape {:?}, expected [n, vocab] with at least one row; skip batches without labels",
            logits.dims()
        )
    }
    super::check_shape(
        op,
        "labels",
        labels,
        &[logits.dim(0)?],
        "the rows of logits",
    )?;
    let op = CrossEntropy {
        lse: Saved::default(),
    };
    tape::apply2(op, &logits.contiguous()?, &labels.contiguous()?)
}

/// On the CPU, where they can be read without waiting.
pub(super) fn check_labels(labels: &[u32], vocab: usize) -> Result<()> {
    let is_wrong = |label: &u32| *label as usize >= vocab && *label != IGNORED;
    match labels.iter().position(is_wrong) {
        Some(row) => bail!(
            "cross_entropy: got label {} in row {row}, but logits has {vocab} columns",
            labels[row]
        ),
        None => Ok(()),
    }
}

struct CrossEntropy {
    /// Log-sum-exp of every row, f32 `[n]`, for the backward pass.
    lse: Saved,
}

#[inline(always)]
fn log_sum_exp<T: Element>(logits: &[T]) -> f32 {
    let max = max(logits);
    max + sum(logits, |x| exp(x.to_f32() - max)).ln()
}

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        logits_layout: &Layout,
        labels: &CpuStorage,
        labels_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, vocab) = logits_layout.shape().dims2()?;
        let labels = values::<u32>(labels, labels_layout)?;
        check_labels(labels, vocab)?;
        let (lse, losses): (Vec<_>, Vec<_>) = with_element!(logits.dtype(), T => {
            let logits = values::<T>(logits, logits_layout)?.par_chunks(vocab).zip(labels);
            let row = |(logits, label): (&[T], &u32)| {
                let lse = vectorized(
                    #[inline(always)]
                    || log_sum_exp(logits),
                );
                let logit = logits.get(*label as usize);
                (lse, logit.map_or(0.0, |logit| f64::from(lse - logit.to_f32())))
            };
            logits.map(row).unzip()
        });
        self.lse.put(Tensor::from_vec(lse, rows, &Device::Cpu)?);
        let mean = losses.iter().sum::<f64>() / rows as f64;
        Ok((CpuStorage::F32(vec![mean as f32]), ().into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        logits: &CudaStorage,
        logits_layout: &Layout,
        labels: &CudaStorage,
        labels_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (loss, lse) = cuda::cross_entropy((logits, logits_layout), (labels, labels_layout))?;
        self.lse.put(lse);
        Ok((loss, ().into()))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        labels: &Tensor,
        _loss: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let backward = CrossEntropyBackward {
            lse: self.lse.get()?,
        };
        Ok((
            Some(logits.apply_op3_no_bwd(labels, grad, &backward)?),
            None,
        ))
    }
}

/// `(softmax(logits) - onehot(labels)) * grad / n`.
struct CrossEntropyBackward<'a> {
    lse: &'a Tensor,
}

#[inline(always)]
fn backward_row<T: Element>(logits: &[T], label: usize, lse: f32, scale: f32, d_logits: &mut [T]) {
    if label >= logits.len() {
        return d_logits.fill(T::from_f32(0.0));
    }
    let probability = |logit: T| exp(logit.to_f32() - lse);
    for (d, logit) in d_logits.iter_mut().zip(logits) {
        *d = T::from_f32(probability(*logit) * scale);
    }
    d_logits[label] = T::from_f32((probability(logits[label]) - 1.0) * scale);
}

impl CustomOp3 for CrossEntropyBackward<'_> {
    fn name(&self) -> &'static str {
        "cross_entropy backward"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        logits_layout: &Layout,
        labels: &CpuStorage,
        labels_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, vocab) = logits_layout.shape().dims2()?;
        let labels = values::<u32>(labels, labels_layout)?;
        let scale = values::<f32>(grad, grad_layout)?[0] / rows as f32;
        let lse = Locked::new(self.lse);
        let lse = lse.operand()?.values::<f32>()?;
        let d_logits = with_element!(logits.dtype(), T => {
            let logits = values::<T>(logits, logits_layout)?;
            let mut d_logits = zeros(logits.len());
            (logits.par_chunks(vocab), d_logits.par_chunks_mut(vocab), labels, lse)
                .into_par_iter()
                .for_each(|(logits, d_logits, &label, &lse)| {
                    vectorized(
                        #[inline(always)]
                        move || backward_row(logits, label as usize, lse, scale, d_logits),
                    )
                });
            T::to_cpu_storage_owned(d_logits)
        });
        Ok((d_logits, logits_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        logits: &CudaStorage,
        logits_layout: &Layout,
        labels: &CudaStorage,
        labels_layout: &Layout,
        grad: &CudaStorage,
        grad_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (labels, grad) = ((labels, labels_layout), (grad, grad_layout));
        cuda::cross_entropy_backward((logits, logits_layout), labels, grad, self.lse)
    }
}

/// The loss of every row, f32 `[rows]`, outside of any graph. The logits `[rows, vocab]` become the
/// gradient of the sum of the losses. On the CPU logits are f32, and labels checked before.
pub(super) fn cross_entropy_in_place(
    logits: &mut Storage,
    labels: &Tensor,
    vocab: usize,
) -> Result<Tensor> {
    let labels = Locked::new(labels);
    match logits {
        Storage::Cpu(CpuStorage::F32(logits)) => {
            let labels = labels.operand()?.values::<u32>()?;
            let row = |(row, label): (&mut [f32], &u32)| {
                vectorized(
                    #[inline(always)]
                    || in_place_row(row, *label as usize),
                )
            };
            let losses = logits.par_chunks_mut(vocab).zip(labels).map(row);
            Tensor::from_vec(losses.collect::<Vec<f32>>(), labels.len(), &Device::Cpu)
        }
        #[cfg(feature = "cuda")]
        Storage::Cuda(logits) => {
            cuda::cross_entropy_in_place(logits, labels.operand()?.cuda()?, vocab)
        }
        logits => bail!(
            "cross_entropy: got {:?} logits on {:?}, expected F32 on a CPU, or an NVIDIA GPU",
            logits.dtype(),
            logits.device().location()
        ),
    }
}

#[inline(always)]
fn in_place_row(row: &mut [f32], label: usize) -> f32 {
    if label >= row.len() {
        row.fill(0.0);
        return 0.0;
    }
    let lse = log_sum_exp(row);
    let loss = lse - row[label];
    row.iter_mut().for_each(|x| *x = exp(*x - lse));
    row[label] -= 1.0;
    loss
}

//! Dropout (Srivastava et al. 2014, <https://jmlr.org/papers/v15/srivastava14a.html>).

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::bail;
use candle_core::{
    CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, WithDType,
};
use rayon::prelude::*;

use super::cpu::{self, CHUNK, values, vectorized, with_element, zeros};
#[cfg(feature = "cuda")]
use crate::cuda::ops as cuda;
use crate::element::{Element, check_dtype};
use crate::operand::{Locked, Operand};
use crate::philox::DropoutMask;
use crate::spec::Dropout;
use crate::tape::{self, Target};

/// Elements whose random words are drawn together.
const LANES: usize = 64;

/// Zeroes elements of x with probability p and multiplies the others by `1 / (1 - p)`.
///
/// x is f32, bf16 or f16 of any shape. What is dropped depends on the seed and the place alone, so
/// nothing is kept for the backward pass: element i, counted in row-major order, is dropped when
/// word `i % 4` of Philox4x32-10 with counter `(i / 4 low, i / 4 high, 0, 0)` and key
/// `(seed low, seed high)` is below `p * 2^32`.
///
/// # Errors
/// When the dtype is another, or p is outside `[0, 1)`.
pub fn dropout(x: &Tensor, p: f32, seed: u64) -> Result<Tensor> {
    let dropout = checked(x.dtype(), p, seed)?;
    if p == 0.0 {
        return Ok(x.clone());
    }
    let (drop, x) = (DropElements(dropout), x.contiguous()?);
    if !tape::records(&[&x]) {
        return x.apply_op1(drop);
    }
    let y = tape::run1(&drop, &x)?;
    let x = Target::from(&x);
    tape::push("dropout", &y, move |grad, gradients| {
        gradients.add(x, grad.value.contiguous()?.apply_op1_no_bwd(&drop)?)
    });
    Ok(y)
}

/// `residual + dropout(x)`, of one shape and dtype. On a tape on a GPU it is rounded once, else after
/// each of the two.
///
/// # Errors
/// As [`dropout`], and when the residual does not fit.
pub fn dropout_add(x: &Tensor, p: f32, seed: u64, residual: &Tensor) -> Result<Tensor> {
    super::check_dtype("dropout", "residual", residual, x.dtype())?;
    super::check_shape("dropout", "residual", residual, x.dims(), "x")?;
    let (x, residual) = (x.contiguous()?, residual.contiguous()?);
    if !tape::records(&[&x, &residual]) {
        return dropout(&x, p, seed)? + residual;
    }
    let drop = DropElements(checked(x.dtype(), p, seed)?);
    let sum = drop.add(&x, &residual)?;
    let y = tape::output(sum, x.shape());
    let [x, residual] = [&x, &residual].map(Target::from);
    tape::push("dropout_add", &y, move |grad, gradients| {
        let grad = grad.value.contiguous()?;
        gradients.add(x, grad.apply_op1_no_bwd(&drop)?)?;
        gradients.add(residual, grad)
    });
    Ok(y)
}

fn checked(dtype: DType, p: f32, seed: u64) -> Result<Dropout> {
    check_dtype("dropout", dtype)?;
    if !(0.0..1.0).contains(&p) {
        bail!("dropout: got probability {p}, expected one in [0, 1)")
    }
    Ok(Dropout { p, seed })
}

struct DropElements(Dropout);

impl DropElements {
    /// `residual + drop(x)`.
    fn add(&self, x: &Tensor, residual: &Tensor) -> Result<Storage> {
        let locked = (Locked::new(x), Locked::new(residual));
        match (locked.0.operand()?, locked.1.operand()?) {
            (Operand::Cpu(x, layout), Operand::Cpu(residual, residual_layout)) => {
                with_element!(x.dtype(), T => {
                    let dropped = self.apply::<T>(values(x, layout)?);
                    let residual = values(residual, residual_layout)?;
                    let sum = cpu::map2(&dropped, residual, |x, residual| x + residual);
                    Ok(Storage::Cpu(T::to_cpu_storage_owned(sum)))
                })
            }
            #[cfg(feature = "cuda")]
            (x, residual) => {
                let sum = cuda::dropout(x.cuda()?, Some(residual.cuda()?), self.0)?;
                Ok(Storage::Cuda(sum.0))
            }
            #[cfg(not(feature = "cuda"))]
            _ => bail!("dropout: this program was built without CUDA"),
        }
    }

    fn apply<T: Element>(&self, x: &[T]) -> Vec<T> {
        let mask = DropoutMask::new(self.0);
        let mut y = zeros(x.len());
        let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate();
        chunks.for_each(|(chunk, (y, x))| {
            let first_group = (chunk * CHUNK / 4) as u64;
            vectorized(
                #[inline(always)]
                || drop_chunk(mask, first_group, x, y),
            )
        });
        y
    }
}

#[inline(always)]
fn drop_chunk<T: Element>(mask: DropoutMask, first_group: u64, x: &[T], y: &mut [T]) {
    let blocks = x.chunks(LANES).zip(y.chunks_mut(LANES));
    for ((x, y), group) in blocks.zip((first_group..).step_by(LANES / 4)) {
        let keeps = mask.keeps_elements::<{ LANES / 4 }>(group);
        for (i, (x, y)) in x.iter().zip(y).enumerate() {
            let factor = if keeps[i % 4][i / 4] { mask.scale } else { 0.0 };
            *y = T::from_f32(x.to_f32() * factor);
        }
    }
}

impl CustomOp1 for DropElements {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = with_element!(x.dtype(), T => {
            T::to_cpu_storage_owned(self.apply::<T>(values(x, layout)?))
        });
        Ok((y, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::dropout((x, layout), None, self.0)
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1_no_bwd(self).map(Some)
    }
}

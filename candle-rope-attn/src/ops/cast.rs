//! Conversion of the dtype.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Result, Storage, Tensor};

use super::plain;
#[cfg(feature = "cuda")]
use crate::cuda::ops as cuda;
use crate::element::check_dtype;
use crate::operand::{Locked, Operand};
use crate::tape::{self, Target};

/// `x` in another dtype, contiguous; both are f32, bf16 or f16.
///
/// On a [`Tape`](super::Tape) an f32 weight that is used as bf16 has an f32 gradient where an
/// operation gives one: the gradient is not rounded on its way back.
///
/// # Errors
/// When a dtype is another, or memory runs out.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    check_dtype("cast", x.dtype())?;
    check_dtype("cast", dtype)?;
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    let records = tape::records(&[x]);
    if x.track_op() && !records {
        return x.to_dtype(dtype)?.contiguous();
    }
    let converted = convert(&x.contiguous()?, dtype)?;
    if !records {
        return Ok(plain(converted, x.shape()));
    }
    let y = tape::output(converted, x.shape());
    let (target, dtype) = (Target::from(x), x.dtype());
    tape::push_wide("cast", &y, move |grad, gradients| {
        let grad = grad.value;
        if grad.dtype() == dtype {
            return gradients.add(target, grad);
        }
        let converted = convert(&grad.contiguous()?, dtype)?;
        gradients.add(target, plain(converted, grad.shape()))
    });
    Ok(y)
}

/// Of a contiguous tensor.
fn convert(x: &Tensor, dtype: DType) -> Result<Storage> {
    match Locked::new(x).operand()? {
        Operand::Cpu(x, layout) => Ok(Storage::Cpu(x.to_dtype(layout, dtype)?)),
        #[cfg(feature = "cuda")]
        Operand::Cuda(x, layout) => cuda::cast((x, layout), dtype).map(Storage::Cuda),
        #[cfg(not(feature = "cuda"))]
        Operand::Cuda(x, layout) => Ok(Storage::Cuda(x.to_dtype(layout, dtype)?)),
    }
}

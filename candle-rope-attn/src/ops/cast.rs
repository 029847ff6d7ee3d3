//! Conversion of the dtype.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Result, Storage, Tensor};

use crate::operand::{Locked, Operand};
use crate::tape;

/// `x` in another dtype, contiguous.
///
/// On a [`Tape`](super::Tape) the gradient of x is that of the result without rounding, so that an
/// f32 weight that is used as bf16 has an f32 gradient where an operation gives one.
///
/// # Errors
/// When memory runs out.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    if !tape::records(&[x]) {
        return x.to_dtype(dtype)?.contiguous();
    }
    let storage = match Locked::new(x).operand()? {
        Operand::Cpu(x, layout) => Storage::Cpu(x.to_dtype(layout, dtype)?),
        Operand::Cuda(x, layout) => Storage::Cuda(x.to_dtype(layout, dtype)?),
    };
    let y = tape::output(storage, x.shape());
    let x = x.clone();
    tape::push(&y, move |grad, gradients| {
        let wider = grad.dtype().size_in_bytes() > x.dtype().size_in_bytes();
        let grad = if wider {
            grad
        } else {
            grad.to_dtype(x.dtype())?
        };
        gradients.add(&x, grad)
    });
    Ok(y)
}

//! Differentiable operations besides attention.
//!
//! Each runs on f32, bf16 and f16 with f32 arithmetic and has a backward pass of its own, in Candle's
//! graph or, for a training step that is fast and small, on a [`Tape`]. Results on the CPU are the same
//! bits on any number of threads.

mod adamw;
mod cast;
pub(crate) mod cpu;
mod cross_entropy;
mod dropout;
mod gather;
mod gelu;
mod global_norm;
mod layer_norm;
mod linear;
mod linear_cross_entropy;
mod overwrite;
pub(crate) mod product;
mod rope;

use std::sync::OnceLock;

use candle_core::op::BackpropOp;
use candle_core::{Context, DType, Device, Result, Shape, Storage, Tensor, bail};

pub use adamw::{AdamW, AdamWState, Parameter};
pub use cast::cast;
pub use cross_entropy::{IGNORED, cross_entropy};
pub use dropout::{dropout, dropout_add};
pub use gather::{MAX_TABLES, embedding, embedding_sum, gather_rows};
pub use gelu::gelu;
pub use global_norm::global_norm;
pub use layer_norm::{layer_norm, layer_norm_as};
#[cfg(feature = "cuda")]
pub(crate) use linear::linear_rotated;
pub use linear::{linear, linear_add, mlp_add};
pub use linear_cross_entropy::linear_cross_entropy;
pub use overwrite::{overwrite, upload};
pub use rope::rope;

pub use crate::profile::{Part, Profile};
pub use crate::tape::{Gradients, Tape, checkpoint};
use gelu::gelu_linear_backward;

/// A contiguous tensor outside of any graph.
fn plain(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Checks the dtype of a tensor.
fn check_dtype(op: &str, name: &str, tensor: &Tensor, expected: DType) -> Result<()> {
    if tensor.dtype() != expected {
        bail!(
            "{op}: got {name} of dtype {:?}, expected {expected:?}; convert it with to_dtype",
            tensor.dtype()
        )
    }
    Ok(())
}

/// Checks the shape of a tensor; `why` says where the expected one comes from.
fn check_shape(op: &str, name: &str, tensor: &Tensor, expected: &[usize], why: &str) -> Result<()> {
    if tensor.dims() != expected {
        bail!(
            "{op}: got {name} of shape {:?}, expected {expected:?} to fit {why}",
            tensor.dims()
        )
    }
    Ok(())
}

/// Checks the device of a tensor.
fn check_device(op: &str, name: &str, tensor: &Tensor, expected: &Device) -> Result<()> {
    if !tensor.device().same_device(expected) {
        bail!(
            "{op}: got {name} on {:?}, expected it on {:?}; move it with to_device",
            tensor.device().location(),
            expected.location()
        )
    }
    Ok(())
}

/// A tensor that one run of an operation leaves beside its result.
#[derive(Default)]
struct Saved(OnceLock<Tensor>);

impl Saved {
    fn put(&self, tensor: Tensor) {
        self.0.get_or_init(|| tensor);
    }

    fn get(&self) -> Result<&Tensor> {
        self.0.get().context("the operation has not run yet")
    }
}

//! The norm of all gradients together.

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{vectorized, with_element};
use crate::element::{Element, check_dtype};
use crate::operand::Locked;

/// Elements whose squares one task sums.
const BLOCK: usize = 1 << 16;

/// Euclidean norm of all elements of all tensors, an f32 scalar on their device, as
/// `torch.nn.utils.get_total_norm`. The tensors are f32, bf16 or f16, of any shapes.
///
/// Not finite when an element is not.
///
/// # Errors
/// When there is no tensor, they are on several devices, or a dtype is another.
pub fn global_norm(tensors: &[Tensor]) -> Result<Tensor> {
    let op = "global_norm";
    let Some(first) = tensors.first() else {
        bail!("{op}: got no tensors, expected at least one")
    };
    for tensor in tensors {
        check_dtype(op, tensor.dtype())?;
        super::check_device(op, "a tensor", tensor, first.device())?;
    }
    let tensors = tensors
        .iter()
        .map(Tensor::contiguous)
        .collect::<Result<Vec<_>>>()?;
    match first.device() {
        Device::Cpu => cpu(&tensors),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::cuda::ops::global_norm(device, &tensors),
        device => bail!(
            "{op}: got tensors on {:?}, which it has no kernels for",
            device.location()
        ),
    }
}

fn cpu(tensors: &[Tensor]) -> Result<Tensor> {
    let mut total = 0.0;
    for tensor in tensors {
        let tensor = Locked::new(tensor);
        let operand = tensor.operand()?;
        let blocks: Vec<f64> = with_element!(operand.dtype(), T => {
            operand.values::<T>()?.par_chunks(BLOCK).map(sum_of_squares).collect()
        });
        total += blocks.iter().sum::<f64>();
    }
    Tensor::new(total.sqrt() as f32, &Device::Cpu)
}

fn sum_of_squares<T: Element>(x: &[T]) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [0.0; LANES];
    vectorized(
        #[inline(always)]
        || {
            let (blocks, rest) = x.as_chunks::<LANES>();
            for block in blocks {
                for (lane, x) in lanes.iter_mut().zip(block) {
                    *lane += f64::from(x.to_f32()).powi(2);
                }
            }
            for (lane, x) in lanes.iter_mut().zip(rest) {
                *lane += f64::from(x.to_f32()).powi(2);
            }
        },
    );
    lanes.iter().sum()
}

//! Numbers from the host in a tensor, new or there already.

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, Storage};

#[cfg(feature = "cuda")]
use crate::cuda::ops as cuda;

/// Ids, positions or labels as a u32 tensor `[n]`. A GPU's work so far is not waited for, as
/// [`Tensor::new`] does with more than a few.
///
/// # Errors
/// When memory runs out.
pub fn upload(values: &[u32], device: &Device) -> Result<Tensor> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let storage = cuda::upload(device, values)?;
            Ok(super::plain(Storage::Cuda(storage), values.len()))
        }
        device => Tensor::new(values, device),
    }
}

/// Replaces the elements of x, u32 and contiguous, for all who share its memory: a
/// [`Graph`](crate::Graph) then works on these.
///
/// # Errors
/// When x has another dtype, gaps, or another number of elements.
pub fn overwrite(x: &Tensor, values: &[u32]) -> Result<()> {
    super::check_dtype("overwrite", "x", x, DType::U32)?;
    if x.elem_count() != values.len() || !x.is_contiguous() {
        bail!(
            "overwrite: got {} values for x of shape {:?} and strides {:?}, expected one for each element of a contiguous tensor",
            values.len(),
            x.dims(),
            x.stride()
        )
    }
    x.inplace_op1(&Overwrite(values))
}

struct Overwrite<'a>(&'a [u32]);

impl InplaceOp1 for Overwrite<'_> {
    fn name(&self) -> &'static str {
        "overwrite"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::U32(x) = x else {
            unreachable!("the dtype was checked")
        };
        x[layout.start_offset()..][..self.0.len()].copy_from_slice(self.0);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &mut CudaStorage, layout: &Layout) -> Result<()> {
        cuda::overwrite(x, layout.start_offset(), self.0)
    }
}

//! Work on a GPU that is launched as a whole.

use std::fmt::Display;

#[cfg(feature = "cuda")]
use candle_core::CudaDevice;
use candle_core::{Device, Error, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use crate::cuda::graph::Captured;

/// A CUDA graph: the kernels that some work launches, captured once and then launched together. That takes
/// a processor about as long as two or three kernels by themselves.
///
/// A replay is the same kernels on the same memory, so that the work
///
/// - reads tensors that exist before, and sees what is in them then: [`overwrite`](crate::ops::overwrite)
///   gives it other numbers, and an optimizer other weights. They live as long as the graph, which owns
///   the work.
/// - has shapes, and sizes in [`Sequences`](crate::Sequences), that are the same at every replay.
/// - neither copies to the host nor waits for the device. What operations upload, such as bounds of
///   sequences or strides, is found again: it was uploaded when the work ran before the capture.
/// - keeps no tensor but its result: what it allocates belongs to the graph. Gradients are results as others,
///   of a [`Tape`](crate::ops::Tape) that the work records and goes back; so a whole training step can be
///   captured.
///
/// ```no_run
/// use candle_core::{DType, Result, Tensor};
/// use candle_rope_attn::{Graph, cuda_device, ops};
///
/// # fn main() -> Result<()> {
/// let device = cuda_device(0)?;
/// let table = Tensor::randn(0f32, 1f32, (100, 64), &device)?;
/// let ids = Tensor::new(&[1u32, 2, 3], &device)?;
/// let work = { let ids = ids.clone(); move || ops::embedding(&ids, &table)?.sqr() };
/// let mut graph = Graph::capture(&device, work)?;
/// ops::overwrite(&ids, &[7, 8, 9])?;
/// let squares = graph.replay()?.to_vec2::<f32>()?;
/// # Ok(())
/// # }
/// ```
///
/// A graph may move to another thread as a tensor may: once the device has been waited for, as each
/// thread has its own order of work; and while the thread that captured it is there, which keeps what was
/// uploaded.
pub struct Graph {
    #[cfg(feature = "cuda")]
    captured: Captured,
    result: Tensor,
    /// Owns the tensors that the kernels read.
    _work: Box<dyn Send>,
}

impl Graph {
    /// Runs `work` as usual, and once more without effect to capture what it launches.
    ///
    /// # Errors
    /// Those of the work, and, once it ran, when it cannot be captured, or the second time was not as
    /// the first, of which the type documents what that takes; the device goes on working. On another
    /// device than a GPU with memory pools, and where events track the work of several streams.
    pub fn capture<E: Display + From<Error>>(
        device: &Device,
        work: impl Fn() -> std::result::Result<Tensor, E> + Send + 'static,
    ) -> std::result::Result<Self, E> {
        let result = Self::rehearse(device, &work)?;
        Ok(Self::capture_rehearsed(device, result, work)?)
    }

    /// The first half of [`Self::capture`], for work that must not be lost or done again when it cannot be
    /// captured: runs it as usual, and keeps what it uploads for a capture. Gives a copy of its result.
    ///
    /// # Errors
    /// Those of the work.
    pub fn rehearse<E: From<Error>>(
        device: &Device,
        work: impl Fn() -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Tensor, E> {
        #[cfg(feature = "cuda")]
        let _keeping = device
            .as_cuda_device()
            .ok()
            .map(CudaDevice::enable_cuda_graph_htod_cache);
        let _ = device;
        // A copy, as it may be a tensor that lives on elsewhere.
        Ok(work()?.contiguous()?.copy()?.detach())
    }

    /// The second half of [`Self::capture`]: captures work that was just rehearsed, without effect, but for
    /// `result`, which it gave and now belongs to the graph.
    ///
    /// # Errors
    /// As of [`Self::capture`].
    pub fn capture_rehearsed<E: Display>(
        device: &Device,
        result: Tensor,
        work: impl Fn() -> std::result::Result<Tensor, E> + Send + 'static,
    ) -> Result<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => {
                let captured = Captured::new(cuda, || {
                    let again = work().map_err(|error| Error::msg(format!("{error:#}")))?;
                    crate::cuda::graph::copy(&again.contiguous()?, &result)
                })?;
                Ok(Self {
                    captured,
                    result,
                    _work: Box::new(work),
                })
            }
            _ => {
                drop((result, work));
                bail!(
                    "CUDA graphs need an NVIDIA GPU and a program built with --features cuda, got {:?}; run the work as it is",
                    device.location()
                )
            }
        }
    }

    /// Does the work again, on what its tensors hold now, without waiting for the device. The result is
    /// that of the last replay for all who hold it.
    ///
    /// # Errors
    /// When the device failed or has no memory left.
    pub fn replay(&mut self) -> Result<&Tensor> {
        #[cfg(feature = "cuda")]
        self.captured.launch()?;
        Ok(&self.result)
    }

    /// The result of the last replay, or before one of the work as it ran first.
    pub fn result(&self) -> &Tensor {
        &self.result
    }
}

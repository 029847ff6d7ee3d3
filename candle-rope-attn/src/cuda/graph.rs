//! Capture and launch of CUDA graphs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, result, sys};
use candle_core::{CudaDevice, Error, Result, Tensor, bail};
use sys::CUgraphNodeType_enum::{CU_GRAPH_NODE_TYPE_MEM_ALLOC, CU_GRAPH_NODE_TYPE_MEM_FREE};
use sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE;

use super::ops::input;
use super::upload::{CapturedUploads, Upload};
use super::{Pointers, device};
use crate::operand::Locked;

/// Graphs that there are, by the number of their GPU.
static GRAPHS: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// See [`crate::Graph`].
pub(crate) struct Captured {
    /// None once dropped.
    graph: Option<CudaGraph>,
    stream: Arc<CudaStream>,
    /// What the kernels read beside tensors.
    _uploads: Vec<Upload>,
}

// SAFETY: the graph is used through a unique reference alone, and its handles belong to no thread.
unsafe impl Send for Captured {}

impl Captured {
    /// Captures what `work` launches.
    pub fn new(device: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        if !context.has_async_alloc() {
            bail!("CUDA graphs need a GPU with memory pools; run the work as it is")
        }
        if context.is_managing_stream_synchronization() {
            bail!(
                "CUDA graphs cannot wait for the events of several streams: open the device by candle_rope_attn::cuda_device, or call disable_event_tracking on it before its tensors are made"
            )
        }
        let capture = Capture::start(&stream)?;
        let uploads = CapturedUploads::start();
        // Candle refuses copies to the host as long as this lives, and from it those it does not keep.
        let refusing = device.enable_cuda_graph_htod_cache();
        let done = work();
        drop(refusing);
        let uploads = uploads.end();
        let graph = capture.end();
        let graph = match (done, graph) {
            (Ok(()), Ok(Some(graph))) => graph,
            (Err(error), _) | (Ok(()), Err(error)) => {
                // What was freed after the capture broke failed, which would be reported later.
                context.check_err().ok();
                return Err(explain(&error));
            }
            (Ok(()), Ok(None)) => bail!("CUDA captured no graph"),
        };
        let mut graphs = GRAPHS.lock().unwrap_or_else(PoisonError::into_inner);
        *graphs.entry(stream.context().ordinal()).or_default() += 1;
        drop(graphs);
        let captured = Self {
            graph: Some(graph),
            stream,
            _uploads: uploads,
        };
        captured.check_memory()?;
        Ok(captured)
    }

    pub fn launch(&mut self) -> Result<()> {
        let graph = self.graph.as_ref().map(CudaGraph::launch);
        graph.transpose().w().map_err(device::explain)?;
        Ok(())
    }

    /// Checks that the graph frees all that it allocates, and nothing else.
    fn check_memory(&self) -> Result<()> {
        let Some(graph) = &self.graph else {
            return Ok(());
        };
        let mut count = 0;
        // SAFETY: the graph is alive; without an array, this counts its nodes.
        unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut count) }
            .result()
            .w()?;
        let mut nodes = vec![std::ptr::null_mut(); count];
        // SAFETY: the graph is alive, and the array has `count` elements.
        unsafe { sys::cuGraphGetNodes(graph.cu_graph(), nodes.as_mut_ptr(), &mut count) }
            .result()
            .w()?;
        let (mut allocated, mut freed) = (0, 0);
        for node in nodes {
            let mut kind = CU_GRAPH_NODE_TYPE_MEM_ALLOC;
            // SAFETY: the node is one of a graph that is alive.
            unsafe { sys::cuGraphNodeGetType(node, &mut kind) }
                .result()
                .w()?;
            allocated += usize::from(kind == CU_GRAPH_NODE_TYPE_MEM_ALLOC);
            freed += usize::from(kind == CU_GRAPH_NODE_TYPE_MEM_FREE);
        }
        if allocated != freed {
            bail!(
                "the work of a CUDA graph allocated {allocated} times and freed {freed} times: it must keep no tensor but its result, and drop none made before"
            )
        }
        Ok(())
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        self.graph = None;
        let mut graphs = GRAPHS.lock().unwrap_or_else(PoisonError::into_inner);
        let left = graphs.entry(self.stream.context().ordinal()).or_insert(1);
        *left -= 1;
        // Graphs share memory, which the driver keeps for the next ones; the last one gives it back.
        if *left == 0 {
            let gpu = self.stream.context().cu_device();
            // SAFETY: the device of a context exists. Memory in use stays.
            self.stream
                .context()
                .record_err(unsafe { sys::cuDeviceGraphMemTrim(gpu) }.result());
        }
    }
}

/// A capture under way, which ends in any case.
struct Capture<'a>(&'a Arc<CudaStream>);

impl<'a> Capture<'a> {
    fn start(stream: &'a Arc<CudaStream>) -> Result<Self> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).w()?;
        Ok(Self(stream))
    }

    fn end(self) -> Result<Option<CudaGraph>> {
        // Such as of memory that could not be freed in a capture that broke. The stream would report it
        // before it ended anything.
        self.0.context().check_err().w()?;
        self.0.end_capture(sys::CUgraphInstantiate_flags(0)).w()
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        let stream = self.0.cu_stream();
        // SAFETY: the stream is alive.
        let status = unsafe { result::stream::is_capturing(stream) };
        if matches!(status, Ok(CU_STREAM_CAPTURE_STATUS_NONE)) {
            return;
        }
        // SAFETY: the stream is being captured; the graph, if there is one, is not used.
        if let Ok(graph) = unsafe { result::stream::end_capture(stream) }
            && !graph.is_null()
        {
            // SAFETY: nothing else has the graph.
            unsafe { result::graph::destroy(graph) }.ok();
        }
    }
}

fn explain(error: &Error) -> Error {
    Error::msg(format!(
        "cannot capture a CUDA graph: {error}. The work ran before; in a graph it must do the same again, without keeping gradients, without copies from or to the host (make tensors before, and overwrite them), and without waiting for the device"
    ))
}

/// Copies the elements of a contiguous tensor to another.
pub(crate) fn copy(from: &Tensor, to: &Tensor) -> Result<()> {
    if (from.shape(), from.dtype()) != (to.shape(), to.dtype()) {
        bail!(
            "the work gave {:?} {:?} now, and {:?} {:?} before",
            from.dims(),
            from.dtype(),
            to.dims(),
            to.dtype()
        )
    }
    let bytes = from.elem_count() * from.dtype().size_in_bytes();
    let (from, to) = (Locked::new(from), Locked::new(to));
    let (from, to) = (from.operand()?.cuda()?, to.operand()?.cuda()?);
    let stream = from.0.device.cuda_stream();
    let mut pointers = Pointers::new(&stream)?;
    let (from, to) = (input(&mut pointers, from)?, input(&mut pointers, to)?);
    // SAFETY: both are live device memory of that size. Changed under a lock for reading, as by AdamW.
    unsafe { result::memcpy_dtod_async(to as u64, from as u64, bytes, stream.cu_stream()) }.w()
}

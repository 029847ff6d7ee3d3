//! The choice of a GPU, and errors of the driver in words that help.

use candle_core::cuda_backend::cudarc::cublas::sys::{cublasMath_t, cublasSetMathMode};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaEvent, DriverError, result, sys};
use candle_core::cuda_backend::{CudaError, WrapErr};
use candle_core::{CudaDevice, Device, Error, Result, bail};
use sys::cudaError_enum as Code;

use crate::CudaMemory;

/// The version of CUDA that this program was built with, as `cuDriverGetVersion` counts: 13020 is
/// 13.2.
const BUILT_WITH: i32 = match i32::from_str_radix(env!("ATTN_CUDA_VERSION"), 10) {
    Ok(version) => version,
    Err(_) => panic!("the build script sets a number"),
};

/// The kernels use `cp.async` and bf16 tensor cores.
const MIN_COMPUTE_CAPABILITY: (i32, i32) = (8, 0);

/// See [`crate::cuda_device`].
pub(crate) fn open(ordinal: usize) -> Result<Device> {
    check_driver()?;
    let count = CudaContext::device_count().w()?;
    if ordinal >= count as usize {
        bail!(
            "GPU {ordinal} does not exist: CUDA shows {count}, numbered from 0; choose another, or see CUDA_VISIBLE_DEVICES"
        )
    }
    let device = Device::new_cuda(ordinal).map_err(explain)?;
    let stream = device.as_cuda_device()?.cuda_stream();
    let context = stream.context();
    let (major, minor) = context.compute_capability().w()?;
    if (major, minor) < MIN_COMPUTE_CAPABILITY {
        bail!(
            "GPU {ordinal} ({}) has compute capability {major}.{minor}, but the kernels need {}.{} or newer (A100, RTX 30 series and later); choose another",
            context.name().w()?,
            MIN_COMPUTE_CAPABILITY.0,
            MIN_COMPUTE_CAPABILITY.1,
        )
    }
    keep_freed_memory(context)?;
    sum_in_f32(device.as_cuda_device()?)?;
    // Two events for each tensor cost as much time as its memory.
    // SAFETY: all work of a thread goes to one stream, which uses and frees memory in order.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}

/// See [`crate::cuda_device_name`].
pub(crate) fn name(device: &CudaDevice) -> Result<String> {
    device.cuda_stream().context().name().w()
}

/// Starts the driver, and checks that it is new enough.
fn check_driver() -> Result<()> {
    if let Err(DriverError(code)) = result::init() {
        let advice = match code {
            Code::CUDA_ERROR_NO_DEVICE => {
                "found no NVIDIA GPU; see nvidia-smi and CUDA_VISIBLE_DEVICES"
            }
            Code::CUDA_ERROR_STUB_LIBRARY => {
                "libcuda.so is a stub for linking; install the NVIDIA driver, or take the stub out of LD_LIBRARY_PATH"
            }
            Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
                "the NVIDIA driver and its libcuda.so are of different versions; reboot, or reinstall the driver"
            }
            _ => "see nvidia-smi",
        };
        bail!("cannot start the NVIDIA driver: {advice} ({code:?})")
    }
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .w()?;
    if version < BUILT_WITH {
        let show = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        let (has, needs) = (show(version), show(BUILT_WITH));
        bail!(
            "the NVIDIA driver supports CUDA {has}, but this program was built with CUDA {needs}; update the driver, or build with a CUDA toolkit of {has} or older"
        )
    }
    Ok(())
}

/// Lets the device's memory pool keep what is freed. Otherwise the memory goes back to the system
/// at each synchronisation, and is slow to get again.
fn keep_freed_memory(context: &CudaContext) -> Result<()> {
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let Some(pool) = pool(context)? else {
        return Ok(());
    };
    // SAFETY: the pool exists, and the attribute is a u64.
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()) }.w()
}

/// Keeps cuBLAS from rounding partial sums of 16-bit products to 16 bits.
fn sum_in_f32(device: &CudaDevice) -> Result<()> {
    let blas = device.cublas_handle();
    let mode = cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the handle lives as long as `blas`.
    unsafe { cublasSetMathMode(*blas.handle(), mode) }
        .result()
        .w()
}

/// See [`crate::CudaMemory::of`].
pub(crate) fn memory(device: &CudaDevice) -> Result<Option<CudaMemory>> {
    use sys::CUgraphMem_attribute_enum::{
        CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT, CU_GRAPH_MEM_ATTR_USED_MEM_HIGH,
    };
    use sys::CUmemPool_attribute::{
        CU_MEMPOOL_ATTR_USED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_HIGH,
    };
    let stream = device.cuda_stream();
    let Some(pool) = pool(stream.context())? else {
        return Ok(None);
    };
    let read = |attribute| -> Result<u64> {
        let mut bytes = 0u64;
        // SAFETY: the pool exists, and the attribute is a u64.
        unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast()) }.w()?;
        Ok(bytes)
    };
    // What graphs allocate is in no pool.
    let gpu = stream.context().cu_device();
    let read_graphs = |attribute| -> Result<u64> {
        let mut bytes = 0u64;
        // SAFETY: the device of a context exists, and the attribute is a u64.
        let code =
            unsafe { sys::cuDeviceGetGraphMemAttribute(gpu, attribute, (&raw mut bytes).cast()) };
        code.result().w()?;
        Ok(bytes)
    };
    Ok(Some(CudaMemory {
        used: read(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?
            + read_graphs(CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT)?,
        peak: read(CU_MEMPOOL_ATTR_USED_MEM_HIGH)? + read_graphs(CU_GRAPH_MEM_ATTR_USED_MEM_HIGH)?,
    }))
}

/// See [`crate::CudaMemory::reset_peak`].
pub(crate) fn reset_peak_memory(device: &CudaDevice) -> Result<()> {
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let stream = device.cuda_stream();
    let Some(pool) = pool(stream.context())? else {
        return Ok(());
    };
    // Only 0 may be set, and means what is in use now.
    let mut bytes = 0u64;
    // SAFETY: the pool exists, and the attribute is a u64.
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut bytes).cast()) }.w()?;
    let attribute = sys::CUgraphMem_attribute_enum::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
    let gpu = stream.context().cu_device();
    // SAFETY: the device of a context exists, and the attribute is a u64.
    unsafe { sys::cuDeviceSetGraphMemAttribute(gpu, attribute, (&raw mut bytes).cast()) }
        .result()
        .w()
}

/// The memory pool that tensors are allocated from, where the device has such.
fn pool(context: &CudaContext) -> Result<Option<sys::CUmemoryPool>> {
    if !context.has_async_alloc() {
        return Ok(None);
    }
    // SAFETY: the device of a context exists.
    let pool = unsafe { result::device::get_default_mem_pool(context.cu_device()) };
    pool.map(Some).w()
}

/// The error, or a clearer one if GPU memory ran out.
pub(crate) fn explain(error: Error) -> Error {
    if !is_out_of_memory(&error) {
        return error;
    }
    let room = match result::mem_get_info() {
        Ok((free, total)) => format!(" ({} of {} MiB free)", free >> 20, total >> 20),
        Err(_) => String::new(),
    };
    Error::msg(format!(
        "out of GPU memory{room}; use smaller batches, shorter sequences or bf16, or another GPU"
    ))
}

fn is_out_of_memory(error: &Error) -> bool {
    match error {
        Error::Cuda(error) => matches!(
            error.downcast_ref(),
            Some(CudaError::Cuda(DriverError(Code::CUDA_ERROR_OUT_OF_MEMORY)))
        ),
        Error::WithBacktrace { inner, .. } | Error::Context { inner, .. } => {
            is_out_of_memory(inner)
        }
        _ => false,
    }
}

/// A point in the work of a device.
pub(crate) struct Event(CudaEvent);

impl Event {
    /// After all that was enqueued so far.
    pub fn record(device: &CudaDevice) -> Result<Self> {
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        device.cuda_stream().record_event(timed).w().map(Self)
    }

    /// Waits for both.
    pub fn seconds_to(&self, later: &Self) -> Result<f64> {
        Ok(f64::from(self.0.elapsed_ms(&later.0).w()?) / 1e3)
    }
}

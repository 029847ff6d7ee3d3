//! What the operations share on NVIDIA GPUs: memory, pointers of a launch, uploads and errors.

pub(crate) mod attention;
pub(crate) mod device;
mod ffi;
pub(crate) mod graph;
pub(crate) mod ops;
mod ops_ffi;
pub(crate) mod product;
pub(crate) mod rope;
mod upload;

use std::ffi::{CStr, c_int, c_void};

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape, Storage, Tensor, bail};

pub(crate) use upload::upload;

/// Evaluates an expression with `$slice` as the elements of a storage of F32, BF16, F16 or U32.
macro_rules! with_slice {
    ($storage_slice:expr, $slice:ident => $body:expr) => {
        match $storage_slice {
            CudaStorageSlice::F32($slice) => $body,
            CudaStorageSlice::BF16($slice) => $body,
            CudaStorageSlice::F16($slice) => $body,
            CudaStorageSlice::U32($slice) => $body,
            _ => bail!("got elements of another dtype, expected F32, BF16, F16 or U32"),
        }
    };
}

/// Uninitialised memory for `len` elements.
pub(crate) fn alloc<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: the kernels write every element before one is read. CUDA refuses to allocate nothing.
    unsafe { device.cuda_stream().alloc(len.max(1)) }
        .w()
        .map_err(device::explain)
}

/// Uninitialised memory for a result.
pub(crate) fn alloc_storage(device: &CudaDevice, dtype: DType, len: usize) -> Result<CudaStorage> {
    let slice = match dtype {
        DType::F32 => CudaStorageSlice::F32(alloc(device, len)?),
        DType::BF16 => CudaStorageSlice::BF16(alloc(device, len)?),
        DType::F16 => CudaStorageSlice::F16(alloc(device, len)?),
        _ => bail!("got dtype {dtype:?}, expected F32, BF16 or F16"),
    };
    let device = device.clone();
    Ok(CudaStorage { slice, device })
}

/// A contiguous tensor outside the graph.
pub(crate) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// Pointers for launches on one stream. If the device tracks the work of several streams, the launches
/// come after what others did before to the memory, and before what they do once this is dropped.
pub(crate) struct Pointers<'a> {
    stream: &'a CudaStream,
    guards: Vec<SyncOnDrop<'a>>,
}

impl<'a> Pointers<'a> {
    /// Makes the stream's device the current one of this thread, as launches need.
    pub fn new(stream: &'a CudaStream) -> Result<Self> {
        stream.context().bind_to_thread().w()?;
        let guards = Vec::new();
        Ok(Self { stream, guards })
    }

    /// The `cudaStream_t`.
    pub fn stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    pub fn read<T>(&mut self, slice: &'a CudaSlice<T>) -> *const T {
        let (pointer, guard) = slice.device_ptr(self.stream);
        self.guards.push(guard);
        pointer as *const T
    }

    pub fn write<T>(&mut self, slice: &'a mut CudaSlice<T>) -> *mut T {
        let (pointer, guard) = slice.device_ptr_mut(self.stream);
        self.guards.push(guard);
        pointer as *mut T
    }

    /// As [`Self::read`], of F32, BF16, F16 or U32 on the GPU of the stream.
    pub fn read_storage(&mut self, storage: &'a CudaStorage) -> Result<*const c_void> {
        let stream = storage.device.cuda_stream();
        let (found, expected) = (stream.context().ordinal(), self.stream.context().ordinal());
        if found != expected {
            bail!(
                "got a tensor on GPU {found} among others on GPU {expected}; move it with to_device"
            )
        }
        Ok(with_slice!(&storage.slice, slice => self.read(slice).cast()))
    }

    /// As [`Self::write`], of F32, BF16, F16 or U32.
    pub fn write_storage(&mut self, storage: &'a mut CudaStorage) -> Result<*mut c_void> {
        Ok(with_slice!(&mut storage.slice, slice => self.write(slice).cast()))
    }
}

/// The `AttnDtype` of a dtype; launchers refuse the code of one that has no kernels.
pub(crate) fn dtype_code(dtype: DType) -> i32 {
    match dtype {
        DType::BF16 => ffi::ATTN_BF16,
        DType::F16 => ffi::ATTN_F16,
        DType::F32 => ffi::ATTN_F32,
        _ => ffi::NO_ATTN_DTYPE,
    }
}

/// Turns the code that a launcher returned into an error; `call` says what was computed.
pub(crate) fn check(code: c_int, call: impl FnOnce() -> String) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: gives a static string for every code.
    let message = unsafe { CStr::from_ptr(ffi::attn_error_string(code)) };
    bail!("{}: {} (code {code})", call(), message.to_string_lossy())
}

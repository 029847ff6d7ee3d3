//! Host data on the device. Small data, such as sequence bounds and RoPE tables, is uploaded once and
//! found again by content, as all layers of a step ask for the same.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, DevicePtrMut, DeviceRepr, HostSlice, PinnedHostSlice, result,
};
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Result, Tensor};

use super::{alloc, device, tensor};

/// Uploads kept at a time. A step has a few; those of the last steps leave first.
const CAPACITY: usize = 32;

struct Entry {
    device: DeviceId,
    key: Box<dyn Any>,
    slice: Rc<dyn Any>,
}

/// Copies on their way at a time: some steps' worth, so that none has to be waited for.
const STAGED: usize = 32;

thread_local! {
    /// Page-locked memory that copies are made from, the one used last at the end.
    static STAGING: RefCell<VecDeque<PinnedHostSlice<u32>>> = RefCell::default();
    /// Those used last are at the end. Each thread has its own: uploads are ordered with the work
    /// of the stream they were made on, and Candle's devices have a stream a thread.
    static UPLOADS: RefCell<Vec<Entry>> = const { RefCell::new(Vec::new()) };
}

/// What `make` makes of `key`, in device memory. A type of key goes with one function `make`.
pub(crate) fn upload<K, T>(
    device: &CudaDevice,
    key: K,
    make: impl FnOnce(&K) -> Result<Vec<T>>,
) -> Result<Rc<CudaSlice<T>>>
where
    K: PartialEq + 'static,
    T: DeviceRepr + 'static,
{
    let found = UPLOADS.with_borrow_mut(|uploads| {
        let is_it = |entry: &Entry| {
            entry.device == device.id() && entry.key.downcast_ref::<K>() == Some(&key)
        };
        let entry = uploads.remove(uploads.iter().rposition(is_it)?);
        let slice = entry.slice.clone();
        uploads.push(entry);
        slice.downcast::<CudaSlice<T>>().ok()
    });
    if let Some(slice) = found {
        return Ok(slice);
    }
    let slice = device.clone_htod(&make(&key)?).map_err(device::explain)?;
    let slice = Rc::new(slice);
    UPLOADS.with_borrow_mut(|uploads| {
        if uploads.len() == CAPACITY {
            uploads.remove(0);
        }
        uploads.push(Entry {
            device: device.id(),
            key: Box::new(key),
            slice: slice.clone(),
        });
    });
    Ok(slice)
}

/// A tensor `[n]` of new numbers. From memory that is not page-locked the driver would copy them only
/// when the device has done all it was told before.
pub(crate) fn upload_numbers(device: &CudaDevice, numbers: &[u32]) -> Result<Tensor> {
    let stream = device.cuda_stream();
    let mut slice = alloc::<u32>(device, numbers.len())?;
    let mut staging = take_staging(device, numbers.len())?;
    staging.as_mut_slice().w()?[..numbers.len()].copy_from_slice(numbers);
    {
        let (to, _written) = slice.device_ptr_mut(&stream);
        // SAFETY: used with this stream only.
        let (from, _read) = unsafe { staging.stream_synced_slice(&stream) };
        // SAFETY: both hold that many numbers; the staging memory is not written again before its
        // event, which `_read` records, says that the copy is done.
        unsafe { result::memcpy_htod_async(to, &from[..numbers.len()], stream.cu_stream()) }.w()?;
    }
    STAGING.with_borrow_mut(|staged| staged.push_back(staging));
    let storage = CudaStorage {
        slice: CudaStorageSlice::U32(slice),
        device: device.clone(),
    };
    Ok(tensor(storage, numbers.len()))
}

/// Page-locked memory for at least `len` numbers.
fn take_staging(device: &CudaDevice, len: usize) -> Result<PinnedHostSlice<u32>> {
    let context = device.cuda_stream().context().clone();
    let oldest = STAGING.with_borrow_mut(|staged| match staged.len() {
        ..STAGED => None,
        _ => staged.pop_front(),
    });
    match oldest {
        Some(oldest) if oldest.len() >= len && oldest.context() == &context => Ok(oldest),
        // SAFETY: numbers are written before they are read.
        _ => unsafe { context.alloc_pinned(len.next_power_of_two()) }.w(),
    }
}

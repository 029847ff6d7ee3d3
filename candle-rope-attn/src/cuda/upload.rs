//! Small host data on the device, such as sequence bounds and RoPE tables: uploaded once and found
//! again by content, as all layers of a step ask for the same.

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;

use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaDevice, Result};

use super::device;

/// Uploads kept at a time. A step has a few; those of the last steps leave first.
const CAPACITY: usize = 32;

struct Entry {
    device: DeviceId,
    key: Box<dyn Any>,
    slice: Rc<dyn Any>,
}

thread_local! {
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

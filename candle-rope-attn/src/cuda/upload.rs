//! Small host data on the device, such as sequence bounds and RoPE tables: uploaded once and found
//! again by content, as all layers of a step ask for the same.

use std::any::Any;
use std::cell::RefCell;
use std::sync::Arc;

use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaDevice, Result, bail};

use super::device;

/// Uploads kept at a time. A step has a few; those of the last steps leave first.
const CAPACITY: usize = 32;

/// An upload of any element type.
pub(super) type Upload = Arc<dyn Any + Send + Sync>;

struct Entry {
    device: DeviceId,
    key: Box<dyn Any>,
    slice: Upload,
}

thread_local! {
    /// Those used last are at the end. Each thread has its own: uploads are ordered with the work
    /// of the stream they were made on, and Candle's devices have a stream a thread.
    static UPLOADS: RefCell<Vec<Entry>> = const { RefCell::new(Vec::new()) };

    /// While a graph is captured on this thread, what was handed out for it.
    static CAPTURED: RefCell<Option<Vec<Upload>>> = const { RefCell::new(None) };
}

/// From its start to its end or drop, uploads of this thread are for a graph that is captured: those
/// that the cache has are noted, others refused.
pub(super) struct CapturedUploads(());

impl CapturedUploads {
    pub fn start() -> Self {
        CAPTURED.set(Some(Vec::new()));
        Self(())
    }

    /// What the graph reads, whether the cache keeps it or not.
    pub fn end(self) -> Vec<Upload> {
        CAPTURED.take().unwrap_or_default()
    }
}

impl Drop for CapturedUploads {
    fn drop(&mut self) {
        CAPTURED.take();
    }
}

/// What `make` makes of `key`, in device memory. A type of key goes with one function `make`.
///
/// # Errors
/// When memory runs out, and when a graph is captured: it would copy again at each replay, from host
/// memory that is free by then.
pub(crate) fn upload<K, T>(
    device: &CudaDevice,
    key: K,
    make: impl FnOnce(&K) -> Result<Vec<T>>,
) -> Result<Arc<CudaSlice<T>>>
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
    let capturing = CAPTURED.with_borrow_mut(|captured| {
        if let (Some(captured), Some(slice)) = (&mut *captured, &found) {
            captured.push(slice.clone());
        }
        captured.is_some()
    });
    if let Some(slice) = found {
        return Ok(slice);
    }
    if capturing {
        bail!(
            "cannot upload {} while a CUDA graph is captured: the work must ask for what it asked for when it ran before",
            std::any::type_name::<K>()
        )
    }
    let slice = device.clone_htod(&make(&key)?).map_err(device::explain)?;
    let slice = Arc::new(slice);
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

//! The rows of tensors, which are read and written by head.

use std::marker::PhantomData;

use candle_core::{CpuStorage, Result};

use crate::batch::{Sequence, View};
use crate::element::Element;

/// The rows of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub data: &'a [T],
    pub view: View,
}

impl<'a, T: Element> Rows<'a, T> {
    pub fn new(storage: &'a CpuStorage, view: View) -> Result<Self> {
        let data = T::cpu_storage_as_slice(storage)?;
        Ok(Self { data, view })
    }
}

/// The rows of a tensor that tasks write, each its own.
#[derive(Clone, Copy)]
pub(super) struct RowsMut<'a, T> {
    pub data: &'a SharedMut<'a, T>,
    pub view: View,
}

/// A slice whose parts several tasks write.
pub(super) struct SharedMut<'a, T> {
    data: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]`, only accessed by `RowsMut::store`, whose callers keep rows apart.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub fn new(data: &'a mut [T]) -> Self {
        Self {
            data: data.as_mut_ptr(),
            len: data.len(),
            lifetime: PhantomData,
        }
    }
}

impl<T: Element> RowsMut<'_, T> {
    /// Rounds and writes the values from a row's beginning on.
    ///
    /// # Safety
    /// Nothing else accesses these elements meanwhile.
    pub unsafe fn store(&self, sequence: Sequence, row: usize, head: usize, values: &[f32]) {
        let start = self.view.row(sequence, row, head);
        assert!(start + values.len() <= self.data.len);
        // SAFETY: in bounds as asserted; exclusive as the caller promises.
        let out =
            unsafe { std::slice::from_raw_parts_mut(self.data.data.add(start), values.len()) };
        T::store(values, out);
    }
}

//! RoPE on NVIDIA GPUs: its tables for every kernel, and the rotation as an operation of its own.

use std::rc::Rc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Shape};

use super::attention::{rows_at, sizes, upload_list};
use super::ffi::AttnParams;
use super::{Pointers, alloc_storage, check, ops_ffi, upload};
use crate::batch::{Batch, View};
use crate::position::{RopeTable, Turn};
use crate::spec::{Rope, RopePairing, Sequences};

/// Every row of x turned by its position in its sequence. The last axis is contiguous.
pub(crate) fn rotate(
    rope: &Rope,
    batch: &Batch,
    turn: Turn,
    x: &CudaStorage,
    layout: &Layout,
) -> Result<(CudaStorage, Shape)> {
    let (device, dtype, shape) = (x.device(), x.dtype(), layout.shape());
    let mut out = alloc_storage(device, dtype, shape.elem_count())?;
    let table = upload_table(device, rope, batch.seqlen)?;
    let bounds = match &batch.sequences {
        Sequences::CuSeqlens(bounds) => Some(upload_list(device, bounds)?),
        _ => None,
    };
    let num_heads = layout.dims()[layout.dims().len() - 2];

    let stream = device.cuda_stream();
    let mut pointers = Pointers::new(&stream)?;
    let mut params = sizes(batch, num_heads, rope.head_dim(), dtype, &pointers)?;
    set_table(&mut params, rope, &table, &mut pointers);
    if let Some(bounds) = &bounds {
        params.cu_seqlens = pointers.read(bounds);
    }
    let from = pointers.read_storage(x)?.cast_mut();
    params.q = rows_at(from, View::new(layout), dtype);
    let to = pointers.write_storage(&mut out)?;
    params.o = rows_at(to, View::new(&Layout::contiguous(shape)), dtype);
    // SAFETY: the pointers are live device memory of the shapes and strides in `params`, which the
    // operation has checked, and stay so until the launch is enqueued.
    let code = unsafe { ops_ffi::op_rope(&params, (turn == Turn::Backward).into()) };
    check(code, || format!("rope of {:?} {dtype:?}", layout.dims()))?;
    drop(pointers);
    Ok((out, shape.clone()))
}

/// Cosines, then sines, of `rope` at the positions below `seqlen`.
pub(super) fn upload_table(
    device: &CudaDevice,
    rope: &Rope,
    seqlen: usize,
) -> Result<Rc<CudaSlice<f32>>> {
    // Lengths of similar size share a table.
    let key = (rope.clone(), seqlen.next_power_of_two());
    upload(device, key, |(rope, positions)| {
        let table = RopeTable::cached(rope, *positions);
        Ok([&table.cos[..], &table.sin[..]].concat())
    })
}

/// Lets a call rotate by the uploaded table of `rope`.
pub(super) fn set_table<'a>(
    params: &mut AttnParams,
    rope: &Rope,
    table: &'a CudaSlice<f32>,
    pointers: &mut Pointers<'a>,
) {
    params.rope_cos = pointers.read(table);
    params.rope_sin = params.rope_cos.wrapping_add(table.len() / 2);
    params.rope_interleaved = (rope.pairing == RopePairing::Interleaved).into();
}

//! RoPE on NVIDIA GPUs: its tables for every kernel, the rotation as an operation of its own, and in
//! the product that makes q and k.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape};

use super::attention::{rows_at, sizes, upload_list};
use super::ffi::AttnParams;
use super::ops::{Input, input, start_is_aligned};
use super::{Pointers, alloc_storage, check, ops_ffi, upload};
use crate::batch::{Batch, View};
use crate::ops::product::rows_and_columns;
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
    let uploads = Uploads::new(device, rope, batch)?;
    let num_heads = layout.dims()[layout.dims().len() - 2];

    let stream = device.cuda_stream();
    let mut pointers = Pointers::new(&stream)?;
    let mut params = uploads.params(rope, batch, num_heads, dtype, &mut pointers)?;
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

/// `x weight^T + bias`, which is q, k and v flat, with q and k turned by their positions: one kernel,
/// if there is one for these. The weight is `[3 * num_heads * head_dim, inner]`.
pub(crate) fn linear_rotated(
    rope: &Rope,
    batch: &Batch,
    num_heads: usize,
    x: Input,
    weight: Input,
    bias: Option<Input>,
) -> Result<Option<CudaStorage>> {
    let (device, dtype) = (x.0.device(), x.0.dtype());
    if batch.total_tokens == 0 || ![x, weight].iter().chain(&bias).all(start_is_aligned) {
        return Ok(None);
    }
    let (columns, inner) = rows_and_columns(weight.1.dims());
    let uploads = Uploads::new(device, rope, batch)?;
    let mut qkv;

    let stream = device.cuda_stream();
    let mut pointers = Pointers::new(&stream)?;
    let mut params = uploads.params(rope, batch, num_heads, dtype, &mut pointers)?;
    // SAFETY: only reads the parameters.
    if unsafe { ops_ffi::op_gemm_rope_suits(&params, inner as i64) } == 0 {
        return Ok(None);
    }
    qkv = alloc_storage(device, dtype, batch.total_tokens * columns)?;
    params.q.ptr = pointers.write_storage(&mut qkv)?;
    let x = input(&mut pointers, x)?;
    let weight = input(&mut pointers, weight)?;
    let bias = (bias.map(|bias| input(&mut pointers, bias)).transpose()?).unwrap_or_default();
    // SAFETY: as in `rotate`.
    let code = unsafe { ops_ffi::op_gemm_rope(&params, x, weight, bias, inner as i64) };
    check(code, || {
        format!(
            "projection of {} tokens to rotated q and k, {dtype:?}",
            batch.total_tokens
        )
    })?;
    drop(pointers);
    Ok(Some(qkv))
}

/// What a rotation reads beside its tensors.
struct Uploads {
    table: Arc<CudaSlice<f32>>,
    /// Where the sequences of packed tensors begin.
    bounds: Option<Arc<CudaSlice<i32>>>,
}

impl Uploads {
    fn new(device: &CudaDevice, rope: &Rope, batch: &Batch) -> Result<Self> {
        Ok(Self {
            table: upload_table(device, rope, batch.seqlen)?,
            bounds: match &batch.sequences {
                Sequences::CuSeqlens(bounds) => Some(upload_list(device, bounds)?),
                _ => None,
            },
        })
    }

    /// The parameters of a call, but its tensors.
    fn params<'a>(
        &'a self,
        rope: &Rope,
        batch: &Batch,
        num_heads: usize,
        dtype: DType,
        pointers: &mut Pointers<'a>,
    ) -> Result<AttnParams> {
        let mut params = sizes(batch, num_heads, rope.head_dim(), dtype, pointers)?;
        set_table(&mut params, rope, &self.table, pointers);
        if let Some(bounds) = &self.bounds {
            params.cu_seqlens = pointers.read(bounds);
        }
        Ok(params)
    }
}

/// Cosines, then sines, of `rope` at the positions below `seqlen`.
pub(super) fn upload_table(
    device: &CudaDevice,
    rope: &Rope,
    seqlen: usize,
) -> Result<Arc<CudaSlice<f32>>> {
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

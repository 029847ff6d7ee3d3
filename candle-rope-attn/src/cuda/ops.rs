//! The training operations on NVIDIA GPUs: the kernels of `cuda/op_*.cu` on Candle's tensors.

use std::ffi::c_void;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::CudaViewMut;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Tensor, bail};

use super::ops_ffi::{self as ffi, OpAdamW, OpAdamWTensor, OpTable, OpTensor};
use super::{Pointers, alloc, alloc_storage, check, dtype_code, tensor};
use crate::operand::Locked;
use crate::ops::product::rows_and_columns;
use crate::spec::Dropout;

/// A contiguous tensor.
pub(crate) type Input<'a> = (&'a CudaStorage, &'a Layout);

/// Enqueues a launch on the stream of a device, with `$pointers` to get its arguments from.
/// `$what` describes it in errors.
macro_rules! launch {
    ($device:expr, $what:expr, $pointers:ident => $call:expr) => {{
        let stream = $device.cuda_stream();
        #[allow(unused_mut)]
        let mut $pointers = Pointers::new(&stream)?;
        // SAFETY: the pointers are live device memory, and stay so until the launch is enqueued;
        // the operation checked that shapes and dtypes are what the kernel expects.
        let code = unsafe { $call };
        check(code, $what)
    }};
}

/// Its first element.
pub(super) fn input<'a>(
    pointers: &mut Pointers<'a>,
    (storage, layout): Input<'a>,
) -> Result<*const c_void> {
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!(
            "got strides {:?} for shape {:?}, expected a contiguous tensor",
            layout.stride(),
            layout.dims()
        )
    };
    let base = pointers.read_storage(storage)?;
    Ok(base.wrapping_byte_add(start * storage.dtype().size_in_bytes()))
}

/// Whether the first element is where kernels with 16-byte accesses can read it.
pub(super) fn start_is_aligned((storage, layout): &Input) -> bool {
    (layout.start_offset() * storage.dtype().size_in_bytes()).is_multiple_of(16)
}

fn describe(op: &str, layout: &Layout, dtype: DType) -> String {
    format!("{op} of {:?} {dtype:?}", layout.dims())
}

pub(crate) fn gelu(x: Input) -> Result<(CudaStorage, Shape)> {
    let shape = x.1.shape();
    let (device, dtype, len) = (x.0.device(), x.0.dtype(), shape.elem_count());
    let mut y = alloc_storage(device, dtype, len)?;
    launch!(device, || describe("gelu", x.1, dtype), p => ffi::op_gelu_fwd(
        dtype_code(dtype),
        input(&mut p, x)?,
        p.write_storage(&mut y)?,
        len as i64,
        p.stream(),
    ))?;
    Ok((y, shape.clone()))
}

pub(crate) fn gelu_backward(x: Input, grad: Input) -> Result<(CudaStorage, Shape)> {
    let shape = x.1.shape();
    let (device, dtype, len) = (x.0.device(), x.0.dtype(), shape.elem_count());
    let mut dx = alloc_storage(device, dtype, len)?;
    launch!(device, || describe("gelu backward", x.1, dtype), p => ffi::op_gelu_bwd(
        dtype_code(dtype),
        input(&mut p, x)?,
        input(&mut p, grad)?,
        p.write_storage(&mut dx)?,
        len as i64,
        p.stream(),
    ))?;
    Ok((dx, shape.clone()))
}

/// `gelu(x)`, the gradient of x, and the sum of that over all axes but the last, f32.
pub(crate) fn gelu_and_backward(
    x: Input,
    grad: Input,
) -> Result<(CudaStorage, CudaStorage, Tensor)> {
    let (rows, columns) = rows_and_columns(x.1.dims());
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let mut y = alloc_storage(device, dtype, rows * columns)?;
    let mut dx = alloc_storage(device, dtype, rows * columns)?;
    let mut sums = alloc_storage(device, DType::F32, columns)?;
    let mut partial = alloc::<f32>(device, column_sum_partials(rows, columns))?;
    launch!(device, || describe("gelu and backward", x.1, dtype), p => ffi::op_gelu_both(
        dtype_code(dtype),
        input(&mut p, x)?,
        input(&mut p, grad)?,
        p.write_storage(&mut y)?,
        p.write_storage(&mut dx)?,
        p.write_storage(&mut sums)?.cast(),
        p.write(&mut partial),
        rows as i64,
        columns as i64,
        p.stream(),
    ))?;
    Ok((y, dx, tensor(sums, columns)))
}

/// Whether there is a kernel that multiplies and applies GELU, for these matrices of `[rows, inner, columns]`.
fn gemm_suits([rows, inner, columns]: [usize; 3], matrices: &[Input]) -> Result<bool> {
    let dtype = matrices[0].0.dtype();
    let alike = |matrix: &Input| matrix.0.dtype() == dtype && start_is_aligned(matrix);
    let stream = matrices[0].0.device().cuda_stream();
    stream.context().bind_to_thread().w()?;
    // SAFETY: takes numbers only, and asks what the device just bound is.
    let suits =
        unsafe { ffi::op_gemm_suits(dtype_code(dtype), rows as i64, inner as i64, columns as i64) };
    Ok(suits != 0 && matrices.iter().all(alike))
}

/// `gelu(x weight^T + bias)`, and with `keep_pre` what that is the GELU of: one kernel, if there is one
/// for these.
pub(crate) fn linear_gelu(
    x: Input,
    weight: Input,
    bias: Input,
    keep_pre: bool,
) -> Result<Option<(CudaStorage, Option<CudaStorage>)>> {
    let (rows, inner) = rows_and_columns(x.1.dims());
    let (columns, _) = rows_and_columns(weight.1.dims());
    if !gemm_suits([rows, inner, columns], &[x, weight, bias])? {
        return Ok(None);
    }
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let mut pre = match keep_pre {
        true => Some(alloc_storage(device, dtype, rows * columns)?),
        false => None,
    };
    let mut y = alloc_storage(device, dtype, rows * columns)?;
    launch!(device, || describe("linear and gelu", x.1, dtype), p => ffi::op_gemm_gelu(
        dtype_code(dtype),
        input(&mut p, x)?,
        input(&mut p, weight)?,
        input(&mut p, bias)?,
        pre.as_mut().map_or(Ok(std::ptr::null_mut()), |pre| p.write_storage(pre))?,
        p.write_storage(&mut y)?,
        rows as i64,
        inner as i64,
        columns as i64,
        p.stream(),
    ))?;
    Ok(Some((y, pre)))
}

/// As [`gelu_and_backward`], from the gradient of `gelu(x) weight^T`, `[.., inner]`, and the weight
/// `[inner, columns]`: one kernel, if there is one for these.
pub(crate) fn gelu_linear_backward(
    x: Input,
    grad: Input,
    weight: Input,
) -> Result<Option<(CudaStorage, CudaStorage, Tensor)>> {
    let (rows, columns) = rows_and_columns(x.1.dims());
    let (_, inner) = rows_and_columns(grad.1.dims());
    if !gemm_suits([rows, inner, columns], &[x, grad, weight])? {
        return Ok(None);
    }
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let mut y = alloc_storage(device, dtype, rows * columns)?;
    let mut dx = alloc_storage(device, dtype, rows * columns)?;
    let mut sums = alloc_storage(device, DType::F32, columns)?;
    // SAFETY: it takes a number only.
    let partials = unsafe { ffi::op_gemm_gelu_partials(rows as i64) } as usize;
    let mut partial = alloc::<f32>(device, partials * columns)?;
    launch!(device, || describe("gelu and linear, backward", x.1, dtype), p => ffi::op_gemm_gelu_bwd(
        dtype_code(dtype),
        input(&mut p, grad)?,
        input(&mut p, weight)?,
        input(&mut p, x)?,
        p.write_storage(&mut dx)?,
        p.write_storage(&mut y)?,
        p.write_storage(&mut sums)?.cast(),
        p.write(&mut partial),
        rows as i64,
        inner as i64,
        columns as i64,
        p.stream(),
    ))?;
    Ok(Some((y, dx, tensor(sums, columns))))
}

/// x in another dtype.
pub(crate) fn cast(x: Input, dtype: DType) -> Result<CudaStorage> {
    let (device, len) = (x.0.device(), x.1.shape().elem_count());
    let mut y = alloc_storage(device, dtype, len)?;
    launch!(device, || describe("cast", x.1, dtype), p => ffi::op_cast(
        dtype_code(x.0.dtype()),
        input(&mut p, x)?,
        dtype_code(dtype),
        p.write_storage(&mut y)?,
        len as i64,
        p.stream(),
    ))?;
    Ok(y)
}

/// Dropout of x, added to a residual if there is one.
pub(crate) fn dropout(
    x: Input,
    residual: Option<Input>,
    dropout: Dropout,
) -> Result<(CudaStorage, Shape)> {
    let shape = x.1.shape();
    let (device, dtype, len) = (x.0.device(), x.0.dtype(), shape.elem_count());
    let mut y = alloc_storage(device, dtype, len)?;
    launch!(device, || describe("dropout", x.1, dtype), p => ffi::op_dropout(
        dtype_code(dtype),
        input(&mut p, x)?,
        residual.map_or(Ok(std::ptr::null()), |residual| input(&mut p, residual))?,
        p.write_storage(&mut y)?,
        len as i64,
        dropout.p,
        dropout.seed,
        p.stream(),
    ))?;
    Ok((y, shape.clone()))
}

/// Elements of the partial sums of columns.
fn column_sum_partials(rows: usize, columns: usize) -> usize {
    // SAFETY: reads no memory.
    let partials = unsafe { ffi::op_column_sum_partials(rows as i64, columns as i64) };
    partials as usize * columns
}

/// The sum of each column of x `[rows, columns]`, f32.
pub(crate) fn column_sum(x: Input, rows: usize, columns: usize) -> Result<CudaStorage> {
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let mut partial = alloc::<f32>(device, column_sum_partials(rows, columns))?;
    let mut sums = alloc_storage(device, DType::F32, columns)?;
    launch!(device, || describe("column sum", x.1, dtype), p => ffi::op_column_sum(
        dtype_code(dtype),
        input(&mut p, x)?,
        p.write_storage(&mut sums)?.cast(),
        p.write(&mut partial),
        rows as i64,
        columns as i64,
        p.stream(),
    ))?;
    Ok(sums)
}

/// `[rows, width]` of a layer norm's x.
fn rows_and_width(x: Input) -> Result<[usize; 2]> {
    let width = x.1.dims().last().copied().unwrap_or(1);
    if width > ffi::OP_LAYER_NORM_MAX_WIDTH {
        bail!(
            "layer_norm on CUDA: got x of shape {:?}, expected a last axis of at most {}",
            x.1.dims(),
            ffi::OP_LAYER_NORM_MAX_WIDTH
        )
    }
    Ok([x.1.shape().elem_count() / width.max(1), width])
}

/// The result in a dtype, and the statistics of the rows, f32 `[rows, 2]`.
pub(crate) fn layer_norm(
    x: Input,
    weight: Input,
    bias: Input,
    eps: f32,
    y_dtype: DType,
) -> Result<(CudaStorage, Tensor)> {
    let [rows, width] = rows_and_width(x)?;
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let mut y = alloc_storage(device, y_dtype, rows * width)?;
    let mut stats = alloc_storage(device, DType::F32, 2 * rows)?;
    launch!(device, || describe("layer_norm", x.1, dtype), p => ffi::op_layer_norm_fwd(
        dtype_code(dtype),
        input(&mut p, x)?,
        input(&mut p, weight)?.cast(),
        input(&mut p, bias)?.cast(),
        dtype_code(y_dtype),
        p.write_storage(&mut y)?,
        p.write_storage(&mut stats)?.cast(),
        rows as i64,
        width as i64,
        eps,
        p.stream(),
    ))?;
    Ok((y, tensor(stats, (rows, 2))))
}

/// The gradient of x; and f32 `[3, width]`: those of weight and bias, and the sum of that of x.
pub(crate) fn layer_norm_backward(
    x: Input,
    weight: Input,
    grad: Input,
    stats: &Tensor,
) -> Result<(CudaStorage, Tensor)> {
    let [rows, width] = rows_and_width(x)?;
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let stats = Locked::new(stats);
    let stats = stats.operand()?.cuda()?;
    // SAFETY: reads no memory.
    let partials = unsafe { ffi::op_layer_norm_partials(rows as i64, width as i64) };
    let mut partial = alloc::<f32>(device, partials as usize * 3 * width)?;
    let mut dx = alloc_storage(device, dtype, rows * width)?;
    let mut sums = alloc_storage(device, DType::F32, 3 * width)?;
    launch!(device, || describe("layer_norm backward", x.1, dtype), p => ffi::op_layer_norm_bwd(
        dtype_code(dtype),
        input(&mut p, x)?,
        input(&mut p, weight)?.cast(),
        dtype_code(grad.0.dtype()),
        input(&mut p, grad)?,
        input(&mut p, stats)?.cast(),
        p.write_storage(&mut dx)?,
        p.write_storage(&mut sums)?.cast(),
        p.write(&mut partial),
        rows as i64,
        width as i64,
        p.stream(),
    ))?;
    Ok((dx, tensor(sums, (3, width))))
}

pub(crate) fn gather_rows(table: Input, rows: Input) -> Result<(CudaStorage, Shape)> {
    let (count, width) = table.1.shape().dims2()?;
    let len = rows.1.shape().elem_count();
    let (device, dtype) = (table.0.device(), table.0.dtype());
    let mut y = alloc_storage(device, dtype, len * width)?;
    launch!(device, || describe("gather_rows", table.1, dtype), p => ffi::op_gather_rows(
        dtype_code(dtype),
        input(&mut p, table)?,
        input(&mut p, rows)?.cast(),
        p.write_storage(&mut y)?,
        len as i64,
        count as i64,
        width as i64,
        p.stream(),
    ))?;
    Ok((y, (len, width).into()))
}

/// The sum of one row each of f32 tables; `parts` are row numbers `[len]` and table.
pub(crate) fn sum_rows(parts: &[(Input, Input)], len: usize, width: usize) -> Result<CudaStorage> {
    let device = parts[0].1.0.device();
    let mut y = alloc_storage(device, DType::F32, len * width)?;
    let what = || describe("embedding_sum", parts[0].1.1, DType::F32);
    let stream = device.cuda_stream();
    let mut pointers = Pointers::new(&stream)?;
    let tables = parts
        .iter()
        .map(|(rows, table)| {
            Ok(OpTable {
                table: input(&mut pointers, *table)?.cast(),
                rows: input(&mut pointers, *rows)?.cast(),
                count: table.1.dims()[0] as i64,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    launch!(device, what, p => ffi::op_sum_rows(
        tables.as_ptr(),
        tables.len() as i64,
        p.write_storage(&mut y)?.cast(),
        len as i64,
        width as i64,
        p.stream(),
    ))?;
    drop(pointers);
    Ok(y)
}

/// The sum of the rows of a gradient at their numbers, in a table of `count` rows.
pub(crate) fn scatter_rows(grad: Input, rows: Input, count: usize) -> Result<(CudaStorage, Shape)> {
    let (_, width) = grad.1.shape().dims2()?;
    let mut d_table = alloc_storage(grad.0.device(), grad.0.dtype(), count * width)?;
    let shape = Shape::from((count, width));
    let layout = Layout::contiguous(&shape);
    scatter_into(grad, rows, (&mut d_table, &layout), false)?;
    Ok((d_table, shape))
}

/// As [`scatter_rows`], added to a contiguous table of the same dtype.
pub(crate) fn add_rows(
    grad: Input,
    rows: Input,
    d_table: (&mut CudaStorage, &Layout),
) -> Result<()> {
    scatter_into(grad, rows, d_table, true)
}

fn scatter_into(
    grad: Input,
    rows: Input,
    (d_table, layout): (&mut CudaStorage, &Layout),
    add: bool,
) -> Result<()> {
    let ((len, width), (count, _)) = (grad.1.shape().dims2()?, layout.shape().dims2()?);
    let (device, dtype) = (grad.0.device(), grad.0.dtype());
    let what = || describe("scatter_rows", grad.1, dtype);
    let mut bytes = 0;
    launch!(device, what, _pointers => ffi::op_scatter_rows_workspace(
        len as i64, count as i64, width as i64, &mut bytes
    ))?;
    let mut workspace = alloc::<u8>(device, bytes)?;
    let start = layout.start_offset() * dtype.size_in_bytes();
    launch!(device, what, p => ffi::op_scatter_rows(
        dtype_code(dtype),
        input(&mut p, grad)?,
        input(&mut p, rows)?.cast(),
        p.write_storage(d_table)?.wrapping_byte_add(start),
        add.into(),
        p.write(&mut workspace).cast(),
        len as i64,
        count as i64,
        width as i64,
        p.stream(),
    ))
}

/// Copies from the host. A copy returns once it has taken the values; of more than 64 KiB CUDA would wait
/// for the work before it.
fn copy(device: &CudaDevice, values: &[u32], to: &mut CudaViewMut<u32>) -> Result<()> {
    const PIECE: usize = (64 << 10) / size_of::<u32>();
    for (i, values) in values.chunks(PIECE).enumerate() {
        let start = i * PIECE;
        device.memcpy_htod(values, &mut to.slice_mut(start..start + values.len()))?;
    }
    Ok(())
}

/// A u32 tensor of these elements.
pub(crate) fn upload(device: &CudaDevice, values: &[u32]) -> Result<CudaStorage> {
    let mut slice = alloc(device, values.len())?;
    copy(device, values, &mut slice.slice_mut(..))?;
    Ok(CudaStorage {
        slice: CudaStorageSlice::U32(slice),
        device: device.clone(),
    })
}

/// Replaces elements of a u32 tensor from `start` on.
pub(crate) fn overwrite(x: &mut CudaStorage, start: usize, values: &[u32]) -> Result<()> {
    let device = x.device().clone();
    let x = x.as_cuda_slice_mut()?;
    copy(
        &device,
        values,
        &mut x.slice_mut(start..start + values.len()),
    )
}

/// The mean loss, and the log-sum-exp of the rows, f32 `[rows]`.
pub(crate) fn cross_entropy(logits: Input, labels: Input) -> Result<(CudaStorage, Tensor)> {
    let (rows, vocab) = logits.1.shape().dims2()?;
    let (device, dtype) = (logits.0.device(), logits.0.dtype());
    let mut lse = alloc_storage(device, DType::F32, rows)?;
    let mut losses = alloc::<f32>(device, rows)?;
    let mut loss = alloc_storage(device, DType::F32, 1)?;
    launch!(device, || describe("cross_entropy", logits.1, dtype), p => ffi::op_cross_entropy_fwd(
        dtype_code(dtype),
        input(&mut p, logits)?,
        input(&mut p, labels)?.cast(),
        p.write_storage(&mut lse)?.cast(),
        p.write(&mut losses),
        p.write_storage(&mut loss)?.cast(),
        rows as i64,
        vocab as i64,
        p.stream(),
    ))?;
    Ok((loss, tensor(lse, rows)))
}

pub(crate) fn cross_entropy_backward(
    logits: Input,
    labels: Input,
    grad: Input,
    lse: &Tensor,
) -> Result<(CudaStorage, Shape)> {
    let (rows, vocab) = logits.1.shape().dims2()?;
    let (device, dtype) = (logits.0.device(), logits.0.dtype());
    let lse = Locked::new(lse);
    let lse = lse.operand()?.cuda()?;
    let mut d_logits = alloc_storage(device, dtype, rows * vocab)?;
    let what = || describe("cross_entropy backward", logits.1, dtype);
    launch!(device, what, p => ffi::op_cross_entropy_bwd(
        dtype_code(dtype),
        input(&mut p, logits)?,
        input(&mut p, labels)?.cast(),
        input(&mut p, lse)?.cast(),
        input(&mut p, grad)?.cast(),
        p.write_storage(&mut d_logits)?,
        rows as i64,
        vocab as i64,
        p.stream(),
    ))?;
    Ok((d_logits, logits.1.shape().clone()))
}

/// The losses of the rows, f32 `[rows]`; the logits become the gradient of their sum.
pub(crate) fn cross_entropy_in_place(
    logits: &mut CudaStorage,
    labels: Input,
    vocab: usize,
) -> Result<Tensor> {
    let rows = labels.1.shape().elem_count();
    let (device, dtype) = (logits.device().clone(), logits.dtype());
    let mut losses = alloc_storage(&device, DType::F32, rows)?;
    let what = || format!("cross_entropy and backward of [{rows}, {vocab}] {dtype:?}");
    launch!(device, what, p => ffi::op_cross_entropy_in_place(
        dtype_code(dtype),
        p.write_storage(logits)?,
        input(&mut p, labels)?.cast(),
        p.write_storage(&mut losses)?.cast(),
        rows as i64,
        vocab as i64,
        p.stream(),
    ))?;
    Ok(tensor(losses, rows))
}

/// Tensors whose storage is locked for the time of a launch.
struct LockedTensors<'a>(Vec<Locked<'a>>);

impl<'a> LockedTensors<'a> {
    fn new(tensors: impl IntoIterator<Item = &'a Tensor>) -> Self {
        Self(tensors.into_iter().map(Locked::new).collect())
    }

    /// Their descriptions for a launch.
    fn op_tensors<'b>(&'b self, pointers: &mut Pointers<'b>) -> Result<Vec<OpTensor>> {
        let describe = |tensor: &'b Locked<'a>| {
            let (storage, layout) = tensor.operand()?.cuda()?;
            Ok(OpTensor {
                ptr: input(pointers, (storage, layout))?,
                len: layout.shape().elem_count() as i64,
                dtype: dtype_code(storage.dtype()),
            })
        };
        self.0.iter().map(describe).collect()
    }
}

/// The norm of all elements, an f32 scalar.
pub(crate) fn global_norm(device: &CudaDevice, tensors: &[Tensor]) -> Result<Tensor> {
    let locked = LockedTensors::new(tensors);
    let mut norm = alloc_storage(device, DType::F32, 1)?;
    let stream = device.cuda_stream();
    let mut pointers = Pointers::new(&stream)?;
    let tensors = locked.op_tensors(&mut pointers)?;
    let count = tensors.len() as i64;
    // SAFETY: reads the descriptions alone.
    let partials = unsafe { ffi::op_global_norm_partials(tensors.as_ptr(), count) };
    let mut partial = alloc::<f32>(device, partials as usize)?;
    let what = || format!("global_norm of {count} tensors");
    launch!(device, what, p => ffi::op_global_norm(
        tensors.as_ptr(),
        count,
        p.write(&mut partial),
        p.write_storage(&mut norm)?.cast(),
        p.stream(),
    ))?;
    drop(pointers);
    Ok(tensor(norm, ()))
}

/// A step of AdamW.
pub(crate) struct AdamW<'a> {
    pub grad_norm: &'a Tensor,
    /// u32 scalar, counted up.
    pub steps: &'a Tensor,
    /// The learning rate, an f64 in two u32.
    pub lr: &'a Tensor,
    pub betas: [f64; 2],
    pub eps: f64,
    pub max_norm: Option<f64>,
}

/// What AdamW does with one parameter.
pub(crate) struct AdamWTensor<'a> {
    /// f32, updated.
    pub parameter: &'a Tensor,
    /// The parameter in another dtype, updated.
    pub rounded: Option<&'a Tensor>,
    /// f32 `[2, elements]`, updated.
    pub moments: &'a Tensor,
    pub grad: &'a Tensor,
    pub weight_decay: f64,
}

/// The tensors are changed under a lock for reading, as Candle gives out no other. No one who uses the
/// same stream sees them change in the middle: it orders the step after everything enqueued before, and
/// before everything after.
pub(crate) fn adamw(device: &CudaDevice, step: &AdamW, tensors: &[AdamWTensor]) -> Result<()> {
    let parameters = LockedTensors::new(tensors.iter().map(|t| t.parameter));
    let moments = LockedTensors::new(tensors.iter().map(|t| t.moments));
    let grads = LockedTensors::new(tensors.iter().map(|t| t.grad));
    let rounded = LockedTensors::new(tensors.iter().filter_map(|t| t.rounded));
    let scalars = LockedTensors::new([step.grad_norm, step.steps, step.lr]);
    let mut workspace = alloc::<f32>(device, 4)?;

    let stream = device.cuda_stream();
    let mut pointers = Pointers::new(&stream)?;
    let parameters = parameters.op_tensors(&mut pointers)?;
    let moments = moments.op_tensors(&mut pointers)?;
    let grads = grads.op_tensors(&mut pointers)?;
    let mut rounded = rounded.op_tensors(&mut pointers)?.into_iter();
    let scalars = scalars.op_tensors(&mut pointers)?;
    let params = OpAdamW {
        grad_norm: scalars[0].ptr.cast(),
        steps: scalars[1].ptr.cast_mut().cast(),
        scalars: pointers.write(&mut workspace),
        lr: scalars[2].ptr.cast(),
        max_norm: step.max_norm.unwrap_or(f64::INFINITY),
        beta1: step.betas[0],
        beta2: step.betas[1],
        eps: step.eps,
    };
    let list: Vec<_> = parameters
        .iter()
        .zip(&moments)
        .zip(grads)
        .zip(tensors)
        .map(|(((parameter, moments), grad), tensor)| OpAdamWTensor {
            parameter: parameter.ptr.cast_mut().cast(),
            moments: moments.ptr.cast_mut().cast(),
            grad,
            rounded: match tensor.rounded.and_then(|_| rounded.next()) {
                Some(rounded) => rounded,
                None => OpTensor {
                    ptr: std::ptr::null(),
                    len: 0,
                    dtype: dtype_code(DType::F32),
                },
            },
            weight_decay: tensor.weight_decay,
        })
        .collect();
    let what = || format!("AdamW of {} tensors", tensors.len());
    launch!(device, what, p => ffi::op_adamw(
        &params,
        list.as_ptr(),
        list.len() as i64,
        p.stream(),
    ))?;
    drop(pointers);
    Ok(())
}

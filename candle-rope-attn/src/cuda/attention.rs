//! Attention on NVIDIA GPUs: the kernels of `cuda/` on Candle's tensors.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Tensor, bail};

use super::ffi::{self, AttnParams, AttnTensor};
use super::{Pointers, alloc, alloc_storage, check, dtype_code, rope, tensor, upload};
use crate::batch::{Batch, View, qkv_views};
use crate::op::AttentionGradients;
use crate::operand::Locked;
use crate::position::{BiasTable, distances};
use crate::spec::{Alibi, AttentionSpec, PositionEncoding, RelativeBias, Sequences, Window};

/// Results of a forward pass.
pub(crate) struct Forward {
    pub out: CudaStorage,
    /// The log-sum-exp of the rows (see [`Batch::lse_shape`]) in natural units.
    pub lse: Tensor,
    /// q and k rotated, for the backward pass.
    pub rotated: Option<Tensor>,
}

/// Computes the output of a call; with `keep_rotated` also what a backward pass needs not compute
/// again.
///
/// `inputs` are q, k and v, or one packed tensor, `qk_rotated` says whether q and k are rotated
/// already; `weight` is that of [`PositionEncoding::RelativeBias`], contiguous f32.
pub(crate) fn forward(
    spec: &AttentionSpec,
    batch: &Batch,
    inputs: &[(&CudaStorage, &Layout)],
    weight: Option<&CudaStorage>,
    out_layout: &Layout,
    qk_rotated: bool,
    keep_rotated: bool,
) -> Result<Forward> {
    let call = Attention::new(spec, batch, inputs, weight);
    let stream = call.device().cuda_stream();
    let tables = call.tables(&stream)?;
    let mut out = alloc_storage(call.device(), call.dtype(), out_layout.shape().elem_count())?;
    let rows = batch.total_tokens * spec.num_heads;
    let mut lse = alloc_storage(call.device(), DType::F32, rows)?;
    let (mut workspace, mut rotated) = (None, None);

    let mut pointers = Pointers::new(&stream)?;
    let mut params = call.params(&tables, &mut pointers)?;
    params.qk_rotated = qk_rotated.into();
    // SAFETY: only reads the parameters.
    let bytes = unsafe { ffi::attn_rotated_bytes(&params) };
    let elements = bytes / call.dtype().size_in_bytes();
    if keep_rotated && !qk_rotated && tables.rope.is_some() {
        let storage = alloc_storage(call.device(), call.dtype(), elements)?;
        params.rotated = pointers.write_storage(rotated.insert(storage))?;
    }
    let base = pointers.write_storage(&mut out)?;
    params.o = rows_at(base, View::new(out_layout), call.dtype());
    params.lse = pointers.write_storage(&mut lse)?.cast();
    // SAFETY: only reads the parameters.
    let bytes = unsafe { ffi::attn_fwd_workspace_bytes(&params) };
    let workspace = workspace.insert(alloc::<u8>(call.device(), bytes)?);
    params.workspace = pointers.write(workspace).cast();
    // SAFETY: the pointers are live device memory of the shapes and strides in `params`, which the
    // operation has checked, and stay so until the launches are enqueued.
    let code = unsafe { ffi::attn_fwd(&params) };
    check(code, || call.describe("forward"))?;
    drop(pointers);
    Ok(Forward {
        out,
        lse: tensor(lse, batch.lse_shape(spec.num_heads)),
        rotated: rotated.map(|rotated| tensor(rotated, elements)),
    })
}

/// Gradients of `inputs` and `weight`, which are as in [`forward`], from the output, its gradient
/// and the log-sum-exp; and from [`Forward::rotated`]. With `sum_columns` also their sums, if the
/// kernels have these at hand.
pub(crate) fn backward(
    spec: &AttentionSpec,
    batch: &Batch,
    inputs: &[&Tensor],
    weight: Option<&Tensor>,
    saved: [&Tensor; 3],
    qk_rotated: bool,
    rotated: Option<&Tensor>,
    sum_columns: bool,
) -> Result<AttentionGradients> {
    let locked: Vec<_> = (inputs.iter().copied().chain(weight))
        .map(Locked::new)
        .collect();
    let storages = (locked.iter())
        .map(|x| x.operand()?.cuda())
        .collect::<Result<Vec<_>>>()?;
    let (storages, weight_storage) = storages.split_at(inputs.len());
    let weight_storage = weight_storage.first().map(|(weight, _)| *weight);
    let call = Attention::new(spec, batch, storages, weight_storage);
    let stream = call.device().cuda_stream();
    let tables = call.tables(&stream)?;

    let [out, d_out, lse] = saved.map(Locked::new);
    let (out, out_layout) = out.operand()?.cuda()?;
    let (d_out, d_out_layout) = d_out.operand()?.cuda()?;
    let (lse, _) = lse.operand()?.cuda()?;
    let rotated = rotated.map(Locked::new);
    let alloc_for = |x: &Tensor| alloc_storage(call.device(), x.dtype(), x.elem_count());
    let mut gradients = (inputs.iter())
        .map(|x| alloc_for(x))
        .collect::<Result<Vec<_>>>()?;
    let mut d_weight = weight.map(alloc_for).transpose()?;
    let (mut column_sums, mut workspace) = (None, None);

    let mut pointers = Pointers::new(&stream)?;
    let mut params = call.params(&tables, &mut pointers)?;
    params.qk_rotated = qk_rotated.into();
    params.o = call.rows(out, View::new(out_layout), &mut pointers)?;
    params.d_o = call.rows(d_out, View::new(d_out_layout), &mut pointers)?;
    params.lse = pointers.read_storage(lse)?.cast_mut().cast();
    if let Some(rotated) = &rotated {
        params.rotated = pointers
            .read_storage(rotated.operand()?.cuda()?.0)?
            .cast_mut();
    }
    let bases = (gradients.iter_mut())
        .map(|gradient| pointers.write_storage(gradient))
        .collect::<Result<Vec<_>>>()?;
    let layout = Layout::contiguous(inputs[0].shape());
    [params.dq, params.dk, params.dv] = qkv_views(&vec![&layout; inputs.len()])
        .map(|(input, view)| rows_at(bases[input], view, call.dtype()));
    if let Some(d_weight) = &mut d_weight {
        params.d_bias = pointers.write_storage(d_weight)?.cast();
    }
    if let Some(buckets) = &tables.buckets {
        params.bias_buckets = pointers.read(buckets);
    }
    let columns = 3 * spec.num_heads * spec.head_dim;
    // SAFETY: only reads the parameters.
    if sum_columns && unsafe { ffi::attn_bwd_sums_columns(&params) } != 0 {
        let storage = alloc_storage(call.device(), DType::F32, columns)?;
        params.d_qkv_sums = pointers.write_storage(column_sums.insert(storage))?.cast();
    }
    // SAFETY: only reads the parameters.
    let bytes = unsafe { ffi::attn_bwd_workspace_bytes(&params) };
    let workspace = workspace.insert(alloc::<u8>(call.device(), bytes)?);
    params.workspace = pointers.write(workspace).cast();
    // SAFETY: as in `forward`.
    let code = unsafe { ffi::attn_bwd(&params) };
    check(code, || call.describe("backward"))?;
    drop(pointers);

    Ok(AttentionGradients {
        inputs: (gradients.into_iter().zip(inputs))
            .map(|(gradient, x)| tensor(gradient, x.shape()))
            .collect(),
        weight: (d_weight.zip(weight)).map(|(gradient, x)| tensor(gradient, x.shape())),
        column_sums: column_sums.map(|sums| tensor(sums, columns)),
    })
}

/// What both passes share.
struct Attention<'a> {
    spec: &'a AttentionSpec,
    batch: &'a Batch,
    qkv: [(&'a CudaStorage, View); 3],
    weight: Option<&'a CudaStorage>,
}

impl<'a> Attention<'a> {
    fn new(
        spec: &'a AttentionSpec,
        batch: &'a Batch,
        inputs: &[(&'a CudaStorage, &Layout)],
        weight: Option<&'a CudaStorage>,
    ) -> Self {
        let layouts: Vec<_> = inputs.iter().map(|(_, layout)| *layout).collect();
        Self {
            spec,
            batch,
            qkv: qkv_views(&layouts).map(|(input, view)| (inputs[input].0, view)),
            weight,
        }
    }

    fn device(&self) -> &CudaDevice {
        self.qkv[0].0.device()
    }

    fn dtype(&self) -> DType {
        self.qkv[0].0.dtype()
    }

    fn describe(&self, pass: &str) -> String {
        format!(
            "attention {pass} of {} tokens in {} sequences of at most {}, {} heads of width {}, {:?}",
            self.batch.total_tokens,
            self.batch.count,
            self.batch.seqlen,
            self.spec.num_heads,
            self.spec.head_dim,
            self.dtype(),
        )
    }

    /// All parameters but the results and what goes with them.
    fn params<'b>(&'b self, tables: &'b Tables, pointers: &mut Pointers<'b>) -> Result<AttnParams> {
        let [q, k, v] = self.qkv;
        let Window { left, right } = self.spec.window.unwrap_or(Window {
            left: None,
            right: None,
        });
        // Wider than any sequence is as good as none.
        let limit = |keys: Option<usize>| keys.and_then(|keys| keys.try_into().ok()).unwrap_or(-1);
        let (num_heads, head_dim) = (self.spec.num_heads, self.spec.head_dim);
        let dropout = self.spec.dropout;
        let mut params = AttnParams {
            q: self.rows(q.0, q.1, pointers)?,
            k: self.rows(k.0, k.1, pointers)?,
            v: self.rows(v.0, v.1, pointers)?,
            causal: self.spec.causal.into(),
            window_left: limit(left),
            window_right: limit(right),
            softmax_scale: self.spec.softmax_scale,
            dropout_p: dropout.map_or(0.0, |dropout| dropout.p),
            dropout_seed: dropout.map_or(0, |dropout| dropout.seed),
            ..sizes(self.batch, num_heads, head_dim, self.dtype(), pointers)?
        };
        match (&tables.sequences, &self.batch.sequences) {
            (Some(list), Sequences::CuSeqlens(_)) => params.cu_seqlens = pointers.read(list),
            (Some(list), _) => params.key_lens = pointers.read(list),
            (None, _) => {}
        }
        if let Some(mask) = &tables.key_mask {
            params.key_mask = pointers.read(mask);
        }
        if let (Some(table), PositionEncoding::Rope(rope)) = (&tables.rope, &self.spec.position) {
            rope::set_table(&mut params, rope, table, pointers);
        }
        if let Some(bias) = &tables.bias {
            params.bias = pointers.read(bias);
        }
        if let PositionEncoding::RelativeBias(bias) = &self.spec.position {
            params.num_buckets = int("num_buckets", bias.num_buckets)?;
        }
        Ok(params)
    }

    fn rows<'b>(
        &self,
        storage: &'b CudaStorage,
        view: View,
        pointers: &mut Pointers<'b>,
    ) -> Result<AttnTensor> {
        let base = pointers.read_storage(storage)?.cast_mut();
        Ok(rows_at(base, view, self.dtype()))
    }

    fn tables(&self, stream: &CudaStream) -> Result<Tables> {
        let device = self.device();
        let seqlen = self.batch.seqlen;
        let mut tables = Tables::default();
        if self.batch.total_tokens == 0 {
            // No kernel will run, and CUDA has no empty memory.
            return Ok(tables);
        }
        match &self.batch.sequences {
            Sequences::Dense => {}
            Sequences::CuSeqlens(list) | Sequences::KeyLens(list) => {
                tables.sequences = Some(upload_list(device, list)?);
            }
            Sequences::KeyMask(mask) => {
                tables.key_mask = Some(upload(device, mask.clone(), |mask: &Vec<bool>| {
                    Ok(mask.iter().map(|&key| u8::from(key)).collect())
                })?);
            }
        }
        match &self.spec.position {
            PositionEncoding::None => {}
            PositionEncoding::Rope(rope) => {
                tables.rope = Some(rope::upload_table(device, rope, seqlen)?);
            }
            PositionEncoding::Alibi(alibi) => {
                tables.bias = Some(upload_alibi(device, alibi, seqlen)?);
            }
            PositionEncoding::RelativeBias(bias) => {
                let buckets = upload_buckets(device, bias, seqlen)?;
                tables.bias = Some(Arc::new(self.gather_bias(&buckets, stream)?));
                tables.buckets = Some(buckets);
            }
        }
        Ok(tables)
    }

    /// The bias of each head and distance, from the weight.
    fn gather_bias(&self, buckets: &CudaSlice<i32>, stream: &CudaStream) -> Result<CudaSlice<f32>> {
        let Some(weight) = self.weight else {
            bail!("attention: PositionEncoding::RelativeBias needs its weight")
        };
        let num_heads = self.spec.num_heads;
        let mut table = alloc::<f32>(self.device(), num_heads * buckets.len())?;
        let mut pointers = Pointers::new(stream)?;
        // SAFETY: live device memory of the sizes that the kernel expects.
        let code = unsafe {
            ffi::attn_bias_table(
                pointers.read_storage(weight)?.cast(),
                pointers.read(buckets),
                pointers.write(&mut table),
                int("num_heads", num_heads)?,
                int("the longest sequence", self.batch.seqlen)?,
                pointers.stream(),
            )
        };
        check(code, || self.describe("bias table"))?;
        drop(pointers);
        Ok(table)
    }
}

/// Device memory that a call reads beside its tensors.
#[derive(Default)]
struct Tables {
    /// `cu_seqlens` or key lengths.
    sequences: Option<Arc<CudaSlice<i32>>>,
    key_mask: Option<Arc<CudaSlice<u8>>>,
    /// Cosines, then sines.
    rope: Option<Arc<CudaSlice<f32>>>,
    /// `[num_heads, 2 * seqlen - 1]`.
    bias: Option<Arc<CudaSlice<f32>>>,
    /// Bucket of each distance, where the bias is a relative one.
    buckets: Option<Arc<CudaSlice<i32>>>,
}

/// Bounds or lengths of sequences.
pub(super) fn upload_list(device: &CudaDevice, list: &[usize]) -> Result<Arc<CudaSlice<i32>>> {
    upload(device, list.to_vec(), |list| {
        list.iter().map(|&n| int("a sequence bound", n)).collect()
    })
}

fn upload_alibi(device: &CudaDevice, alibi: &Alibi, seqlen: usize) -> Result<Arc<CudaSlice<f32>>> {
    upload(device, (alibi.clone(), seqlen), |(alibi, seqlen)| {
        let num_heads = alibi.slopes.len();
        let position = PositionEncoding::Alibi(alibi.clone());
        let table = BiasTable::new(&position, None, num_heads, *seqlen);
        Ok(table.map(|table| table.values).unwrap_or_default())
    })
}

fn upload_buckets(
    device: &CudaDevice,
    bias: &RelativeBias,
    seqlen: usize,
) -> Result<Arc<CudaSlice<i32>>> {
    if bias.num_buckets > RelativeBias::MAX_CUDA_BUCKETS {
        bail!(
            "attention on CUDA: got a relative bias of {} buckets, expected at most {}; use fewer buckets, or the CPU",
            bias.num_buckets,
            RelativeBias::MAX_CUDA_BUCKETS
        )
    }
    upload(device, (*bias, seqlen), |(bias, seqlen)| {
        let buckets = distances(*seqlen).map(|distance| bias.bucket(distance));
        buckets.map(|bucket| int("a bucket", bucket)).collect()
    })
}

/// The parameters that tell how large a call is.
pub(super) fn sizes(
    batch: &Batch,
    num_heads: usize,
    head_dim: usize,
    dtype: DType,
    pointers: &Pointers,
) -> Result<AttnParams> {
    Ok(AttnParams {
        total_tokens: batch.total_tokens as i64,
        batch: int("the number of sequences", batch.count)?,
        seqlen: int("the longest sequence", batch.seqlen)?,
        num_heads: int("num_heads", num_heads)?,
        head_dim: int("head_dim", head_dim)?,
        dtype: dtype_code(dtype),
        stream: pointers.stream(),
        ..Default::default()
    })
}

/// The rows of that view in a storage that begins at `base`.
pub(super) fn rows_at(base: *mut c_void, view: View, dtype: DType) -> AttnTensor {
    AttnTensor {
        ptr: base.wrapping_byte_add(view.start * dtype.size_in_bytes()),
        batch_stride: view.batch_stride as i64,
        row_stride: view.row_stride as i64,
        head_stride: view.head_stride as i64,
    }
}

fn int(name: &str, value: usize) -> Result<i32> {
    value.try_into().or_else(|_| {
        bail!(
            "on CUDA, {name} must be at most {}, got {value}; split the batch",
            i32::MAX
        )
    })
}

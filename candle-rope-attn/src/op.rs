//! The attention functions and their place in Candle's graph.

use std::sync::OnceLock;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Storage,
    Tensor, WithDType, bail,
};
use half::{bf16, f16};

use crate::batch::{Batch, View};
use crate::cpu::{self, Rows, RowsMut, SharedMut};
use crate::element::{Element, check_dtype};
use crate::spec::{AttentionSpec, PositionEncoding, Sequences};

/// `softmax(softmax_scale * q k^T + bias) v` of each head and sequence, with q and k rotated
/// first where the encoding is RoPE.
///
/// q, k and v are `[batch, seqlen, num_heads, head_dim]`, or `[total_tokens, num_heads, head_dim]`
/// with [`Sequences::CuSeqlens`], of one dtype: F32, BF16 or F16. Sums are in f32. The result has
/// the same shape and dtype, is zero in rows that see no key, and is differentiable in q, k and v.
/// The last axis should be contiguous (a copy is made otherwise); the others may have any stride.
///
/// # Errors
/// When a shape, a dtype, `spec` or `sequences` does not fit; the message says what was got and
/// what is needed. [`PositionEncoding::RelativeBias`] needs [`attention_with_bias`].
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spec: &AttentionSpec,
    sequences: &Sequences,
) -> Result<Tensor> {
    check_alike(q, k, v)?;
    let batch = check(q.dims(), q.dtype(), false, spec, sequences)?;
    no_weight(spec)?;
    let [q, k, v] = [
        contiguous_rows(q)?,
        contiguous_rows(k)?,
        contiguous_rows(v)?,
    ];
    let op = Attention::new(spec, batch, &[&q, &k, &v]);
    q.apply_op3(&k, &v, op)
}

/// As [`attention`], of q, k and v in one tensor `[batch, seqlen, 3, num_heads, head_dim]`, or
/// `[total_tokens, 3, num_heads, head_dim]` with [`Sequences::CuSeqlens`].
///
/// Its gradient is one packed tensor too, so nothing is sliced or added up in the graph.
///
/// # Errors
/// As [`attention`].
pub fn attention_qkvpacked(
    qkv: &Tensor,
    spec: &AttentionSpec,
    sequences: &Sequences,
) -> Result<Tensor> {
    let batch = check(qkv.dims(), qkv.dtype(), true, spec, sequences)?;
    no_weight(spec)?;
    let qkv = contiguous_rows(qkv)?;
    let op = Attention::new(spec, batch, &[&qkv]);
    qkv.apply_op1(op)
}

/// As [`attention`] with [`PositionEncoding::RelativeBias`], whose `weight`
/// `[num_buckets, num_heads]` is differentiable too. It may have any float dtype.
///
/// q, k and v are copied into one tensor; [`attention_qkvpacked_with_bias`] does without.
///
/// # Errors
/// As [`attention`], and when the encoding is another one or the weight's shape does not fit.
pub fn attention_with_bias(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weight: &Tensor,
    spec: &AttentionSpec,
    sequences: &Sequences,
) -> Result<Tensor> {
    check_alike(q, k, v)?;
    // Before the heads.
    let axis = q.rank().saturating_sub(2);
    attention_qkvpacked_with_bias(&Tensor::stack(&[q, k, v], axis)?, weight, spec, sequences)
}

/// As [`attention_qkvpacked`] with [`PositionEncoding::RelativeBias`], whose `weight`
/// `[num_buckets, num_heads]` is differentiable too. It may have any float dtype.
///
/// # Errors
/// As [`attention`], and when the encoding is another one or the weight's shape does not fit.
pub fn attention_qkvpacked_with_bias(
    qkv: &Tensor,
    weight: &Tensor,
    spec: &AttentionSpec,
    sequences: &Sequences,
) -> Result<Tensor> {
    let batch = check(qkv.dims(), qkv.dtype(), true, spec, sequences)?;
    let PositionEncoding::RelativeBias(bias) = &spec.position else {
        bail!(
            "attention with a bias weight needs PositionEncoding::RelativeBias, got {:?}",
            spec.position
        )
    };
    if weight.dims() != [bias.num_buckets, spec.num_heads] {
        bail!(
            "attention: the relative bias weight must be [num_buckets, num_heads] = [{}, {}], got {:?}",
            bias.num_buckets,
            spec.num_heads,
            weight.dims()
        )
    }
    let qkv = contiguous_rows(qkv)?;
    let weight = weight.to_dtype(DType::F32)?.contiguous()?;
    let op = Attention::new(spec, batch, &[&qkv, &weight]);
    qkv.apply_op2(&weight, op)
}

fn check_alike(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
    for (name, tensor) in [("k", k), ("v", v)] {
        if tensor.shape() != q.shape() || tensor.dtype() != q.dtype() {
            bail!(
                "attention: q, k and v must have one shape and dtype, got q {:?} {:?} and {name} {:?} {:?}",
                q.dims(),
                q.dtype(),
                tensor.dims(),
                tensor.dtype()
            )
        }
    }
    Ok(())
}

/// Checks a call's spec, sequences and the shape and dtype of q, k and v, or of them packed.
fn check(
    dims: &[usize],
    dtype: DType,
    packed: bool,
    spec: &AttentionSpec,
    sequences: &Sequences,
) -> Result<Batch> {
    spec.validate()?;
    check_dtype("attention", dtype)?;
    let mut rows = vec![spec.num_heads, spec.head_dim];
    if packed {
        rows.insert(0, 3);
    }
    match dims.split_at_checked(dims.len().saturating_sub(rows.len())) {
        Some((tokens, last)) if last == rows => Batch::new("attention", sequences, tokens),
        _ => bail!(
            "attention: with {} heads of width {} the {} must end in {rows:?}, got shape {dims:?}; reshape, or change num_heads or head_dim",
            spec.num_heads,
            spec.head_dim,
            if packed { "packed qkv" } else { "q, k and v" },
        ),
    }
}

fn no_weight(spec: &AttentionSpec) -> Result<()> {
    if let PositionEncoding::RelativeBias(_) = spec.position {
        bail!(
            "attention: PositionEncoding::RelativeBias needs its weight; call attention_with_bias or attention_qkvpacked_with_bias"
        )
    }
    Ok(())
}

/// The tensor, copied if its last axis is not contiguous.
pub(crate) fn contiguous_rows(x: &Tensor) -> Result<Tensor> {
    match x.stride().last() {
        Some(1) => Ok(x.clone()),
        _ => x.contiguous(),
    }
}

/// One call in the graph, in all its forms: q, k and v packed ([`CustomOp1`]), with a bias weight
/// ([`CustomOp2`]), or apart ([`CustomOp3`]).
struct Attention {
    spec: AttentionSpec,
    batch: Batch,
    /// The log-sum-exp, of [`Batch::lse_shape`], from the forward for the backward pass, in the
    /// units of the device's kernel. None if there will be no backward pass.
    lse: Option<OnceLock<Tensor>>,
}

impl Attention {
    /// `arguments` are all tensors of the call.
    fn new(spec: &AttentionSpec, batch: Batch, arguments: &[&Tensor]) -> Self {
        let tracked = arguments.iter().any(|x| x.track_op());
        Self {
            spec: spec.clone(),
            batch,
            lse: tracked.then(OnceLock::new),
        }
    }

    fn output_shape(&self) -> Shape {
        let mut dims = match self.batch.sequences {
            Sequences::CuSeqlens(_) => vec![self.batch.total_tokens],
            _ => vec![self.batch.count, self.batch.seqlen],
        };
        dims.extend([self.spec.num_heads, self.spec.head_dim]);
        dims.into()
    }

    /// `inputs` are q, k and v, or the packed tensor.
    fn cpu_forward(
        &self,
        inputs: &[(&CpuStorage, &Layout)],
        weight: Option<&CpuStorage>,
    ) -> Result<(CpuStorage, Shape)> {
        let storage = match inputs[0].0 {
            CpuStorage::BF16(_) => self.cpu_forward_in::<bf16>(inputs, weight)?,
            CpuStorage::F16(_) => self.cpu_forward_in::<f16>(inputs, weight)?,
            _ => self.cpu_forward_in::<f32>(inputs, weight)?,
        };
        Ok((storage, self.output_shape()))
    }

    fn cpu_forward_in<T: Element>(
        &self,
        inputs: &[(&CpuStorage, &Layout)],
        weight: Option<&CpuStorage>,
    ) -> Result<CpuStorage> {
        let call = self.cpu_call::<T>(inputs, weight)?;
        let shape = self.output_shape();
        let mut out = vec![T::from_f64(0.0); shape.elem_count()];
        let out_rows = RowsMut {
            data: &SharedMut::new(&mut out),
            view: View::new(&Layout::contiguous(shape)),
        };
        let Some(saved) = &self.lse else {
            call.forward(out_rows, None);
            return Ok(T::to_cpu_storage_owned(out));
        };
        let mut lse = vec![0.0; self.batch.total_tokens * self.spec.num_heads];
        let lse_rows = RowsMut {
            data: &SharedMut::new(&mut lse),
            view: self.batch.lse_view(self.spec.num_heads),
        };
        call.forward(out_rows, Some(lse_rows));
        let lse = Tensor::from_vec(lse, self.batch.lse_shape(self.spec.num_heads), &Device::Cpu)?;
        saved.get_or_init(|| lse);
        Ok(T::to_cpu_storage_owned(out))
    }

    fn cpu_call<'a, T: Element>(
        &'a self,
        inputs: &[(&'a CpuStorage, &Layout)],
        weight: Option<&CpuStorage>,
    ) -> Result<cpu::Attention<'a, T>> {
        let data = inputs
            .iter()
            .map(|(storage, _)| T::cpu_storage_as_slice(storage))
            .collect::<Result<Vec<_>>>()?;
        let layouts: Vec<_> = inputs.iter().map(|(_, layout)| *layout).collect();
        let qkv = qkv_views(&layouts).map(|(input, view)| Rows {
            data: data[input],
            view,
        });
        let weight = weight.map(f32::cpu_storage_as_slice).transpose()?;
        Ok(cpu::Attention::new(&self.spec, &self.batch, qkv, weight))
    }

    /// Gradients of `inputs`, which are as in the forward pass, and of the bias weight.
    fn backward(
        &self,
        inputs: &[&Tensor],
        weight: Option<&Tensor>,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Vec<Tensor>, Option<Tensor>)> {
        let Some(lse) = self.lse.as_ref().and_then(OnceLock::get) else {
            bail!("attention: the backward pass needs a forward pass that tracked gradients")
        };
        let d_out = contiguous_rows(d_out)?;
        let saved = [out, &d_out, lse];
        match (out.device(), out.dtype()) {
            (Device::Cpu, DType::BF16) => self.cpu_backward::<bf16>(inputs, weight, saved),
            (Device::Cpu, DType::F16) => self.cpu_backward::<f16>(inputs, weight, saved),
            (Device::Cpu, _) => self.cpu_backward::<f32>(inputs, weight, saved),
            (device, _) => bail!("attention: no backward pass on {:?}", device.location()),
        }
    }

    fn cpu_backward<T: Element>(
        &self,
        inputs: &[&Tensor],
        weight: Option<&Tensor>,
        [out, d_out, lse]: [&Tensor; 3],
    ) -> Result<(Vec<Tensor>, Option<Tensor>)> {
        let locked: Vec<_> = inputs.iter().map(|x| x.storage_and_layout()).collect();
        let storages = locked
            .iter()
            .map(|(storage, layout)| Ok((cpu_storage(storage)?, *layout)))
            .collect::<Result<Vec<_>>>()?;
        let weight_locked = weight.map(Tensor::storage_and_layout);
        let weight_storage = match &weight_locked {
            Some((storage, _)) => Some(cpu_storage(storage)?),
            None => None,
        };
        let call = self.cpu_call::<T>(&storages, weight_storage)?;

        let (out, out_layout) = out.storage_and_layout();
        let (d_out, d_out_layout) = d_out.storage_and_layout();
        let (lse, _) = lse.storage_and_layout();
        let saved = cpu::Saved {
            out: rows::<T>(&out, View::new(out_layout))?,
            d_out: rows::<T>(&d_out, View::new(d_out_layout))?,
            lse: rows::<f32>(&lse, self.batch.lse_view(self.spec.num_heads))?,
        };

        let mut gradients: Vec<_> = inputs
            .iter()
            .map(|x| vec![T::from_f64(0.0); x.elem_count()])
            .collect();
        let shared: Vec<_> = gradients.iter_mut().map(|x| SharedMut::new(x)).collect();
        let layout = Layout::contiguous(inputs[0].shape());
        let views = qkv_views(&vec![&layout; inputs.len()]);
        let d_weight = call.backward(
            &saved,
            views.map(|(input, view)| RowsMut {
                data: &shared[input],
                view,
            }),
        );
        let gradients = gradients
            .into_iter()
            .zip(inputs)
            .map(|(gradient, x)| Tensor::from_vec(gradient, x.shape(), &Device::Cpu))
            .collect::<Result<_>>()?;
        let d_weight = d_weight
            .zip(weight)
            .map(|(gradient, weight)| Tensor::from_vec(gradient, weight.shape(), &Device::Cpu))
            .transpose()?;
        Ok((gradients, d_weight))
    }
}

/// Which input has q, k and v, and where: three tensors of one layout each, or one packed.
fn qkv_views(layouts: &[&Layout]) -> [(usize, View); 3] {
    match layouts {
        [packed] => View::unpack(packed).map(|view| (0, view)),
        _ => [0, 1, 2].map(|input| (input, View::new(layouts[input]))),
    }
}

fn cpu_storage(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("attention: the inputs must be on one device"),
    }
}

fn rows<T: Element>(storage: &Storage, view: View) -> Result<Rows<'_, T>> {
    let data = T::cpu_storage_as_slice(cpu_storage(storage)?)?;
    Ok(Rows { data, view })
}

const NAME: &str = "attention";

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu_forward(&[(qkv, layout)], None)
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, d_out: &Tensor) -> Result<Option<Tensor>> {
        let (mut gradients, _) = self.backward(&[qkv], None, out, d_out)?;
        Ok(gradients.pop())
    }
}

impl CustomOp2 for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu_forward(&[(qkv, layout)], Some(weight))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        weight: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut gradients, d_weight) = self.backward(&[qkv], Some(weight), out, d_out)?;
        Ok((gradients.pop(), d_weight))
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu_forward(&[(q, q_layout), (k, k_layout), (v, v_layout)], None)
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (gradients, _) = self.backward(&[q, k, v], None, out, d_out)?;
        let mut gradients = gradients.into_iter();
        Ok((gradients.next(), gradients.next(), gradients.next()))
    }
}

//! The attention functions and their place in Candle's graph.

use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail,
};

use crate::batch::Batch;
use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::check_dtype;
use crate::ops::linear;
#[cfg(feature = "cuda")]
use crate::ops::linear_rotated;
use crate::spec::{AttentionSpec, PositionEncoding, Sequences};
use crate::tape::{self, Gradient};

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
    let op = Attention::new(spec, batch, &[&q, &k, &v], false);
    tape::apply3(op, &q, &k, &v)
}

/// As [`attention`], of q, k and v in one tensor `[batch, seqlen, 3, num_heads, head_dim]`, or
/// `[total_tokens, 3, num_heads, head_dim]` with [`Sequences::CuSeqlens`]. The last three axes may
/// be one, `3 * num_heads * head_dim`, as a linear layer makes it; then the result's last two are
/// one too.
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
    no_weight(spec)?;
    let (qkv, flat, batch) = packed(qkv, spec, sequences)?;
    let op = Attention::new(spec, batch, &[&qkv], flat);
    tape::apply1(op, &qkv)
}

/// [`attention_qkvpacked`] of the flat q, k and v that a linear layer makes of x: its weight is
/// `[3 * num_heads * head_dim, inner]`, its bias `[3 * num_heads * head_dim]`, and x
/// `[batch, seqlen, inner]`, or `[total_tokens, inner]` with [`Sequences::CuSeqlens`].
///
/// With RoPE in bf16 or f16, the product rotates q and k on Hopper GPUs, which takes next to no time:
/// where head_dim is a power of 2, 16 to 256, and the weight's axes are multiples of 64.
///
/// # Errors
/// As [`attention`] and [`linear`](crate::ops::linear).
pub fn attention_projected(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    spec: &AttentionSpec,
    sequences: &Sequences,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (PositionEncoding::Rope(rope), [tokens @ .., _]) = (&spec.position, x.dims())
        && weight.dims().first() == Some(&(3 * spec.num_heads * spec.head_dim))
    {
        let dims = [tokens, &[3, spec.num_heads, spec.head_dim]].concat();
        let batch = check(&dims, x.dtype(), true, spec, sequences)?;
        if let Some(qkv) = linear_rotated(x, weight, bias, rope, &batch, spec.num_heads)? {
            let mut op = Attention::new(spec, batch, &[&qkv], true);
            op.qk_rotated = true;
            return op.apply_projected(&qkv, bias);
        }
    }
    no_weight(spec)?;
    let (qkv, flat, batch) = packed(&linear(x, weight, bias)?, spec, sequences)?;
    Attention::new(spec, batch, &[&qkv], flat).apply_projected(&qkv, bias)
}

/// As [`attention`] with [`PositionEncoding::RelativeBias`], whose `weight`
/// `[num_buckets, num_heads]` is differentiable too. It may have any float dtype.
///
/// q, k and v are copied into one tensor; [`attention_qkvpacked_with_bias`] does without.
///
/// # Errors
/// As [`attention`], and when the encoding is another one, the weight's shape does not fit, or on a
/// GPU there are more buckets than [`MAX_CUDA_BUCKETS`](crate::RelativeBias::MAX_CUDA_BUCKETS).
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
/// As [`attention`], and when the encoding is another one, the weight's shape does not fit, or on a
/// GPU there are more buckets than [`MAX_CUDA_BUCKETS`](crate::RelativeBias::MAX_CUDA_BUCKETS).
pub fn attention_qkvpacked_with_bias(
    qkv: &Tensor,
    weight: &Tensor,
    spec: &AttentionSpec,
    sequences: &Sequences,
) -> Result<Tensor> {
    let (qkv, flat, batch) = packed(qkv, spec, sequences)?;
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
    // A copy, as a contiguous view may begin within its storage.
    let weight = weight.to_dtype(DType::F32)?.force_contiguous()?;
    let op = Attention::new(spec, batch, &[&qkv, &weight], flat);
    tape::apply2(op, &qkv, &weight)
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

/// The packed tensor, whether its last axis is flat (q, k and v of all heads), and its sequences.
fn packed(
    qkv: &Tensor,
    spec: &AttentionSpec,
    sequences: &Sequences,
) -> Result<(Tensor, bool, Batch)> {
    let (qkv, dims) = match qkv.dims() {
        [tokens @ .., last] if *last == 3 * spec.num_heads * spec.head_dim => {
            let dims = [tokens, &[3, spec.num_heads, spec.head_dim]].concat();
            (qkv.contiguous()?, dims)
        }
        dims => (contiguous_rows(qkv)?, dims.to_vec()),
    };
    let batch = check(&dims, qkv.dtype(), true, spec, sequences)?;
    let flat = dims.len() > qkv.rank();
    Ok((qkv, flat, batch))
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
    /// Whether the last axes of packed tensors and the result are one.
    flat: bool,
    /// The log-sum-exp, of [`Batch::lse_shape`], from the forward for the backward pass, in the
    /// units of the device's kernel. None if there will be no backward pass.
    lse: Option<OnceLock<Tensor>>,
    /// Whether q and k come rotated; gradients are those of q and k before that.
    #[cfg(feature = "cuda")]
    qk_rotated: bool,
    /// q and k rotated, which the GPU's kernels keep for the backward pass.
    #[cfg(feature = "cuda")]
    rotated: OnceLock<Tensor>,
}

impl Attention {
    /// `arguments` are all tensors of the call.
    fn new(spec: &AttentionSpec, batch: Batch, arguments: &[&Tensor], flat: bool) -> Self {
        let tracked = arguments.iter().any(|x| x.track_op());
        Self {
            spec: spec.clone(),
            batch,
            flat,
            lse: tracked.then(OnceLock::new),
            #[cfg(feature = "cuda")]
            qk_rotated: false,
            #[cfg(feature = "cuda")]
            rotated: OnceLock::new(),
        }
    }

    /// A shape of the axes of tokens and some more.
    fn shape(&self, axes: &[usize]) -> Shape {
        let tokens = match self.batch.sequences {
            Sequences::CuSeqlens(_) => vec![self.batch.total_tokens],
            _ => vec![self.batch.count, self.batch.seqlen],
        };
        [&tokens, axes].concat().into()
    }

    /// Of the result, with an axis for the heads.
    fn heads_shape(&self) -> Shape {
        self.shape(&[self.spec.num_heads, self.spec.head_dim])
    }

    fn output_shape(&self) -> Shape {
        match self.flat {
            true => self.shape(&[self.spec.num_heads * self.spec.head_dim]),
            false => self.heads_shape(),
        }
    }

    /// The layout of packed q, k and v with all its axes.
    fn packed_layout(&self, layout: &Layout) -> Layout {
        let qkv = self.shape(&[3, self.spec.num_heads, self.spec.head_dim]);
        match self.flat {
            true => Layout::contiguous_with_offset(qkv, layout.start_offset()),
            false => layout.clone(),
        }
    }

    /// Runs the operation on what a linear layer made with `bias`: on a tape, the backward pass gives the
    /// layer the gradient of its bias, where the kernels have that at hand.
    fn apply_projected(self, qkv: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if !tape::records(&[qkv]) {
            return qkv.apply_op1(self);
        }
        // With axes of their own, the layer makes the width of a head alone.
        let sum_columns = self.flat && bias.is_some_and(Tensor::track_op);
        let out = tape::run1(&self, qkv)?;
        let (qkv, saved) = (qkv.clone(), out.clone());
        tape::push(NAME, &out, move |grad, gradients| {
            let found = self.backward(&[&qkv], None, &saved, &grad.value, sum_columns)?;
            let column_sum = found.column_sums;
            found.inputs.into_iter().try_for_each(|value| {
                let grad = Gradient {
                    column_sum: column_sum.clone(),
                    ..value.into()
                };
                gradients.add(&qkv, grad)
            })
        });
        Ok(out)
    }

    /// `inputs` are q, k and v, or the packed tensor with all its axes.
    fn cpu_forward(
        &self,
        inputs: &[(&CpuStorage, &Layout)],
        weight: Option<&CpuStorage>,
    ) -> Result<(CpuStorage, Shape)> {
        let out_layout = Layout::contiguous(self.heads_shape());
        let (out, lse) = cpu::forward(&self.spec, &self.batch, inputs, weight, &out_layout)?;
        if let Some(saved) = &self.lse {
            let shape = self.batch.lse_shape(self.spec.num_heads);
            let lse = Tensor::from_vec(lse, shape, &Device::Cpu)?;
            saved.get_or_init(|| lse);
        }
        Ok((out, self.output_shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_forward(
        &self,
        inputs: &[(&CudaStorage, &Layout)],
        weight: Option<&CudaStorage>,
    ) -> Result<(CudaStorage, Shape)> {
        let out_layout = Layout::contiguous(self.heads_shape());
        let found = cuda::attention::forward(
            &self.spec,
            &self.batch,
            inputs,
            weight,
            &out_layout,
            self.qk_rotated,
            self.lse.is_some(),
        )?;
        if let Some(saved) = &self.lse {
            saved.get_or_init(|| found.lse);
        }
        if let Some(rotated) = found.rotated {
            self.rotated.get_or_init(|| rotated);
        }
        Ok((found.out, self.output_shape()))
    }

    /// Gradients of `inputs`, which are as in the forward pass, and of the bias weight; with
    /// `sum_columns` also [`AttentionGradients::column_sums`].
    fn backward(
        &self,
        inputs: &[&Tensor],
        weight: Option<&Tensor>,
        out: &Tensor,
        d_out: &Tensor,
        sum_columns: bool,
    ) -> Result<AttentionGradients> {
        let Some(lse) = self.lse.as_ref().and_then(OnceLock::get) else {
            bail!("attention: the backward pass needs a forward pass that tracked gradients")
        };
        if self.flat {
            let qkv = self.shape(&[3, self.spec.num_heads, self.spec.head_dim]);
            let unflatten = |x: &Tensor, shape: &Shape| x.detach().reshape(shape);
            let out = unflatten(out, &self.heads_shape())?;
            let d_out = unflatten(d_out, &self.heads_shape())?;
            let saved = [&out, &d_out, lse];
            let qkv = unflatten(inputs[0], &qkv)?;
            let mut found = self.device_backward(&[&qkv], weight, saved, sum_columns)?;
            for d_qkv in &mut found.inputs {
                *d_qkv = d_qkv.reshape(inputs[0].shape())?;
            }
            return Ok(found);
        }
        let saved = [out, &contiguous_rows(d_out)?, lse];
        self.device_backward(inputs, weight, saved, sum_columns)
    }

    /// The same of tensors with all their axes; `saved` are the output, its gradient and the
    /// log-sum-exp.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
    fn device_backward(
        &self,
        inputs: &[&Tensor],
        weight: Option<&Tensor>,
        saved: [&Tensor; 3],
        sum_columns: bool,
    ) -> Result<AttentionGradients> {
        match inputs[0].device() {
            Device::Cpu => cpu::backward(&self.spec, &self.batch, inputs, weight, saved),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => cuda::attention::backward(
                &self.spec,
                &self.batch,
                inputs,
                weight,
                saved,
                self.qk_rotated,
                self.rotated.get(),
                sum_columns,
            ),
            device => bail!("attention: no backward pass on {:?}", device.location()),
        }
    }
}

/// Results of a backward pass.
pub(crate) struct AttentionGradients {
    /// Of each input.
    pub inputs: Vec<Tensor>,
    /// Of the bias weight.
    pub weight: Option<Tensor>,
    /// Sums of dq, dk and dv over all tokens, f32 `[3 * num_heads * head_dim]`, if they were asked for
    /// and the kernels had them at hand.
    pub column_sums: Option<Tensor>,
}

const NAME: &str = "attention";

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu_forward(&[(qkv, &self.packed_layout(layout))], None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, qkv: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda_forward(&[(qkv, &self.packed_layout(layout))], None)
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, d_out: &Tensor) -> Result<Option<Tensor>> {
        let mut found = self.backward(&[qkv], None, out, d_out, false)?;
        Ok(found.inputs.pop())
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
        self.cpu_forward(&[(qkv, &self.packed_layout(layout))], Some(weight))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        qkv: &CudaStorage,
        layout: &Layout,
        weight: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda_forward(&[(qkv, &self.packed_layout(layout))], Some(weight))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        weight: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut found = self.backward(&[qkv], Some(weight), out, d_out, false)?;
        Ok((found.inputs.pop(), found.weight))
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

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda_forward(&[(q, q_layout), (k, k_layout), (v, v_layout)], None)
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let found = self.backward(&[q, k, v], None, out, d_out, false)?;
        let mut gradients = found.inputs.into_iter();
        Ok((gradients.next(), gradients.next(), gradients.next()))
    }
}

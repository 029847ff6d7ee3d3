//! The affine map of a dense layer.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Layout};
use candle_core::{Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{sum_vectors, values, vectorized};
use super::product::{Matrix, Product, product, rows_and_columns};
use super::{cast, gelu, gelu_linear_backward, plain};
#[cfg(feature = "cuda")]
use crate::batch::Batch;
#[cfg(feature = "cuda")]
use crate::cuda::{ops as cuda, rope as cuda_rope};
use crate::element::check_dtype;
use crate::operand::{Locked, Operand};
#[cfg(feature = "cuda")]
use crate::spec::Rope;
use crate::tape::{self, Gradient, Gradients};

/// Rows that one task of a column sum takes.
const ROWS: usize = 128;

/// `x weight^T + bias`.
///
/// x is `[.., in]`, weight `[out, in]`, bias `[out]`, all of one dtype: f32, bf16 or f16, products
/// summed in f32. The result is `[.., out]`. The backward pass is two matrix products and a column
/// sum.
///
/// # Errors
/// When a dtype or shape is another.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    Linear::new(x, weight, bias, None)?.forward(Input::Given)
}

/// As [`linear`], with the result added to `residual` `[.., out]` before it is rounded.
///
/// # Errors
/// As [`linear`].
pub fn linear_add(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: &Tensor,
) -> Result<Tensor> {
    Linear::new(x, weight, bias, Some(residual))?.forward(Input::Given)
}

/// A transformer's MLP: [`linear_add`] of [`gelu`] of [`linear`] of x, each layer with its weight and bias.
/// The activations are not kept for the backward pass, but computed again. On Hopper one kernel computes
/// the first layer and its activations.
///
/// # Errors
/// As [`linear`].
pub fn mlp_add(
    x: &Tensor,
    (weight, bias): (&Tensor, Option<&Tensor>),
    (out_weight, out_bias): (&Tensor, Option<&Tensor>),
    residual: &Tensor,
) -> Result<Tensor> {
    let (hidden, input) = Linear::new(x, weight, bias, None)?.forward_to_gelu()?;
    Linear::new(&hidden, out_weight, out_bias, Some(residual))?.forward(input)
}

/// [`linear`] to q, k and v of all heads, flat, with q and k rotated, if there is a kernel for these.
/// The gradient is that of the result before the rotation.
#[cfg(feature = "cuda")]
pub(crate) fn linear_rotated(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    rope: &Rope,
    batch: &Batch,
    num_heads: usize,
) -> Result<Option<Tensor>> {
    Linear::new(x, weight, bias, None)?.forward_rotated(rope, batch, num_heads)
}

/// What the matrix product takes.
enum Input {
    /// x.
    Given,
    /// GELU of x, where it is known already.
    Gelu(Option<Tensor>),
}

/// The contiguous tensors of one call.
pub(super) struct Linear {
    pub x: Tensor,
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    residual: Option<Tensor>,
}

impl Linear {
    pub fn new(
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Self> {
        let op = "linear";
        check_dtype(op, x.dtype())?;
        super::check_dtype(op, "weight", weight, x.dtype())?;
        let inputs = x.dim(D::Minus1)?;
        let outputs = weight.dim(0)?;
        let expected = [outputs, inputs];
        super::check_shape(op, "weight", weight, &expected, "the last axis of x")?;
        if inputs == 0 || outputs == 0 {
            bail!(
                "{op}: got weight of shape {:?}, expected no empty axis",
                weight.dims()
            )
        }
        if let Some(bias) = bias {
            super::check_dtype(op, "bias", bias, x.dtype())?;
            super::check_shape(op, "bias", bias, &[outputs], "the rows of weight")?;
        }
        if let Some(residual) = residual {
            super::check_dtype(op, "residual", residual, x.dtype())?;
            let expected = output_shape(x.dims(), outputs);
            super::check_shape(op, "residual", residual, expected.dims(), "the result")?;
        }
        Ok(Self {
            x: contiguous(x)?,
            weight: contiguous(weight)?,
            bias: bias.map(contiguous).transpose()?,
            residual: residual.map(contiguous).transpose()?,
        })
    }

    pub fn inputs(&self) -> impl Iterator<Item = &Tensor> {
        let optional = self.bias.iter().chain(&self.residual);
        [&self.x, &self.weight].into_iter().chain(optional)
    }

    fn forward(self, input: Input) -> Result<Tensor> {
        let dtype = self.x.dtype();
        if self.needs_f32() {
            return cast(&self.in_f32()?.forward(input)?, dtype);
        }
        let activate = matches!(input, Input::Gelu(_));
        if self.belongs_to_graph() {
            return self.in_graph(activate);
        }
        let y = self.compute(input)?;
        Ok(self.output(y, activate))
    }

    /// What the next layer gets as its x, and what it multiplies: GELU of the result.
    fn forward_to_gelu(self) -> Result<(Tensor, Input)> {
        #[cfg(feature = "cuda")]
        if let Some(bias) = &self.bias
            && self.x.device().is_cuda()
            && !self.belongs_to_graph()
        {
            let locked = [&self.x, &self.weight, bias].map(Locked::new);
            let [x, weight, bias] = locked.each_ref().map(Locked::operand);
            let keep_pre = self.records();
            let found = cuda::linear_gelu(x?.cuda()?, weight?.cuda()?, bias?.cuda()?, keep_pre)?;
            drop(locked);
            if let Some((activated, pre)) = found {
                let activated = plain(Storage::Cuda(activated), self.output_shape());
                // Without a backward pass the result itself is of no use.
                let Some(pre) = pre else {
                    return Ok((activated, Input::Given));
                };
                let y = self.output(Storage::Cuda(pre), false);
                return Ok((y, Input::Gelu(Some(activated))));
            }
        }
        Ok((self.forward(Input::Given)?, Input::Gelu(None)))
    }

    /// The result as q, k and v with q and k rotated, if the device does that in one kernel. The
    /// gradient is that of the result before.
    #[cfg(feature = "cuda")]
    fn forward_rotated(
        self,
        rope: &Rope,
        batch: &Batch,
        num_heads: usize,
    ) -> Result<Option<Tensor>> {
        if !self.x.device().is_cuda() || self.belongs_to_graph() {
            return Ok(None);
        }
        let (x, weight) = (Locked::new(&self.x), Locked::new(&self.weight));
        let bias = self.bias.as_ref().map(Locked::new);
        let found = cuda_rope::linear_rotated(
            rope,
            batch,
            num_heads,
            x.operand()?.cuda()?,
            weight.operand()?.cuda()?,
            match &bias {
                Some(bias) => Some(bias.operand()?.cuda()?),
                None => None,
            },
        )?;
        drop((x, weight, bias));
        Ok(found.map(|qkv| self.output(Storage::Cuda(qkv), false)))
    }

    pub fn records(&self) -> bool {
        tape::records(&self.inputs().collect::<Vec<_>>())
    }

    fn belongs_to_graph(&self) -> bool {
        !self.records() && self.inputs().any(Tensor::track_op)
    }

    fn output_shape(&self) -> Shape {
        output_shape(self.x.dims(), rows_and_columns(self.weight.dims()).0)
    }

    /// Makes a tensor of what was computed, on the tape if one records.
    fn output(self, y: Storage, activate: bool) -> Tensor {
        let shape = self.output_shape();
        if !self.records() {
            return plain(y, shape);
        }
        let y = tape::output(y, shape);
        let name = if activate { "gelu_linear" } else { "linear" };
        tape::push(name, &y, move |grad, gradients| {
            self.backward(activate, grad, gradients)
        });
        y
    }

    /// Whether the products of its device take f32 alone.
    pub fn needs_f32(&self) -> bool {
        self.x.device().is_cpu() && self.x.dtype() != DType::F32
    }

    pub fn in_f32(&self) -> Result<Self> {
        let convert = |x: &Tensor| cast(x, DType::F32);
        Ok(Self {
            x: convert(&self.x)?,
            weight: convert(&self.weight)?,
            bias: self.bias.as_ref().map(convert).transpose()?,
            residual: self.residual.as_ref().map(convert).transpose()?,
        })
    }

    /// In Candle's graph, where an operation has three inputs at most.
    fn in_graph(&self, activate: bool) -> Result<Tensor> {
        let x = match activate {
            true => gelu(&self.x)?,
            false => self.x.clone(),
        };
        let y = match &self.bias {
            Some(bias) => x.apply_op3(&self.weight, bias, GraphOp),
            None => x.apply_op2(&self.weight, GraphOp),
        }?;
        match &self.residual {
            Some(residual) => y + residual,
            None => Ok(y),
        }
    }

    fn compute(&self, input: Input) -> Result<Storage> {
        let x = match &input {
            Input::Given => &self.x,
            Input::Gelu(Some(activated)) => activated,
            Input::Gelu(None) => &gelu(&self.x.detach())?,
        };
        let locked = (Locked::new(x), Locked::new(&self.weight));
        let bias = self.bias.as_ref().map(Locked::new);
        let residual = self.residual.as_ref().map(Locked::new);
        let bias = bias.as_ref().map(Locked::operand).transpose()?;
        let residual = residual.as_ref().map(Locked::operand).transpose()?;
        dense(locked.0.operand()?, locked.1.operand()?, bias, residual)
    }

    fn backward(self, activate: bool, grad: Gradient, gradients: &mut Gradients) -> Result<()> {
        let (rows, inputs) = rows_and_columns(self.x.dims());
        let outputs = self.weight.dim(0)?;
        let (weight, x) = (self.weight.detach(), self.x.detach());
        let Gradient {
            value, column_sum, ..
        } = grad;
        let grad = value.contiguous()?.reshape((rows, outputs))?;
        if let Some(residual) = &self.residual {
            gradients.add(residual, grad.reshape(residual.shape())?)?;
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.track_op()) {
            let sum = column_sum.map_or_else(|| grad.apply_op1_no_bwd(&ColumnSum), Ok);
            gradients.add(bias, sum?)?;
        }
        let mut input = x.clone();
        if activate {
            let (activated, dx) = gelu_linear_backward(&x, &grad, &weight)?;
            input = activated;
            gradients.add(&self.x, dx)?;
        } else if self.x.track_op() {
            let before = gradients.remove_as(&self.x, x.dtype())?;
            let dx = product([&grad, &weight], [false, false], before.as_ref(), x.dtype())?;
            gradients.put(&self.x, dx.reshape(x.shape())?.into());
        }
        if self.weight.track_op() {
            let input = input.reshape((rows, inputs))?;
            let before = gradients.remove_as(&self.weight, DType::F32)?;
            let dw = product([&grad, &input], [true, false], before.as_ref(), DType::F32)?;
            gradients.put(&self.weight, dw.into());
        }
        Ok(())
    }
}

/// The tensor, copied if it has gaps, or begins where cuBLAS cannot read it.
fn contiguous(x: &Tensor) -> Result<Tensor> {
    let offset = x.layout().start_offset() * x.dtype().size_in_bytes();
    match x.device().is_cuda() && !offset.is_multiple_of(16) {
        true => x.force_contiguous(),
        false => x.contiguous(),
    }
}

/// `x weight^T + bias + residual`.
pub(super) fn dense(
    x: Operand,
    weight: Operand,
    bias: Option<Operand>,
    residual: Option<Operand>,
) -> Result<Storage> {
    let matrix = |operand, transposed| Matrix {
        operand,
        transposed,
    };
    Product {
        scale: 1.0,
        left: matrix(x, false),
        right: matrix(weight, true),
        bias,
        add: residual,
        dtype: x.dtype(),
    }
    .compute()
}

fn output_shape(x: &[usize], outputs: usize) -> Shape {
    let mut dims = x.to_vec();
    if let Some(last) = dims.last_mut() {
        *last = outputs;
    }
    dims.into()
}

/// [`linear`] in Candle's graph.
struct GraphOp;

impl GraphOp {
    fn cpu(x: Operand, weight: Operand, bias: Option<Operand>) -> Result<(CpuStorage, Shape)> {
        match dense(x, weight, bias, None)? {
            Storage::Cpu(y) => Ok((y, shape(x, weight))),
            y => bail!("linear: got a result on {:?}", y.device().location()),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda(x: Operand, weight: Operand, bias: Option<Operand>) -> Result<(CudaStorage, Shape)> {
        match dense(x, weight, bias, None)? {
            Storage::Cuda(y) => Ok((y, shape(x, weight))),
            y => bail!("linear: got a result on {:?}", y.device().location()),
        }
    }

    /// The gradients of x and weight.
    fn backward(
        x: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (rows, inputs) = rows_and_columns(x.dims());
        let grad = grad.contiguous()?.reshape((rows, weight.dim(0)?))?;
        let dx = match x.track_op() {
            true => {
                let dx = product([&grad, weight], [false, false], None, x.dtype())?;
                Some(dx.reshape(x.shape())?)
            }
            false => None,
        };
        let d_weight = match weight.track_op() {
            true => {
                let x = x.detach().reshape((rows, inputs))?;
                Some(product([&grad, &x], [true, false], None, weight.dtype())?)
            }
            false => None,
        };
        Ok((dx, d_weight))
    }
}

fn shape(x: Operand, weight: Operand) -> Shape {
    output_shape(x.layout().dims(), weight.layout().dims()[0])
}

impl CustomOp2 for GraphOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (
            Operand::Cpu(x, x_layout),
            Operand::Cpu(weight, weight_layout),
        );
        Self::cpu(x, weight, None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (x, weight) = (
            Operand::Cuda(x, x_layout),
            Operand::Cuda(weight, weight_layout),
        );
        Self::cuda(x, weight, None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Self::backward(x, weight, grad)
    }
}

impl CustomOp3 for GraphOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (
            Operand::Cpu(x, x_layout),
            Operand::Cpu(weight, weight_layout),
        );
        Self::cpu(x, weight, Some(Operand::Cpu(bias, bias_layout)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (x, weight) = (
            Operand::Cuda(x, x_layout),
            Operand::Cuda(weight, weight_layout),
        );
        Self::cuda(x, weight, Some(Operand::Cuda(bias, bias_layout)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, d_weight) = Self::backward(x, weight, grad)?;
        let d_bias = match bias.track_op() {
            true => {
                let sum = grad.contiguous()?.apply_op1_no_bwd(&ColumnSum)?;
                Some(sum.to_dtype(bias.dtype())?)
            }
            false => None,
        };
        Ok((dx, d_weight, d_bias))
    }
}

/// Sum over all axes but the last, in f32.
pub(super) struct ColumnSum;

impl CustomOp1 for ColumnSum {
    fn name(&self) -> &'static str {
        "column_sum"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let columns = layout.dim(D::Minus1)?;
        let partial: Vec<_> = values::<f32>(x, layout)?
            .par_chunks(ROWS * columns)
            .map(|rows| {
                let mut sums = vec![0.0; columns];
                vectorized(
                    #[inline(always)]
                    || {
                        for row in rows.chunks_exact(columns) {
                            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                        }
                    },
                );
                sums
            })
            .collect();
        Ok((
            CpuStorage::F32(sum_vectors(columns, &partial)),
            columns.into(),
        ))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let columns = layout.dim(D::Minus1)?;
        let sums = cuda::column_sum((x, layout), rows_and_columns(layout.dims()).0, columns)?;
        Ok((sums, columns.into()))
    }
}

//! The affine map of a dense layer.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Layout, Result, Shape};
use candle_core::{Tensor, bail};
use gemm::Parallelism;
use rayon::prelude::*;

use super::cpu::{sum_vectors, values, vectorized};
#[cfg(feature = "cuda")]
use crate::cuda::ops as cuda;
use crate::element::check_dtype;

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
    let op = "linear";
    check_dtype(op, x.dtype())?;
    super::check_dtype(op, "weight", weight, x.dtype())?;
    let inputs = x.dim(D::Minus1)?;
    let outputs = weight.dim(0)?;
    super::check_shape(
        op,
        "weight",
        weight,
        &[outputs, inputs],
        "the last axis of x",
    )?;
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
    if x.device().is_cpu() && x.dtype() != DType::F32 {
        let bias = bias.map(|bias| bias.to_dtype(DType::F32)).transpose()?;
        let (x32, weight) = (x.to_dtype(DType::F32)?, weight.to_dtype(DType::F32)?);
        return linear(&x32, &weight, bias.as_ref())?.to_dtype(x.dtype());
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    match bias {
        None => x.apply_op2(&weight, Linear),
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, Linear),
    }
}

struct Linear;

impl Linear {
    /// `c += x weight^T`, where c is `[rows, out]`.
    fn add_product(x: &[f32], weight: &[f32], c: &mut [f32], [rows, inputs, outputs]: [usize; 3]) {
        assert_eq!(
            [x.len(), weight.len(), c.len()],
            [rows * inputs, outputs * inputs, rows * outputs]
        );
        // SAFETY: the strides are those of contiguous row-major matrices (weight's transposed) of
        // the lengths just asserted.
        unsafe {
            gemm::gemm(
                rows,
                outputs,
                inputs,
                c.as_mut_ptr(),
                1,
                outputs as isize,
                true,
                x.as_ptr(),
                1,
                inputs as isize,
                weight.as_ptr(),
                inputs as isize,
                1,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::Rayon(0),
            );
        }
    }

    fn cpu_forward(
        x: (&CpuStorage, &Layout),
        weight: (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let (outputs, inputs) = weight.1.shape().dims2()?;
        let shape = output_shape(x.1, outputs);
        let mut y = vec![0.0; shape.elem_count()];
        if let Some((bias, layout)) = bias {
            let bias = values(bias, layout)?;
            y.par_chunks_mut(outputs)
                .with_min_len(ROWS)
                .for_each(|row| row.copy_from_slice(bias));
        }
        let rows = rows(x.1);
        let (x, weight) = (values(x.0, x.1)?, values(weight.0, weight.1)?);
        Self::add_product(x, weight, &mut y, [rows, inputs, outputs]);
        Ok((CpuStorage::F32(y), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_forward(
        x: cuda::Input,
        weight: cuda::Input,
        bias: Option<cuda::Input>,
    ) -> Result<(CudaStorage, Shape)> {
        let (outputs, inputs) = weight.1.shape().dims2()?;
        let y = cuda::linear(x, weight, bias, [rows(x.1), inputs, outputs])?;
        Ok((y, output_shape(x.1, outputs)))
    }

    /// The gradients of x and weight.
    fn backward(
        x: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = weight.dims2()?;
        let rows = rows(x.layout());
        let grad = grad.contiguous()?.reshape((rows, outputs))?;
        let dx = match x.track_op() {
            true => Some(grad.matmul(&weight.detach())?.reshape(x.shape())?),
            false => None,
        };
        let d_weight = match weight.track_op() {
            true => Some(grad.t()?.matmul(&x.detach().reshape((rows, inputs))?)?),
            false => None,
        };
        Ok((dx, d_weight))
    }
}

/// Product of all axes but the last.
fn rows(x: &Layout) -> usize {
    x.dims()[..x.dims().len() - 1].iter().product()
}

fn output_shape(x: &Layout, outputs: usize) -> Shape {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = outputs;
    }
    dims.into()
}

impl CustomOp2 for Linear {
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
        Self::cpu_forward((x, x_layout), (weight, weight_layout), None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Self::cuda_forward((x, x_layout), (weight, weight_layout), None)
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

impl CustomOp3 for Linear {
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
        let (weight, bias) = ((weight, weight_layout), (bias, bias_layout));
        Self::cpu_forward((x, x_layout), weight, Some(bias))
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
        let (weight, bias) = ((weight, weight_layout), (bias, bias_layout));
        Self::cuda_forward((x, x_layout), weight, Some(bias))
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
            true => Some(grad.contiguous()?.apply_op1_no_bwd(&ColumnSum)?),
            false => None,
        };
        Ok((dx, d_weight, d_bias))
    }
}

/// Sum over all axes but the last.
struct ColumnSum;

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
        let sums = cuda::column_sum((x, layout), rows(layout), columns)?;
        Ok((sums, columns.into()))
    }
}

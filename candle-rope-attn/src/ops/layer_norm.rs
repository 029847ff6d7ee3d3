//! Layer normalisation (Ba et al. 2016, <https://arxiv.org/abs/1607.06450>).

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor, bail};
use candle_core::{IndexOp, WithDType};
use rayon::prelude::*;

use super::Saved;
use super::cpu::{sum, sum_vectors, sum2, values, vectorized, with_element, zeros};
#[cfg(feature = "cuda")]
use crate::cuda::ops as cuda;
use crate::element::{Element, check_dtype};
use crate::operand::Locked;
use crate::tape::{self, Gradient};

/// Rows that one task takes.
const ROWS: usize = 32;

/// Evaluates an expression with `$X` and `$Y` as the element types of x and the result: the same, or f32 and
/// any.
macro_rules! with_elements {
    ($x:expr, $y:expr, $X:ident, $Y:ident => $body:expr) => {
        match $x {
            DType::F32 => {
                type $X = f32;
                with_element!($y, $Y => $body)
            }
            narrow => with_element!(narrow, $X => {
                type $Y = $X;
                $body
            }),
        }
    };
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis.
///
/// x is `[.., width]` in f32, bf16 or f16, and so is the result; weight and bias are `[width]` in
/// f32 whatever the dtype of x. Statistics are in f32.
///
/// # Errors
/// When a dtype or shape is another, or the width is 0.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    layer_norm_as(x, weight, bias, eps, x.dtype())
}

/// [`layer_norm`] of an f32 x with the result in another dtype: what a [`cast`](super::cast) after it gives,
/// in both directions, without that pass over memory.
///
/// # Errors
/// As [`layer_norm`], and when x is neither in f32 nor in that dtype.
pub fn layer_norm_as(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    dtype: DType,
) -> Result<Tensor> {
    let op = "layer_norm";
    check_dtype(op, x.dtype())?;
    check_dtype(op, dtype)?;
    if x.dtype() != DType::F32 && x.dtype() != dtype {
        bail!(
            "{op}: got x of dtype {:?} for a result in {dtype:?}, expected x in F32 or {dtype:?}; convert it with to_dtype",
            x.dtype()
        )
    }
    let width = x.dim(D::Minus1)?;
    if width == 0 {
        bail!(
            "{op}: got x of shape {:?}, expected a last axis that is not empty",
            x.dims()
        )
    }
    for (name, parameter) in [("weight", weight), ("bias", bias)] {
        super::check_dtype(op, name, parameter, DType::F32)?;
        super::check_shape(op, name, parameter, &[width], "the last axis of x")?;
    }
    let op = LayerNorm {
        eps: eps as f32,
        dtype,
        stats: Saved::default(),
    };
    let (x, weight, bias) = (x.contiguous()?, weight.contiguous()?, bias.contiguous()?);
    if !tape::records(&[&x, &weight, &bias]) {
        return x.apply_op3(&weight, &bias, op);
    }
    let y = tape::run3(&op, &x, &weight, &bias)?;
    tape::push_wide("layer_norm", &y, move |grad, gradients| {
        let ([d_weight, d_bias], dx) = op.backward(&x, &weight, &grad.value)?;
        gradients.add(&x, dx)?;
        gradients.add(&weight, d_weight)?;
        gradients.add(&bias, d_bias)
    });
    Ok(y)
}

struct LayerNorm {
    eps: f32,
    /// That of the result.
    dtype: DType,
    /// Mean and reciprocal standard deviation of every row, f32 `[rows, 2]`, for the backward pass.
    stats: Saved,
}

impl LayerNorm {
    /// The result and the statistics.
    fn forward<X: Element, Y: Element>(
        &self,
        x: &[X],
        weight: &[f32],
        bias: &[f32],
    ) -> (Vec<Y>, Vec<f32>) {
        let width = weight.len();
        let mut y = zeros(x.len());
        let mut stats = vec![0.0; x.len() / width * 2];
        let rows = x
            .par_chunks(width)
            .zip(y.par_chunks_mut(width))
            .zip(stats.par_chunks_mut(2));
        rows.with_min_len(ROWS).for_each(|((x, y), stats)| {
            vectorized(
                #[inline(always)]
                || {
                    let mean = sum(x, X::to_f32) / width as f32;
                    let variance = sum(x, |x| (x.to_f32() - mean).powi(2)) / width as f32;
                    let rstd = 1.0 / (variance + self.eps).sqrt();
                    for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                        *y = Y::from_f32((x.to_f32() - mean) * rstd * weight + bias);
                    }
                    stats.copy_from_slice(&[mean, rstd]);
                },
            )
        });
        (y, stats)
    }

    /// The gradients of weight and bias, and of x.
    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
    ) -> Result<([Tensor; 2], Gradient)> {
        let backward = LayerNormBackward {
            stats: self.stats.get()?,
            sums: Saved::default(),
        };
        // Of a narrow x, the gradient may be wider.
        let grad = match x.dtype() {
            DType::F32 => grad.contiguous()?,
            narrow => grad.to_dtype(narrow)?.contiguous()?,
        };
        let value = x.apply_op3_no_bwd(weight, &grad, &backward)?;
        let sums = backward.sums.get()?;
        let column_sum = Some(sums.i(2)?);
        let dx = Gradient {
            column_sum,
            ..value.into()
        };
        Ok(([sums.i(0)?, sums.i(1)?], dx))
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
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
        let (weight, bias) = (values(weight, weight_layout)?, values(bias, bias_layout)?);
        let (y, stats) = with_elements!(x.dtype(), self.dtype, X, Y => {
            let (y, stats) = self.forward::<X, Y>(values(x, x_layout)?, weight, bias);
            (Y::to_cpu_storage_owned(y), stats)
        });
        self.stats
            .put(Tensor::from_vec(stats, ((), 2), &Device::Cpu)?);
        Ok((y, x_layout.shape().clone()))
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
        let (y, stats) = cuda::layer_norm((x, x_layout), weight, bias, self.eps, self.dtype)?;
        self.stats.put(stats);
        Ok((y, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ([d_weight, d_bias], dx) = self.backward(x, weight, grad)?;
        Ok((Some(dx.value), Some(d_weight), Some(d_bias)))
    }
}

/// With `n = (x - mean) * rstd` and `g = grad * weight`:
/// `dx = rstd * (g - mean(g) - n * mean(g * n))`, `dweight = sum(grad * n)`, `dbias = sum(grad)`.
struct LayerNormBackward<'a> {
    stats: &'a Tensor,
    /// dweight, dbias, and the sum of dx over the rows, f32 `[3, width]`.
    sums: Saved,
}

/// Writes the gradient of x, and gives the sums, for some rows.
#[inline(always)]
fn backward_rows<X: Element, Y: Element>(
    x: &[X],
    weight: &[f32],
    grad: &[Y],
    stats: &[f32],
    dx: &mut [X],
) -> Vec<f32> {
    let width = weight.len();
    let mut sums = vec![0.0; 3 * width];
    let (d_weight, rest) = sums.split_at_mut(width);
    let (d_bias, column_sum) = rest.split_at_mut(width);
    let mut g = vec![0.0; width];
    let rows = x
        .chunks_exact(width)
        .zip(grad.chunks_exact(width))
        .zip(dx.chunks_exact_mut(width));
    for (((x, grad), dx), stats) in rows.zip(stats.chunks_exact(2)) {
        let (mean, rstd) = (stats[0], stats[1]);
        let normal = |x: X| (x.to_f32() - mean) * rstd;
        for ((g, grad), weight) in g.iter_mut().zip(grad).zip(weight) {
            *g = grad.to_f32() * weight;
        }
        let mean_g = sum(&g, |g| g) / width as f32;
        let mean_gn = sum2(&g, x, |g, x| g * normal(x)) / width as f32;
        for ((dx, x), g) in dx.iter_mut().zip(x).zip(&g) {
            *dx = X::from_f32(rstd * (g - mean_g - normal(*x) * mean_gn));
        }
        for ((d_weight, grad), x) in d_weight.iter_mut().zip(grad).zip(x) {
            *d_weight += grad.to_f32() * normal(*x);
        }
        for (d_bias, grad) in d_bias.iter_mut().zip(grad) {
            *d_bias += grad.to_f32();
        }
        for (sum, dx) in column_sum.iter_mut().zip(dx) {
            *sum += dx.to_f32();
        }
    }
    sums
}

impl CustomOp3 for LayerNormBackward<'_> {
    fn name(&self) -> &'static str {
        "layer_norm backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let weight = values::<f32>(weight, weight_layout)?;
        let width = weight.len();
        let stats = Locked::new(self.stats);
        let stats = stats.operand()?.values::<f32>()?;
        let (dx, partial) = with_elements!(x.dtype(), grad.dtype(), X, Y => {
            let (x, grad) = (values::<X>(x, x_layout)?, values::<Y>(grad, grad_layout)?);
            let mut dx = zeros(x.len());
            let partial: Vec<_> = (x.par_chunks(ROWS * width), grad.par_chunks(ROWS * width))
                .into_par_iter()
                .zip(dx.par_chunks_mut(ROWS * width))
                .zip(stats.par_chunks(ROWS * 2))
                .map(|(((x, grad), dx), stats)| {
                    vectorized(
                        #[inline(always)]
                        || backward_rows(x, weight, grad, stats, dx),
                    )
                })
                .collect();
            (X::to_cpu_storage_owned(dx), partial)
        });
        let sums = sum_vectors(3 * width, &partial);
        self.sums
            .put(Tensor::from_vec(sums, (3, width), &Device::Cpu)?);
        Ok((dx, x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        grad: &CudaStorage,
        grad_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (weight, grad) = ((weight, weight_layout), (grad, grad_layout));
        let (dx, sums) = cuda::layer_norm_backward((x, x_layout), weight, grad, self.stats)?;
        self.sums.put(sums);
        Ok((dx, x_layout.shape().clone()))
    }
}

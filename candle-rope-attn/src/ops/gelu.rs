//! GELU with the error function (Hendrycks and Gimpel 2016, <https://arxiv.org/abs/1606.08415>).

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::WithDType;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor};

use super::cpu::{self, values, with_element};
use super::plain;
use super::product::product;
#[cfg(feature = "cuda")]
use crate::cuda::ops as cuda;
use crate::element::check_dtype;
use crate::operand::{Locked, Operand};
use crate::tape::{self, Gradient};

/// `x * Phi(x)` of every element, where `Phi` is the normal distribution function; `gelu` of
/// transformers' configurations. f32, bf16 or f16, any shape.
///
/// # Errors
/// When the dtype is another.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    check_dtype("gelu", x.dtype())?;
    tape::apply1(Gelu, &x.contiguous()?)
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = with_element!(x.dtype(), T => {
            let y = cpu::map(values::<T>(x, layout)?, |x| x * Normal::at(x).cdf);
            T::to_cpu_storage_owned(y)
        });
        Ok((y, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::gelu((x, layout))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        x.apply_op2_no_bwd(&grad.contiguous()?, &GeluBackward)
            .map(Some)
    }
}

/// `grad * (Phi(x) + x * phi(x))`.
struct GeluBackward;

impl CustomOp2 for GeluBackward {
    fn name(&self) -> &'static str {
        "gelu backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dx = with_element!(x.dtype(), T => {
            let (x, grad) = (values::<T>(x, x_layout)?, values::<T>(grad, grad_layout)?);
            T::to_cpu_storage_owned(cpu::map2(x, grad, |x, grad| {
                let normal = Normal::at(x);
                grad * (normal.cdf + x * normal.pdf)
            }))
        });
        Ok((dx, x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        grad: &CudaStorage,
        grad_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::gelu_backward((x, x_layout), (grad, grad_layout))
    }
}

/// `gelu(x)` and the gradient of x, outside of any graph, from contiguous tensors of one shape.
fn gelu_and_backward(x: &Tensor, grad: &Tensor) -> Result<(Tensor, Gradient)> {
    let locked = (Locked::new(x), Locked::new(grad));
    match (locked.0.operand()?, locked.1.operand()?) {
        (Operand::Cpu(storage, layout), Operand::Cpu(grad, grad_layout)) => {
            let (y, dx) = with_element!(x.dtype(), T => {
                let (x, grad) = (values::<T>(storage, layout)?, values::<T>(grad, grad_layout)?);
                let (y, dx) = cpu::map2_to_2(x, grad, |x, grad| {
                    let normal = Normal::at(x);
                    (x * normal.cdf, grad * (normal.cdf + x * normal.pdf))
                });
                let on_cpu = |values| Storage::Cpu(T::to_cpu_storage_owned(values));
                (on_cpu(y), on_cpu(dx))
            });
            Ok((plain(y, x.shape()), plain(dx, x.shape()).into()))
        }
        #[cfg(feature = "cuda")]
        (operand, grad) => cuda::gelu_and_backward(operand.cuda()?, grad.cuda()?)
            .map(|found| with_column_sum(found, x)),
        #[cfg(not(feature = "cuda"))]
        _ => candle_core::bail!("gelu: this program was built without CUDA"),
    }
}

/// `gelu(x)` and the gradient of x, from the gradient `[rows, out]` of `linear(gelu(x), weight)`.
pub(super) fn gelu_linear_backward(
    x: &Tensor,
    grad: &Tensor,
    weight: &Tensor,
) -> Result<(Tensor, Gradient)> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let locked = (Locked::new(x), Locked::new(grad), Locked::new(weight));
        let (operand, grad) = (locked.0.operand()?, locked.1.operand()?);
        let weight = locked.2.operand()?;
        let fused = cuda::gelu_linear_backward(operand.cuda()?, grad.cuda()?, weight.cuda()?)?;
        if let Some(found) = fused {
            return Ok(with_column_sum(found, x));
        }
    }
    let d_activated = product([grad, weight], [false, false], None, x.dtype())?;
    gelu_and_backward(x, &d_activated.reshape(x.shape())?)
}

/// `gelu(x)`, and the gradient of x with its column sums.
#[cfg(feature = "cuda")]
fn with_column_sum(
    (y, dx, sums): (CudaStorage, CudaStorage, Tensor),
    x: &Tensor,
) -> (Tensor, Gradient) {
    let dx = Gradient {
        column_sum: Some(sums),
        ..plain(Storage::Cuda(dx), x.shape()).into()
    };
    (plain(Storage::Cuda(y), x.shape()), dx)
}

/// The standard normal distribution at one point.
struct Normal {
    cdf: f32,
    pdf: f32,
}

impl Normal {
    /// With `cdf(-x) = exp(-x^2 / 2) * t * q(t)`, `t = 1 / (1 + S * x)` for `x >= 0`, where `q` is
    /// the polynomial through the 9 Chebyshev nodes of `0 <= t <= 1`: relative error 3e-7 before
    /// rounding, so that the negative tail is exact too.
    #[inline(always)]
    fn at(x: f32) -> Self {
        const S: f32 = 0.282_842_7;
        const Q: [f32; 9] = [
            0.025_673_242,
            -0.093_662_75,
            0.088_213_965,
            -0.005_980_786_4,
            0.072_240_666,
            0.083_873_145,
            0.103_972_33,
            0.112_832_315,
            0.112_837_95,
        ];
        const INV_SQRT_2PI: f32 = 0.398_942_3;
        let t = 1.0 / (1.0 + S * x.abs());
        let mut q = 0.0;
        for c in Q {
            q = q * t + c;
        }
        let exp = cpu::exp(-0.5 * x * x);
        let tail = exp * t * q;
        Self {
            cdf: if x < 0.0 { tail } else { 1.0 - tail },
            pdf: exp * INV_SQRT_2PI,
        }
    }
}

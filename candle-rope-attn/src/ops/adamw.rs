//! AdamW (Loshchilov and Hutter 2017, <https://arxiv.org/abs/1711.05101>) for all parameters at
//! once.

use candle_core::backend::BackendStorage;
use candle_core::bail;
use candle_core::{CpuStorage, DType, Device, IndexOp, InplaceOp2, Layout, Result, Tensor, Var};
use rayon::prelude::*;

use super::cpu::{CHUNK, values, values_mut, vectorized, with_element};
use super::overwrite::overwrite;
#[cfg(feature = "cuda")]
use crate::cuda::ops as cuda;
use crate::element::{Element, check_dtype};

/// A variable and how it is trained.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// f32; updated in place, so that whoever holds it sees the new values.
    pub var: Var,
    /// Rate of decoupled weight decay: 0 for none.
    pub weight_decay: f64,
    /// The values in bf16 or f16, for a model to compute with: rounded anew at every step.
    pub rounded: Option<Var>,
}

/// The optimizer with its moments, as `torch.optim.AdamW`. A clone has the same ones.
#[derive(Clone)]
pub struct AdamW {
    parameters: Vec<Parameter>,
    /// Of each parameter the first and second moment, f32 `[2, elements]`.
    moments: Vec<Tensor>,
    /// Updates made so far, a u32 scalar on the device of the parameters.
    steps: Tensor,
    /// Learning rate of the next update, an f64 in two u32 on that device.
    lr: Tensor,
    betas: [f64; 2],
    eps: f64,
}

/// What an optimizer remembers, for checkpoints.
#[derive(Debug, Clone)]
pub struct AdamWState {
    /// Updates made so far.
    pub steps: u32,
    /// First and second moment of each parameter, f32 in its shape.
    pub moments: Vec<(Tensor, Tensor)>,
}

/// The numbers of one step that all elements share.
struct Step {
    beta2: f32,
    /// `1 - beta1` and `1 - beta2`, rounded after the difference.
    gains: [f32; 2],
    eps: f32,
    /// Factor on the gradients.
    clip: f32,
    /// Learning rate over the first moment's bias correction.
    step_size: f32,
    /// Reciprocal root of the second moment's bias correction.
    second_scale: f32,
}

impl AdamW {
    /// An optimizer that has made no step.
    ///
    /// # Errors
    /// When there are no parameters, one is not f32 or on another device than the first, rounded
    /// values do not fit it, or a beta is outside `[0, 1)`.
    pub fn new(parameters: Vec<Parameter>, betas: (f64, f64), eps: f64) -> Result<Self> {
        let Some(first) = parameters.first() else {
            bail!("AdamW: got no parameters, expected at least one")
        };
        let device = first.var.device().clone();
        for Parameter { var, rounded, .. } in &parameters {
            super::check_dtype("AdamW", "a parameter", var, DType::F32)?;
            super::check_device("AdamW", "a parameter", var, &device)?;
            if let Some(rounded) = rounded {
                check_dtype("AdamW", rounded.dtype())?;
                if rounded.dtype() == DType::F32 {
                    bail!("AdamW: got rounded values in F32, expected BF16 or F16, or none")
                }
                super::check_shape("AdamW", "rounded", rounded, var.dims(), "its parameter")?;
                super::check_device("AdamW", "rounded", rounded, &device)?;
            }
        }
        for beta in [betas.0, betas.1] {
            if !(0.0..1.0).contains(&beta) {
                bail!("AdamW: got beta {beta}, expected one in [0, 1)")
            }
        }
        let moments = parameters
            .iter()
            .map(|p| Tensor::zeros((2, p.var.elem_count()), DType::F32, &device))
            .collect::<Result<_>>()?;
        Ok(Self {
            parameters,
            moments,
            steps: Tensor::new(0u32, &device)?,
            lr: Tensor::zeros(2, DType::U32, &device)?,
            betas: [betas.0, betas.1],
            eps,
        })
    }

    /// [`Self::set_lr`], then [`Self::update`].
    ///
    /// # Errors
    /// As theirs.
    pub fn step(
        &self,
        grads: &[Tensor],
        lr: f64,
        grad_norm: &Tensor,
        max_norm: Option<f64>,
    ) -> Result<()> {
        self.set_lr(lr)?;
        self.update(grads, grad_norm, max_norm)
    }

    /// Sets the learning rate, 0 before: on a GPU also that of a [`Graph`](crate::Graph) which updates.
    ///
    /// # Errors
    /// When the device fails.
    pub fn set_lr(&self, lr: f64) -> Result<()> {
        let bits = lr.to_bits();
        overwrite(&self.lr, &[bits as u32, (bits >> 32) as u32])
    }

    /// One update of all parameters by gradients in their order, f32, bf16 or f16.
    ///
    /// `grad_norm` is the [`super::global_norm`] of the gradients, an f32 scalar on their device.
    /// With `max_norm` they are scaled by `min(1, max_norm / (grad_norm + 1e-6))`, as by
    /// `torch.nn.utils.clip_grad_norm_`. When it is not finite nothing changes, not even the count
    /// of steps. On a GPU all that happens without waiting for the device.
    ///
    /// # Errors
    /// When a gradient is missing or does not fit its parameter.
    pub fn update(
        &self,
        grads: &[Tensor],
        grad_norm: &Tensor,
        max_norm: Option<f64>,
    ) -> Result<()> {
        super::check_dtype("AdamW", "grad_norm", grad_norm, DType::F32)?;
        super::check_shape(
            "AdamW",
            "grad_norm",
            grad_norm,
            &[],
            "the norm of all gradients",
        )?;
        super::check_device("AdamW", "grad_norm", grad_norm, self.steps.device())?;
        let grads = self.check_grads(grads)?;
        match self.steps.device() {
            Device::Cpu => self.update_cpu(&grads, grad_norm, max_norm),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => self.update_cuda(device, &grads, grad_norm, max_norm),
            device => bail!(
                "AdamW: got parameters on {:?}, which it has no kernels for",
                device.location()
            ),
        }
    }

    fn check_grads(&self, grads: &[Tensor]) -> Result<Vec<Tensor>> {
        if grads.len() != self.parameters.len() {
            bail!(
                "AdamW: got {} gradients for {} parameters, expected one each, in the same order",
                grads.len(),
                self.parameters.len()
            )
        }
        let checked = grads
            .iter()
            .zip(&self.parameters)
            .map(|(grad, Parameter { var, .. })| {
                check_dtype("AdamW", grad.dtype())?;
                super::check_shape("AdamW", "a gradient", grad, var.dims(), "its parameter")?;
                super::check_device("AdamW", "a gradient", grad, var.device())?;
                grad.contiguous()
            });
        checked.collect()
    }

    fn update_cpu(
        &self,
        grads: &[Tensor],
        grad_norm: &Tensor,
        max_norm: Option<f64>,
    ) -> Result<()> {
        let norm = f64::from(grad_norm.to_scalar::<f32>()?);
        if !norm.is_finite() {
            return Ok(());
        }
        let steps = self.steps()? + 1;
        let lr: Vec<u32> = self.lr.to_vec1()?;
        let lr = f64::from_bits(u64::from(lr[1]) << 32 | u64::from(lr[0]));
        let [first, second] = self.betas.map(|beta| 1.0 - beta.powi(steps as i32));
        let step = Step {
            beta2: self.betas[1] as f32,
            gains: self.betas.map(|beta| (1.0 - beta) as f32),
            eps: self.eps as f32,
            clip: max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0)) as f32,
            step_size: (lr / first) as f32,
            second_scale: second.sqrt().recip() as f32,
        };
        for ((parameter, moments), grad) in self.parameters.iter().zip(&self.moments).zip(grads) {
            moments.inplace_op2(grad, &UpdateMoments(&step))?;
            let keep = (1.0 - lr * parameter.weight_decay) as f32;
            parameter
                .var
                .inplace_op2(moments, &UpdateParameter { step: &step, keep })?;
            if let Some(rounded) = &parameter.rounded {
                rounded.set(
                    &parameter
                        .var
                        .as_detached_tensor()
                        .to_dtype(rounded.dtype())?,
                )?;
            }
        }
        overwrite(&self.steps, &[steps])
    }

    #[cfg(feature = "cuda")]
    fn update_cuda(
        &self,
        device: &candle_core::CudaDevice,
        grads: &[Tensor],
        grad_norm: &Tensor,
        max_norm: Option<f64>,
    ) -> Result<()> {
        let step = cuda::AdamW {
            grad_norm,
            steps: &self.steps,
            lr: &self.lr,
            betas: self.betas,
            eps: self.eps,
            max_norm,
        };
        let tensors: Vec<_> = self
            .parameters
            .iter()
            .zip(&self.moments)
            .zip(grads)
            .map(|((parameter, moments), grad)| cuda::AdamWTensor {
                parameter: &parameter.var,
                rounded: parameter.rounded.as_deref(),
                moments,
                grad,
                weight_decay: parameter.weight_decay,
            })
            .collect();
        cuda::adamw(device, &step, &tensors)
    }

    /// Updates made so far. Waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn steps(&self) -> Result<u32> {
        self.steps.to_scalar()
    }

    /// What [`Self::load_state`] needs to go on as if there had been no break. The moments are
    /// views that the next step changes.
    ///
    /// # Errors
    /// When the device fails.
    pub fn state(&self) -> Result<AdamWState> {
        let moments = self
            .moments
            .iter()
            .zip(&self.parameters)
            .map(|(moments, parameter)| {
                let shape = parameter.var.shape();
                Ok((moments.i(0)?.reshape(shape)?, moments.i(1)?.reshape(shape)?))
            });
        Ok(AdamWState {
            steps: self.steps()?,
            moments: moments.collect::<Result<_>>()?,
        })
    }

    /// Takes over a copy of a saved state.
    ///
    /// # Errors
    /// When it does not fit the parameters; then nothing has changed.
    pub fn load_state(&self, state: &AdamWState) -> Result<()> {
        if state.moments.len() != self.parameters.len() {
            bail!(
                "AdamW: got moments of {} parameters, expected {}; the checkpoint belongs to another model",
                state.moments.len(),
                self.parameters.len()
            )
        }
        let device = self.steps.device();
        let load = |(moments, parameter): (&(Tensor, Tensor), &Parameter)| {
            for moment in [&moments.0, &moments.1] {
                super::check_dtype("AdamW", "a moment", moment, DType::F32)?;
                let shape = parameter.var.dims();
                super::check_shape("AdamW", "a moment", moment, shape, "its parameter")?;
            }
            let [first, second] = [&moments.0, &moments.1].map(Tensor::flatten_all);
            Tensor::stack(&[first?, second?], 0)?.to_device(device)
        };
        let loaded = state.moments.iter().zip(&self.parameters).map(load);
        let loaded = loaded.collect::<Result<Vec<_>>>()?;
        for (moments, loaded) in self.moments.iter().zip(&loaded) {
            moments.slice_set(loaded, 0, 0)?;
        }
        overwrite(&self.steps, &[state.steps])
    }
}

/// `m += (1 - beta1) * (g - m)`, `v = beta2 * v + (1 - beta2) * g^2`, with g the clipped gradient.
struct UpdateMoments<'a>(&'a Step);

impl InplaceOp2 for UpdateMoments<'_> {
    fn name(&self) -> &'static str {
        "AdamW moments"
    }

    fn cpu_fwd(
        &self,
        moments: &mut CpuStorage,
        moments_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<()> {
        let (_, elements) = moments_layout.shape().dims2()?;
        let (first, second) = values_mut(moments, moments_layout)?.split_at_mut(elements);
        with_element!(grad.dtype(), T => {
            let grad = values::<T>(grad, grad_layout)?;
            (first.par_chunks_mut(CHUNK), second.par_chunks_mut(CHUNK), grad.par_chunks(CHUNK))
                .into_par_iter()
                .for_each(|(m, v, grad)| {
                    vectorized(
                        #[inline(always)]
                        || self.update(m, v, grad),
                    )
                });
        });
        Ok(())
    }
}

impl UpdateMoments<'_> {
    #[inline(always)]
    fn update<T: Element>(&self, m: &mut [f32], v: &mut [f32], grad: &[T]) {
        let Step {
            beta2,
            gains: [gain1, gain2],
            clip,
            ..
        } = *self.0;
        for ((m, v), grad) in m.iter_mut().zip(v).zip(grad) {
            let g = grad.to_f32() * clip;
            *m += gain1 * (g - *m);
            *v = beta2 * *v + gain2 * (g * g);
        }
    }
}

/// `p = (1 - lr * weight_decay) * p - lr * m' / (sqrt(v') + eps)`, with m' and v' the moments
/// without their bias towards 0.
struct UpdateParameter<'a> {
    step: &'a Step,
    /// `1 - lr * weight_decay`.
    keep: f32,
}

impl InplaceOp2 for UpdateParameter<'_> {
    fn name(&self) -> &'static str {
        "AdamW parameter"
    }

    fn cpu_fwd(
        &self,
        parameter: &mut CpuStorage,
        parameter_layout: &Layout,
        moments: &CpuStorage,
        moments_layout: &Layout,
    ) -> Result<()> {
        let (_, elements) = moments_layout.shape().dims2()?;
        let (first, second) = values::<f32>(moments, moments_layout)?.split_at(elements);
        let parameter = values_mut(parameter, parameter_layout)?;
        (
            parameter.par_chunks_mut(CHUNK),
            first.par_chunks(CHUNK),
            second.par_chunks(CHUNK),
        )
            .into_par_iter()
            .for_each(|(p, m, v)| {
                vectorized(
                    #[inline(always)]
                    || self.update(p, m, v),
                )
            });
        Ok(())
    }
}

impl UpdateParameter<'_> {
    #[inline(always)]
    fn update(&self, p: &mut [f32], m: &[f32], v: &[f32]) {
        let Step {
            eps,
            step_size,
            second_scale,
            ..
        } = *self.step;
        let keep = self.keep;
        for ((p, m), v) in p.iter_mut().zip(m).zip(v) {
            *p = keep * *p - step_size * m / (v.sqrt() * second_scale + eps);
        }
    }
}

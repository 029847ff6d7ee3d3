use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_rope_attn::ops::{AdamW, AdamWState, Parameter, global_norm};

use crate::common::{Input, device_tests, tensor, values};

device_tests!(
    matches_reference,
    skips_what_is_not_finite,
    resumes_exactly,
    many_parameters
);

const BETAS: (f64, f64) = (0.9, 0.999);
const EPS: f64 = 1e-6;

/// One parameter of `torch.optim.AdamW`, as its documentation writes it.
struct Reference {
    p: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    weight_decay: f64,
}

impl Reference {
    fn step(&mut self, grad: &[f64], step: i32, lr: f64, clip: f64) {
        let (beta1, beta2) = BETAS;
        for (i, grad) in grad.iter().enumerate() {
            let g = grad * clip;
            self.p[i] -= lr * self.weight_decay * self.p[i];
            self.m[i] = beta1 * self.m[i] + (1.0 - beta1) * g;
            self.v[i] = beta2 * self.v[i] + (1.0 - beta2) * g * g;
            let m = self.m[i] / (1.0 - beta1.powi(step));
            let v = self.v[i] / (1.0 - beta2.powi(step));
            self.p[i] -= lr * m / (v.sqrt() + EPS);
        }
    }
}

fn parameters(device: &Device) -> Result<Vec<Parameter>> {
    let shapes: [(&[usize], f64); 5] = [
        (&[3], 0.0),
        (&[40_000], 0.1),
        (&[7, 9], 0.01),
        (&[], 0.0),
        (&[128, 96], 0.1),
    ];
    let parameter = |(seed, (shape, weight_decay)): (usize, &(&[usize], f64))| {
        let var = Input::random(shape, DType::F32, seed as u64).var(device)?;
        let rounded = [None, Some(DType::BF16), Some(DType::F16)][seed % 3];
        Ok(Parameter {
            weight_decay: *weight_decay,
            rounded: rounded
                .map(|dtype| Var::from_tensor(&var.to_dtype(dtype)?))
                .transpose()?,
            var,
        })
    };
    shapes.iter().enumerate().map(parameter).collect()
}

/// Gradients of all parameters, the second in bf16.
fn gradients(parameters: &[Parameter], step: u64, device: &Device) -> Result<Vec<Tensor>> {
    let gradient = |(i, p): (usize, &Parameter)| {
        let dtype = if i == 1 { DType::BF16 } else { DType::F32 };
        let input = Input::random(p.var.dims(), dtype, 100 * step + i as u64);
        tensor(&input.values, &input.shape, dtype, device)
    };
    parameters.iter().enumerate().map(gradient).collect()
}

fn all_values(parameters: &[Parameter]) -> Result<Vec<Vec<f64>>> {
    parameters.iter().map(|p| values(&p.var)).collect()
}

fn matches_reference(device: &Device) -> Result<()> {
    for max_norm in [None, Some(1.0), Some(1e6)] {
        let parameters = parameters(device)?;
        let mut references = Vec::new();
        for Parameter {
            var, weight_decay, ..
        } in &parameters
        {
            references.push(Reference {
                p: values(var)?,
                m: vec![0.0; var.elem_count()],
                v: vec![0.0; var.elem_count()],
                weight_decay: *weight_decay,
            });
        }
        let optimizer = AdamW::new(parameters.clone(), BETAS, EPS)?;
        for step in 1..=4 {
            let lr = 0.01 * f64::from(step);
            let grads = gradients(&parameters, step as u64, device)?;
            let norm = global_norm(&grads)?;
            optimizer.step(&grads, lr, &norm, max_norm)?;
            let norm = f64::from(norm.to_scalar::<f32>()?);
            let clip = max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
            for (reference, grad) in references.iter_mut().zip(&grads) {
                reference.step(&values(grad)?, step, lr, clip);
            }
        }
        for Parameter { var, rounded, .. } in &parameters {
            if let Some(rounded) = rounded {
                let expected = values(&var.to_dtype(rounded.dtype())?)?;
                assert_eq!(values(rounded)?, expected);
            }
        }
        let state = optimizer.state()?;
        assert_eq!(state.steps, 4);
        let moments = state.moments.iter();
        for ((reference, Parameter { var, .. }), (m, v)) in
            references.iter().zip(&parameters).zip(moments)
        {
            assert_eq!(m.dims(), var.dims());
            for (got, expected) in [
                (var.as_tensor(), &reference.p),
                (m, &reference.m),
                (v, &reference.v),
            ] {
                let largest = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
                for (got, expected) in values(got)?.iter().zip(expected) {
                    assert!(
                        (got - expected).abs() < 2e-6 * largest,
                        "{got}, not {expected}"
                    );
                }
            }
        }
    }
    Ok(())
}

fn skips_what_is_not_finite(device: &Device) -> Result<()> {
    let parameters = parameters(device)?;
    let optimizer = AdamW::new(parameters.clone(), BETAS, EPS)?;
    let mut grads = gradients(&parameters, 1, device)?;
    optimizer.step(&grads, 0.1, &global_norm(&grads)?, Some(1.0))?;
    let read = |optimizer: &AdamW| -> Result<_> {
        let state = optimizer.state()?;
        let moments = state.moments.iter().flat_map(|(m, v)| [m, v]);
        let moments = moments.map(values).collect::<Result<Vec<_>>>()?;
        Ok((state.steps, moments, all_values(&parameters)?))
    };
    let before = read(&optimizer)?;
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        grads[0] = Tensor::new(&[0.0, bad, 1.0], device)?;
        optimizer.step(&grads, 0.1, &global_norm(&grads)?, None)?;
        assert_eq!(read(&optimizer)?, before);
    }
    Ok(())
}

/// Saving and loading in the middle gives the bits of the run without a break.
fn resumes_exactly(device: &Device) -> Result<()> {
    let run = |break_after: Option<u64>| -> Result<Vec<Vec<f64>>> {
        let parameters = parameters(device)?;
        let mut optimizer = AdamW::new(parameters.clone(), BETAS, EPS)?;
        for step in 1..=4 {
            let grads = gradients(&parameters, step, device)?;
            optimizer.step(&grads, 0.01, &global_norm(&grads)?, Some(1.0))?;
            if break_after == Some(step) {
                let state = optimizer.state()?;
                let copy = |(m, v): &(Tensor, Tensor)| Ok((m.copy()?, v.copy()?));
                let saved = AdamWState {
                    steps: state.steps,
                    moments: state.moments.iter().map(copy).collect::<Result<_>>()?,
                };
                optimizer = AdamW::new(parameters.clone(), BETAS, EPS)?;
                optimizer.load_state(&saved)?;
            }
        }
        all_values(&parameters)
    };
    assert_eq!(run(None)?, run(Some(2))?);
    Ok(())
}

/// More than one launch takes.
fn many_parameters(device: &Device) -> Result<()> {
    let mut parameters = Vec::new();
    for _ in 0..500 {
        let var = Var::zeros(3, DType::F32, device)?;
        parameters.push(Parameter {
            var,
            weight_decay: 0.0,
            rounded: None,
        });
    }
    let optimizer = AdamW::new(parameters.clone(), BETAS, EPS)?;
    let grads = vec![Tensor::ones(3, DType::F32, device)?; 500];
    optimizer.step(&grads, 0.5, &global_norm(&grads)?, None)?;
    for p in parameters {
        assert!(values(&p.var)?.iter().all(|p| (p + 0.5).abs() < 1e-5));
    }
    Ok(())
}

//! What the tests share: random tensors, and the comparison of an operation with its reference.

#[path = "../common/shared.rs"]
mod shared;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_rope_attn::ops::{Gradients, Tape};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
pub use shared::*;

pub const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Tests of the module on the CPU and, with the feature `cuda`, the same on a GPU.
macro_rules! device_tests {
    ($($test:ident),* $(,)?) => {
        mod cpu {
            $(#[test]
            fn $test() -> anyhow::Result<()> {
                super::$test(&candle_core::Device::Cpu)
            })*
        }
        #[cfg(feature = "cuda")]
        mod cuda {
            $(#[test]
            fn $test() -> anyhow::Result<()> {
                $crate::common::gpu().map_or(Ok(()), |device| super::$test(&device))
            })*
        }
    };
}
pub(crate) use device_tests;

/// Numbers between -2 and 2.
pub fn random(len: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

/// Row numbers below `end`.
pub fn random_indices(len: usize, end: u32, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(0..end)).collect()
}

pub fn tensor(values: &[f64], shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)?)
}

pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(to_f64(tensor)?)
}

/// A differentiable argument of an operation.
pub struct Input {
    pub values: Vec<f64>,
    pub shape: Vec<usize>,
    pub dtype: DType,
}

impl Input {
    pub fn random(shape: &[usize], dtype: DType, seed: u64) -> Self {
        Self {
            values: random(shape.iter().product(), seed),
            shape: shape.to_vec(),
            dtype,
        }
    }

    pub fn var(&self, device: &Device) -> Result<Var> {
        Ok(Var::from_tensor(&tensor(
            &self.values,
            &self.shape,
            self.dtype,
            device,
        )?)?)
    }
}

/// The result of a reference, and the gradients of its inputs for a gradient of the result.
pub type Reference = (Vec<f64>, Vec<Vec<f64>>);

/// Compares result and gradients of `op` with those of `reference`, which sees the inputs as the
/// dtype rounds them. Once with inputs of their own memory, and once with views that begin one
/// element into theirs, where no vector access is aligned.
pub fn compare(
    name: &str,
    device: &Device,
    inputs: &[Input],
    op: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    reference: impl Fn(&[Vec<f64>], &[f64]) -> Reference,
) -> Result<()> {
    compare_with(name, device, inputs, 0.0, op, reference)
}

/// As [`compare`], for an operation that may round what it has before it adds an input of at most
/// `addend` to it.
pub fn compare_with(
    name: &str,
    device: &Device,
    inputs: &[Input],
    addend: f64,
    op: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    reference: impl Fn(&[Vec<f64>], &[f64]) -> Reference,
) -> Result<()> {
    if !device.is_cpu() && inputs.iter().any(|input| input.values.is_empty()) {
        return Ok(()); // Candle has no empty tensors on a GPU.
    }
    for offset in [0, 1] {
        let name = format!("{name} at {offset}");
        let memory = |input: &Input| {
            let padded = [&vec![0.0; offset], &input.values[..]].concat();
            let tensor = tensor(&padded, &[padded.len()], input.dtype, device)?;
            Ok(Var::from_tensor(&tensor)?)
        };
        let vars = inputs.iter().map(memory).collect::<Result<Vec<_>>>()?;
        let view = |(input, var): (&Input, &Var)| {
            Ok(var
                .narrow(0, offset, input.values.len())?
                .reshape(&input.shape[..])?)
        };
        let tensors = inputs
            .iter()
            .zip(&vars)
            .map(view)
            .collect::<Result<Vec<_>>>()?;
        let y = op(&tensors)?;
        let grad = tensor(&random(y.elem_count(), 99), y.dims(), y.dtype(), device)?;
        let in_graph = (&y * &grad)?.sum_all()?.backward()?;
        let mut on_tape = Gradients::default();
        let (loss, tape) = Tape::record(|| (op(&tensors)? * &grad)?.sum_all())?;
        tape.backward(&loss, 1.0, &mut on_tape)?;

        let rounded = tensors.iter().map(values).collect::<Result<Vec<_>>>()?;
        let (expected, expected_grads) = reference(&rounded, &values(&grad)?);
        assert_close_with(&format!("{name} result"), &y, &expected, addend)?;
        for (i, (var, expected)) in vars.iter().zip(&expected_grads).enumerate() {
            let name = format!("{name} gradient {i}");
            let grads = [in_graph.get(var).cloned(), on_tape.remove(var)];
            for (grad, place) in grads.into_iter().zip(["", " on the tape"]) {
                let name = format!("{name}{place}");
                let grad = grad.with_context(|| format!("{name} is missing"))?;
                ensure!(!grad.track_op(), "{name} keeps a graph");
                assert_close(&name, &grad.narrow(0, offset, expected.len())?, expected)?;
            }
        }
    }
    Ok(())
}

/// The result of `op` and the gradients of its inputs on a tape, for a gradient of the result.
pub fn on_tape(
    inputs: &[Tensor],
    grad: &Tensor,
    op: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let ((y, loss), tape) = Tape::record(|| {
        let y = op(inputs)?;
        let loss = (&y * grad)?.sum_all()?;
        Ok::<_, candle_core::Error>((y, loss))
    })?;
    let mut gradients = Gradients::default();
    tape.backward(&loss, 1.0, &mut gradients)?;
    let mut results = vec![y];
    for input in inputs {
        results.push(gradients.remove(input).context("a gradient is missing")?);
    }
    Ok(results)
}

/// Allows errors of a share of the largest value, where several roundings come between.
pub fn assert_near(name: &str, got: &Tensor, expected: &[f64], share: f64) -> Result<()> {
    let largest = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    let got = values(got)?;
    ensure!(got.len() == expected.len(), "{name}: {} values", got.len());
    for (got, expected) in got.iter().zip(expected) {
        ensure!(
            (got - expected).abs() <= share * largest,
            "{name}: got {got}, not {expected}, of at most {largest}"
        );
    }
    Ok(())
}

/// Allows one rounding to the dtype of the result, and the rounding errors of f32 sums.
pub fn assert_close(name: &str, got: &Tensor, expected: &[f64]) -> Result<()> {
    assert_close_with(name, got, expected, 0.0)
}

/// As [`assert_close`], and one more rounding before an addend, see [`compare_with`].
fn assert_close_with(name: &str, got: &Tensor, expected: &[f64], addend: f64) -> Result<()> {
    // The second is half of f16's smallest number.
    let (relative, absolute) = match got.dtype() {
        DType::BF16 => (1.01 / 256.0, 1e-30),
        DType::F16 => (1.01 / 2048.0, 3e-8),
        _ => (1e-6, 1e-30),
    };
    let dtype = got.dtype();
    let got = values(got)?;
    ensure!(
        got.len() == expected.len(),
        "{name}: {} values, not {}",
        got.len(),
        expected.len()
    );
    let largest = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    let mut worst = 0.0;
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let before = if addend > 0.0 {
            expected.abs() + addend
        } else {
            0.0
        };
        let allowed = relative * (expected.abs() + before) + 2e-6 * largest + absolute;
        let ratio = (got - expected).abs() / allowed;
        ensure!(
            ratio <= 1.0,
            "{name} {dtype:?}: element {i} is {got}, not {expected}"
        );
        worst = f64::max(worst, ratio);
    }
    println!("{name} {dtype:?}: worst error {worst:.2} of the allowed");
    Ok(())
}

/// Checks the gradients of a reference by central differences of its result.
pub fn check_reference(inputs: &[Vec<f64>], reference: impl Fn(&[Vec<f64>], &[f64]) -> Reference) {
    const STEP: f64 = 1e-5;
    let outputs = reference(inputs, &[]).0.len();
    let grad = random(outputs, 7);
    let loss = |inputs: &[Vec<f64>]| -> f64 {
        reference(inputs, &[])
            .0
            .iter()
            .zip(&grad)
            .map(|(y, grad)| y * grad)
            .sum()
    };
    let (_, grads) = reference(inputs, &grad);
    for (input, grad) in grads.iter().enumerate() {
        for (at, grad) in grad.iter().enumerate() {
            let moved = |by: f64| {
                let mut inputs = inputs.to_vec();
                inputs[input][at] += by;
                loss(&inputs)
            };
            let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            let error = (slope - grad).abs();
            assert!(
                error < 1e-7 * (1.0 + grad.abs()),
                "{input}, {at}: {grad}, not {slope}"
            );
        }
    }
}

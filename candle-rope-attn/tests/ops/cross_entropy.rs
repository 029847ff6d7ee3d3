use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_rope_attn::ops::{IGNORED, cross_entropy};

use crate::common::{
    DTYPES, Input, Reference, check_reference, compare, device_tests, random, random_indices,
    values,
};

device_tests!(
    matches_reference,
    extreme_logits,
    accumulated_loss,
    labels_out_of_range
);

pub fn reference(inputs: &[Vec<f64>], grad: &[f64], labels: &[u32]) -> Reference {
    let rows = labels.len();
    let vocab = inputs[0].len() / rows;
    let mut loss = 0.0;
    let mut d_logits = Vec::new();
    for (logits, label) in inputs[0].chunks(vocab).zip(labels) {
        if *label == IGNORED {
            d_logits.extend(vec![0.0; vocab]);
            continue;
        }
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
        loss += (max + sum.ln() - logits[*label as usize]) / rows as f64;
        let scale = grad.first().copied().unwrap_or(0.0) / rows as f64;
        d_logits.extend(
            logits
                .iter()
                .enumerate()
                .map(|(i, x)| ((x - max).exp() / sum - f64::from(i == *label as usize)) * scale),
        );
    }
    (vec![loss], vec![d_logits])
}

#[test]
fn reference_is_right() {
    check_reference(&[random(3 * 5, 1)], |inputs, grad| {
        reference(inputs, grad, &[1, 4, 0])
    });
}

/// A third of them ignored.
pub fn random_labels(rows: usize, vocab: usize) -> Vec<u32> {
    let mut labels = random_indices(rows, vocab as u32, 4);
    let ignored = labels.iter_mut().skip(1).step_by(3);
    ignored.for_each(|label| *label = IGNORED);
    labels
}

fn matches_reference(device: &Device) -> Result<()> {
    for dtype in DTYPES {
        for (rows, vocab) in [
            (1, 1),
            (3, 7),
            (65, 1000),
            (17, 5003),
            (4, 30_522),
            (300, 96),
        ] {
            let labels = random_labels(rows, vocab);
            let label_tensor = Tensor::new(&labels[..], device)?;
            let mut logits = Input::random(&[rows, vocab], dtype, 1);
            logits.values.iter_mut().for_each(|x| *x *= 4.0);
            compare(
                &format!("cross_entropy [{rows}, {vocab}]"),
                device,
                &[logits],
                |x| cross_entropy(&x[0], &label_tensor),
                |inputs, grad| reference(inputs, grad, &labels),
            )?;
        }
    }
    Ok(())
}

fn extreme_logits(device: &Device) -> Result<()> {
    let logits = [1e4, -1e4, f32::NEG_INFINITY, 9999.0];
    let logits = Var::from_tensor(&Tensor::from_slice(&logits, (1, 4), device)?)?;
    let loss = cross_entropy(&logits, &Tensor::new(&[0u32], device)?)?;
    let expected = (1.0 + (-1f32).exp()).ln();
    assert!((loss.to_scalar::<f32>()? - expected).abs() < 1e-3);
    let d_logits = loss.backward()?.get(&logits).unwrap().to_vec2::<f32>()?;
    assert_eq!(d_logits[0][1..3], [0.0, 0.0]);

    let nan = Tensor::new(&[[0f32, f32::NAN]], device)?;
    assert!(
        cross_entropy(&nan, &Tensor::new(&[0u32], device)?)?
            .to_scalar::<f32>()?
            .is_nan()
    );
    Ok(())
}

/// The gradient of the loss itself is used, for example of a sum over batches.
fn accumulated_loss(device: &Device) -> Result<()> {
    let logits = Input::random(&[4, 9], DType::F32, 1).var(device)?;
    let labels = Tensor::new(&[1u32, 2, 3, 8], device)?;
    let grad = |factor: f64| -> Result<Vec<f64>> {
        let loss = (cross_entropy(&logits, &labels)? * factor)?;
        values(loss.backward()?.get(&logits).unwrap())
    };
    for (one, quarter) in grad(1.0)?.iter().zip(grad(0.25)?) {
        assert_eq!(one * 0.25, quarter);
    }
    Ok(())
}

/// On a GPU, which cannot refuse them without waiting: a loss of NaN. errors.rs has the CPU.
fn labels_out_of_range(device: &Device) -> Result<()> {
    if device.is_cpu() {
        return Ok(());
    }
    let logits = Input::random(&[2, 9], DType::F32, 1).var(device)?;
    let loss = cross_entropy(&logits, &Tensor::new(&[1u32, 9], device)?)?;
    assert!(loss.to_scalar::<f32>()?.is_nan());
    Ok(())
}

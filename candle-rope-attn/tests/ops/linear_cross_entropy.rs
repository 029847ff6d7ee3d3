use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{Gradients, Tape, cross_entropy, linear, linear_cross_entropy};

use crate::common::{Input, Reference, check_reference, compare, device_tests, random, values};
use crate::{cross_entropy, linear};

device_tests!(
    matches_reference,
    without_bias,
    chunks_equal_the_whole,
    frozen_arguments_get_no_gradient,
    labels_out_of_range
);

/// x, weight and, if there are three inputs, bias.
fn reference(inputs: &[Vec<f64>], grad: &[f64], labels: &[u32]) -> Reference {
    let features = inputs[0].len() / labels.len();
    let (logits, _) = linear::reference(inputs, &[], features);
    let (loss, mut d_logits) = cross_entropy::reference(&[logits], grad, labels);
    let (_, grads) = linear::reference(inputs, &d_logits.remove(0), features);
    (loss, grads)
}

#[test]
fn reference_is_right() {
    let inputs = [random(4 * 3, 1), random(5 * 3, 2), random(5, 3)];
    check_reference(&inputs, |inputs, grad| {
        reference(inputs, grad, &[1, 4, 0, 1])
    });
}

/// x, weight and bias, for logits that 16 bits hold well.
fn inputs([rows, features, vocab]: [usize; 3], dtype: DType) -> [Input; 3] {
    let mut x = Input::random(&[rows, features], dtype, 1);
    x.values.iter_mut().for_each(|x| *x *= 0.25);
    [
        x,
        Input::random(&[vocab, features], dtype, 2),
        Input::random(&[vocab], dtype, 3),
    ]
}

fn labels(rows: usize, vocab: usize, device: &Device) -> Result<(Vec<u32>, Tensor)> {
    let labels = cross_entropy::random_labels(rows, vocab);
    let tensor = Tensor::new(&labels[..], device)?;
    Ok((labels, tensor))
}

/// In f32, where no rounding comes between.
fn matches_reference(device: &Device) -> Result<()> {
    for sizes in [
        [1, 1, 1],
        [3, 5, 7],
        [65, 16, 1000],
        [4, 8, 30_522],
        [300, 32, 96],
    ] {
        let (labels, label_tensor) = labels(sizes[0], sizes[2], device)?;
        compare(
            &format!("linear_cross_entropy {sizes:?}"),
            device,
            &inputs(sizes, DType::F32),
            |x| linear_cross_entropy(&x[0], &x[1], Some(&x[2]), &label_tensor),
            |inputs, grad| reference(inputs, grad, &labels),
        )?;
    }
    Ok(())
}

fn without_bias(device: &Device) -> Result<()> {
    let sizes = [70, 24, 130];
    let (labels, label_tensor) = labels(sizes[0], sizes[2], device)?;
    compare(
        "linear_cross_entropy without bias",
        device,
        &inputs(sizes, DType::F32)[..2],
        |x| linear_cross_entropy(&x[0], &x[1], None, &label_tensor),
        |inputs, grad| reference(inputs, grad, &labels),
    )
}

/// On a tape, so many rows that there are several chunks, against the operations it is made of.
fn chunks_equal_the_whole(device: &Device) -> Result<()> {
    let [rows, features, vocab] = [1150, 8, 60_000];
    let (_, labels) = labels(rows, vocab, device)?;
    for (dtype, rounding, scale) in [
        (DType::F32, 2e-6, 1.0),
        (DType::BF16, 1.0 / 256.0, 0.3),
        // Without a large scale the second way loses small gradients.
        (DType::F16, 1.0 / 2048.0, 4096.0),
    ] {
        let x = vars(&inputs([rows, features, vocab], dtype), device)?;
        let got = loss_and_gradients(&x, scale, || {
            linear_cross_entropy(&x[0], &x[1], Some(&x[2]), &labels)
        })?;
        let expected = loss_and_gradients(&x, scale, || {
            cross_entropy(&linear(&x[0], &x[1], Some(&x[2]))?, &labels)
        })?;
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let largest = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
            for (got, expected) in got.iter().zip(expected) {
                ensure!(
                    (got - expected).abs() <= 2.0 * rounding * largest,
                    "{dtype:?}, result {i}: got {got}, not {expected}"
                );
            }
        }
    }
    Ok(())
}

fn vars(inputs: &[Input], device: &Device) -> Result<Vec<Tensor>> {
    let var = |input: &Input| Ok(input.var(device)?.into_inner());
    inputs.iter().map(var).collect()
}

fn loss_and_gradients(
    x: &[Tensor],
    scale: f64,
    loss: impl FnOnce() -> candle_core::Result<Tensor>,
) -> Result<Vec<Vec<f64>>> {
    let (loss, tape) = Tape::record(loss)?;
    let mut gradients = Gradients::default();
    tape.backward(&loss, scale, &mut gradients)?;
    let mut results = vec![values(&loss)?];
    for x in x {
        let grad = gradients.remove(x).context("a gradient is missing")?;
        ensure!(grad.dims() == x.dims(), "got {:?}", grad.dims());
        results.push(values(&grad)?);
    }
    Ok(results)
}

fn frozen_arguments_get_no_gradient(device: &Device) -> Result<()> {
    let (_, labels) = labels(9, 20, device)?;
    let x = vars(&inputs([9, 6, 20], DType::F32), device)?;
    let all = loss_and_gradients(&x, 1.0, || {
        linear_cross_entropy(&x[0], &x[1], Some(&x[2]), &labels)
    })?;
    for kept in 0..3 {
        let mut part: Vec<_> = x.iter().map(Tensor::detach).collect();
        part[kept] = x[kept].clone();
        let (loss, tape) =
            Tape::record(|| linear_cross_entropy(&part[0], &part[1], Some(&part[2]), &labels))?;
        let mut gradients = Gradients::default();
        tape.backward(&loss, 1.0, &mut gradients)?;
        for (i, x) in x.iter().enumerate() {
            let found = gradients.remove(x).map(|grad| values(&grad)).transpose()?;
            assert_eq!(found.as_ref(), (i == kept).then_some(&all[1 + i]));
        }
    }
    Ok(())
}

/// On a GPU, as those of [`cross_entropy`]. errors.rs has the CPU.
fn labels_out_of_range(device: &Device) -> Result<()> {
    if device.is_cpu() {
        return Ok(());
    }
    let x = inputs([2, 4, 9], DType::F32);
    let (weight, x) = (x[1].var(device)?, x[0].var(device)?);
    let labels = Tensor::new(&[1u32, 9], device)?;
    let (loss, _) = Tape::record(|| linear_cross_entropy(&x, &weight, None, &labels))?;
    assert!(loss.to_scalar::<f32>()?.is_nan());
    Ok(())
}

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::layer_norm;

use crate::common::{DTYPES, Input, Reference, check_reference, compare, device_tests, random};

device_tests!(matches_reference, large_mean);

const EPS: f64 = 1e-5;

fn reference(inputs: &[Vec<f64>], grad: &[f64]) -> Reference {
    let [x, weight, bias] = inputs else {
        unreachable!()
    };
    let width = weight.len();
    let n = width as f64;
    let (mut y, mut dx) = (Vec::new(), Vec::new());
    let (mut d_weight, mut d_bias) = (vec![0.0; width], vec![0.0; width]);
    for (row, x) in x.chunks(width).enumerate() {
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let normal: Vec<_> = x
            .iter()
            .map(|x| (x - mean) / (variance + EPS).sqrt())
            .collect();
        y.extend((0..width).map(|i| normal[i] * weight[i] + bias[i]));
        if grad.is_empty() {
            continue;
        }
        let grad = &grad[row * width..][..width];
        let g: Vec<_> = grad
            .iter()
            .zip(weight)
            .map(|(grad, weight)| grad * weight)
            .collect();
        let mean_g = g.iter().sum::<f64>() / n;
        let mean_gn = g
            .iter()
            .zip(&normal)
            .map(|(g, normal)| g * normal)
            .sum::<f64>()
            / n;
        for i in 0..width {
            dx.push((g[i] - mean_g - normal[i] * mean_gn) / (variance + EPS).sqrt());
            d_weight[i] += grad[i] * normal[i];
            d_bias[i] += grad[i];
        }
    }
    (y, vec![dx, d_weight, d_bias])
}

#[test]
fn reference_is_right() {
    check_reference(&[random(3 * 7, 1), random(7, 2), random(7, 3)], reference);
}

fn op(x: &[Tensor]) -> candle_core::Result<Tensor> {
    layer_norm(&x[0], &x[1], &x[2], EPS)
}

fn matches_reference(device: &Device) -> Result<()> {
    let shapes: [&[usize]; 11] = [
        &[4, 1],
        &[3, 5],
        &[0, 8],
        &[33, 31],
        &[2, 5, 64],
        &[65, 257],
        &[100, 768],
        &[1000, 128],
        &[4000, 64],
        &[3, 1024],
        &[5, 5000],
    ];
    for dtype in DTYPES {
        for shape in shapes {
            let width = shape[shape.len() - 1];
            let inputs = [
                Input::random(shape, dtype, 1),
                Input::random(&[width], DType::F32, 2),
                Input::random(&[width], DType::F32, 3),
            ];
            compare(
                &format!("layer_norm {shape:?}"),
                device,
                &inputs,
                op,
                reference,
            )?;
        }
    }
    Ok(())
}

/// The variance is of the differences from the mean, not a difference of large sums.
fn large_mean(device: &Device) -> Result<()> {
    let mut x = Input::random(&[4, 512], DType::F32, 1);
    x.values
        .iter_mut()
        .for_each(|x| *x = (*x * 64.0).round() / 64.0 + 8192.0);
    let inputs = [
        x,
        Input::random(&[512], DType::F32, 2),
        Input::random(&[512], DType::F32, 3),
    ];
    // The mean itself has an error of an ulp of 8192, 1e-3 of a standard deviation.
    let vars = inputs
        .iter()
        .map(|input| input.var(device))
        .collect::<Result<Vec<_>>>()?;
    let tensors: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let got = crate::common::values(&op(&tensors)?)?;
    let (expected, _) = reference(&inputs.map(|input| input.values), &[]);
    for (got, expected) in got.iter().zip(&expected) {
        assert!((got - expected).abs() < 3e-3, "{got}, not {expected}");
    }
    Ok(())
}

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::gelu;

use crate::common::{
    DTYPES, Input, Reference, assert_close, check_reference, compare, device_tests, random,
};

device_tests!(matches_reference, tails, strided_input);

/// `erf(x)` by its Taylor series, `erfc` of large arguments by its continued fraction.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x > 3.0 {
        let fraction = (1..=80)
            .rev()
            .fold(0.0, |f, k| f64::from(k) / 2.0 / (x + f));
        return (-x * x).exp() / ((x + fraction) * std::f64::consts::PI.sqrt());
    }
    let (mut term, mut sum) = (x, x);
    for k in 1..200 {
        let k = f64::from(k);
        term *= -x * x / k;
        sum += term / (2.0 * k + 1.0);
    }
    1.0 - 2.0 / std::f64::consts::PI.sqrt() * sum
}

pub fn reference(inputs: &[Vec<f64>], grad: &[f64]) -> Reference {
    let cdf = |x: f64| 0.5 * erfc(-x / 2f64.sqrt());
    let pdf = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let x = &inputs[0];
    let y = x.iter().map(|x| x * cdf(*x)).collect();
    let dx = x
        .iter()
        .zip(grad)
        .map(|(x, grad)| grad * (cdf(*x) + x * pdf(*x)))
        .collect();
    (y, vec![dx])
}

#[test]
fn reference_is_right() {
    assert!((erfc(0.5) - 0.479_500_122_186_953_5).abs() < 1e-15);
    assert!((erfc(3.5) / 7.430_983_723_414_128e-7 - 1.0).abs() < 1e-12);
    check_reference(&[random(50, 1)], reference);
}

fn matches_reference(device: &Device) -> Result<()> {
    for dtype in DTYPES {
        for shape in [
            &[0][..],
            &[1],
            &[7, 3],
            &[1000],
            &[16 * 1024 + 5],
            &[3, 64, 768],
        ] {
            let inputs = [Input::random(shape, dtype, 1)];
            compare(
                &format!("gelu {shape:?}"),
                device,
                &inputs,
                |x| gelu(&x[0]),
                reference,
            )?;
        }
    }
    Ok(())
}

/// Also tiny results have a small relative error.
fn tails(device: &Device) -> Result<()> {
    let x: Vec<f32> = (-55..=60).map(|i| i as f32 / 10.0).collect();
    for x in x {
        let y = gelu(&Tensor::from_slice(&[x], 1, device)?)?;
        let (expected, _) = reference(&[vec![f64::from(x)]], &[0.0]);
        let got = f64::from(y.to_vec1::<f32>()?[0]);
        let error = (got - expected[0]).abs() / expected[0].abs().max(1e-30);
        assert!(error < 6e-6, "gelu({x}) = {got}, not {}", expected[0]);
    }
    let extreme = Tensor::new(&[-100f32, -20.0, 100.0, f32::NAN], device)?;
    let y = gelu(&extreme)?.to_vec1::<f32>()?;
    assert_eq!(y[..3], [0.0, 0.0, 100.0]);
    assert!(y[3].is_nan());
    Ok(())
}

fn strided_input(device: &Device) -> Result<()> {
    let x = Input::random(&[5, 9], DType::F32, 3).var(device)?;
    let y = gelu(&x.t()?)?;
    let transposed = x.t()?.contiguous()?;
    let (expected, _) = reference(&[crate::common::values(&transposed)?], &[]);
    assert_close("gelu of a transposed tensor", &y, &expected)
}

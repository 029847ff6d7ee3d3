use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{Gradients, Tape, dropout, dropout_add};

use crate::common::{DTYPES, Input, Reference, assert_close, compare, device_tests, values};

device_tests!(
    drops_as_documented,
    adds_to_a_residual,
    takes_strided_inputs,
    seeds_and_rates,
    no_dropout
);

/// Philox4x32-10 from its paper, as plainly as possible.
fn philox(counter: [u32; 4], seed: u64) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
    for _ in 0..10 {
        let a = u64::from(c0) * 0xD251_1F53;
        let b = u64::from(c2) * 0xCD9E_8D57;
        (c0, c2) = ((b >> 32) as u32 ^ c1 ^ k0, (a >> 32) as u32 ^ c3 ^ k1);
        (c1, c3) = (b as u32, a as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

fn factor(i: usize, p: f32, seed: u64) -> f64 {
    let word = philox([(i / 4) as u32, 0, 0, 0], seed)[i % 4];
    if f64::from(word) < f64::from(p) * 2f64.powi(32) {
        0.0
    } else {
        f64::from(1.0 / (1.0 - p))
    }
}

fn drops_as_documented(device: &Device) -> Result<()> {
    let seed = 0x1234_5678_9abc_def0;
    for dtype in DTYPES {
        for (shape, p) in [(&[1][..], 0.5), (&[3, 67], 0.1), (&[16 * 1024 + 9], 0.25)] {
            let inputs = [Input::random(shape, dtype, 1)];
            let reference = |inputs: &[Vec<f64>], grad: &[f64]| -> Reference {
                let masked = |x: &[f64]| {
                    x.iter()
                        .enumerate()
                        .map(|(i, x)| x * factor(i, p, seed))
                        .collect()
                };
                (masked(&inputs[0]), vec![masked(grad)])
            };
            let op = |x: &[Tensor]| dropout(&x[0], p, seed);
            compare(
                &format!("dropout {shape:?}"),
                device,
                &inputs,
                op,
                reference,
            )?;
        }
    }
    Ok(())
}

fn adds_to_a_residual(device: &Device) -> Result<()> {
    let (p, seed) = (0.25, 77);
    for len in [7, 16 * 1024 + 9] {
        let inputs = [1, 2].map(|seed| Input::random(&[len], DType::F32, seed));
        let masked = |(i, x): (usize, &f64)| x * factor(i, p, seed);
        compare(
            &format!("dropout_add of {len}"),
            device,
            &inputs,
            |x| dropout_add(&x[0], p, seed, &x[1]),
            |inputs, grad| {
                let dropped = inputs[0].iter().enumerate().map(masked);
                let sum = dropped.zip(&inputs[1]).map(|(x, residual)| x + residual);
                let d_x = grad.iter().enumerate().map(masked).collect();
                (sum.collect(), vec![d_x, grad.to_vec()])
            },
        )?;
    }
    Ok(())
}

/// Gradients find their way through what makes a tensor contiguous.
fn takes_strided_inputs(device: &Device) -> Result<()> {
    let var = |seed| Input::random(&[6, 5], DType::F32, seed).var(device);
    let (x, residual) = (var(1)?, var(2)?);
    let run = || {
        dropout_add(&x.t()?, 0.5, 3, &residual.t()?)?
            .sqr()?
            .sum_all()
    };
    let in_graph = run()?.backward()?;
    let (loss, tape) = Tape::record(run)?;
    let mut on_tape = Gradients::default();
    tape.backward(&loss, 1.0, &mut on_tape)?;
    for var in [&x, &residual] {
        let expected = in_graph.get(var).context("no gradient")?;
        let got = on_tape.remove(var).context("no gradient on the tape")?;
        assert_close("dropout_add of transposes", &got, &values(expected)?)?;
    }
    Ok(())
}

fn seeds_and_rates(device: &Device) -> Result<()> {
    let ones = Tensor::ones(100_000, DType::F32, device)?;
    for p in [0.001, 0.1, 0.9] {
        let [a, b] = [1, 2].map(|seed| dropout(&ones, p, seed).unwrap().to_vec1::<f32>().unwrap());
        assert_ne!(a, b);
        let rate = a.iter().filter(|x| **x == 0.0).count() as f64 / 1e5;
        let deviation = (f64::from(p) * (1.0 - f64::from(p)) / 1e5).sqrt();
        assert!(
            (rate - f64::from(p)).abs() < 4.0 * deviation,
            "dropped {rate} of {p}"
        );
    }
    Ok(())
}

fn no_dropout(device: &Device) -> Result<()> {
    let x = Tensor::arange(0f32, 10.0, device)?;
    assert_eq!(dropout(&x, 0.0, 1)?.to_vec1::<f32>()?, x.to_vec1::<f32>()?);
    Ok(())
}

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::rope;
use candle_rope_attn::{Rope, RopePairing, Sequences, reference};

use crate::common::{
    DTYPES, Input, Reference, assert_close, check_reference, compare, device_tests, random, values,
};

device_tests!(matches_reference, strides_do_not_matter, no_tokens);

const PAIRINGS: [RopePairing; 2] = [RopePairing::HalfSplit, RopePairing::Interleaved];

fn rotation(head_dim: usize, pairing: RopePairing) -> Rope {
    let inv_freq = (0..head_dim / 2).map(|i| (-0.3 * i as f32).exp());
    Rope::from_inv_freq(inv_freq.collect(), pairing)
}

fn reference(
    inputs: &[Vec<f64>],
    grad: &[f64],
    rope: &Rope,
    num_heads: usize,
    positions: &[usize],
) -> Reference {
    let turned = |x: &[f64], sign| {
        let mut x = x.to_vec();
        reference::rotate(rope, num_heads, &mut x, sign, positions);
        x
    };
    (turned(&inputs[0], 1.0), vec![turned(grad, -1.0)])
}

#[test]
fn reference_is_right() {
    for pairing in PAIRINGS {
        check_reference(&[random(5 * 2 * 4, 1)], |inputs, grad| {
            reference(inputs, grad, &rotation(4, pairing), 2, &[0, 1, 2, 0, 1])
        });
    }
}

/// Every layout: its token axes, and the position of every token.
fn layouts() -> Vec<(Vec<usize>, Sequences, Vec<usize>)> {
    let dense: Vec<usize> = (0..2).flat_map(|_| 0..90).collect();
    let mask = (0..180).map(|i| i % 3 != 0).collect();
    vec![
        (vec![2, 90], Sequences::Dense, dense.clone()),
        (vec![2, 90], Sequences::KeyLens(vec![90, 7]), dense.clone()),
        (vec![2, 90], Sequences::KeyMask(mask), dense),
        (
            vec![128],
            Sequences::CuSeqlens(vec![0, 0, 90, 91, 91, 128]),
            (0..90).chain(0..1).chain(0..37).collect(),
        ),
    ]
}

fn matches_reference(device: &Device) -> Result<()> {
    for (num_heads, head_dim) in [(1, 2), (3, 6), (11, 40), (2, 64), (5, 256)] {
        for pairing in PAIRINGS {
            let rotation = rotation(head_dim, pairing);
            for (tokens, sequences, positions) in layouts() {
                let shape = [&tokens[..], &[num_heads, head_dim]].concat();
                for dtype in DTYPES {
                    compare(
                        &format!("rope {pairing:?} {shape:?}"),
                        device,
                        &[Input::random(&shape, dtype, 1)],
                        |x| rope(&x[0], &rotation, &sequences),
                        |inputs, grad| reference(inputs, grad, &rotation, num_heads, &positions),
                    )?;
                }
            }
        }
    }
    Ok(())
}

fn strides_do_not_matter(device: &Device) -> Result<()> {
    let rotation = rotation(40, RopePairing::HalfSplit);
    for dtype in DTYPES {
        // Heads before tokens, as after a transpose; and rows that begin at odd places.
        let wide = Input::random(&[2, 3, 70, 43], dtype, 1).var(device)?;
        let d_out = Input::random(&[2, 3, 70, 40], dtype, 2).var(device)?;
        let run = |x: &Tensor| -> Result<(Tensor, Tensor)> {
            let y = rope(x, &rotation, &Sequences::Dense)?.transpose(1, 2)?;
            let mut grads = (&y * d_out.as_tensor())?.sum_all()?.backward()?;
            Ok((y, grads.remove(&wide).context("no gradient")?))
        };
        let strided = wide.narrow(3, 1, 40)?.transpose(1, 2)?;
        let (y, d_wide) = run(&strided)?;
        let (expected_y, expected_d_wide) = run(&strided.contiguous()?)?;
        assert_close("strided rope", &y, &values(&expected_y)?)?;
        assert_close("its gradient", &d_wide, &values(&expected_d_wide)?)?;
    }
    Ok(())
}

fn no_tokens(device: &Device) -> Result<()> {
    let rotation = rotation(8, RopePairing::Interleaved);
    let x = Tensor::zeros((1, 2, 8), DType::F32, device)?.narrow(0, 0, 0)?;
    for bounds in [vec![0], vec![0, 0]] {
        let y = rope(&x, &rotation, &Sequences::CuSeqlens(bounds))?;
        assert_eq!(y.dims(), [0, 2, 8]);
    }
    Ok(())
}

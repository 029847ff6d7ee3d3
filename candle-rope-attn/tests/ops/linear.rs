use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{linear, linear_add, mlp_add};

use crate::common::{
    DTYPES, Input, Reference, assert_near, check_reference, compare, compare_with, device_tests,
    on_tape, random, values,
};
use crate::gelu;

device_tests!(
    matches_reference,
    without_bias,
    adds_to_a_residual,
    mlp_matches_reference,
    mlp_in_16_bits,
    frozen_arguments_get_no_gradient
);

/// x, weight and, if there are three inputs, bias.
pub fn reference(inputs: &[Vec<f64>], grad: &[f64], features: usize) -> Reference {
    let (x, weight) = (&inputs[0], &inputs[1]);
    let outputs = weight.len() / features;
    let rows = x.len() / features;
    let mut y = vec![0.0; rows * outputs];
    let mut grads: Vec<_> = inputs.iter().map(|input| vec![0.0; input.len()]).collect();
    for row in 0..rows {
        for out in 0..outputs {
            let at = row * outputs + out;
            let grad = grad.get(at).copied().unwrap_or(0.0);
            if let Some(bias) = inputs.get(2) {
                y[at] = bias[out];
                grads[2][out] += grad;
            }
            for i in 0..features {
                y[at] += x[row * features + i] * weight[out * features + i];
                grads[0][row * features + i] += grad * weight[out * features + i];
                grads[1][out * features + i] += grad * x[row * features + i];
            }
        }
    }
    (y, grads)
}

#[test]
fn reference_is_right() {
    let inputs = [random(4 * 3, 1), random(5 * 3, 2), random(5, 3)];
    check_reference(&inputs, |inputs, grad| reference(inputs, grad, 3));
}

fn matches_reference(device: &Device) -> Result<()> {
    let shapes: [(&[usize], usize); 6] = [
        (&[1, 1], 1),
        (&[5, 3], 7),
        (&[0, 4], 3),
        (&[2, 17, 64], 33),
        (&[300, 96], 130),
        (&[33, 256], 512),
    ];
    for dtype in DTYPES {
        for (shape, outputs) in shapes {
            let features = shape[shape.len() - 1];
            let inputs = [
                Input::random(shape, dtype, 1),
                Input::random(&[outputs, features], dtype, 2),
                Input::random(&[outputs], dtype, 3),
            ];
            // Some of cuBLAS's kernels round the product before they add it to the bias.
            let bias = inputs[2]
                .values
                .iter()
                .fold(0.0, |max: f64, x| max.max(x.abs()));
            let addend = if device.is_cuda() { bias } else { 0.0 };
            compare_with(
                &format!("linear {shape:?} -> {outputs}"),
                device,
                &inputs,
                addend,
                |x| linear(&x[0], &x[1], Some(&x[2])),
                |inputs, grad| reference(inputs, grad, features),
            )?;
        }
    }
    Ok(())
}

fn residual_inputs(dtype: DType) -> [Input; 4] {
    [
        Input::random(&[2, 9, 40], dtype, 1),
        Input::random(&[24, 40], dtype, 2),
        Input::random(&[24], dtype, 3),
        Input::random(&[2, 9, 24], dtype, 4),
    ]
}

/// As [`reference`], with a residual as the last input.
fn residual_reference(inputs: &[Vec<f64>], grad: &[f64], features: usize) -> Reference {
    let (mut y, mut grads) = reference(&inputs[..3], grad, features);
    y.iter_mut().zip(&inputs[3]).for_each(|(y, x)| *y += x);
    grads.push(grad.to_vec());
    (y, grads)
}

fn adds_to_a_residual(device: &Device) -> Result<()> {
    for dtype in DTYPES {
        // In the graph the product is rounded before it is added.
        compare_with(
            "linear_add",
            device,
            &residual_inputs(dtype),
            4.0,
            |x| linear_add(&x[0], &x[1], Some(&x[2]), &x[3]),
            |inputs, grad| residual_reference(inputs, grad, 40),
        )?;
    }
    Ok(())
}

/// Rows, features and inner features of an MLP.
type MlpSizes = [usize; 3];

/// x, weight and bias, and again, and the residual.
fn mlp_inputs([rows, width, inner]: MlpSizes, dtype: DType) -> [Input; 6] {
    let shapes: [&[usize]; 6] = [
        &[2, rows / 2, width],
        &[inner, width],
        &[inner],
        &[width, inner],
        &[width],
        &[2, rows / 2, width],
    ];
    let mut seed = 0;
    shapes.map(|shape| {
        seed += 1;
        Input::random(shape, dtype, seed)
    })
}

fn mlp(x: &[Tensor]) -> candle_core::Result<Tensor> {
    let layer = |i: usize| (&x[i], Some(&x[i + 1]));
    mlp_add(&x[0], layer(1), layer(3), &x[5])
}

fn mlp_reference([_, width, inner]: MlpSizes, inputs: &[Vec<f64>], grad: &[f64]) -> Reference {
    let (hidden, _) = reference(&inputs[..3], &[], width);
    let outer = [&[hidden], &inputs[3..]].concat();
    let (y, mut outer) = activated_reference(&outer, grad, inner);
    let (_, mut grads) = reference(&inputs[..3], &outer.remove(0), width);
    grads.append(&mut outer);
    (y, grads)
}

/// In f32, where no rounding comes between.
fn mlp_matches_reference(device: &Device) -> Result<()> {
    let sizes = [300, 64, 128];
    compare(
        "mlp_add",
        device,
        &mlp_inputs(sizes, DType::F32),
        mlp,
        |inputs, grad| mlp_reference(sizes, inputs, grad),
    )
}

/// On the tape, where several roundings come between, in Candle's graph, and without gradients. At sizes
/// for which Hopper has kernels with GELU: fewer rows than a tile (taken with ATTN_EVERY_SIZE only) and more
/// features than are in shared memory at a time, and more tiles than thread blocks.
fn mlp_in_16_bits(device: &Device) -> Result<()> {
    let (bf16, f16) = ((DType::BF16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0));
    let cases = [
        ([300, 64, 128], bf16),
        ([300, 64, 128], f16),
        ([100, 320, 320], f16),
        ([9000, 128, 320], bf16),
    ];
    for (sizes, (dtype, rounding)) in cases {
        let inputs = mlp_inputs(sizes, dtype);
        let vars = inputs
            .iter()
            .map(|input| Ok(input.var(device)?.as_tensor().clone()));
        let vars = vars.collect::<Result<Vec<_>>>()?;
        let grad = Input::random(&inputs[5].shape, dtype, 7).var(device)?;
        let grad = grad.detach();
        let mut got = on_tape(&vars, &grad, mlp)?;
        got.push(mlp(&vars)?);
        let detached: Vec<_> = vars.iter().map(Tensor::detach).collect();
        got.push(mlp(&detached)?);

        let rounded = vars.iter().map(values);
        let rounded = rounded.collect::<Result<Vec<_>>>()?;
        let (y, mut expected) = mlp_reference(sizes, &rounded, &values(&grad)?);
        expected.insert(0, y.clone());
        expected.extend([y.clone(), y]);
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_near(
                &format!("{dtype:?}, result {i}"),
                got,
                expected,
                3.0 * rounding,
            )?;
        }
    }
    Ok(())
}

/// As [`residual_reference`], of GELU of the first input.
fn activated_reference(inputs: &[Vec<f64>], grad: &[f64], features: usize) -> Reference {
    let mut activated = inputs.to_vec();
    activated[0] = gelu::reference(&inputs[..1], &[]).0;
    let (y, mut grads) = residual_reference(&activated, grad, features);
    grads[0] = gelu::reference(&inputs[..1], &grads[0]).1.remove(0);
    (y, grads)
}

fn without_bias(device: &Device) -> Result<()> {
    for dtype in DTYPES {
        let inputs = [
            Input::random(&[9, 24], dtype, 1),
            Input::random(&[16, 24], dtype, 2),
        ];
        compare(
            "linear without bias",
            device,
            &inputs,
            |x| linear(&x[0], &x[1], None),
            |inputs, grad| reference(inputs, grad, 24),
        )?;
    }
    Ok(())
}

fn frozen_arguments_get_no_gradient(device: &Device) -> Result<()> {
    let x = Input::random(&[3, 4], DType::F32, 1).var(device)?;
    let weight = Input::random(&[2, 4], DType::F32, 2).var(device)?;
    let grad = |x: &Tensor, weight: &Tensor| -> Result<_> {
        Ok(linear(x, weight, None)?.sum_all()?.backward()?)
    };
    let both = grad(&x, &weight)?;
    let one = grad(&x, &weight.detach())?;
    assert!(one.get(&weight).is_none());
    let [both, one] = [both, one].map(|grads| values(grads.get(&x).unwrap()).unwrap());
    assert_eq!(both, one);
    Ok(())
}

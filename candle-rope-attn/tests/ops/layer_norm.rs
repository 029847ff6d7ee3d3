use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{cast, layer_norm, layer_norm_as, linear};

use crate::common::{
    DTYPES, Input, Reference, check_reference, compare, device_tests, on_tape, random, tensor,
    values,
};

device_tests!(
    matches_reference,
    large_mean,
    narrow_matches_reference,
    narrow_is_a_cast_after,
    rows_are_their_own
);

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

fn inputs(shape: &[usize], dtype: DType) -> [Input; 3] {
    let width = &shape[shape.len() - 1..];
    [
        Input::random(shape, dtype, 1),
        Input::random(width, DType::F32, 2),
        Input::random(width, DType::F32, 3),
    ]
}

fn matches_reference(device: &Device) -> Result<()> {
    let shapes: [&[usize]; 13] = [
        &[4, 1],
        &[3, 5],
        &[0, 8],
        &[33, 31],
        &[2, 5, 64],
        &[65, 257],
        &[100, 768],
        &[2100, 264],
        &[1000, 128],
        &[4000, 64],
        &[3, 1024],
        &[5, 5000],
        &[3, 1031],
    ];
    for dtype in DTYPES {
        for shape in shapes {
            let name = format!("layer_norm {shape:?}");
            compare(&name, device, &inputs(shape, dtype), op, reference)?;
        }
    }
    Ok(())
}

/// What reads f32 and writes fewer bits.
const NARROW: [DType; 2] = [DType::BF16, DType::F16];

fn narrow_matches_reference(device: &Device) -> Result<()> {
    let shapes: [&[usize]; 9] = [
        &[4, 1],
        &[0, 8],
        &[33, 31],
        &[2, 5, 64],
        &[65, 260],
        &[100, 768],
        &[2100, 132],
        &[3, 1024],
        &[5, 5000],
    ];
    for dtype in NARROW {
        for shape in shapes {
            compare(
                &format!("layer_norm {shape:?} from f32 to {dtype:?}"),
                device,
                &inputs(shape, DType::F32),
                |x| layer_norm_as(&x[0], &x[1], &x[2], EPS, dtype),
                reference,
            )?;
        }
    }
    Ok(())
}

fn bits(x: &Tensor) -> Result<Vec<u64>> {
    Ok(values(x)?.into_iter().map(f64::to_bits).collect())
}

/// Result and gradients, by a narrow gradient and by one as wide as weights have.
fn narrow_is_a_cast_after(device: &Device) -> Result<()> {
    for dtype in NARROW {
        for shape in [[3, 5], [40, 768], [2100, 264], [9, 1000], [6, 4096]] {
            let inputs = inputs(&shape, DType::F32);
            let vars = inputs.each_ref().map(|input| input.var(device));
            let vars = vars.into_iter().collect::<Result<Vec<_>>>()?;
            let x: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
            let fused = |x: &[Tensor]| layer_norm_as(&x[0], &x[1], &x[2], EPS, dtype);
            let apart = |x: &[Tensor]| cast(&op(x)?, dtype);
            let grad = tensor(&random(shape[0] * shape[1], 4), &shape, dtype, device)?;

            let input = tensor(&random(2 * shape[1], 5), &[2, shape[1]], dtype, device)?;
            let as_weight = |y: candle_core::Result<Tensor>| linear(&input, &y?, None);
            let wide_grad = tensor(&random(2 * shape[0], 6), &[2, shape[0]], dtype, device)?;

            let mut got = on_tape(&x, &grad, fused)?;
            got.extend(on_tape(&x, &wide_grad, |x| as_weight(fused(x)))?);
            let mut expected = on_tape(&x, &grad, apart)?;
            expected.extend(on_tape(&x, &wide_grad, |x| as_weight(apart(x)))?);
            let graph = |op: &dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>| {
                let grads = (op(&x)? * &grad)?.sum_all()?.backward()?;
                Ok::<_, anyhow::Error>(x.iter().filter_map(|x| grads.get(x).cloned()).collect())
            };
            let in_graph: [Vec<_>; 2] = [graph(&fused)?, graph(&apart)?];
            assert_eq!(in_graph.each_ref().map(Vec::len), [3, 3]);
            let [in_graph, expected_in_graph] = in_graph;
            got.extend(in_graph);
            expected.extend(expected_in_graph);
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let dtypes = [got.dtype(), expected.dtype()];
                ensure!(dtypes[0] == dtypes[1], "{shape:?}, {i}: {dtypes:?}");
                let same = bits(got)? == bits(expected)?;
                ensure!(same, "{shape:?} {dtype:?}: tensor {i} differs");
            }
        }
    }
    Ok(())
}

/// The bits of a row do not depend on how many others there are.
fn rows_are_their_own(device: &Device) -> Result<()> {
    const FEW: usize = 9;
    const TIMES: usize = 500;
    for (from, to) in [
        (DType::F32, DType::F32),
        (DType::F32, DType::BF16),
        (DType::F32, DType::F16),
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F16),
    ] {
        for width in [5, 136, 264, 768, 1000, 1024, 1032] {
            let inputs = inputs(&[FEW, width], from);
            let [x, weight, bias] = inputs.each_ref().map(|input| input.var(device));
            let (x, weight, bias) = (x?.as_detached_tensor(), weight?, bias?);
            let op = |x: &Tensor| layer_norm_as(x, &weight, &bias, EPS, to);
            let few = bits(&op(&x)?)?.repeat(TIMES);
            let many = op(&x.repeat((TIMES, 1))?)?;
            ensure!(many.dtype() == to, "{from:?} to {:?}", many.dtype());
            let same = bits(&many)? == few;
            ensure!(same, "{from:?} to {to:?}, width {width}: rows differ");
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
    let got = values(&op(&tensors)?)?;
    let (expected, _) = reference(&inputs.map(|input| input.values), &[]);
    for (got, expected) in got.iter().zip(&expected) {
        assert!((got - expected).abs() < 3e-3, "{got}, not {expected}");
    }
    Ok(())
}

//! Training operations beside Candle's own, forward and backward, at the sizes of a small model on
//! the CPU: 2048 tokens of width 256, 4 times that in the MLP, 300 labels of 8192.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW as CandleAdamW, Optimizer, ParamsAdamW};
use candle_rope_attn::ops::{
    AdamW, Parameter, cross_entropy, dropout, embedding, gelu, global_norm, layer_norm, linear,
};
use criterion::{Criterion, criterion_group, criterion_main};

const TOKENS: usize = 2048;
const WIDTH: usize = 256;
const MLP: usize = 4 * WIDTH;
const LABELS: usize = 300;
const VOCAB: usize = 8192;

fn var(shape: &[usize]) -> Result<Var> {
    let len = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin()).collect();
    Var::from_vec(values, shape, &Device::Cpu)
}

fn indices(len: usize, end: usize) -> Result<Tensor> {
    let values: Vec<u32> = (0..len).map(|i| (i * 7919 % end) as u32).collect();
    Tensor::from_vec(values, len, &Device::Cpu)
}

/// Times forward and backward of both, for a loss that costs them the same.
fn compare(
    c: &mut Criterion,
    name: &str,
    ours: impl Fn() -> Result<Tensor>,
    candle: impl Fn() -> Result<Tensor>,
) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    let step = |y: Tensor| y.sum_all().and_then(|loss| loss.backward());
    group.bench_function("ours", |b| b.iter(|| step(ours().unwrap()).unwrap()));
    group.bench_function("candle", |b| b.iter(|| step(candle().unwrap()).unwrap()));
    group.finish();
}

fn differentiable(c: &mut Criterion) -> Result<()> {
    let (x, wide) = (var(&[TOKENS, WIDTH])?, var(&[TOKENS, MLP])?);
    let (weight, bias) = (var(&[MLP, WIDTH])?, var(&[MLP])?);
    compare(
        c,
        "linear",
        || linear(&x, &weight, Some(&bias)),
        || x.matmul(&weight.t()?)?.broadcast_add(&bias),
    );
    let (scale, shift) = (var(&[WIDTH])?, var(&[WIDTH])?);
    // Candle's fused layer norm has no backward pass.
    let norm =
        candle_nn::LayerNorm::new(scale.as_tensor().clone(), shift.as_tensor().clone(), 1e-5);
    compare(
        c,
        "layer_norm",
        || layer_norm(&x, &scale, &shift, 1e-5),
        || {
            let mean = x.mean_keepdim(D::Minus1)?;
            let centred = x.broadcast_sub(&mean)?;
            let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
            let normal = centred.broadcast_div(&(variance + 1e-5)?.sqrt()?)?;
            normal.broadcast_mul(norm.weight())?.broadcast_add(&shift)
        },
    );
    compare(c, "gelu", || gelu(&wide), || wide.gelu_erf());
    compare(
        c,
        "dropout",
        || dropout(&x, 0.1, 1),
        || candle_nn::ops::dropout(&x, 0.1),
    );
    let (table, ids) = (var(&[VOCAB, WIDTH])?, indices(TOKENS, VOCAB)?);
    compare(
        c,
        "embedding",
        || embedding(&ids, &table),
        || table.index_select(&ids, 0),
    );
    let (logits, labels) = (var(&[LABELS, VOCAB])?, indices(LABELS, VOCAB)?);
    compare(
        c,
        "cross_entropy",
        || cross_entropy(&logits, &labels),
        || candle_nn::loss::cross_entropy(&logits, &labels),
    );
    Ok(())
}

fn optimizer(c: &mut Criterion) -> Result<()> {
    let var = var(&[16, MLP, WIDTH])?;
    let grad = Tensor::ones(var.shape(), DType::F32, &Device::Cpu)?;
    let mut group = c.benchmark_group("adamw");
    group.sample_size(10);
    let parameter = Parameter {
        var: var.clone(),
        weight_decay: 0.1,
        rounded: None,
    };
    let ours = AdamW::new(vec![parameter], (0.9, 0.999), 1e-8)?;
    let grads = [grad.clone()];
    group.bench_function("ours, clipped", |b| {
        b.iter(|| {
            let norm = global_norm(&grads).unwrap();
            ours.step(&grads, 1e-3, &norm, Some(1.0)).unwrap();
        })
    });
    let mut store = (var.as_tensor() * 0.0)?.sum_all()?.backward()?;
    store.insert(&var, grad);
    let mut candle = CandleAdamW::new(vec![var], ParamsAdamW::default())?;
    group.bench_function("candle, not clipped", |b| {
        b.iter(|| candle.step(&store).unwrap())
    });
    group.finish();
    Ok(())
}

fn benches(c: &mut Criterion) {
    differentiable(c).unwrap();
    optimizer(c).unwrap();
}

criterion_group!(ops, benches);
criterion_main!(ops);

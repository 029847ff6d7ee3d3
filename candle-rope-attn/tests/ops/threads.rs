//! The same bits on any number of threads.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{
    AdamW, Parameter, cross_entropy, dropout, embedding, gelu, global_norm, layer_norm, linear,
};
use rayon::ThreadPoolBuilder;

use crate::common::{Input, random_indices, values};

/// A small training step through every operation: its loss, gradient norm and new weights.
fn train() -> Result<Vec<Vec<f64>>> {
    let (vocab, width, tokens) = (500, 96, 700);
    let device = Device::Cpu;
    let shapes: [&[usize]; 5] = [
        &[vocab, width],
        &[width],
        &[width],
        &[width, width],
        &[width],
    ];
    let mut vars = Vec::new();
    for (seed, shape) in shapes.iter().enumerate() {
        vars.push(Input::random(shape, DType::F32, seed as u64).var(&device)?);
    }
    let ids = Tensor::new(random_indices(tokens, vocab as u32, 8), &device)?;
    let labels = Tensor::new(random_indices(tokens, vocab as u32, 9), &device)?;

    let x = dropout(&embedding(&ids, &vars[0])?, 0.1, 3)?;
    let x = layer_norm(&x, &vars[1], &vars[2], 1e-5)?;
    let x = gelu(&linear(&x, &vars[3], Some(&vars[4]))?)?;
    let loss = cross_entropy(&linear(&x, &vars[0], None)?, &labels)?;
    let store = loss.backward()?;
    let grads: Vec<_> = vars
        .iter()
        .map(|var| store.get(var).unwrap().clone())
        .collect();
    let norm = global_norm(&grads)?;

    let parameter = |var: &candle_core::Var| Parameter {
        var: var.clone(),
        weight_decay: 0.1,
        rounded: None,
    };
    let optimizer = AdamW::new(vars.iter().map(parameter).collect(), (0.9, 0.999), 1e-8)?;
    optimizer.step(&grads, 0.01, &norm, Some(1.0))?;
    let results = [&loss, &norm]
        .into_iter()
        .chain(vars.iter().map(|var| var.as_tensor()));
    results.map(values).collect()
}

#[test]
fn results_do_not_depend_on_threads() -> Result<()> {
    let on = |threads| -> Result<_> {
        ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()?
            .install(train)
    };
    let one = on(1)?;
    assert!(one == on(2)? && one == on(5)?);
    Ok(())
}

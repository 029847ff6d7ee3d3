//! Passes and training steps launched as CUDA graphs compute what those launched kernel by kernel do. Needs
//! a GPU.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Result, ensure};
use bert_variants::config::{BertConfig, ModelType};
use bert_variants::data::Batch;
use bert_variants::model::{LanguageModel, MAX_GRAPHS, Tokens};
use bert_variants::parameters::Parameters;
use bert_variants::train::{Learner, Precision, TrainConfig};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::{CudaMemory, cuda_device};
use clap::ValueEnum;

const VOCAB: u32 = 120;

/// One test at a time, as one measures memory.
static TURN: Mutex<()> = Mutex::new(());

fn gpu() -> Result<Option<(Device, MutexGuard<'static, ()>)>> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    match cuda_device(0) {
        Ok(device) => Ok(Some((device, turn))),
        Err(error) => {
            ensure!(
                std::env::var_os("REQUIRE_CUDA").is_none(),
                "no CUDA device: {error}"
            );
            println!("skipped: no CUDA device ({error})");
            Ok(None)
        }
    }
}

/// The model without and with graphs, and its parameters.
fn models(
    model_type: ModelType,
    dtype: DType,
    device: &Device,
) -> Result<([LanguageModel; 2], Parameters)> {
    let config = BertConfig::new(model_type, VOCAB as usize, 3, 128, 2, 64);
    let parameters = Parameters::init(&config, 1, device)?;
    let model = || LanguageModel::new(&config, &parameters, false, dtype);
    Ok(([model()?, model()?.with_graphs()], parameters))
}

fn ids(len: usize, seed: u32) -> Vec<u32> {
    let ids = 0..len as u32;
    ids.map(|i| (i * i + seed * (2 * i + 7)) % VOCAB).collect()
}

fn bits(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

#[test]
fn every_variant_computes_the_same_bits() -> Result<()> {
    let Some((device, _turn)) = gpu()? else {
        return Ok(());
    };
    for model_type in ModelType::value_variants() {
        for dtype in [DType::F32, DType::BF16] {
            let ([eager, graphs], parameters) = models(*model_type, dtype, &device)?;
            let mut kept = Vec::new();
            for seed in 0..8 {
                // Two kinds of batches in turn, which are captured when they come again.
                let cu_seqlens: &[usize] = match seed % 2 {
                    0 => &[0, 7, 40],
                    _ => &[0, 33],
                };
                let ids = ids(cu_seqlens[cu_seqlens.len() - 1], seed);
                let tokens = Tokens {
                    ids: &ids,
                    cu_seqlens,
                    token_type_ids: None,
                };
                // In any order.
                let positions = [32 - seed, seed, seed, 0];
                let expected = bits(&eager.logits(&tokens, &positions, None)?)?;
                let got = bits(&graphs.logits(&tokens, &positions, None)?)?;
                let name = format!("{} {dtype:?}, pass {seed}", model_type.name());
                ensure!(got == expected, "{name}: other scores");
                let hidden = graphs.encoder().forward(&tokens, None)?;
                let expected = bits(&eager.encoder().forward(&tokens, None)?)?;
                kept.push((hidden, expected));
                if seed == 5 {
                    for (_, var) in parameters.vars() {
                        var.set(&(var.as_tensor() * 1.1)?)?;
                    }
                }
            }
            for (hidden, expected) in kept {
                ensure!(bits(&hidden)? == expected, "a later pass changed a result");
            }
        }
    }
    Ok(())
}

#[test]
fn segments_are_passed_on() -> Result<()> {
    let Some((device, _turn)) = gpu()? else {
        return Ok(());
    };
    let ([eager, graphs], _) = models(ModelType::Bert, DType::BF16, &device)?;
    for seed in 0..6 {
        let (ids, types) = (ids(20, seed), ids(20, seed + 50));
        let types: Vec<u32> = types.iter().map(|id| id % 2).collect();
        let tokens = Tokens {
            ids: &ids,
            cu_seqlens: &[0, 20],
            token_type_ids: (seed % 3 > 0).then_some(&types),
        };
        let expected = bits(&eager.logits(&tokens, &[3, 19], None)?)?;
        let got = bits(&graphs.logits(&tokens, &[3, 19], None)?)?;
        ensure!(got == expected, "pass {seed}");
    }
    Ok(())
}

/// Compares scores of one sequence.
fn check([eager, graphs]: &[LanguageModel; 2], len: usize, seed: u32) -> Result<()> {
    let ids = ids(len, seed);
    let tokens = Tokens {
        ids: &ids,
        cu_seqlens: &[0, len],
        token_type_ids: None,
    };
    let expected = bits(&eager.logits(&tokens, &[0], None)?)?;
    let got = bits(&graphs.logits(&tokens, &[0], None)?)?;
    ensure!(got == expected, "other scores of length {len}");
    Ok(())
}

#[test]
fn graphs_are_limited() -> Result<()> {
    let Some((device, _turn)) = gpu()? else {
        return Ok(());
    };
    let (models, _) = models(ModelType::Roformer, DType::BF16, &device)?;
    let used = || -> Result<u64> {
        device.synchronize()?;
        Ok(CudaMemory::of(&device)?.map_or(0, |memory| memory.used))
    };
    let mut most = Vec::new();
    for round in 0..3 {
        for len in 1..=2 * MAX_GRAPHS {
            // Each twice, so that it is captured.
            check(&models, len, round)?;
            check(&models, len, round + 1)?;
        }
        most.push(used()?);
    }
    ensure!(
        most[2] < most[1] + (1 << 20),
        "memory grows: {most:?} bytes"
    );
    Ok(())
}

#[test]
fn threads_do_not_disturb_each_other() -> Result<()> {
    let Some((device, _turn)) = gpu()? else {
        return Ok(());
    };
    let (models, _) = models(ModelType::Bert, DType::BF16, &device)?;
    let models = &models;
    device.synchronize()?;
    thread::scope(|scope| {
        let start = |thread| {
            scope.spawn(move || (0u32..100).try_for_each(|seed| check(models, 60, seed + thread)))
        };
        let threads = [0, 1, 2].map(start);
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("no panic"))
    })
}

/// Losses and gradient norms of steps of two batches, whose lengths come again and numbers of labels do not,
/// and then all weights.
fn train(
    model_type: ModelType,
    dtype: Precision,
    cuda_graphs: bool,
    device: &Device,
) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
    let config = BertConfig::new(model_type, VOCAB as usize, 2, 128, 2, 64);
    let settings = TrainConfig {
        dtype,
        cuda_graphs,
        ..TrainConfig::default()
    };
    let parameters = Parameters::init(&config, 1, device)?;
    let weights = || -> Result<Vec<Vec<f32>>> {
        let weights = parameters.vars().iter().map(|(_, var)| bits(var));
        weights.collect()
    };
    let before = weights()?;
    let mut learner = Learner::new(&settings, &config, parameters.clone(), 1)?;
    let mut numbers = Vec::new();
    for step in 0..8u32 {
        let batches = [40, 33].map(|len| {
            let input_ids = ids(len, step);
            let last = 3 + step * 2 + len as u32 % 5;
            let label_positions: Vec<u32> = (1..=last).rev().collect();
            let labels = label_positions.iter().map(|at| input_ids[*at as usize]);
            Batch {
                labels: labels.collect(),
                cu_seqlens: vec![0, 5, len],
                label_positions,
                input_ids,
            }
        });
        let lr = 1e-3 * f64::from(1 + step);
        let update = learner.step(&batches, step.into(), lr)?;
        numbers.extend([update.loss, update.grad_norm]);
    }
    let numbers: Result<Vec<f32>> = numbers.iter().map(|x| Ok(x.to_scalar()?)).collect();
    ensure!(
        cuda_graphs == (learner.num_graphs() > 0),
        "{} {dtype:?}: {} graphs where cuda_graphs is {cuda_graphs}",
        model_type.name(),
        learner.num_graphs()
    );
    let after = weights()?;
    for (before, after) in before.iter().zip(&after) {
        ensure!(before != after, "a parameter was not trained");
    }
    Ok((numbers?, after))
}

#[test]
fn steps_are_those_of_kernel_by_kernel() -> Result<()> {
    let Some((device, _turn)) = gpu()? else {
        return Ok(());
    };
    // Says why a step could not be captured.
    bert_variants::init_logging();
    for model_type in ModelType::value_variants() {
        for (dtype, bound) in [(Precision::F32, 1e-4), (Precision::Bf16, 2e-2)] {
            let name = format!("{} {dtype:?}", model_type.name());
            let run = |cuda_graphs| train(*model_type, dtype, cuda_graphs, &device);
            let (graphs, eager) = (run(true)?, run(false)?);
            ensure!(graphs == run(true)?, "{name}: another run has other bits");
            for (i, (got, expected)) in graphs.0.iter().zip(&eager.0).enumerate() {
                let far = (got - expected).abs() > bound * expected.abs();
                ensure!(!far, "{name}, number {i}: got {got}, expected {expected}");
            }
        }
    }
    Ok(())
}

//! The training step of [`Learner`] gives the losses of one that is written with Candle's own means:
//! its graph in place of the tape, clipping by plain tensors, and candle-nn's AdamW.
//!
//! Without settings it takes a few steps on the embedded corpus, on the CPU and on a GPU where there
//! is one. Environment variables make it long:
//!
//! ```text
//! STEPS=2000 DATA=books.jsonl.zst DEVICE=cuda DTYPE=bf16 \
//!     cargo test --release --features cuda --test simple_step -- --nocapture
//! ```
//!
//! `DTYPE` is that of the fast step; the simple one is f32 always.

use std::slice;

use anyhow::{Context, Error, Result, ensure};
use bert_variants::config::{BertConfig, ModelType};
use bert_variants::data::{Batch, BatchConfig, Batches, Data, DataConfig, Objective};
use bert_variants::model::LanguageModel;
use bert_variants::parameters::Parameters;
use bert_variants::pretrain::{ModelSize, open_device};
use bert_variants::train::{Learner, Precision, TrainConfig};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use clap::ValueEnum;

/// Steps in which rounding has no time to grow.
const FIRST_STEPS: usize = 10;
const SEED: u64 = 0;

/// How far the means over the last fifth may be apart, relative to that of the simple step: a third
/// of what another seed of the weights makes on the embedded corpus.
const LAST_BOUND: f64 = 1e-3;

/// The same for each of the first losses. They are 1e-7 apart in f32 and 8e-5 in bf16. In f32 a step
/// that does not clip, or has another beta, epsilon or weight decay, is 5e-5 away or more.
fn first_bound(dtype: Precision) -> f64 {
    match dtype {
        Precision::F32 => 1e-5,
        Precision::Bf16 => 5e-4,
    }
}

/// A model with the optimizers of its weights and of what is not decayed.
struct Simple {
    model: LanguageModel,
    vars: Vec<Var>,
    optimizers: [AdamW; 2],
    max_grad_norm: f64,
}

impl Simple {
    fn new(config: &TrainConfig, model: &BertConfig, parameters: Parameters) -> Result<Self> {
        let (_, vars): (Vec<_>, Vec<Var>) = parameters.vars().iter().cloned().unzip();
        // Biases and LayerNorm, which have one axis, do not decay.
        let (weights, others) = vars.iter().cloned().partition(|var| var.rank() > 1);
        let settings = |weight_decay| ParamsAdamW {
            lr: config.lr,
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            eps: config.adam_epsilon,
            weight_decay,
        };
        Ok(Self {
            model: LanguageModel::new(model, &parameters, true, DType::F32)?,
            optimizers: [
                AdamW::new(weights, settings(config.weight_decay))?,
                AdamW::new(others, settings(0.0))?,
            ],
            vars,
            max_grad_norm: config.max_grad_norm,
        })
    }

    fn step(&mut self, batch: &Batch, lr: f64) -> Result<Tensor> {
        let loss = self.model.loss(batch, None)?;
        let mut gradients = loss.backward()?;
        self.clip(&mut gradients)?;
        for optimizer in &mut self.optimizers {
            optimizer.set_learning_rate(lr);
            optimizer.step(&gradients)?;
        }
        Ok(loss.detach())
    }

    /// As `torch.nn.utils.clip_grad_norm_`.
    fn clip(&self, gradients: &mut GradStore) -> Result<()> {
        let squares = self.vars.iter().map(|var| {
            let gradient = gradients.get(var).context("a variable got no gradient")?;
            Ok(gradient.sqr()?.sum_all()?)
        });
        let squares = squares.collect::<Result<Vec<Tensor>>>()?;
        let norm = Tensor::stack(&squares, 0)?.sum_all()?.sqrt()?;
        let scale = self.max_grad_norm / (f64::from(norm.to_scalar::<f32>()?) + 1e-6);
        for var in &self.vars {
            if let Some(gradient) = gradients.remove(var) {
                gradients.insert(var, (gradient * scale.min(1.0))?);
            }
        }
        Ok(())
    }
}

/// What both steps train on.
struct Run {
    config: TrainConfig,
    model: BertConfig,
    batches: Batches,
    device: Device,
}

impl Run {
    /// Loss before each step, of new parameters.
    fn losses(&self, mut step: impl FnMut(u64, &Batch, f64) -> Result<Tensor>) -> Result<Vec<f64>> {
        let schedule = self.config.schedule();
        (0..self.config.steps)
            .map(|i| {
                let loss = step(i, &self.batches.get(i)?, schedule.lr(i))?;
                Ok(f64::from(loss.to_scalar::<f32>()?))
            })
            .collect()
    }

    fn fast(&self) -> Result<Vec<f64>> {
        let parameters = Parameters::init(&self.model, SEED, &self.device)?;
        let mut learner = Learner::new(&self.config, &self.model, parameters, SEED)?;
        self.losses(|i, batch, lr| Ok(learner.step(slice::from_ref(batch), i, lr)?.loss))
    }

    fn simple(&self) -> Result<Vec<f64>> {
        let parameters = Parameters::init(&self.model, SEED, &self.device)?;
        let mut simple = Simple::new(&self.config, &self.model, parameters)?;
        self.losses(|_, batch, lr| simple.step(batch, lr))
    }

    fn check(&self) -> Result<()> {
        let (fast, simple) = (self.fast()?, self.simple()?);
        for (i, (fast, simple)) in fast.iter().zip(&simple).enumerate().step_by(100) {
            println!("{i:>6} {fast:.5} {simple:.5}");
        }
        let apart = |(fast, simple): (&f64, &f64)| (fast / simple - 1.0).abs();
        let first = fast.iter().zip(&simple).take(FIRST_STEPS).map(apart);
        let first = first.fold(0.0, f64::max);
        let ends = [&fast, &simple].map(|losses| mean(&losses[losses.len() * 4 / 5..]));
        let last = apart((&ends[0], &ends[1]));
        println!(
            "means over the last fifth: {ends:.5?}; apart: first {first:.1e}, last {last:.1e}"
        );
        let bound = first_bound(self.config.dtype);
        ensure!(first < bound, "the first losses are {first:e} apart");
        ensure!(last < LAST_BOUND, "the last losses are {last:e} apart");
        ensure!(ends[0] < 0.85 * fast[0], "it did not learn");
        Ok(())
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Value of an environment variable.
fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The one asked for, or the CPU and a GPU where there is one. With the environment variable
/// `REQUIRE_CUDA` there must be.
fn devices() -> Result<Vec<Device>> {
    if let Some(name) = setting("DEVICE") {
        return Ok(vec![open_device(&name)?]);
    }
    let mut devices = vec![Device::Cpu];
    match open_device("cuda") {
        Ok(device) => devices.push(device),
        Err(error) if setting("REQUIRE_CUDA").is_some() => return Err(error),
        Err(error) => println!("CUDA: skipped, {error:#}"),
    }
    Ok(devices)
}

#[test]
fn losses_equal_those_of_the_simple_step() -> Result<()> {
    let steps = setting("STEPS").map_or(Ok(40), |steps| steps.parse())?;
    let dtype = setting("DTYPE").unwrap_or("f32".into());
    let config = TrainConfig {
        steps,
        warmup_ratio: 0.1,
        weight_decay: 0.1,
        dtype: Precision::from_str(&dtype, false).map_err(Error::msg)?,
        ..TrainConfig::default()
    };
    let cache = tempfile::tempdir()?;
    let data = Data::open(&DataConfig {
        sources: setting("DATA").into_iter().collect(),
        vocab_size: Some(2000),
        corpus_documents: 400,
        cache_dir: Some(cache.path().into()),
        ..DataConfig::default()
    })?;
    let batches = BatchConfig {
        seq_len: 64,
        batch_size: 8,
        seed: SEED,
        ..BatchConfig::default()
    };
    let size = ModelSize {
        num_hidden_layers: 2,
        num_attention_heads: 2,
        ..ModelSize::default()
    };
    for device in devices()? {
        for variant in [ModelType::Bert, ModelType::Roformer] {
            println!(
                "{} on {:?}, {:?}",
                variant.name(),
                device.location(),
                config.dtype
            );
            let vocab_size = data.tokenizer.vocab_size();
            let run = Run {
                config: config.clone(),
                model: size.config(variant, Objective::Mlm, vocab_size, batches.seq_len)?,
                batches: Batches::training(data.train.clone(), &data.tokenizer, batches.clone())?,
                device: device.clone(),
            };
            run.check()?;
        }
    }
    Ok(())
}

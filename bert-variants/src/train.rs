//! The training loop.

mod graphs;
mod learner;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{AdamW, Parameter, Profile, global_norm};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, ModelCard};
use crate::config::BertConfig;
use crate::data::{Batch, Batches};
use crate::memory::PeakMeter;
use crate::model::LanguageModel;
use crate::parameters::{ParameterCounts, Parameters};
use crate::record::{
    EvalRecord, LengthRecord, METRICS_FILE, Record, RunHeader, RunSummary, RunWriter, TrainRecord,
    read_run,
};
use crate::schedule::{Decay, Schedule};
use crate::tokenizer::Tokenizer;

use learner::Core;
pub(crate) use learner::explain_out_of_memory;
pub use learner::{Learner, Update};

/// Name of the checkpoint inside a run's folder.
pub const CHECKPOINT_DIR: &str = "checkpoint";

/// How a model is trained. All but `gradient_checkpointing`, `cuda_graphs` and the last three decide the
/// result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Training")]
pub struct TrainConfig {
    /// Optimizer steps.
    #[arg(long, default_value_t = TrainConfig::default().steps)]
    pub steps: u64,
    /// Sequences of --seq-len tokens in one pass.
    #[arg(long, default_value_t = TrainConfig::default().batch_size)]
    pub batch_size: usize,
    /// Passes whose gradients make one optimizer step.
    #[arg(long, default_value_t = TrainConfig::default().gradient_accumulation)]
    pub gradient_accumulation: usize,
    /// Highest learning rate.
    #[arg(long, default_value_t = TrainConfig::default().lr)]
    pub lr: f64,
    /// Where the learning rate would fall to after the last step, as a share of the highest.
    #[arg(long, default_value_t = TrainConfig::default().min_lr_ratio)]
    pub min_lr_ratio: f64,
    /// Share of the steps over which the learning rate rises.
    #[arg(long, default_value_t = TrainConfig::default().warmup_ratio)]
    pub warmup_ratio: f64,
    /// How the learning rate falls.
    #[arg(long, value_enum, default_value_t = TrainConfig::default().decay)]
    pub decay: Decay,
    /// AdamW's weight decay; biases and LayerNorm have none.
    #[arg(long, default_value_t = TrainConfig::default().weight_decay)]
    pub weight_decay: f64,
    /// AdamW's decay of the first moment.
    #[arg(long, default_value_t = TrainConfig::default().adam_beta1)]
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment.
    #[arg(long, default_value_t = TrainConfig::default().adam_beta2)]
    pub adam_beta2: f64,
    /// AdamW's epsilon.
    #[arg(long, default_value_t = TrainConfig::default().adam_epsilon)]
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this global norm.
    #[arg(long, default_value_t = TrainConfig::default().max_grad_norm)]
    pub max_grad_norm: f64,
    /// Keep of each layer its input alone for the backward pass, which runs the layer again.
    #[arg(long, action = clap::ArgAction::Set, default_value_t = TrainConfig::default().gradient_checkpointing, num_args = 0..=1, default_missing_value = "true")]
    pub gradient_checkpointing: bool,
    /// On a GPU, launch steps of up to 8192 tokens as CUDA graphs where lengths of sequences come again
    /// and there is no dropout. They take the memory of a step once more.
    #[arg(long, action = clap::ArgAction::Set, default_value_t = TrainConfig::default().cuda_graphs, num_args = 0..=1, default_missing_value = "true")]
    pub cuda_graphs: bool,
    /// Arithmetic of the model; weights and optimizer are f32 always.
    #[arg(long, value_enum, default_value_t = TrainConfig::default().dtype)]
    pub dtype: Precision,
    /// Steps between training records; evaluations and checkpoints make one too.
    #[arg(long, default_value_t = TrainConfig::default().log_every)]
    pub log_every: u64,
    /// Steps between evaluations.
    #[arg(long, default_value_t = TrainConfig::default().eval_every)]
    pub eval_every: u64,
    /// Steps between checkpoints.
    #[arg(long, default_value_t = TrainConfig::default().save_every)]
    pub save_every: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 600,
            batch_size: 16,
            gradient_accumulation: 1,
            lr: 1e-3,
            min_lr_ratio: 0.0,
            warmup_ratio: 0.06,
            decay: Decay::Linear,
            weight_decay: 0.01,
            adam_beta1: 0.9,
            adam_beta2: 0.98,
            adam_epsilon: 1e-6,
            max_grad_norm: 1.0,
            gradient_checkpointing: false,
            cuda_graphs: true,
            dtype: Precision::F32,
            log_every: 10,
            eval_every: 100,
            save_every: 200,
        }
    }
}

impl TrainConfig {
    /// # Errors
    /// Names the setting, its value and the values expected.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("steps", self.steps),
            ("batch_size", self.batch_size as u64),
            ("gradient_accumulation", self.gradient_accumulation as u64),
            ("log_every", self.log_every),
            ("eval_every", self.eval_every),
            ("save_every", self.save_every),
        ] {
            ensure!(value > 0, "{name} must be at least 1, got 0");
        }
        for (name, value) in [
            ("lr", self.lr),
            ("adam_epsilon", self.adam_epsilon),
            ("max_grad_norm", self.max_grad_norm),
        ] {
            ensure!(
                value.is_finite() && value > 0.0,
                "{name} must be positive and finite, got {value}"
            );
        }
        for (name, value) in [
            ("adam_beta1", self.adam_beta1),
            ("adam_beta2", self.adam_beta2),
        ] {
            ensure!(
                (0.0..1.0).contains(&value),
                "{name} must be in [0, 1), got {value}"
            );
        }
        for (name, value) in [
            ("min_lr_ratio", self.min_lr_ratio),
            ("warmup_ratio", self.warmup_ratio),
            ("weight_decay", self.weight_decay),
        ] {
            ensure!(
                (0.0..=1.0).contains(&value),
                "{name} must be in [0, 1], got {value}"
            );
        }
        Ok(())
    }

    /// Learning rates of a run.
    pub fn schedule(&self) -> Schedule {
        Schedule {
            peak: self.lr,
            total_steps: self.steps,
            warmup_steps: (self.warmup_ratio * self.steps as f64).round() as u64,
            decay: self.decay,
            min_ratio: self.min_lr_ratio,
        }
    }

    fn optimizer(&self, parameters: &Parameters) -> Result<AdamW> {
        let parameters = parameters.trained().map(|(name, var)| Parameter {
            var: var.clone(),
            weight_decay: if decays(name) { self.weight_decay } else { 0.0 },
            rounded: parameters.rounded(name),
        });
        let betas = (self.adam_beta1, self.adam_beta2);
        Ok(AdamW::new(parameters.collect(), betas, self.adam_epsilon)?)
    }
}

/// Arithmetic of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// Activations and matrix products in bfloat16, sums in f32.
    Bf16,
}

impl Precision {
    /// Candle's name for it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// The batches of a run.
pub struct RunData {
    /// Training batches, of `batch_size` sequences.
    pub train: Arc<Batches>,
    /// Held-out batches.
    pub eval: Vec<Batch>,
    /// Held-out batches for the trained model, by length of their sequences.
    pub lengths: Vec<(usize, Vec<Batch>)>,
}

/// How [`Trainer::train`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// Stopped on request; the checkpoint continues from there.
    Interrupted,
}

/// A model in training, written to a folder: `metrics.jsonl`, `tensorboard/`, and `checkpoint/`,
/// which is a Hugging Face directory with the optimizer's state beside the model.
pub struct Trainer {
    checkpoint: PathBuf,
    config: TrainConfig,
    model_config: BertConfig,
    tokenizer: Tokenizer,
    learner: Learner,
    writer: RunWriter,
    progress: Progress,
    card: ModelCard,
    window: Window,
    clock: Stopwatch,
    /// Steps to come before one is profiled.
    profile_in: Option<u64>,
}

/// What a checkpoint says of the run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Seconds of training, evaluation and checkpoints left out.
    pub seconds: f64,
    /// Highest memory of a step, see [`RunSummary::peak_activation_bytes`].
    pub peak_activation_bytes: u64,
    /// Speed of the latest evaluation.
    pub inference_tokens_per_second: f64,
}

/// Steps since the last training record.
#[derive(Default)]
struct Window {
    losses: Vec<Tensor>,
    grad_norms: Vec<Tensor>,
    tokens: u64,
    lr: f64,
}

impl Trainer {
    /// Starts the run that `header` describes in the folder `dir`, or continues the one there
    /// from its checkpoint.
    ///
    /// # Errors
    /// When `dir` holds a run and `resume` is false, or a run with other settings, or cannot be
    /// written; when memory runs out.
    pub fn new(
        dir: &Path,
        header: &RunHeader,
        config: &TrainConfig,
        model_config: &BertConfig,
        tokenizer: Tokenizer,
        device: &Device,
        resume: bool,
    ) -> Result<Self> {
        config.validate()?;
        let seed = header.seed;
        let resume = resume && dir.join(METRICS_FILE).exists();
        if resume {
            read_run(dir)?.header.check_resumable_as(header)?;
        }
        let checkpoint = dir.join(CHECKPOINT_DIR);
        let found = resume && checkpoint::find_dir(&checkpoint)?;
        let (parameters, progress) = if found {
            checkpoint::read_training(&checkpoint, model_config, device)?
        } else {
            (
                Parameters::init(model_config, seed, device)?,
                Progress::default(),
            )
        };
        let mut learner = Learner::new(config, model_config, parameters, seed)?;
        if found {
            let Core {
                parameters,
                optimizer,
                ..
            } = &mut learner.core;
            checkpoint::read_optimizer(&checkpoint, parameters, optimizer, &progress)?;
        }
        let writer = if resume {
            RunWriter::resume(dir, found.then_some(progress.step), header)?
        } else {
            RunWriter::create(dir, header)?
        };
        Ok(Self {
            clock: Stopwatch::new(progress.seconds),
            checkpoint,
            config: config.clone(),
            model_config: model_config.clone(),
            tokenizer,
            learner,
            writer,
            progress,
            card: ModelCard {
                data: Some(header.data.clone()),
                seed: Some(seed),
                ..ModelCard::default()
            },
            window: Window::default(),
            profile_in: None,
        })
    }

    /// Shows where the time of one step goes, once `steps` others are done.
    pub fn with_profile_in(mut self, steps: Option<u64>) -> Self {
        self.profile_in = steps;
        self
    }

    /// Trains to the end, or until `stop` is set.
    ///
    /// # Errors
    /// When loss or gradients are not finite, which leaves the last checkpoint as it was; when
    /// data cannot be read, files not be written, or memory runs out.
    pub fn train(&mut self, data: &RunData, stop: &AtomicBool) -> Result<Outcome> {
        let passes = self.config.gradient_accumulation;
        let schedule = self.config.schedule();
        let device = self.learner.core.parameters.device().clone();
        let bar = progress_bar(&self.config, self.progress.step);
        if self.progress.step == 0 {
            self.evaluate(&data.eval, &bar)?;
        }
        let mut batches = data.train.prefetch(self.progress.step * passes as u64)?;
        self.clock.start();
        while self.progress.step < self.config.steps {
            let batches = batches.by_ref().take(passes).collect::<Result<Vec<_>>>()?;
            let meter = PeakMeter::start(&device)?;
            let profile = self.start_profile()?;
            self.window.lr = schedule.lr(self.progress.step);
            let (step, lr) = (self.progress.step, self.window.lr);
            let update = self.learner.step(&batches, step, lr)?;
            self.finish_profile(profile, &bar)?;
            self.count_step(&batches, &update, meter.peak_bytes()?);
            self.check_finite(&update)?;

            bar.set_position(self.progress.step);
            let stopped = stop.load(Ordering::Relaxed);
            let last = self.progress.step == self.config.steps;
            let due = |every: u64| last || self.progress.step.is_multiple_of(every);
            let (log, eval, save) = (
                due(self.config.log_every),
                due(self.config.eval_every),
                due(self.config.save_every),
            );
            if log || eval || save || stopped {
                self.log(&bar)?;
            }
            if eval {
                self.evaluate(&data.eval, &bar)?;
            }
            if save || stopped {
                self.save()?;
            }
            if stopped && !last {
                return Ok(Outcome::Interrupted);
            }
        }
        self.evaluate_lengths(&data.lengths, &bar)?;
        self.finish()?;
        Ok(Outcome::Finished)
    }

    fn start_profile(&mut self) -> Result<Option<Profile>> {
        let now = self.profile_in == Some(0);
        self.profile_in = self.profile_in.and_then(|steps| steps.checked_sub(1));
        Ok(match now {
            true => Some(Profile::start(self.learner.core.parameters.device())?),
            false => None,
        })
    }

    fn finish_profile(&self, profile: Option<Profile>, bar: &ProgressBar) -> Result<()> {
        let Some(profile) = profile else {
            return Ok(());
        };
        profile.mark("step", "clipping and optimizer");
        let parts = profile.finish()?;
        let total: f64 = parts.iter().map(|part| part.seconds).sum();
        let rows = parts.iter().map(|part| {
            format!(
                "{:>9.3} ms {:>5.1} % {:>4} x {} {}\n",
                part.seconds * 1e3,
                100.0 * part.seconds / total,
                part.calls,
                part.pass,
                part.name
            )
        });
        let table: String = rows.collect();
        bar.suspend(|| tracing::info!("one step took {:.3} ms:\n{table}", total * 1e3));
        Ok(())
    }

    fn count_step(&mut self, batches: &[Batch], update: &Update, peak: u64) {
        let tokens = batches
            .iter()
            .map(|batch| batch.input_ids.len() as u64)
            .sum::<u64>();
        self.window.losses.push(update.loss.clone());
        self.window.grad_norms.push(update.grad_norm.clone());
        self.window.tokens += tokens;
        self.progress.step += 1;
        self.progress.tokens += tokens;
        self.progress.peak_activation_bytes = self.progress.peak_activation_bytes.max(peak);
    }

    /// On the CPU, where reading a number is free. A GPU must be waited for: there, [`Self::log`]
    /// finds out. The optimizer skips an update whose norm is not finite in either case.
    fn check_finite(&self, update: &Update) -> Result<()> {
        if !update.loss.device().is_cpu() {
            return Ok(());
        }
        let loss = update.loss.to_scalar::<f32>()?;
        let norm = update.grad_norm.to_scalar::<f32>()?;
        if loss.is_finite() && norm.is_finite() {
            return Ok(());
        }
        let mut bad = Vec::new();
        let trained = self.learner.core.parameters.trained();
        for ((name, _), gradient) in trained.zip(&update.gradients) {
            if !global_norm(std::slice::from_ref(gradient))?
                .to_scalar::<f32>()?
                .is_finite()
            {
                bad.push(name);
            }
        }
        bad.truncate(5);
        if bad.is_empty() {
            bad.push("none");
        }
        bail!(
            "step {}: loss {loss}, gradient norm {norm}; the first gradients that are not finite: {}. \
             The update was not applied, and the last checkpoint is as it was; try a lower --lr or a longer --warmup-ratio",
            self.progress.step,
            bad.join(", ")
        )
    }

    /// Writes the mean of the window as a record and empties it.
    fn log(&mut self, bar: &ProgressBar) -> Result<()> {
        let window = std::mem::take(&mut self.window);
        if window.losses.is_empty() {
            return Ok(());
        }
        let losses: Vec<f32> = Tensor::stack(&window.losses, 0)?.to_vec1()?;
        let norms: Vec<f32> = Tensor::stack(&window.grad_norms, 0)?.to_vec1()?;
        let seconds = self.clock.seconds();
        let record = TrainRecord {
            step: self.progress.step,
            tokens: self.progress.tokens,
            loss: mean(&losses),
            lr: window.lr,
            grad_norm: mean(&norms),
            tokens_per_second: window.tokens as f64 / (seconds - self.progress.seconds),
            seconds,
        };
        self.progress.seconds = seconds;
        self.writer.write(&Record::Train(record))?;
        bar.set_message(format!(
            "loss {:.3}, lr {:.1e}, {:.0} tokens/s",
            record.loss, record.lr, record.tokens_per_second
        ));
        ensure!(
            record.loss.is_finite() && record.grad_norm.is_finite(),
            "steps {} to {}: losses {losses:?}, gradient norms {norms:?} are not all finite. Updates \
             with such gradients were not applied, and the last checkpoint is as it was; try a lower --lr or a longer --warmup-ratio",
            record.step + 1 - losses.len() as u64,
            record.step
        );
        Ok(())
    }

    /// The model without dropout.
    fn evaluation_model(&self) -> Result<LanguageModel> {
        let dtype = self.config.dtype.dtype();
        LanguageModel::new(
            &self.model_config,
            &self.learner.core.parameters,
            false,
            dtype,
        )
    }

    /// Writes loss and accuracy on held-out text.
    fn evaluate(&mut self, batches: &[Batch], bar: &ProgressBar) -> Result<()> {
        self.clock.pause();
        let model = self.evaluation_model()?;
        let start = Instant::now();
        let score = model.evaluate(batches)?;
        self.progress.inference_tokens_per_second =
            score.tokens as f64 / start.elapsed().as_secs_f64();
        let record = EvalRecord {
            step: self.progress.step,
            tokens: self.progress.tokens,
            loss: score.loss,
            accuracy: score.accuracy,
            perplexity: score.loss.exp(),
        };
        self.writer.write(&Record::Eval(record))?;
        self.card.results = vec![
            ("loss".into(), record.loss),
            ("accuracy".into(), record.accuracy),
        ];
        bar.suspend(|| {
            tracing::info!(
                "step {:>6}: eval loss {:.4}, accuracy {:.4}, perplexity {:.1}",
                record.step,
                record.loss,
                record.accuracy,
                record.perplexity
            );
        });
        self.clock.start();
        Ok(())
    }

    /// Writes loss and accuracy of the trained model on inputs of each length.
    fn evaluate_lengths(
        &mut self,
        lengths: &[(usize, Vec<Batch>)],
        bar: &ProgressBar,
    ) -> Result<()> {
        let model = self.evaluation_model()?;
        for (seq_len, batches) in lengths {
            let score = model.evaluate(batches)?;
            let record = LengthRecord {
                step: self.progress.step,
                seq_len: *seq_len as u64,
                loss: score.loss,
                accuracy: score.accuracy,
            };
            self.writer.write(&Record::Length(record))?;
            bar.suspend(|| {
                tracing::info!(
                    "inputs of {seq_len} tokens: eval loss {:.4}, accuracy {:.4}",
                    record.loss,
                    record.accuracy
                );
            });
        }
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.clock.pause();
        self.card.steps = Some(self.progress.step);
        self.card.tokens = Some(self.progress.tokens);
        checkpoint::save_training(
            &self.checkpoint,
            &self.model_config,
            &self.learner.core.parameters,
            &self.tokenizer,
            &self.learner.core.optimizer,
            &self.progress,
            &self.card,
        )?;
        self.clock.start();
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let Progress {
            step,
            tokens,
            seconds,
            peak_activation_bytes,
            inference_tokens_per_second,
        } = self.progress;
        self.writer.write(&Record::Summary(RunSummary {
            step,
            seconds,
            train_tokens_per_second: tokens as f64 / seconds,
            inference_tokens_per_second,
            peak_activation_bytes,
            // Two f32 moments.
            optimizer_bytes: 8 * ParameterCounts::of(&self.model_config).all,
        }))
    }
}

/// Whether AdamW decays a parameter: not biases and LayerNorm, as in Devlin et al. 2018.
pub(crate) fn decays(name: &str) -> bool {
    !name.ends_with(".bias") && !name.contains("LayerNorm")
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64
}

fn progress_bar(config: &TrainConfig, step: u64) -> ProgressBar {
    let template = "{bar:30} {pos}/{len} {msg}, {eta} left";
    let bar = ProgressBar::new(config.steps).with_position(step);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.reset_eta();
    bar
}

/// Time that can be paused; starts paused.
struct Stopwatch {
    before: Duration,
    running_since: Option<Instant>,
}

impl Stopwatch {
    fn new(seconds: f64) -> Self {
        Self {
            before: Duration::from_secs_f64(seconds),
            running_since: None,
        }
    }

    fn seconds(&self) -> f64 {
        let running = self
            .running_since
            .map_or(Duration::ZERO, |since| since.elapsed());
        (self.before + running).as_secs_f64()
    }

    fn pause(&mut self) {
        if let Some(since) = self.running_since.take() {
            self.before += since.elapsed();
        }
    }

    fn start(&mut self) {
        self.running_since.get_or_insert_with(Instant::now);
    }
}

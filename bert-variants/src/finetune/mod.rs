//! Fine-tuning on labelled texts: what the program `finetune` does.

mod data;
mod metrics;
mod optimizer;
mod records;
mod report;
mod run;
mod state;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

pub use data::{Dataset, Example, Label, Split, TaskConfig, TaskName};
pub use metrics::Metric;
pub use records::{Evaluation, FinetuneRecord, SeedResult};

use crate::pretrain::open_device;
use crate::record::{METRICS_FILE, write_atomic};
use crate::schedule::Decay;
use crate::train::{Outcome, Precision};
use run::Run;
use state::Stopped;

/// Everything that decides what is trained and where it is written.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct FinetuneConfig {
    /// Which runs, and where.
    #[command(flatten)]
    pub run: RunsConfig,
    /// Texts and labels.
    #[command(flatten)]
    pub data: TaskConfig,
    /// Optimisation.
    #[command(flatten)]
    pub train: FinetuneTraining,
}

/// Which runs to make, and where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Runs")]
pub struct RunsConfig {
    /// Model directory to start from, or a Hub id owner/name or owner/name@revision.
    #[arg(long, default_value_t = RunsConfig::default().model)]
    pub model: String,
    /// Give a model that takes shorter texts than --max-length positions for these: a table of learned
    /// positions is interpolated.
    #[arg(long, action = clap::ArgAction::Set, default_value_t = RunsConfig::default().resize_positions, num_args = 0..=1, default_missing_value = "true")]
    pub resize_positions: bool,
    /// Seeds: of the new head, order of texts and dropout; a run each.
    #[arg(long, value_delimiter = ',', default_values_t = RunsConfig::default().seeds)]
    pub seeds: Vec<u64>,
    /// Folder for models, predictions, records and the report.
    #[arg(long, default_value = "finetuned")]
    pub out: PathBuf,
    /// cpu, cuda, or cuda:N for the GPU of that number.
    #[arg(long, default_value_t = RunsConfig::default().device)]
    pub device: String,
}

impl Default for RunsConfig {
    fn default() -> Self {
        Self {
            model: "google-bert/bert-base-uncased".into(),
            resize_positions: false,
            seeds: vec![0],
            out: "finetuned".into(),
            device: "cpu".into(),
        }
    }
}

/// How a model is fine-tuned; the defaults are those of transformers' `run_glue.py`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Training")]
pub struct FinetuneTraining {
    /// Passes over the training texts.
    #[arg(long, default_value_t = FinetuneTraining::default().epochs)]
    pub epochs: u64,
    /// Texts of one optimizer step.
    #[arg(long, default_value_t = FinetuneTraining::default().batch_size)]
    pub batch_size: usize,
    /// Highest learning rate.
    #[arg(long, default_value_t = FinetuneTraining::default().lr)]
    pub lr: f64,
    /// Factor on the learning rate of each layer, over that of the layer above it.
    #[arg(long, default_value_t = FinetuneTraining::default().layer_decay)]
    pub layer_decay: f64,
    /// Keep the embeddings and this many first layers as they are [default: train all]
    #[arg(long)]
    pub freeze_layers: Option<usize>,
    /// Share of the steps over which the learning rate rises.
    #[arg(long, default_value_t = FinetuneTraining::default().warmup_ratio)]
    pub warmup_ratio: f64,
    /// How the learning rate falls.
    #[arg(long, value_enum, default_value_t = FinetuneTraining::default().decay)]
    pub decay: Decay,
    /// AdamW's weight decay; biases and LayerNorm have none.
    #[arg(long, default_value_t = FinetuneTraining::default().weight_decay)]
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm.
    #[arg(long, default_value_t = FinetuneTraining::default().max_grad_norm)]
    pub max_grad_norm: f64,
    /// Share of the target probability that all classes have in equal parts.
    #[arg(long, default_value_t = FinetuneTraining::default().label_smoothing)]
    pub label_smoothing: f64,
    /// Evaluations in each epoch.
    #[arg(long, default_value_t = FinetuneTraining::default().evals_per_epoch)]
    pub evals_per_epoch: u64,
    /// Stop after this many evaluations without a better score [default: never]
    #[arg(long)]
    pub patience: Option<usize>,
    /// Arithmetic of the model; weights and optimizer are f32 always.
    #[arg(long, value_enum, default_value_t = FinetuneTraining::default().dtype)]
    pub dtype: Precision,
    /// Steps between training records.
    #[arg(long, default_value_t = FinetuneTraining::default().log_every)]
    pub log_every: u64,
}

impl Default for FinetuneTraining {
    fn default() -> Self {
        Self {
            epochs: 3,
            batch_size: 32,
            lr: 2e-5,
            layer_decay: 1.0,
            freeze_layers: None,
            warmup_ratio: 0.0,
            decay: Decay::Linear,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            label_smoothing: 0.0,
            evals_per_epoch: 1,
            patience: None,
            dtype: Precision::F32,
            log_every: 20,
        }
    }
}

impl FinetuneTraining {
    /// # Errors
    /// Names the setting, its value and the values expected.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("epochs", self.epochs),
            ("batch_size", self.batch_size as u64),
            ("evals_per_epoch", self.evals_per_epoch),
            ("log_every", self.log_every),
        ] {
            ensure!(value > 0, "{name} must be at least 1, got 0");
        }
        for (name, value) in [("lr", self.lr), ("max_grad_norm", self.max_grad_norm)] {
            ensure!(
                value.is_finite() && value > 0.0,
                "{name} must be positive and finite, got {value}"
            );
        }
        ensure!(
            self.layer_decay > 0.0 && self.layer_decay <= 1.0,
            "layer_decay must be above 0 and at most 1, got {}",
            self.layer_decay
        );
        for (name, value) in [
            ("warmup_ratio", self.warmup_ratio),
            ("weight_decay", self.weight_decay),
            ("label_smoothing", self.label_smoothing),
        ] {
            ensure!(
                (0.0..=1.0).contains(&value),
                "{name} must be in [0, 1], got {value}"
            );
        }
        Ok(())
    }
}

/// Fine-tunes the model once for each seed, and writes the report on all of them.
///
/// `OUT/seedN` holds the best model of seed N (a Hugging Face directory `model`), its predictions
/// of the texts evaluated on and of `predict_file`, and its records. A run already there is an
/// error, unless `resume` leaves it where it is finished, goes on from where `stop` ended it last, to the
/// same result, and makes it again where it was killed before any stop. Returns the report's path, `None`
/// where `stop` ended it early.
///
/// # Errors
/// When a setting is wrong, a file cannot be read or written, a run is there already or had other
/// settings, or a loss is not finite.
pub fn finetune(
    config: &FinetuneConfig,
    resume: bool,
    stop: &AtomicBool,
) -> Result<Option<PathBuf>> {
    config.train.validate()?;
    let RunsConfig {
        model, seeds, out, ..
    } = &config.run;
    ensure!(!seeds.is_empty(), "--seeds is empty, expected at least one");
    // Before the texts are read, which may take long.
    for (i, seed) in seeds.iter().enumerate() {
        ensure!(!seeds[..i].contains(seed), "seed {seed} is asked for twice");
        let dir = seed_dir(out, *seed);
        ensure!(
            resume || !dir.join(METRICS_FILE).exists(),
            "{} already holds a run: resume it with --resume, or choose another --out",
            dir.display()
        );
        SeedResult::read(&dir, config)?;
    }
    let device = open_device(&config.run.device)?;
    let dataset = Dataset::read(&config.data)?;
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    write_atomic(
        &out.join("settings.toml"),
        toml::to_string_pretty(config)?.as_bytes(),
    )?;
    let mut results = Vec::new();
    for seed in seeds {
        let dir = seed_dir(out, *seed);
        if let Some(result) = SeedResult::read(&dir, config)? {
            tracing::info!("seed {seed} is finished already");
            Stopped::remove(&dir)?;
            results.push(result);
            continue;
        }
        let run = Run::new(config, &dataset, *seed, &dir, &device, resume)
            .with_context(|| format!("cannot fine-tune {model}"))?;
        match run.train(stop)? {
            Outcome::Finished => results.extend(SeedResult::read(&dir, config)?),
            Outcome::Interrupted => return Ok(None),
        }
    }
    let path = out.join("report.html");
    write_atomic(&path, report::render(config, &dataset, &results).as_bytes())?;
    Ok(Some(path))
}

fn seed_dir(out: &Path, seed: u64) -> PathBuf {
    out.join(format!("seed{seed}"))
}

//! What a fine-tuning run writes down: one JSON object a line, read again by the report and by
//! `--resume`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::FinetuneConfig;
use crate::record::{METRICS_FILE, check_same, flatten, float, write_atomic};

/// One line of a run's `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum FinetuneRecord {
    /// First line: what was run.
    Run {
        /// Seed of head, order and dropout.
        seed: u64,
        /// All settings.
        settings: Value,
        /// Hugging Face model configuration.
        model_config: Value,
    },
    /// The mean over the steps since the last such line.
    Train {
        /// Optimizer steps done.
        step: u64,
        /// Mean loss.
        loss: f64,
        /// Learning rate of the last step, of the head.
        lr: f64,
        /// Mean global gradient norm before clipping.
        grad_norm: f64,
    },
    /// One pass over the training texts.
    Epoch {
        /// Which one, from 1.
        epoch: u64,
        /// Seconds of training, without evaluations.
        seconds: f64,
    },
    /// One evaluation.
    Eval(Evaluation),
    /// Last line, after the model was saved.
    Summary {
        /// Step of the best evaluation, whose model was kept.
        best_step: u64,
        /// Seconds of training, without evaluations.
        seconds: f64,
        /// The same for one epoch.
        seconds_per_epoch: f64,
    },
}

/// Results on held-out texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Optimizer steps done.
    pub step: u64,
    /// Which texts.
    pub split: String,
    /// Mean loss.
    #[serde(with = "float")]
    pub loss: f64,
    /// Results by the name of the metric.
    pub metrics: Vec<(String, f64)>,
}

impl Evaluation {
    /// The mean of the metrics, by which models are compared.
    pub fn score(&self) -> f64 {
        let sum: f64 = self.metrics.iter().map(|(_, value)| value).sum();
        sum / self.metrics.len() as f64
    }
}

/// What came out of one seed.
#[derive(Debug, Clone, PartialEq)]
pub struct SeedResult {
    /// Seed of head, order and dropout.
    pub seed: u64,
    /// Of the best model, one for each split.
    pub best: Vec<Evaluation>,
    /// All evaluations of the first split.
    pub evaluations: Vec<Evaluation>,
    /// Seconds of training for an epoch.
    pub seconds_per_epoch: f64,
}

impl SeedResult {
    /// What the run in the folder `dir` came to, `None` where it did not reach its end.
    ///
    /// # Errors
    /// When the records cannot be read, or are of a run with other settings.
    pub(super) fn read(dir: &Path, config: &FinetuneConfig) -> Result<Option<Self>> {
        let path = dir.join(METRICS_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let records = read_records(&path)?;
        let Some((FinetuneRecord::Run { seed, settings, .. }, rest)) = records.split_first() else {
            return Ok(None);
        };
        let now = serde_json::to_value(config)?;
        check_same(&comparable(settings), &comparable(&now))
            .with_context(|| format!("cannot go on with {}", dir.display()))?;
        let Some(FinetuneRecord::Summary {
            best_step,
            seconds_per_epoch,
            ..
        }) = rest.last()
        else {
            return Ok(None);
        };
        let mut evaluations: Vec<Evaluation> = rest
            .iter()
            .filter_map(|record| match record {
                FinetuneRecord::Eval(evaluation) => Some(evaluation.clone()),
                _ => None,
            })
            .collect();
        let mut best = evaluations.clone();
        best.retain(|evaluation| evaluation.step == *best_step);
        let first = best
            .first()
            .with_context(|| format!("{} has no evaluation at step {best_step}", path.display()))?;
        evaluations.retain(|evaluation| evaluation.split == first.split);
        Ok(Some(Self {
            seed: *seed,
            best,
            evaluations,
            seconds_per_epoch: *seconds_per_epoch,
        }))
    }
}

/// All whole lines: a process that is killed may leave half of one.
fn read_records(path: &Path) -> Result<Vec<FinetuneRecord>> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(line, number): (&str, usize)| {
        serde_json::from_str(line)
            .with_context(|| format!("{}: line {number} is damaged", path.display()))
    };
    whole.lines().zip(1..).map(parse).collect()
}

/// Keeps the records of a run up to a step, after which it was stopped, in an epoch with `epochs` before it.
/// False where there is no such run.
pub(super) fn keep_records(path: &Path, step: u64, epochs: u64) -> Result<bool> {
    if !path.exists() {
        return Ok(false);
    }
    let mut kept = Vec::new();
    let records = read_records(path)?;
    let begins = matches!(records.first(), Some(FinetuneRecord::Run { .. }));
    for record in records {
        let keep = match &record {
            FinetuneRecord::Run { .. } => true,
            FinetuneRecord::Train { step: at, .. } => *at <= step,
            FinetuneRecord::Epoch { epoch, .. } => *epoch <= epochs,
            FinetuneRecord::Eval(evaluation) => evaluation.step <= step,
            FinetuneRecord::Summary { .. } => false,
        };
        if keep {
            serde_json::to_writer(&mut kept, &record)?;
            kept.push(b'\n');
        }
    }
    write_atomic(path, &kept)?;
    Ok(begins)
}

/// The settings that decide a result, by dotted path.
fn comparable(settings: &Value) -> BTreeMap<String, String> {
    let mut flat = BTreeMap::new();
    flatten("", settings, &mut flat);
    flat.retain(|key, _| {
        let other = ["run.seeds", "run.out", "run.device", "train.log_every"];
        !other.contains(&key.as_str())
    });
    flat
}

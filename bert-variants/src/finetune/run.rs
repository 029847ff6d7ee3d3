//! One fine-tuning run.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_rope_attn::ops::{AdamW, Gradients, Parameter, Tape, global_norm};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::data::{Dataset, Example, Label};
use super::{FinetuneConfig, FinetuneTraining};
use crate::checkpoint::{ModelCard, from_pretrained_as, save_pretrained};
use crate::config::{BertConfig, ProblemType, Task};
use crate::model::{SequenceClassifier, Targets, classification_loss};
use crate::parameters::Parameters;
use crate::record::METRICS_FILE;
use crate::schedule::Schedule;
use crate::text::{Encoded, Text, TextEncoder};
use crate::tokenizer::Tokenizer;
use crate::train::decays;

/// Texts of one pass in evaluation.
const EVAL_BATCH: usize = 64;

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
    /// One evaluation.
    Eval(Evaluation),
    /// Last line.
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

/// A model with all it takes to train it.
pub(super) struct Run<'a> {
    config: &'a FinetuneConfig,
    dataset: &'a Dataset,
    seed: u64,
    dir: PathBuf,
    model_config: BertConfig,
    parameters: Parameters,
    encoder: TextEncoder,
    records: File,
    step: u64,
}

/// Steps since the last training record.
#[derive(Default)]
struct Window {
    losses: Vec<Tensor>,
    norms: Vec<Tensor>,
    lr: f64,
}

/// The evaluations so far.
#[derive(Default)]
struct History {
    /// Of the first split.
    evaluations: Vec<Evaluation>,
    /// The best one, of all splits, and its weights.
    best: Option<(Vec<Evaluation>, Vec<Tensor>)>,
    /// Evaluations since.
    worse: usize,
}

impl History {
    fn add(&mut self, found: Vec<Evaluation>, parameters: &Parameters) -> Result<()> {
        self.evaluations.push(found[0].clone());
        let highest = self.best.as_ref().map(|(best, _)| best[0].score());
        if highest.is_none_or(|highest| found[0].score() > highest) {
            self.best = Some((found, parameters.copy()?));
            self.worse = 0;
        } else {
            self.worse += 1;
        }
        Ok(())
    }
}

impl<'a> Run<'a> {
    pub fn new(
        config: &'a FinetuneConfig,
        dataset: &'a Dataset,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let as_classifier = |model: BertConfig| {
            model
                .with_task(Task::SequenceClassification)
                .with_labels(dataset.labels.clone(), dataset.problem_type)
        };
        let mut pretrained = from_pretrained_as(&config.run.model, as_classifier, seed, device)?;
        let model_config = pretrained.config;
        let tokenizer = Tokenizer::load(&pretrained.dir, None)?;
        let encoder = TextEncoder::new(tokenizer, &model_config, Some(config.data.max_length))?;
        if let Some(layers) = config.train.freeze_layers {
            pretrained
                .parameters
                .freeze(|name| depth(name, &model_config) <= layers);
        }
        let dir = config.run.out.join(format!("seed{seed}"));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join(METRICS_FILE);
        let records = OpenOptions::new().append(true).create_new(true).open(&path);
        let records = records.with_context(|| {
            format!(
                "cannot begin {}; a run that is there already is not overwritten",
                path.display()
            )
        })?;
        Ok(Self {
            config,
            dataset,
            seed,
            dir,
            model_config,
            parameters: pretrained.parameters,
            encoder,
            records,
            step: 0,
        })
    }

    /// Trains, and writes the best model and its predictions.
    pub fn train(mut self) -> Result<SeedResult> {
        let settings = &self.config.train;
        self.record(&FinetuneRecord::Run {
            seed: self.seed,
            settings: serde_json::to_value(self.config)?,
            model_config: serde_json::to_value(&self.model_config)?,
        })?;
        let dataset = self.dataset;
        let train = self.encode(&dataset.train)?;
        let steps_per_epoch = train.len().div_ceil(settings.batch_size) as u64;
        let eval_every = steps_per_epoch.div_ceil(settings.evals_per_epoch);
        let schedule = settings.schedule(settings.epochs * steps_per_epoch);
        let dtype = settings.dtype.dtype();
        let model = SequenceClassifier::new(&self.model_config, &self.parameters, true, dtype)?;
        let mut optimizer = LayerwiseAdamW::new(&self.parameters, &self.model_config, settings)?;

        let mut window = Window::default();
        let mut history = History::default();
        let mut seconds = Duration::ZERO;
        'epochs: for epoch in 0..settings.epochs {
            let order = self.order(epoch);
            for (batch, done) in order.chunks(settings.batch_size).zip(1u64..) {
                let start = Instant::now();
                window.lr = schedule.lr(self.step);
                self.train_step(&model, &mut optimizer, &train, batch, &mut window)?;
                let evaluate = done.is_multiple_of(eval_every) || done == steps_per_epoch;
                if evaluate || self.step.is_multiple_of(settings.log_every) {
                    self.log(&mut window)?;
                }
                seconds += start.elapsed();
                if evaluate {
                    let found = self.evaluate()?;
                    history.add(found, &self.parameters)?;
                    if settings
                        .patience
                        .is_some_and(|patience| history.worse >= patience)
                    {
                        break 'epochs;
                    }
                }
            }
        }
        self.finish(history, seconds.as_secs_f64(), steps_per_epoch)
    }

    fn finish(
        mut self,
        history: History,
        seconds: f64,
        steps_per_epoch: u64,
    ) -> Result<SeedResult> {
        let (best, weights) = history.best.context("there was no evaluation")?;
        let seconds_per_epoch = seconds * steps_per_epoch as f64 / self.step as f64;
        self.record(&FinetuneRecord::Summary {
            best_step: best[0].step,
            seconds,
            seconds_per_epoch,
        })?;
        self.parameters.assign(&weights)?;
        self.save(&best)?;
        Ok(SeedResult {
            seed: self.seed,
            best,
            evaluations: history.evaluations,
            seconds_per_epoch,
        })
    }

    /// The order of the training texts in an epoch.
    fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.dataset.train.len()).collect();
        let seed = xxh3_64_with_seed(&epoch.to_le_bytes(), self.seed);
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        order
    }

    fn encode(&self, examples: &[Example]) -> Result<Vec<Encoded>> {
        let texts: Vec<Text> = examples.iter().map(Example::as_text).collect();
        self.encoder.encode(&texts)
    }

    fn train_step(
        &mut self,
        model: &SequenceClassifier,
        optimizer: &mut LayerwiseAdamW,
        texts: &[Encoded],
        batch: &[usize],
        window: &mut Window,
    ) -> Result<()> {
        let place = self.step.to_le_bytes();
        let dropout_seed = xxh3_64_with_seed(&place, self.seed ^ 0x5eed);
        let tokens = self.encoder.batch(batch.iter().map(|&i| &texts[i]));
        let smoothing = self.config.train.label_smoothing;
        let (loss, tape) = Tape::record(|| {
            let logits = model.logits(&tokens.tokens(), Some(dropout_seed))?;
            let labels = batch.iter().map(|&i| &self.dataset.train[i]);
            self.loss(&logits, labels, smoothing)
        })?;
        let mut gradients = Gradients::default();
        tape.backward(&loss, 1.0, &mut gradients)?;
        let found = self.parameters.gradients(&mut gradients)?;
        let norm = global_norm(&found)?;
        optimizer.step(&found, window.lr, &norm, self.config.train.max_grad_norm)?;
        window.losses.push(loss.detach());
        window.norms.push(norm);
        self.step += 1;
        Ok(())
    }

    fn loss<'e>(
        &self,
        logits: &Tensor,
        examples: impl Iterator<Item = &'e Example>,
        smoothing: f64,
    ) -> Result<Tensor> {
        let labels = examples.filter_map(|example| example.label);
        let problem_type = self.dataset.problem_type;
        match problem_type {
            ProblemType::SingleLabelClassification => {
                let classes: Vec<u32> = labels.map(|label| label.value() as u32).collect();
                classification_loss(logits, Targets::Classes(&classes), problem_type, smoothing)
            }
            _ => {
                let values: Vec<f32> = labels.map(|label| label.value() as f32).collect();
                classification_loss(logits, Targets::Values(&values), problem_type, 0.0)
            }
        }
    }

    /// Writes the mean of the window as a record and empties it.
    fn log(&mut self, window: &mut Window) -> Result<()> {
        let Window { losses, norms, lr } = std::mem::take(window);
        if losses.is_empty() {
            return Ok(());
        }
        let mean = |values: &[Tensor]| -> Result<f64> {
            let mean = Tensor::stack(values, 0)?.to_dtype(DType::F32)?.mean_all()?;
            Ok(f64::from(mean.to_scalar::<f32>()?))
        };
        let (loss, grad_norm) = (mean(&losses)?, mean(&norms)?);
        ensure!(
            loss.is_finite() && grad_norm.is_finite(),
            "loss {loss} and gradient norm {grad_norm} up to step {} are not all finite; try a lower --lr or a longer --warmup-ratio",
            self.step
        );
        tracing::info!(
            "seed {} step {:>6}: loss {loss:.4}, lr {lr:.1e}",
            self.seed,
            self.step
        );
        self.record(&FinetuneRecord::Train {
            step: self.step,
            loss,
            lr,
            grad_norm,
        })
    }

    /// Results on all texts to evaluate on.
    fn evaluate(&mut self) -> Result<Vec<Evaluation>> {
        let dataset = self.dataset;
        let mut evaluations = Vec::new();
        for split in &dataset.evals {
            let logits = self.predict(&split.examples)?;
            let loss = self.loss(&logits, split.examples.iter(), 0.0)?;
            let predicted = self.labels(&logits)?;
            let truth: Vec<Label> = split.examples.iter().filter_map(|e| e.label).collect();
            let metrics = dataset.metrics.iter();
            let evaluation = Evaluation {
                step: self.step,
                split: split.name.to_string(),
                loss: f64::from(loss.to_scalar::<f32>()?),
                metrics: metrics
                    .map(|metric| (metric.name().to_string(), metric.of(&predicted, &truth)))
                    .collect(),
            };
            tracing::info!(
                "seed {} {}: {}",
                self.seed,
                split.name,
                describe(&evaluation)
            );
            self.record(&FinetuneRecord::Eval(evaluation.clone()))?;
            evaluations.push(evaluation);
        }
        Ok(evaluations)
    }

    /// Scores `[examples, labels]`, f32.
    fn predict(&self, examples: &[Example]) -> Result<Tensor> {
        let dtype = self.config.train.dtype.dtype();
        let model = SequenceClassifier::new(&self.model_config, &self.parameters, false, dtype)?;
        let encoded = self.encode(examples)?;
        let mut logits = Vec::new();
        for batch in encoded.chunks(EVAL_BATCH) {
            let batch = self.encoder.batch(batch);
            logits.push(model.logits(&batch.tokens(), None)?.to_dtype(DType::F32)?);
        }
        Ok(Tensor::cat(&logits, 0)?)
    }

    /// The label that each row of scores says.
    fn labels(&self, logits: &Tensor) -> Result<Vec<Label>> {
        Ok(match self.dataset.problem_type {
            ProblemType::Regression => {
                let values: Vec<f32> = logits.flatten_all()?.to_vec1()?;
                values.into_iter().map(Label::Value).collect()
            }
            _ => {
                let classes: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
                classes.into_iter().map(Label::Class).collect()
            }
        })
    }

    /// Writes the model and what it predicts.
    fn save(&self, evaluations: &[Evaluation]) -> Result<()> {
        let data = format!(
            "{:?}, {} texts",
            self.config.data.task,
            self.dataset.train.len()
        );
        let results = evaluations.iter().flat_map(|evaluation| {
            let named =
                |(name, value): &(String, f64)| (format!("{name} ({})", evaluation.split), *value);
            evaluation.metrics.iter().map(named).collect::<Vec<_>>()
        });
        let card = ModelCard {
            data: Some(data),
            steps: evaluations.first().map(|evaluation| evaluation.step),
            seed: Some(self.seed),
            results: results.collect(),
            ..ModelCard::default()
        };
        let dir = self.dir.join("model");
        let tokenizer = Some(self.encoder.tokenizer());
        save_pretrained(&dir, &self.model_config, &self.parameters, tokenizer, &card)?;
        for split in &self.dataset.evals {
            self.write_predictions(split.name, &split.examples)?;
        }
        match self.dataset.predict.as_slice() {
            [] => Ok(()),
            examples => self.write_predictions("predict", examples),
        }
    }

    /// `predictions-NAME.jsonl`: label, scores and, where known, truth of each text in order.
    fn write_predictions(&self, name: &str, examples: &[Example]) -> Result<()> {
        let path = self.dir.join(format!("predictions-{name}.jsonl"));
        let logits = self.predict(examples)?;
        let scores: Vec<Vec<f32>> = logits.to_vec2()?;
        let named = |label: Label| match label {
            Label::Class(class) => json!(self.dataset.labels[class as usize]),
            Label::Value(value) => json!(value),
        };
        let write = || -> Result<()> {
            let mut file = BufWriter::new(File::create(&path)?);
            for (i, (label, scores)) in self.labels(&logits)?.into_iter().zip(scores).enumerate() {
                let truth = examples[i].label.map(named);
                let line = json!({
                    "index": i, "label": named(label), "logits": scores, "truth": truth,
                });
                writeln!(file, "{line}")?;
            }
            Ok(file.flush()?)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    fn record(&mut self, record: &FinetuneRecord) -> Result<()> {
        let line = serde_json::to_string(record)? + "\n";
        self.records
            .write_all(line.as_bytes())
            .context("cannot write the records")
    }
}

/// Such as `loss 0.4321, accuracy 0.9123`.
fn describe(evaluation: &Evaluation) -> String {
    let metrics = evaluation.metrics.iter();
    let metrics: String = metrics
        .map(|(name, value)| format!(", {name} {value:.4}"))
        .collect();
    format!("loss {:.4}{metrics}", evaluation.loss)
}

impl FinetuneTraining {
    fn schedule(&self, steps: u64) -> Schedule {
        Schedule {
            peak: self.lr,
            total_steps: steps,
            warmup_steps: (self.warmup_ratio * steps as f64).round() as u64,
            decay: self.decay,
            min_ratio: 0.0,
        }
    }
}

/// The layer of a weight: 0 for embeddings, then 1 for the first layer, and one more than there are
/// layers for the head.
fn depth(name: &str, config: &BertConfig) -> usize {
    let layer = name
        .strip_prefix("encoder.layer.")
        .and_then(|rest| rest.split('.').next());
    match layer.and_then(|layer| layer.parse::<usize>().ok()) {
        Some(layer) => layer + 1,
        None if name.starts_with("head.") => config.num_hidden_layers + 1,
        // The last LayerNorm of models that normalise first.
        None if name.starts_with("encoder.LayerNorm") => config.num_hidden_layers,
        None => 0,
    }
}

/// AdamW with a learning rate for each depth.
struct LayerwiseAdamW {
    /// Factor on the learning rate, and which gradients are meant.
    groups: Vec<(f64, Vec<usize>, AdamW)>,
}

impl LayerwiseAdamW {
    fn new(
        parameters: &Parameters,
        config: &BertConfig,
        settings: &FinetuneTraining,
    ) -> Result<Self> {
        let top = config.num_hidden_layers + 1;
        let scale = |depth: usize| settings.layer_decay.powi((top - depth) as i32);
        let mut groups: Vec<(f64, Vec<usize>, Vec<Parameter>)> = Vec::new();
        for (i, (name, var)) in parameters.trained().enumerate() {
            let scale = scale(depth(name, config));
            let parameter = Parameter {
                var: Var::clone(var),
                weight_decay: if decays(name) {
                    settings.weight_decay
                } else {
                    0.0
                },
                rounded: parameters.rounded(name),
            };
            match groups.iter_mut().find(|group| group.0 == scale) {
                Some((_, indices, parameters)) => {
                    indices.push(i);
                    parameters.push(parameter);
                }
                None => groups.push((scale, vec![i], vec![parameter])),
            }
        }
        let groups = groups.into_iter().map(|(scale, indices, parameters)| {
            Ok((scale, indices, AdamW::new(parameters, (0.9, 0.999), 1e-8)?))
        });
        Ok(Self {
            groups: groups.collect::<Result<_>>()?,
        })
    }

    fn step(&mut self, gradients: &[Tensor], lr: f64, norm: &Tensor, max_norm: f64) -> Result<()> {
        for (scale, indices, optimizer) in &mut self.groups {
            let own: Vec<Tensor> = indices.iter().map(|&i| gradients[i].clone()).collect();
            optimizer.step(&own, lr * *scale, norm, Some(max_norm))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelType;

    #[test]
    fn depths_go_from_the_embeddings_to_the_head() {
        let config = BertConfig::new(ModelType::Modernbert, 50, 12, 16, 4, 32)
            .with_task(Task::SequenceClassification);
        for (name, expected) in [
            ("embeddings.word_embeddings.weight", 0),
            ("encoder.layer.0.output.dense.bias", 1),
            ("encoder.layer.11.output.dense.bias", 12),
            ("encoder.LayerNorm.weight", 12),
            ("encoder.relative_attention_bias.weight", 0),
            ("head.dense.weight", 13),
        ] {
            assert_eq!(depth(name, &config), expected, "{name}");
        }
    }
}

//! One fine-tuning run.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_rope_attn::ops::{Gradients, Tape, global_norm};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::data::{Dataset, Example, Label};
use super::optimizer::{LayerwiseAdamW, depth};
use super::records::{Evaluation, FinetuneRecord, keep_records};
use super::state::{History, Progress, Stopped};
use super::{FinetuneConfig, FinetuneTraining};
use crate::checkpoint::{ModelCard, from_pretrained_as, save_pretrained};
use crate::config::{BertConfig, ProblemType, Task};
use crate::model::{SequenceClassifier, Targets, classification_loss};
use crate::parameters::Parameters;
use crate::record::METRICS_FILE;
use crate::schedule::Schedule;
use crate::text::{Encoded, Text, TextEncoder};
use crate::tokenizer::Tokenizer;
use crate::train::Outcome;

/// Texts of one pass in evaluation.
const EVAL_BATCH: usize = 64;

/// A model with all it takes to train it.
pub(super) struct Run<'a> {
    config: &'a FinetuneConfig,
    dataset: &'a Dataset,
    seed: u64,
    dir: PathBuf,
    model_config: BertConfig,
    parameters: Parameters,
    encoder: TextEncoder,
    /// The texts of each split to evaluate on.
    evals: Vec<Vec<Encoded>>,
    records: File,
    progress: Progress,
    /// What it goes on from.
    stopped: Option<Stopped>,
}

/// Steps since the last training record.
#[derive(Default)]
struct Window {
    losses: Vec<Tensor>,
    norms: Vec<Tensor>,
    lr: f64,
}

impl<'a> Run<'a> {
    /// A run to be written to the folder `dir`, or with `resume` the rest of one that was stopped there.
    pub fn new(
        config: &'a FinetuneConfig,
        dataset: &'a Dataset,
        seed: u64,
        dir: &Path,
        device: &Device,
        resume: bool,
    ) -> Result<Self> {
        let as_classifier = |model: BertConfig| {
            model
                .with_task(Task::SequenceClassification)
                .with_labels(dataset.labels.clone(), dataset.problem_type)
        };
        let mut pretrained = from_pretrained_as(&config.run.model, as_classifier, seed, device)?;
        let (wanted, length) = (config.data.max_length, pretrained.config.intended_length());
        if wanted > length && config.run.resize_positions {
            pretrained = pretrained.resize_positions(wanted)?;
        } else if wanted > length {
            tracing::warn!(
                "{} takes {length} tokens: longer texts are cut to that, not to --max-length {wanted}; --resize-positions gives it positions for all",
                config.run.model
            );
        }
        let model_config = pretrained.config;
        let tokenizer = Tokenizer::load(&pretrained.dir, None)?;
        let encoder = TextEncoder::new(tokenizer, &model_config, Some(config.data.max_length))?;
        let evals = dataset.evals.iter();
        let evals = evals.map(|split| encode(&encoder, &split.examples));
        let evals = evals.collect::<Result<_>>()?;
        if let Some(layers) = config.train.freeze_layers {
            pretrained
                .parameters
                .freeze(|name| depth(name, &model_config) <= layers);
        }
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join(METRICS_FILE);
        let mut stopped = match resume {
            true => Stopped::find(dir, dataset.train.len())?,
            false => None,
        };
        if let Some(Progress { step, .. }) = stopped.as_ref().map(|stopped| stopped.progress) {
            let epochs = step / steps_per_epoch(config, dataset);
            if !keep_records(&path, step, epochs)? {
                stopped = None;
            }
        }
        if stopped.is_none() {
            Stopped::remove(dir)?;
        }
        let records = OpenOptions::new()
            .create(true)
            .write(true)
            .append(stopped.is_some())
            .truncate(stopped.is_none())
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self {
            config,
            dataset,
            seed,
            dir: dir.to_path_buf(),
            model_config,
            parameters: pretrained.parameters,
            encoder,
            evals,
            records,
            progress: Progress::default(),
            stopped,
        })
    }

    /// Trains, and writes the best model and its predictions, unless `stop` ends it early, for another to
    /// go on.
    pub fn train(mut self, stop: &AtomicBool) -> Result<Outcome> {
        let settings = &self.config.train;
        let train = encode(&self.encoder, &self.dataset.train)?;
        let steps_per_epoch = steps_per_epoch(self.config, self.dataset);
        let eval_every = steps_per_epoch.div_ceil(settings.evals_per_epoch);
        let schedule = settings.schedule(settings.epochs * steps_per_epoch);
        let dtype = settings.dtype.dtype();
        let model = SequenceClassifier::new(&self.model_config, &self.parameters, true, dtype)?;
        let mut optimizer = LayerwiseAdamW::new(&self.parameters, &self.model_config, settings)?;
        let mut history = self.begin(&mut optimizer)?;

        let mut window = Window::default();
        'epochs: for epoch in self.progress.step / steps_per_epoch..settings.epochs {
            let order = self.order(epoch);
            let batches = order.chunks(settings.batch_size).zip(1u64..);
            let before = self.progress.step % steps_per_epoch;
            for (batch, done) in batches.skip(before as usize) {
                if stop.load(Ordering::Relaxed) {
                    self.log(&mut window)?;
                    self.stop(&optimizer, &history)?;
                    return Ok(Outcome::Interrupted);
                }
                let start = Instant::now();
                window.lr = schedule.lr(self.progress.step);
                self.train_step(&model, &mut optimizer, &train, batch, &mut window)?;
                let last = done == steps_per_epoch;
                let evaluate = last || done.is_multiple_of(eval_every);
                if evaluate || self.progress.step.is_multiple_of(settings.log_every) {
                    self.log(&mut window)?;
                }
                self.progress.add_seconds(start.elapsed());
                if last {
                    self.log_epoch(epoch + 1)?;
                }
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
        self.finish(history, steps_per_epoch)?;
        Ok(Outcome::Finished)
    }

    /// Goes on from where the run was stopped, or says what is run.
    fn begin(&mut self, optimizer: &mut LayerwiseAdamW) -> Result<History> {
        if let Some(stopped) = self.stopped.take() {
            self.progress = stopped.progress;
            return stopped.restore(&self.dir, &self.parameters, optimizer);
        }
        self.record(&FinetuneRecord::Run {
            seed: self.seed,
            settings: serde_json::to_value(self.config)?,
            model_config: serde_json::to_value(&self.model_config)?,
        })?;
        Ok(History::default())
    }

    /// Keeps what [`Self::begin`] goes on from.
    fn stop(&self, optimizer: &LayerwiseAdamW, history: &History) -> Result<()> {
        if self.progress.step == 0 {
            return Ok(());
        }
        let (texts, parameters) = (self.dataset.train.len(), &self.parameters);
        Stopped::save(
            &self.dir,
            self.progress,
            texts,
            parameters,
            optimizer,
            history,
        )
    }

    /// The summary comes last: a run that has one is whole.
    fn finish(&self, history: History, steps_per_epoch: u64) -> Result<()> {
        let (best, weights) = history.best.context("there was no evaluation")?;
        self.parameters.assign(&weights)?;
        self.save(&best)?;
        let Progress { step, seconds, .. } = self.progress;
        self.record(&FinetuneRecord::Summary {
            best_step: best[0].step,
            seconds,
            seconds_per_epoch: seconds * steps_per_epoch as f64 / step as f64,
        })?;
        Stopped::remove(&self.dir)
    }

    /// The order of the training texts in an epoch.
    fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.dataset.train.len()).collect();
        let seed = xxh3_64_with_seed(&epoch.to_le_bytes(), self.seed);
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        order
    }

    fn train_step(
        &mut self,
        model: &SequenceClassifier,
        optimizer: &mut LayerwiseAdamW,
        texts: &[Encoded],
        batch: &[usize],
        window: &mut Window,
    ) -> Result<()> {
        let place = self.progress.step.to_le_bytes();
        let dropout_seed = xxh3_64_with_seed(&place, self.seed ^ 0x5eed);
        let tokens = self.encoder.batch(batch.iter().map(|&i| &texts[i]));
        let (loss, tape) = Tape::record(|| {
            let logits = model.logits(&tokens.tokens(), Some(dropout_seed))?;
            let labels = batch.iter().map(|&i| &self.dataset.train[i]);
            self.loss(&logits, labels, self.config.train.label_smoothing)
        })?;
        let mut gradients = Gradients::default();
        tape.backward(&loss, 1.0, &mut gradients)?;
        let found = self.parameters.gradients(&mut gradients)?;
        let norm = global_norm(&found)?;
        optimizer.step(&found, window.lr, &norm, self.config.train.max_grad_norm)?;
        window.losses.push(loss.detach());
        window.norms.push(norm);
        self.progress.step += 1;
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
    fn log(&self, window: &mut Window) -> Result<()> {
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
            self.progress.step
        );
        tracing::info!(
            "seed {} step {:>6}: loss {loss:.4}, lr {lr:.1e}",
            self.seed,
            self.progress.step
        );
        self.record(&FinetuneRecord::Train {
            step: self.progress.step,
            loss,
            lr,
            grad_norm,
        })
    }

    fn log_epoch(&mut self, epoch: u64) -> Result<()> {
        let seconds = std::mem::take(&mut self.progress.epoch_seconds);
        tracing::info!("seed {} epoch {epoch}: {seconds:.2} s", self.seed);
        self.record(&FinetuneRecord::Epoch { epoch, seconds })
    }

    /// Results on all texts to evaluate on.
    fn evaluate(&self) -> Result<Vec<Evaluation>> {
        let dataset = self.dataset;
        let mut evaluations = Vec::new();
        for (split, texts) in dataset.evals.iter().zip(&self.evals) {
            let logits = self.predict(texts)?;
            let loss = self.loss(&logits, split.examples.iter(), 0.0)?;
            let predicted = self.labels(&logits)?;
            let truth: Vec<Label> = split.examples.iter().filter_map(|e| e.label).collect();
            let metrics = dataset.metrics.iter();
            let evaluation = Evaluation {
                step: self.progress.step,
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

    /// Scores `[texts, labels]`, f32.
    fn predict(&self, texts: &[Encoded]) -> Result<Tensor> {
        let dtype = self.config.train.dtype.dtype();
        let model = SequenceClassifier::new(&self.model_config, &self.parameters, false, dtype)?;
        let mut logits = Vec::new();
        for batch in texts.chunks(EVAL_BATCH) {
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
        for (split, texts) in self.dataset.evals.iter().zip(&self.evals) {
            self.write_predictions(split.name, &split.examples, texts)?;
        }
        match self.dataset.predict.as_slice() {
            [] => Ok(()),
            examples => {
                let texts = encode(&self.encoder, examples)?;
                self.write_predictions("predict", examples, &texts)
            }
        }
    }

    /// `predictions-NAME.jsonl`: label, scores and, where known, truth of each text in order.
    fn write_predictions(&self, name: &str, examples: &[Example], texts: &[Encoded]) -> Result<()> {
        let path = self.dir.join(format!("predictions-{name}.jsonl"));
        let logits = self.predict(texts)?;
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

    fn record(&self, record: &FinetuneRecord) -> Result<()> {
        let line = serde_json::to_string(record)? + "\n";
        (&self.records)
            .write_all(line.as_bytes())
            .context("cannot write the records")
    }
}

fn steps_per_epoch(config: &FinetuneConfig, dataset: &Dataset) -> u64 {
    dataset.train.len().div_ceil(config.train.batch_size) as u64
}

fn encode(encoder: &TextEncoder, examples: &[Example]) -> Result<Vec<Encoded>> {
    let texts: Vec<Text> = examples.iter().map(Example::as_text).collect();
    encoder.encode(&texts)
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

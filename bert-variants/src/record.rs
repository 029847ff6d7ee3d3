//! What a training run writes down: one JSON object a line, read again by the report.
//!
//! JSON has no NaN and no infinity; a diverged run has both. Such numbers are written as the
//! strings `"NaN"`, `"Infinity"` and `"-Infinity"`, as in the JSON mapping of Protocol Buffers,
//! and read back as what they were.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tensorboard_proto::event::{Event, SessionLog, SessionLog_SessionStatus};
use tensorboard_rs::summary_writer::FileWriter;

use crate::data::Objective;

/// Name of the records inside a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// One line of a run's `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// First line: what was run.
    Run(Box<RunHeader>),
    /// One optimizer step, or the mean over the steps since the last such line.
    Train(TrainRecord),
    /// One evaluation on held-out text.
    Eval(EvalRecord),
    /// One evaluation of the trained model on inputs of one length.
    Length(LengthRecord),
    /// Last line of a run that reached its end.
    Summary(RunSummary),
}

/// What was run, enough to run it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunHeader {
    /// Variant name, such as `bert` or `roformer`; runs that share it differ in seed only.
    pub variant: String,
    /// What the model learned to predict.
    pub objective: Objective,
    /// Seed of initialisation, data order, masks and dropout.
    pub seed: u64,
    /// Version of the program that started the run, with the git commit where known.
    pub code_version: String,
    /// Name of the device it started on, such as `cpu`.
    pub device: String,
    /// Later starts by another version or on another device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub continued: Vec<Continuation>,
    /// All parameters, tied weights counted once.
    pub parameters: u64,
    /// Parameters of the position table alone, 0 without one.
    pub position_parameters: u64,
    /// Bytes of the parameters.
    pub parameter_bytes: u64,
    /// The data: sources, tokens, checksum, as text for the report.
    pub data: String,
    /// Optimizer steps the run will make.
    pub total_steps: u64,
    /// Hugging Face model configuration.
    pub model_config: Value,
    /// Training settings.
    pub train_config: Value,
}

/// Where another version of the program or another device went on with a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Continuation {
    /// Optimizer steps done before.
    pub step: u64,
    /// See [`RunHeader::code_version`].
    pub code_version: String,
    /// See [`RunHeader::device`].
    pub device: String,
}

impl RunHeader {
    /// Every device of the run, in order.
    pub fn devices(&self) -> String {
        self.join(&self.device, |part| &part.device)
    }

    /// Every program version of the run, in order.
    pub fn code_versions(&self) -> String {
        self.join(&self.code_version, |part| &part.code_version)
    }

    fn join<'a>(&'a self, first: &'a str, of: fn(&'a Continuation) -> &'a str) -> String {
        let mut names = vec![first];
        names.extend(self.continued.iter().map(of));
        names.dedup();
        names.join(", then ")
    }

    /// Notes that the run goes on after optimizer step `step` as `header` says.
    fn go_on(&mut self, step: u64, header: &Self) {
        // What was made by those is made again.
        self.continued.retain(|part| part.step < step);
        let last = match self.continued.last() {
            Some(part) => (&part.code_version, &part.device),
            None => (&self.code_version, &self.device),
        };
        if last != (&header.code_version, &header.device) {
            self.continued.push(Continuation {
                step,
                code_version: header.code_version.clone(),
                device: header.device.clone(),
            });
        }
    }

    /// What was set for all variants, seeds and objectives, by dotted path.
    pub(crate) fn settings(&self) -> BTreeMap<String, String> {
        let mut settings = BTreeMap::from([
            ("data".to_string(), self.data.clone()),
            ("device".to_string(), self.devices()),
            ("code_version".to_string(), self.code_versions()),
            ("total_steps".to_string(), self.total_steps.to_string()),
        ]);
        flatten("model_config", &self.model_config, &mut settings);
        flatten("train_config", &self.train_config, &mut settings);
        settings
    }

    /// Whether a run with this header may go on as one with `other`: only device, program version,
    /// the place of the cache, activation checkpointing and CUDA graphs may differ.
    ///
    /// # Errors
    /// Names every setting that differs.
    pub(crate) fn check_resumable_as(&self, other: &Self) -> Result<()> {
        let settings = |header: &Self| {
            let mut settings = header.settings();
            // These change no result.
            for key in [
                "device",
                "code_version",
                "train_config.data.cache_dir",
                "train_config.train.gradient_checkpointing",
                "train_config.train.cuda_graphs",
            ] {
                settings.remove(key);
            }
            settings.insert("variant".to_string(), header.variant.clone());
            settings.insert("seed".to_string(), header.seed.to_string());
            settings.insert("objective".to_string(), format!("{:?}", header.objective));
            settings
        };
        check_same(&settings(self), &settings(other))
    }
}

/// Refuses to resume a run with the settings `before` as one with those of `now`.
///
/// # Errors
/// Names every setting that differs.
pub(crate) fn check_same(
    before: &BTreeMap<String, String>,
    now: &BTreeMap<String, String>,
) -> Result<()> {
    let keys: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let text = |value: Option<&String>| value.map_or("absent", String::as_str).to_string();
    let differences: Vec<String> = keys
        .into_iter()
        .map(|key| (key, text(before.get(key)), text(now.get(key))))
        .filter(|(_, before, now)| before != now)
        .map(|(key, before, now)| format!("{key} was {before}, is now {now}"))
        .collect();
    ensure!(
        differences.is_empty(),
        "the run to resume had other settings: {}. Use the same settings, or another --out",
        differences.join("; ")
    );
    Ok(())
}

/// Adds the settings of an object by dotted path, which begins with `key`.
pub(crate) fn flatten(key: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                let dot = if key.is_empty() { "" } else { "." };
                flatten(&format!("{key}{dot}{name}"), value, into);
            }
        }
        // A setting that is null is a setting that is absent; so is an empty list.
        Value::Null => {}
        Value::Array(list) if list.is_empty() => {}
        value => {
            into.insert(key.to_string(), value.to_string());
        }
    }
}

/// One point of the training curves.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TrainRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Mean cross-entropy in nats over the predicted tokens.
    #[serde(with = "float")]
    pub loss: f64,
    /// Learning rate of the step.
    #[serde(with = "float")]
    pub lr: f64,
    /// Global gradient norm before clipping.
    #[serde(with = "float")]
    pub grad_norm: f64,
    /// Training speed since the last record, evaluation and checkpoints left out.
    #[serde(with = "float")]
    pub tokens_per_second: f64,
    /// Seconds of training so far, evaluation and checkpoints left out.
    #[serde(with = "float")]
    pub seconds: f64,
}

/// One point of the evaluation curves.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens seen in training.
    pub tokens: u64,
    /// Mean cross-entropy in nats over the predicted tokens of the held-out text.
    #[serde(with = "float")]
    pub loss: f64,
    /// Share of predicted tokens that are right, 0 to 1.
    #[serde(with = "float")]
    pub accuracy: f64,
    /// `exp(loss)`.
    #[serde(with = "float")]
    pub perplexity: f64,
}

/// The trained model on inputs of one length. The records of a run are on the same tokens of
/// held-out text: those of the training length come first, for comparison.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LengthRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// Most tokens of an input.
    pub seq_len: u64,
    /// Mean cross-entropy in nats over the predicted tokens.
    #[serde(with = "float")]
    pub loss: f64,
    /// Share of predicted tokens that are right, 0 to 1.
    #[serde(with = "float")]
    pub accuracy: f64,
}

/// Figures of a whole run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// Optimizer steps done.
    pub step: u64,
    /// Seconds of training, evaluation and checkpoints left out.
    #[serde(with = "float")]
    pub seconds: f64,
    /// Mean training speed.
    #[serde(with = "float")]
    pub train_tokens_per_second: f64,
    /// Forward-only speed on the evaluation text.
    #[serde(with = "float")]
    pub inference_tokens_per_second: f64,
    /// Highest memory in use during a training step beyond what is in use between steps
    /// (parameters, optimizer state, data): activations and gradients.
    pub peak_activation_bytes: u64,
    /// Bytes of the optimizer state.
    pub optimizer_bytes: u64,
}

/// Writes a run's records: `metrics.jsonl` for the report, `tensorboard/` to watch it live.
///
/// Each record reaches the operating system before [`RunWriter::write`] returns, so a killed
/// process loses no whole line.
pub struct RunWriter {
    path: PathBuf,
    metrics: File,
    scalars: FileWriter,
}

impl RunWriter {
    /// Starts the records of a new run in `dir`, which is made where missing.
    ///
    /// # Errors
    /// Where `dir` already holds a run, or cannot be written.
    pub fn create(dir: &Path, header: &RunHeader) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join(METRICS_FILE);
        ensure!(
            !path.exists(),
            "{} already holds a run: resume it, or choose another folder",
            path.display()
        );
        // Whole from the start, so that a run killed here can be resumed.
        write_atomic(&path, &line(&Record::Run(Box::new(header.clone())))?)?;
        Self::append(path, open_scalars(dir)?)
    }

    fn append(path: PathBuf, scalars: FileWriter) -> Result<Self> {
        let metrics = OpenOptions::new()
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot append to {}", path.display()))?;
        Ok(Self {
            path,
            metrics,
            scalars,
        })
    }

    /// Continues the records of the run in `dir` after optimizer step `step`, or from its very
    /// beginning, as the run that `header` describes.
    ///
    /// Training and evaluation records of later steps and those of the trained model are dropped,
    /// so that the records of a resumed run equal those of an uninterrupted one. TensorBoard is
    /// told to drop the same steps by a session start event.
    ///
    /// # Errors
    /// Where `dir` holds no run, or a line of it is no record.
    pub fn resume(dir: &Path, step: Option<u64>, header: &RunHeader) -> Result<Self> {
        let path = dir.join(METRICS_FILE);
        let mut kept = Vec::new();
        for (mut record, _) in parse(&path, &read(&path)?)?.0 {
            let keep = match &mut record {
                Record::Run(run) => {
                    match step {
                        Some(step) => run.go_on(step, header),
                        None => **run = header.clone(),
                    }
                    true
                }
                Record::Train(train) => Some(train.step) <= step,
                Record::Eval(eval) => Some(eval.step) <= step,
                Record::Length(_) | Record::Summary(_) => false,
            };
            if keep {
                kept.extend(line(&record)?);
            }
        }
        write_atomic(&path, &kept)?;
        let mut scalars = open_scalars(dir)?;
        let mut session = SessionLog::new();
        session.set_status(SessionLog_SessionStatus::START);
        let mut event = Event::new();
        event.set_session_log(session);
        scalars.add_event(&event, step.map_or(0, |step| step as usize + 1));
        Self::append(path, scalars)
    }

    /// Appends one record.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        // One call, so that a killed process tears at most the last line.
        self.metrics
            .write_all(&line(record)?)
            .with_context(|| format!("cannot append to {}", self.path.display()))?;
        match record {
            Record::Train(r) => self.mirror(
                r.step,
                &[
                    ("train/loss", r.loss),
                    ("train/lr", r.lr),
                    ("train/grad_norm", r.grad_norm),
                    ("train/tokens_per_second", r.tokens_per_second),
                ],
            ),
            Record::Eval(r) => self.mirror(
                r.step,
                &[
                    ("eval/loss", r.loss),
                    ("eval/accuracy", r.accuracy),
                    ("eval/perplexity", r.perplexity),
                ],
            ),
            Record::Run(_) | Record::Length(_) | Record::Summary(_) => {}
        }
        Ok(())
    }

    fn mirror(&mut self, step: u64, scalars: &[(&str, f64)]) {
        for (tag, value) in scalars {
            let summary = tensorboard_rs::summary::scalar(tag, *value as f32);
            self.scalars.add_summary(summary, step as usize);
        }
        self.scalars.flush();
    }
}

/// The records of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// The file read.
    pub path: PathBuf,
    /// What was run.
    pub header: RunHeader,
    /// Training records, steps increasing.
    pub train: Vec<TrainRecord>,
    /// Evaluations, steps increasing.
    pub eval: Vec<EvalRecord>,
    /// The trained model by input length, lengths increasing.
    pub lengths: Vec<LengthRecord>,
    /// Present where the run reached its end.
    pub summary: Option<RunSummary>,
    /// What a reader of the numbers should know, such as a torn last line.
    pub warnings: Vec<String>,
}

/// Reads a run from its folder or its `metrics.jsonl`.
///
/// A last line without its newline that is no whole record is what a killed process leaves: it
/// is left out with a warning.
///
/// # Errors
/// Where the file is missing, empty, does not begin with a run header, holds a line that is no
/// record, or steps that do not increase; the message names file and line.
pub fn read_run(path: &Path) -> Result<Run> {
    let path = if path.is_dir() {
        path.join(METRICS_FILE)
    } else {
        path.to_path_buf()
    };
    let (records, torn) = parse(&path, &read(&path)?)?;
    let at = |number: usize| format!("{}:{number}", path.display());

    let mut records = records.into_iter();
    let header = match records.next() {
        Some((Record::Run(header), _)) => *header,
        Some((_, number)) => {
            bail!(
                "{}: expected the run header (\"kind\": \"run\") first",
                at(number)
            )
        }
        None => bail!(
            "{}: no records: the run wrote nothing before it ended",
            path.display()
        ),
    };
    let mut run = Run {
        header,
        train: Vec::new(),
        eval: Vec::new(),
        lengths: Vec::new(),
        summary: None,
        warnings: torn.into_iter().collect(),
        path: path.clone(),
    };
    for (record, number) in records {
        ensure!(
            run.summary.is_none(),
            "{}: a record after the run's summary",
            at(number)
        );
        match record {
            Record::Run(_) => bail!(
                "{}: a second run header: one file holds one run",
                at(number)
            ),
            Record::Train(r) => {
                check_step(run.train.last().map(|last| last.step), r.step, &at(number))?;
                run.train.push(r);
            }
            Record::Eval(r) => {
                check_step(run.eval.last().map(|last| last.step), r.step, &at(number))?;
                run.eval.push(r);
            }
            Record::Length(r) => run.lengths.push(r),
            Record::Summary(r) => run.summary = Some(r),
        }
    }
    if run.summary.is_none() {
        let step = run.train.last().map_or(0, |r| r.step);
        run.warnings.push(format!(
            "{}: stopped after step {step} of {}",
            path.display(),
            run.header.total_steps
        ));
    }
    Ok(run)
}

/// Writes `bytes` to `path` so that the name never holds a part of them, whoever else writes there.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temp = path.as_os_str().to_owned();
    temp.push(format!(".{:016x}.tmp", rand::random::<u64>()));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temp, path)
    };
    let written = write();
    if written.is_err() {
        fs::remove_file(&temp).ok();
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn open_scalars(dir: &Path) -> Result<FileWriter> {
    // Made here, because the TensorBoard writer panics where it cannot.
    let dir = dir.join("tensorboard");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(FileWriter::new(dir))
}

fn line(record: &Record) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record).context("cannot write a record as JSON")?;
    line.push(b'\n');
    Ok(line)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A record and the number of its line.
type Numbered = (Record, usize);

/// The records, and a warning where the last line is torn.
fn parse(path: &Path, bytes: &[u8]) -> Result<(Vec<Numbered>, Option<String>)> {
    let mut records = Vec::new();
    for (line, number) in bytes.split_inclusive(|byte| *byte == b'\n').zip(1..) {
        match serde_json::from_slice(line) {
            Ok(record) => records.push((record, number)),
            Err(_) if !line.ends_with(b"\n") => {
                let warning = format!("{}:{number}: left out a torn last line", path.display());
                return Ok((records, Some(warning)));
            }
            Err(error) => bail!("{}:{number}: not a run's record: {error}", path.display()),
        }
    }
    Ok((records, None))
}

fn check_step(last: Option<u64>, step: u64, at: &str) -> Result<()> {
    if let Some(last) = last {
        ensure!(
            step > last,
            "{at}: step {step} after step {last}, expected increasing steps"
        );
    }
    Ok(())
}

/// Numbers that may be NaN or infinite, see the module's description.
pub(crate) mod float {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Float {
        Number(f64),
        Name(String),
    }

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        let name = match *value {
            f64::INFINITY => "Infinity",
            f64::NEG_INFINITY => "-Infinity",
            value if value.is_nan() => "NaN",
            value => return serializer.serialize_f64(value),
        };
        serializer.serialize_str(name)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        match Float::deserialize(deserializer)? {
            Float::Number(value) => Ok(value),
            Float::Name(name) => match name.as_str() {
                "NaN" => Ok(f64::NAN),
                "Infinity" => Ok(f64::INFINITY),
                "-Infinity" => Ok(f64::NEG_INFINITY),
                _ => Err(D::Error::custom(format!("expected a number, got {name:?}"))),
            },
        }
    }
}

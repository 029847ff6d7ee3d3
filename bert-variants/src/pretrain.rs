//! Pretraining and comparing variants: what the program `pretrain` does.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::config::{BertConfig, Dropouts, ModelType};
use crate::data::{Batch, BatchConfig, Batches, Data, DataConfig, Objective, check_lengths};
use crate::parameters::ParameterCounts;
use crate::record::{METRICS_FILE, Run, RunHeader, read_run, write_atomic};
use crate::report::{ReportOptions, ReportPaths, write_report};
use crate::train::{Outcome, RunData, TrainConfig, Trainer};

/// Everything that decides what is trained and where it is written.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct PretrainConfig {
    /// Which runs, and where.
    #[command(flatten)]
    pub run: RunConfig,
    /// Text.
    #[command(flatten)]
    pub data: DataConfig,
    /// Sizes of the model.
    #[command(flatten)]
    pub model: ModelSize,
    /// Sequences and masks.
    #[command(flatten)]
    pub batch: SequenceConfig,
    /// Optimisation.
    #[command(flatten)]
    pub train: TrainConfig,
}

/// Which runs to make, and where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Runs")]
pub struct RunConfig {
    /// Variants to train and compare.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = RunConfig::default().variants)]
    pub variants: Vec<ModelType>,
    /// Objectives to train each variant on.
    #[arg(long, value_enum, default_value_t = RunConfig::default().objective)]
    pub objective: Objectives,
    /// Seeds to train each variant with: of weights, order of text, masks and dropout.
    #[arg(long, value_delimiter = ',', default_values_t = RunConfig::default().seeds)]
    pub seeds: Vec<u64>,
    /// Folder for the runs and the report.
    #[arg(long, default_value = "runs")]
    pub out: PathBuf,
    /// cpu, cuda, or cuda:N for the GPU of that number.
    #[arg(long, default_value_t = RunConfig::default().device)]
    pub device: String,
    /// Show where the time of one step goes, once this many others are done [10 if not given].
    #[arg(long, value_name = "STEPS", num_args = 0..=1, default_missing_value = "10")]
    pub profile: Option<u64>,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            variants: vec![ModelType::Bert, ModelType::Roformer],
            objective: Objectives::Mlm,
            seeds: vec![0],
            out: "runs".into(),
            device: "cpu".into(),
            profile: None,
        }
    }
}

/// One objective, or both in runs of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Objectives {
    /// Masked language modelling.
    Mlm,
    /// Causal language modelling.
    Clm,
    /// Each in its own runs.
    Both,
}

impl Objectives {
    fn list(self) -> &'static [Objective] {
        match self {
            Self::Mlm => &[Objective::Mlm],
            Self::Clm => &[Objective::Clm],
            Self::Both => &[Objective::Mlm, Objective::Clm],
        }
    }
}

/// Sizes of the model, with the keys of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Model")]
pub struct ModelSize {
    /// Encoder layers.
    #[arg(long, default_value_t = ModelSize::default().num_hidden_layers)]
    pub num_hidden_layers: usize,
    /// Width of the residual stream.
    #[arg(long, default_value_t = ModelSize::default().hidden_size)]
    pub hidden_size: usize,
    /// Attention heads.
    #[arg(long, default_value_t = ModelSize::default().num_attention_heads)]
    pub num_attention_heads: usize,
    /// Width of the MLP [default: 4 times --hidden-size, or with a gate 8/3]
    #[arg(long)]
    pub intermediate_size: Option<usize>,
    /// Longest input, in tokens [default: that of the longest sequence]
    #[arg(long)]
    pub max_position_embeddings: Option<usize>,
    /// Standard deviation of the initial weights. Narrow models that sum up learned positions leave
    /// the plateau of unigrams sooner with more.
    #[arg(long, default_value_t = ModelSize::default().initializer_range)]
    pub initializer_range: f64,
    /// Dropout after embeddings, attention and MLP.
    #[arg(long, default_value_t = ModelSize::default().hidden_dropout_prob)]
    pub hidden_dropout_prob: f64,
}

impl Default for ModelSize {
    fn default() -> Self {
        Self {
            num_hidden_layers: 4,
            hidden_size: 128,
            num_attention_heads: 4,
            intermediate_size: None,
            max_position_embeddings: None,
            initializer_range: 0.02,
            hidden_dropout_prob: 0.0,
        }
    }
}

impl ModelSize {
    /// A language model of this size for sequences of `seq_len` tokens.
    ///
    /// # Errors
    /// Names the size that is wrong, with what is expected.
    pub fn config(
        &self,
        variant: ModelType,
        objective: Objective,
        vocab_size: usize,
        seq_len: usize,
    ) -> Result<BertConfig> {
        let mut config = BertConfig::new(
            variant,
            // Rows for no token, so that the products with the logits are aligned.
            vocab_size.next_multiple_of(8),
            self.num_hidden_layers,
            self.hidden_size,
            self.num_attention_heads,
            self.max_position_embeddings.unwrap_or(seq_len),
        )
        .with_decoder(objective == Objective::Clm);
        if let Some(intermediate_size) = self.intermediate_size {
            config.intermediate_size = intermediate_size;
        }
        config.initializer_range = self.initializer_range;
        config.dropout = Dropouts::of_hidden(self.hidden_dropout_prob);
        config.validate()?;
        ensure!(
            config.max_position_embeddings >= seq_len,
            "max_position_embeddings {} is less than the longest sequence, {seq_len}",
            config.max_position_embeddings,
        );
        Ok(config)
    }
}

/// How text becomes sequences.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Sequences")]
pub struct SequenceConfig {
    /// Most tokens of a sequence.
    #[arg(long, default_value_t = SequenceConfig::default().seq_len)]
    pub seq_len: usize,
    /// Share of tokens to predict in training, for masked language modelling.
    #[arg(long, default_value_t = SequenceConfig::default().mask_rate)]
    pub mask_rate: f64,
    /// The same in evaluation.
    #[arg(long, default_value_t = SequenceConfig::default().eval_mask_rate)]
    pub eval_mask_rate: f64,
    /// Most held-out sequences to evaluate on.
    #[arg(long, default_value_t = SequenceConfig::default().eval_sequences)]
    pub eval_sequences: usize,
    /// Longer inputs to evaluate the trained model on, in tokens, beside those of --seq-len with
    /// the same text: multiples of it, each of the one before. Models whose table of learned
    /// positions ends before are left out.
    #[arg(long, value_name = "TOKENS", num_args = 1.., value_delimiter = ',')]
    pub eval_lengths: Vec<usize>,
}

impl Default for SequenceConfig {
    fn default() -> Self {
        Self {
            seq_len: 128,
            mask_rate: 0.3,
            eval_mask_rate: 0.15,
            eval_sequences: 128,
            eval_lengths: Vec::new(),
        }
    }
}

/// Trains every variant with every objective and seed, then compares all of them.
///
/// A run already in `out` is an error, unless `resume` continues it, or leaves it where it is
/// finished. `None` where `stop` ended it early.
///
/// # Errors
/// When a setting is wrong, text cannot be read, a loss is not finite, or a file cannot be
/// written.
pub fn pretrain(
    config: &PretrainConfig,
    resume: bool,
    stop: &AtomicBool,
) -> Result<Option<ReportPaths>> {
    let RunConfig {
        variants,
        objective,
        seeds,
        out,
        device,
        ..
    } = &config.run;
    ensure!(
        !variants.is_empty(),
        "--variants is empty, expected at least one"
    );
    ensure!(!seeds.is_empty(), "--seeds is empty, expected at least one");
    let ids: Vec<RunId> = objective
        .list()
        .iter()
        .flat_map(|objective| seeds.iter().map(move |seed| (*objective, *seed)))
        .flat_map(|(objective, seed)| {
            variants.iter().map(move |variant| RunId {
                objective,
                seed,
                variant: *variant,
            })
        })
        .collect();
    // Before the text is read, which may take long.
    config.train.validate()?;
    check_lengths(config.batch.seq_len, &config.batch.eval_lengths)?;
    let device = open_device(device)?;
    for (i, id) in ids.iter().enumerate() {
        let name = id.name();
        ensure!(!ids[..i].contains(id), "{name} is asked for twice");
        config.model_config(id, 1)?;
        config.batch_config(id).validate()?;
        config.eval_batch_config(id).validate()?;
        ensure!(
            resume || !out.join(&name).join(METRICS_FILE).exists(),
            "{} already holds a run: resume it with --resume, or choose another --out",
            out.join(&name).display()
        );
    }
    let data = Data::open(&config.data)?;
    tracing::info!("training on {}", data.train.description());
    tracing::info!("evaluating on {}", data.validation.description());
    let plans: Vec<Plan> = ids
        .into_iter()
        .map(|id| Plan::new(config, id, &data, &device))
        .collect::<Result<_>>()?;
    for plan in &plans {
        plan.check_resumable()?;
    }

    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    write_atomic(
        &out.join("settings.toml"),
        toml::to_string_pretty(config)?.as_bytes(),
    )?;
    let mut runs = Vec::new();
    for plan in &plans {
        match plan.run(resume, stop)? {
            Some(run) => runs.push(run),
            None => return Ok(None),
        }
    }
    write_report(&runs, &out.join("report"), &ReportOptions::default()).map(Some)
}

impl PretrainConfig {
    fn model_config(&self, id: &RunId, vocab_size: usize) -> Result<BertConfig> {
        let seq_len = self.batch.seq_len;
        self.model
            .config(id.variant, id.objective, vocab_size, seq_len)
    }

    fn batch_config(&self, id: &RunId) -> BatchConfig {
        BatchConfig {
            objective: id.objective,
            seq_len: self.batch.seq_len,
            batch_size: self.train.batch_size,
            mask_rate: self.batch.mask_rate,
            seed: id.seed,
        }
    }

    fn eval_batch_config(&self, id: &RunId) -> BatchConfig {
        BatchConfig {
            mask_rate: self.batch.eval_mask_rate,
            ..self.batch_config(id)
        }
    }
}

/// What tells the runs of one [`PretrainConfig`] apart.
#[derive(Debug, Clone, Copy, PartialEq)]
struct RunId {
    objective: Objective,
    seed: u64,
    variant: ModelType,
}

impl RunId {
    /// Such as `mlm-roformer-seed0`.
    fn name(&self) -> String {
        let objective = match self.objective {
            Objective::Mlm => "mlm",
            Objective::Clm => "clm",
        };
        format!("{objective}-{}-seed{}", self.variant.name(), self.seed)
    }
}

/// One run to make.
struct Plan<'a> {
    config: &'a PretrainConfig,
    data: &'a Data,
    device: &'a Device,
    id: RunId,
    dir: PathBuf,
    model_config: BertConfig,
    header: RunHeader,
}

impl<'a> Plan<'a> {
    fn new(
        config: &'a PretrainConfig,
        id: RunId,
        data: &'a Data,
        device: &'a Device,
    ) -> Result<Self> {
        let model_config = config.model_config(&id, data.tokenizer.vocab_size())?;
        let parameters = ParameterCounts::of(&model_config);
        let header = RunHeader {
            variant: id.variant.name().to_string(),
            objective: id.objective,
            seed: id.seed,
            code_version: code_version(),
            device: device_name(device)?,
            continued: Vec::new(),
            parameters: parameters.all,
            position_parameters: parameters.positions,
            parameter_bytes: 4 * parameters.all,
            data: data.train.description(),
            total_steps: config.train.steps,
            model_config: serde_json::to_value(&model_config)?,
            train_config: serde_json::json!({
                "data": config.data,
                "batch": config.batch,
                "train": config.train,
            }),
        };
        Ok(Self {
            dir: config.run.out.join(id.name()),
            config,
            data,
            device,
            id,
            model_config,
            header,
        })
    }

    /// The records of an earlier start of this run, if there was one.
    fn earlier(&self) -> Result<Option<Run>> {
        match self.dir.join(METRICS_FILE).exists() {
            true => read_run(&self.dir).map(Some),
            false => Ok(None),
        }
    }

    fn check_resumable(&self) -> Result<()> {
        match self.earlier()? {
            Some(run) => run.header.check_resumable_as(&self.header),
            None => Ok(()),
        }
    }

    /// Makes the run and reads its records, or `None` where it was stopped.
    fn run(&self, resume: bool, stop: &AtomicBool) -> Result<Option<Run>> {
        let name = self.id.name();
        if let Some(run) = self.earlier()?.filter(|run| run.summary.is_some()) {
            tracing::info!("{name} is finished already");
            return Ok(Some(run));
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        tracing::info!("training {name}");
        let batches = self.batches()?;
        let mut trainer = Trainer::new(
            &self.dir,
            &self.header,
            &self.config.train,
            &self.model_config,
            self.data.tokenizer.clone(),
            self.device,
            resume,
        )
        .with_context(|| format!("cannot train {name}"))?
        .with_profile_in(self.config.run.profile);
        match trainer.train(&batches, stop)? {
            Outcome::Finished => read_run(&self.dir).map(Some),
            Outcome::Interrupted => Ok(None),
        }
    }

    fn batches(&self) -> Result<RunData> {
        let config = self.config.batch_config(&self.id);
        let eval_config = self.config.eval_batch_config(&self.id);
        let Data {
            tokenizer,
            train,
            validation,
        } = self.data;
        let most = self.config.batch.eval_sequences;
        let eval = Batches::evaluation(validation.clone(), tokenizer, eval_config, most)?;
        Ok(RunData {
            train: Arc::new(Batches::training(train.clone(), tokenizer, config)?),
            eval: eval.collect()?,
            lengths: self.eval_lengths()?,
        })
    }

    /// Held-out text in inputs of the training length and of those longer ones that the model
    /// reads.
    fn eval_lengths(&self) -> Result<Vec<(usize, Vec<Batch>)>> {
        let longer = &self.config.batch.eval_lengths;
        if longer.is_empty() {
            return Ok(Vec::new());
        }
        let config = self.config.eval_batch_config(&self.id);
        let most = self.config.batch.eval_sequences;
        let Data {
            tokenizer,
            validation,
            ..
        } = self.data;
        let max_length = self.model_config.max_length().unwrap_or(usize::MAX);
        Batches::evaluations_by_length(validation, tokenizer, &config, longer, most)
            .with_context(|| format!("cannot evaluate on eval_lengths {longer:?}"))?
            .into_iter()
            .filter(|(length, _)| *length <= max_length)
            .map(|(length, batches)| Ok((length, batches.collect()?)))
            .collect()
    }
}

/// Version of this program, with the git commit where it was built from a checkout.
fn code_version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    match option_env!("GIT_COMMIT") {
        Some(commit) => format!("{version} ({commit})"),
        None => version.to_string(),
    }
}

/// For the records of a run.
pub(crate) fn device_name(device: &Device) -> Result<String> {
    let gpu = candle_rope_attn::cuda_device_name(device)?;
    Ok(gpu.unwrap_or_else(|| format!("cpu, {} threads", rayon::current_num_threads())))
}

/// The device of that name.
///
/// # Errors
/// When there is no such device, or the program was built without it.
pub fn open_device(name: &str) -> Result<Device> {
    let ordinal = match name.split_once(':') {
        None if name == "cpu" => return Ok(Device::Cpu),
        None if name == "cuda" => Some(0),
        Some(("cuda", ordinal)) => ordinal.parse().ok(),
        _ => None,
    };
    let ordinal = ordinal
        .with_context(|| format!("there is no device \"{name}\"; expected cpu, cuda or cuda:N"))?;
    Ok(candle_rope_attn::cuda_device(ordinal)?)
}

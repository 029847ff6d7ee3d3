//! Speed and memory of training steps and of inference: what the program `bench` measures.

mod flops;
mod input;

use std::num::NonZeroUsize;
use std::slice;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Serialize;

pub use input::{InputConfig, Shape};

use crate::config::{BertConfig, ModelType};
use crate::data::Batch;
use crate::memory::PeakMeter;
use crate::model::{LanguageModel, MAX_GRAPH_TOKENS, Tokens};
use crate::parameters::Parameters;
use crate::pretrain::{ModelSize, device_name, open_device};
use crate::report::stats::quantile;
use crate::train::{Learner, Precision, TrainConfig, explain_out_of_memory};
use flops::forward_flops;
use input::{Input, pad};

/// Computes something of a batch, without waiting for a GPU.
type Step = Box<dyn FnMut(&Batch) -> Result<Tensor>>;

/// Low, so that random tokens leave the weights sane.
const LEARNING_RATE: f64 = 1e-5;

/// Everything that decides what is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchConfig {
    /// What to run, and how long.
    #[command(flatten)]
    pub measure: MeasureConfig,
    /// Tokens.
    #[command(flatten)]
    pub input: InputConfig,
    /// Sizes of the model.
    #[command(flatten)]
    pub model: ModelSize,
}

/// What to run, and how long.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Measurement")]
pub struct MeasureConfig {
    /// Training steps, inference, or both.
    #[arg(long, value_enum, default_value_t = Mode::Both)]
    pub mode: Mode,
    /// Variants to measure.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "bert,roformer"
    )]
    pub variants: Vec<ModelType>,
    /// cpu, cuda, or cuda:N for the GPU of that number.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Arithmetic of the model; weights and optimizer are f32 always.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    pub dtype: Precision,
    /// Keep of each layer its input alone for the backward pass, which runs the layer again.
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// Launch kernels one by one instead of as a CUDA graph.
    #[arg(long)]
    pub no_graphs: bool,
    /// Batches before the clock starts.
    #[arg(long, default_value_t = 5)]
    pub warmup: usize,
    /// Rounds, of whose times the median counts.
    #[arg(long, default_value = "5")]
    pub rounds: NonZeroUsize,
    /// Batches of a round, at whose end the device is waited for.
    #[arg(long, default_value = "10")]
    pub steps: NonZeroUsize,
    /// Dense rate of the device in TFLOP/s, such as 989 of an H100 SXM in bf16, to show the MFU.
    #[arg(long)]
    pub peak_tflops: Option<f64>,
}

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Training steps.
    Train,
    /// Inference.
    Infer,
    /// Each in turn.
    Both,
}

impl Mode {
    fn passes(self) -> &'static [Pass] {
        match self {
            Self::Train => &[Pass::Train],
            Self::Infer => &[Pass::Infer],
            Self::Both => &[Pass::Train, Pass::Infer],
        }
    }
}

/// What is done with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// Forward, backward, clipping and AdamW.
    Train,
    /// Scores of the labelled tokens, without gradients.
    Infer,
}

impl Pass {
    /// What it computes, in forward passes: the backward pass has two products for each forward.
    fn forwards(self) -> f64 {
        match self {
            Self::Train => 3.0,
            Self::Infer => 1.0,
        }
    }
}

/// One measurement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was done.
    pub pass: Pass,
    /// The model.
    pub variant: &'static str,
    /// Sequences of a batch.
    pub batch: usize,
    /// Most tokens of a sequence.
    pub seqlen: usize,
    /// Whether shorter sequences were padded to `seqlen`.
    pub padded: bool,
    /// Tokens of a batch without padding, the mean of those measured.
    pub tokens: f64,
    /// The same with padding.
    pub padded_tokens: f64,
    /// Milliseconds of a batch, the median over rounds.
    pub ms: f64,
    /// Milliseconds of a batch that is waited for by itself, the median over batches; inference.
    pub latency_ms: Option<f64>,
    /// Tokens a second, without padding.
    pub tokens_per_second: f64,
    /// Operations of a batch that the model asks for, without padding.
    pub flops: f64,
    /// The same a second, in units of 10^12.
    pub tflops_per_second: f64,
    /// Share of `peak_tflops`, where that was given.
    pub mfu: Option<f64>,
    /// Most bytes in use: weights, optimizer, gradients and activations.
    pub peak_bytes: u64,
    /// How many times as long the same batches take padded; of unpadded ones.
    pub speedup: Option<f64>,
    /// Arithmetic.
    pub dtype: Precision,
    /// The device.
    pub device: String,
    /// Whether passes were launched as CUDA graphs: not where lengths differ, nor training with dropout.
    pub graphs: bool,
}

/// Measures every pass, variant and shape in turn, and hands over each result once it is there.
///
/// Memory on the CPU is 0 without the global allocator that [`PeakMeter`] asks for.
///
/// # Errors
/// When a setting is wrong, text cannot be read, memory runs out, or `emit` fails.
pub fn bench(config: &BenchConfig, mut emit: impl FnMut(&Row) -> Result<()>) -> Result<()> {
    // Before the text is read, which may take long.
    config.validate()?;
    let bench = Bench {
        device: open_device(&config.measure.device)?,
        input: Input::open(&config.input)?,
        config,
    };
    for pass in config.measure.mode.passes() {
        for variant in &config.measure.variants {
            for shape in &config.input.shapes {
                let rows = bench.measure(*pass, *variant, *shape);
                let rows = rows.with_context(|| format!("{pass:?} {} {shape}", variant.name()))?;
                rows.iter().try_for_each(&mut emit)?;
            }
        }
    }
    Ok(())
}

impl BenchConfig {
    fn validate(&self) -> Result<()> {
        if let Some(peak) = self.measure.peak_tflops {
            ensure!(
                peak.is_finite() && peak > 0.0,
                "--peak-tflops must be positive and finite, got {peak}"
            );
        }
        self.input.validate()?;
        for variant in &self.measure.variants {
            for shape in &self.input.shapes {
                self.model_config(*variant, *shape, 1)?;
            }
        }
        Ok(())
    }

    fn model_config(
        &self,
        variant: ModelType,
        shape: Shape,
        vocab_size: usize,
    ) -> Result<BertConfig> {
        let objective = self.input.objective;
        self.model
            .config(variant, objective, vocab_size, shape.seqlen)
    }
}

/// What all measurements share.
struct Bench<'a> {
    config: &'a BenchConfig,
    device: Device,
    input: Input<'a>,
}

/// One measurement to make.
struct Job {
    pass: Pass,
    variant: ModelType,
    shape: Shape,
    model: BertConfig,
    /// Without padding, those to warm up with first.
    batches: Vec<Batch>,
}

/// What clock and meter say.
struct Measured {
    seconds: f64,
    latency: Option<f64>,
    peak_bytes: u64,
}

impl Bench<'_> {
    /// One row, and before it that of the same batches padded, where lengths differ.
    fn measure(&self, pass: Pass, variant: ModelType, shape: Shape) -> Result<Vec<Row>> {
        let Self { config, input, .. } = self;
        let measure = &config.measure;
        let count = measure.warmup + measure.rounds.get() * measure.steps.get();
        let job = Job {
            pass,
            variant,
            shape,
            model: config.model_config(variant, shape, input.vocab_size)?,
            batches: input.batches(shape, count),
        };
        if !input.is_ragged() {
            return Ok(vec![self.row(&job, &job.batches, None)?]);
        }
        let pad = |batch| pad(batch, shape.seqlen, job.model.pad_token_id);
        let batches: Vec<Batch> = job.batches.iter().map(pad).collect();
        let padded = Row {
            padded: true,
            ..self.row(&job, &batches, None)?
        };
        let unpadded = self.row(&job, &job.batches, Some(padded.ms))?;
        Ok(vec![padded, unpadded])
    }

    /// Measures with `batches`, those of the job or the same padded, which took `padded_ms`.
    fn row(&self, job: &Job, batches: &[Batch], padded_ms: Option<f64>) -> Result<Row> {
        let MeasureConfig {
            warmup,
            dtype,
            peak_tflops,
            ..
        } = self.config.measure;
        let measured = self.run(job, batches).map_err(explain_out_of_memory)?;
        let mean = |batches: &[Batch], of: &dyn Fn(&Batch) -> f64| {
            let timed = &batches[warmup..];
            timed.iter().map(of).sum::<f64>() / timed.len() as f64
        };
        let count = |batch: &Batch| batch.input_ids.len() as f64;
        let tokens = mean(&job.batches, &count);
        let forward = mean(&job.batches, &|batch| forward_flops(&job.model, batch));
        let flops = job.pass.forwards() * forward;
        let tflops_per_second = flops / measured.seconds / 1e12;
        let ms = 1e3 * measured.seconds;
        Ok(Row {
            pass: job.pass,
            variant: job.variant.name(),
            batch: job.shape.batch,
            seqlen: job.shape.seqlen,
            padded: false,
            tokens,
            padded_tokens: mean(batches, &count),
            ms,
            latency_ms: measured.latency.map(|seconds| 1e3 * seconds),
            tokens_per_second: tokens / measured.seconds,
            flops,
            tflops_per_second,
            mfu: peak_tflops.map(|peak| tflops_per_second / peak),
            peak_bytes: measured.peak_bytes,
            speedup: padded_ms.map(|padded_ms| padded_ms / ms),
            dtype,
            device: device_name(&self.device)?,
            graphs: self.graphs()
                && (job.pass == Pass::Infer || !job.model.dropout.any())
                && (batches.iter()).all(|batch| batch.input_ids.len() <= MAX_GRAPH_TOKENS),
        })
    }

    /// Runs a new model on `batches`.
    fn run(&self, job: &Job, batches: &[Batch]) -> Result<Measured> {
        let MeasureConfig { warmup, steps, .. } = self.config.measure;
        self.device.synchronize()?;
        let meter = PeakMeter::start(&self.device)?;
        let mut step = match job.pass {
            Pass::Train => self.training(&job.model)?,
            Pass::Infer => self.inference(&job.model)?,
        };
        let (warmup, timed) = batches.split_at(warmup);
        warmup.iter().try_for_each(|batch| step(batch).map(drop))?;
        self.device.synchronize()?;
        meter.forget_peak()?;
        let seconds = self.time(timed, steps.get(), &mut step)?;
        let latency = match job.pass {
            Pass::Train => None,
            Pass::Infer => Some(self.time(timed, 1, &mut step)?),
        };
        let peak_bytes = meter.peak_bytes()?;
        let result = step(&batches[0])?.to_dtype(DType::F32)?.sum_all()?;
        let result: f32 = result.to_scalar()?;
        ensure!(
            result.is_finite(),
            "the model's results are not finite, but {result}: its speed means nothing"
        );
        Ok(Measured {
            seconds,
            latency,
            peak_bytes,
        })
    }

    /// Does a training step, and returns its loss.
    fn training(&self, model: &BertConfig) -> Result<Step> {
        let MeasureConfig {
            dtype,
            gradient_checkpointing,
            ..
        } = self.config.measure;
        let config = TrainConfig {
            dtype,
            gradient_checkpointing,
            cuda_graphs: self.graphs(),
            ..TrainConfig::default()
        };
        let seed = self.config.input.seed;
        let parameters = Parameters::init(model, seed, &self.device)?;
        let mut learner = Learner::new(&config, model, parameters, seed)?;
        let mut steps = 0..;
        Ok(Box::new(move |batch| {
            let step = steps.next().unwrap_or(0);
            let update = learner.step(slice::from_ref(batch), step, LEARNING_RATE)?;
            Ok(update.loss)
        }))
    }

    /// Predicts the labels, and returns scores over the vocabulary.
    fn inference(&self, model: &BertConfig) -> Result<Step> {
        let parameters = Parameters::init(model, self.config.input.seed, &self.device)?;
        let dtype = self.config.measure.dtype.dtype();
        let mut model = LanguageModel::new(model, &parameters, false, dtype)?;
        if self.graphs() {
            model = model.with_graphs();
        }
        Ok(Box::new(move |batch| {
            model.logits(&Tokens::from(batch), &batch.label_positions, None)
        }))
    }

    fn graphs(&self) -> bool {
        // Of batches of ever new lengths, each would be captured in the second of its two passes.
        let lengths_come_again = !self.input.is_ragged();
        lengths_come_again && !self.config.measure.no_graphs && self.device.is_cuda()
    }

    /// Seconds of a batch: the median over rounds of `steps` batches, after each of which the
    /// device is waited for.
    fn time(&self, batches: &[Batch], steps: usize, step: &mut Step) -> Result<f64> {
        let mut seconds = Vec::new();
        for round in batches.chunks(steps) {
            let start = Instant::now();
            round.iter().try_for_each(|batch| step(batch).map(drop))?;
            self.device.synchronize()?;
            seconds.push(start.elapsed().as_secs_f64() / round.len() as f64);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(quantile(&seconds, 0.5))
    }
}

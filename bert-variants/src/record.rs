//! What a training run writes down: one JSON object a line, read again by the report.

use serde::{Deserialize, Serialize};

use crate::data::Objective;

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
    /// Version of this program, with the git commit where known.
    pub code_version: String,
    /// Device name, such as `cpu`.
    pub device: String,
    /// All parameters, tied weights counted once.
    pub parameters: u64,
    /// Parameters of the position table alone, 0 without one.
    pub position_parameters: u64,
    /// Bytes of the parameters.
    pub parameter_bytes: u64,
    /// The data: sources, tokens, checksum, as text for the report.
    pub data: String,
    /// Tokens the run will train on.
    pub total_steps: u64,
    /// Hugging Face model configuration.
    pub model_config: serde_json::Value,
    /// Training settings.
    pub train_config: serde_json::Value,
}

/// One point of the training curves.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TrainRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Mean cross-entropy in nats over the predicted tokens.
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Training speed since the last record, evaluation and checkpoints left out.
    pub tokens_per_second: f64,
    /// Seconds of training so far, evaluation and checkpoints left out.
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
    pub loss: f64,
    /// Share of predicted tokens that are right, 0 to 1.
    pub accuracy: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
}

/// Figures of a whole run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// Optimizer steps done.
    pub step: u64,
    /// Seconds of training, evaluation and checkpoints left out.
    pub seconds: f64,
    /// Mean training speed.
    pub train_tokens_per_second: f64,
    /// Forward-only speed on the evaluation text.
    pub inference_tokens_per_second: f64,
    /// Highest memory in use during a training step beyond parameters, gradients kept for the
    /// update and optimizer state.
    pub peak_activation_bytes: u64,
    /// Bytes of the optimizer state.
    pub optimizer_bytes: u64,
}

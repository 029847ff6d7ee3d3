//! Models of one task each: an [`Encoder`] with a head.

use anyhow::{Result, ensure};
use candle_core::{D, DType, Tensor};
use candle_rope_attn::ops::{IGNORED, cast, cross_entropy, overwrite, upload};

use super::encoder::{Encoder, Inputs, Tokens, check_ids};
use super::layers::{LayerNorm, Linear, PassDropout, Weights, f32};
use crate::config::{Activation, BertConfig, Pooling, ProblemType, Task};
use crate::data::Batch;
use crate::parameters::{Parameters, WORD_EMBEDDINGS};

/// `output(norm(act(dense(x))))`, of which only `output` is in every head.
struct Head {
    transform: Option<Transform>,
    output: Linear,
    dropout: f64,
}

/// The part of a head before its last layer; BERT's pooler is one too.
struct Transform {
    dense: Linear,
    activation: Activation,
    layer_norm: Option<LayerNorm>,
    dropout_before: bool,
}

impl Transform {
    fn new(weights: &Weights) -> Result<Option<Self>> {
        let Some(transform) = weights.config.transform() else {
            return Ok(None);
        };
        let layer_norm = transform.norm.then(|| weights.layer_norm("head.LayerNorm"));
        Ok(Some(Self {
            dense: weights.linear("head.dense", weights.config.bias.head)?,
            activation: transform.activation,
            layer_norm: layer_norm.transpose()?,
            dropout_before: transform.dropout_before,
        }))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.activation.forward(&self.dense.forward(x)?)?;
        match &self.layer_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }
}

impl Head {
    fn new(weights: &Weights) -> Result<Self> {
        let config = weights.config;
        let language_model = config.task == Task::LanguageModel;
        let output = if language_model && config.tie_word_embeddings {
            let bias = config
                .bias
                .decoder
                .then(|| weights.tied("head.output.bias"));
            Linear {
                weight: weights.tied(WORD_EMBEDDINGS)?,
                bias: bias.transpose()?,
            }
        } else {
            weights.linear("head.output", !language_model || config.bias.decoder)?
        };
        Ok(Self {
            transform: Transform::new(weights)?,
            output,
            dropout: config.head_dropout(),
        })
    }

    fn forward(&self, x: &Tensor, dropout: PassDropout) -> Result<Tensor> {
        self.output.forward(&self.transform(x, dropout)?)
    }

    /// What the last layer takes.
    fn transform(&self, x: &Tensor, dropout: PassDropout) -> Result<Tensor> {
        let mut x = x.clone();
        if let Some(transform) = &self.transform {
            if transform.dropout_before {
                x = dropout.forward(x, self.dropout, "head_input", 0)?;
            }
            x = transform.forward(&x)?;
        }
        dropout.forward(x, self.dropout, "head", 0)
    }
}

/// Encoder and head from the same parameters.
fn build(
    task: Task,
    config: &BertConfig,
    parameters: &Parameters,
    trainable: bool,
    dtype: DType,
) -> Result<(Encoder, Head)> {
    ensure!(
        config.task == task,
        "the configuration is for {:?}, expected {task:?}; set it with with_task",
        config.task
    );
    let encoder = Encoder::new(config, parameters, trainable, dtype)?;
    let head = Head::new(&Weights {
        parameters,
        trainable,
        dtype,
        config,
    })?;
    Ok((encoder, head))
}

/// How well a model predicts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Mean cross-entropy in nats over the labels.
    pub loss: f64,
    /// Share of labels that get the highest score, 0 to 1.
    pub accuracy: f64,
    /// Tokens read.
    pub tokens: u64,
}

/// Predicts tokens: `BertForMaskedLM` and its kin, and with `is_decoder` their causal forms.
pub struct LanguageModel {
    encoder: Encoder,
    head: Head,
}

impl LanguageModel {
    /// See [`Encoder::new`].
    ///
    /// # Errors
    /// When the configuration is for another task, or the parameters do not belong to it.
    pub fn new(
        config: &BertConfig,
        parameters: &Parameters,
        trainable: bool,
        dtype: DType,
    ) -> Result<Self> {
        let (encoder, head) = build(Task::LanguageModel, config, parameters, trainable, dtype)?;
        Ok(Self { encoder, head })
    }

    /// The encoder below the head.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// See [`Encoder::with_graphs`].
    pub fn with_graphs(mut self) -> Self {
        self.encoder = self.encoder.with_graphs();
        self
    }

    /// See [`Encoder::with_checkpointing`].
    pub fn with_checkpointing(mut self, checkpointing: bool) -> Self {
        self.encoder = self.encoder.with_checkpointing(checkpointing);
        self
    }

    /// Scores over the vocabulary `[positions, vocab_size]` at the given tokens.
    ///
    /// # Errors
    /// As [`Encoder::forward`], and when a position is out of range.
    pub fn logits(
        &self,
        tokens: &Tokens,
        positions: &[u32],
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        let rows = self.encoder.hidden(tokens, Some(positions), dropout_seed)?;
        self.head.forward(&rows, PassDropout { seed: dropout_seed })
    }

    /// Mean cross-entropy in nats over the labels of a batch, a scalar.
    ///
    /// # Errors
    /// As [`LanguageModel::logits`], and when the batch has no labels.
    pub fn loss(&self, batch: &Batch, dropout_seed: Option<u64>) -> Result<Tensor> {
        self.loss_of(&self.upload(batch, batch.labels.len())?, dropout_seed)
    }

    /// What [`Self::loss_of`] takes, with labels that are [`IGNORED`] as far as there are fewer than `count`.
    pub(crate) fn upload(&self, batch: &Batch, count: usize) -> Result<LabelledInputs> {
        self.check_labels(batch)?;
        let [positions, labels] = padded_labels(batch, count);
        let inputs = self.encoder.upload(&batch.into(), &positions)?;
        let labels = upload(&labels, inputs.ids.device())?;
        Ok(LabelledInputs { inputs, labels })
    }

    /// Puts another batch with the same `cu_seqlens` in the place of one, and as many labels with ignored ones.
    pub(crate) fn overwrite(&self, to: &LabelledInputs, batch: &Batch) -> Result<()> {
        self.check_labels(batch)?;
        let [positions, labels] = padded_labels(batch, to.labels.elem_count());
        self.encoder
            .overwrite(&to.inputs, &batch.into(), &positions)?;
        Ok(overwrite(&to.labels, &labels)?)
    }

    /// As [`Self::loss`]; ignored labels count in the mean with a loss of 0.
    pub(crate) fn loss_of(
        &self,
        batch: &LabelledInputs,
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        let rows = self.encoder.forward_inputs(&batch.inputs, dropout_seed)?;
        let dropout = PassDropout { seed: dropout_seed };
        let x = self.head.transform(&rows, dropout)?;
        self.head.output.cross_entropy(&x, &batch.labels)
    }

    /// Loss and accuracy over all labels of `batches`, without dropout.
    ///
    /// # Errors
    /// As [`LanguageModel::loss`].
    pub fn evaluate(&self, batches: &[Batch]) -> Result<Score> {
        let (mut loss, mut right) = (0.0, 0.0);
        let (mut tokens, mut labels) = (0, 0);
        for batch in batches {
            self.check_labels(batch)?;
            let logits = self.logits(&batch.into(), &batch.label_positions, None)?;
            let expected = upload(&batch.labels, logits.device())?;
            let count = batch.labels.len();
            let mean: f32 = cross_entropy(&logits, &expected)?.to_scalar()?;
            loss += f64::from(mean) * count as f64;
            let hits = logits
                .argmax(D::Minus1)?
                .eq(&expected)?
                .to_dtype(DType::F32)?;
            right += f64::from(hits.sum_all()?.to_scalar::<f32>()?);
            labels += count;
            tokens += batch.input_ids.len() as u64;
        }
        ensure!(
            labels > 0,
            "there is nothing to evaluate: the batches have no labels"
        );
        Ok(Score {
            loss: loss / labels as f64,
            accuracy: right / labels as f64,
            tokens,
        })
    }

    fn check_labels(&self, batch: &Batch) -> Result<()> {
        ensure!(
            !batch.labels.is_empty(),
            "the batch has no labels: no token was masked; raise the mask rate or the batch size"
        );
        ensure!(
            batch.labels.len() == batch.label_positions.len(),
            "got {} labels for {} positions, expected one for each",
            batch.labels.len(),
            batch.label_positions.len()
        );
        let vocab_size = self.encoder.config().vocab_size;
        check_ids("label", &batch.labels, vocab_size, "vocab_size")
    }
}

/// A batch on the device of a model. A clone has the same tensors.
#[derive(Clone)]
pub(crate) struct LabelledInputs {
    inputs: Inputs,
    pub labels: Tensor,
}

/// Positions and labels of a batch, and then ignored ones.
fn padded_labels(batch: &Batch, count: usize) -> [Vec<u32>; 2] {
    [(&batch.label_positions, 0), (&batch.labels, IGNORED)].map(|(values, padding)| {
        let mut values = values.clone();
        values.resize(count, padding);
        values
    })
}

/// What a classifier learns, one entry a row of its scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Targets<'a> {
    /// A class each.
    Classes(&'a [u32]),
    /// A number for each label, row after row: for regression any, for several labels at once 0
    /// or 1.
    Values(&'a [f32]),
}

/// The loss that transformers takes for `problem_type`: cross-entropy, mean squared error or
/// binary cross-entropy, means. Of the probability that cross-entropy aims at, the share
/// `smoothing` is the same for all classes (Szegedy et al. 2015, section 7).
pub(crate) fn classification_loss(
    logits: &Tensor,
    targets: Targets,
    problem_type: ProblemType,
    smoothing: f64,
) -> Result<Tensor> {
    let (rows, labels) = logits.dims2()?;
    match (problem_type, targets) {
        (ProblemType::SingleLabelClassification, Targets::Classes(classes)) => {
            check_ids("class", classes, labels, "number of labels")?;
            let loss = cross_entropy(logits, &upload(classes, logits.device())?)?;
            if smoothing == 0.0 {
                return Ok(loss);
            }
            Ok(((loss * (1.0 - smoothing))? + (uniform_cross_entropy(logits)? * smoothing)?)?)
        }
        (_, Targets::Values(values)) if problem_type != ProblemType::SingleLabelClassification => {
            ensure!(
                values.len() == rows * labels,
                "got {} target values for {rows} rows of {labels}",
                values.len()
            );
            let logits = f32(logits)?;
            let targets = Tensor::from_slice(values, (rows, labels), logits.device())?;
            if problem_type == ProblemType::Regression {
                return Ok((logits - targets)?.sqr()?.mean_all()?);
            }
            // max(x, 0) - x t + ln(1 + exp(-|x|))
            let softplus = (logits.abs()?.neg()?.exp()? + 1.0)?.log()?;
            let linear = (logits.relu()? - (&logits * targets)?)?;
            Ok((linear + softplus)?.mean_all()?)
        }
        (_, targets) => anyhow::bail!("{problem_type:?} does not learn from {targets:?}"),
    }
}

/// Mean cross-entropy against all classes alike.
fn uniform_cross_entropy(logits: &Tensor) -> Result<Tensor> {
    let logits = f32(logits)?;
    let highest = logits.detach().max_keepdim(D::Minus1)?;
    let logits = logits.broadcast_sub(&highest)?;
    let normalizer = logits.exp()?.sum(D::Minus1)?.log()?;
    Ok((normalizer.mean_all()? - logits.mean_all()?)?)
}

/// Labels sequences: `BertForSequenceClassification` and its kin.
pub struct SequenceClassifier {
    encoder: Encoder,
    head: Head,
}

impl SequenceClassifier {
    /// See [`Encoder::new`].
    ///
    /// # Errors
    /// When the configuration is for another task, or the parameters do not belong to it.
    pub fn new(
        config: &BertConfig,
        parameters: &Parameters,
        trainable: bool,
        dtype: DType,
    ) -> Result<Self> {
        let task = Task::SequenceClassification;
        let (encoder, head) = build(task, config, parameters, trainable, dtype)?;
        Ok(Self { encoder, head })
    }

    /// The encoder below the head.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// See [`Encoder::with_graphs`].
    pub fn with_graphs(mut self) -> Self {
        self.encoder = self.encoder.with_graphs();
        self
    }

    /// Scores `[sequences, labels]`.
    ///
    /// # Errors
    /// As [`Encoder::forward`].
    pub fn logits(&self, tokens: &Tokens, dropout_seed: Option<u64>) -> Result<Tensor> {
        let hidden = |rows: Option<&[u32]>| self.encoder.hidden(tokens, rows, dropout_seed);
        let pooled = match self.encoder.config().classifier_pooling {
            Pooling::Cls => hidden(Some(&first_of_sequence(tokens)))?,
            Pooling::Mean => {
                let hidden = hidden(None)?;
                cast(&mean_of_sequence(&hidden, tokens)?, hidden.dtype())?
            }
        };
        self.head
            .forward(&pooled, PassDropout { seed: dropout_seed })
    }

    /// The loss that transformers takes for the configuration's `problem_type`, a scalar.
    ///
    /// # Errors
    /// As [`Encoder::forward`], and when `targets` do not fit.
    pub fn loss(
        &self,
        tokens: &Tokens,
        targets: Targets,
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        let logits = self.logits(tokens, dropout_seed)?;
        classification_loss(&logits, targets, self.encoder.config().problem_type(), 0.0)
    }
}

/// Scores every token: `BertForTokenClassification` and its kin, and for question answering
/// `BertForQuestionAnswering` and its kin, where the scores say whether a token is the first of the
/// answer, and whether it is the last.
pub struct TokenClassifier {
    encoder: Encoder,
    head: Head,
}

impl TokenClassifier {
    /// See [`Encoder::new`].
    ///
    /// # Errors
    /// When the configuration is for another task, or the parameters do not belong to it.
    pub fn new(
        config: &BertConfig,
        parameters: &Parameters,
        trainable: bool,
        dtype: DType,
    ) -> Result<Self> {
        let task = match config.task {
            Task::QuestionAnswering => Task::QuestionAnswering,
            _ => Task::TokenClassification,
        };
        let (encoder, head) = build(task, config, parameters, trainable, dtype)?;
        Ok(Self { encoder, head })
    }

    /// The encoder below the head.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// See [`Encoder::with_graphs`].
    pub fn with_graphs(mut self) -> Self {
        self.encoder = self.encoder.with_graphs();
        self
    }

    /// Scores `[tokens, labels]`, of which question answering has two.
    ///
    /// # Errors
    /// As [`Encoder::forward`].
    pub fn logits(&self, tokens: &Tokens, dropout_seed: Option<u64>) -> Result<Tensor> {
        self.logits_of(tokens, None, dropout_seed)
    }

    /// Those of some tokens.
    fn logits_of(
        &self,
        tokens: &Tokens,
        rows: Option<&[u32]>,
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        let hidden = self.encoder.hidden(tokens, rows, dropout_seed)?;
        self.head
            .forward(&hidden, PassDropout { seed: dropout_seed })
    }

    /// Mean cross-entropy over the tokens at `positions`, whose classes are `classes`; a scalar.
    ///
    /// # Errors
    /// As [`Encoder::forward`], and when positions or classes do not fit.
    pub fn loss(
        &self,
        tokens: &Tokens,
        positions: &[u32],
        classes: &[u32],
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        let logits = self.logits_of(tokens, Some(positions), dropout_seed)?;
        let problem_type = ProblemType::SingleLabelClassification;
        classification_loss(&logits, Targets::Classes(classes), problem_type, 0.0)
    }

    /// Mean cross-entropy of the first and last tokens of the answers, `[start, end]` for each
    /// sequence, counted from its own first token; a scalar.
    ///
    /// transformers lets padding compete with a sequence's tokens; here there is none.
    ///
    /// # Errors
    /// As [`Encoder::forward`], and when answers do not fit.
    pub fn answer_loss(
        &self,
        tokens: &Tokens,
        answers: &[[u32; 2]],
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        ensure!(
            answers.len() == tokens.num_sequences(),
            "got {} answers for {} sequences",
            answers.len(),
            tokens.num_sequences()
        );
        let labels = self.encoder.config().labels.len();
        ensure!(
            labels == 2,
            "the model scores {labels} labels a token, expected 2: the first token of an answer, and the last"
        );
        let logits = self.logits(tokens, dropout_seed)?;
        let mut losses = Vec::with_capacity(answers.len());
        for (bounds, answer) in tokens.cu_seqlens.windows(2).zip(answers) {
            let len = bounds[1] - bounds[0];
            check_ids("token of an answer", answer, len, "sequence length")?;
            let scores = logits.narrow(0, bounds[0], len)?.t()?.contiguous()?;
            losses.push(cross_entropy(&scores, &upload(answer, scores.device())?)?);
        }
        Ok(Tensor::stack(&losses, 0)?.mean(0)?)
    }
}

/// Maps a sequence to one vector: `BertModel` and its kin, with mean pooling as in
/// sentence-transformers (Reimers and Gurevych 2019, <https://arxiv.org/abs/1908.10084>).
pub struct SentenceEncoder {
    encoder: Encoder,
    pooler: Option<Transform>,
}

impl SentenceEncoder {
    /// See [`Encoder::new`].
    ///
    /// # Errors
    /// When the configuration is for another task, or the parameters do not belong to it.
    pub fn new(
        config: &BertConfig,
        parameters: &Parameters,
        trainable: bool,
        dtype: DType,
    ) -> Result<Self> {
        ensure!(
            config.task == Task::Base,
            "the configuration is for {:?}, expected {:?}; set it with with_task",
            config.task,
            Task::Base
        );
        let weights = Weights {
            parameters,
            trainable,
            dtype,
            config,
        };
        Ok(Self {
            encoder: Encoder::new(config, parameters, trainable, dtype)?,
            pooler: Transform::new(&weights)?,
        })
    }

    /// The encoder below.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// See [`Encoder::with_graphs`].
    pub fn with_graphs(mut self) -> Self {
        self.encoder = self.encoder.with_graphs();
        self
    }

    /// Means of the last hidden states `[sequences, hidden_size]`.
    ///
    /// # Errors
    /// As [`Encoder::forward`].
    pub fn mean(&self, tokens: &Tokens, dropout_seed: Option<u64>) -> Result<Tensor> {
        mean_of_sequence(&self.encoder.hidden(tokens, None, dropout_seed)?, tokens)
    }

    /// What transformers calls `pooler_output` `[sequences, hidden_size]`: a layer on top of the
    /// first token, in models that have one.
    ///
    /// # Errors
    /// As [`Encoder::forward`], and when the model has no pooler.
    pub fn pooled(&self, tokens: &Tokens, dropout_seed: Option<u64>) -> Result<Tensor> {
        let Some(pooler) = &self.pooler else {
            anyhow::bail!("{} has no pooler", self.encoder.config().model_type.name());
        };
        let first = first_of_sequence(tokens);
        pooler.forward(&self.encoder.hidden(tokens, Some(&first), dropout_seed)?)
    }
}

/// Positions of the first tokens.
fn first_of_sequence(tokens: &Tokens) -> Vec<u32> {
    let starts = &tokens.cu_seqlens[..tokens.num_sequences()];
    starts.iter().map(|&start| start as u32).collect()
}

/// Means over each sequence `[sequences, hidden_size]`, as one matrix product.
fn mean_of_sequence(hidden: &Tensor, tokens: &Tokens) -> Result<Tensor> {
    let (total, sequences) = (tokens.ids.len(), tokens.num_sequences());
    let mut shares = vec![0f32; sequences * total];
    for (i, bounds) in tokens.cu_seqlens.windows(2).enumerate() {
        let row = &mut shares[i * total..][bounds[0]..bounds[1]];
        row.fill(1.0 / row.len() as f32);
    }
    let shares = Tensor::from_vec(shares, (sequences, total), hidden.device())?;
    Ok(shares.matmul(&f32(hidden)?)?)
}

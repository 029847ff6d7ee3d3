//! The encoder and its language-model head, one code for every variant.
//!
//! There is no padding: the sequences of a batch lie end to end in `[tokens, hidden_size]`, and
//! `cu_seqlens` says where each begins.

use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_rope_attn::ops::{
    cross_entropy, dropout, embedding, gather_rows, gelu, layer_norm, linear,
};
use candle_rope_attn::{AttentionSpec, Sequences, attention_qkvpacked};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::config::{BertConfig, ModelType};
use crate::data::Batch;
use crate::parameters::{POSITION_EMBEDDINGS, Parameters};

/// An encoder with the head that predicts tokens: `BertForMaskedLM`, `RoFormerForMaskedLM`, and
/// with `is_decoder` their causal forms.
pub struct LanguageModel {
    config: BertConfig,
    spec: AttentionSpec,
    embeddings: Embeddings,
    layers: Vec<Layer>,
    head: Head,
    dtype: DType,
    device: Device,
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

impl LanguageModel {
    /// A model that computes with `parameters` and sees every later change of them.
    ///
    /// With `trainable` the results carry gradients to the parameters; without, no intermediate
    /// result is kept. Embeddings are summed and normalised in f32, everything after that is
    /// computed in `dtype`, to which the f32 weights are cast where they are used.
    ///
    /// # Errors
    /// When the parameters do not belong to the configuration.
    pub fn new(
        config: &BertConfig,
        parameters: &Parameters,
        trainable: bool,
        dtype: DType,
    ) -> Result<Self> {
        config.validate()?;
        let weights = Weights {
            parameters,
            trainable,
            config,
        };
        Ok(Self {
            spec: config.attention_spec()?,
            embeddings: Embeddings::new(&weights)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&weights, &format!("encoder.layer.{i}")))
                .collect::<Result<_>>()?,
            head: Head::new(&weights)?,
            config: config.clone(),
            dtype,
            device: parameters.device().clone(),
        })
    }

    /// The configuration it was made with.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// Last hidden states `[tokens, hidden_size]` of the sequences in `input_ids`, see
    /// [`Batch`]. `dropout_seed` turns on dropout; equal seeds drop equal elements.
    ///
    /// # Errors
    /// When a sequence is longer than the position table, an id outside the vocabulary, or
    /// `cu_seqlens` does not fit.
    pub fn hidden_states(
        &self,
        input_ids: &[u32],
        cu_seqlens: &[usize],
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        let dropout = Dropout {
            p: self.config.hidden_dropout_prob,
            seed: dropout_seed,
        };
        let sequences = Sequences::CuSeqlens(cu_seqlens.to_vec());
        self.check_ids(input_ids)?;
        let x = self
            .embeddings
            .forward(input_ids, cu_seqlens, &dropout, &self.device)?;
        let mut x = x.to_dtype(self.dtype)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &self.spec, &sequences, &dropout, i)?;
        }
        Ok(x)
    }

    /// Scores over the vocabulary `[rows, vocab_size]` at the given rows of `hidden_states`.
    ///
    /// # Errors
    /// When a row is out of range.
    pub fn logits(&self, hidden_states: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let rows = Tensor::new(rows, &self.device)?;
        self.head.forward(&gather_rows(hidden_states, &rows)?)
    }

    /// Mean cross-entropy in nats over the labels of a batch, a scalar.
    ///
    /// # Errors
    /// As [`LanguageModel::hidden_states`], and when the batch has no labels.
    pub fn loss(&self, batch: &Batch, dropout_seed: Option<u64>) -> Result<Tensor> {
        let (logits, labels) = self.predict(batch, dropout_seed)?;
        Ok(cross_entropy(&logits, &labels)?)
    }

    /// Loss and accuracy over all labels of `batches`, without dropout.
    ///
    /// # Errors
    /// As [`LanguageModel::loss`].
    pub fn evaluate(&self, batches: &[Batch]) -> Result<Score> {
        let (mut loss, mut right) = (0.0, 0.0);
        let (mut tokens, mut labels) = (0, 0);
        for batch in batches {
            let (logits, expected) = self.predict(batch, None)?;
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

    /// Logits and labels at the label positions of a batch.
    fn predict(&self, batch: &Batch, dropout_seed: Option<u64>) -> Result<(Tensor, Tensor)> {
        ensure!(
            !batch.labels.is_empty(),
            "the batch has no labels: no token was masked; raise the mask rate or the batch size"
        );
        self.check_ids(&batch.labels)?;
        let hidden = self.hidden_states(&batch.input_ids, &batch.cu_seqlens, dropout_seed)?;
        let logits = self.logits(&hidden, &batch.label_positions)?;
        Ok((logits, Tensor::new(batch.labels.as_slice(), &self.device)?))
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let highest = ids.iter().copied().max().unwrap_or(0) as usize;
        ensure!(
            highest < self.config.vocab_size,
            "got token id {highest}, but the model's vocab_size is {}: tokenizer and model do not belong together",
            self.config.vocab_size
        );
        Ok(())
    }
}

/// Where a model takes its weights from.
struct Weights<'a> {
    parameters: &'a Parameters,
    trainable: bool,
    config: &'a BertConfig,
}

impl Weights<'_> {
    fn get(&self, name: &str) -> Result<Tensor> {
        self.parameters.get(name, self.trainable)
    }

    fn linear(&self, name: &str) -> Result<Linear> {
        Ok(Linear {
            weight: self.get(&format!("{name}.weight"))?,
            bias: self.get(&format!("{name}.bias"))?,
        })
    }

    fn layer_norm(&self, name: &str) -> Result<LayerNorm> {
        Ok(LayerNorm {
            weight: self.get(&format!("{name}.weight"))?,
            bias: self.get(&format!("{name}.bias"))?,
            eps: self.config.layer_norm_eps,
        })
    }
}

struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (
            self.weight.to_dtype(x.dtype())?,
            self.bias.to_dtype(x.dtype())?,
        );
        Ok(linear(x, &weight, Some(&bias))?)
    }
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(layer_norm(x, &self.weight, &self.bias, self.eps)?)
    }
}

/// The dropout of one pass; every place in the model has its own seed.
struct Dropout {
    p: f32,
    seed: Option<u64>,
}

impl Dropout {
    fn forward(&self, x: Tensor, place: &str, layer: usize) -> Result<Tensor> {
        match self.seed {
            Some(seed) if self.p > 0.0 => {
                let seed = xxh3_64_with_seed(place.as_bytes(), seed).wrapping_add(layer as u64);
                Ok(dropout(&x, self.p, seed)?)
            }
            _ => Ok(x),
        }
    }
}

struct Embeddings {
    word: Tensor,
    /// Only with absolute positions.
    position: Option<Tensor>,
    token_type: Tensor,
    layer_norm: LayerNorm,
}

impl Embeddings {
    fn new(weights: &Weights) -> Result<Self> {
        Ok(Self {
            word: weights.get("embeddings.word_embeddings.weight")?,
            position: match weights.config.model_type {
                ModelType::Bert => Some(weights.get(POSITION_EMBEDDINGS)?),
                ModelType::Roformer => None,
            },
            token_type: weights.get("embeddings.token_type_embeddings.weight")?,
            layer_norm: weights.layer_norm("embeddings.LayerNorm")?,
        })
    }

    fn forward(
        &self,
        ids: &[u32],
        cu_seqlens: &[usize],
        dropout: &Dropout,
        device: &Device,
    ) -> Result<Tensor> {
        let mut x = embedding(&Tensor::new(ids, device)?, &self.word)?;
        if let Some(table) = &self.position {
            let positions = Tensor::new(position_ids(cu_seqlens, table.dim(0)?)?, device)?;
            x = (x + embedding(&positions, table)?)?;
        }
        // Every token is of the first segment.
        x = x.broadcast_add(&self.token_type.get(0)?)?;
        dropout.forward(self.layer_norm.forward(&x)?, "embeddings", 0)
    }
}

/// `0, 1, 2, …` in every sequence.
fn position_ids(cu_seqlens: &[usize], max_position_embeddings: usize) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for bounds in cu_seqlens.windows(2) {
        let len = bounds[1].saturating_sub(bounds[0]);
        ensure!(
            len <= max_position_embeddings,
            "got a sequence of {len} tokens, but the position table has {max_position_embeddings} rows (max_position_embeddings): cut the text, or train with a longer table or with RoPE"
        );
        ids.extend(0..len as u32);
    }
    Ok(ids)
}

/// One encoder layer, normalised after each residual sum as in BERT.
struct Layer {
    qkv: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
}

impl Layer {
    fn new(weights: &Weights, name: &str) -> Result<Self> {
        let linear = |part: &str| weights.linear(&format!("{name}.{part}"));
        let layer_norm = |part: &str| weights.layer_norm(&format!("{name}.{part}"));
        Ok(Self {
            qkv: linear("attention.self.qkv")?,
            attention_output: linear("attention.output.dense")?,
            attention_norm: layer_norm("attention.output.LayerNorm")?,
            intermediate: linear("intermediate.dense")?,
            output: linear("output.dense")?,
            output_norm: layer_norm("output.LayerNorm")?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        spec: &AttentionSpec,
        sequences: &Sequences,
        dropout: &Dropout,
        index: usize,
    ) -> Result<Tensor> {
        let (tokens, hidden) = x.dims2()?;
        let qkv = self.qkv.forward(x)?;
        let qkv = qkv.reshape((tokens, 3, spec.num_heads, spec.head_dim))?;
        let context = attention_qkvpacked(&qkv, spec, sequences)?.reshape((tokens, hidden))?;
        let attended = self.attention_output.forward(&context)?;
        let attended = dropout.forward(attended, "attention", index)?;
        let x = self.attention_norm.forward(&(attended + x)?)?;

        let mlp = self
            .output
            .forward(&gelu(&self.intermediate.forward(&x)?)?)?;
        let mlp = dropout.forward(mlp, "mlp", index)?;
        self.output_norm.forward(&(mlp + x)?)
    }
}

/// `BertLMPredictionHead`: its decoder is the token embedding.
struct Head {
    dense: Linear,
    layer_norm: LayerNorm,
    decoder: Linear,
}

impl Head {
    fn new(weights: &Weights) -> Result<Self> {
        Ok(Self {
            dense: weights.linear("cls.predictions.transform.dense")?,
            layer_norm: weights.layer_norm("cls.predictions.transform.LayerNorm")?,
            decoder: Linear {
                weight: weights.get("embeddings.word_embeddings.weight")?,
                bias: weights.get("cls.predictions.bias")?,
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = gelu(&self.dense.forward(x)?)?;
        self.decoder.forward(&self.layer_norm.forward(&x)?)
    }
}

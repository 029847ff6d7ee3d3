//! Embeddings and transformer layers.

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{
    cast, checkpoint, dropout, embedding_sum, gather_rows, overwrite, upload,
};
use candle_rope_attn::{AttentionSpec, Dropout, Sequences, attention_qkvpacked_with_bias};

use super::graphs::Graphs;
use super::layers::{LayerNorm, Linear, PassDropout, Weights};
use crate::config::{Activation, BertConfig, Dropouts, Norm, Position};
use crate::data::Batch;
use crate::parameters::{POSITION_EMBEDDINGS, Parameters, RELATIVE_BIAS, WORD_EMBEDDINGS};

/// Token sequences end to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tokens<'a> {
    /// Token ids `[tokens]`.
    pub ids: &'a [u32],
    /// Where each sequence begins, ending with `tokens`.
    pub cu_seqlens: &'a [usize],
    /// Segment of each token, all 0 without.
    pub token_type_ids: Option<&'a [u32]>,
}

impl<'a> From<&'a Batch> for Tokens<'a> {
    fn from(batch: &'a Batch) -> Self {
        Self {
            ids: &batch.input_ids,
            cu_seqlens: &batch.cu_seqlens,
            token_type_ids: None,
        }
    }
}

impl Tokens<'_> {
    /// Number of sequences.
    pub fn num_sequences(&self) -> usize {
        self.cu_seqlens.len().saturating_sub(1)
    }

    fn check(&self, config: &BertConfig) -> Result<()> {
        let total = self.ids.len();
        ensure!(
            self.cu_seqlens.first() == Some(&0) && self.cu_seqlens.last() == Some(&total),
            "cu_seqlens must go from 0 to the number of tokens {total}, got {:?} to {:?}",
            self.cu_seqlens.first(),
            self.cu_seqlens.last()
        );
        for (i, bounds) in self.cu_seqlens.windows(2).enumerate() {
            ensure!(
                bounds[0] < bounds[1],
                "sequence {i} is empty or ends before it begins: cu_seqlens {bounds:?}; leave empty sequences out"
            );
            let len = bounds[1] - bounds[0];
            if let Some(max_length) = config.max_length() {
                ensure!(
                    len <= max_length,
                    "got a sequence of {len} tokens, but the position table has rows for {max_length} (max_position_embeddings): cut the text, or use a longer table or RoPE"
                );
            }
        }
        check_ids("token id", self.ids, config.vocab_size, "vocab_size")?;
        if let Some(types) = self.token_type_ids {
            ensure!(
                types.len() == total,
                "got {} token_type_ids for {total} tokens",
                types.len()
            );
            // A model without segments takes one segment for all.
            let segments = config.type_vocab_size.max(1);
            check_ids("token type", types, segments, "type_vocab_size")?;
        }
        Ok(())
    }
}

pub(super) fn check_ids(what: &str, ids: &[u32], rows: usize, key: &str) -> Result<()> {
    let highest = ids.iter().copied().max().unwrap_or(0) as usize;
    ensure!(
        highest < rows,
        "got {what} {highest}, but the model's {key} is {rows}: tokenizer and model do not belong together"
    );
    Ok(())
}

/// Embeddings and layers, without a head: the part that all tasks share.
pub struct Encoder {
    stack: Arc<Stack>,
    trainable: bool,
    checkpointing: bool,
    graphs: Option<Graphs>,
}

impl Encoder {
    /// An encoder that computes with `parameters` and sees every later change that an optimizer made
    /// after it makes of them.
    ///
    /// With `trainable` the results carry gradients to the parameters; without, no intermediate
    /// result is kept. Embeddings are summed and normalised in f32, everything after that is
    /// computed in `dtype`, of which the parameters keep rounded weights.
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
            dtype,
            config,
        };
        let relative = matches!(config.position, Position::RelativeBias { .. });
        let final_norm =
            (config.norm == Norm::Pre).then(|| weights.layer_norm("encoder.LayerNorm"));
        let stack = Stack {
            embeddings: Embeddings::new(&weights)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&weights, i).map(Arc::new))
                .collect::<Result<_>>()?,
            relative_bias: relative.then(|| weights.get(RELATIVE_BIAS)).transpose()?,
            final_norm: final_norm.transpose()?,
            config: config.clone(),
            dtype,
            device: parameters.device().clone(),
        };
        Ok(Self {
            stack: Arc::new(stack),
            trainable,
            checkpointing: false,
            graphs: None,
        })
    }

    /// Keeps of each layer its input alone for the backward pass, which runs the layer again: a
    /// third more time for a fraction of the memory. On a [`Tape`](candle_rope_attn::ops::Tape).
    pub fn with_checkpointing(mut self, checkpointing: bool) -> Self {
        self.checkpointing = checkpointing;
        self
    }

    /// Launches a pass as one CUDA graph where lengths of sequences come again, as launches are most of what
    /// small batches take: from the second batch of equal `cu_seqlens` and as many tokens asked for on, for
    /// the [`MAX_GRAPHS`](super::MAX_GRAPHS) such used last, of up to
    /// [`MAX_GRAPH_TOKENS`](super::MAX_GRAPH_TOKENS) tokens. Results are the same bits. Each keeps memory
    /// for its hidden states, and all together for a pass.
    ///
    /// For inference: does nothing on a CPU, with dropout, and where the encoder is trainable. Weights that
    /// an optimizer changes are seen by the next pass as they are without. Graphs are those of a thread;
    /// wait for the device before another thread drops the encoder.
    pub fn with_graphs(mut self) -> Self {
        let suits = self.stack.device.is_cuda() && !self.trainable;
        self.graphs = suits.then(Graphs::default);
        self
    }

    /// The configuration it was made with.
    pub fn config(&self) -> &BertConfig {
        &self.stack.config
    }

    /// Last hidden states `[tokens, hidden_size]`. `dropout_seed` turns on dropout; equal seeds
    /// drop equal elements.
    ///
    /// # Errors
    /// When a sequence is empty or longer than the position table, an id is outside of its table,
    /// or `cu_seqlens` does not fit.
    pub fn forward(&self, tokens: &Tokens, dropout_seed: Option<u64>) -> Result<Tensor> {
        let hidden = self.hidden(tokens, None, dropout_seed)?;
        Ok(match self.graphs {
            Some(_) => hidden.copy()?,
            None => hidden,
        })
    }

    /// As [`Self::forward`], in memory that the next pass of this thread may use again. With `rows`, of
    /// these tokens alone, in that order: the last layer computes no others after its attention.
    pub(super) fn hidden(
        &self,
        tokens: &Tokens,
        rows: Option<&[u32]>,
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        self.check(tokens, rows)?;
        if let (Some(graphs), None) = (&self.graphs, dropout_seed)
            && let Some(hidden) = graphs.forward(&self.stack, tokens, rows)
        {
            return Ok(hidden);
        }
        self.forward_inputs(&self.stack.upload(tokens, rows)?, dropout_seed)
    }

    fn check(&self, tokens: &Tokens, rows: Option<&[u32]>) -> Result<()> {
        tokens.check(&self.stack.config)?;
        let count = tokens.ids.len();
        if let Some(highest) = rows.and_then(|rows| rows.iter().max()) {
            ensure!(
                (*highest as usize) < count,
                "got position {highest}, but there are {count} tokens, numbered from 0"
            );
        }
        Ok(())
    }

    /// What [`Self::forward_inputs`] takes for the hidden states of some tokens.
    pub(super) fn upload(&self, tokens: &Tokens, rows: &[u32]) -> Result<Inputs> {
        self.check(tokens, Some(rows))?;
        self.stack.upload(tokens, Some(rows))
    }

    /// Puts other tokens with the same `cu_seqlens` and number of rows in the place of those uploaded.
    pub(super) fn overwrite(&self, to: &Inputs, tokens: &Tokens, rows: &[u32]) -> Result<()> {
        self.check(tokens, Some(rows))?;
        to.overwrite(tokens, Some(rows))
    }

    /// As [`Self::hidden`].
    pub(super) fn forward_inputs(
        &self,
        inputs: &Inputs,
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        self.stack.forward(inputs, dropout_seed, self.checkpointing)
    }
}

/// Tokens that were checked, on the device of a model. A clone has the same tensors.
#[derive(Clone)]
pub(super) struct Inputs {
    pub ids: Tensor,
    /// In a model with segments.
    token_type_ids: Option<Tensor>,
    /// In a model with a table of positions.
    positions: Option<Tensor>,
    /// Tokens that are asked for, if not all.
    rows: Option<Tensor>,
    sequences: Sequences,
}

impl Inputs {
    /// Puts in other tokens with the same `cu_seqlens` and number of rows.
    pub fn overwrite(&self, tokens: &Tokens, rows: Option<&[u32]>) -> Result<()> {
        overwrite(&self.ids, tokens.ids)?;
        if let (Some(to), Some(types)) = (&self.token_type_ids, tokens.token_type_ids) {
            overwrite(to, types)?;
        }
        if let (Some(to), Some(rows)) = (&self.rows, rows) {
            overwrite(to, rows)?;
        }
        Ok(())
    }
}

/// What an [`Encoder`] computes with.
pub(super) struct Stack {
    config: BertConfig,
    embeddings: Embeddings,
    layers: Vec<Arc<Layer>>,
    relative_bias: Option<Tensor>,
    final_norm: Option<LayerNorm>,
    dtype: DType,
    pub device: Device,
}

impl Stack {
    pub fn upload(&self, tokens: &Tokens, rows: Option<&[u32]>) -> Result<Inputs> {
        let (device, embeddings) = (&self.device, &self.embeddings);
        let types = embeddings
            .token_type
            .as_ref()
            .map(|_| match tokens.token_type_ids {
                Some(types) => upload(types, device),
                None => Tensor::zeros(tokens.ids.len(), DType::U32, device),
            });
        let positions = embeddings
            .position
            .as_ref()
            .map(|(_, first)| upload(&position_ids(tokens.cu_seqlens, *first), device));
        Ok(Inputs {
            ids: upload(tokens.ids, device)?,
            token_type_ids: types.transpose()?,
            positions: positions.transpose()?,
            rows: rows.map(|rows| upload(rows, device)).transpose()?,
            sequences: Sequences::CuSeqlens(tokens.cu_seqlens.to_vec()),
        })
    }

    /// Last hidden states of the tokens asked for. Uploads nothing but what depends on `sequences` alone.
    pub fn forward(
        &self,
        inputs: &Inputs,
        dropout_seed: Option<u64>,
        checkpointing: bool,
    ) -> Result<Tensor> {
        let dropout = PassDropout { seed: dropout_seed };
        let p = &self.config.dropout;
        let at_embeddings = dropout.at(p.embeddings, "embeddings", 0);
        let mut x = self.embeddings.forward(inputs, at_embeddings, self.dtype)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let probs = dropout.at(p.attention_probs, "attention_probs", i);
            let last = i + 1 == self.layers.len();
            let attention = Attention {
                spec: layer.spec.clone().with_dropout(probs),
                relative_bias: self.relative_bias.clone(),
                sequences: inputs.sequences.clone(),
                rows: inputs.rows.clone().filter(|_| last),
            };
            let place = Place {
                dropouts: *p,
                dropout,
                layer: i,
            };
            let layer = layer.clone();
            let forward = move |x: &Tensor| layer.forward(x, &attention, place);
            x = match checkpointing {
                true => checkpoint(&x, forward)?,
                false => forward(&x)?,
            };
        }
        match &self.final_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }
}

struct Embeddings {
    word: Tensor,
    position: Option<(Tensor, usize)>,
    token_type: Option<Tensor>,
    layer_norm: LayerNorm,
}

impl Embeddings {
    fn new(weights: &Weights) -> Result<Self> {
        let config = weights.config;
        let position = config
            .position_table
            .map(|first| -> Result<_> { Ok((weights.get(POSITION_EMBEDDINGS)?, first)) });
        let token_type = (config.type_vocab_size > 0)
            .then(|| weights.get("embeddings.token_type_embeddings.weight"));
        Ok(Self {
            word: weights.get(WORD_EMBEDDINGS)?,
            position: position.transpose()?,
            token_type: token_type.transpose()?,
            layer_norm: weights.layer_norm("embeddings.LayerNorm")?,
        })
    }

    /// Summed, normalised and dropped in f32, and then in a dtype.
    fn forward(&self, inputs: &Inputs, at: Option<Dropout>, dtype: DType) -> Result<Tensor> {
        let position = self.position.as_ref().map(|(table, _)| table);
        let parts = [
            (Some(&inputs.ids), Some(&self.word)),
            (inputs.token_type_ids.as_ref(), self.token_type.as_ref()),
            (inputs.positions.as_ref(), position),
        ];
        let parts: Vec<_> = parts
            .into_iter()
            .filter_map(|(ids, table)| ids.zip(table))
            .collect();
        let sum = embedding_sum(&parts)?;
        match at {
            Some(Dropout { p, seed }) => {
                let x = dropout(&self.layer_norm.forward(&sum)?, p, seed)?;
                Ok(cast(&x, dtype)?)
            }
            None => self.layer_norm.forward_as(&sum, dtype),
        }
    }
}

/// `first, first + 1, …` in every sequence.
fn position_ids(cu_seqlens: &[usize], first: usize) -> Vec<u32> {
    let lens = cu_seqlens.windows(2).map(|bounds| bounds[1] - bounds[0]);
    lens.flat_map(|len| first as u32..(first + len) as u32)
        .collect()
}

/// What the attention of a layer computes in one pass.
struct Attention {
    spec: AttentionSpec,
    relative_bias: Option<Tensor>,
    sequences: Sequences,
    /// The tokens that the rest of the layer computes, if not all.
    rows: Option<Tensor>,
}

impl Attention {
    /// `[tokens, hidden_size]` of x, of the same shape, by the layer that makes q, k and v of it.
    fn forward(&self, x: &Tensor, qkv: &Linear) -> Result<Tensor> {
        let (spec, sequences) = (&self.spec, &self.sequences);
        match &self.relative_bias {
            Some(bias) => {
                let qkv = qkv.forward(x)?;
                Ok(attention_qkvpacked_with_bias(&qkv, bias, spec, sequences)?)
            }
            None => qkv.attention(x, spec, sequences),
        }
    }

    /// The tokens that the rest of the layer computes.
    fn pick(&self, x: &Tensor) -> Result<Tensor> {
        match &self.rows {
            Some(rows) => Ok(gather_rows(x, rows)?),
            None => Ok(x.clone()),
        }
    }
}

/// Where in the model dropout happens.
#[derive(Clone, Copy)]
struct Place {
    dropouts: Dropouts,
    dropout: PassDropout,
    layer: usize,
}

/// One transformer layer.
struct Layer {
    spec: AttentionSpec,
    norm: Norm,
    qkv: Linear,
    attention_output: Linear,
    /// None in the first layer of a model that normalises before attention.
    attention_norm: Option<LayerNorm>,
    mlp: Mlp,
    mlp_norm: LayerNorm,
}

impl Layer {
    fn new(weights: &Weights, index: usize) -> Result<Self> {
        let config = weights.config;
        let name = format!("encoder.layer.{index}");
        let attention =
            |part: &str| weights.linear(&format!("{name}.attention.{part}"), config.bias.attention);
        let attention_norm = (config.norm == Norm::Post || index > 0)
            .then(|| weights.layer_norm(&format!("{name}.attention.output.LayerNorm")));
        Ok(Self {
            spec: config.attention_spec(index)?,
            norm: config.norm,
            qkv: attention("self.qkv")?,
            attention_output: attention("output.dense")?,
            attention_norm: attention_norm.transpose()?,
            mlp: Mlp::new(weights, &name)?,
            mlp_norm: weights.layer_norm(&format!("{name}.output.LayerNorm"))?,
        })
    }

    fn forward(&self, x: &Tensor, attention: &Attention, place: Place) -> Result<Tensor> {
        let norm = |norm: &Option<LayerNorm>, x: &Tensor| match norm {
            Some(norm) => norm.forward(x),
            None => Ok(x.clone()),
        };
        match self.norm {
            Norm::Post => {
                let x = self.attend(x, x, attention, place)?;
                let x = norm(&self.attention_norm, &x)?;
                let x = self.mlp.forward(&x, &x, place)?;
                self.mlp_norm.forward(&x)
            }
            Norm::Pre => {
                let normed = norm(&self.attention_norm, x)?;
                let x = self.attend(&normed, x, attention, place)?;
                let normed = self.mlp_norm.forward(&x)?;
                self.mlp.forward(&normed, &x, place)
            }
        }
    }

    /// Attention of x, added to the residual.
    fn attend(
        &self,
        x: &Tensor,
        residual: &Tensor,
        attention: &Attention,
        place: Place,
    ) -> Result<Tensor> {
        let context = attention.pick(&attention.forward(x, &self.qkv)?)?;
        let residual = attention.pick(residual)?;
        let p = place.dropouts.attention_output;
        let dropout = place.dropout.at(p, "attention", place.layer);
        self.attention_output
            .forward_add(&context, &residual, dropout)
    }
}

/// Two linear layers, or three with a gate.
struct Mlp {
    activation: Activation,
    intermediate: Linear,
    up: Option<Linear>,
    output: Linear,
}

impl Mlp {
    fn new(weights: &Weights, layer: &str) -> Result<Self> {
        let config = weights.config;
        let linear = |part: &str| weights.linear(&format!("{layer}.{part}.dense"), config.bias.mlp);
        Ok(Self {
            activation: config.hidden_act,
            intermediate: linear("intermediate")?,
            up: config.gated_mlp.then(|| linear("up")).transpose()?,
            output: linear("output")?,
        })
    }

    /// Added to the residual.
    fn forward(&self, x: &Tensor, residual: &Tensor, place: Place) -> Result<Tensor> {
        let p = &place.dropouts;
        let at = |p, name| place.dropout.at(p, name, place.layer);
        let (inner, outer) = (at(p.mlp_hidden, "mlp_hidden"), at(p.mlp_output, "mlp"));
        let simple = self.up.is_none() && inner.is_none() && outer.is_none();
        if simple && self.activation == Activation::Gelu {
            return self.intermediate.mlp_add(x, &self.output, residual);
        }
        let mut hidden = self.activation.forward(&self.intermediate.forward(x)?)?;
        if let Some(up) = &self.up {
            hidden = (hidden * up.forward(x)?)?;
        }
        if let Some(Dropout { p, seed }) = inner {
            hidden = dropout(&hidden, p, seed)?;
        }
        self.output.forward_add(&hidden, residual, outer)
    }
}

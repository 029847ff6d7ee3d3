//! The model configuration, with the keys of Hugging Face's `config.json`.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_rope_attn::{AttentionSpec, PositionEncoding, Rope, RopePairing, RopeScaling};
use serde::{Deserialize, Serialize};

/// The variants: one model, told apart by how positions enter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ModelType {
    /// Learned absolute position embeddings (Devlin et al. 2018).
    Bert,
    /// Rotary position embedding in every attention layer (Su et al. 2021).
    Roformer,
}

impl ModelType {
    /// Hugging Face's `model_type`, which also prefixes the names of the weights.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::Roformer => "roformer",
        }
    }

    /// Hugging Face's class for the language model, for `architectures`.
    fn architecture(self, is_decoder: bool) -> &'static str {
        match (self, is_decoder) {
            (Self::Bert, false) => "BertForMaskedLM",
            (Self::Bert, true) => "BertLMHeadModel",
            (Self::Roformer, false) => "RoFormerForMaskedLM",
            (Self::Roformer, true) => "RoFormerForCausalLM",
        }
    }
}

/// Hyperparameters of one model: `config.json` of a Hugging Face directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BertConfig {
    /// Which variant.
    pub model_type: ModelType,
    /// Class names that Python loads the directory with.
    #[serde(default)]
    pub architectures: Vec<String>,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Encoder layers.
    pub num_hidden_layers: usize,
    /// Attention heads; `hidden_size` is a multiple.
    pub num_attention_heads: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Activation of the MLP and the head; only `gelu` (the erf form).
    #[serde(default = "default_activation")]
    pub hidden_act: String,
    /// Dropout after embeddings, attention output and MLP, in training.
    #[serde(default)]
    pub hidden_dropout_prob: f32,
    /// Dropout of attention probabilities; must be 0 to train.
    #[serde(default)]
    pub attention_probs_dropout_prob: f32,
    /// Rows of the position table; for RoPE the longest input that transformers accepts.
    pub max_position_embeddings: usize,
    /// Rows of the segment table.
    #[serde(default = "default_type_vocab_size")]
    pub type_vocab_size: usize,
    /// Standard deviation of initial weights.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f64,
    /// Epsilon of every LayerNorm.
    #[serde(default = "default_layer_norm_eps")]
    pub layer_norm_eps: f64,
    /// Id of `[PAD]`.
    #[serde(default)]
    pub pad_token_id: u32,
    /// Causal attention.
    #[serde(default)]
    pub is_decoder: bool,
    /// The decoder shares the token embedding; only `true`.
    #[serde(default = "default_true")]
    pub tie_word_embeddings: bool,
    /// BERT: only `absolute`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position_embedding_type: Option<String>,
    /// RoFormer: width of the token embedding; only `hidden_size`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_size: Option<usize>,
    /// RoFormer: rotate values too; only `false`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary_value: Option<bool>,
    /// RoPE base. transformers takes the angles from the saved table instead, so other
    /// values load there too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
}

fn default_activation() -> String {
    "gelu".into()
}
fn default_type_vocab_size() -> usize {
    2
}
fn default_initializer_range() -> f64 {
    0.02
}
fn default_layer_norm_eps() -> f64 {
    1e-12
}
fn default_true() -> bool {
    true
}

impl BertConfig {
    /// A model of the given size with BERT's other defaults, and no dropout.
    pub fn new(
        model_type: ModelType,
        vocab_size: usize,
        num_hidden_layers: usize,
        hidden_size: usize,
        num_attention_heads: usize,
        max_position_embeddings: usize,
    ) -> Self {
        let roformer = model_type == ModelType::Roformer;
        Self {
            model_type,
            architectures: vec![model_type.architecture(false).into()],
            vocab_size,
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            intermediate_size: 4 * hidden_size,
            hidden_act: default_activation(),
            hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0,
            max_position_embeddings,
            type_vocab_size: default_type_vocab_size(),
            initializer_range: default_initializer_range(),
            layer_norm_eps: default_layer_norm_eps(),
            pad_token_id: 0,
            is_decoder: false,
            tie_word_embeddings: true,
            position_embedding_type: (!roformer).then(|| "absolute".into()),
            embedding_size: roformer.then_some(hidden_size),
            rotary_value: roformer.then_some(false),
            rope_theta: None,
        }
    }

    /// The same model with causal attention or without.
    pub fn with_decoder(mut self, is_decoder: bool) -> Self {
        self.is_decoder = is_decoder;
        self.architectures = vec![self.model_type.architecture(is_decoder).into()];
        self
    }

    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// Names the file and the key that is missing, wrong or not supported.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the model configuration {}", path.display()))?;
        let config: Self = serde_json::from_str(&text).with_context(|| {
            format!(
                "{} is not the configuration of a model we know",
                path.display()
            )
        })?;
        config
            .validate()
            .with_context(|| format!("in {}", path.display()))?;
        Ok(config)
    }

    /// Features of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// What every attention layer computes.
    ///
    /// # Errors
    /// When `head_dim` does not suit the position encoding.
    pub fn attention_spec(&self) -> Result<AttentionSpec> {
        let position = match self.model_type {
            ModelType::Bert => PositionEncoding::None,
            ModelType::Roformer => PositionEncoding::Rope(self.rope()?),
        };
        let spec = AttentionSpec::new(self.num_attention_heads, self.head_dim())
            .with_causal(self.is_decoder)
            .with_position(position);
        spec.validate()?;
        Ok(spec)
    }

    /// RoFormer's rotary frequencies: interleaved pairs.
    pub(crate) fn rope(&self) -> Result<Rope> {
        let theta = self.rope_theta.unwrap_or(10_000.0);
        Ok(Rope::new(
            self.head_dim(),
            theta,
            RopePairing::Interleaved,
            RopeScaling::None,
        )?)
    }

    /// Refuses what we would otherwise compute differently from transformers.
    ///
    /// # Errors
    /// Names the key, its value and the values supported.
    pub fn validate(&self) -> Result<()> {
        for (key, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ] {
            ensure!(value > 0, "{key} must be at least 1, got 0");
        }
        ensure!(
            self.hidden_size.is_multiple_of(self.num_attention_heads),
            "hidden_size {} is not a multiple of num_attention_heads {}; change one of them",
            self.hidden_size,
            self.num_attention_heads
        );
        ensure!(
            self.hidden_act == "gelu",
            "hidden_act \"{}\" is not supported, only \"gelu\" (the erf form)",
            self.hidden_act
        );
        for (key, p) in [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            (
                "attention_probs_dropout_prob",
                self.attention_probs_dropout_prob,
            ),
        ] {
            ensure!((0.0..1.0).contains(&p), "{key} must be in [0, 1), got {p}");
        }
        ensure!(
            self.tie_word_embeddings,
            "tie_word_embeddings false is not supported: the decoder shares the token embedding"
        );
        if let Some(kind) = &self.position_embedding_type {
            ensure!(
                kind == "absolute",
                "position_embedding_type \"{kind}\" is not supported, only \"absolute\""
            );
        }
        if let Some(size) = self.embedding_size {
            ensure!(
                size == self.hidden_size,
                "embedding_size {size} must equal hidden_size {}",
                self.hidden_size
            );
        }
        if self.rotary_value == Some(true) {
            bail!("rotary_value true (rotated values) is not supported, only false");
        }
        self.attention_spec().map(|_| ())
    }
}

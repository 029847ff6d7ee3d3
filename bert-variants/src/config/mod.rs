//! What a model computes, in one description for every `model_type` of Hugging Face.
//!
//! A variant is a value of [`BertConfig`]: the model's code reads its fields and never asks which
//! `model_type` they came from. `json.rs` translates to and from `config.json`.

mod json;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_rope_attn::{
    Alibi, AttentionSpec, PositionEncoding, RelativeBias, Rope, RopePairing, RopeScaling, Window,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// More than any model has; sizes beyond are mistakes that would use up memory.
const MAX_LAYERS: usize = 1_000;
const MAX_LABELS: usize = 1_000_000;

/// The kinds of model that we read and write, by Hugging Face's `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ModelType {
    /// Learned absolute position embeddings (Devlin et al. 2018, <https://arxiv.org/abs/1810.04805>).
    Bert,
    /// Rotary position embedding, interleaved pairs (Su et al. 2021, <https://arxiv.org/abs/2104.09864>).
    Roformer,
    /// Linear biases (Press et al. 2021, <https://arxiv.org/abs/2108.12409>), symmetric; Python
    /// loads it with a file that is saved beside the weights.
    Alibi,
    /// T5's relative bias, and absolute positions unless `position_table` is none
    /// (Song et al. 2020, <https://arxiv.org/abs/2004.09297>).
    Mpnet,
    /// Pre-norm, GeGLU, RoPE, local and global layers, no biases
    /// (Warner et al. 2024, <https://arxiv.org/abs/2412.13663>).
    Modernbert,
    /// RoPE and SwiGLU (Nussbaum et al. 2024, <https://arxiv.org/abs/2402.01613>).
    #[value(name = "nomic_bert")]
    NomicBert,
    /// BERT without segments and pooler (Sanh et al. 2019, <https://arxiv.org/abs/1910.01108>).
    Distilbert,
    /// BERT whose positions begin after the padding id (Liu et al. 2019,
    /// <https://arxiv.org/abs/1907.11692>).
    Roberta,
}

/// What stands on top of the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    /// Nothing but the pooler, where the model has one: `BertModel`.
    Base,
    /// Predicts tokens, masked or with `is_decoder` the next.
    LanguageModel,
    /// Labels a sequence.
    SequenceClassification,
    /// Labels every token.
    TokenClassification,
    /// Finds the first and last token of an answer.
    QuestionAnswering,
}

/// Elementwise functions of MLP and head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `x Φ(x)`, with erf.
    Gelu,
    /// Its approximation with tanh.
    #[serde(rename = "gelu_new", alias = "gelu_pytorch_tanh")]
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `x sigmoid(x)`.
    #[serde(alias = "swish")]
    Silu,
    /// Hyperbolic tangent.
    Tanh,
}

/// How positions enter attention; absolute positions are [`BertConfig::position_table`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Position {
    /// They do not.
    None,
    /// Rotary position embedding.
    Rope {
        /// Base of the frequencies, in layers that are not local.
        theta: f64,
        /// Which features form a pair.
        pairing: RopePairing,
        /// How the frequencies are stretched, in the same layers.
        scaling: RopeScaling,
    },
    /// Attention with linear biases.
    Alibi,
    /// T5's learned biases, shared by all layers.
    RelativeBias {
        /// Rows of the table of biases.
        num_buckets: usize,
        /// Distances from here on share a bucket.
        max_distance: usize,
    },
}

/// Layers whose queries see nearby keys only.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalAttention {
    /// Keys seen on either side.
    pub window: usize,
    /// Base of the frequencies of RoPE in these layers.
    pub rope_theta: f64,
    /// How they are stretched.
    pub rope_scaling: RopeScaling,
    /// For each layer, whether it is local.
    pub layers: Vec<bool>,
}

/// Where LayerNorm stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// After each residual sum, as in BERT.
    Post,
    /// Before attention (but not in the first layer, where the embeddings are normalised) and
    /// before the MLP, and once at the end.
    Pre,
}

/// Which weights have a bias beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Biases {
    /// Projections of attention.
    pub attention: bool,
    /// The MLP.
    pub mlp: bool,
    /// LayerNorm.
    pub norm: bool,
    /// The dense layer of the head.
    pub head: bool,
    /// Scores over the vocabulary.
    pub decoder: bool,
}

/// Probabilities of dropping, in training. A `config.json` holds those that transformers has for its
/// kind of model.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Dropouts {
    /// After the embeddings.
    pub embeddings: f64,
    /// Attention probabilities.
    pub attention_probs: f64,
    /// After attention's output projection.
    pub attention_output: f64,
    /// Between the two halves of the MLP.
    pub mlp_hidden: f64,
    /// After the MLP.
    pub mlp_output: f64,
    /// In a classification head; as `mlp_output` without.
    pub classifier: Option<f64>,
}

impl Dropouts {
    /// After embeddings, attention and MLP, as BERT's `hidden_dropout_prob`.
    pub fn of_hidden(p: f64) -> Self {
        Self {
            embeddings: p,
            attention_output: p,
            mlp_output: p,
            ..Self::default()
        }
    }

    /// Whether anything is dropped anywhere.
    pub(crate) fn any(&self) -> bool {
        self.all().iter().any(|p| *p > 0.0)
    }

    fn all(&self) -> [f64; 6] {
        let classifier = self.classifier.unwrap_or(0.0);
        [
            self.embeddings,
            self.attention_probs,
            self.attention_output,
            self.mlp_hidden,
            self.mlp_output,
            classifier,
        ]
    }
}

/// Which hidden states a head reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// That of the first token of a sequence.
    Cls,
    /// The mean over a sequence.
    Mean,
}

/// What the labels of a sequence are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemType {
    /// Numbers.
    Regression,
    /// One of several classes.
    SingleLabelClassification,
    /// Any number of several classes.
    MultiLabelClassification,
}

/// `dense`, activation and perhaps LayerNorm, before the last layer of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Transform {
    pub activation: Activation,
    pub norm: bool,
    /// Whether a classifier drops elements of its input too.
    pub dropout_before: bool,
}

/// One model. Build it with [`BertConfig::new`] or read it from a file, then change fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct BertConfig {
    /// Names of keys and weights on disk.
    pub model_type: ModelType,
    /// Head.
    pub task: Task,
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
    /// Rows of the position table; without one the longest input that transformers accepts.
    pub max_position_embeddings: usize,
    /// Rows of the segment table, 0 for none.
    pub type_vocab_size: usize,
    /// Row of the first position in a table of learned positions, if there is one.
    pub position_table: Option<usize>,
    /// How positions enter attention.
    pub position: Position,
    /// Local layers, if there are any.
    pub local: Option<LocalAttention>,
    /// Where LayerNorm stands.
    pub norm: Norm,
    /// Whether the MLP is `output(act(intermediate(x)) * up(x))`, as in GeGLU and SwiGLU, or
    /// `output(act(intermediate(x)))`.
    pub gated_mlp: bool,
    /// Activation of the MLP.
    pub hidden_act: Activation,
    /// Activation of ModernBERT's heads.
    pub classifier_activation: Activation,
    /// What a sequence classifier reads.
    pub classifier_pooling: Pooling,
    /// Which weights have biases.
    pub bias: Biases,
    /// Epsilon of every LayerNorm.
    pub layer_norm_eps: f64,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    /// Id of the padding token.
    pub pad_token_id: u32,
    /// Causal attention.
    pub is_decoder: bool,
    /// The scores over the vocabulary share the token embedding.
    pub tie_word_embeddings: bool,
    /// Dropout in training.
    pub dropout: Dropouts,
    /// Names of the classes; one for regression.
    pub labels: Vec<String>,
    /// What the labels are; without, regression if there is one and a class otherwise.
    pub problem_type: Option<ProblemType>,
    /// Keys of the `config.json` it was read from that change nothing of what is computed.
    extra: Map<String, Value>,
}

impl BertConfig {
    /// A language model of the given size for inputs of up to `max_length` tokens, with the other
    /// defaults of its `model_type` and no dropout.
    ///
    /// The MLP has four times the width, or a gated one 8/3, which is as many weights.
    pub fn new(
        model_type: ModelType,
        vocab_size: usize,
        num_hidden_layers: usize,
        hidden_size: usize,
        num_attention_heads: usize,
        max_length: usize,
    ) -> Self {
        let mut config = Self::of_type(model_type);
        config.vocab_size = vocab_size;
        config.num_hidden_layers = num_hidden_layers;
        config.hidden_size = hidden_size;
        config.num_attention_heads = num_attention_heads;
        config.intermediate_size = if config.gated_mlp {
            (8 * hidden_size / 3).next_multiple_of(8)
        } else {
            4 * hidden_size
        };
        config.pad_token_id = 0;
        match model_type {
            // The comparison's T5 variant: relative positions only.
            ModelType::Mpnet => config.position_table = None,
            ModelType::Roberta => config.position_table = Some(1),
            _ => {}
        }
        config.max_position_embeddings = max_length + model_type.first_position(0);
        if let Some(local) = &mut config.local {
            local.layers = every_third_global(num_hidden_layers);
        }
        config
    }

    /// The defaults of transformers' configuration class, except for the sizes, which are 0, and
    /// dropout, which is none.
    fn of_type(model_type: ModelType) -> Self {
        use ModelType::*;
        let half_split = |theta| Position::Rope {
            theta,
            pairing: RopePairing::HalfSplit,
            scaling: RopeScaling::None,
        };
        let modern = model_type == Modernbert;
        let nomic = model_type == NomicBert;
        Self {
            model_type,
            task: Task::LanguageModel,
            vocab_size: 0,
            hidden_size: 0,
            num_hidden_layers: 0,
            num_attention_heads: 0,
            intermediate_size: 0,
            max_position_embeddings: 0,
            type_vocab_size: match model_type {
                Bert | Roformer | Alibi | NomicBert | Roberta => 2,
                Mpnet | Modernbert | Distilbert => 0,
            },
            position_table: match model_type {
                Bert | Distilbert => Some(0),
                Mpnet | Roberta => Some(2),
                Roformer | Alibi | Modernbert | NomicBert => None,
            },
            position: match model_type {
                Bert | Distilbert | Roberta => Position::None,
                Roformer => Position::Rope {
                    theta: 10_000.0,
                    pairing: RopePairing::Interleaved,
                    scaling: RopeScaling::None,
                },
                Modernbert => half_split(160_000.0),
                NomicBert => half_split(1_000.0),
                Alibi => Position::Alibi,
                Mpnet => Position::RelativeBias {
                    num_buckets: 32,
                    max_distance: 128,
                },
            },
            local: modern.then(|| LocalAttention {
                window: 64,
                rope_theta: 10_000.0,
                rope_scaling: RopeScaling::None,
                layers: Vec::new(),
            }),
            norm: if modern { Norm::Pre } else { Norm::Post },
            gated_mlp: modern || nomic,
            hidden_act: if nomic {
                Activation::Silu
            } else {
                Activation::Gelu
            },
            classifier_activation: Activation::Gelu,
            classifier_pooling: Pooling::Cls,
            bias: Biases {
                attention: !modern && !nomic,
                mlp: !modern && !nomic,
                norm: !modern,
                head: !modern,
                decoder: true,
            },
            layer_norm_eps: if modern { 1e-5 } else { 1e-12 },
            initializer_range: 0.02,
            pad_token_id: match model_type {
                Bert | Roformer | Alibi | NomicBert | Distilbert => 0,
                Mpnet | Roberta => 1,
                Modernbert => 50_283,
            },
            is_decoder: false,
            tie_word_embeddings: true,
            dropout: Dropouts {
                // These have no classifier without a probability of its own.
                classifier: (modern || model_type == Distilbert).then_some(0.0),
                ..Dropouts::default()
            },
            labels: default_labels(2),
            problem_type: None,
            extra: Map::new(),
        }
    }

    /// The same model with causal attention or without.
    pub fn with_decoder(mut self, is_decoder: bool) -> Self {
        self.is_decoder = is_decoder;
        self
    }

    /// The same encoder with another head. Question answering has two labels always, the first and
    /// the last token of the answer.
    pub fn with_task(mut self, task: Task) -> Self {
        self.task = task;
        if task == Task::QuestionAnswering {
            self.labels = default_labels(2);
        }
        self
    }

    /// The same model with other labels.
    pub fn with_labels(mut self, labels: Vec<String>, problem_type: ProblemType) -> Self {
        self.labels = labels;
        self.problem_type = Some(problem_type);
        self
    }

    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// Names the file and the key that is missing, wrong or not supported.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the model configuration {}", path.display()))?;
        let parse = || -> Result<Self> {
            let json: Map<String, Value> = serde_json::from_str(&text)?;
            Self::try_from(json)
        };
        parse().with_context(|| format!("{} is not a configuration we can use", path.display()))
    }

    /// Features of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// The longest input in tokens, `None` without a limit.
    pub fn max_length(&self) -> Option<usize> {
        let table = self.position_table;
        table.map(|first| self.max_position_embeddings.saturating_sub(first))
    }

    /// The longest input in tokens that the model is meant for.
    pub fn intended_length(&self) -> usize {
        self.max_length().unwrap_or(self.max_position_embeddings)
    }

    /// What the attention of a layer computes, without dropout.
    ///
    /// # Errors
    /// When `head_dim` does not suit the position encoding.
    pub fn attention_spec(&self, layer: usize) -> Result<AttentionSpec> {
        let local = self
            .local
            .as_ref()
            .filter(|local| local.layers.get(layer) == Some(&true));
        let mut attention_factor = 1.0;
        let position = match self.position {
            Position::None => PositionEncoding::None,
            Position::Rope {
                theta,
                pairing,
                scaling,
            } => {
                let of_local = |local: &LocalAttention| (local.rope_theta, local.rope_scaling);
                let (theta, scaling) = local.map_or((theta, scaling), of_local);
                if let RopeScaling::Yarn(yarn) = scaling {
                    attention_factor = yarn.attention_factor;
                }
                PositionEncoding::Rope(Rope::new(self.head_dim(), theta, pairing, scaling)?)
            }
            Position::Alibi => PositionEncoding::Alibi(Alibi::new(self.num_attention_heads)),
            Position::RelativeBias {
                num_buckets,
                max_distance,
            } => PositionEncoding::RelativeBias(RelativeBias {
                num_buckets,
                max_distance,
                bidirectional: !self.is_decoder,
            }),
        };
        let window = local.map(|local| Window {
            left: Some(local.window),
            right: Some(local.window),
        });
        let spec = AttentionSpec::new(self.num_attention_heads, self.head_dim());
        // It multiplies both queries and keys.
        let softmax_scale = spec.softmax_scale * attention_factor.powi(2) as f32;
        let spec = spec
            .with_softmax_scale(softmax_scale)
            .with_causal(self.is_decoder)
            .with_position(position)
            .with_window(window);
        spec.validate()?;
        Ok(spec)
    }

    /// What the head computes before its last layer; none for heads of one layer.
    pub(crate) fn transform(&self) -> Option<Transform> {
        use ModelType::*;
        let modern = self.model_type == Modernbert;
        let (activation, norm) = match self.task {
            _ if modern && self.task != Task::Base => (self.classifier_activation, true),
            Task::LanguageModel => match self.model_type {
                // Whatever hidden_act says.
                Roberta | Mpnet => (Activation::Gelu, true),
                _ => (self.hidden_act, true),
            },
            Task::Base if !self.model_type.has_pooler() => return None,
            Task::Base => (Activation::Tanh, false),
            Task::SequenceClassification => match self.model_type {
                Roformer => (self.hidden_act, false),
                Distilbert => (Activation::Relu, false),
                _ => (Activation::Tanh, false),
            },
            Task::TokenClassification | Task::QuestionAnswering => return None,
        };
        Some(Transform {
            activation,
            norm,
            dropout_before: self.task == Task::SequenceClassification
                && matches!(self.model_type, Roformer | Roberta | Mpnet),
        })
    }

    /// Outputs of the last layer of the head, 0 without one.
    pub(crate) fn head_outputs(&self) -> usize {
        match self.task {
            Task::Base => 0,
            Task::LanguageModel => self.vocab_size,
            _ => self.labels.len(),
        }
    }

    /// Dropout of the head.
    pub(crate) fn head_dropout(&self) -> f64 {
        match self.task {
            Task::SequenceClassification | Task::TokenClassification => {
                self.dropout.classifier.unwrap_or(self.dropout.mlp_output)
            }
            _ => 0.0,
        }
    }

    /// What the labels are.
    pub fn problem_type(&self) -> ProblemType {
        self.problem_type.unwrap_or(match self.labels.len() {
            1 => ProblemType::Regression,
            _ => ProblemType::SingleLabelClassification,
        })
    }

    /// Refuses what cannot be computed, or would be computed differently by transformers.
    ///
    /// # Errors
    /// Names the key, its value and the values supported.
    pub fn validate(&self) -> Result<()> {
        /// Far above any model, far below sizes whose products overflow.
        const LARGEST: usize = 1 << 28;
        let max_length = self.intended_length();
        for (key, value, largest) in [
            ("vocab_size", self.vocab_size, LARGEST),
            ("hidden_size", self.hidden_size, LARGEST),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, LARGEST),
            ("intermediate_size", self.intermediate_size, LARGEST),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                LARGEST,
            ),
            (
                "the longest input (of max_position_embeddings)",
                max_length,
                LARGEST,
            ),
            ("the number of labels", self.labels.len(), MAX_LABELS),
        ] {
            ensure!(
                (1..=largest).contains(&value),
                "{key} must be 1 to {largest}, got {value}"
            );
        }
        ensure!(
            self.type_vocab_size <= LARGEST,
            "type_vocab_size must be at most {LARGEST}, got {}",
            self.type_vocab_size
        );
        ensure!(
            self.type_vocab_size > 0 || Self::of_type(self.model_type).type_vocab_size == 0,
            "type_vocab_size must be at least 1, got 0"
        );
        ensure!(
            self.hidden_size.is_multiple_of(self.num_attention_heads),
            "hidden_size {} is not a multiple of num_attention_heads {}; change one of them",
            self.hidden_size,
            self.num_attention_heads
        );
        for (key, value) in [
            ("layer_norm_eps", self.layer_norm_eps),
            ("initializer_range", self.initializer_range),
        ] {
            ensure!(
                value.is_finite() && value >= 0.0,
                "{key} must be finite and not negative, got {value}"
            );
        }
        for p in self.dropout.all() {
            ensure!(
                (0.0..1.0).contains(&p),
                "dropout must be in [0, 1), got {p}"
            );
        }
        ensure!(
            self.task != Task::QuestionAnswering || self.labels.len() == 2,
            "question answering has 2 labels, got {}",
            self.labels.len()
        );
        if self.is_decoder {
            self.model_type.class(Task::LanguageModel, true)?;
        }
        if let Some(local) = &self.local {
            ensure!(
                local.layers.len() == self.num_hidden_layers,
                "layer_types has {} entries, but num_hidden_layers is {}",
                local.layers.len(),
                self.num_hidden_layers
            );
        }
        for layer in 0..self.num_hidden_layers {
            self.attention_spec(layer)?;
        }
        Ok(())
    }
}

/// ModernBERT's default pattern: which layers are local.
fn every_third_global(layers: usize) -> Vec<bool> {
    (0..layers).map(|layer| layer % 3 != 0).collect()
}

/// transformers' names for labels without one.
fn default_labels(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("LABEL_{i}")).collect()
}

impl ModelType {
    const ALL: [Self; 8] = [
        Self::Bert,
        Self::Roformer,
        Self::Alibi,
        Self::Mpnet,
        Self::Modernbert,
        Self::NomicBert,
        Self::Distilbert,
        Self::Roberta,
    ];

    /// Hugging Face's `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::Roformer => "roformer",
            Self::Alibi => "alibi",
            Self::Mpnet => "mpnet",
            Self::Modernbert => "modernbert",
            Self::NomicBert => "nomic_bert",
            Self::Distilbert => "distilbert",
            Self::Roberta => "roberta",
        }
    }

    /// The position id of the first token.
    fn first_position(self, pad_token_id: u32) -> usize {
        match self {
            Self::Roberta => pad_token_id as usize + 1,
            // transformers' MPNet takes 1 for the padding id always.
            Self::Mpnet => 2,
            _ => 0,
        }
    }

    fn has_pooler(self) -> bool {
        matches!(self, Self::Bert | Self::Roberta | Self::Mpnet | Self::Alibi)
    }

    /// transformers' class for a task.
    pub(crate) fn class(self, task: Task, is_decoder: bool) -> Result<String> {
        let model = match self {
            Self::Bert => "Bert",
            Self::Roformer => "RoFormer",
            Self::Alibi => "Alibi",
            Self::Mpnet => "MPNet",
            Self::Modernbert => "ModernBert",
            Self::NomicBert => "NomicBert",
            Self::Distilbert => "DistilBert",
            Self::Roberta => "Roberta",
        };
        let has_decoder = matches!(
            self,
            Self::Bert | Self::Roformer | Self::Alibi | Self::Roberta
        );
        ensure!(
            !is_decoder || has_decoder,
            "{} has no causal form in transformers (is_decoder true); use bert, roformer, alibi or roberta",
            self.name()
        );
        let head = match task {
            Task::Base => "Model",
            Task::LanguageModel if !is_decoder => "ForMaskedLM",
            Task::LanguageModel if self == Self::Bert => "LMHeadModel",
            Task::LanguageModel => "ForCausalLM",
            Task::SequenceClassification => "ForSequenceClassification",
            Task::TokenClassification => "ForTokenClassification",
            Task::QuestionAnswering if self == Self::NomicBert => {
                bail!("nomic_bert has no question answering in transformers")
            }
            Task::QuestionAnswering => "ForQuestionAnswering",
        };
        Ok(format!("{model}{head}"))
    }
}

impl Task {
    /// The task of a class in `architectures`.
    fn of_class(class: &str) -> Self {
        let ends = |endings: &[&str]| endings.iter().any(|ending| class.ends_with(ending));
        if ends(&[
            "ForMaskedLM",
            "LMHeadModel",
            "ForCausalLM",
            "ForPreTraining",
        ]) {
            Self::LanguageModel
        } else if ends(&["ForSequenceClassification"]) {
            Self::SequenceClassification
        } else if ends(&["ForTokenClassification"]) {
            Self::TokenClassification
        } else if ends(&["ForQuestionAnswering"]) {
            Self::QuestionAnswering
        } else {
            Self::Base
        }
    }
}

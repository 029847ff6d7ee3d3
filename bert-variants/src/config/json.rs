//! `config.json` of every `model_type`, to and from [`BertConfig`].
//!
//! One list of keys serves both ways, see [`Keys`].

use anyhow::{Context, Result, anyhow, ensure};
use candle_rope_attn::{RopeScaling, Yarn};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    BertConfig, Dropouts, LocalAttention, MAX_LABELS, MAX_LAYERS, ModelType, Position, Task,
    default_labels, every_third_global,
};

/// Keys that say how a file was made, which is not true of the one we write.
const DROPPED: [&str; 4] = [
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
];

/// Ids that ModernBERT's configuration holds.
const SPECIAL_TOKENS: [&str; 4] = [
    "bos_token_id",
    "eos_token_id",
    "cls_token_id",
    "sep_token_id",
];

/// Module of the Python file that is saved with an ALiBi model.
const ALIBI_MODULE: &str = "modeling_alibi";

impl TryFrom<Map<String, Value>> for BertConfig {
    type Error = anyhow::Error;

    fn try_from(json: Map<String, Value>) -> Result<Self> {
        let mut keys = Keys {
            json,
            reading: true,
        };
        let mut name = String::new();
        keys.required("model_type", &mut name)?;
        let known = ModelType::ALL.map(ModelType::name);
        let model_type = ModelType::ALL
            .into_iter()
            .find(|t| t.name() == name)
            .ok_or_else(|| {
                anyhow!(
                    "model_type \"{name}\" is not supported, only {}",
                    known.join(", ")
                )
            })?;
        let mut config = Self::of_type(model_type);
        let mut architectures: Vec<String> = Vec::new();
        keys.optional("architectures", &mut architectures)?;
        config.task = architectures
            .first()
            .map_or(Task::Base, |class| Task::of_class(class));
        describe(&mut keys, &mut config)?;
        for key in DROPPED {
            keys.json.remove(key);
        }
        config.extra = keys.json;
        config.validate()?;
        Ok(config)
    }
}

impl From<BertConfig> for Map<String, Value> {
    fn from(mut config: BertConfig) -> Self {
        let mut keys = Keys {
            json: Map::new(),
            reading: false,
        };
        let class = config.model_type.class(config.task, config.is_decoder);
        if let Ok(class) = class {
            keys.json.insert("architectures".into(), json!([class]));
        }
        keys.json
            .insert("model_type".into(), json!(config.model_type));
        let extra = std::mem::take(&mut config.extra);
        // Writing fails for no value that a configuration can hold.
        let _ = describe(&mut keys, &mut config);
        keys.json.extend(extra);
        keys.json
    }
}

/// The keys of a `config.json`, gone through once to read it and once to write it.
struct Keys {
    json: Map<String, Value>,
    reading: bool,
}

impl Keys {
    /// A key that must be there.
    fn required<T: Serialize + DeserializeOwned>(
        &mut self,
        key: &str,
        value: &mut T,
    ) -> Result<()> {
        ensure!(
            !self.reading || self.json.get(key).is_some_and(|value| !value.is_null()),
            "the key {key} is missing"
        );
        self.optional(key, value)
    }

    /// A key without which `value` stays as it is.
    fn optional<T: Serialize + DeserializeOwned>(
        &mut self,
        key: &str,
        value: &mut T,
    ) -> Result<()> {
        if !self.reading {
            self.json.insert(key.into(), serde_json::to_value(value)?);
        } else if let Some(found) = self.json.remove(key).filter(|found| !found.is_null()) {
            let text = found.to_string();
            *value = serde_json::from_value(found)
                .with_context(|| format!("{key} is {}", shortened(&text)))?;
        }
        Ok(())
    }

    /// A key that may have one value only, the one it has where it is missing.
    fn only(&mut self, key: &str, expected: Value) -> Result<()> {
        if !self.reading {
            self.json.insert(key.into(), expected);
        } else {
            self.refuse(key, &expected)?;
            self.json.remove(key);
        }
        Ok(())
    }

    /// As [`Keys::only`], but not written unless it was read.
    fn refuse(&mut self, key: &str, expected: &Value) -> Result<()> {
        let Some(found) = self.json.get(key).filter(|_| self.reading) else {
            return Ok(());
        };
        ensure!(
            found.is_null() || found == expected,
            "{key} {} is not supported, only {expected}",
            shortened(&found.to_string())
        );
        Ok(())
    }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

fn describe(keys: &mut Keys, config: &mut BertConfig) -> Result<()> {
    use ModelType::*;
    keys.refuse("quantization_config", &Value::Null)?;
    keys.refuse("pruned_heads", &json!({}))?;
    keys.required("vocab_size", &mut config.vocab_size)?;
    match config.model_type {
        Distilbert => distilbert(keys, config)?,
        Modernbert => modernbert(keys, config)?,
        Bert | Roformer | Alibi | Mpnet | NomicBert | Roberta => bert(keys, config)?,
    }
    keys.optional("initializer_range", &mut config.initializer_range)?;
    keys.optional("pad_token_id", &mut config.pad_token_id)?;
    keys.optional("tie_word_embeddings", &mut config.tie_word_embeddings)?;
    if config.model_type == Roberta && config.position_table.is_some() {
        config.position_table = Some(Roberta.first_position(config.pad_token_id));
    }
    auto_map(keys, config)?;
    labels(keys, config)
}

fn sizes(keys: &mut Keys, config: &mut BertConfig, names: [&str; 4]) -> Result<()> {
    let [hidden, layers, heads, intermediate] = names;
    keys.required(hidden, &mut config.hidden_size)?;
    keys.required(layers, &mut config.num_hidden_layers)?;
    keys.required(heads, &mut config.num_attention_heads)?;
    keys.required(intermediate, &mut config.intermediate_size)?;
    keys.required(
        "max_position_embeddings",
        &mut config.max_position_embeddings,
    )
}

const SIZES: [&str; 4] = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
];

/// The keys of `BertConfig`, and those that others of its kind have beside.
fn bert(keys: &mut Keys, config: &mut BertConfig) -> Result<()> {
    use ModelType::*;
    let model_type = config.model_type;
    sizes(keys, config, SIZES)?;
    keys.optional("hidden_act", &mut config.hidden_act)?;
    let dropout = &mut config.dropout;
    keys.optional("hidden_dropout_prob", &mut dropout.mlp_output)?;
    dropout.embeddings = dropout.mlp_output;
    dropout.attention_output = dropout.mlp_output;
    keys.optional("attention_probs_dropout_prob", &mut dropout.attention_probs)?;
    keys.optional("layer_norm_eps", &mut config.layer_norm_eps)?;
    if model_type != Mpnet {
        keys.optional("type_vocab_size", &mut config.type_vocab_size)?;
    }
    if matches!(model_type, Bert | Roberta | NomicBert | Alibi) {
        keys.optional("classifier_dropout", &mut config.dropout.classifier)?;
    }
    if matches!(model_type, Bert | Roberta | Roformer | Alibi) {
        keys.optional("is_decoder", &mut config.is_decoder)?;
        keys.refuse("add_cross_attention", &json!(false))?;
    }
    match model_type {
        Bert | Roberta => keys.only("position_embedding_type", json!("absolute")),
        Roformer => {
            keys.only("embedding_size", json!(config.hidden_size))?;
            keys.only("rotary_value", json!(false))?;
            roformer_theta(keys, &mut config.position)
        }
        NomicBert => {
            let head_dim = config.hidden_size.checked_div(config.num_attention_heads);
            keys.only("head_dim", json!(head_dim))?;
            let (mut theta, scaling) = rope_of(&config.position);
            if keys.reading {
                keys.optional("rope_theta", &mut theta)?;
                rename_rope_scaling(keys, theta)?;
            }
            let mut rope = RopeParameters::new(theta, scaling);
            keys.optional("rope_parameters", &mut rope)?;
            set_rope(&mut config.position, rope);
            Ok(())
        }
        Mpnet => {
            keys.only("relative_attention_num_buckets", json!(32))?;
            // A key of ours; transformers has the table always, and we write one of zeros.
            let mut absolute = config.position_table.is_some();
            keys.optional("absolute_positions", &mut absolute)?;
            config.position_table = absolute.then_some(Mpnet.first_position(1));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// transformers takes RoFormer's angles from a table among the weights, so that other bases than
/// the usual one load there too; the key is ours.
fn roformer_theta(keys: &mut Keys, position: &mut Position) -> Result<()> {
    let (mut theta, scaling) = rope_of(position);
    if keys.reading || theta != 10_000.0 {
        keys.optional("rope_theta", &mut theta)?;
    }
    set_rope(position, RopeParameters::new(theta, scaling));
    Ok(())
}

/// RoPE in version 5 of transformers.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
enum RopeParameters {
    Default {
        rope_theta: f64,
    },
    Linear {
        rope_theta: f64,
        factor: f64,
    },
    Yarn {
        rope_theta: f64,
        factor: f64,
        original_max_position_embeddings: usize,
        beta_fast: Option<f64>,
        beta_slow: Option<f64>,
        attention_factor: Option<f64>,
    },
}

impl RopeParameters {
    fn new(rope_theta: f64, scaling: RopeScaling) -> Self {
        match scaling {
            RopeScaling::Linear(factor) => Self::Linear { rope_theta, factor },
            RopeScaling::Yarn(yarn) => Self::Yarn {
                rope_theta,
                factor: yarn.factor,
                original_max_position_embeddings: yarn.original_length,
                beta_fast: Some(yarn.beta_fast),
                beta_slow: Some(yarn.beta_slow),
                attention_factor: Some(yarn.attention_factor),
            },
            // transformers has no name for the other; no file asks for it.
            RopeScaling::None | RopeScaling::Ntk(_) => Self::Default { rope_theta },
        }
    }

    fn theta_and_scaling(self) -> (f64, RopeScaling) {
        match self {
            Self::Default { rope_theta } => (rope_theta, RopeScaling::None),
            Self::Linear { rope_theta, factor } => (rope_theta, RopeScaling::Linear(factor)),
            Self::Yarn {
                rope_theta,
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor,
            } => {
                let usual = Yarn::new(factor, original_max_position_embeddings);
                let yarn = Yarn {
                    beta_fast: beta_fast.unwrap_or(usual.beta_fast),
                    beta_slow: beta_slow.unwrap_or(usual.beta_slow),
                    attention_factor: attention_factor.unwrap_or(usual.attention_factor),
                    ..usual
                };
                (rope_theta, RopeScaling::Yarn(yarn))
            }
        }
    }
}

/// Version 4 of transformers has the base apart from what stretches it, whose kind is `type`.
fn rename_rope_scaling(keys: &mut Keys, theta: f64) -> Result<()> {
    let mut scaling: Option<Map<String, Value>> = None;
    keys.optional("rope_scaling", &mut scaling)?;
    let Some(mut scaling) = scaling else {
        return Ok(());
    };
    ensure!(
        keys.json.get("rope_parameters").is_none_or(Value::is_null),
        "both rope_scaling and rope_parameters are given; leave one of them out"
    );
    if let Some(kind) = scaling.remove("type") {
        scaling.insert("rope_type".into(), kind);
    }
    scaling.entry("rope_theta").or_insert(json!(theta));
    keys.json.insert("rope_parameters".into(), scaling.into());
    Ok(())
}

/// Base and scaling.
fn rope_of(position: &Position) -> (f64, RopeScaling) {
    match *position {
        Position::Rope { theta, scaling, .. } => (theta, scaling),
        _ => (10_000.0, RopeScaling::None),
    }
}

fn set_rope(position: &mut Position, new: RopeParameters) {
    if let Position::Rope { theta, scaling, .. } = position {
        (*theta, *scaling) = new.theta_and_scaling();
    }
}

/// Where it must be a number; transformers refuses null.
fn classifier_dropout(keys: &mut Keys, key: &str, dropout: &mut Dropouts) -> Result<()> {
    let mut p = dropout.classifier.unwrap_or(dropout.mlp_output);
    keys.optional(key, &mut p)?;
    dropout.classifier = Some(p);
    Ok(())
}

fn distilbert(keys: &mut Keys, config: &mut BertConfig) -> Result<()> {
    sizes(keys, config, ["dim", "n_layers", "n_heads", "hidden_dim"])?;
    keys.optional("activation", &mut config.hidden_act)?;
    let dropout = &mut config.dropout;
    keys.optional("dropout", &mut dropout.mlp_output)?;
    dropout.embeddings = dropout.mlp_output;
    keys.optional("attention_dropout", &mut dropout.attention_probs)?;
    classifier_dropout(keys, "seq_classif_dropout", dropout)
}

#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LayerType {
    FullAttention,
    SlidingAttention,
}

/// RoPE of ModernBERT's two kinds of layers.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerRopeParameters {
    full_attention: RopeParameters,
    sliding_attention: RopeParameters,
}

/// The keys of versions 4 and 5 of transformers; both are written.
fn modernbert(keys: &mut Keys, config: &mut BertConfig) -> Result<()> {
    sizes(keys, config, SIZES)?;
    keys.optional("hidden_activation", &mut config.hidden_act)?;
    keys.optional("norm_eps", &mut config.layer_norm_eps)?;
    keys.optional("norm_bias", &mut config.bias.norm)?;
    keys.optional("attention_bias", &mut config.bias.attention)?;
    keys.optional("mlp_bias", &mut config.bias.mlp)?;
    keys.optional("decoder_bias", &mut config.bias.decoder)?;
    keys.optional("classifier_bias", &mut config.bias.head)?;
    keys.optional("classifier_activation", &mut config.classifier_activation)?;
    keys.optional("classifier_pooling", &mut config.classifier_pooling)?;
    let dropout = &mut config.dropout;
    keys.optional("embedding_dropout", &mut dropout.embeddings)?;
    keys.optional("attention_dropout", &mut dropout.attention_probs)?;
    dropout.attention_output = dropout.attention_probs;
    keys.optional("mlp_dropout", &mut dropout.mlp_hidden)?;
    classifier_dropout(keys, "classifier_dropout", dropout)?;
    // Special tokens are the tokenizer's business, and transformers' defaults may lie outside of
    // the vocabulary.
    for key in SPECIAL_TOKENS {
        match keys.reading {
            true if keys.json.get(key).is_some_and(Value::is_null) => drop(keys.json.remove(key)),
            true => {}
            false => drop(keys.json.insert(key.into(), Value::Null)),
        }
    }
    local_attention(keys, config)
}

fn local_attention(keys: &mut Keys, config: &mut BertConfig) -> Result<()> {
    let layers = config.num_hidden_layers;
    let local = config.local.get_or_insert_with(|| LocalAttention {
        window: 64,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        layers: every_third_global(layers),
    });
    let mut both_sides = 2 * local.window;
    keys.optional("local_attention", &mut both_sides)?;
    local.window = both_sides / 2;

    let (mut global_theta, global_scaling) = rope_of(&config.position);
    keys.optional("global_rope_theta", &mut global_theta)?;
    keys.optional("local_rope_theta", &mut local.rope_theta)?;
    let mut rope = LayerRopeParameters {
        full_attention: RopeParameters::new(global_theta, global_scaling),
        sliding_attention: RopeParameters::new(local.rope_theta, local.rope_scaling),
    };
    keys.optional("rope_parameters", &mut rope)?;
    keys.refuse("rope_scaling", &Value::Null)?;
    set_rope(&mut config.position, rope.full_attention);
    (local.rope_theta, local.rope_scaling) = rope.sliding_attention.theta_and_scaling();

    let mut every = period(&local.layers).unwrap_or(3);
    if keys.reading || period(&local.layers).is_some() {
        keys.optional("global_attn_every_n_layers", &mut every)?;
    }
    ensure!(
        every > 0,
        "global_attn_every_n_layers must be at least 1, got 0"
    );
    if keys.reading {
        ensure!(
            layers <= MAX_LAYERS,
            "num_hidden_layers must be at most {MAX_LAYERS}, got {layers}"
        );
        local.layers = (0..layers).map(|layer| layer % every != 0).collect();
    }
    let kind = |local: &bool| {
        if *local {
            LayerType::SlidingAttention
        } else {
            LayerType::FullAttention
        }
    };
    let mut kinds: Vec<LayerType> = local.layers.iter().map(kind).collect();
    keys.optional("layer_types", &mut kinds)?;
    local.layers = kinds
        .iter()
        .map(|kind| *kind == LayerType::SlidingAttention)
        .collect();
    Ok(())
}

/// `n` where every `n`-th layer is global, beginning with the first.
fn period(local: &[bool]) -> Option<usize> {
    (1..=local.len().max(1)).find(|n| (0..local.len()).all(|i| local[i] == (i % n != 0)))
}

/// Python code beside a model: ours for ALiBi. A model that brings its own computes what we
/// cannot know.
fn auto_map(keys: &mut Keys, config: &BertConfig) -> Result<()> {
    if config.model_type != ModelType::Alibi {
        return keys.refuse("auto_map", &Value::Null).context(
            "the model comes with Python code of its own; remove auto_map if it computes the same without",
        );
    }
    let mut map = Map::new();
    map.insert(
        "AutoConfig".into(),
        json!(format!("{ALIBI_MODULE}.AlibiConfig")),
    );
    for (auto, task, is_decoder) in [
        ("AutoModel", Task::Base, false),
        ("AutoModelForMaskedLM", Task::LanguageModel, false),
        ("AutoModelForCausalLM", Task::LanguageModel, true),
        (
            "AutoModelForSequenceClassification",
            Task::SequenceClassification,
            false,
        ),
        (
            "AutoModelForTokenClassification",
            Task::TokenClassification,
            false,
        ),
        (
            "AutoModelForQuestionAnswering",
            Task::QuestionAnswering,
            false,
        ),
    ] {
        let class = config.model_type.class(task, is_decoder)?;
        map.insert(auto.into(), json!(format!("{ALIBI_MODULE}.{class}")));
    }
    keys.only("auto_map", Value::Object(map))
}

/// `id2label` and what goes with it. transformers' default of two nameless labels is left out.
fn labels(keys: &mut Keys, config: &mut BertConfig) -> Result<()> {
    let ids = |labels: &[String]| -> Map<String, Value> {
        let named = labels.iter().enumerate();
        named
            .map(|(id, label)| (id.to_string(), json!(label)))
            .collect()
    };
    if !keys.reading {
        if config.labels != default_labels(2) {
            let label2id: Map<String, Value> = config
                .labels
                .iter()
                .enumerate()
                .map(|(id, label)| (label.clone(), json!(id)))
                .collect();
            keys.json
                .insert("id2label".into(), Value::Object(ids(&config.labels)));
            keys.json.insert("label2id".into(), Value::Object(label2id));
        }
        if config.problem_type.is_some() {
            keys.optional("problem_type", &mut config.problem_type)?;
        }
        return Ok(());
    }
    keys.optional("problem_type", &mut config.problem_type)?;
    let mut count = config.labels.len();
    keys.optional("num_labels", &mut count)?;
    ensure!(
        count <= MAX_LABELS,
        "num_labels must be at most {MAX_LABELS}, got {count}"
    );
    let mut id2label = ids(&default_labels(count));
    keys.optional("id2label", &mut id2label)?;
    keys.json.remove("label2id");
    let label = |id: usize| {
        let label = id2label.get(&id.to_string())?;
        Some(
            label
                .as_str()
                .map_or_else(|| label.to_string(), str::to_string),
        )
    };
    config.labels = (0..id2label.len())
        .map(|id| {
            label(id).with_context(|| {
                format!("id2label has {} labels, but none for {id}", id2label.len())
            })
        })
        .collect::<Result<_>>()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Activation, Pooling};
    use clap::ValueEnum;

    fn bert() -> Value {
        json!({
            "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 30522,
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "max_position_embeddings": 512,
        })
    }

    fn parse(json: &Value) -> Result<BertConfig> {
        BertConfig::try_from(json.as_object().cloned().unwrap_or_default())
    }

    fn with(mut json: Value, key: &str, value: Value) -> Value {
        json[key] = value;
        json
    }

    #[test]
    fn every_model_type_survives_writing_and_reading() {
        for model_type in ModelType::value_variants() {
            let mut config = BertConfig::new(*model_type, 100, 6, 64, 4, 128);
            config.labels = vec!["no".into(), "yes".into(), "perhaps".into()];
            config.task = Task::SequenceClassification;
            config.layer_norm_eps = if *model_type == ModelType::Distilbert {
                1e-12
            } else {
                1e-6
            };
            config.hidden_act = Activation::Relu;
            config.dropout.mlp_hidden = 0.0;
            let written = Map::from(config.clone());
            assert_eq!(written["model_type"], model_type.name());
            assert_eq!(BertConfig::try_from(written.clone()).unwrap(), config);
            let no_null = ["classifier_dropout", "seq_classif_dropout"];
            if matches!(model_type, ModelType::Modernbert | ModelType::Distilbert) {
                let mut config = config.clone();
                config.dropout = Dropouts::of_hidden(0.1);
                let written = Map::from(config);
                assert!(
                    no_null
                        .iter()
                        .any(|key| written.get(*key).is_some_and(Value::is_f64))
                );
            }
            // Through text too.
            let text = serde_json::to_string(&written).unwrap();
            assert_eq!(serde_json::from_str::<BertConfig>(&text).unwrap(), config);
        }
    }

    #[test]
    fn keys_that_change_nothing_are_kept() {
        let json = with(bert(), "my_note", json!({"a": [1, 2]}));
        let json = with(json, "transformers_version", json!("4.1"));
        let written = Map::from(parse(&json).unwrap());
        assert_eq!(written["my_note"], json["my_note"]);
        assert!(!written.contains_key("transformers_version"));
    }

    #[test]
    fn what_we_do_not_compute_is_refused() {
        for (key, value, message) in [
            (
                "model_type",
                json!("t5"),
                "model_type \"t5\" is not supported, only bert, roformer",
            ),
            ("model_type", Value::Null, "the key model_type is missing"),
            ("hidden_size", Value::Null, "the key hidden_size is missing"),
            ("hidden_size", json!("768"), "hidden_size is \"768\""),
            ("hidden_size", json!(-768), "hidden_size is -768"),
            ("hidden_size", json!(1e30), "hidden_size is 1e+30"),
            (
                "hidden_size",
                json!(770),
                "not a multiple of num_attention_heads",
            ),
            (
                "num_attention_heads",
                json!(0),
                "num_attention_heads must be 1 to",
            ),
            (
                "num_hidden_layers",
                json!(1_000_000_000_000u64),
                "num_hidden_layers must be 1 to",
            ),
            (
                "num_labels",
                json!(1_000_000_000_000u64),
                "num_labels must be at most",
            ),
            ("hidden_act", json!("mish"), "hidden_act is \"mish\""),
            (
                "position_embedding_type",
                json!("relative_key"),
                "only \"absolute\"",
            ),
            (
                "add_cross_attention",
                json!(true),
                "add_cross_attention true is not supported",
            ),
            (
                "quantization_config",
                json!({"bits": 4}),
                "quantization_config",
            ),
            ("pruned_heads", json!({"0": [1]}), "pruned_heads"),
            (
                "auto_map",
                json!({"AutoModel": "x.Y"}),
                "Python code of its own",
            ),
            (
                "hidden_dropout_prob",
                json!(1.5),
                "dropout must be in [0, 1)",
            ),
            (
                "layer_norm_eps",
                json!(-1.0),
                "layer_norm_eps must be finite",
            ),
            (
                "id2label",
                json!({"0": "a", "2": "b"}),
                "id2label has 2 labels, but none for 1",
            ),
            (
                "type_vocab_size",
                json!(0),
                "type_vocab_size must be at least 1",
            ),
        ] {
            let error = format!(
                "{:#}",
                parse(&with(bert(), key, value.clone())).unwrap_err()
            );
            assert!(error.contains(message), "{key} {value}: {error}");
        }
        let roformer = with(bert(), "model_type", json!("roformer"));
        for (key, value) in [
            ("rotary_value", json!(true)),
            ("embedding_size", json!(128)),
        ] {
            let error = parse(&with(roformer.clone(), key, value)).unwrap_err();
            assert!(format!("{error:#}").contains(key), "{error:#}");
        }
        let nomic = with(bert(), "model_type", json!("nomic_bert"));
        for (key, value, message) in [
            (
                "rope_type",
                json!("dynamic"),
                "unknown variant `dynamic`, expected one of `default`",
            ),
            ("rope_type", json!("linear"), "missing field `factor`"),
            ("truncate", json!(false), "unknown field `truncate`"),
        ] {
            let mut rope = json!({"rope_type": "default", "rope_theta": 1000.0});
            rope[key] = value;
            let error = parse(&with(nomic.clone(), "rope_parameters", rope)).unwrap_err();
            assert!(format!("{error:#}").contains(message), "{error:#}");
        }
        // A key that transformers ignores there.
        assert!(
            !parse(&with(nomic, "is_decoder", json!(true)))
                .unwrap()
                .is_decoder
        );
    }

    #[test]
    fn stretched_frequencies_are_read_from_versions_4_and_5() {
        let nomic = with(bert(), "model_type", json!("nomic_bert"));
        let old = with(nomic.clone(), "rope_theta", json!(500.0));
        let scaling = json!({"type": "linear", "factor": 2.0});
        let old = parse(&with(old, "rope_scaling", scaling)).unwrap();
        let linear = |pairing| Position::Rope {
            theta: 500.0,
            pairing,
            scaling: RopeScaling::Linear(2.0),
        };
        assert_eq!(
            old.position,
            linear(candle_rope_attn::RopePairing::HalfSplit)
        );
        assert_eq!(BertConfig::try_from(Map::from(old.clone())).unwrap(), old);

        let yarn = json!({
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
            "original_max_position_embeddings": 128, "beta_fast": 16.0,
        });
        let new = parse(&with(nomic.clone(), "rope_parameters", yarn.clone())).unwrap();
        let expected = Yarn {
            beta_fast: 16.0,
            ..Yarn::new(4.0, 128)
        };
        assert_eq!(rope_of(&new.position), (500.0, RopeScaling::Yarn(expected)));
        assert_eq!(BertConfig::try_from(Map::from(new.clone())).unwrap(), new);
        let scale = new.attention_spec(0).unwrap().softmax_scale;
        assert!(
            (scale - 1.138_629_4f32.powi(2) / 8.0).abs() < 1e-6,
            "{scale}"
        );

        let both = with(nomic, "rope_parameters", yarn);
        let error = parse(&with(both, "rope_scaling", json!({"type": "yarn"}))).unwrap_err();
        assert!(
            error.to_string().contains("leave one of them out"),
            "{error}"
        );
    }

    #[test]
    fn modernbert_is_read_from_versions_4_and_5() {
        let base = with(bert(), "model_type", json!("modernbert"));
        let old = with(base.clone(), "global_attn_every_n_layers", json!(2));
        let old = with(old, "global_rope_theta", json!(5e4));
        let old = with(old, "classifier_pooling", json!("mean"));
        let old = parse(&old).unwrap();
        assert_eq!(old.classifier_pooling, Pooling::Mean);
        let local = old.local.clone().unwrap();
        assert_eq!((local.window, local.rope_theta), (64, 10_000.0));
        assert_eq!(local.layers, [false, true].repeat(6));

        let mut types = vec!["full_attention"; 12];
        types[5] = "sliding_attention";
        let new = with(base, "layer_types", json!(types));
        let rope = |theta: f64| json!({"rope_type": "default", "rope_theta": theta});
        let both = json!({"full_attention": rope(7e4), "sliding_attention": rope(7e3)});
        let new = parse(&with(new, "rope_parameters", both)).unwrap();
        let local = new.local.clone().unwrap();
        assert_eq!(local.layers.iter().position(|local| *local), Some(5));
        assert_eq!(local.rope_theta, 7e3);
        assert_eq!(BertConfig::try_from(Map::from(new.clone())).unwrap(), new);
    }
}

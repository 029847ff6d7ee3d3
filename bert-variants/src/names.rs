//! What transformers calls the weights: a table for each `model_type`, read both ways.

use anyhow::{Context, Result};

use crate::config::{BertConfig, ModelType, Task};

/// Names of ours and of transformers, a pair a line, without `.weight` or `.bias` where both are
/// called alike. `*` is `encoder.layer.N` on our side and [`Names::layer`] on theirs; names of
/// theirs that begin with `.` or `*` stand below the prefix of the model, others do not. Weights
/// joined by `+` are equal to the other side when laid end to end along the first axis.
type Table = &'static str;

const BERT: Table = "
    embeddings.word_embeddings           .embeddings.word_embeddings
    embeddings.position_embeddings       .embeddings.position_embeddings
    embeddings.token_type_embeddings     .embeddings.token_type_embeddings
    embeddings.LayerNorm                 .embeddings.LayerNorm
    *.attention.self.qkv                 *.attention.self.query+*.attention.self.key+*.attention.self.value
    *.attention.output.dense             *.attention.output.dense
    *.attention.output.LayerNorm         *.attention.output.LayerNorm
    *.intermediate.dense                 *.intermediate.dense
    *.output.dense                       *.output.dense
    *.output.LayerNorm                   *.output.LayerNorm
";

const MPNET: Table = "
    embeddings.word_embeddings           .embeddings.word_embeddings
    embeddings.position_embeddings       .embeddings.position_embeddings
    embeddings.LayerNorm                 .embeddings.LayerNorm
    encoder.relative_attention_bias      .encoder.relative_attention_bias
    *.attention.self.qkv                 *.attention.attn.q+*.attention.attn.k+*.attention.attn.v
    *.attention.output.dense             *.attention.attn.o
    *.attention.output.LayerNorm         *.attention.LayerNorm
    *.intermediate.dense                 *.intermediate.dense
    *.output.dense                       *.output.dense
    *.output.LayerNorm                   *.output.LayerNorm
";

const DISTILBERT: Table = "
    embeddings.word_embeddings           .embeddings.word_embeddings
    embeddings.position_embeddings       .embeddings.position_embeddings
    embeddings.LayerNorm                 .embeddings.LayerNorm
    *.attention.self.qkv                 *.attention.q_lin+*.attention.k_lin+*.attention.v_lin
    *.attention.output.dense             *.attention.out_lin
    *.attention.output.LayerNorm         *.sa_layer_norm
    *.intermediate.dense                 *.ffn.lin1
    *.output.dense                       *.ffn.lin2
    *.output.LayerNorm                   *.output_layer_norm
";

const MODERNBERT: Table = "
    embeddings.word_embeddings           .embeddings.tok_embeddings
    embeddings.LayerNorm                 .embeddings.norm
    *.attention.self.qkv                 *.attn.Wqkv
    *.attention.output.dense             *.attn.Wo
    *.attention.output.LayerNorm         *.attn_norm
    *.intermediate.dense+*.up.dense      *.mlp.Wi
    *.output.dense                       *.mlp.Wo
    *.output.LayerNorm                   *.mlp_norm
    encoder.LayerNorm                    .final_norm
";

const NOMIC_BERT: Table = "
    embeddings.word_embeddings           .embeddings.word_embeddings
    embeddings.token_type_embeddings     .embeddings.token_type_embeddings
    embeddings.LayerNorm                 .emb_ln
    *.attention.self.qkv                 *.attn.Wqkv
    *.attention.output.dense             *.attn.out_proj
    *.attention.output.LayerNorm         *.norm1
    *.intermediate.dense                 *.mlp.fc12
    *.up.dense                           *.mlp.fc11
    *.output.dense                       *.mlp.fc2
    *.output.LayerNorm                   *.norm2
";

const POOLER: Table = "
    head.dense                           .pooler.dense
    head.output                          classifier
";

const BERT_LM_HEAD: Table = "
    head.dense                           cls.predictions.transform.dense
    head.LayerNorm                       cls.predictions.transform.LayerNorm
    head.output.weight                   cls.predictions.decoder.weight
    head.output.bias                     cls.predictions.bias
";

const NOMIC_LM_HEAD: Table = "
    head.dense                           cls.predictions.transform.dense
    head.LayerNorm                       cls.predictions.transform.layer_norm
    head.output.weight                   cls.predictions.decoder.weight
    head.output.bias                     cls.predictions.bias
";

const ROBERTA_LM_HEAD: Table = "
    head.dense                           lm_head.dense
    head.LayerNorm                       lm_head.layer_norm
    head.output.weight                   lm_head.decoder.weight
    head.output.bias                     lm_head.bias
";

const DISTILBERT_LM_HEAD: Table = "
    head.dense                           vocab_transform
    head.LayerNorm                       vocab_layer_norm
    head.output                          vocab_projector
";

const MODERNBERT_LM_HEAD: Table = "
    head.dense                           head.dense
    head.LayerNorm                       head.norm
    head.output                          decoder
";

const MODERNBERT_CLASSIFIER: Table = "
    head.dense                           head.dense
    head.LayerNorm                       head.norm
    head.output                          classifier
";

const ROBERTA_CLASSIFIER: Table = "
    head.dense                           classifier.dense
    head.output                          classifier.out_proj
";

const DISTILBERT_CLASSIFIER: Table = "
    head.dense                           pre_classifier
    head.output                          classifier
";

const QUESTION_ANSWERING: Table = "
    head.output                          qa_outputs
";

/// The names of one model.
pub(crate) struct Names {
    /// Prefix of the encoder's weights in models with a head.
    prefix: &'static str,
    /// Where its layers are, below the prefix.
    layer: &'static str,
    encoder: Table,
    head: Table,
}

/// Weights that are equal when laid end to end, see [`Table`]; whole names.
#[derive(Debug, PartialEq)]
pub(crate) struct Group {
    pub ours: Vec<String>,
    /// Begin with `.` where the prefix belongs.
    pub theirs: Vec<String>,
}

impl Names {
    pub fn new(config: &BertConfig) -> Self {
        use ModelType::*;
        let (prefix, layer, encoder) = match config.model_type {
            Bert => ("bert", "encoder.layer", BERT),
            Roformer => ("roformer", "encoder.layer", BERT),
            Alibi => ("alibi", "encoder.layer", BERT),
            Roberta => ("roberta", "encoder.layer", BERT),
            Mpnet => ("mpnet", "encoder.layer", MPNET),
            Distilbert => ("distilbert", "transformer.layer", DISTILBERT),
            Modernbert => ("model", "layers", MODERNBERT),
            NomicBert => ("nomic_bert", "encoder.layers", NOMIC_BERT),
        };
        let head = match (config.task, config.model_type) {
            (Task::LanguageModel, Bert | Roformer | Alibi) => BERT_LM_HEAD,
            (Task::LanguageModel, NomicBert) => NOMIC_LM_HEAD,
            (Task::LanguageModel, Roberta | Mpnet) => ROBERTA_LM_HEAD,
            (Task::LanguageModel, Distilbert) => DISTILBERT_LM_HEAD,
            (Task::LanguageModel, Modernbert) => MODERNBERT_LM_HEAD,
            (Task::Base, _) => POOLER,
            (_, Modernbert) => MODERNBERT_CLASSIFIER,
            (Task::SequenceClassification, Roformer | Roberta | Mpnet) => ROBERTA_CLASSIFIER,
            (Task::SequenceClassification, Distilbert) => DISTILBERT_CLASSIFIER,
            (Task::SequenceClassification | Task::TokenClassification, _) => POOLER,
            (Task::QuestionAnswering, _) => QUESTION_ANSWERING,
        };
        Self {
            prefix,
            layer,
            encoder,
            head,
        }
    }

    /// The group that one of our weights belongs to.
    pub fn group(&self, ours: &str) -> Result<Group> {
        let (pattern, layer) = pattern_of(ours);
        let (stem, suffix) = pattern.rsplit_once('.').unwrap_or((&pattern, ""));
        let lines = [self.encoder, self.head].into_iter().flat_map(str::lines);
        let mut pairs = lines.filter_map(|line| line.trim().split_once(' '));
        let (pair, suffix) = pairs
            .find_map(|(left, right)| {
                let names = |name: &str| left.split('+').any(|part| part == name);
                let suffix = match () {
                    () if names(&pattern) => "",
                    () if names(stem) => suffix,
                    () => return None,
                };
                Some(((left, right.trim()), suffix))
            })
            .with_context(|| format!("the table of names has no {ours}"))?;
        let whole = |pattern: &str, layers: &str| {
            let name = pattern.replacen('*', &format!("{layers}.{layer}"), 1);
            if suffix.is_empty() {
                name
            } else {
                format!("{name}.{suffix}")
            }
        };
        Ok(Group {
            ours: pair
                .0
                .split('+')
                .map(|name| whole(name, "encoder.layer"))
                .collect(),
            theirs: pair
                .1
                .split('+')
                .map(|name| whole(name, &format!(".{}", self.layer)))
                .collect(),
        })
    }

    /// A name of theirs as it stands in the files of a model with a head, or without one.
    pub fn on_disk(&self, theirs: &str, has_head: bool) -> String {
        match theirs.strip_prefix('.') {
            Some(name) if has_head => format!("{}.{name}", self.prefix),
            Some(name) => name.to_string(),
            None => theirs.to_string(),
        }
    }

    /// Whether a name in a file says that it belongs to the encoder.
    pub fn is_of_encoder(&self, on_disk: &str) -> bool {
        let root = |name: &str| name.split('.').next().map(str::to_string);
        let below = on_disk
            .strip_prefix(self.prefix)
            .and_then(|name| name.strip_prefix('.'));
        let found = root(below.unwrap_or(on_disk));
        self.encoder
            .lines()
            .filter_map(|line| line.trim().rsplit(' ').next())
            .any(|theirs| {
                let name = theirs.strip_prefix('.').unwrap_or(self.layer);
                root(name) == found
            })
    }
}

/// `encoder.layer.3.output.dense.bias` is `*.output.dense.bias` of layer `3`.
fn pattern_of(ours: &str) -> (String, &str) {
    let layer = ours
        .strip_prefix("encoder.layer.")
        .and_then(|rest| rest.split_once('.'));
    match layer {
        Some((layer, rest)) => (format!("*.{rest}"), layer),
        None => (ours.to_string(), ""),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::parameters::layout;
    use clap::ValueEnum;

    const TASKS: [Task; 5] = [
        Task::Base,
        Task::LanguageModel,
        Task::SequenceClassification,
        Task::TokenClassification,
        Task::QuestionAnswering,
    ];

    #[test]
    fn every_weight_has_a_name_of_its_own() {
        for model_type in ModelType::value_variants() {
            for task in TASKS {
                let config = BertConfig::new(*model_type, 100, 2, 16, 4, 32).with_task(task);
                let names = Names::new(&config);
                let mut seen = BTreeSet::new();
                for layout in layout(&config) {
                    let group = names.group(&layout.name).unwrap();
                    assert!(group.ours.contains(&layout.name));
                    assert!(!format!("{group:?}").contains('*'), "{group:?}");
                    if group.ours[0] == layout.name {
                        for theirs in group.theirs {
                            assert!(seen.insert(names.on_disk(&theirs, true)), "{theirs}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn groups_are_of_one_layer() {
        let names = Names::new(&BertConfig::new(ModelType::Modernbert, 100, 2, 16, 4, 32));
        let group = names.group("encoder.layer.12.up.dense.weight").unwrap();
        let expected = Group {
            ours: vec![
                "encoder.layer.12.intermediate.dense.weight".into(),
                "encoder.layer.12.up.dense.weight".into(),
            ],
            theirs: vec![".layers.12.mlp.Wi.weight".into()],
        };
        assert_eq!(group, expected);
        assert_eq!(
            names.on_disk(&group.theirs[0], true),
            "model.layers.12.mlp.Wi.weight"
        );
        assert!(names.is_of_encoder("model.layers.3.mlp.Wi.weight"));
        assert!(names.is_of_encoder("layers.3.mlp.Wi.weight"));
        assert!(!names.is_of_encoder("head.dense.weight"));
        assert!(names.group("encoder.layer.0.nothing.weight").is_err());
    }
}

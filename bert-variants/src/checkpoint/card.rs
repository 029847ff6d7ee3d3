//! The model card: the `README.md` of a model directory.

use serde_json::{Map, Value};

use crate::config::{BertConfig, ModelType, Task};
use crate::parameters::ParameterCounts;

/// What is known of a model's training; all of it may be left out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ModelCard {
    /// What it was trained on.
    pub data: Option<String>,
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Tokens seen.
    pub tokens: Option<u64>,
    /// Seed of weights and data order.
    pub seed: Option<u64>,
    /// Results on held-out data by name, such as `loss` (cross-entropy in nats).
    pub results: Vec<(String, f64)>,
}

impl ModelCard {
    /// Markdown, with the header that the Hugging Face Hub reads.
    pub(super) fn render(&self, config: &BertConfig) -> String {
        let facts = self.facts(config).into_iter();
        let facts: String = facts
            .map(|(name, value)| format!("| {name} | {value} |\n"))
            .collect();
        let json = serde_json::to_string_pretty(&Map::<String, Value>::from(config.clone()));
        format!(
            "---\nlibrary_name: transformers\npipeline_tag: {}\ntags:\n- {}\n---\n\n# {}\n\n\
             | | |\n|---|---|\n{facts}\n## Use in Python\n\n```python\n{}```\n\n\
             ## Configuration\n\n```json\n{}\n```\n",
            pipeline(config.task),
            config.model_type.name(),
            config
                .model_type
                .class(config.task, config.is_decoder)
                .unwrap_or_default(),
            python(config),
            json.unwrap_or_default(),
        )
    }

    fn facts(&self, config: &BertConfig) -> Vec<(String, String)> {
        let counts = ParameterCounts::of(config);
        let size = format!(
            "{} layers, width {}, {} heads",
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        );
        let count = match counts.positions {
            0 => format!("{}", counts.all),
            positions => format!(
                "{}, of them {positions} in the table of positions",
                counts.all
            ),
        };
        let mut facts = vec![
            ("Size".to_string(), size),
            ("Parameters".to_string(), count),
        ];
        let mut add = |name: &str, value: Option<String>| {
            facts.extend(value.map(|value| (name.to_string(), value)));
        };
        add(
            "Longest input",
            config.max_length().map(|length| format!("{length} tokens")),
        );
        add("Data", self.data.clone());
        add("Steps", self.steps.map(|steps| steps.to_string()));
        add("Tokens seen", self.tokens.map(|tokens| tokens.to_string()));
        add("Seed", self.seed.map(|seed| seed.to_string()));
        for (name, value) in &self.results {
            add(&format!("Held-out {name}"), Some(format!("{value:.4}")));
        }
        facts
    }
}

fn pipeline(task: Task) -> &'static str {
    match task {
        Task::Base => "feature-extraction",
        Task::LanguageModel => "fill-mask",
        Task::SequenceClassification => "text-classification",
        Task::TokenClassification => "token-classification",
        Task::QuestionAnswering => "question-answering",
    }
}

fn python(config: &BertConfig) -> String {
    let auto = match (config.task, config.is_decoder) {
        (Task::Base, _) => "AutoModel",
        (Task::LanguageModel, false) => "AutoModelForMaskedLM",
        (Task::LanguageModel, true) => "AutoModelForCausalLM",
        (Task::SequenceClassification, _) => "AutoModelForSequenceClassification",
        (Task::TokenClassification, _) => "AutoModelForTokenClassification",
        (Task::QuestionAnswering, _) => "AutoModelForQuestionAnswering",
    };
    let (code, note) = match config.model_type {
        ModelType::Alibi => (
            ", trust_remote_code=True",
            "# transformers has no encoder with ALiBi: modeling_alibi.py beside this file is one.\n",
        ),
        _ => ("", ""),
    };
    format!(
        "from transformers import AutoTokenizer, {auto}\n\n{note}\
         tokenizer = AutoTokenizer.from_pretrained(\"DIR\")\n\
         model = {auto}.from_pretrained(\"DIR\"{code})\n\
         outputs = model(**tokenizer(\"A text.\", return_tensors=\"pt\"))\n"
    )
}

//! Fills masks in texts, or classifies them, with a model of a Hugging Face directory.

use anyhow::Result;
use bert_variants::lines::{AnswerConfig, Line, answer_lines};
use bert_variants::predict::{Classifier, FillMask};
use bert_variants::pretrain::open_device;
use bert_variants::text::Text;
use clap::{Parser, Subcommand};
use serde_json::{Map, Value, json};

/// Fill masks in texts, or classify them.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// The most probable tokens for each mask of a text, such as `Paris is in [MASK].`
    FillMask {
        #[command(flatten)]
        config: AnswerConfig,
        /// Candidates for each mask.
        #[arg(long, default_value_t = 5)]
        top_k: usize,
    },
    /// The label of a text, or of two, with the probabilities of all labels.
    Classify {
        #[command(flatten)]
        config: AnswerConfig,
        /// Most tokens of a text, the rest of which is cut off [default: what the model can read]
        #[arg(long)]
        max_length: Option<usize>,
    },
}

fn main() -> Result<()> {
    bert_variants::init_logging();
    match Cli::parse().task {
        Task::FillMask { config, top_k } => {
            let device = open_device(&config.device)?;
            let fill_mask =
                FillMask::from_pretrained(&config.model, config.dtype.dtype(), &device)?;
            answer_lines(&config.lines, |lines| {
                let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
                let masks = fill_mask.predict(&texts, top_k)?.into_iter();
                Ok(masks.map(|masks| json!({ "masks": masks })).collect())
            })
        }
        Task::Classify { config, max_length } => {
            let device = open_device(&config.device)?;
            let dtype = config.dtype.dtype();
            let classifier =
                Classifier::from_pretrained(&config.model, max_length, dtype, &device)?;
            answer_lines(&config.lines, |lines| classify(&classifier, lines))
        }
    }
}

fn classify(classifier: &Classifier, lines: &[Line]) -> Result<Vec<Value>> {
    let texts: Vec<Text> = lines.iter().map(Line::as_text).collect();
    let answer = |classification: bert_variants::predict::Classification| {
        let labels = classifier.labels().iter().cloned();
        let named = labels
            .zip(&classification.scores)
            .map(|(label, score)| (label, json!(score)));
        let scores: Map<String, Value> = named.collect();
        match classifier.is_regression() {
            true => json!({ "scores": scores }),
            false => json!({
                "label": classifier.labels()[classification.label],
                "score": classification.scores[classification.label],
                "scores": scores,
            }),
        }
    };
    Ok(classifier
        .predict(&texts)?
        .into_iter()
        .map(answer)
        .collect())
}

//! Turns texts into vectors with a model of a Hugging Face directory.

use anyhow::Result;
use bert_variants::lines::{AnswerConfig, Line, answer_lines};
use bert_variants::predict::Embedder;
use bert_variants::pretrain::open_device;
use bert_variants::text::Text;
use clap::Parser;
use serde_json::json;

/// Turn texts into vectors of length 1: means of the last hidden states, as sentence-transformers
/// computes them.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    config: AnswerConfig,
    /// Most tokens of a text, the rest of which is cut off [default: as the model says]
    #[arg(long)]
    max_length: Option<usize>,
}

fn main() -> Result<()> {
    bert_variants::init_logging();
    let Cli { config, max_length } = Cli::parse();
    let device = open_device(&config.device)?;
    let dtype = config.dtype.dtype();
    let embedder = Embedder::from_pretrained(&config.model, max_length, dtype, &device)?;
    answer_lines(&config.lines, |lines| {
        let texts: Vec<Text> = lines.iter().map(Line::as_text).collect();
        let vectors = embedder.embed(&texts)?.into_iter();
        Ok(vectors
            .map(|vector| json!({ "embedding": vector }))
            .collect())
    })
}

//! Turns texts into vectors with a model of a Hugging Face directory.

use anyhow::Result;
use bert_variants::lines::{Line, LinesConfig, answer_lines};
use bert_variants::predict::Embedder;
use bert_variants::pretrain::open_device;
use bert_variants::text::Text;
use bert_variants::train::Precision;
use clap::Parser;
use serde_json::json;

/// Turn texts into vectors of length 1: means of the last hidden states, as sentence-transformers
/// computes them.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Model directory, or a Hub id owner/name or owner/name@revision.
    #[arg(long)]
    model: String,
    /// Most tokens of a text, the rest of which is cut off [default: as the model says]
    #[arg(long)]
    max_length: Option<usize>,
    #[command(flatten)]
    lines: LinesConfig,
    /// cpu, cuda, or cuda:N for the GPU of that number.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Arithmetic of the model.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    dtype: Precision,
}

fn main() -> Result<()> {
    bert_variants::init_logging();
    let cli = Cli::parse();
    let device = open_device(&cli.device)?;
    let dtype = cli.dtype.dtype();
    let embedder = Embedder::from_pretrained(&cli.model, cli.max_length, dtype, &device)?;
    answer_lines(&cli.lines, |lines| {
        let texts: Vec<Text> = lines.iter().map(Line::as_text).collect();
        let vectors = embedder.embed(&texts)?.into_iter();
        Ok(vectors
            .map(|vector| json!({ "embedding": vector }))
            .collect())
    })
}

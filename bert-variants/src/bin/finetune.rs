//! Fine-tunes a model on labelled texts.

use std::path::PathBuf;

use anyhow::Result;
use bert_variants::finetune::{FinetuneConfig, finetune};
use bert_variants::settings::settings;
use clap::{CommandFactory, Parser};

/// Fine-tune a model on a task of GLUE, IMDB, or a table of texts with classes or numbers.
///
/// Models, predictions, records and the report are written to --out.
#[derive(Parser)]
#[command(version, args_override_self = true)]
struct Cli {
    /// TOML or YAML file of settings, as in OUT/settings.toml; options on the command line win.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: FinetuneConfig,
}

fn main() -> Result<()> {
    bert_variants::init_logging();
    bert_variants::memory::keep_freed_memory();
    let config: FinetuneConfig = settings(&Cli::command().get_matches())?;
    println!("Report: {}", finetune(&config)?.display());
    Ok(())
}

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
    /// Keep the finished seeds in --out, and go on with one that was stopped (Ctrl-C, SIGTERM).
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    settings: FinetuneConfig,
}

fn main() -> Result<()> {
    bert_variants::init_logging();
    bert_variants::memory::keep_freed_memory();
    let matches = Cli::command().get_matches();
    let config: FinetuneConfig = settings(&matches)?;
    let stop = bert_variants::stop_on_signal()?;
    match finetune(&config, matches.get_flag("resume"), &stop)? {
        Some(report) => println!("Report: {}", report.display()),
        None => {
            eprintln!("stopped; the same command with --resume goes on with this seed");
            std::process::exit(130);
        }
    }
    Ok(())
}

//! Pretrains BERT variants that differ in position encoding only, and compares them.

use std::path::PathBuf;

use anyhow::Result;
use bert_variants::pretrain::{PretrainConfig, pretrain};
use bert_variants::settings::settings;
use clap::{CommandFactory, Parser};
use peak_alloc::PeakAlloc;

#[global_allocator]
static PEAK_ALLOC: PeakAlloc = PeakAlloc;

/// Pretrain BERT variants that differ in position encoding only, and compare them.
///
/// Without options, two small models are trained on an embedded corpus in a few minutes. Their
/// runs, checkpoints (Hugging Face directories) and the report are written to --out.
#[derive(Parser)]
#[command(version, args_override_self = true)]
struct Cli {
    /// TOML or YAML file of settings, as in OUT/settings.toml; options on the command line win.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Continue the runs in --out that are not finished, each from its last checkpoint.
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    settings: PretrainConfig,
}

fn main() -> Result<()> {
    bert_variants::init_logging();
    bert_variants::memory::keep_freed_memory();
    let matches = Cli::command().get_matches();
    let config: PretrainConfig = settings(&matches)?;
    let stop = bert_variants::stop_on_signal()?;
    match pretrain(&config, matches.get_flag("resume"), &stop)? {
        Some(report) => println!("Report: {}", report.html.display()),
        None => {
            eprintln!("stopped; the same command with --resume continues");
            std::process::exit(130);
        }
    }
    Ok(())
}

//! Uploads a model directory to the Hugging Face Hub.

use anyhow::Result;
use bert_variants::hub::{Upload, upload};
use clap::Parser;

/// Upload a model directory to the Hugging Face Hub as one commit.
///
/// The token is taken from HF_TOKEN, or from where `hf auth login` keeps it.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    upload: Upload,
}

fn main() -> Result<()> {
    bert_variants::init_logging();
    println!("{}", upload(&Cli::parse().upload)?);
    Ok(())
}

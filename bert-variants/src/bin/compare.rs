//! Compares training runs: writes a report and prints its main table.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use bert_variants::record::{self, Run};
use bert_variants::report::{self, ReportOptions};
use clap::Parser;
use walkdir::WalkDir;

/// Compare training runs in an HTML report with curves and tables.
///
/// Runs are grouped by objective and variant; the runs of a group differ in seed.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Folders to search for metrics.jsonl, or such files.
    #[arg(required = true, value_name = "RUNS")]
    runs: Vec<PathBuf>,

    /// Folder to write the report to.
    #[arg(long, default_value = "report")]
    out: PathBuf,

    /// Title of the report.
    #[arg(long, default_value_t = ReportOptions::default().title)]
    title: String,

    /// Weight of the past in the moving average over training curves, 0 for none.
    #[arg(long, default_value_t = ReportOptions::default().smoothing)]
    smoothing: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runs = read_runs(&args.runs)?;
    let options = ReportOptions {
        title: args.title,
        smoothing: args.smoothing,
    };
    let paths = report::write_report(&runs, &args.out, &options)?;
    let summary = report::summarize(&runs, &options.title)?;
    for warning in &summary.warnings {
        eprintln!("warning: {warning}");
    }
    print!("{}", report::results_text(&summary));
    println!("\nReport: {}", paths.html.display());
    Ok(())
}

fn read_runs(given: &[PathBuf]) -> Result<Vec<Run>> {
    // A set, so that a run named twice counts once.
    let mut paths = BTreeSet::new();
    for path in given {
        let root = path
            .canonicalize()
            .with_context(|| format!("cannot find {}", path.display()))?;
        for entry in WalkDir::new(root) {
            let entry = entry?;
            let named = entry.file_name() == record::METRICS_FILE || entry.depth() == 0;
            if named && entry.file_type().is_file() {
                paths.insert(entry.into_path());
            }
        }
    }
    ensure!(
        !paths.is_empty(),
        "no runs found: no {} under {}",
        record::METRICS_FILE,
        given
            .iter()
            .map(|path| path.display().to_string())
            .collect::<Vec<_>>()
            .join(", ")
    );
    paths.iter().map(|path| record::read_run(path)).collect()
}

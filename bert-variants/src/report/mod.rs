//! Compares runs: tables and curves as HTML, Markdown, JSON, SVG and PNG.
//!
//! Runs are grouped by objective and variant; runs of a group differ in seed. Every number is
//! computed from the records alone, so a report can be made again from a run's folder.

mod claims;
mod fairness;
mod html;
mod plot;
pub(crate) mod stats;
mod summary;
mod tables;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

pub use claims::{Claim, Verdict};
pub use fairness::{ConfigDifference, Effect, Fairness};
pub(crate) use html::{page, table};
pub use stats::Stat;
pub use summary::{
    Difference, EvalStats, GradientNorm, LengthStats, Reading, Summary, Threshold, VariantSummary,
};

use crate::record::{Run, write_atomic};

/// How to write a report.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportOptions {
    /// Title of the report.
    pub title: String,
    /// Weight of the past in the moving average over training loss and gradient norm, in
    /// `[0, 1)`; 0 shows them as they are.
    pub smoothing: f64,
}

impl Default for ReportOptions {
    fn default() -> Self {
        Self {
            title: "Position encodings compared".to_string(),
            smoothing: 0.8,
        }
    }
}

/// What [`write_report`] wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportPaths {
    /// The report, one file with everything in it.
    pub html: PathBuf,
    /// Its numbers.
    pub summary_json: PathBuf,
    /// Its tables.
    pub summary_md: PathBuf,
    /// Its pictures, each as SVG and PNG.
    pub plots: Vec<PathBuf>,
}

/// Computes the numbers of the report.
///
/// # Errors
/// Where `runs` is empty.
pub fn summarize(runs: &[Run], title: &str) -> Result<Summary> {
    ensure!(!runs.is_empty(), "no runs to compare");
    Ok(summary::summarize(title, &summary::group(runs)))
}

/// Writes the report of `runs` into the folder `out`, which is made where missing.
///
/// Each file appears under its name only when whole, and replaces that of an earlier report.
///
/// # Errors
/// Where `runs` is empty, the smoothing is outside `[0, 1)`, or a file cannot be written.
pub fn write_report(runs: &[Run], out: &Path, options: &ReportOptions) -> Result<ReportPaths> {
    ensure!(
        (0.0..1.0).contains(&options.smoothing),
        "smoothing is {}, expected at least 0 and less than 1",
        options.smoothing
    );
    let summary = summarize(runs, &options.title)?;
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;

    let mut paths = ReportPaths {
        html: out.join("report.html"),
        summary_json: out.join("summary.json"),
        summary_md: out.join("summary.md"),
        plots: Vec::new(),
    };
    let mut figures = Vec::new();
    for chart in plot::charts(&summary::group(runs), options.smoothing) {
        let svg = chart.svg()?;
        for (ending, bytes) in [("svg", svg.as_bytes()), ("png", &chart.png()?)] {
            let path = out.join(format!("{}.{ending}", chart.stem));
            write_atomic(&path, bytes)?;
            paths.plots.push(path);
        }
        figures.push(html::Figure {
            title: chart.title,
            legend: chart.legend,
            svg,
        });
    }
    write_atomic(&paths.summary_json, &serde_json::to_vec_pretty(&summary)?)?;
    write_atomic(&paths.summary_md, markdown(&summary).as_bytes())?;
    write_atomic(
        &paths.html,
        html::render(&summary, &figures, runs).as_bytes(),
    )?;
    Ok(paths)
}

/// The main table for a terminal.
pub fn results_text(summary: &Summary) -> String {
    tables::results(summary).plain()
}

fn markdown(summary: &Summary) -> String {
    let escape = tables::escape_markdown;
    let mut parts = vec![format!("# {}\n", escape(&summary.title))];
    if !summary.warnings.is_empty() {
        let warning = |text: &String| format!("- **{}**\n", escape(text));
        parts.push(summary.warnings.iter().map(warning).collect());
    }
    parts.extend(tables::all(summary).iter().map(|table| table.markdown()));
    parts.join("\n")
}

//! The report as one HTML file that needs nothing else.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::summary::Summary;
use super::tables::{self, Table, objective_name};
use crate::record::Run;

const STYLE: &str = "
body { font-family: system-ui, sans-serif; line-height: 1.45; color: #1a1a1a; background: #fff;
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: left; border-bottom: 1px solid #ddd;
  vertical-align: top; }
th { border-bottom: 2px solid #555; }
td { overflow-wrap: anywhere; min-width: 4em; }
.wide { overflow-x: auto; }
.note { color: #444; font-size: 0.9rem; }
.warning { border-left: 6px solid #d55e00; background: #fdf0e7; padding: 0.5rem 1rem;
  margin: 0.5rem 0; font-weight: 600; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 0.7rem; overflow-x: auto; font-size: 0.8rem; }
";

/// A picture with its title.
pub(super) struct Figure {
    pub title: String,
    pub legend: String,
    pub svg: String,
}

/// A page of that title, which needs no other file.
pub(crate) fn page(title: &str, content: &Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                (content)
            }
        }
    };
    page.into_string()
}

/// Rows of cells below titles of columns.
pub(crate) fn table(columns: &[String], rows: &[Vec<String>]) -> Markup {
    html! {
        div.wide {
            table {
                thead { tr { @for column in columns { th scope="col" { (column) } } } }
                tbody {
                    @for row in rows {
                        tr { @for cell in row { td { (cell) } } }
                    }
                }
            }
        }
    }
}

pub(super) fn render(summary: &Summary, figures: &[Figure], runs: &[Run]) -> String {
    let content = html! {
        p.note { (runs.len()) " runs, " (summary.variants.len()) " pairs of variant and objective." }
        @for warning in &summary.warnings {
            div.warning role="alert" { (warning) }
        }
        @for table in tables::all(summary) { (render_table(&table)) }
        @if summary.claims.is_empty() {
            p.note { "No claims are judged: that takes a variant with learned absolute and one with rotary positions." }
        }
        @if summary.fairness.differences.is_empty() {
            p.note { "Fairness: the compared runs differ in position encoding and seed only." }
        }
        h2 { "Curves" }
        @for figure in figures {
            figure {
                figcaption { strong { (figure.title) } " " span.note { (figure.legend) } }
                (PreEscaped(&figure.svg))
            }
        }
        h2 { "Runs" }
        @for run in runs { (render_run(run)) }
    };
    page(&summary.title, &content)
}

fn render_table(found: &Table) -> Markup {
    html! {
        h2 { (found.title) }
        p.note { (found.note) }
        (table(&found.columns, &found.rows))
    }
}

fn render_run(run: &Run) -> Markup {
    let header = &run.header;
    let json = |value| serde_json::to_string_pretty(value).unwrap_or_default();
    let steps = run.train.last().map_or(0, |last| last.step);
    html! {
        details {
            summary {
                (objective_name(header.objective)) " " (header.variant) ", seed " (header.seed)
                ", " (steps) " of " (header.total_steps) " steps"
            }
            p.note {
                (run.path.display()) br;
                "Data: " (header.data) br;
                "Device: " (header.devices()) ", program " (header.code_versions())
            }
            p { "Model" }
            pre { (json(&header.model_config)) }
            p { "Training" }
            pre { (json(&header.train_config)) }
        }
    }
}

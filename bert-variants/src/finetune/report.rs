//! The report on fine-tuning runs that differ in seed, one HTML file.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::FinetuneConfig;
use super::data::Dataset;
use super::records::{Evaluation, SeedResult};
use crate::report::{STYLE, Stat};

pub(super) fn render(config: &FinetuneConfig, dataset: &Dataset, results: &[SeedResult]) -> String {
    let title = format!("{} fine-tuned on {:?}", config.run.model, config.data.task);
    let settings = serde_json::to_string_pretty(config).unwrap_or_default();
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
                p.note {
                    (dataset.train.len()) " texts to train on"
                    @for split in &dataset.evals { ", " (split.examples.len()) " in " (split.name) }
                    ". The best evaluation of each seed counts."
                }
                h2 { "Results" }
                div.wide { (results_table(results)) }
                h2 { "Evaluations" }
                div.wide { (evaluations_table(results)) }
                h2 { "Settings" }
                pre { (settings) }
            }
        }
    };
    page.into_string()
}

/// A row for each metric of each split, a column for each seed.
fn results_table(results: &[SeedResult]) -> Markup {
    let rows = results.first().into_iter().flat_map(|first| {
        first
            .best
            .iter()
            .enumerate()
            .flat_map(|(split, evaluation)| {
                let names = evaluation.metrics.iter().enumerate();
                names.map(move |(metric, (name, _))| {
                    let title = format!("{} {name}", evaluation.split);
                    (
                        title,
                        results
                            .iter()
                            .map(|r| r.best[split].metrics[metric].1)
                            .collect(),
                    )
                })
            })
    });
    let mut rows: Vec<(String, Vec<f64>)> = rows.collect();
    let seconds = results.iter().map(|result| result.seconds_per_epoch);
    rows.push(("seconds per epoch".into(), seconds.collect()));
    html! {
        table {
            thead { tr {
                th scope="col" { "" }
                th scope="col" { "mean ± sd" }
                @for result in results { th scope="col" { "seed " (result.seed) } }
            } }
            tbody {
                @for (title, values) in &rows {
                    tr {
                        td { (title) }
                        td { (mean_and_deviation(values)) }
                        @for value in values { td { (format!("{value:.4}")) } }
                    }
                }
            }
        }
    }
}

fn mean_and_deviation(values: &[f64]) -> String {
    match Stat::of(values) {
        Some(Stat {
            mean, sd: Some(sd), ..
        }) => format!("{mean:.4} ± {sd:.4}"),
        Some(Stat { mean, .. }) => format!("{mean:.4}"),
        None => String::new(),
    }
}

fn evaluations_table(results: &[SeedResult]) -> Markup {
    let metrics = |evaluation: &Evaluation| {
        let metrics = evaluation.metrics.iter();
        metrics
            .map(|(name, value)| format!("{name} {value:.4}"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    html! {
        table {
            thead { tr {
                th scope="col" { "seed" }
                th scope="col" { "step" }
                th scope="col" { "loss" }
                th scope="col" { "metrics" }
            } }
            tbody {
                @for result in results {
                    @for evaluation in &result.evaluations {
                        tr {
                            td { (result.seed) }
                            td { (evaluation.step) }
                            td { (format!("{:.4}", evaluation.loss)) }
                            td { (metrics(evaluation)) }
                        }
                    }
                }
            }
        }
    }
}

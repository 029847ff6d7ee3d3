//! The report on fine-tuning runs that differ in seed, one HTML file.

use maud::{Markup, html};

use super::FinetuneConfig;
use super::data::Dataset;
use super::records::{Evaluation, SeedResult};
use crate::report::{Stat, page, table};

pub(super) fn render(config: &FinetuneConfig, dataset: &Dataset, results: &[SeedResult]) -> String {
    let title = format!("{} fine-tuned on {:?}", config.run.model, config.data.task);
    let settings = serde_json::to_string_pretty(config).unwrap_or_default();
    let content = html! {
        p.note {
            (dataset.train.len()) " texts to train on"
            @for split in &dataset.evals { ", " (split.examples.len()) " in " (split.name) }
            ". The best evaluation of each seed counts."
        }
        h2 { "Results" }
        (results_table(results))
        h2 { "Evaluations" }
        (evaluations_table(results))
        h2 { "Settings" }
        pre { (settings) }
    };
    page(&title, &content)
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
    let mut columns = vec![String::new(), "mean ± sd".into()];
    columns.extend(results.iter().map(|result| format!("seed {}", result.seed)));
    let cells = rows.into_iter().map(|(title, values)| {
        let mut cells = vec![title, mean_and_deviation(&values)];
        cells.extend(values.iter().map(|value| format!("{value:.4}")));
        cells
    });
    table(&columns, &cells.collect::<Vec<_>>())
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
    let rows = results.iter().flat_map(|result| {
        result.evaluations.iter().map(|evaluation| {
            let loss = format!("{:.4}", evaluation.loss);
            let (seed, step) = (result.seed.to_string(), evaluation.step.to_string());
            vec![seed, step, loss, metrics(evaluation)]
        })
    });
    let columns = ["seed", "step", "loss", "metrics"].map(String::from);
    table(&columns, &rows.collect::<Vec<_>>())
}

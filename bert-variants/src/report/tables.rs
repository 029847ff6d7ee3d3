//! The summary's numbers as text: the same tables in HTML, Markdown and on the terminal.

use std::collections::BTreeSet;

use super::fairness::values_text;
use super::stats::{SPIKE_WARMUP, SPIKE_WINDOW, Stat};
use super::summary::{EvalStats, Summary, VariantSummary};
use crate::data::Objective;

/// A table of text.
pub(super) struct Table {
    pub title: &'static str,
    /// What the numbers mean, in a sentence or two.
    pub note: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

fn titles<const N: usize>(titles: [&str; N]) -> Vec<String> {
    titles.map(String::from).to_vec()
}

/// How the field calls it.
pub(super) fn objective_name(objective: Objective) -> &'static str {
    match objective {
        Objective::Mlm => "MLM",
        Objective::Clm => "CLM",
    }
}

/// With `digits` behind the point.
pub(super) fn decimal(value: f64, digits: usize) -> String {
    format!("{value:.digits$}")
}

/// A whole number with thousands set apart.
pub(super) fn count(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string();
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = if value < 0.0 && digits != "0" {
        "-".to_string()
    } else {
        String::new()
    };
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn mebibytes(value: f64) -> String {
    format!("{:.1}", value / f64::from(1 << 20))
}

/// `mean ± sd`; the count of values only where it is not that of the runs.
fn stat(stat: Option<Stat>, runs: usize, text: impl Fn(f64) -> String) -> String {
    let Some(stat) = stat else {
        return "-".to_string();
    };
    let sd = stat
        .sd
        .map_or(String::new(), |sd| format!(" ± {}", text(sd)));
    let n = if stat.n == runs {
        String::new()
    } else {
        format!(" (n = {})", stat.n)
    };
    format!("{}{sd}{n}", text(stat.mean))
}

/// The table of losses.
pub(super) fn results(summary: &Summary) -> Table {
    let row = |v: &VariantSummary| {
        let n = v.seeds.len();
        let cell = |eval: Option<EvalStats>, pick: fn(EvalStats) -> Stat, digits| {
            stat(eval.map(pick), n, |value| decimal(value, digits))
        };
        vec![
            objective_name(v.objective).to_string(),
            v.variant.clone(),
            n.to_string(),
            stat(v.final_eval.map(|e| e.step), n, count),
            cell(v.final_eval, |e| e.loss, 4),
            cell(v.final_eval, |e| e.accuracy, 4),
            cell(v.final_eval, |e| e.perplexity, 3),
            cell(v.best_eval, |e| e.loss, 4),
            cell(v.best_eval, |e| e.accuracy, 4),
            cell(v.best_eval, |e| e.perplexity, 3),
        ]
    };
    Table {
        title: "Evaluation",
        note: "On held-out text, mean ± sample standard deviation over seeds; loss in nats a \
               predicted token. Best is the evaluation of the lowest loss."
            .to_string(),
        columns: titles([
            "objective",
            "variant",
            "seeds",
            "steps",
            "final loss",
            "final accuracy",
            "final perplexity",
            "best loss",
            "best accuracy",
            "best perplexity",
        ]),
        rows: summary.variants.iter().map(row).collect(),
    }
}

/// Every table, in the order of the report.
pub(super) fn all(summary: &Summary) -> Vec<Table> {
    let mut tables = vec![
        claims(summary),
        results(summary),
        lengths(summary),
        differences(summary),
        parameters(summary),
        speed(summary),
        thresholds(summary),
        gradient_norms(summary),
        fairness(summary),
    ];
    tables.retain(|table| !table.rows.is_empty());
    tables
}

fn claims(summary: &Summary) -> Table {
    Table {
        title: "Claims",
        note: "What is said of rotary against learned absolute positions. A difference counts \
               where it is more than two standard errors (2 sd / √n) from zero over the shared \
               seeds; with few seeds this is weaker than it sounds (at n = 3 a 95 % interval is \
               4.3 / √n wide on either side)."
            .to_string(),
        columns: titles(["objective", "claim", "verdict", "evidence"]),
        rows: summary
            .claims
            .iter()
            .map(|c| {
                vec![
                    objective_name(c.objective).to_string(),
                    c.claim.clone(),
                    c.verdict.label().to_string(),
                    c.evidence.clone(),
                ]
            })
            .collect(),
    }
}

/// Variants by lengths.
fn lengths(summary: &Summary) -> Table {
    let measured: BTreeSet<u64> = summary
        .variants
        .iter()
        .flat_map(|v| v.lengths.iter().map(|length| length.seq_len))
        .collect();
    let row = |v: &VariantSummary| {
        let cells = measured.iter().map(|seq_len| {
            match v.lengths.iter().find(|length| length.seq_len == *seq_len) {
                Some(length) if !length.defined => "undefined".to_string(),
                length => stat(length.and_then(|l| l.loss), v.seeds.len(), |x| {
                    decimal(x, 4)
                }),
            }
        });
        let names = [objective_name(v.objective).to_string(), v.variant.clone()];
        names.into_iter().chain(cells).collect()
    };
    let measured_variants = summary.variants.iter().filter(|v| !v.lengths.is_empty());
    let mut columns = titles(["objective", "variant"]);
    columns.extend(measured.iter().map(|seq_len| format!("{seq_len} tokens")));
    Table {
        title: "Held-out loss by input length",
        note: "Of the trained models, in nats a predicted token, mean ± sample standard deviation \
               over seeds. The same tokens of long documents are predicted at every length; the \
               first length is that of training. Undefined: the table of learned positions ends \
               before."
            .to_string(),
        columns,
        rows: measured_variants.map(row).collect(),
    }
}

fn differences(summary: &Summary) -> Table {
    Table {
        title: "Paired differences",
        note: "Variant less baseline, seed by seed: runs of one seed share data order and masks."
            .to_string(),
        columns: titles([
            "objective",
            "comparison",
            "metric",
            "difference",
            "n",
            "reading",
        ]),
        rows: summary
            .differences
            .iter()
            .map(|d| {
                let Stat { mean, sd, n } = d.difference;
                let sd = sd.map_or(String::new(), |sd| format!(" ± {sd:.4}"));
                vec![
                    objective_name(d.objective).to_string(),
                    format!("{} - {}", d.variant, d.baseline),
                    d.metric.clone(),
                    format!("{mean:+.4}{sd}"),
                    n.to_string(),
                    d.reading.label().to_string(),
                ]
            })
            .collect(),
    }
}

fn parameters(summary: &Summary) -> Table {
    let row = |v: &VariantSummary| {
        let n = v.seeds.len();
        vec![
            objective_name(v.objective).to_string(),
            v.variant.clone(),
            count(v.parameters as f64),
            count(v.parameters.saturating_sub(v.position_parameters) as f64),
            count(v.position_parameters as f64),
            mebibytes(v.parameter_bytes as f64),
            stat(v.optimizer_bytes, n, mebibytes),
            stat(v.peak_activation_bytes, n, mebibytes),
        ]
    };
    Table {
        title: "Parameters and memory",
        note: "Tied weights count once; memory in MiB. Activations are the peak of a training \
               step, gradients included, beyond parameters and optimizer state."
            .to_string(),
        columns: titles([
            "objective",
            "variant",
            "parameters",
            "without position table",
            "position table",
            "parameters MiB",
            "optimizer MiB",
            "activations MiB",
        ]),
        rows: summary.variants.iter().map(row).collect(),
    }
}

fn speed(summary: &Summary) -> Table {
    let row = |v: &VariantSummary| {
        let n = v.seeds.len();
        vec![
            objective_name(v.objective).to_string(),
            v.variant.clone(),
            stat(v.train_tokens_per_second, n, count),
            stat(v.inference_tokens_per_second, n, count),
            stat(v.seconds, n, |seconds| decimal(seconds, 1)),
        ]
    };
    Table {
        title: "Speed",
        note: "Training without evaluation and checkpoints; inference is forward only.".to_string(),
        columns: titles([
            "objective",
            "variant",
            "training tokens/s",
            "inference tokens/s",
            "training seconds",
        ]),
        rows: summary.variants.iter().map(row).collect(),
    }
}

fn thresholds(summary: &Summary) -> Table {
    let mut rows = Vec::new();
    for variants in summary.variants.chunk_by(|a, b| a.objective == b.objective) {
        for i in 0..variants[0].thresholds.len() {
            for v in variants {
                let t = &v.thresholds[i];
                let cell = |value, text: fn(f64) -> String| match value {
                    None => "not reached".to_string(),
                    value => stat(value, t.reached, text),
                };
                rows.push(vec![
                    objective_name(v.objective).to_string(),
                    decimal(t.loss, 3),
                    v.variant.clone(),
                    format!("{} of {}", t.reached, t.runs),
                    cell(t.steps, count),
                    cell(t.tokens, count),
                    cell(t.seconds, |seconds| decimal(seconds, 1)),
                ]);
            }
        }
    }
    Table {
        title: "Time to an evaluation loss",
        note: "The first evaluation at or below the loss, as fine as the evaluation interval; \
               means over the runs that reached it. The lowest is what the best variant reached \
               with every seed, then comes what every finished run reached."
            .to_string(),
        columns: titles([
            "objective",
            "loss",
            "variant",
            "reached",
            "steps",
            "tokens",
            "seconds",
        ]),
        rows,
    }
}

fn gradient_norms(summary: &Summary) -> Table {
    let rows = summary.variants.iter().filter_map(|v| {
        let g = v.gradient_norm?;
        let cell = |value, digits| stat(Some(value), v.seeds.len(), |x| decimal(x, digits));
        Some(vec![
            objective_name(v.objective).to_string(),
            v.variant.clone(),
            cell(g.p50, 3),
            cell(g.p90, 3),
            cell(g.p99, 3),
            cell(g.max, 3),
            cell(g.spikes, 1),
            g.non_finite.to_string(),
        ])
    });
    Table {
        title: "Gradient norm",
        note: format!(
            "Before clipping, over the training records of a run. A spike is more than three \
             times the median of the {SPIKE_WINDOW} records before it (from record {} on).",
            SPIKE_WARMUP + 1
        ),
        columns: titles([
            "objective",
            "variant",
            "p50",
            "p90",
            "p99",
            "max",
            "spikes",
            "non-finite records",
        ]),
        rows: rows.collect(),
    }
}

fn fairness(summary: &Summary) -> Table {
    Table {
        title: "Fairness",
        note: "Every setting that differs between runs of one objective, besides position \
               encoding and seed."
            .to_string(),
        columns: titles(["objective", "setting", "values", "effect"]),
        rows: summary
            .fairness
            .differences
            .iter()
            .map(|d| {
                vec![
                    objective_name(d.objective).to_string(),
                    d.key.clone(),
                    values_text(&d.values),
                    d.effect.label().to_string(),
                ]
            })
            .collect(),
    }
}

impl Table {
    /// As Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let mut text = format!(
            "## {}\n\n{}\n\n{}",
            self.title,
            self.note,
            line(&self.columns)
        );
        text += &line(&vec!["---".to_string(); self.columns.len()]);
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(|cell| escape_markdown(cell)).collect();
            text += &line(&cells);
        }
        text
    }

    /// In columns for a terminal.
    pub fn plain(&self) -> String {
        let rows = || std::iter::once(&self.columns).chain(&self.rows);
        let width = |i: usize| rows().map(|row| row[i].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
        };
        rows().map(line).collect()
    }
}

/// Text that Markdown leaves as it is.
pub(super) fn escape_markdown(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\n' => escaped.push(' '),
            '|' | '<' | '>' | '*' | '_' | '`' | '[' | ']' | '\\' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_set_thousands_apart() {
        assert_eq!(count(393_216.0), "393,216");
        assert_eq!(count(999.0), "999");
        assert_eq!(count(-1_234_567.0), "-1,234,567");
        assert_eq!(count(f64::NAN), "NaN");
    }

    #[test]
    fn markdown_cells_keep_their_table() {
        let table = Table {
            title: "T",
            note: String::new(),
            columns: titles(["a"]),
            rows: vec![vec!["x|<b>".to_string()]],
        };
        assert!(
            table.markdown().ends_with("| x\\|\\<b\\> |\n"),
            "{}",
            table.markdown()
        );
    }
}

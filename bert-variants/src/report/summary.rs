//! The numbers of the report, computed from the runs.

use std::collections::BTreeSet;

use serde::Serialize;

use super::claims::{self, Claim};
use super::fairness::{self, Fairness};
use super::stats::{self, Stat};
use crate::data::Objective;
use crate::record::{EvalRecord, LengthRecord, Run, RunHeader};

/// Everything the report says in numbers; also its `summary.json`, where NaN is `null`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Title of the report.
    pub title: String,
    /// What to know before reading on.
    pub warnings: Vec<String>,
    /// Runs grouped by objective and variant.
    pub variants: Vec<VariantSummary>,
    /// Differences between variants over the seeds they share.
    pub differences: Vec<Difference>,
    /// What is said of rotary position encoding, and what these runs say.
    pub claims: Vec<Claim>,
    /// Settings that differ between compared runs.
    pub fairness: Fairness,
}

/// One variant trained for one objective, over its seeds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VariantSummary {
    /// What it learned to predict.
    pub objective: Objective,
    /// Name of the variant.
    pub variant: String,
    /// Seeds, one a run.
    pub seeds: Vec<u64>,
    /// All parameters.
    pub parameters: u64,
    /// Parameters of the position table.
    pub position_parameters: u64,
    /// Bytes of the parameters.
    pub parameter_bytes: u64,
    /// Bytes of the optimizer state.
    pub optimizer_bytes: Option<Stat>,
    /// Peak bytes of activations in a training step.
    pub peak_activation_bytes: Option<Stat>,
    /// Training speed.
    pub train_tokens_per_second: Option<Stat>,
    /// Forward-only speed.
    pub inference_tokens_per_second: Option<Stat>,
    /// Seconds of training.
    pub seconds: Option<Stat>,
    /// The last evaluation.
    pub final_eval: Option<EvalStats>,
    /// The evaluation of the lowest loss.
    pub best_eval: Option<EvalStats>,
    /// The trained model by input length; empty where none was evaluated so.
    pub lengths: Vec<LengthStats>,
    /// Time to fixed evaluation losses.
    pub thresholds: Vec<Threshold>,
    /// Gradient norms before clipping.
    pub gradient_norm: Option<GradientNorm>,
}

/// One evaluation over seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EvalStats {
    /// Optimizer steps done.
    pub step: Stat,
    /// Nats a predicted token.
    pub loss: Stat,
    /// Share of right predictions.
    pub accuracy: Stat,
    /// `exp(loss)`.
    pub perplexity: Stat,
}

/// Held-out loss on inputs of one length, over seeds. The same text is cut into inputs of each
/// length.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LengthStats {
    /// Most tokens of an input; the first of a variant is the training length.
    pub seq_len: u64,
    /// Whether the variant reads inputs of that length: a table of learned positions ends.
    pub defined: bool,
    /// Nats a predicted token.
    pub loss: Option<Stat>,
    /// Share of right predictions.
    pub accuracy: Option<Stat>,
}

/// The first evaluation at or below a loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Threshold {
    /// Nats.
    pub loss: f64,
    /// Runs that got there; the means are over these.
    pub reached: usize,
    /// All runs.
    pub runs: usize,
    /// Optimizer steps.
    pub steps: Option<Stat>,
    /// Tokens.
    pub tokens: Option<Stat>,
    /// Seconds of training, interpolated between training records.
    pub seconds: Option<Stat>,
}

/// Quantiles over the training records of a run, then mean over seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GradientNorm {
    /// Median.
    pub p50: Stat,
    /// 90 % quantile.
    pub p90: Stat,
    /// 99 % quantile.
    pub p99: Stat,
    /// Largest.
    pub max: Stat,
    /// Records above three times the running median.
    pub spikes: Stat,
    /// Records without a finite norm or loss, over all runs.
    pub non_finite: usize,
}

/// A variant less the baseline, seed by seed: same data order and masks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// What both learned to predict.
    pub objective: Objective,
    /// The variant.
    pub variant: String,
    /// What it is compared with.
    pub baseline: String,
    /// What is compared, with its unit.
    pub metric: String,
    /// Over shared seeds.
    pub difference: Stat,
    /// What it amounts to.
    pub reading: Reading,
}

/// Whether a mean difference stands out from its spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reading {
    /// More than two standard errors below zero.
    Lower,
    /// More than two standard errors above zero.
    Higher,
    /// Within two standard errors of zero.
    WithinNoise,
    /// One seed has no spread.
    OneSeed,
    /// A run ended without a finite number.
    Diverged,
}

impl Reading {
    /// Of a paired difference.
    pub fn of(difference: Stat) -> Self {
        match difference.two_standard_errors() {
            _ if !difference.mean.is_finite() => Self::Diverged,
            None => Self::OneSeed,
            Some(noise) if difference.mean < -noise => Self::Lower,
            Some(noise) if difference.mean > noise => Self::Higher,
            Some(_) => Self::WithinNoise,
        }
    }

    /// For readers.
    pub fn label(self) -> &'static str {
        match self {
            Self::Lower => "lower",
            Self::Higher => "higher",
            Self::WithinNoise => "within noise",
            Self::OneSeed => "one seed, no claim",
            Self::Diverged => "diverged",
        }
    }
}

/// The runs of one variant and objective.
pub(super) struct Group<'a> {
    pub objective: Objective,
    pub variant: &'a str,
    pub runs: Vec<&'a Run>,
}

impl Group<'_> {
    pub fn header(&self) -> &RunHeader {
        &self.runs[0].header
    }

    /// Over the seeds that have a value.
    pub fn stat(&self, value: impl Fn(&Run) -> Option<f64>) -> Option<Stat> {
        Stat::of(
            &self
                .runs
                .iter()
                .filter_map(|run| value(run))
                .collect::<Vec<_>>(),
        )
    }

    /// Over the seeds both groups have, `value(self, other)`.
    pub fn paired(&self, other: &Group, value: impl Fn(&Run, &Run) -> Option<f64>) -> Option<Stat> {
        let pair = |run: &Run| {
            let same_seed = |r: &&&Run| r.header.seed == run.header.seed;
            value(run, other.runs.iter().find(same_seed)?)
        };
        self.stat(pair)
    }

    /// The same, of `value(self) - value(other)`.
    pub fn difference(&self, other: &Group, value: impl Fn(&Run) -> Option<f64>) -> Option<Stat> {
        self.paired(other, |a, b| Some(value(a)? - value(b)?))
    }
}

/// Groups runs by objective, then variant name, then seed.
pub(super) fn group(runs: &[Run]) -> Vec<Group<'_>> {
    let mut runs: Vec<&Run> = runs.iter().collect();
    runs.sort_by_key(|run| {
        (
            order(run.header.objective),
            &run.header.variant,
            run.header.seed,
        )
    });
    let same = |a: &&Run, b: &&Run| {
        (a.header.objective, &a.header.variant) == (b.header.objective, &b.header.variant)
    };
    runs.to_vec();
    runs.chunk_by(same)
        .map(|runs| Group {
            objective: runs[0].header.objective,
            variant: &runs[0].header.variant,
            runs: runs.to_vec(),
        })
        .collect()
}

fn order(objective: Objective) -> u8 {
    match objective {
        Objective::Mlm => 0,
        Objective::Clm => 1,
    }
}

/// All numbers of the report.
pub(super) fn summarize(title: &str, groups: &[Group]) -> Summary {
    let fairness = fairness::check(groups);
    let mut warnings = fairness.warnings.clone();
    for run in groups.iter().flat_map(|g| &g.runs) {
        warnings.extend(run.warnings.clone());
        if run.eval.is_empty() {
            warnings.push(format!("{}: no evaluations", run.path.display()));
        }
    }
    let mut summary = Summary {
        title: title.to_string(),
        warnings,
        variants: Vec::new(),
        differences: Vec::new(),
        claims: Vec::new(),
        fairness,
    };
    for groups in groups.chunk_by(|a, b| a.objective == b.objective) {
        let thresholds = choose_thresholds(groups);
        let common = common_threshold(groups);
        let lengths = lengths(groups);
        summary.variants.extend(
            groups
                .iter()
                .map(|group| variant(group, &thresholds, &lengths)),
        );
        let baseline = claims::baseline(groups);
        for group in groups
            .iter()
            .filter(|group| group.variant != baseline.variant)
        {
            summary
                .differences
                .extend(differences(group, baseline, common));
        }
        summary.claims.extend(claims::judge(groups, common));
    }
    summary
}

fn variant(group: &Group, thresholds: &[f64], lengths: &[u64]) -> VariantSummary {
    let header = group.header();
    let summary = |value: fn(&crate::record::RunSummary) -> f64| {
        group.stat(|run| run.summary.as_ref().map(value))
    };
    VariantSummary {
        objective: group.objective,
        variant: group.variant.to_string(),
        seeds: group.runs.iter().map(|run| run.header.seed).collect(),
        parameters: header.parameters,
        position_parameters: header.position_parameters,
        parameter_bytes: header.parameter_bytes,
        optimizer_bytes: summary(|s| s.optimizer_bytes as f64),
        peak_activation_bytes: summary(|s| s.peak_activation_bytes as f64),
        train_tokens_per_second: group.stat(train_speed),
        inference_tokens_per_second: summary(|s| s.inference_tokens_per_second),
        seconds: group.stat(|run| run.train.last().map(|last| last.seconds)),
        final_eval: eval_stats(group, |run| run.eval.last()),
        best_eval: eval_stats(group, best),
        lengths: lengths
            .iter()
            .map(|seq_len| length_stats(group, *seq_len))
            .collect(),
        thresholds: thresholds
            .iter()
            .map(|loss| threshold(group, *loss))
            .collect(),
        gradient_norm: gradient_norm(group),
    }
}

fn eval_stats(group: &Group, pick: fn(&Run) -> Option<&EvalRecord>) -> Option<EvalStats> {
    let stat = |value: fn(&EvalRecord) -> f64| group.stat(|run| pick(run).map(value));
    Some(EvalStats {
        step: stat(|e| e.step as f64)?,
        loss: stat(|e| e.loss)?,
        accuracy: stat(|e| e.accuracy)?,
        perplexity: stat(|e| e.perplexity)?,
    })
}

/// The evaluation of the lowest finite loss.
fn best(run: &Run) -> Option<&EvalRecord> {
    let finite = run.eval.iter().filter(|eval| eval.loss.is_finite());
    finite.min_by(|a, b| a.loss.total_cmp(&b.loss))
}

/// Loss of the last evaluation.
pub(super) fn final_loss(run: &Run) -> Option<f64> {
    run.eval.last().map(|eval| eval.loss)
}

/// Every input length that any of the runs was evaluated on, increasing.
pub(super) fn lengths(groups: &[Group]) -> Vec<u64> {
    let runs = groups.iter().flat_map(|group| &group.runs);
    let lengths: BTreeSet<u64> = runs
        .flat_map(|run| run.lengths.iter().map(|length| length.seq_len))
        .collect();
    lengths.into_iter().collect()
}

fn at_length(run: &Run, seq_len: u64) -> Option<&LengthRecord> {
    run.lengths.iter().find(|length| length.seq_len == seq_len)
}

/// Loss of the trained model on inputs of one length.
pub(super) fn loss_at(run: &Run, seq_len: u64) -> Option<f64> {
    at_length(run, seq_len).map(|length| length.loss)
}

fn length_stats(group: &Group, seq_len: u64) -> LengthStats {
    let header = group.header();
    let rows = header.model_config.get("max_position_embeddings");
    let rows = rows.and_then(|rows| rows.as_u64()).unwrap_or(u64::MAX);
    LengthStats {
        seq_len,
        defined: header.position_parameters == 0 || seq_len <= rows,
        loss: group.stat(|run| loss_at(run, seq_len)),
        accuracy: group.stat(|run| at_length(run, seq_len).map(|length| length.accuracy)),
    }
}

/// Tokens a second over the whole run; of an unfinished run, over what it did.
pub(super) fn train_speed(run: &Run) -> Option<f64> {
    let done = run
        .train
        .last()
        .map(|last| last.tokens as f64 / last.seconds);
    run.summary.map(|s| s.train_tokens_per_second).or(done)
}

fn threshold(group: &Group, loss: f64) -> Threshold {
    let reach = |value: fn(&Run, &EvalRecord) -> Option<f64>| {
        group.stat(|run| value(run, first_at_or_below(run, loss)?))
    };
    let steps = reach(|_, eval| Some(eval.step as f64));
    Threshold {
        loss,
        reached: steps.map_or(0, |steps| steps.n),
        runs: group.runs.len(),
        steps,
        tokens: reach(|_, eval| Some(eval.tokens as f64)),
        seconds: reach(|run, eval| seconds_at(run, eval.step)),
    }
}

fn first_at_or_below(run: &Run, loss: f64) -> Option<&EvalRecord> {
    run.eval.iter().find(|eval| eval.loss <= loss)
}

/// Steps to an evaluation loss.
pub(super) fn steps_to(run: &Run, loss: f64) -> Option<f64> {
    first_at_or_below(run, loss).map(|eval| eval.step as f64)
}

fn seconds_at(run: &Run, step: u64) -> Option<f64> {
    let after = run.train.partition_point(|r| r.step < step);
    let point = |i: usize| run.train.get(i).map(|r| (r.step as f64, r.seconds));
    let (at, seconds) = point(after)?;
    if at == step as f64 {
        return Some(seconds);
    }
    let before = if after == 0 {
        (0.0, 0.0)
    } else {
        point(after - 1)?
    };
    Some(stats::interpolate(before, (at, seconds), step as f64))
}

/// Finished runs, or all where none is: a run stopped early reached less than it would have.
fn compared<'a>(groups: &'a [Group]) -> impl Iterator<Item = Vec<&'a Run>> {
    let finished = groups
        .iter()
        .flat_map(|g| &g.runs)
        .any(|run| run.summary.is_some());
    groups.iter().map(move |group| {
        let runs = group.runs.iter().copied();
        runs.filter(|run| !finished || run.summary.is_some())
            .collect::<Vec<_>>()
    })
}

fn worst_best(runs: &[&Run]) -> Option<f64> {
    let best = runs.iter().filter_map(|run| best(run));
    best.map(|eval| eval.loss).max_by(f64::total_cmp)
}

/// The lowest evaluation loss, rounded up to 0.001, that every finished run reached.
fn common_threshold(groups: &[Group]) -> Option<f64> {
    let every_run = compared(groups)
        .filter_map(|runs| worst_best(&runs))
        .max_by(f64::total_cmp);
    every_run.map(|loss| (loss * 1000.0).ceil() / 1000.0)
}

fn choose_thresholds(groups: &[Group]) -> Vec<f64> {
    let worst: Vec<f64> = compared(groups)
        .filter_map(|runs| worst_best(&runs))
        .collect();
    let first = groups
        .iter()
        .flat_map(|g| &g.runs)
        .filter_map(|run| run.eval.first());
    let initial = first.map(|eval| eval.loss).filter(|loss| loss.is_finite());
    let (Some(initial), Some(every_run), Some(best_variant)) = (
        initial.min_by(f64::total_cmp),
        worst.iter().copied().max_by(f64::total_cmp),
        worst.iter().copied().min_by(f64::total_cmp),
    ) else {
        return Vec::new();
    };
    stats::thresholds(initial, every_run, best_variant)
}

/// Finite gradient norms in order.
fn norms(run: &Run) -> Vec<f64> {
    run.train
        .iter()
        .map(|r| r.grad_norm)
        .filter(|norm| norm.is_finite())
        .collect()
}

fn norm_quantile(run: &Run, q: f64) -> Option<f64> {
    let mut norms = norms(run);
    norms.sort_by(f64::total_cmp);
    (!norms.is_empty()).then(|| stats::quantile(&norms, q))
}

/// How far the 99 % quantile of the gradient norm lies above its median.
pub(super) fn norm_spread(run: &Run) -> Option<f64> {
    Some(norm_quantile(run, 0.99)? / norm_quantile(run, 0.5)?)
}

/// Gradient norms above three times the running median.
pub(super) fn spikes(run: &Run) -> Option<f64> {
    let norms = norms(run);
    (!norms.is_empty()).then(|| stats::count_spikes(&norms) as f64)
}

fn gradient_norm(group: &Group) -> Option<GradientNorm> {
    let quantile = |q: f64| group.stat(|run| norm_quantile(run, q));
    let records = group.runs.iter().flat_map(|run| &run.train);
    Some(GradientNorm {
        p50: quantile(0.5)?,
        p90: quantile(0.9)?,
        p99: quantile(0.99)?,
        max: quantile(1.0)?,
        spikes: group.stat(spikes)?,
        non_finite: records
            .filter(|r| !r.grad_norm.is_finite() || !r.loss.is_finite())
            .count(),
    })
}

fn differences(group: &Group, baseline: &Group, common: Option<f64>) -> Vec<Difference> {
    let steps_name = common.map_or_else(
        || "Steps to a common evaluation loss".to_string(),
        |loss| format!("Steps to evaluation loss {loss:.3}"),
    );
    [
        (
            "Final evaluation loss (nats)",
            group.difference(baseline, final_loss),
        ),
        (
            "Best evaluation loss (nats)",
            group.difference(baseline, |run| best(run).map(|eval| eval.loss)),
        ),
        (
            "Final accuracy (percentage points)",
            group.difference(baseline, |run| run.eval.last().map(|e| 100.0 * e.accuracy)),
        ),
        (
            &steps_name,
            group.difference(baseline, |run| steps_to(run, common?)),
        ),
        ("Training speed (%)", group.paired(baseline, relative_speed)),
        (
            "Gradient norm p99 / p50",
            group.difference(baseline, norm_spread),
        ),
        ("Gradient spikes", group.difference(baseline, spikes)),
    ]
    .into_iter()
    .filter_map(|(metric, difference)| {
        Some(Difference {
            objective: group.objective,
            variant: group.variant.to_string(),
            baseline: baseline.variant.to_string(),
            metric: metric.to_string(),
            difference: difference?,
            reading: Reading::of(difference?),
        })
    })
    .collect()
}

/// By how many per cent `run` trains faster than `other`.
pub(super) fn relative_speed(run: &Run, other: &Run) -> Option<f64> {
    Some(100.0 * (train_speed(run)? / train_speed(other)? - 1.0))
}

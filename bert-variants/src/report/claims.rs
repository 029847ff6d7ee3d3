//! What is said of rotary position encoding (RoPE, Su et al. 2021) against learned absolute
//! positions, and what the runs say of it.

use std::ops::RangeInclusive;
use std::slice;

use serde::Serialize;

use super::stats::Stat;
use super::summary::{self, Group, Reading};
use super::tables::{count, decimal};
use crate::data::Objective;
use crate::record::{Run, RunHeader};

/// One claim with its verdict.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Claim {
    /// For which objective.
    pub objective: Objective,
    /// What is claimed, of which variant against which.
    pub claim: String,
    /// What the runs say.
    pub verdict: Verdict,
    /// The numbers behind the verdict.
    pub evidence: String,
}

/// What the runs say of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The numbers agree with it.
    Supported,
    /// The numbers contradict it.
    NotSupported,
    /// The difference is within two standard errors.
    WithinNoise,
    /// One seed has no spread to judge by.
    OneSeed,
    /// These runs do not measure it.
    NotTested,
}

impl Verdict {
    /// For readers.
    pub fn label(self) -> &'static str {
        match self {
            Self::Supported => "supported",
            Self::NotSupported => "not supported",
            Self::WithinNoise => "within noise",
            Self::OneSeed => "one seed, no claim",
            Self::NotTested => "not tested in these runs",
        }
    }
}

/// Training speeds closer than this many per cent count as the same.
const SAME_SPEED: f64 = 5.0;

#[derive(PartialEq)]
enum Positions {
    LearnedAbsolute,
    Rotary,
    Other,
}

fn positions(header: &RunHeader) -> Positions {
    let text = |key: &str| {
        header
            .model_config
            .get(key)
            .and_then(|v| v.as_str())
            .unwrap_or("")
    };
    let has = |key: &str| {
        header
            .model_config
            .get(key)
            .is_some_and(|value| !value.is_null())
    };
    let kind = text("position_embedding_type").to_lowercase();
    let variant = header.variant.to_lowercase();
    if text("model_type") == "roformer"
        || ["rope", "rotary"]
            .iter()
            .any(|name| kind.contains(name) || variant.contains(name))
        || ["rope_theta", "rope_parameters"].into_iter().any(has)
    {
        Positions::Rotary
    } else if header.position_parameters > 0
        && matches!(text("model_type"), "bert" | "")
        && matches!(kind.as_str(), "absolute" | "learned" | "")
    {
        Positions::LearnedAbsolute
    } else {
        Positions::Other
    }
}

/// What the other variants are compared with: learned absolute positions where trained, else the
/// first variant.
pub(super) fn baseline<'a, 'b>(groups: &'a [Group<'b>]) -> &'a Group<'b> {
    let absolute = |group: &&Group| positions(group.header()) == Positions::LearnedAbsolute;
    groups.iter().find(absolute).unwrap_or(&groups[0])
}

/// The verdicts of one objective: each rotary variant against the absolute baseline.
pub(super) fn judge(groups: &[Group], common: Option<f64>) -> Vec<Claim> {
    let baseline = baseline(groups);
    if positions(baseline.header()) != Positions::LearnedAbsolute {
        return Vec::new();
    }
    let rotary = groups
        .iter()
        .filter(|g| positions(g.header()) == Positions::Rotary);
    rotary
        .flat_map(|group| judge_pair(group, baseline, common))
        .collect()
}

fn judge_pair(rope: &Group, absolute: &Group, common: Option<f64>) -> Vec<Claim> {
    let names = format!("{} against {}", rope.variant, absolute.variant);
    let claim = |text: &str, (verdict, evidence): (Verdict, String)| Claim {
        objective: rope.objective,
        claim: format!("{text} ({names})"),
        verdict,
        evidence,
    };
    let loss = rope.difference(absolute, summary::final_loss);
    let steps = common.and_then(|loss| rope.difference(absolute, |r| summary::steps_to(r, loss)));
    let steps_what = format!(
        "steps to evaluation loss {}, which every finished run reached",
        common.map_or("-".to_string(), |loss| decimal(loss, 3))
    );
    vec![
        claim(
            "RoPE reaches a lower loss",
            lower(loss, 4, "nats of final evaluation loss"),
        ),
        claim(
            "RoPE is 5 to 10 % better on long inputs",
            better_on_long_inputs(rope, absolute),
        ),
        claim(
            "RoPE extrapolates past the training length",
            extrapolates(rope),
        ),
        claim(
            "RoPE needs fewer parameters",
            fewer_parameters(rope, absolute),
        ),
        claim(
            "RoPE saves about 0.5M parameters",
            half_a_million(rope, absolute),
        ),
        claim("RoPE converges faster", lower(steps, 0, &steps_what)),
        claim(
            "RoPE trains more stably",
            lower(
                rope.difference(absolute, summary::norm_spread),
                3,
                "in p99 / p50 of the gradient norm",
            ),
        ),
        claim("RoPE trains at the same speed", same_speed(rope, absolute)),
    ]
}

/// The verdict on "lower than the baseline".
fn lower(difference: Option<Stat>, digits: usize, what: &str) -> (Verdict, String) {
    let Some(difference) = difference else {
        return (
            Verdict::NotTested,
            format!("no shared seed has both: {what}"),
        );
    };
    let verdict = match Reading::of(difference) {
        Reading::Lower => Verdict::Supported,
        Reading::Higher => Verdict::NotSupported,
        Reading::WithinNoise => Verdict::WithinNoise,
        Reading::OneSeed => Verdict::OneSeed,
        Reading::Diverged => return (Verdict::NotTested, "a run diverged".to_string()),
    };
    (verdict, format!("{} {what}", signed(difference, digits)))
}

/// A claim of a size: supported where the whole interval lies inside it.
fn inside(stat: Stat, range: RangeInclusive<f64>) -> Verdict {
    let Some(noise) = stat.two_standard_errors() else {
        return Verdict::OneSeed;
    };
    let (low, high) = (stat.mean - noise, stat.mean + noise);
    if range.contains(&low) && range.contains(&high) {
        Verdict::Supported
    } else if high < *range.start() || low > *range.end() {
        Verdict::NotSupported
    } else {
        Verdict::WithinNoise
    }
}

/// On the longest inputs past the training length that both read.
fn better_on_long_inputs(rope: &Group, absolute: &Group) -> (Verdict, String) {
    let percent = |loss: &dyn Fn(&Run) -> Option<f64>| {
        rope.paired(absolute, |a, b| Some(100.0 * (loss(a)? / loss(b)? - 1.0)))
    };
    let text = |stat: Option<Stat>| stat.map_or("-".to_string(), |stat| signed(stat, 2) + " %");
    let [ours, theirs] = [rope, absolute].map(|group| summary::lengths(slice::from_ref(group)));
    let both: Vec<u64> = ours.into_iter().filter(|l| theirs.contains(l)).collect();
    match both[..] {
        [] => (
            Verdict::NotTested,
            format!(
                "evaluated on inputs of the training length only; there the final loss differs \
                 by {}",
                text(percent(&summary::final_loss))
            ),
        ),
        [trained] => (
            Verdict::NotTested,
            format!(
                "no input past the training length of {trained} tokens was read by both: learned \
                 positions end with their table; at {trained} tokens the loss differs by {}",
                text(percent(&|run| summary::loss_at(run, trained)))
            ),
        ),
        [trained, .., longest] => {
            let difference = percent(&|run| summary::loss_at(run, longest));
            let verdict = match difference {
                Some(difference) if difference.mean.is_finite() => inside(difference, -10.0..=-5.0),
                _ => Verdict::NotTested,
            };
            let evidence = format!(
                "{} of loss at {longest} tokens, trained on {trained}",
                text(difference)
            );
            (verdict, evidence)
        }
    }
}

/// On the longest inputs, against the same text in inputs of the training length.
fn extrapolates(rope: &Group) -> (Verdict, String) {
    let [trained, .., longest] = summary::lengths(slice::from_ref(rope))[..] else {
        let text = "no evaluation past the training length (--eval-lengths)".to_string();
        return (Verdict::NotTested, text);
    };
    let rise =
        rope.stat(|run| Some(summary::loss_at(run, longest)? - summary::loss_at(run, trained)?));
    let what = format!(
        "nats at {longest} tokens against the same text in inputs of {trained}, the training length"
    );
    match lower(rise, 4, &what) {
        // It is enough not to lose.
        (Verdict::WithinNoise, text) => (Verdict::Supported, text),
        other => other,
    }
}

fn saved(rope: &Group, absolute: &Group) -> i128 {
    i128::from(absolute.header().parameters) - i128::from(rope.header().parameters)
}

fn fewer_parameters(rope: &Group, absolute: &Group) -> (Verdict, String) {
    let verdict = match saved(rope, absolute) {
        1.. => Verdict::Supported,
        _ => Verdict::NotSupported,
    };
    let [ours, theirs] = [rope, absolute].map(|group| group.header());
    let text = format!(
        "{} against {}; the position table has {}",
        count(ours.parameters as f64),
        count(theirs.parameters as f64),
        count(theirs.position_parameters as f64)
    );
    (verdict, text)
}

fn half_a_million(rope: &Group, absolute: &Group) -> (Verdict, String) {
    let saved = saved(rope, absolute);
    let near = (450_000..=550_000).contains(&saved);
    let verdict = if near {
        Verdict::Supported
    } else {
        Verdict::NotSupported
    };
    (verdict, format!("exactly {} fewer", count(saved as f64)))
}

fn same_speed(rope: &Group, absolute: &Group) -> (Verdict, String) {
    if rope.header().devices() != absolute.header().devices() {
        return (Verdict::NotTested, "run on different devices".to_string());
    }
    let Some(faster) = rope.paired(absolute, summary::relative_speed) else {
        return (
            Verdict::NotTested,
            "no shared seed has training speeds of both".to_string(),
        );
    };
    let verdict = inside(faster, -SAME_SPEED..=SAME_SPEED);
    let text = format!(
        "{} % training tokens/s; same means within {SAME_SPEED} %",
        signed(faster, 1)
    );
    (verdict, text)
}

/// Mean with sign and sd, and how many seeds.
fn signed(stat: Stat, digits: usize) -> String {
    let sd = stat
        .sd
        .map_or(String::new(), |sd| format!(" ± {sd:.digits$}"));
    format!("{:+.digits$}{sd} (n = {})", stat.mean, stat.n)
}

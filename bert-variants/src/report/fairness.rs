//! Whether the compared runs differ in their position encoding only.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::summary::Group;
use super::tables::objective_name;
use crate::data::Objective;

/// What differs between runs of one objective besides position encoding and seed.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Fairness {
    /// Every setting that differs.
    pub differences: Vec<ConfigDifference>,
    /// Those that make the comparison unfair, in words.
    pub warnings: Vec<String>,
}

/// One setting that differs between runs of one objective.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConfigDifference {
    /// The runs' objective.
    pub objective: Objective,
    /// Dotted path of the setting.
    pub key: String,
    /// The values found, by variant.
    pub values: BTreeMap<String, BTreeSet<String>>,
    /// What it means for the comparison.
    pub effect: Effect,
}

/// What a differing setting means for the comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// The losses cannot be compared.
    Unfair,
    /// Speeds may not compare.
    Speed,
    /// A name or place.
    Harmless,
}

impl Effect {
    /// For readers.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unfair => "unfair comparison",
            Self::Speed => "speeds may not compare",
            Self::Harmless => "harmless",
        }
    }
}

/// Words in the last part of a key that make a difference harmless: where things are written and
/// how often. Everything else counts as unfair.
const HARMLESS: [&str; 12] = [
    "dir",
    "out",
    "output",
    "log",
    "save",
    "checkpoint",
    "checkpoints",
    "resume",
    "name",
    "variant",
    "version",
    "path",
];

/// Words of keys that belong to the position encoding. A Hugging Face architecture is named after
/// its encoding, so its names and extra sizes belong here too.
const POSITION: [&str; 11] = [
    "position",
    "positions",
    "rope",
    "rotary",
    "alibi",
    "relative",
    "variant",
    "architectures",
    "model_type",
    "embedding_size",
    "auto_map",
];

pub(super) fn check(groups: &[Group]) -> Fairness {
    let mut fairness = Fairness::default();
    for groups in groups.chunk_by(|a, b| a.objective == b.objective) {
        let objective = groups[0].objective;
        let found = differences(objective, groups);
        for difference in found.iter().filter(|d| d.effect == Effect::Unfair) {
            fairness.warnings.push(format!(
                "Unfair comparison: the {} runs differ in {}: {}",
                objective_name(objective),
                difference.key,
                values_text(&difference.values)
            ));
        }
        fairness.differences.extend(found);
        for group in groups {
            for runs in group.runs.windows(2) {
                if runs[0].header.seed == runs[1].header.seed {
                    fairness.warnings.push(format!(
                        "Two runs of {} {} share seed {}: {} and {}",
                        group.variant,
                        objective_name(objective),
                        runs[0].header.seed,
                        runs[0].path.display(),
                        runs[1].path.display()
                    ));
                }
            }
        }
    }
    fairness
}

/// `bert: 0.1; roformer: 0.2`.
pub(super) fn values_text(values: &BTreeMap<String, BTreeSet<String>>) -> String {
    let one = |(variant, values): (&String, &BTreeSet<String>)| {
        format!(
            "{variant}: {}",
            values.iter().cloned().collect::<Vec<_>>().join(", ")
        )
    };
    values.iter().map(one).collect::<Vec<_>>().join("; ")
}

fn differences(objective: Objective, groups: &[Group]) -> Vec<ConfigDifference> {
    let runs: Vec<(&str, BTreeMap<String, String>)> = groups
        .iter()
        .flat_map(|g| g.runs.iter().map(|run| (g.variant, run.header.settings())))
        .collect();
    let keys: BTreeSet<&String> = runs
        .iter()
        .flat_map(|(_, settings)| settings.keys())
        .collect();
    keys.into_iter()
        .filter_map(|key| {
            let mut values: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
            for (variant, settings) in &runs {
                let value = settings
                    .get(key)
                    .cloned()
                    .unwrap_or_else(|| "absent".to_string());
                values.entry(variant.to_string()).or_default().insert(value);
            }
            let all: BTreeSet<&String> = values.values().flatten().collect();
            let effect = effect(key)?;
            let key = key.clone();
            (all.len() > 1).then_some(ConfigDifference {
                objective,
                key,
                values,
                effect,
            })
        })
        .collect()
}

/// `None` where runs may differ: seed and position encoding.
fn effect(key: &str) -> Option<Effect> {
    let (section, rest) = key.split_once('.').unwrap_or(("", key));
    let last = rest.rsplit('.').next().unwrap_or(rest);
    let words = || last.split(['_', '-']);
    let any = |list: &[&str]| list.contains(&last) || words().any(|word| list.contains(&word));
    let of_position = || {
        let mut parts = rest.split('.').chain(rest.split(['.', '_', '-']));
        parts.any(|part| POSITION.contains(&part))
    };
    // The objective decides `is_decoder`, which some architectures leave out.
    if words().any(|word| word == "seed") || last == "is_decoder" || of_position() {
        return None;
    }
    Some(match last {
        "device" | "code_version" | "threads" | "cuda_graphs" | "gradient_checkpointing" => {
            Effect::Speed
        }
        _ if words().any(|word| ["data", "lr", "batch", "steps"].contains(&word)) => Effect::Unfair,
        _ if section != "model_config" && any(&HARMLESS) => Effect::Harmless,
        "_name_or_path" | "transformers_version" => Effect::Harmless,
        _ => Effect::Unfair,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effects_of_keys() {
        assert_eq!(effect("train_config.seed"), None);
        assert_eq!(effect("model_config.position_embedding_type"), None);
        assert_eq!(effect("model_config.rope_theta"), None);
        assert_eq!(effect("model_config.rope_scaling.factor"), None);
        assert_eq!(effect("model_config.auto_map.AutoModel"), None);
        assert_eq!(effect("model_config.is_decoder"), None);
        assert_eq!(
            effect("train_config.train.cuda_graphs"),
            Some(Effect::Speed)
        );
        assert_eq!(effect("train_config.optimizer.lr"), Some(Effect::Unfair));
        assert_eq!(effect("train_config.data_dir"), Some(Effect::Unfair));
        assert_eq!(effect("train_config.output_dir"), Some(Effect::Harmless));
        assert_eq!(effect("train_config.weight_decay"), Some(Effect::Unfair));
        assert_eq!(effect("model_config.hidden_size"), Some(Effect::Unfair));
        assert_eq!(effect("device"), Some(Effect::Speed));
        assert_eq!(effect("total_steps"), Some(Effect::Unfair));
    }
}

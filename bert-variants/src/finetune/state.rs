//! What a run that was stopped goes on from.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use candle_rope_attn::ops::AdamWState;
use serde::{Deserialize, Serialize};

use super::optimizer::LayerwiseAdamW;
use super::records::Evaluation;
use crate::checkpoint::{WeightFiles, find_dir, named_moments, read_moments};
use crate::checkpoint::{write_dir, write_safetensors};
use crate::parameters::Parameters;

/// Beside the records of the run.
const DIR: &str = "stopped";
const TENSORS: &str = "state.safetensors";
const STATE: &str = "state.json";

/// How far a run is.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Seconds of training, without evaluations.
    pub seconds: f64,
    /// Those since the epoch began.
    pub epoch_seconds: f64,
}

impl Progress {
    pub fn add_seconds(&mut self, elapsed: Duration) {
        self.seconds += elapsed.as_secs_f64();
        self.epoch_seconds += elapsed.as_secs_f64();
    }
}

/// The evaluations so far.
#[derive(Default)]
pub(super) struct History {
    /// The best one, of all splits, and its weights.
    pub best: Option<(Vec<Evaluation>, Vec<Tensor>)>,
    /// Evaluations since.
    pub worse: usize,
}

impl History {
    pub fn add(&mut self, found: Vec<Evaluation>, parameters: &Parameters) -> Result<()> {
        let highest = self.best.as_ref().map(|(best, _)| best[0].score());
        if highest.is_none_or(|highest| found[0].score() > highest) {
            self.best = Some((found, parameters.copy()?));
            self.worse = 0;
        } else {
            self.worse += 1;
        }
        Ok(())
    }
}

/// The state of a stopped run but for its tensors: all weights, those of the best evaluation, and the
/// optimizer's moments.
#[derive(Serialize, Deserialize)]
pub(super) struct Stopped {
    pub progress: Progress,
    /// Number of texts to train on, which the place in the epoch is one of.
    texts: usize,
    /// Updates that the optimizer made.
    updates: u32,
    best: Option<Vec<Evaluation>>,
    worse: usize,
}

impl Stopped {
    /// Writes the state of the run in the folder `dir`, in place of an earlier one.
    pub fn save(
        dir: &Path,
        progress: Progress,
        texts: usize,
        parameters: &Parameters,
        optimizer: &LayerwiseAdamW,
        history: &History,
    ) -> Result<()> {
        let AdamWState { steps, moments } = optimizer.state()?;
        let mut tensors = Vec::new();
        for (name, var) in parameters.vars() {
            tensors.push((name.clone(), var.as_detached_tensor()));
        }
        tensors.extend(named_moments(parameters, moments));
        if let Some((_, weights)) = &history.best {
            for ((name, _), weight) in parameters.vars().iter().zip(weights) {
                tensors.push((format!("{name}.best"), weight.clone()));
            }
        }
        let state = Self {
            progress,
            texts,
            updates: steps,
            best: history.best.as_ref().map(|(best, _)| best.clone()),
            worse: history.worse,
        };
        write_dir(&dir.join(DIR), |dir| {
            write_safetensors(&dir.join(TENSORS), tensors)?;
            fs::write(dir.join(STATE), serde_json::to_vec_pretty(&state)?)?;
            Ok(())
        })
    }

    /// The state in the folder of a run, if it was stopped, when there were as many `texts`.
    pub fn find(dir: &Path, texts: usize) -> Result<Option<Self>> {
        let dir = dir.join(DIR);
        if !find_dir(&dir)? {
            return Ok(None);
        }
        let path = dir.join(STATE);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let found: Self = serde_json::from_str(&text).with_context(|| damaged(&path))?;
        ensure!(
            found.texts == texts,
            "{}: the run had {} texts to train on, now there are {texts}; restore them, or {ADVICE}",
            path.display(),
            found.texts
        );
        Ok(Some(found))
    }

    /// Gives parameters and optimizer their state, from the folder of the run.
    pub fn restore(
        self,
        dir: &Path,
        parameters: &Parameters,
        optimizer: &mut LayerwiseAdamW,
    ) -> Result<History> {
        let path = dir.join(DIR).join(TENSORS);
        let mut files = WeightFiles::open(&path)?;
        let mut read = |name: &str, like: &Tensor| -> Result<Tensor> {
            let found = files.read(name, parameters.device());
            let found = found.with_context(|| damaged(&path))?;
            ensure!(
                found.shape() == like.shape(),
                "{}: {name} has shape {:?}, expected {:?}; {}",
                path.display(),
                found.dims(),
                like.dims(),
                ADVICE
            );
            Ok(found)
        };
        let mut all = |suffix: &str| -> Result<Vec<Tensor>> {
            let vars = parameters.vars().iter();
            vars.map(|(name, var)| read(&format!("{name}{suffix}"), var))
                .collect()
        };
        parameters.assign(&all("")?)?;
        let best = match self.best {
            Some(best) => Some((best, all(".best")?)),
            None => None,
        };
        let (steps, moments) = (self.updates, read_moments(parameters, read)?);
        optimizer.load_state(&AdamWState { steps, moments })?;
        Ok(History {
            best,
            worse: self.worse,
        })
    }

    /// Removes the state of a run that has ended, or begins.
    pub fn remove(dir: &Path) -> Result<()> {
        let dir = dir.join(DIR);
        if find_dir(&dir)? {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        Ok(())
    }
}

const ADVICE: &str = "remove its folder to begin the seed again";

fn damaged(path: &Path) -> String {
    format!("{} is damaged; {ADVICE}", path.display())
}

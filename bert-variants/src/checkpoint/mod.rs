//! Models on disk: Hugging Face directories, and the state of training beside them.
//!
//! A model directory holds `config.json`, `model.safetensors`, a model card and the tokenizer's
//! files, as transformers reads and writes them.

mod card;
mod hub;
mod pretrained;
mod weights;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use candle_rope_attn::ops::{AdamW, AdamWState};

pub use card::ModelCard;
pub use pretrained::{Pretrained, from_pretrained, from_pretrained_as, save_pretrained};

use crate::config::BertConfig;
use crate::parameters::Parameters;
use crate::tokenizer::Tokenizer;
use crate::train::Progress;
use pretrained::{read_weights, write_model};
pub(crate) use weights::{WeightFiles, write_safetensors};

const CONFIG: &str = "config.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const TRAINER: &str = "trainer.json";
/// What [`save_training`] adds to a model directory.
pub(crate) const TRAINING_STATE: [&str; 2] = [OPTIMIZER, TRAINER];

/// The state of a training run: a model directory with two more files, which continues as if it
/// had never stopped.
pub(crate) fn save_training(
    dir: &Path,
    config: &BertConfig,
    parameters: &Parameters,
    tokenizer: &Tokenizer,
    optimizer: &AdamW,
    progress: &Progress,
    card: &ModelCard,
) -> Result<()> {
    let moments = named_moments(parameters, optimizer.state()?.moments);
    write_dir(dir, |dir| {
        write_model(dir, config, parameters, card)?;
        tokenizer.save(dir)?;
        write_safetensors(&dir.join(OPTIMIZER), moments.collect())?;
        fs::write(dir.join(TRAINER), serde_json::to_vec_pretty(progress)?)?;
        Ok(())
    })
}

/// Reads what [`save_training`] wrote, except the optimizer's state, which
/// [`read_optimizer`] does once there is an optimizer for the parameters.
pub(crate) fn read_training(
    dir: &Path,
    config: &BertConfig,
    device: &Device,
) -> Result<(Parameters, Progress)> {
    let loaded = read_weights(config, dir, 0, device)
        .with_context(|| format!("cannot load the weights of {}", dir.display()))?;
    ensure!(
        loaded.initialized.is_empty(),
        "{} lacks {}: it is not the checkpoint of this run",
        dir.display(),
        loaded.initialized.join(", ")
    );
    let path = dir.join(TRAINER);
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let progress = serde_json::from_str(&text)
        .with_context(|| format!("{} is damaged; restore it from a copy", path.display()))?;
    Ok((loaded.parameters, progress))
}

/// Gives the optimizer of `parameters` the state in a checkpoint.
pub(crate) fn read_optimizer(
    dir: &Path,
    parameters: &Parameters,
    optimizer: &mut AdamW,
    progress: &Progress,
) -> Result<()> {
    let path = dir.join(OPTIMIZER);
    let mut tensors = WeightFiles::open(&path)?;
    let moments = read_moments(parameters, |name, _| {
        let belongs = || format!("{} belongs to another model", path.display());
        (tensors.read(name, parameters.device())).with_context(belongs)
    })?;
    let steps = u32::try_from(progress.step).context("too many steps")?;
    optimizer.load_state(&AdamWState { steps, moments })?;
    Ok(())
}

/// What the moments of a parameter are called in a file, after its name.
const MOMENTS: [&str; 2] = [".exp_avg", ".exp_avg_sq"];

/// The moments of the trained parameters with their names in a file.
pub(crate) fn named_moments(
    parameters: &Parameters,
    moments: Vec<(Tensor, Tensor)>,
) -> impl Iterator<Item = (String, Tensor)> {
    let names =
        (parameters.trained()).flat_map(|(name, _)| MOMENTS.map(|end| format!("{name}{end}")));
    names.zip(moments.into_iter().flat_map(<[_; 2]>::from))
}

/// The moments of the trained parameters from `read`, which takes a name and a tensor of the same shape.
pub(crate) fn read_moments(
    parameters: &Parameters,
    mut read: impl FnMut(&str, &Tensor) -> Result<Tensor>,
) -> Result<Vec<(Tensor, Tensor)>> {
    let mut read = |name, end, var| read(&format!("{name}{end}"), var);
    let moments = (parameters.trained())
        .map(|(name, var)| Ok((read(name, MOMENTS[0], var)?, read(name, MOMENTS[1], var)?)));
    moments.collect()
}

/// Whether there is a directory `dir`, as [`write_dir`] writes it: also where a killed process had taken
/// the name from an earlier one, which then gets it back.
pub(crate) fn find_dir(dir: &Path) -> Result<bool> {
    let old = old_name(dir);
    if !dir.exists() && old.exists() {
        fs::rename(&old, dir).with_context(|| format!("cannot restore {}", dir.display()))?;
    }
    Ok(dir.exists())
}

/// The name of a directory while its successor takes its place: hidden beside it, and no name that
/// a user would give.
fn old_name(dir: &Path) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    dir.with_file_name(format!(".{name}.replaced"))
}

/// Writes the files of a directory under a temporary name, makes sure that they are on the disk,
/// and gives them their name. On an error nothing is left behind, and an earlier directory stays.
pub(crate) fn write_dir(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let write = || -> Result<()> {
        fs::create_dir_all(parent)?;
        let temporary = tempfile::Builder::new()
            .prefix(".incomplete-")
            .tempdir_in(parent)?;
        fill(temporary.path())?;
        for entry in fs::read_dir(temporary.path())? {
            File::open(entry?.path())?.sync_all()?;
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Temporary folders are private; this one is the user's.
            fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o755))?;
        }
        File::open(temporary.path())?.sync_all()?;
        // A directory cannot be renamed onto one that has files.
        let old = old_name(dir);
        let replaced = dir.exists();
        if replaced {
            if old.exists() {
                fs::remove_dir_all(&old)?;
            }
            fs::rename(dir, &old)?;
        }
        if let Err(error) = fs::rename(temporary.path(), dir) {
            if replaced {
                fs::rename(&old, dir)?;
            }
            return Err(error.into());
        }
        let _ = temporary.keep();
        File::open(parent)?.sync_all()?;
        if replaced {
            fs::remove_dir_all(&old)?;
        }
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", dir.display()))
}

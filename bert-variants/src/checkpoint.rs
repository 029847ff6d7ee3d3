//! Models on disk: Hugging Face directories, read and written.
//!
//! A model directory holds `config.json`, `model.safetensors` and the tokenizer's files, as
//! transformers reads and writes them.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{AdamW, AdamWState};
use hf_hub::api::sync::ApiBuilder;

use crate::config::{BertConfig, ModelType};
use crate::parameters::{Init, Parameters};
use crate::tokenizer::Tokenizer;
use crate::train::Progress;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const TRAINER: &str = "trainer.json";
/// RoFormer's table of angles, which transformers keeps among the weights.
const ROPE_TABLE: &str = "encoder.embed_positions.weight";

/// A model read from disk.
pub struct Pretrained {
    /// Its configuration.
    pub config: BertConfig,
    /// Its weights, f32.
    pub parameters: Parameters,
    /// The directory it came from.
    pub dir: PathBuf,
    /// Names of weights that the checkpoint lacks, and that got their initial values: only the
    /// language-model head of a checkpoint without one.
    pub initialized: Vec<String>,
    /// Names of weights in the checkpoint that the model has no place for, such as a pooler.
    pub unused: Vec<String>,
}

/// Writes a model that transformers loads; `tokenizer` files are added where given.
///
/// The directory appears under its name only when whole, and replaces an earlier one.
///
/// # Errors
/// When a file cannot be written.
pub fn save_pretrained(
    dir: &Path,
    config: &BertConfig,
    parameters: &Parameters,
    tokenizer: Option<&Tokenizer>,
) -> Result<()> {
    write_dir(dir, |dir| {
        write_model(dir, config, parameters)?;
        tokenizer.map_or(Ok(()), |tokenizer| tokenizer.save(dir))
    })
}

/// Reads a model from a directory, or from the Hugging Face Hub by its id (`owner/name`).
///
/// Accepts names with and without the model's prefix, and LayerNorm's old `gamma` and `beta`.
/// `seed` initialises a language-model head that the checkpoint lacks.
///
/// # Errors
/// When there is no such directory and the Hub cannot be reached, when a file is missing or
/// damaged, or when configuration and weights do not fit each other or are not supported.
pub fn from_pretrained(name: &str, seed: u64, device: &Device) -> Result<Pretrained> {
    let dir = locate(name)?;
    let config = BertConfig::from_file(&dir.join(CONFIG))?;
    let path = dir.join(WEIGHTS);
    let (parameters, initialized, unused) = read_weights(&config, &path, seed, device)
        .with_context(|| format!("cannot load {}", path.display()))?;
    Ok(Pretrained {
        config,
        parameters,
        dir,
        initialized,
        unused,
    })
}

/// The state of a training run: a model directory with two more files, which continues as if it
/// had never stopped.
pub(crate) fn save_training(
    dir: &Path,
    config: &BertConfig,
    parameters: &Parameters,
    tokenizer: &Tokenizer,
    optimizer: &AdamW,
    progress: &Progress,
) -> Result<()> {
    let mut moments = Vec::new();
    for ((name, _), (first, second)) in parameters.vars().iter().zip(optimizer.state()?.moments) {
        moments.push((format!("{name}.exp_avg"), first));
        moments.push((format!("{name}.exp_avg_sq"), second));
    }
    write_dir(dir, |dir| {
        write_model(dir, config, parameters)?;
        tokenizer.save(dir)?;
        write_safetensors(&dir.join(OPTIMIZER), moments)?;
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
    let weights = dir.join(WEIGHTS);
    let (parameters, initialized, _) = read_weights(config, &weights, 0, device)
        .with_context(|| format!("cannot load {}", weights.display()))?;
    ensure!(
        initialized.is_empty(),
        "{} lacks {}: it is not the checkpoint of this run",
        weights.display(),
        initialized.join(", ")
    );
    let path = dir.join(TRAINER);
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let progress = serde_json::from_str(&text)
        .with_context(|| format!("{} is damaged; restore it from a copy", path.display()))?;
    Ok((parameters, progress))
}

/// Gives the optimizer of `parameters` the state in a checkpoint.
pub(crate) fn read_optimizer(
    dir: &Path,
    parameters: &Parameters,
    optimizer: &mut AdamW,
    progress: &Progress,
) -> Result<()> {
    let path = dir.join(OPTIMIZER);
    let mut tensors = read_safetensors(&path, parameters.device())?;
    let mut take = |name: String| {
        let missing = || {
            format!(
                "{} has no {name}: it belongs to another model",
                path.display()
            )
        };
        tensors.remove(&name).with_context(missing)
    };
    let mut moments = Vec::new();
    for (name, _) in parameters.vars() {
        moments.push((
            take(format!("{name}.exp_avg"))?,
            take(format!("{name}.exp_avg_sq"))?,
        ));
    }
    let steps = u32::try_from(progress.step).context("too many steps")?;
    optimizer.load_state(&AdamWState { steps, moments })?;
    Ok(())
}

/// The checkpoint directory `dir`, if there is one; also where a killed process was about to give
/// a new one its name.
pub(crate) fn find_training(dir: &Path) -> Result<bool> {
    let old = old_name(dir);
    if !dir.exists() && old.exists() {
        fs::rename(&old, dir).with_context(|| format!("cannot restore {}", dir.display()))?;
    }
    Ok(dir.exists())
}

/// The name of a directory while its successor takes its place.
fn old_name(dir: &Path) -> PathBuf {
    let mut old = dir.as_os_str().to_owned();
    old.push(".old");
    old.into()
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
        let temporary = temporary.keep();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Temporary folders are private; this one is the user's.
            fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755))?;
        }
        // A directory cannot be renamed onto one that has files.
        let old = old_name(dir);
        if dir.exists() {
            if old.exists() {
                fs::remove_dir_all(&old)?;
            }
            fs::rename(dir, &old)?;
        }
        fs::rename(&temporary, dir)?;
        if old.exists() {
            fs::remove_dir_all(&old)?;
        }
        File::open(parent)?.sync_all()?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", dir.display()))
}

pub(crate) fn write_model(dir: &Path, config: &BertConfig, parameters: &Parameters) -> Result<()> {
    fs::write(dir.join(CONFIG), serde_json::to_vec_pretty(config)?)?;
    let prefix = config.model_type.name();
    let mut tensors: Vec<(String, Tensor)> = parameters
        .state_dict()?
        .into_iter()
        .map(|(name, tensor)| (prefixed(prefix, &name), tensor))
        .collect();
    if config.model_type == ModelType::Roformer {
        tensors.push((prefixed(prefix, ROPE_TABLE), rope_table(config)?));
    }
    write_safetensors(&dir.join(WEIGHTS), tensors)
}

/// Writes tensors with the metadata that transformers asks for.
pub(crate) fn write_safetensors(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Reads all tensors of a file.
pub(crate) fn read_safetensors(path: &Path, device: &Device) -> Result<HashMap<String, Tensor>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    candle_core::safetensors::load_buffer(&bytes, device).with_context(|| {
        format!(
            "{} ({} bytes) is not a whole safetensors file: copy or download it again",
            path.display(),
            bytes.len()
        )
    })
}

fn prefixed(prefix: &str, name: &str) -> String {
    if name.starts_with("cls.") {
        name.to_string()
    } else {
        format!("{prefix}.{name}")
    }
}

fn read_weights(
    config: &BertConfig,
    path: &Path,
    seed: u64,
    device: &Device,
) -> Result<(Parameters, Vec<String>, Vec<String>)> {
    let tensors = read_safetensors(path, device)?;
    let prefix = config.model_type.name();
    let mut unused: BTreeSet<&str> = tensors.keys().map(String::as_str).collect();
    let mut find = |name: &str| {
        let old = name
            .replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta");
        let names = [name, &old].map(|name| [prefixed(prefix, name), name.to_string()]);
        let (name, tensor) = names
            .iter()
            .flatten()
            .find_map(|n| tensors.get_key_value(n))?;
        unused.remove(name.as_str());
        Some(tensor)
    };

    let mut initialized = Vec::new();
    let initial = Parameters::init(config, seed, device)?;
    let parameters = Parameters::build(config, |name, shape, _: Init| {
        let Some(tensor) = find(name) else {
            ensure!(
                name.starts_with("cls."),
                "the file has no weight {}; is it a checkpoint of a {prefix} model?",
                prefixed(prefix, name)
            );
            initialized.push(name.to_string());
            return initial.get(name, false);
        };
        ensure!(
            tensor.dims() == shape,
            "{name} has shape {:?}, but {CONFIG} asks for {shape:?}: they belong to different models",
            tensor.dims()
        );
        Ok(tensor.to_dtype(DType::F32)?)
    })?;

    let word_embeddings = parameters.get("embeddings.word_embeddings.weight", false)?;
    if let Some(decoder) = find("cls.predictions.decoder.weight") {
        ensure!(
            max_difference(&decoder.to_dtype(DType::F32)?, &word_embeddings)? == 0.0,
            "cls.predictions.decoder.weight differs from the token embedding; only tied decoders are supported"
        );
    }
    find("cls.predictions.decoder.bias");
    if let Some(table) = find(ROPE_TABLE) {
        let (rows, width) = table.dims2()?;
        let expected = rope_table(config)?;
        ensure!(
            expected.dims() == [rows, width] && max_difference(table, &expected)? < 1e-4,
            "{ROPE_TABLE} is not the table of rope_theta {}; set rope_theta in {CONFIG} to the base it was made with",
            config.rope_theta.unwrap_or(10_000.0)
        );
    }
    let unused = unused.into_iter().map(str::to_string).collect();
    Ok((parameters, initialized, unused))
}

/// `RoFormerSinusoidalPositionalEmbedding`: `[max_position_embeddings, head_dim]`, the sines of
/// all frequencies, then the cosines.
fn rope_table(config: &BertConfig) -> Result<Tensor> {
    let inv_freq = config.rope()?.inv_freq;
    let mut table = Vec::with_capacity(config.max_position_embeddings * config.head_dim());
    for position in 0..config.max_position_embeddings {
        let angles = inv_freq.iter().map(|&f| position as f64 * f as f64);
        table.extend(angles.clone().map(|angle| angle.sin() as f32));
        table.extend(angles.map(|angle| angle.cos() as f32));
    }
    let shape = (config.max_position_embeddings, config.head_dim());
    Ok(Tensor::from_vec(table, shape, &Device::Cpu)?)
}

/// Infinity where the shapes differ, NaN where a value is.
fn max_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    if a.dims() != b.dims() {
        return Ok(f32::INFINITY);
    }
    let a = a.to_dtype(DType::F32)?;
    Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()?)
}

/// The local directory of a model, downloaded where `name` is a Hub id.
fn locate(name: &str) -> Result<PathBuf> {
    let dir = PathBuf::from(name);
    if dir.is_dir() {
        for file in [CONFIG, WEIGHTS] {
            ensure!(
                dir.join(file).is_file(),
                "{name} has no {file}; expected a model directory with {CONFIG} and {WEIGHTS}{}",
                if dir.join("pytorch_model.bin").is_file() {
                    ": convert pytorch_model.bin with transformers' save_pretrained"
                } else {
                    ""
                }
            );
        }
        return Ok(dir);
    }
    let parts: Vec<&str> = name.split('/').collect();
    let is_hub_id = matches!(parts[..], [owner, model]
        if ![".", "..", "~", ""].contains(&owner) && !model.is_empty());
    if !is_hub_id {
        bail!("found no directory {name}; expected a model directory or a Hub id owner/name");
    }
    download(name).with_context(|| {
        format!(
            "found no directory {name} and cannot get {name} from the Hugging Face Hub; \
             without a network, pass a local model directory"
        )
    })
}

fn download(name: &str) -> Result<PathBuf> {
    let repo = ApiBuilder::from_env().build()?.model(name.to_string());
    let config = repo
        .get(CONFIG)
        .with_context(|| format!("cannot get {CONFIG}"))?;
    repo.get(WEIGHTS)
        .with_context(|| format!("cannot get {WEIGHTS}"))?;
    // One of the two is enough, and which one a repository has is not known before.
    let tokenizer = ["tokenizer.json", "vocab.txt"].map(|file| repo.get(file));
    if let [Err(error), Err(_)] = tokenizer {
        tracing::warn!("{name} has neither tokenizer.json nor vocab.txt: {error}");
    }
    let dir = config
        .parent()
        .ok_or_else(|| anyhow!("{} has no folder", config.display()))?;
    Ok(dir.to_path_buf())
}

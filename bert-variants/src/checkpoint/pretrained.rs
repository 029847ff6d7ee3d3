//! Hugging Face model directories, read and written.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::PositionEncoding;

use super::card::ModelCard;
use super::hub::locate;
use super::weights::{WEIGHTS, WeightFiles, pickle_hint, write_safetensors};
use super::{CONFIG, write_dir};
use crate::config::{BertConfig, ModelType, Position, Task};
use crate::names::Names;
use crate::parameters::{
    Layout, POSITION_EMBEDDINGS, Parameters, WORD_EMBEDDINGS, initial, layout,
};
use crate::tokenizer::Tokenizer;

/// RoFormer's table of angles, which transformers keeps among the weights.
const ROPE_TABLE: &str = ".encoder.embed_positions.weight";
/// Ends of the names of tensors that some versions of transformers save, and that say nothing new.
const IGNORED: [&str; 5] = [
    "position_ids",
    "inv_freq",
    "embed_positions.weight",
    "predictions.decoder.bias",
    "lm_head.decoder.bias",
];
/// The Python code of [`ModelType::Alibi`].
const ALIBI_FILE: &str = "modeling_alibi.py";
const ALIBI_CODE: &str = include_str!("modeling_alibi.py");

/// A model read from disk.
pub struct Pretrained {
    /// Its configuration, for the task that was asked for.
    pub config: BertConfig,
    /// Its weights, f32.
    pub parameters: Parameters,
    /// The directory it came from.
    pub dir: PathBuf,
    /// Names (on disk) of weights that the checkpoint lacks, and that got their initial values:
    /// only of the head, so a model that has some must be trained before it is used.
    pub initialized: Vec<String>,
    /// Names of weights in the checkpoint that the model has no place for, such as another head.
    pub unused: Vec<String>,
}

/// Writes a model that transformers loads, with a model card; `tokenizer` files are added where
/// given.
///
/// The directory appears under its name only when whole, and replaces an earlier one.
///
/// # Errors
/// When a file cannot be written, or transformers has no such model.
pub fn save_pretrained(
    dir: &Path,
    config: &BertConfig,
    parameters: &Parameters,
    tokenizer: Option<&Tokenizer>,
    card: &ModelCard,
) -> Result<()> {
    write_dir(dir, |dir| {
        write_model(dir, config, parameters, card)?;
        tokenizer.map_or(Ok(()), |tokenizer| tokenizer.save(dir))
    })
}

/// Reads a model for a task from a directory, or from the Hugging Face Hub by its id
/// (`owner/name[@revision]`).
///
/// Accepts one file or several, weights of f32, f16, bf16 or f64, names with and without the
/// model's prefix, and LayerNorm's old `gamma` and `beta`. `seed` initialises a head that the
/// checkpoint lacks.
///
/// # Errors
/// When there is no such directory and the Hub cannot be reached, when a file is missing or
/// damaged, or when configuration and weights do not fit each other or are not supported.
pub fn from_pretrained(name: &str, task: Task, seed: u64, device: &Device) -> Result<Pretrained> {
    from_pretrained_as(name, |config| config.with_task(task), seed, device)
}

/// As [`from_pretrained`], of a model whose configuration is changed before its weights are read,
/// for instance by other labels.
///
/// # Errors
/// As [`from_pretrained`].
pub fn from_pretrained_as(
    name: &str,
    change: impl FnOnce(BertConfig) -> BertConfig,
    seed: u64,
    device: &Device,
) -> Result<Pretrained> {
    let dir = locate(name)?;
    let path = dir.join(CONFIG);
    ensure!(
        path.is_file(),
        "{name} has no {CONFIG}; expected a model directory with {CONFIG} and {WEIGHTS}{}",
        pickle_hint(&dir)
    );
    let config = change(BertConfig::from_file(&path)?);
    config.validate()?;
    let loaded = read_weights(&config, &dir, seed, device)
        .with_context(|| format!("cannot load the weights of {}", dir.display()))?;
    Ok(Pretrained {
        config,
        parameters: loaded.parameters,
        dir,
        initialized: loaded.initialized,
        unused: loaded.unused,
    })
}

impl Pretrained {
    /// Refuses a model whose head has never been trained.
    ///
    /// # Errors
    /// Names the weights that the checkpoint lacks.
    pub fn require_head(&self) -> Result<()> {
        ensure!(
            self.initialized.is_empty(),
            "{} has no trained head for this: it lacks {}",
            self.dir.display(),
            self.initialized.join(", ")
        );
        Ok(())
    }

    /// The same model for inputs of up to `max_length` tokens: a shorter table of positions keeps
    /// its first rows, a longer one is interpolated linearly over the old one. Encodings without
    /// a table only note the new length.
    ///
    /// # Errors
    /// When `max_length` is 0 or memory runs out.
    pub fn resize_positions(mut self, max_length: usize) -> Result<Self> {
        ensure!(
            max_length > 0,
            "the longest input must have at least one token, got 0"
        );
        let first = self.config.position_table.unwrap_or(0);
        let mut config = self.config.clone();
        config.max_position_embeddings = first + max_length;
        config.validate()?;
        if config.position_table.is_some() {
            let old = self.parameters.get(POSITION_EMBEDDINGS, false)?;
            let new = resized(&old, first, max_length)?;
            self.parameters = Parameters::build(&config, |layout| match layout.name.as_str() {
                POSITION_EMBEDDINGS => Ok(new.clone()),
                name => self.parameters.get(name, false),
            })?;
        }
        self.config = config;
        Ok(self)
    }
}

/// The rows before `first` as they are, then `length` rows for those from `first` on.
fn resized(table: &Tensor, first: usize, length: usize) -> Result<Tensor> {
    let old_length = table.dim(0)? - first;
    if length <= old_length {
        return Ok(table.narrow(0, 0, first + length)?);
    }
    let rows: Vec<Vec<f32>> = table.to_vec2()?;
    let step = (old_length - 1) as f64 / (length - 1) as f64;
    let mut values: Vec<f32> = rows[..first].concat();
    for position in 0..length {
        let place = position as f64 * step;
        let (low, share) = (place as usize, place.fract() as f32);
        let high = (low + 1).min(old_length - 1);
        let pairs = rows[first + low].iter().zip(&rows[first + high]);
        values.extend(pairs.map(|(low, high)| low + share * (high - low)));
    }
    Ok(Tensor::from_vec(
        values,
        (first + length, table.dim(1)?),
        table.device(),
    )?)
}

/// Writes the files of a model, without those of a tokenizer.
pub(super) fn write_model(
    dir: &Path,
    config: &BertConfig,
    parameters: &Parameters,
    card: &ModelCard,
) -> Result<()> {
    config.validate()?;
    config.model_type.class(config.task, config.is_decoder)?;
    fs::write(dir.join(CONFIG), serde_json::to_vec_pretty(config)?)?;
    fs::write(dir.join("README.md"), card.render(config))?;
    if config.model_type == ModelType::Alibi {
        fs::write(dir.join(ALIBI_FILE), ALIBI_CODE)?;
    }
    write_safetensors(&dir.join(WEIGHTS), state_dict(config, parameters)?)
}

/// The weights under the names that transformers gives them.
fn state_dict(config: &BertConfig, parameters: &Parameters) -> Result<Vec<(String, Tensor)>> {
    let names = Names::new(config);
    let has_head = config.task != Task::Base;
    let mut tensors = Vec::new();
    for (name, _) in parameters.vars() {
        let group = names.group(name)?;
        if group.ours[0] != *name {
            continue;
        }
        let parts = group.ours.iter().map(|name| parameters.get(name, false));
        let joined = match &parts.collect::<Result<Vec<_>>>()?[..] {
            [one] => one.clone(),
            parts => Tensor::cat(parts, 0)?,
        };
        for (theirs, part) in group
            .theirs
            .iter()
            .zip(joined.chunk(group.theirs.len(), 0)?)
        {
            tensors.push((names.on_disk(theirs, has_head), part.contiguous()?));
        }
    }
    match (config.model_type, config.position_table) {
        (ModelType::Roformer, _) => {
            tensors.push((names.on_disk(ROPE_TABLE, has_head), rope_table(config)?));
        }
        // transformers adds a table of positions always, so here it adds nothing.
        (ModelType::Mpnet, None) => {
            let shape = (config.max_position_embeddings, config.hidden_size);
            let zeros = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
            let theirs = names.group(POSITION_EMBEDDINGS)?.theirs.remove(0);
            tensors.push((names.on_disk(&theirs, has_head), zeros));
        }
        _ => {}
    }
    Ok(tensors)
}

/// Weights for a configuration, see [`Pretrained`].
pub(super) struct Loaded {
    pub parameters: Parameters,
    pub initialized: Vec<String>,
    pub unused: Vec<String>,
}

pub(super) fn read_weights(
    config: &BertConfig,
    dir: &Path,
    seed: u64,
    device: &Device,
) -> Result<Loaded> {
    let mut files = WeightFiles::open_dir(dir)?;
    let plan = Plan::new(config, &files)?;
    plan.check_tables(config, &mut files)?;
    let parameters = Parameters::build(config, |layout| match plan.sources.get(&layout.name) {
        Some(source) => source.read(&mut files, device),
        None => initial(layout, config, seed, device),
    })?;
    Ok(Loaded {
        parameters,
        initialized: plan.initialized,
        unused: plan.unused,
    })
}

/// Where a parameter comes from: part `share` of `shares` equal ones of the tensors `on_disk`,
/// laid end to end.
struct Source {
    on_disk: Vec<String>,
    share: usize,
    shares: usize,
}

impl Source {
    fn read(&self, files: &mut WeightFiles, device: &Device) -> Result<Tensor> {
        let parts = self.on_disk.iter().map(|name| files.read(name, device));
        let joined = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
        if self.shares == 1 {
            return Ok(joined);
        }
        let rows = joined.dim(0)? / self.shares;
        Ok(joined.narrow(0, self.share * rows, rows)?.copy()?)
    }

    /// Checks that the tensors together have the rows that all shares need.
    fn check_shapes(&self, layout: &Layout, files: &WeightFiles) -> Result<()> {
        let mut expected = layout.shape.clone();
        expected[0] = expected[0] * self.shares / self.on_disk.len();
        for name in &self.on_disk {
            let shape = files.shape(name).unwrap_or_default();
            ensure!(
                shape == expected,
                "{name} has shape {shape:?}, but {CONFIG} asks for {expected:?}: they belong to different models"
            );
        }
        Ok(())
    }
}

/// Which tensor of the files becomes which parameter. Made before any is read, so that files and
/// configuration that do not fit cost no memory.
struct Plan {
    model_type: ModelType,
    names: Names,
    sources: HashMap<String, Source>,
    initialized: Vec<String>,
    unused: Vec<String>,
}

impl Plan {
    fn new(config: &BertConfig, files: &WeightFiles) -> Result<Self> {
        let mut plan = Self {
            model_type: config.model_type,
            names: Names::new(config),
            sources: HashMap::new(),
            initialized: Vec::new(),
            unused: Vec::new(),
        };
        let mut missing = Vec::new();
        for layout in layout(config) {
            let group = plan.names.group(&layout.name)?;
            let found: Vec<_> = group
                .theirs
                .iter()
                .map(|theirs| plan.find(files, theirs))
                .collect();
            if let Some(on_disk) = found.iter().cloned().collect::<Option<Vec<_>>>() {
                let share = group.ours.iter().position(|name| *name == layout.name);
                let source = Source {
                    on_disk,
                    share: share.unwrap_or(0),
                    shares: group.ours.len(),
                };
                source.check_shapes(&layout, files)?;
                plan.sources.insert(layout.name, source);
            } else {
                let has_head = config.task != Task::Base;
                let absent = group
                    .theirs
                    .iter()
                    .zip(&found)
                    .filter(|(_, found)| found.is_none());
                let absent = absent.map(|(theirs, _)| plan.names.on_disk(theirs, has_head));
                let list = match layout.name.starts_with("head.") {
                    true => &mut plan.initialized,
                    false => &mut missing,
                };
                list.extend(absent);
            }
        }
        ensure!(
            missing.is_empty(),
            "the files lack {}; are they of a {} model of this size?",
            listed(&missing),
            config.model_type.name()
        );
        plan.find_unused(files)?;
        Ok(plan)
    }

    /// The name in the files of a weight of theirs: with the model's prefix or without, and with
    /// LayerNorm's old names.
    fn find(&self, files: &WeightFiles, theirs: &str) -> Option<String> {
        let old = theirs
            .replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta");
        let candidates = [theirs, &old]
            .into_iter()
            .flat_map(|name| [true, false].map(|has_head| self.names.on_disk(name, has_head)));
        candidates
            .into_iter()
            .find(|name| files.shape(name).is_some())
    }

    /// Lists what the model has no place for. Other heads are no concern, but an encoder with
    /// more weights than the configuration has would compute something else.
    fn find_unused(&mut self, files: &WeightFiles) -> Result<()> {
        let used: BTreeSet<&String> = self
            .sources
            .values()
            .flat_map(|source| &source.on_disk)
            .collect();
        let zeros = self.zero_positions(files);
        let unused = files.names().filter(|name| {
            !used.contains(&name.to_string())
                && !IGNORED.iter().any(|end| name.ends_with(end))
                && zeros.as_deref() != Some(*name)
        });
        self.unused = unused.map(str::to_string).collect();
        let strange = self
            .unused
            .iter()
            .filter(|name| self.names.is_of_encoder(name));
        let strange: Vec<String> = strange.cloned().collect();
        ensure!(
            strange.is_empty(),
            "the files have weights that {CONFIG} has no place for: {}",
            listed(&strange)
        );
        Ok(())
    }

    /// Checks tensors that are no parameters, but must have certain values.
    fn check_tables(&self, config: &BertConfig, files: &mut WeightFiles) -> Result<()> {
        let word = self.names.group(WORD_EMBEDDINGS)?.theirs.remove(0);
        if config.task == Task::LanguageModel && config.tie_word_embeddings {
            let decoder = self.names.group("head.output.weight")?.theirs.remove(0);
            if let (Some(decoder), Some(word)) =
                (self.find(files, &decoder), self.find(files, &word))
            {
                let (decoder_values, word) = (
                    files.read(&decoder, &Device::Cpu)?,
                    files.read(&word, &Device::Cpu)?,
                );
                ensure!(
                    max_difference(&decoder_values, &word)? == 0.0,
                    "{decoder} differs from the token embedding, but {CONFIG} says that they are one (tie_word_embeddings true)"
                );
            }
        }
        match config.model_type {
            ModelType::Roformer => self.check_rope_table(config, files),
            ModelType::Mpnet => {
                let Some(name) = self.zero_positions(files) else {
                    return Ok(());
                };
                let table = files.read(&name, &Device::Cpu)?;
                ensure!(
                    max_difference(&table, &table.zeros_like()?)? == 0.0,
                    "{name} is not zero, but {CONFIG} says that there are no absolute positions (absolute_positions false)"
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// MPNet's table of absolute positions in a model that has none.
    fn zero_positions(&self, files: &WeightFiles) -> Option<String> {
        if self.model_type != ModelType::Mpnet || self.sources.contains_key(POSITION_EMBEDDINGS) {
            return None;
        }
        let theirs = self.names.group(POSITION_EMBEDDINGS).ok()?.theirs;
        self.find(files, theirs.first()?)
    }

    fn check_rope_table(&self, config: &BertConfig, files: &mut WeightFiles) -> Result<()> {
        let Some(name) = self.find(files, ROPE_TABLE) else {
            return Ok(());
        };
        let expected = [config.max_position_embeddings, config.head_dim()];
        let shape = files.shape(&name).unwrap_or_default();
        ensure!(
            shape == expected,
            "{name} has shape {shape:?}, but {CONFIG} asks for {expected:?} (max_position_embeddings, head_dim)"
        );
        let table = files.read(&name, &Device::Cpu)?;
        // Frequencies are f32 here and f64 there, which shows at far positions.
        let rounding = config.max_position_embeddings as f32 * f32::EPSILON;
        ensure!(
            max_difference(&table, &rope_table(config)?)? < 1e-4 + rounding,
            "{name} is not the table of rope_theta {}; set rope_theta in {CONFIG} to the base it was made with",
            rope_theta(config)
        );
        Ok(())
    }
}

fn listed(names: &[String]) -> String {
    const MOST: usize = 20;
    let mut text = names
        .iter()
        .take(MOST)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > MOST {
        text += &format!(" and {} more", names.len() - MOST);
    }
    text
}

fn rope_theta(config: &BertConfig) -> f64 {
    match config.position {
        Position::Rope { theta, .. } => theta,
        _ => f64::NAN,
    }
}

/// `RoFormerSinusoidalPositionalEmbedding`: `[max_position_embeddings, head_dim]`, the sines of
/// all frequencies, then the cosines.
fn rope_table(config: &BertConfig) -> Result<Tensor> {
    let PositionEncoding::Rope(rope) = config.attention_spec(0)?.position else {
        bail!("only a model with RoPE has a table of angles");
    };
    let mut table = Vec::with_capacity(config.max_position_embeddings * config.head_dim());
    for position in 0..config.max_position_embeddings {
        let angles = rope.inv_freq.iter().map(|&f| position as f64 * f as f64);
        table.extend(angles.clone().map(|angle| angle.sin() as f32));
        table.extend(angles.map(|angle| angle.cos() as f32));
    }
    let shape = (config.max_position_embeddings, config.head_dim());
    Ok(Tensor::from_vec(table, shape, &Device::Cpu)?)
}

/// Infinity where the shapes differ.
fn max_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    if a.dims() != b.dims() {
        return Ok(f32::INFINITY);
    }
    Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()?)
}

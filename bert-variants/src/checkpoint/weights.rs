//! Weights in safetensors files, one or several, read one tensor at a time.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;

/// Weights in one file.
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// Which file of several holds which weight.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Larger headers are refused by every reader of safetensors.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The tensors of one or several files. Nothing is read before it is asked for, so a file cannot
/// claim memory that it does not fill.
pub(crate) struct WeightFiles {
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

struct WeightFile {
    path: PathBuf,
    file: File,
    /// Where its tensors begin.
    start: u64,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Opens the weights of a model's directory.
    ///
    /// # Errors
    /// When there are none, or a file is damaged or incomplete.
    pub fn open_dir(dir: &Path) -> Result<Self> {
        let (single, index) = (dir.join(WEIGHTS), dir.join(INDEX));
        if single.is_file() {
            Self::open(&single)
        } else if index.is_file() {
            Self::open_sharded(dir, &index)
        } else {
            bail!(
                "{} holds no {WEIGHTS} and no {INDEX}{}",
                dir.display(),
                pickle_hint(dir)
            )
        }
    }

    /// Opens one file.
    ///
    /// # Errors
    /// When it is not a whole safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let mut weights = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        weights.add(path.to_path_buf())?;
        Ok(weights)
    }

    fn open_sharded(dir: &Path, index: &Path) -> Result<Self> {
        let read = || -> Result<Index> { Ok(serde_json::from_slice(&fs::read(index)?)?) };
        let damaged = || format!("{} is not the index of a sharded model", index.display());
        let weight_map = read().with_context(damaged)?.weight_map;
        let mut shards: Vec<&String> = weight_map.values().collect();
        shards.sort();
        shards.dedup();
        let mut weights = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for shard in shards {
            let mut parts = Path::new(shard).components();
            let plain = matches!(
                (parts.next(), parts.next()),
                (Some(Component::Normal(_)), None)
            );
            ensure!(
                plain,
                "{} names the file {shard:?}, which is outside of its folder; expected a plain file name",
                index.display()
            );
            weights.add(dir.join(shard))?;
        }
        for (name, shard) in &weight_map {
            let found = weights
                .tensors
                .get(name)
                .map(|(file, _)| &weights.files[*file].path);
            ensure!(
                found == Some(&dir.join(shard)),
                "{} says that {shard} holds {name}, but it does not: the files are of different models",
                index.display()
            );
        }
        Ok(weights)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let mut file =
            File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let (start, header) = read_header(&mut file).with_context(|| {
            format!(
                "{} is not a whole safetensors file: copy or download it again",
                path.display()
            )
        })?;
        let number = self.files.len();
        for (name, info) in header.tensors() {
            let before = self.tensors.insert(name.clone(), (number, info.clone()));
            ensure!(
                before.is_none(),
                "{} repeats the weight {name} of another file",
                path.display()
            );
        }
        self.files.push(WeightFile { path, file, start });
        Ok(())
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor, `None` where there is none of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors
            .get(name)
            .map(|(_, info)| info.shape.as_slice())
    }

    /// A tensor in f32.
    ///
    /// # Errors
    /// When there is none of that name, when it is not of floats or not all are finite, or when
    /// the file cannot be read.
    pub fn read(&mut self, name: &str, device: &Device) -> Result<Tensor> {
        let (number, info) = self
            .tensors
            .get(name)
            .with_context(|| format!("there is no weight {name}"))?;
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 => DType::F64,
            other => bail!("{name} is of dtype {other:?}, expected F32, F16, BF16 or F64"),
        };
        let (start, end) = info.data_offsets;
        let WeightFile {
            path,
            file,
            start: first,
        } = &mut self.files[*number];
        let mut bytes = vec![0; end - start];
        file.seek(SeekFrom::Start(*first + start as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .with_context(|| format!("cannot read {name} from {}", path.display()))?;
        let tensor = Tensor::from_raw_buffer(&bytes, dtype, &info.shape, &Device::Cpu)?;
        let tensor = tensor.to_dtype(DType::F32)?;
        check_finite(&tensor).with_context(|| format!("{name} in {}", path.display()))?;
        Ok(tensor.to_device(device)?)
    }
}

/// The header of a file and where its tensors begin.
fn read_header(file: &mut File) -> Result<(u64, Metadata)> {
    let bytes = file.metadata()?.len();
    let mut length = [0; 8];
    ensure!(
        bytes >= 8,
        "it has {bytes} bytes, and its header alone is longer"
    );
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    ensure!(
        length <= MAX_HEADER_BYTES.min(bytes - 8),
        "it has {bytes} bytes, but says that its header has {length}"
    );
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header)?;
    let header: Metadata = serde_json::from_slice(&header).context("its header is damaged")?;
    let start = 8 + length;
    let ends = header
        .tensors()
        .into_values()
        .map(|info| info.data_offsets.1 as u64)
        .max();
    let expected = start.checked_add(ends.unwrap_or(0));
    ensure!(
        expected == Some(bytes),
        "it has {bytes} bytes, but its header tells of {}",
        expected.map_or("more than there can be".into(), |expected| expected
            .to_string())
    );
    Ok((start, header))
}

fn check_finite(tensor: &Tensor) -> Result<()> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => bail!("value {at} is {}: the model is broken", values[at]),
        None => Ok(()),
    }
}

/// What to do where the weights are pickled.
pub(crate) fn pickle_hint(dir: &Path) -> &'static str {
    if dir.join("pytorch_model.bin").is_file() || dir.join("pytorch_model.bin.index.json").is_file()
    {
        "; pytorch_model.bin can run code when it is read: convert it with transformers, \
         AutoModel.from_pretrained(DIR).save_pretrained(DIR)"
    } else {
        ""
    }
}

/// Writes tensors with the metadata that transformers asks for.
pub(crate) fn write_safetensors(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .with_context(|| format!("cannot write {}", path.display()))
}

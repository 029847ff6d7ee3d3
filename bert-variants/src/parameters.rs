//! The weights of a model: their names, shapes and initial values.
//!
//! Names are those of transformers' state dict without the model's prefix (`bert.`), with one
//! difference: query, key and value of a layer are one parameter, `attention.self.qkv`, so that
//! they are one matrix product. They are split and joined where checkpoints are written and read.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::config::{BertConfig, ModelType};

/// Name of the position table, which is what the comparison counts apart.
pub const POSITION_EMBEDDINGS: &str = "embeddings.position_embeddings.weight";

const PACKED: &str = "self.qkv.";
const PARTS: [&str; 3] = ["self.query.", "self.key.", "self.value."];

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Init {
    /// Normal with standard deviation `initializer_range`.
    Normal,
    Zeros,
    Ones,
}

/// How many weights a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCounts {
    /// All of them; the tied decoder counts once.
    pub all: u64,
    /// Those of the position table, 0 without one.
    pub positions: u64,
}

impl ParameterCounts {
    /// Of a model with this configuration.
    pub fn of(config: &BertConfig) -> Self {
        let mut counts = Self {
            all: 0,
            positions: 0,
        };
        for (name, shape, _) in layout(config) {
            let count = shape.iter().product::<usize>() as u64;
            counts.all += count;
            if name == POSITION_EMBEDDINGS {
                counts.positions = count;
            }
        }
        counts
    }
}

/// All trainable weights of one model, f32, in a fixed order.
pub struct Parameters {
    vars: Vec<(String, Var)>,
    index: HashMap<String, usize>,
}

impl Parameters {
    /// Initial weights as in transformers' `_init_weights`: normal weights, biases 0, LayerNorm 1.
    ///
    /// Every weight depends on `seed` and its own name alone, so variants start with equal values
    /// in the weights that they share.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn init(config: &BertConfig, seed: u64, device: &Device) -> Result<Self> {
        let normal = Normal::new(0.0, config.initializer_range as f32)
            .context("initializer_range must be finite and not negative")?;
        Self::build(config, |name, shape, init| {
            initial(name, shape, init, &normal, seed, device)
        })
    }

    /// Weights from `source`, which is asked for each by transformers' name and shape.
    pub(crate) fn build(
        config: &BertConfig,
        mut source: impl FnMut(&str, &[usize], Init) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut vars = Vec::new();
        for (name, shape, init) in layout(config) {
            let tensor = if name.contains(PACKED) {
                let mut part_shape = shape.clone();
                part_shape[0] /= PARTS.len();
                let parts = PARTS
                    .iter()
                    .map(|part| source(&name.replace(PACKED, part), &part_shape, init))
                    .collect::<Result<Vec<_>>>()?;
                Tensor::cat(&parts, 0)?
            } else {
                source(&name, &shape, init)?
            };
            ensure!(
                tensor.dims() == shape,
                "{name}: got shape {:?}, the configuration expects {shape:?}",
                tensor.dims()
            );
            vars.push((name, Var::from_tensor(&tensor)?));
        }
        let index = vars
            .iter()
            .enumerate()
            .map(|(i, (name, _))| (name.clone(), i));
        Ok(Self {
            index: index.collect(),
            vars,
        })
    }

    /// Names and variables, in a fixed order.
    pub fn vars(&self) -> &[(String, Var)] {
        &self.vars
    }

    /// The parameter of that name: to train it, or else detached (sharing its memory), so that
    /// what is computed from it keeps no graph.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, name: &str, trainable: bool) -> Result<Tensor> {
        let at = self
            .index
            .get(name)
            .with_context(|| format!("the model has no weight {name}"))?;
        let tensor = self.vars[*at].1.as_tensor();
        Ok(if trainable {
            tensor.clone()
        } else {
            tensor.detach()
        })
    }

    /// Where they are.
    pub fn device(&self) -> &Device {
        self.vars[0].1.device()
    }

    /// The weights under transformers' names (without the model's prefix).
    ///
    /// # Errors
    /// When the device cannot copy them.
    pub(crate) fn state_dict(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::new();
        for (name, var) in &self.vars {
            if name.contains(PACKED) {
                for (part, tensor) in PARTS.iter().zip(var.chunk(PARTS.len(), 0)?) {
                    tensors.push((name.replace(PACKED, part), tensor.detach().contiguous()?));
                }
            } else {
                tensors.push((name.clone(), var.detach()));
            }
        }
        Ok(tensors)
    }
}

fn initial(
    name: &str,
    shape: &[usize],
    init: Init,
    normal: &Normal<f32>,
    seed: u64,
    device: &Device,
) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    let values = match init {
        Init::Zeros => vec![0.0; count],
        Init::Ones => vec![1.0; count],
        Init::Normal => {
            let mut rng = ChaCha8Rng::seed_from_u64(xxh3_64_with_seed(name.as_bytes(), seed));
            (0..count).map(|_| normal.sample(&mut rng)).collect()
        }
    };
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// Every parameter of the model in order: name, shape, initial value.
fn layout(config: &BertConfig) -> Vec<(String, Vec<usize>, Init)> {
    let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
    let mut all = Vec::new();
    let mut table = |name: &str, rows: usize| {
        all.push((
            format!("embeddings.{name}.weight"),
            vec![rows, hidden],
            Init::Normal,
        ));
    };
    table("word_embeddings", config.vocab_size);
    if config.model_type == ModelType::Bert {
        table("position_embeddings", config.max_position_embeddings);
    }
    table("token_type_embeddings", config.type_vocab_size);

    let linear = |all: &mut Vec<_>, name: &str, outputs: usize, inputs: usize| {
        all.push((
            format!("{name}.weight"),
            vec![outputs, inputs],
            Init::Normal,
        ));
        all.push((format!("{name}.bias"), vec![outputs], Init::Zeros));
    };
    let layer_norm = |all: &mut Vec<_>, name: &str| {
        all.push((format!("{name}.weight"), vec![hidden], Init::Ones));
        all.push((format!("{name}.bias"), vec![hidden], Init::Zeros));
    };
    layer_norm(&mut all, "embeddings.LayerNorm");
    for i in 0..config.num_hidden_layers {
        let layer = format!("encoder.layer.{i}");
        linear(
            &mut all,
            &format!("{layer}.attention.self.qkv"),
            3 * hidden,
            hidden,
        );
        linear(
            &mut all,
            &format!("{layer}.attention.output.dense"),
            hidden,
            hidden,
        );
        layer_norm(&mut all, &format!("{layer}.attention.output.LayerNorm"));
        linear(
            &mut all,
            &format!("{layer}.intermediate.dense"),
            mlp,
            hidden,
        );
        linear(&mut all, &format!("{layer}.output.dense"), hidden, mlp);
        layer_norm(&mut all, &format!("{layer}.output.LayerNorm"));
    }
    linear(&mut all, "cls.predictions.transform.dense", hidden, hidden);
    layer_norm(&mut all, "cls.predictions.transform.LayerNorm");
    all.push((
        "cls.predictions.bias".into(),
        vec![config.vocab_size],
        Init::Zeros,
    ));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(model_type: ModelType) -> BertConfig {
        BertConfig::new(model_type, 50, 2, 16, 4, 32)
    }

    fn values(parameters: &Parameters) -> HashMap<String, Vec<f32>> {
        let read = |(name, tensor): (String, Tensor)| {
            (name, tensor.flatten_all().unwrap().to_vec1().unwrap())
        };
        parameters
            .state_dict()
            .unwrap()
            .into_iter()
            .map(read)
            .collect()
    }

    #[test]
    fn variants_share_initial_weights_and_differ_by_the_position_table() {
        let init =
            |model_type, seed| Parameters::init(&config(model_type), seed, &Device::Cpu).unwrap();
        let (bert, roformer) = (init(ModelType::Bert, 1), init(ModelType::Roformer, 1));
        let counts = |model_type| ParameterCounts::of(&config(model_type));
        let (absolute, rope) = (counts(ModelType::Bert), counts(ModelType::Roformer));
        assert_eq!((absolute.positions, rope.positions), (32 * 16, 0));
        assert_eq!(absolute.all, rope.all + 32 * 16);
        let elements = bert
            .vars()
            .iter()
            .map(|(_, var)| var.elem_count() as u64)
            .sum::<u64>();
        assert_eq!(absolute.all, elements);

        let (mut bert, roformer) = (values(&bert), values(&roformer));
        assert!(bert.remove(POSITION_EMBEDDINGS).is_some());
        assert_eq!(bert, roformer);

        let other_seed = values(&init(ModelType::Roformer, 2));
        let word = "embeddings.word_embeddings.weight";
        assert_ne!(roformer[word], other_seed[word]);
        let [query, key] = ["query", "key"]
            .map(|part| &roformer[&format!("encoder.layer.0.attention.self.{part}.weight")]);
        assert_ne!(query, key);
    }

    #[test]
    fn initial_weights_have_the_configured_deviation() {
        let parameters = Parameters::init(&config(ModelType::Bert), 0, &Device::Cpu).unwrap();
        let table = parameters
            .get("encoder.layer.1.attention.self.qkv.weight", false)
            .unwrap();
        let values: Vec<f32> = table.flatten_all().unwrap().to_vec1().unwrap();
        let variance = values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32;
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.1, "{variance}");
    }
}

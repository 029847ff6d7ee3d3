//! The weights of a model: their names, shapes and initial values.
//!
//! Names are the same for every variant, close to those of transformers' BERT. Query, key and value
//! of a layer are one parameter, `attention.self.qkv`, so that they are one matrix product.
//! `names.rs` says what the weights are called on disk.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_rope_attn::ops::Gradients;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::config::{BertConfig, Norm, Position, Task};

/// Name of the position table, which is what the comparison counts apart.
pub const POSITION_EMBEDDINGS: &str = "embeddings.position_embeddings.weight";
/// Name of T5's relative biases `[num_buckets, num_heads]`.
pub(crate) const RELATIVE_BIAS: &str = "encoder.relative_attention_bias.weight";
/// Name of the token embedding.
pub(crate) const WORD_EMBEDDINGS: &str = "embeddings.word_embeddings.weight";

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
        for Layout { name, shape, .. } in layout(config) {
            let count = shape.iter().product::<usize>() as u64;
            counts.all += count;
            if name == POSITION_EMBEDDINGS {
                counts.positions = count;
            }
        }
        counts
    }
}

/// A parameter of a configuration.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    pub name: String,
    pub shape: Vec<usize>,
    pub init: Init,
}

/// All trainable weights of one model, f32, in a fixed order. A clone has the same variables.
#[derive(Clone)]
pub struct Parameters {
    vars: Vec<(String, Var)>,
    index: HashMap<String, usize>,
    frozen: HashSet<String>,
    /// Values in the dtype that models compute in, by name, once one asked for them.
    rounded: Arc<Mutex<HashMap<String, Var>>>,
}

impl Parameters {
    /// Initial weights: normal weights, biases 0, LayerNorm 1, as in BERT's `_init_weights`.
    ///
    /// Every weight depends on `seed` and its own name alone, so variants start with equal values
    /// in the weights that they share.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn init(config: &BertConfig, seed: u64, device: &Device) -> Result<Self> {
        Self::build(config, |layout| initial(layout, config, seed, device))
    }

    /// Weights from `source`, which is asked for each.
    pub(crate) fn build(
        config: &BertConfig,
        mut source: impl FnMut(&Layout) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut vars = Vec::new();
        for layout in layout(config) {
            let tensor = source(&layout)?;
            ensure!(
                tensor.dims() == layout.shape,
                "{}: got shape {:?}, the configuration expects {:?}",
                layout.name,
                tensor.dims(),
                layout.shape
            );
            vars.push((layout.name, Var::from_tensor(&tensor)?));
        }
        let index = vars
            .iter()
            .enumerate()
            .map(|(i, (name, _))| (name.clone(), i));
        Ok(Self {
            index: index.collect(),
            vars,
            frozen: HashSet::new(),
            rounded: Arc::default(),
        })
    }

    /// Names and variables, in a fixed order.
    pub fn vars(&self) -> &[(String, Var)] {
        &self.vars
    }

    /// Names and variables of those that are trained, in the same order.
    pub fn trained(&self) -> impl Iterator<Item = (&str, &Var)> {
        let vars = self.vars.iter().map(|(name, var)| (name.as_str(), var));
        vars.filter(|(name, _)| !self.frozen.contains(*name))
    }

    /// Models made from now on do not train the parameters whose names are chosen.
    pub fn freeze(&mut self, choose: impl Fn(&str) -> bool) {
        let names = self.vars.iter().map(|(name, _)| name);
        self.frozen = names.filter(|name| choose(name)).cloned().collect();
    }

    /// Copies of all values, for [`Parameters::assign`].
    ///
    /// # Errors
    /// When the device has no memory left.
    pub(crate) fn copy(&self) -> Result<Vec<Tensor>> {
        self.vars
            .iter()
            .map(|(_, var)| Ok(var.as_tensor().copy()?.detach()))
            .collect()
    }

    /// Takes over values of [`Parameters::copy`].
    ///
    /// # Errors
    /// When they are of other parameters.
    pub(crate) fn assign(&self, values: &[Tensor]) -> Result<()> {
        for ((name, var), value) in self.vars.iter().zip(values) {
            var.set(value)?;
            if let Some(rounded) = self.rounded(name) {
                rounded.set(&value.to_dtype(rounded.dtype())?)?;
            }
        }
        Ok(())
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
        Ok(if trainable && !self.frozen.contains(name) {
            tensor.clone()
        } else {
            tensor.detach()
        })
    }

    /// As [`Self::get`], in `dtype`: values that are kept rounded, and that have a gradient of
    /// their own, see [`Self::gradients`]. An optimizer made later keeps them up to date.
    ///
    /// # Errors
    /// As [`Self::get`], and when all models do not compute in one dtype.
    pub(crate) fn get_as(&self, name: &str, dtype: DType, trainable: bool) -> Result<Tensor> {
        let tensor = self.get(name, trainable)?;
        if dtype == DType::F32 {
            return Ok(tensor);
        }
        let mut rounded = self.lock_rounded();
        let var = match rounded.entry(name.to_string()) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => {
                place.insert(Var::from_tensor(&tensor.detach().to_dtype(dtype)?)?)
            }
        };
        ensure!(
            var.dtype() == dtype,
            "{name} is in use as {:?}, and cannot be used as {dtype:?} too",
            var.dtype()
        );
        Ok(match tensor.is_variable() {
            true => var.as_tensor().clone(),
            false => var.as_detached_tensor(),
        })
    }

    /// The values that [`Self::get_as`] gave.
    pub(crate) fn rounded(&self, name: &str) -> Option<Var> {
        self.lock_rounded().get(name).cloned()
    }

    fn lock_rounded(&self) -> MutexGuard<'_, HashMap<String, Var>> {
        self.rounded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes out the gradients of the trained parameters, in their order.
    ///
    /// # Errors
    /// Names a parameter without one.
    pub(crate) fn gradients(&self, found: &mut Gradients) -> Result<Vec<Tensor>> {
        let gradients = self.trained().map(|(name, var)| {
            let rounded = self
                .rounded(name)
                .and_then(|rounded| found.remove(&rounded));
            match (found.remove(var), rounded) {
                (Some(a), Some(b)) => Ok((&a + b.to_dtype(a.dtype())?)?),
                (one, other) => one
                    .or(other)
                    .with_context(|| format!("{name} got no gradient")),
            }
        });
        gradients.collect()
    }

    /// Where they are.
    pub fn device(&self) -> &Device {
        self.vars[0].1.device()
    }
}

/// The initial value of a parameter.
pub(crate) fn initial(
    layout: &Layout,
    config: &BertConfig,
    seed: u64,
    device: &Device,
) -> Result<Tensor> {
    let shape = layout.shape.as_slice();
    let count: usize = shape.iter().product();
    let values = match layout.init {
        Init::Zeros => vec![0.0; count],
        Init::Ones => vec![1.0; count],
        Init::Normal => {
            let normal = Normal::new(0.0, config.initializer_range as f32)
                .context("initializer_range must be finite and not negative")?;
            let name = layout.name.as_bytes();
            let mut rng = ChaCha8Rng::seed_from_u64(xxh3_64_with_seed(name, seed));
            (0..count).map(|_| normal.sample(&mut rng)).collect()
        }
    };
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// Every parameter of the model in order.
pub(crate) fn layout(config: &BertConfig) -> Vec<Layout> {
    let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
    let mut all = LayoutBuilder::default();
    all.table(WORD_EMBEDDINGS, config.vocab_size, hidden);
    if config.position_table.is_some() {
        all.table(POSITION_EMBEDDINGS, config.max_position_embeddings, hidden);
    }
    if config.type_vocab_size > 0 {
        all.table(
            "embeddings.token_type_embeddings.weight",
            config.type_vocab_size,
            hidden,
        );
    }
    let norm_bias = config.bias.norm;
    all.norm("embeddings.LayerNorm", hidden, norm_bias);
    if let Position::RelativeBias { num_buckets, .. } = config.position {
        all.table(RELATIVE_BIAS, num_buckets, config.num_attention_heads);
    }
    for i in 0..config.num_hidden_layers {
        let layer = format!("encoder.layer.{i}");
        let bias = config.bias;
        all.linear(
            &format!("{layer}.attention.self.qkv"),
            3 * hidden,
            hidden,
            bias.attention,
        );
        all.linear(
            &format!("{layer}.attention.output.dense"),
            hidden,
            hidden,
            bias.attention,
        );
        if config.norm == Norm::Post || i > 0 {
            all.norm(
                &format!("{layer}.attention.output.LayerNorm"),
                hidden,
                norm_bias,
            );
        }
        all.linear(
            &format!("{layer}.intermediate.dense"),
            mlp,
            hidden,
            bias.mlp,
        );
        if config.gated_mlp {
            all.linear(&format!("{layer}.up.dense"), mlp, hidden, bias.mlp);
        }
        all.linear(&format!("{layer}.output.dense"), hidden, mlp, bias.mlp);
        all.norm(&format!("{layer}.output.LayerNorm"), hidden, norm_bias);
    }
    if config.norm == Norm::Pre {
        all.norm("encoder.LayerNorm", hidden, norm_bias);
    }
    head_layout(&mut all, config);
    all.0
}

fn head_layout(all: &mut LayoutBuilder, config: &BertConfig) {
    let (hidden, outputs) = (config.hidden_size, config.head_outputs());
    if let Some(transform) = config.transform() {
        all.linear("head.dense", hidden, hidden, config.bias.head);
        if transform.norm {
            all.norm("head.LayerNorm", hidden, config.bias.norm);
        }
    }
    let language_model = config.task == Task::LanguageModel;
    if outputs > 0 && !(language_model && config.tie_word_embeddings) {
        all.table("head.output.weight", outputs, hidden);
    }
    if outputs > 0 && (!language_model || config.bias.decoder) {
        all.push("head.output.bias".into(), vec![outputs], Init::Zeros);
    }
}

#[derive(Default)]
struct LayoutBuilder(Vec<Layout>);

impl LayoutBuilder {
    fn push(&mut self, name: String, shape: Vec<usize>, init: Init) {
        self.0.push(Layout { name, shape, init });
    }

    fn table(&mut self, name: &str, rows: usize, width: usize) {
        self.push(name.into(), vec![rows, width], Init::Normal);
    }

    fn linear(&mut self, name: &str, outputs: usize, inputs: usize, bias: bool) {
        self.table(&format!("{name}.weight"), outputs, inputs);
        if bias {
            self.push(format!("{name}.bias"), vec![outputs], Init::Zeros);
        }
    }

    fn norm(&mut self, name: &str, width: usize, bias: bool) {
        self.push(format!("{name}.weight"), vec![width], Init::Ones);
        if bias {
            self.push(format!("{name}.bias"), vec![width], Init::Zeros);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelType;

    fn config(model_type: ModelType) -> BertConfig {
        BertConfig::new(model_type, 50, 2, 16, 4, 32)
    }

    fn init(model_type: ModelType, seed: u64) -> Parameters {
        Parameters::init(&config(model_type), seed, &Device::Cpu).unwrap()
    }

    fn values(parameters: &Parameters) -> HashMap<String, Vec<f32>> {
        let read = |(name, var): &(String, Var)| {
            (name.clone(), var.flatten_all().unwrap().to_vec1().unwrap())
        };
        parameters.vars().iter().map(read).collect()
    }

    #[test]
    fn variants_share_initial_weights_and_differ_by_their_positions() {
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

        let mut bert = values(&bert);
        assert!(bert.remove(POSITION_EMBEDDINGS).is_some());
        assert_eq!(bert, values(&roformer));
        assert_eq!(bert, values(&init(ModelType::Alibi, 1)));
        let mut t5 = values(&init(ModelType::Mpnet, 1));
        assert_eq!(t5.remove(RELATIVE_BIAS).unwrap().len(), 32 * 4);
        assert!(
            bert.remove("embeddings.token_type_embeddings.weight")
                .is_some()
        );
        assert_eq!(bert, t5);
        let modern = values(&init(ModelType::Modernbert, 1));
        let qkv = "encoder.layer.1.attention.self.qkv.weight";
        assert_eq!(bert[qkv], modern[qkv]);

        let other_seed = values(&init(ModelType::Roformer, 2));
        assert_ne!(bert[WORD_EMBEDDINGS], other_seed[WORD_EMBEDDINGS]);
        assert_ne!(bert[qkv][..256], bert[qkv][256..512]);
    }

    #[test]
    fn initial_weights_have_the_configured_deviation() {
        let parameters = init(ModelType::Bert, 0);
        let table = parameters
            .get("encoder.layer.1.attention.self.qkv.weight", false)
            .unwrap();
        let values: Vec<f32> = table.flatten_all().unwrap().to_vec1().unwrap();
        let variance = values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32;
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.1, "{variance}");
    }
}

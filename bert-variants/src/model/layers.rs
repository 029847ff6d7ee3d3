//! The layers that encoder and heads are made of.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_rope_attn::{AttentionSpec, Dropout, Sequences, attention_projected, ops};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::config::{Activation, BertConfig};
use crate::parameters::Parameters;

/// Where a model takes its weights from.
pub(super) struct Weights<'a> {
    pub parameters: &'a Parameters,
    pub trainable: bool,
    /// What the model computes in.
    pub dtype: DType,
    pub config: &'a BertConfig,
}

impl Weights<'_> {
    pub fn get(&self, name: &str) -> Result<Tensor> {
        self.parameters.get(name, self.trainable)
    }

    fn rounded(&self, name: &str) -> Result<Tensor> {
        self.parameters.get_as(name, self.dtype, self.trainable)
    }

    /// Of a layer that shares its weight. To train it, there is one gradient, of the f32 values; models that
    /// do not are spared rounding a large table at every pass.
    pub fn tied(&self, name: &str) -> Result<Tensor> {
        // Asked for in either case: an optimizer keeps up to date what the model that it trains asked for.
        let rounded = self.rounded(name)?;
        match self.trainable {
            true => self.get(name),
            false => Ok(rounded),
        }
    }

    pub fn linear(&self, name: &str, bias: bool) -> Result<Linear> {
        let get = |part| self.rounded(&format!("{name}.{part}"));
        Ok(Linear {
            weight: get("weight")?,
            bias: bias.then(|| get("bias")).transpose()?,
        })
    }

    pub fn layer_norm(&self, name: &str) -> Result<LayerNorm> {
        let weight = self.get(&format!("{name}.weight"))?;
        Ok(LayerNorm {
            bias: match self.config.bias.norm {
                true => self.get(&format!("{name}.bias"))?,
                false => weight.zeros_like()?,
            },
            weight,
            eps: self.config.layer_norm_eps,
        })
    }
}

pub(super) struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = self.cast(x.dtype())?;
        Ok(ops::linear(x, &weight, bias.as_ref())?)
    }

    /// Mean cross-entropy of `forward(x)`, which in training never exists as a whole.
    pub fn cross_entropy(&self, x: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let (weight, bias) = self.cast(x.dtype())?;
        Ok(ops::linear_cross_entropy(
            x,
            &weight,
            bias.as_ref(),
            labels,
        )?)
    }

    /// `residual + dropout(forward(x))`.
    pub fn forward_add(
        &self,
        x: &Tensor,
        residual: &Tensor,
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        Ok(match dropout {
            Some(Dropout { p, seed }) => ops::dropout_add(&self.forward(x)?, p, seed, residual)?,
            None => {
                let (weight, bias) = self.cast(x.dtype())?;
                ops::linear_add(x, &weight, bias.as_ref(), residual)?
            }
        })
    }

    /// Attention of the q, k and v that this layer makes of x.
    pub fn attention(
        &self,
        x: &Tensor,
        spec: &AttentionSpec,
        sequences: &Sequences,
    ) -> Result<Tensor> {
        let (weight, bias) = self.cast(x.dtype())?;
        let bias = bias.as_ref();
        Ok(attention_projected(x, &weight, bias, spec, sequences)?)
    }

    /// `residual + output.forward(gelu(forward(x)))`.
    pub fn mlp_add(&self, x: &Tensor, output: &Self, residual: &Tensor) -> Result<Tensor> {
        let (weight, bias) = self.cast(x.dtype())?;
        let (out_weight, out_bias) = output.cast(x.dtype())?;
        let (inner, outer) = ((&weight, bias.as_ref()), (&out_weight, out_bias.as_ref()));
        Ok(ops::mlp_add(x, inner, outer, residual)?)
    }

    fn cast(&self, dtype: DType) -> Result<(Tensor, Option<Tensor>)> {
        let bias = self.bias.as_ref().map(|bias| ops::cast(bias, dtype));
        Ok((ops::cast(&self.weight, dtype)?, bias.transpose()?))
    }
}

pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_as(x, x.dtype())
    }

    /// The result in a dtype; x is in that or f32.
    pub fn forward_as(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let (weight, bias) = (&self.weight, &self.bias);
        Ok(ops::layer_norm_as(x, weight, bias, self.eps, dtype)?)
    }
}

impl Activation {
    pub(super) fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Gelu => ops::gelu(x)?,
            Self::GeluTanh => x.gelu()?,
            Self::Relu => x.relu()?,
            Self::Silu => x.silu()?,
            Self::Tanh => x.tanh()?,
        })
    }
}

/// The dropout of one pass, if it has any; every place in the model has a seed of its own.
#[derive(Clone, Copy)]
pub(super) struct PassDropout {
    pub seed: Option<u64>,
}

impl PassDropout {
    pub fn forward(self, x: Tensor, p: f64, place: &str, layer: usize) -> Result<Tensor> {
        match self.at(p, place, layer) {
            Some(dropout) => Ok(ops::dropout(&x, dropout.p, dropout.seed)?),
            None => Ok(x),
        }
    }

    /// Probability and seed of a place, `None` where nothing is dropped.
    pub fn at(self, p: f64, place: &str, layer: usize) -> Option<Dropout> {
        let seed = self.seed.filter(|_| p > 0.0)?;
        Some(Dropout {
            p: p as f32,
            seed: xxh3_64_with_seed(place.as_bytes(), seed).wrapping_add(layer as u64),
        })
    }
}

/// `x` in f32, for losses.
pub(super) fn f32(x: &Tensor) -> Result<Tensor> {
    Ok(ops::cast(x, DType::F32)?)
}

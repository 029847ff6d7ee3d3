//! AdamW with a learning rate for each layer.

use anyhow::Result;
use candle_core::{Tensor, Var};
use candle_rope_attn::ops::{AdamW, AdamWState, Parameter};

use super::FinetuneTraining;
use crate::config::BertConfig;
use crate::parameters::Parameters;
use crate::train::decays;

/// The layer of a weight: 0 for embeddings, then 1 for the first layer, and one more than there are
/// layers for the head.
pub(super) fn depth(name: &str, config: &BertConfig) -> usize {
    let layer = name
        .strip_prefix("encoder.layer.")
        .and_then(|rest| rest.split('.').next());
    match layer.and_then(|layer| layer.parse::<usize>().ok()) {
        Some(layer) => layer + 1,
        None if name.starts_with("head.") => config.num_hidden_layers + 1,
        // The last LayerNorm of models that normalise first.
        None if name.starts_with("encoder.LayerNorm") => config.num_hidden_layers,
        None => 0,
    }
}

/// AdamW with a learning rate for each depth.
pub(super) struct LayerwiseAdamW {
    /// Factor on the learning rate, and which gradients are meant.
    groups: Vec<(f64, Vec<usize>, AdamW)>,
}

impl LayerwiseAdamW {
    pub fn new(
        parameters: &Parameters,
        config: &BertConfig,
        settings: &FinetuneTraining,
    ) -> Result<Self> {
        let top = config.num_hidden_layers + 1;
        let scale = |depth: usize| settings.layer_decay.powi((top - depth) as i32);
        let mut groups: Vec<(f64, Vec<usize>, Vec<Parameter>)> = Vec::new();
        for (i, (name, var)) in parameters.trained().enumerate() {
            let scale = scale(depth(name, config));
            let parameter = Parameter {
                var: Var::clone(var),
                weight_decay: if decays(name) {
                    settings.weight_decay
                } else {
                    0.0
                },
                rounded: parameters.rounded(name),
            };
            match groups.iter_mut().find(|group| group.0 == scale) {
                Some((_, indices, parameters)) => {
                    indices.push(i);
                    parameters.push(parameter);
                }
                None => groups.push((scale, vec![i], vec![parameter])),
            }
        }
        let groups = groups.into_iter().map(|(scale, indices, parameters)| {
            Ok((scale, indices, AdamW::new(parameters, (0.9, 0.999), 1e-8)?))
        });
        Ok(Self {
            groups: groups.collect::<Result<_>>()?,
        })
    }

    /// One update by the gradients of the trained parameters in their order.
    pub fn step(
        &mut self,
        gradients: &[Tensor],
        lr: f64,
        norm: &Tensor,
        max_norm: f64,
    ) -> Result<()> {
        for (scale, indices, optimizer) in &mut self.groups {
            let own: Vec<Tensor> = indices.iter().map(|&i| gradients[i].clone()).collect();
            optimizer.step(&own, lr * *scale, norm, Some(max_norm))?;
        }
        Ok(())
    }

    /// Updates made so far, and first and second moment of every trained parameter in their order.
    pub fn state(&self) -> Result<AdamWState> {
        let count = self
            .groups
            .iter()
            .map(|(_, indices, _)| indices.len())
            .sum();
        let mut steps = 0;
        let mut moments = vec![None; count];
        for (_, indices, optimizer) in &self.groups {
            let state = optimizer.state()?;
            steps = state.steps;
            for (&i, found) in indices.iter().zip(state.moments) {
                moments[i] = Some(found);
            }
        }
        Ok(AdamWState {
            steps,
            moments: moments.into_iter().flatten().collect(),
        })
    }

    /// Takes over a copy of a saved state.
    pub fn load_state(&mut self, state: &AdamWState) -> Result<()> {
        for (_, indices, optimizer) in &mut self.groups {
            optimizer.load_state(&AdamWState {
                steps: state.steps,
                moments: indices.iter().map(|&i| state.moments[i].clone()).collect(),
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ModelType, Task};

    #[test]
    fn depths_go_from_the_embeddings_to_the_head() {
        let config = BertConfig::new(ModelType::Modernbert, 50, 12, 16, 4, 32)
            .with_task(Task::SequenceClassification);
        for (name, expected) in [
            ("embeddings.word_embeddings.weight", 0),
            ("encoder.layer.0.output.dense.bias", 1),
            ("encoder.layer.11.output.dense.bias", 12),
            ("encoder.LayerNorm.weight", 12),
            ("encoder.relative_attention_bias.weight", 0),
            ("head.dense.weight", 13),
        ] {
            assert_eq!(depth(name, &config), expected, "{name}");
        }
    }
}

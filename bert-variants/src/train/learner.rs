//! One step of training.

use anyhow::Result;
use candle_core::Tensor;
use candle_rope_attn::ops::{AdamW, Gradients, Tape, global_norm};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::TrainConfig;
use crate::config::BertConfig;
use crate::data::Batch;
use crate::model::LanguageModel;
use crate::parameters::Parameters;

/// A model with its optimizer.
pub struct Learner {
    pub(crate) parameters: Parameters,
    pub(crate) optimizer: AdamW,
    model: LanguageModel,
    max_grad_norm: f64,
    seed: u64,
}

/// What a step computed, on the device.
pub struct Update {
    /// Mean loss over all labels, a scalar.
    pub loss: Tensor,
    /// Norm of all gradients before they were clipped, a scalar.
    pub grad_norm: Tensor,
    /// Gradients of the trained parameters in their order, not clipped.
    pub gradients: Vec<Tensor>,
}

impl Learner {
    /// Trains `parameters`; `seed` is that of dropout.
    ///
    /// # Errors
    /// When the parameters do not belong to `model_config`, or memory runs out.
    pub fn new(
        config: &TrainConfig,
        model_config: &BertConfig,
        parameters: Parameters,
        seed: u64,
    ) -> Result<Self> {
        let model = LanguageModel::new(model_config, &parameters, true, config.dtype.dtype())?
            .with_checkpointing(config.gradient_checkpointing);
        Ok(Self {
            model,
            // After the model, which says which weights are rounded.
            optimizer: config.optimizer(&parameters)?,
            parameters,
            max_grad_norm: config.max_grad_norm,
            seed,
        })
    }

    /// Step number `step`: one update by the gradients of all batches, clipped. Does not wait for a
    /// GPU. An update that is not finite is not applied.
    ///
    /// # Errors
    /// When memory runs out, or a batch does not fit the model.
    pub fn step(&mut self, batches: &[Batch], step: u64, lr: f64) -> Result<Update> {
        let (loss, gradients) = self
            .gradients(batches, step)
            .map_err(explain_out_of_memory)?;
        let grad_norm = global_norm(&gradients)?;
        self.optimizer
            .step(&gradients, lr, &grad_norm, Some(self.max_grad_norm))?;
        Ok(Update {
            loss,
            grad_norm,
            gradients,
        })
    }

    /// Mean loss over all labels of the batches, and its gradient for every parameter.
    fn gradients(&self, batches: &[Batch], step: u64) -> Result<(Tensor, Vec<Tensor>)> {
        let labels: usize = batches.iter().map(|batch| batch.labels.len()).sum();
        let mut gradients = Gradients::default();
        let mut losses = Vec::with_capacity(batches.len());
        for (pass, batch) in (0u64..).zip(batches) {
            let place = [step.to_le_bytes(), pass.to_le_bytes()].concat();
            let dropout_seed = xxh3_64_with_seed(&place, self.seed);
            let share = batch.labels.len() as f64 / labels as f64;
            let (loss, tape) = Tape::record(|| self.model.loss(batch, Some(dropout_seed)))?;
            tape.backward(&loss, share, &mut gradients)?;
            losses.push((loss.detach() * share)?);
        }
        let gradients = self.parameters.gradients(&mut gradients)?;
        Ok((Tensor::stack(&losses, 0)?.sum(0)?, gradients))
    }
}

pub(crate) fn explain_out_of_memory(error: anyhow::Error) -> anyhow::Error {
    match error.downcast() {
        Ok(error) => candle_rope_attn::explain_out_of_memory(error).into(),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::config::ModelType;
    use crate::train::Precision;

    #[test]
    fn a_model_made_after_steps_sees_them() -> Result<()> {
        let (config, device) = (
            BertConfig::new(ModelType::Bert, 40, 2, 16, 2, 32),
            Device::Cpu,
        );
        let training = TrainConfig {
            dtype: Precision::Bf16,
            ..TrainConfig::default()
        };
        let parameters = Parameters::init(&config, 1, &device)?;
        let mut learner = Learner::new(&training, &config, parameters, 1)?;
        let batch = Batch {
            input_ids: (0..20).collect(),
            cu_seqlens: vec![0, 20],
            label_positions: vec![3, 7],
            labels: vec![30, 31],
        };
        let scores = |parameters: &Parameters| -> Result<Vec<Vec<f32>>> {
            let model = LanguageModel::new(&config, parameters, false, DType::BF16)?;
            let logits = model.logits(&(&batch).into(), &batch.label_positions, None)?;
            Ok(logits.to_dtype(DType::F32)?.to_vec2()?)
        };
        let before = scores(&learner.parameters)?;
        for step in 0..2 {
            learner.step(std::slice::from_ref(&batch), step, 0.1)?;
        }
        let fresh = Parameters::init(&config, 2, &device)?;
        fresh.assign(&learner.parameters.copy()?)?;
        let after = scores(&learner.parameters)?;
        assert_eq!(after, scores(&fresh)?);
        assert_ne!(after, before);
        Ok(())
    }
}

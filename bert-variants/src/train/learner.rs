//! One step of training.

use std::sync::Arc;

use anyhow::Result;
use candle_core::Tensor;
use candle_rope_attn::ops::{AdamW, Gradients, Profile, Tape, global_norm};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::TrainConfig;
use super::graphs::StepGraphs;
use crate::config::BertConfig;
use crate::data::Batch;
use crate::model::{LabelledInputs, LanguageModel, MAX_GRAPH_TOKENS};
use crate::parameters::Parameters;

/// A model with its optimizer.
pub struct Learner {
    pub(crate) core: Core,
    /// Of steps, unless they have dropout, of which every step has another seed.
    graphs: Option<StepGraphs>,
    seed: u64,
}

/// What a step computes with. A clone has the same tensors.
#[derive(Clone)]
pub(crate) struct Core {
    pub parameters: Parameters,
    pub optimizer: AdamW,
    pub model: Arc<LanguageModel>,
    max_grad_norm: f64,
}

/// A batch of a step.
pub(super) struct Pass {
    pub inputs: LabelledInputs,
    pub dropout_seed: Option<u64>,
    pub share: Share,
}

/// Of its mean loss in that of the step.
pub(super) enum Share {
    Number(f64),
    /// An f32 scalar.
    OnDevice(Tensor),
}

/// What a step computed, on the device.
pub struct Update {
    /// Mean loss over all labels, a scalar.
    pub loss: Tensor,
    /// Norm of all gradients before they were clipped, a scalar.
    pub grad_norm: Tensor,
    /// Gradients of the trained parameters in their order, not clipped; none of a step that may be
    /// launched as a CUDA graph.
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
        let on_gpu = parameters.device().is_cuda();
        let graphs = config.cuda_graphs && on_gpu && !model_config.dropout.any();
        Ok(Self {
            core: Core {
                model: Arc::new(model),
                // After the model, which says which weights are rounded.
                optimizer: config.optimizer(&parameters)?,
                parameters,
                max_grad_norm: config.max_grad_norm,
            },
            graphs: graphs.then(StepGraphs::default),
            seed,
        })
    }

    /// Step number `step`: one update by the gradients of all batches, clipped. Does not wait for a
    /// GPU. An update that is not finite is not applied.
    ///
    /// # Errors
    /// When memory runs out, or a batch does not fit the model.
    pub fn step(&mut self, batches: &[Batch], step: u64, lr: f64) -> Result<Update> {
        self.core.optimizer.set_lr(lr)?;
        let tokens: usize = batches.iter().map(|batch| batch.input_ids.len()).sum();
        let update = match &mut self.graphs {
            Some(graphs) if tokens <= MAX_GRAPH_TOKENS && !Profile::is_running() => {
                graphs.step(&self.core, batches)
            }
            _ => self
                .passes(batches, step)
                .and_then(|passes| self.core.step(&passes)),
        };
        update.map_err(explain_out_of_memory)
    }

    /// Kinds of steps, by their lengths, that are launched as a CUDA graph.
    pub fn num_graphs(&self) -> usize {
        self.graphs.as_ref().map_or(0, StepGraphs::len)
    }

    fn passes(&self, batches: &[Batch], step: u64) -> Result<Vec<Pass>> {
        let labels: usize = batches.iter().map(|batch| batch.labels.len()).sum();
        let passes = (0u64..).zip(batches).map(|(pass, batch)| {
            let place = [step.to_le_bytes(), pass.to_le_bytes()].concat();
            Ok(Pass {
                inputs: self.core.model.upload(batch, batch.labels.len())?,
                dropout_seed: Some(xxh3_64_with_seed(&place, self.seed)),
                share: Share::Number(batch.labels.len() as f64 / labels as f64),
            })
        });
        passes.collect()
    }
}

impl Core {
    /// One update by the gradients of all passes, at the optimizer's learning rate.
    pub(super) fn step(&self, passes: &[Pass]) -> Result<Update> {
        let mut gradients = Gradients::default();
        let mut losses = Vec::with_capacity(passes.len());
        for pass in passes {
            let loss = || self.model.loss_of(&pass.inputs, pass.dropout_seed);
            let (loss, tape) = Tape::record(loss)?;
            losses.push(match &pass.share {
                Share::Number(share) => {
                    tape.backward(&loss, *share, &mut gradients)?;
                    (loss.detach() * *share)?
                }
                Share::OnDevice(share) => {
                    tape.backward_from(&loss, share, &mut gradients)?;
                    (loss.detach() * share)?
                }
            });
        }
        let gradients = self.parameters.gradients(&mut gradients)?;
        let grad_norm = global_norm(&gradients)?;
        self.optimizer
            .update(&gradients, &grad_norm, Some(self.max_grad_norm))?;
        Ok(Update {
            loss: Tensor::stack(&losses, 0)?.sum(0)?,
            grad_norm,
            gradients,
        })
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
    fn ignored_labels_change_nothing_but_the_mean() -> Result<()> {
        let config = BertConfig::new(ModelType::Roformer, 40, 2, 16, 2, 32);
        let parameters = Parameters::init(&config, 1, &Device::Cpu)?;
        let model = LanguageModel::new(&config, &parameters, true, DType::F32)?;
        let mut batch = Batch {
            input_ids: (0..20).collect(),
            cu_seqlens: vec![0, 20],
            label_positions: vec![3, 0, 7],
            labels: vec![30, 31, 5],
        };
        let gradients = |count: usize, share: f64| -> Result<Vec<Vec<f32>>> {
            let inputs = model.upload(&batch, count)?;
            let (loss, tape) = Tape::record(|| model.loss_of(&inputs, None))?;
            let mut found = Gradients::default();
            tape.backward(&loss, share, &mut found)?;
            let mut values = vec![(loss * share)?.reshape(1)?];
            values.extend(parameters.gradients(&mut found)?);
            let values = values.iter().map(|x| Ok(x.flatten_all()?.to_vec1()?));
            values.collect()
        };
        let (expected, got) = (gradients(3, 1.0)?, gradients(64, 64.0 / 3.0)?);
        for (expected, got) in expected.iter().flatten().zip(got.iter().flatten()) {
            assert!((expected - got).abs() < 1e-5, "{expected} {got}");
        }
        batch.labels.pop();
        let error = model.upload(&batch, 2).err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.contains("2 labels for 3 positions")));
        Ok(())
    }

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
        let before = scores(&learner.core.parameters)?;
        for step in 0..2 {
            learner.step(std::slice::from_ref(&batch), step, 0.1)?;
        }
        let fresh = Parameters::init(&config, 2, &device)?;
        fresh.assign(&learner.core.parameters.copy()?)?;
        let after = scores(&learner.core.parameters)?;
        assert_eq!(after, scores(&fresh)?);
        assert_ne!(after, before);
        Ok(())
    }
}

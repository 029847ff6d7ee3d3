//! CUDA graphs of training steps.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_rope_attn::Graph;
use candle_rope_attn::ops::{overwrite, upload};

use super::learner::{Core, Pass, Share, Update};
use crate::data::Batch;
use crate::model::{Kind, LabelledInputs, find};

/// Labels are filled up to a multiple, as their number is another in each batch.
const LABELS: usize = 64;

/// Graphs of the steps whose shapes were used last.
#[derive(Default)]
pub(super) struct StepGraphs {
    list: Vec<Kind<Shapes, (Graph, Inputs)>>,
    /// Once a graph failed.
    off: bool,
}

/// What the graph of a step cannot change.
#[derive(PartialEq)]
struct Shapes {
    /// Of each batch.
    cu_seqlens: Vec<Vec<usize>>,
    /// Labels of each batch with ignored ones: the same, as numbers that differ would make many kinds.
    labels: usize,
}

impl Shapes {
    fn of(batches: &[Batch]) -> Self {
        let labels = batches.iter().map(|batch| batch.labels.len()).max();
        Self {
            cu_seqlens: batches
                .iter()
                .map(|batch| batch.cu_seqlens.clone())
                .collect(),
            labels: labels.unwrap_or(0).next_multiple_of(LABELS),
        }
    }
}

/// The batches of a step on the device.
#[derive(Clone)]
struct Inputs {
    batches: Vec<LabelledInputs>,
    /// Labels of all batches, ignored ones left out: a u32 scalar.
    labels: Tensor,
}

impl Inputs {
    fn upload(core: &Core, batches: &[Batch], shapes: &Shapes) -> Result<Self> {
        let on_device = batches
            .iter()
            .map(|batch| core.model.upload(batch, shapes.labels))
            .collect::<Result<_>>()?;
        let labels = upload(&[count_labels(batches)], core.parameters.device())?;
        Ok(Self {
            batches: on_device,
            labels: labels.reshape(())?,
        })
    }

    fn overwrite(&self, core: &Core, batches: &[Batch]) -> Result<()> {
        for (inputs, batch) in self.batches.iter().zip(batches) {
            core.model.overwrite(inputs, batch)?;
        }
        Ok(overwrite(&self.labels, &[count_labels(batches)])?)
    }

    /// Loss and norm of the gradients `[2]` of a step.
    fn step(&self, core: &Core) -> Result<Tensor> {
        let per_label = self.labels.to_dtype(DType::F32)?.recip()?;
        let passes = self.batches.iter().map(|inputs| {
            // The mean of a batch is over ignored labels too.
            let share = (&per_label * inputs.labels.elem_count() as f64)?;
            Ok(Pass {
                inputs: inputs.clone(),
                dropout_seed: None,
                share: Share::OnDevice(share),
            })
        });
        let update = core.step(&passes.collect::<Result<Vec<_>>>()?)?;
        Ok(Tensor::stack(&[update.loss, update.grad_norm], 0)?)
    }
}

fn count_labels(batches: &[Batch]) -> u32 {
    batches.iter().map(|batch| batch.labels.len() as u32).sum()
}

impl StepGraphs {
    /// A step, of which only what the batches hold may be another at each: kernel by kernel the first two
    /// times that there are such shapes, later as a graph, which gives the same bits.
    pub fn step(&mut self, core: &Core, batches: &[Batch]) -> Result<Update> {
        let Some((kind, new)) = find(&mut self.list, Shapes::of(batches), |_| true) else {
            unreachable!("any may go for another")
        };
        if let Some((graph, inputs)) = &mut kind.captured {
            inputs.overwrite(core, batches)?;
            match graph.replay() {
                Ok(result) => return update(&result.copy()?),
                // Nothing was launched.
                Err(error) => self.give_up(&error),
            }
            return self.step(core, batches);
        }
        let inputs = Inputs::upload(core, batches, &kind.key)?;
        if new || self.off {
            return update(&inputs.step(core)?);
        }
        let device = core.parameters.device();
        let work = {
            let (core, inputs) = (core.clone(), inputs.clone());
            move || inputs.step(&core)
        };
        let result = Graph::rehearse(device, &work)?;
        let done = update(&result.copy()?);
        match Graph::capture_rehearsed(device, result, work) {
            Ok(graph) => kind.captured = Some((graph, inputs)),
            Err(error) => self.give_up(&error),
        }
        done
    }

    /// Kinds that are captured.
    pub fn len(&self) -> usize {
        let captured = self.list.iter().filter(|kind| kind.captured.is_some());
        captured.count()
    }

    fn give_up(&mut self, error: &candle_core::Error) {
        tracing::warn!("going on without CUDA graphs: {error:#}");
        self.off = true;
        self.list.clear();
    }
}

/// Of loss and norm `[2]`.
fn update(numbers: &Tensor) -> Result<Update> {
    Ok(Update {
        loss: numbers.get(0)?,
        grad_norm: numbers.get(1)?,
        gradients: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MAX_GRAPHS;

    #[test]
    fn steps_come_again_and_the_oldest_leave() {
        let mut list = StepGraphs::default().list;
        // Two batches, of which the first has so many labels.
        let mut is_new = |len: usize, labels: usize| {
            let batches = [(len, labels), (5, 1)].map(|(len, labels)| Batch {
                input_ids: vec![1; len],
                cu_seqlens: vec![0, len],
                label_positions: vec![0; labels],
                labels: vec![2; labels],
            });
            let found = find(&mut list, Shapes::of(&batches), |_| true);
            found.expect("any may go").1
        };
        assert!(is_new(9, 3) && !is_new(9, 3) && !is_new(9, LABELS));
        assert!(is_new(9, LABELS + 1) && is_new(8, 3));
        for len in 10..10 + MAX_GRAPHS {
            assert!(is_new(len, 3));
        }
        assert!(is_new(9, 3));
    }
}

//! CUDA graphs of training steps.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_rope_attn::Graph;
use candle_rope_attn::ops::{overwrite, upload};

use super::learner::{Core, Pass, Share, Update};
use crate::data::Batch;
use crate::model::{LabelledInputs, MAX_GRAPHS};

/// Labels of a batch are filled up to a multiple, as their number is another in each.
const LABELS: usize = 64;

/// Steps by what a graph cannot change, those used last at the end.
#[derive(Default)]
pub(super) struct StepGraphs {
    list: Vec<Kind>,
    /// Once a capture failed.
    off: bool,
}

struct Kind {
    /// `cu_seqlens` and number of labels of each batch.
    shapes: Vec<(Vec<usize>, usize)>,
    /// None while it was seen once.
    captured: Option<(Graph, Inputs)>,
}

/// The batches of a step on the device.
#[derive(Clone)]
struct Inputs {
    batches: Vec<LabelledInputs>,
    /// Labels of all batches, ignored ones left out: a u32 scalar.
    labels: Tensor,
}

impl Inputs {
    fn upload(core: &Core, batches: &[Batch]) -> Result<Self> {
        let on_device = batches
            .iter()
            .map(|batch| core.model.upload(batch, LABELS))
            .collect::<Result<_>>()?;
        let labels = upload(&[count_labels(batches)], core.parameters.device())?;
        Ok(Self {
            batches: on_device,
            labels: labels.reshape(())?,
        })
    }

    fn overwrite(&self, core: &Core, batches: &[Batch]) -> Result<()> {
        for (inputs, batch) in self.batches.iter().zip(batches) {
            core.model.overwrite(inputs, batch, LABELS)?;
        }
        Ok(overwrite(&self.labels, &[count_labels(batches)])?)
    }

    /// Loss and norm of the gradients `[2]` of a step.
    fn step(&self, core: &Core) -> Result<Tensor> {
        let labels = self.labels.to_dtype(DType::F32)?;
        let passes = self.batches.iter().map(|inputs| {
            // The mean of a batch is over ignored labels too.
            let share = (labels.recip()? * inputs.labels.elem_count() as f64)?;
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
        let shapes = batches.iter().map(|batch| {
            let labels = batch.labels.len().next_multiple_of(LABELS);
            (batch.cu_seqlens.clone(), labels)
        });
        let (at, new) = self.find(shapes.collect());
        let kind = &mut self.list[at];
        if let Some((graph, inputs)) = &mut kind.captured {
            inputs.overwrite(core, batches)?;
            return update(&graph.replay()?.copy()?);
        }
        let inputs = Inputs::upload(core, batches)?;
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
            Err(error) => {
                tracing::warn!("going on without CUDA graphs: {error:#}");
                self.off = true;
            }
        }
        done
    }

    /// Where steps of these shapes are in the list, and whether there was none before.
    fn find(&mut self, shapes: Vec<(Vec<usize>, usize)>) -> (usize, bool) {
        let found = self.list.iter().rposition(|kind| kind.shapes == shapes);
        let kind = match found {
            Some(at) => self.list.remove(at),
            None => Kind {
                shapes,
                captured: None,
            },
        };
        if self.list.len() == MAX_GRAPHS {
            self.list.remove(0);
        }
        self.list.push(kind);
        (self.list.len() - 1, found.is_none())
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

//! CUDA graphs of an encoder's passes.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use anyhow::Result;
use candle_core::Tensor;
use candle_rope_attn::Graph;

use super::encoder::{Inputs, Stack, Tokens};

/// Kinds of passes that an encoder keeps graphs of, or has seen once, and of training steps that a learner does.
pub const MAX_GRAPHS: usize = 64;

/// Tokens of a pass or a training step that is launched as a graph: with more, kernels take longer than their launches.
pub const MAX_GRAPH_TOKENS: usize = 8192;

/// See [`Encoder::with_graphs`](super::Encoder::with_graphs).
#[derive(Default)]
pub(super) struct Graphs(Mutex<Passes>);

/// Passes by what a graph cannot change, those used last at the end.
#[derive(Default)]
struct Passes {
    list: Vec<Pass>,
    /// Once a graph failed.
    off: bool,
}

struct Pass {
    /// Each thread has its own order of work, and so its own inputs and results.
    thread: ThreadId,
    cu_seqlens: Vec<usize>,
    has_types: bool,
    /// How many tokens are asked for, if not all.
    rows: Option<usize>,
    /// None while it was seen once.
    captured: Option<(Graph, Inputs)>,
}

impl Pass {
    fn is_of(&self, thread: ThreadId, tokens: &Tokens, rows: Option<&[u32]>) -> bool {
        self.thread == thread
            && self.rows == rows.map(<[u32]>::len)
            && self.has_types == tokens.token_type_ids.is_some()
            && self.cu_seqlens == tokens.cu_seqlens
    }

    /// Last hidden states of tokens that it [is of](Self::is_of).
    fn forward(
        &mut self,
        stack: &Arc<Stack>,
        tokens: &Tokens,
        rows: Option<&[u32]>,
    ) -> Result<Tensor> {
        if let Some((graph, inputs)) = &mut self.captured {
            inputs.overwrite(tokens, rows)?;
            return Ok(graph.replay()?.clone());
        }
        let inputs = stack.upload(tokens, rows)?;
        let work = {
            let (stack, inputs) = (stack.clone(), inputs.clone());
            move || stack.forward(&inputs, None, false)
        };
        let graph = Graph::capture(&stack.device, work)?;
        let hidden = graph.result().clone();
        self.captured = Some((graph, inputs));
        Ok(hidden)
    }
}

impl Graphs {
    /// Last hidden states of checked tokens, in memory that the next pass of the same kind uses again.
    /// None where there is no graph.
    pub fn forward(
        &self,
        stack: &Arc<Stack>,
        tokens: &Tokens,
        rows: Option<&[u32]>,
    ) -> Option<Tensor> {
        let mut passes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if passes.off || tokens.ids.len() > MAX_GRAPH_TOKENS {
            return None;
        }
        let thread = thread::current().id();
        let hidden = find(&mut passes.list, thread, tokens, rows)?.forward(stack, tokens, rows);
        if let Err(error) = &hidden {
            tracing::warn!("going on without CUDA graphs: {error:#}");
            passes.off = true;
            // The memory of another thread's graph may be in use there.
            passes.list.retain(|pass| pass.thread != thread);
        }
        hidden.ok()
    }
}

/// The pass of these tokens, if they were seen before.
fn find<'a>(
    passes: &'a mut Vec<Pass>,
    thread: ThreadId,
    tokens: &Tokens,
    rows: Option<&[u32]>,
) -> Option<&'a mut Pass> {
    let is_it = |pass: &Pass| pass.is_of(thread, tokens, rows);
    if let Some(at) = passes.iter().rposition(is_it) {
        let pass = passes.remove(at);
        passes.push(pass);
        return passes.last_mut();
    }
    if passes.len() == MAX_GRAPHS {
        let may_go = |pass: &Pass| pass.thread == thread || pass.captured.is_none();
        let oldest = passes.iter().position(may_go)?;
        passes.remove(oldest);
    }
    passes.push(Pass {
        thread,
        cu_seqlens: tokens.cu_seqlens.to_vec(),
        has_types: tokens.token_type_ids.is_some(),
        rows: rows.map(<[u32]>::len),
        captured: None,
    });
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_come_again_and_the_oldest_leave() {
        let here = thread::current().id();
        let there = thread::spawn(|| thread::current().id()).join().unwrap();
        let mut passes = Vec::new();
        let mut seen = |thread, length: usize, types: bool, rows: Option<&[u32]>| {
            let (ids, types_of) = (vec![0; length], vec![0; length]);
            let tokens = Tokens {
                ids: &ids,
                cu_seqlens: &[0, length],
                token_type_ids: types.then_some(&types_of[..]),
            };
            find(&mut passes, thread, &tokens, rows).is_some()
        };
        assert!(!seen(here, 1, false, None));
        assert!(seen(here, 1, false, None));
        assert!(!seen(here, 1, true, None) && !seen(there, 1, false, None));
        assert!(!seen(here, 1, false, Some(&[0])) && seen(here, 1, false, Some(&[0])));
        assert!(!seen(here, 1, false, Some(&[0, 0])));
        // They fill the rest, and drive out all but the one that came again.
        for length in 2..=MAX_GRAPHS {
            assert!(!seen(there, length, false, None));
            assert!(seen(here, 1, false, None));
        }
        assert!(!seen(here, 1, true, None) && !seen(there, 1, false, None));
    }
}

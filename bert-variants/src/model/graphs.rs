//! CUDA graphs of an encoder's passes.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use anyhow::Result;
use candle_core::Tensor;
use candle_rope_attn::Graph;
use candle_rope_attn::ops::overwrite;

use super::encoder::{Inputs, Stack, Tokens};

/// Kinds of passes that an encoder keeps graphs of, or has seen once.
pub const MAX_GRAPHS: usize = 64;

/// Tokens of a pass that is launched as a graph: with more, kernels take longer than their launches.
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
    /// None while it was seen once.
    captured: Option<(Graph, Inputs)>,
}

impl Pass {
    fn is_of(&self, thread: ThreadId, tokens: &Tokens) -> bool {
        self.thread == thread
            && self.has_types == tokens.token_type_ids.is_some()
            && self.cu_seqlens == tokens.cu_seqlens
    }

    /// Last hidden states of tokens that it [is of](Self::is_of).
    fn forward(&mut self, stack: &Arc<Stack>, tokens: &Tokens) -> Result<Tensor> {
        if let Some((graph, inputs)) = &mut self.captured {
            overwrite(&inputs.ids, tokens.ids)?;
            if let (Some(to), Some(types)) = (&inputs.token_type_ids, tokens.token_type_ids) {
                overwrite(to, types)?;
            }
            return Ok(graph.replay()?.clone());
        }
        let inputs = stack.upload(tokens)?;
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
    pub fn forward(&self, stack: &Arc<Stack>, tokens: &Tokens) -> Option<Tensor> {
        let mut passes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if passes.off || tokens.ids.len() > MAX_GRAPH_TOKENS {
            return None;
        }
        let hidden = find(&mut passes.list, tokens)?.forward(stack, tokens);
        if let Err(error) = &hidden {
            tracing::warn!("going on without CUDA graphs: {error:#}");
            passes.off = true;
        }
        hidden.ok()
    }
}

/// The pass of these tokens, if they were seen before.
fn find<'a>(passes: &'a mut Vec<Pass>, tokens: &Tokens) -> Option<&'a mut Pass> {
    let thread = thread::current().id();
    if let Some(at) = passes.iter().rposition(|pass| pass.is_of(thread, tokens)) {
        let pass = passes.remove(at);
        passes.push(pass);
        return passes.last_mut();
    }
    if passes.len() == MAX_GRAPHS {
        // The memory of another thread's graph may be in use there.
        match passes.iter().position(|pass| pass.thread == thread) {
            Some(oldest) => drop(passes.remove(oldest)),
            None => return None,
        }
    }
    passes.push(Pass {
        thread,
        cu_seqlens: tokens.cu_seqlens.to_vec(),
        has_types: tokens.token_type_ids.is_some(),
        captured: None,
    });
    None
}

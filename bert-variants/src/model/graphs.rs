//! CUDA graphs of an encoder's passes.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use anyhow::Result;
use candle_core::Tensor;
use candle_rope_attn::Graph;

use super::encoder::{Inputs, Stack, Tokens};

/// Kinds of passes that an encoder keeps graphs of, or has seen once, and of training steps that a
/// learner does.
pub const MAX_GRAPHS: usize = 64;

/// Tokens of a pass or a training step that is launched as a graph: with more, kernels take longer than
/// their launches.
pub const MAX_GRAPH_TOKENS: usize = 8192;

/// Work of one kind.
pub(crate) struct Kind<K, C> {
    /// What a graph cannot change.
    pub key: K,
    /// None while it was seen once.
    pub captured: Option<C>,
}

/// The kind with that key, and whether it is new: then it takes the place of the oldest that may go if
/// there are [`MAX_GRAPHS`], and is none where none may. Those used last are at the end of the list.
pub(crate) fn find<K: PartialEq, C>(
    list: &mut Vec<Kind<K, C>>,
    key: K,
    may_go: impl Fn(&Kind<K, C>) -> bool,
) -> Option<(&mut Kind<K, C>, bool)> {
    let found = list.iter().rposition(|kind| kind.key == key);
    let kind = match found {
        Some(at) => list.remove(at),
        None => {
            if list.len() == MAX_GRAPHS {
                let oldest = list.iter().position(may_go)?;
                list.remove(oldest);
            }
            Kind {
                key,
                captured: None,
            }
        }
    };
    list.push(kind);
    list.last_mut().map(|kind| (kind, found.is_none()))
}

/// See [`Encoder::with_graphs`](super::Encoder::with_graphs).
#[derive(Default)]
pub(super) struct Graphs(Mutex<Passes>);

#[derive(Default)]
struct Passes {
    list: Vec<Kind<Pass, (Graph, Inputs)>>,
    /// Once a graph failed.
    off: bool,
}

/// What the graph of a pass cannot change.
#[derive(PartialEq)]
struct Pass {
    /// Each thread has its own order of work, and so its own inputs and results.
    thread: ThreadId,
    cu_seqlens: Vec<usize>,
    has_types: bool,
    /// How many tokens are asked for, if not all.
    rows: Option<usize>,
}

impl Pass {
    fn of(thread: ThreadId, tokens: &Tokens, rows: Option<&[u32]>) -> Self {
        Self {
            thread,
            cu_seqlens: tokens.cu_seqlens.to_vec(),
            has_types: tokens.token_type_ids.is_some(),
            rows: rows.map(<[u32]>::len),
        }
    }
}

impl Kind<Pass, (Graph, Inputs)> {
    /// Whether its memory is in use in no other thread.
    fn may_go(&self, thread: ThreadId) -> bool {
        self.key.thread == thread || self.captured.is_none()
    }

    /// Last hidden states of tokens of this kind.
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
        let key = Pass::of(thread, tokens, rows);
        let (kind, new) = find(&mut passes.list, key, |kind| kind.may_go(thread))?;
        if new {
            return None;
        }
        let hidden = kind.forward(stack, tokens, rows);
        if let Err(error) = &hidden {
            tracing::warn!("going on without CUDA graphs: {error:#}");
            passes.off = true;
            // The memory of another thread's graph may be in use there.
            passes.list.retain(|kind| kind.key.thread != thread);
        }
        hidden.ok()
    }
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
            let key = Pass::of(thread, &tokens, rows);
            find(&mut passes, key, |kind| kind.may_go(thread)).is_some_and(|(_, new)| !new)
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

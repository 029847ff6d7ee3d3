//! The models: one encoder for every variant, and the heads on top of it.
//!
//! There is no padding: the sequences of a batch lie end to end in `[tokens, hidden_size]`, and
//! `cu_seqlens` says where each begins.

mod encoder;
mod graphs;
mod heads;
mod layers;

pub(crate) use graphs::{Kind, find};
pub(crate) use heads::{LabelledInputs, classification_loss};

pub use encoder::{Encoder, Tokens};
pub use graphs::{MAX_GRAPH_TOKENS, MAX_GRAPHS};
pub use heads::{
    LanguageModel, Score, SentenceEncoder, SequenceClassifier, Targets, TokenClassifier,
};

//! Flash attention with rotary position embedding for [Candle](https://github.com/huggingface/candle),
//! forward and backward, and the other differentiable operations a transformer encoder trains with.

mod batch;
mod cpu;
mod element;
mod op;
pub mod ops;
mod philox;
mod position;
pub mod reference;
mod spec;

pub use op::{attention, attention_qkvpacked, attention_qkvpacked_with_bias, attention_with_bias};

pub use spec::{
    Alibi, AttentionSpec, Dropout, PositionEncoding, RelativeBias, Rope, RopePairing, RopeScaling,
    Sequences, Window,
};

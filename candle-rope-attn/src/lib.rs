//! Flash attention with rotary position embedding for [Candle](https://github.com/huggingface/candle),
//! forward and backward, and the other differentiable operations a transformer encoder trains with.

pub mod ops;
mod spec;

pub use spec::{
    Alibi, AttentionSpec, Dropout, PositionEncoding, RelativeBias, Rope, RopePairing, RopeScaling,
    Sequences, Window,
};

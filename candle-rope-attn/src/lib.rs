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

/// The GPU of that number.
///
/// # Errors
/// When there is none, or the program was built without the feature `cuda`.
pub fn cuda_device(ordinal: usize) -> candle_core::Result<candle_core::Device> {
    candle_core::Device::new_cuda(ordinal)
}

//! Flash attention with rotary position embedding for [Candle](https://github.com/huggingface/candle),
//! forward and backward, and the other differentiable operations a transformer encoder trains with.
//!
//! Attention never makes the matrix of scores: memory is linear in the sequence length in both
//! passes. What to compute is plain data, an [`AttentionSpec`] (scale, causality, window, dropout
//! and the [`PositionEncoding`]) and the [`Sequences`] (padding, or variable lengths without any);
//! positions are applied inside, so no bias is stored either, nor rotated queries and keys, but for a
//! backward pass on a GPU.
//!
//! | function | q, k, v | also differentiable |
//! | --- | --- | --- |
//! | [`attention`] | three tensors | |
//! | [`attention_qkvpacked`] | one tensor, as one linear layer makes them | |
//! | [`attention_projected`] | the hidden states, which one linear layer makes q, k and v of | |
//! | [`attention_with_bias`], [`attention_qkvpacked_with_bias`] | either | the weight of [`RelativeBias`] |
//! | [`ops::rope`] | rotation alone | |
//!
//! # Example
//!
//! Two sequences of 3 and 5 tokens, without padding, through RoPE attention and back:
//!
//! ```
//! use candle_core::{Device, Result, Var};
//! use candle_rope_attn::{
//!     AttentionSpec, PositionEncoding, Rope, RopePairing, RopeScaling, Sequences,
//!     attention_qkvpacked,
//! };
//!
//! # fn main() -> Result<()> {
//! let (num_heads, head_dim) = (4, 32);
//! let rope = Rope::new(head_dim, 10_000.0, RopePairing::HalfSplit, RopeScaling::None)?;
//! let spec = AttentionSpec::new(num_heads, head_dim).with_position(PositionEncoding::Rope(rope));
//!
//! let qkv = Var::randn(0f32, 1f32, (3 + 5, 3, num_heads, head_dim), &Device::Cpu)?;
//! let out = attention_qkvpacked(&qkv, &spec, &Sequences::CuSeqlens(vec![0, 3, 8]))?;
//! assert_eq!(out.dims(), [8, num_heads, head_dim]);
//!
//! let gradients = out.sqr()?.sum_all()?.backward()?;
//! assert_eq!(gradients.get(&qkv).map(|g| g.dims()), Some(&[8, 3, num_heads, head_dim][..]));
//! # Ok(())
//! # }
//! ```
//!
//! # A position encoding of your own
//!
//! Two families need no change here. A *rotation* is any list of inverse frequencies, for instance
//! a partial one, whose slowest pairs do not turn at all:
//!
//! ```
//! use candle_rope_attn::{AttentionSpec, PositionEncoding, Rope, RopePairing};
//!
//! let head_dim = 64;
//! let inv_freq = (0..head_dim / 2)
//!     .map(|i| if i < 24 { 0.5f32.powi(i) } else { 0.0 })
//!     .collect();
//! let rope = Rope::from_inv_freq(inv_freq, RopePairing::Interleaved);
//! let spec = AttentionSpec::new(8, head_dim as usize).with_position(PositionEncoding::Rope(rope));
//! assert!(spec.validate().is_ok());
//! ```
//!
//! A *bias by distance* is a [`RelativeBias`] whose weight you compute by Candle operations, with
//! gradients to whatever it is made of. KERPLE (Chi et al. 2022,
//! <https://arxiv.org/abs/2205.09921>), which learns `-a ln(1 + b |distance|)` for each head:
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor, Var};
//! use candle_rope_attn::{
//!     AttentionSpec, PositionEncoding, RelativeBias, Sequences, attention_qkvpacked_with_bias,
//! };
//!
//! # fn main() -> Result<()> {
//! let (num_heads, head_dim, seqlen) = (4, 16, 50);
//! // Below a quarter of the buckets, every distance in either direction has a bucket to itself. On a
//! // GPU, where `RelativeBias::MAX_CUDA_BUCKETS` are the most, that is up to 256 tokens.
//! let buckets = RelativeBias {
//!     num_buckets: 4 * seqlen,
//!     max_distance: 2 * seqlen,
//!     bidirectional: true,
//! };
//! let mut distances = vec![0f32; buckets.num_buckets];
//! for distance in 1 - seqlen as i64..seqlen as i64 {
//!     distances[buckets.bucket(distance)] = distance.unsigned_abs() as f32;
//! }
//! let distances = Tensor::from_vec(distances, (buckets.num_buckets, 1), &Device::Cpu)?;
//!
//! let a = Var::ones((1, num_heads), DType::F32, &Device::Cpu)?;
//! let b = Var::ones((1, num_heads), DType::F32, &Device::Cpu)?;
//! let weight = (distances.matmul(&b)? + 1.0)?.log()?.broadcast_mul(&a)?.neg()?;
//!
//! let spec = AttentionSpec::new(num_heads, head_dim)
//!     .with_position(PositionEncoding::RelativeBias(buckets));
//! let qkv = Tensor::randn(0f32, 1f32, (1, seqlen, 3, num_heads, head_dim), &Device::Cpu)?;
//! let out = attention_qkvpacked_with_bias(&qkv, &weight, &spec, &Sequences::Dense)?;
//! let gradients = out.sqr()?.sum_all()?.backward()?;
//! assert!(gradients.get(&a).is_some() && gradients.get(&b).is_some());
//! # Ok(())
//! # }
//! ```
//!
//! Anything else is a new variant of [`PositionEncoding`]: give it to the `reference` module first,
//! then to the table of cases in `tests/common`, and then to the kernels, where it is either a
//! rotation of rows (`position::Rotation`) or a table of biases (`position::BiasTable`).

mod batch;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod element;
mod graph;
mod op;
mod operand;
pub mod ops;
mod philox;
mod position;
mod profile;
pub mod reference;
mod spec;
mod tape;

use candle_core::{Device, Result};

pub use graph::Graph;
pub use op::{
    attention, attention_projected, attention_qkvpacked, attention_qkvpacked_with_bias,
    attention_with_bias,
};

pub use spec::{
    Alibi, AttentionSpec, Dropout, PositionEncoding, RelativeBias, Rope, RopePairing, RopeScaling,
    Sequences, Window, Yarn,
};

/// The GPU of that number. Memory that tensors free stays with the program for the next ones. The work
/// of each thread is in order; what other streams than Candle's do to its tensors must be waited for.
///
/// # Errors
/// Says what to do when there is no such GPU or it is too old for the kernels, when the NVIDIA
/// driver is missing or too old, and when this program was built without the feature `cuda`.
#[cfg(feature = "cuda")]
pub fn cuda_device(ordinal: usize) -> Result<Device> {
    cuda::device::open(ordinal)
}

/// The GPU of that number.
///
/// # Errors
/// Always: this program was built without the feature `cuda`.
#[cfg(not(feature = "cuda"))]
pub fn cuda_device(ordinal: usize) -> Result<Device> {
    candle_core::bail!(
        "GPU {ordinal} was asked for, but this program was built without CUDA; build with --features cuda"
    )
}

/// The name of a GPU, such as `NVIDIA H100 80GB HBM3`, or `None` where `device` is none.
///
/// # Errors
/// When the driver does not answer.
pub fn cuda_device_name(device: &Device) -> Result<Option<String>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::device::name(device).map(Some),
        _ => Ok(None),
    }
}

/// Memory of a GPU that tensors and [`Graph`]s use, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaMemory {
    /// Now.
    pub used: u64,
    /// At most, since the start or the last [`CudaMemory::reset_peak`]: the peak of tensors and that of
    /// graphs, which may have come at different times.
    pub peak: u64,
}

impl CudaMemory {
    /// That of `device`, or `None` where it is no GPU, or one that has no memory pools to count it.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub fn of(device: &Device) -> Result<Option<Self>> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => cuda::device::memory(device),
            _ => Ok(None),
        }
    }

    /// Sets the peak to what is in use now; does nothing where [`CudaMemory::of`] gives none.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub fn reset_peak(device: &Device) -> Result<()> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => cuda::device::reset_peak_memory(device),
            _ => Ok(()),
        }
    }
}

/// The error, or if a GPU ran out of memory, one that says what to do. The operations of this crate
/// do so by themselves, but Candle's own repeat the driver's code.
pub fn explain_out_of_memory(error: candle_core::Error) -> candle_core::Error {
    #[cfg(feature = "cuda")]
    let error = cuda::device::explain(error);
    error
}

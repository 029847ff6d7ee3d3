//! What to compute: [`AttentionSpec`] and the [`PositionEncoding`] inside it.
//!
//! Both are plain data. Every implementation (CPU kernel, f64 reference) reads
//! the same two types, so an encoding exists in one place.

use candle_core::{Result, bail};

/// How positions enter attention.
///
/// Absolute position embeddings are [`PositionEncoding::None`] here: the model
/// adds their table to the token embeddings before the first layer.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum PositionEncoding {
    /// Attention sees no positions.
    #[default]
    None,
    /// Rotary position embedding, fused into attention.
    Rope(Rope),
}

/// Rotary position embedding (Su et al. 2021, <https://arxiv.org/abs/2104.09864>, eq. 34).
///
/// A pair of features `(x0, x1)` of a query or key at position `p` is rotated by
/// the angle `p * inv_freq[i]`. Scores then depend on relative position only.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Angle per position of each pair, in radians, length `head_dim / 2`.
    pub inv_freq: Vec<f32>,
    /// Which features form a pair.
    pub pairing: RopePairing,
}

/// Which two features of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// `(x[i], x[i + head_dim / 2])`: GPT-NeoX, LLaMA, ModernBERT.
    HalfSplit,
    /// `(x[2i], x[2i + 1])`: RoFormer, GPT-J.
    Interleaved,
}

/// How the standard frequencies are stretched to reach beyond the trained length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// No change.
    None,
    /// Position interpolation (Chen et al. 2023): every angle divided by the factor.
    Linear(f64),
    /// NTK-aware: `theta * factor^(d / (d - 2))`, which keeps the highest frequency
    /// and divides the lowest by the factor.
    Ntk(f64),
}

impl Rope {
    /// Standard frequencies `theta^(-2i / head_dim)`, with the given scaling.
    ///
    /// # Errors
    /// When `head_dim` is odd or zero, or `theta` or the factor is not positive and finite.
    pub fn new(
        head_dim: usize,
        theta: f64,
        pairing: RopePairing,
        scaling: RopeScaling,
    ) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            bail!(
                "RoPE rotates pairs of features: got head_dim {head_dim}, expected an even number; change hidden_size or num_attention_heads"
            )
        }
        let positive = |name: &str, value: f64| -> Result<()> {
            if !(value.is_finite() && value > 0.0) {
                bail!("RoPE {name} must be positive and finite, got {value}")
            }
            Ok(())
        };
        positive("theta", theta)?;
        let dim = head_dim as f64;
        let (theta, divisor) = match scaling {
            RopeScaling::None => (theta, 1.0),
            RopeScaling::Linear(factor) => (theta, factor),
            RopeScaling::Ntk(factor) if head_dim > 2 => {
                positive("scaling factor", factor)?;
                (theta * factor.powf(dim / (dim - 2.0)), 1.0)
            }
            RopeScaling::Ntk(_) => (theta, 1.0),
        };
        positive("scaling factor", divisor)?;
        let inv_freq = (0..head_dim / 2)
            .map(|i| (theta.powf(-2.0 * i as f64 / dim) / divisor) as f32)
            .collect();
        Ok(Self { inv_freq, pairing })
    }

    /// Frequencies of your own, in radians per position, one per pair (`head_dim / 2`).
    pub fn from_inv_freq(inv_freq: Vec<f32>, pairing: RopePairing) -> Self {
        Self { inv_freq, pairing }
    }

    /// The width of the heads that these frequencies fit.
    pub fn head_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }
}

/// Everything about one attention call except its tensors and sequence lengths.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Heads of q, k and v.
    pub num_heads: usize,
    /// Features per head, 1 to 256.
    pub head_dim: usize,
    /// Factor on `q·k` before the softmax, usually `1 / sqrt(head_dim)`.
    pub softmax_scale: f32,
    /// A query sees only keys at its own position or before, within its sequence.
    pub causal: bool,
    /// How positions enter.
    pub position: PositionEncoding,
}

impl AttentionSpec {
    /// Bidirectional attention without positions, scale `1 / sqrt(head_dim)`.
    pub fn new(num_heads: usize, head_dim: usize) -> Self {
        Self {
            num_heads,
            head_dim,
            softmax_scale: (head_dim as f32).sqrt().recip(),
            causal: false,
            position: PositionEncoding::None,
        }
    }

    /// The same, but causal or not.
    pub fn with_causal(mut self, causal: bool) -> Self {
        self.causal = causal;
        self
    }

    /// The same, with a position encoding.
    pub fn with_position(mut self, position: PositionEncoding) -> Self {
        self.position = position;
        self
    }

    /// The same, with another scale.
    pub fn with_softmax_scale(mut self, softmax_scale: f32) -> Self {
        self.softmax_scale = softmax_scale;
        self
    }

    /// Largest supported `head_dim`.
    pub const MAX_HEAD_DIM: usize = 256;

    /// Checks the spec by itself.
    ///
    /// # Errors
    /// Names the field, the value got and the value expected.
    pub fn validate(&self) -> Result<()> {
        if self.num_heads == 0 {
            bail!("attention needs at least one head, got num_heads 0")
        }
        if self.head_dim == 0 || self.head_dim > Self::MAX_HEAD_DIM {
            bail!(
                "attention head_dim must be 1 to {}, got {}; use more heads of a smaller width",
                Self::MAX_HEAD_DIM,
                self.head_dim
            )
        }
        if !self.softmax_scale.is_finite() {
            bail!(
                "attention softmax_scale must be finite, got {}",
                self.softmax_scale
            )
        }
        if let PositionEncoding::Rope(rope) = &self.position
            && rope.head_dim() != self.head_dim
        {
            bail!(
                "RoPE has {} inverse frequencies, which fits head_dim {}, but the attention has head_dim {}; pass head_dim / 2 frequencies",
                rope.inv_freq.len(),
                rope.head_dim(),
                self.head_dim
            )
        }
        Ok(())
    }
}

/// How tokens are grouped into sequences. Attention never crosses a sequence.
///
/// With `[batch, seqlen, num_heads, head_dim]` inputs each batch row is a
/// sequence; with `[total_tokens, num_heads, head_dim]` inputs the sequences lie
/// end to end and [`Sequences::CuSeqlens`] says where each begins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Sequences {
    /// Every token of a `[batch, seqlen, ..]` input takes part.
    #[default]
    Dense,
    /// `[batch, seqlen, ..]` input where only the first `lens[b]` tokens of row `b` are
    /// real keys. A row of length 0 gives zeros.
    KeyLens(Vec<usize>),
    /// `[batch, seqlen, ..]` input with a key mask, row-major `[batch, seqlen]`, true = attend
    /// (Hugging Face's `attention_mask`; may have holes). A row with no true gives zeros.
    KeyMask(Vec<bool>),
    /// `[total_tokens, ..]` input: sequence `i` is tokens `cu_seqlens[i]..cu_seqlens[i + 1]`,
    /// so the list starts with 0, does not decrease, and ends with `total_tokens`.
    CuSeqlens(Vec<usize>),
}

//! What to compute: [`AttentionSpec`] and the [`PositionEncoding`] inside it.
//!
//! Both are plain data. Every implementation (CPU, CUDA, f64 reference) reads
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
    /// Attention with linear biases (Press et al. 2021, <https://arxiv.org/abs/2108.12409>).
    Alibi(Alibi),
    /// A learned bias of each head for each bucket of distances (Raffel et al. 2019,
    /// <https://arxiv.org/abs/1910.10683>, section 2.1). Its weights are a tensor of the call.
    RelativeBias(RelativeBias),
}

/// Attention with linear biases: `-slope * |query - key|` is added to each scaled score.
///
/// Without causality this is the symmetric form used by encoders.
#[derive(Debug, Clone, PartialEq)]
pub struct Alibi {
    /// One slope a head.
    pub slopes: Vec<f32>,
}

impl Alibi {
    /// The slopes of the paper: `2^(-8i / n)` for `n` heads, `i = 1..=n`, when `n` is a power of
    /// two; otherwise those of the next lower power of two, then every second one of the next
    /// higher.
    pub fn new(num_heads: usize) -> Self {
        let geometric = |n: usize| (1..=n).map(move |i| (-8.0 * i as f64 / n as f64).exp2() as f32);
        let lower = match num_heads {
            0 => 0,
            n => 1 << n.ilog2(),
        };
        let rest = geometric(2 * lower).step_by(2).take(num_heads - lower);
        Self {
            slopes: geometric(lower).chain(rest).collect(),
        }
    }
}

/// T5's buckets of distances. The bias of a head for a bucket is `weight[bucket, head]`, where
/// `weight` is `[num_buckets, num_heads]`; it is added to each scaled score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelativeBias {
    /// Rows of the weight. At most [`RelativeBias::MAX_CUDA_BUCKETS`] on a GPU.
    pub num_buckets: usize,
    /// Distances from here on share the last bucket of their direction.
    pub max_distance: usize,
    /// Keys after the query have buckets of their own (encoders), or all share bucket 0.
    pub bidirectional: bool,
}

impl RelativeBias {
    /// The most buckets that the CUDA kernels take.
    pub const MAX_CUDA_BUCKETS: usize = 1024;

    /// The bucket of a key at `distance = key - query`, as transformers'
    /// `T5Attention._relative_position_bucket`.
    pub fn bucket(&self, distance: i64) -> usize {
        let mut buckets = self.num_buckets;
        let mut first = 0;
        let away = if self.bidirectional {
            buckets /= 2;
            if distance > 0 {
                first = buckets;
            }
            distance.unsigned_abs()
        } else {
            distance.min(0).unsigned_abs()
        } as usize;
        let exact = buckets / 2;
        if away < exact {
            return first + away;
        }
        // f32 as in transformers, so that distances on a boundary fall into the same bucket.
        let ratio = (away as f32 / exact as f32).ln()
            / ((self.max_distance as f64 / exact as f64).ln() as f32);
        let large = exact + (ratio * (buckets - exact) as f32) as usize;
        first + large.min(buckets - 1)
    }
}

/// Keys a query sees around its own position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// At most this many keys before it; `None` for all.
    pub left: Option<usize>,
    /// At most this many keys after it; `None` for all.
    pub right: Option<usize>,
}

/// Dropout of attention probabilities, kept ones scaled by `1 / (1 - p)`.
///
/// What is dropped depends on `seed` and the element's place alone, so the backward pass drops the
/// same, and so does every device: element (sequence `b`, head `h`, query `i`, key `j`) is dropped
/// when word `j % 4` of Philox4x32-10 with counter `(j / 4, i, h, b)` and key
/// `(seed low, seed high)` is below `p * 2^32`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of dropping, in `[0, 1)`.
    pub p: f32,
    /// Differs from call to call.
    pub seed: u64,
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
    /// Low frequencies divided by the factor, high ones unchanged.
    Yarn(Yarn),
}

/// YaRN (Peng et al. 2023, <https://arxiv.org/abs/2309.00071>, section 3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// What low frequencies are divided by: how many times longer inputs may become.
    pub factor: f64,
    /// Tokens of the longest input in training.
    pub original_length: usize,
    /// Turns over that length from which on a pair keeps its frequency.
    pub beta_fast: f64,
    /// Turns up to which the whole factor divides it; between the two, part of it.
    pub beta_slow: f64,
    /// Factor on rotated queries and keys. The frequencies know nothing of it: its square belongs
    /// into [`AttentionSpec::softmax_scale`].
    pub attention_factor: f64,
}

impl Yarn {
    /// With the values of the paper.
    pub fn new(factor: f64, original_length: usize) -> Self {
        Self {
            factor,
            original_length,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 0.1 * factor.max(1.0).ln() + 1.0,
        }
    }

    /// Which part of the frequency of pair `i` is divided, 0 to 1.
    fn divided(&self, i: usize, head_dim: usize, theta: f64) -> f64 {
        let dim = head_dim as f64;
        let pair_of = |turns: f64| {
            let length = self.original_length as f64 / (turns * 2.0 * std::f64::consts::PI);
            dim * length.ln() / (2.0 * theta.ln())
        };
        let low = pair_of(self.beta_fast).floor().max(0.0);
        let high = pair_of(self.beta_slow).ceil().min(dim - 1.0);
        let width = if low == high { 0.001 } else { high - low };
        ((i as f64 - low) / width).clamp(0.0, 1.0)
    }
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
        let standard = |theta: f64, i: usize| theta.powf(-2.0 * i as f64 / dim);
        let factor = match scaling {
            RopeScaling::None => 1.0,
            RopeScaling::Linear(factor) | RopeScaling::Ntk(factor) => factor,
            RopeScaling::Yarn(yarn) => yarn.factor,
        };
        positive("scaling factor", factor)?;
        if let RopeScaling::Yarn(yarn) = scaling {
            positive("original length", yarn.original_length as f64)?;
        }
        let frequency = |i| match scaling {
            RopeScaling::None => standard(theta, i),
            RopeScaling::Linear(factor) => standard(theta, i) / factor,
            RopeScaling::Ntk(_) if head_dim == 2 => 1.0,
            RopeScaling::Ntk(factor) => standard(theta * factor.powf(dim / (dim - 2.0)), i),
            RopeScaling::Yarn(yarn) => {
                let divided = yarn.divided(i, head_dim, theta);
                standard(theta, i) * (1.0 - divided + divided / factor)
            }
        };
        let inv_freq: Vec<f32> = (0..head_dim / 2).map(|i| frequency(i) as f32).collect();
        if inv_freq.iter().any(|frequency| !frequency.is_finite()) {
            bail!("RoPE with theta {theta} and {scaling:?} has frequencies that are not finite")
        }
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
    /// Limits the keys that a query sees (sliding-window attention), beside `causal`.
    pub window: Option<Window>,
    /// How positions enter.
    pub position: PositionEncoding,
    /// Dropout of the attention probabilities, in training.
    pub dropout: Option<Dropout>,
}

impl AttentionSpec {
    /// Bidirectional attention without positions, scale `1 / sqrt(head_dim)`.
    pub fn new(num_heads: usize, head_dim: usize) -> Self {
        Self {
            num_heads,
            head_dim,
            softmax_scale: (head_dim as f32).sqrt().recip(),
            causal: false,
            window: None,
            position: PositionEncoding::None,
            dropout: None,
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

    /// The same, with a sliding window.
    pub fn with_window(mut self, window: Option<Window>) -> Self {
        self.window = window;
        self
    }

    /// The same, with dropout of the attention probabilities or without.
    pub fn with_dropout(mut self, dropout: Option<Dropout>) -> Self {
        self.dropout = dropout;
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
        if let Some(Dropout { p, .. }) = self.dropout
            && !(0.0..1.0).contains(&p)
        {
            bail!("attention dropout must be in [0, 1), got {p}")
        }
        match &self.position {
            PositionEncoding::None => {}
            PositionEncoding::Rope(rope) => {
                if rope.head_dim() != self.head_dim {
                    bail!(
                        "RoPE has {} inverse frequencies, which fits head_dim {}, but the attention has head_dim {}; pass head_dim / 2 frequencies",
                        rope.inv_freq.len(),
                        rope.head_dim(),
                        self.head_dim
                    )
                }
            }
            PositionEncoding::Alibi(alibi) => {
                if alibi.slopes.len() != self.num_heads {
                    bail!(
                        "ALiBi has {} slopes, but the attention has {} heads; pass one slope a head",
                        alibi.slopes.len(),
                        self.num_heads
                    )
                }
            }
            PositionEncoding::RelativeBias(bias) => {
                let directions = if bias.bidirectional { 2 } else { 1 };
                if bias.num_buckets < 2 * directions
                    || bias.max_distance <= bias.num_buckets / directions / 2
                {
                    bail!(
                        "relative bias needs at least {} buckets and max_distance above {}, got num_buckets {} and max_distance {}",
                        2 * directions,
                        bias.num_buckets / directions / 2,
                        bias.num_buckets,
                        bias.max_distance
                    )
                }
            }
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

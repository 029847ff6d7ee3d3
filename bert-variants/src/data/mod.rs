//! From text on disk to training batches.

/// One batch of token sequences, without padding.
///
/// Sequences lie end to end, as in [`candle_rope_attn::Sequences::CuSeqlens`]. Attention
/// stays inside a sequence, and positions restart at 0 in each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids `[tokens]`, after masking.
    pub input_ids: Vec<u32>,
    /// Where each sequence begins, ending with `tokens`.
    pub cu_seqlens: Vec<usize>,
    /// Indices into `input_ids` whose output predicts a label, increasing.
    pub label_positions: Vec<u32>,
    /// The token id to predict at each of `label_positions`.
    pub labels: Vec<u32>,
}

/// What the model learns to predict.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// Masked language modelling (Devlin et al. 2018, section 3.1): bidirectional attention.
    Mlm,
    /// Causal language modelling: each token predicts the next, causal attention.
    Clm,
}

//! Where the rows of a call's tensors lie, and how they group into sequences.

use candle_core::{Layout, Result, bail};

use crate::spec::Sequences;

/// [`Sequences`] that fit the tensors of a call.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    pub sequences: Sequences,
    /// Number of sequences.
    pub count: usize,
    /// Rows of the longest sequence.
    pub seqlen: usize,
    /// Rows of all sequences.
    pub total_tokens: usize,
}

/// One sequence of a [`Batch`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sequence {
    pub index: usize,
    /// Its first row in `[total_tokens, ..]` tensors; 0 where it has a batch row to itself.
    pub first_row: usize,
    pub len: usize,
}

impl Batch {
    /// Checks `sequences` against the token axes of the tensors: `[batch, seqlen]`, or
    /// `[total_tokens]` with [`Sequences::CuSeqlens`].
    pub fn new(op: &str, sequences: &Sequences, token_dims: &[usize]) -> Result<Self> {
        match (sequences, token_dims) {
            (Sequences::CuSeqlens(bounds), &[total_tokens]) => {
                let valid = bounds.first() == Some(&0)
                    && bounds.last() == Some(&total_tokens)
                    && bounds.is_sorted();
                if !valid {
                    bail!(
                        "{op}: cu_seqlens must start with 0, not decrease, and end with the {total_tokens} tokens of the input, got {}",
                        shorten(bounds)
                    )
                }
                let lens = bounds.windows(2).map(|b| b[1] - b[0]);
                Ok(Self {
                    sequences: sequences.clone(),
                    count: bounds.len() - 1,
                    seqlen: lens.max().unwrap_or(0),
                    total_tokens,
                })
            }
            (
                Sequences::Dense | Sequences::KeyLens(_) | Sequences::KeyMask(_),
                &[count, seqlen],
            ) => {
                match sequences {
                    Sequences::KeyLens(lens)
                        if lens.len() != count || lens.iter().any(|&len| len > seqlen) =>
                    {
                        bail!(
                            "{op}: KeyLens needs {count} lengths (one a batch row) of at most {seqlen} tokens, got {}",
                            shorten(lens)
                        )
                    }
                    Sequences::KeyMask(mask) if mask.len() != count * seqlen => bail!(
                        "{op}: KeyMask needs batch * seqlen = {count} * {seqlen} = {} entries, got {}",
                        count * seqlen,
                        mask.len()
                    ),
                    _ => {}
                }
                Ok(Self {
                    sequences: sequences.clone(),
                    count,
                    seqlen,
                    total_tokens: count * seqlen,
                })
            }
            (Sequences::CuSeqlens(_), _) => bail!(
                "{op}: with CuSeqlens the input has one token axis [total_tokens, ..], got {token_dims:?}; flatten batch and seqlen into one axis"
            ),
            _ => bail!(
                "{op}: the input needs two token axes [batch, seqlen, ..], got {token_dims:?}; unsqueeze a batch axis, or describe the tokens by CuSeqlens"
            ),
        }
    }

    /// The sequences in order.
    pub fn iter(&self) -> impl Iterator<Item = Sequence> + '_ {
        (0..self.count).map(|index| match &self.sequences {
            Sequences::CuSeqlens(bounds) => Sequence {
                index,
                first_row: bounds[index],
                len: bounds[index + 1] - bounds[index],
            },
            _ => Sequence {
                index,
                first_row: 0,
                len: self.seqlen,
            },
        })
    }

    /// Positions of the keys that take part, ascending.
    pub fn key_positions(&self, sequence: Sequence) -> Vec<usize> {
        match &self.sequences {
            Sequences::Dense | Sequences::CuSeqlens(_) => (0..sequence.len).collect(),
            Sequences::KeyLens(lens) => (0..lens[sequence.index]).collect(),
            Sequences::KeyMask(mask) => {
                let mask = &mask[sequence.index * self.seqlen..][..self.seqlen];
                (0..self.seqlen).filter(|&key| mask[key]).collect()
            }
        }
    }

    /// Shape of the log-sum-exp of a call: `[batch, num_heads, seqlen]`, or
    /// `[num_heads, total_tokens]` with [`Sequences::CuSeqlens`].
    pub fn lse_shape(&self, num_heads: usize) -> Vec<usize> {
        match self.sequences {
            Sequences::CuSeqlens(_) => vec![num_heads, self.total_tokens],
            _ => vec![self.count, num_heads, self.seqlen],
        }
    }

    /// Where the entries of a head lie there; those of a sequence are contiguous.
    pub fn lse_view(&self, num_heads: usize) -> View {
        let (batch_stride, head_stride) = match self.sequences {
            Sequences::CuSeqlens(_) => (0, self.total_tokens),
            _ => (num_heads * self.seqlen, self.seqlen),
        };
        View {
            start: 0,
            batch_stride,
            row_stride: 1,
            head_stride,
        }
    }
}

/// Where the rows of a `[batch, seqlen, num_heads, head_dim]` or
/// `[total_tokens, num_heads, head_dim]` tensor lie. Strides count elements; the last axis is
/// contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    pub start: usize,
    /// 0 without a batch axis.
    pub batch_stride: usize,
    pub row_stride: usize,
    pub head_stride: usize,
}

impl View {
    /// The rows of a tensor of that shape.
    pub fn new(layout: &Layout) -> Self {
        Self::from_strides(layout.start_offset(), layout.stride())
    }

    /// The rows of q, k and v in a packed tensor, which has an axis of 3 before the heads.
    fn unpack(layout: &Layout) -> [Self; 3] {
        let mut strides = layout.stride().to_vec();
        let part_stride = strides.remove(strides.len() - 3);
        [0, 1, 2]
            .map(|part| Self::from_strides(layout.start_offset() + part * part_stride, &strides))
    }

    fn from_strides(start: usize, strides: &[usize]) -> Self {
        let [batch @ .., row_stride, head_stride, _] = strides else {
            unreachable!("the rank was checked");
        };
        Self {
            start,
            batch_stride: batch.first().copied().unwrap_or(0),
            row_stride: *row_stride,
            head_stride: *head_stride,
        }
    }

    /// Index of a row's first element.
    pub fn row(&self, sequence: Sequence, row: usize, head: usize) -> usize {
        self.start
            + sequence.index * self.batch_stride
            + (sequence.first_row + row) * self.row_stride
            + head * self.head_stride
    }
}

/// Which input has q, k and v, and where: three tensors, or one packed.
pub(crate) fn qkv_views(layouts: &[&Layout]) -> [(usize, View); 3] {
    match layouts {
        [packed] => View::unpack(packed).map(|view| (0, view)),
        _ => [0, 1, 2].map(|input| (input, View::new(layouts[input]))),
    }
}

/// The list, or its beginning when it is long.
fn shorten(list: &[usize]) -> String {
    match list {
        [head @ .., _] if head.len() >= 8 => {
            format!("{:?}... ({} entries)", &list[..8], list.len())
        }
        _ => format!("{list:?}"),
    }
}

//! Batches to measure with.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Error, Result, ensure};
use rand::{Rng, SeedableRng, seq::index};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, LogNormal};

use crate::data::{Batch, Data, DataConfig, Objective, TokenDataset};
use crate::tokenizer::SpecialTokens;

/// Shape of the lognormal distribution of lengths: two thirds are within a factor of e.
const LENGTH_DEVIATION: f64 = 1.0;
/// `[CLS]`, a token and `[SEP]`.
const MIN_SEQLEN: usize = 3;

/// Which tokens to measure with.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Tokens")]
pub struct InputConfig {
    /// Batches to measure, as sequences times their most tokens.
    #[arg(long, value_name = "BATCHxSEQLEN", num_args = 1.., value_delimiter = ',', default_value = "256x128,64x512,16x2048,4x8192")]
    pub shapes: Vec<Shape>,
    /// Masked (mlm) or causal (clm) language modelling.
    #[arg(long, value_enum, default_value_t = Objective::Mlm)]
    pub objective: Objective,
    /// Share of tokens to predict, for masked language modelling.
    #[arg(long, default_value_t = 0.15)]
    pub mask_rate: f64,
    /// Tokens of the vocabulary, unless --tokenizer says so.
    #[arg(long, default_value_t = 30_522)]
    pub vocab_size: usize,
    /// Text to measure with, each sequence the beginning of a document: files, folders, or
    /// `hf://datasets/OWNER/NAME[@REVISION][/PATH]`. Batches are measured as they are, without
    /// padding, and padded. Without, tokens are random.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub data: Vec<String>,
    /// JSON field or Parquet column that holds the text.
    #[arg(long, default_value_t = DataConfig::default().text_field)]
    pub text_field: String,
    /// vocab.txt, tokenizer.json or model directory. Without, a WordPiece vocabulary is trained.
    #[arg(long, value_name = "PATH", requires = "data")]
    pub tokenizer: Option<PathBuf>,
    /// Folder for tokenised text [default: bert-variants in the user's cache folder]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Random tokens in sequences of lognormal lengths with this median (sigma 1), cut to the
    /// seqlen, measured without padding and padded. Without, all are as long as the seqlen.
    #[arg(long, value_name = "TOKENS", conflicts_with = "data")]
    pub median_length: Option<usize>,
    /// Seed of weights and tokens.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Size of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Most tokens of a sequence.
    pub seqlen: usize,
}

impl FromStr for Shape {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = |part: &str| part.parse().ok().filter(|size| *size > 0);
        let shape = text.split_once('x').and_then(|(batch, seqlen)| {
            Some(Self {
                batch: parse(batch)?,
                seqlen: parse(seqlen)?,
            })
        });
        shape.context("expected BATCHxSEQLEN, such as 64x512")
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.batch, self.seqlen)
    }
}

impl InputConfig {
    pub(super) fn validate(&self) -> Result<()> {
        let Self {
            shapes,
            mask_rate,
            vocab_size,
            median_length,
            ..
        } = self;
        for shape in shapes {
            ensure!(
                shape.seqlen >= MIN_SEQLEN,
                "--shapes: sequences must have at least {MIN_SEQLEN} tokens, got {shape}"
            );
        }
        ensure!(
            *mask_rate > 0.0 && *mask_rate <= 1.0,
            "--mask-rate must be above 0 and at most 1, got {mask_rate}"
        );
        ensure!(
            (1..=u32::MAX as usize).contains(vocab_size),
            "--vocab-size must be at least 1 and fit 32 bits, got {vocab_size}"
        );
        ensure!(
            *median_length != Some(0),
            "--median-length must be at least 1, got 0"
        );
        Ok(())
    }
}

/// Where sequences come from.
enum Source {
    /// Random tokens, all sequences of full length.
    Full,
    /// Random tokens, lengths of this distribution.
    Ragged(LogNormal<f64>),
    /// Beginnings of documents.
    Text(Arc<TokenDataset>, SpecialTokens),
}

/// Makes batches, each from a seed.
pub(super) struct Input<'a> {
    config: &'a InputConfig,
    source: Source,
    /// Number of token ids.
    pub vocab_size: usize,
}

impl<'a> Input<'a> {
    /// # Errors
    /// As [`Data::open`].
    pub fn open(config: &'a InputConfig) -> Result<Self> {
        let mut vocab_size = config.vocab_size;
        let source = if let Some(median) = config.median_length {
            Source::Ragged(LogNormal::new((median as f64).ln(), LENGTH_DEVIATION)?)
        } else if config.data.is_empty() {
            Source::Full
        } else {
            let data = Data::open(&DataConfig {
                sources: config.data.clone(),
                // Else a part would be held out.
                validation: config.data.clone(),
                text_field: config.text_field.clone(),
                tokenizer: config.tokenizer.clone(),
                vocab_size: Some(vocab_size),
                cache_dir: config.cache_dir.clone(),
                ..DataConfig::default()
            })?;
            tracing::info!("measuring on {}", data.train.description());
            vocab_size = data.tokenizer.vocab_size();
            Source::Text(data.train, data.tokenizer.special())
        };
        Ok(Self {
            config,
            source,
            vocab_size,
        })
    }

    /// Whether sequences are of several lengths.
    pub fn is_ragged(&self) -> bool {
        !matches!(self.source, Source::Full)
    }

    /// Batches that differ, the same in every call.
    pub fn batches(&self, shape: Shape, count: usize) -> Vec<Batch> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.config.seed);
        (0..count).map(|_| self.batch(shape, &mut rng)).collect()
    }

    fn batch(&self, shape: Shape, rng: &mut ChaCha8Rng) -> Batch {
        let mut input_ids = Vec::new();
        let mut cu_seqlens = vec![0];
        for _ in 0..shape.batch {
            self.push_sequence(shape.seqlen, rng, &mut input_ids);
            cu_seqlens.push(input_ids.len());
        }
        // What stands at a label's place makes no difference to the time, so it stays.
        let (label_positions, labels) = match self.config.objective {
            Objective::Mlm => {
                let labels = (self.config.mask_rate * input_ids.len() as f64).round() as usize;
                let mut chosen = index::sample(rng, input_ids.len(), labels.max(1)).into_vec();
                chosen.sort_unstable();
                let labels = chosen.iter().map(|&i| input_ids[i]).collect();
                (chosen, labels)
            }
            Objective::Clm => {
                let sequences = cu_seqlens.windows(2);
                let chosen: Vec<usize> = sequences.flat_map(|b| b[0]..b[1] - 1).collect();
                let labels = chosen.iter().map(|&i| input_ids[i + 1]).collect();
                (chosen, labels)
            }
        };
        Batch {
            input_ids,
            cu_seqlens,
            label_positions: label_positions.into_iter().map(|i| i as u32).collect(),
            labels,
        }
    }

    fn push_sequence(&self, seqlen: usize, rng: &mut ChaCha8Rng, ids: &mut Vec<u32>) {
        let len = match &self.source {
            Source::Full => seqlen,
            Source::Ragged(lengths) => (lengths.sample(rng) as usize).clamp(2, seqlen),
            Source::Text(dataset, special) => {
                let documents = dataset.documents();
                let document = &documents[rng.random_range(0..documents.len())];
                let end = document.end.min(document.start + seqlen as u64 - 2);
                ids.push(special.cls);
                dataset.read(&(document.start..end), ids);
                ids.push(special.sep);
                return;
            }
        };
        ids.extend((0..len).map(|_| rng.random_range(0..self.vocab_size as u32)));
    }
}

/// The same batch with every sequence filled up to `seqlen` tokens. What is filled in is a sequence
/// of its own, so that results stay the same: attention within it costs what it costs among so
/// many tokens, less than where all tokens of a row attend to it.
pub(super) fn pad(batch: &Batch, seqlen: usize, pad_token_id: u32) -> Batch {
    let mut padded = Batch {
        input_ids: Vec::new(),
        cu_seqlens: vec![0],
        label_positions: Vec::new(),
        labels: batch.labels.clone(),
    };
    let mut positions = batch.label_positions.iter().peekable();
    for bounds in batch.cu_seqlens.windows(2) {
        let start = padded.input_ids.len();
        while let Some(position) = positions.next_if(|p| (**p as usize) < bounds[1]) {
            let position = start + *position as usize - bounds[0];
            padded.label_positions.push(position as u32);
        }
        padded
            .input_ids
            .extend(&batch.input_ids[bounds[0]..bounds[1]]);
        padded.cu_seqlens.push(padded.input_ids.len());
        if padded.input_ids.len() < start + seqlen {
            padded.input_ids.resize(start + seqlen, pad_token_id);
            padded.cu_seqlens.push(padded.input_ids.len());
        }
    }
    padded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_moves_sequences_and_labels() {
        let batch = Batch {
            input_ids: vec![5, 6, 7, 8, 9, 10],
            cu_seqlens: vec![0, 2, 6],
            label_positions: vec![1, 2, 5],
            labels: vec![6, 7, 10],
        };
        let expected = Batch {
            input_ids: vec![5, 6, 0, 0, 7, 8, 9, 10],
            cu_seqlens: vec![0, 2, 4, 8],
            label_positions: vec![1, 4, 7],
            labels: vec![6, 7, 10],
        };
        assert_eq!(pad(&batch, 4, 0), expected);
    }

    #[test]
    fn shapes_are_read() {
        let shape = Shape {
            batch: 64,
            seqlen: 512,
        };
        assert_eq!("64x512".parse::<Shape>().unwrap(), shape);
        for wrong in ["64", "64x", "64x0", "64x-1", "64x512x1"] {
            assert!(wrong.parse::<Shape>().is_err(), "{wrong}");
        }
    }
}

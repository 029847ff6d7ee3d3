//! From text on disk to training batches.
//!
//! [`Sources`] (files, folders, the Hub, the embedded [`Corpus`]) are tokenised once into a
//! [`TokenDataset`] in the cache, out of which [`Batches`] are packed and masked. [`Data::open`]
//! does it all from a [`DataConfig`].

mod batches;
mod corpus;
mod dataset;
mod hub;
mod permutation;
mod pipeline;
mod prefetch;
mod readers;
mod sources;
mod token_file;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub(crate) use batches::check_lengths;
pub use batches::{BatchConfig, Batches};
pub use corpus::Corpus;
pub use dataset::{TokenDataset, train_tokenizer};
pub use prefetch::Prefetch;
pub use readers::{Emit, Passage};
pub use sources::{FileSources, Sources};

use crate::tokenizer::Tokenizer;

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

/// Which text to train and evaluate on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Data")]
pub struct DataConfig {
    /// Text to train on: files, folders, or `hf://datasets/OWNER/NAME[@REVISION][/PATH]`. Without,
    /// the embedded corpus.
    #[arg(long, visible_alias = "data", value_name = "PATH", num_args = 1..)]
    pub sources: Vec<String>,
    /// Text to evaluate on, named in the same way. Without, a part of --sources is held out.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub validation: Vec<String>,
    /// Share of the tokens to hold out where there is no --validation.
    #[arg(long, default_value_t = DataConfig::default().held_out)]
    pub held_out: f64,
    /// JSON field or Parquet column that holds the text.
    #[arg(long, default_value_t = DataConfig::default().text_field)]
    pub text_field: String,
    /// vocab.txt, tokenizer.json or model directory. Without, a WordPiece vocabulary is trained.
    #[arg(long, value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
    /// Pieces of a trained vocabulary [default: 1500 for the embedded corpus, else 16000]
    #[arg(long)]
    pub vocab_size: Option<usize>,
    /// Whether to lower-case text [default: as the tokenizer's files say; true where trained]
    #[arg(long)]
    pub lowercase: Option<bool>,
    /// Folder for tokenised text [default: bert-variants in the user's cache folder]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Tales of the embedded corpus.
    #[arg(long, default_value_t = DataConfig::default().corpus_documents)]
    pub corpus_documents: usize,
    /// Seed of the embedded corpus.
    #[arg(long, default_value_t = DataConfig::default().corpus_seed)]
    pub corpus_seed: u64,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            sources: Vec::new(),
            validation: Vec::new(),
            held_out: 0.02,
            text_field: "text".into(),
            tokenizer: None,
            vocab_size: None,
            lowercase: None,
            cache_dir: None,
            corpus_documents: 4000,
            corpus_seed: 0,
        }
    }
}

/// Text to train and evaluate on, as tokens.
#[derive(Clone)]
pub struct Data {
    /// The tokenizer that made the tokens.
    pub tokenizer: Tokenizer,
    /// Text to train on.
    pub train: Arc<TokenDataset>,
    /// Held-out text.
    pub validation: Arc<TokenDataset>,
}

impl Data {
    /// Reads, tokenises and splits text, or finds it in the cache.
    ///
    /// # Errors
    /// When a source, the tokenizer or the cache cannot be read or written, or holds too little
    /// text.
    pub fn open(config: &DataConfig) -> Result<Self> {
        let find = |names: &[String]| Sources::find(names, &config.text_field);
        let embedded = config.sources.is_empty();
        let sources = if embedded {
            Sources::Corpus(Corpus {
                documents: config.corpus_documents,
                seed: config.corpus_seed,
            })
        } else {
            find(&config.sources)?
        };
        let cache_dir = config.cache_dir()?;
        let tokenizer = match &config.tokenizer {
            Some(path) => Tokenizer::load(path, config.lowercase)?,
            None => {
                let vocab_size = config
                    .vocab_size
                    .unwrap_or(if embedded { 1500 } else { 16_000 });
                let lowercase = config.lowercase.unwrap_or(true);
                train_tokenizer(&sources, vocab_size, lowercase, &cache_dir)?
            }
        };
        let open = |sources| TokenDataset::open_or_build(sources, &tokenizer, &cache_dir);
        let (train, validation) = if config.validation.is_empty() {
            open(&sources)?.split(config.held_out)?
        } else {
            (open(&sources)?, open(&find(&config.validation)?)?)
        };
        Ok(Self {
            train: Arc::new(train),
            validation: Arc::new(validation),
            tokenizer,
        })
    }
}

impl DataConfig {
    fn cache_dir(&self) -> Result<PathBuf> {
        let set = |variable| std::env::var_os(variable).filter(|value| !value.is_empty());
        self.cache_dir
            .clone()
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| PathBuf::from(dir).join("bert-variants")))
            .or_else(|| set("HOME").map(|dir| PathBuf::from(dir).join(".cache/bert-variants")))
            .context("found no folder for the cache: set cache_dir, or the variable HOME")
    }
}

//! Tokenised documents: built once, cached, and split into training and held-out text.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

use super::pipeline;
use super::sources::Sources;
use super::token_file::{TokenFile, TokenWriter};
use crate::tokenizer::{Tokenizer, WordCounts};

/// Seed of the choice of held-out documents.
const HELD_OUT_SEED: u64 = 0x4845_4c44; // "HELD"

/// Tokenised documents on disk, or a part of them.
#[derive(Debug, Clone)]
pub struct TokenDataset {
    file: Arc<TokenFile>,
    documents: Vec<Range<u64>>,
    sources: String,
    /// Fingerprint of the tokenizer.
    tokenizer: u128,
}

impl TokenDataset {
    /// Opens the tokens of `sources` in `cache_dir`, and tokenises them first where they are not
    /// there yet.
    ///
    /// The cache is found again by what it was made from: path, size and modification time of
    /// every file, the text field, and the tokenizer. A damaged cache is reported as a warning
    /// and made anew.
    ///
    /// # Errors
    /// When a source cannot be read (see [`Sources::read`]), or the cache not be written.
    pub fn open_or_build(
        sources: &Sources,
        tokenizer: &Tokenizer,
        cache_dir: &Path,
    ) -> Result<Self> {
        let made_from = format!(
            "{}tokenizer {:032x}",
            sources.identity()?,
            tokenizer.fingerprint()
        );
        let key = xxh3_128(made_from.as_bytes());
        let path = cache_dir.join(format!("tokens-{key:032x}.bin"));
        let file = match path.exists().then(|| TokenFile::open(&path, key)) {
            Some(Ok(file)) => file,
            missing_or_damaged => {
                if let Some(Err(error)) = missing_or_damaged {
                    tracing::warn!("{error:#}; tokenising {sources} again");
                }
                tokenize(sources, tokenizer, &path, key)?;
                TokenFile::open(&path, key)?
            }
        };
        Ok(Self {
            documents: file.documents(),
            file: Arc::new(file),
            sources: sources.to_string(),
            tokenizer: tokenizer.fingerprint(),
        })
    }

    /// Splits off documents that hold about `fraction` of the tokens, and returns the rest and
    /// the part held out.
    ///
    /// Documents are held out in the order of a hash of their tokens until they reach
    /// `fraction`; equal documents go together. Documents that alone are longer than that are
    /// passed over. Where that leaves none, such as of a single book, the last `fraction` of
    /// every document is held out instead.
    ///
    /// # Errors
    /// When `fraction` is not between 0 and 1, or a part would be empty.
    pub fn split(&self, fraction: f64) -> Result<(Self, Self)> {
        ensure!(
            fraction > 0.0 && fraction < 1.0,
            "the held-out fraction must be between 0 and 1, got {fraction}"
        );
        let budget = (self.tokens() as f64 * fraction) as u64;
        let (train, held_out) = match self.split_documents(budget) {
            (_, held_out) if held_out.is_empty() => self.split_tails(fraction),
            parts => parts,
        };
        ensure!(
            !train.is_empty() && !held_out.is_empty(),
            "{}: too little text to hold out a fraction of {fraction}; pass a validation source",
            self.description()
        );
        Ok((self.part(train), self.part(held_out)))
    }

    fn split_documents(&self, budget: u64) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        let hash = |document| xxh3_64_with_seed(self.file.bytes(document), HELD_OUT_SEED);
        let mut order: Vec<(u64, usize)> = self.documents.iter().map(hash).zip(0..).collect();
        order.sort_unstable();
        let mut is_held_out = vec![false; self.documents.len()];
        let mut tokens = 0;
        for (_, index) in order {
            let len = length(&self.documents[index]);
            if tokens < budget && len <= budget {
                is_held_out[index] = true;
                tokens += len;
            }
        }
        let with = |part: bool| {
            let documents = self.documents.iter().zip(&is_held_out);
            documents
                .filter(|(_, held_out)| **held_out == part)
                .map(|(d, _)| d.clone())
                .collect()
        };
        (with(false), with(true))
    }

    fn split_tails(&self, fraction: f64) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        let cuts = self.documents.iter().map(|document| {
            let cut = document.end - (length(document) as f64 * fraction).ceil() as u64;
            (document.start..cut, cut..document.end)
        });
        let (mut train, mut held_out): (Vec<_>, Vec<_>) = cuts.unzip();
        train.retain(|document| !document.is_empty());
        held_out.retain(|document| !document.is_empty());
        (train, held_out)
    }

    /// The first `most` pieces of `piece` tokens: the whole ones that each document begins with.
    ///
    /// # Errors
    /// When no document has `piece` tokens.
    pub fn whole_pieces(&self, piece: u64, most: u64) -> Result<Self> {
        let mut left = most;
        let mut documents = Vec::new();
        for document in &self.documents {
            let pieces = (length(document) / piece).min(left);
            if pieces > 0 {
                documents.push(document.start..document.start + pieces * piece);
                left -= pieces;
            }
        }
        ensure!(
            !documents.is_empty(),
            "{}: no document has {piece} tokens, the longest has {}; pass longer documents, or evaluate on shorter inputs",
            self.description(),
            self.documents.iter().map(length).max().unwrap_or(0)
        );
        Ok(self.part(documents))
    }

    fn part(&self, documents: Vec<Range<u64>>) -> Self {
        Self {
            file: self.file.clone(),
            documents,
            sources: self.sources.clone(),
            tokenizer: self.tokenizer,
        }
    }

    /// Where the tokens of each document lie among all tokens of the file.
    pub fn documents(&self) -> &[Range<u64>] {
        &self.documents
    }

    /// Number of tokens, `[CLS]` and `[SEP]` not counted.
    pub fn tokens(&self) -> u64 {
        self.documents.iter().map(length).sum()
    }

    /// Appends the token ids in `range` to `ids`.
    ///
    /// # Panics
    /// When `range` is not inside of one of [`TokenDataset::documents`].
    pub fn read(&self, range: &Range<u64>, ids: &mut Vec<u32>) {
        self.file.read(range, ids);
    }

    /// Sources, documents, tokens and checksum, as text for the record of a run. The checksum is
    /// that of all tokens of the sources, before a split.
    pub fn description(&self) -> String {
        format!(
            "{}: {} documents, {} tokens, checksum {:016x}",
            self.sources,
            self.documents.len(),
            self.tokens(),
            self.file.checksum()
        )
    }

    /// # Errors
    /// When the tokens are not those of `tokenizer`.
    pub(crate) fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<()> {
        ensure!(
            self.tokenizer == tokenizer.fingerprint(),
            "{}: tokenised with another tokenizer",
            self.description()
        );
        Ok(())
    }
}

fn length(range: &Range<u64>) -> u64 {
    range.end - range.start
}

fn tokenize(sources: &Sources, tokenizer: &Tokenizer, path: &Path, key: u128) -> Result<()> {
    let mut writer = TokenWriter::create(path, key, tokenizer.vocab_size())?;
    pipeline::run(
        sources,
        "tokenising",
        |text| tokenizer.encode(text),
        |passage, ids| {
            writer.push(&ids)?;
            if passage.ends_document {
                writer.end_document();
            }
            Ok(())
        },
    )?;
    writer.finish()
}

/// A WordPiece tokenizer with a vocabulary trained on `sources`, found again in `cache_dir` as
/// the tokens are.
///
/// # Errors
/// When a source cannot be read, the cache not be written, or the vocabulary not be trained.
pub fn train_tokenizer(
    sources: &Sources,
    vocab_size: usize,
    lowercase: bool,
    cache_dir: &Path,
) -> Result<Tokenizer> {
    let identity = sources.identity()?;
    let key = xxh3_128(format!("{identity}vocabulary {vocab_size} {lowercase}").as_bytes());
    let path = cache_dir.join(format!("vocab-{key:032x}.txt"));
    if !path.is_file() {
        let mut counts = WordCounts::new(lowercase);
        let counter = WordCounts::new(lowercase);
        pipeline::run(
            sources,
            "counting words",
            |text| counter.count(text),
            |_, words| {
                counts.add(words);
                Ok(())
            },
        )?;
        let vocab = counts.train(vocab_size)?;
        fs::create_dir_all(cache_dir)
            .with_context(|| format!("cannot make the cache {}", cache_dir.display()))?;
        crate::record::write_atomic(&path, vocab.as_bytes())?;
    }
    Tokenizer::load(&path, Some(lowercase))
}

//! Batches out of tokenised documents, each a pure function of the seed and its index.
//!
//! **Packing.** Documents are cut, in order, into chunks of at most `seq_len` tokens. A chunk
//! holds one piece of a long document, or several whole or cut ones. Every piece is a sequence
//! of its own, `[CLS] … [SEP]` as BERT sees it when it is used: attention stays inside and
//! positions restart. A document goes on in the next chunk, but is not cut for less than
//! [`MIN_CUT`] tokens: such room stays empty.
//!
//! **Order.** The chunks of an epoch come in a pseudorandom permutation of its own.
//!
//! **Masks** (Devlin et al. 2018, section 3.1). Whether and how a token is masked depends on the
//! seed, the epoch and the token's place among the tokens of the data, and on nothing else:
//! batches of any size, chunks of any length and every variant see the same masks, and masks
//! change from epoch to epoch.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::permutation::Permutation;
use super::prefetch::Prefetch;
use super::{Batch, Objective, TokenDataset};
use crate::tokenizer::{SpecialTokens, Tokenizer};

/// Fewest tokens of a document, of those left, that are put into the rest of a chunk.
const MIN_CUT: u64 = 8;
/// Smallest `seq_len`: a piece of `MIN_CUT` tokens with `[CLS]` and `[SEP]`.
const MIN_SEQ_LEN: usize = MIN_CUT as usize + 2;
/// Seed of the masks in evaluations, the same for all runs.
const EVALUATION_SEED: u64 = 0x4556_414c; // "EVAL"
/// Batches that are prepared ahead.
const PREFETCH: usize = 4;

/// How batches are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// What the labels are.
    pub objective: Objective,
    /// Most tokens of a chunk and so of a sequence, `[CLS]` and `[SEP]` counted.
    pub seq_len: usize,
    /// Chunks of a batch.
    pub batch_size: usize,
    /// Share of tokens that masked language modelling predicts, 0 to 1.
    pub mask_rate: f64,
    /// Seed of order and masks; evaluations have their own.
    pub seed: u64,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self {
            objective: Objective::Mlm,
            seq_len: 128,
            batch_size: 32,
            mask_rate: 0.15,
            seed: 0,
        }
    }
}

impl BatchConfig {
    /// # Errors
    /// Names the setting, its value and the values allowed.
    pub fn validate(&self) -> Result<()> {
        ensure!(
            self.seq_len >= MIN_SEQ_LEN,
            "seq_len must be at least {MIN_SEQ_LEN}, got {}",
            self.seq_len
        );
        ensure!(self.batch_size > 0, "batch_size must be at least 1, got 0");
        ensure!(
            self.mask_rate > 0.0 && self.mask_rate <= 1.0,
            "mask_rate must be above 0 and at most 1, got {}",
            self.mask_rate
        );
        Ok(())
    }
}

/// The batches of a data set.
#[derive(Debug, Clone)]
pub struct Batches {
    dataset: Arc<TokenDataset>,
    config: BatchConfig,
    /// Where each chunk begins.
    chunks: Vec<Cursor>,
    /// Chunks of an evaluation; training goes on and on.
    limit: Option<u64>,
    special: SpecialTokens,
    masking: Masking,
}

impl Batches {
    /// Endless batches for training: all chunks in a new order in every epoch.
    ///
    /// # Errors
    /// When a setting is out of range, or `dataset` was not made with `tokenizer`.
    pub fn training(
        dataset: Arc<TokenDataset>,
        tokenizer: &Tokenizer,
        config: BatchConfig,
    ) -> Result<Self> {
        config.validate()?;
        dataset.check_tokenizer(tokenizer)?;
        let chunks = pack(dataset.documents(), config.seq_len);
        ensure!(
            !chunks.is_empty(),
            "{}: no tokens to make batches of",
            dataset.description()
        );
        Ok(Self {
            masking: Masking::new(&config, tokenizer),
            special: tokenizer.special(),
            limit: None,
            dataset,
            config,
            chunks,
        })
    }

    /// Batches for evaluation: the first `max_chunks` chunks in order, with masks that do not
    /// depend on the seed. The last batch may be smaller.
    ///
    /// # Errors
    /// As [`Batches::training`], and when `max_chunks` is 0.
    pub fn evaluation(
        dataset: Arc<TokenDataset>,
        tokenizer: &Tokenizer,
        config: BatchConfig,
        max_chunks: usize,
    ) -> Result<Self> {
        ensure!(
            max_chunks > 0,
            "an evaluation needs at least one sequence, got 0"
        );
        let config = BatchConfig {
            seed: EVALUATION_SEED,
            ..config
        };
        let mut batches = Self::training(dataset, tokenizer, config)?;
        batches.limit = Some(batches.chunks.len().min(max_chunks) as u64);
        Ok(batches)
    }

    /// Evaluations that differ in the length of their sequences alone: of `config.seq_len`, then
    /// of each of `longer`, which are multiples of the one before. About `max_chunks` sequences of
    /// `config.seq_len`.
    ///
    /// A longer sequence joins whole sequences of `config.seq_len`; as one `[CLS]` and `[SEP]` are
    /// enough for it, it stays two tokens below its length for each that it joins but the first.
    /// So all evaluations have the same text, that of documents which fill the longest sequence,
    /// the same labels, and sequences of that length only. Batches hold as much text as those of
    /// `config`.
    ///
    /// # Errors
    /// As [`Batches::evaluation`], and when a length is no multiple of the one before, or no
    /// document is long enough.
    pub fn evaluations_by_length(
        dataset: &TokenDataset,
        tokenizer: &Tokenizer,
        config: &BatchConfig,
        longer: &[usize],
        max_chunks: usize,
    ) -> Result<Vec<(usize, Self)>> {
        config.validate()?;
        check_lengths(config.seq_len, longer)?;
        let text = config.seq_len - 2;
        let longest = longer.last().map_or(1, |longest| longest / config.seq_len);
        let sequences = (max_chunks / longest).max(1);
        let dataset = Arc::new(dataset.whole_pieces((longest * text) as u64, sequences as u64)?);
        let lengths = std::iter::once(&config.seq_len).chain(longer);
        lengths
            .map(|&length| {
                let joined = length / config.seq_len;
                let config = BatchConfig {
                    seq_len: joined * text + 2,
                    batch_size: (config.batch_size / joined).max(1),
                    ..config.clone()
                };
                let batches = Self::evaluation(dataset.clone(), tokenizer, config, usize::MAX)?;
                Ok((length, batches))
            })
            .collect()
    }

    /// All batches of an evaluation, or of the first epoch of training.
    ///
    /// # Errors
    /// As [`Batches::get`].
    pub fn collect(&self) -> Result<Vec<Batch>> {
        (0..self.num_batches())
            .map(|index| self.get(index))
            .collect()
    }

    /// Number of chunks of the data set.
    pub fn num_chunks(&self) -> usize {
        self.chunks.len()
    }

    /// Number of batches of an evaluation, or of an epoch of training, the last one begun
    /// included.
    pub fn num_batches(&self) -> u64 {
        let chunks = self.limit.unwrap_or(self.chunks.len() as u64);
        chunks.div_ceil(self.config.batch_size as u64)
    }

    /// Batch number `index`, from 0.
    ///
    /// # Errors
    /// When `index` is behind the end of an evaluation, or the batch has nothing to predict,
    /// because all its tokens are `[UNK]`.
    pub fn get(&self, index: u64) -> Result<Batch> {
        let batch_size = self.config.batch_size as u64;
        let samples = index * batch_size..(index + 1) * batch_size;
        let samples = match self.limit {
            None => samples,
            Some(limit) => {
                ensure!(
                    index < self.num_batches(),
                    "got batch {index} of an evaluation of {} batches",
                    self.num_batches()
                );
                samples.start..samples.end.min(limit)
            }
        };
        let mut batch = BatchBuilder::new();
        for sample in samples {
            let (epoch, chunk) = self.chunk_of(sample);
            fill(
                self.dataset.documents(),
                self.chunks[chunk],
                self.config.seq_len,
                |piece| self.push(&mut batch, piece, epoch),
            );
        }
        let batch = batch.finish();
        ensure!(
            !batch.labels.is_empty(),
            "{}: batch {index} has no token to predict, all are special or unknown; does the \
             tokenizer suit the text?",
            self.dataset.description()
        );
        Ok(batch)
    }

    /// All batches from `start` on, prepared in a background thread.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn prefetch(self: &Arc<Self>, start: u64) -> Result<Prefetch<Batch>> {
        let batches = self.clone();
        let end = self.limit.map_or(u64::MAX, |_| self.num_batches());
        Prefetch::new((start..end).map(move |index| batches.get(index)), PREFETCH)
    }

    /// Epoch and chunk of the chunk that is seen as number `sample`.
    fn chunk_of(&self, sample: u64) -> (u64, usize) {
        if self.limit.is_some() {
            return (0, sample as usize);
        }
        let chunks = self.chunks.len() as u64;
        let epoch = sample / chunks;
        let order = Permutation::new(chunks, self.config.seed, epoch);
        (epoch, order.get(sample % chunks) as usize)
    }

    fn push(&self, batch: &mut BatchBuilder, piece: Piece, epoch: u64) {
        let start = batch.begin(self.special.cls);
        self.dataset.read(&piece.tokens, &mut batch.input_ids);
        match self.config.objective {
            Objective::Mlm => self
                .masking
                .apply(batch, start + 1, piece.tokens.start, epoch),
            Objective::Clm => batch.label_next(start),
        }
        batch.end(self.special.sep);
        if self.config.objective == Objective::Clm && piece.ends_document {
            batch.label(batch.input_ids.len() - 2, self.special.sep);
        }
    }
}

/// # Errors
/// When one of `longer` is no multiple of the length before it, the first of `seq_len`.
pub(crate) fn check_lengths(seq_len: usize, longer: &[usize]) -> Result<()> {
    let mut before = seq_len;
    for &length in longer {
        ensure!(
            length > before && length.is_multiple_of(before),
            "eval_lengths must be multiples of seq_len {seq_len}, each of the one before, got {length} after {before}"
        );
        before = length;
    }
    Ok(())
}

/// A batch that is being filled.
struct BatchBuilder {
    input_ids: Vec<u32>,
    cu_seqlens: Vec<usize>,
    label_positions: Vec<u32>,
    labels: Vec<u32>,
    /// The token whose draw came nearest to being masked, masked where none is.
    nearest: Option<Nearest>,
}

#[derive(Clone, Copy)]
struct Nearest {
    draw: u32,
    position: usize,
    input: u32,
}

impl BatchBuilder {
    fn new() -> Self {
        Self {
            input_ids: Vec::new(),
            cu_seqlens: vec![0],
            label_positions: Vec::new(),
            labels: Vec::new(),
            nearest: None,
        }
    }

    /// Begins a sequence, and returns where.
    fn begin(&mut self, cls: u32) -> usize {
        self.input_ids.push(cls);
        self.input_ids.len() - 1
    }

    fn end(&mut self, sep: u32) {
        self.input_ids.push(sep);
        self.cu_seqlens.push(self.input_ids.len());
    }

    fn label(&mut self, position: usize, label: u32) {
        self.label_positions.push(position as u32);
        self.labels.push(label);
    }

    /// Every token from `start` on predicts the next.
    fn label_next(&mut self, start: usize) {
        for position in start..self.input_ids.len() - 1 {
            self.label(position, self.input_ids[position + 1]);
        }
    }

    fn finish(mut self) -> Batch {
        if let (true, Some(nearest)) = (self.labels.is_empty(), self.nearest) {
            self.label(nearest.position, self.input_ids[nearest.position]);
            self.input_ids[nearest.position] = nearest.input;
        }
        Batch {
            input_ids: self.input_ids,
            cu_seqlens: self.cu_seqlens,
            label_positions: self.label_positions,
            labels: self.labels,
        }
    }
}

/// Which tokens are masked, and what stands in their place.
#[derive(Debug, Clone)]
struct Masking {
    seed: u64,
    /// A token is masked where a draw of 32 bits is below.
    threshold: u64,
    mask: u32,
    /// Special tokens, ascending.
    special: [u32; 5],
    vocab_size: u32,
}

impl Masking {
    /// Draws for each token: whether, how, and which replacement.
    const DRAWS: u128 = 3;

    fn new(config: &BatchConfig, tokenizer: &Tokenizer) -> Self {
        Self {
            seed: config.seed,
            threshold: (config.mask_rate * (1_u64 << 32) as f64) as u64,
            mask: tokenizer.special().mask,
            special: tokenizer.special().sorted(),
            vocab_size: tokenizer.vocab_size() as u32,
        }
    }

    /// Masks the tokens of a batch from `start` on, of which the first is token `place` of the
    /// data. Special tokens, `[UNK]` among them, are never masked.
    fn apply(&self, batch: &mut BatchBuilder, start: usize, place: u64, epoch: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(epoch);
        rng.set_word_pos(place as u128 * Self::DRAWS);
        for position in start..batch.input_ids.len() {
            let [draw, how, which] = [(); 3].map(|()| rng.next_u32());
            let id = batch.input_ids[position];
            if self.special.contains(&id) {
                continue;
            }
            let input = self.input(id, how, which);
            if (draw as u64) < self.threshold {
                batch.label(position, id);
                batch.input_ids[position] = input;
            } else if batch.nearest.is_none_or(|nearest| draw < nearest.draw) {
                batch.nearest = Some(Nearest {
                    draw,
                    position,
                    input,
                });
            }
        }
    }

    /// What the model sees of a token that it predicts: 80% `[MASK]`, 10% a random token, 10%
    /// the token itself.
    fn input(&self, id: u32, how: u32, which: u32) -> u32 {
        match scale(how, 10) {
            0..8 => self.mask,
            8 => self.random_token(which),
            _ => id,
        }
    }

    /// A token that is not special.
    fn random_token(&self, draw: u32) -> u32 {
        let mut id = scale(draw, self.vocab_size - self.special.len() as u32);
        for special in self.special {
            id += (id >= special) as u32;
        }
        id
    }
}

/// A number below `n` from a draw of 32 bits.
fn scale(draw: u32, n: u32) -> u32 {
    ((draw as u64 * n as u64) >> 32) as u32
}

/// A place in the documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cursor {
    document: usize,
    /// Tokens of the document that were before.
    offset: u64,
}

/// A run of tokens of one document.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    tokens: Range<u64>,
    ends_document: bool,
}

/// Where each chunk begins.
fn pack(documents: &[Range<u64>], seq_len: usize) -> Vec<Cursor> {
    let mut chunks = Vec::new();
    let mut at = Cursor {
        document: 0,
        offset: 0,
    };
    while at.document < documents.len() {
        chunks.push(at);
        at = fill(documents, at, seq_len, |_| {});
    }
    chunks
}

/// Places the pieces of the chunk that begins at `at`, and returns where the next one begins.
fn fill(
    documents: &[Range<u64>],
    mut at: Cursor,
    seq_len: usize,
    mut place: impl FnMut(Piece),
) -> Cursor {
    let mut room = seq_len as u64;
    while let Some(document) = documents.get(at.document) {
        let start = document.start + at.offset;
        let rest = document.end - start;
        let len = rest.min(room.saturating_sub(2));
        let ends_document = len == rest;
        if len < MIN_CUT && !ends_document {
            break;
        }
        place(Piece {
            tokens: start..start + len,
            ends_document,
        });
        room -= len + 2;
        at = if ends_document {
            Cursor {
                document: at.document + 1,
                offset: 0,
            }
        } else {
            Cursor {
                offset: at.offset + len,
                ..at
            }
        };
    }
    at
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::data::{Data, DataConfig};

    /// The embedded corpus in a folder of its own.
    fn data(documents: usize) -> (tempfile::TempDir, Data) {
        let dir = tempfile::tempdir().unwrap();
        let config = DataConfig {
            corpus_documents: documents,
            vocab_size: Some(600),
            held_out: 0.1,
            cache_dir: Some(dir.path().to_path_buf()),
            ..Default::default()
        };
        let data = Data::open(&config).unwrap();
        (dir, data)
    }

    fn training(data: &Data, config: BatchConfig) -> Arc<Batches> {
        Arc::new(Batches::training(data.train.clone(), &data.tokenizer, config).unwrap())
    }

    /// The batch without masks.
    fn unmasked(batch: &Batch) -> Vec<u32> {
        let mut ids = batch.input_ids.clone();
        for (&position, &label) in batch.label_positions.iter().zip(&batch.labels) {
            ids[position as usize] = label;
        }
        ids
    }

    fn chunks(documents: &[Range<u64>], seq_len: usize) -> Vec<Vec<Piece>> {
        let chunks = pack(documents, seq_len).into_iter().map(|at| {
            let mut pieces = Vec::new();
            fill(documents, at, seq_len, |piece| pieces.push(piece));
            pieces
        });
        chunks.collect()
    }

    proptest! {
        #[test]
        fn packing_keeps_every_token_in_order_once(
            lengths in proptest::collection::vec(1_u64..200, 1..40),
            gap in 0_u64..5,
            seq_len in MIN_SEQ_LEN..150,
        ) {
            let mut start = 0;
            let documents: Vec<Range<u64>> = lengths.iter().map(|len| {
                let document = start..start + len;
                start += len + gap;
                document
            }).collect();
            let chunks = chunks(&documents, seq_len);

            let placed: Vec<u64> = chunks.iter().flatten().flat_map(|p| p.tokens.clone()).collect();
            let expected: Vec<u64> = documents.iter().cloned().flatten().collect();
            prop_assert_eq!(placed, expected);
            for pieces in &chunks {
                let len: u64 = pieces.iter().map(|p| p.tokens.end - p.tokens.start + 2).sum();
                prop_assert!(!pieces.is_empty() && len <= seq_len as u64);
                for piece in pieces {
                    let document = documents.iter().find(|d| d.contains(&piece.tokens.start));
                    let document = document.unwrap();
                    prop_assert!(piece.tokens.end <= document.end);
                    prop_assert_eq!(piece.ends_document, piece.tokens.end == document.end);
                }
            }
            for pieces in &chunks[..chunks.len() - 1] {
                let len: u64 = pieces.iter().map(|p| p.tokens.end - p.tokens.start + 2).sum();
                prop_assert!(len > seq_len as u64 - MIN_CUT - 2, "room is left for a piece");
            }
        }

        #[test]
        fn masks_hide_text_tokens_only_and_labels_restore_them(
            seed: u64,
            mask_rate in 0.001_f64..=1.0,
            seq_len in MIN_SEQ_LEN..150,
            batch_size in 1_usize..6,
            index in 0_u64..100,
        ) {
            static DATA: LazyLock<(tempfile::TempDir, Data)> = LazyLock::new(|| data(20));
            let batch = |objective| {
                let config = BatchConfig { objective, seq_len, batch_size, mask_rate, seed };
                training(&DATA.1, config).get(index).unwrap()
            };
            let (masked, plain) = (batch(Objective::Mlm), batch(Objective::Clm));
            prop_assert_eq!(unmasked(&masked), plain.input_ids);
            prop_assert_eq!(masked.cu_seqlens, plain.cu_seqlens);
            prop_assert!(!masked.labels.is_empty());
            prop_assert_eq!(masked.labels.len(), masked.label_positions.len());
            prop_assert!(masked.label_positions.is_sorted_by(|a, b| a < b));
            let special = DATA.1.tokenizer.special().sorted();
            prop_assert!(masked.labels.iter().all(|label| !special.contains(label)));
        }

        #[test]
        fn random_tokens_are_of_the_vocabulary_and_not_special(
            mut special in proptest::array::uniform5(0_u32..50),
            draw: u32,
        ) {
            special.sort_unstable();
            let masking = Masking { seed: 0, threshold: 0, mask: special[0], special, vocab_size: 50 };
            let id = masking.random_token(draw);
            prop_assert!(id < 50 && !special.contains(&id));
        }
    }

    #[test]
    fn sequences_are_pieces_of_documents_between_cls_and_sep() {
        let (_dir, data) = data(60);
        let special = data.tokenizer.special();
        for objective in [Objective::Mlm, Objective::Clm] {
            let config = BatchConfig {
                objective,
                seq_len: 64,
                batch_size: 5,
                ..Default::default()
            };
            let batches = training(&data, config);
            for index in 0..batches.num_batches() {
                let batch = batches.get(index).unwrap();
                assert_eq!(batch.cu_seqlens[0], 0);
                assert_eq!(batch.cu_seqlens.last(), Some(&batch.input_ids.len()));
                assert!(batch.input_ids.len() <= 5 * 64);
                let ids = unmasked_input(&batch, objective);
                for bounds in batch.cu_seqlens.windows(2) {
                    let sequence = &ids[bounds[0]..bounds[1]];
                    let (first, last) = (sequence[0], sequence[sequence.len() - 1]);
                    assert_eq!((first, last), (special.cls, special.sep));
                    assert!((3..=64).contains(&sequence.len()));
                    let inner = &sequence[1..sequence.len() - 1];
                    assert!(!inner.iter().any(|id| special.sorted().contains(id)));
                }
            }
        }
    }

    fn unmasked_input(batch: &Batch, objective: Objective) -> Vec<u32> {
        match objective {
            Objective::Mlm => unmasked(batch),
            Objective::Clm => batch.input_ids.clone(),
        }
    }

    #[test]
    fn an_epoch_shows_every_chunk_once_in_an_order_of_its_own() {
        let (_dir, data) = data(60);
        let config = BatchConfig {
            seq_len: 64,
            batch_size: 1,
            ..Default::default()
        };
        let batches = training(&data, config);
        let epochs = batches.num_chunks() as u64;
        let epoch = |epoch: u64| -> Vec<Vec<u32>> {
            let indices = epoch * epochs..(epoch + 1) * epochs;
            indices
                .map(|index| unmasked(&batches.get(index).unwrap()))
                .collect()
        };
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        let sorted = |mut epoch: Vec<Vec<u32>>| {
            epoch.sort();
            epoch
        };
        assert_eq!(sorted(first.clone()), sorted(second));
        let tokens: usize = first.iter().map(Vec::len).sum();
        assert!(tokens as u64 >= data.train.tokens() + 2 * epochs);
    }

    #[test]
    fn batches_depend_on_seed_and_index_alone_and_resume_anywhere() {
        let (_dir, data) = data(60);
        let config = BatchConfig {
            seq_len: 64,
            batch_size: 16,
            seed: 3,
            ..Default::default()
        };
        let batches = training(&data, config.clone());
        let straight: Vec<Batch> = batches
            .prefetch(0)
            .unwrap()
            .take(40)
            .collect::<Result<_>>()
            .unwrap();
        assert!(
            batches.num_batches() < 40,
            "the test covers more than an epoch"
        );
        let again = training(&data, config.clone());
        let resumed: Vec<Batch> = again
            .prefetch(17)
            .unwrap()
            .take(23)
            .collect::<Result<_>>()
            .unwrap();
        assert_eq!(straight[17..], resumed);
        assert_eq!(straight[5], again.get(5).unwrap());

        let other = training(&data, BatchConfig { seed: 4, ..config });
        assert_ne!(straight[0], other.get(0).unwrap());
    }

    #[test]
    fn masks_do_not_depend_on_batch_size_nor_on_the_length_of_chunks() {
        let (_dir, data) = data(30);
        let masked = |seq_len, batch_size| -> Vec<(u32, u32)> {
            let config = BatchConfig {
                seq_len,
                batch_size,
                ..Default::default()
            };
            let dataset = data.validation.clone();
            let batches =
                Batches::evaluation(dataset, &data.tokenizer, config, usize::MAX).unwrap();
            let batches = (0..batches.num_batches()).map(|index| batches.get(index).unwrap());
            batches
                .flat_map(|batch| {
                    let inputs = batch
                        .label_positions
                        .iter()
                        .map(|&p| batch.input_ids[p as usize]);
                    inputs.zip(batch.labels.clone()).collect::<Vec<_>>()
                })
                .collect()
        };
        assert!(masked(64, 8).len() > 50);
        assert_eq!(masked(64, 8), masked(64, 3));
        assert_eq!(masked(64, 8), masked(200, 2));
    }

    #[test]
    fn masking_is_80_10_10_at_the_rate() {
        let (_dir, data) = data(400);
        let config = BatchConfig {
            mask_rate: 0.3,
            ..Default::default()
        };
        let batches = training(&data, config);
        let special = data.tokenizer.special();
        let (mut text, mut labels, mut masked, mut kept, mut random) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for index in 0..batches.num_batches() {
            let batch = batches.get(index).unwrap();
            text += (batch.input_ids.len() - 2 * (batch.cu_seqlens.len() - 1)) as f64;
            for (&position, &label) in batch.label_positions.iter().zip(&batch.labels) {
                assert!(!special.sorted().contains(&label));
                labels += 1.0;
                match batch.input_ids[position as usize] {
                    id if id == special.mask => masked += 1.0,
                    id if id == label => kept += 1.0,
                    id => {
                        assert!(!special.sorted().contains(&id));
                        random += 1.0;
                    }
                }
            }
        }
        // Five standard deviations of a share.
        let near = |share: f64, expected: f64, n: f64| {
            let deviation = 5.0 * (expected * (1.0 - expected) / n).sqrt();
            assert!(
                (share - expected).abs() < deviation,
                "{share} is not near {expected}"
            );
        };
        near(labels / text, 0.3, text);
        near(masked / labels, 0.8, labels);
        // A random token is the token itself once in 595 times.
        near(random / labels, 0.1 * 594.0 / 595.0, labels);
        near(kept / labels, 0.1 + 0.1 / 595.0, labels);
    }

    #[test]
    fn masks_change_from_epoch_to_epoch() {
        let (_dir, data) = data(60);
        let config = BatchConfig {
            batch_size: 1,
            ..Default::default()
        };
        let batches = training(&data, config);
        let chunks = batches.num_chunks() as u64;
        let first = batches.get(0).unwrap();
        let again = (chunks..2 * chunks)
            .map(|index| batches.get(index).unwrap())
            .find(|batch| unmasked(batch) == unmasked(&first))
            .unwrap();
        assert_ne!(first.label_positions, again.label_positions);
    }

    #[test]
    fn a_batch_has_a_label_at_the_lowest_rate() {
        let (_dir, data) = data(30);
        let config = BatchConfig {
            mask_rate: 1e-9,
            batch_size: 1,
            ..Default::default()
        };
        let batches = training(&data, config);
        for index in 0..20 {
            let batch = batches.get(index).unwrap();
            assert_eq!(batch.labels.len(), 1);
            assert!(!data.tokenizer.special().sorted().contains(&batch.labels[0]));
        }
    }

    #[test]
    fn causal_labels_are_the_next_tokens_and_the_end_of_a_document() {
        let (_dir, data) = data(60);
        let config = BatchConfig {
            objective: Objective::Clm,
            seq_len: 64,
            batch_size: 3,
            ..Default::default()
        };
        let batches = training(&data, config);
        let sep = data.tokenizer.special().sep;
        let mut ends = 0;
        for index in 0..batches.num_batches() {
            let batch = batches.get(index).unwrap();
            let mut labels = batch.label_positions.iter().zip(&batch.labels).peekable();
            for bounds in batch.cu_seqlens.windows(2) {
                for position in bounds[0]..bounds[1] - 2 {
                    let expected = (&(position as u32), &batch.input_ids[position + 1]);
                    assert_eq!(labels.next(), Some(expected));
                }
                ends += labels
                    .next_if(|(p, label)| **p == bounds[1] as u32 - 2 && **label == sep)
                    .is_some() as usize;
            }
            assert!(labels.next().is_none());
        }
        // The last batch begins the next epoch.
        let documents = data.train.documents().len();
        assert!(
            (documents..documents + 6).contains(&ends),
            "{ends} ends of {documents}"
        );
    }

    #[test]
    fn evaluations_are_in_order_and_do_not_depend_on_the_seed() {
        let (_dir, data) = data(60);
        let evaluation = |seed, max_chunks| {
            let config = BatchConfig {
                seq_len: 32,
                batch_size: 4,
                seed,
                ..Default::default()
            };
            let dataset = data.validation.clone();
            Arc::new(Batches::evaluation(dataset, &data.tokenizer, config, max_chunks).unwrap())
        };
        let all = |batches: Arc<Batches>| -> Vec<Batch> {
            batches.prefetch(0).unwrap().collect::<Result<_>>().unwrap()
        };
        let first = evaluation(1, 10);
        assert_eq!(first.num_batches(), 3);
        assert!(
            first
                .get(3)
                .unwrap_err()
                .to_string()
                .contains("evaluation of 3 batches")
        );
        let first = all(first);
        assert_eq!(first, all(evaluation(2, 10)));
        assert_eq!(first[..2], all(evaluation(1, 8)));

        let mut start = Vec::new();
        let document = data.validation.documents()[0].clone();
        data.validation
            .read(&(document.start..document.start + 5), &mut start);
        assert_eq!(unmasked(&first[0])[1..6], start);
    }

    #[test]
    fn evaluations_of_every_length_predict_the_same_tokens() {
        let (_dir, data) = data(60);
        let evaluations = |objective, longer: &[usize]| {
            let config = BatchConfig {
                objective,
                seq_len: 32,
                batch_size: 8,
                ..Default::default()
            };
            Batches::evaluations_by_length(&data.validation, &data.tokenizer, &config, longer, 40)
        };
        for objective in [Objective::Mlm, Objective::Clm] {
            let [short, middle, long] = &evaluations(objective, &[64, 128]).unwrap()[..] else {
                panic!("expected three lengths")
            };
            let [short, middle, long] =
                [(short, 32), (middle, 62), (long, 122)].map(|((_, batches), len)| {
                    let batches = batches.collect().unwrap();
                    for batch in &batches {
                        assert!(batch.cu_seqlens.windows(2).all(|b| b[1] - b[0] == len));
                    }
                    batches
                });
            assert_eq!(short.len(), 5, "40 sequences in batches of 8");
            for (short, longer) in short.iter().chain(&short).zip(middle.iter().chain(&long)) {
                assert_eq!(short.labels, longer.labels);
                let seen = |batch: &Batch| -> Vec<u32> {
                    let special = data.tokenizer.special();
                    let ids = batch.input_ids.iter().copied();
                    ids.filter(|id| ![special.cls, special.sep].contains(id))
                        .collect()
                };
                assert_eq!(seen(short), seen(longer));
            }
        }
        let error = |longer| {
            let evaluations = evaluations(Objective::Mlm, longer);
            evaluations.unwrap_err().to_string()
        };
        assert!(error(&[32]).contains("got 32 after 32"));
        assert!(error(&[64, 96]).contains("got 96 after 64"));
        assert!(error(&[64, 4096]).contains("no document has 3840 tokens"));
    }

    #[test]
    fn settings_out_of_range_and_foreign_tokenizers_are_refused() {
        let (_dir, data) = data(30);
        let error = |config| {
            let batches = Batches::training(data.train.clone(), &data.tokenizer, config);
            batches.unwrap_err().to_string()
        };
        let base = BatchConfig::default();
        assert!(
            error(BatchConfig {
                seq_len: 9,
                ..base.clone()
            })
            .contains("at least 10, got 9")
        );
        assert!(
            error(BatchConfig {
                batch_size: 0,
                ..base.clone()
            })
            .contains("batch_size")
        );
        for mask_rate in [0.0, 1.5, f64::NAN] {
            assert!(
                error(BatchConfig {
                    mask_rate,
                    ..base.clone()
                })
                .contains("mask_rate")
            );
        }
        let none =
            Batches::evaluation(data.train.clone(), &data.tokenizer, base.clone(), 0).unwrap_err();
        assert!(none.to_string().contains("at least one sequence"), "{none}");
        let vocab = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n";
        let other = Tokenizer::from_vocab(vocab, None).unwrap();
        let error = Batches::training(data.train.clone(), &other, base)
            .unwrap_err()
            .to_string();
        assert!(error.contains("another tokenizer"), "{error}");
    }

    #[test]
    fn text_of_unknown_words_alone_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.txt"), "x y z ".repeat(10)).unwrap();
        std::fs::write(
            dir.path().join("vocab"),
            "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n",
        )
        .unwrap();
        let config = DataConfig {
            sources: vec![dir.path().join("a.txt").display().to_string()],
            tokenizer: Some(dir.path().join("vocab")),
            held_out: 0.5,
            cache_dir: Some(dir.path().to_path_buf()),
            ..Default::default()
        };
        let data = Data::open(&config).unwrap();
        let batches = training(&data, BatchConfig::default());
        let error = batches.get(0).unwrap_err().to_string();
        assert!(error.contains("no token to predict"), "{error}");
    }
}

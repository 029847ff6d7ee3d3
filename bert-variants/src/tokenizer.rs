//! WordPiece and other tokenizers of Hugging Face models: load, train, encode, save.

mod train;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::utils::truncation::truncate_encodings;
use tokenizers::{
    AddedToken, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential,
    OffsetType, PostProcessor, PreTokenizedString, PreTokenizer, TruncationParams,
};
use xxhash_rust::xxh3::xxh3_128;

use crate::record::write_atomic;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const VOCAB: &str = "vocab.txt";

/// Keys of the special tokens in `tokenizer_config.json`, and BERT's tokens.
const SPECIAL_TOKENS: [(&str, &str); 5] = [
    ("pad_token", "[PAD]"),
    ("unk_token", "[UNK]"),
    ("cls_token", "[CLS]"),
    ("sep_token", "[SEP]"),
    ("mask_token", "[MASK]"),
];

/// Ids of the tokens that stand for no text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Fills up short sequences.
    pub pad: u32,
    /// A word that the vocabulary cannot spell.
    pub unk: u32,
    /// Begins every sequence.
    pub cls: u32,
    /// Ends every sequence.
    pub sep: u32,
    /// Stands for a token that is to be predicted.
    pub mask: u32,
}

impl SpecialTokens {
    /// All of them, in ascending order.
    pub fn sorted(&self) -> [u32; 5] {
        let mut ids = [self.pad, self.unk, self.cls, self.sep, self.mask];
        ids.sort_unstable();
        ids
    }
}

/// Turns text into token ids.
///
/// The names of special tokens inside of text, such as a written `[MASK]`, are text like any
/// other.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Names in the order of [`SPECIAL_TOKENS`].
    special_names: [String; 5],
    special: SpecialTokens,
    fingerprint: u128,
}

impl Tokenizer {
    /// Reads a `vocab.txt`, a `tokenizer.json`, or a model's directory that holds one of them.
    ///
    /// A `vocab.txt` becomes BERT's tokenizer. It does not say whether text is lower-cased:
    /// `lowercase` says so, else `do_lower_case` of a `tokenizer_config.json` beside it, else
    /// text is lower-cased where no piece of the vocabulary has a letter `A` to `Z`.
    ///
    /// # Errors
    /// When the file is missing, damaged, or lacks a special token, or when `lowercase`
    /// contradicts a `tokenizer.json`.
    pub fn load(path: &Path, lowercase: Option<bool>) -> Result<Self> {
        if path.is_dir() {
            let files = [TOKENIZER, VOCAB].map(|name| path.join(name));
            let Some(file) = files.iter().find(|file| file.is_file()) else {
                bail!(
                    "{} holds no tokenizer; expected a {TOKENIZER} or {VOCAB} there",
                    path.display()
                );
            };
            return Self::load(file, lowercase);
        }
        let bytes = fs::read(path)
            .with_context(|| format!("cannot read the tokenizer {}", path.display()))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let read = || {
            let config = read_config(folder)?;
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                Self::from_json(&bytes, &config, lowercase)
            } else {
                let configured = config.get("do_lower_case").and_then(Value::as_bool);
                Self::from_vocab(&bytes, lowercase.or(configured))
            }
        };
        read().with_context(|| format!("in {}", path.display()))
    }

    /// BERT's tokenizer with the pieces of a `vocab.txt`, one a line.
    ///
    /// # Errors
    /// When `vocab` is not UTF-8, repeats a piece or lacks a special token.
    pub fn from_vocab(vocab: &[u8], lowercase: Option<bool>) -> Result<Self> {
        let text = std::str::from_utf8(vocab).context("the vocabulary is not UTF-8")?;
        let mut seen = HashMap::new();
        for (line, number) in text.lines().zip(1..) {
            if let Some(before) = seen.insert(line.trim_end(), number) {
                bail!("line {number} repeats the piece {line:?} of line {before}");
            }
        }
        let lowercase = lowercase.unwrap_or_else(|| !text.lines().any(has_upper_case));
        let special_names = SPECIAL_TOKENS.map(|(_, name)| name.to_string());
        if let Some(missing) = special_names
            .iter()
            .find(|name| !seen.contains_key(name.as_str()))
        {
            bail!("no line {missing}; expected BERT's vocabulary, one piece a line");
        }
        let model = WordPiece::read_bytes(vocab)
            .and_then(|vocab| WordPiece::builder().vocab(vocab).build())
            .map_err(anyhow::Error::from_boxed)?;
        let mut inner = tokenizers::Tokenizer::new(model);
        inner
            .with_normalizer(Some(normalizer(lowercase)))
            .map_err(anyhow::Error::from_boxed)?
            .with_pre_tokenizer(Some(BertPreTokenizer))
            .with_decoder(Some(tokenizers::decoders::wordpiece::WordPiece::default()));
        let special = special_names
            .clone()
            .map(|name| AddedToken::from(name, true));
        inner
            .add_special_tokens(special)
            .map_err(anyhow::Error::from_boxed)?;
        Self::new(inner, special_names)
    }

    fn from_json(bytes: &[u8], config: &Value, lowercase: Option<bool>) -> Result<Self> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| anyhow!("not a tokenizer: {error}"))?;
        let special_names = SPECIAL_TOKENS.map(|(key, name)| {
            let configured = &config[key];
            let configured = configured.as_str().or(configured["content"].as_str());
            configured.unwrap_or(name).to_string()
        });
        let tokenizer = Self::new(inner, special_names)?;
        if let Some(lowercase) = lowercase {
            ensure!(
                tokenizer.lowercase() == Some(lowercase),
                "lowercase is {lowercase}, but the file's own normalizer is {}: leave the option out",
                json!(tokenizer.inner.get_normalizer())
            );
        }
        Ok(tokenizer)
    }

    fn new(mut inner: tokenizers::Tokenizer, special_names: [String; 5]) -> Result<Self> {
        let id = |name: &String| {
            inner.token_to_id(name).with_context(|| {
                format!(
                    "the tokenizer has no token {name}; name its special tokens in {TOKENIZER_CONFIG}"
                )
            })
        };
        let [pad, unk, cls, sep, mask] = special_names.each_ref().map(id);
        let special = SpecialTokens {
            pad: pad?,
            unk: unk?,
            cls: cls?,
            sep: sep?,
            mask: mask?,
        };
        ensure!(
            inner.get_vocab_size(true) > SPECIAL_TOKENS.len(),
            "the vocabulary holds nothing but special tokens"
        );
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(anyhow::Error::from_boxed)?;
        if let ModelWrapper::WordPiece(_) = inner.get_model() {
            let named = |i: usize, id| (special_names[i].clone(), id);
            let processing = BertProcessing::new(named(3, special.sep), named(2, special.cls));
            inner.with_post_processor(Some(processing));
        }
        let json = inner.to_string(false).map_err(anyhow::Error::from_boxed)?;
        inner.set_encode_special_tokens(true);
        Ok(Self {
            inner,
            special_names,
            special,
            fingerprint: xxh3_128(json.as_bytes()),
        })
    }

    /// Ids of the special tokens.
    pub fn special(&self) -> SpecialTokens {
        self.special
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Equal only for tokenizers that encode alike.
    pub fn fingerprint(&self) -> u128 {
        self.fingerprint
    }

    /// Token ids of a text, without `[CLS]` and `[SEP]`.
    ///
    /// # Errors
    /// When the tokenizer has no id for an unknown word.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(anyhow::Error::from_boxed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A text, or two that belong together, as a model reads them: with the special tokens around,
    /// cut at its end to at most `max_length` tokens, of two texts the longer one first. Token ids,
    /// and for each token the segment that it belongs to.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], and when `max_length` has no room for the special tokens.
    pub fn encode_for_model(
        &self,
        text: &str,
        pair: Option<&str>,
        max_length: usize,
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let encode = |text| self.inner.encode_fast(text, false);
        let encode_all = || {
            let pair = pair.map(encode).transpose()?;
            let processor = self.inner.get_post_processor();
            let added = processor.map_or(0, |processor| processor.added_tokens(pair.is_some()));
            let truncation = TruncationParams {
                max_length: max_length.saturating_sub(added),
                ..TruncationParams::default()
            };
            let (text, pair) = truncate_encodings(encode(text)?, pair, &truncation)?;
            self.inner.post_process(text, pair, true)
        };
        let encoding = encode_all().map_err(anyhow::Error::from_boxed)?;
        Ok((
            encoding.get_ids().to_vec(),
            encoding.get_type_ids().to_vec(),
        ))
    }

    /// Text of token ids; with `skip_special_tokens` without `[CLS]` and its like.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(anyhow::Error::from_boxed)
    }

    /// Writes the files that transformers' `AutoTokenizer` loads: `tokenizer.json`,
    /// `tokenizer_config.json`, `special_tokens_map.json` and, of a WordPiece tokenizer,
    /// `vocab.txt`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let write = |name: &str, text: String| write_atomic(&dir.join(name), text.as_bytes());
        let special = || {
            let keys = SPECIAL_TOKENS.iter().zip(&self.special_names);
            keys.map(|((key, _), name)| (key.to_string(), json!(name)))
        };
        let mut config: serde_json::Map<String, Value> = special().collect();
        if let ModelWrapper::WordPiece(model) = self.inner.get_model() {
            write(VOCAB, vocab_text(model))?;
            config.insert("tokenizer_class".into(), json!("BertTokenizer"));
        } else {
            config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        }
        if let Some(NormalizerWrapper::BertNormalizer(normalizer)) = self.inner.get_normalizer() {
            config.insert("do_lower_case".into(), json!(normalizer.lowercase));
            config.insert("strip_accents".into(), json!(normalizer.strip_accents));
            let chinese = normalizer.handle_chinese_chars;
            config.insert("tokenize_chinese_chars".into(), json!(chinese));
        }
        let json = self
            .inner
            .to_string(true)
            .map_err(anyhow::Error::from_boxed)?;
        write(TOKENIZER, json)?;
        write(TOKENIZER_CONFIG, serde_json::to_string_pretty(&config)?)?;
        let special: serde_json::Map<String, Value> = special().collect();
        write(SPECIAL_TOKENS_MAP, serde_json::to_string_pretty(&special)?)
    }

    /// Whether BERT's normalizer lower-cases; `None` with another normalizer.
    fn lowercase(&self) -> Option<bool> {
        match self.inner.get_normalizer() {
            Some(NormalizerWrapper::BertNormalizer(normalizer)) => Some(normalizer.lowercase),
            _ => None,
        }
    }
}

/// Counts words to train a vocabulary from.
pub struct WordCounts {
    normalizer: BertNormalizer,
    counts: HashMap<String, u64>,
}

impl WordCounts {
    /// Counts words as BERT's tokenizer splits them, in lower case or as they are.
    pub fn new(lowercase: bool) -> Self {
        Self {
            normalizer: normalizer(lowercase),
            counts: HashMap::new(),
        }
    }

    /// The counts of one text, for [`WordCounts::add`].
    ///
    /// # Errors
    /// None that is known; the tokenizers' interface has one.
    pub fn count(&self, text: &str) -> Result<HashMap<String, u64>> {
        let mut normalized = NormalizedString::from(text);
        self.normalizer
            .normalize(&mut normalized)
            .map_err(anyhow::Error::from_boxed)?;
        let mut words = PreTokenizedString::from(normalized);
        BertPreTokenizer
            .pre_tokenize(&mut words)
            .map_err(anyhow::Error::from_boxed)?;
        let mut counts = HashMap::new();
        for (word, _, _) in words.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            match counts.get_mut(word) {
                Some(count) => *count += 1,
                None => {
                    counts.insert(word.to_string(), 1);
                }
            }
        }
        Ok(counts)
    }

    /// Adds the counts of a text.
    pub fn add(&mut self, counts: HashMap<String, u64>) {
        for (word, count) in counts {
            *self.counts.entry(word).or_default() += count;
        }
    }

    /// A `vocab.txt` of at most `vocab_size` pieces, the same for equal counts.
    ///
    /// # Errors
    /// When `vocab_size` has no room for the special tokens and the letters, or there are no
    /// words.
    pub fn train(&self, vocab_size: usize) -> Result<String> {
        let special = SPECIAL_TOKENS.map(|(_, name)| name.to_string());
        let pieces = train::vocabulary(&self.counts, vocab_size, special.to_vec())?;
        Ok(pieces.join("\n") + "\n")
    }
}

fn normalizer(lowercase: bool) -> BertNormalizer {
    BertNormalizer::new(true, true, None, lowercase)
}

/// `A` to `Z` only: BERT's uncased vocabularies do hold capitals of other scripts.
fn has_upper_case(piece: &str) -> bool {
    let is_special = piece.starts_with('[') && piece.ends_with(']');
    !is_special && piece.contains(|letter: char| letter.is_ascii_uppercase())
}

/// `tokenizer_config.json` of a folder, null without one.
fn read_config(folder: &Path) -> Result<Value> {
    let path = folder.join(TOKENIZER_CONFIG);
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let read = || anyhow::Ok(serde_json::from_slice(&fs::read(&path)?)?);
    read().with_context(|| format!("cannot read {}", path.display()))
}

fn vocab_text(model: &WordPiece) -> String {
    use tokenizers::Model;
    let mut pieces: Vec<(String, u32)> = model.get_vocab().into_iter().collect();
    pieces.sort_by_key(|(_, id)| *id);
    pieces.into_iter().map(|(piece, _)| piece + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox runs!";

    fn trained(vocab_size: usize, lowercase: bool) -> Tokenizer {
        let mut counts = WordCounts::new(lowercase);
        for _ in 0..3 {
            counts.add(counts.count(TEXT).unwrap());
        }
        let vocab = counts.train(vocab_size).unwrap();
        Tokenizer::from_vocab(vocab.as_bytes(), Some(lowercase)).unwrap()
    }

    #[test]
    fn encodes_what_it_was_trained_on_without_unknown_words() {
        for lowercase in [false, true] {
            let tokenizer = trained(120, lowercase);
            let ids = tokenizer.encode(TEXT).unwrap();
            assert!(!ids.contains(&tokenizer.special().unk));
            let expected = if lowercase {
                TEXT.to_lowercase()
            } else {
                TEXT.to_string()
            };
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), expected);
        }
    }

    #[test]
    fn special_tokens_in_text_are_text() {
        let tokenizer = trained(120, true);
        let ids = tokenizer.encode("the [MASK] dog [SEP]").unwrap();
        let special = tokenizer.special();
        assert!(
            !ids.contains(&special.mask) && !ids.contains(&special.sep),
            "{ids:?}"
        );
    }

    #[test]
    fn saved_files_load_as_the_same_tokenizer() {
        let dir = tempfile::tempdir().unwrap();
        for lowercase in [false, true] {
            let tokenizer = trained(120, lowercase);
            tokenizer.save(dir.path()).unwrap();
            let from_json = Tokenizer::load(dir.path(), None).unwrap();
            let from_vocab = Tokenizer::load(&dir.path().join(VOCAB), None).unwrap();
            for loaded in [from_json, from_vocab] {
                assert_eq!(loaded.fingerprint(), tokenizer.fingerprint());
                assert_eq!(loaded.special(), tokenizer.special());
                assert_eq!(
                    loaded.encode(TEXT).unwrap(),
                    tokenizer.encode(TEXT).unwrap()
                );
            }
        }
    }

    #[test]
    fn lower_casing_follows_the_option_then_the_config_then_the_vocabulary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(VOCAB);
        let load = |lowercase| Tokenizer::load(&path, lowercase).unwrap().lowercase();

        fs::write(&path, "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nA\na\n").unwrap();
        assert_eq!(load(None), Some(false));
        fs::write(
            &path,
            "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n[unusedA]\na\nℝ\n",
        )
        .unwrap();
        assert_eq!(load(None), Some(true));
        fs::write(
            dir.path().join(TOKENIZER_CONFIG),
            r#"{"do_lower_case": false}"#,
        )
        .unwrap();
        assert_eq!(load(None), Some(false));
        assert_eq!(load(Some(true)), Some(true));
    }

    #[test]
    fn other_special_tokens_come_from_the_config() {
        let dir = tempfile::tempdir().unwrap();
        trained(120, true).save(dir.path()).unwrap();
        for file in [TOKENIZER, TOKENIZER_CONFIG] {
            let text = fs::read_to_string(dir.path().join(file)).unwrap();
            fs::write(dir.path().join(file), text.replace("[MASK]", "<mask>")).unwrap();
        }
        let tokenizer = Tokenizer::load(dir.path(), None).unwrap();
        assert_eq!(tokenizer.special(), trained(120, true).special());
        fs::write(dir.path().join(TOKENIZER_CONFIG), "{}").unwrap();
        let error = format!("{:#}", Tokenizer::load(dir.path(), None).err().unwrap());
        assert!(error.contains("no token [MASK]"), "{error}");
    }

    #[test]
    fn bad_files_say_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let error = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            format!("{:#}", Tokenizer::load(&path, None).err().expect(name))
        };
        assert!(error(VOCAB, b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n").contains("no line [MASK]"));
        assert!(
            error(VOCAB, b"[PAD]\na\nb\na\n").contains("line 4 repeats the piece \"a\" of line 2")
        );
        assert!(error(VOCAB, b"[PAD]\n\xff\n").contains("not UTF-8"));
        let special = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n";
        assert!(error(VOCAB, special).contains("nothing but special tokens"));
        assert!(error(TOKENIZER, b"{}").contains("not a tokenizer"));

        let missing = Tokenizer::load(&dir.path().join("none.txt"), None)
            .err()
            .unwrap();
        assert!(format!("{missing:#}").contains("none.txt"));
        fs::remove_file(dir.path().join(VOCAB)).unwrap();
        fs::remove_file(dir.path().join(TOKENIZER)).unwrap();
        let empty = Tokenizer::load(dir.path(), None).err().unwrap();
        assert!(format!("{empty:#}").contains("holds no tokenizer"));
    }
}

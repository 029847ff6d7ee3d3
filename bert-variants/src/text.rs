//! Texts as a model reads them: special tokens around, end to end, without padding.

use anyhow::{Result, ensure};
use rayon::prelude::*;

use crate::config::BertConfig;
use crate::model::Tokens;
use crate::tokenizer::Tokenizer;

/// A text, or two that belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Text<'a> {
    /// The text, or the first of two.
    pub first: &'a str,
    /// The second.
    pub second: Option<&'a str>,
}

impl<'a> From<&'a str> for Text<'a> {
    fn from(first: &'a str) -> Self {
        Self {
            first,
            second: None,
        }
    }
}

/// One text in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Segment of each token: 1 in the second text of two.
    pub token_type_ids: Vec<u32>,
}

/// Texts end to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextBatch {
    ids: Vec<u32>,
    cu_seqlens: Vec<usize>,
    token_type_ids: Option<Vec<u32>>,
}

impl TextBatch {
    /// As the models take them.
    pub fn tokens(&self) -> Tokens<'_> {
        Tokens {
            ids: &self.ids,
            cu_seqlens: &self.cu_seqlens,
            token_type_ids: self.token_type_ids.as_deref(),
        }
    }
}

/// Turns texts into what a model reads.
pub struct TextEncoder {
    tokenizer: Tokenizer,
    max_length: usize,
    has_segments: bool,
}

impl TextEncoder {
    /// Of a model with this tokenizer. Texts are cut to `max_length` tokens, and to what the model
    /// can read.
    ///
    /// # Errors
    /// When the tokenizer has ids that the model does not know, or `max_length` has no room for a
    /// text.
    pub fn new(
        tokenizer: Tokenizer,
        config: &BertConfig,
        max_length: Option<usize>,
    ) -> Result<Self> {
        ensure!(
            tokenizer.vocab_size() <= config.vocab_size,
            "the tokenizer has {} tokens, but the model's vocab_size is {}: they do not belong together",
            tokenizer.vocab_size(),
            config.vocab_size
        );
        let longest = config.intended_length();
        let max_length = max_length.map_or(longest, |length| length.min(longest));
        ensure!(
            max_length > 4,
            "the longest input has {max_length} tokens, expected at least 5"
        );
        Ok(Self {
            tokenizer,
            max_length,
            has_segments: config.type_vocab_size > 1,
        })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Most tokens of a text.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Tokens of each text, which is cut at its end where it is too long; of two texts the longer
    /// is cut first.
    ///
    /// # Errors
    /// When the tokenizer has no id for an unknown word.
    pub fn encode(&self, texts: &[Text]) -> Result<Vec<Encoded>> {
        let encode = |text: &Text| {
            let Text { first, second } = *text;
            let (ids, token_type_ids) =
                self.tokenizer
                    .encode_for_model(first, second, self.max_length)?;
            Ok(Encoded {
                ids,
                token_type_ids,
            })
        };
        texts.par_iter().map(encode).collect()
    }

    /// One batch of all.
    pub fn batch<'a>(&self, texts: impl IntoIterator<Item = &'a Encoded>) -> TextBatch {
        let mut batch = TextBatch {
            ids: Vec::new(),
            cu_seqlens: vec![0],
            token_type_ids: self.has_segments.then(Vec::new),
        };
        for text in texts {
            batch.ids.extend(&text.ids);
            batch.cu_seqlens.push(batch.ids.len());
            if let Some(types) = &mut batch.token_type_ids {
                types.extend(&text.token_type_ids);
            }
        }
        batch
    }
}

//! Using trained models on texts: filling masks, classifying, embedding.
//!
//! ```no_run
//! use bert_variants::predict::{Embedder, FillMask};
//! use candle_core::{DType, Device};
//!
//! # fn main() -> anyhow::Result<()> {
//! let model = FillMask::from_pretrained("google-bert/bert-base-uncased", DType::F32, &Device::Cpu)?;
//! for candidate in &model.predict(&["Paris is the [MASK] of France."], 5)?[0][0] {
//!     println!("{:.3} {}", candidate.score, candidate.token);
//! }
//!
//! let model = Embedder::from_pretrained("my/model", None, DType::F32, &Device::Cpu)?;
//! let vectors = model.embed(&["A man is eating.".into(), "Someone has a meal.".into()])?;
//! let alike: f32 = vectors[0].iter().zip(&vectors[1]).map(|(a, b)| a * b).sum();
//! # Ok(())
//! # }
//! ```

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{D, DType, Device, Tensor};
use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::{Pretrained, from_pretrained};
use crate::config::{ProblemType, Task};
use crate::model::{LanguageModel, SentenceEncoder, SequenceClassifier, Tokens};
use crate::text::{Text, TextEncoder};
use crate::tokenizer::Tokenizer;

/// A model for a task with its tokenizer.
fn load(
    name: &str,
    task: Task,
    max_length: Option<usize>,
    device: &Device,
) -> Result<(Pretrained, TextEncoder)> {
    let pretrained = from_pretrained(name, task, 0, device)?;
    let tokenizer = Tokenizer::load(&pretrained.dir, None)?;
    let encoder = TextEncoder::new(tokenizer, &pretrained.config, max_length)?;
    Ok((pretrained, encoder))
}

/// A token with its probability.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Candidate {
    /// The token as text.
    pub token: String,
    /// Its id.
    pub id: u32,
    /// Its probability.
    pub score: f32,
}

/// Fills masks in texts.
pub struct FillMask {
    model: LanguageModel,
    encoder: TextEncoder,
    mask: String,
}

impl FillMask {
    /// Loads a masked language model, see [`from_pretrained`].
    ///
    /// # Errors
    /// As [`from_pretrained`], and when the model has no head for it or no tokenizer.
    pub fn from_pretrained(name: &str, dtype: DType, device: &Device) -> Result<Self> {
        let (pretrained, encoder) = load(name, Task::LanguageModel, None, device)?;
        pretrained.require_head()?;
        ensure!(
            !pretrained.config.is_decoder,
            "{name} is a causal language model, which fills no masks"
        );
        let mask = encoder.tokenizer().special().mask;
        let model = LanguageModel::new(&pretrained.config, &pretrained.parameters, false, dtype)?
            .with_graphs();
        Ok(Self {
            model,
            mask: encoder.tokenizer().decode(&[mask], false)?,
            encoder,
        })
    }

    /// How a mask is written, such as `[MASK]`.
    pub fn mask(&self) -> &str {
        &self.mask
    }

    /// The `top_k` most probable tokens for each mask of each text.
    ///
    /// # Errors
    /// When a text has no mask, or is too long for the model.
    pub fn predict(&self, texts: &[&str], top_k: usize) -> Result<Vec<Vec<Vec<Candidate>>>> {
        let (mut ids, mut cu_seqlens) = (Vec::new(), vec![0]);
        let (mut masks, mut counts) = (Vec::new(), Vec::new());
        for text in texts {
            let before = masks.len();
            for id in self.encode(text)? {
                if id == self.encoder.tokenizer().special().mask {
                    masks.push(ids.len() as u32);
                }
                ids.push(id);
            }
            cu_seqlens.push(ids.len());
            counts.push(masks.len() - before);
        }
        let tokens = Tokens {
            ids: &ids,
            cu_seqlens: &cu_seqlens,
            token_type_ids: None,
        };
        let logits = self.model.logits(&tokens, &masks, None)?;
        let probabilities: Vec<Vec<f32>> = softmax(&logits)?.to_vec2()?;
        let mut rows = probabilities.into_iter();
        counts
            .into_iter()
            .map(|count| {
                rows.by_ref()
                    .take(count)
                    .map(|row| self.best(&row, top_k))
                    .collect()
            })
            .collect()
    }

    /// Token ids of a text with masks; the tokenizer takes a written mask for text.
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let tokenizer = self.encoder.tokenizer();
        let special = tokenizer.special();
        let parts = text.split(&self.mask).map(|part| tokenizer.encode(part));
        let parts: Vec<Vec<u32>> = parts.collect::<Result<_>>()?;
        ensure!(parts.len() > 1, "there is no {} in {text:?}", self.mask);
        let ids = [
            &[special.cls],
            parts.join(&special.mask).as_slice(),
            &[special.sep],
        ]
        .concat();
        let longest = self.encoder.max_length();
        ensure!(
            ids.len() <= longest,
            "a text has {} tokens, but the model reads at most {longest}",
            ids.len()
        );
        Ok(ids)
    }

    fn best(&self, probabilities: &[f32], top_k: usize) -> Result<Vec<Candidate>> {
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
        let candidate = |id: usize| {
            Ok(Candidate {
                token: self.encoder.tokenizer().decode(&[id as u32], false)?,
                id: id as u32,
                score: probabilities[id],
            })
        };
        order.into_iter().take(top_k).map(candidate).collect()
    }
}

/// What a classifier says of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Classification {
    /// Index of the best label.
    pub label: usize,
    /// For each label its probability, or of a regression its value.
    pub scores: Vec<f32>,
}

/// Labels texts.
pub struct Classifier {
    model: SequenceClassifier,
    encoder: TextEncoder,
}

impl Classifier {
    /// Loads a sequence classifier, see [`from_pretrained`].
    ///
    /// # Errors
    /// As [`from_pretrained`], and when the model has no head for it or no tokenizer.
    pub fn from_pretrained(
        name: &str,
        max_length: Option<usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (pretrained, encoder) = load(name, Task::SequenceClassification, max_length, device)?;
        pretrained.require_head()?;
        let config = &pretrained.config;
        let model =
            SequenceClassifier::new(config, &pretrained.parameters, false, dtype)?.with_graphs();
        Ok(Self { model, encoder })
    }

    /// Names of the labels.
    pub fn labels(&self) -> &[String] {
        &self.model.encoder().config().labels
    }

    /// Whether scores are values rather than probabilities.
    pub fn is_regression(&self) -> bool {
        self.model.encoder().config().problem_type() == ProblemType::Regression
    }

    /// Labels of texts, which are cut where they are too long.
    ///
    /// # Errors
    /// When a text cannot be tokenized.
    pub fn predict(&self, texts: &[Text]) -> Result<Vec<Classification>> {
        let encoded = self.encoder.encode(texts)?;
        let batch = self.encoder.batch(&encoded);
        let logits = self
            .model
            .logits(&batch.tokens(), None)?
            .to_dtype(DType::F32)?;
        let scores = match self.model.encoder().config().problem_type() {
            ProblemType::Regression => logits,
            ProblemType::SingleLabelClassification => softmax(&logits)?,
            ProblemType::MultiLabelClassification => (logits.neg()?.exp()? + 1.0)?.recip()?,
        };
        let scores: Vec<Vec<f32>> = scores.to_vec2()?;
        let best = |scores: &[f32]| {
            let order = |a: &usize, b: &usize| scores[*a].total_cmp(&scores[*b]);
            (0..scores.len()).rev().max_by(order).unwrap_or(0)
        };
        let classified = scores.into_iter().map(|scores| Classification {
            label: best(&scores),
            scores,
        });
        Ok(classified.collect())
    }
}

/// Turns texts into vectors of length 1 whose products say how alike the texts are, by the mean of
/// their hidden states, as sentence-transformers does.
pub struct Embedder {
    model: SentenceEncoder,
    encoder: TextEncoder,
}

impl Embedder {
    /// Loads an encoder, see [`from_pretrained`]. Of a folder of sentence-transformers, the longest
    /// input is taken over, and other ways of pooling are refused.
    ///
    /// # Errors
    /// As [`from_pretrained`], and when the model has no tokenizer or pools in another way.
    pub fn from_pretrained(
        name: &str,
        max_length: Option<usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let pretrained = from_pretrained(name, Task::Base, 0, device)?;
        let (config, dir) = (&pretrained.config, &pretrained.dir);
        let max_length = match max_length {
            Some(length) => Some(length),
            None => sentence_length(dir)?,
        };
        check_pooling(dir)?;
        let encoder = TextEncoder::new(Tokenizer::load(dir, None)?, config, max_length)?;
        let model =
            SentenceEncoder::new(config, &pretrained.parameters, false, dtype)?.with_graphs();
        Ok(Self { model, encoder })
    }

    /// A vector `hidden_size` wide for each text; texts are cut where they are too long.
    ///
    /// # Errors
    /// When a text cannot be tokenized.
    pub fn embed(&self, texts: &[Text]) -> Result<Vec<Vec<f32>>> {
        let encoded = self.encoder.encode(texts)?;
        let batch = self.encoder.batch(&encoded);
        let means = self.model.mean(&batch.tokens(), None)?;
        let norms = means
            .sqr()?
            .sum_keepdim(D::Minus1)?
            .sqrt()?
            .maximum(1e-12)?;
        Ok(means.broadcast_div(&norms)?.to_vec2()?)
    }
}

fn softmax(logits: &Tensor) -> Result<Tensor> {
    let logits = logits.to_dtype(DType::F32)?;
    let exp = logits
        .broadcast_sub(&logits.max_keepdim(D::Minus1)?)?
        .exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
}

/// `max_seq_length` of sentence-transformers.
fn sentence_length(dir: &Path) -> Result<Option<usize>> {
    let json = read_json(&dir.join("sentence_bert_config.json"))?;
    Ok(json["max_seq_length"]
        .as_u64()
        .map(|length| length as usize))
}

/// Refuses models of sentence-transformers that do not take the mean.
fn check_pooling(dir: &Path) -> Result<()> {
    let path = dir.join("1_Pooling/config.json");
    let json = read_json(&path)?;
    let other = |(key, value): (&String, &Value)| {
        let is_mode = key.starts_with("pooling_mode_") && value == &Value::Bool(true);
        is_mode && key != "pooling_mode_mean_tokens"
    };
    if json.as_object().is_some_and(|json| json.iter().any(other))
        || json["pooling_mode"]
            .as_str()
            .is_some_and(|mode| mode != "mean")
    {
        bail!(
            "{}: only pooling by the mean is supported, got {json}",
            path.display()
        );
    }
    Ok(())
}

/// Null where there is no such file.
fn read_json(path: &Path) -> Result<Value> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not JSON", path.display())),
        Err(_) => Ok(Value::Null),
    }
}

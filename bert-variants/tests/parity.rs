//! Every kind of model and head computes what transformers computes: last hidden states, logits,
//! loss, and the gradient of every weight, on fixtures that `scripts/make_fixtures.py` made.
//!
//! The fixtures are of padded batches computed in f64, and here the same sequences run without
//! padding in f32. An error of rounding grows with depth and width, which are tiny: differences are
//! below 50 units in the last place of the largest value, and a wrong formula is far above.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use bert_variants::checkpoint::{Pretrained, from_pretrained};
use bert_variants::config::{BertConfig, ProblemType, Task};
use bert_variants::data::Batch;
use bert_variants::model::{
    Encoder, LanguageModel, SentenceEncoder, SequenceClassifier, Targets, TokenClassifier, Tokens,
};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{Gradients, Tape};

/// Largest difference, in parts of the largest expected value.
const TOLERANCE: f32 = 50.0 * f32::EPSILON;

fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut dirs: Vec<_> = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    dirs.sort();
    assert!(dirs.len() > 30);
    dirs
}

fn load(dir: &Path) -> Pretrained {
    let task = BertConfig::from_file(&dir.join("config.json"))
        .unwrap()
        .task;
    let loaded = from_pretrained(dir.to_str().unwrap(), task, 0, &Device::Cpu).unwrap();
    assert_eq!(loaded.initialized, Vec::<String>::new());
    assert_eq!(loaded.unused, Vec::<String>::new());
    loaded
}

/// The gradients of a fixture: they are saved as the weights of a model are.
fn load_gradients(dir: &Path) -> Pretrained {
    let copy = tempfile::tempdir().unwrap();
    fs::copy(dir.join("config.json"), copy.path().join("config.json")).unwrap();
    let weights = copy.path().join("model.safetensors");
    fs::copy(dir.join("gradients.safetensors"), weights).unwrap();
    load(copy.path())
}

/// Inputs and results of a fixture, with padding taken out.
struct Expected {
    tensors: HashMap<String, Tensor>,
    lengths: Vec<usize>,
    cu_seqlens: Vec<usize>,
}

impl Expected {
    fn read(dir: &Path) -> Self {
        let file = dir.join("expected.safetensors");
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let lengths: Vec<i32> = tensors["lengths"].to_vec1().unwrap();
        let lengths: Vec<usize> = lengths.into_iter().map(|len| len as usize).collect();
        let mut cu_seqlens = vec![0];
        for len in &lengths {
            cu_seqlens.push(cu_seqlens.last().unwrap() + len);
        }
        Self {
            tensors,
            lengths,
            cu_seqlens,
        }
    }

    /// A tensor `[batch, longest, ..]` without the rows of padding.
    fn unpadded(&self, name: &str) -> Option<Tensor> {
        let tensor = self.tensors.get(name)?;
        let rows = self.lengths.iter().enumerate();
        let rows: Vec<Tensor> = rows
            .map(|(i, &len)| tensor.get(i).unwrap().narrow(0, 0, len).unwrap())
            .collect();
        Some(Tensor::cat(&rows, 0).unwrap())
    }

    fn ids(&self, name: &str) -> Option<Vec<i32>> {
        Some(self.unpadded(name)?.to_vec1().unwrap())
    }

    fn values<T: candle_core::WithDType>(&self, name: &str) -> Vec<T> {
        self.tensors[name].flatten_all().unwrap().to_vec1().unwrap()
    }
}

fn unsigned(values: Vec<i32>) -> Vec<u32> {
    values.into_iter().map(|value| value as u32).collect()
}

/// Positions and classes of the labels; those of a causal model one position before.
fn labelled(expected: &Expected, causal: bool) -> (Vec<u32>, Vec<u32>) {
    let labels = expected.ids("labels").unwrap();
    let shift = usize::from(causal);
    let mut pairs = Vec::new();
    for bounds in expected.cu_seqlens.windows(2) {
        let sequence = labels
            .iter()
            .enumerate()
            .take(bounds[1])
            .skip(bounds[0] + shift);
        let labelled = sequence.filter(|(_, label)| **label >= 0);
        pairs.extend(labelled.map(|(at, label)| ((at - shift) as u32, *label as u32)));
    }
    pairs.into_iter().unzip()
}

/// Last hidden states, logits and loss.
type Results = (Tensor, Tensor, Tensor);

fn run(pretrained: &Pretrained, expected: &Expected) -> Results {
    let ids = unsigned(expected.ids("input_ids").unwrap());
    let types = expected.ids("token_type_ids").map(unsigned);
    let tokens = Tokens {
        ids: &ids,
        cu_seqlens: &expected.cu_seqlens,
        token_type_ids: types.as_deref(),
    };
    let Pretrained {
        config, parameters, ..
    } = pretrained;
    let hidden = |encoder: &Encoder| encoder.forward(&tokens, None).unwrap();
    match config.task {
        Task::LanguageModel => {
            let model = LanguageModel::new(config, parameters, true, DType::F32).unwrap();
            let everywhere: Vec<u32> = (0..ids.len() as u32).collect();
            let logits = model.logits(&tokens, &everywhere, None).unwrap();
            let (label_positions, labels) = labelled(expected, config.is_decoder);
            // The data pipeline has no segments, so here the loss goes by another way.
            let loss = match types {
                Some(_) => cross_entropy(&logits, &label_positions, &labels),
                None => {
                    let batch = Batch {
                        input_ids: ids.clone(),
                        cu_seqlens: expected.cu_seqlens.clone(),
                        label_positions,
                        labels,
                    };
                    model.loss(&batch, None).unwrap()
                }
            };
            (hidden(model.encoder()), logits, loss)
        }
        Task::SequenceClassification => {
            let model = SequenceClassifier::new(config, parameters, true, DType::F32).unwrap();
            let logits = model.logits(&tokens, None).unwrap();
            let loss = match config.problem_type() {
                ProblemType::SingleLabelClassification => {
                    let classes = unsigned(expected.values("labels"));
                    model.loss(&tokens, Targets::Classes(&classes), None)
                }
                _ => model.loss(&tokens, Targets::Values(&expected.values("labels")), None),
            };
            (hidden(model.encoder()), logits, loss.unwrap())
        }
        Task::TokenClassification => {
            let model = TokenClassifier::new(config, parameters, true, DType::F32).unwrap();
            let (positions, classes) = labelled(expected, false);
            let logits = model.logits(&tokens, None).unwrap();
            let loss = model.loss(&tokens, &positions, &classes, None).unwrap();
            (hidden(model.encoder()), logits, loss)
        }
        Task::QuestionAnswering => {
            let model = TokenClassifier::new(config, parameters, true, DType::F32).unwrap();
            let starts = unsigned(expected.values("start_positions"));
            let ends = unsigned(expected.values("end_positions"));
            let answers: Vec<_> = starts.into_iter().zip(ends).map(|(s, e)| [s, e]).collect();
            let logits = model.logits(&tokens, None).unwrap();
            let loss = model.answer_loss(&tokens, &answers, None).unwrap();
            (hidden(model.encoder()), logits, loss)
        }
        Task::Base => {
            let model = SentenceEncoder::new(config, parameters, true, DType::F32).unwrap();
            let pooled = model.pooled(&tokens, None).unwrap();
            let loss = pooled.sqr().unwrap().mean_all().unwrap();
            (hidden(model.encoder()), pooled, loss)
        }
    }
}

fn cross_entropy(logits: &Tensor, positions: &[u32], labels: &[u32]) -> Tensor {
    let rows = Tensor::new(positions, &Device::Cpu).unwrap();
    let logits = candle_rope_attn::ops::gather_rows(logits, &rows).unwrap();
    let labels = Tensor::new(labels, &Device::Cpu).unwrap();
    candle_rope_attn::ops::cross_entropy(&logits, &labels).unwrap()
}

fn largest(x: &Tensor) -> f32 {
    x.abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .max(0)
        .unwrap()
        .to_scalar()
        .unwrap()
}

/// The largest difference, which must be within tolerance of the largest value.
fn difference(what: &str, found: &Tensor, expected: &Tensor, at_least: f32) -> f32 {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let difference = largest(&(found - expected).unwrap());
    let scale = largest(expected).max(at_least);
    assert!(
        difference <= TOLERANCE * scale,
        "{what}: {difference} of {scale}"
    );
    difference
}

/// Windows, positions and biases must not see the neighbours in a batch.
#[test]
fn sequences_of_a_batch_do_not_depend_on_each_other() {
    for dir in fixtures() {
        let Pretrained {
            config, parameters, ..
        } = load(&dir);
        let encoder = Encoder::new(&config, &parameters, false, DType::F32).unwrap();
        let expected = Expected::read(&dir);
        let ids = unsigned(expected.ids("input_ids").unwrap());
        let together = Tokens {
            ids: &ids,
            cu_seqlens: &expected.cu_seqlens,
            token_type_ids: None,
        };
        let together = encoder.forward(&together, None).unwrap();
        for bounds in expected.cu_seqlens.windows(2) {
            let (start, len) = (bounds[0], bounds[1] - bounds[0]);
            let alone = Tokens {
                ids: &ids[start..start + len],
                cu_seqlens: &[0, len],
                token_type_ids: None,
            };
            let alone = encoder.forward(&alone, None).unwrap();
            let together = together.narrow(0, start, len).unwrap();
            difference(&format!("{}", dir.display()), &alone, &together, 0.0);
        }
    }
}

#[test]
fn models_equal_those_of_transformers() {
    println!(
        "{:24} {:>9} {:>9} {:>9} {:>9}",
        "", "hidden", "logits", "loss", "gradient"
    );
    for dir in fixtures() {
        let name = dir.file_name().unwrap().to_str().unwrap().to_string();
        let (pretrained, expected) = (load(&dir), Expected::read(&dir));
        let (hidden, logits, loss) = run(&pretrained, &expected);
        let mut on_tape = Gradients::default();
        let ((_, _, recorded), tape) =
            Tape::record(|| anyhow::Ok(run(&pretrained, &expected))).unwrap();
        tape.backward(&recorded, 1.0, &mut on_tape).unwrap();
        let of_tokens = !matches!(
            pretrained.config.task,
            Task::SequenceClassification | Task::Base
        );
        let expected_logits = match of_tokens {
            true => expected.unpadded("logits").unwrap(),
            false => expected.tensors["logits"].clone(),
        };
        let last = expected.unpadded("last_hidden_state").unwrap();
        let hidden = difference(&format!("{name}: hidden"), &hidden, &last, 0.0);
        let logits = difference(&format!("{name}: logits"), &logits, &expected_logits, 0.0);
        let expected_loss = expected.tensors["loss"].get(0).unwrap();
        let in_graph = loss.backward().unwrap();
        let loss = difference(&format!("{name}: loss"), &loss, &expected_loss, 0.0);

        let expected = load_gradients(&dir);
        // A gradient that is zero but for rounding is compared by the size of the others.
        let typical = expected
            .parameters
            .vars()
            .iter()
            .map(|(_, var)| largest(var));
        let typical = typical.fold(0.0, f32::max);
        let mut worst = 0f32;
        for ((var_name, var), (_, expected)) in pretrained
            .parameters
            .vars()
            .iter()
            .zip(expected.parameters.vars())
        {
            let what = format!("{name}: gradient of {var_name}");
            let in_graph = in_graph.get(var).expect(&what);
            worst = worst.max(difference(&what, in_graph, expected, 0.1 * typical));
            let on_tape = on_tape.remove(var).expect(&what);
            worst = worst.max(difference(&what, &on_tape, expected, 0.1 * typical));
        }
        println!("{name:24} {hidden:9.1e} {logits:9.1e} {loss:9.1e} {worst:9.1e}");
    }
}

//! Models of every kind on disk: written, read again, in several files, in halves, renamed.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use bert_variants::checkpoint::{ModelCard, from_pretrained, save_pretrained};
use bert_variants::config::{BertConfig, Dropouts, ModelType, Norm, Task};
use bert_variants::data::Batch;
use bert_variants::model::{LanguageModel, Tokens};
use bert_variants::parameters::Parameters;
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{Gradients, Tape};
use clap::ValueEnum;

const TASKS: [Task; 5] = [
    Task::Base,
    Task::LanguageModel,
    Task::SequenceClassification,
    Task::TokenClassification,
    Task::QuestionAnswering,
];

fn config(model_type: ModelType) -> BertConfig {
    BertConfig::new(model_type, 50, 3, 16, 4, 32)
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn values(parameters: &Parameters) -> HashMap<String, Vec<f32>> {
    let read = |(name, var): &(String, candle_core::Var)| {
        (name.clone(), var.flatten_all().unwrap().to_vec1().unwrap())
    };
    parameters.vars().iter().map(read).collect()
}

fn load(dir: &Path, task: Task) -> bert_variants::checkpoint::Pretrained {
    from_pretrained(dir.to_str().unwrap(), task, 0, &Device::Cpu).unwrap()
}

/// Rewrites the weights of a fixture into a new directory.
fn rewritten(
    name: &str,
    change: impl Fn(String, Tensor) -> Option<(String, Tensor)>,
) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = fixture(name);
    fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu);
    let tensors = tensors
        .unwrap()
        .into_iter()
        .filter_map(|(name, tensor)| change(name, tensor));
    let tensors: HashMap<_, _> = tensors.collect();
    candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
    dir
}

#[test]
fn what_is_saved_is_loaded_again() {
    for model_type in ModelType::value_variants() {
        for task in TASKS {
            if (*model_type, task) == (ModelType::NomicBert, Task::QuestionAnswering) {
                continue;
            }
            let config = config(*model_type).with_task(task);
            let parameters = Parameters::init(&config, 7, &Device::Cpu).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path().join("model");
            save_pretrained(&dir, &config, &parameters, None, &ModelCard::default()).unwrap();
            let loaded = load(&dir, task);
            assert_eq!(loaded.config, config);
            assert_eq!(loaded.initialized, Vec::<String>::new());
            assert_eq!(loaded.unused, Vec::<String>::new());
            assert_eq!(values(&loaded.parameters), values(&parameters));
            let card = fs::read_to_string(dir.join("README.md")).unwrap();
            assert!(card.contains("from_pretrained"), "{card}");
        }
    }
}

/// A wiring mistake shows as a weight that never learns.
#[test]
fn every_weight_gets_a_gradient() {
    for model_type in ModelType::value_variants() {
        let mut config = config(*model_type);
        // All segments but the first are without a gradient, as all tokens are of the first.
        config.type_vocab_size = config.type_vocab_size.min(1);
        config.dropout = Dropouts::of_hidden(0.1);
        let parameters = Parameters::init(&config, 0, &Device::Cpu).unwrap();
        let model = LanguageModel::new(&config, &parameters, true, DType::F32).unwrap();
        let batch = Batch {
            input_ids: (0..40).map(|i| i * 7 % 50).collect(),
            cu_seqlens: vec![0, 8, 40],
            label_positions: (0..40).collect(),
            labels: (0..40).map(|i| i * 3 % 50).collect(),
        };
        let in_graph = model.loss(&batch, Some(1)).unwrap().backward().unwrap();
        let recorded = |model: &LanguageModel| {
            let mut gradients = Gradients::default();
            let (loss, tape) = Tape::record(|| model.loss(&batch, Some(1))).unwrap();
            tape.backward(&loss, 1.0, &mut gradients).unwrap();
            gradients
        };
        let mut on_tape = recorded(&model);
        let mut checkpointed = recorded(&model.with_checkpointing(true));
        let largest = |x: &Tensor| -> f32 {
            let sizes = x.flatten_all().unwrap().abs().unwrap();
            sizes.max(0).unwrap().to_scalar().unwrap()
        };
        for (name, var) in parameters.vars() {
            let in_graph = in_graph.get(var).expect(name);
            let on_tape = on_tape.remove(var).expect(name);
            let checkpointed = checkpointed.remove(var).expect(name);
            assert_eq!(largest(&(&on_tape - checkpointed).unwrap()), 0.0, "{name}");
            let difference = largest(&(in_graph - on_tape).unwrap());
            assert!(largest(in_graph) > 0.0, "{name} of {model_type:?}");
            assert!(
                difference <= 1e-5 * largest(in_graph),
                "{name} of {model_type:?}"
            );
        }
    }
}

#[test]
fn attention_dropout_depends_on_its_seed_alone() {
    let mut config = config(ModelType::Roformer);
    config.dropout.attention_probs = 0.5;
    let parameters = Parameters::init(&config, 0, &Device::Cpu).unwrap();
    let model = LanguageModel::new(&config, &parameters, false, DType::F32).unwrap();
    let ids: Vec<u32> = (0..20).collect();
    let tokens = Tokens {
        ids: &ids,
        cu_seqlens: &[0, 20],
        token_type_ids: None,
    };
    let run = |seed| -> Vec<Vec<f32>> {
        model
            .encoder()
            .forward(&tokens, seed)
            .unwrap()
            .to_vec2()
            .unwrap()
    };
    assert_eq!(run(Some(1)), run(Some(1)));
    assert_ne!(run(Some(1)), run(Some(2)));
    assert_ne!(run(Some(1)), run(None));
}

#[test]
fn names_without_prefix_and_old_names_are_found() {
    let expected = values(&load(&fixture("bert-masked-lm"), Task::LanguageModel).parameters);
    let renamed = rewritten("bert-masked-lm", |name, tensor| {
        let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
        let name = name.replace("LayerNorm.bias", "LayerNorm.beta");
        Some((
            name.strip_prefix("bert.").unwrap_or(&name).to_string(),
            tensor,
        ))
    });
    let ids = Tensor::arange(0i64, 16, &Device::Cpu).unwrap();
    let path = renamed.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    tensors.insert("embeddings.position_ids".into(), ids);
    tensors.insert(
        "pooler.dense.bias".into(),
        Tensor::zeros(16, DType::F32, &Device::Cpu).unwrap(),
    );
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let loaded = load(renamed.path(), Task::LanguageModel);
    assert_eq!(values(&loaded.parameters), expected);
    assert_eq!(loaded.unused, ["pooler.dense.bias"]);
}

#[test]
fn a_head_that_is_not_there_starts_anew() {
    let loaded = load(&fixture("bert-masked-lm"), Task::SequenceClassification);
    let expected = [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ];
    assert_eq!(loaded.initialized, expected);
    assert!(loaded.require_head().is_err());
    assert!(loaded.unused.contains(&"cls.predictions.bias".to_string()));
    // ModernBERT's classifier takes over the dense layer of its language model.
    let loaded = load(
        &fixture("modernbert-masked-lm"),
        Task::SequenceClassification,
    );
    assert_eq!(loaded.initialized, ["classifier.weight", "classifier.bias"]);
}

#[test]
fn halves_are_read_as_f32() {
    let exact = values(&load(&fixture("mpnet-masked-lm"), Task::LanguageModel).parameters);
    for (dtype, precision) in [(DType::F16, 1e-3), (DType::BF16, 1e-2), (DType::F64, 0.0)] {
        let dir = rewritten("mpnet-masked-lm", |name, tensor| {
            Some((name, tensor.to_dtype(dtype).unwrap()))
        });
        for (name, values) in values(&load(dir.path(), Task::LanguageModel).parameters) {
            for (value, exact) in values.iter().zip(&exact[&name]) {
                assert!(
                    (value - exact).abs() <= precision * exact.abs().max(1e-3),
                    "{name}"
                );
            }
        }
    }
}

#[test]
fn several_files_make_one_model() {
    let from = fixture("modernbert-masked-lm");
    let expected = values(&load(&from, Task::LanguageModel).parameters);
    let dir = tempfile::tempdir().unwrap();
    fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu);
    let mut shards = [HashMap::new(), HashMap::new()];
    let mut weight_map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.unwrap().into_iter().enumerate() {
        weight_map.insert(name.clone(), format!("model-{}.safetensors", i % 2).into());
        shards[i % 2].insert(name, tensor);
    }
    for (i, shard) in shards.iter().enumerate() {
        let path = dir.path().join(format!("model-{i}.safetensors"));
        candle_core::safetensors::save(shard, path).unwrap();
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    let path = dir.path().join("model.safetensors.index.json");
    fs::write(path, index.to_string()).unwrap();
    assert_eq!(
        values(&load(dir.path(), Task::LanguageModel).parameters),
        expected
    );
}

#[test]
fn tables_of_positions_are_cut_and_stretched() {
    let table = |resized: &bert_variants::checkpoint::Pretrained| -> Vec<Vec<f32>> {
        let name = bert_variants::parameters::POSITION_EMBEDDINGS;
        resized
            .parameters
            .get(name, false)
            .unwrap()
            .to_vec2()
            .unwrap()
    };
    let load = || load(&fixture("roberta-masked-lm"), Task::LanguageModel);
    let old = table(&load());
    let first = load().config.position_table.unwrap();
    assert_eq!((old.len(), first), (16, 2));

    let shorter = load().resize_positions(5).unwrap();
    assert_eq!(table(&shorter), old[..7]);
    assert_eq!(shorter.config.max_length(), Some(5));

    let longer = load().resize_positions(27).unwrap();
    let new = table(&longer);
    assert_eq!(new.len(), 29);
    assert_eq!(new[..3], old[..3]);
    assert_eq!(new[28], old[15]);
    // Twice as many steps between the ends: every second row is an old one.
    assert_eq!(new[4], old[3]);
    let between = (old[2][0] + old[3][0]) / 2.0;
    assert!((new[3][0] - between).abs() < 1e-6);

    let rope = from_pretrained(
        fixture("roformer-masked-lm").to_str().unwrap(),
        Task::LanguageModel,
        0,
        &Device::Cpu,
    );
    let rope = rope.unwrap().resize_positions(100).unwrap();
    assert_eq!(rope.config.max_position_embeddings, 100);
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let config = config(ModelType::Bert);
    assert_eq!(config.norm, Norm::Post);
    let parameters = Parameters::init(&config, 0, &Device::Cpu).unwrap();
    let model = LanguageModel::new(&config, &parameters, false, DType::F32).unwrap();
    let error = |ids: &[u32], cu_seqlens: &[usize], types: Option<&[u32]>| {
        let tokens = Tokens {
            ids,
            cu_seqlens,
            token_type_ids: types,
        };
        model
            .encoder()
            .forward(&tokens, None)
            .unwrap_err()
            .to_string()
    };
    assert!(error(&[50], &[0, 1], None).contains("token id 50"));
    assert!(error(&[1; 33], &[0, 33], None).contains("position table has rows for 32"));
    assert!(error(&[1; 3], &[0, 1, 1, 3], None).contains("sequence 1 is empty"));
    assert!(error(&[1; 3], &[0, 2], None).contains("cu_seqlens"));
    assert!(error(&[1; 3], &[0, 3, 2], None).contains("cu_seqlens"));
    assert!(error(&[1; 3], &[], None).contains("cu_seqlens"));
    assert!(error(&[1; 3], &[0, 3], Some(&[0])).contains("token_type_ids"));
    assert!(error(&[1; 3], &[0, 3], Some(&[0, 1, 2])).contains("token type 2"));
}

/// The last layer computes only what is asked for.
#[test]
fn tokens_asked_for_are_those_of_the_whole() {
    let (ids, cu_seqlens): (Vec<u32>, _) = ((5..25).collect(), [0, 7, 8, 20]);
    let tokens = Tokens {
        ids: &ids,
        cu_seqlens: &cu_seqlens,
        token_type_ids: None,
    };
    for model_type in ModelType::value_variants() {
        let config = config(*model_type);
        let parameters = Parameters::init(&config, 3, &Device::Cpu).unwrap();
        let model = LanguageModel::new(&config, &parameters, false, DType::F32).unwrap();
        let logits = |positions: &[u32]| -> Vec<Vec<f32>> {
            let logits = model.logits(&tokens, positions, None).unwrap();
            logits.to_vec2().unwrap()
        };
        let all = logits(&(0..20).collect::<Vec<_>>());
        let positions = [19, 7, 0, 7, 12];
        for (position, row) in positions.iter().zip(logits(&positions)) {
            for (got, expected) in row.iter().zip(&all[*position as usize]) {
                assert!((got - expected).abs() < 1e-5, "{model_type:?} {position}");
            }
        }
        let error = model.logits(&tokens, &[3, 20], None).unwrap_err();
        assert!(error.to_string().contains("position 20"), "{error}");
    }
}

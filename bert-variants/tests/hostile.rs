//! Model folders that are damaged, contradictory or made to harm: each is refused with an error
//! that says what is wrong, without a panic and without much memory.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;

use bert_variants::checkpoint::from_pretrained;
use bert_variants::config::Task;
use bert_variants::predict::Classifier;
use candle_core::{DType, Device};
use peak_alloc::PeakAlloc;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

#[global_allocator]
static PEAK_ALLOC: PeakAlloc = PeakAlloc;

/// One at a time, as the memory of all threads is measured.
static ALONE: Mutex<()> = Mutex::new(());

/// The folders hold 30 kB.
const MOST_MEMORY: usize = 4 << 20;

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture(name).join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn load(dir: &Path) -> Result<(), String> {
    let name = dir.to_str().unwrap();
    let load = || from_pretrained(name, Task::LanguageModel, 0, &Device::Cpu).map(|_| ());
    let _alone = ALONE.lock();
    PEAK_ALLOC.reset_peak_usage();
    let before = PEAK_ALLOC.current_usage();
    let result = catch_unwind(AssertUnwindSafe(load)).expect("the loader panicked");
    let memory = PEAK_ALLOC.peak_usage().saturating_sub(before);
    assert!(memory < MOST_MEMORY, "loading took {memory} bytes");
    result.map_err(|error| format!("{error:#}"))
}

fn edit(dir: &Path, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let path = dir.join(file);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

fn edit_config(dir: &Path, key: &str, value: Value) {
    edit(dir, "config.json", |bytes| {
        let mut json: Value = serde_json::from_slice(bytes).unwrap();
        json[key] = value;
        *bytes = serde_json::to_vec(&json).unwrap();
    });
}

/// Changes the header of the weights, whose length is corrected.
fn edit_header(dir: &Path, change: impl FnOnce(&mut Value)) {
    edit(dir, "model.safetensors", |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let mut header = serde_json::to_vec(&header).unwrap();
        header.resize(header.len().next_multiple_of(8), b' ');
        let tensors = bytes.split_off(8 + length);
        *bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &tensors].concat();
    });
}

fn write_index(dir: &Path, shard: &str) {
    fs::rename(dir.join("model.safetensors"), dir.join("part.safetensors")).unwrap();
    let index = json!({"weight_map": {"cls.predictions.bias": shard}});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Name, what is done to a good folder, and what the error must say.
type Case = (&'static str, fn(&Path), &'static str);

const BIAS: &str = "cls.predictions.bias";
const WEIGHTS: &str = "model.safetensors";

const CASES: &[Case] = &[
    (
        "no configuration",
        |dir| fs::remove_file(dir.join("config.json")).unwrap(),
        "has no config.json",
    ),
    (
        "no weights",
        |dir| fs::remove_file(dir.join(WEIGHTS)).unwrap(),
        "holds no model.safetensors",
    ),
    (
        "pickled weights",
        |dir| fs::rename(dir.join(WEIGHTS), dir.join("pytorch_model.bin")).unwrap(),
        "save_pretrained",
    ),
    (
        "weights are a folder",
        |dir| {
            fs::remove_file(dir.join(WEIGHTS)).unwrap();
            fs::create_dir(dir.join(WEIGHTS)).unwrap();
        },
        "holds no model.safetensors",
    ),
    (
        "empty configuration",
        |dir| fs::write(dir.join("config.json"), "").unwrap(),
        "config.json",
    ),
    (
        "no object",
        |dir| fs::write(dir.join("config.json"), "[1]").unwrap(),
        "config.json",
    ),
    (
        "not UTF-8",
        |dir| fs::write(dir.join("config.json"), b"\xff\xfe{}").unwrap(),
        "config.json",
    ),
    (
        "endless nesting",
        |dir| fs::write(dir.join("config.json"), "{\"a\":".repeat(100_000)).unwrap(),
        "recursion limit",
    ),
    (
        "unknown kind",
        |dir| edit_config(dir, "model_type", json!("gpt2")),
        "model_type \"gpt2\"",
    ),
    (
        "huge width",
        |dir| {
            edit_config(dir, "hidden_size", json!(1u64 << 27));
            edit_config(dir, "num_attention_heads", json!(1u64 << 20));
        },
        "asks for",
    ),
    (
        "many layers",
        |dir| edit_config(dir, "num_hidden_layers", json!(1_000)),
        "the files lack bert.encoder.layer.2",
    ),
    (
        "too many layers",
        |dir| edit_config(dir, "num_hidden_layers", json!(u64::MAX)),
        "num_hidden_layers",
    ),
    (
        "fewer layers",
        |dir| edit_config(dir, "num_hidden_layers", json!(1)),
        "no place for: bert.encoder.layer.1",
    ),
    (
        "huge vocabulary",
        |dir| edit_config(dir, "vocab_size", json!(200_000_000)),
        "asks for [200000000, 16]",
    ),
    (
        "huge position table",
        |dir| edit_config(dir, "max_position_embeddings", json!(200_000_000)),
        "asks for",
    ),
    (
        "wide heads",
        |dir| edit_config(dir, "num_attention_heads", json!(3)),
        "not a multiple",
    ),
    (
        "infinite epsilon",
        |dir| {
            edit(dir, "config.json", |bytes| {
                let text = String::from_utf8(bytes.clone()).unwrap();
                *bytes = text.replace("1e-12", "1e999").into_bytes();
            })
        },
        "config.json",
    ),
    (
        "another kind's weights",
        |dir| edit_config(dir, "model_type", json!("mpnet")),
        "the files lack mpnet.",
    ),
    (
        "no bytes",
        |dir| fs::write(dir.join(WEIGHTS), b"").unwrap(),
        "has 0 bytes",
    ),
    (
        "cut in the header",
        |dir| edit(dir, WEIGHTS, |bytes| bytes.truncate(100)),
        "says that its header has",
    ),
    (
        "cut in the weights",
        |dir| edit(dir, WEIGHTS, |bytes| bytes.truncate(bytes.len() - 4)),
        "its header tells of",
    ),
    (
        "bytes after the end",
        |dir| edit(dir, WEIGHTS, |bytes| bytes.extend([0; 64])),
        "its header tells of",
    ),
    (
        "huge header",
        |dir| edit(dir, WEIGHTS, |bytes| bytes[..8].fill(0xff)),
        "says that its header has",
    ),
    (
        "header of 90 MB",
        |dir| {
            edit(dir, WEIGHTS, |bytes| {
                bytes[..8].copy_from_slice(&90_000_000u64.to_le_bytes())
            })
        },
        "says that its header has 90000000",
    ),
    (
        "header is no JSON",
        |dir| edit(dir, WEIGHTS, |bytes| bytes[8..40].fill(b'x')),
        "header is damaged",
    ),
    (
        "a pickle called safetensors",
        |dir| fs::write(dir.join(WEIGHTS), b"\x80\x02}q\x00.PKxxxxxxxxxxxx").unwrap(),
        "says that its header has",
    ),
    (
        "unknown dtype",
        |dir| edit_header(dir, |header| header[BIAS]["dtype"] = json!("F13")),
        "header is damaged",
    ),
    (
        "whole numbers",
        |dir| edit_header(dir, |header| header[BIAS]["dtype"] = json!("I32")),
        "dtype I32, expected F32",
    ),
    (
        "other dtype",
        |dir| edit_header(dir, |header| header[BIAS]["dtype"] = json!("F16")),
        "header is damaged",
    ),
    (
        "other shape",
        |dir| edit_header(dir, |header| header[BIAS]["shape"] = json!([2, 16])),
        "cls.predictions.bias has shape [2, 16]",
    ),
    (
        "shape that overflows",
        |dir| {
            edit_header(dir, |header| {
                header[BIAS]["shape"] = json!([1u64 << 40, 1u64 << 40])
            })
        },
        "header is damaged",
    ),
    (
        "negative shape",
        |dir| edit_header(dir, |header| header[BIAS]["shape"] = json!([-1])),
        "header is damaged",
    ),
    (
        "offsets out of range",
        |dir| {
            edit_header(dir, |header| {
                header[BIAS]["data_offsets"] = json!([1u64 << 50, (1u64 << 50) + 128])
            })
        },
        "header is damaged",
    ),
    (
        "overlapping offsets",
        |dir| edit_header(dir, |header| header[BIAS]["data_offsets"] = json!([8, 136])),
        "header is damaged",
    ),
    (
        "offsets backwards",
        |dir| edit_header(dir, |header| header[BIAS]["data_offsets"] = json!([128, 0])),
        "header is damaged",
    ),
    (
        "a weight renamed",
        |dir| {
            edit_header(dir, |header| {
                let bias = header
                    .as_object_mut()
                    .unwrap()
                    .remove("bert.embeddings.LayerNorm.bias");
                header["bert.embeddings.LayerNorm.bia"] = bias.unwrap();
            })
        },
        "the files lack bert.embeddings.LayerNorm.bias",
    ),
    (
        "not a number",
        |dir| {
            edit(dir, WEIGHTS, |bytes| {
                let end = bytes.len();
                bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
            })
        },
        "is NaN: the model is broken",
    ),
    (
        "infinite",
        |dir| {
            edit(dir, WEIGHTS, |bytes| {
                let end = bytes.len();
                bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
            })
        },
        "is inf: the model is broken",
    ),
    (
        "index out of the folder",
        |dir| write_index(dir, "../part.safetensors"),
        "outside of its folder",
    ),
    (
        "index to the root",
        |dir| write_index(dir, "/etc/passwd"),
        "outside of its folder",
    ),
    (
        "index to the folder",
        |dir| write_index(dir, "."),
        "outside of its folder",
    ),
    (
        "index to nothing",
        |dir| write_index(dir, "none.safetensors"),
        "none.safetensors",
    ),
    (
        "index of another model",
        |dir| {
            write_index(dir, "part.safetensors");
            edit(dir, "model.safetensors.index.json", |bytes| {
                let text = String::from_utf8(bytes.clone()).unwrap();
                *bytes = text
                    .replace("cls.predictions.bias", "something")
                    .into_bytes();
            });
        },
        "the files are of different models",
    ),
    (
        "index to itself",
        |dir| write_index(dir, "model.safetensors.index.json"),
        "not a whole safetensors file",
    ),
    (
        "index of nonsense",
        |dir| {
            write_index(dir, "part.safetensors");
            fs::write(
                dir.join("model.safetensors.index.json"),
                "{\"weight_map\": [1]}",
            )
            .unwrap();
        },
        "not the index of a sharded model",
    ),
];

#[test]
fn bad_folders_are_refused() {
    for (name, damage, message) in CASES {
        let dir = copy("bert-masked-lm");
        load(dir.path()).unwrap();
        damage(dir.path());
        let error = load(dir.path()).expect_err(name);
        assert!(error.contains(message), "{name}: {error}");
        assert!(error.len() < 2000, "{name}: {error}");
    }
    let error = load(Path::new("/nowhere/at/all")).unwrap_err();
    assert!(
        error.contains("found no directory /nowhere/at/all"),
        "{error}"
    );
}

#[test]
fn a_table_of_angles_that_is_not_ours_is_refused() {
    let dir = copy("roformer-masked-lm");
    edit_config(dir.path(), "rope_theta", json!(500.0));
    let error = load(dir.path()).unwrap_err();
    assert!(
        error.contains("is not the table of rope_theta 500"),
        "{error}"
    );
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let dir = copy("bert-sequence");
    let words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        .map(String::from)
        .into_iter();
    let words: Vec<String> = words.chain((0..100).map(|i| format!("word{i}"))).collect();
    fs::write(dir.path().join("vocab.txt"), words.join("\n")).unwrap();
    let name = dir.path().to_str().unwrap();
    let loaded = Classifier::from_pretrained(name, None, DType::F32, &Device::Cpu);
    let error = loaded.err().unwrap().to_string();
    assert!(
        error.contains("has 105 tokens, but the model's vocab_size is 24"),
        "{error}"
    );
}

/// Whatever bytes change, loading ends with a model or an error.
#[test]
fn changed_bytes_never_panic() {
    let files = ["config.json", "model.safetensors"].map(|file| {
        (
            file,
            fs::read(fixture("modernbert-masked-lm").join(file)).unwrap(),
        )
    });
    let dir = copy("modernbert-masked-lm");
    let change = (
        0..2usize,
        any::<prop::sample::Index>(),
        any::<u8>(),
        0..4usize,
    );
    // The header of the weights is 2 kB, and what comes after are numbers.
    let changes = prop::collection::vec(change, 1..6);
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    let mut runner = TestRunner::new(Config {
        cases: cases.unwrap_or(1000),
        failure_persistence: None,
        ..Config::default()
    });
    let result = runner.run(&changes, |changes| {
        let mut changed = files.clone();
        for (file, at, byte, kind) in changes {
            let bytes = &mut changed[file].1;
            let at = at.index(bytes.len().min(2500));
            match kind {
                0 => drop(bytes.remove(at)),
                1 => bytes.insert(at, byte),
                2 => bytes[at] ^= 1 << (byte % 8),
                _ => bytes[at] = byte,
            }
        }
        for (file, bytes) in &changed {
            fs::write(dir.path().join(file), bytes).unwrap();
        }
        let _ = load(dir.path());
        Ok(())
    });
    result.unwrap();
}

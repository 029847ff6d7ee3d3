//! The programs `predict` and `embed`, on tiny models with a vocabulary of a few words.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn model(fixture: &str, words: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(fixture);
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), dir.path().join(file)).unwrap();
    }
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(String::from);
    let words = special
        .into_iter()
        .chain((5..words).map(|i| format!("w{i}")));
    fs::write(
        dir.path().join("vocab.txt"),
        words.collect::<Vec<_>>().join("\n"),
    )
    .unwrap();
    dir
}

fn run(program: &str, args: &[&str], input: &str) -> Output {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that refuses its arguments does not read.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn answers(output: Output) -> Vec<Value> {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn masks_are_filled() {
    let dir = model("bert-masked-lm", 32);
    let args = [
        "fill-mask",
        "--model",
        dir.path().to_str().unwrap(),
        "--top-k",
        "3",
    ];
    let input = "w5 [MASK] w7\n[MASK] [MASK]\n";
    let answers = answers(run(env!("CARGO_BIN_EXE_predict"), &args, input));
    assert_eq!(answers[0]["text"], "w5 [MASK] w7");
    assert_eq!(answers[1]["masks"].as_array().unwrap().len(), 2);
    let best = answers[0]["masks"][0].as_array().unwrap();
    assert_eq!(best.len(), 3);
    let score = |i: usize| best[i]["score"].as_f64().unwrap();
    assert!(score(0) >= score(1) && score(1) >= score(2) && score(0) < 1.0);

    let output = run(env!("CARGO_BIN_EXE_predict"), &args, "w5\n");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no [MASK]"));
}

#[test]
fn texts_and_pairs_are_classified() {
    let dir = model("roformer-sequence", 24);
    let args = [
        "classify",
        "--jsonl",
        "--batch-size",
        "2",
        "--model",
        dir.path().to_str().unwrap(),
    ];
    let input =
        "{\"text\": \"w5 w6\"}\n{\"text\": \"w5 w6\", \"text_pair\": \"w9\"}\n{\"text\": \"\"}\n";
    let answers = answers(run(env!("CARGO_BIN_EXE_predict"), &args, input));
    assert_eq!(answers.len(), 3);
    let scores = answers[0]["scores"].as_object().unwrap();
    assert_eq!(
        scores.keys().collect::<Vec<_>>(),
        ["LABEL_0", "LABEL_1", "LABEL_2"]
    );
    let sum: f64 = scores.values().map(|score| score.as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-5);
    assert_eq!(
        answers[0]["score"],
        scores[answers[0]["label"].as_str().unwrap()]
    );
    assert_eq!(answers[1]["text_pair"], "w9");
    assert_ne!(answers[0]["scores"], answers[1]["scores"]);

    let output = run(
        env!("CARGO_BIN_EXE_predict"),
        &args,
        "{\"text\": \"w5\"}\nw6\n",
    );
    let error = String::from_utf8_lossy(&output.stderr).to_string();
    assert!(
        error.contains("line 2") && error.contains("expected a JSON object"),
        "{error}"
    );

    // A language model has no classifier, and an untrained one would say anything.
    let dir = model("bert-masked-lm", 32);
    let args = ["classify", "--model", dir.path().to_str().unwrap()];
    let output = run(env!("CARGO_BIN_EXE_predict"), &args, "w5\n");
    let error = String::from_utf8_lossy(&output.stderr).to_string();
    assert!(
        error.contains("no trained head") && error.contains("classifier.weight"),
        "{error}"
    );
}

#[test]
fn texts_are_embedded_alike_in_any_batch() {
    let dir = model("mpnet-base", 24);
    let out = dir.path().join("answers.jsonl");
    let texts = dir.path().join("texts.txt");
    fs::write(&texts, "w5 w6 w7\nw8\nw5 w6 w7\n").unwrap();
    let embed = |batch_size: &str| -> Vec<Vec<f64>> {
        let args = [
            "--model",
            dir.path().to_str().unwrap(),
            "--input",
            texts.to_str().unwrap(),
            "--output",
            out.to_str().unwrap(),
            "--batch-size",
            batch_size,
        ];
        assert!(answers(run(env!("CARGO_BIN_EXE_embed"), &args, "")).is_empty());
        let text = fs::read_to_string(&out).unwrap();
        let vector = |line: &str| {
            let json: Value = serde_json::from_str(line).unwrap();
            serde_json::from_value(json["embedding"].clone()).unwrap()
        };
        text.lines().map(vector).collect()
    };
    let (together, alone) = (embed("3"), embed("1"));
    assert_eq!(together.len(), 3);
    for (together, alone) in together.iter().zip(&alone) {
        let product: f64 = together.iter().zip(alone).map(|(a, b)| a * b).sum();
        assert!((product - 1.0).abs() < 1e-6, "{product}");
    }
    assert_eq!(alone[0], alone[2]);
    assert_ne!(alone[0], alone[1]);
}

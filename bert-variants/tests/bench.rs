//! The program `bench`, on a tiny model.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bench"))
        .args("--num-hidden-layers 2 --hidden-size 32 --num-attention-heads 2".split(' '))
        .args("--intermediate-size 64 --warmup 1 --rounds 2 --steps 2".split(' '))
        .args(args)
        .output()
        .unwrap()
}

fn rows(args: &[&str]) -> Vec<Value> {
    let output = bench(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", errors(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"))
}

fn assert_near(value: f64, expected: f64) {
    assert!(
        (value / expected - 1.0).abs() < 1e-9,
        "{value}, expected {expected}"
    );
}

#[test]
fn speeds_follow_from_times_and_operations() {
    let args = "--shapes 2x16 3x8 --vocab-size 96 --mask-rate 0.25 --peak-tflops 0.5";
    let rows = rows(&args.split(' ').collect::<Vec<_>>());
    let names: Vec<_> = rows
        .iter()
        .map(|row| {
            (
                row["pass"].as_str().unwrap(),
                row["variant"].as_str().unwrap(),
                row["batch"].as_u64().unwrap(),
            )
        })
        .collect();
    let expected = ["train", "infer"].into_iter().flat_map(|pass| {
        let variants = ["bert", "roformer"].into_iter();
        variants.flat_map(move |variant| [2, 3].map(|batch| (pass, variant, batch)))
    });
    assert_eq!(names, expected.collect::<Vec<_>>());
    // There are none on a CPU.
    assert!(rows.iter().all(|row| row["graphs"] == false));

    // 32 tokens through a layer of 4 * 32^2 + 2 * 32 * 64 weights and the 3 * 32^2 of q, k and v in the
    // next, 8 labels through its rest and a head of 32^2 + 96 * 32, and 2 * 16^2 pairs of query and key;
    // then the same of 24 tokens, 6 labels and 3 * 8^2 pairs.
    let (all, labelled) = (8192 + 3072, 5120 + 4096);
    let expected = [
        6 * (32 * all + 8 * labelled) + 12 * 2 * 32 * 512,
        6 * (24 * all + 6 * labelled) + 12 * 2 * 32 * 192,
    ];
    for row in &rows {
        let [one, other] = expected.map(f64::from);
        let training = if row["batch"] == 2 { one } else { other };
        let tokens = if row["batch"] == 2 { 32.0 } else { 24.0 };
        let infer = row["pass"] == "infer";
        let flops = if infer { training / 3.0 } else { training };
        assert_eq!(number(row, "flops"), flops);
        let seconds = number(row, "ms") / 1e3;
        assert!(seconds > 0.0);
        assert_near(number(row, "tokens_per_second"), tokens / seconds);
        assert_near(number(row, "tflops_per_second"), flops / seconds / 1e12);
        assert_near(number(row, "mfu"), flops / seconds / 0.5e12);
        assert_eq!(row["latency_ms"].is_f64(), infer);
        assert_eq!(row["padded"], false);
        assert!(row["speedup"].is_null());
        assert_eq!(row["dtype"], "f32");
        assert!(row["device"].as_str().unwrap().starts_with("cpu"));
    }

    // The f32 weights and, in training, two moments of each.
    let weights = 4.0 * (2.0 * (8192.0 + 64.0 + 9.0 * 32.0) + (96.0 + 16.0) * 32.0);
    assert!(number(&rows[0], "peak_bytes") > 3.0 * weights);
    assert!(number(&rows[4], "peak_bytes") > weights);
    assert!(number(&rows[0], "peak_bytes") > number(&rows[4], "peak_bytes"));
}

#[test]
fn text_is_measured_with_padding_and_without() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let [text, vocab, cache] = [path("text.jsonl"), path("vocab.txt"), path("cache")];
    // Three tokens or eight, which are cut to six.
    let documents = ["a b c", "a b c d a b c d"].map(|text| format!("{{\"text\": \"{text}\"}}\n"));
    fs::write(&text, documents.concat().repeat(50)).unwrap();
    fs::write(&vocab, "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\nd").unwrap();
    let args = [
        "--data",
        &text,
        "--tokenizer",
        &vocab,
        "--cache-dir",
        &cache,
    ];
    let more = "--shapes 16x8 --variants bert --mode train --peak-tflops 1";
    let rows = rows(&args.into_iter().chain(more.split(' ')).collect::<Vec<_>>());
    let [padded, unpadded] = &rows[..] else {
        panic!("{rows:?}")
    };
    assert_eq!(
        (&padded["padded"], &unpadded["padded"]),
        (&true.into(), &false.into())
    );
    let tokens = number(unpadded, "tokens");
    assert!(tokens > 16.0 * 5.0 && tokens < 16.0 * 8.0, "{tokens}");
    assert_eq!(number(unpadded, "padded_tokens"), tokens);
    assert_eq!(number(padded, "tokens"), tokens);
    assert_eq!(number(padded, "padded_tokens"), 128.0);
    assert_eq!(padded["flops"], unpadded["flops"]);
    assert!(padded["speedup"].is_null());
    let [of_padded, of_unpadded] = [padded, unpadded].map(|row| number(row, "ms"));
    assert_near(number(unpadded, "speedup"), of_padded / of_unpadded);

    // Random tokens of random lengths, and the table.
    let args = "--shapes 8x32 --median-length 12 --vocab-size 50 --variants bert --mode infer";
    let output = bench(&args.split(' ').collect::<Vec<_>>());
    assert!(output.status.success(), "{}", errors(&output));
    let table = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert_eq!(lines[1][..4], ["infer", "bert", "8x32", "padded"]);
    assert_eq!(lines[2][..4], ["infer", "bert", "8x32", "none"]);
    let tokens: f64 = lines[2][4].parse().unwrap();
    assert!(tokens > 16.0 && tokens < 256.0, "{table}");
}

#[test]
fn wrong_settings_are_named() {
    for (args, expected) in [
        ("--shapes 64", "expected BATCHxSEQLEN, such as 64x512"),
        ("--shapes 4x2", "must have at least 3 tokens, got 4x2"),
        (
            "--mask-rate 0",
            "--mask-rate must be above 0 and at most 1, got 0",
        ),
        (
            "--peak-tflops 0",
            "--peak-tflops must be positive and finite, got 0",
        ),
        (
            "--hidden-size 33",
            "hidden_size 33 is not a multiple of num_attention_heads 2",
        ),
        (
            "--max-position-embeddings 8",
            "max_position_embeddings 8 is less than the longest sequence, 128",
        ),
        ("--variants mpnet --objective clm", "no causal form"),
        ("--data /nowhere/text.txt", "/nowhere/text.txt"),
        (
            "--device tpu",
            "there is no device \"tpu\"; expected cpu, cuda or cuda:N",
        ),
        ("--steps 0", "--steps"),
    ] {
        let output = bench(&args.split(' ').collect::<Vec<_>>());
        let message = errors(&output);
        assert!(
            !output.status.success() && message.contains(expected),
            "{args}: {message}"
        );
        assert!(!message.contains("panicked"), "{message}");
    }
}

//! The program `pretrain`: a run that is killed and resumed equals one that was left alone.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use bert_variants::record::{Run, read_run};

/// A model so small that a step takes milliseconds. Dropout is on, so that its seeds count too.
fn pretrain(out: &Path, extra: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pretrain"));
    command
        .args("--variants roformer --num-hidden-layers 2 --hidden-size 32".split(' '))
        .args(
            "--num-attention-heads 2 --seq-len 32 --batch-size 4 --hidden-dropout-prob 0.1"
                .split(' '),
        )
        .args(
            "--gradient-accumulation 2 --eval-sequences 8 --eval-every 20 --save-every 10"
                .split(' '),
        )
        .arg("--out")
        .arg(out)
        .arg("--cache-dir")
        .arg(concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"))
        .args(extra)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn succeed(out: &Path, extra: &[&str]) {
    let output = pretrain(out, extra).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

fn fail(out: &Path, extra: &[&str]) -> String {
    let output = pretrain(out, extra).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    stderr(&output)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const RUN: &str = "mlm-roformer-seed0";

/// Starts a run and waits for its first checkpoint.
fn start(out: &Path, extra: &[&str]) -> Child {
    let mut child = pretrain(out, extra).stderr(Stdio::null()).spawn().unwrap();
    let trainer = out.join(RUN).join("checkpoint/trainer.json");
    let deadline = Instant::now() + Duration::from_secs(120);
    while !trainer.exists() {
        assert!(Instant::now() < deadline, "no checkpoint in two minutes");
        assert!(
            child.try_wait().unwrap().is_none(),
            "ended before its first checkpoint"
        );
        sleep(Duration::from_millis(2));
    }
    child
}

fn checkpoint_file(out: &Path, name: &str) -> Vec<u8> {
    fs::read(out.join(RUN).join("checkpoint").join(name)).unwrap()
}

/// What must not depend on interruptions: everything but times.
fn curve(run: &Run) -> Vec<(u64, u64, f64, f64)> {
    let train = run
        .train
        .iter()
        .map(|r| (r.step, r.tokens, r.loss, r.grad_norm));
    let eval = run
        .eval
        .iter()
        .map(|r| (r.step, r.tokens, r.loss, r.accuracy));
    train.chain(eval).collect()
}

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    let steps = ["--steps", "200"];
    succeed(&whole, &steps);

    let mut child = start(&killed, &steps);
    child.kill().unwrap();
    assert!(
        !child.wait().unwrap().success(),
        "it ended before it was killed"
    );
    assert!(read_run(&killed.join(RUN)).unwrap().summary.is_none());
    succeed(&killed, &[&steps[..], &["--resume"]].concat());

    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(
            checkpoint_file(&whole, file) == checkpoint_file(&killed, file),
            "{file} differs"
        );
    }
    let [whole, killed] = [whole, killed].map(|out| read_run(&out.join(RUN)).unwrap());
    assert_eq!(curve(&whole), curve(&killed));
    assert_eq!(whole.train.len(), 20);
    assert!(
        whole.train[19].loss < whole.train[0].loss,
        "it did not learn"
    );
}

#[cfg(unix)]
#[test]
fn sigterm_saves_and_exits() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("runs");
    let steps = ["--steps", "100000"];
    let mut child = start(&out, &steps);
    // As `timeout` and schedulers do, which signal a program and its process group.
    let process = child.id().to_string();
    let kill = Command::new("kill")
        .args(["-TERM", &process, &process])
        .status()
        .unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));

    let progress: serde_json::Value =
        serde_json::from_slice(&checkpoint_file(&out, "trainer.json")).unwrap();
    let last = read_run(&out.join(RUN))
        .unwrap()
        .train
        .last()
        .copied()
        .unwrap();
    assert_eq!(
        progress["step"], last.step,
        "the checkpoint is of the last step"
    );
}

#[test]
fn runs_are_not_overwritten_and_not_mixed() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("runs");
    succeed(&out, &["--steps", "2"]);
    let before = fs::read(out.join(RUN).join("metrics.jsonl")).unwrap();

    let again = fail(&out, &["--steps", "2"]);
    assert!(again.contains("already holds a run"), "{again}");
    let other = fail(&out, &["--steps", "4", "--resume"]);
    assert!(other.contains("total_steps was 2, is now 4"), "{other}");
    succeed(&out, &["--steps", "2", "--resume"]);
    assert_eq!(
        fs::read(out.join(RUN).join("metrics.jsonl")).unwrap(),
        before
    );
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_update() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("runs");
    let message = fail(
        &out,
        &["--steps", "60", "--save-every", "1", "--lr", "1e38"],
    );
    assert!(
        message.contains("gradient norm NaN") && message.contains("not applied"),
        "{message}"
    );
    let step: u64 = message
        .split("step ")
        .last()
        .unwrap()
        .split(':')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let progress: serde_json::Value =
        serde_json::from_slice(&checkpoint_file(&out, "trainer.json")).unwrap();
    assert_eq!(
        progress["step"],
        step - 1,
        "the checkpoint is of the step before"
    );
}

/// Sources whose words are one token each, the held-out document of 480.
fn letters(dir: &Path) -> Vec<String> {
    let letter = |i: usize| char::from(b'a' + (i * i / 7 % 20) as u8).to_string();
    let vocab = "[PAD] [UNK] [CLS] [SEP] [MASK]"
        .split(' ')
        .map(String::from);
    let vocab: Vec<String> = vocab.chain(('a'..='t').map(String::from)).collect();
    let text = |range: std::ops::Range<usize>| range.map(letter).collect::<Vec<_>>().join(" ");
    [
        ("--data", "train.txt", text(0..3000)),
        ("--validation", "valid.txt", text(3000..3480)),
        ("--tokenizer", "vocab.txt", vocab.join("\n")),
    ]
    .into_iter()
    .flat_map(|(option, name, text)| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        [option.to_string(), path.display().to_string()]
    })
    .collect()
}

#[test]
fn trained_models_are_evaluated_on_longer_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("runs");
    let letters = letters(dir.path());
    let mut args: Vec<&str> = letters.iter().map(String::as_str).collect();
    args.extend("--variants bert --steps 20 --eval-sequences 16".split(' '));
    args.extend("--eval-lengths 64 128".split(' '));
    succeed(&out, &args);
    let read = |variant: &str| read_run(&out.join(format!("mlm-{variant}-seed0"))).unwrap();
    let [bert, roformer] = ["bert", "roformer"].map(read);
    let lengths = |run: &Run| -> Vec<u64> { run.lengths.iter().map(|l| l.seq_len).collect() };
    assert_eq!(lengths(&bert), [32], "its table has 32 rows");
    assert_eq!(lengths(&roformer), [32, 64, 128]);
    // 16 sequences of 30 tokens between [CLS] and [SEP] are all of the held-out text.
    for run in [&bert, &roformer] {
        let last = run.eval.last().unwrap();
        let control = run.lengths[0];
        assert_eq!(
            (control.step, control.loss, control.accuracy),
            (20, last.loss, last.accuracy)
        );
    }
    let [short, .., long] = &roformer.lengths[..] else {
        panic!("{:?}", roformer.lengths)
    };
    assert!(long.loss.is_finite() && long.loss != short.loss);
    let tables = fs::read_to_string(out.join("report/summary.md")).unwrap();
    let row = format!(
        "| MLM | bert | {:.4} | undefined | undefined |",
        bert.lengths[0].loss
    );
    assert!(tables.contains(&row), "{row} is not in {tables}");

    // Killed between the lengths and the summary.
    let metrics = out.join(RUN).join("metrics.jsonl");
    let whole = fs::read_to_string(&metrics).unwrap();
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    fs::write(&metrics, lines[..lines.len() - 2].concat()).unwrap();
    args.push("--resume");
    succeed(&out, &args);
    assert_eq!(read("roformer").lengths, roformer.lengths);
}

#[test]
fn wrong_settings_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("runs");
    for (args, expected) in [
        (
            ["--hidden-size", "33"],
            "hidden_size 33 is not a multiple of num_attention_heads 2",
        ),
        (["--lr", "0"], "lr must be positive and finite, got 0"),
        (
            ["--batch-size", "0"],
            "batch_size must be at least 1, got 0",
        ),
        (
            ["--device", "tpu"],
            "there is no device \"tpu\"; expected cpu, cuda or cuda:N",
        ),
        (["--data", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (
            ["--eval-lengths", "48"],
            "eval_lengths must be multiples of seq_len 32, each of the one before, got 48 after 32",
        ),
        (
            ["--eval-lengths", "1024"],
            "no document has 960 tokens, the longest has",
        ),
        (
            ["--max-position-embeddings", "8"],
            "max_position_embeddings 8 is less than the longest sequence, 32",
        ),
    ] {
        let message = fail(&out, &args);
        assert!(message.contains(expected), "{args:?}: {message}");
        assert!(!message.contains("panicked"), "{message}");
    }
}

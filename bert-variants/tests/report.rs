//! Records of runs and the report made from them.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use bert_variants::data::Objective;
use bert_variants::record::{
    EvalRecord, LengthRecord, METRICS_FILE, Record, Run, RunHeader, RunSummary, RunWriter,
    TrainRecord, read_run,
};
use bert_variants::report::{self, Effect, Reading, ReportOptions, Verdict};
use serde_json::json;

fn header(variant: &str, seed: u64) -> RunHeader {
    let table = if variant == "bert" { 393_216 } else { 0 };
    let kind = if variant == "bert" {
        "bert"
    } else {
        "roformer"
    };
    RunHeader {
        variant: variant.to_string(),
        objective: Objective::Mlm,
        seed,
        code_version: "0.1.0".to_string(),
        device: "cpu".to_string(),
        continued: Vec::new(),
        parameters: 1_000_000 + table,
        position_parameters: table,
        parameter_bytes: 4 * (1_000_000 + table),
        data: "text".to_string(),
        total_steps: 40,
        model_config: json!({ "model_type": kind, "hidden_size": 64 }),
        train_config: json!({ "lr": 1e-3, "seed": seed, "batch": { "tokens": 100 } }),
    }
}

fn train(step: u64, loss: f64) -> TrainRecord {
    let seconds = step as f64 / 2.0;
    TrainRecord {
        step,
        tokens: 100 * step,
        loss,
        lr: 1e-3,
        grad_norm: 1.0,
        tokens_per_second: 200.0,
        seconds,
    }
}

fn eval(step: u64, loss: f64) -> EvalRecord {
    EvalRecord {
        step,
        tokens: 100 * step,
        loss,
        accuracy: 0.5,
        perplexity: loss.exp(),
    }
}

fn length(seq_len: u64, loss: f64) -> LengthRecord {
    LengthRecord {
        step: 40,
        seq_len,
        loss,
        accuracy: 0.5,
    }
}

/// Forty training records and the given evaluations, ten steps apart.
fn run(variant: &str, seed: u64, losses: &[f64]) -> Run {
    Run {
        path: format!("{variant}-{seed}").into(),
        header: header(variant, seed),
        train: (1..=40)
            .map(|step| train(step, 5.0 - step as f64 / 20.0))
            .collect(),
        eval: losses
            .iter()
            .zip(0..)
            .map(|(loss, i)| eval(10 * i, *loss))
            .collect(),
        lengths: Vec::new(),
        summary: Some(RunSummary {
            step: 40,
            seconds: 20.0,
            train_tokens_per_second: 200.0,
            inference_tokens_per_second: 600.0,
            peak_activation_bytes: 1 << 20,
            optimizer_bytes: 2 << 20,
        }),
        warnings: Vec::new(),
    }
}

fn two_variants() -> Vec<Run> {
    vec![
        run("bert", 1, &[8.0, 6.0, 4.0, 3.5, 3.0]),
        run("bert", 2, &[8.0, 6.0, 4.0, 3.6, 3.2]),
        run("roformer", 1, &[8.0, 5.0, 3.0, 2.9, 2.8]),
        run("roformer", 2, &[8.0, 5.0, 3.2, 3.1, 2.9]),
    ]
}

fn write(dir: &Path, records: &[Record]) {
    let mut writer = RunWriter::create(dir, &header("bert", 1)).unwrap();
    records
        .iter()
        .for_each(|record| writer.write(record).unwrap());
}

#[test]
fn records_come_back_as_written_non_finite_too() {
    let dir = tempfile::tempdir().unwrap();
    let summary = run("bert", 1, &[]).summary.unwrap();
    let mut diverged = train(2, f64::NAN);
    diverged.grad_norm = f64::INFINITY;
    write(
        dir.path(),
        &[
            Record::Train(train(1, 0.1 + 0.2)),
            Record::Eval(eval(1, 2.5)),
            Record::Train(diverged),
            Record::Length(length(512, f64::NAN)),
            Record::Summary(summary),
        ],
    );
    let run = read_run(dir.path()).unwrap();
    assert_eq!(run.header, header("bert", 1));
    assert_eq!(run.train[0], train(1, 0.1 + 0.2));
    assert!(run.train[1].loss.is_nan() && run.train[1].grad_norm == f64::INFINITY);
    assert_eq!((run.eval, run.summary), (vec![eval(1, 2.5)], Some(summary)));
    assert!(run.lengths[0].seq_len == 512 && run.lengths[0].loss.is_nan());
    assert_eq!(run.warnings, [""; 0]);
    assert!(
        RunWriter::create(dir.path(), &header("bert", 1)).is_err(),
        "overwrote a run"
    );
}

#[test]
fn torn_last_line_warns_and_other_damage_names_its_line() {
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        &[Record::Train(train(1, 4.0)), Record::Train(train(2, 3.0))],
    );
    let path = dir.path().join(METRICS_FILE);
    let whole = fs::read_to_string(&path).unwrap();

    fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    let run = read_run(&path).unwrap();
    assert_eq!(run.train.len(), 1);
    assert!(run.warnings[0].contains("metrics.jsonl:3: left out a torn last line"));

    let fails = |text: &str, expected: &str| {
        fs::write(&path, text).unwrap();
        let error = read_run(&path).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    };
    let lines: Vec<&str> = whole.lines().collect();
    fails(
        &whole.replacen("train\"", "trai\"", 1),
        "metrics.jsonl:2: not a run's record",
    );
    fails(
        &format!("{}\n", lines[1]),
        "metrics.jsonl:1: expected the run header",
    );
    fails(
        &format!("{whole}{}\n", lines[1]),
        "metrics.jsonl:4: step 1 after step 2",
    );
    fails("", "no records");
}

#[test]
fn resumed_records_equal_uninterrupted_ones() {
    let records: Vec<Record> = (1..=6)
        .flat_map(|step| {
            [
                Record::Train(train(step, 4.0)),
                Record::Eval(eval(step, 3.0)),
            ]
        })
        .collect();
    let (whole, resumed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(whole.path(), &records);
    let of_the_trained_model = [Record::Length(length(128, 3.0))];
    write(
        resumed.path(),
        &[&records[..10], &of_the_trained_model].concat(),
    );
    let path = resumed.path().join(METRICS_FILE);
    let mut torn = fs::read(&path).unwrap();
    torn.extend(b"{\"kind\":\"tr");
    fs::write(&path, torn).unwrap();

    let mut writer = RunWriter::resume(resumed.path(), Some(3), &header("bert", 1)).unwrap();
    records[6..]
        .iter()
        .for_each(|record| writer.write(record).unwrap());
    let read = |dir: &Path| fs::read_to_string(dir.join(METRICS_FILE)).unwrap();
    assert_eq!(read(resumed.path()), read(whole.path()));
}

#[test]
fn the_header_tells_what_went_on_with_a_run() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[]);
    let on = |device: &str| RunHeader {
        device: device.to_string(),
        ..header("bert", 1)
    };
    let resume = |step, device| {
        RunWriter::resume(dir.path(), step, &on(device)).unwrap();
        read_run(dir.path()).unwrap().header
    };
    assert_eq!(resume(Some(2), "cpu"), on("cpu"));
    assert_eq!(resume(Some(4), "gpu").devices(), "cpu, then gpu");
    assert_eq!(resume(Some(6), "gpu").continued.len(), 1);
    let last = resume(Some(8), "cpu");
    assert_eq!(last.devices(), "cpu, then gpu, then cpu");
    assert_eq!(last.code_versions(), "0.1.0");
    // From a checkpoint before the first change.
    assert_eq!(resume(Some(3), "cpu"), on("cpu"));
    assert_eq!(resume(None, "gpu"), on("gpu"));
}

/// Castagnoli's CRC, bit by bit, masked as TensorFlow's records mask it.
fn masked_crc(bytes: &[u8]) -> u32 {
    let crc = !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
        })
    });
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[test]
fn tensorboard_events_are_framed_with_step_and_time() {
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        &[Record::Train(train(7, 4.0)), Record::Eval(eval(100, 3.0))],
    );
    let file = fs::read_dir(dir.path().join("tensorboard"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let bytes = fs::read(file.path()).unwrap();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64();

    let mut rest = bytes.as_slice();
    let mut steps = Vec::new();
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        let crc = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
        let event = &rest[12..12 + length];
        assert_eq!(
            (crc(8), crc(12 + length)),
            (masked_crc(&rest[..8]), masked_crc(event))
        );
        // Field 1 is the wall time, field 2 the step.
        assert_eq!(event[0], 0x09);
        let time = f64::from_le_bytes(event[1..9].try_into().unwrap());
        assert!((now - time).abs() < 60.0, "{time} at {now}");
        if event[9] == 0x10 {
            steps.push(event[10]);
        }
        rest = &rest[16 + length..];
    }
    assert_eq!(steps, [7, 7, 7, 7, 100, 100, 100]);
    for tag in [
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "eval/accuracy",
        "eval/perplexity",
    ] {
        assert!(
            bytes
                .windows(tag.len())
                .any(|window| window == tag.as_bytes()),
            "no {tag}"
        );
    }
}

#[test]
fn numbers_match_hand_computed_ones() {
    let summary = report::summarize(&two_variants(), "t").unwrap();
    let [bert, roformer] = &summary.variants[..] else {
        panic!("{:?}", summary.variants)
    };
    assert_eq!(
        (bert.variant.as_str(), &bert.seeds[..]),
        ("bert", &[1, 2][..])
    );
    let loss = bert.final_eval.unwrap().loss;
    assert!((loss.mean - 3.1).abs() < 1e-12);
    assert!((loss.sd.unwrap() - 0.02f64.sqrt()).abs() < 1e-12);

    // Every run reached 3.2; the better variant 2.9 with both seeds, the other never.
    let reached = |v: &report::VariantSummary, loss: f64| {
        *v.thresholds.iter().find(|t| t.loss == loss).unwrap()
    };
    let steps = |v, loss| reached(v, loss).steps.map(|s| s.mean);
    assert_eq!(
        (steps(bert, 3.2), steps(roformer, 3.2)),
        (Some(40.0), Some(20.0))
    );
    assert_eq!((steps(bert, 2.9), steps(roformer, 2.9)), (None, Some(35.0)));
    assert_eq!(reached(roformer, 2.9).seconds.unwrap().mean, 17.5);
    assert_eq!(reached(roformer, 2.9).tokens.unwrap().mean, 3500.0);
    assert_eq!(bert.gradient_norm.unwrap().p99.mean, 1.0);

    // By seed: 2.8 - 3.0 and 2.9 - 3.2.
    let difference = &summary.differences[0];
    assert!((difference.difference.mean + 0.25).abs() < 1e-12);
    assert!((difference.difference.sd.unwrap() - 0.005f64.sqrt()).abs() < 1e-12);
    assert_eq!(difference.reading, Reading::Lower);
}

#[test]
fn claims_follow_the_numbers() {
    let verdict = |runs: &[Run], text: &str| {
        let claims = report::summarize(runs, "t").unwrap().claims;
        claims
            .iter()
            .find(|c| c.claim.contains(text))
            .unwrap()
            .verdict
    };
    let runs = two_variants();
    assert_eq!(verdict(&runs, "lower loss"), Verdict::Supported);
    assert_eq!(verdict(&runs, "converges faster"), Verdict::Supported);
    assert_eq!(verdict(&runs, "fewer parameters"), Verdict::Supported);
    assert_eq!(verdict(&runs, "0.5M"), Verdict::NotSupported);
    assert_eq!(verdict(&runs, "more stably"), Verdict::WithinNoise);
    assert_eq!(verdict(&runs, "same speed"), Verdict::Supported);
    assert_eq!(verdict(&runs, "extrapolates"), Verdict::NotTested);

    let one_seed = [runs[0].clone(), runs[2].clone()];
    assert_eq!(verdict(&one_seed, "lower loss"), Verdict::OneSeed);
    let mut mixed = runs.clone();
    mixed[3].eval.last_mut().unwrap().loss = 3.5;
    assert_eq!(verdict(&mixed, "lower loss"), Verdict::WithinNoise);
    mixed[3].eval.last_mut().unwrap().loss = f64::NAN;
    assert_eq!(verdict(&mixed, "lower loss"), Verdict::NotTested);
}

/// `(trained, long)` losses at 128 and 512 tokens, a pair for every run of [`two_variants`].
fn with_lengths(losses: [(f64, Option<f64>); 4]) -> Vec<Run> {
    let mut runs = two_variants();
    for (run, (trained, long)) in runs.iter_mut().zip(losses) {
        let long = long.map(|loss| length(512, loss));
        run.lengths = [length(128, trained)].into_iter().chain(long).collect();
        run.header.model_config["max_position_embeddings"] = json!(128);
    }
    runs
}

#[test]
fn extrapolation_is_judged_by_the_same_text() {
    let claim = |runs: &[Run], text: &str| {
        let claims = report::summarize(runs, "t").unwrap().claims;
        let claim = claims.into_iter().find(|c| c.claim.contains(text)).unwrap();
        (claim.verdict, claim.evidence)
    };
    let extrapolates = |long: [f64; 2]| {
        let [first, second] = [(2.8, Some(long[0])), (2.9, Some(long[1]))];
        let runs = with_lengths([(3.0, None), (3.2, None), first, second]);
        (
            claim(&runs, "extrapolates"),
            claim(&[runs[0].clone(), runs[2].clone()], "extrapolates").0,
        )
    };
    let (higher, one_seed) = extrapolates([3.3, 3.5]);
    assert_eq!(
        (higher.0, one_seed),
        (Verdict::NotSupported, Verdict::OneSeed)
    );
    assert!(
        higher
            .1
            .starts_with("+0.5500 ± 0.0707 (n = 2) nats at 512 tokens"),
        "{}",
        higher.1
    );
    assert_eq!(extrapolates([2.7, 2.75]).0.0, Verdict::Supported);
    assert_eq!(extrapolates([2.9, 2.8]).0.0, Verdict::Supported);
    assert_eq!(extrapolates([f64::NAN, 2.8]).0.0, Verdict::NotTested);

    let on_long = |absolute: Option<f64>, rope: f64| {
        let [first, second] = [(3.0, absolute), (3.0, absolute.map(|loss| loss + 0.001))];
        let rope = (2.7, Some(rope));
        claim(&with_lengths([first, second, rope, rope]), "long inputs")
    };
    let (verdict, evidence) = on_long(None, 2.7);
    assert_eq!(verdict, Verdict::NotTested);
    assert!(
        evidence.contains("past the training length of 128") && evidence.contains("-10.00"),
        "{evidence}"
    );
    assert_eq!(on_long(Some(4.0), 3.7).0, Verdict::Supported);
    assert_eq!(on_long(Some(4.0), 2.0).0, Verdict::NotSupported);
    assert_eq!(on_long(Some(4.0), 3.9).0, Verdict::NotSupported);
    assert_eq!(on_long(Some(4.0), f64::NAN).0, Verdict::NotTested);
}

#[test]
fn losses_by_length_are_a_table() {
    let dir = tempfile::tempdir().unwrap();
    let rope = (2.8, Some(2.7));
    let mut runs = with_lengths([(3.0, None), (3.2, None), rope, rope]);
    let paths = report::write_report(&runs, dir.path(), &ReportOptions::default()).unwrap();
    let tables = fs::read_to_string(&paths.summary_md).unwrap();
    for line in [
        "| objective | variant | 128 tokens | 512 tokens |",
        "| MLM | bert | 3.1000 ± 0.1414 | undefined |",
        "| MLM | roformer | 2.8000 ± 0.0000 | 2.7000 ± 0.0000 |",
    ] {
        assert!(tables.contains(line), "{line} is not in {tables}");
    }
    let plot = fs::read_to_string(dir.path().join("mlm_loss_by_length.svg")).unwrap();
    assert!(plot.contains("Tokens of an input"));
    let json = fs::read_to_string(&paths.summary_json).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let bert = &json["variants"][0]["lengths"][1];
    assert_eq!(
        (&bert["seq_len"], &bert["defined"], &bert["loss"]),
        (&json!(512), &json!(false), &json!(null))
    );

    // A longer table is no reason: the run was not evaluated there.
    for run in &mut runs {
        run.header.model_config["max_position_embeddings"] = json!(512);
    }
    report::write_report(&runs, dir.path(), &ReportOptions::default()).unwrap();
    let tables = fs::read_to_string(&paths.summary_md).unwrap();
    assert!(tables.contains("| MLM | bert | 3.1000 ± 0.1414 | - |"));
}

#[test]
fn unfair_settings_are_named() {
    let mut runs = two_variants();
    let fair = report::summarize(&runs, "t").unwrap();
    assert_eq!(
        (fair.fairness.differences.len(), fair.warnings.len()),
        (0, 0)
    );
    runs[2].header.train_config["lr"] = json!(2e-3);
    let summary = report::summarize(&runs, "t").unwrap();
    let [difference] = &summary.fairness.differences[..] else {
        panic!("{summary:?}")
    };
    assert_eq!(
        (difference.key.as_str(), difference.effect),
        ("train_config.lr", Effect::Unfair)
    );
    assert!(summary.warnings[0].contains("train_config.lr: bert: 0.001; roformer: 0.001, 0.002"));
}

#[test]
fn report_is_whole_and_self_contained() {
    let dir = tempfile::tempdir().unwrap();
    let mut runs = two_variants();
    runs[0].header.data = "<script>alert(1)</script>".to_string();
    runs[1].eval.clear();
    let paths = report::write_report(&runs, dir.path(), &ReportOptions::default()).unwrap();

    let html = fs::read_to_string(&paths.html).unwrap();
    for outside in [
        "<script", "<link", "<img", "src=", "href=", "url(", "@import",
    ] {
        assert!(!html.contains(outside), "the report has {outside}");
    }
    assert!(html.contains("&lt;script&gt;") && html.contains("bert-2: no evaluations"));
    assert_eq!(html.matches("<svg").count(), 4);
    let warning = html
        .find("Unfair comparison: the MLM runs differ in data")
        .unwrap();
    assert!(warning < html.find("Claims").unwrap());

    assert_eq!(paths.plots.len(), 8);
    for path in &paths.plots {
        if path.extension().unwrap() == "svg" {
            let svg = fs::read_to_string(path).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            assert!(svg.contains("<polyline") && svg.contains("Optimizer step"));
        } else {
            let image = image::open(path).unwrap().to_rgb8();
            assert_eq!(image.dimensions(), (2000, 900));
            // The line of the first variant and the text, so the font was found.
            for color in [[0, 114, 178], [0, 0, 0]] {
                let count = image.pixels().filter(|pixel| pixel.0 == color).count();
                assert!(
                    count > 100,
                    "{}: {count} pixels of {color:?}",
                    path.display()
                );
            }
        }
    }
    let json = fs::read_to_string(&paths.summary_json).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["variants"][0]["seeds"], json!([1, 2]));
    assert!(
        fs::read_to_string(&paths.summary_md)
            .unwrap()
            .contains("## Claims")
    );
    let left = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 11, "temporary files stay behind");
    assert!(report::write_report(&[], dir.path(), &ReportOptions::default()).is_err());
}

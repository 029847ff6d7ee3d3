//! Fine-tuning: tasks are read, learned, recorded and saved.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bert_variants::checkpoint::from_pretrained;
use bert_variants::config::{ProblemType, Task};
use bert_variants::finetune::{
    Dataset, FinetuneConfig, FinetuneRecord, Label, TaskConfig, TaskName, finetune as run,
};
use bert_variants::predict::Classifier;
use bert_variants::train::Precision;
use candle_core::{DType, Device};
use serde_json::Value;

/// A tiny model with a vocabulary of the words `w5` to `w31`.
fn model(dir: &Path) -> String {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bert-masked-lm");
    let dir = dir.join("start");
    fs::create_dir(&dir).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), dir.join(file)).unwrap();
    }
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(String::from);
    let words = special.into_iter().chain((5..32).map(|i| format!("w{i}")));
    fs::write(dir.join("vocab.txt"), words.collect::<Vec<_>>().join("\n")).unwrap();
    dir.to_str().unwrap().to_string()
}

/// Texts whose label is whether `w7` is in them.
fn write_texts(path: &Path, from: usize, to: usize, label: impl Fn(bool) -> String) {
    let mut table = String::from("text,label\n");
    for i in from..to {
        let words = [
            5 + i * 7 % 13,
            18 + i * 5 % 14,
            if i % 2 == 0 { 7 } else { 31 },
        ];
        let [a, b, c] = words.map(|word| format!("w{word}"));
        let has = words.contains(&7);
        table += &format!("\"{a} {b}, \"\"{c}\"\"\",{}\n", label(has));
    }
    fs::write(path, table).unwrap();
}

fn config(dir: &Path, label: impl Fn(bool) -> String) -> FinetuneConfig {
    let (train, eval) = (dir.join("train.csv"), dir.join("eval.csv"));
    write_texts(&train, 0, 200, &label);
    write_texts(&eval, 200, 260, &label);
    let mut config = FinetuneConfig::default();
    config.run.model = model(dir);
    config.run.out = dir.join("out");
    config.data.train_file = Some(train);
    config.data.eval_file = Some(eval);
    config.data.max_length = 14;
    config.train.epochs = 4;
    config.train.batch_size = 10;
    config.train.lr = 5e-3;
    config
}

/// From the beginning to the end.
fn finetune(config: &FinetuneConfig) -> anyhow::Result<PathBuf> {
    let report = run(config, false, &AtomicBool::new(false))?;
    Ok(report.expect("nothing stopped it"))
}

fn records(path: PathBuf) -> Vec<FinetuneRecord> {
    let text = fs::read_to_string(path.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn lines(path: PathBuf) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn classes_are_learned_saved_and_predicted() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), |has| if has { "yes" } else { "no" }.to_string());
    config.run.seeds = vec![1, 2];
    config.train.label_smoothing = 0.1;
    config.data.predict_file = Some(dir.path().join("predict.jsonl"));
    let texts = "{\"text\": \"w9 w20 w7\"}\n{\"text\": \"w9 w20 w31\"}\n";
    fs::write(dir.path().join("predict.jsonl"), texts).unwrap();
    let report = fs::read_to_string(finetune(&config).unwrap()).unwrap();
    assert!(report.contains("dev accuracy") && report.contains("seed 2"));

    for seed in ["seed1", "seed2"] {
        let dir = config.run.out.join(seed);
        let scores: Vec<f64> = records(dir.clone())
            .iter()
            .filter_map(|record| match record {
                FinetuneRecord::Eval(evaluation) => Some(evaluation.score()),
                _ => None,
            })
            .collect();
        assert_eq!(scores.len(), 4);
        let best = scores.iter().copied().fold(0.0, f64::max);
        assert!(best > 0.95, "{seed}: {scores:?}");

        // The model on disk is the best one, and predicts what is written.
        let predictions = lines(dir.join("predictions-dev.jsonl"));
        let right = predictions
            .iter()
            .filter(|line| line["label"] == line["truth"])
            .count();
        assert_eq!(right as f64 / predictions.len() as f64, best);
        let model = dir.join("model");
        let classifier =
            Classifier::from_pretrained(model.to_str().unwrap(), None, DType::F32, &Device::Cpu);
        let classifier = classifier.unwrap();
        assert_eq!(classifier.labels(), ["no", "yes"]);
        let predicted = classifier
            .predict(&["w9 w20 w7".into(), "w9 w20 w31".into()])
            .unwrap();
        assert_eq!(
            predicted.iter().map(|p| p.label).collect::<Vec<_>>(),
            [1, 0]
        );
        let predictions = lines(dir.join("predictions-predict.jsonl"));
        assert_eq!(predictions[0]["label"], "yes");
        assert_eq!(predictions[1]["truth"], Value::Null);
        let card = fs::read_to_string(model.join("README.md")).unwrap();
        assert!(card.contains("accuracy (dev)"), "{card}");
    }
    // A run that is there is not overwritten.
    let error = format!("{:#}", finetune(&config).unwrap_err());
    assert!(error.contains("already holds a run"), "{error}");
}

#[test]
fn texts_longer_than_the_table_of_positions_are_cut_unless_it_is_resized() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), |has| has.to_string());
    // What differs comes behind the model's 16 tokens.
    for file in [&config.data.train_file, &config.data.eval_file] {
        let path = file.as_ref().unwrap();
        let text = fs::read_to_string(path).unwrap();
        let filler = format!("\"{}", "w5 ".repeat(20));
        fs::write(path, text.replace("\"w", &(filler + "w"))).unwrap();
    }
    config.data.max_length = 30;
    config.train.epochs = 1;
    let all_alike = |config: &FinetuneConfig| {
        finetune(config).unwrap();
        let predictions = lines(config.run.out.join("seed0/predictions-dev.jsonl"));
        let first = &predictions[0]["logits"];
        predictions.iter().all(|line| line["logits"] == *first)
    };
    assert!(all_alike(&config));
    config.run.out = dir.path().join("resized");
    config.run.resize_positions = true;
    assert!(!all_alike(&config));
    let saved = config.run.out.join("seed0/model/config.json");
    let saved: Value = serde_json::from_str(&fs::read_to_string(saved).unwrap()).unwrap();
    assert_eq!(saved["max_position_embeddings"], 30);
}

#[test]
fn resuming_keeps_what_is_finished_and_makes_the_rest_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), |has| u8::from(has).to_string());
    config.train.epochs = 1;
    config.run.seeds = vec![1];
    finetune(&config).unwrap();
    let metrics = |seed: &str| config.run.out.join(seed).join("metrics.jsonl");
    let read = |seed: &str| fs::read_to_string(metrics(seed)).unwrap();
    let first = read("seed1");

    let mut config = config.clone();
    config.run.seeds = vec![1, 2];
    let stopped = run(&config, true, &AtomicBool::new(true)).unwrap();
    assert_eq!(stopped, None);
    assert_eq!(read("seed1"), first);
    assert_eq!(read("seed2").lines().count(), 1);
    let report = run(&config, true, &AtomicBool::new(false))
        .unwrap()
        .unwrap();
    assert_eq!(read("seed1"), first);
    assert!(fs::read_to_string(report).unwrap().contains("seed 2"));
    let second = records(config.run.out.join("seed2"));
    assert!(matches!(
        second.last(),
        Some(FinetuneRecord::Summary { .. })
    ));

    // A process that was killed while it wrote its last line has not finished.
    fs::write(
        metrics("seed2"),
        &read("seed2").trim_end()[..read("seed2").len() - 9],
    )
    .unwrap();
    run(&config, true, &AtomicBool::new(false))
        .unwrap()
        .unwrap();
    let scores = |records: Vec<FinetuneRecord>| -> Vec<f64> {
        let score = |record: &FinetuneRecord| match record {
            FinetuneRecord::Eval(evaluation) => Some(evaluation.score()),
            _ => None,
        };
        records.iter().filter_map(score).collect()
    };
    let again = records(config.run.out.join("seed2"));
    assert_eq!(scores(again), scores(second));

    config.train.lr = 1e-4;
    let error = run(&config, true, &AtomicBool::new(false)).unwrap_err();
    let error = format!("{error:#}");
    assert!(
        error.contains("train.lr was 0.005, is now 0.0001"),
        "{error}"
    );
}

/// Runs until some lines more are in the records of seed 0, if the run is not over before: then it is `None`.
fn run_some_lines(config: &FinetuneConfig, resume: bool, more: usize) -> Option<PathBuf> {
    let path = config.run.out.join("seed0/metrics.jsonl");
    let count = || fs::read_to_string(&path).map_or(0, |text| text.lines().count());
    let (stop, before) = (AtomicBool::new(false), count());
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                stop.fetch_or(count() >= before + more, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        let report = run(config, resume, &stop).unwrap();
        stop.store(true, Ordering::Relaxed);
        report
    })
}

#[test]
fn a_stopped_seed_goes_on_to_the_same_result() {
    for (dtype, freeze_layers) in [(Precision::F32, None), (Precision::Bf16, Some(0))] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), |has| u8::from(has).to_string());
        config.train.epochs = 30;
        config.train.lr = 1e-3;
        config.train.layer_decay = 0.9;
        config.train.evals_per_epoch = 3;
        config.train.patience = Some(80);
        config.train.dtype = dtype;
        config.train.freeze_layers = freeze_layers;
        config.run.out = dir.path().join("whole");
        finetune(&config).unwrap();
        let whole = config.run.out.join("seed0");

        config.run.out = dir.path().join("parts");
        let parts = config.run.out.join("seed0");
        let mut pieces = 1;
        while run_some_lines(&config, pieces > 1, 20).is_none() {
            pieces += 1;
            assert!(parts.join("stopped").exists());
            // As if it had gone on and been killed while it wrote a line.
            let later = r#"{"kind":"train","step":100000,"loss":1.0,"lr":1.0,"grad_norm":1.0}
{"kind":"epoch","epoch":1000,"seconds":1.0}
{"kind":"eval","step":100000,"split":"dev","loss":1.0,"metrics":[["accuracy",1.0]]}
{"kind":"tr"#;
            let path = parts.join("metrics.jsonl");
            let records = fs::read_to_string(&path).unwrap();
            fs::write(&path, records + later).unwrap();
        }
        assert!(pieces > 1, "it was never stopped");
        assert!(!parts.join("stopped").exists());
        let results = |dir: &Path| {
            let (mut evaluations, mut epochs) = (Vec::new(), Vec::new());
            for record in records(dir.to_path_buf()) {
                match record {
                    FinetuneRecord::Eval(evaluation) => evaluations.push(evaluation),
                    FinetuneRecord::Epoch { epoch, .. } => epochs.push(epoch),
                    _ => {}
                }
            }
            (evaluations, epochs)
        };
        assert_eq!(results(&parts), results(&whole));
        let weights = |dir: &Path| fs::read(dir.join("model/model.safetensors")).unwrap();
        assert!(weights(&parts) == weights(&whole));
    }
}

#[test]
fn what_a_stopped_seed_cannot_go_on_from_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), |has| u8::from(has).to_string());
    config.train.epochs = 1000;
    assert!(run_some_lines(&config, false, 3).is_none());
    let error = |config: &FinetuneConfig| {
        let error = run(config, true, &AtomicBool::new(false)).unwrap_err();
        format!("{error:#}")
    };

    let train = config.data.train_file.clone().unwrap();
    let texts = fs::read_to_string(&train).unwrap();
    fs::write(&train, format!("{texts}w7,1\n")).unwrap();
    let found = error(&config);
    assert!(
        found.contains("had 200 texts to train on, now there are 201"),
        "{found}"
    );
    fs::write(&train, texts).unwrap();

    let seed = config.run.out.join("seed0");
    for file in ["state.safetensors", "state.json"] {
        fs::write(seed.join("stopped").join(file), "{").unwrap();
        let found = error(&config);
        assert!(found.contains(file), "{found}");
    }
    // Another run in the same place does not go on from there.
    fs::remove_file(seed.join("metrics.jsonl")).unwrap();
    config.train.epochs = 1;
    finetune(&config).unwrap();
    assert!(!seed.join("stopped").exists());
}

#[test]
fn numbers_are_learned_again_in_the_same_way() {
    let scores = || {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), |has| if has { "4.5" } else { "-1" }.to_string());
        config.data.regression = true;
        config.train.layer_decay = 0.9;
        finetune(&config).unwrap();
        let records = records(config.run.out.join("seed0"));
        let evaluations = records.into_iter().filter_map(|record| match record {
            FinetuneRecord::Eval(evaluation) => Some(evaluation),
            _ => None,
        });
        evaluations.collect::<Vec<_>>()
    };
    let first = scores();
    assert_eq!(first, scores());
    let names: Vec<&str> = first[0]
        .metrics
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(names, ["pearson", "spearman"]);
    assert!(first.last().unwrap().metrics[0].1 > 0.95, "{first:?}");
}

#[test]
fn classes_and_numbers_are_learned_in_bf16() {
    for regression in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), |has| u8::from(has).to_string());
        config.data.regression = regression;
        config.train.dtype = Precision::Bf16;
        finetune(&config).unwrap();
        let records = records(config.run.out.join("seed0"));
        let scores = records.iter().filter_map(|record| match record {
            FinetuneRecord::Eval(evaluation) => Some(evaluation.score()),
            _ => None,
        });
        let best = scores.fold(0.0, f64::max);
        assert!(best > 0.9, "regression {regression}: {best}");
    }
}

#[test]
fn frozen_layers_stay_and_patience_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), |has| u8::from(has).to_string());
    config.train.freeze_layers = Some(1);
    config.train.patience = Some(2);
    config.train.epochs = 50;
    config.train.lr = 1e-9;
    finetune(&config).unwrap();
    let records = records(config.run.out.join("seed0"));
    let evaluations = records
        .iter()
        .filter(|r| matches!(r, FinetuneRecord::Eval(_)))
        .count();
    assert_eq!(evaluations, 3);

    config.train.lr = 1e-3;
    config.train.patience = None;
    config.train.epochs = 1;
    config.run.out = dir.path().join("again");
    finetune(&config).unwrap();
    let load = |dir: &Path| {
        let task = Task::SequenceClassification;
        from_pretrained(dir.to_str().unwrap(), task, 0, &Device::Cpu)
            .unwrap()
            .parameters
    };
    let (before, after) = (
        load(Path::new(&config.run.model)),
        load(&config.run.out.join("seed0/model")),
    );
    for (name, _) in before
        .vars()
        .iter()
        .filter(|(name, _)| !name.starts_with("head."))
    {
        let values = |parameters: &bert_variants::parameters::Parameters| -> Vec<f32> {
            let tensor = parameters.get(name, false).unwrap();
            tensor.flatten_all().unwrap().to_vec1().unwrap()
        };
        let frozen = name.starts_with("embeddings.") || name.starts_with("encoder.layer.0.");
        assert_eq!(values(&before) == values(&after), frozen, "{name}");
    }
}

fn read(task: TaskName, files: &[(&str, &str)]) -> Result<Dataset, String> {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    let config = TaskConfig {
        task,
        data: Some(dir.path().to_path_buf()),
        ..TaskConfig::default()
    };
    Dataset::read(&config).map_err(|error| format!("{error:#}"))
}

#[test]
fn files_of_glue_are_read_as_they_are() {
    let cola = "gj04\t1\t\tShe said \"no.\ngj04\t0\t*\tNo she \"said.\n";
    let dataset = read(TaskName::Cola, &[("train.tsv", cola), ("dev.tsv", cola)]).unwrap();
    assert_eq!(dataset.train[0].first, "She said \"no.");
    assert_eq!(dataset.train[1].label, Some(Label::Class(0)));
    assert_eq!(dataset.evals[0].examples.len(), 2);

    let mrpc = "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA \"b\" c\tD\n";
    let dataset = read(TaskName::Mrpc, &[("train.tsv", mrpc), ("dev.tsv", mrpc)]).unwrap();
    assert_eq!(dataset.train[0].first, "A \"b\" c");
    assert_eq!(dataset.train[0].second.as_deref(), Some("D"));
    assert_eq!(dataset.train[0].label, Some(Label::Class(1)));

    let stsb = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.250\n";
    let dataset = read(TaskName::Stsb, &[("train.tsv", stsb), ("dev.tsv", stsb)]).unwrap();
    assert_eq!(dataset.problem_type, ProblemType::Regression);
    assert_eq!(dataset.train[0].label, Some(Label::Value(3.25)));

    let mnli = "sentence1\tsentence2\tgold_label\na\tb\tneutral\n";
    let files = ["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"].map(|name| (name, mnli));
    let dataset = read(TaskName::Mnli, &files).unwrap();
    let names: Vec<&str> = dataset.evals.iter().map(|split| split.name).collect();
    assert_eq!(names, ["dev_matched", "dev_mismatched"]);
    assert_eq!(dataset.train[0].label, Some(Label::Class(1)));

    let imdb = "{\"id\": \"0\", \"label\": 1, \"text\": \"Good.\"}\n";
    let dataset = read(
        TaskName::Imdb,
        &[("train.jsonl", imdb), ("test.jsonl", imdb)],
    )
    .unwrap();
    assert_eq!(dataset.evals[0].examples[0].label, Some(Label::Class(1)));
}

#[test]
fn bad_tables_are_refused() {
    let sst2 = |text: &str| read(TaskName::Sst2, &[("train.tsv", text), ("dev.tsv", text)]);
    let good = "sentence\tlabel\na\t1\n";
    assert!(sst2(good).is_ok());
    for (text, message) in [
        (
            "text\tlabel\na\t1\n",
            "there is no column \"sentence\", only text, label",
        ),
        (
            "sentence\tlabel\na\t1\nb\t2\n",
            "line 3: got label \"2\", expected one of 0, 1",
        ),
        (
            "sentence\tlabel\na\t1\nb\n",
            "line 3 has 1 columns, expected at least 2",
        ),
        ("sentence\tlabel\n", "holds no examples"),
    ] {
        let error = sst2(text).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
    let error = read(TaskName::Sst2, &[]).unwrap_err();
    assert!(error.contains("train.tsv"), "{error}");
    let bad = "{\"label\": 1, \"text\": [1]}\n";
    let error = read(TaskName::Imdb, &[("train.jsonl", bad), ("test.jsonl", bad)]).unwrap_err();
    assert!(
        error.contains("line 1: \"text\" is [1], expected a text"),
        "{error}"
    );
    let config = TaskConfig::default();
    let error = Dataset::read(&config).unwrap_err().to_string();
    assert!(
        error.contains("--task custom needs --train-file"),
        "{error}"
    );
}

//! Labelled texts: the tasks of GLUE, IMDB, and tables of one's own.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::metrics::Metric;
use crate::config::ProblemType;
use crate::text::Text;

/// Known tasks, and `custom` for any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TaskName {
    /// Is a sentence grammatical?
    Cola,
    /// Sentiment of sentences.
    #[serde(rename = "sst-2")]
    #[value(name = "sst-2")]
    Sst2,
    /// Paraphrases.
    Mrpc,
    /// Similarity of sentences, 0 to 5.
    Stsb,
    /// Paraphrases among questions.
    Qqp,
    /// Entailment, three classes.
    Mnli,
    /// Does a sentence answer a question?
    Qnli,
    /// Entailment, two classes.
    Rte,
    /// Pronouns.
    Wnli,
    /// Sentiment of film reviews: `train.jsonl` and `test.jsonl` of `label` and `text`.
    Imdb,
    /// Any table of texts with a class or a number.
    Custom,
}

/// What to learn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Data")]
pub struct TaskConfig {
    /// Task, which says how its files are read and judged.
    #[arg(long, value_enum, default_value_t = TaskConfig::default().task)]
    pub task: TaskName,
    /// Folder of a known task's files, as GLUE has them.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// custom: .csv, .tsv or .jsonl file to train on.
    #[arg(long, value_name = "FILE")]
    pub train_file: Option<PathBuf>,
    /// custom: the same, to evaluate on.
    #[arg(long, value_name = "FILE")]
    pub eval_file: Option<PathBuf>,
    /// Texts without labels to predict, in columns as those of training.
    #[arg(long, value_name = "FILE")]
    pub predict_file: Option<PathBuf>,
    /// custom: column or field of the text.
    #[arg(long, default_value_t = TaskConfig::default().text_column)]
    pub text_column: String,
    /// custom: column or field of a second text.
    #[arg(long)]
    pub pair_column: Option<String>,
    /// custom: column or field of the label.
    #[arg(long, default_value_t = TaskConfig::default().label_column)]
    pub label_column: String,
    /// custom: labels are numbers to be predicted, not classes.
    #[arg(long)]
    pub regression: bool,
    /// Use no more than this many training texts, the first ones.
    #[arg(long)]
    pub max_train_samples: Option<usize>,
    /// Use no more than this many texts of each evaluation, the first ones.
    #[arg(long)]
    pub max_eval_samples: Option<usize>,
    /// Most tokens of a text, the rest of which is cut off.
    #[arg(long, default_value_t = TaskConfig::default().max_length)]
    pub max_length: usize,
}

impl Default for TaskConfig {
    fn default() -> Self {
        Self {
            task: TaskName::Custom,
            data: None,
            train_file: None,
            eval_file: None,
            predict_file: None,
            text_column: "text".into(),
            pair_column: None,
            label_column: "label".into(),
            regression: false,
            max_train_samples: None,
            max_eval_samples: None,
            max_length: 128,
        }
    }
}

/// What a text is labelled with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Label {
    /// Index of a class.
    Class(u32),
    /// A number.
    Value(f32),
}

impl Label {
    /// The number, or that of the class.
    pub fn value(&self) -> f64 {
        match *self {
            Self::Class(class) => f64::from(class),
            Self::Value(value) => f64::from(value),
        }
    }
}

/// A text, perhaps with a second one and a label.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The text, or the first of two.
    pub first: String,
    /// The second.
    pub second: Option<String>,
    /// None in texts to predict.
    pub label: Option<Label>,
}

impl Example {
    /// As models take it.
    pub fn as_text(&self) -> Text<'_> {
        Text {
            first: &self.first,
            second: self.second.as_deref(),
        }
    }
}

/// Examples to evaluate on.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// Such as `dev`.
    pub name: &'static str,
    /// With labels.
    pub examples: Vec<Example>,
}

/// All texts of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Names of the classes; one for numbers.
    pub labels: Vec<String>,
    /// Classes or numbers.
    pub problem_type: ProblemType,
    /// How it is judged.
    pub metrics: Vec<Metric>,
    /// To train on.
    pub train: Vec<Example>,
    /// To evaluate on; the first one decides which checkpoint is best.
    pub evals: Vec<Split>,
    /// To predict.
    pub predict: Vec<Example>,
}

/// How the files of a task are read.
struct Format {
    columns: Columns,
    /// Names of the classes in order; `None` to collect them, `Some` of none for numbers.
    classes: Option<Vec<String>>,
    metrics: Vec<Metric>,
    quoting: bool,
}

/// Columns by name, or of a file without header by number (`0`, `1`, …).
#[derive(Clone)]
struct Columns {
    first: String,
    second: Option<String>,
    label: String,
    header: bool,
}

impl Dataset {
    /// Reads the files of a task.
    ///
    /// # Errors
    /// Names the file, line and column that is missing or wrong.
    pub fn read(config: &TaskConfig) -> Result<Self> {
        let mut format = Format::new(config);
        let (train_file, eval_files) = files(config)?;
        let mut train = read_table(&train_file, &format.columns, format.quoting)?;
        train.truncate(config.max_train_samples.unwrap_or(usize::MAX));
        let classes = match format.classes.take() {
            Some(classes) => classes,
            None => collect_classes(&train),
        };
        let labelled = |rows: Vec<Row>, file: &Path| -> Result<Vec<Example>> {
            ensure!(!rows.is_empty(), "{} holds no examples", file.display());
            let label = |row: Row| row.labelled(&classes);
            rows.into_iter()
                .map(label)
                .collect::<Result<_>>()
                .with_context(|| format!("in {}", file.display()))
        };
        let mut evals = Vec::new();
        for (name, file) in eval_files {
            let mut rows = read_table(&file, &format.columns, format.quoting)?;
            rows.truncate(config.max_eval_samples.unwrap_or(usize::MAX));
            let examples = labelled(rows, &file)?;
            evals.push(Split { name, examples });
        }
        let predict = match &config.predict_file {
            Some(file) => read_unlabelled(file, &format)?,
            None => Vec::new(),
        };
        let regression = classes.is_empty();
        Ok(Self {
            train: labelled(train, &train_file)?,
            evals,
            predict,
            problem_type: match regression {
                true => ProblemType::Regression,
                false => ProblemType::SingleLabelClassification,
            },
            labels: if regression {
                vec!["score".into()]
            } else {
                classes.clone()
            },
            metrics: format.metrics,
        })
    }
}

impl Format {
    fn new(config: &TaskConfig) -> Self {
        use Metric::*;
        let (first, second, label, classes, metrics): (_, _, _, &[&str], &[_]) = match config.task {
            TaskName::Custom => return Self::custom(config),
            TaskName::Cola => ("3", None, "1", &["0", "1"], &[Matthews]),
            TaskName::Sst2 => ("sentence", None, "label", &["0", "1"], &[Accuracy]),
            TaskName::Mrpc => (
                "#1 String",
                Some("#2 String"),
                "Quality",
                &["0", "1"],
                &[Accuracy, F1],
            ),
            TaskName::Stsb => (
                "sentence1",
                Some("sentence2"),
                "score",
                &[],
                &[Pearson, Spearman],
            ),
            TaskName::Qqp => (
                "question1",
                Some("question2"),
                "is_duplicate",
                &["0", "1"],
                &[Accuracy, F1],
            ),
            TaskName::Mnli => (
                "sentence1",
                Some("sentence2"),
                "gold_label",
                &["entailment", "neutral", "contradiction"],
                &[Accuracy],
            ),
            TaskName::Qnli => (
                "question",
                Some("sentence"),
                "label",
                &["entailment", "not_entailment"],
                &[Accuracy],
            ),
            TaskName::Rte => (
                "sentence1",
                Some("sentence2"),
                "label",
                &["entailment", "not_entailment"],
                &[Accuracy],
            ),
            TaskName::Wnli => (
                "sentence1",
                Some("sentence2"),
                "label",
                &["0", "1"],
                &[Accuracy],
            ),
            TaskName::Imdb => ("text", None, "label", &["0", "1"], &[Accuracy]),
        };
        Self {
            columns: Columns {
                first: first.into(),
                second: second.map(str::to_string),
                label: label.into(),
                header: config.task != TaskName::Cola,
            },
            classes: Some(classes.iter().map(|class| class.to_string()).collect()),
            metrics: metrics.to_vec(),
            quoting: false,
        }
    }

    fn custom(config: &TaskConfig) -> Self {
        Self {
            columns: Columns {
                first: config.text_column.clone(),
                second: config.pair_column.clone(),
                label: config.label_column.clone(),
                header: true,
            },
            classes: config.regression.then(Vec::new),
            metrics: match config.regression {
                true => vec![Metric::Pearson, Metric::Spearman],
                false => vec![Metric::Accuracy],
            },
            quoting: true,
        }
    }
}

/// The file to train on, and those to evaluate on by name.
fn files(config: &TaskConfig) -> Result<(PathBuf, Vec<(&'static str, PathBuf)>)> {
    if config.task == TaskName::Custom {
        let need = |file: &Option<PathBuf>, option: &str| {
            file.clone()
                .with_context(|| format!("--task custom needs --{option}"))
        };
        let train = need(&config.train_file, "train-file")?;
        return Ok((train, vec![("dev", need(&config.eval_file, "eval-file")?)]));
    }
    let dir = config
        .data
        .as_ref()
        .context("a known --task needs --data, the folder of its files")?;
    let train = |name: &str| config.train_file.clone().unwrap_or(dir.join(name));
    let eval = |name: &'static str, file: &str| (name, dir.join(file));
    Ok(match config.task {
        TaskName::Imdb => (train("train.jsonl"), vec![eval("test", "test.jsonl")]),
        TaskName::Mnli => {
            let both = vec![
                eval("dev_matched", "dev_matched.tsv"),
                eval("dev_mismatched", "dev_mismatched.tsv"),
            ];
            (train("train.tsv"), both)
        }
        _ => match &config.eval_file {
            Some(file) => (train("train.tsv"), vec![("dev", file.clone())]),
            None => (train("train.tsv"), vec![eval("dev", "dev.tsv")]),
        },
    })
}

/// A line of a table.
struct Row {
    line: u64,
    first: String,
    second: Option<String>,
    label: String,
}

impl Row {
    fn labelled(self, classes: &[String]) -> Result<Example> {
        let label = if classes.is_empty() {
            let value = self
                .label
                .trim()
                .parse::<f32>()
                .ok()
                .filter(|value| value.is_finite());
            value.map(Label::Value)
        } else {
            let class = classes.iter().position(|class| *class == self.label);
            class.map(|class| Label::Class(class as u32))
        };
        let Some(label) = label else {
            let expected = match classes.is_empty() {
                true => "a number".to_string(),
                false => format!("one of {}", classes.join(", ")),
            };
            bail!(
                "line {}: got label {:?}, expected {expected}",
                self.line,
                self.label
            );
        };
        Ok(Example {
            first: self.first,
            second: self.second,
            label: Some(label),
        })
    }
}

/// The labels there are, numbers in order of size.
fn collect_classes(rows: &[Row]) -> Vec<String> {
    let found: BTreeSet<&str> = rows.iter().map(|row| row.label.as_str()).collect();
    let mut classes: Vec<String> = found.into_iter().map(str::to_string).collect();
    let number = |class: &String| class.parse::<f64>().unwrap_or(f64::INFINITY);
    classes.sort_by(|a, b| number(a).total_cmp(&number(b)));
    classes
}

fn read_unlabelled(file: &Path, format: &Format) -> Result<Vec<Example>> {
    // GLUE's files to predict have a header, even where those to train on have none.
    let mut columns = format.columns.clone();
    if !columns.header {
        (columns.first, columns.header) = ("sentence".into(), true);
    }
    columns.label = String::new();
    let rows = read_table(file, &columns, format.quoting)?;
    let example = |row: Row| Example {
        first: row.first,
        second: row.second,
        label: None,
    };
    Ok(rows.into_iter().map(example).collect())
}

fn read_table(path: &Path, columns: &Columns, quoting: bool) -> Result<Vec<Row>> {
    let read = || match path.extension().and_then(|ending| ending.to_str()) {
        Some("jsonl") => read_jsonl(path, columns),
        Some("tsv") => read_separated(path, columns, b'\t', false),
        Some("csv") => read_separated(path, columns, b',', quoting),
        _ => bail!("tables are .tsv, .csv or .jsonl files"),
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

/// `.csv`, or `.tsv` without quoting as GLUE's files are.
fn read_separated(
    path: &Path,
    columns: &Columns,
    separator: u8,
    quoting: bool,
) -> Result<Vec<Row>> {
    let bytes = fs::read(path)?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(separator)
        .quoting(quoting)
        .has_headers(columns.header)
        .flexible(true)
        .from_reader(bytes);
    let header = reader.headers()?.clone();
    let at = |name: &str| -> Result<usize> {
        if !columns.header {
            return Ok(name.parse()?);
        }
        header
            .iter()
            .position(|column| column == name)
            .with_context(|| {
                let known = header.iter().collect::<Vec<_>>().join(", ");
                format!("there is no column \"{name}\", only {known}")
            })
    };
    let first = at(&columns.first)?;
    let second = columns.second.as_deref().map(at).transpose()?;
    let label = (!columns.label.is_empty())
        .then(|| at(&columns.label))
        .transpose()?;
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record?;
        let line = record.position().map_or(0, |position| position.line());
        let field = |at: usize| -> Result<String> {
            let field = record.get(at).with_context(|| {
                format!(
                    "line {line} has {} columns, expected at least {}",
                    record.len(),
                    at + 1
                )
            })?;
            Ok(field.to_string())
        };
        rows.push(Row {
            line,
            first: field(first)?,
            second: second.map(field).transpose()?,
            label: label.map(field).transpose()?.unwrap_or_default(),
        });
    }
    Ok(rows)
}

fn read_jsonl(path: &Path, columns: &Columns) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (line, number) in BufReader::new(File::open(path)?).lines().zip(1..) {
        let at = || format!("line {number}");
        let json: Value = serde_json::from_str(&line?).with_context(at)?;
        let field = |name: &str| -> Result<String> {
            match &json[name] {
                Value::String(text) => Ok(text.clone()),
                Value::Number(number) => Ok(number.to_string()),
                Value::Bool(value) => Ok(value.to_string()),
                other => bail!("line {number}: \"{name}\" is {other}, expected a text or a number"),
            }
        };
        rows.push(Row {
            line: number,
            first: field(&columns.first)?,
            second: columns.second.as_deref().map(field).transpose()?,
            label: match columns.label.is_empty() {
                true => String::new(),
                false => field(&columns.label)?,
            },
        });
    }
    Ok(rows)
}

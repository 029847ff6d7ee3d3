//! Texts from a file or standard input, one a line, answered by a line of JSON each.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::text::Text;
use crate::train::Precision;

/// A model, and the texts that it answers.
#[derive(Debug, Clone, clap::Args)]
pub struct AnswerConfig {
    /// Model directory, or a Hub id owner/name or owner/name@revision.
    #[arg(long)]
    pub model: String,
    /// Texts and answers.
    #[command(flatten)]
    pub lines: LinesConfig,
    /// cpu, cuda, or cuda:N for the GPU of that number.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Arithmetic of the model.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    pub dtype: Precision,
}

/// Where texts come from and answers go.
#[derive(Debug, Clone, clap::Args)]
pub struct LinesConfig {
    /// File of texts, one a line; standard input without.
    #[arg(long)]
    pub input: Option<PathBuf>,
    /// File for the answers, a line of JSON each; standard output without.
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// Each line of the input is a JSON object with "text" and, where there are two, "text_pair".
    #[arg(long)]
    pub jsonl: bool,
    /// Texts computed, and answered, at a time.
    #[arg(long, default_value_t = 32)]
    pub batch_size: usize,
}

/// A line of input.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Line {
    /// The text, or the first of two.
    pub text: String,
    /// The second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_pair: Option<String>,
}

impl Line {
    /// As models take it.
    pub fn as_text(&self) -> Text<'_> {
        Text {
            first: &self.text,
            second: self.text_pair.as_deref(),
        }
    }
}

/// An answer beside its text.
#[derive(Serialize)]
struct Answered<'a, T> {
    #[serde(flatten)]
    line: &'a Line,
    #[serde(flatten)]
    answer: T,
}

/// Answers all lines in order, `batch_size` at a time, so that any number of them need no memory;
/// the answers of a batch are written before the next is read.
///
/// # Errors
/// When a line is not UTF-8, or not the JSON asked for, when `answer` fails, each with the number
/// of the line, and when a file cannot be read or written.
pub fn answer_lines<T: Serialize>(
    config: &LinesConfig,
    mut answer: impl FnMut(&[Line]) -> Result<Vec<T>>,
) -> Result<()> {
    let mut output = open_output(config.output.as_deref())?;
    let mut lines = open_input(config.input.as_deref())?
        .lines()
        .zip(1usize..)
        .peekable();
    while let Some((_, first)) = lines.peek() {
        let first = *first;
        let batch = lines.by_ref().take(config.batch_size.max(1));
        let batch: Vec<Line> = batch
            .map(|(line, number)| {
                parse(line, config.jsonl).with_context(|| format!("line {number}"))
            })
            .collect::<Result<_>>()?;
        let last = first + batch.len() - 1;
        let answers = answer(&batch).with_context(|| format!("lines {first} to {last}"))?;
        for (line, answer) in batch.iter().zip(answers) {
            serde_json::to_writer(&mut output, &Answered { line, answer })?;
            output.write_all(b"\n")?;
        }
        output.flush().context("cannot write the answers")?;
    }
    Ok(())
}

fn parse(line: io::Result<String>, jsonl: bool) -> Result<Line> {
    let line = line?;
    if jsonl {
        return serde_json::from_str(&line)
            .context("expected a JSON object with the string \"text\" and perhaps \"text_pair\"");
    }
    Ok(Line {
        text: line,
        text_pair: None,
    })
}

fn open_input(path: Option<&Path>) -> Result<Box<dyn BufRead>> {
    let Some(path) = path else {
        return Ok(Box::new(io::stdin().lock()));
    };
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Box::new(BufReader::new(file)))
}

fn open_output(path: Option<&Path>) -> Result<Box<dyn Write>> {
    let Some(path) = path else {
        return Ok(Box::new(BufWriter::new(io::stdout().lock())));
    };
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Box::new(BufWriter::new(file)))
}

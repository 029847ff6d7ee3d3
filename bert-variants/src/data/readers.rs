//! Documents out of files: plain text, JSON Lines and Parquet, compressed or not.
//!
//! Readers stream: a long document comes as several [`Passage`]s, so that neither a file nor a
//! document is ever whole in memory (JSON lines and Parquet values excepted, which are one by one).

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, anyhow, bail, ensure};
use flate2::read::MultiGzDecoder;
use indicatif::ProgressBar;
use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

/// Length at which documents are cut into passages, in bytes.
const PASSAGE_BYTES: usize = 32 << 10;
/// Longest passage of text without white space, in bytes; then a word may be cut.
const MAX_PASSAGE_BYTES: usize = 1 << 20;
/// Longest line of JSON, in bytes.
const MAX_LINE_BYTES: u64 = 1 << 30;
/// Parquet values read at once.
const PARQUET_BATCH: usize = 64;
/// Largest window of Zstandard that a 64-bit machine can read (`zstd --ultra --long=31`).
const ZSTD_WINDOW_LOG: u32 = 31;
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// A run of a document's text, cut in front of white space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage {
    /// The text.
    pub text: String,
    /// Whether the document ends here.
    pub ends_document: bool,
}

/// Takes passages as they are read; an error stops the reader.
pub type Emit<'a> = &'a mut dyn FnMut(Passage) -> Result<()>;

/// A file that holds documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InputFile {
    pub path: PathBuf,
    format: Format,
    compression: Compression,
    /// Bytes on disk.
    pub size: u64,
    /// Nanoseconds since 1970.
    pub modified: u128,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    JsonLines,
    Parquet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

impl InputFile {
    /// What file names may end in.
    pub const EXTENSIONS: &str =
        ".txt, .jsonl (also .ndjson and .json), each also with .gz or .zst, or .parquet";

    /// `None` where the name's ending is not one of [`InputFile::EXTENSIONS`].
    pub fn new(path: &Path) -> Result<Option<Self>> {
        let Some((format, compression)) = kind(&path.to_string_lossy()) else {
            return Ok(None);
        };
        let read = || -> Result<_> {
            let metadata = path.metadata()?;
            let modified = metadata.modified()?.duration_since(UNIX_EPOCH);
            Ok((metadata.len(), modified.unwrap_or_default().as_nanos()))
        };
        let (size, modified) = read().with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(Self {
            path: path.to_path_buf(),
            format,
            compression,
            size,
            modified,
        }))
    }

    /// Whether [`InputFile::new`] takes a file of this name.
    pub fn supports(name: &str) -> bool {
        kind(name).is_some()
    }

    /// Reads all documents. `progress` advances by the bytes of the file.
    pub fn read(&self, text_field: &str, progress: &ProgressBar, emit: Emit) -> Result<()> {
        match self.format {
            Format::Text => read_text(self.open(progress)?, &self.path, emit),
            Format::JsonLines => {
                read_json_lines(self.open(progress)?, &self.path, text_field, emit)
            }
            Format::Parquet => {
                read_parquet(&self.path, text_field, emit)?;
                progress.inc(self.size);
                Ok(())
            }
        }
    }

    /// The decompressed contents.
    fn open(&self, progress: &ProgressBar) -> Result<Box<dyn BufRead>> {
        let open = || -> std::io::Result<Box<dyn BufRead>> {
            let file =
                BufReader::with_capacity(1 << 17, progress.wrap_read(File::open(&self.path)?));
            Ok(match self.compression {
                Compression::None => Box::new(file),
                Compression::Gzip => Box::new(BufReader::new(MultiGzDecoder::new(file))),
                Compression::Zstd => {
                    let mut decoder = zstd::Decoder::with_buffer(file)?;
                    decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                    Box::new(BufReader::with_capacity(1 << 17, decoder))
                }
            })
        };
        open().with_context(|| format!("cannot open {}", self.path.display()))
    }
}

fn kind(name: &str) -> Option<(Format, Compression)> {
    let name = name.to_ascii_lowercase();
    let (stem, compression) = if let Some(stem) = name.strip_suffix(".gz") {
        (stem, Compression::Gzip)
    } else if let Some(stem) = name.strip_suffix(".zst") {
        (stem, Compression::Zstd)
    } else {
        (name.as_str(), Compression::None)
    };
    let format = match stem.rsplit_once('.')?.1 {
        "txt" => Format::Text,
        "jsonl" | "ndjson" | "json" => Format::JsonLines,
        "parquet" if compression == Compression::None => Format::Parquet,
        _ => return None,
    };
    Some((format, compression))
}

/// One document: blank lines separate its paragraphs and mean nothing more.
fn read_text(mut reader: impl BufRead, path: &Path, emit: Emit) -> Result<()> {
    let mut offset = 0;
    let head = reader.fill_buf().with_context(|| damaged(path))?;
    if head.starts_with(BYTE_ORDER_MARK) {
        offset = BYTE_ORDER_MARK.len();
        reader.consume(offset);
    }
    cut(reader, path, offset, emit)
}

/// One JSON object a line, whose `text_field` is a document. Blank lines, empty texts and nulls
/// are passed over.
fn read_json_lines(
    mut reader: impl BufRead,
    path: &Path,
    text_field: &str,
    emit: Emit,
) -> Result<()> {
    let mut bytes = Vec::new();
    let mut offset = 0;
    for number in 1.. {
        bytes.clear();
        let read = reader
            .by_ref()
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut bytes);
        let read = read.with_context(|| damaged(path))?;
        if read == 0 {
            break;
        }
        let at = || format!("{}:{number}", path.display());
        ensure!(
            (read as u64) < MAX_LINE_BYTES,
            "{}: a line of more than {MAX_LINE_BYTES} bytes; expected JSON Lines, one object a line",
            at()
        );
        let line =
            std::str::from_utf8(&bytes).map_err(|error| not_utf8(path, offset, &error, &bytes))?;
        offset += read;
        let line = line.trim_start_matches('\u{feff}').trim();
        if line.is_empty() {
            continue;
        }
        if let Some(text) = parse_line(line, text_field).with_context(at)? {
            emit_document(text, path, emit)?;
        }
    }
    Ok(())
}

/// The text of one line, `None` for null.
fn parse_line(line: &str, text_field: &str) -> Result<Option<String>> {
    let value = serde_json::from_str(line).map_err(|error| {
        anyhow!(
            "not JSON: {error}; expected one object a line, such as {{\"{text_field}\": \"…\"}}"
        )
    })?;
    let Value::Object(mut object) = value else {
        bail!(
            "got a JSON {}, expected an object with the field \"{text_field}\"",
            type_name(&value)
        );
    };
    match object.remove(text_field) {
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Null) => Ok(None),
        Some(value) => bail!(
            "field \"{text_field}\" is a JSON {}, expected a string",
            type_name(&value)
        ),
        None => bail!(missing_field(text_field, object.keys().map(String::as_str))),
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn missing_field<'a>(text_field: &str, found: impl Iterator<Item = &'a str>) -> String {
    let found: Vec<&str> = found.collect();
    format!(
        "no field \"{text_field}\"; found {}: name the one that holds the text (text_field)",
        if found.is_empty() {
            "none".to_string()
        } else {
            found.join(", ")
        }
    )
}

/// Every value of the column `text_field` is a document; nulls are passed over.
fn read_parquet(path: &Path, text_field: &str, emit: Emit) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let reader = SerializedFileReader::new(file).with_context(|| damaged(path))?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let index = schema
        .columns()
        .iter()
        .position(|column| column.path().string() == text_field);
    let Some(index) = index else {
        let fields = schema
            .root_schema()
            .get_fields()
            .iter()
            .map(|field| field.name());
        bail!("{}: {}", path.display(), missing_field(text_field, fields));
    };
    let column = schema.column(index);
    ensure!(
        column.physical_type() == PhysicalType::BYTE_ARRAY && column.max_rep_level() == 0,
        "{}: column \"{text_field}\" holds {} values, expected strings",
        path.display(),
        column.physical_type()
    );
    for group in 0..reader.num_row_groups() {
        let at = || format!("{}, row group {group}", damaged(path));
        let rows = reader.get_row_group(group).with_context(at)?;
        let ColumnReader::ByteArrayColumnReader(mut column) =
            rows.get_column_reader(index).with_context(at)?
        else {
            bail!("{}: expected a column of byte arrays", at());
        };
        loop {
            let values = read_values(&mut column).with_context(at)?;
            let Some(values) = values else { break };
            for value in values {
                let text = std::str::from_utf8(value.data())
                    .map_err(|error| not_utf8(path, 0, &error, value.data()))
                    .with_context(|| format!("in a value of row group {group}"))?;
                emit_document(text.to_string(), path, emit)?;
            }
        }
    }
    Ok(())
}

/// The next values that are not null, `None` after the last.
fn read_values(column: &mut ColumnReaderImpl<ByteArrayType>) -> Result<Option<Vec<ByteArray>>> {
    let mut values = Vec::new();
    let mut definition_levels = Vec::new();
    let (records, _, _) = column.read_records(
        PARQUET_BATCH,
        Some(&mut definition_levels),
        None,
        &mut values,
    )?;
    Ok((records > 0).then_some(values))
}

fn emit_document(text: String, path: &Path, emit: Emit) -> Result<()> {
    if text.len() <= PASSAGE_BYTES {
        return emit(Passage {
            text,
            ends_document: true,
        });
    }
    cut(text.as_bytes(), path, 0, emit)
}

/// Emits one document in passages. `offset` is where `reader` stands in the file.
fn cut(mut reader: impl Read, path: &Path, mut offset: usize, emit: Emit) -> Result<()> {
    let mut bytes = Vec::new();
    loop {
        let read = reader
            .by_ref()
            .take(PASSAGE_BYTES as u64)
            .read_to_end(&mut bytes);
        let ends_document = read.with_context(|| damaged(path))? < PASSAGE_BYTES;
        let end = match last_word_end(&bytes) {
            _ if ends_document => bytes.len(),
            Some(end) => end,
            None if bytes.len() < MAX_PASSAGE_BYTES => continue,
            None => last_char_end(&bytes),
        };
        let text = std::str::from_utf8(&bytes[..end])
            .map_err(|error| not_utf8(path, offset, &error, &bytes))?
            .to_string();
        emit(Passage {
            text,
            ends_document,
        })?;
        if ends_document {
            return Ok(());
        }
        bytes.drain(..end);
        offset += end;
    }
}

/// Where the last word ends that is followed by white space.
fn last_word_end(bytes: &[u8]) -> Option<usize> {
    bytes
        .windows(2)
        .rposition(|pair| !pair[0].is_ascii_whitespace() && pair[1].is_ascii_whitespace())
        .map(|before| before + 1)
}

/// Where the last whole character ends.
fn last_char_end(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => bytes.len(),
    }
}

fn damaged(path: &Path) -> String {
    format!("cannot read {}: damaged or cut short", path.display())
}

/// `offset` is the place in the file of `bytes`, in which `error` was found.
fn not_utf8(
    path: &Path,
    offset: usize,
    error: &std::str::Utf8Error,
    bytes: &[u8],
) -> anyhow::Error {
    let at = error.valid_up_to();
    anyhow!(
        "{} is not UTF-8: byte {:#04x} at offset {}{}; convert it, such as with iconv -f latin1 -t utf-8",
        path.display(),
        bytes[at],
        offset + at,
        if offset == 0 && (bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff])) {
            " (it looks like UTF-16)"
        } else {
            " of its text"
        }
    )
}

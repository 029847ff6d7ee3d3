//! What the user names as data, resolved to files or to the embedded corpus.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use indicatif::ProgressBar;
use walkdir::{DirEntry, WalkDir};

use super::corpus::Corpus;
use super::hub;
use super::readers::{Emit, InputFile};
use crate::hub::SCHEME;

/// Documents, in a fixed order.
#[derive(Debug, Clone)]
pub enum Sources {
    /// In files.
    Files(FileSources),
    /// Made by the program.
    Corpus(Corpus),
}

/// Files and folders as the user named them, with the files found there.
#[derive(Debug, Clone)]
pub struct FileSources {
    named: Vec<(String, Vec<InputFile>)>,
    text_field: String,
}

impl Sources {
    /// Finds the files of every name, which is one of
    ///
    /// - a file,
    /// - a folder: all supported files in it and below, in the order of their paths, hidden ones
    ///   left out,
    /// - `hf://datasets/owner/name[@revision][/path]`: the supported files of a data set on the
    ///   Hugging Face Hub whose paths begin with `path`.
    ///
    /// Kinds of files are
    ///
    /// - `.txt`: one document a file; blank lines separate its paragraphs and mean nothing more,
    /// - `.jsonl`, `.ndjson`, `.json`: one JSON object a line, whose field `text_field` is a
    ///   document; blank lines, empty texts and nulls are passed over,
    /// - all of these also with `.gz` or `.zst`, of any window size,
    /// - `.parquet`: one document a row, in the column `text_field`; nulls are passed over.
    ///
    /// # Errors
    /// When a file or folder is missing, of an unknown kind or empty, or the Hub not in reach.
    pub fn find(names: &[String], text_field: &str) -> Result<Self> {
        ensure!(!names.is_empty(), "expected at least one file or folder");
        let named = names.iter().map(|name| Ok((name.clone(), find(name)?)));
        Ok(Self::Files(FileSources {
            named: named.collect::<Result<_>>()?,
            text_field: text_field.to_string(),
        }))
    }

    /// Reads all documents, in order. `progress` advances to [`Sources::progress_len`].
    ///
    /// # Errors
    /// When a file cannot be read, see the message, or `emit` fails.
    pub fn read(&self, progress: &ProgressBar, emit: Emit) -> Result<()> {
        match self {
            Self::Files(sources) => sources.read(progress, emit),
            Self::Corpus(corpus) => corpus.read(progress, emit),
        }
    }

    /// What a progress bar counts to: bytes on disk, or tales of the embedded corpus.
    pub fn progress_len(&self) -> u64 {
        match self {
            Self::Files(sources) => sources.files().map(|file| file.size).sum(),
            Self::Corpus(corpus) => corpus.documents as u64,
        }
    }

    /// Text that is equal only for equal documents: path, size and modification time of every
    /// file, or the parameters of the embedded corpus.
    pub fn identity(&self) -> Result<String> {
        match self {
            Self::Files(sources) => sources.identity(),
            Self::Corpus(corpus) => Ok(corpus.identity()),
        }
    }
}

impl std::fmt::Display for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Files(sources) => {
                for (i, (name, _)) in sources.named.iter().enumerate() {
                    f.write_str(if i == 0 { "" } else { ", " })?;
                    match Path::new(name).file_name() {
                        Some(file_name) if !name.starts_with(SCHEME) => {
                            f.write_str(&file_name.to_string_lossy())?;
                        }
                        _ => f.write_str(name)?,
                    }
                }
                Ok(())
            }
            Self::Corpus(corpus) => corpus.fmt(f),
        }
    }
}

impl FileSources {
    fn files(&self) -> impl Iterator<Item = &InputFile> {
        self.named.iter().flat_map(|(_, files)| files)
    }

    fn identity(&self) -> Result<String> {
        let mut identity = format!("field {}\n", self.text_field);
        for file in self.files() {
            let path = file.path.canonicalize();
            let path = path.with_context(|| format!("cannot find {}", file.path.display()))?;
            identity += &format!("{} {} {}\n", path.display(), file.size, file.modified);
        }
        Ok(identity)
    }

    fn read(&self, progress: &ProgressBar, emit: Emit) -> Result<()> {
        for (name, files) in &self.named {
            let mut has_text = false;
            for file in files {
                let mut file_has_text = false;
                file.read(&self.text_field, progress, &mut |passage| {
                    file_has_text = file_has_text || !passage.text.trim_start().is_empty();
                    emit(passage)
                })?;
                if !file_has_text && files.len() > 1 {
                    tracing::warn!("{} holds no text", file.path.display());
                }
                has_text |= file_has_text;
            }
            ensure!(
                has_text,
                "{name} holds no text: expected at least one document"
            );
        }
        Ok(())
    }
}

fn find(name: &str) -> Result<Vec<InputFile>> {
    if name.starts_with(SCHEME) {
        return hub::find(name);
    }
    let path = Path::new(name);
    if path.is_dir() {
        return find_in_folder(path);
    }
    if !path.exists() {
        bail!("found no file or folder {name}; expected a path or hf://datasets/owner/name");
    }
    match InputFile::new(path)? {
        Some(file) => Ok(vec![file]),
        None => bail!(
            "{name} is of an unknown kind; expected {}",
            InputFile::EXTENSIONS
        ),
    }
}

fn find_in_folder(folder: &Path) -> Result<Vec<InputFile>> {
    let hidden = |entry: &DirEntry| {
        entry.depth() > 0 && entry.file_name().to_string_lossy().starts_with('.')
    };
    let entries = WalkDir::new(folder).follow_links(true).sort_by_file_name();
    let mut files = Vec::new();
    for entry in entries.into_iter().filter_entry(|entry| !hidden(entry)) {
        let entry = entry.with_context(|| format!("cannot read {}", folder.display()))?;
        if entry.file_type().is_file() {
            files.extend(InputFile::new(entry.path())?);
        }
    }
    ensure!(
        !files.is_empty(),
        "{} holds no file of a supported kind; expected {}",
        folder.display(),
        InputFile::EXTENSIONS
    );
    Ok(files)
}

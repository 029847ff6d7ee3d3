//! Tokenised documents on disk, written once and then memory-mapped.
//!
//! All numbers are little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 8 | magic `BVTOKENS` |
//! | 4 + 4 | version of the format; bytes of a token id, 2 or 4 |
//! | 16 | key: what the tokens were made from |
//! | 8 + 8 | number of documents, number of tokens |
//! | 8 + 8 | XXH3 of all that follows the header; XXH3 of the header up to here |
//! | | token ids of all documents, end to end, filled up to a multiple of 8 bytes |
//! | 8 each | where each document begins, in tokens, and where the last one ends |
//!
//! A file has its name only when it is whole: it is written under a temporary name, flushed to
//! the disk and then renamed.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use memmap2::Mmap;
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

const MAGIC: [u8; 8] = *b"BVTOKENS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const ALIGNMENT: usize = 8;

/// The fields of the header that differ from file to file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    token_bytes: usize,
    key: u128,
    documents: u64,
    tokens: u64,
    checksum: u64,
}

impl Header {
    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((self.token_bytes as u32).to_le_bytes());
        bytes.extend(self.key.to_le_bytes());
        for field in [self.documents, self.tokens, self.checksum] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let bytes = bytes.first_chunk::<HEADER_BYTES>().with_context(|| {
            format!(
                "got {} bytes, expected a header of {HEADER_BYTES}",
                bytes.len()
            )
        })?;
        ensure!(
            bytes.starts_with(&MAGIC),
            "not a token file: it does not begin with BVTOKENS"
        );
        let version = u32::from_le_bytes(field(bytes, 8));
        ensure!(
            version == VERSION,
            "got version {version}, expected {VERSION}"
        );
        ensure!(
            xxh3_64(&bytes[..HEADER_BYTES - 8]) == u64::from_le_bytes(field(bytes, 56)),
            "the header is damaged: its checksum differs"
        );
        Ok(Self {
            token_bytes: u32::from_le_bytes(field(bytes, 12)) as usize,
            key: u128::from_le_bytes(field(bytes, 16)),
            documents: u64::from_le_bytes(field(bytes, 32)),
            tokens: u64::from_le_bytes(field(bytes, 40)),
            checksum: u64::from_le_bytes(field(bytes, 48)),
        })
    }

    /// Bytes from the beginning of the file to the document offsets.
    fn offsets_at(&self) -> usize {
        HEADER_BYTES + (self.tokens as usize * self.token_bytes).next_multiple_of(ALIGNMENT)
    }

    fn file_bytes(&self) -> usize {
        self.offsets_at() + (self.documents as usize + 1) * 8
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// Writes a token file.
pub(crate) struct TokenWriter {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    header: Header,
    offsets: Vec<u64>,
    hash: Xxh3,
}

impl TokenWriter {
    /// `key` says what the tokens are made from; ids are below `vocab_size`.
    pub fn create(path: &Path, key: u128, vocab_size: usize) -> Result<Self> {
        let create = || -> Result<_> {
            let folder = path.parent().unwrap_or(Path::new(""));
            std::fs::create_dir_all(folder)?;
            let mut file = tempfile::Builder::new()
                .prefix(".incomplete-")
                .tempfile_in(folder)?;
            file.write_all(&[0; HEADER_BYTES])?;
            Ok(file)
        };
        let file = create().with_context(|| cannot_write(path))?;
        let token_bytes = if vocab_size <= 1 << 16 { 2 } else { 4 };
        Ok(Self {
            path: path.to_path_buf(),
            file: BufWriter::with_capacity(1 << 20, file),
            header: Header {
                token_bytes,
                key,
                documents: 0,
                tokens: 0,
                checksum: 0,
            },
            offsets: vec![0],
            hash: Xxh3::new(),
        })
    }

    /// Adds tokens to the present document.
    pub fn push(&mut self, ids: &[u32]) -> Result<()> {
        let token_bytes = self.header.token_bytes;
        let mut bytes = Vec::with_capacity(ids.len() * token_bytes);
        for id in ids {
            bytes.extend(&id.to_le_bytes()[..token_bytes]);
        }
        self.header.tokens += ids.len() as u64;
        self.write(&bytes)
    }

    /// Ends the present document; one without tokens is none.
    pub fn end_document(&mut self) {
        if self.offsets.last() != Some(&self.header.tokens) {
            self.offsets.push(self.header.tokens);
        }
    }

    /// Gives the file its name.
    pub fn finish(mut self) -> Result<()> {
        let tokens = self.header.tokens as usize * self.header.token_bytes;
        self.write(&vec![0; tokens.next_multiple_of(ALIGNMENT) - tokens])?;
        let offsets: Vec<u8> = self
            .offsets
            .iter()
            .flat_map(|at| at.to_le_bytes())
            .collect();
        self.write(&offsets)?;
        self.header.documents = self.offsets.len() as u64 - 1;
        self.header.checksum = self.hash.digest();
        let Self {
            path, file, header, ..
        } = self;
        let finish = || -> Result<()> {
            let mut file = file.into_inner().map_err(|error| error.into_error())?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header.to_bytes())?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        finish().with_context(|| cannot_write(&path))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file
            .write_all(bytes)
            .with_context(|| cannot_write(&self.path))
    }
}

fn cannot_write(path: &Path) -> String {
    format!(
        "cannot write the token cache {}; make room there or choose another cache_dir",
        path.display()
    )
}

/// A token file in memory.
#[derive(Debug)]
pub(crate) struct TokenFile {
    map: Mmap,
    header: Header,
}

impl TokenFile {
    /// Maps a file, and checks its size and checksums.
    ///
    /// # Errors
    /// When the file is missing, cut short, damaged, or made from something else than `key`.
    pub fn open(path: &Path, key: u128) -> Result<Self> {
        let open = || {
            let file = File::open(path)?;
            // SAFETY: nobody writes to a file that has its final name (see the module's
            // description); who does, or cuts it short, breaks what every memory map rests on.
            let map = unsafe { Mmap::map(&file) }?;
            Self::check(map, key)
        };
        open().with_context(|| format!("cannot read the token cache {}", path.display()))
    }

    fn check(map: Mmap, key: u128) -> Result<Self> {
        let header = Header::from_bytes(&map)?;
        ensure!(
            header.key == key,
            "it was made from other data or with another tokenizer"
        );
        ensure!(
            map.len() == header.file_bytes(),
            "got {} bytes, expected {}: the file was cut short or added to",
            map.len(),
            header.file_bytes()
        );
        ensure!(
            xxh3_64(&map[HEADER_BYTES..]) == header.checksum,
            "the file is damaged: its checksum differs"
        );
        Ok(Self { map, header })
    }

    /// Where the tokens of each document lie.
    pub fn documents(&self) -> Vec<Range<u64>> {
        let offsets: Vec<u64> = self.map[self.header.offsets_at()..]
            .as_chunks()
            .0
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes))
            .collect();
        offsets.windows(2).map(|pair| pair[0]..pair[1]).collect()
    }

    /// Appends the token ids in `range` to `ids`.
    pub fn read(&self, range: &Range<u64>, ids: &mut Vec<u32>) {
        let bytes = self.bytes(range);
        match self.header.token_bytes {
            2 => ids.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|id| u16::from_le_bytes(*id) as u32),
            ),
            _ => ids.extend(bytes.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id))),
        }
    }

    /// The stored form of the token ids in `range`.
    pub fn bytes(&self, range: &Range<u64>) -> &[u8] {
        let at = |token: u64| HEADER_BYTES + token as usize * self.header.token_bytes;
        &self.map[at(range.start)..at(range.end)]
    }

    /// Checksum of the tokens and documents.
    pub fn checksum(&self) -> u64 {
        self.header.checksum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, vocab_size: usize, documents: &[Vec<u32>]) {
        let mut writer = TokenWriter::create(path, 7, vocab_size).unwrap();
        for document in documents {
            let (head, tail) = document.split_at(document.len() / 2);
            writer.push(head).unwrap();
            writer.push(tail).unwrap();
            writer.end_document();
        }
        writer.finish().unwrap();
    }

    fn read(file: &TokenFile) -> Vec<Vec<u32>> {
        let read = |range| {
            let mut ids = Vec::new();
            file.read(&range, &mut ids);
            ids
        };
        file.documents().into_iter().map(read).collect()
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]
        #[test]
        fn reads_what_was_written(
            wide: bool,
            documents in proptest::collection::vec(
                proptest::collection::vec(0_u32..65_536, 0..30),
                0..8,
            ),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("tokens");
            write(&path, if wide { 65_537 } else { 65_536 }, &documents);
            let file = TokenFile::open(&path, 7).unwrap();
            let expected: Vec<Vec<u32>> =
                documents.into_iter().filter(|document| !document.is_empty()).collect();
            proptest::prop_assert_eq!(read(&file), expected);
            let left = std::fs::read_dir(dir.path()).unwrap().count();
            proptest::prop_assert_eq!(left, 1, "only the finished file is left");
        }
    }

    #[test]
    fn wide_ids_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        write(&path, 100_000, &[vec![99_999, 3]]);
        assert_eq!(read(&TokenFile::open(&path, 7).unwrap()), [[99_999, 3]]);
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        write(&path, 1000, &[vec![1, 2, 3], vec![4, 5]]);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            std::fs::write(&path, &damaged).unwrap();
            assert!(TokenFile::open(&path, 7).is_err(), "flipped byte {at}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(TokenFile::open(&path, 7).is_err(), "cut to {at} bytes");
        }
        std::fs::write(&path, &whole).unwrap();
        assert!(TokenFile::open(&path, 7).is_ok());
        let error = format!("{:#}", TokenFile::open(&path, 8).unwrap_err());
        assert!(error.contains("other data"), "{error}");
    }

    #[test]
    fn an_unfinished_file_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        let mut writer = TokenWriter::create(&path, 7, 1000).unwrap();
        writer.push(&[1, 2]).unwrap();
        drop(writer);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

//! Documents from files of every kind, and the cache of their tokens.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bert_variants::data::{Corpus, Data, DataConfig, Sources, TokenDataset, train_tokenizer};
use bert_variants::tokenizer::Tokenizer;
use indicatif::ProgressBar;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tempfile::TempDir;

/// A folder for one test.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file, and returns its path.
    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }

    fn name(&self) -> String {
        self.0.path().display().to_string()
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// With a window that readers accept only when told to, as `zstd --long=28` writes.
fn zstd_long(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(28).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Rows of an optional column `text` and a number, in row groups of two.
fn parquet(column_type: &str, texts: &[Option<&[u8]>]) -> Vec<u8> {
    let schema = format!("message m {{ required int32 id; optional {column_type}; }}");
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Default::default()).unwrap();
    for rows in texts.chunks(2) {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let ids: Vec<i32> = (0..rows.len() as i32).collect();
        column
            .typed::<parquet::data_type::Int32Type>()
            .write_batch(&ids, None, None)
            .unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = rows
            .iter()
            .flatten()
            .map(|text| ByteArray::from(text.to_vec()))
            .collect();
        let levels: Vec<i16> = rows.iter().map(|row| row.is_some() as i16).collect();
        column
            .typed::<ByteArrayType>()
            .write_batch(&values, Some(&levels), None)
            .unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.into_inner().unwrap()
}

/// All documents, their passages joined.
fn read(names: &[String], text_field: &str) -> anyhow::Result<Vec<String>> {
    let mut documents = vec![];
    let mut document = String::new();
    Sources::find(names, text_field)?.read(&ProgressBar::hidden(), &mut |passage| {
        document += &passage.text;
        if passage.ends_document {
            documents.push(std::mem::take(&mut document));
        }
        Ok(())
    })?;
    assert!(document.is_empty(), "the last document has an end");
    Ok(documents)
}

fn documents(name: &str) -> Vec<String> {
    read(&[name.to_string()], "text").unwrap()
}

fn error(name: &str) -> String {
    format!("{:#}", read(&[name.to_string()], "text").unwrap_err())
}

const JSON_LINES: &str = "{\"id\": 1, \"text\": \"One é.\"}\n\n{\"text\": \"Two\\nlines.\"}\r\n\
                          {\"text\": null}\n{\"text\": \"Three.\"}";

#[test]
fn text_is_one_document_a_file() {
    let folder = Folder::new();
    let text = "First paragraph\nof é.\r\n\n\n\nSecond.\n";
    for (name, bytes) in [
        ("a.txt", text.as_bytes().to_vec()),
        ("b.TXT.gz", gzip(text.as_bytes())),
        ("c.txt.zst", zstd_long(text.as_bytes())),
        ("d.txt", ["\u{feff}", text].concat().into_bytes()),
    ] {
        assert_eq!(documents(&folder.write(name, bytes)), [text], "{name}");
    }
}

#[test]
fn json_lines_are_one_document_a_line() {
    let folder = Folder::new();
    let expected = ["One é.", "Two\nlines.", "Three."];
    for (name, bytes) in [
        ("a.jsonl", JSON_LINES.as_bytes().to_vec()),
        ("b.jsonl.gz", gzip(JSON_LINES.as_bytes())),
        ("c.json.zst", zstd_long(JSON_LINES.as_bytes())),
        ("d.ndjson", ["\u{feff}", JSON_LINES].concat().into_bytes()),
        // Two compressed streams, one after the other.
        (
            "e.jsonl.gz",
            [
                gzip(b"{\"text\": \"One \xc3\xa9.\"}\n"),
                gzip(&JSON_LINES.as_bytes()[29..]),
            ]
            .concat(),
        ),
    ] {
        assert_eq!(documents(&folder.write(name, bytes)), expected, "{name}");
    }
    let other = folder.write("other.jsonl", "{\"body\": \"Here.\"}\n");
    assert_eq!(read(&[other], "body").unwrap(), ["Here."]);
}

#[test]
fn parquet_has_one_document_a_row() {
    let folder = Folder::new();
    let texts = [Some("One é."), None, Some("Two."), Some("Three.")];
    let texts = texts.map(|text| text.map(str::as_bytes));
    for column in ["binary text (UTF8)", "binary text"] {
        let file = folder.write("a.parquet", parquet(column, &texts));
        assert_eq!(documents(&file), ["One é.", "Two.", "Three."]);
    }
    let many: Vec<String> = (0..500).map(|i| format!("Row {i}.")).collect();
    let rows: Vec<Option<&[u8]>> = many.iter().map(|row| Some(row.as_bytes())).collect();
    let file = folder.write("many.parquet", parquet("binary text (UTF8)", &rows));
    assert_eq!(documents(&file), many);
}

#[test]
fn folders_are_read_in_the_order_of_their_paths() {
    let folder = Folder::new();
    folder.write("b/2.txt", "four");
    folder.write("b/1.jsonl", "{\"text\": \"two\"}\n{\"text\": \"three\"}\n");
    folder.write("a.txt", "one");
    folder.write("c.txt", "");
    folder.write("b/notes.md", "not data");
    folder.write(".git/x.txt", "hidden");
    assert_eq!(
        documents(&folder.name())[..4],
        ["one", "two", "three", "four"]
    );
    let both = [
        folder.path("b").display().to_string(),
        folder.path("a.txt").display().to_string(),
    ];
    assert_eq!(
        read(&both, "text").unwrap(),
        ["two", "three", "four", "one"]
    );
}

#[test]
fn long_documents_come_in_passages_that_join_to_the_whole() {
    let folder = Folder::new();
    let words: String = (0..40_000)
        .map(|i| format!("wörd{i} {}", if i % 9 == 0 { "\n" } else { "" }))
        .collect();
    let no_spaces = "é".repeat(1_500_000);
    let json = serde_json::json!({ "text": words }).to_string();
    for (name, bytes, expected) in [
        ("a.txt", &words, &words),
        ("b.txt", &no_spaces, &no_spaces),
        ("c.jsonl", &json, &words),
    ] {
        let name = folder.write(name, bytes);
        assert_eq!(documents(&name), [expected.as_str()]);
        let mut longest = 0;
        let sources = Sources::find(std::slice::from_ref(&name), "text").unwrap();
        let passages = &mut |passage: bert_variants::data::Passage| {
            longest = longest.max(passage.text.len());
            Ok(())
        };
        sources.read(&ProgressBar::hidden(), passages).unwrap();
        assert!(
            longest
                <= if name.ends_with("b.txt") {
                    1 << 20
                } else {
                    64 << 10
                },
            "{longest}"
        );
    }
}

#[test]
fn passages_have_the_tokens_of_the_whole_document() {
    let folder = Folder::new();
    let corpus = Corpus {
        documents: 200,
        seed: 3,
    };
    let whole: String = (0..200).map(|i| corpus.document(i)).collect();
    let sources = Sources::find(&[folder.write("a.txt", &whole)], "text").unwrap();
    let tokenizer = train_tokenizer(&sources, 500, true, folder.0.path()).unwrap();
    let dataset = TokenDataset::open_or_build(&sources, &tokenizer, folder.0.path()).unwrap();
    assert_eq!(dataset.documents().len(), 1);
    let mut ids = Vec::new();
    dataset.read(&dataset.documents()[0], &mut ids);
    assert!(whole.len() > 4 * 32_768);
    assert_eq!(ids, tokenizer.encode(&whole).unwrap());
}

#[test]
fn bad_sources_say_what_is_wrong() {
    let folder = Folder::new();
    let has = |error: String, expected: &str| assert!(error.contains(expected), "{error}");

    has(
        error(&folder.path("none.txt").display().to_string()),
        "found no file or folder",
    );
    has(error(&folder.name()), "holds no file of a supported kind");
    has(
        error(&folder.write("a.pdf", "x")),
        "unknown kind; expected .txt",
    );
    has(
        error(&folder.write("empty.txt", "")),
        "empty.txt holds no text",
    );
    has(
        error(&folder.write("blank.txt", " \n\n")),
        "blank.txt holds no text",
    );
    has(
        error(&folder.write("empty.jsonl", "")),
        "empty.jsonl holds no text",
    );
    has(
        error(&folder.write("empty.parquet", "")),
        "damaged or cut short",
    );
    assert!(read(&[], "text").is_err());
}

#[test]
fn bad_bytes_are_named_with_their_place() {
    let folder = Folder::new();
    let has = |error: String, expected: &str| assert!(error.contains(expected), "{error}");

    has(
        error(&folder.write("latin1.txt", b"caf\xe9 here")),
        "latin1.txt is not UTF-8: byte 0xe9 at offset 3",
    );
    let late = ["word ".repeat(20_000).as_bytes(), b"\xff"].concat();
    has(
        error(&folder.write("late.txt", &late)),
        "byte 0xff at offset 100000 of its text",
    );
    has(
        error(&folder.write("late.txt.gz", gzip(&late))),
        "offset 100000",
    );
    has(
        error(&folder.write("cut.txt", &"é".as_bytes()[..1])),
        "offset 0",
    );
    has(
        error(&folder.write("utf16.txt", b"\xff\xfea\0b\0")),
        "looks like UTF-16",
    );
    let line = b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n";
    has(
        error(&folder.write("bad.jsonl", line)),
        "bad.jsonl is not UTF-8: byte 0xff at offset 24",
    );
    let rows = [Some(&b"ok"[..]), Some(b"bad \xff")];
    for column in ["binary text (UTF8)", "binary text"] {
        has(
            error(&folder.write("bad.parquet", parquet(column, &rows))),
            "byte 0xff at offset 4",
        );
    }
}

#[test]
fn bad_json_is_named_with_its_line() {
    let folder = Folder::new();
    let has = |text: &str, expected: &str| {
        let error = error(&folder.write("bad.jsonl", text));
        assert!(error.contains(expected), "{error}");
    };
    has("{\"text\": \"a\"}\n{\"text\": \n", "bad.jsonl:2: not JSON");
    has(
        "\n\n[1, 2]\n",
        "bad.jsonl:3: got a JSON array, expected an object",
    );
    has(
        "{\"title\": \"a\", \"body\": \"b\"}",
        ":1: no field \"text\"; found title, body",
    );
    has("{}", "no field \"text\"; found none");
    has(
        "{\"text\": 3}",
        "field \"text\" is a JSON number, expected a string",
    );
}

#[test]
fn damaged_files_are_noticed() {
    let folder = Folder::new();
    let text = "some words ".repeat(5000);
    let cut = |bytes: Vec<u8>| bytes[..bytes.len() - 5].to_vec();
    let rows = [Some(text.as_bytes())];
    let parquet_file = parquet("binary text (UTF8)", &rows);
    for (name, bytes) in [
        ("a.txt.gz", cut(gzip(text.as_bytes()))),
        ("a.txt.zst", cut(zstd_long(text.as_bytes()))),
        ("b.txt.gz", text.clone().into_bytes()),
        ("b.txt.zst", text.clone().into_bytes()),
        ("c.parquet", cut(parquet_file.clone())),
        (
            "d.parquet",
            [&parquet_file[..4], &[7; 200], &parquet_file[204..]].concat(),
        ),
    ] {
        let error = error(&folder.write(name, bytes));
        assert!(
            error.contains(name) && error.contains("damaged or cut short"),
            "{name}: {error}"
        );
    }
}

#[test]
fn parquet_columns_that_are_no_text_are_refused() {
    let folder = Folder::new();
    let file = folder.write("a.parquet", parquet("binary body (UTF8)", &[Some(b"x")]));
    assert!(
        error(&file).contains("no field \"text\"; found id, body"),
        "{}",
        error(&file)
    );
    let error = format!("{:#}", read(&[file], "id").unwrap_err());
    assert!(
        error.contains("column \"id\" holds INT32 values, expected strings"),
        "{error}"
    );
}

fn tokenizer() -> Tokenizer {
    let pieces: Vec<String> = ('a'..='z')
        .flat_map(|c| [c.to_string(), format!("##{c}")])
        .collect();
    let vocab = format!(
        "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n.\n{}\n",
        pieces.join("\n")
    );
    Tokenizer::from_vocab(vocab.as_bytes(), None).unwrap()
}

/// The cache files of a folder and when they were written.
fn cache_files(dir: &Path) -> Vec<(PathBuf, std::time::SystemTime)> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> = entries
        .map(|entry| (entry.path(), entry.metadata().unwrap().modified().unwrap()))
        .collect();
    files.sort();
    files
}

fn tokens(dataset: &TokenDataset) -> Vec<Vec<u32>> {
    let read = |document| {
        let mut ids = Vec::new();
        dataset.read(document, &mut ids);
        ids
    };
    dataset.documents().iter().map(read).collect()
}

#[test]
fn the_cache_is_used_again_while_sources_and_tokenizer_stay() {
    let folder = Folder::new();
    let cache = folder.path("cache");
    let file = folder.write(
        "a.jsonl",
        "{\"text\": \"ab c\"}\n{\"text\": \"\"}\n{\"text\": \"d\"}\n",
    );
    let open = |tokenizer: &Tokenizer, field: &str| {
        let sources = Sources::find(std::slice::from_ref(&file), field)?;
        TokenDataset::open_or_build(&sources, tokenizer, &cache)
    };
    let first = open(&tokenizer(), "text").unwrap();
    let expected: Vec<Vec<u32>> = ["ab c", "d"]
        .map(|text| tokenizer().encode(text).unwrap())
        .into();
    assert_eq!(tokens(&first), expected);
    let files = cache_files(&cache);
    assert_eq!(files.len(), 1);

    let again = open(&tokenizer(), "text").unwrap();
    assert_eq!(tokens(&again), expected);
    assert_eq!(again.description(), first.description());
    assert_eq!(cache_files(&cache), files, "nothing was written");

    let cased = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nA\na\n";
    open(&Tokenizer::from_vocab(cased, None).unwrap(), "text").unwrap();
    assert_eq!(
        cache_files(&cache).len(),
        2,
        "another tokenizer has a cache of its own"
    );

    folder.write(
        "a.jsonl",
        "{\"text\": \"ab c\"}\n{\"text\": \"\"}\n{\"text\": \"e\"}\n",
    );
    let changed = open(&tokenizer(), "text").unwrap();
    assert_eq!(tokens(&changed)[1], tokenizer().encode("e").unwrap());
    assert_ne!(changed.description(), first.description());
}

#[test]
fn a_damaged_cache_is_made_anew() {
    let folder = Folder::new();
    let cache = folder.path("cache");
    let sources = Sources::find(&[folder.write("a.txt", "some text.")], "text").unwrap();
    let open = || TokenDataset::open_or_build(&sources, &tokenizer(), &cache).unwrap();
    let expected = tokens(&open());
    let path = cache_files(&cache)[0].0.clone();
    let whole = fs::read(&path).unwrap();

    let mut flipped = whole.clone();
    flipped[70] ^= 1;
    for damaged in [&whole[..whole.len() - 8], &flipped, &[], b"something else"] {
        fs::write(&path, damaged).unwrap();
        assert_eq!(tokens(&open()), expected);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
}

#[test]
fn a_failed_build_leaves_no_file() {
    let folder = Folder::new();
    let cache = folder.path("cache");
    let lines = "{\"text\": \"word\"}\n".repeat(100_000) + "broken\n";
    let sources = Sources::find(&[folder.write("a.jsonl", lines)], "text").unwrap();
    let error = TokenDataset::open_or_build(&sources, &tokenizer(), &cache).unwrap_err();
    assert!(
        format!("{error:#}").contains("a.jsonl:100001: not JSON"),
        "{error:#}"
    );
    assert_eq!(cache_files(&cache), []);
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let folder = Folder::new();
    let file = folder.write("a.txt", "some text.");
    let sources = Sources::find(std::slice::from_ref(&file), "text").unwrap();
    let error = TokenDataset::open_or_build(&sources, &tokenizer(), Path::new(&file)).unwrap_err();
    let error = format!("{error:#}");
    assert!(
        error.contains("cannot write the token cache") && error.contains("cache_dir"),
        "{error}"
    );
}

fn dataset(folder: &Folder, texts: &[String]) -> TokenDataset {
    let lines = texts
        .iter()
        .map(|text| serde_json::json!({ "text": text }).to_string() + "\n");
    let file = folder.write("a.jsonl", lines.collect::<String>());
    let sources = Sources::find(&[file], "text").unwrap();
    TokenDataset::open_or_build(&sources, &tokenizer(), &folder.path("cache")).unwrap()
}

#[test]
fn whole_documents_are_held_out_and_equal_ones_together() {
    let folder = Folder::new();
    let texts: Vec<String> = (0..300).map(|i| "ab ".repeat(3 + i % 150)).collect();
    let all = dataset(&folder, &texts);
    let (train, held_out) = all.split(0.1).unwrap();
    let share = held_out.tokens() as f64 / all.tokens() as f64;
    assert!((0.1..0.12).contains(&share), "{share}");
    assert_eq!(train.tokens() + held_out.tokens(), all.tokens());

    let mut documents = [train.documents(), held_out.documents()].concat();
    documents.sort_by_key(|document| document.start);
    assert_eq!(documents, all.documents());
    let in_train = tokens(&train);
    let both = tokens(&held_out)
        .into_iter()
        .filter(|document| in_train.contains(document))
        .count();
    assert!(
        both <= 1,
        "{both} of {} held-out texts are trained on",
        held_out.documents().len()
    );
    assert_eq!(all.split(0.1).unwrap().1.documents(), held_out.documents());
}

#[test]
fn the_tail_is_held_out_of_a_single_document() {
    let folder = Folder::new();
    let (train, held_out) = dataset(&folder, &["a ".repeat(1000)]).split(0.05).unwrap();
    assert_eq!(train.documents(), std::slice::from_ref(&(0..950)));
    assert_eq!(held_out.documents(), std::slice::from_ref(&(950..1000)));
}

#[test]
fn a_split_that_leaves_nothing_is_refused() {
    let folder = Folder::new();
    let all = dataset(&folder, &["a".to_string()]);
    assert!(
        all.split(0.5)
            .unwrap_err()
            .to_string()
            .contains("too little text")
    );
    for fraction in [0.0, 1.0, -1.0, f64::NAN] {
        let error = all.split(fraction).unwrap_err().to_string();
        assert!(error.contains("between 0 and 1"), "{error}");
    }
}

#[test]
fn the_default_is_the_embedded_corpus() {
    let folder = Folder::new();
    let config = DataConfig {
        corpus_documents: 100,
        cache_dir: Some(folder.path("cache")),
        ..Default::default()
    };
    let first = Data::open(&config).unwrap();
    let again = Data::open(&config).unwrap();
    assert_eq!(first.tokenizer.fingerprint(), again.tokenizer.fingerprint());
    assert!(first.tokenizer.vocab_size() <= 1500);
    assert_eq!(first.train.description(), again.train.description());
    assert!(
        first
            .train
            .description()
            .starts_with("embedded corpus (version 1, seed 0): ")
    );
    assert!(first.train.tokens() > 15_000 && first.validation.tokens() > 300);
    assert!(
        !tokens(&first.train)
            .concat()
            .contains(&first.tokenizer.special().unk)
    );

    let config = DataConfig {
        sources: vec![folder.write("train.txt", "a b c ".repeat(50))],
        validation: vec![folder.write("valid.txt", "c b a")],
        vocab_size: Some(30),
        ..config
    };
    let data = Data::open(&config).unwrap();
    assert_eq!((data.train.tokens(), data.validation.tokens()), (150, 3));
}

#[test]
fn settings_are_read_from_a_file_with_defaults_for_the_rest() {
    let config: DataConfig = toml::from_str("sources = [\"a.txt\"]\nlowercase = false").unwrap();
    let expected = DataConfig {
        sources: vec!["a.txt".into()],
        lowercase: Some(false),
        ..Default::default()
    };
    assert_eq!(config, expected);
    assert!(toml::from_str::<DataConfig>("source = []").is_err());
}

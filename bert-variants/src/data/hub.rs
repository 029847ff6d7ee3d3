//! Data sets of the Hugging Face Hub.

use anyhow::{Context, Result, bail, ensure};
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Repo, RepoType};

use super::readers::InputFile;

/// What a Hub name begins with.
pub(crate) const SCHEME: &str = "hf://";

/// Downloads the supported files of `hf://datasets/owner/name[@revision][/path]` into the Hub's
/// cache, where they stay, and returns them in the order of their paths.
///
/// `path` is one file, a folder, or the beginning of file names, such as `data/train-`.
pub(crate) fn find(name: &str) -> Result<Vec<InputFile>> {
    find_with(&ApiBuilder::from_env().build()?, name)
}

fn find_with(api: &Api, name: &str) -> Result<Vec<InputFile>> {
    let DataSet { id, revision, path } = DataSet::parse(name)?;
    let repo = api.repo(Repo::with_revision(id.clone(), RepoType::Dataset, revision));
    let get = || -> Result<Vec<InputFile>> {
        let mut files = Vec::new();
        for path in list(&repo, &path)? {
            let local = repo
                .get(&path)
                .with_context(|| format!("cannot get {path}"))?;
            files.extend(InputFile::new(&local)?);
        }
        Ok(files)
    };
    let files = get().with_context(|| {
        format!(
            "cannot get {name} from the Hugging Face Hub; without a network, pass a local file \
             or folder, such as what `hf download --repo-type dataset {id}` makes"
        )
    })?;
    ensure!(
        !files.is_empty(),
        "{name}: no file there of a supported kind; expected {}",
        InputFile::EXTENSIONS
    );
    Ok(files)
}

#[derive(Debug, PartialEq, Eq)]
struct DataSet {
    id: String,
    revision: String,
    path: String,
}

impl DataSet {
    fn parse(name: &str) -> Result<Self> {
        let parts: Vec<&str> = name.trim_start_matches(SCHEME).splitn(4, '/').collect();
        let ["datasets", owner, repo, ref path @ ..] = parts[..] else {
            bail!("got {name}, expected hf://datasets/owner/name[@revision][/path]");
        };
        let (repo, revision) = repo.split_once('@').unwrap_or((repo, "main"));
        ensure!(
            ![owner, repo, revision].contains(&""),
            "got {name}, expected hf://datasets/owner/name[@revision][/path]"
        );
        Ok(Self {
            id: format!("{owner}/{repo}"),
            revision: revision.to_string(),
            path: path.concat(),
        })
    }
}

/// The supported files that begin with `path`. One named in full needs no listing, so that it
/// is found without a network once it was downloaded.
fn list(repo: &ApiRepo, path: &str) -> Result<Vec<String>> {
    if InputFile::supports(path) {
        return Ok(vec![path.to_string()]);
    }
    let files = repo
        .info()
        .context("cannot list its files")?
        .siblings
        .into_iter();
    let mut files: Vec<String> = files
        .map(|file| file.rfilename)
        .filter(|file| file.starts_with(path) && InputFile::supports(file))
        .collect();
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::path::Path;
    use std::thread;

    use super::*;

    const FILES: [(&str, &str); 4] = [
        ("README.md", "no data"),
        ("data/test.jsonl", "{\"text\": \"test\"}\n"),
        ("data/train-0.jsonl", "{\"text\": \"zero\"}\n"),
        ("data/train-1.jsonl", "{\"text\": \"one\"}\n"),
    ];

    /// Answers as the Hub does for the data set `owner/name` with `FILES`. Returns its address.
    fn serve_hub() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap());
            }
        });
        format!("http://{address}")
    }

    fn answer(mut stream: TcpStream) {
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let request: Vec<String> = lines
            .map(Result::unwrap)
            .take_while(|line| !line.is_empty())
            .collect();
        let path = request[0].split(' ').nth(1).unwrap();
        let file = path.strip_prefix("/datasets/owner/name/resolve/main/");
        let file = FILES.iter().find(|(name, _)| Some(*name) == file);
        let (status, body) = match (path, file) {
            ("/api/datasets/owner/name/revision/main", _) => ("200 OK", listing()),
            (_, Some((_, body))) if request.contains(&"range: bytes=0-0".to_string()) => {
                ("206 Partial Content", body[..1].to_string())
            }
            (_, Some((_, body))) => ("206 Partial Content", body.to_string()),
            _ => ("404 Not Found", String::new()),
        };
        let size = file.map_or(0, |(_, body)| body.len());
        write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\netag: \"{}\"\r\n\
             x-repo-commit: c0ffee\r\ncontent-range: bytes 0-0/{size}\r\n\r\n{body}",
            body.len(),
            path.replace('/', "-"),
        )
        .unwrap();
    }

    fn listing() -> String {
        let files = FILES.map(|(name, _)| format!("{{\"rfilename\": \"{name}\"}}"));
        format!(
            "{{\"siblings\": [{}], \"sha\": \"c0ffee\"}}",
            files.join(",")
        )
    }

    fn api(endpoint: String, cache: &Path) -> Api {
        let builder = ApiBuilder::new()
            .with_endpoint(endpoint)
            .with_progress(false);
        builder.with_cache_dir(cache.to_path_buf()).build().unwrap()
    }

    /// Nobody listens there.
    fn no_network(cache: &Path) -> Api {
        api("http://127.0.0.1:1".to_string(), cache)
    }

    fn texts(api: &Api, name: &str) -> Vec<String> {
        let files = find_with(api, name).unwrap();
        files
            .iter()
            .map(|file| fs::read_to_string(&file.path).unwrap())
            .collect()
    }

    #[test]
    fn downloads_the_files_that_a_path_names() {
        let cache = tempfile::tempdir().unwrap();
        let api = api(serve_hub(), cache.path());
        let all: Vec<&str> = FILES[1..].iter().map(|(_, text)| *text).collect();
        assert_eq!(texts(&api, "hf://datasets/owner/name"), all);
        assert_eq!(
            texts(&api, "hf://datasets/owner/name@main/data/train-"),
            all[1..]
        );
        assert_eq!(
            texts(&api, "hf://datasets/owner/name/data/test.jsonl"),
            all[..1]
        );

        let offline = no_network(cache.path());
        assert_eq!(
            texts(&offline, "hf://datasets/owner/name/data/test.jsonl"),
            all[..1]
        );

        let error = find_with(&api, "hf://datasets/owner/name/other")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no file there of a supported kind"),
            "{error}"
        );
        let error = find_with(&api, "hf://datasets/owner/none").unwrap_err();
        assert!(format!("{error:#}").contains("404"), "{error:#}");
    }

    #[test]
    fn without_a_network_the_error_says_what_to_do() {
        let cache = tempfile::tempdir().unwrap();
        let api = no_network(cache.path());
        let error = format!(
            "{:#}",
            find_with(&api, "hf://datasets/owner/name").unwrap_err()
        );
        assert!(
            error.contains("without a network, pass a local file or folder"),
            "{error}"
        );
    }

    #[test]
    fn names_of_another_form_are_refused() {
        let parsed = DataSet::parse("hf://datasets/a/b@c/d/e.txt").unwrap();
        let expected = DataSet {
            id: "a/b".into(),
            revision: "c".into(),
            path: "d/e.txt".into(),
        };
        assert_eq!(parsed, expected);
        for name in [
            "hf://datasets/a",
            "hf://models/a/b",
            "hf://datasets/a/",
            "hf://datasets/a/b@",
        ] {
            let error = DataSet::parse(name).unwrap_err().to_string();
            assert!(
                error.contains("expected hf://datasets/owner/name"),
                "{error}"
            );
        }
    }
}

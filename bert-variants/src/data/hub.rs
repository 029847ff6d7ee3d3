//! Data sets of the Hugging Face Hub.

use anyhow::{Context, Result, bail, ensure};
use hf_hub::{Repo, RepoType};

use super::readers::InputFile;
use crate::hub::{Hub, RepoName, SCHEME, explain};

/// Downloads the supported files of `hf://datasets/owner/name[@revision][/path]` into the Hub's
/// cache, where they stay, and returns them in the order of their paths.
///
/// `path` is one file, a folder, or the beginning of file names, such as `data/train-`.
pub(crate) fn find(name: &str) -> Result<Vec<InputFile>> {
    find_with(&Hub::from_env(), name)
}

fn find_with(hub: &Hub, name: &str) -> Result<Vec<InputFile>> {
    let DataSet { repo, path } = DataSet::parse(name)?;
    let id = &repo.id;
    let repo = repo.repo(RepoType::Dataset);
    let get = || -> Result<Vec<InputFile>> {
        let mut files = Vec::new();
        for path in list(hub, &repo, &path)? {
            files.extend(InputFile::new(&hub.file(&repo, &path)?)?);
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
    repo: RepoName,
    path: String,
}

impl DataSet {
    fn parse(name: &str) -> Result<Self> {
        let parts: Vec<&str> = name.trim_start_matches(SCHEME).splitn(4, '/').collect();
        let parsed = match parts[..] {
            ["datasets", owner, repo, ref path @ ..] => {
                RepoName::parse(&format!("{owner}/{repo}")).map(|repo| (repo, path.concat()))
            }
            _ => None,
        };
        let Some((repo, path)) = parsed else {
            bail!("got {name}, expected hf://datasets/owner/name[@revision][/path]");
        };
        Ok(Self { repo, path })
    }
}

/// The supported files that begin with `path`. One named in full needs no listing, so that it
/// is found without a network once it was downloaded.
fn list(hub: &Hub, repo: &Repo, path: &str) -> Result<Vec<String>> {
    if InputFile::supports(path) {
        return Ok(vec![path.to_string()]);
    }
    let info = hub.api()?.repo(repo.clone()).info().map_err(explain);
    let files = info.context("cannot list its files")?.siblings.into_iter();
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

    use super::*;
    use crate::hub::server::{NO_NETWORK, Request, Response, file, hub, not_found, ok, serve};

    const FILES: [(&str, &str); 4] = [
        ("README.md", "no data"),
        ("data/test.jsonl", "{\"text\": \"test\"}\n"),
        ("data/train-0.jsonl", "{\"text\": \"zero\"}\n"),
        ("data/train-1.jsonl", "{\"text\": \"one\"}\n"),
    ];

    /// Answers as the Hub does for the data set `owner/name` with `FILES`.
    fn answer(_: &str, request: &Request) -> Response {
        if request.path == "/api/datasets/owner/name/revision/main" {
            return ok(listing());
        }
        let path = request
            .path
            .strip_prefix("/datasets/owner/name/resolve/main/");
        match FILES.iter().find(|(name, _)| Some(*name) == path) {
            Some((_, body)) => file(request, "c0ffee", body.as_bytes()),
            None => not_found(),
        }
    }

    fn listing() -> String {
        let files = FILES.map(|(name, _)| format!("{{\"rfilename\": \"{name}\"}}"));
        format!(
            "{{\"siblings\": [{}], \"sha\": \"c0ffee\"}}",
            files.join(",")
        )
    }

    fn texts(hub: &Hub, name: &str) -> Vec<String> {
        let files = find_with(hub, name).unwrap();
        files
            .iter()
            .map(|file| fs::read_to_string(&file.path).unwrap())
            .collect()
    }

    #[test]
    fn downloads_the_files_that_a_path_names() {
        let cache = tempfile::tempdir().unwrap();
        let online = hub(&serve(answer).0, cache.path());
        let all: Vec<&str> = FILES[1..].iter().map(|(_, text)| *text).collect();
        assert_eq!(texts(&online, "hf://datasets/owner/name"), all);
        assert_eq!(
            texts(&online, "hf://datasets/owner/name@main/data/train-"),
            all[1..]
        );
        assert_eq!(
            texts(&online, "hf://datasets/owner/name/data/test.jsonl"),
            all[..1]
        );

        let mut offline = hub(NO_NETWORK, cache.path());
        assert_eq!(
            texts(&offline, "hf://datasets/owner/name/data/test.jsonl"),
            all[..1]
        );
        offline.offline = true;
        assert_eq!(
            texts(&offline, "hf://datasets/owner/name/data/test.jsonl"),
            all[..1]
        );

        let error = find_with(&offline, "hf://datasets/owner/name/data").unwrap_err();
        assert!(format!("{error:#}").contains("HF_HUB_OFFLINE is set"));

        let error = find_with(&online, "hf://datasets/owner/name/other")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no file there of a supported kind"),
            "{error}"
        );
        let error = find_with(&online, "hf://datasets/owner/none").unwrap_err();
        assert!(format!("{error:#}").contains("404"), "{error:#}");
    }

    #[test]
    fn without_a_network_the_error_says_what_to_do() {
        let cache = tempfile::tempdir().unwrap();
        let hub = hub(NO_NETWORK, cache.path());
        let error = format!(
            "{:#}",
            find_with(&hub, "hf://datasets/owner/name").unwrap_err()
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
            repo: RepoName::parse("a/b@c").unwrap(),
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

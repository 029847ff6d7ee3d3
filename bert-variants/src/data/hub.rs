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

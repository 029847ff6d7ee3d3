//! The Hugging Face Hub: how it is reached, and uploads of models.

mod upload;

#[cfg(test)]
pub(crate) mod server;

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

pub use upload::{Upload, upload};

/// What the name of something on the Hub begins with, where it could be a file as well.
pub(crate) const SCHEME: &str = "hf://";

/// How the Hub is reached.
pub(crate) struct Hub {
    pub endpoint: String,
    pub cache: Cache,
    pub token: Option<String>,
    pub offline: bool,
    pub progress: bool,
}

impl Hub {
    /// As Hugging Face's own programs are told by `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` (or the
    /// token that `hf auth login` saved) and `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let cache = Cache::from_env();
        Self {
            endpoint: variable("HF_ENDPOINT").unwrap_or("https://huggingface.co".into()),
            token: variable("HF_TOKEN").or_else(|| cache.token()),
            offline: variable("HF_HUB_OFFLINE")
                .is_some_and(|value| !["0", "false", "no", "off"].contains(&value.as_str())),
            cache,
            progress: true,
        }
    }

    /// # Errors
    /// Where there shall be no network.
    pub fn api(&self) -> Result<Api> {
        self.check_online()?;
        let builder = ApiBuilder::from_cache(self.cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(self.progress);
        Ok(builder.build()?)
    }

    fn check_online(&self) -> Result<()> {
        ensure!(
            !self.offline,
            "HF_HUB_OFFLINE is set, so only what is in {} can be used",
            self.cache.path().display()
        );
        Ok(())
    }

    /// A file of a repository: from the cache, or else downloaded into it.
    ///
    /// # Errors
    /// When it is in neither.
    pub fn file(&self, repo: &Repo, path: &str) -> Result<PathBuf> {
        if let Some(file) = self.cache.repo(repo.clone()).get(path) {
            return Ok(file);
        }
        let file = self.api().and_then(|api| {
            let downloaded = api.repo(repo.clone()).get(path);
            downloaded.map_err(explain)
        });
        file.with_context(|| format!("cannot get {path}"))
    }
}

/// Whether the Hub has answered, and refuses.
pub(crate) fn is_refusal(error: &ApiError) -> bool {
    matches!(status(error), Some(400..500))
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

/// Says what an answer of the Hub means.
pub(crate) fn explain(error: ApiError) -> anyhow::Error {
    let hint = hint(status(&error));
    let error = anyhow::Error::new(error);
    match hint {
        Some(hint) => error.context(hint),
        None => error,
    }
}

fn hint(status: Option<u16>) -> Option<&'static str> {
    match status {
        Some(401 | 403) => Some(
            "the Hub has no such repository, or it is not open to all: set HF_TOKEN to a token that may use it",
        ),
        Some(404) => Some("the Hub has no such repository, revision or file"),
        Some(429) => Some("the Hub takes no more requests for now; try again later"),
        _ => None,
    }
}

/// `owner/name[@revision]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RepoName {
    /// `owner/name`.
    pub id: String,
    /// Branch, tag or commit.
    pub revision: String,
}

impl RepoName {
    /// `None` where `text` has another form.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = id.split_once('/')?;
        let is_file = [".", "..", "~", ""].contains(&owner) || name.contains('/');
        (!is_file && !name.is_empty() && !revision.is_empty()).then(|| Self {
            id: id.to_string(),
            revision: revision.to_string(),
        })
    }

    pub fn repo(&self, repo_type: RepoType) -> Repo {
        Repo::with_revision(self.id.clone(), repo_type, self.revision.clone())
    }
}

impl fmt::Display for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_an_owner_and_perhaps_a_revision() {
        let name = RepoName::parse("a/b@refs/pr/1").unwrap();
        assert_eq!((&*name.id, &*name.revision), ("a/b", "refs/pr/1"));
        assert_eq!(RepoName::parse("a/b").unwrap().to_string(), "a/b@main");
        for other in ["a", "/a", "./a", "../a", "~/a", "a/", "a/b/c", "a/b@", ""] {
            assert_eq!(RepoName::parse(other), None, "{other}");
        }
    }
}

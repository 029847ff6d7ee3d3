//! Models by name: a directory here, or one on the Hugging Face Hub.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use serde_json::Value;

use super::CONFIG;
use super::weights::{INDEX, WEIGHTS};

/// The local directory of a model, downloaded where `name` is a Hub id.
pub(super) fn locate(name: &str) -> Result<PathBuf> {
    let dir = PathBuf::from(name);
    if dir.is_dir() {
        return Ok(dir);
    }
    let parts: Vec<&str> = name.split('/').collect();
    let is_hub_id = matches!(parts[..], [owner, model]
        if ![".", "..", "~", ""].contains(&owner) && !model.is_empty());
    if !is_hub_id {
        bail!("found no directory {name}; expected a model directory or a Hub id owner/name");
    }
    download(name).with_context(|| {
        format!(
            "found no directory {name} and cannot get {name} from the Hugging Face Hub; \
             without a network, pass a local model directory"
        )
    })
}

fn download(name: &str) -> Result<PathBuf> {
    let repo = ApiBuilder::from_env().build()?.model(name.to_string());
    let get = |file: &str| repo.get(file).with_context(|| format!("cannot get {file}"));
    let config = get(CONFIG)?;
    if let Err(error) = repo.get(WEIGHTS) {
        let index = repo.get(INDEX).map_err(|_| error);
        download_shards(
            &repo,
            &index.with_context(|| format!("cannot get {WEIGHTS}"))?,
        )?;
    }
    // One of the two is enough, and which one a repository has is not known before.
    let tokenizer = ["tokenizer.json", "vocab.txt"].map(|file| repo.get(file));
    if let [Err(error), Err(_)] = tokenizer {
        tracing::warn!("{name} has neither tokenizer.json nor vocab.txt: {error}");
    }
    let dir = config
        .parent()
        .ok_or_else(|| anyhow!("{} has no folder", config.display()))?;
    Ok(dir.to_path_buf())
}

fn download_shards(repo: &ApiRepo, index: &Path) -> Result<()> {
    let json: Value = serde_json::from_slice(&std::fs::read(index)?)?;
    let files = json["weight_map"].as_object().into_iter().flatten();
    let mut shards: Vec<&str> = files.filter_map(|(_, file)| file.as_str()).collect();
    shards.sort_unstable();
    shards.dedup();
    for shard in shards {
        repo.get(shard)
            .with_context(|| format!("cannot get {shard}"))?;
    }
    Ok(())
}

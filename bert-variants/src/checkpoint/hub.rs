//! Models by name: a directory here, or one on the Hugging Face Hub.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use hf_hub::api::RepoInfo;
use hf_hub::{Repo, RepoType};

use super::CONFIG;
use super::weights::{INDEX, WEIGHTS};
use crate::hub::{Hub, RepoName, explain, is_refusal};

/// What is downloaded beside the weights, where a repository has it.
const FILES: [&str; 6] = [
    CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    // Those of sentence-transformers.
    "sentence_bert_config.json",
    "1_Pooling/config.json",
];

/// The local directory of a model, downloaded where `name` is a Hub id.
pub(super) fn locate(name: &str) -> Result<PathBuf> {
    let dir = PathBuf::from(name);
    if dir.is_dir() {
        return Ok(dir);
    }
    let Some(repo) = RepoName::parse(name) else {
        bail!(
            "found no directory {name}; expected a model directory or a Hub id owner/name[@revision]"
        );
    };
    find(&Hub::from_env(), &repo).with_context(|| {
        format!(
            "found no directory {name} and cannot get {name} from the Hugging Face Hub; \
             without a network, pass a local model directory"
        )
    })
}

/// The folder in the Hub's cache that holds all files of the model.
fn find(hub: &Hub, name: &RepoName) -> Result<PathBuf> {
    if hub.offline {
        return cached(hub, name).with_context(|| {
            format!(
                "HF_HUB_OFFLINE is set, and {} holds no whole {name}",
                hub.cache.path().display()
            )
        });
    }
    match hub.api()?.repo(name.repo(RepoType::Model)).info() {
        Ok(info) => download(hub, name, &info),
        Err(error) => match cached(hub, name) {
            Some(dir) if !is_refusal(&error) => {
                tracing::warn!("cannot reach the Hub, taking {name} from the cache: {error}");
                Ok(dir)
            }
            _ => Err(explain(error)),
        },
    }
}

/// Downloads what the cache lacks. All files are of one commit, whatever the revision becomes
/// meanwhile, which is known without a network only once all of them are there.
fn download(hub: &Hub, name: &RepoName, info: &RepoInfo) -> Result<PathBuf> {
    let files: Vec<&str> = info
        .siblings
        .iter()
        .map(|file| file.rfilename.as_str())
        .collect();
    let is_weights = |file: &&str| match files.contains(&WEIGHTS) {
        true => *file == WEIGHTS,
        false => *file == INDEX || file.starts_with("model-") && file.ends_with(".safetensors"),
    };
    if !files.iter().any(is_weights) {
        let hint = match files.contains(&"pytorch_model.bin") {
            true => {
                ": pytorch_model.bin can run code when it is read; convert it with transformers, \
                 AutoModel.from_pretrained(NAME).save_pretrained(DIR)"
            }
            false => "",
        };
        bail!("{name} holds no {WEIGHTS}{hint}");
    }
    let commit = Repo::with_revision(name.id.clone(), RepoType::Model, info.sha.clone());
    let cache = hub.cache.repo(commit.clone());
    cache.create_ref(&info.sha)?;
    for file in files
        .iter()
        .filter(|file| is_weights(file) || FILES.contains(file))
    {
        hub.file(&commit, file)?;
    }
    hub.cache
        .repo(name.repo(RepoType::Model))
        .create_ref(&info.sha)?;
    Ok(cache.pointer_path(&info.sha))
}

fn cached(hub: &Hub, name: &RepoName) -> Option<PathBuf> {
    let repo = hub.cache.repo(name.repo(RepoType::Model));
    let dir = match repo.get(CONFIG) {
        Some(config) => config.parent()?.to_path_buf(),
        None => repo.pointer_path(&name.revision),
    };
    let has_weights = [WEIGHTS, INDEX].iter().any(|file| dir.join(file).is_file());
    has_weights.then_some(dir)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::hub::server::{NO_NETWORK, file, hub, not_found, ok, serve};

    const FIRST: [&str; 5] = [
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ];
    const SECOND: [&str; 5] = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    ];

    fn name(revision: &str) -> RepoName {
        RepoName::parse(&format!("owner/model@{revision}")).unwrap()
    }

    /// All files below a folder.
    fn listed(dir: &PathBuf) -> Vec<String> {
        let entries = walkdir::WalkDir::new(dir).sort_by_file_name().into_iter();
        let files = entries
            .map(Result::unwrap)
            .filter(|entry| entry.path().is_file());
        files
            .map(|entry| {
                entry
                    .path()
                    .strip_prefix(dir)
                    .unwrap()
                    .display()
                    .to_string()
            })
            .collect()
    }

    #[test]
    fn a_model_is_one_commit_and_stays_in_the_cache() {
        let moved = Arc::new(AtomicBool::new(false));
        let main_moved = moved.clone();
        let (endpoint, requests) = serve(move |_, request| {
            let commit = match request.path.split('/').rev().find(|part| part.len() == 4) {
                Some("main") if main_moved.load(Ordering::Relaxed) => "bbbb",
                Some("main") => "aaaa",
                Some(commit @ ("aaaa" | "bbbb")) => commit,
                _ => return not_found(),
            };
            let files = if commit == "aaaa" { FIRST } else { SECOND };
            if request
                .path
                .starts_with("/api/models/owner/model/revision/")
            {
                let files = files.map(|file| serde_json::json!({ "rfilename": file }));
                let info = serde_json::json!({ "siblings": files, "sha": commit });
                return ok(info.to_string());
            }
            let path = request
                .path
                .strip_prefix(&format!("/owner/model/resolve/{commit}/"));
            match path.filter(|path| files.contains(path)) {
                Some(path) => file(request, commit, format!("{path} of {commit}").as_bytes()),
                None => not_found(),
            }
        });
        let cache = tempfile::tempdir().unwrap();
        let mut online = hub(&endpoint, cache.path());
        online.token = Some("secret".into());
        let dir = find(&online, &name("main")).unwrap();
        let expected: Vec<&str> = FIRST
            .into_iter()
            .filter(|file| *file != "README.md")
            .collect();
        assert_eq!(listed(&dir), expected);
        assert_eq!(
            fs::read_to_string(dir.join("model.safetensors")).unwrap(),
            "model.safetensors of aaaa"
        );
        let asked = requests.lock().unwrap().clone();
        assert!(
            asked
                .iter()
                .all(|request| request.header("authorization") == Some("Bearer secret"))
        );

        // Nothing is downloaded twice.
        assert_eq!(find(&online, &name("main")).unwrap(), dir);
        assert_eq!(requests.lock().unwrap().len(), asked.len() + 1);
        let mut offline = hub(NO_NETWORK, cache.path());
        assert_eq!(find(&offline, &name("main")).unwrap(), dir);
        offline.offline = true;
        assert_eq!(find(&offline, &name("main")).unwrap(), dir);

        moved.store(true, Ordering::Relaxed);
        let new = find(&online, &name("main")).unwrap();
        assert_eq!(listed(&new), &SECOND[..4]);
        assert_eq!(find(&offline, &name("main")).unwrap(), new);
        assert_eq!(find(&offline, &name("aaaa")).unwrap(), dir);
    }

    #[test]
    fn errors_say_what_to_do() {
        let cache = tempfile::tempdir().unwrap();
        let error = |hub: &Hub| format!("{:#}", find(hub, &name("main")).unwrap_err());
        let (endpoint, _) = serve(|_, _| (401, Vec::new(), Vec::new()));
        let message = error(&hub(&endpoint, cache.path()));
        assert!(message.contains("set HF_TOKEN"), "{message}");
        let (endpoint, _) = serve(|_, _| not_found());
        let message = error(&hub(&endpoint, cache.path()));
        assert!(
            message.contains("no such repository, revision"),
            "{message}"
        );
        let (endpoint, _) = serve(|_, _| {
            ok(r#"{ "siblings": [{ "rfilename": "pytorch_model.bin" }], "sha": "aaaa" }"#)
        });
        let message = error(&hub(&endpoint, cache.path()));
        assert!(
            message.contains("holds no model.safetensors: pytorch_model.bin can"),
            "{message}"
        );
        let mut offline = hub(NO_NETWORK, cache.path());
        let message = error(&offline);
        assert!(message.contains("refused"), "{message}");
        offline.offline = true;
        let message = error(&offline);
        assert!(
            message.contains("holds no whole owner/model@main"),
            "{message}"
        );
    }
}

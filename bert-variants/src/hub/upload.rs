//! Uploads of model directories, one commit each, as `huggingface_hub`'s `upload_folder` makes
//! them. Large files go to the Hub's storage first, by the protocol of
//! [Git LFS](https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md) with the Hub's own
//! transfer in several parts.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use ureq::http::Response;
use ureq::typestate::WithBody;
use ureq::{Agent, AsSendBody, Body, RequestBuilder};
use walkdir::WalkDir;

use super::{Hub, RepoName, SCHEME, hint};
use crate::checkpoint::TRAINING_STATE;

/// Bytes of a file by which the Hub decides where it belongs.
const SAMPLE: u64 = 512;
const LFS: &str = "application/vnd.git-lfs+json";

/// What to upload, and where to.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Upload {
    /// Model directory. Hidden files and the state of training are left out.
    pub dir: PathBuf,
    /// Where to, as hf://owner/name or hf://owner/name@branch; a repository that is not there is made.
    pub target: String,
    /// Make a new repository private.
    #[arg(long)]
    pub private: bool,
    /// Message of the commit.
    #[arg(long, default_value = "Upload model")]
    pub message: String,
}

/// Uploads a model directory to the Hugging Face Hub. Returns the commit's address.
///
/// The token is taken from `HF_TOKEN`, or from where `hf auth login` keeps it. What a broken upload
/// has stored already is not sent again.
///
/// # Errors
/// When there is no directory or token, or the Hub cannot be reached or refuses.
pub fn upload(upload: &Upload) -> Result<String> {
    upload_to(&Hub::from_env(), upload)
}

fn upload_to(hub: &Hub, upload: &Upload) -> Result<String> {
    let target = upload.target.strip_prefix(SCHEME).and_then(RepoName::parse);
    let target = target
        .with_context(|| format!("got {}, expected hf://owner/name[@branch]", upload.target))?;
    let files =
        find_files(&upload.dir).with_context(|| format!("cannot read {}", upload.dir.display()))?;
    ensure!(!files.is_empty(), "{} holds no files", upload.dir.display());
    hub.check_online()?;
    let token = hub.token.as_ref().context(
        "uploads need a token that may write: set HF_TOKEN, see https://huggingface.co/settings/tokens",
    )?;
    let client = Client {
        agent: Agent::config_builder()
            .http_status_as_error(false)
            .build()
            .into(),
        endpoint: hub.endpoint.clone(),
        authorization: format!("Bearer {token}"),
        target,
    };
    client.make_repository(upload.private)?;
    let files = client.choose_storage(files)?;
    client.store(
        files.iter().filter(|file| file.large).collect(),
        hub.progress,
    )?;
    client.commit(&files, &upload.message)
}

/// A file to upload.
#[derive(Debug)]
struct UploadFile {
    local: PathBuf,
    /// In the repository.
    path: String,
    size: u64,
    /// Whether it goes to the storage of large files.
    large: bool,
}

/// All files of a directory in the order of their paths.
fn find_files(dir: &Path) -> Result<Vec<UploadFile>> {
    let hidden = |name: &str| name.starts_with('.');
    let entries = WalkDir::new(dir)
        .sort_by_file_name()
        .min_depth(1)
        .into_iter();
    let entries = entries.filter_entry(|entry| !hidden(&entry.file_name().to_string_lossy()));
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        let metadata = entry.path().metadata()?;
        let relative = entry.path().strip_prefix(dir)?;
        let names = relative.iter().map(|name| name.to_str());
        let names: Option<Vec<&str>> = names.collect();
        let path = names
            .with_context(|| format!("{relative:?} is not UTF-8"))?
            .join("/");
        if metadata.is_file() && !TRAINING_STATE.contains(&path.as_str()) {
            files.push(UploadFile {
                local: entry.path().to_path_buf(),
                path,
                size: metadata.len(),
                large: false,
            });
        }
    }
    Ok(files)
}

impl UploadFile {
    fn open(&self) -> Result<File> {
        File::open(&self.local).with_context(|| format!("cannot read {}", self.local.display()))
    }

    fn read(&self, most: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open()?.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// SHA-256, in hexadecimal: its name in the storage.
    fn oid(&self) -> Result<String> {
        let mut hash = Sha256::new();
        io::copy(&mut self.open()?, &mut hash)?;
        let digits = hash
            .finalize()
            .into_iter()
            .map(|byte| format!("{byte:02x}"));
        Ok(digits.collect())
    }
}

#[derive(Deserialize)]
struct Preupload {
    files: Vec<PreuploadFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PreuploadFile {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
}

#[derive(Deserialize)]
struct Batch {
    objects: Vec<BatchObject>,
}

/// How to store a file, `actions` being absent where it is stored already.
#[derive(Deserialize)]
struct BatchObject {
    oid: String,
    actions: Option<Actions>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Actions {
    upload: Action,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: HashMap<String, Value>,
}

impl Action {
    /// Bytes of a part and where each part goes, for a file that is sent in parts.
    fn parts(&self) -> Result<Option<(u64, Vec<&str>)>> {
        let Some(size) = self.header.get("chunk_size") else {
            return Ok(None);
        };
        let size = size.as_u64().or_else(|| size.as_str()?.parse().ok());
        let size = size
            .filter(|size| *size > 0)
            .context("chunk_size is no number")?;
        let mut parts: Vec<(u32, &str)> = self
            .header
            .iter()
            .filter_map(|(name, url)| Some((name.parse().ok()?, url.as_str()?)))
            .collect();
        parts.sort_unstable();
        Ok(Some((
            size,
            parts.into_iter().map(|(_, url)| url).collect(),
        )))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Commit {
    commit_url: String,
}

struct Client {
    agent: Agent,
    endpoint: String,
    authorization: String,
    target: RepoName,
}

impl Client {
    fn make_repository(&self, private: bool) -> Result<()> {
        let url = format!("{}/api/models/{}", self.endpoint, self.target.id);
        let found = self
            .agent
            .get(&url)
            .header("authorization", &self.authorization)
            .call()?;
        if found.status().is_success() {
            return Ok(());
        }
        let (owner, name) = self.target.id.split_once('/').unwrap_or_default();
        let body = json!({
            "organization": owner, "name": name, "type": "model", "private": private,
        });
        let url = format!("{}/api/repos/create", self.endpoint);
        let made = self.post(&url).send_json(&body)?;
        check(made).with_context(|| format!("cannot make the repository {}", self.target.id))?;
        Ok(())
    }

    /// Asks the Hub which files are large, and which a repository has no place for.
    fn choose_storage(&self, mut files: Vec<UploadFile>) -> Result<Vec<UploadFile>> {
        let mut samples = Vec::new();
        for file in &files {
            let sample = BASE64.encode(file.read(SAMPLE)?);
            samples.push(json!({ "path": file.path, "size": file.size, "sample": sample }));
        }
        let answer = self
            .post(&self.api("preupload"))
            .send_json(json!({ "files": samples }))?;
        let answer: Preupload =
            read_json(answer).with_context(|| format!("cannot write to {}", self.target))?;
        let answers: HashMap<&str, &PreuploadFile> = answer
            .files
            .iter()
            .map(|file| (file.path.as_str(), file))
            .collect();
        for file in &mut files {
            let mode = answers
                .get(file.path.as_str())
                .map(|answer| answer.upload_mode.as_str());
            file.large = match mode {
                // The storage takes no empty files.
                Some("lfs") => file.size > 0,
                Some("regular") => false,
                mode => bail!(
                    "the Hub wants {} by {mode:?}, expected regular or lfs",
                    file.path
                ),
            };
        }
        files.retain(|file| {
            !answers
                .get(file.path.as_str())
                .is_some_and(|a| a.should_ignore)
        });
        Ok(files)
    }

    /// Sends large files to the storage.
    fn store(&self, files: Vec<&UploadFile>, progress: bool) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let by_oid: HashMap<String, &UploadFile> = files
            .iter()
            .map(|file| Ok((file.oid()?, *file)))
            .collect::<Result<_>>()?;
        let objects = by_oid
            .iter()
            .map(|(oid, file)| json!({ "oid": oid, "size": file.size }));
        let body = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "hash_algo": "sha256",
            "ref": { "name": self.target.revision },
            "objects": objects.collect::<Vec<_>>(),
        });
        let url = format!(
            "{}/{}.git/info/lfs/objects/batch",
            self.endpoint, self.target.id
        );
        let request = self.post(&url).header("accept", LFS).content_type(LFS);
        let batch: Batch = read_json(request.send(body.to_string())?)?;
        let bar = progress_bar(by_oid.values().map(|file| file.size).sum(), progress);
        for object in &batch.objects {
            let file = by_oid
                .get(&object.oid)
                .with_context(|| format!("the Hub asks for an unknown file {}", object.oid))?;
            self.store_file(file, object, &bar)
                .with_context(|| format!("cannot upload {}", file.path))?;
        }
        bar.finish();
        Ok(())
    }

    fn store_file(&self, file: &UploadFile, object: &BatchObject, bar: &ProgressBar) -> Result<()> {
        if let Some(error) = &object.error {
            bail!("the Hub says {error}");
        }
        let Some(actions) = &object.actions else {
            bar.inc(file.size);
            return Ok(());
        };
        let url = &actions.upload.href;
        match actions.upload.parts()? {
            Some((size, urls)) => {
                let parts = self.store_parts(file, size, &urls, bar)?;
                let body = json!({ "oid": object.oid, "parts": parts });
                let request = self.agent.post(url).header("accept", LFS).content_type(LFS);
                check(request.send(body.to_string())?)?;
            }
            None => {
                self.put(url, &file.open()?)?;
                bar.inc(file.size);
            }
        }
        if let Some(verify) = &actions.verify {
            let body = json!({ "oid": object.oid, "size": file.size });
            check(self.post(&verify.href).send_json(&body)?)?;
        }
        Ok(())
    }

    /// Sends a file in parts of `size` bytes. Returns the storage's names for them.
    fn store_parts(
        &self,
        file: &UploadFile,
        size: u64,
        urls: &[&str],
        bar: &ProgressBar,
    ) -> Result<Vec<Value>> {
        ensure!(
            urls.len() as u64 == file.size.div_ceil(size),
            "the Hub has {} places for the parts, expected {}",
            urls.len(),
            file.size.div_ceil(size)
        );
        let mut reader = file.open()?;
        let mut parts = Vec::new();
        for (url, number) in urls.iter().zip(1..) {
            let mut part = Vec::new();
            reader.by_ref().take(size).read_to_end(&mut part)?;
            let stored = self.put(url, &part)?;
            let etag = stored
                .headers()
                .get("etag")
                .context("a part was stored without etag")?;
            parts.push(json!({ "partNumber": number, "etag": etag.to_str()? }));
            bar.inc(part.len() as u64);
        }
        Ok(parts)
    }

    /// Sends bytes to the storage, whose addresses are signed: it must not see the token.
    fn put(&self, url: &str, bytes: impl AsSendBody) -> Result<Response<Body>> {
        check(self.agent.put(url).send(bytes)?)
    }

    fn commit(&self, files: &[UploadFile], message: &str) -> Result<String> {
        let mut lines = vec![json!({
            "key": "header", "value": { "summary": message, "description": "" },
        })];
        for file in files {
            lines.push(match file.large {
                true => json!({ "key": "lfsFile", "value": {
                    "path": file.path, "algo": "sha256", "oid": file.oid()?, "size": file.size,
                } }),
                false => json!({ "key": "file", "value": {
                    "path": file.path,
                    "encoding": "base64",
                    "content": BASE64.encode(file.read(u64::MAX)?),
                } }),
            });
        }
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let request = self
            .post(&self.api("commit"))
            .content_type("application/x-ndjson");
        let commit: Commit = read_json(request.send(body)?)
            .with_context(|| format!("cannot commit to {}", self.target))?;
        Ok(commit.commit_url)
    }

    fn api(&self, what: &str) -> String {
        let RepoName { id, revision } = &self.target;
        let revision = revision.replace('/', "%2F");
        format!("{}/api/models/{id}/{what}/{revision}", self.endpoint)
    }

    fn post(&self, url: &str) -> RequestBuilder<WithBody> {
        self.agent
            .post(url)
            .header("authorization", &self.authorization)
    }
}

/// An answer that is no refusal.
fn check(mut response: Response<Body>) -> Result<Response<Body>> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let text: String = response
        .body_mut()
        .read_to_string()?
        .chars()
        .take(300)
        .collect();
    let hint = hint(Some(status.as_u16())).map_or(String::new(), |hint| format!("; {hint}"));
    bail!("the Hub answers {status} {text}{hint}")
}

fn read_json<T: DeserializeOwned>(response: Response<Body>) -> Result<T> {
    let json = check(response)?.body_mut().read_json();
    json.context("the answer of the Hub has another form than expected")
}

fn progress_bar(bytes: u64, visible: bool) -> ProgressBar {
    if !visible {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(bytes);
    let template = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::{Arc, Mutex};

    use super::super::server::{Request, Response, hub, not_found, ok, serve};
    use super::*;

    const WEIGHTS: &[u8] = b"0123456789abcdefghijklmno";
    /// `sha256sum` of it.
    const OID: &str = "d3cc908a6a9e94a24102021443928ec09e65b194af1a0631cf56e136869725e7";

    /// How the storage takes `WEIGHTS`.
    #[derive(Clone, Copy)]
    enum Storage {
        Whole,
        InParts,
        HasIt,
        Refuses,
    }

    fn model() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("config.json", &b"{}"[..]),
            ("empty.bin", b""),
            ("model.safetensors", WEIGHTS),
            ("optimizer.safetensors", b"state"),
            ("trainer.json", b"{}"),
            (".hidden", b"secret"),
            ("1_Pooling/config.json", b"{}"),
        ] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        dir
    }

    fn answer(address: &str, request: &Request, storage: Storage, exists: bool) -> Response {
        let json = |value: Value| ok(value.to_string());
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/api/models/me/mine") if exists => ok("{}"),
            ("POST", "/api/repos/create") => ok("{}"),
            ("POST", "/api/models/me/mine/preupload/main") => {
                let body: Value = serde_json::from_slice(&request.body).unwrap();
                let files = body["files"].as_array().unwrap().iter().map(|file| {
                    let path = file["path"].as_str().unwrap();
                    let mode = match path.ends_with(".json") {
                        true => "regular",
                        false => "lfs",
                    };
                    json!({ "path": path, "uploadMode": mode, "shouldIgnore": false })
                });
                json(json!({ "files": files.collect::<Vec<_>>() }))
            }
            ("POST", "/me/mine.git/info/lfs/objects/batch") => {
                let verify = json!({ "href": format!("{address}/verify") });
                let part = |n: u32| format!("{address}/part{n}");
                json(json!({ "objects": [match storage {
                    Storage::Whole => json!({ "oid": OID, "actions": {
                        "upload": { "href": format!("{address}/whole") }, "verify": verify,
                    } }),
                    Storage::InParts => json!({ "oid": OID, "actions": { "upload": {
                        "href": format!("{address}/complete"),
                        "header": { "chunk_size": "10", "2": part(2), "1": part(1), "3": part(3) },
                    } } }),
                    Storage::HasIt => json!({ "oid": OID }),
                    Storage::Refuses => json!({ "oid": OID, "error": {
                        "code": 422, "message": "too large",
                    } }),
                }] }))
            }
            ("PUT", path) => (200, vec![("etag", format!("\"{path}\""))], Vec::new()),
            ("POST", "/verify" | "/complete") => ok(""),
            ("POST", "/api/models/me/mine/commit/main") => {
                json(json!({ "commitUrl": "https://hub/commit/1", "commitOid": "1" }))
            }
            _ => not_found(),
        }
    }

    fn run(storage: Storage, exists: bool) -> (Result<String>, Vec<Request>) {
        let (endpoint, requests): (_, Arc<Mutex<Vec<Request>>>) =
            serve(move |address, request| answer(address, request, storage, exists));
        let (dir, cache) = (model(), tempfile::tempdir().unwrap());
        let mut hub = hub(&endpoint, cache.path());
        hub.token = Some("secret".into());
        let upload = Upload {
            dir: dir.path().to_path_buf(),
            target: "hf://me/mine".into(),
            private: true,
            message: "Trained".into(),
        };
        let result = upload_to(&hub, &upload);
        let requests = requests.lock().unwrap().clone();
        (result, requests)
    }

    fn find<'a>(requests: &'a [Request], path: &str) -> Vec<&'a Request> {
        requests
            .iter()
            .filter(|request| request.path == path)
            .collect()
    }

    #[test]
    fn a_directory_becomes_a_commit() {
        let (result, requests) = run(Storage::Whole, false);
        assert_eq!(result.unwrap(), "https://hub/commit/1");
        let made: Value =
            serde_json::from_slice(&find(&requests, "/api/repos/create")[0].body).unwrap();
        let expected = json!({
            "organization": "me", "name": "mine", "type": "model", "private": true,
        });
        assert_eq!(made, expected);
        // The storage gets the bytes, and no token.
        let stored = find(&requests, "/whole");
        assert_eq!(stored[0].body, WEIGHTS);
        assert_eq!(stored[0].header("authorization"), None);
        let verified: Value = serde_json::from_slice(&find(&requests, "/verify")[0].body).unwrap();
        assert_eq!(verified, json!({ "oid": OID, "size": WEIGHTS.len() }));

        let commit = requests.last().unwrap();
        assert_eq!(commit.header("authorization"), Some("Bearer secret"));
        assert_eq!(commit.header("content-type"), Some("application/x-ndjson"));
        let text = String::from_utf8(commit.body.clone()).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let small = |path: &str, content: &str| json!({ "key": "file", "value": { "path": path, "encoding": "base64", "content": content } });
        let expected = [
            json!({ "key": "header", "value": { "summary": "Trained", "description": "" } }),
            small("1_Pooling/config.json", "e30="),
            small("config.json", "e30="),
            small("empty.bin", ""),
            json!({ "key": "lfsFile", "value": {
                "path": "model.safetensors", "algo": "sha256", "oid": OID, "size": WEIGHTS.len(),
            } }),
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn large_files_go_in_parts() {
        let (result, requests) = run(Storage::InParts, true);
        result.unwrap();
        assert!(find(&requests, "/api/repos/create").is_empty());
        let parts = requests.iter().filter(|request| request.method == "PUT");
        let parts: Vec<(&str, &[u8])> = parts.map(|part| (&*part.path, &*part.body)).collect();
        let expected = [
            ("/part1", &WEIGHTS[..10]),
            ("/part2", &WEIGHTS[10..20]),
            ("/part3", &WEIGHTS[20..]),
        ];
        assert_eq!(parts, expected);
        let complete: Value =
            serde_json::from_slice(&find(&requests, "/complete")[0].body).unwrap();
        let part = |n: u32| json!({ "partNumber": n, "etag": format!("\"/part{n}\"") });
        let expected = json!({ "oid": OID, "parts": [part(1), part(2), part(3)] });
        assert_eq!(complete, expected);
    }

    #[test]
    fn what_is_stored_is_not_sent_again() {
        let (result, requests) = run(Storage::HasIt, true);
        result.unwrap();
        assert!(requests.iter().all(|request| request.method != "PUT"));
    }

    #[test]
    fn refusals_say_what_to_do() {
        let (result, _) = run(Storage::Refuses, true);
        let error = format!("{:#}", result.unwrap_err());
        assert!(
            error.contains("model.safetensors") && error.contains("too large"),
            "{error}"
        );

        let (endpoint, _) = serve(|_, _| (401, Vec::new(), b"who?".to_vec()));
        let (dir, cache) = (model(), tempfile::tempdir().unwrap());
        let mut hub = hub(&endpoint, cache.path());
        let mut upload = Upload {
            dir: dir.path().to_path_buf(),
            target: "hf://me/mine".into(),
            private: false,
            message: String::new(),
        };
        let error =
            |hub: &Hub, upload: &Upload| format!("{:#}", upload_to(hub, upload).unwrap_err());
        let message = error(&hub, &upload);
        assert!(message.contains("set HF_TOKEN, see"), "{message}");
        hub.token = Some("wrong".into());
        let message = error(&hub, &upload);
        assert!(
            message.contains("cannot make the repository me/mine"),
            "{message}"
        );
        assert!(message.contains("who?; the Hub has no such"), "{message}");
        hub.offline = true;
        let message = error(&hub, &upload);
        assert!(message.contains("HF_HUB_OFFLINE is set"), "{message}");
        upload.target = "me/mine".into();
        let message = error(&hub, &upload);
        assert!(message.contains("expected hf://owner/name"), "{message}");
        upload.target = "hf://me/mine".into();
        upload.dir = dir.path().join("none");
        let message = error(&hub, &upload);
        assert!(message.contains("cannot read"), "{message}");
    }
}

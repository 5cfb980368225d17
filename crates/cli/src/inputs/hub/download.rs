//! From the hub into its cache, in the layout that huggingface_hub made: `blobs/<etag>`,
//! `snapshots/<commit>/<name>` linked to them, `refs/main`, and a lock per blob that its tools take too.
//!
//! A blob grows as `<etag>.incomplete`, is continued after an interruption, and gets its name when it is
//! whole.

use super::{Listing, Repo, cache, home, path_variable};
use crate::failure::Failure;
use crate::ui::Ui;
use serde::Deserialize;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};
use suasion_data::Error;
use suasion_data::report::format::{bytes, count, percent};
use suasion_files::write_bytes;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

/// Attempts for one request, and for one part of a file that makes no progress.
const TRIES: u32 = 4;

/// The part of the API's answer on a repository at a commit that is read.
#[derive(Deserialize)]
struct Answer {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// As [`Repo::list`].
pub fn list(repo: &Repo, commit: Option<&str>) -> anyhow::Result<Listing> {
    let Answer { sha, siblings } = Hub::new(repo).answer(commit.unwrap_or("main"))?;
    let names = siblings.into_iter().map(|file| file.rfilename).collect();
    Ok(Listing { commit: sha, main: commit.is_none(), names })
}

/// As [`Repo::get`].
pub fn get(repo: &Repo, listing: &Listing, names: &[String], ui: &Ui) -> anyhow::Result<PathBuf> {
    let hub = Hub::new(repo);
    let folder = repo.folder();
    let snapshot = folder.join("snapshots").join(&listing.commit);
    let missing: Vec<&String> = names.iter().filter(|name| !snapshot.join(name).exists()).collect();
    if !missing.is_empty() {
        let files = count(missing.len() as u64, "file");
        ui.log(format_args!("downloading {files} of {} into {}", repo.id, folder.display()));
    }
    for name in missing {
        hub.file(name, &listing.commit, &snapshot, ui)?;
    }
    if listing.main && !names.is_empty() {
        let main = folder.join("refs/main");
        fs::create_dir_all(folder.join("refs")).map_err(|e| Error::io(&main, e))?;
        write_bytes(&main, listing.commit.as_bytes()).map_err(Error::from)?;
    }
    Ok(snapshot)
}

/// Requests to the hub that concern one repository.
struct Hub<'a> {
    repo: &'a Repo,
    agent: Agent,
    endpoint: String,
    authorization: Option<String>,
}

/// Facts about a file that the hub sends before the file.
struct Meta {
    etag: String,
    size: Option<u64>,
}

impl<'a> Hub<'a> {
    fn new(repo: &'a Repo) -> Hub<'a> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            // The token is for the hub only, not for the storage that it redirects to.
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .user_agent(concat!("suasion/", env!("CARGO_PKG_VERSION")))
            .build();
        let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|url| !url.is_empty());
        let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".into());
        Hub {
            repo,
            agent: config.into(),
            endpoint: endpoint.trim_end_matches('/').to_string(),
            authorization: token().map(|token| format!("Bearer {token}")),
        }
    }

    /// The files at a revision, and its commit.
    fn answer(&self, revision: &str) -> anyhow::Result<Answer> {
        let Repo { kind, id } = self.repo;
        let url = format!("{}/api/{}/{id}/revision/{}", self.endpoint, kind.plural(), escape(revision));
        let body = self.answered(&url, 0)?.into_body().into_with_config().limit(1 << 28).read_to_vec();
        let answer: Result<Answer, String> = body
            .map_err(|e| e.to_string())
            .and_then(|b| serde_json::from_slice(&b).map_err(|e| e.to_string()));
        let answer = answer.map_err(|e| {
            self.failure(&format!("{url}: {e}"), "check HF_ENDPOINT: the answer is not a hub's")
        })?;
        // These become paths: a server that is not a hub must not write outside of the cache.
        let names = answer.siblings.iter().map(|file| &file.rfilename).chain([&answer.sha]);
        for name in names {
            let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
            if name.is_empty() || !inside {
                return Err(self.failure(
                    &format!("{url}: names the file {name:?}"),
                    "check HF_ENDPOINT: the answer is not a hub's",
                ));
            }
        }
        Ok(answer)
    }

    /// Downloads a file and links it into the snapshot.
    fn file(&self, name: &str, sha: &str, snapshot: &Path, ui: &Ui) -> anyhow::Result<()> {
        let prefix = if self.repo.kind == super::Kind::Dataset { "datasets/" } else { "" };
        let escaped: Vec<String> = name.split('/').map(escape).collect();
        let url = format!("{}/{prefix}{}/resolve/{sha}/{}", self.endpoint, self.repo.id, escaped.join("/"));
        let meta = self.meta(&url)?;
        let folder = self.repo.folder();
        let blob = folder.join("blobs").join(&meta.etag);
        let lock = cache().join(".locks").join(folder.file_name().unwrap_or_default());
        let lock = lock.join(format!("{}.lock", meta.etag));
        let link = snapshot.join(name);
        for path in [&blob, &lock, &link] {
            let parent = path.parent().unwrap_or(path);
            fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        }
        let guard = File::create(&lock).and_then(|file| file.lock().map(|()| file));
        let _guard = guard.map_err(|e| Error::io(&lock, e))?;
        if !blob.exists() {
            let mut partial = blob.clone().into_os_string();
            partial.push(".incomplete");
            let partial = PathBuf::from(partial);
            let done = self.body(name, &url, &meta, &partial, ui);
            ui.overwrite("");
            done?;
            fs::rename(&partial, &blob).map_err(|e| Error::io(&blob, e))?;
        }
        let depth = name.split('/').count();
        let target = PathBuf::from("../".repeat(depth + 1)).join("blobs").join(&meta.etag);
        place(&blob, &target, &link).map_err(|e| Error::io(&link, e).into())
    }

    /// The etag and size of a file. Large files are stored elsewhere; the redirection to them has theirs.
    fn meta(&self, url: &str) -> anyhow::Result<Meta> {
        let mut url = url.to_string();
        for _ in 0..5 {
            let response = self.request(|| {
                let request =
                    self.agent.head(&url).config().max_redirects(0).max_redirects_will_error(false).build();
                // With compressed transfers the length would not be the file's.
                let request = request.header("Accept-Encoding", "identity");
                match &self.authorization {
                    Some(token) => request.header("Authorization", token),
                    None => request,
                }
                .call()
            });
            let response = response.map_err(|e| self.unreachable(&url, &e))?;
            let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
            let location = header("location").filter(|_| response.status().is_redirection());
            // A repository that was renamed: the same hub, another path.
            if let Some(path) = location.filter(|path| path.starts_with('/')) {
                url = format!("{}{path}", self.endpoint);
                continue;
            }
            if location.is_none() {
                self.check(&url, response.status())?;
            }
            let size = header("x-linked-size").or(header("content-length").filter(|_| location.is_none()));
            let etag = header("x-linked-etag").or(header("etag")).unwrap_or_default();
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
            if etag.is_empty() || !etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
                return Err(self.failure(
                    &format!("{url}: has the etag {etag:?}"),
                    "check HF_ENDPOINT: the answer is not a hub's",
                ));
            }
            return Ok(Meta { etag, size: size.and_then(|text| text.parse().ok()) });
        }
        Err(self.failure(
            &format!("{url}: too many redirections"),
            "check HF_ENDPOINT: the answer is not a hub's",
        ))
    }

    /// Continues `partial` until it is the whole file.
    fn body(&self, name: &str, url: &str, meta: &Meta, partial: &Path, ui: &Ui) -> anyhow::Result<()> {
        let io_error = |e| Error::io(partial, e);
        let mut file = OpenOptions::new().create(true).append(true).open(partial).map_err(io_error)?;
        let mut done = file.metadata().map_err(io_error)?.len();
        let mut failed = 0;
        while meta.size != Some(done) {
            let mut from = done;
            if meta.size.is_none_or(|size| done > size) {
                from = 0;
            }
            let response = self.answered(url, from)?;
            if response.status() != StatusCode::PARTIAL_CONTENT {
                from = 0;
            }
            file.set_len(from).map_err(io_error)?;
            done = from;
            let mut reader = response.into_body().into_reader();
            let mut buffer = vec![0; 1 << 16];
            let mut shown = Instant::now();
            let ended = loop {
                match reader.read(&mut buffer) {
                    Ok(0) => break Ok(()),
                    Ok(n) => {
                        file.write_all(&buffer[..n]).map_err(io_error)?;
                        done += n as u64;
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => break Err(e),
                }
                if shown.elapsed() > Duration::from_millis(100) {
                    shown = Instant::now();
                    ui.overwrite(&progress(name, done, meta.size));
                }
            };
            if ended.is_ok() && meta.size.is_none_or(|size| done == size) {
                break;
            }
            let further = done > from && meta.size.is_none_or(|size| done < size);
            failed = if further { 1 } else { failed + 1 };
            if failed == TRIES {
                let why = ended.err().map_or_else(|| "the connection ended".to_string(), |e| e.to_string());
                let size = meta.size.map_or_else(|| "?".into(), |size| size.to_string());
                let message = format!("{url}: {why} after {done} of {size} bytes");
                return Err(self.failure(&message, "run it again: the download continues there"));
            }
            pause(failed);
        }
        file.sync_all().map_err(|e| io_error(e).into())
    }

    /// The answer to a GET of the bytes from `from` on, redirections followed.
    fn answered(&self, url: &str, from: u64) -> anyhow::Result<Response<Body>> {
        let response = self.request(|| {
            let mut request = self.agent.get(url);
            if let Some(token) = &self.authorization {
                request = request.header("Authorization", token);
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            request.header("Accept-Encoding", "identity").call()
        });
        let response = response.map_err(|e| self.unreachable(url, &e))?;
        self.check(url, response.status())?;
        Ok(response)
    }

    /// Sends a request, again where it failed for a reason that may pass.
    fn request(
        &self,
        send: impl Fn() -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, ureq::Error> {
        let mut failed = 1;
        loop {
            let result = send();
            let passing = match &result {
                Ok(response) => {
                    response.status().is_server_error() || response.status() == StatusCode::TOO_MANY_REQUESTS
                }
                Err(ureq::Error::Io(_) | ureq::Error::Timeout(_)) => true,
                Err(_) => false,
            };
            if !passing || failed == TRIES {
                return result;
            }
            pause(failed);
            failed += 1;
        }
    }

    fn check(&self, url: &str, status: StatusCode) -> anyhow::Result<()> {
        let id = &self.repo.id;
        match status.as_u16() {
            200..=299 => Ok(()),
            // The hub answers 401 for repositories that do not exist, too.
            401 | 403 => Err(self.failure(
                &format!("{url}: {status}: {id} does not exist, is private, or has terms to accept first"),
                "check the id; for a repository of yours or one with terms set HF_TOKEN",
            )),
            404 => Err(self.failure(&format!("{url}: {status}"), "check the id")),
            _ => Err(self.failure(&format!("{url}: {status}"), "try again later")),
        }
    }

    fn unreachable(&self, url: &str, error: &ureq::Error) -> anyhow::Error {
        let help = "check the network, or set HF_HUB_OFFLINE=1 to use what the cache has";
        self.failure(&format!("{url}: {error}"), help)
    }

    fn failure(&self, message: &str, help: &str) -> anyhow::Error {
        Failure::run_time("E-HUB", format!("{}: {message}", self.repo.id), help).into()
    }
}

/// Waits before another attempt: not at all, then 1, 2, .. seconds.
fn pause(failed: u32) {
    std::thread::sleep(Duration::from_secs(u64::from(failed - 1)));
}

/// `HF_TOKEN`, or the token that the Hugging Face tools keep.
fn token() -> Option<String> {
    let token = std::env::var("HF_TOKEN").ok().or_else(|| {
        let path = path_variable("HF_TOKEN_PATH").unwrap_or_else(|| home().join("token"));
        fs::read_to_string(path).ok()
    })?;
    Some(token.trim().to_string()).filter(|token| !token.is_empty())
}

/// A part of a path, as URLs write it.
fn escape(part: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    part.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

fn progress(name: &str, done: u64, size: Option<u64>) -> String {
    match size {
        Some(size) => {
            format!("downloading {name}: {} of {}", percent(done as f64 / size.max(1) as f64), bytes(size))
        }
        None => format!("downloading {name}: {}", bytes(done)),
    }
}

/// Links a blob into a snapshot.
#[cfg(unix)]
fn place(_blob: &Path, target: &Path, link: &Path) -> io::Result<()> {
    // A link to a blob that was deleted.
    if link.symlink_metadata().is_ok() {
        fs::remove_file(link)?;
    }
    std::os::unix::fs::symlink(target, link)
}

/// Copies a blob into a snapshot: links need privileges on this system.
#[cfg(not(unix))]
fn place(blob: &Path, _target: &Path, link: &Path) -> io::Result<()> {
    fs::copy(blob, link).map(|_| ())
}

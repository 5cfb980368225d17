//! Downloads from a small hub in this process, with the paths, headers and redirections of the real one.

use crate::util::{Dir, TestCommand, row};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request: method and path, range, and whether it carried the token.
#[derive(Clone, Debug, PartialEq)]
struct Request {
    what: String,
    range: Option<String>,
    token: bool,
}

/// A hub of the models and data sets in `files`, by `kind/id/name`. Files of more than 4000 bytes are stored at another
/// path, where the first request for each file breaks off.
struct Hub {
    port: u16,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    fn new(files: BTreeMap<String, Vec<u8>>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen: Arc<Mutex<Vec<Request>>> = Arc::default();
        let log = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that has disconnected is not an error of the hub.
                let _ = answer(stream.unwrap(), port, &files, &log);
            }
        });
        Hub { port, seen }
    }

    fn env(&self, command: TestCommand) -> TestCommand {
        let command = command.env("HF_ENDPOINT", format!("http://127.0.0.1:{}", self.port));
        command.env("HF_HUB_CACHE", "cache").env("HF_TOKEN", "secret")
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

fn etag(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

fn answer(
    stream: TcpStream,
    port: u16,
    files: &BTreeMap<String, Vec<u8>>,
    log: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let (mut range, mut token) = (None, false);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap();
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.trim().to_string()),
            "authorization" => token = value.trim() == "Bearer secret",
            _ => {}
        }
    }
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap().to_string(), words.next().unwrap().to_string());
    let again = {
        let mut log = log.lock().unwrap();
        let what = format!("{method} {path}");
        let again = log.iter().any(|seen| seen.what == what);
        log.push(Request { what, range: range.clone(), token });
        again
    };
    let mut send = |status: &str, headers: &str, length: usize, body: &[u8]| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        )?;
        if method == "GET" { stream.write_all(body) } else { Ok(()) }
    };
    if let Some(rest) = path.strip_prefix("/api/") {
        let (repo, revision) = rest.split_once("/revision/").unwrap();
        assert!(["main", SHA].contains(&revision), "{revision}");
        if repo == "models/org/private" {
            return send("401 Unauthorized", "", 0, b"");
        }
        let prefix = format!("{repo}/");
        let names = files.keys().filter_map(|name| name.strip_prefix(&prefix));
        let siblings: Vec<Value> = names.map(|name| json!({"rfilename": name})).collect();
        let body = json!({"id": repo, "sha": SHA, "siblings": siblings}).to_string();
        return send("200 OK", "Content-Type: application/json\r\n", body.len(), body.as_bytes());
    }
    if let Some(name) = path.strip_prefix("/storage/") {
        let bytes = &files[name];
        let from = range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        let from: usize = from.map_or(0, |from| from.parse().unwrap());
        let rest = &bytes[from..];
        let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
        let sent = if again { rest } else { &rest[..rest.len() / 2] };
        return send(status, "", rest.len(), sent);
    }
    let path = path.replacen(&format!("/resolve/{SHA}/"), "/", 1);
    let name = match path.strip_prefix("/datasets/") {
        Some(rest) => format!("datasets/{rest}"),
        None => format!("models{path}"),
    };
    let Some(bytes) = files.get(&name) else { return send("404 Not Found", "", 0, b"") };
    let tag = etag(bytes);
    if bytes.len() > 4000 {
        let headers = format!(
            "X-Repo-Commit: {SHA}\r\nX-Linked-Etag: \"{tag}\"\r\nX-Linked-Size: {}\r\nETag: \"other\"\r\n\
             Location: http://localhost:{port}/storage/{name}\r\n",
            bytes.len()
        );
        return send("302 Found", &headers, 0, b"");
    }
    send("200 OK", &format!("X-Repo-Commit: {SHA}\r\nETag: W/\"{tag}\"\r\n"), bytes.len(), bytes)
}

fn served(dir: &Dir) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        files.insert(format!("models/org/tiny/{name}"), dir.read(&format!("model/{name}")));
    }
    files.insert("models/org/tiny/README.md".into(), b"# tiny".to_vec());
    files.insert("models/org/tiny/onnx/model.safetensors".into(), b"no".to_vec());
    let rows = |range: std::ops::Range<usize>| range.map(|i| row(i) + "\n").collect::<String>().into_bytes();
    files.insert("datasets/org/rows/README.md".into(), b"# rows".to_vec());
    files.insert("datasets/org/rows/data/train-00000-of-00002.jsonl".into(), rows(0..3));
    files.insert("datasets/org/rows/data/train-00001-of-00002.jsonl".into(), rows(3..5));
    files.insert("datasets/org/rows/data/test-00000-of-00001.jsonl".into(), rows(5..6));
    files.insert("datasets/org/train_only/train.jsonl".into(), rows(0..5));
    files.insert("models/org/hostile/../../../evil.json".into(), b"{}".to_vec());
    files
}

#[test]
fn what_the_cache_lacks_is_downloaded_into_it() {
    let dir = Dir::new().with_weights().with_rows(5);
    let hub = Hub::new(served(&dir));
    let prepare =
        |model: &str, data: &str| dir.suasion(&["prepare", "-M", model, "-D", data, "-o", "out.jsonl"]);
    prepare("model", "rows.jsonl").ok();
    let expected = dir.text("out.jsonl");

    hub.env(prepare("org/tiny", "rows.jsonl")).ok().says("downloading 3 files of org/tiny");
    assert_eq!(dir.text("out.jsonl"), expected);
    let requests = hub.requests();
    let what: Vec<&str> = requests.iter().map(|request| request.what.as_str()).collect();
    assert_eq!(what[0], "GET /api/models/org/tiny/revision/main");
    assert!(!what.iter().any(|what| what.contains("README") || what.contains("safetensors")), "{what:?}");
    // The tokenizer is large: it comes from storage, which does not receive the token, and the second request continues
    // the first.
    let stored: Vec<&Request> = requests.iter().filter(|r| r.what.starts_with("GET /storage/")).collect();
    let size = dir.read("model/tokenizer.json").len();
    assert_eq!(stored.len(), 2, "{requests:?}");
    assert_eq!(stored[1].range.as_deref(), Some(format!("bytes={}-", size / 2).as_str()));
    assert!(requests.iter().all(|r| r.token != r.what.starts_with("GET /storage/")), "{requests:?}");
    // The layout of huggingface_hub.
    let base = "cache/models--org--tiny";
    assert_eq!(dir.text(&format!("{base}/refs/main")), SHA);
    let tokenizer = dir.read("model/tokenizer.json");
    assert_eq!(dir.read(&format!("{base}/blobs/{}", etag(&tokenizer))), tokenizer);
    #[cfg(unix)]
    assert_eq!(
        std::fs::read_link(dir.path(&format!("{base}/snapshots/{SHA}/tokenizer.json"))).unwrap(),
        std::path::Path::new("../../blobs").join(etag(&tokenizer))
    );

    // Cached files are not requested again, and need no network.
    hub.env(prepare("org/tiny", "rows.jsonl")).ok();
    hub.env(prepare("org/tiny", "rows.jsonl")).env("HF_HUB_OFFLINE", "1").ok();
    assert_eq!(hub.requests(), []);

    // A data set: only the needed split, in order.
    hub.env(prepare("org/tiny", "org/rows")).ok();
    assert_eq!(dir.text("out.jsonl"), expected);
    let what: Vec<String> = hub.requests().into_iter().map(|request| request.what).collect();
    assert!(!what.iter().any(|what| what.contains("test-") || what.contains("README")), "{what:?}");
    assert!(
        dir.exists(&format!("cache/datasets--org--rows/snapshots/{SHA}/data/train-00001-of-00002.jsonl"))
    );

    // Training also needs the weights, and the data set's test rows.
    let train = dir.suasion(&["train", "-M", "org/tiny", "-D", "org/rows", "--dry-run"]);
    hub.env(train).ok().prints("org/rows/train: 5 rows").prints("org/rows/test: 1 row:");
    let weights = dir.read("model/model.safetensors");
    assert_eq!(dir.read(&format!("{base}/snapshots/{SHA}/model.safetensors")), weights);
    assert!(!dir.exists(&format!("{base}/snapshots/{SHA}/onnx")));
}

#[test]
fn failed_downloads_are_errors_with_help() {
    let dir = Dir::new().with_weights().with_rows(1);
    let hub = Hub::new(served(&dir));
    let prepare =
        |model: &str| hub.env(dir.suasion(&["prepare", "-M", model, "-D", "rows.jsonl", "-o", "out.jsonl"]));
    prepare("org/private").run().error(3, "E-HUB", "401").says("HF_TOKEN");
    prepare("org/hostile").run().error(3, "E-HUB", "names the file \"../../../evil.json\"");
    assert!(!dir.exists("evil.json") && !dir.exists("cache"));
    let offline = prepare("org/tiny").env("HF_HUB_OFFLINE", "1").run();
    offline.error(3, "E-MODEL", "cache/models--org--tiny").says("HF_HUB_OFFLINE");
    prepare("org/tiny").env("HF_ENDPOINT", "http://127.0.0.1:9").run().error(3, "E-HUB", "org/tiny: ");
}

/// A data set without evaluation rows: one request looks for them, at the cached commit, and without a network the run
/// continues without them.
#[test]
fn rows_to_evaluate_on_are_of_the_cached_commit() {
    let dir = Dir::new().with_weights().with_rows(1);
    let hub = Hub::new(served(&dir));
    let train = || hub.env(dir.train("org/train_only").arg("--dry-run"));
    let what = || hub.requests().into_iter().map(|request| request.what).collect::<Vec<_>>();
    let listing = |revision: &str| format!("GET /api/datasets/org/train_only/revision/{revision}");
    train().ok();
    let first = what();
    assert_eq!((&first[0], first.last().unwrap()), (&listing("main"), &listing(SHA)), "{first:?}");
    assert_eq!(first.iter().filter(|what| what.contains("/api/")).count(), 2, "{first:?}");
    train().ok();
    assert_eq!(what(), [listing(SHA)]);
    let gone = train().env("HF_ENDPOINT", "http://127.0.0.1:9");
    gone.ok()
        .says("warning: org/train_only: ")
        .says(&format!("going on with cache/datasets--org--train_only/snapshots/{SHA}"));
    assert_eq!(what(), [""; 0]);
    // If one split is cached, the other is downloaded at the same commit.
    let prepare = dir.prepare("org/rows", "out.jsonl");
    hub.env(prepare).ok();
    what();
    let train = dir.train("org/rows").arg("--dry-run");
    hub.env(train).ok().prints("org/rows/test: 1 row:");
    let what = what();
    assert_eq!(what[0], format!("GET /api/datasets/org/rows/revision/{SHA}"));
    assert!(what[1..].iter().all(|what| what.contains("test-00000")), "{what:?}");
}

#[test]
fn a_check_downloads_nothing() {
    let dir = Dir::new().with_weights().with_rows(1);
    let hub = Hub::new(served(&dir));
    let check = || hub.env(dir.suasion(&["check", "-M", "org/tiny", "-D", "org/rows"]));
    check()
        .ok()
        .says("note: model_name_or_path: not all of org/tiny is in the cache")
        .says("note: dataset_name: ");
    // Offline, a missing file is a problem.
    check().env("HF_HUB_OFFLINE", "1").run().code(1).says("org/tiny: no such path");
    assert_eq!(hub.requests(), []);
    assert!(!dir.exists("cache"));
    hub.env(dir.suasion(&["train", "-M", "org/tiny", "-D", "org/rows", "--dry-run"])).ok();
    hub.requests();
    check().ok().says("the configuration is valid");
    assert_eq!(hub.requests(), []);
}

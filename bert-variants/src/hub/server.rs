//! A Hub for tests: an HTTP server on this machine.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use hf_hub::Cache;

use super::Hub;

/// What a program asked for.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub method: String,
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers
            .find(|(header, _)| header == name)
            .map(|(_, value)| value.as_str())
    }
}

/// Status, further headers, body.
pub(crate) type Response = (u16, Vec<(&'static str, String)>, Vec<u8>);

pub(crate) fn ok(body: impl Into<Vec<u8>>) -> Response {
    (200, Vec::new(), body.into())
}

pub(crate) fn not_found() -> Response {
    (404, Vec::new(), Vec::new())
}

/// A file as the Hub sends it, or the part of it that `request` asks for.
pub(crate) fn file(request: &Request, commit: &str, body: &[u8]) -> Response {
    let part = match request.header("range") {
        Some("bytes=0-0") => &body[..1],
        _ => body,
    };
    let headers = vec![
        ("etag", format!("\"{}\"", request.path.replace('/', "-"))),
        ("x-repo-commit", commit.to_string()),
        ("content-range", format!("bytes 0-0/{}", body.len())),
    ];
    (206, headers, part.to_vec())
}

/// Answers requests as `answer` says. Returns the server's address, and what it is asked for.
pub(crate) fn serve(
    answer: impl Fn(&str, &Request) -> Response + Send + 'static,
) -> (String, Arc<Mutex<Vec<Request>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let requests = Arc::new(Mutex::new(Vec::new()));
    let (own_address, log) = (address.clone(), requests.clone());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let request = read(&stream);
            let (status, headers, body) = answer(&own_address, &request);
            log.lock().unwrap().push(request);
            let headers = headers
                .iter()
                .map(|(name, value)| format!("{name}: {value}\r\n"));
            write!(
                stream,
                "HTTP/1.1 {status} Status\r\ncontent-length: {}\r\nconnection: close\r\n{}\r\n",
                body.len(),
                headers.collect::<String>(),
            )
            .unwrap();
            stream.write_all(&body).unwrap();
        }
    });
    (address, requests)
}

fn read(stream: &TcpStream) -> Request {
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_string()
    };
    let first = line();
    let mut words = first.split(' ').map(str::to_string);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let mut headers = Vec::new();
    while let Some((name, value)) = line().split_once(": ") {
        headers.push((name.to_lowercase(), value.to_string()));
    }
    let mut request = Request {
        method,
        path,
        headers,
        body: Vec::new(),
    };
    let length = request
        .header("content-length")
        .map_or(0, |n| n.parse().unwrap());
    request.body = vec![0; length];
    reader.read_exact(&mut request.body).unwrap();
    request
}

/// The Hub at an address, with its cache in a folder.
pub(crate) fn hub(endpoint: &str, cache: &Path) -> Hub {
    Hub {
        endpoint: endpoint.to_string(),
        cache: Cache::new(cache.to_path_buf()),
        token: None,
        offline: false,
        progress: false,
    }
}

/// Nobody listens there.
pub(crate) const NO_NETWORK: &str = "http://127.0.0.1:1";

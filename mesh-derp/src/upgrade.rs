//! The HTTP/1.1 bytes around a relay connection, without any I/O.
//!
//! A relay connection begins as an HTTP request and then stops being HTTP:
//!
//! ```text
//! GET /derp HTTP/1.1            HTTP/1.1 101 Switching Protocols
//! Host: relay.example           Upgrade: DERP
//! Upgrade: DERP                 Connection: Upgrade
//! Connection: Upgrade           Derp-Version: 2
//! [Derp-Fast-Start: 1]          Derp-Public-Key: <64 hex digits>
//! [Ideal-Node: 1a]
//! ```
//!
//! With `Derp-Fast-Start: 1` the relay sends no response at all: a client that has learnt the relay's key from the TLS
//! handshake (see [`meta certificate`](crate::x509)) sends its login right behind the request. The method is not
//! checked, and the target may be in absolute form (`POST https://host/derp`): the official Rust client does both. The
//! header `Ideal-Node` says that the client would rather be at another node of the region.
//!
//! Whatever follows the blank line belongs to the next layer, and often arrives in the same segment.

use mesh_noise::key::RelayPublic;

use crate::frame::PROTOCOL_VERSION;

/// The longest request or response head that is read.
pub const MAX_HEAD_LEN: usize = 16 * 1024;
/// The most headers that a head may have.
const MAX_HEADERS: usize = 64;

/// Why bytes are not an HTTP head.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// They do not follow the HTTP/1 grammar.
    #[error("malformed http head: {0}")]
    Malformed(#[from] httparse::Error),
    /// The blank line does not come within [`MAX_HEAD_LEN`] bytes.
    #[error("http head longer than {MAX_HEAD_LEN} bytes")]
    TooLong,
}

/// The headers of a head, in the order they came.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Headers(Vec<(String, Vec<u8>)>);

impl Headers {
    /// The first value of a header, if it is text. Names match without regard to case.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(have, _)| have.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(value).ok().map(str::trim)
    }

    /// All headers as they came.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_slice()))
    }

    /// Whether a comma-separated header holds `token`, without regard to case.
    #[must_use]
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.0
            .iter()
            .filter(|(have, _)| have.eq_ignore_ascii_case(name))
            .filter_map(|(_, value)| std::str::from_utf8(value).ok())
            .any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
    }

    fn from_parsed(parsed: &[httparse::Header<'_>]) -> Self {
        Self(parsed.iter().map(|header| (header.name.to_owned(), header.value.to_vec())).collect())
    }
}

/// The head of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHead {
    /// The method, such as `GET`.
    pub method: String,
    /// The target as it came: `/path?query`, or in absolute form.
    pub target: String,
    /// The minor version: 0 or 1.
    pub minor: u8,
    /// The headers.
    pub headers: Headers,
}

impl RequestHead {
    /// The path alone: without scheme and host, and without the query.
    #[must_use]
    pub fn path(&self) -> &str {
        let target = match self.target.split_once("://") {
            Some((_, rest)) if !self.target.starts_with('/') => rest.find('/').map_or("/", |at| &rest[at..]),
            _ => &self.target,
        };
        target.split_once(['?', '#']).map_or(target, |(path, _)| path)
    }

    /// The query, without the question mark.
    #[must_use]
    pub fn query(&self) -> Option<&str> {
        self.target.split_once('?').map(|(_, query)| query)
    }

    /// The first value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)
    }

    /// Whether the connection may carry another request after this one.
    #[must_use]
    pub fn keeps_alive(&self) -> bool {
        if self.minor == 0 {
            self.headers.has_token("connection", "keep-alive")
        } else {
            !self.headers.has_token("connection", "close")
        }
    }
}

/// The head of a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseHead {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: Headers,
}

/// Reads a request head from the front of `bytes`: the head and its length, or `None` if it is not whole yet.
///
/// # Errors
/// If it never will be a head.
pub fn parse_request(bytes: &[u8]) -> Result<Option<(RequestHead, usize)>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let Some(len) = within_limit(request.parse(bytes)?, bytes)? else { return Ok(None) };
    let head = RequestHead {
        method: request.method.unwrap_or_default().to_owned(),
        target: request.path.unwrap_or_default().to_owned(),
        minor: request.version.unwrap_or_default(),
        headers: Headers::from_parsed(request.headers),
    };
    Ok(Some((head, len)))
}

/// Reads a response head from the front of `bytes`: the head and its length, or `None` if it is not whole yet.
///
/// # Errors
/// If it never will be a head.
pub fn parse_response(bytes: &[u8]) -> Result<Option<(ResponseHead, usize)>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let Some(len) = within_limit(response.parse(bytes)?, bytes)? else { return Ok(None) };
    let status = response.code.unwrap_or_default();
    Ok(Some((ResponseHead { status, headers: Headers::from_parsed(response.headers) }, len)))
}

fn within_limit(parsed: httparse::Status<usize>, bytes: &[u8]) -> Result<Option<usize>, HttpError> {
    match parsed {
        httparse::Status::Complete(len) if len <= MAX_HEAD_LEN => Ok(Some(len)),
        httparse::Status::Partial if bytes.len() < MAX_HEAD_LEN => Ok(None),
        httparse::Status::Complete(_) | httparse::Status::Partial => Err(HttpError::TooLong),
    }
}

/// The request with which a client asks for a relay connection.
///
/// `host` goes into the `Host` header, with its port if that is not the scheme's own. `ideal_node` names the node of the
/// region the client would rather be at.
#[must_use]
pub fn request(host: &str, fast_start: bool, ideal_node: Option<&str>) -> Vec<u8> {
    let mut text = format!("GET /derp HTTP/1.1\r\nHost: {host}\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n");
    if fast_start {
        text.push_str("Derp-Fast-Start: 1\r\n");
    }
    if let Some(node) = ideal_node.filter(|node| node.chars().all(|c| c.is_ascii_graphic())) {
        text.push_str(&format!("Ideal-Node: {node}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

/// What a request to `/derp` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// A relay connection.
    Relay {
        /// No response is wanted.
        fast_start: bool,
        /// The client would rather be at another node.
        not_ideal: bool,
    },
    /// A relay connection inside WebSocket messages.
    WebSocket,
    /// Nothing that can be given: the answer is 426.
    NoUpgrade,
}

/// Reads what a request to `/derp` asks for.
///
/// Some old clients say `websocket` and speak plain frames; only the sub-protocol `derp` makes it a WebSocket.
#[must_use]
pub fn asked(head: &RequestHead) -> Asked {
    let upgrade = head.header("upgrade").unwrap_or_default().to_ascii_lowercase();
    match upgrade.as_str() {
        "websocket" if head.headers.has_token("sec-websocket-protocol", "derp") => Asked::WebSocket,
        "derp" | "websocket" => Asked::Relay {
            fast_start: head.header("derp-fast-start") == Some("1"),
            not_ideal: head.header("ideal-node").is_some_and(|node| !node.is_empty()),
        },
        _ => Asked::NoUpgrade,
    }
}

/// The response that opens a relay connection.
#[must_use]
pub fn accepted(relay: &RelayPublic) -> Vec<u8> {
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\nDerp-Version: {PROTOCOL_VERSION}\r\n\
         Derp-Public-Key: {relay}\r\n\r\n"
    )
    .into_bytes()
}

/// A plain response. `Content-Length` is added, except to 204, which has none; a HEAD request gets no body.
#[must_use]
pub fn response(status: u16, reason: &str, headers: &[(&str, &str)], body: &str, head_only: bool) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} {reason}\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if status != 204 {
        text.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    text.push_str("\r\n");
    if !head_only {
        text.push_str(body);
    }
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(text: &str) -> RequestHead {
        let (head, len) = parse_request(text.as_bytes()).unwrap().unwrap();
        assert_eq!(len, text.len());
        head
    }

    #[test]
    fn our_request_is_understood_as_we_mean_it() {
        let text = String::from_utf8(request("relay.example:3443", true, Some("1b"))).unwrap();
        let request = head(&text);
        assert_eq!((request.method.as_str(), request.path()), ("GET", "/derp"));
        assert_eq!(request.header("HOST"), Some("relay.example:3443"));
        assert_eq!(asked(&request), Asked::Relay { fast_start: true, not_ideal: true });
        let plain = head(&String::from_utf8(super::request("h", false, None)).unwrap());
        assert_eq!(asked(&plain), Asked::Relay { fast_start: false, not_ideal: false });
    }

    #[test]
    fn absolute_targets_and_queries_have_the_same_path() {
        for (target, path) in [
            ("/derp", "/derp"),
            ("https://10.0.0.1:3443/derp", "/derp"),
            ("http://h/generate_204?t=1", "/generate_204"),
            ("http://h", "/"),
            ("/derp?x=http://h/y", "/derp"),
        ] {
            assert_eq!(head(&format!("POST {target} HTTP/1.1\r\n\r\n")).path(), path, "{target}");
        }
        assert_eq!(head("GET /key?v=130 HTTP/1.1\r\n\r\n").query(), Some("v=130"));
    }

    #[test]
    fn upgrade_tokens_are_told_apart() {
        let with = |headers: &str| asked(&head(&format!("GET /derp HTTP/1.1\r\n{headers}\r\n")));
        let relay = Asked::Relay { fast_start: false, not_ideal: false };
        assert_eq!(with("Upgrade: derp\r\n"), relay);
        assert_eq!(with("Upgrade: WebSocket\r\n"), relay);
        assert_eq!(with("Upgrade: websocket\r\nSec-WebSocket-Protocol: x, derp\r\n"), Asked::WebSocket);
        assert_eq!(with("Upgrade: h2c\r\n"), Asked::NoUpgrade);
        assert_eq!(with(""), Asked::NoUpgrade);
        assert_eq!(with("Upgrade: DERP\r\nDerp-Fast-Start: true\r\n"), relay);
    }

    #[test]
    fn the_response_carries_the_key() {
        let key = RelayPublic::from_bytes([0xab; 32]);
        let bytes = accepted(&key);
        let (head, len) = parse_response(&bytes).unwrap().unwrap();
        assert_eq!((head.status, len), (101, bytes.len()));
        assert_eq!(head.headers.get("derp-public-key"), Some("ab".repeat(32).as_str()));
        assert_eq!(head.headers.get("Derp-Version"), Some("2"));
    }

    #[test]
    fn heads_that_never_end_are_refused() {
        assert_eq!(parse_request(b"GET / HTTP/1.1\r\nA: b"), Ok(None));
        let mut long = b"GET / HTTP/1.1\r\nA: ".to_vec();
        long.resize(MAX_HEAD_LEN, b'a');
        assert_eq!(parse_request(&long), Err(HttpError::TooLong));
        assert!(matches!(parse_request(b"\x16\x03\x01"), Err(HttpError::Malformed(_))));
    }

    #[test]
    fn keep_alive_depends_on_version_and_header() {
        assert!(head("GET / HTTP/1.1\r\n\r\n").keeps_alive());
        assert!(!head("GET / HTTP/1.1\r\nConnection: close\r\n\r\n").keeps_alive());
        assert!(!head("GET / HTTP/1.0\r\n\r\n").keeps_alive());
        assert!(head("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").keeps_alive());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_head_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(Some((request, _))) = parse_request(&bytes) {
                let _ = (request.path(), request.query(), asked(&request));
            }
            let _ = parse_response(&bytes);
        }
    }
}

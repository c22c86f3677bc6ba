//! As much of HTTP/1.1 (RFC 9112) as a gateway's UPnP server takes to talk to: one request and one response a connection.
//!
//! Gateways' servers are old and odd: lines may end in a bare LF, field names come in any case, and a body may end with the
//! connection. What is written here is strict; what is read is whatever can be understood.

use std::net::SocketAddr;

/// A response, or a request, may have so many bytes in all.
pub const MAX_LEN: usize = 128 * 1024;
/// A head longer than this is none.
const MAX_HEAD: usize = 8 * 1024;

/// Why bytes are not the message that was wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The first line is not one of HTTP.
    #[error("not an http message")]
    StartLine,
    /// It ended too soon.
    #[error("the http message ends too soon")]
    Cut,
    /// It is longer than [`MAX_LEN`], or says that it will be.
    #[error("the http message is too long")]
    TooLong,
    /// A chunk's length cannot be read.
    #[error("a malformed chunk")]
    Chunk,
}

/// An `http` URL, as far as it is used: whoever names a host in it is not believed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Url {
    /// The port, 80 if none is given.
    pub port: u16,
    /// The path with its query, beginning with a slash.
    pub path: String,
}

impl Url {
    /// Reads an absolute `http` URL. `None` for any other, and for one with characters that have no place in a request.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let scheme = text.get(..7)?;
        if !scheme.eq_ignore_ascii_case("http://") {
            return None;
        }
        let rest = &text[7..];
        let at = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(at);
        // The colons of an IPv6 address are inside brackets.
        let after_host = authority.rsplit_once(']').map_or(authority, |(_, after)| after);
        let port = match after_host.rsplit_once(':') {
            Some((_, "")) | None => 80,
            Some((_, port)) => port.parse().ok().filter(|port| *port != 0)?,
        };
        Some(Self { port, path: clean(path)? })
    }

    /// What `reference` means where this URL is the base (RFC 3986 §5, but for dots): an absolute URL, an absolute path or
    /// a relative one.
    #[must_use]
    pub fn join(&self, reference: &str) -> Option<Self> {
        let reference = reference.trim();
        if reference.contains("://") {
            return Self::parse(reference);
        }
        if reference.starts_with('/') {
            return Some(Self { port: self.port, path: clean(reference)? });
        }
        let end = self.path.find(['?', '#']).unwrap_or(self.path.len());
        let folder = self.path[..end].rfind('/').map_or("/", |slash| &self.path[..=slash]);
        Some(Self { port: self.port, path: clean(&format!("{folder}{reference}"))? })
    }
}

/// A path for a request line: no fragment, a slash in front, printable ASCII only.
fn clean(path: &str) -> Option<String> {
    let path = path.split('#').next().unwrap_or_default();
    if path.len() > 1024 || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return None;
    }
    Some(if path.starts_with('/') { path.to_owned() } else { format!("/{path}") })
}

/// `remote` as the field `Host` names it: its zone means nothing to anybody else (RFC 6874 §4).
fn host(remote: SocketAddr) -> SocketAddr {
    SocketAddr::new(remote.ip(), remote.port())
}

/// A request to fetch `path` from `remote`.
#[must_use]
pub fn get(remote: SocketAddr, path: &str) -> Vec<u8> {
    let host = host(remote);
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nUser-Agent: mesh\r\n\r\n").into_bytes()
}

/// A SOAP request (UPnP Device Architecture 1.1 §3.2.1).
#[must_use]
pub fn post(remote: SocketAddr, path: &str, soap_action: &str, body: &str) -> Vec<u8> {
    let (host, len) = (host(remote), body.len());
    format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nUser-Agent: mesh\r\n\
         Content-Type: text/xml; charset=\"utf-8\"\r\nSOAPAction: \"{soap_action}\"\r\nContent-Length: {len}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// A response with an XML body, as a gateway sends it.
#[must_use]
pub fn respond(status: u16, body: &str) -> Vec<u8> {
    let reason = if status == 200 { "OK" } else { "Error" };
    let len = body.len();
    format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: text/xml; charset=\"utf-8\"\r\nConnection: close\r\n\
         Content-Length: {len}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// The lines in front of a body, of HTTP and of SSDP.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    first: &'a str,
    fields: &'a str,
}

impl<'a> Head<'a> {
    /// Finds the head and how many bytes it has, with the empty line that ends it. `None` while that has not come.
    #[must_use]
    pub fn find(bytes: &'a [u8]) -> Option<(Self, usize)> {
        let searched = &bytes[..bytes.len().min(MAX_HEAD)];
        let end = |pattern: &[u8]| {
            let at = searched.windows(pattern.len()).position(|window| window == pattern)?;
            Some(at + pattern.len())
        };
        let len = [end(b"\r\n\r\n"), end(b"\n\n")].into_iter().flatten().min()?;
        Some((Self::of(&searched[..len]), len))
    }

    /// Reads all of `bytes` as a head: a datagram may leave the empty line out.
    #[must_use]
    pub fn of(bytes: &'a [u8]) -> Self {
        // Names and values that matter are ASCII; what is not valid text ends the head.
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
        };
        let (first, fields) = text.split_once('\n').unwrap_or((text, ""));
        Self { first: first.trim(), fields }
    }

    /// The first line.
    #[must_use]
    pub const fn first_line(&self) -> &'a str {
        self.first
    }

    /// The status of a response.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        let mut words = self.first.split_ascii_whitespace();
        words.next().filter(|version| version.starts_with("HTTP/1."))?;
        words.next()?.parse().ok().filter(|status| (100..1000).contains(status))
    }

    /// The method and the path of a request.
    #[must_use]
    pub fn request(&self) -> Option<(&'a str, &'a str)> {
        let mut words = self.first.split_ascii_whitespace();
        let (method, path) = (words.next()?, words.next()?);
        words.next().filter(|version| version.starts_with("HTTP/1."))?;
        Some((method, path))
    }

    /// The value of the first field of this name, in any case.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&'a str> {
        self.fields.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.trim().eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// A whole response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body, without chunks.
    pub body: Vec<u8>,
}

/// Reads a response from what has come so far; `ended` says that nothing more will. `None` while more is needed.
///
/// # Errors
/// [`HttpError`]: it will never be one.
pub fn response(bytes: &[u8], ended: bool) -> Result<Option<Response>, HttpError> {
    let Some((head, body_at)) = message_head(bytes, ended)? else { return Ok(None) };
    let status = head.status().ok_or(HttpError::StartLine)?;
    let body = body(&head, &bytes[body_at..], ended, Untold::UntilEnd)?;
    Ok(body.map(|body| Response { status, body }))
}

/// A whole request, as a gateway reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request<'a> {
    /// `GET`, `POST`.
    pub method: &'a str,
    /// The path.
    pub path: &'a str,
    /// What `SOAPAction` says, without quotes; empty if nothing.
    pub soap_action: &'a str,
    /// The body.
    pub body: Vec<u8>,
}

/// Reads a request from what has come so far. `None` while more is needed.
///
/// # Errors
/// [`HttpError`]: it will never be one.
pub fn request(bytes: &[u8]) -> Result<Option<Request<'_>>, HttpError> {
    let Some((head, body_at)) = message_head(bytes, false)? else { return Ok(None) };
    let (method, path) = head.request().ok_or(HttpError::StartLine)?;
    let soap_action = head.field("SOAPAction").unwrap_or_default().trim_matches('"');
    let body = body(&head, &bytes[body_at..], false, Untold::Empty)?;
    Ok(body.map(|body| Request { method, path, soap_action, body }))
}

fn message_head(bytes: &[u8], ended: bool) -> Result<Option<(Head<'_>, usize)>, HttpError> {
    match Head::find(bytes) {
        Some((head, len)) => Ok(Some((head, len))),
        None if bytes.len() >= MAX_HEAD => Err(HttpError::TooLong),
        None if ended => Err(HttpError::Cut),
        None => Ok(None),
    }
}

/// What a body is whose length is not told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Untold {
    Empty,
    UntilEnd,
}

fn body(head: &Head<'_>, bytes: &[u8], ended: bool, untold: Untold) -> Result<Option<Vec<u8>>, HttpError> {
    if bytes.len() > MAX_LEN {
        return Err(HttpError::TooLong);
    }
    let chunked = head.field("Transfer-Encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
    let whole = if chunked {
        chunks(bytes)?
    } else {
        match head.field("Content-Length").and_then(|len| len.parse::<usize>().ok()) {
            Some(len) if len > MAX_LEN => return Err(HttpError::TooLong),
            Some(len) => bytes.get(..len).map(<[u8]>::to_vec),
            None if untold == Untold::Empty => Some(Vec::new()),
            None => ended.then(|| bytes.to_vec()),
        }
    };
    match whole {
        None if ended => Err(HttpError::Cut),
        whole => Ok(whole),
    }
}

/// Joins chunks (RFC 9112 §7.1); `None` while the last one has not come.
fn chunks(mut bytes: &[u8]) -> Result<Option<Vec<u8>>, HttpError> {
    let mut joined = Vec::new();
    loop {
        let Some(line) = bytes.iter().position(|byte| *byte == b'\n') else {
            return if bytes.len() > 64 { Err(HttpError::Chunk) } else { Ok(None) };
        };
        let text = std::str::from_utf8(&bytes[..line]).map_err(|_| HttpError::Chunk)?;
        let digits = text.split(';').next().unwrap_or_default().trim();
        let len = usize::from_str_radix(digits, 16).map_err(|_| HttpError::Chunk)?;
        if len > MAX_LEN {
            return Err(HttpError::TooLong);
        }
        if len == 0 {
            return Ok(Some(joined));
        }
        let Some(chunk) = bytes.get(line + 1..line + 1 + len) else { return Ok(None) };
        joined.extend_from_slice(chunk);
        bytes = &bytes[line + 1 + len..];
        bytes = bytes.strip_prefix(b"\r\n").or_else(|| bytes.strip_prefix(b"\n")).unwrap_or(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn url(text: &str) -> Option<(u16, String)> {
        Url::parse(text).map(|url| (url.port, url.path))
    }

    #[test]
    fn urls_give_port_and_path_and_no_host() {
        assert_eq!(url("http://192.168.1.1:5000/rootDesc.xml"), Some((5000, "/rootDesc.xml".into())));
        assert_eq!(url("HTTP://router"), Some((80, "/".into())));
        assert_eq!(url("http://[fe80::1]:1900/a?b=c#d"), Some((1900, "/a?b=c".into())));
        assert_eq!(url("http://[fe80::1]/a"), Some((80, "/a".into())));
        for wrong in
            ["https://a/", "http://a:0/", "http://a:99999/", "http://a/b c", "http://a/b\r\nX: y", "", "http:/"]
        {
            assert_eq!(url(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn references_are_resolved_against_where_they_stand() {
        let base = Url::parse("http://10.0.0.1:49000/igd/desc.xml?x=1").unwrap();
        let joined = |reference: &str| base.join(reference).map(|url| (url.port, url.path));
        assert_eq!(joined("/ctl/IPConn"), Some((49000, "/ctl/IPConn".into())));
        assert_eq!(joined("ctl/IPConn"), Some((49000, "/igd/ctl/IPConn".into())));
        assert_eq!(joined("http://other:80/x"), Some((80, "/x".into())));
        assert_eq!(joined("ftp://other/x"), None);
    }

    #[test]
    fn a_response_is_whole_when_its_length_has_come() {
        let bytes = respond(200, "<a/>");
        for cut in 0..bytes.len() {
            assert_eq!(response(&bytes[..cut], false), Ok(None), "{cut}");
            assert_eq!(response(&bytes[..cut], true), Err(HttpError::Cut), "{cut}");
        }
        assert_eq!(response(&bytes, false), Ok(Some(Response { status: 200, body: b"<a/>".to_vec() })));
    }

    #[test]
    fn odd_servers_are_understood() {
        let bare = b"HTTP/1.0 200 OK\nSERVER: x\n\n<a/>";
        assert_eq!(response(bare, false), Ok(None), "its end is that of the connection");
        assert_eq!(response(bare, true).unwrap().unwrap().body, b"<a/>");
        let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n3;x\r\n<a/\r\n1\r\n>\r\n0\r\n\r\n";
        assert_eq!(response(chunked, false).unwrap().unwrap().body, b"<a/>");
        assert_eq!(response(&chunked[..chunked.len() - 8], false), Ok(None));
    }

    #[test]
    fn lengths_beyond_the_limit_are_refused_at_once() {
        let long = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", MAX_LEN + 1);
        assert_eq!(response(long.as_bytes(), false), Err(HttpError::TooLong));
        assert_eq!(response(&[b'a'; MAX_HEAD], false), Err(HttpError::TooLong));
        let chunk = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n";
        assert_eq!(response(chunk, false), Err(HttpError::TooLong));
    }

    #[test]
    fn our_requests_are_what_a_server_reads() {
        let host = "192.168.1.1:5000".parse().unwrap();
        let bytes = post(host, "/ctl", "urn:x#Do", "<b/>");
        let read = request(&bytes).unwrap().unwrap();
        assert_eq!((read.method, read.path, read.soap_action), ("POST", "/ctl", "urn:x#Do"));
        assert_eq!(read.body, b"<b/>");
        assert_eq!(request(&get(host, "/d.xml")).unwrap().unwrap().path, "/d.xml");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(
            head in prop::sample::select(vec![
                "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                "HTTP/1.1 500 X\nContent-Length: 9\n\n", "POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\n", "",
            ]),
            tail in vec(any::<u8>(), 0..80),
            ended in any::<bool>(),
        ) {
            let bytes = [head.as_bytes(), &tail].concat();
            let _ = (response(&bytes, ended), request(&bytes));
        }

        #[test]
        fn any_text_is_a_url_or_none(text in "(http://)?[a-z:/\\[\\]?#. 0-9é]{0,30}", reference in ".{0,20}") {
            if let Some(url) = Url::parse(&text) {
                prop_assert!(url.path.starts_with('/'));
                let _ = url.join(&reference);
            }
        }
    }
}

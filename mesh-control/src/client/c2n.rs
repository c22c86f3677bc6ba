//! Control-to-node requests: a whole HTTP/1.1 request inside a ping, answered with a whole HTTP/1.1 response.
//!
//! | path | answer |
//! |---|---|
//! | any that ends in `/echo` | 200 with the request's body |
//! | other | 400 `unknown c2n path` |

/// Answers the request in `payload`. Bytes that are no request are answered like an unknown path.
#[must_use]
pub fn answer(payload: &[u8]) -> Vec<u8> {
    match parse(payload) {
        Some((path, body)) if path.split('?').next().is_some_and(|path| path.ends_with("/echo")) => {
            response("200 OK", &body)
        }
        Some(_) | None => response("400 Bad Request", b"unknown c2n path\n"),
    }
}

fn response(status: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n");
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// The path and the body of an HTTP/1.1 request.
fn parse(payload: &[u8]) -> Option<(&str, Vec<u8>)> {
    let end = payload.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&payload[..end]).ok()?;
    let body = &payload[end + 4..];
    let mut lines = head.split("\r\n");
    let mut request = lines.next()?.split(' ');
    let (_method, path) = (request.next()?, request.next()?);
    let mut length = None;
    let mut chunked = false;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.parse::<usize>().ok()?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = value.eq_ignore_ascii_case("chunked");
        }
    }
    let body = if chunked { dechunk(body)? } else { body.get(..length.unwrap_or(0))?.to_vec() };
    Some((path, body))
}

/// Joins the chunks of RFC 9112 §7.1; trailers are ignored.
fn dechunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|window| window == b"\r\n")?;
        let size = std::str::from_utf8(&rest[..line]).ok()?.split(';').next()?.trim();
        let size = usize::from_str_radix(size, 16).ok()?;
        rest = &rest[line + 2..];
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size..)?.strip_prefix(b"\r\n")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn echo_is_answered_as_the_go_client_does() {
        let answer = answer(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc");
        let golden = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nabc";
        assert_eq!(String::from_utf8(answer).unwrap(), golden);
    }

    #[test]
    fn a_chunked_body_is_joined() {
        let request = b"POST /echo HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\n\
            Transfer-Encoding: chunked\r\n\r\na\r\nping=hello\r\n0\r\n\r\n";
        assert!(answer(request).ends_with(b"\r\n\r\nping=hello"));
    }

    #[test]
    fn other_paths_are_refused() {
        assert!(answer(b"GET /debug/prefs HTTP/1.1\r\n\r\n").starts_with(b"HTTP/1.1 400"));
        assert!(answer(b"rubbish").starts_with(b"HTTP/1.1 400"));
    }

    proptest! {
        #[test]
        fn any_payload_gets_an_answer(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(answer(&payload).starts_with(b"HTTP/1.1 "));
        }

        #[test]
        fn any_chunked_body_gets_an_answer(body in "[0-9a-f\r\n;x]{0,60}") {
            let request = format!("POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
            prop_assert!(answer(request.as_bytes()).starts_with(b"HTTP/1.1 "));
        }
    }
}

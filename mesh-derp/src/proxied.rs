//! The PROXY protocol: what a load balancer says about a client before that client's own bytes.
//!
//! A TCP proxy hides who connects. One that speaks this protocol sends a header first, in one of two forms
//! ([specification](https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt)):
//!
//! ```text
//! version 1   PROXY TCP4 203.0.113.7 192.0.2.1 51234 443\r\n       at most 107 bytes; also TCP6, and UNKNOWN …
//!
//! version 2   0D 0A 0D 0A 00 0D 0A 51 55 49 54 0A                  signature, 12 bytes
//!             version 2 (high 4 bits), command (low 4 bits)        0 = LOCAL, 1 = PROXY
//!             family (high 4 bits), transport (low 4 bits)         1 = IPv4, 2 = IPv6, 3 = Unix
//!             length u16                                           of what follows
//!             source address, destination address (4 or 16 bytes each), source port, destination port, extensions
//! ```
//!
//! Anybody could send that. It must be read from addresses of trusted proxies only, and then be there always: a header that
//! is optional lets every client behind the proxy write its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family, length.
const FIXED_LEN: usize = 16;
/// The longest header of version 1, line end included.
const MAX_V1_LEN: usize = 107;
/// The shortest: `PROXY UNKNOWN` and the line end.
const MIN_V1_LEN: usize = 15;
/// Addresses take 36 bytes, and certificates of the proxy's own clients may follow; more than this is no header.
const MAX_V2_BODY: usize = 4096;

/// Why bytes are not a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// They begin with neither signature.
    #[error("no PROXY header where a trusted proxy has to send one")]
    Missing,
    /// The text of version 1 does not follow its grammar.
    #[error("malformed PROXY header of version 1")]
    Malformed,
    /// Version 2 holds a version, command or family that does not exist.
    #[error("PROXY header of version 2 with an unknown version, command or family ({0:#04x})")]
    Unknown(u8),
    /// The length of version 2 does not fit its family, or is absurd.
    #[error("PROXY header of version 2 with a length of {0}")]
    Length(usize),
}

/// What has been found so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The header goes on for at least so many bytes, which may be read without taking any of the client's.
    Needs(usize),
    /// The header is whole. The client's address; `None` if the proxy speaks for itself or does not say.
    Done(Option<SocketAddr>),
}

/// Reads a header from `bytes`, which hold nothing else and perhaps not all of it yet.
///
/// # Errors
/// If it never will be one.
pub fn read(bytes: &[u8]) -> Result<Progress, ProxyError> {
    let v2 = bytes.iter().zip(&SIGNATURE).all(|(have, want)| have == want);
    let v1 = bytes.iter().zip(b"PROXY ").all(|(have, want)| have == want);
    match (v1, v2) {
        // No byte yet: this much every header has.
        (true, true) => Ok(Progress::Needs(MIN_V1_LEN)),
        (false, true) => read_v2(bytes),
        (true, false) => read_v1(bytes),
        (false, false) => Err(ProxyError::Missing),
    }
}

fn read_v1(bytes: &[u8]) -> Result<Progress, ProxyError> {
    let Some(line) = bytes.strip_suffix(b"\r\n") else {
        if bytes.len() >= MAX_V1_LEN || bytes.contains(&b'\n') {
            return Err(ProxyError::Malformed);
        }
        return Ok(Progress::Needs(MIN_V1_LEN.saturating_sub(bytes.len()).max(1)));
    };
    let text = std::str::from_utf8(line).map_err(|_| ProxyError::Malformed)?;
    let mut words = text.split(' ').skip(1);
    let family = words.next();
    if family == Some("UNKNOWN") {
        return Ok(Progress::Done(None));
    }
    let (Some(from), Some(_to), Some(port), Some(_to_port), None) =
        (words.next(), words.next(), words.next(), words.next(), words.next())
    else {
        return Err(ProxyError::Malformed);
    };
    let address = match family {
        Some("TCP4") => from.parse::<Ipv4Addr>().map(IpAddr::from).ok(),
        Some("TCP6") => from.parse::<Ipv6Addr>().map(IpAddr::from).ok(),
        Some(_) | None => None,
    };
    let port = Some(port).filter(|port| port.bytes().all(|b| b.is_ascii_digit())).and_then(|port| port.parse().ok());
    let (Some(address), Some(port)) = (address, port) else { return Err(ProxyError::Malformed) };
    Ok(Progress::Done(Some(canonical(address, port))))
}

fn read_v2(bytes: &[u8]) -> Result<Progress, ProxyError> {
    const IPV4: u8 = 1;
    const IPV6: u8 = 2;
    const UNIX: u8 = 3;
    let Some((fixed, body)) = bytes.split_first_chunk::<FIXED_LEN>() else {
        return Ok(Progress::Needs(FIXED_LEN - bytes.len()));
    };
    let (command, family) = (fixed[12], fixed[13] >> 4);
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    let addresses = match (command, family) {
        (0x20, _) | (0x21, 0) => 0,
        (0x21, IPV4) => 12,
        (0x21, IPV6) => 36,
        (0x21, UNIX) => 216,
        (0x21, _) => return Err(ProxyError::Unknown(fixed[13])),
        (_, _) => return Err(ProxyError::Unknown(command)),
    };
    if length < addresses || length > MAX_V2_BODY {
        return Err(ProxyError::Length(length));
    }
    if body.len() < length {
        return Ok(Progress::Needs(length - body.len()));
    }
    if body.len() > length {
        return Err(ProxyError::Length(length));
    }
    let source = match (addresses, body) {
        (12, [a, b, c, d, _, _, _, _, p, q, ..]) => {
            Some((IpAddr::from([*a, *b, *c, *d]), u16::from_be_bytes([*p, *q])))
        }
        (36, body) => body
            .first_chunk::<16>()
            .zip(body.get(32..34))
            .map(|(address, port)| (IpAddr::from(*address), u16::from_be_bytes([port[0], port[1]]))),
        (_, _) => None,
    };
    Ok(Progress::Done(source.map(|(address, port)| canonical(address, port))))
}

/// An IPv4 client is one however the proxy wrote its address: limits and access lists are kept by address.
fn canonical(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address.to_canonical(), port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, body].concat()
    }

    /// Reads as a driver does: only what surely belongs to the header. Returns what is left as well.
    fn read_from(stream: &[u8]) -> Result<(Option<SocketAddr>, &[u8]), Option<ProxyError>> {
        let mut have = 0;
        loop {
            match read(&stream[..have]).map_err(Some)? {
                Progress::Done(source) => return Ok((source, &stream[have..])),
                Progress::Needs(more) if have + more <= stream.len() => have += more,
                Progress::Needs(_) => return Err(None),
            }
        }
    }

    #[test]
    fn both_versions_name_the_client_and_leave_its_bytes_alone() {
        let ipv4 = Some("203.0.113.7:51234".parse().unwrap());
        let ipv6 = Some("[2001:db8::7]:51234".parse().unwrap());
        let [high, low] = 51234u16.to_be_bytes();
        let four = [203, 0, 113, 7, 192, 0, 2, 1, high, low, 1, 187];
        let mut six = [0; 36];
        six[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
        (six[15], six[32], six[33]) = (7, high, low);
        let with_extension = [&four[..], &[0x04, 0, 2, 0, 0]].concat();
        for (header, source) in [
            (b"PROXY TCP4 203.0.113.7 192.0.2.1 51234 443\r\n".to_vec(), ipv4),
            (b"PROXY TCP6 2001:db8::7 2001:db8::1 51234 443\r\n".to_vec(), ipv6),
            (b"PROXY TCP6 ::ffff:203.0.113.7 ::1 51234 443\r\n".to_vec(), ipv4),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n".to_vec(), None),
            (v2(0x21, 0x11, &four), ipv4),
            (v2(0x21, 0x11, &with_extension), ipv4),
            (v2(0x21, 0x21, &six), ipv6),
            (v2(0x21, 0x31, &[0; 216]), None),
            (v2(0x20, 0x00, &[]), None),
            (v2(0x20, 0x11, &four), None),
            (v2(0x21, 0x00, &[]), None),
        ] {
            let stream = [&header[..], b"\x16\x03\x01 hello"].concat();
            assert_eq!(read_from(&stream), Ok((source, &b"\x16\x03\x01 hello"[..])), "{header:?}");
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        for (stream, error) in [
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), ProxyError::Missing),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\x00\x00\x00".to_vec(), ProxyError::Missing),
            (b"PROXY TCP4 203.0.113.7 192.0.2.1 51234\r\n".to_vec(), ProxyError::Malformed),
            (b"PROXY TCP4 203.0.113.7 192.0.2.1 51234 443 \r\n".to_vec(), ProxyError::Malformed),
            (b"PROXY TCP4 2001:db8::7 192.0.2.1 51234 443\r\n".to_vec(), ProxyError::Malformed),
            (b"PROXY TCP4 203.0.113.7 192.0.2.1 +5123 443\r\n".to_vec(), ProxyError::Malformed),
            (b"PROXY UDP4 203.0.113.7 192.0.2.1 51234 443\r\n".to_vec(), ProxyError::Malformed),
            ([b"PROXY TCP6 ", &[b'1'; 120][..], b"\r\n"].concat(), ProxyError::Malformed),
            (v2(0x21, 0x11, &[0; 11]), ProxyError::Length(11)),
            (v2(0x21, 0x41, &[0; 40]), ProxyError::Unknown(0x41)),
            (v2(0x11, 0x11, &[0; 12]), ProxyError::Unknown(0x11)),
            (v2(0x21, 0x11, &[0; 5000]), ProxyError::Length(5000)),
        ] {
            assert_eq!(read_from(&stream), Err(Some(error)), "{:?}", String::from_utf8_lossy(&stream));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(
            start in prop_oneof![Just(vec![]), Just(b"PROXY ".to_vec()), Just(SIGNATURE.to_vec()), Just(v2(0x21, 0x11, &[]))],
            rest in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let stream = [start, rest].concat();
            let _ = read(&stream);
            if let Ok((_, left)) = read_from(&stream) {
                prop_assert!(left.len() < stream.len());
            }
        }

        #[test]
        fn an_address_survives_both_versions(source: SocketAddr) {
            let source = canonical(source.ip(), source.port());
            let (name, family, mut body) = match source.ip() {
                IpAddr::V4(ip) => ("TCP4", 0x11, ip.octets().repeat(2)),
                IpAddr::V6(ip) => ("TCP6", 0x21, ip.octets().repeat(2)),
            };
            let text = format!("PROXY {name} {ip} {ip} {} 443\r\n", source.port(), ip = source.ip());
            prop_assert_eq!(read_from(text.as_bytes()), Ok((Some(source), &b""[..])));
            body.extend(source.port().to_be_bytes().repeat(2));
            let header = v2(0x21, family, &body);
            prop_assert_eq!(read_from(&header), Ok((Some(source), &b""[..])));
        }
    }
}

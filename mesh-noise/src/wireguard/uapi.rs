//! The configuration protocol that `wg` speaks with userspace implementations.
//!
//! The [specification](https://www.wireguard.com/xplatform/#configuration-protocol): lines `key=value` over a stream
//! socket, an empty line ends a request. Keys are 64 lower-case hexadecimal digits.
//!
//! | request | answer |
//! |---|---|
//! | `get=1` | what is set, and what happens, as lines; then `errno=0` |
//! | `set=1`, settings | `errno=0`, or the negative number of an error |
//!
//! A request first has the interface's settings, then for each peer `public_key` and what is to change about it:
//!
//! | key | value | of |
//! |---|---|---|
//! | `private_key` | key; all zero removes it | interface |
//! | `listen_port` | 0 lets the system choose | interface |
//! | `fwmark` | 0 is none | interface |
//! | `replace_peers` | `true`: forget all others | interface |
//! | `public_key` | key; the following lines are about this peer | peer |
//! | `remove` | `true` | peer |
//! | `update_only` | `true`: not if the peer is new | peer |
//! | `preshared_key` | key; all zero is none | peer |
//! | `endpoint` | `192.0.2.1:51820` or `[2001:db8::1]:51820` | peer |
//! | `persistent_keepalive_interval` | seconds; 0 is off | peer |
//! | `replace_allowed_ips` | `true`: forget all others | peer |
//! | `allowed_ip` | prefix; `-` before it takes it away | peer |
//! | `protocol_version` | 1 | peer |
//!
//! [`Decoder`] turns bytes into [`Request`]s, [`DeviceState::to_answer`] writes the answer to a get.

use std::fmt;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use zeroize::{Zeroize, Zeroizing};

use crate::key::{NodePrivate, NodePublic, PresharedKey};

/// The longest request: some fifty thousand peers.
const MAX_REQUEST: usize = 16 << 20;

/// Why a request was refused. The answer carries [`UapiError::errno`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UapiError {
    /// The first line is neither `get=1` nor `set=1`.
    #[error("the request is neither get=1 nor set=1")]
    UnknownRequest,
    /// A line without `=`.
    #[error("line {line} is not key=value")]
    NotKeyValue {
        /// Counted from 1.
        line: usize,
    },
    /// A key that does not belong here.
    #[error("line {line}: unknown key \"{key}\"")]
    UnknownKey {
        /// Counted from 1.
        line: usize,
        /// The key.
        key: String,
    },
    /// A value that does not fit its key. Values may be secret, so it is not repeated.
    #[error("line {line}: the value of {key} is malformed")]
    BadValue {
        /// Counted from 1.
        line: usize,
        /// The key.
        key: String,
    },
    /// The request does not end.
    #[error("the request is longer than {MAX_REQUEST} bytes")]
    TooLong,
    /// What was asked for cannot be had from the system.
    #[error("{0}")]
    System(String, i32),
}

impl UapiError {
    /// The number that belongs into the answer: negative, as the kernel has them.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::UnknownRequest | Self::NotKeyValue { .. } => -71,
            Self::UnknownKey { .. } | Self::BadValue { .. } => -22,
            Self::TooLong => -7,
            Self::System(_, errno) => -errno.abs(),
        }
    }
}

/// The answer to a `set`, and to whatever could not be read.
#[must_use]
pub fn status(outcome: Result<(), &UapiError>) -> String {
    format!("errno={}\n\n", outcome.err().map_or(0, UapiError::errno))
}

/// What a client asks for.
#[derive(Debug)]
pub enum Request {
    /// Everything that is set and counted.
    Get,
    /// Changes.
    Set(Settings),
}

/// Changes to an interface. What is none stays as it is.
#[derive(Debug, Default)]
pub struct Settings {
    /// The private key; `Some(None)` removes it.
    pub private_key: Option<Option<NodePrivate>>,
    /// The UDP port; 0 lets the system choose.
    pub listen_port: Option<u16>,
    /// The mark on outgoing datagrams; 0 is none.
    pub fwmark: Option<u32>,
    /// Whether peers that are not named go.
    pub replace_peers: bool,
    /// Changes to peers, in order.
    pub peers: Vec<PeerSettings>,
}

/// Changes to a peer. What is none stays as it is.
#[derive(Debug)]
pub struct PeerSettings {
    /// Which peer.
    pub public_key: NodePublic,
    /// Whether it goes.
    pub remove: bool,
    /// Whether nothing happens if there is no such peer yet.
    pub update_only: bool,
    /// All zero is none.
    pub preshared_key: Option<PresharedKey>,
    /// Where it is.
    pub endpoint: Option<SocketAddr>,
    /// Zero is off.
    pub persistent_keepalive: Option<Duration>,
    /// Whether prefixes that are not named go.
    pub replace_allowed_ips: bool,
    /// Prefixes that it gets or loses, in order.
    pub allowed_ips: Vec<AllowedIpChange>,
}

/// A change to what a peer may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllowedIpChange {
    /// The prefix is this peer's, and no other's.
    Add(IpNet),
    /// The prefix is not this peer's any more.
    Remove(IpNet),
}

impl PeerSettings {
    /// No change to this peer.
    #[must_use]
    pub fn new(public_key: NodePublic) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// Cuts a stream of bytes into requests.
#[derive(Default)]
pub struct Decoder {
    /// May hold keys: wiped when done with.
    bytes: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").field("waiting", &self.bytes.len()).finish()
    }
}

impl Decoder {
    /// Takes bytes in the order in which they arrive.
    pub fn push(&mut self, bytes: &[u8]) {
        // A growing vector leaves copies of keys behind in freed memory.
        if self.bytes.capacity() - self.bytes.len() < bytes.len() {
            let mut larger = Vec::with_capacity((self.bytes.len() + bytes.len()).next_power_of_two().max(4096));
            larger.extend_from_slice(&self.bytes);
            self.bytes = Zeroizing::new(larger);
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole request, if it has arrived. After an error the stream is of no use.
    ///
    /// # Errors
    /// Says what is wrong with the request; it has been taken from the stream.
    pub fn next_request(&mut self) -> Result<Option<Request>, UapiError> {
        let Some(end) = self.bytes.windows(2).position(|pair| pair == b"\n\n") else {
            return if self.bytes.len() > MAX_REQUEST { Err(UapiError::TooLong) } else { Ok(None) };
        };
        let request = std::str::from_utf8(&self.bytes[..end])
            .map_err(|_| UapiError::NotKeyValue { line: 1 })
            .and_then(Request::from_str);
        let mut rest = Zeroizing::new(self.bytes[end + 2..].to_vec());
        std::mem::swap(&mut self.bytes, &mut rest);
        rest.zeroize();
        request.map(Some)
    }
}

impl FromStr for Request {
    type Err = UapiError;

    fn from_str(text: &str) -> Result<Self, UapiError> {
        let mut lines = (1..).zip(text.lines());
        match lines.next() {
            Some((_, "get=1")) => Ok(Self::Get),
            Some((_, "set=1")) => {
                let mut settings = Settings::default();
                for (line, text) in lines {
                    let (key, value) = text.split_once('=').ok_or(UapiError::NotKeyValue { line })?;
                    let applied = match settings.peers.last_mut() {
                        Some(peer) if key != "public_key" => peer.apply(key, value),
                        _ => settings.apply(key, value),
                    };
                    match applied {
                        Applied::Yes => {}
                        Applied::BadValue => return Err(UapiError::BadValue { line, key: key.into() }),
                        Applied::UnknownKey => return Err(UapiError::UnknownKey { line, key: key.into() }),
                    }
                }
                Ok(Self::Set(settings))
            }
            Some(_) | None => Err(UapiError::UnknownRequest),
        }
    }
}

/// What became of one line.
enum Applied {
    Yes,
    BadValue,
    UnknownKey,
}

impl Applied {
    fn set<T>(place: &mut T, value: Option<T>) -> Self {
        match value {
            Some(value) => {
                *place = value;
                Self::Yes
            }
            None => Self::BadValue,
        }
    }
}

fn key(value: &str) -> Option<Zeroizing<[u8; 32]>> {
    let mut bytes = Zeroizing::new([0; 32]);
    hex::decode_to_slice(value, &mut *bytes).ok()?;
    Some(bytes)
}

fn truth(value: &str) -> Option<bool> {
    match value {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

fn prefix(value: &str) -> Option<IpNet> {
    value.parse().ok().or_else(|| value.parse::<IpAddr>().ok().map(IpNet::from)).map(|prefix| prefix.trunc())
}

impl Settings {
    fn apply(&mut self, name: &str, value: &str) -> Applied {
        match name {
            "private_key" => Applied::set(
                &mut self.private_key,
                key(value).map(|key| Some((*key != [0; 32]).then(|| NodePrivate::from_bytes(*key)))),
            ),
            "listen_port" => Applied::set(&mut self.listen_port, value.parse().ok().map(Some)),
            "fwmark" => Applied::set(&mut self.fwmark, value.parse().ok().map(Some)),
            "replace_peers" => Applied::set(&mut self.replace_peers, truth(value)),
            "public_key" => match key(value) {
                Some(key) => {
                    self.peers.push(PeerSettings::new(NodePublic::from_bytes(*key)));
                    Applied::Yes
                }
                None => Applied::BadValue,
            },
            _ => Applied::UnknownKey,
        }
    }
}

impl PeerSettings {
    fn apply(&mut self, name: &str, value: &str) -> Applied {
        match name {
            "remove" => Applied::set(&mut self.remove, truth(value)),
            "update_only" => Applied::set(&mut self.update_only, truth(value)),
            "preshared_key" => {
                Applied::set(&mut self.preshared_key, key(value).map(|key| Some(PresharedKey::from_bytes(*key))))
            }
            "endpoint" => Applied::set(&mut self.endpoint, value.parse().ok().map(Some)),
            "persistent_keepalive_interval" => {
                let seconds = value.parse::<u16>().ok();
                let interval = seconds.map(|seconds| Some(Duration::from_secs(seconds.into())));
                Applied::set(&mut self.persistent_keepalive, interval)
            }
            "replace_allowed_ips" => Applied::set(&mut self.replace_allowed_ips, truth(value)),
            "allowed_ip" => {
                let change = match value.strip_prefix('-') {
                    Some(value) => prefix(value).map(AllowedIpChange::Remove),
                    None => prefix(value.strip_prefix('+').unwrap_or(value)).map(AllowedIpChange::Add),
                };
                self.allowed_ips.extend(change);
                if change.is_some() { Applied::Yes } else { Applied::BadValue }
            }
            "protocol_version" if value == "1" => Applied::Yes,
            "protocol_version" => Applied::BadValue,
            _ => Applied::UnknownKey,
        }
    }
}

/// What an interface tells about itself.
#[derive(Debug, Clone, Default)]
pub struct DeviceState {
    /// The private key, if one is set.
    pub private_key: Option<NodePrivate>,
    /// The UDP port in use; 0 if none.
    pub listen_port: u16,
    /// The mark; 0 is none.
    pub fwmark: u32,
    /// The peers.
    pub peers: Vec<PeerState>,
}

/// What an interface tells about a peer.
#[derive(Debug, Clone)]
pub struct PeerState {
    /// Its key.
    pub public_key: NodePublic,
    /// All zero is none.
    pub preshared_key: PresharedKey,
    /// Where it was last heard, or what was set.
    pub endpoint: Option<SocketAddr>,
    /// When the last handshake was completed.
    pub last_handshake: Option<SystemTime>,
    /// Bytes sent to it.
    pub tx_bytes: u64,
    /// Bytes received from it.
    pub rx_bytes: u64,
    /// None is off.
    pub persistent_keepalive: Option<Duration>,
    /// Its prefixes.
    pub allowed_ips: Vec<IpNet>,
}

impl DeviceState {
    /// The answer to a get, with its closing `errno=0`. It holds the private key.
    #[must_use]
    pub fn to_answer(&self) -> Zeroizing<String> {
        // Written into memory that is large enough from the start, so that no copy of a key stays behind.
        let size = 256 + self.peers.iter().map(|peer| 512 + 64 * peer.allowed_ips.len()).sum::<usize>();
        let mut text = Zeroizing::new(String::with_capacity(size));
        let out = &mut *text;
        if let Some(key) = &self.private_key {
            line_hex(out, "private_key", key.expose_secret());
        }
        line(out, "listen_port", self.listen_port);
        if self.fwmark != 0 {
            line(out, "fwmark", self.fwmark);
        }
        for peer in &self.peers {
            peer.write(out);
        }
        line(out, "errno", 0);
        out.push('\n');
        text
    }
}

impl PeerState {
    fn write(&self, out: &mut String) {
        line_hex(out, "public_key", self.public_key.as_bytes());
        line_hex(out, "preshared_key", self.preshared_key.expose_secret());
        line(out, "protocol_version", 1);
        if let Some(endpoint) = self.endpoint {
            line(out, "endpoint", endpoint);
        }
        let handshake = self.last_handshake.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        line(out, "last_handshake_time_sec", handshake.as_secs());
        line(out, "last_handshake_time_nsec", handshake.subsec_nanos());
        line(out, "tx_bytes", self.tx_bytes);
        line(out, "rx_bytes", self.rx_bytes);
        line(out, "persistent_keepalive_interval", self.persistent_keepalive.unwrap_or_default().as_secs());
        for prefix in &self.allowed_ips {
            line(out, "allowed_ip", prefix);
        }
    }
}

fn line(out: &mut String, key: &str, value: impl std::fmt::Display) {
    writeln!(out, "{key}={value}").expect("writing into memory does not fail");
}

fn line_hex(out: &mut String, key: &str, bytes: &[u8; 32]) {
    let mut digits = Zeroizing::new([0; 64]);
    hex::encode_to_slice(bytes, &mut *digits).expect("64 digits for 32 bytes");
    line(out, key, std::str::from_utf8(&*digits).expect("digits are text"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXAMPLE: &str = "set=1
private_key=e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a
fwmark=51820
listen_port=12912
replace_peers=true
public_key=b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33
preshared_key=188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52
replace_allowed_ips=true
allowed_ip=192.168.4.4/32
allowed_ip=10.1.2.3/8
endpoint=[abcd:23::33]:51820
public_key=58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376
remove=true
public_key=662e14fd594556f522604703340351258903b64f35553763f19426ab2a515c58
update_only=true
allowed_ip=fd00::/8
allowed_ip=-192.0.2.7
endpoint=5.152.198.39:51820
persistent_keepalive_interval=111

";

    fn settings(text: &str) -> Result<Settings, UapiError> {
        let mut decoder = Decoder::default();
        decoder.push(text.as_bytes());
        match decoder.next_request()?.expect("a whole request") {
            Request::Set(settings) => Ok(settings),
            Request::Get => panic!("a set"),
        }
    }

    #[test]
    fn settings_are_read_in_order() {
        let settings = settings(EXAMPLE).unwrap();
        assert_eq!((settings.listen_port, settings.fwmark, settings.replace_peers), (Some(12912), Some(51820), true));
        assert_eq!(settings.private_key.unwrap().unwrap().expose_secret()[0], 0xe8);
        let [first, second, third] = &settings.peers[..] else { panic!("three peers") };
        assert_eq!(first.endpoint, Some("[abcd:23::33]:51820".parse().unwrap()));
        assert!(first.replace_allowed_ips && first.preshared_key.is_some() && !first.remove);
        assert_eq!(first.allowed_ips[1], AllowedIpChange::Add("10.0.0.0/8".parse().unwrap()), "host bits are cut");
        assert!(second.remove && second.endpoint.is_none());
        assert!(third.update_only);
        assert_eq!(third.allowed_ips[1], AllowedIpChange::Remove("192.0.2.7/32".parse().unwrap()));
        assert_eq!(third.persistent_keepalive, Some(Duration::from_secs(111)));
    }

    #[test]
    fn a_zero_private_key_removes_it() {
        let settings = settings(&format!("set=1\nprivate_key={}\n\n", "0".repeat(64))).unwrap();
        assert!(matches!(settings.private_key, Some(None)));
    }

    #[test]
    fn errors_name_the_line_and_never_the_value() {
        for (text, expected, errno) in [
            ("bet=1\n\n", UapiError::UnknownRequest, -71),
            ("set=1\nprivate_key\n\n", UapiError::NotKeyValue { line: 2 }, -71),
            ("set=1\nprivate_key=secret\n\n", UapiError::BadValue { line: 2, key: "private_key".into() }, -22),
            ("set=1\nlisten_port=65536\n\n", UapiError::BadValue { line: 2, key: "listen_port".into() }, -22),
            ("set=1\nendpoint=1.2.3.4:5\n\n", UapiError::UnknownKey { line: 2, key: "endpoint".into() }, -22),
        ] {
            let error = settings(text).unwrap_err();
            assert!(!error.to_string().contains("secret"));
            assert_eq!((error.errno(), error), (errno, expected), "{text:?}");
        }
        assert_eq!(status(Ok(())), "errno=0\n\n");
        assert_eq!(status(Err(&UapiError::System("no".into(), 98))), "errno=-98\n\n");
    }

    #[test]
    fn requests_arrive_in_pieces_and_in_heaps() {
        let stream = format!("get=1\n\n{EXAMPLE}get=1\n\n");
        let (mut decoder, mut requests) = (Decoder::default(), 0);
        for byte in stream.bytes() {
            decoder.push(&[byte]);
            while let Some(request) = decoder.next_request().unwrap() {
                assert_eq!(matches!(request, Request::Get), requests != 1);
                requests += 1;
            }
        }
        decoder.push(stream.as_bytes());
        while decoder.next_request().unwrap().is_some() {
            requests += 1;
        }
        assert_eq!(requests, 6);
        decoder.push(&vec![b'a'; MAX_REQUEST + 1]);
        assert_eq!(decoder.next_request().unwrap_err(), UapiError::TooLong);
    }

    #[test]
    fn the_answer_has_every_line() {
        let state = DeviceState {
            private_key: Some(NodePrivate::from_bytes([0xab; 32])),
            listen_port: 51820,
            fwmark: 7,
            peers: vec![PeerState {
                public_key: NodePublic::from_bytes([0xcd; 32]),
                preshared_key: PresharedKey::default(),
                endpoint: Some("[2001:db8::1]:5".parse().unwrap()),
                last_handshake: Some(UNIX_EPOCH + Duration::new(3, 9)),
                tx_bytes: 1,
                rx_bytes: 2,
                persistent_keepalive: Some(Duration::from_secs(25)),
                allowed_ips: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
            }],
        };
        let expected = format!(
            "private_key={}\nlisten_port=51820\nfwmark=7\npublic_key={}\npreshared_key={}\nprotocol_version=1\n\
             endpoint=[2001:db8::1]:5\nlast_handshake_time_sec=3\nlast_handshake_time_nsec=9\ntx_bytes=1\nrx_bytes=2\n\
             persistent_keepalive_interval=25\nallowed_ip=10.0.0.0/8\nallowed_ip=fd00::/8\nerrno=0\n\n",
            "ab".repeat(32),
            "cd".repeat(32),
            "00".repeat(32)
        );
        assert_eq!(*state.to_answer(), expected);
        let capacity = state.to_answer().capacity();
        assert!(capacity >= 256 && state.to_answer().len() < 512 + 256 + 128, "no reallocation");
    }

    proptest! {
        #[test]
        fn the_decoder_survives_any_text(text in "(set=1\n|get=1\n)?([a-z_]{0,30}=[0-9a-f.:/-]{0,70}\n){0,6}\n?") {
            let mut decoder = Decoder::default();
            decoder.push(text.as_bytes());
            let _ = decoder.next_request();
        }

        #[test]
        fn the_decoder_survives_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            decoder.push(b"\n\n");
            let _ = decoder.next_request();
        }
    }
}

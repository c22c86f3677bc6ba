//! Which HTTP proxy to go through, and what to say to it, without any I/O.
//!
//! A proxy is asked for a tunnel to a relay by its name (`CONNECT`, RFC 9110 §9.3.6); TLS then runs inside:
//!
//! ```text
//! CONNECT relay.example:443 HTTP/1.1          HTTP/1.1 200 Connection established
//! Host: relay.example:443
//! [Proxy-Authorization: Basic …]
//! ```
//!
//! | variable | |
//! |---|---|
//! | `HTTPS_PROXY`, `https_proxy`, else `ALL_PROXY`, `all_proxy` | `http://` or `https://`, `[user:password@]host[:port]`; without a scheme, `http://` |
//! | `NO_PROXY`, `no_proxy` | whom to reach directly, separated by commas: see [`Proxies::through_except`] |
//!
//! Names such as `localhost` and addresses such as 127.0.0.1 are always reached directly when the proxy comes from the
//! environment.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::map::{DerpNode, FamilyAddress};

/// Why a proxy's URL cannot be used. Says nothing of what stands in front of the `@`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// Not a scheme we speak.
    #[error("proxies of kind \"{0}\" are not supported; give one that begins with http:// or https://")]
    Scheme(String),
    /// No host, or a port that is none.
    #[error("a proxy's URL has the form http://[user:password@]host[:port]")]
    Malformed,
    /// A variable of the environment does not name a proxy.
    #[error("{variable}: {reason}")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// What is wrong.
        reason: Box<ProxyError>,
    },
}

/// An HTTP proxy. Its user name and password are never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    tls: bool,
    host: String,
    port: u16,
    /// What goes behind `Basic`.
    login: Option<String>,
}

impl Proxy {
    /// Whether the proxy itself is spoken to over TLS.
    #[must_use]
    pub const fn is_tls(&self) -> bool {
        self.tls
    }

    /// Its name or address, without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its TCP port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Whether its URL holds a user name.
    #[must_use]
    pub const fn has_login(&self) -> bool {
        self.login.is_some()
    }

    /// The request for a tunnel to a relay.
    #[must_use]
    pub fn request(&self, host: &str, port: u16) -> Vec<u8> {
        let to = authority(host, port);
        let mut text = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n");
        if let Some(login) = &self.login {
            text.push_str(&format!("Proxy-Authorization: Basic {login}\r\n"));
        }
        text.push_str("\r\n");
        text.into_bytes()
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}", authority(&self.host, self.port))
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({self})")
    }
}

impl FromStr for Proxy {
    type Err = ProxyError;

    fn from_str(url: &str) -> Result<Self, ProxyError> {
        let (scheme, rest) = url.trim().split_once("://").unwrap_or(("http", url.trim()));
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err(ProxyError::Scheme(scheme.to_owned())),
        };
        let rest = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (login, place) = match rest.rsplit_once('@') {
            Some((login, place)) => (Some(login), place),
            None => (None, rest),
        };
        let (host, port) = split_port(place).ok_or(ProxyError::Malformed)?;
        if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(ProxyError::Malformed);
        }
        let login = login.map(|login| {
            let (user, password) = login.split_once(':').unwrap_or((login, ""));
            let text = [&percent_decoded(user)[..], b":", &percent_decoded(password)].concat();
            STANDARD.encode(text)
        });
        Ok(Self { tls, host: host.to_owned(), port: port.unwrap_or(if tls { 443 } else { 80 }), login })
    }
}

/// Host and port as HTTP writes them.
fn authority(host: &str, port: u16) -> String {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if bare.contains(':') { format!("[{bare}]:{port}") } else { format!("{bare}:{port}") }
}

/// The host without brackets, and the port if there is one; `None` if the port is no number.
fn split_port(text: &str) -> Option<(&str, Option<u16>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        return match rest.strip_prefix(':') {
            Some(port) => Some((host, Some(port.parse().ok()?))),
            None => rest.is_empty().then_some((host, None)),
        };
    }
    match text.split_once(':') {
        Some((_, rest)) if rest.contains(':') => Some((text, None)),
        Some((host, port)) => Some((host, Some(port.parse().ok()?))),
        None => Some((text, None)),
    }
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let (bytes, mut decoded, mut at) = (text.as_bytes(), Vec::with_capacity(text.len()), 0);
    while let Some(byte) = bytes.get(at) {
        let hex = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        let code = hex.filter(|hex| !hex.starts_with('+')).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code.filter(|_| *byte == b'%') {
            Some(code) => {
                decoded.push(code);
                at += 3;
            }
            None => {
                decoded.push(*byte);
                at += 1;
            }
        }
    }
    decoded
}

/// Whom to reach directly.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Everything,
    /// A name and all names below it; names below it only, if so written.
    Name {
        name: String,
        itself: bool,
    },
    Network {
        address: IpAddr,
        bits: u8,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Exception {
    place: Place,
    port: Option<u16>,
}

impl Exception {
    fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self { place: Place::Everything, port: None });
        }
        if let Some((address, bits)) = text.split_once('/') {
            let (address, bits) = (address.parse::<IpAddr>().ok()?, bits.parse().ok()?);
            let most = if address.is_ipv4() { 32 } else { 128 };
            return (bits <= most).then_some(Self { place: Place::Network { address, bits }, port: None });
        }
        let (host, port) = split_port(text)?;
        let place = match host.parse::<IpAddr>() {
            Ok(address) => Place::Network { address, bits: if address.is_ipv4() { 32 } else { 128 } },
            Err(_) => {
                let name = host.strip_prefix("*.").or_else(|| host.strip_prefix('.'));
                let itself = name.is_none();
                Place::Name { name: name.unwrap_or(host).trim_end_matches('.').to_ascii_lowercase(), itself }
            }
        };
        Some(Self { place, port })
    }

    fn covers(&self, host: &str, addresses: &[IpAddr], port: u16) -> bool {
        if self.port.is_some_and(|only| only != port) {
            return false;
        }
        match &self.place {
            Place::Everything => true,
            Place::Name { name, itself } => match host.strip_suffix(name.as_str()) {
                Some("") => *itself,
                Some(above) => above.ends_with('.'),
                None => false,
            },
            Place::Network { address, bits } => addresses.iter().any(|other| within(*other, *address, *bits)),
        }
    }
}

fn within(address: IpAddr, network: IpAddr, bits: u8) -> bool {
    let (differing, len) = match (address.to_canonical(), network.to_canonical()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits() ^ b.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits(), 128),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
    };
    differing.checked_shr(len - u32::from(bits).min(len)).unwrap_or(0) == 0
}

/// Through which proxy each relay is reached, if any. Cheap enough to clone for each connection.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Proxies {
    proxy: Option<Proxy>,
    except: Vec<Exception>,
    spare_loopback: bool,
}

impl Proxies {
    /// None: every relay is reached directly.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Every relay through this proxy.
    #[must_use]
    pub const fn through(proxy: Proxy) -> Self {
        Self { proxy: Some(proxy), except: Vec::new(), spare_loopback: false }
    }

    /// Every relay through this proxy, except those that `except` names: names (`example.com` and all below it,
    /// `.example.com` those below it only), addresses, networks such as `10.0.0.0/8` or `fd00::/8`, each but networks with
    /// a port if only that is meant; separated by commas or spaces; or `*`, everything. A relay is in a network if its name
    /// is an address in it, or the DERP map gives it one. What is none of these is left out.
    #[must_use]
    pub fn through_except(proxy: Proxy, except: &str) -> Self {
        let texts = except.split([',', ' ', '\t', '\n']).filter(|text| !text.is_empty());
        Self { except: texts.filter_map(Exception::parse).collect(), ..Self::through(proxy) }
    }

    /// What the environment says. See the [module doc](self).
    ///
    /// # Errors
    /// If it names a proxy that cannot be used.
    pub fn from_environment() -> Result<Self, ProxyError> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// What these variables say: `variable` returns the value of a name.
    ///
    /// # Errors
    /// If they name a proxy that cannot be used.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, ProxyError> {
        let set = |name: &'static str| Some((name, variable(name).filter(|value| !value.trim().is_empty())?));
        let names = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
        let Some((name, url)) = names.into_iter().find_map(set) else { return Ok(Self::none()) };
        let proxy: Proxy =
            url.parse().map_err(|reason| ProxyError::Variable { variable: name, reason: Box::new(reason) })?;
        let except = ["NO_PROXY", "no_proxy"].into_iter().find_map(set);
        let proxies = Self::through_except(proxy, except.as_ref().map_or("", |(_, value)| value));
        Ok(Self { spare_loopback: true, ..proxies })
    }

    /// The proxy through which to reach this relay; `None` means directly.
    #[must_use]
    pub fn for_node(&self, node: &DerpNode) -> Option<&Proxy> {
        let proxy = self.proxy.as_ref()?;
        let host =
            node.host_name.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.').to_ascii_lowercase();
        let mut addresses: Vec<IpAddr> = host.parse().into_iter().collect();
        if let FamilyAddress::At(ip) = node.v4() {
            addresses.push(ip.into());
        }
        if let FamilyAddress::At(ip) = node.v6() {
            addresses.push(ip.into());
        }
        let loopback = host == "localhost" || addresses.iter().any(IpAddr::is_loopback);
        let spared = self.except.iter().any(|exception| exception.covers(&host, &addresses, node.relay_port()));
        if spared || (loopback && self.spare_loopback) { None } else { Some(proxy) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::RegionId;
    use proptest::prelude::*;

    fn node(host: &str, ipv4: &str) -> DerpNode {
        DerpNode { ipv4: ipv4.into(), ..DerpNode::new("1a", RegionId::new(1).unwrap(), host) }
    }

    #[test]
    fn urls_are_read_and_what_is_secret_is_decoded_but_never_printed() {
        let proxy: Proxy = "HTTPS://us%65r:p%40ss%3aword@[2001:db8::1]:3129/".parse().unwrap();
        assert_eq!((proxy.is_tls(), proxy.host(), proxy.port()), (true, "2001:db8::1", 3129));
        assert_eq!(format!("{proxy} {proxy:?}"), "https://[2001:db8::1]:3129 Proxy(https://[2001:db8::1]:3129)");
        let request = String::from_utf8(proxy.request("relay.example", 443)).unwrap();
        let login = STANDARD.encode("user:p@ss:word");
        let expected = format!(
            "CONNECT relay.example:443 HTTP/1.1\r\nHost: relay.example:443\r\nProxy-Authorization: Basic {login}\r\n\r\n"
        );
        assert_eq!(request, expected);
        let plain: Proxy = "proxy.example".parse().unwrap();
        assert_eq!((plain.to_string().as_str(), plain.has_login()), ("http://proxy.example:80", false));
        assert!(String::from_utf8(plain.request("::1", 3340)).unwrap().starts_with("CONNECT [::1]:3340 HTTP/1.1\r\n"));
    }

    #[test]
    fn what_is_no_proxy_is_refused_without_telling_secrets() {
        for url in ["", "http://", "http://u:secret@", "http://h:port", "http://[::1", "http://u:secret@h:99999"] {
            assert_eq!(url.parse::<Proxy>(), Err(ProxyError::Malformed), "{url}");
        }
        let vars = |name: &str| (name == "all_proxy").then(|| "socks5://u:secret@h".to_owned());
        let error = Proxies::from_variables(vars).unwrap_err().to_string();
        assert!(error.starts_with("all_proxy: proxies of kind \"socks5\"") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn the_environment_decides_and_spares_this_host() {
        let vars = |name: &str| match name {
            "HTTPS_PROXY" => Some(" ".to_owned()),
            "https_proxy" => Some("http://one:1".to_owned()),
            "ALL_PROXY" => Some("http://two:2".to_owned()),
            "NO_PROXY" => Some("internal.example".to_owned()),
            _ => None,
        };
        let proxies = Proxies::from_variables(vars).unwrap();
        let by = |host: &str, ip: &str| proxies.for_node(&node(host, ip)).map(ToString::to_string);
        assert_eq!(by("relay.example", ""), Some("http://one:1".into()));
        assert_eq!(by("derp.internal.example", ""), None);
        assert_eq!((by("localhost", ""), by("relay.example", "127.0.0.1")), (None, None));
        assert_eq!(Proxies::from_variables(|_| None), Ok(Proxies::none()));
        let explicit = Proxies::through("http://one:1".parse().unwrap());
        assert!(explicit.for_node(&node("localhost", "")).is_some(), "who names a proxy means it");
    }

    #[test]
    fn exceptions_are_names_addresses_networks_and_ports() {
        let except =
            "example.com, .only-below.org *.star.org,192.0.2.0/24,[2001:db8::1]:444,h:8443,10.1.2.3,fd00::/8,:,1/99";
        let proxies = Proxies::through_except("p".parse().unwrap(), except);
        let direct = |host: &str, ip: &str, port: u16| {
            proxies.for_node(&DerpNode { derp_port: port, ..node(host, ip) }).is_none()
        };
        for (host, ip) in [
            ("example.com", ""),
            ("A.Example.COM.", ""),
            ("a.only-below.org", ""),
            ("b.star.org", ""),
            ("192.0.2.200", ""),
            ("named.example", "192.0.2.1"),
            ("10.1.2.3", ""),
            ("fd12::1", ""),
        ] {
            assert!(direct(host, ip, 0), "{host}");
        }
        for (host, ip) in [
            ("notexample.com", ""),
            ("only-below.org", ""),
            ("192.0.3.1", ""),
            ("h", ""),
            ("2001:db8::1", ""),
            ("fe80::1", ""),
        ] {
            assert!(!direct(host, ip, 0), "{host}");
        }
        assert!(direct("h", "", 8443) && direct("2001:db8::1", "", 444));
        assert!(Proxies::through_except("p".parse().unwrap(), "*").for_node(&node("x", "")).is_none());
    }

    proptest! {
        #[test]
        fn any_text_is_a_proxy_and_a_list_or_neither(url in ".{0,40}", except in ".{0,60}", host in ".{0,30}") {
            if let Ok(proxy) = url.parse::<Proxy>() {
                let request = proxy.request(&host, 1);
                prop_assert!(request.ends_with(b"\r\n\r\n"));
                let _ = Proxies::through_except(proxy, &except).for_node(&node(&host, &url));
            }
        }
    }
}

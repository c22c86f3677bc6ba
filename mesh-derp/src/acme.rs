//! A server's certificate from a public authority (ACME, RFC 8555): what to ask for, and when.
//!
//! # The life of a certificate
//! Without one that it may show, a server asks at once, and shows one of its own making meanwhile, so that the port
//! answers. A certificate is renewed at two thirds of its lifetime, be that ninety days or six, a little earlier by
//! chance, so that servers that started together do not ask together. The old one is shown until the new one is there.
//! What goes wrong is tried again, ever less often ([`Renewal`]).
//!
//! # Proving a name
//! | challenge | where the authority looks | needs |
//! |---|---|---|
//! | TLS-ALPN-01 (RFC 8737) | port 443 | the TLS listener to be reachable there |
//! | HTTP-01 (RFC 8555 §8.3) | port 80 | a listener there, plain HTTP |
//!
//! Each order tries one of them; when the authority does not accept it, the next order tries the other. Which comes
//! first follows from the ports listened on ([`challenges`]). Every listener answers both.
//!
//! # Files in the state directory
//! | file | holds | written |
//! |---|---|---|
//! | `acme-account.json` | the account's key, its address at the authority, the authority's directory | when an account is made |
//! | `acme.pem` | a comment with the directory's URL, the chain, its key | when a certificate is issued |
//!
//! Both are their owner's alone, and are written whole or not at all. A kept certificate is asked for anew when it lacks a
//! name or comes from another directory.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use rustls::pki_types::DnsName;

mod renewal;

pub use renewal::{Failure, Renewal};

/// The directory of Let's Encrypt.
pub const LETS_ENCRYPT: &str = "https://acme-v02.api.letsencrypt.org/directory";

/// What to ask of which authority. [`Settings::new`] gives the defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// What the certificate is for. At least one; the first is the server's name.
    pub names: Vec<Name>,
    /// The URL of the authority's directory. Default [`LETS_ENCRYPT`].
    pub directory: String,
    /// Where the authority may write to. Default nowhere.
    pub email: Option<String>,
    /// Further certificates (PEM) to trust when talking to the authority. Default none.
    pub ca_file: Option<PathBuf>,
    /// Whether the operator agrees to the authority's terms of service. Most authorities demand it. Default no.
    pub agree_to_terms: bool,
    /// The only challenge to use. Default: see [`challenges`].
    pub challenge: Option<Challenge>,
}

impl Settings {
    /// A certificate for `names` from Let's Encrypt.
    #[must_use]
    pub fn new(names: Vec<Name>) -> Self {
        let directory = LETS_ENCRYPT.to_owned();
        Self { names, directory, email: None, ca_file: None, agree_to_terms: false, challenge: None }
    }
}

/// What a certificate is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// A DNS name in lower case, without a wildcard.
    Dns(String),
    /// An address (RFC 8738). Few authorities certify one, and for days only.
    Address(IpAddr),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// Why nothing can be certified by that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadName {
    /// Only the DNS can prove a wildcard.
    #[error("a wildcard can be proved by DNS only, which is not supported: list the names one by one")]
    Wildcard,
    /// It is something else.
    #[error("neither a DNS name nor an address")]
    Malformed,
}

impl FromStr for Name {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        if let Ok(address) = text.trim_matches(['[', ']']).parse() {
            return Ok(Self::Address(address));
        }
        if text.starts_with("*.") {
            return Err(BadName::Wildcard);
        }
        let name = text.trim_end_matches('.').to_ascii_lowercase();
        match DnsName::try_from(name.as_str()) {
            Ok(_) if name.contains('.') => Ok(Self::Dns(name)),
            Ok(_) | Err(_) => Err(BadName::Malformed),
        }
    }
}

/// How a name is proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Challenge {
    /// By a handshake on port 443.
    TlsAlpn01,
    /// By a request on port 80.
    Http01,
}

impl fmt::Display for Challenge {
    /// As the registry of RFC 8555 §9.7.8 has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TlsAlpn01 => "tls-alpn-01",
            Self::Http01 => "http-01",
        })
    }
}

impl FromStr for Challenge {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let all = [Self::TlsAlpn01, Self::Http01];
        all.into_iter().find(|one| one.to_string() == text).ok_or("expected tls-alpn-01 or http-01")
    }
}

/// The challenges to try, in order: the chosen one; else those whose port is listened on; else both, since then something
/// in front of this host leads the ports here.
#[must_use]
pub fn challenges(chosen: Option<Challenge>, listen: &[SocketAddr]) -> Vec<Challenge> {
    if let Some(chosen) = chosen {
        return vec![chosen];
    }
    let both = [(Challenge::TlsAlpn01, 443), (Challenge::Http01, 80)];
    let here = |port: u16| listen.iter().any(|address| address.port() == port);
    let some = both.iter().any(|(_, port)| here(*port));
    both.into_iter().filter(|(_, port)| !some || here(*port)).map(|(challenge, _)| challenge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_names_in_lower_case_or_addresses() {
        let parsed = |text: &str| text.parse::<Name>();
        assert_eq!(parsed("Relay.Example.ORG."), Ok(Name::Dns("relay.example.org".to_owned())));
        assert_eq!(parsed("[2001:db8::1]"), Ok(Name::Address("2001:db8::1".parse().unwrap())));
        assert_eq!(parsed("*.example.org"), Err(BadName::Wildcard));
        for bad in ["", "relay", "a b.example", "https://relay.example", "-.example", "relay.example:443"] {
            assert_eq!(parsed(bad), Err(BadName::Malformed), "{bad:?}");
        }
    }

    #[test]
    fn challenges_follow_the_ports_listened_on() {
        use Challenge::{Http01, TlsAlpn01};
        let tried = |ports: &[u16]| {
            challenges(None, &ports.iter().map(|port| ([0, 0, 0, 0], *port).into()).collect::<Vec<SocketAddr>>())
        };
        assert_eq!(tried(&[443, 80]), [TlsAlpn01, Http01]);
        assert_eq!(tried(&[80, 443]), [TlsAlpn01, Http01]);
        assert_eq!((tried(&[443]), tried(&[8080, 80])), (vec![TlsAlpn01], vec![Http01]));
        assert_eq!(tried(&[8443]), [TlsAlpn01, Http01]);
        assert_eq!(challenges(Some(Http01), &[([0, 0, 0, 0], 443).into()]), [Http01]);
        assert_eq!(("http-01".parse(), "dns-01".parse::<Challenge>().is_err()), (Ok(Http01), true));
    }
}

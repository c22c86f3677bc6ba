//! The few facts of an X.509 certificate that relay connections need, and the relay's meta-certificate.
//!
//! A relay appends one certificate of its own making to the chain that it presents in every TLS handshake. It
//! certifies nothing; it carries the relay's key to the client one round trip early:
//!
//! | member | value |
//! |---|---|
//! | subject and issuer | common name `derpkey` followed by the relay's key, 64 hex digits |
//! | serial number | version of the relay protocol, 2 |
//! | key | Ed25519, fresh, self-signed |
//! | validity | 30 days before to 30 days after it was made; clients do not look |
//!
//! A client uses it only under TLS 1.3, where certificates are encrypted, and then starts fast (see
//! [`upgrade`](crate::upgrade)). Whoever checks a chain has to leave it out.
//!
//! What is read here, of RFC 5280 §4.1: `Certificate ::= SEQUENCE { tbsCertificate SEQUENCE { [0] version, serialNumber,
//! signature, issuer, validity SEQUENCE { notBefore, notAfter }, subject, … }, … }`. Signatures are not checked here.

use std::time::{Duration, SystemTime};

use mesh_noise::key::RelayPublic;

/// How the common name of a meta-certificate begins.
pub const META_PREFIX: &str = "derpkey";

const INTEGER: u8 = 0x02;
const OID: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;
/// `id-at-commonName`, 2.5.4.3.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts<'a> {
    /// Serial number, big-endian as it stands.
    pub serial: &'a [u8],
    /// First common name of the subject.
    pub common_name: Option<&'a str>,
    /// First second of its validity, since 1970.
    pub not_before: i64,
    /// Last second of its validity, since 1970.
    pub not_after: i64,
}

/// Reads a certificate in DER form; `None` if it is none.
#[must_use]
pub fn facts(der: &[u8]) -> Option<Facts<'_>> {
    let certificate = Reader(der).expect(SEQUENCE)?;
    let mut tbs = Reader(Reader(certificate).expect(SEQUENCE)?);
    let (tag, content) = tbs.next()?;
    let serial = if tag == VERSION { tbs.expect(INTEGER)? } else { (tag == INTEGER).then_some(content)? };
    tbs.expect(SEQUENCE)?;
    tbs.expect(SEQUENCE)?;
    let mut validity = Reader(tbs.expect(SEQUENCE)?);
    let not_before = time(validity.next()?)?;
    let not_after = time(validity.next()?)?;
    let subject = tbs.expect(SEQUENCE)?;
    Some(Facts { serial, common_name: common_name(subject), not_before, not_after })
}

/// From when to when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// First moment.
    pub not_before: SystemTime,
    /// Last moment.
    pub not_after: SystemTime,
}

impl Validity {
    /// How long that still is.
    #[must_use]
    pub fn left(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }
}

/// From when to when a certificate in DER form is valid; `None` if it is none. What lies before 1970 is taken for 1970.
#[must_use]
pub fn validity(der: &[u8]) -> Option<Validity> {
    let facts = facts(der)?;
    let moment =
        |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
    Some(Validity { not_before: moment(facts.not_before), not_after: moment(facts.not_after) })
}

/// The relay key in a meta-certificate and the protocol version it names; `None` if it is another certificate.
#[must_use]
pub fn meta(der: &[u8]) -> Option<(RelayPublic, u8)> {
    let facts = facts(der)?;
    let key = facts.common_name?.strip_prefix(META_PREFIX)?.parse().ok()?;
    match facts.serial {
        [version] | [0, version] => Some((key, *version)),
        _ => None,
    }
}

/// Whether a certificate's name has the form of a meta-certificate's.
#[must_use]
pub fn looks_like_meta(der: &[u8]) -> bool {
    facts(der).and_then(|facts| facts.common_name).is_some_and(|name| name.starts_with(META_PREFIX))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// The next element: its tag and content.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (tag, rest) = self.0.split_first()?;
        let (first, rest) = rest.split_first()?;
        let (len, rest) = match *first {
            short @ 0..=0x7f => (usize::from(short), rest),
            long @ 0x81..=0x83 => {
                let (digits, rest) = rest.split_at_checked(usize::from(long & 0x7f))?;
                (digits.iter().fold(0, |len, digit| len << 8 | usize::from(*digit)), rest)
            }
            0x80 | 0x84.. => return None,
        };
        let (content, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        Some((*tag, content))
    }

    fn expect(&mut self, expected: u8) -> Option<&'a [u8]> {
        self.next().filter(|(tag, _)| *tag == expected).map(|(_, content)| content)
    }
}

fn common_name(subject: &[u8]) -> Option<&str> {
    let mut names = Reader(subject);
    while let Some(set) = names.expect(SET) {
        let mut attribute = Reader(Reader(set).expect(SEQUENCE)?);
        if attribute.expect(OID)? == COMMON_NAME {
            return std::str::from_utf8(attribute.next()?.1).ok();
        }
    }
    None
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ` as seconds since 1970.
fn time((tag, content): (u8, &[u8])) -> Option<i64> {
    let digits = content.strip_suffix(b"Z")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let (year, rest) = match (tag, digits.len()) {
        (UTC_TIME, 12) => {
            let year = number(&digits[..2]);
            (if year < 50 { 2000 + year } else { 1900 + year }, &digits[2..])
        }
        (GENERALIZED_TIME, 14) => (number(&digits[..4]), &digits[4..]),
        _ => return None,
    };
    let [month, day, hour, minute, second] = std::array::from_fn(|i| number(&rest[2 * i..2 * i + 2]));
    // Days since 1970-01-01 in the Gregorian calendar, with years that begin in March.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day - 1 - 719_468;
    ((1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second < 61)
        .then_some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

fn number(digits: &[u8]) -> i64 {
    digits.iter().fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times_count_from_1970() {
        for (tag, text, expected) in [
            (UTC_TIME, "700101000000Z", Some(0)),
            (UTC_TIME, "261122104500Z", Some(1_795_344_300)),
            (UTC_TIME, "500101000000Z", Some(-631_152_000)),
            (GENERALIZED_TIME, "20000229235959Z", Some(951_868_799)),
            (GENERALIZED_TIME, "20501231000000Z", Some(2_556_057_600)),
            (UTC_TIME, "261322104500Z", None),
            (UTC_TIME, "2611221045Z", None),
            (GENERALIZED_TIME, "20261122104500+0100", None),
        ] {
            assert_eq!(time((tag, text.as_bytes())), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_facts_or_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (facts(&bytes), meta(&bytes), looks_like_meta(&bytes));
        }

        #[test]
        fn any_nesting_is_survived(bytes in proptest::collection::vec(prop_oneof![Just(0x30u8), 0u8..8, Just(0x82)], 0..200)) {
            let _ = facts(&bytes);
        }
    }
}

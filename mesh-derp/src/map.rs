//! The DERP map: which relays exist, grouped into regions, and how to reach and authenticate each.
//!
//! A control server sends the map to every node. It is JSON with Go's member names:
//!
//! ```text
//! {"HomeParams"?: {"RegionScore"?: {"<region>": float}},
//!  "Regions": {"<region>": {"RegionID", "RegionCode", "RegionName", "Latitude"?, "Longitude"?, "Avoid"?,
//!      "NoMeasureNoHome"?, "Nodes": [{"Name", "RegionID", "HostName", "CertName"?, "IPv4"?, "IPv6"?, "STUNPort"?,
//!          "STUNOnly"?, "DERPPort"?, "InsecureForTests"?, "STUNTestIP"?, "CanPort80"?}]}},
//!  "omitDefaultRegions"?: bool}
//! ```
//!
//! Types here hold what came, so that reading and writing a map loses nothing we know; methods such as
//! [`DerpNode::stun_udp_port`] and [`DerpNode::cert_check`] give the members their meaning. A region whose number does not fit
//! 16 bits, or that is `null`, is left out when reading: the rest of the map stays usable.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::json::null_as_default;

/// The number of a region: 1 to 65535. Zero on the wire means "none" (see [`region_or_zero`]).
///
/// Regions 900 to 999 are reserved for users' own relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(NonZeroU16);

impl RegionId {
    /// The region of that number, unless it is zero.
    #[must_use]
    pub const fn new(number: u16) -> Option<Self> {
        match NonZeroU16::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// Its number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for RegionId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl From<RegionId> for u16 {
    fn from(id: RegionId) -> Self {
        id.get()
    }
}

impl Serialize for RegionId {
    fn serialize<S: Serializer>(&self, writer: S) -> Result<S::Ok, S::Error> {
        writer.serialize_u16(self.get())
    }
}

impl<'de> Deserialize<'de> for RegionId {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        let number = u64::deserialize(reader)?;
        u16::try_from(number).ok().and_then(Self::new).ok_or_else(|| {
            serde::de::Error::invalid_value(serde::de::Unexpected::Unsigned(number), &"a region from 1 to 65535")
        })
    }
}

/// For `#[serde(with)]` on an `Option<RegionId>`: `None` is written as 0; 0, `null`, a negative number and one over
/// 65535 are read as `None`. Members such as `HomeDERP` and `PreferredDERP` have this form. Add `default` as well.
pub mod region_or_zero {
    use super::{Deserialize, Deserializer, RegionId, Serializer};

    /// Writes the number, or 0.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn serialize<S: Serializer>(id: &Option<RegionId>, writer: S) -> Result<S::Ok, S::Error> {
        writer.serialize_u16(id.map_or(0, RegionId::get))
    }

    /// Reads a number.
    ///
    /// # Errors
    /// If there is something other than an integer or `null`.
    pub fn deserialize<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<RegionId>, D::Error> {
        let number = Option::<i64>::deserialize(reader)?.unwrap_or(0);
        Ok(u16::try_from(number).ok().and_then(RegionId::new))
    }
}

/// All regions a node may use.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DerpMap {
    /// How to choose a home region. Absent in an update means "as before".
    #[serde(rename = "HomeParams", skip_serializing_if = "Option::is_none")]
    pub home_params: Option<HomeParams>,
    /// The regions by number.
    #[serde(rename = "Regions", deserialize_with = "read_regions")]
    pub regions: BTreeMap<RegionId, DerpRegion>,
    /// Only means something when a policy is merged with built-in regions; carried along.
    #[serde(rename = "omitDefaultRegions", deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub omit_default_regions: bool,
}

impl DerpMap {
    /// All nodes of all regions, in region order and each region's own order.
    pub fn nodes(&self) -> impl Iterator<Item = (RegionId, &DerpNode)> {
        self.regions.iter().flat_map(|(id, region)| region.nodes.iter().map(move |node| (*id, node)))
    }
}

/// Hints for choosing a home region.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HomeParams {
    /// Multiplies a region's measured latency: below 1 attracts, above 1 repels; values that are not positive count as 1.
    #[serde(rename = "RegionScore", deserialize_with = "null_as_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub region_score: BTreeMap<RegionId, f64>,
}

/// A group of relays that pass packets among one another; any of them reaches every node at home in the region.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DerpRegion {
    /// Its number, equal to its key in the map.
    #[serde(rename = "RegionID")]
    pub id: RegionId,
    /// Short name, such as `nyc`.
    #[serde(rename = "RegionCode", default, deserialize_with = "null_as_default")]
    pub code: String,
    /// Name for people, such as `New York City`.
    #[serde(rename = "RegionName", default, deserialize_with = "null_as_default")]
    pub name: String,
    /// Degrees north; 0 when unknown.
    #[serde(rename = "Latitude", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub latitude: f64,
    /// Degrees east; 0 when unknown.
    #[serde(rename = "Longitude", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub longitude: f64,
    /// Deprecated: not to be chosen as home.
    #[serde(rename = "Avoid", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub avoid: bool,
    /// Neither measured nor chosen as home; still used to reach peers whose home it is.
    #[serde(
        rename = "NoMeasureNoHome",
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "is_default"
    )]
    pub no_measure_no_home: bool,
    /// Its servers; the first is preferred.
    #[serde(rename = "Nodes", default, deserialize_with = "null_as_default")]
    pub nodes: Vec<DerpNode>,
}

impl DerpRegion {
    /// A region without nodes.
    #[must_use]
    pub fn new(id: RegionId, code: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            id,
            code: code.into(),
            name: name.into(),
            latitude: 0.0,
            longitude: 0.0,
            avoid: false,
            no_measure_no_home: false,
            nodes: Vec::new(),
        }
    }

    /// The nodes that relay, in order of preference; the others answer STUN only.
    pub fn relays(&self) -> impl Iterator<Item = &DerpNode> {
        self.nodes.iter().filter(|node| !node.stun_only)
    }

    /// Whether a node may make this region its home.
    #[must_use]
    pub fn may_be_home(&self) -> bool {
        !self.avoid && !self.no_measure_no_home && self.relays().next().is_some()
    }
}

/// One server: a relay, a STUN responder, or both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DerpNode {
    /// Unique in the whole map, such as `900a`.
    #[serde(rename = "Name", default, deserialize_with = "null_as_default")]
    pub name: String,
    /// The region it belongs to.
    #[serde(rename = "RegionID")]
    pub region_id: RegionId,
    /// DNS name or address: looked up unless addresses are given, sent as TLS server name, verified.
    #[serde(rename = "HostName", default, deserialize_with = "null_as_default")]
    pub host_name: String,
    /// What certificate to expect where it is not one for the host name. See [`DerpNode::cert_check`].
    #[serde(rename = "CertName", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub cert_name: String,
    /// IPv4 address; empty: look the name up; anything that is no address (`none`): this family is not to be used.
    #[serde(rename = "IPv4", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub ipv4: String,
    /// IPv6 address, as `ipv4`.
    #[serde(rename = "IPv6", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub ipv6: String,
    /// UDP port of STUN; 0 is 3478, -1 is no STUN.
    #[serde(rename = "STUNPort", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub stun_port: i32,
    /// Whether it answers STUN and does not relay.
    #[serde(rename = "STUNOnly", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub stun_only: bool,
    /// TCP port of the relay; 0 is 443.
    #[serde(rename = "DERPPort", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub derp_port: u16,
    /// Whether its certificate is not verified. For tests only: whoever is on the path can then pose as the relay.
    #[serde(
        rename = "InsecureForTests",
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "is_default"
    )]
    pub insecure_for_tests: bool,
    /// Where STUN goes in tests instead of the node's own address.
    #[serde(rename = "STUNTestIP", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub stun_test_ip: String,
    /// Whether port 80 answers `/generate_204`, which finds captive portals.
    #[serde(rename = "CanPort80", default, deserialize_with = "null_as_default", skip_serializing_if = "is_default")]
    pub can_port80: bool,
}

/// How to reach a node over one address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FamilyAddress<A> {
    /// Look the host name up.
    Lookup,
    /// Use this address.
    At(A),
    /// Do not use this family.
    Disabled,
}

/// What a relay's certificate has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertCheck {
    /// Valid for this name, and issued by a trusted root. The name sent in the handshake stays the host name.
    Name(String),
    /// The one certificate whose DER form has this SHA-256.
    Sha256([u8; 32]),
    /// Anything. For tests.
    Nothing,
}

/// The prefix of [`DerpNode::cert_name`] that announces a pinned certificate.
pub const PIN_PREFIX: &str = "sha256-raw:";

/// A pin that is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected 64 hexadecimal digits after \"sha256-raw:\" in CertName")]
pub struct BadPin;

impl DerpNode {
    /// A relay with STUN on the usual ports, whose certificate is verified by its name.
    #[must_use]
    pub fn new(name: impl Into<String>, region_id: RegionId, host_name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            region_id,
            host_name: host_name.into(),
            cert_name: String::new(),
            ipv4: String::new(),
            ipv6: String::new(),
            stun_port: 0,
            stun_only: false,
            derp_port: 0,
            insecure_for_tests: false,
            stun_test_ip: String::new(),
            can_port80: false,
        }
    }

    /// TCP port of the relay.
    #[must_use]
    pub const fn relay_port(&self) -> u16 {
        if self.derp_port == 0 { 443 } else { self.derp_port }
    }

    /// UDP port of STUN, if it answers STUN at all.
    #[must_use]
    pub fn stun_udp_port(&self) -> Option<u16> {
        match self.stun_port {
            0 => Some(3478),
            port => u16::try_from(port).ok(),
        }
    }

    /// How to reach it over IPv4.
    #[must_use]
    pub fn v4(&self) -> FamilyAddress<Ipv4Addr> {
        family(&self.ipv4)
    }

    /// How to reach it over IPv6.
    #[must_use]
    pub fn v6(&self) -> FamilyAddress<Ipv6Addr> {
        family(&self.ipv6)
    }

    /// What to demand of its certificate.
    ///
    /// A pin or a name of its own in `CertName` is demanded even of a node marked `InsecureForTests`, except a name that
    /// only repeats the host name.
    ///
    /// # Errors
    /// If `CertName` announces a pin and holds none.
    pub fn cert_check(&self) -> Result<CertCheck, BadPin> {
        if let Some(digits) = self.cert_name.strip_prefix(PIN_PREFIX) {
            let mut pin = [0; 32];
            hex::decode_to_slice(digits, &mut pin).map_err(|_| BadPin)?;
            return Ok(CertCheck::Sha256(pin));
        }
        let own_name = !self.cert_name.is_empty() && self.cert_name != self.host_name;
        Ok(match (own_name, self.insecure_for_tests) {
            (true, _) => CertCheck::Name(self.cert_name.clone()),
            (false, true) => CertCheck::Nothing,
            (false, false) => CertCheck::Name(self.host_name.clone()),
        })
    }
}

fn family<A: FromStr>(text: &str) -> FamilyAddress<A> {
    match (text, text.parse()) {
        ("", _) => FamilyAddress::Lookup,
        (_, Ok(address)) => FamilyAddress::At(address),
        (_, Err(_)) => FamilyAddress::Disabled,
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Reads the regions, leaving out those without a usable number.
fn read_regions<'de, D: Deserializer<'de>>(reader: D) -> Result<BTreeMap<RegionId, DerpRegion>, D::Error> {
    struct Regions;
    impl<'de> serde::de::Visitor<'de> for Regions {
        type Value = BTreeMap<RegionId, DerpRegion>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of regions by number")
        }

        fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
            Ok(BTreeMap::new())
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, mut members: A) -> Result<Self::Value, A::Error> {
            let mut regions = BTreeMap::new();
            while let Some(key) = members.next_key::<String>()? {
                if let Ok(id) = key.parse::<RegionId>() {
                    if let Some(region) = members.next_value::<Option<DerpRegion>>()? {
                        regions.insert(id, region);
                    }
                } else {
                    let serde::de::IgnoredAny = members.next_value()?;
                }
            }
            Ok(regions)
        }
    }
    reader.deserialize_any(Regions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json;

    const RECORDED: &str = r#"{"Regions":{"900":{"RegionID":900,"RegionCode":"it","RegionName":"itest","Nodes":[{
        "Name":"900a","RegionID":900,"HostName":"10.99.0.1","IPv4":"10.99.0.1","IPv6":"none","STUNPort":3478,
        "DERPPort":3443,"InsecureForTests":true}]}}}"#;

    fn region(number: u16) -> RegionId {
        RegionId::new(number).unwrap()
    }

    #[test]
    fn a_map_that_four_clients_accepted_reads_and_writes_back_unchanged() {
        for read in [json::from_str::<DerpMap>, |text: &'static str| serde_json::from_str(text)] {
            let map = read(RECORDED).unwrap();
            let node = &map.regions[&region(900)].nodes[0];
            assert_eq!(node.v4(), FamilyAddress::At(Ipv4Addr::new(10, 99, 0, 1)));
            assert_eq!(node.v6(), FamilyAddress::Disabled);
            assert_eq!((node.relay_port(), node.stun_udp_port()), (3443, Some(3478)));
            assert_eq!(node.cert_check(), Ok(CertCheck::Nothing));
            let before: serde_json::Value = serde_json::from_str(RECORDED).unwrap();
            assert_eq!(serde_json::to_value(&map).unwrap(), before);
            assert_eq!(serde_json::from_str::<DerpMap>(&serde_json::to_string(&map).unwrap()).unwrap(), map);
        }
    }

    #[test]
    fn unusable_regions_are_left_out_and_nulls_are_empty() {
        let map: DerpMap = json::from_str(
            r#"{"HomeParams":{"RegionScore":{"1":0.5}},"regions":{"0":{},"1":{"regionid":1,"Nodes":null,"RegionName":null},
               "2":null,"70000":{"RegionID":70000}},"omitDefaultRegions":true}"#,
        )
        .unwrap();
        assert_eq!(map.regions.keys().copied().collect::<Vec<_>>(), [region(1)]);
        assert_eq!(map.home_params.unwrap().region_score, BTreeMap::from([(region(1), 0.5)]));
        assert!(map.omit_default_regions);
        assert_eq!(json::from_str::<DerpMap>(r#"{"Regions":null}"#).unwrap(), DerpMap::default());
        assert_eq!(serde_json::from_str::<DerpMap>(r#"{"Regions":null}"#).unwrap(), DerpMap::default());
    }

    #[test]
    fn ports_have_their_special_values() {
        let mut node = DerpNode::new("1a", region(1), "relay.example");
        assert_eq!((node.relay_port(), node.stun_udp_port()), (443, Some(3478)));
        node.stun_port = -1;
        assert_eq!(node.stun_udp_port(), None);
        node.stun_port = 70_000;
        assert_eq!(node.stun_udp_port(), None);
        node.ipv4 = "none".into();
        assert_eq!((node.v4(), node.v6()), (FamilyAddress::Disabled, FamilyAddress::Lookup));
    }

    #[test]
    fn a_certificate_name_of_its_own_is_demanded_even_of_an_insecure_node() {
        let mut node = DerpNode::new("1a", region(1), "relay.example");
        assert_eq!(node.cert_check(), Ok(CertCheck::Name("relay.example".into())));
        node.insecure_for_tests = true;
        node.cert_name = "relay.example".into();
        assert_eq!(node.cert_check(), Ok(CertCheck::Nothing));
        node.cert_name = "other.example".into();
        assert_eq!(node.cert_check(), Ok(CertCheck::Name("other.example".into())));
        node.cert_name = format!("{PIN_PREFIX}{}", "0A".repeat(32));
        assert_eq!(node.cert_check(), Ok(CertCheck::Sha256([10; 32])));
        node.cert_name = format!("{PIN_PREFIX}00");
        assert_eq!(node.cert_check(), Err(BadPin));
    }

    #[test]
    fn home_members_take_zero_null_and_nonsense_as_none() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Home {
            #[serde(rename = "HomeDERP", with = "region_or_zero", default)]
            home: Option<RegionId>,
        }
        for (text, home) in [
            (r#"{"HomeDERP":900}"#, RegionId::new(900)),
            (r#"{"homederp":0}"#, None),
            (r#"{"HomeDERP":null}"#, None),
            (r#"{"HomeDERP":-1}"#, None),
            (r#"{"HomeDERP":70000}"#, None),
            ("{}", None),
        ] {
            assert_eq!(json::from_str::<Home>(text).unwrap().home, home, "{text}");
        }
        assert_eq!(serde_json::to_string(&Home { home: None }).unwrap(), r#"{"HomeDERP":0}"#);
    }

    #[test]
    fn only_regions_with_relays_can_be_home() {
        let mut area = DerpRegion::new(region(7), "x", "X");
        assert!(!area.may_be_home());
        area.nodes.push(DerpNode { stun_only: true, ..DerpNode::new("7a", region(7), "a") });
        assert!(!area.may_be_home());
        area.nodes.push(DerpNode::new("7b", region(7), "b"));
        assert!(area.may_be_home());
        assert_eq!(area.relays().map(|node| node.name.as_str()).collect::<Vec<_>>(), ["7b"]);
        area.no_measure_no_home = true;
        assert!(!area.may_be_home());
    }
}

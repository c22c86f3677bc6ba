//! Reading what Go's JSON decoder would read: `null` for anything, zones in addresses.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use serde::de::{Deserialize, Deserializer};

/// Reads a value, with `null` for its default.
pub(crate) fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

/// Whether a member may be left out.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Reads a map whose values may be `null`, each for its default.
pub(crate) fn map_of_nullable<'de, D, K, V>(from: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: Deserialize<'de> + Ord,
    V: Deserialize<'de> + Default,
{
    let read = Option::<BTreeMap<K, Option<V>>>::deserialize(from)?.unwrap_or_default();
    Ok(read.into_iter().map(|(key, value)| (key, value.unwrap_or_default())).collect())
}

/// The same, keeping an absent map apart from an empty one.
pub(crate) fn optional_map_of_nullable<'de, D, K, V>(from: D) -> Result<Option<BTreeMap<K, V>>, D::Error>
where
    D: Deserializer<'de>,
    K: Deserialize<'de> + Ord,
    V: Deserialize<'de> + Default,
{
    let read = Option::<BTreeMap<K, Option<V>>>::deserialize(from)?;
    Ok(read.map(|map| map.into_iter().map(|(key, value)| (key, value.unwrap_or_default())).collect()))
}

/// Reads a list of `address:port`. What cannot be used (empty, or no address) reads as `0.0.0.0:0`, so that a list
/// that runs in parallel stays aligned; zones are cut off, which leaves a link-local address that nobody may use.
pub(crate) fn endpoints<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<SocketAddr>, D::Error> {
    let texts = Option::<Vec<Option<String>>>::deserialize(from)?.unwrap_or_default();
    Ok(texts.into_iter().map(|text| endpoint(&text.unwrap_or_default())).collect())
}

/// The same for an optional list.
pub(crate) fn optional_endpoints<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<SocketAddr>>, D::Error> {
    let texts = Option::<Vec<Option<String>>>::deserialize(from)?;
    Ok(texts.map(|texts| texts.into_iter().map(|text| endpoint(&text.unwrap_or_default())).collect()))
}

fn endpoint(text: &str) -> SocketAddr {
    let without_zone = match (text.find('%'), text.find(']')) {
        (Some(zone), Some(end)) if zone < end => format!("{}{}", &text[..zone], &text[end..]),
        _ => text.to_owned(),
    };
    without_zone.parse().unwrap_or_else(|_| SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unusable_endpoint_reads_as_unspecified_and_a_zone_is_cut_off() {
        assert_eq!(endpoint(""), "0.0.0.0:0".parse().unwrap());
        assert_eq!(endpoint("[fe80::1%eth0]:9"), "[fe80::1]:9".parse().unwrap());
        assert_eq!(endpoint("192.0.2.1:41641"), "192.0.2.1:41641".parse().unwrap());
        assert_eq!(endpoint("]%["), "0.0.0.0:0".parse().unwrap());
    }
}

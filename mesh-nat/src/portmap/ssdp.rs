//! SSDP, how UPnP devices are found (UPnP Device Architecture 1.1 §1): HTTP heads in datagrams.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::http::{Head, Url};

/// Where devices listen.
pub const PORT: u16 = 1900;
/// The group that searches are sent to.
pub const GROUP: IpAddr = IpAddr::V4(Ipv4Addr::new(239, 255, 255, 250));
/// The same for IPv6, on one link (UPnP Device Architecture 1.1, annex A).
pub const GROUP_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xc));
/// What is searched for: the first version, for which later ones answer too.
pub const GATEWAY: &str = "urn:schemas-upnp-org:device:InternetGatewayDevice:1";
/// The second version, for devices that answer for their own alone.
pub const GATEWAY_2: &str = "urn:schemas-upnp-org:device:InternetGatewayDevice:2";
/// What opens firewalls for IPv6, which devices of the second version have.
pub const FIREWALL: &str = "urn:schemas-upnp-org:service:WANIPv6FirewallControl:1";
/// Everything that is there, for devices that answer to nothing else.
pub const ALL: &str = "ssdp:all";

/// A search for `target` in `group`. Devices that got it by multicast answer within a second.
#[must_use]
pub fn search(group: IpAddr, target: &str) -> Vec<u8> {
    let host = SocketAddr::new(group, PORT);
    format!("M-SEARCH * HTTP/1.1\r\nHOST: {host}\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\nST: {target}\r\n\r\n")
        .into_bytes()
}

/// What is searched for, if `datagram` is a search.
#[must_use]
pub fn searched(datagram: &[u8]) -> Option<&str> {
    let head = Head::of(datagram);
    let searches = head.request().is_some_and(|(method, path)| method == "M-SEARCH" && path == "*");
    searches.then(|| head.field("ST"))?
}

/// A gateway that answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Where its description is.
    pub location: Url,
    /// Whether it says that it is a gateway of the second version.
    pub second: bool,
}

/// Why a datagram does not tell of a gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SsdpError {
    /// Not an answer to a search.
    #[error("not an answer to a search for devices")]
    NotAnswer,
    /// A device of another kind.
    #[error("not a gateway")]
    NotGateway,
    /// It does not say where its description is, or not in a way that can be used.
    #[error("the device does not say where its description is")]
    NoLocation,
}

/// Reads the answer to a search.
///
/// # Errors
/// [`SsdpError`] says why it does not tell of a gateway.
pub fn answer(datagram: &[u8]) -> Result<Found, SsdpError> {
    let head = Head::of(datagram);
    if head.status() != Some(200) {
        return Err(SsdpError::NotAnswer);
    }
    let kinds = [head.field("ST"), head.field("USN")].map(Option::unwrap_or_default);
    let is = |what: &str| kinds.iter().any(|kind| kind.contains(what));
    let gateway =
        [":InternetGatewayDevice:", ":WANIPConnection:", ":WANPPPConnection:", ":WANIPv6FirewallControl:"].map(is);
    if !gateway.contains(&true) {
        return Err(SsdpError::NotGateway);
    }
    let location = head.field("LOCATION").and_then(Url::parse).ok_or(SsdpError::NoLocation)?;
    Ok(Found { location, second: is(":InternetGatewayDevice:2") || is(":WANIPConnection:2") })
}

/// The answer of a gateway whose description is at `location`, on its `host`, to a search for `target`.
#[must_use]
pub fn respond(host: SocketAddr, location: &str, target: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: {target}\r\nUSN: uuid:00000000-0000-0000-0000-000000000001::\
         {target}\r\nEXT:\r\nSERVER: mesh UPnP/1.1\r\nLOCATION: http://{host}{location}\r\n\r\n"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// As Debian's miniupnpd 2.3.1 sends it.
    const MINIUPNPD: &str = "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\n\
        ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\
        USN: uuid:73a5a9b2-4a53-4b0a-9a5e-7c2a90e28c2b::urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\nEXT:\r\n\
        SERVER: Debian/12 UPnP/1.1 MiniUPnPd/2.3.1\r\nLOCATION: http://192.168.1.1:5000/rootDesc.xml\r\n\
        OPT: \"http://schemas.upnp.org/upnp/1/0/\"; ns=01\r\n01-NLS: 1\r\nBOOTID.UPNP.ORG: 1\r\n\r\n";

    #[test]
    fn a_gateway_tells_where_its_description_is() {
        let found = answer(MINIUPNPD.as_bytes()).unwrap();
        assert_eq!((found.location.port, found.location.path.as_str(), found.second), (5000, "/rootDesc.xml", false));
        assert!(answer(MINIUPNPD.replace("Device:1", "Device:2").as_bytes()).unwrap().second);
    }

    #[test]
    fn other_devices_are_not_gateways() {
        let printer = MINIUPNPD.replace("InternetGatewayDevice", "Printer");
        assert_eq!(answer(printer.as_bytes()), Err(SsdpError::NotGateway));
        assert_eq!(answer(&search(GROUP, GATEWAY)), Err(SsdpError::NotAnswer));
        let secret = MINIUPNPD.replace("http://192", "https://192");
        assert_eq!(answer(secret.as_bytes()), Err(SsdpError::NoLocation));
    }

    #[test]
    fn a_search_is_answered_for_what_was_searched() {
        assert_eq!(searched(&search(GROUP, GATEWAY_2)), Some(GATEWAY_2));
        let on_link = search(GROUP_V6, FIREWALL);
        assert!(on_link.windows(21).any(|bytes| bytes == b"HOST: [ff02::c]:1900\r"), "{on_link:?}");
        assert_eq!(searched(MINIUPNPD.as_bytes()), None);
        let answered = answer(&respond("10.0.0.1:80".parse().unwrap(), "/d.xml", GATEWAY_2)).unwrap();
        assert_eq!((answered.location.path.as_str(), answered.second), ("/d.xml", true));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(prefix in prop::sample::select(vec!["HTTP/1.1 200 OK\r\n", "M-SEARCH * HTTP/1.1\r\n", ""]), tail in vec(any::<u8>(), 0..80)) {
            let bytes = [prefix.as_bytes(), &tail].concat();
            let _ = (answer(&bytes), searched(&bytes));
        }
    }
}

//! UPnP gateways (Internet Gateway Device 1 and 2): what their descriptions say, and the SOAP calls for port mappings.
//!
//! A description lists services; WANIPConnection:2 (IGD 2), WANIPConnection:1 and WANPPPConnection:1 can map ports, and
//! WANIPv6FirewallControl:1 opens pinholes in front of IPv6 addresses. Each call is an XML body posted to the service's
//! control URL, and each answer a body whose elements are the results, or a fault with a number.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::http::Url;
use super::xml::{Piece, Pieces, escape, text_of};

/// No gateway has more services that matter.
const MAX_SERVICES: usize = 8;
/// What mappings are called in a gateway's list.
const DESCRIPTION: &str = "mesh";
/// UDP, as firewalls name it (the IANA protocol number).
const UDP: u32 = 17;

/// What kind of connection a service controls; the first is preferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceKind {
    /// `WANIPConnection:2` and later: it chooses a port where the wanted one is taken.
    WanIp2,
    /// `WANIPConnection:1`.
    WanIp1,
    /// `WANPPPConnection:1`.
    WanPpp,
    /// `WANIPv6FirewallControl:1`.
    Firewall6,
}

/// A service that can map ports, or open a firewall.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Service {
    /// Which kind it is.
    pub kind: ServiceKind,
    /// Its full type, by which calls name it.
    pub urn: String,
    /// Where calls go.
    pub control: Url,
}

impl Service {
    fn new(urn: &str, control: Url) -> Option<Self> {
        // urn:schemas-upnp-org:service:WANIPConnection:1, and urn:dslforum-org:… of old gateways.
        let mut parts = urn.split(':');
        let named = parts.next() == Some("urn") && parts.next().is_some() && parts.next() == Some("service");
        let (name, version) = (parts.next()?, parts.next()?.parse::<u8>().ok()?);
        let harmless = urn.bytes().all(|byte| byte.is_ascii_alphanumeric() || b":-_.".contains(&byte));
        if !named || !harmless || parts.next().is_some() {
            return None;
        }
        let kind = match (name, version) {
            ("WANIPConnection", 1) => ServiceKind::WanIp1,
            ("WANIPConnection", 2..) => ServiceKind::WanIp2,
            ("WANPPPConnection", 1..) => ServiceKind::WanPpp,
            ("WANIPv6FirewallControl", 1..) => ServiceKind::Firewall6,
            _ => return None,
        };
        Some(Self { kind, urn: urn.to_owned(), control })
    }
}

/// The services of a gateway that can map ports or open its firewall, the preferred first. `location` is where the
/// description came from.
#[must_use]
pub fn services(description: &[u8], location: &Url) -> Vec<Service> {
    let document = String::from_utf8_lossy(description);
    let base = text_of(&document, "URLBase").and_then(|base| Url::parse(&base)).unwrap_or_else(|| location.clone());
    let mut found: Vec<Service> = Vec::new();
    let (mut urn, mut control, mut within) = (None, None, "");
    for piece in Pieces::of(&document) {
        match piece {
            Piece::Open("service") => (urn, control) = (None, None),
            Piece::Open(name) => within = name,
            Piece::Text(text) if within == "serviceType" => urn = Some(text),
            Piece::Text(text) if within == "controlURL" => control = base.join(&text),
            Piece::Text(_) => {}
            Piece::Close("service") => {
                let service = urn.take().zip(control.take()).and_then(|(urn, control)| Service::new(&urn, control));
                if found.len() < MAX_SERVICES {
                    found.extend(service.filter(|service| !found.contains(service)));
                }
            }
            Piece::Close(_) => within = "",
        }
    }
    found.sort_by_key(|service| service.kind);
    found
}

/// A mapping of a UDP port, as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortMapping {
    /// The port outside.
    pub external_port: u16,
    /// The port of the client.
    pub internal_port: u16,
    /// The client.
    pub client: Ipv4Addr,
    /// For how long, in seconds; 0 means until it is deleted, where that is possible.
    pub lease: u32,
}

/// A hole in a firewall for one UDP port of an IPv6 address, open to everybody, as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pinhole {
    /// The client.
    pub client: Ipv6Addr,
    /// Its port.
    pub port: u16,
    /// For how long, in seconds; 1 to [`MAX_LEASE`](Self::MAX_LEASE).
    pub lease: u32,
}

impl Pinhole {
    /// No pinhole may be asked for longer: a day (WANIPv6FirewallControl:1 §2.3.2).
    pub const MAX_LEASE: u32 = 86_400;
}

/// A call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// Which external address do you have?
    GetExternalIpAddress,
    /// Map exactly this port.
    AddPortMapping(PortMapping),
    /// Map this port, or any other if it is taken; IGD 2 only.
    AddAnyPortMapping(PortMapping),
    /// Remove the mapping of this external port.
    DeletePortMapping {
        /// The port outside.
        external_port: u16,
    },
    /// Open a pinhole. The answer names it by a number.
    AddPinhole(Pinhole),
    /// Keep it open for so long from now.
    UpdatePinhole {
        /// Its number.
        id: u16,
        /// In seconds.
        lease: u32,
    },
    /// Close it.
    DeletePinhole {
        /// Its number.
        id: u16,
    },
}

const GET_ADDRESS: &str = "GetExternalIPAddress";
const ADD: &str = "AddPortMapping";
const ADD_ANY: &str = "AddAnyPortMapping";
const DELETE: &str = "DeletePortMapping";
const ADD_HOLE: &str = "AddPinhole";
const UPDATE_HOLE: &str = "UpdatePinhole";
const DELETE_HOLE: &str = "DeletePinhole";

impl Action {
    /// The call's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::GetExternalIpAddress => GET_ADDRESS,
            Self::AddPortMapping(_) => ADD,
            Self::AddAnyPortMapping(_) => ADD_ANY,
            Self::DeletePortMapping { .. } => DELETE,
            Self::AddPinhole(_) => ADD_HOLE,
            Self::UpdatePinhole { .. } => UPDATE_HOLE,
            Self::DeletePinhole { .. } => DELETE_HOLE,
        }
    }

    /// What the field `SOAPAction` says.
    #[must_use]
    pub fn soap_action(&self, service: &Service) -> String {
        format!("{}#{}", service.urn, self.name())
    }

    /// The body.
    #[must_use]
    pub fn encode(&self, service: &Service) -> String {
        let mut arguments = String::new();
        let mut argument = |name: &str, value: &dyn std::fmt::Display| {
            // Writing to a string does not fail.
            let _ = write!(arguments, "<{name}>{}</{name}>", escape(&value.to_string()));
        };
        match self {
            Self::GetExternalIpAddress => {}
            Self::AddPortMapping(map) | Self::AddAnyPortMapping(map) => {
                argument("NewRemoteHost", &"");
                argument("NewExternalPort", &map.external_port);
                argument("NewProtocol", &"UDP");
                argument("NewInternalPort", &map.internal_port);
                argument("NewInternalClient", &map.client);
                argument("NewEnabled", &1);
                argument("NewPortMappingDescription", &DESCRIPTION);
                argument("NewLeaseDuration", &map.lease);
            }
            Self::DeletePortMapping { external_port } => {
                argument("NewRemoteHost", &"");
                argument("NewExternalPort", external_port);
                argument("NewProtocol", &"UDP");
            }
            Self::AddPinhole(hole) => {
                // No remote host and port 0: any.
                argument("RemoteHost", &"");
                argument("RemotePort", &0);
                argument("InternalClient", &hole.client);
                argument("InternalPort", &hole.port);
                argument("Protocol", &UDP);
                argument("LeaseTime", &hole.lease);
            }
            Self::UpdatePinhole { id, lease } => {
                argument("UniqueID", id);
                argument("NewLeaseTime", lease);
            }
            Self::DeletePinhole { id } => argument("UniqueID", id),
        }
        let (name, urn) = (self.name(), &service.urn);
        envelope(&format!("<u:{name} xmlns:u=\"{urn}\">{arguments}</u:{name}>"))
    }

    /// Reads a call, as a gateway does. `None` if it is none of these, or lacks something.
    #[must_use]
    pub fn decode(soap_action: &str, body: &[u8]) -> Option<Self> {
        let document = String::from_utf8_lossy(body);
        let number = |name: &str| text_of(&document, name)?.parse::<u32>().ok();
        let port = |name: &str| number(name).and_then(|port| u16::try_from(port).ok());
        let id = || port("UniqueID");
        let udp = text_of(&document, "NewProtocol").is_some_and(|protocol| protocol == "UDP");
        let mapping = || {
            Some(PortMapping {
                external_port: port("NewExternalPort")?,
                internal_port: port("NewInternalPort")?,
                client: text_of(&document, "NewInternalClient")?.parse().ok()?,
                lease: number("NewLeaseDuration")?,
            })
        };
        match soap_action.rsplit_once('#')?.1 {
            GET_ADDRESS => Some(Self::GetExternalIpAddress),
            ADD if udp => mapping().map(Self::AddPortMapping),
            ADD_ANY if udp => mapping().map(Self::AddAnyPortMapping),
            DELETE if udp => Some(Self::DeletePortMapping { external_port: port("NewExternalPort")? }),
            ADD_HOLE if number("Protocol") == Some(UDP) => Some(Self::AddPinhole(Pinhole {
                client: text_of(&document, "InternalClient")?.parse().ok()?,
                port: port("InternalPort")?,
                lease: number("LeaseTime")?,
            })),
            UPDATE_HOLE => Some(Self::UpdatePinhole { id: id()?, lease: number("NewLeaseTime")? }),
            DELETE_HOLE => Some(Self::DeletePinhole { id: id()? }),
            _ => None,
        }
    }
}

/// Why a gateway did not do what it was asked (UPnP errors; WANIPConnection:2 §2.5, WANIPv6FirewallControl:1 §2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// 401, 602: it does not know the call.
    InvalidAction,
    /// 402: something in the call is wrong; from some gateways, a lease that is not permanent.
    InvalidArguments,
    /// 501: it failed, for whatever reason.
    ActionFailed,
    /// 606: its owner does not want it.
    NotAuthorized,
    /// 701: it has no room for another pinhole.
    NoPinholes,
    /// 702: its firewall is off.
    FirewallOff,
    /// 703: its owner wants no pinholes.
    PinholesOff,
    /// 704: it has no pinhole of that number.
    UnknownPinhole,
    /// 718: the port belongs to another mapping.
    Conflict,
    /// 724: only the same port inside and outside.
    SamePorts,
    /// 725: only permanent mappings.
    OnlyPermanent,
    /// 728: it is full.
    NoPortMaps,
    /// 729: the port belongs to something other than a mapping.
    ConflictWithOther,
    /// Another number; 0 if it gave none that can be read.
    Other(u16),
}

impl From<u16> for Fault {
    fn from(code: u16) -> Self {
        match code {
            401 | 602 => Self::InvalidAction,
            402 => Self::InvalidArguments,
            501 => Self::ActionFailed,
            606 => Self::NotAuthorized,
            701 => Self::NoPinholes,
            702 => Self::FirewallOff,
            703 => Self::PinholesOff,
            704 => Self::UnknownPinhole,
            718 => Self::Conflict,
            724 => Self::SamePorts,
            725 => Self::OnlyPermanent,
            728 => Self::NoPortMaps,
            729 => Self::ConflictWithOther,
            other => Self::Other(other),
        }
    }
}

impl From<Fault> for u16 {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::InvalidAction => 401,
            Fault::InvalidArguments => 402,
            Fault::ActionFailed => 501,
            Fault::NotAuthorized => 606,
            Fault::NoPinholes => 701,
            Fault::FirewallOff => 702,
            Fault::PinholesOff => 703,
            Fault::UnknownPinhole => 704,
            Fault::Conflict => 718,
            Fault::SamePorts => 724,
            Fault::OnlyPermanent => 725,
            Fault::NoPortMaps => 728,
            Fault::ConflictWithOther => 729,
            Fault::Other(code) => code,
        }
    }
}

/// What a gateway answered to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Answer {
    /// From [`Action::GetExternalIpAddress`]; none if it has none.
    pub external: Option<Ipv4Addr>,
    /// From [`Action::AddAnyPortMapping`]: the port that it chose.
    pub reserved_port: Option<u16>,
    /// From [`Action::AddPinhole`]: the pinhole's number.
    pub pinhole: Option<u16>,
}

impl Answer {
    /// Reads the answer in an HTTP response.
    ///
    /// # Errors
    /// The fault that it tells; [`Fault::Other`] with 0 for anything that is no answer.
    pub fn decode(status: u16, body: &[u8]) -> Result<Self, Fault> {
        let document = String::from_utf8_lossy(body);
        let fault = text_of(&document, "errorCode").and_then(|code| code.parse::<u16>().ok());
        match fault {
            Some(code) => Err(Fault::from(code)),
            None if status == 200 => Ok(Self {
                external: text_of(&document, "NewExternalIPAddress")
                    .and_then(|address| address.parse().ok())
                    .filter(|address: &Ipv4Addr| !address.is_unspecified()),
                reserved_port: text_of(&document, "NewReservedPort").and_then(|port| port.parse().ok()),
                pinhole: text_of(&document, "UniqueID").and_then(|id| id.parse().ok()),
            }),
            None => Err(Fault::Other(0)),
        }
    }

    /// The body with which a gateway answers `action`.
    #[must_use]
    pub fn encode(&self, action: &Action, urn: &str) -> String {
        let name = action.name();
        let mut results = String::new();
        if let Some(address) = self.external {
            results = format!("<NewExternalIPAddress>{address}</NewExternalIPAddress>");
        }
        if let Some(port) = self.reserved_port {
            results = format!("<NewReservedPort>{port}</NewReservedPort>");
        }
        if let Some(id) = self.pinhole {
            results = format!("<UniqueID>{id}</UniqueID>");
        }
        envelope(&format!("<u:{name}Response xmlns:u=\"{urn}\">{results}</u:{name}Response>"))
    }
}

impl Fault {
    /// The body with which a gateway refuses; its status is 500.
    #[must_use]
    pub fn encode(self) -> String {
        let code = u16::from(self);
        envelope(&format!(
            "<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail>\
             <UPnPError xmlns=\"urn:schemas-upnp-org:control-1-0\"><errorCode>{code}</errorCode>\
             <errorDescription>{self:?}</errorDescription></UPnPError></detail></s:Fault>"
        ))
    }
}

fn envelope(inside: &str) -> String {
    format!(
        "<?xml version=\"1.0\"?>\r\n<s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" \
         s:encodingStyle=\"http://schemas.xmlsoap.org/soap/encoding/\"><s:Body>{inside}</s:Body></s:Envelope>\r\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn description(services: &[(&str, &str)]) -> String {
        let list: String = services
            .iter()
            .map(|(urn, control)| {
                format!(
                    "<service><serviceType>{urn}</serviceType><serviceId>x</serviceId><SCPDURL>/s.xml</SCPDURL>\
                     <controlURL>{control}</controlURL><eventSubURL>/e</eventSubURL></service>"
                )
            })
            .collect();
        format!(
            "<?xml version=\"1.0\"?><root xmlns=\"urn:schemas-upnp-org:device-1-0\"><device><deviceList><device>\
             <serviceList>{list}</serviceList></device></deviceList></device></root>"
        )
    }

    fn location() -> Url {
        Url::parse("http://192.168.1.1:5000/rootDesc.xml").unwrap()
    }

    #[test]
    fn the_newest_connection_service_comes_first_and_others_are_left_out() {
        let text = description(&[
            ("urn:schemas-upnp-org:service:WANIPv6FirewallControl:1", "/fw"),
            ("urn:schemas-upnp-org:service:WANPPPConnection:1", "/ppp"),
            ("urn:schemas-upnp-org:service:Layer3Forwarding:1", "/l3f"),
            ("urn:dslforum-org:service:WANIPConnection:1", "ip1"),
            ("urn:schemas-upnp-org:service:WANIPConnection:2", "http://10.9.9.9:81/ip2"),
        ]);
        let found = services(text.as_bytes(), &location());
        let kinds: Vec<_> = found.iter().map(|service| service.kind).collect();
        assert_eq!(kinds, [ServiceKind::WanIp2, ServiceKind::WanIp1, ServiceKind::WanPpp, ServiceKind::Firewall6]);
        assert_eq!((found[0].control.port, found[0].control.path.as_str()), (81, "/ip2"));
        assert_eq!((found[1].control.port, found[1].control.path.as_str()), (5000, "/ip1"));
    }

    #[test]
    fn a_base_in_the_description_counts_and_a_type_that_would_break_out_does_not() {
        let urn = "urn:schemas-upnp-org:service:WANIPConnection:1";
        let text = description(&[(urn, "/c"), ("urn:x&quot;:service:WANIPConnection:1", "/d")]);
        let text = text.replace("<device><deviceList>", "<URLBase>http://x:99/</URLBase><device><deviceList>");
        let found = services(text.as_bytes(), &location());
        assert_eq!(found.iter().map(|service| service.control.port).collect::<Vec<_>>(), [99]);
    }

    #[test]
    fn calls_are_read_as_they_were_written() {
        let control = Url::parse("http://a/c").unwrap();
        let service = Service::new("urn:schemas-upnp-org:service:WANIPConnection:2", control).unwrap();
        let client = Ipv4Addr::new(192, 168, 1, 7);
        let map = PortMapping { external_port: 5, internal_port: 41641, client, lease: 7200 };
        let hole = Pinhole { client: "2001:db8::7".parse().unwrap(), port: 41641, lease: 7200 };
        for action in [
            Action::GetExternalIpAddress,
            Action::AddPortMapping(map),
            Action::AddAnyPortMapping(map),
            Action::DeletePortMapping { external_port: 5 },
            Action::AddPinhole(hole),
            Action::UpdatePinhole { id: 7, lease: 60 },
            Action::DeletePinhole { id: 7 },
        ] {
            let body = action.encode(&service);
            assert_eq!(Action::decode(&action.soap_action(&service), body.as_bytes()), Some(action));
        }
    }

    #[test]
    fn answers_and_faults_are_told_apart() {
        let address = Answer { external: Some(Ipv4Addr::new(203, 0, 113, 5)), ..Answer::default() };
        let text = address.encode(&Action::GetExternalIpAddress, "urn:x");
        assert_eq!(Answer::decode(200, text.as_bytes()), Ok(address));
        let port = Answer { reserved_port: Some(7), ..Answer::default() };
        let hole = Answer { pinhole: Some(9), ..Answer::default() };
        for answer in [port, hole] {
            let text = answer.encode(&Action::GetExternalIpAddress, "urn:x");
            assert_eq!(Answer::decode(200, text.as_bytes()), Ok(answer));
        }
        for fault in
            [Fault::Conflict, Fault::OnlyPermanent, Fault::InvalidArguments, Fault::UnknownPinhole, Fault::Other(999)]
        {
            assert_eq!(Answer::decode(500, fault.encode().as_bytes()), Err(fault));
        }
        assert_eq!(Answer::decode(404, b"<html>"), Err(Fault::Other(0)));
        assert_eq!(Answer::decode(200, text.replace("203.0.113.5", "0.0.0.0").as_bytes()).unwrap().external, None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(</?(service|serviceType|controlURL|errorCode|NewReservedPort|UniqueID|NewLeaseTime)>|urn:a:service:WANIPConnection:1|/c|7|<|&|é){0,30}") {
            let _ = services(text.as_bytes(), &location());
            let _ = Answer::decode(200, text.as_bytes());
            for name in [ADD, ADD_HOLE, UPDATE_HOLE] {
                let _ = Action::decode(&format!("x#{name}"), text.as_bytes());
            }
        }
    }
}

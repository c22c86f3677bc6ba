//! The gateway's UPnP server: searches, the description, calls.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::{Entry, Gateway, HTTP_PORT};
use crate::portmap::http;
use crate::portmap::ssdp;
use crate::portmap::status::Protocol;
use crate::portmap::upnp::{Action, Answer, Fault, PortMapping};

const DESCRIPTION: &str = "/description.xml";
const CONTROL: &str = "/control";

impl Gateway {
    pub(super) fn search(&self, datagram: &[u8]) -> Option<Vec<u8>> {
        let target = ssdp::searched(datagram).filter(|_| self.speaks(Protocol::Upnp))?;
        let own = if self.config.quirks.first_version { ssdp::GATEWAY } else { ssdp::GATEWAY_2 };
        let answered = match target {
            ssdp::ALL => own,
            // A later version answers for the earlier ones, by their name.
            ssdp::GATEWAY => ssdp::GATEWAY,
            other if other == own => own,
            _ => return None,
        };
        Some(ssdp::respond(SocketAddr::new(self.config.inside, HTTP_PORT), DESCRIPTION, answered))
    }

    fn service(&self) -> &'static str {
        if self.config.quirks.first_version {
            "urn:schemas-upnp-org:service:WANIPConnection:1"
        } else {
            "urn:schemas-upnp-org:service:WANIPConnection:2"
        }
    }

    pub(super) fn soap(&mut self, now: Instant, source: IpAddr, request: &http::Request<'_>) -> Vec<u8> {
        match (request.method, request.path) {
            ("GET", DESCRIPTION) => http::respond(200, &self.description()),
            ("POST", CONTROL) => {
                let outcome = match Action::decode(request.soap_action, &request.body) {
                    Some(action) => self.call(now, source, &action).map(|answer| (action, answer)),
                    None => Err(Fault::InvalidAction),
                };
                match outcome {
                    Ok((action, answer)) => http::respond(200, &answer.encode(&action, self.service())),
                    Err(fault) => http::respond(500, &fault.encode()),
                }
            }
            _ => http::respond(404, ""),
        }
    }

    fn description(&self) -> String {
        let (service, version) = (self.service(), if self.config.quirks.first_version { 1 } else { 2 });
        format!(
            "<?xml version=\"1.0\"?>\r\n<root xmlns=\"urn:schemas-upnp-org:device-1-0\"><specVersion><major>1</major>\
             <minor>1</minor></specVersion><device>\
             <deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:{version}</deviceType>\
             <friendlyName>laboratory</friendlyName><manufacturer>mesh</manufacturer><modelName>gateway</modelName>\
             <UDN>uuid:00000000-0000-0000-0000-000000000001</UDN><deviceList><device>\
             <deviceType>urn:schemas-upnp-org:device:WANDevice:{version}</deviceType>\
             <friendlyName>wan</friendlyName><manufacturer>mesh</manufacturer><modelName>wan</modelName>\
             <UDN>uuid:00000000-0000-0000-0000-000000000002</UDN><deviceList><device>\
             <deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:{version}</deviceType>\
             <friendlyName>connection</friendlyName><manufacturer>mesh</manufacturer><modelName>connection</modelName>\
             <UDN>uuid:00000000-0000-0000-0000-000000000003</UDN><serviceList><service>\
             <serviceType>{service}</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId>\
             <SCPDURL>/service.xml</SCPDURL><controlURL>{CONTROL}</controlURL><eventSubURL>/event</eventSubURL>\
             </service></serviceList></device></deviceList></device></deviceList></device></root>"
        )
    }

    fn call(&mut self, now: Instant, source: IpAddr, action: &Action) -> Result<Answer, Fault> {
        let refused = self.refuses(Protocol::Upnp);
        match action {
            Action::GetExternalIpAddress => Ok(Answer { external: Some(self.config.outside), reserved_port: None }),
            _ if refused => Err(Fault::NotAuthorized),
            Action::AddPortMapping(map) => self.add(now, source, map, map.external_port).map(|_| Answer::default()),
            Action::AddAnyPortMapping(_) if self.config.quirks.first_version => Err(Fault::InvalidAction),
            Action::AddAnyPortMapping(map) => {
                let inside = SocketAddr::new(map.client.into(), map.internal_port);
                let port = self.choose(inside, map.external_port).ok_or(Fault::NoPortMaps)?;
                let reserved_port = Some(self.add(now, source, map, port)?);
                Ok(Answer { external: None, reserved_port })
            }
            Action::DeletePortMapping { external_port } => match self.ports.get(external_port) {
                Some(entry) if entry.inside.ip() == source => {
                    self.ports.remove(external_port);
                    Ok(Answer::default())
                }
                Some(_) => Err(Fault::NotAuthorized),
                None => Err(Fault::Other(714)),
            },
        }
    }

    fn add(&mut self, now: Instant, source: IpAddr, map: &PortMapping, port: u16) -> Result<u16, Fault> {
        let inside = SocketAddr::new(map.client.into(), map.internal_port);
        if inside.ip() != source {
            return Err(Fault::NotAuthorized);
        }
        if self.config.quirks.permanent_only && map.lease != 0 {
            return Err(Fault::OnlyPermanent);
        }
        if self.config.quirks.same_ports && port != map.internal_port {
            return Err(Fault::SamePorts);
        }
        if !self.is_free(port, inside) {
            return Err(Fault::Conflict);
        }
        let lifetime = Duration::from_secs(self.lifetime(map.lease).into());
        let expires = (map.lease != 0).then(|| now + lifetime);
        self.ports.insert(port, Entry { inside, expires, nonce: None });
        Ok(port)
    }
}

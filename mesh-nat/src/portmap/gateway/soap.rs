//! The gateway's UPnP server: searches and calls.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::description::{self, CONTROL, DESCRIPTION, FIREWALL_CONTROL};
use super::{Entry, Gateway, HTTP_PORT};
use crate::portmap::http;
use crate::portmap::ssdp;
use crate::portmap::status::Protocol;
use crate::portmap::upnp::{Action, Answer, Fault, Pinhole, PortMapping};
use crate::portmap::xml::escape;

impl Gateway {
    pub(super) fn search(&self, datagram: &[u8]) -> Option<Vec<u8>> {
        let target = ssdp::searched(datagram).filter(|_| self.speaks(Protocol::Upnp))?;
        let own = if self.config.quirks.first_version { ssdp::GATEWAY } else { ssdp::GATEWAY_2 };
        let answered = match target {
            ssdp::ALL => own,
            // A later version answers for the earlier ones, by their name.
            ssdp::GATEWAY => ssdp::GATEWAY,
            ssdp::FIREWALL if !self.config.quirks.first_version => ssdp::FIREWALL,
            other if other == own => own,
            _ => return None,
        };
        Some(ssdp::respond(SocketAddr::new(self.config.inside, HTTP_PORT), DESCRIPTION, answered))
    }

    pub(super) fn soap(&mut self, now: Instant, source: IpAddr, request: &http::Request<'_>) -> Vec<u8> {
        let first_version = self.config.quirks.first_version;
        match (request.method, request.path) {
            ("GET", DESCRIPTION) => http::respond(200, &description::device(first_version)),
            ("GET", path) => match description::service(path, first_version) {
                Some(text) => http::respond(200, &text),
                None => http::respond(404, ""),
            },
            ("POST", CONTROL | FIREWALL_CONTROL) => {
                let outcome = match Action::decode(request.soap_action, &request.body) {
                    Some(action) => self.call(now, source, &action).map(|answer| (action, answer)),
                    None => Err(Fault::InvalidAction),
                };
                match outcome {
                    Ok((action, answer)) => {
                        // The type is what stands before the call's name.
                        let urn = request.soap_action.split('#').next().unwrap_or_default();
                        http::respond(200, &answer.encode(&action, &escape(urn)))
                    }
                    Err(fault) => http::respond(500, &fault.encode()),
                }
            }
            _ => http::respond(404, ""),
        }
    }

    fn call(&mut self, now: Instant, source: IpAddr, action: &Action) -> Result<Answer, Fault> {
        let refused = self.refuses(Protocol::Upnp);
        match action {
            Action::GetExternalIpAddress => Ok(Answer { external: Some(self.config.outside), ..Answer::default() }),
            _ if refused => Err(Fault::NotAuthorized),
            Action::AddPortMapping(map) => self.add(now, source, map, map.external_port).map(|_| Answer::default()),
            Action::AddAnyPortMapping(_) if self.config.quirks.first_version => Err(Fault::InvalidAction),
            Action::AddAnyPortMapping(map) => {
                let inside = SocketAddr::new(map.client.into(), map.internal_port);
                let port = self.choose(inside, map.external_port).ok_or(Fault::NoPortMaps)?;
                let reserved_port = Some(self.add(now, source, map, port)?);
                Ok(Answer { reserved_port, ..Answer::default() })
            }
            Action::DeletePortMapping { external_port } => match self.ports.get(external_port) {
                Some(entry) if entry.inside.ip() == source => {
                    self.ports.remove(external_port);
                    Ok(Answer::default())
                }
                Some(_) => Err(Fault::NotAuthorized),
                None => Err(Fault::Other(714)),
            },
            Action::AddPinhole(_) | Action::UpdatePinhole { .. } | Action::DeletePinhole { .. }
                if self.config.quirks.first_version =>
            {
                Err(Fault::InvalidAction)
            }
            Action::AddPinhole(hole) => self.open(now, source, hole),
            Action::UpdatePinhole { id, lease } => {
                let lifetime = Duration::from_secs(self.lifetime(*lease).into());
                self.hole(source, *id)?.expires = Some(now + lifetime);
                Ok(Answer::default())
            }
            Action::DeletePinhole { id } => {
                let inside = self.hole(source, *id)?.inside;
                self.pinholes.remove(&inside);
                Ok(Answer::default())
            }
        }
    }

    fn open(&mut self, now: Instant, source: IpAddr, hole: &Pinhole) -> Result<Answer, Fault> {
        let inside = SocketAddr::new(hole.client.into(), hole.port);
        if inside.ip() != source {
            return Err(Fault::NotAuthorized);
        }
        if !(1..=Pinhole::MAX_LEASE).contains(&hole.lease) || hole.port == 0 {
            return Err(Fault::InvalidArguments);
        }
        let had = self.pinholes.get(&inside).and_then(|entry| entry.id);
        let id = had.unwrap_or_else(|| {
            self.holes = self.holes.wrapping_add(1);
            self.holes
        });
        let expires = Some(now + Duration::from_secs(self.lifetime(hole.lease).into()));
        self.pinholes.insert(inside, Entry { inside, expires, nonce: None, id: Some(id) });
        Ok(Answer { pinhole: Some(id), ..Answer::default() })
    }

    /// The pinhole of this number, if it is the caller's.
    fn hole(&mut self, source: IpAddr, id: u16) -> Result<&mut Entry, Fault> {
        let entry = self.pinholes.values_mut().find(|entry| entry.id == Some(id)).ok_or(Fault::UnknownPinhole)?;
        if entry.inside.ip() == source { Ok(entry) } else { Err(Fault::NotAuthorized) }
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
        self.ports.insert(port, Entry { inside, expires, nonce: None, id: None });
        Ok(port)
    }
}

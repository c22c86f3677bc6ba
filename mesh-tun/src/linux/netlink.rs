//! Applies a [`plan`] over netlink, and reads back what is there.
//!
//! The one module that knows rtnetlink's types. Requests that find their work done already (an address that exists, a
//! route that is gone) count as successes, so that a plan can be applied again after a crash.
#![expect(clippy::wildcard_enum_match_arm, reason = "the kernel sends more attributes than anyone reads, and new ones")]

use std::io;
use std::net::IpAddr;
use std::path::Path;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::LinkFlags;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};

use crate::Error;
use crate::plan::{self, Action, Change, Family, Host, PolicyRule, Route};

/// The priorities that our rules have; others are not looked at.
const OUR_PRIORITIES: std::ops::Range<u32> = 5200..5300;

/// A connection to the kernel's network configuration; needs a tokio runtime.
#[derive(Debug)]
pub struct Netlink {
    pub(super) handle: Handle,
    task: tokio::task::JoinHandle<()>,
}

/// A plan that was applied in part.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Incomplete {
    /// The changes that were made, for [`plan::undo`].
    pub done: Vec<Change>,
    /// Why the next one was not.
    #[source]
    pub error: Error,
}

impl Netlink {
    /// Opens the connection; its work is done by a task on the current runtime.
    ///
    /// # Errors
    /// [`Error::System`] if the kernel offers no netlink socket.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open() -> Result<Self, Error> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|error| Error::system("open a netlink socket", error))?;
        Ok(Self { handle, task: tokio::spawn(connection) })
    }

    /// What the kernel has for the interface `index`, as far as a plan is concerned: its addresses but the link-local
    /// ones, routes through it that somebody configured, and policy rules with our priorities.
    ///
    /// # Errors
    /// [`Error::System`] if the kernel does not answer.
    pub async fn found(&self, index: u32) -> Result<Host, Error> {
        let read = async {
            let mut host = Host::default();
            let mut links = self.handle.link().get().match_index(index).execute();
            while let Some(link) = links.try_next().await? {
                host.up |= link.header.flags.contains(LinkFlags::Up);
            }
            let mut addresses = self.handle.address().get().set_link_index_filter(index).execute();
            while let Some(message) = addresses.try_next().await? {
                host.addresses.extend(address(&message).filter(|address| !is_link_local(address.addr())));
            }
            for family in [Family::V4, Family::V6] {
                let mut routes = self.handle.route().get(all_routes(family)).execute();
                while let Some(message) = routes.try_next().await? {
                    if message.header.protocol == RouteProtocol::Static && interface(&message) == Some(index) {
                        host.routes.extend(route(&message, family));
                    }
                }
            }
            for family in [Family::V4, Family::V6] {
                // A kernel without policy routing has no rules to tell.
                let Ok(rules) = self.rules(family).await else { continue };
                host.rules.extend(rules.into_iter().filter(|rule| OUR_PRIORITIES.contains(&rule.priority)));
            }
            Ok::<_, rtnetlink::Error>(host)
        };
        read.await.map_err(|error| Error::system("read the network configuration", to_io(error)))
    }

    /// Whether the kernel routes by policy rules, so that [`plan::Routing::Policy`] can be used.
    pub async fn has_policy_routing(&self) -> bool {
        // Every kernel that has rules at all begins with the three built-in ones.
        self.rules(Family::V4).await.is_ok_and(|rules| !rules.is_empty())
    }

    /// Makes one change to the interface `index`.
    ///
    /// # Errors
    /// [`Error::NoPermission`] without the privilege, [`Error::System`] otherwise.
    pub async fn apply(&self, index: u32, change: &Change) -> Result<(), Error> {
        let result = match *change {
            Change::Up => self.handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await,
            Change::Down => self.handle.link().set(LinkUnspec::new_with_index(index).down().build()).execute().await,
            Change::AddAddress(address) => {
                self.handle.address().add(index, address.addr(), address.prefix_len()).execute().await
            }
            Change::RemoveAddress(address) => {
                let message =
                    self.handle.address().add(index, address.addr(), address.prefix_len()).message_mut().clone();
                self.handle.address().del(message).execute().await
            }
            Change::AddRoute(route) => self.handle.route().add(route_message(index, route)).execute().await,
            Change::RemoveRoute(route) => self.handle.route().del(route_message(index, route)).execute().await,
            Change::AddRule(rule) => {
                let mut request = self.handle.rule().add();
                *request.message_mut() = rule_message(&rule);
                request.execute().await
            }
            Change::RemoveRule(rule) => self.handle.rule().del(rule_message(&rule)).execute().await,
        };
        match result.map_err(to_io) {
            Ok(()) => Ok(()),
            Err(error) if is_done_already(change, &error) => Ok(()),
            Err(error) => Err(Error::system(describe(change), error)),
        }
    }

    /// Makes the changes in order, up to the first that fails.
    ///
    /// # Errors
    /// [`Incomplete`] says what was done before the failure.
    pub async fn apply_all(&self, index: u32, changes: &[Change]) -> Result<(), Incomplete> {
        for (done, change) in changes.iter().enumerate() {
            if let Err(error) = self.apply(index, change).await {
                return Err(Incomplete { done: changes[..done].to_vec(), error });
            }
        }
        Ok(())
    }

    /// Brings the interface `index` to `wanted` and returns the changes that took.
    ///
    /// # Errors
    /// [`Incomplete`] as for [`Netlink::apply_all`].
    pub async fn converge(&self, index: u32, wanted: &Host) -> Result<Vec<Change>, Incomplete> {
        let found = self.found(index).await.map_err(|error| Incomplete { done: Vec::new(), error })?;
        let changes = plan::changes(&found, wanted);
        self.apply_all(index, &changes).await?;
        Ok(changes)
    }

    async fn rules(&self, family: Family) -> Result<Vec<PolicyRule>, rtnetlink::Error> {
        let version = match family {
            Family::V4 => IpVersion::V4,
            Family::V6 => IpVersion::V6,
        };
        let messages: Vec<_> = self.handle.rule().get(version).execute().try_collect().await?;
        Ok(messages.iter().filter_map(|message| policy_rule(message, family)).collect())
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Whether this host has IPv6 switched on for new interfaces.
#[must_use]
pub fn has_ipv6() -> bool {
    let disabled = Path::new("/proc/sys/net/ipv6/conf/default/disable_ipv6");
    std::fs::read_to_string(disabled).is_ok_and(|text| text.trim() == "0")
}

pub(super) fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// The request for all routes of a family.
pub(super) fn all_routes(family: Family) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family);
    message
}

/// The interface that a route leads through, if it is just one.
pub(super) fn interface(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

/// The destination and table of a unicast route.
pub(super) fn route(message: &RouteMessage, family: Family) -> Option<Route> {
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut address, mut table) = (None, u32::from(message.header.table));
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(v4)) => address = Some(IpAddr::V4(*v4)),
            RouteAttribute::Destination(RouteAddress::Inet6(v6)) => address = Some(IpAddr::V6(*v6)),
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    let unspecified = match family {
        Family::V4 => IpAddr::from([0; 4]),
        Family::V6 => IpAddr::from([0; 16]),
    };
    let destination = IpNet::new(address.unwrap_or(unspecified), message.header.destination_prefix_length).ok()?;
    Some(Route { destination, table })
}

/// The address that a message is about, with its prefix.
pub(super) fn address(message: &AddressMessage) -> Option<IpNet> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            // On a link with a peer the local address is ours, and the other one is not.
            AddressAttribute::Local(address) => found = Some(*address),
            AddressAttribute::Address(address) => found = found.or(Some(*address)),
            _ => {}
        }
    }
    IpNet::new(found?, message.header.prefix_len).ok()
}

pub(super) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn route_message(index: u32, route: Route) -> RouteMessage {
    let mut message = RouteMessageBuilder::<IpAddr>::new().output_interface(index).table_id(route.table).build();
    let (family, address) = match route.destination {
        IpNet::V4(net) => {
            message.header.scope = RouteScope::Link;
            (Family::V4, RouteAddress::Inet(net.network()))
        }
        IpNet::V6(net) => (Family::V6, RouteAddress::Inet6(net.network())),
    };
    message.header.address_family = address_family(family);
    message.header.destination_prefix_length = route.destination.prefix_len();
    message.attributes.push(RouteAttribute::Destination(address));
    message
}

fn rule_message(rule: &PolicyRule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    message.attributes.push(RuleAttribute::Priority(rule.priority));
    if let Some((mark, mask)) = rule.mark {
        message.attributes.push(RuleAttribute::FwMark(mark));
        message.attributes.push(RuleAttribute::FwMask(mask));
    }
    match rule.action {
        Action::Table(table) => {
            message.header.action = RuleAction::ToTable;
            message.attributes.push(RuleAttribute::Table(table));
        }
        Action::Unreachable => message.header.action = RuleAction::Unreachable,
    }
    message
}

/// A rule that selects by mark alone; none for others.
fn policy_rule(message: &RuleMessage, family: Family) -> Option<PolicyRule> {
    let (mut priority, mut mark, mut mask, mut table) = (0, None, u32::MAX, u32::from(message.header.table));
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::FwMark(number) => mark = Some(*number),
            RuleAttribute::FwMask(number) => mask = *number,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Iifname(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::Source(_)
            | RuleAttribute::Destination(_) => return None,
            _ => {}
        }
    }
    let action = match message.header.action {
        RuleAction::ToTable => Action::Table(table),
        RuleAction::Unreachable => Action::Unreachable,
        _ => return None,
    };
    Some(PolicyRule { family, priority, mark: mark.map(|mark| (mark, mask)), action })
}

fn is_done_already(change: &Change, error: &io::Error) -> bool {
    let code = error.raw_os_error().unwrap_or(0);
    match change {
        Change::Up | Change::Down => false,
        Change::AddAddress(_) | Change::AddRoute(_) | Change::AddRule(_) => code == libc::EEXIST,
        Change::RemoveAddress(_) | Change::RemoveRoute(_) | Change::RemoveRule(_) => {
            matches!(code, libc::ESRCH | libc::ENOENT | libc::EADDRNOTAVAIL | libc::ENODEV)
        }
    }
}

fn describe(change: &Change) -> String {
    match change {
        Change::Up => "bring the tunnel interface up".into(),
        Change::Down => "take the tunnel interface down".into(),
        Change::AddAddress(address) => format!("add address {address} to the tunnel interface"),
        Change::RemoveAddress(address) => format!("remove address {address} from the tunnel interface"),
        Change::AddRoute(route) => format!("add route {} to table {}", route.destination, route.table),
        Change::RemoveRoute(route) => format!("remove route {} from table {}", route.destination, route.table),
        Change::AddRule(rule) => format!("add policy rule {}", rule.priority),
        Change::RemoveRule(rule) => format!("remove policy rule {}", rule.priority),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Routing;

    #[test]
    fn our_messages_read_back_as_what_they_were_made_of() {
        let wanted = plan::wanted(
            &[],
            &["100.64.0.0/10".parse().unwrap(), "fd7a:115c:a1e0::/48".parse().unwrap()],
            Routing::Policy { mark: (super::super::BYPASS_MARK, super::super::BYPASS_MASK) },
        );
        for rule in &wanted.rules {
            assert_eq!(policy_rule(&rule_message(rule), rule.family), Some(*rule));
        }
        for expected in &wanted.routes {
            let message = route_message(7, *expected);
            let family = if expected.destination.addr().is_ipv4() { Family::V4 } else { Family::V6 };
            assert_eq!((route(&message, family), interface(&message)), (Some(*expected), Some(7)));
        }
    }

    #[test]
    fn repeated_work_is_success_and_missing_privilege_is_not() {
        let add = Change::AddAddress("100.64.0.1/32".parse().unwrap());
        let remove = Change::RemoveAddress("100.64.0.1/32".parse().unwrap());
        assert!(is_done_already(&add, &io::Error::from_raw_os_error(libc::EEXIST)));
        assert!(is_done_already(&remove, &io::Error::from_raw_os_error(libc::EADDRNOTAVAIL)));
        assert!(!is_done_already(&add, &io::Error::from_raw_os_error(libc::EPERM)));
        assert!(!is_done_already(&remove, &io::Error::from_raw_os_error(libc::EEXIST)));
    }
}

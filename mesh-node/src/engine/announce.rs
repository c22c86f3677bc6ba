//! What control is told of us, and when: endpoint lists that do not flap.
//!
//! Every message to control goes on to all peers, so a list changes only when there is something in it for them:
//!
//! - an address that a STUN server has seen stays listed for five minutes after it was last seen, for a measurement may
//!   lose packets, and a NAT with a mapping for every destination shows another port each time;
//! - what has only gone is told after five seconds, unless it comes back before;
//! - messages are a second apart, but for a move of the home region, which peers have to follow.
//!
//! Path discovery works with the list as it is, at once.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_nat::report::Report;

use super::{Announcement, Command, Endpoint, EndpointKind, Engine, gather};

/// How long an address is told after it was last seen.
const SEEN: Duration = Duration::from_secs(300);
/// How many addresses with one IP are remembered.
const MAX_PER_IP: usize = 6;
/// Between two messages to control.
const SPACING: Duration = Duration::from_secs(1);
/// How long something must be gone before control hears of it.
const GONE: Duration = Duration::from_secs(5);

/// Our addresses as STUN servers have seen them lately, in the order in which they first did.
#[derive(Debug, Default)]
pub(super) struct Sightings(Vec<(Endpoint, Instant)>);

impl Sightings {
    /// Takes what a measurement has found. `fixed_port` is the port of our IPv4 socket if the user has chosen it: where a
    /// NAT gives every destination another port, chances are that somebody has forwarded that one to us.
    pub(super) fn note(&mut self, now: Instant, report: &Report, fixed_port: Option<u16>) {
        for address in report.endpoints() {
            self.note_one(now, Endpoint { address, kind: EndpointKind::Stun });
        }
        let outside = report.global_v4.filter(|_| report.mapping_varies_by_dest_ip == Some(true));
        if let (Some(outside), Some(port)) = (outside, fixed_port) {
            let address = SocketAddr::new(outside.ip(), port);
            self.note_one(now, Endpoint { address, kind: EndpointKind::StunLocalPort });
        }
        self.0.retain(|(_, seen)| now.saturating_duration_since(*seen) <= SEEN);
    }

    fn note_one(&mut self, now: Instant, endpoint: Endpoint) {
        let same = |(known, _): &&mut (Endpoint, Instant)| known.address == endpoint.address;
        if let Some((known, seen)) = self.0.iter_mut().find(same) {
            *seen = now;
            // A server's word is worth more than a guess.
            known.kind = known.kind.min(endpoint.kind);
            return;
        }
        let ip = endpoint.address.ip();
        if self.0.iter().filter(|(known, _)| known.address.ip() == ip).count() >= MAX_PER_IP {
            let of_ip = self.0.iter().enumerate().filter(|(_, (known, _))| known.address.ip() == ip);
            if let Some(oldest) = of_ip.min_by_key(|(_, (_, seen))| *seen).map(|(at, _)| at) {
                self.0.remove(oldest);
            }
        }
        self.0.push((endpoint, now));
    }

    /// The network is another one.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }

    pub(super) fn endpoints(&self) -> impl Iterator<Item = Endpoint> {
        self.0.iter().map(|(endpoint, _)| *endpoint)
    }
}

/// When control was told what, and what it still has to hear.
#[derive(Debug, Default)]
pub(super) struct Announcer {
    told: Announcement,
    told_at: Option<Instant>,
    /// Since when there is something else to be told.
    differs: Option<Instant>,
    due: Option<Instant>,
}

impl Announcer {
    /// Given what is true now, returns it if control should be told now.
    pub(super) fn poll(&mut self, now: Instant, announcement: Announcement) -> Option<Announcement> {
        if !announcement.differs(&self.told) {
            (self.differs, self.due) = (None, None);
            return None;
        }
        let since = *self.differs.get_or_insert(now);
        let due = if announcement.home == self.told.home {
            let patience = if announcement.only_lacks(&self.told) { GONE } else { Duration::ZERO };
            self.told_at.map_or(now, |told_at| (told_at + SPACING).max(since + patience))
        } else {
            now
        };
        if now < due {
            self.due = Some(due);
            return None;
        }
        *self = Self { told: announcement.clone(), told_at: Some(now), differs: None, due: None };
        Some(announcement)
    }

    /// When to call [`Self::poll`] again though nothing has happened.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }
}

impl Engine {
    /// Something has changed that endpoints are made of. Path discovery waits for `measured` ones, changed or not.
    pub(super) fn gather(&mut self, now: Instant, measured: bool) {
        let seen: Vec<_> = self.sightings.endpoints().collect();
        let endpoints = gather(&self.local, &self.mappings, &seen, &self.static_endpoints);
        if measured || endpoints != self.endpoints {
            self.endpoints = endpoints;
            self.agent.set_endpoints(now, self.endpoints.iter().map(|endpoint| endpoint.address).collect());
        }
        self.announce = true;
    }

    /// Tells control what has changed, if it is time to.
    pub(super) fn announce(&mut self, now: Instant) {
        let due = self.announcer.due().is_some_and(|due| due <= now);
        if !std::mem::take(&mut self.announce) && !due {
            return;
        }
        let announcement = Announcement {
            endpoints: self.endpoints.clone(),
            home: self.relays.home(),
            report: self.report.clone(),
            mappings: self.mappings,
        };
        if let Some(announcement) = self.announcer.poll(now, announcement) {
            self.commands.push_back(Command::Announce(announcement));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::epoch;

    fn report(outside: &str, hard: bool) -> Report {
        Report { global_v4: outside.parse().ok(), mapping_varies_by_dest_ip: Some(hard), ..Report::default() }
    }

    fn texts(sightings: &Sightings) -> Vec<String> {
        sightings.endpoints().map(|endpoint| endpoint.address.to_string()).collect()
    }

    fn listing(addresses: &[&str]) -> Announcement {
        let endpoint = |text: &&str| Endpoint { address: text.parse().unwrap(), kind: EndpointKind::Stun };
        Announcement { endpoints: addresses.iter().map(endpoint).collect(), ..Announcement::default() }
    }

    #[test]
    fn an_address_stays_listed_for_five_minutes_after_it_was_last_seen() {
        let (start, mut sightings) = (epoch(), Sightings::default());
        let minutes = |minutes: u64| start + Duration::from_secs(60 * minutes);
        sightings.note(start, &report("203.0.113.5:1", false), None);
        sightings.note(minutes(2), &Report::default(), None);
        assert_eq!(texts(&sightings), ["203.0.113.5:1"], "a measurement without an answer takes nothing back");
        sightings.note(minutes(4), &report("203.0.113.5:2", false), None);
        sightings.note(minutes(5), &report("203.0.113.5:1", false), None);
        assert_eq!(texts(&sightings), ["203.0.113.5:1", "203.0.113.5:2"], "whichever was seen last, the order stays");
        sightings.note(minutes(11), &Report::default(), None);
        assert_eq!(texts(&sightings), Vec::<String>::new());
    }

    #[test]
    fn a_nat_that_shows_another_port_each_time_fills_six_places() {
        let (start, mut sightings) = (epoch(), Sightings::default());
        for port in 1..=20_u16 {
            let now = start + Duration::from_secs(u64::from(port));
            sightings.note(now, &report(&format!("203.0.113.5:{port}"), false), None);
        }
        sightings.note(start + Duration::from_secs(30), &report("203.0.113.6:7", false), None);
        let kept: Vec<_> =
            (15..=20).map(|port| format!("203.0.113.5:{port}")).chain(["203.0.113.6:7".into()]).collect();
        assert_eq!(texts(&sightings), kept);
    }

    #[test]
    fn behind_a_hard_nat_a_port_that_the_user_has_chosen_is_listed_as_a_guess() {
        let kinds = |hard, fixed_port| {
            let mut sightings = Sightings::default();
            sightings.note(epoch(), &report("203.0.113.5:9", hard), fixed_port);
            sightings.endpoints().map(|endpoint| (endpoint.address.port(), endpoint.kind)).collect::<Vec<_>>()
        };
        let (seen, guess) = ((9, EndpointKind::Stun), (41641, EndpointKind::StunLocalPort));
        assert_eq!(kinds(true, Some(41641)), [seen, guess]);
        assert_eq!(kinds(true, None), [seen]);
        assert_eq!(kinds(false, Some(41641)), [seen]);
        assert_eq!(kinds(true, Some(9)), [seen], "what a server has seen is no guess");
    }

    #[test]
    fn control_does_not_hear_of_an_address_that_is_gone_for_a_moment() {
        let (start, mut announcer) = (epoch(), Announcer::default());
        let seconds = |seconds| start + Duration::from_secs(seconds);
        let (both, one) = (listing(&["203.0.113.5:1", "192.0.2.7:1"]), listing(&["203.0.113.5:1"]));
        assert_eq!(announcer.poll(start, both.clone()), Some(both.clone()));
        assert_eq!(announcer.poll(seconds(10), one.clone()), None);
        assert_eq!(announcer.due(), Some(seconds(15)));
        assert_eq!(announcer.poll(seconds(12), both.clone()), None);
        assert_eq!(announcer.due(), None, "it is back");
        assert_eq!(announcer.poll(seconds(20), one.clone()), None);
        assert_eq!(announcer.poll(seconds(25), one.clone()), Some(one));
        assert_eq!(announcer.poll(seconds(26), both.clone()), Some(both), "news are told at once");
    }

    #[test]
    fn a_burst_of_news_waits_a_second_and_a_move_of_the_home_does_not() {
        let (start, mut announcer) = (epoch(), Announcer::default());
        let mut told = Vec::new();
        for step in 0..20_u64 {
            let now = start + Duration::from_millis(50 * step);
            let news = listing(&[&format!("203.0.113.5:{}", step + 1)]);
            told.extend(announcer.poll(now, news).map(|told| told.endpoints[0].address.port()));
        }
        assert_eq!((told, announcer.due()), (vec![1], Some(start + SPACING)));
        let home = mesh_derp::map::RegionId::new(3);
        let moved = Announcement { home, ..listing(&["203.0.113.5:20"]) };
        assert_eq!(announcer.poll(start + Duration::from_millis(960), moved.clone()), Some(moved));
        assert_eq!(announcer.due(), None);
    }
}

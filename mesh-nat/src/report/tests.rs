//! Reports in virtual time: servers answer after a delay, or not.

use super::run::REPORT_LIMIT;
use super::*;
use crate::behaviour::Mapping;
use crate::stun::message::response;
use mesh_derp::map::{DerpNode, DerpRegion};

mod nats;

const V4: (SocketId, &str) = (SocketId(0), "0.0.0.0:41641");
const V6: (SocketId, &str) = (SocketId(1), "[::]:41641");

fn id(number: u16) -> RegionId {
    RegionId::new(number).unwrap()
}

/// Region n has one server at 192.0.2.n and [2001:db8::n].
fn map(regions: u16) -> DerpMap {
    let mut map = DerpMap::default();
    for number in 1..=regions {
        let mut region = DerpRegion::new(id(number), "r", "R");
        let mut node = DerpNode::new(format!("{number}a"), id(number), "relay.example");
        node.ipv4 = format!("192.0.2.{number}");
        node.ipv6 = format!("2001:db8::{number:x}");
        region.nodes.push(node);
        map.regions.insert(id(number), region);
    }
    map
}

struct Bench {
    now: Instant,
    netcheck: Netcheck,
    /// What the caller was asked to do.
    asked: Vec<Event>,
    requests: Vec<(Duration, SocketAddr)>,
    /// What a portal check finds, and when.
    portal: Option<(Option<bool>, u64)>,
}

impl Bench {
    fn new(sockets: &[(SocketId, &str)]) -> Self {
        #[expect(clippy::disallowed_methods, reason = "virtual time starts at any instant")]
        let now = Instant::now();
        let mut netcheck = Netcheck::new([1; 32]);
        let bound: Vec<(SocketId, SocketAddr)> = sockets.iter().map(|(id, at)| (*id, at.parse().unwrap())).collect();
        netcheck.set_sockets(bound.iter().map(|(id, bound)| (*id, Family::of(bound))).collect());
        netcheck.set_ports(&bound);
        Self { now, netcheck, asked: Vec::new(), requests: Vec::new(), portal: None }
    }

    /// Makes one report. `answer` says what a server sees and how long it takes there and back.
    fn report(
        &mut self,
        map: DerpMap,
        scope: Scope,
        answer: impl Fn(SocketAddr) -> Option<(&'static str, u64)>,
        https: impl Fn(RegionId) -> Option<u64>,
    ) -> Report {
        enum Due {
            Stun(SocketAddr, Vec<u8>),
            Https(RegionId, Duration),
            Portal(Option<bool>),
        }
        let started = self.now;
        let mut due: BTreeMap<(Instant, usize), Due> = BTreeMap::new();
        let mut number = 0;
        self.asked.clear();
        self.requests.clear();
        assert!(self.netcheck.start(self.now, Arc::new(map.clone()), scope));
        if self.netcheck.is_running() {
            assert!(!self.netcheck.start(self.now, Arc::new(map), scope), "one at a time");
        }
        for _ in 0..10_000 {
            let mut asked = false;
            while let Some(transmit) = self.netcheck.poll_transmit() {
                self.requests.push((self.now - started, transmit.remote));
                if let Some((mapped, millis)) = answer(transmit.remote) {
                    let tx = Request::decode(&transmit.datagram).unwrap().tx;
                    let at = self.now + Duration::from_millis(millis);
                    due.insert((at, number), Due::Stun(transmit.remote, response(tx, mapped.parse().unwrap())));
                    number += 1;
                }
            }
            while let Some(event) = self.netcheck.poll_event() {
                match event {
                    Event::Finished(report) => return report,
                    Event::Located(_) => {}
                    Event::WantSockets { .. } => {
                        self.netcheck.handle_sockets(self.now, &[]);
                        asked = true;
                    }
                    Event::WantPortalCheck(_) => {
                        let (found, millis) = self.portal.unwrap_or((None, 1000));
                        due.insert((self.now + Duration::from_millis(millis), number), Due::Portal(found));
                        number += 1;
                        self.asked.push(event);
                    }
                    Event::WantHttpsLatency { region } => {
                        let latency = Duration::from_millis(https(region).unwrap_or(300));
                        due.insert((self.now + latency, number), Due::Https(region, latency));
                        number += 1;
                        self.asked.push(event);
                    }
                    Event::Resolve { ref host } => {
                        assert_eq!(host, "relay.example");
                        self.asked.push(event.clone());
                        self.netcheck.handle_resolved(self.now, "relay.example", vec!["192.0.2.77".parse().unwrap()]);
                        asked = true;
                    }
                }
            }
            if asked {
                continue;
            }
            let timeout = self.netcheck.poll_timeout().expect("a running report has a deadline");
            match due.first_key_value().map(|(key, _)| *key).filter(|(at, _)| *at <= timeout) {
                Some(key) => {
                    self.now = self.now.max(key.0);
                    match due.remove(&key).unwrap() {
                        Due::Stun(server, datagram) => {
                            let _ = self.netcheck.handle_datagram_from(self.now, server, &datagram);
                        }
                        Due::Portal(found) => self.netcheck.handle_portal(self.now, found),
                        Due::Https(region, latency) => {
                            let measured = https(region).map(|_| (latency, Family::V4));
                            self.netcheck.handle_https_latency(self.now, region, measured);
                        }
                    }
                }
                None => {
                    self.now = timeout;
                    self.netcheck.handle_timeout(timeout);
                    let next = self.netcheck.poll_timeout();
                    assert!(next.is_none_or(|next| next > timeout), "a deadline stays due after it was handled");
                }
            }
        }
        panic!("the report never ends");
    }
}

fn nobody(_: RegionId) -> Option<u64> {
    None
}

/// Region n answers after 10 n ms.
fn by_distance(server: SocketAddr) -> Option<(&'static str, u64)> {
    match server.ip() {
        IpAddr::V4(ip) => Some(("203.0.113.5:41641", u64::from(ip.octets()[3]) * 10)),
        IpAddr::V6(ip) => Some(("[2001:db8:5::1]:41641", u64::from(ip.segments()[7]) * 10)),
    }
}

#[test]
fn a_report_tells_families_addresses_latencies_and_home() {
    let mut bench = Bench::new(&[V4, V6]);
    let report = bench.report(map(5), Scope::Auto, by_distance, nobody);
    assert!(report.udp && report.ipv4 && report.ipv6 && report.full);
    assert_eq!(report.endpoints(), ["203.0.113.5:41641".parse().unwrap(), "[2001:db8:5::1]:41641".parse().unwrap()]);
    assert_eq!(report.mapping_varies_by_dest_ip, Some(false));
    assert_eq!(report.region_latency[&id(3)], Duration::from_millis(30));
    assert_eq!(report.preferred, Some(id(1)));
    assert!(report.took < Duration::from_millis(150), "{:?}", report.took);
}

#[test]
fn two_servers_that_see_different_addresses_give_the_nat_away() {
    let per_server = |server: SocketAddr| {
        Some((if server.ip() == IpAddr::from([192, 0, 2, 1]) { "203.0.113.5:1" } else { "203.0.113.5:2" }, 5))
    };
    let report = Bench::new(&[V4]).report(map(2), Scope::Auto, per_server, nobody);
    assert_eq!(report.mapping_varies_by_dest_ip, Some(true));
    assert_eq!(report.endpoints().len(), 1, "what one server alone saw is of no use to others");
}

/// A map of one region whose server has a second STUN port.
fn two_ports() -> DerpMap {
    let mut map = map(1);
    let region = map.regions.get_mut(&id(1)).unwrap();
    let name = "1-stun-3479".to_owned();
    region.nodes.push(DerpNode { name, stun_port: 3479, stun_only: true, ..region.nodes[0].clone() });
    map
}

#[test]
fn one_region_with_two_stun_ports_is_enough_to_see_a_mapping_by_port() {
    let per_port =
        |server: SocketAddr| Some((if server.port() == 3478 { "203.0.113.5:1" } else { "203.0.113.5:2" }, 5));
    let report = Bench::new(&[V4]).report(two_ports(), Scope::Auto, per_port, nobody);
    assert_eq!(report.mapping_varies_by_dest_ip, Some(true));
    assert_eq!(report.nat_v4.mapping, Some(Mapping::AddressAndPortDependent));
    assert!(report.took < Duration::from_millis(50), "{:?}", report.took);
    let same = Bench::new(&[V4]).report(two_ports(), Scope::Auto, |_| Some(("203.0.113.5:1", 5)), nobody);
    assert_eq!(same.mapping_varies_by_dest_ip, None, "another address might see another port");
    assert!(same.took < Duration::from_millis(50), "{:?}", same.took);
}

#[test]
fn the_mapping_of_ipv6_is_found_out_as_well() {
    let per_server = |server: SocketAddr| match server.ip() {
        IpAddr::V4(_) => Some(("203.0.113.5:1", 5)),
        IpAddr::V6(ip) if ip.segments()[7] == 1 => Some(("[2001:db8:5::1]:1", 5)),
        IpAddr::V6(_) => Some(("[2001:db8:5::1]:2", 5)),
    };
    let report = Bench::new(&[V4, V6]).report(map(2), Scope::Auto, per_server, nobody);
    assert_eq!(report.nat_v4.mapping, Some(Mapping::EndpointIndependent));
    assert!(report.nat_v6.varies && report.nat_v6.is_easy() == Some(false));
    assert_eq!(report.mapping_varies_by_dest_ip, Some(false), "control asks about IPv4");
}

#[test]
fn a_single_server_leaves_the_mapping_open_and_ends_quickly() {
    let report = Bench::new(&[V4]).report(map(1), Scope::Auto, by_distance, nobody);
    assert_eq!(report.mapping_varies_by_dest_ip, None);
    assert!(report.took <= Duration::from_millis(10), "{:?}", report.took);
}

#[test]
fn a_dead_family_does_not_hold_the_report_up() {
    let only_v4 = |server: SocketAddr| by_distance(server).filter(|_| server.is_ipv4());
    let report = Bench::new(&[V4, V6]).report(map(1), Scope::Auto, only_v4, nobody);
    assert!(report.ipv4 && !report.ipv6);
    assert!(report.took <= Duration::from_millis(100), "{:?}", report.took);
}

#[test]
fn a_lost_request_is_repeated() {
    let first = std::cell::Cell::new(true);
    let lossy = |server: SocketAddr| (!first.replace(false)).then(|| by_distance(server)).flatten();
    let report = Bench::new(&[V4]).report(map(1), Scope::Auto, lossy, nobody);
    assert_eq!(report.region_latency[&id(1)], Duration::from_millis(10));
    assert!(report.took < Duration::from_millis(150), "{:?}", report.took);
}

#[test]
fn where_udp_is_blocked_https_chooses_the_home_within_a_second() {
    let mut bench = Bench::new(&[V4, V6]);
    let https = |region: RegionId| (region != id(3)).then(|| 100 - u64::from(region.get()) * 10);
    let report = bench.report(map(3), Scope::Auto, |_| None, https);
    assert_eq!(bench.asked.len(), 3);
    assert!(!report.udp && report.ipv4 && !report.ipv6);
    assert_eq!(report.preferred, Some(id(2)));
    assert!(report.endpoints().is_empty());
    assert!(report.took < Duration::from_secs(1), "{:?}", report.took);
    assert_eq!(report.nat_v4, crate::Behaviour::default());
}

#[test]
fn where_udp_is_blocked_far_relays_are_not_waited_for() {
    let https = |region: RegionId| Some(if region == id(2) { 400 } else { 5000 });
    let report = Bench::new(&[V4]).report(map(9), Scope::Full, |_| None, https);
    assert_eq!(report.preferred, Some(id(2)));
    assert!(report.took < Duration::from_secs(1), "{:?}", report.took);
}

#[test]
fn a_relay_that_answers_after_the_end_still_becomes_home() {
    let mut bench = Bench::new(&[V4]);
    let report = bench.report(map(2), Scope::Full, |_| None, |_| Some(60_000));
    assert_eq!(report.preferred, None);
    bench.now += Duration::from_secs(1);
    bench.netcheck.handle_https_latency(bench.now, id(2), Some((Duration::from_millis(900), Family::V4)));
    let Some(Event::Finished(amended)) = bench.netcheck.poll_event() else { panic!("nothing was amended") };
    assert_eq!(amended.preferred, Some(id(2)));
    assert!(amended.ipv4 && !amended.udp);
    bench.netcheck.handle_https_latency(bench.now, id(2), Some((Duration::from_millis(900), Family::V4)));
    assert_eq!(bench.netcheck.poll_event(), None, "once");
}

#[test]
fn a_portal_is_looked_for_only_while_udp_is_silent() {
    let mut map = map(2);
    map.regions.get_mut(&id(1)).unwrap().nodes[0].can_port80 = true;
    let mut bench = Bench::new(&[V4]);
    bench.portal = Some((Some(true), 20));
    let caught = bench.report(map.clone(), Scope::Full, |_| None, nobody);
    assert_eq!(caught.captive_portal, Some(true));
    assert!(caught.took <= REPORT_LIMIT);
    let free = bench.report(map.clone(), Scope::Full, by_distance, nobody);
    assert_eq!(free.captive_portal, None);
    // A relay that takes no connection on port 80 is no portal, and no reason to wait for long.
    bench.portal = Some((None, 60_000));
    let silent = bench.report(map, Scope::Full, |_| None, |_| Some(50));
    assert_eq!(silent.captive_portal, None);
    assert!(silent.took < Duration::from_secs(1), "{:?}", silent.took);
}

#[test]
fn however_the_network_is_a_report_takes_less_than_a_second_and_a_half() {
    // A region that never answers, slow ones, and half of IPv6.
    let patchy = |server: SocketAddr| match server.ip() {
        IpAddr::V4(ip) if ip.octets()[3] == 1 => None,
        IpAddr::V4(_) => Some(("203.0.113.5:41641", 600)),
        IpAddr::V6(_) => None,
    };
    for regions in 1..6 {
        let report = Bench::new(&[V4, V6]).report(map(regions), Scope::Full, patchy, |_| Some(300));
        assert!(report.took < Duration::from_millis(1500), "{regions} regions: {:?}", report.took);
        assert_eq!(report.udp, regions > 1);
    }
    let unresolved = {
        let mut map = map(2);
        map.regions.get_mut(&id(1)).unwrap().nodes[0].ipv4.clear();
        Bench::new(&[V4]).report(map, Scope::Full, |server| by_distance(server).filter(|_| false), nobody)
    };
    assert!(unresolved.took < Duration::from_millis(1500));
}

#[test]
fn the_address_of_the_last_report_stays_while_any_server_sees_it() {
    let fast = |first: u8| {
        move |server: SocketAddr| {
            let IpAddr::V4(ip) = server.ip() else { return None };
            let last = ip.octets()[3];
            Some((if last == 1 { "203.0.113.5:1" } else { "203.0.113.5:2" }, if last == first { 5 } else { 20 }))
        }
    };
    let mut bench = Bench::new(&[V4]);
    let first = bench.report(map(2), Scope::Full, fast(1), nobody).endpoints();
    assert_eq!(first, ["203.0.113.5:1".parse().unwrap()]);
    assert_eq!(bench.report(map(2), Scope::Full, fast(2), nobody).endpoints(), first);
}

#[test]
fn a_region_without_stun_is_measured_by_https_beside_the_others() {
    let mut map = map(2);
    map.regions.get_mut(&id(2)).unwrap().nodes[0].stun_port = -1;
    let mut bench = Bench::new(&[V4]);
    bench.netcheck.set_home(Some(id(2)));
    let report = bench.report(map.clone(), Scope::Full, by_distance, |_| Some(12));
    assert_eq!(report.region_latency[&id(2)], Duration::from_millis(12));
    assert_eq!(report.preferred, Some(id(2)), "2 ms are no reason to move");
    let later = bench.report(map, Scope::Auto, by_distance, |_| Some(12));
    assert!(!later.full);
    assert_eq!(later.preferred, Some(id(2)));
}

#[test]
fn a_change_of_address_makes_the_next_report_a_full_one() {
    let mut bench = Bench::new(&[V4]);
    let at = |mapped: &'static str| move |_: SocketAddr| Some((mapped, 5));
    assert!(bench.report(map(4), Scope::Auto, at("203.0.113.5:1"), nobody).full);
    assert!(!bench.report(map(4), Scope::Auto, at("203.0.113.5:1"), nobody).full);
    assert!(!bench.report(map(4), Scope::Auto, at("203.0.113.9:1"), nobody).full);
    assert!(bench.report(map(4), Scope::Auto, at("203.0.113.9:1"), nobody).full);
}

#[test]
fn a_node_without_sockets_measures_by_https_alone() {
    let report = Bench::new(&[]).report(map(2), Scope::Auto, |_| None, |region| Some(u64::from(region.get())));
    assert_eq!(report.preferred, Some(id(1)));
    assert!(report.took < Duration::from_millis(10), "{:?}", report.took);
}

#[test]
fn a_dead_network_is_reported_as_such() {
    let report = Bench::new(&[V4]).report(map(2), Scope::Auto, |_| None, nobody);
    assert_eq!(report.preferred, None);
    assert!(!report.udp && !report.ipv4);
    assert!(report.took <= REPORT_LIMIT);
    let empty = Bench::new(&[V4]).report(DerpMap::default(), Scope::Auto, |_| None, nobody);
    assert!(empty.took <= Duration::from_millis(1), "nothing to ask");
}

#[test]
fn later_reports_ask_only_the_nearest_until_five_minutes_are_over() {
    let mut bench = Bench::new(&[V4]);
    bench.report(map(8), Scope::Auto, by_distance, nobody);
    assert!(bench.requests.len() >= 8);
    let second = bench.report(map(8), Scope::Auto, by_distance, nobody);
    assert!(!second.full);
    assert_eq!(second.region_latency.keys().copied().collect::<Vec<_>>(), [id(1), id(2), id(3)]);
    assert!(bench.requests.len() <= 4, "{:?}", bench.requests);
    assert!(bench.report(map(8), Scope::Full, by_distance, nobody).full);
    bench.now += Duration::from_secs(301);
    assert!(bench.report(map(8), Scope::Auto, by_distance, nobody).full);
}

#[test]
fn the_home_stays_when_another_region_is_slightly_nearer() {
    let mut bench = Bench::new(&[V4]);
    let near = |first: u64, second: u64| {
        move |server: SocketAddr| {
            Some(("203.0.113.5:9", if server.ip() == IpAddr::from([192, 0, 2, 1]) { first } else { second }))
        }
    };
    assert_eq!(bench.report(map(2), Scope::Full, near(40, 50), nobody).preferred, Some(id(1)));
    assert_eq!(bench.report(map(2), Scope::Full, near(50, 41), nobody).preferred, Some(id(1)));
    assert_eq!(bench.report(map(2), Scope::Full, near(90, 20), nobody).preferred, Some(id(2)));
}

#[test]
fn a_home_that_was_asked_for_is_kept_whatever_others_measure_until_it_is_silent_for_two_minutes() {
    let mut bench = Bench::new(&[V4]);
    let (near, far) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
    let both = |server: SocketAddr| Some(("203.0.113.5:9", if server.ip() == far { 300 } else { 5 }));
    let near_alone = |server: SocketAddr| (server.ip() == near).then_some(("203.0.113.5:9", 5));
    assert_eq!(bench.report(map(2), Scope::Full, both, nobody).preferred, Some(id(1)));
    bench.netcheck.force_home(Some(id(2)));
    for _ in 0..3 {
        assert_eq!(bench.report(map(2), Scope::Full, both, nobody).preferred, Some(id(2)), "far, but asked for");
    }
    bench.netcheck.heard_by_relay(bench.now, id(2));
    bench.now += Duration::from_secs(100);
    assert_eq!(bench.report(map(2), Scope::Full, near_alone, nobody).preferred, Some(id(2)), "its relay was heard");
    bench.now += Duration::from_secs(100);
    assert_eq!(bench.report(map(2), Scope::Full, near_alone, nobody).preferred, Some(id(1)), "it seems to be dead");
    assert_eq!(bench.report(map(2), Scope::Full, both, nobody).preferred, Some(id(2)), "it is back");
    bench.netcheck.force_home(None);
    assert_eq!(bench.report(map(2), Scope::Full, both, nobody).preferred, Some(id(1)));
    bench.netcheck.force_home(Some(id(9)));
    assert_eq!(bench.report(map(2), Scope::Full, both, nobody).preferred, Some(id(1)), "there is no such region");
}

#[test]
fn a_change_of_network_gives_a_report_up_and_the_next_one_begins_at_once() {
    let mut bench = Bench::new(&[V4]);
    assert!(bench.netcheck.start(bench.now, Arc::new(map(2)), Scope::Full));
    let former = bench.netcheck.poll_transmit().unwrap();
    bench.netcheck.forget_network();
    assert!(!bench.netcheck.is_running());
    while bench.netcheck.poll_transmit().is_some() {}
    assert!(bench.netcheck.start(bench.now, Arc::new(map(2)), Scope::Full));
    let late = response(Request::decode(&former.datagram).unwrap().tx, "203.0.113.5:1".parse().unwrap());
    let outcome = bench.netcheck.handle_datagram_from(bench.now, former.remote, &late);
    assert_eq!(outcome, Err(StunError::UnknownTransaction), "an answer from the former network");
}

#[test]
fn names_are_looked_up_once_and_addresses_in_their_place_never() {
    let mut map = map(1);
    let node = &mut map.regions.get_mut(&id(1)).unwrap().nodes[0];
    node.ipv4.clear();
    let mut bench = Bench::new(&[V4]);
    let report = bench.report(map.clone(), Scope::Full, by_distance, nobody);
    assert_eq!(report.region_latency[&id(1)], Duration::from_millis(770));
    assert_eq!(bench.asked.first(), Some(&Event::Resolve { host: "relay.example".into() }));
    bench.report(map.clone(), Scope::Full, by_distance, nobody);
    assert!(bench.asked.iter().all(|event| !matches!(event, Event::Resolve { .. })));

    map.regions.get_mut(&id(1)).unwrap().nodes[0].host_name = "192.0.2.9".into();
    bench.report(map, Scope::Full, by_distance, nobody);
    assert_eq!(bench.requests[0].1, "192.0.2.9:3478".parse().unwrap());
}

#[test]
fn answers_to_other_questions_are_refused() {
    let mut bench = Bench::new(&[V4]);
    let stray = response(TransactionId([9; 12]), "203.0.113.5:1".parse().unwrap());
    let server = "192.0.2.1:3478".parse().unwrap();
    assert_eq!(bench.netcheck.handle_datagram_from(bench.now, server, &stray), Err(StunError::UnknownTransaction));
    bench.netcheck.start(bench.now, Arc::new(map(1)), Scope::Auto);
    assert_eq!(bench.netcheck.handle_datagram_from(bench.now, server, &stray), Err(StunError::UnknownTransaction));
    assert_eq!(bench.netcheck.handle_datagram_from(bench.now, server, b"x"), Err(StunError::Malformed));
    let request = request(TransactionId([9; 12]));
    assert_eq!(bench.netcheck.handle_datagram_from(bench.now, server, &request), Err(StunError::UnknownTransaction));
}

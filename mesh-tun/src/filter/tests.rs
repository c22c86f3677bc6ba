//! The filter against the table in its documentation, and against a slow implementation of the same.

use super::*;
use crate::packet::TcpFlags;
use proptest::prelude::*;

const NOW: Duration = Duration::from_secs(10);
const SYN: Transport = Transport::Tcp { source: 9, destination: 80, flags: TcpFlags::SYN };
const ECHO: Transport = Transport::Icmp { class: IcmpClass::EchoRequest, identifier: 1 };

#[test]
fn nothing_passes_before_rules_are_received() {
    let filter = Filter::closed(flows());
    let established = Transport::Tcp { source: 9, destination: 80, flags: TcpFlags::ACK };
    for transport in [SYN, established, ECHO] {
        assert_eq!(judge(&filter, packet(Protocol::TCP, transport)), Verdict::Drop(Reason::NoFilter));
    }
}

#[test]
fn an_open_filter_accepts_what_no_rule_could() {
    let filter = Filter::open(flows());
    let multicast = Packet { destination: ip("ff02::1"), ..packet(Protocol(47), Transport::Unknown) };
    assert_eq!(filter.inbound(&multicast, Standing::Jailed, NOW), Verdict::Accept);
}

#[test]
fn a_rule_opens_its_port_to_its_source_and_nothing_else() {
    let filter = filter(&[rule("100.64.0.2", "100.64.0.1", 80..=80, &[])]);
    assert_eq!(judge(&filter, packet(Protocol::TCP, SYN)), Verdict::Accept);
    let ssh = Transport::Tcp { source: 9, destination: 22, flags: TcpFlags::SYN };
    assert_eq!(judge(&filter, packet(Protocol::TCP, ssh)), Verdict::Drop(Reason::NoRule));
    let other = Packet { source: ip("100.64.0.3"), ..packet(Protocol::TCP, SYN) };
    assert_eq!(judge(&filter, other), Verdict::Drop(Reason::NoRule));
}

#[test]
fn a_jailed_peer_may_only_answer() {
    let filter = filter(&[rule("*", "*", ALL_PORTS, &[])]);
    assert_eq!(filter.inbound(&packet(Protocol::TCP, SYN), Standing::Jailed, NOW), Verdict::Drop(Reason::NoRule));
    let reply = Transport::Icmp { class: IcmpClass::EchoReply, identifier: 1 };
    assert_eq!(filter.inbound(&packet(Protocol::ICMP, reply), Standing::Jailed, NOW), Verdict::Accept);
}

#[test]
fn errors_about_earlier_packets_get_in_whatever_the_rules() {
    for (protocol, kind) in [(Protocol::ICMP, 3), (Protocol::ICMP, 11), (Protocol::ICMPV6, 2), (Protocol::ICMPV6, 1)] {
        let transport = Transport::parse(protocol, &[kind, 4, 0, 0, 0, 0, 5, 0]).unwrap();
        for standing in [Standing::Ordinary, Standing::Jailed] {
            assert_eq!(filter(&[]).inbound(&packet(protocol, transport), standing, NOW), Verdict::Accept);
        }
    }
}

#[test]
fn a_first_fragment_is_judged_like_the_whole_packet() {
    let filter = filter(&[rule("100.64.0.2", "100.64.0.1", 53..=53, &[])]);
    for (port, verdict) in [(53, Verdict::Accept), (54, Verdict::Drop(Reason::NoRule))] {
        let transport = Transport::Udp { source: 9, destination: port };
        let first = Packet { fragment: Fragment::First, ..packet(Protocol::UDP, transport) };
        assert_eq!(judge(&filter, first), verdict);
    }
}

#[test]
fn an_answer_to_our_datagram_passes_without_a_rule() {
    let filter = filter(&[]);
    let answer = packet(Protocol::UDP, Transport::Udp { source: 53, destination: 4000 });
    assert_eq!(judge(&filter, answer), Verdict::Drop(Reason::NoRule));
    let question = Packet {
        source: answer.destination,
        destination: answer.source,
        transport: Transport::Udp { source: 4000, destination: 53 },
        ..answer
    };
    filter.note_outbound(&question, NOW);
    assert_eq!(judge(&filter, answer), Verdict::Accept);
    let late = NOW + flow::FLOW_LIFETIME * 2;
    assert_eq!(filter.inbound(&answer, Standing::Ordinary, late), Verdict::Drop(Reason::NoRule));
}

#[test]
fn flows_outlive_the_filter_that_saw_them() {
    let (before, question) = (filter(&[]), Transport::Udp { source: 4000, destination: 53 });
    let out = Packet { source: ip("100.64.0.1"), destination: ip("100.64.0.2"), ..packet(Protocol::UDP, question) };
    before.note_outbound(&out, NOW);
    let after = Filter::new(&local(), &[], Arc::clone(before.flows()));
    let answer = packet(Protocol::UDP, Transport::Udp { source: 53, destination: 4000 });
    assert_eq!(judge(&after, answer), Verdict::Accept);
}

#[test]
fn ping_needs_any_rule_between_the_two() {
    assert_eq!(judge(&filter(&[]), packet(Protocol::ICMP, ECHO)), Verdict::Drop(Reason::NoRule));
    let ssh_only = filter(&[rule("100.64.0.0/10", "*", 22..=22, &[Protocol::TCP])]);
    assert_eq!(judge(&ssh_only, packet(Protocol::ICMP, ECHO)), Verdict::Accept);
}

#[test]
fn sctp_must_be_named_and_other_protocols_need_all_ports() {
    let association = packet(Protocol::SCTP, Transport::Sctp { source: 1, destination: 2 });
    assert_eq!(judge(&filter(&[rule("*", "*", ALL_PORTS, &[])]), association), Verdict::Drop(Reason::NoRule));
    let named = filter(&[rule("*", "*", 2..=2, &[Protocol::SCTP])]);
    assert_eq!(judge(&named, association), Verdict::Accept);
    let gre = packet(Protocol(47), Transport::Unknown);
    assert_eq!(judge(&filter(&[rule("*", "*", 1..=9, &[Protocol(47)])]), gre), Verdict::Drop(Reason::NoRule));
    assert_eq!(judge(&filter(&[rule("*", "*", ALL_PORTS, &[Protocol(47)])]), gre), Verdict::Accept);
    assert_eq!(judge(&filter(&[]), packet(Protocol::TSMP, Transport::Unknown)), Verdict::Accept);
}

#[test]
fn only_our_own_addresses_are_sources_once_they_are_known() {
    let filter = filter(&[]);
    for (source, ours) in [("100.64.0.1", true), ("100.64.0.7", true), ("fd7a::1", true), ("100.64.0.2", false)] {
        assert_eq!(filter.owns(ip(source)), ours, "{source}");
        assert!(Filter::open(flows()).owns(ip(source)) && Filter::closed(flows()).owns(ip(source)));
    }
}

#[test]
fn only_our_own_addresses_are_destinations() {
    let filter = filter(&[rule("*", "*", ALL_PORTS, &[])]);
    for (destination, reason) in [
        ("8.8.8.8", Reason::NotLocal),
        ("224.0.0.1", Reason::Scope),
        ("169.254.1.1", Reason::Scope),
        ("ff02::1", Reason::Scope),
        ("fe80::1", Reason::Scope),
    ] {
        let packet = Packet { destination: ip(destination), ..packet(Protocol::TCP, SYN) };
        assert_eq!(judge(&filter, packet), Verdict::Drop(reason), "{destination}");
    }
}

#[test]
fn later_fragments_pass_unless_they_overlay_a_header() {
    let filter = filter(&[]);
    let later = |offset| Packet { fragment: Fragment::Later { offset }, ..packet(Protocol::TCP, Transport::Unknown) };
    assert_eq!(judge(&filter, later(1480)), Verdict::Accept);
    assert_eq!(judge(&filter, later(8)), Verdict::Drop(Reason::Overlap));
}

proptest! {
    #[test]
    fn equals_the_slow_reference(
        rules in proptest::collection::vec(any_rule(), 0..6),
        probes in proptest::collection::vec(any_packet(), 1..40),
        jailed: bool,
    ) {
        let filter = filter(&rules);
        let standing = if jailed { Standing::Jailed } else { Standing::Ordinary };
        let mut begun = Vec::new();
        for (probe, outgoing) in probes {
            if outgoing {
                filter.note_outbound(&probe, NOW);
                begun.push(probe);
                continue;
            }
            let accepted = filter.inbound(&probe, standing, NOW) == Verdict::Accept;
            prop_assert_eq!(accepted, reference(&rules, standing, &begun, &probe), "{:?}", probe);
        }
    }
}

/// The documented table, by walking every rule and every flow.
fn reference(rules: &[Rule], standing: Standing, begun: &[Packet<'_>], packet: &Packet<'_>) -> bool {
    let local = local().iter().any(|prefix| prefix.contains(&packet.destination));
    let out_of_scope = match packet.destination {
        IpAddr::V4(v4) => v4.octets()[0] >> 4 == 14 || v4.octets()[..2] == [169, 254],
        IpAddr::V6(v6) => v6.octets()[0] == 0xff || v6.segments()[0] & 0xffc0 == 0xfe80,
    };
    if !local || out_of_scope {
        return false;
    }
    if let Fragment::Later { offset } = packet.fragment {
        return offset >= 80;
    }
    let rules: &[Rule] = if standing == Standing::Jailed { &[] } else { rules };
    let rule_allows = |ports_match: &dyn Fn(&RangeInclusive<u16>) -> bool, any_protocol: bool| {
        rules.iter().any(|rule| {
            rule.sources.iter().any(|source| source.contains(packet.source))
                && rule
                    .destinations
                    .iter()
                    .any(|to| to.addresses.contains(packet.destination) && ports_match(&to.ports))
                && (any_protocol || rule.covers(packet.protocol))
        })
    };
    let answers = || {
        begun.iter().any(|out| {
            (out.protocol, out.source, out.destination) == (packet.protocol, packet.destination, packet.source)
                && out.transport.ports() == packet.transport.ports().map(|(from, to)| (to, from))
        })
    };
    match packet.transport {
        Transport::Tcp { destination, flags, .. } => {
            !flags.opens() || rule_allows(&|ports| ports.contains(&destination), false)
        }
        Transport::Udp { destination, .. } | Transport::Sctp { destination, .. } => {
            answers() || rule_allows(&|ports| ports.contains(&destination), false)
        }
        Transport::Icmp { class: IcmpClass::EchoReply | IcmpClass::Error, .. } => true,
        Transport::Icmp { .. } => rule_allows(&|_| true, true),
        Transport::Unknown => packet.protocol == Protocol::TSMP || rule_allows(&|ports| *ports == ALL_PORTS, false),
    }
}

fn any_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0..8_u8).prop_map(|last| IpAddr::from([100, 64, 0, last])),
        (0..4_u16).prop_map(|last| IpAddr::from([0xfd7a, 0, 0, 0, 0, 0, 0, last])),
        proptest::sample::select(&["224.0.0.1", "169.254.0.1", "10.0.0.1", "ff02::1", "fe80::1"]).prop_map(ip),
    ]
}

fn any_addresses() -> impl Strategy<Value = Addresses> {
    prop_oneof![
        Just(Addresses::ANY),
        any_address().prop_map(Addresses::from),
        Just("100.64.0.0/30".parse().unwrap()),
        Just("100.64.0.1-100.64.0.6".parse().unwrap()),
        Just("fd7a::/64".parse().unwrap()),
        proptest::sample::select(&["0.0.0.0/0", "::/0", "100.64.0.4/31", "100.64.0.0/10"])
            .prop_map(|prefix| prefix.parse().unwrap()),
    ]
}

fn any_ports() -> impl Strategy<Value = RangeInclusive<u16>> {
    prop_oneof![Just(ALL_PORTS), (0..6_u16, 0..6_u16).prop_map(|(a, b)| a.min(b)..=a.max(b))]
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    proptest::sample::select(&[1, 6, 17, 58, 132, 47, 99]).prop_map(Protocol)
}

fn any_rule() -> impl Strategy<Value = Rule> {
    (
        proptest::collection::vec(any_addresses(), 0..3),
        proptest::collection::vec((any_addresses(), any_ports()), 0..3),
        proptest::collection::vec(any_protocol(), 0..3),
    )
        .prop_map(|(sources, destinations, protocols)| {
            let destinations =
                destinations.into_iter().map(|(addresses, ports)| Destination { addresses, ports }).collect();
            Rule { sources, destinations, protocols }
        })
}

fn any_packet() -> impl Strategy<Value = (Packet<'static>, bool)> {
    let any_fragment = prop_oneof![
        4 => Just(Fragment::Whole),
        1 => Just(Fragment::First),
        1 => (1..20_usize).prop_map(|eighths| Fragment::Later { offset: eighths * 8 }),
    ];
    let ends = (any_address(), any_address());
    (ends, any_protocol(), 0..6_u16, 0..6_u16, any::<u8>(), any_fragment, any::<bool>()).prop_map(
        |((source, destination), protocol, from, to, kind, fragment, outgoing)| {
            let mut header = [0_u8; 20];
            header[..2].copy_from_slice(&from.to_be_bytes());
            header[2..4].copy_from_slice(&to.to_be_bytes());
            header[13] = kind;
            if matches!(protocol, Protocol::ICMP | Protocol::ICMPV6) {
                header[0] = kind;
            }
            let transport = match fragment {
                Fragment::Whole | Fragment::First => Transport::parse(protocol, &header).unwrap(),
                Fragment::Later { .. } => Transport::Unknown,
            };
            (Packet { source, destination, protocol, fragment, transport, payload: &[] }, outgoing)
        },
    )
}

use std::ops::RangeInclusive;

fn judge(filter: &Filter, packet: Packet<'_>) -> Verdict {
    filter.inbound(&packet, Standing::Ordinary, NOW)
}

fn flows() -> Arc<Flows> {
    Arc::new(Flows::new([3; 16]))
}

fn local() -> Vec<IpNet> {
    vec!["100.64.0.1/32".parse().unwrap(), "100.64.0.4/30".parse().unwrap(), "fd7a::1/128".parse().unwrap()]
}

fn filter(rules: &[Rule]) -> Filter {
    Filter::new(&local(), rules, flows())
}

fn rule(source: &str, destination: &str, ports: RangeInclusive<u16>, protocols: &[Protocol]) -> Rule {
    Rule {
        sources: vec![source.parse().unwrap()],
        destinations: vec![Destination { addresses: destination.parse().unwrap(), ports }],
        protocols: protocols.to_vec(),
    }
}

fn packet(protocol: Protocol, transport: Transport) -> Packet<'static> {
    let (source, destination) = (ip("100.64.0.2"), ip("100.64.0.1"));
    Packet { source, destination, protocol, fragment: Fragment::Whole, transport, payload: &[] }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

//! The table of names, and one answer to one message.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use ipnet::IpNet;

/// How long answers may be kept, in seconds: short, since nodes are renamed and names move.
const TTL: u32 = 60;
/// How long a missing name may be kept, in seconds.
const NEGATIVE_TTL: u32 = 10;
/// The largest UDP answer we send, whatever the client offers: it fits the mesh's smallest MTU (RFC 9715 §3.2).
const LARGEST_UDP: usize = 1232;
/// The largest UDP answer without EDNS (RFC 1035 §4.2.1).
const PLAIN_UDP: usize = 512;
/// Bytes of a DNS header.
const HEADER_LEN: usize = 12;

/// What a message came over: it bounds the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// One datagram; longer answers are truncated.
    Udp,
    /// A stream; 65535 bytes.
    Tcp,
}

/// What to do with one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send this back.
    Answer(Vec<u8>),
    /// Pass the message on unchanged to the first of these that answers; never empty.
    Forward(Vec<SocketAddr>),
    /// No DNS query at all: do nothing.
    Ignore,
}

/// The names of a mesh, and who answers for the rest.
///
/// ```
/// use mesh_node::dns::MagicDns;
///
/// let mut dns = MagicDns::new("example.ts.net");
/// assert!(dns.insert("web.example.ts.net.", &["100.64.0.7".parse()?]));
/// assert_eq!(dns.lookup("web"), Some(["100.64.0.7".parse()?].as_slice()));
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Clone, Debug)]
pub struct MagicDns {
    domain: Option<Name>,
    hosts: BTreeMap<Name, Vec<IpAddr>>,
    /// Names without data that have others below them: they exist all the same (RFC 8020).
    inner: BTreeSet<Name>,
    reverse: BTreeMap<IpAddr, Name>,
    zones: Vec<IpNet>,
    routes: BTreeMap<Name, Vec<SocketAddr>>,
    resolvers: Vec<SocketAddr>,
}

impl Default for MagicDns {
    /// A table that knows nothing and refuses everything outside the mesh's reverse zones.
    fn default() -> Self {
        Self::new("")
    }
}

impl MagicDns {
    /// An empty table for nodes below `domain`; an empty or impossible domain means that there is none.
    pub fn new(domain: &str) -> Self {
        Self {
            domain: absolute(domain),
            hosts: BTreeMap::new(),
            inner: BTreeSet::new(),
            reverse: BTreeMap::new(),
            zones: vec![
                IpNet::new_assert(Ipv4Addr::new(100, 64, 0, 0).into(), 10),
                IpNet::new_assert(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0).into(), 48),
            ],
            routes: BTreeMap::new(),
            resolvers: Vec::new(),
        }
    }

    /// Adds a node: its addresses are answered for its name, and its name for them. `name` is a full name, or a bare
    /// label to be completed with the domain. False when the name is impossible.
    pub fn insert(&mut self, name: &str, addresses: &[IpAddr]) -> bool {
        let Some(name) = self.add(name, addresses) else { return false };
        for address in addresses {
            self.reverse.entry(*address).or_insert_with(|| name.clone());
        }
        true
    }

    /// Adds one more address to a name that need not be a node's; it is not answered in reverse. False when the name is
    /// impossible.
    pub fn add_record(&mut self, name: &str, address: IpAddr) -> bool {
        self.add(name, &[address]).is_some()
    }

    /// Sends everything below `suffix` to these resolvers; none at all means that only this table answers there.
    /// False when the name is impossible.
    pub fn add_route(&mut self, suffix: &str, resolvers: Vec<SocketAddr>) -> bool {
        let Some(suffix) = absolute(suffix) else { return false };
        self.routes.insert(suffix, resolvers);
        true
    }

    /// Who answers for the rest of the world; none means that it is refused.
    pub fn set_resolvers(&mut self, resolvers: Vec<SocketAddr>) {
        self.resolvers = resolvers;
    }

    /// The addresses of a full name, with or without its last dot, or of a bare label.
    pub fn lookup(&self, name: &str) -> Option<&[IpAddr]> {
        let name = self.complete(absolute(name)?);
        self.hosts.get(&name).map(Vec::as_slice)
    }

    /// The full name of a node, without its last dot.
    pub fn name_of(&self, address: IpAddr) -> Option<String> {
        self.reverse.get(&address).map(|name| name.to_ascii().trim_end_matches('.').to_owned())
    }

    /// Decides about one message.
    pub fn answer(&self, query: &[u8], transport: Transport) -> Decision {
        // The QR bit: an answer is never answered.
        if query.len() < HEADER_LEN || query.get(2).is_none_or(|flags| flags & 0x80 != 0) {
            return Decision::Ignore;
        }
        let Ok(message) = Message::from_vec(query) else {
            return Decision::Answer(format_error(query));
        };
        let mut reply = Reply::to(&message);
        let question = match message.queries.as_slice() {
            _ if message.metadata.op_code != OpCode::Query => return reply.fail(ResponseCode::NotImp, transport),
            _ if message.version() > 0 => return reply.fail(ResponseCode::BADVERS, transport),
            [question] => question,
            _ => return reply.fail(ResponseCode::FormErr, transport),
        };
        if !matches!(question.query_class(), DNSClass::IN | DNSClass::ANY) {
            return reply.fail(ResponseCode::Refused, transport);
        }
        match self.find(question) {
            Found::Records(records) => reply.message.add_answers(records),
            Found::Nothing(zone) => reply.message.add_authority(start_of_authority(zone)),
            Found::NoName(zone) => {
                reply.message.metadata.response_code = ResponseCode::NXDomain;
                reply.message.add_authority(start_of_authority(zone))
            }
            Found::Elsewhere([]) => return reply.fail(ResponseCode::Refused, transport),
            Found::Elsewhere(resolvers) => return Decision::Forward(resolvers.to_vec()),
        };
        reply.message.metadata.authoritative = true;
        reply.finish(transport)
    }

    fn add(&mut self, name: &str, addresses: &[IpAddr]) -> Option<Name> {
        let name = self.complete(absolute(name)?);
        let mut above = name.base_name();
        while !above.is_root() {
            self.inner.insert(above.clone());
            above = above.base_name();
        }
        let known = self.hosts.entry(name.clone()).or_default();
        for address in addresses {
            if !known.contains(address) {
                known.push(*address);
            }
        }
        Some(name)
    }

    /// A bare label gets the domain.
    fn complete(&self, name: Name) -> Name {
        match &self.domain {
            Some(domain) if name.num_labels() == 1 => {
                // A name that would be too long stays as it is, and is not found.
                name.clone().append_name(domain).unwrap_or(name)
            }
            _ => name,
        }
    }

    fn find(&self, question: &Query) -> Found<'_> {
        let asked = question.name();
        if let Ok(prefix) = asked.parse_arpa_name()
            && let Some(found) = self.find_reverse(asked, prefix, question.query_type())
        {
            return found;
        }
        let name = self.complete(asked.clone());
        if let Some(addresses) = self.hosts.get(&name) {
            let records = addresses_of(asked, addresses, question.query_type());
            return if records.is_empty() { Found::Nothing(self.zone_of(&name)) } else { Found::Records(records) };
        }
        let ours = self.domain.as_ref().filter(|domain| domain.zone_of(&name));
        if let Some(domain) = ours
            && asked.num_labels() > 1
        {
            if name == *domain && question.query_type() == RecordType::SOA {
                return Found::Records(vec![start_of_authority(domain.clone())]);
            }
            let exists = name == *domain || self.inner.contains(&name);
            return if exists { Found::Nothing(domain.clone()) } else { Found::NoName(domain.clone()) };
        }
        let mut suffixes = std::iter::successors(Some(asked.clone()), |n| (!n.is_root()).then(|| n.base_name()));
        match suffixes.find_map(|suffix| self.routes.get_key_value(&suffix)) {
            Some((suffix, resolvers)) if resolvers.is_empty() => Found::NoName(suffix.clone()),
            Some((_, resolvers)) => Found::Elsewhere(resolvers),
            None => Found::Elsewhere(&self.resolvers),
        }
    }

    /// What a name below `in-addr.arpa` or `ip6.arpa` is to us; `None` when it is not in a zone of ours.
    fn find_reverse(&self, asked: &Name, prefix: IpNet, kind: RecordType) -> Option<Found<'_>> {
        let whole = prefix.prefix_len() == prefix.max_prefix_len();
        let known = self.reverse.get(&prefix.addr()).filter(|_| whole);
        let zone = self.zones.iter().find(|zone| zone.contains(&prefix));
        if known.is_none() && zone.is_none() {
            return None;
        }
        Some(match known {
            Some(name) if matches!(kind, RecordType::PTR | RecordType::ANY) => {
                Found::Records(vec![Record::from_rdata(asked.clone(), TTL, RData::PTR(PTR(name.clone())))])
            }
            Some(_) => Found::Nothing(asked.base_name()),
            None if whole => Found::NoName(asked.base_name()),
            None => Found::Nothing(asked.clone()),
        })
    }

    /// The zone whose authority we claim for an existing name.
    fn zone_of(&self, name: &Name) -> Name {
        match &self.domain {
            Some(domain) if domain.zone_of(name) => domain.clone(),
            _ => name.clone(),
        }
    }
}

/// What the table holds for a question.
enum Found<'a> {
    Records(Vec<Record>),
    /// The name exists without such data; the zone it is in.
    Nothing(Name),
    /// The name does not exist; the zone it would be in.
    NoName(Name),
    /// Not ours: ask these.
    Elsewhere(&'a [SocketAddr]),
}

fn addresses_of(name: &Name, addresses: &[IpAddr], kind: RecordType) -> Vec<Record> {
    let any = kind == RecordType::ANY;
    let wanted = |address: &&IpAddr| any || kind == if address.is_ipv4() { RecordType::A } else { RecordType::AAAA };
    let record = |address: &IpAddr| {
        let data = match address {
            IpAddr::V4(v4) => RData::A(A(*v4)),
            IpAddr::V6(v6) => RData::AAAA(AAAA(*v6)),
        };
        Record::from_rdata(name.clone(), TTL, data)
    };
    addresses.iter().filter(wanted).map(record).collect()
}

/// Bounds how long a negative answer is kept (RFC 2308 §3).
fn start_of_authority(zone: Name) -> Record {
    let seconds = NEGATIVE_TTL.cast_signed();
    let soa = SOA::new(zone.clone(), zone.clone(), 1, seconds, seconds, seconds, NEGATIVE_TTL);
    Record::from_rdata(zone, NEGATIVE_TTL, RData::SOA(soa))
}

/// A full name from text, with or without its last dot.
fn absolute(name: &str) -> Option<Name> {
    let mut name = Name::from_ascii(name.trim_end_matches('.')).ok()?;
    name.set_fqdn(true);
    (!name.is_root()).then_some(name)
}

/// An answer in the making.
struct Reply {
    message: Message,
    /// The largest UDP answer that the client takes.
    room: usize,
}

impl Reply {
    fn to(query: &Message) -> Self {
        let mut message = Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
        message.metadata = Metadata::response_from_request(&query.metadata);
        message.metadata.recursion_available = true;
        message.add_queries(query.queries.iter().cloned());
        let mut room = PLAIN_UDP;
        if query.edns.is_some() {
            room = usize::from(query.max_payload()).min(LARGEST_UDP);
            let mut edns = Edns::new();
            edns.set_max_payload(u16::try_from(LARGEST_UDP).unwrap_or(u16::MAX)).set_version(0);
            message.set_edns(edns);
        }
        Self { message, room }
    }

    fn fail(mut self, code: ResponseCode, transport: Transport) -> Decision {
        self.message.metadata.response_code = code;
        if let Some(edns) = self.message.edns.as_mut() {
            edns.set_rcode_high(code.high());
        }
        self.finish(transport)
    }

    fn finish(self, transport: Transport) -> Decision {
        let limit = match transport {
            Transport::Udp => self.room,
            Transport::Tcp => usize::from(u16::MAX),
        };
        let whole = self.message.to_vec().ok().filter(|bytes| bytes.len() <= limit);
        match whole.or_else(|| self.message.truncate().to_vec().ok().filter(|bytes| bytes.len() <= limit)) {
            Some(bytes) => Decision::Answer(bytes),
            None => Decision::Ignore,
        }
    }
}

/// The header alone, saying that the question could not be read.
fn format_error(query: &[u8]) -> Vec<u8> {
    let mut answer = vec![0; HEADER_LEN];
    if let (Some(to), Some(from)) = (answer.get_mut(..3), query.get(..3)) {
        to.copy_from_slice(from);
        // Response, with the query's operation and its wish for recursion.
        to[2] = 0x80 | (from[2] & 0x79);
    }
    // Recursion available, format error.
    answer[3] = 0x81;
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table() -> MagicDns {
        let mut dns = MagicDns::new("mesh.example.");
        assert!(dns.insert("web.mesh.example.", &[ip("100.64.0.7"), ip("fd7a:115c:a1e0::7")]));
        assert!(dns.insert("only4", &[ip("100.64.0.8")]));
        assert!(dns.insert("shared.other.example.", &[ip("100.64.0.9")]));
        assert!(dns.add_record("a.b.mesh.example", ip("192.0.2.1")));
        assert!(dns.add_route("corp.example.", vec![at("192.0.2.53:53")]));
        assert!(dns.add_route("empty.example.", Vec::new()));
        dns.set_resolvers(vec![at("198.51.100.1:53")]);
        dns
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn query(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    fn answer(dns: &MagicDns, message: &Message) -> Message {
        match dns.answer(&message.to_vec().unwrap(), Transport::Udp) {
            Decision::Answer(bytes) => Message::from_vec(&bytes).unwrap(),
            other @ (Decision::Forward(_) | Decision::Ignore) => panic!("{other:?}"),
        }
    }

    fn ask(name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
        let answer = answer(&table(), &query(name, kind));
        assert_eq!(answer.metadata.id, 4711);
        assert_eq!(answer.metadata.message_type, MessageType::Response);
        assert!(answer.metadata.recursion_desired);
        assert_eq!(answer.queries, query(name, kind).queries);
        (answer.metadata.response_code, answer.answers.iter().map(|record| record.data.to_string()).collect())
    }

    fn forwards(name: &str) -> Decision {
        table().answer(&query(name, RecordType::A).to_vec().unwrap(), Transport::Udp)
    }

    #[test]
    fn a_node_is_found_by_full_and_bare_name_in_any_case() {
        for name in ["web.mesh.example.", "web.", "WEB.Mesh.Example."] {
            assert_eq!(ask(name, RecordType::A), (ResponseCode::NoError, vec!["100.64.0.7".into()]), "{name}");
            assert_eq!(ask(name, RecordType::AAAA), (ResponseCode::NoError, vec!["fd7a:115c:a1e0::7".into()]));
        }
        assert_eq!(ask("shared.other.example.", RecordType::A).1, ["100.64.0.9"]);
        assert_eq!(ask("a.b.mesh.example.", RecordType::A).1, ["192.0.2.1"]);
    }

    #[test]
    fn missing_data_is_no_error_and_a_missing_name_is() {
        let without = answer(&table(), &query("only4.mesh.example.", RecordType::AAAA));
        assert_eq!((without.metadata.response_code, without.answers.len()), (ResponseCode::NoError, 0));
        assert_eq!(without.authorities.len(), 1, "the SOA bounds how long that is kept");
        assert!(without.metadata.authoritative);
        assert_eq!(ask("web.mesh.example.", RecordType::MX), (ResponseCode::NoError, vec![]));
        assert_eq!(ask("nobody.mesh.example.", RecordType::A), (ResponseCode::NXDomain, vec![]));
        assert_eq!(ask("mesh.example.", RecordType::A), (ResponseCode::NoError, vec![]), "the domain itself exists");
        assert_eq!(ask("b.mesh.example.", RecordType::A), (ResponseCode::NoError, vec![]), "so does what has children");
        assert_eq!(ask("x.empty.example.", RecordType::A), (ResponseCode::NXDomain, vec![]));
    }

    #[test]
    fn addresses_have_names() {
        assert_eq!(ask("7.0.64.100.in-addr.arpa.", RecordType::PTR).1, ["web.mesh.example."]);
        let v6 = Name::from(ip("fd7a:115c:a1e0::7")).to_ascii();
        assert_eq!(ask(&v6, RecordType::PTR).1, ["web.mesh.example."]);
        assert_eq!(ask("9.9.64.100.in-addr.arpa.", RecordType::PTR).0, ResponseCode::NXDomain);
        assert_eq!(ask("64.100.in-addr.arpa.", RecordType::PTR), (ResponseCode::NoError, vec![]));
        assert!(matches!(forwards("1.2.0.192.in-addr.arpa."), Decision::Forward(_)), "a record is no node");
        assert!(matches!(forwards("8.8.8.8.in-addr.arpa."), Decision::Forward(_)));
    }

    #[test]
    fn the_rest_of_the_world_goes_to_its_resolvers() {
        assert_eq!(forwards("www.example.org."), Decision::Forward(vec![at("198.51.100.1:53")]));
        assert_eq!(forwards("host.corp.example."), Decision::Forward(vec![at("192.0.2.53:53")]));
        assert_eq!(forwards("unknown."), Decision::Forward(vec![at("198.51.100.1:53")]), "a bare name may be a TLD");
        let nowhere = MagicDns::new("mesh.example");
        let refused = answer(&nowhere, &query("www.example.org.", RecordType::A));
        assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
        let refused = answer(&MagicDns::default(), &query("www.", RecordType::A));
        assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
    }

    #[test]
    fn a_long_answer_is_truncated_over_udp_and_whole_over_tcp() {
        let mut dns = MagicDns::new("mesh.example");
        let addresses: Vec<IpAddr> = (0..100).map(|i| IpAddr::from([100, 64, 1, i])).collect();
        dns.insert("many", &addresses);
        let mut message = query("many.mesh.example.", RecordType::A);
        let short = answer(&dns, &message);
        assert!(short.metadata.truncation && short.answers.is_empty());
        message.set_edns(Edns::new().set_max_payload(4096).clone());
        let short = answer(&dns, &message);
        assert!(short.metadata.truncation, "never beyond what the mesh carries");
        assert_eq!(usize::from(short.max_payload()), LARGEST_UDP);
        let Decision::Answer(whole) = dns.answer(&message.to_vec().unwrap(), Transport::Tcp) else { panic!() };
        assert_eq!(Message::from_vec(&whole).unwrap().answers.len(), 100);
        dns.insert("fifty", &addresses[..50]);
        let mut message = query("fifty.mesh.example.", RecordType::A);
        assert!(answer(&dns, &message).metadata.truncation);
        message.set_edns(Edns::new().set_max_payload(1232).clone());
        assert_eq!(answer(&dns, &message).answers.len(), 50);
    }

    #[test]
    fn odd_messages_are_told_what_is_wrong() {
        let dns = table();
        let mut odd = query("web.mesh.example.", RecordType::A);
        odd.metadata.op_code = OpCode::Notify;
        assert_eq!(answer(&dns, &odd).metadata.response_code, ResponseCode::NotImp);
        let mut odd = query("web.mesh.example.", RecordType::A);
        odd.queries.clear();
        assert_eq!(answer(&dns, &odd).metadata.response_code, ResponseCode::FormErr);
        let mut odd = query("web.mesh.example.", RecordType::A);
        odd.queries[0].set_query_class(DNSClass::CH);
        assert_eq!(answer(&dns, &odd).metadata.response_code, ResponseCode::Refused);
        let mut odd = query("web.mesh.example.", RecordType::A);
        odd.set_edns(Edns::new().set_version(1).clone());
        assert_eq!(u16::from(answer(&dns, &odd).metadata.response_code), 16, "BADVERS");
        let mut unreadable = query("web.mesh.example.", RecordType::A).to_vec().unwrap();
        unreadable.truncate(20);
        let Decision::Answer(bytes) = dns.answer(&unreadable, Transport::Udp) else { panic!() };
        let read = Message::from_vec(&bytes).unwrap();
        assert_eq!((read.metadata.id, read.metadata.response_code), (4711, ResponseCode::FormErr));
    }

    #[test]
    fn answers_and_fragments_are_ignored() {
        let mut response = query("web.mesh.example.", RecordType::A);
        response.metadata.message_type = MessageType::Response;
        assert_eq!(table().answer(&response.to_vec().unwrap(), Transport::Udp), Decision::Ignore);
        assert_eq!(table().answer(&[0; 11], Transport::Udp), Decision::Ignore);
        assert_eq!(table().answer(&[], Transport::Tcp), Decision::Ignore);
    }

    #[test]
    fn names_are_looked_up_for_dialing() {
        let dns = table();
        assert_eq!(dns.lookup("web"), Some([ip("100.64.0.7"), ip("fd7a:115c:a1e0::7")].as_slice()));
        assert_eq!(dns.lookup("Only4.mesh.example."), Some([ip("100.64.0.8")].as_slice()));
        assert_eq!(dns.lookup("nobody"), None);
        assert_eq!(dns.lookup(""), None);
        assert_eq!(dns.lookup(&"x".repeat(300)), None);
        assert_eq!(dns.name_of(ip("100.64.0.8")).as_deref(), Some("only4.mesh.example"));
    }

    #[test]
    fn impossible_names_are_refused() {
        let mut dns = table();
        assert!(!dns.insert(&"x".repeat(64), &[ip("100.64.0.1")]));
        assert!(!dns.insert("", &[ip("100.64.0.1")]));
        assert!(!dns.insert("a..b", &[ip("100.64.0.1")]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = table().answer(&bytes, Transport::Udp);
        }

        #[test]
        fn a_damaged_query_is_survived(at in 0_usize..60, value: u8, cut in 0_usize..60) {
            let mut message = query("7.0.64.100.in-addr.arpa.", RecordType::PTR);
            message.set_edns(Edns::new());
            let mut bytes = message.to_vec().unwrap();
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            bytes.truncate(bytes.len().saturating_sub(cut));
            if let Decision::Answer(answer) = table().answer(&bytes, Transport::Udp) {
                prop_assert!(answer.len() <= LARGEST_UDP);
                prop_assert_eq!(&answer[..2], &bytes[..2], "the id comes back");
            }
        }
    }
}

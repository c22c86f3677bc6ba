use std::net::UdpSocket;

use mesh_nat::disco::message::{Binding, Message};
use mesh_nat::disco::seal;
use mesh_nat::relay::geneve::Content;
use mesh_tun::linux::udp;

use super::*;

/// A client on loopback.
struct Client {
    disco: DiscoPrivate,
    socket: UdpSocket,
}

impl Client {
    fn new(number: u8) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        Self { disco: DiscoPrivate::from_bytes([number; 32]), socket }
    }

    fn receive(&self) -> Vec<u8> {
        let mut buffer = [0; 2048];
        let (len, _) = self.socket.recv_from(&mut buffer).unwrap();
        buffer[..len].to_vec()
    }

    fn send(&self, endpoint: &RelayEndpoint, message: &Message) {
        let shared = self.disco.box_with(&endpoint.server);
        let mut plaintext = Vec::new();
        message.encode(&mut plaintext);
        let sealed = seal::seal(&self.disco.public(), &shared, &mut SystemRng, &plaintext);
        let datagram = geneve::encapsulate(endpoint.vni, Content::Control, &sealed);
        self.socket.send_to(&datagram, endpoint.endpoints[0]).unwrap();
    }

    /// Begins to bind as clients do, and returns the answer to the challenge.
    fn ask(&self, endpoint: &RelayEndpoint, other: &Self) -> Message {
        let remote = other.disco.public();
        let bind = Binding { vni: endpoint.vni, generation: 1, remote, challenge: [0; 32] };
        self.send(endpoint, &Message::Bind(bind));
        let reply = self.receive();
        let (header, sealed) = geneve::split(&reply).unwrap();
        assert!(header.control && header.vni == endpoint.vni);
        let plaintext = seal::open(&self.disco.box_with(&endpoint.server), sealed).unwrap();
        let Message::BindChallenge(challenge) = Message::decode(&plaintext).unwrap() else { panic!("no challenge") };
        Message::BindAnswer(challenge)
    }

    fn bind(&self, endpoint: &RelayEndpoint, other: &Self) {
        let answer = self.ask(endpoint, other);
        self.send(endpoint, &answer);
    }
}

#[expect(clippy::disallowed_methods, reason = "a test on real sockets")]
fn relay() -> PeerRelay {
    let config = udp::Config::bound_to("127.0.0.1:0".parse().unwrap());
    let relay = PeerRelay::start(vec![UdpBatch::bind(&config).unwrap()], Arc::new(Instant::now)).unwrap();
    let addresses = relay.bound().collect();
    relay.set_addresses(addresses);
    relay
}

#[test]
fn two_clients_on_real_sockets_bind_and_exchange_whole_bursts() {
    let relay = relay();
    let (a, b) = (Client::new(1), Client::new(2));
    let endpoint = relay.allocate([a.disco.public(), b.disco.public()]).unwrap();
    let server = endpoint.endpoints[0];
    let early = geneve::encapsulate(endpoint.vni, Content::WireGuard, b"early");
    a.socket.send_to(&early, server).unwrap();
    a.bind(&endpoint, &b);
    b.bind(&endpoint, &a);
    // The answer was not answered: wait until it has been read.
    let opened = (0..500).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        relay.sessions()[0].bound.iter().all(Option::is_some)
    });
    assert!(opened);
    for (from, to) in [(&a, &b), (&b, &a)] {
        for number in 0..50_u8 {
            let payload = vec![number; 1000];
            from.socket.send_to(&geneve::encapsulate(endpoint.vni, Content::WireGuard, &payload), server).unwrap();
        }
        for number in 0..50_u8 {
            let payload = vec![number; 1000];
            assert_eq!(to.receive(), geneve::encapsulate(endpoint.vni, Content::WireGuard, &payload));
        }
    }
    let session = &relay.sessions()[0];
    assert_eq!(session.forwarded.map(|forwarded| forwarded.packets), [50, 50]);
    assert_eq!(relay.dropped(), Dropped { unknown: 1, ..Dropped::default() }, "what came before both had bound");
    // Somebody else is not heard, whatever number he names.
    let stranger = Client::new(3);
    stranger.socket.send_to(&early, server).unwrap();
    a.socket.send_to(&early, server).unwrap();
    assert_eq!(b.receive(), early);
    assert_eq!(relay.dropped().unknown, 2);
}

#[test]
fn what_follows_the_answer_that_opens_a_pair_is_forwarded_in_the_same_batch() {
    let relay = relay();
    let (a, b) = (Client::new(1), Client::new(2));
    let endpoint = relay.allocate([a.disco.public(), b.disco.public()]).unwrap();
    let server = endpoint.endpoints[0];
    a.bind(&endpoint, &b);
    let answer = b.ask(&endpoint, &a);
    // The thread waits here with this one, and finds the next two together.
    let held = relay.shared.server();
    a.socket.send_to(&geneve::encapsulate(endpoint.vni, Content::Control, b"?"), server).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    b.send(&endpoint, &answer);
    let ping = geneve::encapsulate(endpoint.vni, Content::Disco, b"ping");
    b.socket.send_to(&ping, server).unwrap();
    drop(held);
    assert_eq!(a.receive(), ping);
}

#[test]
fn a_relay_ends_when_it_is_dropped() {
    let relay = relay();
    let address = relay.bound().next().unwrap();
    drop(relay);
    UdpSocket::bind(address).unwrap();
}

use super::*;
use crate::disco::message::{CallMeMaybe, Ping, TxId};
use proptest::collection::vec;
use proptest::prelude::*;

const SERVER: &str = "203.0.113.1:7777";

/// A client, and what it needs to speak to the server.
struct Party {
    disco: DiscoPrivate,
    shared: SharedBox,
    rng: StdRng,
}

impl Party {
    fn new(number: u8, server: DiscoPublic) -> Self {
        let disco = DiscoPrivate::from_bytes([number; 32]);
        Self { shared: disco.box_with(&server), disco, rng: StdRng::seed_from_u64(number.into()) }
    }

    fn key(&self) -> DiscoPublic {
        self.disco.public()
    }

    fn control(&mut self, vni: Vni, message: &Message) -> Vec<u8> {
        let mut plaintext = Vec::new();
        message.encode(&mut plaintext);
        let sealed = seal::seal(&self.disco.public(), &self.shared, &mut self.rng, &plaintext);
        geneve::encapsulate(vni, Content::Control, &sealed)
    }

    fn open(&self, datagram: &[u8]) -> Message {
        let (header, payload) = geneve::split(datagram).unwrap();
        assert!(header.control);
        Message::decode(&seal::open(&self.shared, payload).unwrap()).unwrap()
    }
}

struct World {
    now: Instant,
    server: Server,
    a: Party,
    b: Party,
}

fn addr(last: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, last], port))
}

fn binding(vni: Vni, generation: u32, remote: DiscoPublic) -> Binding {
    Binding { vni, generation, remote, challenge: [0; 32] }
}

impl World {
    fn new(config: Config) -> Self {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let disco = DiscoPrivate::from_bytes([9; 32]);
        let (a, b) = (Party::new(1, disco.public()), Party::new(2, disco.public()));
        let mut server = Server::new(now, disco, [5; 32], config);
        server.set_addresses(vec![SERVER.parse().unwrap()]);
        Self { now, server, a, b }
    }

    fn allocate(&mut self) -> RelayEndpoint {
        self.server.allocate(self.now, [self.a.key(), self.b.key()]).unwrap()
    }

    /// Binds and returns the challenge.
    fn challenge(&mut self, a: bool, vni: Vni, generation: u32, from: SocketAddr) -> Result<Binding, Reject> {
        let (party, other) = if a { (&mut self.a, &self.b) } else { (&mut self.b, &self.a) };
        let datagram = party.control(vni, &Message::Bind(binding(vni, generation, other.key())));
        assert_eq!(self.server.handle_datagram(self.now, from, &datagram)?, Handled::Consumed);
        let (to, reply) = self.server.poll_transmit().unwrap();
        assert_eq!(to, from);
        assert!(reply.len() <= datagram.len(), "{} bytes for {}", reply.len(), datagram.len());
        let Message::BindChallenge(binding) = party.open(&reply) else { panic!("no challenge") };
        Ok(binding)
    }

    fn answer(&mut self, a: bool, challenge: Binding, from: SocketAddr) -> Result<Handled, Reject> {
        let party = if a { &mut self.a } else { &mut self.b };
        let datagram = party.control(challenge.vni, &Message::BindAnswer(challenge));
        self.server.handle_datagram(self.now, from, &datagram)
    }

    fn bind(&mut self, a: bool, vni: Vni, generation: u32, from: SocketAddr) {
        let challenge = self.challenge(a, vni, generation, from).unwrap();
        self.answer(a, challenge, from).unwrap();
    }

    fn data(&mut self, vni: Vni, from: SocketAddr) -> Result<Handled, Reject> {
        let datagram = geneve::encapsulate(vni, Content::WireGuard, &[4, 0, 0, 0, 1]);
        self.server.handle_datagram(self.now, from, &datagram)
    }

    fn open_pair(&mut self) -> Vni {
        let vni = self.allocate().vni;
        self.bind(true, vni, 1, addr(1, 1));
        self.bind(false, vni, 1, addr(2, 2));
        vni
    }
}

#[test]
fn data_passes_only_after_both_legs_are_bound() {
    let mut world = World::new(Config::default());
    let vni = world.allocate().vni;
    assert_eq!(world.data(vni, addr(1, 1)), Err(Reject::NotOpen));
    world.bind(true, vni, 1, addr(1, 1));
    assert_eq!(world.data(vni, addr(1, 1)), Err(Reject::NotOpen));
    world.bind(false, vni, 1, addr(2, 2));
    assert_eq!(world.data(vni, addr(1, 1)), Ok(Handled::Forward(addr(2, 2))));
    assert_eq!(world.data(vni, addr(2, 2)), Ok(Handled::Forward(addr(1, 1))));
    assert_eq!(world.data(vni, addr(3, 3)), Err(Reject::UnknownSource));
    let other = Vni::new(vni.get() + 1).unwrap();
    assert_eq!(world.data(other, addr(1, 1)), Err(Reject::UnknownPair));
}

#[test]
fn threads_hear_of_a_pair_when_it_opens_and_when_it_moves() {
    let mut world = World::new(Config::default());
    let vni = world.open_pair();
    let Some(Event::Open(pair)) = world.server.poll_event() else { panic!("nothing opened") };
    assert_eq!(pair.vni(), vni);
    let leg = pair.sender(addr(1, 1)).unwrap();
    assert_eq!(pair.address(leg.other()), addr(2, 2));
    assert_eq!(pair.sender(addr(3, 3)), None);

    world.bind(true, vni, 2, addr(1, 9));
    let Some(Event::Open(moved)) = world.server.poll_event() else { panic!("nothing moved") };
    assert_eq!((moved.sender(addr(1, 1)), moved.sender(addr(1, 9))), (None, Some(leg)));
    assert_eq!(world.data(vni, addr(1, 1)), Err(Reject::UnknownSource), "the former address");
    assert_eq!(world.data(vni, addr(2, 2)), Ok(Handled::Forward(addr(1, 9))));

    world.bind(true, vni, 3, addr(1, 9));
    assert!(world.server.poll_event().is_none(), "nothing has changed");
}

#[test]
fn a_pair_that_asks_again_gets_the_same_allocation() {
    let mut world = World::new(Config::default());
    let first = world.allocate();
    let (a, b) = (world.a.key(), world.b.key());
    assert_eq!(world.server.allocate(world.now, [b, a]).unwrap(), first, "whoever asks");
    assert_eq!((first.vni.get(), first.lamport), (1, 1));
    assert!(first.clients.is_sorted());
    let c = Party::new(3, first.server).key();
    let second = world.server.allocate(world.now, [a, c]).unwrap();
    assert_eq!((second.vni.get(), second.lamport), (2, 2));
}

#[test]
fn nothing_is_allocated_without_an_address_or_for_fewer_than_two_clients() {
    let mut world = World::new(Config::default());
    let (a, b) = (world.a.key(), world.b.key());
    assert_eq!(world.server.allocate(world.now, [a, a]), Err(Refused::NotTwoClients));
    assert_eq!(world.server.allocate(world.now, [DiscoPublic::ZERO, a]), Err(Refused::NotTwoClients));
    world.server.set_addresses(Vec::new());
    assert_eq!(world.server.allocate(world.now, [a, b]), Err(Refused::NoAddress));
}

#[test]
fn a_client_can_have_so_many_allocations_and_all_together_so_many() {
    let config = Config { max_pairs: 5, max_pairs_of_client: 3, ..Config::default() };
    let mut world = World::new(config);
    let (now, a) = (world.now, world.a.key());
    let other = |number| DiscoPrivate::from_bytes([number; 32]).public();
    for number in 10..13 {
        world.server.allocate(now, [a, other(number)]).unwrap();
    }
    assert_eq!(world.server.allocate(now, [a, other(13)]), Err(Refused::Full));
    for number in 20..22 {
        world.server.allocate(now, [other(number), other(number + 10)]).unwrap();
    }
    assert_eq!(world.server.allocate(now, [other(50), other(51)]), Err(Refused::Full));
    assert_eq!(world.server.counters().refused, 2);
    let later = now + Duration::from_secs(61);
    world.server.handle_timeout(later);
    assert_eq!(world.server.sessions().count(), 0);
    let again = world.server.allocate(later, [a, other(13)]).unwrap();
    assert_eq!((again.vni.get(), again.lamport), (6, 6), "numbers are reused late");
}

#[test]
fn an_answer_counts_for_the_generation_and_address_it_was_asked_for() {
    let mut world = World::new(Config::default());
    let vni = world.allocate().vni;
    let first = world.challenge(true, vni, 1, addr(1, 1)).unwrap();
    assert_eq!(world.answer(true, first.clone(), addr(1, 2)), Err(Reject::WrongAnswer), "another address");
    let forged = Binding { challenge: [7; 32], ..first.clone() };
    assert_eq!(world.answer(true, forged, addr(1, 1)), Err(Reject::WrongAnswer));
    let second = world.challenge(true, vni, 2, addr(1, 1)).unwrap();
    assert_eq!(world.answer(true, first, addr(1, 1)), Err(Reject::WrongAnswer), "a former generation");
    assert_eq!(world.answer(true, second.clone(), addr(1, 1)), Ok(Handled::Consumed));
    assert_eq!(world.answer(true, second, addr(1, 1)), Err(Reject::WrongAnswer), "a second time");
}

#[test]
fn a_bind_must_be_about_this_pair_and_from_one_of_it() {
    let mut world = World::new(Config::default());
    let vni = world.allocate().vni;
    let (a, b, now) = (world.a.key(), world.b.key(), world.now);
    let mut stranger = Party::new(3, world.server.public());
    let mut refused = |party: Option<&mut Party>, message: &Message| {
        let datagram = party.unwrap_or(&mut world.a).control(vni, message);
        let outcome = world.server.handle_datagram(now, addr(1, 1), &datagram);
        assert!(world.server.poll_transmit().is_none());
        outcome.unwrap_err()
    };
    let other = Vni::new(vni.get() + 1).unwrap();
    assert_eq!(refused(None, &Message::Bind(binding(vni, 0, b))), Reject::Mismatch, "generation zero");
    assert_eq!(refused(None, &Message::Bind(binding(vni, 1, a))), Reject::Mismatch, "itself");
    assert_eq!(refused(None, &Message::Bind(binding(other, 1, b))), Reject::Mismatch, "another pair");
    assert_eq!(refused(Some(&mut stranger), &Message::Bind(binding(vni, 1, b))), Reject::UnknownSender);
    assert_eq!(refused(None, &Message::CallMeMaybe(CallMeMaybe::default())), Reject::Unexpected);
    let ping = Ping { tx: TxId([1; 12]), node: None, padding: 0 };
    assert_eq!(refused(None, &Message::Ping(ping)), Reject::Unexpected);
    let mut wrong_box = Party::new(1, a);
    assert_eq!(refused(Some(&mut wrong_box), &Message::Bind(binding(vni, 1, b))), Reject::Unsealed);
    assert_eq!(world.server.counters().rejected, 7);
}

#[test]
fn what_nobody_binds_ends_after_half_a_minute_and_silence_ends_the_rest() {
    let mut world = World::new(Config::default());
    let start = world.now;
    world.allocate();
    world.server.handle_timeout(start + Duration::from_secs(61));
    assert_eq!((world.server.sessions().count(), world.server.poll_timeout()), (0, None));

    world.now = start + Duration::from_secs(100);
    let vni = world.open_pair();
    for seconds in (0..600).step_by(10) {
        world.now = start + Duration::from_secs(100 + seconds);
        world.server.handle_timeout(world.now);
        world.data(vni, addr(1, 1)).unwrap();
        if seconds < 400 {
            world.data(vni, addr(2, 2)).unwrap();
        }
    }
    assert_eq!(world.server.sessions().count(), 1);
    world.now += Duration::from_secs(150);
    world.server.handle_timeout(world.now);
    assert_eq!(world.server.sessions().count(), 0, "one of the two has been silent for more than five minutes");
    assert!(world.data(vni, addr(1, 1)).is_err());
    assert!(matches!(world.server.poll_event(), Some(Event::Open(_))));
    assert!(matches!(world.server.poll_event(), Some(Event::Closed(closed)) if closed == vni));
}

#[test]
fn threads_keep_a_pair_alive_by_what_they_note() {
    let mut world = World::new(Config::default());
    let vni = world.open_pair();
    let Some(Event::Open(pair)) = world.server.poll_event() else { panic!("nothing opened") };
    let later = world.now + Duration::from_secs(290);
    for leg in [Leg::Low, Leg::High] {
        pair.note(leg, world.server.clock_ms(later), 3, 300);
    }
    world.server.handle_timeout(world.now + Duration::from_secs(400));
    let session = world.server.sessions().next().unwrap();
    assert_eq!((session.vni, session.forwarded), (vni, [Forwarded { packets: 3, bytes: 300 }; 2]));
}

#[test]
fn an_expired_allocation_is_not_handed_out_again() {
    let mut world = World::new(Config::default());
    let first = world.allocate();
    world.now += Duration::from_secs(40);
    let second = world.allocate();
    assert!(second.lamport > first.lamport && second.vni != first.vni);
}

#[test]
fn whoever_binds_without_end_is_not_answered_without_end() {
    let mut world = World::new(Config::default());
    let vni = world.allocate().vni;
    let answered = (1..1000).filter(|n| world.challenge(true, vni, *n, addr(1, 1)).is_ok()).count();
    assert!(answered < 200, "{answered} challenges");
}

proptest! {
    #[test]
    fn any_bytes_are_survived_and_answered_with_nothing_longer(
        datagrams in vec((vec(any::<u8>(), 0..240), 0u8..6, any::<bool>()), 1..20),
    ) {
        let mut world = World::new(Config::default());
        let vni = world.allocate().vni;
        for (bytes, shape, bound) in datagrams {
            if bound {
                world.bind(true, vni, 1, addr(1, 1));
            }
            let datagram = match shape {
                0 => bytes,
                1 => geneve::encapsulate(vni, Content::Control, &bytes),
                2 => geneve::encapsulate(vni, Content::WireGuard, &bytes),
                // Behind a box that opens: whatever a client may say.
                _ => {
                    let sealed = seal::seal(&world.a.key(), &world.a.shared, &mut world.a.rng, &bytes);
                    geneve::encapsulate(vni, Content::Control, &sealed)
                }
            };
            let outcome = world.server.handle_datagram(world.now, addr(1, 1), &datagram);
            prop_assert!(!matches!(outcome, Ok(Handled::Forward(_))), "only one leg is bound");
            let replies: Vec<_> = std::iter::from_fn(|| world.server.poll_transmit()).collect();
            prop_assert!(replies.len() <= 1);
            for (to, reply) in replies {
                prop_assert_eq!(to, addr(1, 1));
                prop_assert!(reply.len() <= datagram.len());
            }
        }
    }

    #[test]
    fn every_bind_is_answered_by_no_more_than_was_sent(
        generation in 1u32.., trailing in 0usize..64, challenge in any::<[u8; 32]>(),
    ) {
        let mut world = World::new(Config::default());
        let vni = world.allocate().vni;
        let mut plaintext = Vec::new();
        Message::Bind(Binding { challenge, ..binding(vni, generation, world.b.key()) }).encode(&mut plaintext);
        plaintext.resize(plaintext.len() + trailing, 7);
        let sealed = seal::seal(&world.a.key(), &world.a.shared, &mut world.a.rng, &plaintext);
        let datagram = geneve::encapsulate(vni, Content::Control, &sealed);
        prop_assert_eq!(datagram.len(), 160 + trailing);
        world.server.handle_datagram(world.now, addr(1, 1), &datagram).unwrap();
        let (to, reply) = world.server.poll_transmit().unwrap();
        prop_assert_eq!((to, reply.len()), (addr(1, 1), 160));
        prop_assert!(world.server.poll_transmit().is_none());
    }

    #[test]
    fn no_deadline_stays_due_after_it_was_handled(steps in vec((0u64..400, any::<u8>()), 1..40)) {
        let mut world = World::new(Config::default());
        for (seconds, other) in steps {
            world.now += Duration::from_secs(seconds);
            world.server.handle_timeout(world.now);
            prop_assert!(world.server.poll_timeout().is_none_or(|due| due > world.now));
            let other = DiscoPrivate::from_bytes([other; 32]).public();
            let _ = world.server.allocate(world.now, [world.a.key(), other]);
            prop_assert!(world.server.poll_timeout().is_some() || world.server.sessions().count() == 0);
        }
    }
}

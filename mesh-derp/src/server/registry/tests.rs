use super::*;
use proptest::prelude::*;

fn node(number: u8) -> NodePublic {
    NodePublic::from_bytes([number; 32])
}

fn active(registry: &Registry<u32, char>, number: u8) -> Option<u32> {
    registry.route(&node(number)).map(|(_, handle)| *handle)
}

#[test]
fn the_newest_connection_is_active_until_another_speaks() {
    let mut registry: Registry<u32, char> = Registry::new();
    let old = registry.register(node(1), 10);
    let new = registry.register(node(1), 11);
    assert_eq!((active(&registry, 1), registry.doubled()), (Some(11), 1));
    assert!(registry.is_shadowed(old) && !registry.is_shadowed(new));
    registry.touch(old);
    assert_eq!(active(&registry, 1), Some(10));
    assert!(registry.unregister(old).is_none());
    assert_eq!((active(&registry, 1), registry.doubled()), (Some(11), 0));
    assert!(registry.unregister(new).is_some());
    assert_eq!(active(&registry, 1), None);
}

#[test]
fn those_who_heard_from_a_node_learn_that_it_left() {
    let mut registry: Registry<u32, char> = Registry::new();
    let (a, b, c) = (registry.register(node(1), 1), registry.register(node(2), 2), registry.register(node(3), 3));
    registry.note_heard(b, node(1));
    registry.note_heard(c, node(1));
    registry.unregister(c);
    let departure = registry.unregister(a).unwrap();
    assert_eq!((departure.node, departure.heard_by), (node(1), vec![2]));
    let again = registry.register(node(1), 4);
    assert_eq!(registry.unregister(again).unwrap().heard_by, Vec::<u32>::new());
    let again = registry.register(node(1), 5);
    registry.note_heard(b, node(1));
    assert_eq!(registry.unregister(again).unwrap().heard_by, [2]);
}

#[test]
fn a_second_connection_keeps_a_node_present() {
    let mut registry: Registry<u32, char> = Registry::new();
    let (first, _second) = (registry.register(node(1), 1), registry.register(node(1), 2));
    let listener = registry.register(node(9), 9);
    registry.note_heard(listener, node(1));
    assert!(registry.unregister(first).is_none());
    assert_eq!((registry.nodes(), registry.connections()), (2, 2));
}

#[derive(Debug, Clone)]
enum Step {
    Register(u8),
    Unregister(usize),
    Touch(usize),
    Heard(usize, u8),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u8..4).prop_map(Step::Register),
        (0usize..20).prop_map(Step::Unregister),
        (0usize..20).prop_map(Step::Touch),
        (0usize..20, 0u8..4).prop_map(|(at, number)| Step::Heard(at, number)),
    ]
}

proptest! {
    #[test]
    fn it_routes_as_a_plain_list_would(steps in proptest::collection::vec(any_step(), 0..60)) {
        let mut registry: Registry<u32, char> = Registry::new();
        // The model: connections with their node, the last of each node being its active one.
        let mut model: Vec<(ConnectionId, u8)> = Vec::new();
        for step in steps {
            match step {
                Step::Register(number) => model.push((registry.register(node(number), u32::from(number)), number)),
                Step::Unregister(at) if at < model.len() => {
                    let (id, number) = model.remove(at);
                    let was_active = !model[at..].iter().any(|(_, other)| *other == number);
                    let left = registry.unregister(id);
                    prop_assert_eq!(left.is_some(), !model.iter().any(|(_, other)| *other == number));
                    if was_active && left.is_none() {
                        // The newest of the others takes over.
                        let heir = (0..model.len()).filter(|i| model[*i].1 == number).max_by_key(|i| model[*i].0);
                        let heir = model.remove(heir.unwrap());
                        model.push(heir);
                    }
                }
                Step::Touch(at) if at < model.len() => {
                    registry.touch(model[at].0);
                    let moved = model.remove(at);
                    model.push(moved);
                }
                Step::Heard(at, number) if at < model.len() => registry.note_heard(model[at].0, node(number)),
                Step::Unregister(_) | Step::Touch(_) | Step::Heard(..) => {}
            }
            for number in 0..4 {
                let expected = model.iter().rev().find(|(_, other)| *other == number).map(|(id, _)| *id);
                prop_assert_eq!(registry.route(&node(number)).map(|(id, _)| id), expected);
            }
            prop_assert_eq!(registry.connections(), model.len());
            let doubled = (0..4).filter(|n| model.iter().filter(|(_, other)| other == n).count() > 1).count();
            prop_assert_eq!(registry.doubled(), doubled);
        }
        for (id, _) in model {
            registry.unregister(id);
        }
        prop_assert!(registry.listeners.is_empty() && registry.clients.is_empty());
    }
}

mod region {
    use super::*;
    use crate::server::DOUBT;
    use std::time::Duration;

    #[expect(clippy::disallowed_methods, reason = "tests need some instant to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    fn departures(registry: &mut Registry<u32, char>, now: Instant) -> Vec<(NodePublic, Vec<u32>)> {
        std::iter::from_fn(|| registry.poll_departure(now)).map(|left| (left.node, left.heard_by)).collect()
    }

    #[test]
    fn the_oldest_link_that_has_a_node_gets_its_packets() {
        let (now, mut registry) = (start(), Registry::<u32, char>::new());
        let (a, b) = (registry.add_link('a'), registry.add_link('b'));
        registry.link_present(b, node(1));
        registry.link_present(a, node(1));
        registry.link_present(b, node(1));
        assert_eq!(registry.forwarder(&node(1)), Some(&'b'));
        registry.link_gone(now, b, &node(1));
        assert_eq!(registry.forwarder(&node(1)), Some(&'a'));
        registry.link_present(b, node(1));
        assert_eq!((registry.forwarder(&node(1)), registry.nodes_elsewhere()), (Some(&'a'), 1));
        registry.remove_link(now, a);
        assert_eq!((registry.forwarder(&node(1)), registry.is_in_doubt(&node(1))), (Some(&'b'), false));
    }

    #[test]
    fn a_node_that_changes_relays_when_one_dies_never_counts_as_gone() {
        let (now, mut registry) = (start(), Registry::<u32, char>::new());
        let listener = registry.register(node(9), 9);
        let (dying, other) = (registry.add_link('a'), registry.add_link('b'));
        for number in 1..=3 {
            registry.link_present(dying, node(number));
            registry.note_heard(listener, node(number));
        }
        registry.remove_link(now, dying);
        assert!(registry.forwarder(&node(1)).is_none() && registry.is_in_doubt(&node(1)));
        let here = registry.register(node(1), 1);
        registry.link_present(other, node(2));
        assert!(!registry.is_in_doubt(&node(1)) && !registry.is_in_doubt(&node(2)));
        assert_eq!(registry.forwarder(&node(2)), Some(&'b'));
        assert_eq!(departures(&mut registry, now + DOUBT - Duration::from_millis(1)), []);
        assert_eq!(registry.poll_timeout(), Some(now + DOUBT));
        assert_eq!(departures(&mut registry, now + DOUBT), [(node(3), vec![9])]);
        // And what was heard from it before still counts.
        assert_eq!(registry.unregister(here).unwrap().heard_by, [9]);
    }

    #[test]
    fn leaving_here_is_not_leaving_the_region() {
        let (now, mut registry) = (start(), Registry::<u32, char>::new());
        let listener = registry.register(node(9), 9);
        let here = registry.register(node(1), 1);
        registry.note_heard(listener, node(1));
        let link = registry.add_link('a');
        registry.link_present(link, node(1));
        let departure = registry.unregister(here).unwrap();
        assert_eq!((departure.node, departure.heard_by), (node(1), vec![]));
        registry.link_gone(now, link, &node(1));
        assert_eq!(departures(&mut registry, now + DOUBT), [(node(1), vec![9])]);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Register(u8),
        Unregister(usize),
        Heard(usize, u8),
        AddLink,
        Present(usize, u8),
        Gone(usize, u8),
        Break(usize),
        Wait(u64),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u8..4).prop_map(Step::Register),
            (0usize..6).prop_map(Step::Unregister),
            (0usize..6, 0u8..4).prop_map(|(at, number)| Step::Heard(at, number)),
            Just(Step::AddLink),
            (0usize..3, 0u8..4).prop_map(|(at, number)| Step::Present(at, number)),
            (0usize..3, 0u8..4).prop_map(|(at, number)| Step::Gone(at, number)),
            (0usize..3).prop_map(Step::Break),
            (0u64..4000).prop_map(Step::Wait),
        ]
    }

    /// The same, slowly: lists of who said what, searched from the front.
    #[derive(Default)]
    struct Model {
        connections: Vec<(ConnectionId, u8, u32)>,
        links: Vec<(LinkId, char)>,
        said: Vec<(LinkId, u8)>,
        doubts: Vec<(Instant, u8)>,
        heard: Vec<(ConnectionId, u8)>,
    }

    impl Model {
        fn here(&self, number: u8) -> bool {
            self.connections.iter().any(|(_, other, _)| *other == number)
        }

        fn elsewhere(&self, number: u8) -> bool {
            self.said.iter().any(|(_, other)| *other == number)
        }

        fn doubted(&self, number: u8) -> bool {
            self.doubts.iter().any(|(_, other)| *other == number)
        }

        fn forwarder(&self, number: u8) -> Option<char> {
            let (link, _) = self.said.iter().find(|(_, other)| *other == number)?;
            self.links.iter().find(|(id, _)| id == link).map(|(_, name)| *name)
        }

        fn lose(&mut self, now: Instant, number: u8) {
            if !self.here(number) && !self.elsewhere(number) {
                self.doubts.push((now + DOUBT, number));
            }
        }

        fn take_listeners(&mut self, number: u8) -> Vec<u32> {
            let heard = |id: &ConnectionId| self.heard.contains(&(*id, number));
            let mut found: Vec<_> = self.connections.iter().filter(|(id, ..)| heard(id)).collect();
            found.sort_unstable();
            let names = found.into_iter().map(|(_, _, name)| *name).collect();
            self.heard.retain(|(_, other)| *other != number);
            names
        }
    }

    proptest! {
        #[test]
        fn it_knows_the_region_as_slow_lists_would(steps in proptest::collection::vec(any_step(), 0..80)) {
            let mut now = start();
            let mut registry = Registry::<u32, char>::new();
            let mut model = Model::default();
            let mut names = 0;
            for step in steps {
                match step {
                    Step::Register(number) => {
                        names += 1;
                        let id = registry.register(node(number), names);
                        model.connections.push((id, number, names));
                        model.doubts.retain(|(_, other)| *other != number);
                    }
                    Step::Unregister(at) if at < model.connections.len() => {
                        let (id, number, _) = model.connections.remove(at);
                        model.heard.retain(|(listener, _)| *listener != id);
                        let left = registry.unregister(id).map(|left| left.heard_by);
                        let expected = match (model.here(number), model.elsewhere(number)) {
                            (true, _) => None,
                            (false, true) => Some(Vec::new()),
                            (false, false) => Some(model.take_listeners(number)),
                        };
                        prop_assert_eq!(left, expected);
                    }
                    Step::Heard(at, number) if at < model.connections.len() => {
                        let id = model.connections[at].0;
                        let known = model.here(number) || model.elsewhere(number) || model.doubted(number);
                        let new = known && !model.heard.contains(&(id, number));
                        prop_assert_eq!(registry.is_new_to(id, &node(number)), new);
                        registry.note_heard(id, node(number));
                        if new {
                            model.heard.push((id, number));
                        }
                    }
                    Step::AddLink => {
                        let name = char::from(b'a' + u8::try_from(model.links.len() % 26).unwrap());
                        model.links.push((registry.add_link(name), name));
                    }
                    Step::Present(at, number) if at < model.links.len() => {
                        let id = model.links[at].0;
                        registry.link_present(id, node(number));
                        if !model.said.contains(&(id, number)) {
                            model.said.push((id, number));
                        }
                        model.doubts.retain(|(_, other)| *other != number);
                    }
                    Step::Gone(at, number) if at < model.links.len() => {
                        let id = model.links[at].0;
                        registry.link_gone(now, id, &node(number));
                        if model.said.contains(&(id, number)) {
                            model.said.retain(|said| *said != (id, number));
                            model.lose(now, number);
                        }
                    }
                    Step::Break(at) if at < model.links.len() => {
                        let (id, _) = model.links.remove(at);
                        registry.remove_link(now, id);
                        let lost: BTreeSet<u8> = model.said.iter().filter(|s| s.0 == id).map(|s| s.1).collect();
                        model.said.retain(|(link, _)| *link != id);
                        for number in lost {
                            model.lose(now, number);
                        }
                    }
                    Step::Wait(millis) => now += Duration::from_millis(millis),
                    Step::Unregister(_) | Step::Heard(..) | Step::Present(..) | Step::Gone(..) | Step::Break(_) => {}
                }
                let mut due: Vec<_> = model.doubts.iter().filter(|(at, _)| *at <= now).copied().collect();
                due.sort_unstable();
                model.doubts.retain(|(at, _)| *at > now);
                let expected: Vec<_> =
                    due.into_iter().map(|(_, number)| (node(number), model.take_listeners(number))).collect();
                prop_assert_eq!(departures(&mut registry, now), expected);
                prop_assert!(registry.poll_timeout().is_none_or(|next| next > now));
                for number in 0..4 {
                    prop_assert_eq!(registry.forwarder(&node(number)).copied(), model.forwarder(number));
                    prop_assert_eq!(registry.route(&node(number)).is_some(), model.here(number));
                    prop_assert_eq!(registry.is_in_doubt(&node(number)), model.doubted(number));
                }
                prop_assert_eq!(registry.links(), model.links.len());
                prop_assert_eq!(registry.nodes_elsewhere(), (0..4).filter(|n| model.elsewhere(*n)).count());
            }
        }
    }
}

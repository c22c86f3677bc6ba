use super::*;
use crate::wire::{EndpointType, Node};
use mesh_noise::key::DiscoPublic;
use proptest::prelude::*;
use std::time::UNIX_EPOCH;

const WALL: u64 = 1_800_000_000;

struct Rig {
    client: Client,
    now: Instant,
}

#[expect(clippy::disallowed_methods, reason = "a test needs some moment to count from")]
fn rig() -> Rig {
    let now = Instant::now();
    let wall = UNIX_EPOCH + Duration::from_secs(WALL);
    let config = Config::new(NodePrivate::from_bytes([0x40; 32]), Description::default());
    Rig { client: Client::new(now, wall, config, [7; 32]), now }
}

impl Rig {
    fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.client.poll_action()).collect()
    }

    fn events(&mut self) -> Vec<ControlEvent> {
        std::iter::from_fn(|| self.client.poll_event()).collect()
    }

    fn connect(&mut self) {
        assert_eq!(self.actions(), [Action::Connect]);
        self.client.connected(self.now);
    }

    fn register_request(&mut self) -> (RequestId, RegisterRequest) {
        let actions = self.actions();
        let [Action::Register(id, request)] = &actions[..] else { panic!("no registration in {actions:?}") };
        (*id, (**request).clone())
    }

    fn map_requests(&mut self) -> (RequestId, RequestId, MapRequest) {
        let actions = self.actions();
        let [Action::Update(update, told), Action::OpenMap(map, request)] = &actions[..] else {
            panic!("no map poll in {actions:?}")
        };
        assert!(told.omit_peers && !told.stream && request.stream && !request.omit_peers);
        (*update, *map, (**request).clone())
    }

    fn running() -> (Self, RequestId, RequestId) {
        let mut rig = rig();
        rig.client.login(rig.now, Some("key".into()));
        rig.connect();
        let (id, _) = rig.register_request();
        rig.client.register_answered(rig.now, id, RegisterResponse { machine_authorized: true, ..Default::default() });
        let (update, map, _) = rig.map_requests();
        let first = rig.first_map();
        rig.client.map_received(rig.now, map, first);
        rig.client.update_answered(rig.now, update);
        assert!(rig.actions().is_empty() && rig.client.is_polling());
        rig.events();
        (rig, update, map)
    }

    fn first_map(&self) -> MapResponse {
        MapResponse { node: Some(Node { key: self.client.node_key(), ..Node::default() }), ..MapResponse::default() }
    }

    /// Lets time pass until the next deadline.
    fn tick(&mut self) {
        self.now = self.client.poll_timeout().expect("something is due");
        self.client.handle_timeout(self.now);
    }
}

#[test]
fn an_auth_key_leads_to_a_map_poll() {
    let mut rig = rig();
    rig.client.login(rig.now, Some("key".into()));
    rig.connect();
    let (id, request) = rig.register_request();
    assert_eq!(request.auth.unwrap().auth_key, "key");
    assert!(request.old_node_key.is_zero() && request.expiry.is_zero() && request.hostinfo.is_some());
    rig.client.register_answered(rig.now, id, RegisterResponse { machine_authorized: true, ..Default::default() });
    let events = rig.events();
    assert!(matches!(&events[..], [ControlEvent::Registered(done)] if !done.rotated && done.machine_authorized));
    let (_, map, request) = rig.map_requests();
    assert_eq!((request.compress.as_str(), request.keep_alive), ("zstd", true));
    let first = rig.first_map();
    rig.client.map_received(rig.now, map, first);
    assert!(matches!(&rig.events()[..], [ControlEvent::Netmap { changes, .. }] if changes.node));
}

#[test]
fn a_pending_login_is_waited_for_with_followup() {
    let mut rig = rig();
    rig.client.login(rig.now, None);
    rig.connect();
    let (id, request) = rig.register_request();
    assert!(request.auth.is_none() && request.followup.is_empty());
    let pending = RegisterResponse { auth_url: "http://c/register/1".into(), ..Default::default() };
    rig.client.register_answered(rig.now, id, pending.clone());
    assert!(matches!(&rig.events()[..], [ControlEvent::AuthUrl(url)] if url == "http://c/register/1"));
    let (id, again) = rig.register_request();
    assert_eq!((again.followup.as_str(), again.node_key), ("http://c/register/1", request.node_key));
    // The same page again means: keep waiting, with a pause and without another event.
    rig.client.register_answered(rig.now, id, pending);
    assert!(rig.events().is_empty() && rig.actions().is_empty());
    rig.tick();
    let (id, _) = rig.register_request();
    rig.client.register_answered(rig.now, id, RegisterResponse::default());
    assert!(matches!(&rig.events()[..], [ControlEvent::Registered(_)]));
}

#[test]
fn a_pending_login_survives_a_broken_connection() {
    let mut rig = rig();
    rig.client.login(rig.now, None);
    rig.connect();
    let (id, _) = rig.register_request();
    rig.client.register_answered(rig.now, id, RegisterResponse { auth_url: "u".into(), ..Default::default() });
    rig.register_request();
    rig.client.connection_failed(rig.now, Problem::MapEnded);
    rig.tick();
    rig.connect();
    assert_eq!(rig.register_request().1.followup, "u");
}

#[test]
fn a_refused_auth_key_stops_the_client() {
    let mut rig = rig();
    rig.client.login(rig.now, Some("bad".into()));
    rig.connect();
    let (id, _) = rig.register_request();
    rig.client.register_answered(
        rig.now,
        id,
        RegisterResponse { error: "unknown auth key".into(), ..Default::default() },
    );
    let events = rig.events();
    assert!(matches!(&events[..], [ControlEvent::Error(Problem::Refused(text))] if text == "unknown auth key"));
    assert_eq!(rig.actions(), [Action::Disconnect]);
    assert_eq!(rig.client.poll_timeout(), None);
    rig.client.login(rig.now, Some("good".into()));
    rig.connect();
    assert_eq!(rig.register_request().1.auth.unwrap().auth_key, "good");
}

#[test]
fn an_expired_key_is_replaced_and_names_the_old_one() {
    let mut rig = rig();
    let old = rig.client.node_key();
    rig.client.login(rig.now, Some("key".into()));
    rig.connect();
    let (id, _) = rig.register_request();
    let expired = RegisterResponse { node_key_expired: true, ..Default::default() };
    rig.client.register_answered(rig.now, id, expired.clone());
    let (id, request) = rig.register_request();
    assert_eq!((request.old_node_key, request.node_key != old), (old, true));
    rig.client.register_answered(rig.now, id, RegisterResponse::default());
    let events = rig.events();
    let [ControlEvent::Registered(done)] = &events[..] else { panic!("{events:?}") };
    assert!(done.rotated && done.node_key.public() == request.node_key);
}

#[test]
fn a_server_that_calls_a_fresh_key_expired_is_not_asked_in_a_loop() {
    let mut rig = rig();
    rig.client.login(rig.now, None);
    rig.connect();
    let expired = RegisterResponse { node_key_expired: true, ..Default::default() };
    let (id, _) = rig.register_request();
    rig.client.register_answered(rig.now, id, expired.clone());
    let (id, _) = rig.register_request();
    rig.client.register_answered(rig.now, id, expired);
    assert!(rig.actions().is_empty());
    assert!(matches!(&rig.events()[..], [ControlEvent::Unreachable { reason: Problem::FreshKeyExpired, .. }]));
}

#[test]
fn our_own_expiry_asks_for_a_new_login_when_it_comes() {
    let (mut rig, _, map) = Rig::running();
    let (old, wall) = (rig.client.node_key(), i64::try_from(WALL).unwrap());
    let mut message = rig.first_map();
    message.control_time = Timestamp::from_unix(wall, 0);
    message.node.as_mut().unwrap().key_expiry = Timestamp::from_unix(wall + 60, 0);
    rig.client.map_received(rig.now, map, message);
    rig.events();
    assert!(rig.actions().is_empty());
    assert_eq!(rig.client.poll_timeout(), Some(rig.now + Duration::from_secs(60)));
    rig.tick();
    assert!(matches!(&rig.events()[..], [ControlEvent::Expired]));
    let actions = rig.actions();
    let [Action::CloseMap(_), Action::Register(id, request)] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(request.old_node_key, old);
    rig.client.register_answered(rig.now, *id, RegisterResponse::default());
    let (_, map, _) = rig.map_requests();
    // The old map still shows the expired key; that must not set it off again.
    rig.client.map_received(rig.now, map, MapResponse::keep_alive());
    assert!(!rig.events().iter().any(|event| matches!(event, ControlEvent::Expired)));
}

#[test]
fn a_silent_stream_is_given_up_after_two_minutes() {
    let (mut rig, _, map) = Rig::running();
    rig.now += Duration::from_secs(100);
    rig.client.map_received(rig.now, map, MapResponse::keep_alive());
    assert_eq!(rig.client.poll_timeout(), Some(rig.now + WATCHDOG));
    rig.tick();
    assert_eq!(rig.actions(), [Action::Disconnect]);
    assert!(matches!(&rig.events()[..], [ControlEvent::Unreachable { reason: Problem::Stalled(_), .. }]));
    rig.tick();
    rig.connect();
    // Registered once, the map is asked for directly.
    rig.map_requests();
}

#[test]
fn a_server_that_forgot_the_node_is_introduced_to_it_again() {
    let (mut rig, _, map) = Rig::running();
    let problem = Problem::Status { path: "/machine/map".into(), status: 404, text: String::new(), retry_after: None };
    rig.client.request_failed(rig.now, map, problem);
    rig.tick();
    rig.register_request();
}

#[test]
fn waits_double_up_to_the_limit_and_a_map_sets_them_back() {
    let (mut rig, _, _) = Rig::running();
    let mut waits = Vec::new();
    rig.client.connection_failed(rig.now, Problem::MapEnded);
    for _ in 0..12 {
        let events = rig.events();
        let [ControlEvent::Unreachable { retry_in, .. }] = &events[..] else { panic!("{events:?}") };
        waits.push(*retry_in);
        rig.tick();
        assert_eq!(rig.actions(), [Action::Connect]);
        rig.client.connection_failed(rig.now, Problem::MapEnded);
    }
    for (at, wait) in waits.iter().enumerate() {
        let full = FIRST_RETRY.saturating_mul(1 << at.min(10)).min(LAST_RETRY);
        assert!((full / 2..=full).contains(wait), "{at}: {wait:?}");
    }
    rig.tick();
    rig.connect();
    let (_, map, _) = rig.map_requests();
    let first = rig.first_map();
    rig.client.map_received(rig.now, map, first);
    rig.events();
    rig.client.request_failed(rig.now, map, Problem::MapEnded);
    assert!(matches!(&rig.events()[..], [ControlEvent::Unreachable { retry_in, .. }] if *retry_in <= FIRST_RETRY));
}

#[test]
fn updates_go_one_at_a_time_and_only_when_different() {
    let (mut rig, ..) = Rig::running();
    let description = |port: u16| Description {
        endpoints: vec![(([192, 0, 2, 1], port).into(), EndpointType::Stun)],
        ..Description::default()
    };
    rig.client.describe(rig.now, description(1));
    let actions = rig.actions();
    let [Action::Update(id, request)] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((request.endpoints.len(), &request.endpoint_types[..]), (1, &[EndpointType::Stun][..]));
    rig.client.describe(rig.now, description(2));
    rig.client.describe(rig.now, description(3));
    assert!(rig.actions().is_empty());
    rig.client.update_answered(rig.now, *id);
    let actions = rig.actions();
    let [Action::Update(id, request)] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(request.endpoints[0].port(), 3);
    rig.client.update_answered(rig.now, *id);
    rig.client.describe(rig.now, description(3));
    assert!(rig.actions().is_empty());
}

#[test]
fn a_failed_update_is_sent_again_without_ending_the_stream() {
    let (mut rig, ..) = Rig::running();
    rig.client.describe(rig.now, Description { disco: DiscoPublic::from_bytes([1; 32]), ..Description::default() });
    let actions = rig.actions();
    let [Action::Update(id, _)] = &actions[..] else { panic!("{actions:?}") };
    let problem = Problem::Status { path: "/machine/map".into(), status: 500, text: String::new(), retry_after: None };
    rig.client.request_failed(rig.now, *id, problem);
    assert!(rig.actions().is_empty() && rig.client.is_polling());
    rig.tick();
    assert!(matches!(&rig.actions()[..], [Action::Update(..)]));
}

#[test]
fn retry_after_is_obeyed() {
    let mut rig = rig();
    rig.client.login(rig.now, None);
    rig.connect();
    let (id, _) = rig.register_request();
    let after = Duration::from_secs(90);
    let problem = Problem::Status {
        path: "/machine/register".into(),
        status: 429,
        text: String::new(),
        retry_after: Some(after),
    };
    rig.client.request_failed(rig.now, id, problem);
    assert_eq!(rig.client.poll_timeout(), Some(rig.now + after));
}

#[test]
fn the_first_map_has_to_contain_this_node() {
    let mut rig = rig();
    rig.client.login(rig.now, None);
    rig.connect();
    let (id, _) = rig.register_request();
    rig.client.register_answered(rig.now, id, RegisterResponse::default());
    let (_, map, _) = rig.map_requests();
    rig.events();
    rig.client.map_received(rig.now, map, MapResponse::default());
    assert!(matches!(&rig.events()[..], [ControlEvent::Unreachable { reason: Problem::NoNode, .. }]));
    assert_eq!(rig.actions(), [Action::CloseMap(map)]);
}

#[test]
fn pings_are_answered_once() {
    let (mut rig, _, map) = Rig::running();
    let ping = PingRequest {
        url: "https://unused/machine/ping/1?x=2".into(),
        types: "c2n".into(),
        payload: crate::wire::Base64(b"POST /echo HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi".to_vec()),
        ..PingRequest::default()
    };
    let message = MapResponse { ping_request: Some(ping), ..MapResponse::keep_alive() };
    rig.client.map_received(rig.now, map, message.clone());
    rig.client.map_received(rig.now, map, message);
    let actions = rig.actions();
    let [Action::Post { path, body }] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(path, "/machine/ping/1?x=2");
    assert!(body.ends_with(b"\r\n\r\nhi"));
}

#[test]
fn clocks_far_apart_are_mentioned_once() {
    let (mut rig, _, map) = Rig::running();
    let control_time = Timestamp::from_unix(i64::try_from(WALL).unwrap() + 600, 0);
    for _ in 0..2 {
        rig.client.map_received(rig.now, map, MapResponse { control_time, ..MapResponse::keep_alive() });
    }
    let events = rig.events();
    assert!(matches!(&events[..], [ControlEvent::ClockSkew { by, ahead: false }] if by.as_secs() == 600), "{events:?}");
}

#[test]
fn a_logout_tells_the_server_and_forgets_the_key() {
    let (mut rig, ..) = Rig::running();
    let old = rig.client.node_key();
    rig.client.logout(rig.now);
    let actions = rig.actions();
    let [Action::CloseMap(_), Action::Register(id, request)] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((request.expiry, request.node_key), (Timestamp::LOGOUT, old));
    rig.client.register_answered(rig.now, *id, RegisterResponse { node_key_expired: true, ..Default::default() });
    assert!(matches!(&rig.events()[..], [ControlEvent::LoggedOut(None)]));
    assert_eq!(rig.actions(), [Action::Disconnect]);
    assert_ne!(rig.client.node_key(), old);
    assert!(rig.client.netmap().node().is_none());
}

#[test]
fn a_logout_ends_even_if_nobody_listens() {
    let mut rig = rig();
    rig.client.logout(rig.now);
    assert_eq!(rig.actions(), [Action::Connect]);
    rig.client.connection_failed(rig.now, Problem::MapEnded);
    assert!(matches!(&rig.events()[..], [ControlEvent::LoggedOut(Some(Problem::MapEnded))]));
    assert_eq!(rig.client.poll_timeout(), None);
}

#[test]
fn stopping_is_quiet_and_late_answers_are_ignored() {
    let (mut rig, _, map) = Rig::running();
    rig.client.stop(rig.now);
    assert_eq!(rig.actions(), [Action::Disconnect]);
    rig.client.map_received(rig.now, map, MapResponse { domain: "x".into(), ..MapResponse::default() });
    rig.client.connection_failed(rig.now, Problem::MapEnded);
    assert!(rig.actions().is_empty() && rig.events().is_empty() && rig.client.poll_timeout().is_none());
}

#[derive(Debug, Clone)]
enum Step {
    Login(bool),
    Stop,
    Logout,
    Describe(u8),
    Reauthenticate,
    Connected,
    Broken,
    Answer(u8),
    Map(bool, i64),
    Fail(u16),
    Told,
    Tick,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(
        prop_oneof![
            any::<bool>().prop_map(Step::Login),
            Just(Step::Stop),
            Just(Step::Logout),
            any::<u8>().prop_map(Step::Describe),
            Just(Step::Reauthenticate),
            Just(Step::Connected),
            Just(Step::Connected),
            Just(Step::Broken),
            (0_u8..5).prop_map(Step::Answer),
            (any::<bool>(), -100_i64..100).prop_map(|(node, expiry)| Step::Map(node, expiry)),
            (400_u16..600).prop_map(Step::Fail),
            Just(Step::Told),
            Just(Step::Tick),
            Just(Step::Tick),
        ],
        1..60,
    )
}

proptest! {
    #[test]
    fn no_order_of_events_stalls_or_spins_it(steps in steps()) {
        let mut rig = rig();
        let mut last: Vec<RequestId> = Vec::new();
        let wall = i64::try_from(WALL).unwrap();
        for step in steps {
            let id = last.last().copied().unwrap_or(RequestId(0));
            match step {
                Step::Login(key) => rig.client.login(rig.now, key.then(|| "key".into())),
                Step::Stop => rig.client.stop(rig.now),
                Step::Logout => rig.client.logout(rig.now),
                Step::Describe(byte) => rig.client.describe(
                    rig.now,
                    Description { disco: DiscoPublic::from_bytes([byte; 32]), ..Description::default() },
                ),
                Step::Reauthenticate => rig.client.reauthenticate(rig.now, None),
                Step::Connected => rig.client.connected(rig.now),
                Step::Broken => rig.client.connection_failed(rig.now, Problem::MapEnded),
                Step::Answer(kind) => rig.client.register_answered(rig.now, id, RegisterResponse {
                    error: if kind == 1 { "no".into() } else { String::new() },
                    node_key_expired: kind == 2,
                    auth_url: if kind == 3 { "url".into() } else { String::new() },
                    ..RegisterResponse::default()
                }),
                Step::Map(node, expiry) => {
                    let mut message = rig.first_map();
                    message.control_time = Timestamp::from_unix(wall, 0);
                    message.node.as_mut().unwrap().key_expiry = Timestamp::from_unix(wall + expiry, 0);
                    if !node { message.node = None; }
                    rig.client.map_received(rig.now, id, message);
                }
                Step::Fail(status) => rig.client.request_failed(rig.now, id, Problem::Status {
                    path: String::new(), status, text: String::new(), retry_after: None,
                }),
                Step::Told => rig.client.update_answered(rig.now, id),
                Step::Tick => if let Some(at) = rig.client.poll_timeout() { rig.now = rig.now.max(at) },
            }
            rig.client.handle_timeout(rig.now);
            let actions = rig.actions();
            prop_assert!(actions.len() < 8, "{actions:?}");
            for action in actions {
                if let Action::Register(id, _) | Action::OpenMap(id, _) | Action::Update(id, _) = action {
                    last.push(id);
                }
            }
            rig.events();
            prop_assert!(rig.client.poll_timeout().is_none_or(|at| at > rig.now));
            // Whoever runs is connecting, waiting for an answer, or has set an alarm.
            let busy = rig.client.link == Link::Connecting || rig.client.register.is_some() || rig.client.stream.is_some();
            prop_assert!(rig.client.goal == Goal::Idle || busy || rig.client.poll_timeout().is_some());
        }
    }
}

//! Two data planes that have agreed on a session.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use mesh_nat::{Path, SocketId};
use mesh_node::dataplane::{Config, Dataplane, NoRelay, Notices, PeerConfig, Workers};
use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::random::SeededRng;
use mesh_noise::wireguard::{self, Event, Interface, Session};
use mesh_tun::channel::{self, ChannelDevice};
use mesh_tun::filter::{Filter, Standing};
use mesh_tun::linux::udp::{self, UdpBatch};

/// The addresses of the two hosts.
pub(crate) const A: [u8; 4] = [100, 64, 0, 1];
pub(crate) const B: [u8; 4] = [100, 64, 0, 2];

/// A data plane, and the other end of its device.
pub(crate) struct End {
    pub(crate) plane: Dataplane,
    pub(crate) host: ChannelDevice,
    _notices: Notices,
}

/// Two data planes with a session, a direct path on the loopback interface, and open filters.
pub(crate) fn pair(workers: Workers) -> [End; 2] {
    let epoch = now();
    let privates = [1, 2].map(|seed| NodePrivate::generate(&mut SeededRng::from_seed([seed; 32])));
    let keys = [privates[0].public(), privates[1].public()];
    let sockets = [(); 2].map(|()| UdpBatch::bind(&udp::Config::bound_to(([127, 0, 0, 1], 0).into())).unwrap());
    let sessions = agree(epoch, &privates, keys);
    [0, 1].map(|own| {
        let other = 1 - own;
        let (device, host) = channel::pair(1280, 4096);
        let (plane, notices) = Dataplane::start(Config {
            device: Arc::new(device),
            sockets: vec![(SocketId(0), Arc::clone(&sockets[own]))],
            relay: Arc::new(NoRelay),
            flow_seed: [7; 16],
            clock: Arc::new(move || u64::try_from(epoch.elapsed().as_millis()).unwrap() + 1),
            workers,
        })
        .unwrap();
        let prefix = |address: [u8; 4]| ipnet::IpNet::from(std::net::IpAddr::from(address));
        let allowed_ips = vec![prefix([A, B][other])];
        plane.set_peer(&PeerConfig { key: keys[other], allowed_ips, standing: Standing::Ordinary });
        let remote = sockets[other].local_addr();
        plane.set_path(&keys[other], Some(Path::Direct { socket: SocketId(0), remote }));
        plane.set_filter(Filter::open(plane.flows()));
        for session in &sessions[own] {
            plane.session_opened(session);
            plane.session_ready(session);
        }
        End { plane, host, _notices: notices }
    })
}

/// Lets two interfaces shake hands, and returns the sessions of each.
fn agree(epoch: Instant, privates: &[NodePrivate; 2], keys: [NodePublic; 2]) -> [Vec<Arc<Session>>; 2] {
    #[expect(clippy::disallowed_methods, reason = "tests are their own driver")]
    let wall = SystemTime::now();
    let mut interfaces = [0, 1].map(|own| {
        let mut interface = Interface::<Path>::new(epoch, wall, &privates[own], [u8::try_from(own).unwrap() + 7; 32]);
        interface.set_peer(epoch, keys[1 - own], wireguard::PeerConfig::default());
        interface
    });
    interfaces[0].want_session(epoch, &keys[1]);
    let mut sessions = [Vec::new(), Vec::new()];
    let path = Path::Direct { socket: SocketId(0), remote: ([127, 0, 0, 1], 9).into() };
    for own in [0, 1, 0] {
        let sent: Vec<_> = std::iter::from_fn(|| interfaces[own].poll_transmit()).collect();
        for transmit in sent {
            // The last message is transport data that confirms the session; the data planes see to that.
            let _ = interfaces[1 - own].handle_datagram(epoch, &path, None, &transmit.datagram);
        }
        for (sessions, interface) in sessions.iter_mut().zip(&mut interfaces) {
            while let Some(event) = interface.poll_event() {
                if let Event::SessionOpened { session, .. } = event {
                    sessions.push(session);
                }
            }
        }
    }
    assert_eq!(sessions.each_ref().map(Vec::len), [1, 1]);
    sessions
}

#[expect(clippy::disallowed_methods, reason = "tests are their own driver")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

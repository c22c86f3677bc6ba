//! The packet path takes no memory from the system once it runs: counted by the allocator of this test's own binary.
#![expect(clippy::unwrap_used, reason = "helpers outside test functions, in a test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use mesh_nat::{Path, SocketId};
use mesh_node::dataplane::{Config, Dataplane, NoRelay, Notices, PeerConfig};
use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::random::SeededRng;
use mesh_noise::wireguard::{self, Event, Interface, Session};
use mesh_tun::batch::Batch;
use mesh_tun::channel::{self, ChannelDevice};
use mesh_tun::device::Device;
use mesh_tun::filter::{Filter, Standing};
use mesh_tun::linux::udp::{self, UdpBatch};

/// The system's allocator, counting.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator with the same arguments; counting touches no memory of theirs.
#[expect(unsafe_code, reason = "an allocator cannot be written without")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same here.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above; `memory` came from `alloc`, and so from the system.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const A: [u8; 4] = [100, 64, 0, 1];
const B: [u8; 4] = [100, 64, 0, 2];
const ROUNDS: u64 = 200;
const BURST: u64 = 32;

#[test]
fn packets_cost_no_allocations() {
    let [a, b] = pair();
    let mut batch = Batch::new(64, 1280);
    let mut carry = |from: &End, to: &End, packet: &[u8]| {
        for _ in 0..BURST {
            assert!(from.host.send(packet));
        }
        let mut arrived = 0;
        while arrived < BURST {
            batch.clear();
            let read = to.host.read_batch(&mut batch, Duration::from_secs(5)).unwrap();
            assert_ne!(read, 0, "{:?} and {:?}", from.plane.drops(), to.plane.drops());
            arrived += read as u64;
        }
    };
    let (there, back) = (packet(A, B), packet(B, A));
    let mut rounds = |count| {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for _ in 0..count {
            carry(&a, &b, &there);
            carry(&b, &a, &back);
        }
        ALLOCATIONS.load(Ordering::Relaxed) - before
    };
    // Queues grow to what they need, and the first packets are news for the engine.
    rounds(20);
    let (allocations, packets) = (rounds(ROUNDS), 2 * ROUNDS * BURST);
    println!("{allocations} allocations for {packets} packets through both data planes");
    assert_eq!(allocations, 0);
}

struct End {
    plane: Dataplane,
    host: ChannelDevice,
    _notices: Notices,
}

/// Two data planes with a session, a direct path on the loopback interface, and open filters.
fn pair() -> [End; 2] {
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

fn packet(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0; 1200];
    (packet[0], packet[8], packet[9]) = (0x45, 64, 17);
    packet[2..4].copy_from_slice(&1200_u16.to_be_bytes());
    packet[12..16].copy_from_slice(&from);
    packet[16..20].copy_from_slice(&to);
    packet[20..24].copy_from_slice(&[4, 0, 4, 0]);
    packet[24..26].copy_from_slice(&1180_u16.to_be_bytes());
    packet
}

#[expect(clippy::disallowed_methods, reason = "tests are their own driver")]
fn now() -> Instant {
    Instant::now()
}

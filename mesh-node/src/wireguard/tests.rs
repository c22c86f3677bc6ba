//! Two tunnels over loopback, configured through their control sockets as `wg` does it, with devices in memory.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::random::SeededRng;
use mesh_tun::channel::{self, ChannelDevice};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::{ControlSocket, Error, Options, Tunnel};

const PATIENCE: Duration = Duration::from_secs(10);

/// A tunnel in a task, with the two ends that a user sees.
struct Running {
    socket: std::path::PathBuf,
    device: Arc<ChannelDevice>,
    public: NodePublic,
    task: JoinHandle<Result<(), Error>>,
}

impl Running {
    async fn start(dir: &Path, number: u8) -> Self {
        let (near, far) = channel::pair(1420, 64);
        let control = ControlSocket::bind_in(dir, &format!("wg{number}")).unwrap();
        let socket = control.path().to_owned();
        let options = Options::new([number; 32]);
        let mut tunnel = Tunnel::start(Arc::new(far), options).unwrap();
        let task = tokio::spawn(async move { tunnel.run(control).await });
        let private = NodePrivate::generate(&mut SeededRng::from_seed([number + 100; 32]));
        let running = Self { socket, device: Arc::new(near), public: private.public(), task };
        let set = format!("set=1\nprivate_key={}\n\n", hex::encode(private.expose_secret()));
        assert_eq!(running.ask(&set).await, "errno=0\n\n");
        running
    }

    /// Sends one request and returns the answer.
    async fn ask(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(&self.socket).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// The values of a key in the answer to a get.
    async fn values(&self, key: &str) -> Vec<String> {
        let answer = self.ask("get=1\n\n").await;
        let lines = answer.lines().filter_map(|line| line.split_once('='));
        lines.filter(|(name, _)| *name == key).map(|(_, value)| value.to_owned()).collect()
    }

    /// Waits until the only value of a key is as wanted: packets overtake what is counted about them.
    async fn comes_to(&self, key: &str, wanted: impl Fn(&str) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let values = self.values(key).await;
            if matches!(&values[..], [value] if wanted(value)) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "{key} is {values:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn add_peer(&self, peer: &Self, lines: &str) {
        let key = hex::encode(peer.public.as_bytes());
        assert_eq!(self.ask(&format!("set=1\npublic_key={key}\n{lines}\n\n")).await, "errno=0\n\n");
    }

    async fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.values("listen_port").await[0])
    }

    async fn recv(&self) -> Option<Vec<u8>> {
        let device = Arc::clone(&self.device);
        tokio::task::spawn_blocking(move || device.recv(PATIENCE)).await.unwrap()
    }
}

/// An IPv4 packet of an unassigned protocol, 28 bytes long.
fn packet(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 200, 0, 0];
    packet.extend_from_slice(&from);
    packet.extend_from_slice(&to);
    packet.extend_from_slice(b"8 bytes.");
    packet
}

const ONE: [u8; 4] = [10, 0, 0, 1];
const TWO: [u8; 4] = [10, 0, 0, 2];

#[tokio::test(flavor = "multi_thread")]
async fn two_tunnels_carry_packets_and_count_them() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Running::start(dir.path(), 1).await, Running::start(dir.path(), 2).await);
    let psk = format!("preshared_key={}", "5a".repeat(32));
    a.add_peer(&b, &format!("{psk}\nendpoint={}\nallowed_ip=10.0.0.2/32", b.endpoint().await)).await;
    b.add_peer(&a, &format!("{psk}\nallowed_ip=10.0.0.1/32")).await;

    assert!(a.device.send(&packet(ONE, TWO)));
    assert_eq!(b.recv().await, Some(packet(ONE, TWO)));
    assert!(b.device.send(&packet(TWO, ONE)));
    assert_eq!(a.recv().await, Some(packet(TWO, ONE)));

    // Initiation, confirming keepalive, padded packet; response and padded packet.
    a.comes_to("tx_bytes", |value| value == (148 + 32 + 64).to_string()).await;
    a.comes_to("rx_bytes", |value| value == (92 + 64).to_string()).await;
    b.comes_to("last_handshake_time_sec", |value| value != "0").await;
    // b has learnt where a is.
    let endpoint = a.endpoint().await;
    b.comes_to("endpoint", |value| value == endpoint).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_has_one_owner_and_its_source_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Running::start(dir.path(), 3).await, Running::start(dir.path(), 4).await);
    let stranger = Running::start(dir.path(), 5).await;
    a.add_peer(&b, &format!("endpoint={}\nallowed_ip=10.0.0.0/24", b.endpoint().await)).await;
    b.add_peer(&a, "allowed_ip=10.0.0.1/32").await;
    assert!(a.device.send(&packet([10, 0, 0, 9], TWO)), "not an address that b allows a");
    assert!(a.device.send(&packet(ONE, TWO)));
    assert_eq!(b.recv().await, Some(packet(ONE, TWO)));

    a.add_peer(&stranger, "allowed_ip=10.0.0.0/24\nallowed_ip=fd00::/8").await;
    assert_eq!(a.values("allowed_ip").await, ["10.0.0.0/24", "fd00::/8"], "taken from b");
    a.add_peer(&stranger, "remove=true").await;
    assert_eq!(a.values("public_key").await, [hex::encode(b.public.as_bytes())]);
    a.add_peer(&stranger, "update_only=true\nallowed_ip=10.0.0.7/32").await;
    assert_eq!(a.values("allowed_ip").await, Vec::<String>::new(), "nobody was updated");
    assert_eq!(a.ask("set=1\nreplace_peers=true\n\n").await, "errno=0\n\n");
    assert_eq!(a.values("public_key").await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_can_change_and_a_taken_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Running::start(dir.path(), 6).await, Running::start(dir.path(), 7).await);
    let before = a.values("listen_port").await;
    let taken = b.values("listen_port").await;
    assert_eq!(a.ask(&format!("set=1\nlisten_port={}\n\n", taken[0])).await, "errno=-98\n\n");
    assert_eq!(a.values("listen_port").await, before);
    assert_eq!(a.ask("set=1\nlisten_port=0\n\n").await, "errno=0\n\n");
    assert_ne!(a.values("listen_port").await, before);
    a.add_peer(&b, &format!("endpoint={}\nallowed_ip=10.0.0.2/32", b.endpoint().await)).await;
    b.add_peer(&a, "allowed_ip=10.0.0.1/32").await;
    assert!(a.device.send(&packet(ONE, TWO)));
    assert_eq!(b.recv().await, Some(packet(ONE, TWO)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_configuration_is_answered_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let a = Running::start(dir.path(), 8).await;
    let key = a.values("private_key").await;
    assert_eq!(a.ask("set=1\nprivate_key=nonsense\n\n").await, "errno=-22\n\n");
    assert_eq!(a.ask("hello\n\n").await, "errno=-71\n\n");
    assert_eq!(a.ask("set=1\nlisten_port=1\nhalf a request").await, "", "nothing is done before its end");
    assert_eq!(a.values("private_key").await, key);
    assert_eq!(a.ask(&format!("set=1\nprivate_key={}\n\n", "00".repeat(32))).await, "errno=0\n\n");
    assert_eq!(a.values("private_key").await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_the_control_socket_ends_the_tunnel() {
    let dir = tempfile::tempdir().unwrap();
    let a = Running::start(dir.path(), 9).await;
    let second = ControlSocket::bind_in(dir.path(), "wg9");
    assert!(matches!(second, Err(Error::InUse { .. })), "{second:?}");
    std::fs::remove_file(&a.socket).unwrap();
    let ended = tokio::time::timeout(PATIENCE, a.task).await;
    assert!(matches!(ended, Ok(Ok(Ok(())))), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_nobody_answers_on_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("wg0.sock")).unwrap());
    assert!(ControlSocket::bind_in(dir.path(), "wg0").is_ok());
    std::fs::write(dir.path().join("wg1.sock"), "a file of somebody's").unwrap();
    assert!(ControlSocket::bind_in(dir.path(), "wg1").is_err(), "and only a socket");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_that_is_cancelled_takes_its_socket_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (_near, far) = channel::pair(1420, 64);
    let options = Options::new([10; 32]);
    let mut tunnel = Tunnel::start(Arc::new(far), options).unwrap();
    let control = ControlSocket::bind_in(dir.path(), "wg0").unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(300), tunnel.run(control)).await.is_err());
    assert!(!dir.path().join("wg0.sock").exists());
}

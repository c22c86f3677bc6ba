//! Sockets and clocks: the parts that need tokio.
//!
//! [`listener`] accepts connections and reads their HTTP request heads, [`server`] is the relay behind it, [`client`] is
//! one node's connection to a region. [`tls_stream`] is what both put between TCP and HTTP.

#[cfg(feature = "server")]
use std::time::SystemTime;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use mesh_noise::random::SystemRng;
use rand_core::Rng;
use tokio::net::TcpStream;

#[cfg(feature = "acme")]
pub mod acme;
#[cfg(feature = "server")]
pub mod certificates;
pub mod client;
#[cfg(feature = "server")]
mod counter;
#[cfg(feature = "server")]
pub mod listener;
#[cfg(feature = "server")]
pub mod server;
mod stream;
pub mod tls_stream;
mod websocket;

pub use stream::{Detached, Duplex, Rewind, Transport, read_request_head};

/// The one clock of the drivers.
#[expect(clippy::disallowed_methods, reason = "the drivers' one clock")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// What certificates are dated by.
#[cfg(feature = "server")]
#[expect(clippy::disallowed_methods, reason = "certificates are valid by the calendar")]
pub(crate) fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// A number from 0 up to, but not including, 1.
pub(crate) fn random_fraction() -> f64 {
    f64::from(SystemRng.next_u32()) / (f64::from(u32::MAX) + 1.0)
}

/// Makes sure that a read has somewhere to go. A new buffer is only begun when the old one is nearly full: its packets
/// may still be queued somewhere, and then it cannot be grown in place.
pub(crate) fn make_room(buffer: &mut BytesMut, chunk: usize) {
    if buffer.capacity() - buffer.len() < chunk / 4 {
        buffer.reserve(chunk);
    }
}

/// How much the system takes beyond what it can send at once; then it takes no more until half of it is sent.
#[cfg(target_os = "linux")]
const NOT_SENT: u32 = 128 * 1024;

/// How long a relay lets what it has sent go unacknowledged.
#[cfg(feature = "server")]
pub(crate) const SERVER_PATIENCE: Duration = Duration::from_secs(15);
/// How long a client does: it has other relays to turn to. Its pings notice sooner, unless the system is stuck on data.
pub(crate) const CLIENT_PATIENCE: Duration = Duration::from_secs(8);

/// Sets up a relay's TCP connection: no waiting for more to send, and an end that has silently gone is noticed after
/// `patience` of unanswered data, or some 11 min of silence. Options that the system does not have are left alone.
pub(crate) fn tune(stream: &TcpStream, patience: Duration) {
    let socket = socket2::SockRef::from(stream);
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(Duration::from_secs(600)));
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(patience));
    #[cfg(not(target_os = "linux"))]
    let _ = patience;
    // What waits, waits in our queue, where disco overtakes it and too much is noticed.
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_notsent_lowat(NOT_SENT);
}

/// Writes a file that only its owner may read, as a whole or not at all. The directory is made if it is missing.
///
/// # Errors
/// Those of the file system.
#[cfg(feature = "server")]
pub(crate) fn write_private_file(path: &std::path::Path, content: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{:08x}.tmp", SystemRng.next_u32()));
    let temporary = path.with_file_name(name);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&temporary).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    let moved = written.and_then(|()| std::fs::rename(&temporary, path));
    if moved.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    moved
}

//! UDP datagrams at a given rate, and a counter of those that arrive: what iperf3 is too heavy for at 64 bytes.
//!
//! ```text
//! datagrams receive ADDRESS:PORT
//!     for every line on standard input, prints how many datagrams have arrived since the last one; ends with the input
//! datagrams send ADDRESS:PORT BYTES RATE SECONDS
//!     sends RATE datagrams of BYTES a second, evenly, and prints how many were sent in how many seconds
//! ```
//!
//! Each datagram is a message of its own: neither side lets the kernel segment or join.

use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mesh_tun::batch::Batch;
use mesh_tun::linux::udp::{Config, Outgoing, Segmentation, UdpBatch};

/// Datagrams a system call takes.
const BATCH: usize = 64;

/// How far the sender catches up after it was held up; what is older is not sent at all, since a burst is no rate.
const CATCH_UP: Duration = Duration::from_millis(4);

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["receive", address] => receive(address.parse()?),
        ["send", to, bytes, rate, seconds] => {
            send(to.parse()?, bytes.parse()?, rate.parse()?, Duration::from_secs_f64(seconds.parse()?))
        }
        _ => bail!("datagrams receive ADDRESS:PORT | datagrams send ADDRESS:PORT BYTES RATE SECONDS"),
    }
}

fn receive(address: SocketAddr) -> anyhow::Result<()> {
    let socket = UdpBatch::bind(&plain(address))?;
    let arrived = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut room = socket.recv_room(BATCH);
            while let Ok(count) = socket.recv_batch(&mut room, Duration::MAX) {
                arrived.fetch_add(count as u64, Ordering::Relaxed);
            }
        });
        let mut output = std::io::stdout();
        for line in std::io::stdin().lock().lines() {
            line?;
            writeln!(output, "{}", arrived.swap(0, Ordering::Relaxed))?;
            output.flush()?;
        }
        socket.close();
        Ok(())
    })
}

#[expect(clippy::disallowed_methods, reason = "a load generator lives by the real clock")]
fn send(to: SocketAddr, bytes: usize, rate: f64, duration: Duration) -> anyhow::Result<()> {
    let socket = UdpBatch::bind(&plain(SocketAddr::from(([0, 0, 0, 0], 0))))?;
    let mut batch = Batch::new(BATCH, bytes);
    while batch.push(&vec![0x5a; bytes]) {}
    let outgoing: Vec<_> = (0..batch.len()).map(|index| Outgoing { to, index }).collect();

    let (start, mut sent, mut forgone) = (Instant::now(), 0, 0.0);
    let elapsed = loop {
        let elapsed = start.elapsed();
        if elapsed >= duration {
            break elapsed;
        }
        let mut due = elapsed.as_secs_f64() * rate - forgone - f64::from(sent);
        let most = (CATCH_UP.as_secs_f64() * rate).max(1.0);
        if due > most {
            forgone += due - most;
            due = most;
        }
        let count = outgoing.iter().take(BATCH).zip(1..).take_while(|(_, number)| f64::from(*number) <= due).count();
        if count == 0 {
            std::thread::sleep(Duration::from_micros(30));
            continue;
        }
        sent += u32::try_from(socket.send_batch(&batch, &outgoing[..count]).sent).context("a batch is small")?;
    };
    writeln!(std::io::stdout(), "{sent} {}", elapsed.as_secs_f64())?;
    Ok(())
}

fn plain(address: SocketAddr) -> Config {
    let mut config = Config::bound_to(address);
    config.segmentation = Segmentation::Off;
    config.gather = false;
    config
}

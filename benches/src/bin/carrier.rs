//! `carrier INTERFACE LOCAL:PORT REMOTE:PORT`: a tunnel without cryptography, peers, filter, timers or replay window.
//!
//! What is left is what the machine wants for moving packets between a TUN device and a socket: super-packets read, cut,
//! sent by `sendmmsg` with segmentation, gathered by `recvmmsg`, joined and written. No userspace tunnel on this design
//! can be faster, so its cost and that of the cipher make the ceiling that the data plane is measured by. Datagrams are
//! as long as WireGuard's.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::bail;
use mesh_tun::batch::Batch;
use mesh_tun::device::Device;
use mesh_tun::linux::tun::{self, Tun};
use mesh_tun::linux::udp::{Config, Outgoing, UdpBatch};

/// WireGuard's transport header and tag (whitepaper §5.4.6).
const HEADER: usize = 16;
const TAG: usize = 16;

/// Packets a turn: two super-packets.
const BATCH: usize = 128;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [name, local, remote] = &arguments[..] else { bail!("carrier INTERFACE LOCAL:PORT REMOTE:PORT") };
    let mut config = tun::Config::named(name);
    config.packet_size = Some(1500);
    let device = Tun::open(&config)?;
    let socket = UdpBatch::bind(&Config::bound_to(local.parse()?))?;
    let remote: SocketAddr = remote.parse()?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&device, &socket));
        transmit(&device, &socket, remote)?;
        receiver.join().unwrap_or_else(|_| bail!("the receiving thread panicked"))
    })
}

fn transmit(device: &Tun, socket: &UdpBatch, to: SocketAddr) -> anyhow::Result<()> {
    let mut batch = Batch::new(BATCH, device.packet_size());
    let mut outgoing = Vec::with_capacity(BATCH);
    loop {
        batch.clear();
        device.read_batch(&mut batch, Duration::MAX)?;
        outgoing.clear();
        for index in 0..batch.len() {
            batch.grow(index, HEADER, HEADER + batch.packet(index).len() + TAG);
            outgoing.push(Outgoing { to, index });
        }
        socket.send_batch(&batch, &outgoing);
    }
}

fn receive(device: &Tun, socket: &UdpBatch) -> anyhow::Result<()> {
    let mut room = socket.recv_room(BATCH);
    loop {
        socket.recv_batch(&mut room, Duration::MAX)?;
        let batch = room.batch_mut();
        for index in 0..batch.len() {
            match batch.packet(index).len().checked_sub(TAG) {
                Some(end) if end > HEADER => batch.narrow(index, HEADER..end),
                _ => batch.discard(index),
            }
        }
        device.write_batch(batch)?;
    }
}

//! One connection on which frames pass.

use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};

use super::dial::Link;
use super::outbox::Shared;
use super::sleep_until;
use crate::client::Connection;
use crate::client::dialling::Via;
use crate::driver::stream::{Rewind, Transport};
use crate::driver::{make_room, now};
use crate::frame::HEADER_LEN;

const CLOSED: &str = "relay closed the connection";
/// How much is handed to the socket at once: four TLS records.
const BATCH: usize = 64 * 1024;
/// How much is read at once, and becomes one batch of events.
const READ_CHUNK: usize = 64 * 1024;

/// A connection to a relay, from the first frame on.
pub(super) struct Open {
    /// The relay's place in the region.
    pub(super) node: usize,
    pub(super) via: Via,
    pub(super) core: Connection,
    reader: ReadHalf<Rewind<Transport>>,
    writer: WriteHalf<Rewind<Transport>>,
    out: BytesMut,
    unflushed: bool,
}

impl Open {
    pub(super) fn new(link: Link, core: Connection) -> Self {
        let (reader, writer) = tokio::io::split(link.stream);
        let out = BytesMut::from(&link.first[..]);
        Self { node: link.node, via: link.via, core, reader, writer, out, unflushed: false }
    }

    /// Does one thing: reads, writes, flushes, or lets time pass. Packets are taken from `shared`. Safe to cancel.
    pub(super) async fn step(&mut self, shared: &Shared, last_sent: &mut Option<Instant>) -> Result<(), String> {
        if self.out.is_empty() {
            self.take_packets(shared, last_sent);
        }
        let more = async {
            shared.ready.notified().await;
            Ok(())
        };
        let idle = self.out.is_empty() && self.core.accepts_packets() && !self.core.is_paused();
        tokio::select! {
            done = self.step_alone() => done,
            more = more, if idle => more,
        }
    }

    /// The same without taking packets.
    pub(super) async fn step_alone(&mut self) -> Result<(), String> {
        if self.out.is_empty() {
            self.fill();
        }
        let deadline = self.core.poll_timeout().map(tokio::time::Instant::from_std);
        make_room(self.core.read_buffer(), READ_CHUNK);
        tokio::select! {
            read = self.reader.read_buf(self.core.read_buffer()) => self.handle_read(read),
            written = write_some(&mut self.writer, &mut self.out), if !self.out.is_empty() || self.unflushed => {
                self.unflushed = written.map_err(lost)?;
                Ok(())
            }
            () = sleep_until(deadline) => self.core.handle_timeout(now()).map_err(|error| error.to_string()),
        }
    }

    /// Reads only: a relay that hears from an older connection takes it for the one to send to.
    pub(super) async fn listen(&mut self) -> Result<(), String> {
        make_room(self.core.read_buffer(), READ_CHUNK);
        let read = self.reader.read_buf(self.core.read_buffer()).await;
        self.handle_read(read)
    }

    fn handle_read(&mut self, read: std::io::Result<usize>) -> Result<(), String> {
        if read.map_err(lost)? == 0 {
            return Err(CLOSED.to_owned());
        }
        self.core.handle_buffered(now()).map_err(|error| error.to_string())
    }

    /// Moves packets that are to be sent into the core, up to one batch, or as many as the relay's limit allows.
    fn take_packets(&mut self, shared: &Shared, last_sent: &mut Option<Instant>) {
        if !self.core.accepts_packets() || self.core.is_paused() {
            return;
        }
        let (mut queue, at, mut length) = (shared.queue(), now(), 0);
        while length < BATCH
            && !self.core.is_paused()
            && let Some(packet) = queue.pop(at)
        {
            length += HEADER_LEN + 32 + packet.payload.len();
            shared.sent.fetch_add(1, Ordering::Relaxed);
            shared.sent_bytes.fetch_add(packet.payload.len() as u64, Ordering::Relaxed);
            *last_sent = Some(at);
            self.core.send(at, packet.node, packet.payload);
        }
    }

    fn fill(&mut self) {
        while let Some(bytes) = self.core.poll_transmit() {
            if self.out.is_empty() {
                self.out = bytes.try_into_mut().unwrap_or_else(|bytes| BytesMut::from(&bytes[..]));
            } else {
                self.out.extend_from_slice(&bytes);
            }
        }
    }
}

fn lost(error: std::io::Error) -> String {
    // TLS reports an end without farewell this way.
    let ended = error.kind() == std::io::ErrorKind::UnexpectedEof;
    if ended { CLOSED.to_owned() } else { format!("connection lost: {error}") }
}

/// Writes some of `out`, or flushes if there is none; says whether a flush is still due. Safe to cancel.
pub(crate) async fn write_some(writer: &mut WriteHalf<Rewind<Transport>>, out: &mut BytesMut) -> std::io::Result<bool> {
    if out.is_empty() {
        return writer.flush().await.map(|()| false);
    }
    match writer.write_buf(out).await? {
        0 => Err(std::io::ErrorKind::WriteZero.into()),
        _ => Ok(true),
    }
}

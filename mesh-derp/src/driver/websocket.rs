//! A byte stream carried in WebSocket messages.
//!
//! What is read is decoded in the caller's buffer, and of what is written at most one message waits here. Both directions
//! have to be polled by one task, since reading may have to write: Pings are answered.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use mesh_noise::random::SystemRng;
use rand_core::Rng as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::websocket::{Decoder, Role, encode_close, encode_message};

/// The longest message that is written: four TLS records.
const MAX_MESSAGE: usize = 64 * 1024;

/// A stream over WebSocket messages. The handshake has been made.
#[derive(Debug)]
pub(crate) struct WebSocket<S> {
    inner: S,
    role: Role,
    decoder: Decoder,
    out: BytesMut,
    /// Whether something has been written that `inner` may still hold.
    unflushed: bool,
    closing: bool,
}

impl<S> WebSocket<S> {
    pub(crate) fn new(inner: S, role: Role) -> Self {
        let out = BytesMut::new();
        Self { inner, role, decoder: Decoder::new(role), out, unflushed: false, closing: false }
    }
}

fn mask() -> [u8; 4] {
    SystemRng.next_u32().to_ne_bytes()
}

impl<S: AsyncWrite + Unpin> WebSocket<S> {
    /// Hands everything that waits to `inner`.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while !self.out.is_empty() {
                match ready!(Pin::new(&mut self.inner).poll_write(cx, &self.out))? {
                    0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    written => self.out.advance(written),
                }
                self.unflushed = true;
            }
            if !self.decoder.has_answer() || self.closing {
                break;
            }
            self.decoder.answer(mask(), &mut self.out);
        }
        // An idle connection holds no buffer.
        self.out = BytesMut::new();
        Poll::Ready(Ok(()))
    }

    fn poll_drain_and_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        if self.unflushed {
            ready!(Pin::new(&mut self.inner).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            if this.decoder.has_answer() && !this.closing {
                // Whether it is gone or not, reading goes on; a failure is met again by whoever writes.
                let _ = this.poll_drain_and_flush(cx)?;
            }
            if this.decoder.is_closed() {
                return Poll::Ready(Ok(()));
            }
            ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
            let got = &mut buf.filled_mut()[before..];
            if got.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let kept = this.decoder.decode(got).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            buf.set_filled(before + kept);
            if kept > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.closing {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(this.poll_drain(cx))?;
        let taken = bytes.len().min(MAX_MESSAGE);
        if taken > 0 {
            encode_message(this.role, mask(), &bytes[..taken], &mut this.out);
            // What does not go now goes with the next write or flush.
            let _ = this.poll_drain(cx)?;
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        this.unflushed = false;
        Pin::new(&mut this.inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closing {
            this.closing = true;
            encode_close(this.role, mask(), &mut this.out);
        }
        ready!(this.poll_drain_and_flush(cx))?;
        Pin::new(&mut this.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use futures_util::{SinkExt as _, StreamExt as _};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_websockets::{ClientBuilder, Message, ServerBuilder};

    #[tokio::test]
    async fn another_implementation_hears_what_is_written_and_is_heard() {
        for ours in [Role::Client, Role::Server] {
            let (near, far) = tokio::io::duplex(700);
            let mut near = WebSocket::new(near, ours);
            let mut far = match ours {
                Role::Client => ServerBuilder::new().serve(far),
                Role::Server => ClientBuilder::new().take_over(far),
            };
            let data: Vec<u8> = (0..200_000u32).map(|n| n.to_be_bytes()[3] ^ n.to_be_bytes()[2]).collect();
            let sent = data.clone();
            let echo = tokio::spawn(async move {
                let mut heard = 0;
                while let Some(message) = far.next().await {
                    let message = message.unwrap();
                    if message.is_binary() {
                        heard += message.as_payload().len();
                        far.feed(Message::ping(Bytes::from_static(b"still there?"))).await.unwrap();
                        far.send(message).await.unwrap();
                    }
                }
                heard
            });
            let (mut reader, mut writer) = tokio::io::split(near);
            let mut got = vec![0; data.len()];
            let write = async {
                writer.write_all(&sent).await.unwrap();
                writer.flush().await.unwrap();
            };
            tokio::join!(write, async { reader.read_exact(&mut got).await.unwrap() });
            assert!(got == data, "{ours:?}");
            near = reader.unsplit(writer);
            near.shutdown().await.unwrap();
            assert_eq!(near.read(&mut [0; 9]).await.unwrap(), 0, "a Close is the end of the stream");
            assert_eq!(echo.await.unwrap(), data.len());
        }
    }

    #[tokio::test]
    async fn a_ping_is_answered_by_who_only_reads() {
        let (near, far) = tokio::io::duplex(1000);
        let mut near = WebSocket::new(near, Role::Server);
        let mut far = ClientBuilder::new().take_over(far);
        far.send(Message::ping(Bytes::from_static(b"hello"))).await.unwrap();
        let mut buffer = [0; 8];
        tokio::select! {
            read = near.read(&mut buffer) => panic!("{read:?}"),
            answer = far.next() => {
                let answer = answer.unwrap().unwrap();
                assert!(answer.is_pong() && answer.as_payload()[..] == b"hello"[..], "{answer:?}");
            }
        }
    }

    #[tokio::test]
    async fn pings_that_nobody_reads_the_answers_of_take_no_memory() {
        let (near, mut far) = tokio::io::duplex(300);
        let mut near = WebSocket::new(near, Role::Server);
        let mut ping = [0x89, 0x80 | 100, 0, 0, 0, 0].to_vec();
        ping.resize(106, 1);
        let flood = async {
            for _ in 0..10_000 {
                far.write_all(&ping).await.unwrap();
            }
        };
        let mut buffer = [0; 64];
        tokio::select! {
            read = near.read(&mut buffer) => panic!("{read:?}"),
            () = flood => {}
        }
        assert!(near.out.capacity() < 1000, "{}", near.out.capacity());
    }
}

//! Byte streams: TCP with or without TLS, and streams whose first bytes have already been read.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::tls_stream::{TlsSession, TlsStream};
use crate::upgrade::{self, MAX_HEAD_LEN, RequestHead};

/// A byte stream of any kind: what [`Transport::Other`] carries.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin + Send + fmt::Debug {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + fmt::Debug> Duplex for S {}

/// What carries a relay connection.
#[derive(Debug)]
pub enum Transport {
    /// TCP.
    Plain(TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
    /// Anything else: WebSocket messages, or a connection that another HTTP server has upgraded.
    Other(Box<dyn Duplex>),
}

impl Transport {
    /// Takes the connection from the present runtime. Nothing is lost, and nothing is read or written meanwhile.
    ///
    /// [`Transport::Other`] stays with the runtime that it belongs to, which has to go on running.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn detach(self) -> io::Result<Detached> {
        Ok(Detached(match self {
            Self::Plain(tcp) => Parked::Plain(tcp.into_std()?),
            Self::Tls(tls) => {
                let (tcp, session) = tls.into_parts();
                Parked::Tls(tcp.into_std()?, Box::new(session))
            }
            Self::Other(other) => Parked::Other(other),
        }))
    }

    /// Whether something has arrived that has not been read, once everything that could be was. Where that cannot be known
    /// without reading, it is assumed.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn poll_arrived(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(tcp) => tcp.poll_read_ready(cx),
            Self::Tls(tls) => tls.get_ref().poll_read_ready(cx),
            Self::Other(_) => Poll::Ready(Ok(())),
        }
    }
}

/// A connection taken from its runtime by [`Transport::detach`]. It may be sent to any thread.
#[derive(Debug)]
pub struct Detached(Parked);

#[derive(Debug)]
enum Parked {
    Plain(std::net::TcpStream),
    Tls(std::net::TcpStream, Box<TlsSession>),
    Other(Box<dyn Duplex>),
}

impl Detached {
    /// Goes on in the present runtime.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn attach(self) -> io::Result<Transport> {
        Ok(match self.0 {
            Parked::Plain(tcp) => Transport::Plain(TcpStream::from_std(tcp)?),
            Parked::Tls(tcp, session) => {
                Transport::Tls(Box::new(TlsStream::from_parts(TcpStream::from_std(tcp)?, *session)))
            }
            Parked::Other(other) => Transport::Other(other),
        })
    }
}

macro_rules! delegate {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Self::Plain(tcp) => {
                let $stream = Pin::new(tcp);
                $call
            }
            Self::Tls(tls) => {
                let $stream = Pin::new(tls.as_mut());
                $call
            }
            Self::Other(other) => {
                let $stream = Pin::new(other.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        delegate!(self, stream => stream.poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_shutdown(cx))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, stream => stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(tcp) => tcp.is_write_vectored(),
            Self::Tls(tls) => tls.is_write_vectored(),
            Self::Other(other) => other.is_write_vectored(),
        }
    }
}

/// A stream that yields some bytes first that were already read from it.
#[derive(Debug)]
pub struct Rewind<S> {
    first: Bytes,
    inner: S,
}

impl<S> Rewind<S> {
    /// `first`, then the rest of `inner`.
    pub const fn new(first: Bytes, inner: S) -> Self {
        Self { first, inner }
    }

    /// Puts bytes back in front of what is still to be read.
    pub fn unread(&mut self, bytes: Bytes) {
        self.first = if self.first.is_empty() { bytes } else { [bytes, self.first.split_off(0)].concat().into() };
    }

    /// The stream underneath, which lacks the bytes that were put back.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Takes it apart: the bytes that were put back, and the stream underneath.
    pub fn into_parts(self) -> (Bytes, S) {
        (self.first, self.inner)
    }
}

impl Rewind<Transport> {
    /// As [`Transport::detach`], with the bytes that were put back.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn detach(self) -> io::Result<Rewind<Detached>> {
        Ok(Rewind::new(self.first, self.inner.detach()?))
    }
}

impl Rewind<Detached> {
    /// As [`Detached::attach`], with the bytes that were put back.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn attach(self) -> io::Result<Rewind<Transport>> {
        Ok(Rewind::new(self.first, self.inner.attach()?))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewind<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let now = self.first.len().min(buf.remaining());
        buf.put_slice(&self.first[..now]);
        self.first.advance(now);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewind<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

/// Reads an HTTP request head: the parsed head, its bytes as they came, and whatever was read beyond it. `None` if the
/// stream ended before a first byte.
///
/// # Errors
/// If the stream fails or ends within the head, or the bytes are no head.
pub async fn read_request_head<S: AsyncRead + Unpin>(
    stream: &mut S,
) -> io::Result<Option<(RequestHead, Bytes, Bytes)>> {
    let mut bytes = BytesMut::new();
    loop {
        let parsed = upgrade::parse_request(&bytes);
        if let Some((head, len)) = parsed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))? {
            let raw = bytes.split_to(len).freeze();
            return Ok(Some((head, raw, bytes.freeze())));
        }
        bytes.reserve(MAX_HEAD_LEN / 4);
        if stream.read_buf(&mut bytes).await? == 0 {
            return if bytes.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn bytes_behind_the_head_are_kept() {
        let (mut near, mut far) = tokio::io::duplex(1024);
        near.write_all(b"GET /derp HTTP/1.1\r\n").await.unwrap();
        near.write_all(b"Upgrade: DERP\r\n\r\nframes").await.unwrap();
        let (head, raw, rest) = read_request_head(&mut far).await.unwrap().unwrap();
        assert_eq!((head.path(), &rest[..]), ("/derp", &b"frames"[..]));
        near.write_all(b" and more").await.unwrap();
        drop(near);
        let mut stream = Rewind::new(rest, far);
        stream.unread(raw);
        let mut all = String::new();
        stream.read_to_string(&mut all).await.unwrap();
        assert_eq!(all, "GET /derp HTTP/1.1\r\nUpgrade: DERP\r\n\r\nframes and more");
    }

    #[cfg(feature = "server")]
    #[test]
    fn a_connection_goes_on_in_another_runtime() {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        for tls in [false, true] {
            let there = runtime();
            let (mut far, detached) = there.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
                let near = listener.accept().await.unwrap().0;
                let (near, mut far) = if tls {
                    let server = crate::tls::ServerTls::generate(&["localhost".to_owned()]).unwrap();
                    let client = crate::tls::ClientTls::system().unwrap().unverified().unwrap();
                    let (near, far) = tokio::try_join!(
                        TlsStream::accept(server.config(None).unwrap(), near),
                        TlsStream::connect(client, "localhost".try_into().unwrap(), far)
                    )
                    .unwrap();
                    (Transport::Tls(Box::new(near.0)), Transport::Tls(Box::new(far.0)))
                } else {
                    (Transport::Plain(near), Transport::Plain(far))
                };
                far.write_all(b"second, ").await.unwrap();
                let mut near = Rewind::new(Bytes::from_static(b"first, "), near);
                // Some of it is read, some has come, some is still to come.
                assert_eq!(near.read_u8().await.unwrap(), b'f');
                (far, near.detach().unwrap())
            });
            let read = std::thread::spawn(move || {
                runtime().block_on(async {
                    let mut near = detached.attach().unwrap();
                    let mut all = String::new();
                    near.read_to_string(&mut all).await.unwrap();
                    all
                })
            });
            there.block_on(async {
                far.write_all(b"third").await.unwrap();
                far.shutdown().await.unwrap();
            });
            assert_eq!(read.join().unwrap(), "irst, second, third");
        }
    }

    #[tokio::test]
    async fn a_stream_that_ends_is_told_from_one_that_breaks_off() {
        assert!(read_request_head(&mut &b""[..]).await.unwrap().is_none());
        assert_eq!(read_request_head(&mut &b"GET /"[..]).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(read_request_head(&mut &b"\0\0\0"[..]).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}

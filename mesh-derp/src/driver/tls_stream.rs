//! TLS over a byte stream, without a copy in between and without a buffer while nothing happens.
//!
//! rustls shakes hands ([`TlsStream::accept`], [`TlsStream::connect`]) and then hands over the keys; from there on records
//! are protected here, by the same AEAD of aws-lc-rs, and rustls only derives further keys when one is updated. That
//! leaves out what its own record layer costs: reading 4 KiB at a time, an allocation for each record, and copies of
//! everything between its queues.
//!
//! - A read takes up to 64 KiB from the socket in one call, into a buffer that the whole thread shares, and opens as many
//!   records as fit straight into the reader's buffer. Only what does not fit, or is incomplete, is kept with the
//!   connection.
//! - A write seals up to 64 KiB straight into the thread's buffer and hands it to the socket in one call. What the socket
//!   does not take is kept; until that is gone, nothing further is accepted. Flush to be sure that it is sent.
//! - An end without the peer's farewell (`close_notify`) is [`io::ErrorKind::UnexpectedEof`]. After the peer's farewell
//!   one may still write.
//! - Keys that have protected as many records as is safe are updated (TLS 1.3), or the connection fails (TLS 1.2, after
//!   2²⁴ records with AES-GCM).

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ProtocolVersion, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

mod handshake;
#[cfg(test)]
#[cfg(feature = "server")]
mod measure;
mod record;
mod session;
#[cfg(test)]
#[cfg(feature = "server")]
mod tests;

pub use handshake::Peer;
use session::{BATCH_ROOM, Session};

/// The longest record.
const MAX_RECORD: usize = record::HEADER_LEN + record::MAX_PLAIN + 2048;
/// The thread's buffer: what is read at once, behind an incomplete record.
const SCRATCH_LEN: usize = 64 * 1024 + MAX_RECORD;
const _: () = assert!(BATCH_ROOM <= SCRATCH_LEN);

/// How many buffers a thread keeps. More than one are in use at a time only where TLS is inside TLS.
const SCRATCH_KEPT: usize = 2;

thread_local! {
    /// Every read and write uses one, none keeps it.
    static SCRATCH: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

fn with_scratch<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    let kept = SCRATCH.with_borrow_mut(Vec::pop);
    let mut scratch = kept.unwrap_or_else(|| vec![0; SCRATCH_LEN]);
    let result = work(&mut scratch);
    SCRATCH.with_borrow_mut(|all| {
        if all.len() < SCRATCH_KEPT {
            all.push(scratch);
        }
    });
    result
}

/// A server's configuration for many long connections: made fit for [`TlsStream::accept`], and without what would let a
/// client resume a session. Relay clients never do, and each ticket would cost time and memory.
#[cfg(feature = "server")]
pub(crate) fn lean_config(mut config: Arc<ServerConfig>) -> Arc<ServerConfig> {
    let lean = Arc::make_mut(&mut config);
    lean.enable_secret_extraction = true;
    lean.send_tls13_tickets = 0;
    lean.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config
}

/// TLS over `IO`. See the [module doc](self).
#[derive(Debug)]
pub struct TlsStream<IO> {
    io: IO,
    session: Session,
}

/// A [`TlsStream`] without the stream below it.
#[derive(Debug)]
pub struct TlsSession(Session);

impl<IO: AsyncRead + AsyncWrite + Unpin> TlsStream<IO> {
    /// The server's handshake, and what it told about the client. To be dropped when it takes too long.
    ///
    /// A `config` with `enable_secret_extraction` is used as it is; any other is copied for this connection and the
    /// copy has it set.
    ///
    /// # Errors
    /// If the stream fails or ends, or if TLS cannot be agreed on: then the error's source is a [`rustls::Error`].
    pub async fn accept(config: Arc<ServerConfig>, mut io: IO) -> io::Result<(Self, Peer)> {
        let (session, peer) = handshake::run(handshake::server(config)?, &mut io).await?;
        Ok((Self { io, session }, peer))
    }

    /// The client's handshake with the server `name`, and what it told about that. To be dropped when it takes too long.
    ///
    /// A `config` with `enable_secret_extraction` is used as it is; any other is copied for this connection and the
    /// copy has it set.
    ///
    /// # Errors
    /// If the stream fails or ends, or if TLS cannot be agreed on: then the error's source is a [`rustls::Error`].
    pub async fn connect(config: Arc<ClientConfig>, name: ServerName<'static>, mut io: IO) -> io::Result<(Self, Peer)> {
        let (session, peer) = handshake::run(handshake::client(config, name)?, &mut io).await?;
        Ok((Self { io, session }, peer))
    }
}

impl<IO> TlsStream<IO> {
    /// The stream below.
    #[must_use]
    pub const fn get_ref(&self) -> &IO {
        &self.io
    }

    /// The version of TLS.
    #[must_use]
    pub fn version(&self) -> ProtocolVersion {
        self.session.version()
    }

    /// Bytes of memory that are held in buffers. None while nothing waits to be read or sent.
    #[must_use]
    pub const fn buffered(&self) -> usize {
        self.session.buffered()
    }

    /// Takes it apart, to go on with the same stream below in another shape.
    #[must_use]
    pub fn into_parts(self) -> (IO, TlsSession) {
        (self.io, TlsSession(self.session))
    }

    /// Puts it together again. `io` has to be the stream that it was taken from.
    #[must_use]
    pub fn from_parts(io: IO, session: TlsSession) -> Self {
        Self { io, session: session.0 }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> TlsStream<IO> {
    /// Sends what is sealed.
    fn poll_push(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.session.unsent().is_empty() {
            let sent = ready!(Pin::new(&mut self.io).poll_write(cx, self.session.unsent()))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.session.note_sent(sent);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        with_scratch(|scratch| {
            let kept = self.session.partial().len();
            // No more than the reader takes, or there would be much to keep; but enough for a whole record.
            let most = (buf.remaining() + buf.remaining() / 16).clamp(MAX_RECORD, SCRATCH_LEN - kept);
            let mut came = ReadBuf::new(&mut scratch[kept..kept + most]);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut came))?;
            let came = came.filled().len();
            if came == 0 {
                let reason = "the peer closed the connection without the farewell of TLS";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason)));
            }
            scratch[..kept].copy_from_slice(self.session.partial());
            self.session.read(&mut scratch[..kept + came], buf);
            Poll::Ready(Ok(()))
        })
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let writer_waits = !this.session.unsent().is_empty();
        this.session.read_kept(buf);
        while buf.filled().len() == before && buf.remaining() > 0 && !this.session.ended() {
            if let Err(error) = this.session.failed() {
                if !writer_waits {
                    // One attempt to tell the peer why.
                    let _ = this.poll_push(cx);
                }
                return Poll::Ready(Err(error));
            }
            ready!(this.poll_fill(cx, buf))?;
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_push(cx))?;
        with_scratch(|scratch| {
            let (taken, length) = this.session.seal(parts, scratch)?;
            if length == 0 {
                return Poll::Ready(Ok(0));
            }
            let sent = match Pin::new(&mut this.io).poll_write(cx, &scratch[..length]) {
                Poll::Ready(sent) => sent?,
                Poll::Pending => 0,
            };
            if sent < length {
                this.session.keep_unsent(&scratch[sent..length]);
            }
            Poll::Ready(Ok(taken))
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_push(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.session.close();
        ready!(this.poll_push(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

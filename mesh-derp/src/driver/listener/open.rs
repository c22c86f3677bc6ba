//! One connection, from accepting to the end of its request head.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::{ProtocolVersion, ServerConfig};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::counters::Atomics;
use super::{Incoming, Place, Settings};
use crate::driver::stream::{Rewind, Transport, read_request_head};
use crate::driver::tls_stream::TlsStream;
use crate::proxied::{self, Progress, ProxyError};
use crate::server::Stage;
#[cfg(feature = "acme")]
use crate::tls::CurrentCertificate;
#[cfg(feature = "acme")]
use crate::tls::validation::is_validation;

/// What has just been accepted.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) stream: TcpStream,
    pub(super) peer: SocketAddr,
    pub(super) place: Place,
    /// Whether a proxy says first for whom it is.
    pub(super) announced: bool,
    /// Whose answers to authorities are given.
    #[cfg(feature = "acme")]
    pub(super) answering: Option<Arc<CurrentCertificate>>,
}

/// Why a connection did not get to its request.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("it took too long")]
    Late(#[from] tokio::time::error::Elapsed),
    #[error("its place was needed")]
    ShownOut,
    #[error("the client has gone")]
    Ended,
    #[error("{0}")]
    Tls(io::Error),
    #[error("a TLS client on a port without TLS")]
    NoTls,
    #[error("{0}")]
    Garbage(io::Error),
    /// It was none of a client: all that it came for has been said.
    #[cfg(feature = "acme")]
    #[error("an authority has validated a name")]
    Validated,
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Failed {
    fn count(&self, counters: &Atomics) {
        match self {
            Self::Late(_) => counters.dropped_late.add(1),
            // Counted by whoever needed the place.
            Self::ShownOut => {}
            #[cfg(feature = "acme")]
            Self::Validated => {}
            Self::Ended | Self::Io(_) => counters.ended_early.add(1),
            Self::Tls(_) | Self::NoTls => counters.tls_failures.add(1),
            Self::Garbage(_) => counters.garbage_heads.add(1),
            Self::Proxy(_) => counters.proxy_errors.add(1),
        }
    }
}

/// Reads a connection's request head; `None` if it does not get so far.
///
/// This future is what a silent connection costs, so everything that comes after the first byte is in a box.
pub(super) async fn open(
    mut opening: Opening,
    tls: Option<Arc<ServerConfig>>,
    settings: Arc<Settings>,
) -> Option<Box<Incoming>> {
    let (door, peer) = (opening.place.door(), opening.peer);
    crate::driver::tune(&opening.stream, crate::driver::SERVER_PATIENCE);
    let opened = async {
        if opening.announced {
            Box::pin(opening.hear_proxy(&settings)).await?;
        }
        let first = tokio::select! {
            first = timeout(settings.handshake, first_byte(&opening.stream)) => first??,
            () = opening.place.shown_out() => return Err(Failed::ShownOut),
        };
        Box::pin(opening.proceed(first, tls, &settings)).await
    };
    match opened.await {
        Ok(incoming) => Some(incoming),
        Err(failed) => {
            failed.count(door.counters());
            tracing::debug!(%peer, error = %failed, "connection dropped before its request");
            None
        }
    }
}

impl Opening {
    /// Reads what a trusted proxy says about its client, and not one byte of the client's own.
    async fn hear_proxy(&mut self, settings: &Settings) -> Result<(), Failed> {
        let header = timeout(settings.handshake, proxy_header(&mut self.stream));
        let announced = tokio::select! {
            announced = header => announced??,
            () = self.place.shown_out() => return Err(Failed::ShownOut),
        };
        if let Some(client) = announced {
            self.peer = client;
            if !self.place.rename(client.ip()) {
                self.place.counters().refused_source.add(1);
                return Err(Failed::ShownOut);
            }
        }
        Ok(())
    }

    async fn proceed(
        self,
        first: u8,
        tls: Option<Arc<ServerConfig>>,
        settings: &Settings,
    ) -> Result<Box<Incoming>, Failed> {
        let Self { stream, peer: peer_addr, mut place, .. } = self;
        let local_addr = stream.local_addr()?;
        // Held until the head is there: with fast start, head and login come with the end of the handshake.
        let permit = place.begin_handshake().await;
        let door = place.door();
        let counters = door.counters();
        let mut transport = tokio::select! {
            secured = timeout(settings.handshake, secure(stream, first, tls, counters)) => secured??,
            () = place.shown_out() => return Err(Failed::ShownOut),
        };
        let read = tokio::select! {
            read = timeout(settings.head, read_request_head(&mut transport)) => read?,
            () = place.shown_out() => return Err(Failed::ShownOut),
        };
        drop(permit);
        let (head, head_bytes, rest) = read
            .map_err(|error| {
                let garbage = error.kind() == io::ErrorKind::InvalidData;
                if garbage { Failed::Garbage(error) } else { Failed::Io(error) }
            })?
            .ok_or(Failed::Ended)?;
        place.advance(Stage::Login);
        #[cfg(feature = "acme")]
        if let Some(answer) =
            self.answering.as_deref().and_then(CurrentCertificate::validations).and_then(|all| all.http(&head))
        {
            timeout(settings.head, answer_authority(&mut transport, &answer)).await??;
            return Err(Failed::Validated);
        }
        let tls = matches!(transport, Transport::Tls(_));
        let stream = Rewind::new(rest, transport);
        Ok(Box::new(Incoming { head, stream, peer_addr, local_addr, tls, head_bytes, place }))
    }
}

#[cfg(feature = "acme")]
async fn answer_authority(transport: &mut Transport, answer: &[u8]) -> io::Result<()> {
    use tokio::io::AsyncWriteExt as _;
    transport.write_all(answer).await?;
    transport.shutdown().await
}

async fn proxy_header(stream: &mut TcpStream) -> Result<Option<SocketAddr>, Failed> {
    let mut header = Vec::new();
    loop {
        match proxied::read(&header)? {
            Progress::Done(client) => return Ok(client),
            Progress::Needs(more) => {
                let have = header.len();
                header.resize(have + more, 0);
                stream.read_exact(&mut header[have..]).await?;
            }
        }
    }
}

/// The first byte, which stays to be read.
async fn first_byte(stream: &TcpStream) -> Result<u8, Failed> {
    let mut first = [0; 1];
    if stream.peek(&mut first).await? == 0 {
        return Err(Failed::Ended);
    }
    Ok(first[0])
}

async fn secure(
    stream: TcpStream,
    first: u8,
    tls: Option<Arc<ServerConfig>>,
    counters: &Atomics,
) -> Result<Transport, Failed> {
    const TLS_HANDSHAKE: u8 = 0x16;
    match tls {
        _ if first != TLS_HANDSHAKE => Ok(Transport::Plain(stream)),
        Some(config) => {
            let (secured, client) = TlsStream::accept(config, stream).await.map_err(Failed::Tls)?;
            let version =
                if client.version == ProtocolVersion::TLSv1_3 { &counters.tls_1_3 } else { &counters.tls_1_2 };
            version.add(1);
            // An authority has seen what it wanted to see (RFC 8737 §3): nothing is said inside.
            #[cfg(feature = "acme")]
            if is_validation([client.alpn.as_deref()]) {
                let mut secured = secured;
                tokio::io::AsyncWriteExt::shutdown(&mut secured).await?;
                return Err(Failed::Validated);
            }
            Ok(Transport::Tls(Box::new(secured)))
        }
        None => Err(Failed::NoTls),
    }
}

#[cfg(test)]
mod tests {
    use super::super::door::Door;
    use super::*;
    use crate::server::Limits;

    #[tokio::test]
    async fn a_silent_connection_costs_less_than_a_kibibyte_of_task() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, peer) = listener.accept().await.unwrap();
        let place = Door::new(Limits::default()).enter(Some(peer.ip())).unwrap();
        let opening = Opening {
            stream,
            peer,
            place,
            announced: false,
            #[cfg(feature = "acme")]
            answering: None,
        };
        let size = size_of_val(&open(opening, None, Arc::default()));
        assert!(size <= 1024, "{size} bytes");
    }
}

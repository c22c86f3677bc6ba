//! A [channel](crate::channel) as an `AsyncRead + AsyncWrite`, to run HTTP/2 over.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use mesh_noise::key::{MachinePrivate, MachinePublic};
use rand_core::CryptoRng;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::channel::{ChannelError, ClientChannel, Records, ServerChannel};
use crate::version::CapabilityVersion;
use crate::wire::EarlyNoise;

/// Ciphertext that may wait before a writer has to.
const MAX_OUTPUT: usize = 64 << 10;
const READ_SIZE: usize = 16 << 10;

impl From<ChannelError> for io::Error {
    fn from(error: ChannelError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// An open channel over the connection `S`, after the HTTP upgrade.
///
/// What is written is sealed at once and leaves on `flush`, or when 64 KiB have gathered.
#[derive(Debug)]
pub struct NoiseStream<S> {
    inner: S,
    records: Records,
    scratch: Box<[u8]>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> NoiseStream<S> {
    /// Finishes a client's handshake: takes the server's response, which stands behind the 101 answer.
    ///
    /// `read_ahead` is what was read together with that answer; the rest comes from `inner`.
    ///
    /// # Errors
    /// Those of `inner`; `UnexpectedEof` if it ends before the response; `InvalidData` with a [`ChannelError`].
    pub async fn connect(mut inner: S, mut channel: ClientChannel, read_ahead: &[u8]) -> io::Result<Self> {
        let mut buffer = [0; 1024];
        if let Some(records) = channel.receive(read_ahead)? {
            return Ok(Self::new(inner, records));
        }
        loop {
            let count = inner.read(&mut buffer).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(records) = channel.receive(&buffer[..count])? {
                return Ok(Self::new(inner, records));
            }
        }
    }

    /// Answers a client's initiation: sends the response and, in the same write, the early payload if there is one.
    ///
    /// # Errors
    /// Those of `inner`; `InvalidData` with a [`ChannelError`] if the initiation is refused, in which case nothing was
    /// sent.
    pub async fn accept(
        mut inner: S,
        control: &MachinePrivate,
        initiation: &[u8],
        early: Option<&EarlyNoise>,
        rng: &mut (impl CryptoRng + ?Sized),
    ) -> io::Result<Accepted<S>> {
        let mut channel = ServerChannel::accept(control, initiation, rng)?;
        if let Some(early) = early {
            channel.write_early(early)?;
        }
        let mut flight = channel.response.to_vec();
        flight.extend_from_slice(channel.records.output());
        let sealed = channel.records.output().len();
        channel.records.consume_output(sealed);
        inner.write_all(&flight).await?;
        inner.flush().await?;
        Ok(Accepted { version: channel.version, machine: channel.machine, stream: Self::new(inner, channel.records) })
    }
}

/// A client whose handshake a server has answered.
#[derive(Debug)]
pub struct Accepted<S> {
    /// What the client speaks.
    pub version: CapabilityVersion,
    /// Who it is.
    pub machine: MachinePublic,
    /// The channel.
    pub stream: NoiseStream<S>,
}

impl<S> NoiseStream<S> {
    /// Joins an open channel with the connection that it runs over.
    #[must_use]
    pub fn new(inner: S, records: Records) -> Self {
        Self { inner, records, scratch: vec![0; READ_SIZE].into() }
    }

    /// The server's early payload, once it has been read.
    #[must_use]
    pub fn early(&self) -> Option<&EarlyNoise> {
        self.records.early()
    }

    /// The connection underneath.
    #[must_use]
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S: AsyncWrite + Unpin> NoiseStream<S> {
    /// Writes ciphertext until none waits.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.records.output().is_empty() {
            let count = ready!(Pin::new(&mut self.inner).poll_write(cx, self.records.output()))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.records.consume_output(count);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for NoiseStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        while this.records.readable() == 0 {
            let mut buffer = ReadBuf::new(&mut this.scratch);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut buffer))?;
            let bytes = buffer.filled();
            if bytes.is_empty() {
                return Poll::Ready(if this.records.mid_record() {
                    Err(io::ErrorKind::UnexpectedEof.into())
                } else {
                    Ok(())
                });
            }
            let received = this.records.receive(bytes);
            if this.records.readable() == 0 {
                received?;
            }
        }
        let count = this.records.read(out.initialize_unfilled());
        out.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for NoiseStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.records.output().len() >= MAX_OUTPUT {
            ready!(this.poll_drain(cx))?;
        }
        let count = bytes.len().min(MAX_OUTPUT);
        this.records.write(&bytes[..count])?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_noise::key::ChallengePublic;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[tokio::test]
    async fn bytes_pass_both_ways_through_a_narrow_pipe() {
        let mut rng = StdRng::seed_from_u64(1);
        let (control, machine) = (MachinePrivate::generate(&mut rng), MachinePrivate::generate(&mut rng));
        let (near, far) = tokio::io::duplex(100);
        let (channel, initiation) =
            ClientChannel::start(CapabilityVersion::CURRENT, &machine, &control.public(), &mut rng).unwrap();
        let early = EarlyNoise { node_key_challenge: ChallengePublic::from_bytes([3; 32]) };
        let sent: Vec<u8> = (0..200_000_u32).map(|at| at.to_le_bytes()[0]).collect();

        let server = async {
            let accepted = NoiseStream::accept(far, &control, &initiation, Some(&early), &mut rng).await.unwrap();
            assert_eq!((accepted.version, accepted.machine), (CapabilityVersion::CURRENT, machine.public()));
            let (mut read, mut write) = tokio::io::split(accepted.stream);
            tokio::io::copy(&mut read, &mut write).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let client = async {
            let stream = NoiseStream::connect(near, channel, b"").await.unwrap();
            let (mut read, mut write) = tokio::io::split(stream);
            let mut got = Vec::new();
            let (written, received) = tokio::join!(
                async {
                    write.write_all(&sent).await?;
                    write.shutdown().await
                },
                read.read_to_end(&mut got)
            );
            written.unwrap();
            received.unwrap();
            let stream = read.unsplit(write);
            assert_eq!(stream.early(), Some(&early));
            got
        };
        let ((), got) = tokio::join!(server, client);
        assert_eq!(got, sent);
    }

    #[tokio::test]
    async fn an_end_inside_a_record_is_an_error() {
        let mut rng = StdRng::seed_from_u64(2);
        let (control, machine) = (MachinePrivate::generate(&mut rng), MachinePrivate::generate(&mut rng));
        let (channel, initiation) =
            ClientChannel::start(CapabilityVersion::CURRENT, &machine, &control.public(), &mut rng).unwrap();
        let server = ServerChannel::accept(&control, &initiation, &mut rng).unwrap();
        let mut flight = server.response.to_vec();
        flight.extend([4, 0]);
        let stream = tokio::io::join(&flight[..], tokio::io::sink());
        let mut stream = NoiseStream::connect(stream, channel, b"").await.unwrap();
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

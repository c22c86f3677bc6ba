//! `peers iroh HOST:PORT CERTIFICATE COMMAND…`: the load of `relay_load.rs` for iroh-relay, by the client it comes with.
//!
//! CERTIFICATE is the PEM file that the server shows. Packets are sent one in a frame, as for DERP; with `SEGMENTS=n` up
//! to n of them in one, as an iroh endpoint does that has several for one peer.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
use iroh_base::{EndpointId, RelayUrl, SecretKey};
use iroh_dns::dns::DnsResolver;
use iroh_relay::client::ClientBuilder;
use iroh_relay::protos::relay::{ClientToRelayMsg, Datagrams, RelayToClientMsg};
use iroh_relay::tls::CaTlsConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

#[path = "../../src/relay_load.rs"]
mod relay_load;

#[derive(Clone)]
struct Iroh {
    url: RelayUrl,
    tls: rustls::ClientConfig,
    resolver: DnsResolver,
    segments: usize,
}

struct Connection {
    client: iroh_relay::client::Client,
    key: EndpointId,
    segments: usize,
    /// A ping that is still to be answered.
    pinged: Option<[u8; 8]>,
}

impl relay_load::Relay for Iroh {
    type Client = Connection;

    async fn connect(&self) -> anyhow::Result<Connection> {
        let secret = SecretKey::generate();
        let key = secret.public();
        let builder = ClientBuilder::new(self.url.clone(), secret, self.resolver.clone());
        let client = builder.tls_client_config(self.tls.clone()).connect().await?;
        Ok(Connection { client, key, segments: self.segments, pinged: None })
    }
}

impl relay_load::Client for Connection {
    type Key = EndpointId;

    fn key(&self) -> EndpointId {
        self.key
    }

    async fn send(&mut self, to: &EndpointId, packets: &[Bytes]) -> anyhow::Result<()> {
        for batch in packets.chunks(self.segments) {
            let datagrams = match batch {
                [packet] => Datagrams { ecn: None, segment_size: None, contents: packet.clone() },
                [first, ..] => {
                    let mut contents = BytesMut::with_capacity(batch.len() * first.len());
                    batch.iter().for_each(|packet| contents.extend_from_slice(packet));
                    let segment_size = NonZeroU16::new(u16::try_from(first.len())?);
                    Datagrams { ecn: None, segment_size, contents: contents.freeze() }
                }
                [] => continue,
            };
            self.client.feed(ClientToRelayMsg::Datagrams { dst_endpoint_id: *to, datagrams }).await?;
        }
        Ok(self.client.flush().await?)
    }

    async fn receive(&mut self, see: &mut (impl FnMut(&[u8]) + Send)) -> anyhow::Result<()> {
        if let Some(data) = self.pinged {
            self.client.send(ClientToRelayMsg::Pong(data)).await?;
            self.pinged = None;
        }
        let mut next = Some(self.client.next().await);
        while let Some(message) = next {
            match message.context("the relay has closed the connection")?? {
                RelayToClientMsg::Datagrams { datagrams, .. } => {
                    let whole = datagrams.contents.len().max(1);
                    let length = datagrams.segment_size.map_or(whole, |length| usize::from(length.get()));
                    datagrams.contents.chunks(length).for_each(&mut *see);
                }
                RelayToClientMsg::Ping(data) => self.pinged = Some(data),
                _ => {}
            }
            // An answer is due first, and what else has come is there already.
            next = if self.pinged.is_some() { None } else { self.client.next().now_or_never() };
        }
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let ["iroh", address, certificate, command @ ..] = &arguments[..] else {
        bail!("peers iroh HOST:PORT CERTIFICATE COMMAND…")
    };
    let address: SocketAddr = address.parse()?;
    let trusted = CertificateDer::from_pem_file(Path::new(certificate))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let relay = Iroh {
        url: format!("https://{address}/").parse()?,
        tls: CaTlsConfig::custom_roots([trusted]).client_config(provider)?,
        resolver: DnsResolver::new(),
        segments: std::env::var("SEGMENTS").map_or(Ok(1), |count| count.parse())?,
    };
    relay_load::run(relay, command)
}

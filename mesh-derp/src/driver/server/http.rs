//! The relay's HTTP surface: what is answered before, or instead of, a relay connection.
//!
//! | path | answer |
//! |---|---|
//! | `/derp` | becomes a relay connection (101, or silence with `Derp-Fast-Start: 1`); 426 without `Upgrade: DERP`; |
//! | | with `Upgrade: websocket` and the sub-protocol `derp`, inside WebSocket messages |
//! | `/derp/probe`, `/derp/latency-check` | 200, empty, for any origin; 405 unless GET or HEAD |
//! | `/generate_204` | 204; echoes `X-Tailscale-Challenge` of 1 to 64 characters `A-Za-z0-9._:-` |
//! | `/bootstrap-dns` | addresses of the operator's names, as JSON |
//! | `/healthz` | 200, or 503 when the relay is about to end |
//! | `/metrics` | numbers for Prometheus; 403 but for this host and the operator's networks |
//! | `/robots.txt` | nothing is to be indexed |
//! | `/` | a page saying what this is |
//! | anything else | 404 |
//!
//! Where plain HTTP is redirected, it is but for `/generate_204`, `/healthz` and `/metrics`.
//!
//! A connection that was answered may ask again; clients measure latency that way.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;

use super::RelayServer;
use super::session::Running;
use crate::driver::listener::Incoming;
use crate::driver::stream::{Duplex, Rewind, Transport, read_request_head};
use crate::driver::websocket::WebSocket;
use crate::upgrade::{self, Asked, RequestHead};
use crate::websocket::{self, Role};

mod answer;
mod bootstrap;
mod status;

pub use bootstrap::BootstrapDns;
pub use status::Public;

use answer::Circumstances;

impl RelayServer {
    /// Answers what a listener has read, and the requests that follow on the same connection, until it ends. Never
    /// fails: why a connection ended is a trace line and a counter.
    ///
    /// Dropping the future ends the connection.
    pub async fn serve(self: Arc<Self>, incoming: Incoming) {
        // Once the connection runs elsewhere, what stands here is small.
        let running = Box::pin(self.answer_until_upgrade(incoming)).await;
        if let Some(running) = running {
            running.wait().await;
        }
    }

    /// Runs a relay connection on a stream that some other HTTP server has answered with 101 to `GET /derp`, as
    /// [`upgrade::asked`] and [`upgrade::accepted`] say. `peer_addr` is the client's address.
    ///
    /// Such a server cannot stay silent, so a request with `Derp-Fast-Start: 1` has to be turned away: clients ask for
    /// that only where TLS showed them the relay's key ([`ServerTls`](crate::tls::ServerTls)), and are one round trip
    /// slower where it did not.
    ///
    /// Dropping the future ends the connection.
    pub async fn serve_upgraded(self: Arc<Self>, stream: impl Duplex + 'static, peer_addr: SocketAddr) {
        let stream = Rewind::new(Bytes::new(), Transport::Other(Box::new(stream)));
        let asked = Asked::Relay { fast_start: true, not_ideal: false };
        let running = Box::pin(self.log_in(stream, asked, peer_addr, None)).await;
        if let Some(running) = running {
            running.wait().await;
        }
    }

    async fn answer_until_upgrade(self: Arc<Self>, incoming: Incoming) -> Option<Running> {
        let Incoming { mut stream, mut head, peer_addr, local_addr, tls, mut place, .. } = incoming;
        loop {
            let redirected = !tls && self.config.public.redirect_plain_to.is_some();
            if head.path() == "/derp" && !redirected {
                let asked = upgrade::asked(&head);
                match asked {
                    Asked::Relay { .. } => return self.log_in(stream, asked, peer_addr, Some(place)).await,
                    Asked::WebSocket => {
                        let stream = self.carry_in_messages(stream, &head).await?;
                        return self.log_in(stream, asked, peer_addr, Some(place)).await;
                    }
                    Asked::NoUpgrade => {}
                }
            }
            let keep = head.keeps_alive()
                && head.header("transfer-encoding").is_none()
                && head.header("content-length").is_none_or(|length| length == "0");
            let keep = keep && head.path() != "/bootstrap-dns";
            let answer = answer::to(&self, &head, &Circumstances { peer: peer_addr, tls, local: local_addr, keep });
            let written = async {
                stream.write_all(&answer).await?;
                stream.flush().await
            };
            if !matches!(timeout(self.config.write_stall, written).await, Ok(Ok(()))) || !keep {
                let _ = timeout(self.config.write_stall, stream.shutdown()).await;
                return None;
            }
            let next = tokio::select! {
                next = timeout(self.config.idle_http, read_request_head(&mut stream)) => next,
                () = place.shown_out() => return None,
            };
            let Ok(Ok(Some((next, _, rest)))) = next else { return None };
            stream.unread(rest);
            head = next;
        }
    }
}

impl RelayServer {
    /// Opens the WebSocket connection that `head` asks for, or says in vain what is wrong with the request.
    async fn carry_in_messages(&self, mut stream: Rewind<Transport>, head: &RequestHead) -> Option<Rewind<Transport>> {
        let (answer, opened) = match websocket::accepted(head) {
            Ok(answer) => (answer, true),
            Err(error) => {
                let headers = [("Sec-WebSocket-Version", "13"), ("Connection", "close")];
                (upgrade::response(400, "Bad Request", &headers, &format!("{error}\n"), false), false)
            }
        };
        let written = async {
            stream.write_all(&answer).await?;
            stream.flush().await
        };
        let written = timeout(self.config.write_stall, written).await;
        let carried = || Transport::Other(Box::new(WebSocket::new(stream, Role::Server)));
        (opened && matches!(written, Ok(Ok(())))).then(|| Rewind::new(Bytes::new(), carried()))
    }
}

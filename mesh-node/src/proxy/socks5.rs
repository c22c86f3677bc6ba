//! The SOCKS5 proxy (RFC 1928): CONNECT by IPv4, IPv6 or name, without authentication.

use std::net::SocketAddr;

use fast_socks5::server::{Socks5ServerProtocol, SocksServerError};
use fast_socks5::util::target_addr::TargetAddr;
use fast_socks5::{ReplyError, Socks5Command};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::{DialError, Dialer, REQUEST_TIME, accept_loop};
use crate::forward::bridge;

/// Serves clients of `listener`, which should be bound to a loopback address, until the future is dropped.
pub async fn serve(listener: TcpListener, dialer: Dialer) {
    accept_loop(listener, move |stream| {
        let dialer = dialer.clone();
        async move {
            if let Err(error) = serve_client(stream, &dialer).await {
                tracing::debug!(%error, "a SOCKS5 client broke the protocol or left");
            }
        }
    })
    .await;
}

async fn serve_client(stream: TcpStream, dialer: &Dialer) -> Result<(), SocksServerError> {
    let request = async {
        let protocol = Socks5ServerProtocol::accept_no_auth(stream).await?;
        protocol.read_command().await
    };
    let Ok(request) = timeout(REQUEST_TIME, request).await else { return Ok(()) };
    let (protocol, command, target) = request?;
    if command != Socks5Command::TCPConnect {
        return protocol.reply_error(&ReplyError::CommandNotSupported).await;
    }
    let dialed = match target {
        TargetAddr::Ip(target) => dialer.dial(&target.ip().to_string(), target.port()).await,
        TargetAddr::Domain(name, port) => dialer.dial(&name, port).await,
    };
    match dialed {
        Ok(remote) => {
            let bound: SocketAddr = remote.local_addr();
            let local = protocol.reply_success(bound).await?;
            bridge(remote, local).await;
            Ok(())
        }
        Err(error) => {
            tracing::debug!(%error, "a SOCKS5 client's target could not be reached");
            protocol.reply_error(&reply(&error)).await
        }
    }
}

fn reply(error: &DialError) -> ReplyError {
    match error {
        DialError::UnknownName(_) => ReplyError::HostUnreachable,
        DialError::NotInMesh(_) => ReplyError::NetworkUnreachable,
        DialError::Refused(_) => ReplyError::ConnectionRefused,
        DialError::TimedOut(_) => ReplyError::TtlExpired,
        DialError::Failed(..) => ReplyError::GeneralFailure,
    }
}

//! The commands that talk to a running daemon.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mesh_derp::proxy::Proxies;
use mesh_derp::tls::ClientTls;
use mesh_node::local_api::{Client, ClientError, PingRequest, Pong, SetRequest, UpRequest, UpResponse, Via};
use mesh_node::netcheck::NetcheckReport;
use serde_json::json;

use crate::{cli, output};

/// How long `up` waits when it is not told.
const UP_TIMEOUT: Duration = Duration::from_secs(30);
/// How long `up` waits for a person who has been shown a URL, when it is not told.
const APPROVAL_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// How the daemon says that nothing came back in time.
const NO_ANSWER: u16 = 504;
/// How the daemon says that it knows no such peer.
const UNKNOWN_PEER: u16 = 404;
/// How long a peer that joins may take to be known here.
const JOINING: Duration = Duration::from_secs(2);

/// Whether to keep the node key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SignIn {
    /// `up`: with the key that the node has.
    AsBefore,
    /// `login`: with a new one.
    Anew,
}

/// `mesh up`, `mesh login`.
pub(crate) async fn up(socket: PathBuf, options: cli::Up, sign_in: SignIn) -> anyhow::Result<()> {
    let client = Client::new(socket);
    let timeout = options.timeout.unwrap_or(UP_TIMEOUT);
    let request = UpRequest {
        control_url: options.login_server,
        auth_key: options.auth_key,
        hostname: options.hostname,
        timeout_ms: Some(milliseconds(timeout)),
    };
    let started = now();
    let mut reached = match sign_in {
        SignIn::AsBefore => client.up(&request).await?,
        SignIn::Anew => client.login(&request).await?,
    };
    if let Some(url) = reached.auth_url.clone() {
        if options.json {
            output::print(&json!({ "auth_url": url }).to_string())?;
        } else {
            output::sign_in(&url)?;
        }
        let patience = options.timeout.map_or(APPROVAL_TIMEOUT, |timeout| timeout.saturating_sub(started.elapsed()));
        reached = client.wait(patience).await?;
    }
    report_up(&reached, options.json)
}

fn report_up(reached: &UpResponse, as_json: bool) -> anyhow::Result<()> {
    if !reached.state.is_running() {
        bail!("the node is not up: {}", output::state(&reached.state));
    }
    if as_json {
        output::print(&serde_json::to_string(reached)?)?;
    } else {
        let addresses: Vec<String> = reached.addresses.iter().map(ToString::to_string).collect();
        output::print(&format!("up: {}", addresses.join(", ")))?;
    }
    Ok(())
}

/// `mesh down`.
pub(crate) async fn down(socket: PathBuf) -> anyhow::Result<()> {
    Ok(Client::new(socket).down().await?)
}

/// `mesh logout`.
pub(crate) async fn logout(socket: PathBuf) -> anyhow::Result<()> {
    Ok(Client::new(socket).logout().await?)
}

/// `mesh status`.
pub(crate) async fn status(socket: PathBuf, options: &cli::Status) -> anyhow::Result<()> {
    let status = Client::new(socket).status().await?;
    if let Some(wanted) = &options.why {
        let known = status.peers.iter().find(|peer| is_called(&peer.name, &peer.addresses, wanted));
        let peer = known.with_context(|| format!("no peer is called or addressed {wanted:?}; see `mesh status`"))?;
        let text = if options.json { serde_json::to_string_pretty(peer)? } else { output::why(peer) };
        output::print(&text)?;
    } else if options.json {
        output::print(&serde_json::to_string_pretty(&status)?)?;
    } else {
        output::print(&output::status(&status))?;
    }
    Ok(())
}

/// `mesh ip`.
pub(crate) async fn ip(socket: PathBuf, peer: Option<String>) -> anyhow::Result<()> {
    let client = Client::new(socket);
    let addresses = match peer {
        None => client.ip().await?.addresses,
        Some(peer) => {
            let status = client.status().await?;
            let this = (status.this.name, status.this.addresses);
            let all = status.peers.into_iter().map(|peer| (peer.name, peer.addresses)).chain([this]);
            let found = all.into_iter().find(|(name, addresses)| is_called(name, addresses, &peer));
            found.with_context(|| format!("no peer is called or addressed {peer:?}; see `mesh status`"))?.1
        }
    };
    for address in addresses {
        output::print(&address.to_string())?;
    }
    Ok(())
}

/// Whether a node is meant by `wanted`: its name, full or short, or one of its addresses.
fn is_called(name: &str, addresses: &[std::net::IpAddr], wanted: &str) -> bool {
    name.eq_ignore_ascii_case(wanted)
        || name.split('.').next().is_some_and(|short| short.eq_ignore_ascii_case(wanted))
        || cli::as_address(wanted).is_some_and(|address| addresses.contains(&address))
}

/// `mesh ping`. Ends well if a peer answered; with `--until-direct` only if it answered on the direct path.
pub(crate) async fn ping(socket: PathBuf, options: cli::Ping) -> anyhow::Result<()> {
    let client = Client::new(socket);
    let started = now();
    let deadline = started + options.timeout;
    let mut answers = 0;
    let mut last_refusal = None;
    loop {
        let left = deadline.saturating_duration_since(now());
        if left.is_zero() {
            break;
        }
        let probe = PingRequest {
            peer: options.peer.clone(),
            size: options.size,
            timeout_ms: Some(milliseconds(left.min(Duration::from_secs(5)))),
        };
        match client.ping(&probe).await {
            Ok(pong) => {
                print_pong(&pong, options.json)?;
                answers += 1;
                let direct = matches!(pong.via, Via::Direct { .. });
                if (options.until_direct && direct) || (!options.until_direct && answers >= options.count) {
                    return Ok(());
                }
            }
            Err(error) if hopeless(&error, started.elapsed()) => return Err(error.into()),
            Err(error) => last_refusal = Some(error),
        }
        let pause = if options.until_direct { Duration::from_millis(100) } else { Duration::from_secs(1) };
        tokio::time::sleep(pause.min(deadline.saturating_duration_since(now()))).await;
    }
    match (answers, last_refusal) {
        (0, Some(error)) if !matches!(error, ClientError::Refused { status: NO_ANSWER, .. }) => Err(error.into()),
        (0, _) => bail!("{} did not answer within {:?}", options.peer, options.timeout),
        _ if options.until_direct => bail!("no direct path to {} within {:?}", options.peer, options.timeout),
        _ => Ok(()),
    }
}

/// Whether asking the daemon again will not help. A peer that has just joined may be unknown for a moment.
fn hopeless(error: &ClientError, waited: Duration) -> bool {
    let ClientError::Refused { status, .. } = error else { return true };
    match *status {
        NO_ANSWER => false,
        UNKNOWN_PEER => waited > JOINING,
        _ => true,
    }
}

fn print_pong(pong: &Pong, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        output::print(&serde_json::to_string(pong)?)?;
    } else {
        output::print(&format!("{} answered in {:.1} ms {}", pong.peer, pong.ms, output::via(&pong.via)))?;
    }
    Ok(())
}

/// `mesh set`.
pub(crate) async fn set(socket: PathBuf, options: &cli::Set) -> anyhow::Result<()> {
    let path = match options.path {
        cli::PathMode::Auto => mesh_node::prefs::PathMode::Auto,
        cli::PathMode::Relay => mesh_node::prefs::PathMode::Relay,
        cli::PathMode::Direct => mesh_node::prefs::PathMode::Direct,
    };
    Ok(Client::new(socket).set(&SetRequest { path: Some(path), ..SetRequest::default() }).await?)
}

/// `mesh netcheck`, through the daemon, or on its own with a DERP map.
pub(crate) async fn netcheck(socket: PathBuf, options: &cli::Netcheck) -> anyhow::Result<()> {
    let report = match &options.derp_map {
        None => match Client::new(socket).netcheck().await {
            Err(error @ ClientError::NoDaemon { .. }) => bail!("{error}, or give --derp-map FILE to do without"),
            answer => answer?,
        },
        Some(file) => {
            let map = crate::serve::read_derp_map(file)?;
            let report =
                mesh_nat::driver::netcheck_once(map, &ClientTls::system()?, &Proxies::from_environment()?).await;
            NetcheckReport::from(&report)
        }
    };
    if options.json {
        output::print(&serde_json::to_string_pretty(&report)?)?;
    } else {
        output::print(&output::netcheck(&report))?;
    }
    Ok(())
}

/// `mesh version`.
pub(crate) async fn version(socket: PathBuf) -> anyhow::Result<()> {
    output::print(&format!("mesh {}", env!("CARGO_PKG_VERSION")))?;
    if let Ok(daemon) = Client::new(socket).version().await {
        output::print(&format!("daemon {} (capability version {})", daemon.version, daemon.capability_version))?;
    }
    Ok(())
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[expect(clippy::disallowed_methods, reason = "this is the program's clock")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

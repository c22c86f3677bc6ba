//! Reaching a relay of a region: [`Dialling`] says what to try when, and here it is done.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::sleep_until;
use crate::client::dialling::{Action, Attempt, Dialling, History};
use crate::driver::now;
use crate::driver::stream::Transport;
use crate::map::DerpRegion;
use crate::proxy::Proxies;
use crate::tls::{ClientTls, TlsError};
use crate::upgrade::HttpError;
use crate::websocket::WebSocketError;

mod stages;

pub(crate) use stages::Link;
use stages::{connect, look_up, measure, open};

/// For a measurement, connecting included.
const MEASURE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why no relay of a region could be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The region has no node that relays.
    #[error("region has no relay")]
    NoRelay,
    /// A name could not be looked up, or gives no address of a usable family.
    #[error("{host}: no address: {reason}")]
    Lookup {
        /// The name.
        host: String,
        /// Why.
        reason: String,
    },
    /// No TCP connection.
    #[error("{address}: {source}")]
    Tcp {
        /// Where to.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The relay's certificate is not what the DERP map demands, or TLS failed otherwise.
    #[error("{host}: tls: {source}")]
    Tls {
        /// The relay.
        host: String,
        /// Why.
        source: std::io::Error,
    },
    /// TLS could not be set up.
    #[error(transparent)]
    Setup(#[from] TlsError),
    /// The connection broke while asking.
    #[error("{host}: {source}")]
    Io {
        /// The relay.
        host: String,
        /// Why.
        source: std::io::Error,
    },
    /// The answer is not HTTP.
    #[error("{host}: {source}")]
    Http {
        /// The relay.
        host: String,
        /// Why.
        source: HttpError,
    },
    /// The answer is a refusal.
    #[error("{host}: answered {status} and not {expected}")]
    Refused {
        /// The relay.
        host: String,
        /// The status code.
        status: u16,
        /// The one that was needed.
        expected: u16,
    },
    /// The answer to a request for a WebSocket is something else.
    #[error("{host}: {source}")]
    WebSocket {
        /// The relay.
        host: String,
        /// What is wrong.
        source: WebSocketError,
    },
    /// The proxy wants to know who we are.
    #[error(
        "proxy {proxy} wants a user name and password (407): put them into its URL, http://user:password@host:port"
    )]
    ProxyWantsLogin {
        /// The proxy.
        proxy: String,
    },
    /// The proxy knows who we are, and does not like it.
    #[error("proxy {proxy} refuses the user name and password that its URL holds (407)")]
    ProxyRefusesLogin {
        /// The proxy.
        proxy: String,
    },
    /// The proxy makes no tunnel to the relay.
    #[error("proxy {proxy}: answered {status} and not 200 when asked for {host}")]
    ProxyRefused {
        /// The proxy.
        proxy: String,
        /// The status code.
        status: u16,
        /// The relay.
        host: String,
    },
    /// It took too long.
    #[error("{host}: no relay connection in time")]
    Timeout {
        /// The relay.
        host: String,
    },
    /// Several relays were tried, and each failed in its own way.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Each(Vec<DialError>),
}

/// How frames travel once a relay has been reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Carriage {
    /// As they are; inside WebSocket messages where something answers the request for that with a refusal, as some
    /// proxies and hosting platforms do that let only WebSocket through.
    #[default]
    Automatic,
    /// Always inside WebSocket messages.
    WebSocket,
}

/// Where to connect to, and how.
#[derive(Debug, Clone)]
pub(super) struct Reach {
    pub(super) region: DerpRegion,
    pub(super) tls: ClientTls,
    pub(super) proxies: Proxies,
    pub(super) carriage: Carriage,
}

/// For everything, from looking up a name to the relay's answer.
#[cfg(feature = "server")]
const TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to the relay of the region that is first to be reached, the map's first by preference, without a proxy.
#[cfg(feature = "server")]
pub(crate) async fn dial(region: DerpRegion, tls: ClientTls) -> Result<Link, DialError> {
    let history = History::default();
    let order = history.order(now(), &region);
    let reach = Reach { region, tls, proxies: Proxies::none(), carriage: Carriage::default() };
    dial_in_order(Arc::new(reach), order, history, TIMEOUT).await
}

/// Connects to the relay of the region that is first to be reached, trying these in this order.
pub(super) async fn dial_in_order(
    reach: Arc<Reach>,
    order: Vec<usize>,
    history: History,
    budget: Duration,
) -> Result<Link, DialError> {
    let by_proxy = |node: &_| reach.proxies.for_node(node).is_some();
    let dialling = Dialling::with_order(now(), &reach.region, &order, &history, by_proxy, budget);
    let history = Arc::new(history);
    round(&reach, dialling, |attempt, transport| open(Arc::clone(&reach), Arc::clone(&history), attempt, transport))
        .await
}

/// Measures how long a relay of the region takes to answer a small request over an established connection.
///
/// Connecting is not counted. At most 5 s, connecting included.
///
/// # Errors
/// If no relay of the region answers.
pub async fn latency_check(region: &DerpRegion, tls: &ClientTls, proxies: &Proxies) -> Result<Duration, DialError> {
    let (region, tls, proxies) = (region.clone(), tls.clone(), proxies.clone());
    let reach = Arc::new(Reach { region, tls, proxies, carriage: Carriage::default() });
    let by_proxy = |node: &_| reach.proxies.for_node(node).is_some();
    let dialling = Dialling::new(now(), &reach.region, &History::default(), by_proxy, MEASURE_TIMEOUT);
    round(&reach, dialling, |attempt, transport| measure(Arc::clone(&reach), attempt, transport)).await
}

/// What a task of a round has come to.
enum Done<T> {
    LookedUp(usize, Result<Vec<IpAddr>, DialError>),
    Connected(Attempt, Result<Transport, DialError>),
    Finished(Attempt, Result<T, DialError>),
}

/// Does what `dialling` says until an attempt has come through `finish`, which gets a connection or a tunnel. Whatever else
/// is under way then ends.
async fn round<T, F, Finishing>(reach: &Arc<Reach>, mut dialling: Dialling, finish: F) -> Result<T, DialError>
where
    T: Send + 'static,
    F: Fn(Attempt, Transport) -> Finishing,
    Finishing: Future<Output = Result<T, DialError>> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    // What became of each node that was tried: nothing yet, or its latest failure.
    let mut tried: BTreeMap<usize, Option<DialError>> = BTreeMap::new();
    loop {
        while let Some(action) = dialling.poll_action() {
            let reach = Arc::clone(reach);
            match action {
                Action::LookUp { node } => {
                    tried.entry(node).or_default();
                    tasks.spawn(async move { Done::LookedUp(node, look_up(&reach.region.nodes[node]).await) });
                }
                Action::Connect(attempt) => {
                    tried.entry(attempt.node).or_default();
                    tasks.spawn(async move { Done::Connected(attempt, connect(&reach, attempt).await) });
                }
                Action::GiveUp => return Err(what_went_wrong(tried, &reach.region)),
            }
        }
        let done = tokio::select! {
            Some(done) = tasks.join_next() => done,
            () = sleep_until(dialling.poll_timeout().map(Into::into)) => {
                dialling.handle_timeout(now());
                continue;
            }
        };
        let done = done.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        let (attempt, error) = match done {
            Done::LookedUp(node, found) => {
                let found = found.unwrap_or_else(|error| {
                    tried.insert(node, Some(error));
                    Vec::new()
                });
                dialling.handle_addresses(now(), node, &found);
                continue;
            }
            Done::Connected(attempt, Ok(transport)) => {
                if dialling.handle_connected(now(), attempt) {
                    let finishing = finish(attempt, transport);
                    tasks.spawn(async move { Done::Finished(attempt, finishing.await) });
                }
                continue;
            }
            Done::Finished(_, Ok(result)) => return Ok(result),
            Done::Connected(attempt, Err(error)) | Done::Finished(attempt, Err(error)) => (attempt, error),
        };
        tracing::debug!(node = %reach.region.nodes[attempt.node].name, %error, "relay not reached");
        tried.insert(attempt.node, Some(error));
        dialling.handle_failure(now(), attempt);
    }
}

fn what_went_wrong(tried: BTreeMap<usize, Option<DialError>>, region: &DerpRegion) -> DialError {
    let host = |node: usize| region.nodes[node].host_name.clone();
    let named =
        |(node, error): (usize, Option<DialError>)| error.unwrap_or_else(|| DialError::Timeout { host: host(node) });
    let mut errors: Vec<DialError> = tried.into_iter().map(named).collect();
    match errors.len() {
        0 => DialError::NoRelay,
        1 => errors.remove(0),
        _ => DialError::Each(errors),
    }
}

//! Answering over a [`Netstack`], and asking others.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{Decision, MagicDns, Transport};
use crate::netstack::{self, Bind, Netstack};

/// The port of DNS.
pub const SERVICE_PORT: u16 = 53;
/// Queries at others, and TCP clients, at a time; further queries are dropped, and clients ask again.
const MAX_FORWARDS: usize = 256;
const MAX_CLIENTS: usize = 64;
/// How long one resolver may take.
const RESOLVER_TIME: Duration = Duration::from_secs(3);
/// How long a TCP client may stay without a query.
const CLIENT_IDLE: Duration = Duration::from_secs(20);

/// The newest table, shared: whoever learns of a change stores, whoever answers loads.
#[derive(Clone, Debug, Default)]
pub struct Names {
    table: Arc<ArcSwap<MagicDns>>,
}

impl Names {
    /// Shares `table`.
    pub fn new(table: MagicDns) -> Self {
        Self { table: Arc::new(ArcSwap::from_pointee(table)) }
    }

    /// Replaces the table.
    pub fn store(&self, table: MagicDns) {
        self.table.store(Arc::new(table));
    }

    /// The table of this moment.
    pub fn load(&self) -> Arc<MagicDns> {
        self.table.load_full()
    }
}

/// Answers DNS over UDP and TCP on `address` of `netstack`: takes the port at once, and returns the future that serves it
/// until the stack ends. Dropping the future stops answering.
///
/// # Errors
/// `AddrInUse` when the port is taken; the future ends with `NotConnected` once the stack has ended.
pub fn serve(
    netstack: &Netstack,
    address: IpAddr,
    names: &Names,
) -> io::Result<impl Future<Output = io::Result<()>> + Send + 'static> {
    let bind = Bind { address: Some(address), port: SERVICE_PORT };
    let (socket, listener) = (Arc::new(netstack.bind_udp(bind)?), netstack.listen_tcp(bind)?);
    let names = names.clone();
    Ok(async move {
        tokio::select! {
            ended = serve_datagrams(&socket, &names) => ended,
            ended = serve_streams(&listener, &names) => ended,
        }
    })
}

async fn serve_datagrams(socket: &Arc<netstack::UdpSocket>, names: &Names) -> io::Result<()> {
    let permits = Arc::new(Semaphore::new(MAX_FORWARDS));
    loop {
        let (flow, query) = socket.recv().await?;
        match names.load().answer(&query, Transport::Udp) {
            // A full outbox is loss, which DNS clients live with.
            Decision::Answer(answer) => drop(socket.send_to(&answer, flow.remote)),
            Decision::Forward(resolvers) => {
                let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { continue };
                let socket = Arc::clone(socket);
                tokio::spawn(async move {
                    if let Some(answer) = ask(&resolvers, &query, Transport::Udp).await {
                        drop(socket.send_to(&answer, flow.remote));
                    }
                    drop(permit);
                });
            }
            Decision::Ignore => {}
        }
    }
}

async fn serve_streams(listener: &netstack::TcpListener, names: &Names) -> io::Result<()> {
    let permits = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let (stream, _) = listener.accept().await?;
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { continue };
        let names = names.clone();
        tokio::spawn(async move {
            if let Err(error) = serve_stream(stream, &names).await {
                tracing::debug!(%error, "a DNS client's stream broke");
            }
            drop(permit);
        });
    }
}

/// Messages over a stream have their length before them, two bytes (RFC 1035 §4.2.2).
async fn serve_stream<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, names: &Names) -> io::Result<()> {
    loop {
        let Ok(query) = timeout(CLIENT_IDLE, read_message(&mut stream)).await else { return Ok(()) };
        let Some(query) = query? else { return Ok(()) };
        let answer = match names.load().answer(&query, Transport::Tcp) {
            Decision::Answer(answer) => answer,
            Decision::Forward(resolvers) => match ask(&resolvers, &query, Transport::Tcp).await {
                Some(answer) => answer,
                None => return Ok(()),
            },
            Decision::Ignore => return Ok(()),
        };
        write_message(&mut stream, &answer).await?;
    }
}

/// One message; `None` at the end of the stream.
async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut len = [0; 2];
    match stream.read_exact(&mut len).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let mut message = vec![0; usize::from(u16::from_be_bytes(len))];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

async fn write_message(stream: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let framed = [&len.to_be_bytes(), message].concat();
    stream.write_all(&framed).await
}

/// Passes `query` on unchanged, to one resolver after the other, over what it came.
async fn ask(resolvers: &[SocketAddr], query: &[u8], transport: Transport) -> Option<Vec<u8>> {
    for resolver in resolvers {
        let asked = async {
            match transport {
                Transport::Udp => ask_udp(*resolver, query).await,
                Transport::Tcp => ask_tcp(*resolver, query).await,
            }
        };
        match timeout(RESOLVER_TIME, asked).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => tracing::debug!(%resolver, %error, "a resolver failed"),
            Err(_) => tracing::debug!(%resolver, "a resolver does not answer"),
        }
    }
    None
}

async fn ask_udp(resolver: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = if resolver.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    loop {
        let len = socket.recv(&mut answer).await?;
        // A stray answer to somebody else's query is not ours to deliver.
        if len >= 2 && answer.get(..2) == query.get(..2) {
            answer.truncate(len);
            return Ok(answer);
        }
    }
}

async fn ask_tcp(resolver: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(resolver).await?;
    write_message(&mut stream, query).await?;
    read_message(&mut stream).await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netstack::{SERVICE_V4, SERVICE_V6};
    use hickory_proto::op::{Message, MessageType, OpCode, Query};
    use hickory_proto::rr::{Name, RecordType};

    fn query(name: &str) -> Vec<u8> {
        let mut message = Message::new(99, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message.to_vec().unwrap()
    }

    fn answers(bytes: &[u8]) -> Vec<String> {
        Message::from_vec(bytes).unwrap().answers.iter().map(|record| record.data.to_string()).collect()
    }

    /// A stack that answers on both service addresses, seen from the same stack.
    fn node(table: MagicDns) -> (Netstack, Names) {
        let own = ["100.64.0.1".parse().unwrap(), "fd7a:115c:a1e0::1".parse().unwrap()];
        let addresses = own.into_iter().chain([SERVICE_V4.into(), SERVICE_V6.into()]);
        let (stack, _device) = Netstack::start(netstack::Config::with_addresses(addresses)).unwrap();
        let names = Names::new(table);
        for address in [SERVICE_V4.into(), SERVICE_V6.into()] {
            let (stack, names) = (stack.clone(), names.clone());
            tokio::spawn(serve(&stack, address, &names).unwrap());
        }
        (stack, names)
    }

    async fn ask_over(stack: &Netstack, server: IpAddr, query: &[u8]) -> Vec<u8> {
        let socket = stack.bind_udp(0).unwrap();
        for _ in 0..50 {
            socket.send_to(query, SocketAddr::new(server, SERVICE_PORT)).unwrap();
            if let Ok(received) = timeout(Duration::from_millis(100), socket.recv()).await {
                return received.unwrap().1;
            }
        }
        panic!("no answer");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn both_service_addresses_answer_over_udp_and_tcp() {
        let mut table = MagicDns::new("mesh.example");
        table.insert("web", &["100.64.0.7".parse().unwrap()]);
        let (stack, names) = node(table);
        for server in [SERVICE_V4.into(), SERVICE_V6.into()] {
            assert_eq!(answers(&ask_over(&stack, server, &query("web.mesh.example.")).await), ["100.64.0.7"]);
            let mut stream = stack.dial_tcp(SocketAddr::new(server, SERVICE_PORT)).await.unwrap();
            for name in ["web.", "web.mesh.example."] {
                write_message(&mut stream, &query(name)).await.unwrap();
                let answer = read_message(&mut stream).await.unwrap().unwrap();
                assert_eq!(answers(&answer), ["100.64.0.7"]);
            }
        }
        let mut renamed = MagicDns::new("mesh.example");
        renamed.insert("www", &["100.64.0.7".parse().unwrap()]);
        names.store(renamed);
        assert_eq!(answers(&ask_over(&stack, SERVICE_V4.into(), &query("www.")).await), ["100.64.0.7"]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn other_names_are_asked_of_the_next_resolver_that_answers() {
        let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let resolver = upstream.local_addr().unwrap();
        tokio::spawn(async move {
            let mut other = MagicDns::new("example.org");
            other.insert("www", &["192.0.2.80".parse().unwrap()]);
            let mut buffer = [0; 600];
            loop {
                let (len, from) = upstream.recv_from(&mut buffer).await.unwrap();
                let Decision::Answer(answer) = other.answer(&buffer[..len], Transport::Udp) else { panic!() };
                upstream.send_to(&answer, from).await.unwrap();
            }
        });
        let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let mut table = MagicDns::new("mesh.example");
        table.set_resolvers(vec![closed, resolver]);
        let (stack, _) = node(table);
        let answer = ask_over(&stack, SERVICE_V4.into(), &query("www.example.org.")).await;
        assert_eq!(answers(&answer), ["192.0.2.80"]);
    }
}

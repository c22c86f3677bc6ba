//! Relays that are reached through an HTTP proxy.

use std::sync::Arc;
use std::sync::Mutex;

use mesh_derp::driver::client::{Options, RelayClient, RelayEvent, latency_check};
use mesh_derp::proxy::Proxies;
use mesh_derp::tls::{ClientTls, ServerTls};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::harness::{TestRelay, client, connected, event, node_key, packet, trusting};

/// What a proxy answers.
#[derive(Clone, Copy)]
enum Manner {
    Open,
    /// Wants this behind `Basic`.
    Login(&'static str),
    Refuse(&'static str),
}

struct TestProxy {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
}

impl TestProxy {
    async fn start(manner: Manner, tls: Option<&ServerTls>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self { port: listener.local_addr().unwrap().port(), asked: Arc::default() };
        let asked = Arc::clone(&proxy.asked);
        let tls = tls.map(|tls| TlsAcceptor::from(tls.config(None).unwrap()));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (asked, tls) = (Arc::clone(&asked), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        Some(tls) => serve(tls.accept(stream).await.unwrap(), manner, &asked).await,
                        None => serve(stream, manner, &asked).await,
                    }
                });
            }
        });
        proxy
    }

    fn by(&self, login: &str) -> Proxies {
        Proxies::through(format!("http://{login}127.0.0.1:{}", self.port).parse().unwrap())
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin, manner: Manner, asked: &Mutex<Vec<String>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let target = head.strip_prefix("CONNECT ").unwrap().split(' ').next().unwrap().to_owned();
    asked.lock().unwrap().push(target.clone());
    let refusal = match manner {
        Manner::Open => None,
        Manner::Login(login) if head.contains(&format!("Proxy-Authorization: Basic {login}\r\n")) => None,
        Manner::Login(_) => Some("407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\""),
        Manner::Refuse(status) => Some(status),
    };
    if let Some(refusal) = refusal {
        stream.write_all(format!("HTTP/1.1 {refusal}\r\nContent-Length: 0\r\n\r\n").as_bytes()).await.unwrap();
        return;
    }
    let mut relay = TcpStream::connect(&target).await.unwrap();
    stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
    let _ = tokio::io::copy_bidirectional(&mut stream, &mut relay).await;
}

fn client_by(relay: &TestRelay, proxies: Proxies, tls: ClientTls) -> RelayClient {
    let mut options = Options::new(relay.region(), node_key(1), tls);
    options.proxies = proxies;
    RelayClient::new(options)
}

async fn works(mut client: RelayClient) {
    connected(&mut client).await;
    client.outbox().try_send(node_key(1).public(), "through".into());
    assert_eq!(packet(&mut client).await, (node_key(1).public(), "through".into()));
}

async fn reason(mut client: RelayClient) -> String {
    let event = event(&mut client).await;
    let RelayEvent::Disconnected { reason } = event else { panic!("{event:?}") };
    reason
}

#[tokio::test]
async fn a_proxy_is_asked_for_the_relay_by_name_and_tls_runs_inside() {
    let (relay, proxy) = (TestRelay::start().await, TestProxy::start(Manner::Open, None).await);
    works(client_by(&relay, proxy.by(""), trusting())).await;
    works(client_by(&relay, proxy.by(""), ClientTls::plain())).await;
    let target = format!("localhost:{}", relay.address.port());
    assert_eq!(proxy.asked(), [target.clone(), target.clone()]);
    latency_check(&relay.region(), &trusting(), &proxy.by("")).await.unwrap();
    assert_eq!(proxy.asked().len(), 3, "measurements go the same way");
}

#[tokio::test]
async fn a_proxy_over_tls_carries_tls_within_tls() {
    let tls = ServerTls::generate(&["127.0.0.1".to_owned()]).unwrap();
    let (relay, proxy) = (TestRelay::start().await, TestProxy::start(Manner::Open, Some(&tls)).await);
    let proxies = Proxies::through(format!("https://127.0.0.1:{}", proxy.port).parse().unwrap());
    let trusted = ClientTls::with_roots(vec![tls.leaf().clone()]).unwrap();
    works(client_by(&relay, proxies.clone(), trusted)).await;
    let told = reason(client_by(&relay, proxies, trusting())).await;
    assert!(told.starts_with(&format!("proxy https://127.0.0.1:{}: tls: ", proxy.port)), "{told}");
}

#[tokio::test]
async fn a_login_from_the_url_is_sent_and_a_missing_or_wrong_one_is_named_and_never_shown() {
    // "user" and "p@ss".
    let proxy = TestProxy::start(Manner::Login("dXNlcjpwQHNz"), None).await;
    let relay = TestRelay::start().await;
    works(client_by(&relay, proxy.by("user:p%40ss@"), trusting())).await;
    let missing = reason(client_by(&relay, proxy.by(""), trusting())).await;
    assert!(missing.contains("wants a user name and password (407)"), "{missing}");
    let wrong = reason(client_by(&relay, proxy.by("user:secret@"), trusting())).await;
    assert!(wrong.contains("refuses the user name and password") && !wrong.contains("secret"), "{wrong}");
}

#[tokio::test]
async fn a_proxy_that_refuses_is_named_with_its_status() {
    let (relay, proxy) = (TestRelay::start().await, TestProxy::start(Manner::Refuse("503 Busy"), None).await);
    let told = reason(client_by(&relay, proxy.by(""), trusting())).await;
    assert_eq!(
        told,
        format!("proxy http://127.0.0.1:{}: answered 503 and not 200 when asked for localhost", proxy.port)
    );
    let nobody = Proxies::through("http://127.0.0.1:1".parse().unwrap());
    let told = reason(client_by(&relay, nobody, trusting())).await;
    assert!(told.starts_with("proxy http://127.0.0.1:1: ") && told.contains("onnection refused"), "{told}");
}

#[tokio::test]
async fn whom_the_exceptions_name_is_reached_directly() {
    let (relay, proxy) = (TestRelay::start().await, TestProxy::start(Manner::Refuse("403 No"), None).await);
    let url = format!("http://127.0.0.1:{}", proxy.port);
    for except in ["localhost", "127.0.0.0/8", &format!("localhost:{}", relay.address.port())] {
        works(client_by(&relay, Proxies::through_except(url.parse().unwrap(), except), trusting())).await;
    }
    let vars = |name: &str| (name == "HTTPS_PROXY").then(|| url.clone());
    works(client_by(&relay, Proxies::from_variables(vars).unwrap(), trusting())).await;
    works(client(relay.region(), trusting(), 1)).await;
    assert_eq!(proxy.asked(), [""; 0]);
}

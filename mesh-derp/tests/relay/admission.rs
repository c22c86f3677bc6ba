//! Who is let in, by file and by URL.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mesh_derp::driver::server::{
    Admission, AllOf, AllowList, AllowListFile, Applicant, Config, Counters, Unreachable, Verdict, Verify,
};
use mesh_derp::frame::Frame;
use mesh_derp::login::{ClientInfo, MeshKey};
use mesh_derp::tls::{ClientTls, ServerTls};
use mesh_noise::key::NodePrivate;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::harness::{TestRelay, eventually, node_key, trusting};

/// Reads one request and gives `answer` to it; returns the request.
async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, answer: &str) -> String {
    let mut request = Vec::new();
    while !request.ends_with(b"}") {
        request.push(stream.read_u8().await.unwrap());
    }
    stream.write_all(answer.as_bytes()).await.unwrap();
    let _ = stream.shutdown().await;
    String::from_utf8(request).unwrap()
}

/// Gives each question the same answer; says where, and counts.
async fn answering(answer: String) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, asked) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let counting = Arc::clone(&asked);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            counting.fetch_add(1, Ordering::Relaxed);
            exchange(stream, &answer).await;
        }
    });
    (address, asked)
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn applicant(seed: u64) -> Applicant {
    Applicant { node: node_key(seed).public(), address: "192.0.2.7".parse().unwrap() }
}

fn verify(url: &str, unreachable: Unreachable) -> Verify {
    Verify::new(url, &trusting(), unreachable).unwrap()
}

#[tokio::test]
async fn each_answer_of_a_url_has_its_verdict() {
    let oversized = format!("{{\"Allow\":true{}}}", " ".repeat(4096));
    let cases = [
        (ok("{\"Allow\":true}"), Verdict::Admit),
        (ok("{\"allow\":true,\"Why\":\"ours\"}"), Verdict::Admit),
        (ok("{\"Allow\":false}"), Verdict::Refuse),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nE\r\n{\"Allow\":true}\r\n0\r\n\r\n".into(),
            Verdict::Admit,
        ),
        (ok("{}"), Verdict::RefuseMalformed),
        (ok("yes"), Verdict::RefuseMalformed),
        (ok(&oversized), Verdict::RefuseMalformed),
        ("HTTP/1.1 500 Oh\r\nContent-Length: 14\r\n\r\n{\"Allow\":true}".into(), Verdict::RefuseMalformed),
        ("HTTP/1.1 302 Found\r\nLocation: /yes\r\nContent-Length: 0\r\n\r\n".into(), Verdict::RefuseMalformed),
    ];
    for (answer, verdict) in cases {
        let (address, _) = answering(answer.clone()).await;
        // Letting in whom nobody can be asked about changes nothing where somebody answers.
        for unreachable in [Unreachable::Refuse, Unreachable::Admit] {
            let verify = verify(&format!("http://{address}/verify"), unreachable);
            assert_eq!(verify.decide(applicant(1)).await, verdict, "{answer}");
        }
    }
}

#[tokio::test]
async fn who_cannot_be_asked_about_is_let_in_only_if_that_was_chosen() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (broken, _) = answering(String::new()).await;
    let (cut_short, _) = answering("HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{\"All".to_owned()).await;
    for address in [closed, broken, cut_short] {
        let url = format!("http://{address}/");
        assert_eq!(verify(&url, Unreachable::Refuse).decide(applicant(1)).await, Verdict::RefuseUnasked);
        assert_eq!(verify(&url, Unreachable::Admit).decide(applicant(1)).await, Verdict::AdmitUnasked);
    }
}

#[tokio::test(start_paused = true)]
async fn silence_is_waited_for_five_seconds() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let verify = verify(&format!("http://{}", listener.local_addr().unwrap()), Unreachable::Refuse);
    let at = tokio::time::Instant::now();
    let (verdict, _held) = tokio::join!(verify.decide(applicant(1)), listener.accept());
    assert_eq!((verdict, at.elapsed().as_secs()), (Verdict::RefuseUnasked, 5));
}

#[tokio::test]
async fn a_yes_is_remembered_and_a_no_is_not() {
    let (address, asked) = answering(ok("{\"Allow\":true}")).await;
    let friendly = verify(&format!("http://{address}/"), Unreachable::Refuse);
    for _ in 0..3 {
        assert_eq!(friendly.decide(applicant(1)).await, Verdict::Admit);
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    // For that node from that address alone.
    assert_eq!(friendly.decide(applicant(2)).await, Verdict::Admit);
    let elsewhere = Applicant { address: "192.0.2.8".parse().unwrap(), ..applicant(1) };
    assert_eq!(friendly.decide(elsewhere).await, Verdict::Admit);
    assert_eq!(asked.load(Ordering::Relaxed), 3);
    let (address, asked) = answering(ok("{\"Allow\":false}")).await;
    let unfriendly = verify(&format!("http://{address}/"), Unreachable::Refuse);
    for _ in 0..3 {
        assert_eq!(unfriendly.decide(applicant(1)).await, Verdict::Refuse);
    }
    assert_eq!(asked.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_url_is_asked_over_tls_if_its_certificate_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let tls = ServerTls::load_or_generate(dir.path(), &["localhost".to_owned()]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/verify?x=1", listener.local_addr().unwrap().port());
    let knowing = ClientTls::with_ca_file(&dir.path().join("tls.pem")).unwrap();
    let knowing = Verify::new(&url, &knowing, Unreachable::Refuse).unwrap();
    let acceptor = TlsAcceptor::from(tls.config(None).unwrap());
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        exchange(acceptor.accept(stream).await.unwrap(), &ok("{\"Allow\":true}")).await
    };
    let (verdict, request) = tokio::join!(knowing.decide(applicant(1)), serve);
    assert_eq!(verdict, Verdict::Admit);
    assert!(request.starts_with("POST /verify?x=1 HTTP/1.1\r\n"), "{request}");
    let body = format!("{{\"NodePublic\":\"{}\",\"Source\":\"192.0.2.7\"}}", node_key(1).public());
    assert!(request.ends_with(&body), "{request}");
    let ignorant = verify(&url, Unreachable::Refuse);
    let refuse = async {
        let (stream, _) = listener.accept().await.unwrap();
        assert!(acceptor.accept(stream).await.is_err());
    };
    let (verdict, ()) = tokio::join!(ignorant.decide(applicant(1)), refuse);
    assert_eq!(verdict, Verdict::RefuseUnasked);
}

/// Logs in and says whether that was allowed.
async fn let_in(relay: &TestRelay, key: &NodePrivate, info: &ClientInfo) -> bool {
    let mut raw = relay.upgraded().await;
    raw.log_in_with(key, info).await;
    matches!(raw.frame().await, Some(Frame::ServerInfo { .. }))
}

async fn counted(relay: &TestRelay, count: impl Fn(&Counters) -> [u64; 3], expected: [u64; 3]) {
    eventually("the counts", || (count(&relay.counters()) == expected).then_some(())).await;
}

#[tokio::test]
async fn a_relay_counts_each_verdict_and_asks_nobody_about_relays() {
    let (address, asked) = answering("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".into()).await;
    let list = Arc::new(AllowList::new([node_key(1).public(), node_key(2).public()]));
    let all: Vec<Arc<dyn Admission>> = vec![list, Arc::new(verify(&format!("http://{address}/"), Unreachable::Refuse))];
    let mesh_key = MeshKey::from_bytes([4; 32]);
    let config = Config { admission: Arc::new(AllOf(all)), mesh_key: Some(mesh_key.clone()), ..Config::default() };
    let relay = TestRelay::start_with(config, "127.0.0.1:0".parse().unwrap()).await;
    assert!(!let_in(&relay, &node_key(1), &ClientInfo::default()).await);
    assert!(!let_in(&relay, &node_key(9), &ClientInfo::default()).await);
    counted(&relay, |c| [c.not_admitted, c.refused, c.refused_malformed], [2, 1, 1]).await;
    let relative = ClientInfo { mesh_key: Some(mesh_key), ..ClientInfo::default() };
    assert!(let_in(&relay, &node_key(9), &relative).await);
    // Who is not on the list is not asked about either.
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_node_that_is_removed_from_the_file_is_disconnected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("allowed");
    let line = |seed| format!("{} # node {seed}\n", node_key(seed).public());
    std::fs::write(&path, line(1) + &line(2)).unwrap();
    let file = Arc::new(AllowListFile::load(&path).unwrap());
    let config = Config { admission: Arc::clone(&file) as _, ..Config::default() };
    let relay = TestRelay::start_with(config, "127.0.0.1:0".parse().unwrap()).await;
    let (serving, following) = (Arc::clone(&relay.server), Arc::clone(&file));
    let follow = tokio::spawn(async move { following.follow(&serving).await });
    let (mut one, mut two) = (relay.raw(&node_key(1)).await, relay.raw(&node_key(2)).await);
    assert!(!let_in(&relay, &node_key(3), &ClientInfo::default()).await);
    // A file that makes no sense changes nothing.
    std::fs::write(&path, "nobody").unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    two.send(Frame::Ping(*b"12345678")).await;
    assert_eq!(two.frame().await, Some(Frame::Pong(*b"12345678")));
    std::fs::write(&path, line(1) + &line(3)).unwrap();
    assert_eq!(two.frame().await, None);
    assert!(let_in(&relay, &node_key(3), &ClientInfo::default()).await);
    one.send(Frame::Ping(*b"12345678")).await;
    assert_eq!(one.frame().await, Some(Frame::Pong(*b"12345678")));
    counted(&relay, |c| [c.admitted, c.refused, c.not_admitted], [3, 1, 1]).await;
    follow.abort();
}

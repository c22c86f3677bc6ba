use std::collections::VecDeque;

use proptest::prelude::*;
use rustls::crypto::aws_lc_rs::cipher_suite as suites;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{RootCertStore, SupportedCipherSuite};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex, split};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::record::{ALERT, DATA, HANDSHAKE, MAX_PLAIN};
use super::*;
use crate::driver::Duplex;

const SUITES: [SupportedCipherSuite; 6] = [
    suites::TLS13_AES_128_GCM_SHA256,
    suites::TLS13_AES_256_GCM_SHA384,
    suites::TLS13_CHACHA20_POLY1305_SHA256,
    suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    suites::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    suites::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
];

/// Both sides' configurations, which allow nothing but one cipher suite.
pub(super) fn configs(suite: SupportedCipherSuite) -> (Arc<ServerConfig>, Arc<ClientConfig>) {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites = vec![suite];
    let (provider, versions) = (Arc::new(provider), [suite.version()]);
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    server.alpn_protocols = vec![b"derp".to_vec()];
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![b"derp".to_vec()];
    (Arc::new(server), Arc::new(client))
}

pub(super) fn localhost() -> ServerName<'static> {
    "localhost".try_into().unwrap()
}

async fn pair_over<A, B>(suite: SupportedCipherSuite, near: A, far: B) -> (TlsStream<A>, TlsStream<B>)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (server, client) = configs(suite);
    let (server, client) =
        tokio::try_join!(TlsStream::accept(server, near), TlsStream::connect(client, localhost(), far)).unwrap();
    (server.0, client.0)
}

/// Both ends over a pipe that holds much.
async fn pair(suite: SupportedCipherSuite) -> (TlsStream<DuplexStream>, TlsStream<DuplexStream>) {
    let (near, far) = duplex(1 << 20);
    pair_over(suite, near, far).await
}

/// A pipe that passes on as many bytes at a time as a list says, round and round; 0 means: not now.
#[derive(Debug)]
struct Choppy {
    inner: DuplexStream,
    reads: VecDeque<usize>,
    writes: VecDeque<usize>,
}

fn next(sizes: &mut VecDeque<usize>, cx: &Context<'_>) -> Poll<usize> {
    sizes.rotate_left(1);
    match sizes[0] {
        0 => {
            cx.waker().wake_by_ref();
            Poll::Pending
        }
        size => Poll::Ready(size),
    }
}

fn choppy(capacity: usize, sizes: &[usize]) -> (Choppy, Choppy) {
    let (near, far) = duplex(capacity);
    let sizes: VecDeque<_> = sizes.iter().copied().chain([3]).collect();
    let over = |inner| Choppy { inner, reads: sizes.clone(), writes: sizes.clone() };
    (over(near), over(far))
}

impl AsyncRead for Choppy {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut part = vec![0; ready!(next(&mut self.reads, cx)).min(buf.remaining())];
        let mut part = ReadBuf::new(&mut part);
        ready!(Pin::new(&mut self.inner).poll_read(cx, &mut part))?;
        buf.put_slice(part.filled());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Choppy {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let size = ready!(next(&mut self.writes, cx)).min(bytes.len());
        Pin::new(&mut self.inner).poll_write(cx, &bytes[..size])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Bytes in which a loss or a swap shows.
fn pattern(length: usize, seed: u32) -> Vec<u8> {
    (seed..).take(length).map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()
}

/// Sends in both directions at once, in writes of the given sizes, says goodbye, and checks what came.
async fn exchange<A, B>(near: A, far: B, length: usize, writes: &[usize], read: usize) -> (A, B)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    async fn side<S>(stream: S, out: Vec<u8>, wanted: Vec<u8>, writes: &[usize], read: usize) -> S
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (mut reader, mut writer) = split(stream);
        let write = async {
            let (mut rest, mut sizes) = (&out[..], writes.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at((*sizes.next().unwrap()).clamp(1, rest.len()));
                writer.write_all(now).await.unwrap();
                rest = later;
            }
            writer.shutdown().await.unwrap();
        };
        let read = async {
            let (mut came, mut buffer) = (Vec::new(), vec![0; read.max(1)]);
            loop {
                match reader.read(&mut buffer).await.unwrap() {
                    0 => break,
                    length => came.extend_from_slice(&buffer[..length]),
                }
            }
            assert!(came == wanted, "{} of {} bytes, or others", came.len(), wanted.len());
        };
        tokio::join!(write, read);
        reader.unsplit(writer)
    }
    let (one, other) = (pattern(length, 1), pattern(length, 1 << 30));
    tokio::join!(side(near, one.clone(), other.clone(), writes, read), side(far, other, one, writes, read))
}

fn holds_nothing<IO>(stream: &TlsStream<IO>) {
    assert_eq!(stream.buffered(), 0);
}

#[tokio::test]
async fn it_understands_rustls_on_either_side_with_every_cipher() {
    for suite in SUITES {
        for (own_server, own_client) in [(true, true), (true, false), (false, true)] {
            let (server_config, client_config) = configs(suite);
            let (near, far) = choppy(100_000, &[70_000, 5, 0, 1000, 17_000, 0, 1]);
            let accept = async {
                if !own_server {
                    return Box::new(TlsAcceptor::from(server_config).accept(near).await.unwrap()) as Box<dyn Duplex>;
                }
                let (stream, peer) = TlsStream::accept(server_config, near).await.unwrap();
                assert_eq!((peer.version, peer.alpn.as_deref()), (suite.version().version, Some(&b"derp"[..])));
                assert_eq!((stream.version(), peer.certificates.len()), (peer.version, 0));
                Box::new(stream)
            };
            let connect = async {
                if !own_client {
                    let connector = TlsConnector::from(client_config);
                    return Box::new(connector.connect(localhost(), far).await.unwrap()) as Box<dyn Duplex>;
                }
                let (stream, peer) = TlsStream::connect(client_config, localhost(), far).await.unwrap();
                assert_eq!((peer.version, peer.alpn.as_deref()), (suite.version().version, Some(&b"derp"[..])));
                assert_eq!((stream.version(), peer.certificates.len()), (peer.version, 1));
                Box::new(stream)
            };
            let (server, client) = tokio::join!(accept, connect);
            exchange(server, client, 400_000, &[70_000, 1, 1400, 16_384, 16_385, 65_536], 65_536).await;
        }
    }
}

#[tokio::test]
async fn much_goes_both_ways_at_once() {
    for suite in [SUITES[0], SUITES[5]] {
        let (near, far) = duplex(200_000);
        let (server, client) = pair_over(suite, near, far).await;
        let (server, client) = exchange(server, client, 20_000_000, &[65_536, 1400, 300_000], 50_000).await;
        holds_nothing(&server);
        holds_nothing(&client);
    }
}

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn nothing_is_lost_however_it_is_cut(
        suite in 0..SUITES.len(),
        length in 0..150_000usize,
        writes in prop::collection::vec(1..70_000usize, 1..6),
        read in 1..70_000usize,
        capacity in 1..100_000usize,
        pieces in prop::collection::vec(prop_oneof![Just(0), 1..20usize, 1..70_000usize], 1..8),
        limit in prop_oneof![Just(u64::MAX), 5..50u64],
    ) {
        run(async {
            let (near, far) = choppy(capacity.max(pieces.len() * 100), &pieces);
            let (mut server, mut client) = pair_over(SUITES[suite], near, far).await;
            if suite < 3 {
                server.session.limit_records(limit);
                client.session.limit_records(limit);
            }
            // Not so many steps that it takes long.
            let least = length / 500;
            let writes: Vec<_> = writes.iter().map(|size| *size.max(&least)).collect();
            let (server, client) = exchange(server, client, length, &writes, read.max(least)).await;
            holds_nothing(&server);
            holds_nothing(&client);
        });
    }

    #[test]
    fn any_bytes_are_records_or_an_error(
        suite in 0..SUITES.len(),
        bytes in prop::collection::vec(any::<u8>(), 1..2000),
        shape in 0..4u8,
        room in 1..3000usize,
    ) {
        run(async {
            let (mut server, client) = pair(SUITES[suite]).await;
            let (mut raw, mut session) = client.into_parts();
            let bytes = match shape {
                0 => bytes,
                1 => [&[DATA, 3, 3, 0, 100][..], &bytes[..]].concat(),
                2 => session.0.seal_raw(HANDSHAKE, &bytes),
                _ => session.0.seal_raw(bytes[0], &bytes[1..]),
            };
            raw.write_all(&bytes).await.unwrap();
            raw.shutdown().await.unwrap();
            let mut buffer = vec![0; room];
            // Whatever it is, it ends.
            while let Ok(1..) = server.read(&mut buffer).await {}
        });
    }

    #[test]
    fn any_greeting_is_refused_or_waited_for(bytes in prop::collection::vec(any::<u8>(), 0..1000), tls in any::<bool>()) {
        run(async {
            let (server, client) = configs(SUITES[0]);
            let bytes = if tls { [&[22, 3, 1, 0, 200][..], &bytes[..]].concat() } else { bytes };
            for own_server in [true, false] {
                let (near, mut far) = duplex(4096);
                far.write_all(&bytes).await.unwrap();
                far.shutdown().await.unwrap();
                let refused = if own_server {
                    TlsStream::accept(Arc::clone(&server), near).await.err()
                } else {
                    TlsStream::connect(Arc::clone(&client), localhost(), near).await.err()
                };
                prop_assert!(refused.is_some());
            }
            Ok(())
        })?;
    }
}

#[tokio::test]
async fn one_read_takes_several_records() {
    let (mut server, mut client) = pair(SUITES[0]).await;
    let sent = pattern(60_000, 7);
    for part in sent.chunks(1400) {
        client.write_all(part).await.unwrap();
    }
    let mut buffer = vec![0; 65_536];
    assert_eq!(server.read(&mut buffer).await.unwrap(), sent.len());
    assert_eq!(buffer[..sent.len()], sent);
    holds_nothing(&server);
    // A reader with little room gets the same, piece by piece.
    client.write_all(&sent).await.unwrap();
    let mut small = [0; 1000];
    for part in sent.chunks(1000) {
        server.read_exact(&mut small).await.unwrap();
        assert_eq!(small, part);
        assert!(server.buffered() <= SCRATCH_LEN);
    }
    holds_nothing(&server);
}

#[tokio::test]
async fn tls_goes_inside_tls_and_a_thread_keeps_few_buffers() {
    for suite in [SUITES[0], SUITES[4]] {
        let (near, far) = pair(SUITES[1]).await;
        let (near, far) = pair_over(suite, near, far).await;
        let (near, far) = exchange(near, far, 1_000_000, &[65_536, 1400], 65_536).await;
        holds_nothing(&near);
        holds_nothing(&far);
        holds_nothing(near.get_ref());
    }
    assert!(SCRATCH.with_borrow(|kept| kept.len() <= SCRATCH_KEPT && kept.iter().all(|one| one.len() == SCRATCH_LEN)));
}

#[tokio::test]
async fn small_parts_share_a_record() {
    let (server, client) = pair(SUITES[1]).await;
    let (mut raw, session) = server.into_parts();
    let mut client = client;
    let sent = pattern(40_000, 3);
    let (one, rest) = sent.split_at(10);
    let (two, rest) = rest.split_at(4990);
    let (three, four) = rest.split_at(30_000);
    let parts = [one, &[], two, three, four].map(IoSlice::new);
    let written = std::future::poll_fn(|cx| Pin::new(&mut client).poll_write_vectored(cx, &parts)).await.unwrap();
    assert_eq!(written, sent.len());
    let mut wire = vec![0; 100_000];
    let length = raw.read(&mut wire).await.unwrap();
    let mut lengths = Vec::new();
    let mut at = 0;
    while at < length {
        let body = usize::from(u16::from_be_bytes([wire[at + 3], wire[at + 4]]));
        lengths.push(body - 17);
        at += 5 + body;
    }
    assert_eq!(lengths, [MAX_PLAIN, MAX_PLAIN, 40_000 - 2 * MAX_PLAIN]);
    let (mut near, far) = duplex(100_000);
    near.write_all(&wire[..length]).await.unwrap();
    let mut server = TlsStream::from_parts(far, session);
    let mut came = vec![0; sent.len()];
    server.read_exact(&mut came).await.unwrap();
    assert_eq!(came, sent);
}

#[tokio::test]
async fn what_the_peer_does_not_take_is_bounded_and_waits() {
    let (near, far) = duplex(10_000);
    let (mut server, mut client) = pair_over(SUITES[0], near, far).await;
    let sent = pattern(300_000, 9);
    let mut taken = 0;
    while let Poll::Ready(more) =
        std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut server).poll_write(cx, &sent[taken..]))).await
    {
        taken += more.unwrap();
    }
    assert_eq!(taken, session::MAX_BATCH);
    assert!(server.buffered() > 0 && server.buffered() <= BATCH_ROOM, "{}", server.buffered());
    let mut came = vec![0; taken];
    let (flushed, read) = tokio::join!(server.flush(), client.read_exact(&mut came));
    flushed.unwrap();
    read.unwrap();
    assert_eq!(came, sent[..taken]);
    holds_nothing(&server);
    holds_nothing(&client);
}

#[tokio::test]
async fn keys_are_updated_for_and_by_rustls() {
    let (server_config, client_config) = configs(SUITES[2]);
    let (near, far) = duplex(1 << 20);
    let acceptor = TlsAcceptor::from(server_config);
    let (server, client) = tokio::join!(acceptor.accept(near), TlsStream::connect(client_config, localhost(), far));
    let (mut server, (mut client, _)) = (server.unwrap(), client.unwrap());
    client.session.limit_records(10);
    let (mut one, mut two) = ([0; 1400], [0; 1400]);
    for round in 0..100 {
        if round % 7 == 0 {
            server.get_mut().1.refresh_traffic_keys().unwrap();
        }
        let (to_client, to_server) = (pattern(1400, round), pattern(1400, round + 1));
        server.write_all(&to_client).await.unwrap();
        server.flush().await.unwrap();
        client.read_exact(&mut one).await.unwrap();
        client.write_all(&to_server).await.unwrap();
        client.flush().await.unwrap();
        server.read_exact(&mut two).await.unwrap();
        assert_eq!((&one[..], &two[..]), (&to_client[..], &to_server[..]));
    }
    assert!(client.session.sent_with_key() < 10);
}

#[tokio::test]
async fn an_asked_for_key_update_is_answered_before_the_next_data() {
    let (mut server, client) = pair(SUITES[0]).await;
    let (mut raw, mut session) = client.into_parts();
    // In two records, as any message may be.
    let halves = [session.0.seal_raw(HANDSHAKE, &[24, 0]), session.0.seal_raw(HANDSHAKE, &[0, 1, 1])].concat();
    raw.write_all(&halves).await.unwrap();
    let session = TlsSession(session.0.after_key_update());
    let mut client = TlsStream::from_parts(raw, session);
    client.write_all(b"new key").await.unwrap();
    let mut came = [0; 7];
    server.read_exact(&mut came).await.unwrap();
    assert_eq!(&came, b"new key");
    let before = server.session.sent_with_key();
    assert!(before > 0);
    server.write_all(b"as well").await.unwrap();
    client.read_exact(&mut came).await.unwrap();
    assert_eq!((&came, server.session.sent_with_key()), (b"as well", 1));
    holds_nothing(&server);
}

#[tokio::test]
async fn a_used_up_key_of_tls_1_2_ends_the_connection() {
    let (mut server, _client) = pair(SUITES[3]).await;
    server.session.limit_records(4);
    let mut error = None;
    for _ in 0..4 {
        error = server.write_all(b"x").await.err();
    }
    assert_eq!(error.unwrap().to_string(), "tls: the connection's key is used up, connect again");
}

#[tokio::test]
async fn an_end_without_farewell_is_told_from_one_with() {
    for suite in [SUITES[0], SUITES[3]] {
        let (mut server, mut client) = pair(suite).await;
        client.write_all(b"all").await.unwrap();
        client.shutdown().await.unwrap();
        let mut all = Vec::new();
        server.read_to_end(&mut all).await.unwrap();
        assert_eq!((&all[..], server.read(&mut [0; 10]).await.unwrap()), (&b"all"[..], 0));

        let (mut server, mut client) = pair(suite).await;
        client.write_all(b"some").await.unwrap();
        drop(client);
        let error = server.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[tokio::test]
async fn after_the_peers_farewell_one_may_still_write() {
    let (mut server, client) = pair(SUITES[0]).await;
    let (raw, mut session) = client.into_parts();
    let farewell = session.0.seal_raw(ALERT, &[1, 0]);
    let mut client = TlsStream::from_parts(raw, session);
    client.io.write_all(&farewell).await.unwrap();
    assert_eq!(server.read(&mut [0; 10]).await.unwrap(), 0);
    server.write_all(b"one more thing").await.unwrap();
    server.shutdown().await.unwrap();
    let mut all = Vec::new();
    client.read_to_end(&mut all).await.unwrap();
    assert_eq!(&all, b"one more thing");
    let error = server.write_all(b"and another").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}

/// Sends a record of the client's making and says what the server makes of it and what the client hears about it.
async fn complaint(suite: SupportedCipherSuite, forge: impl FnOnce(&mut TlsSession) -> Vec<u8>) -> (String, String) {
    let (mut server, client) = pair(suite).await;
    let (mut raw, mut session) = client.into_parts();
    raw.write_all(&forge(&mut session)).await.unwrap();
    let mut client = TlsStream::from_parts(raw, session);
    let error = server.read(&mut [0; 100]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    // It stays that way.
    assert_eq!(server.read(&mut [0; 100]).await.unwrap_err().to_string(), error.to_string());
    assert_eq!(server.write(&[0; 100]).await.unwrap_err().to_string(), error.to_string());
    (error.to_string(), client.read(&mut [0; 100]).await.unwrap_err().to_string())
}

#[tokio::test]
async fn broken_rules_end_the_connection_with_an_alert() {
    let forged = |session: &mut TlsSession| {
        let mut record = session.0.seal_raw(DATA, b"an honest record");
        record[20] ^= 1;
        record
    };
    for suite in SUITES {
        let (error, heard) = complaint(suite, forged).await;
        assert_eq!(error, "tls: a record fails its authentication");
        assert_eq!(heard, "tls: the peer gave up: BadRecordMac");
    }
    let tls13 = |content, plain: &'static [u8]| complaint(SUITES[0], move |session| session.0.seal_raw(content, plain));
    let heard = "tls: the peer gave up: UnexpectedMessage";
    for (content, plain, reason) in [
        (0, &[0; 20][..], "a record is nothing but padding"),
        (20, b"\x01", "a record is neither data nor alert nor handshake"),
        (HANDSHAKE, b"", "an empty handshake record"),
        (HANDSHAKE, b"\x18\xff\0\0", "a handshake message is too long"),
        (HANDSHAKE, b"\x04\0\0\0", "a handshake message came after the handshake"),
        (HANDSHAKE, b"\x18\0\0\x01\0\x18", "key updates come too many or not alone"),
    ] {
        assert_eq!(tls13(content, plain).await, (format!("tls: {reason}"), heard.to_owned()));
    }
    assert_eq!(tls13(HANDSHAKE, b"\x18\0\0\x01\x02").await.1, "tls: the peer gave up: IllegalParameter");
    assert_eq!(tls13(ALERT, b"\x02").await.1, "tls: the peer gave up: DecodeError");
    let (error, heard) = complaint(SUITES[0], |session| {
        [session.0.seal_raw(HANDSHAKE, &[24]), session.0.seal_raw(DATA, b"data")].concat()
    })
    .await;
    assert_eq!(error, "tls: data came in the middle of a handshake message");
    assert_eq!(heard, "tls: the peer gave up: UnexpectedMessage");
    let (error, heard) = complaint(SUITES[0], |_| vec![DATA, 3, 3, 0x48, 0]).await;
    assert_eq!(error, "tls: a record is longer than TLS allows");
    assert_eq!(heard, "tls: the peer gave up: RecordOverflow");
    let (error, _) = complaint(SUITES[0], |_| b"GET / HTTP/1.1\r\n\r\n".to_vec()).await;
    assert_eq!(error, "tls: what came is no protected TLS record");
}

#[tokio::test]
async fn padding_is_taken_off() {
    let (mut server, client) = pair(SUITES[0]).await;
    let (mut raw, mut session) = client.into_parts();
    // The content type stands inside, zeros behind it.
    raw.write_all(&session.0.seal_raw(0, b"padded\x17\0\0\0")).await.unwrap();
    let mut came = [0; 100];
    assert_eq!(server.read(&mut came).await.unwrap(), 6);
    assert_eq!(&came[..6], b"padded");
}

#[tokio::test]
async fn a_flood_of_key_updates_is_stopped() {
    let (mut server, client) = pair(SUITES[0]).await;
    let (mut raw, mut session) = client.into_parts();
    for _ in 0..40 {
        raw.write_all(&session.0.seal_raw(HANDSHAKE, &[24, 0, 0, 1, 1])).await.unwrap();
        session = TlsSession(session.0.after_key_update());
    }
    let error = server.read(&mut [0; 10]).await.unwrap_err();
    assert_eq!(error.to_string(), "tls: key updates come too many or not alone");
}

#[tokio::test]
async fn shaking_hands_again_is_declined_once() {
    let (mut server, client) = pair(SUITES[4]).await;
    let (mut raw, mut session) = client.into_parts();
    let hello = session.0.seal_raw(HANDSHAKE, &[1, 0, 0, 0]);
    let data = session.0.seal_raw(DATA, b"going on");
    raw.write_all(&[hello, data].concat()).await.unwrap();
    let mut came = [0; 8];
    server.read_exact(&mut came).await.unwrap();
    assert_eq!(&came, b"going on");
    server.write_all(b"likewise").await.unwrap();
    let mut client = TlsStream::from_parts(raw, session);
    client.read_exact(&mut came).await.unwrap();
    assert_eq!(&came, b"likewise");
    let again = client.session.seal_raw(HANDSHAKE, &[1, 0, 0, 0]);
    client.io.write_all(&again).await.unwrap();
    assert_eq!(server.read(&mut came).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[tokio::test]
async fn a_refused_certificate_is_told_to_the_server() {
    let (server, _) = configs(SUITES[0]);
    let (_, stranger) = configs(SUITES[0]);
    let (near, far) = duplex(10_000);
    let (server, client) =
        tokio::join!(TlsStream::accept(server, near), TlsStream::connect(stranger, localhost(), far));
    assert!(client.unwrap_err().to_string().contains("certificate"));
    let error = server.unwrap_err();
    assert!(error.to_string().contains("alert"), "{error}");
}

#[tokio::test]
async fn a_peer_that_vanishes_while_shaking_hands_is_noticed() {
    let (server, client) = configs(SUITES[0]);
    let (near, mut far) = duplex(10_000);
    far.write_all(&[22, 3, 1, 2]).await.unwrap();
    drop(far);
    let error = TlsStream::accept(server, near).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    let (near, far) = duplex(10_000);
    drop(far);
    assert!(TlsStream::connect(client, localhost(), near).await.is_err());
}

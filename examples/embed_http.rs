//! Two nodes in one process: one serves HTTP within the mesh, the other fetches from it. Run with
//! `cargo run --example embed_http`; it brings its own coordinator, so it needs neither root nor a network.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::{Request, Response, client, server, service::service_fn};
use hyper_util::rt::TokioIo;
use mesh_control::admin::{Client as Operator, CreateKey};
use mesh_node::coordinator::{self, Coordinator};
use mesh_node::{Error, Node};

#[tokio::main]
#[expect(clippy::print_stdout, reason = "an example shows what it has fetched")]
async fn main() -> anyhow::Result<()> {
    // A real program joins a coordinator that runs elsewhere; its operator makes the key with `mesh admin keys create`.
    let state = tempfile::tempdir()?;
    let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let config = coordinator::Config::new(state.path(), vec![address], format!("http://{address}"));
    let coordinator = Coordinator::start(config).await?;
    let operator = Operator::new(state.path());
    operator.create_user("anna").await?;
    let wanted = CreateKey { user: "anna".into(), reusable: true, ..CreateKey::default() };
    let key = operator.create_key(&wanted).await?.key.unwrap_or_default();

    let server = join(coordinator.url(), &key, "web").await?;
    let listener = server.listen(80)?;
    tokio::spawn(async move {
        while let Ok((stream, peer)) = listener.accept().await {
            let answer = format!("Hello {}, this is the mesh.\n", peer.ip());
            let service = service_fn(move |_| {
                let page = Response::new(Full::new(Bytes::from(answer.clone())));
                async move { Ok::<_, std::convert::Infallible>(page) }
            });
            tokio::spawn(server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });

    let browser = join(coordinator.url(), &key, "browser").await?;
    let stream = browser.dial("web", 80).await?;
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let answer = sender.send_request(Request::get("/").header("Host", "web").body(Empty::<Bytes>::new())?).await?;
    print!("{}", String::from_utf8_lossy(&answer.into_body().collect().await?.to_bytes()));
    server.shutdown().await;
    browser.shutdown().await;
    Ok(())
}

async fn join(url: &str, key: &str, name: &str) -> Result<Node, Error> {
    // Both nodes are on this host, so its router is left alone.
    let node = Node::builder().control_url(url).auth_key(key).hostname(name).port_mapping(false).start().await?;
    node.wait_running(Duration::from_secs(30)).await?;
    Ok(node)
}

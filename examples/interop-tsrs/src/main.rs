//! The official Rust client as a test peer.
//!
//! `interop-tsrs URL AUTH_KEY HOSTNAME KEY_FILE PEER_NAME` joins the network at URL, echoes TCP and UDP on port 7 of its
//! own address, and asks port 8007 of the named peer to echo, by TCP and by UDP, until both have worked. Every step
//! prints one line: `ready IPV4`, `tcp echoed`, `udp echoed`.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tailscale::{Config, Device};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

type Outcome<T> = Result<T, Box<dyn Error>>;

#[tokio::main]
async fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, auth_key, hostname, key_file, peer] = &arguments[..] else {
        return Err("usage: interop-tsrs URL AUTH_KEY HOSTNAME KEY_FILE PEER_NAME".into());
    };
    let mut config = Config::default_with_key_file(key_file).await?;
    config.control_server_url = url.parse()?;
    config.requested_hostname = Some(hostname.clone());
    let device = Device::new(&config, Some(auth_key.clone())).await?;
    let address = IpAddr::V4(device.ipv4_addr().await?);

    let listener = device.tcp_listen(SocketAddr::new(address, 7)).await?;
    tokio::spawn(async move {
        while let Ok(stream) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = tokio::io::split(stream);
                drop(tokio::io::copy(&mut reader, &mut writer).await);
            });
        }
    });
    let udp = device.udp_bind(SocketAddr::new(address, 7)).await?;
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((source, length)) = udp.recv_from(&mut buffer).await {
            drop(udp.send_to(source, &buffer[..length]).await);
        }
    });
    println!("ready {address}");

    let target = loop {
        if let Ok(Some(node)) = device.peer_by_name(peer).await {
            break SocketAddr::new(IpAddr::V4(node.tailnet_address.ipv4.addr()), 8007);
        }
        sleep(Duration::from_millis(200)).await;
    };
    while timeout(Duration::from_secs(5), tcp_echo(&device, target)).await.is_err() {}
    println!("tcp echoed");

    // A socket dropped with a receive pending ends this client's netstack (version 0.6.1), so one task keeps it for good.
    let socket = std::sync::Arc::new(device.udp_bind(SocketAddr::new(address, 7007)).await?);
    let receiver = socket.clone();
    let mut answer = tokio::spawn(async move {
        let mut buffer = [0; 64];
        while !matches!(receiver.recv_from(&mut buffer).await, Ok((_, 4)) if &buffer[..4] == b"pong") {}
    });
    while !answer.is_finished() {
        socket.send_to(target, b"pong").await?;
        drop(timeout(Duration::from_millis(500), &mut answer).await);
    }
    println!("udp echoed");
    std::future::pending().await
}

async fn tcp_echo(device: &Device, target: SocketAddr) {
    loop {
        let attempt = async {
            let mut stream = device.tcp_connect(target).await?;
            stream.write_all(b"over the mesh").await?;
            let mut answer = [0; 13];
            stream.read_exact(&mut answer).await?;
            if &answer != b"over the mesh" {
                return Err::<(), Box<dyn Error>>("the echo differs from what was sent".into());
            }
            Ok(())
        };
        match attempt.await {
            Ok(()) => return,
            Err(error) => eprintln!("no echo yet: {error}"),
        }
        sleep(Duration::from_millis(200)).await;
    }
}

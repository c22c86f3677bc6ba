//! The commands that run until they are asked to end: coordinator, relay, daemon.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use mesh_derp::driver::server::Unreachable;
use mesh_derp::map::DerpMap;
use mesh_derp::server::{AcceptLimit, Limits};
use mesh_node::activation::{self, Phase, Sockets};
use mesh_node::coordinator::Coordinator;
use mesh_node::front::Front;
use mesh_node::local_api::LocalApi;
use mesh_node::node::Device;
use mesh_node::relay::Relay;
use mesh_node::{Certificate, CertificateFiles, Node, acme, coordinator, privileges, relay, sandbox};
use tokio::signal::unix::{SignalKind, signal};

use crate::{cli, output};

/// The TUN interface of a daemon that was not told otherwise.
const DEFAULT_TUN: &str = "mesh0";

/// `mesh coordinator`.
pub(crate) async fn coordinator(options: cli::Coordinator) -> anyhow::Result<()> {
    let derp_map = options.derp_map.as_deref().map(read_derp_map).transpose()?;
    // The command line demands the one or the other.
    let url = options.url.or_else(|| options.tls.acme.first().map(https)).unwrap_or_default();
    let mut config = coordinator::Config::new(options.state_dir, options.listen, url);
    config.stun = options.stun;
    config.region_id = options.region_id;
    config.relay = !options.no_relay;
    config.derp_map = derp_map.unwrap_or_default();
    config.certificate = certificate(options.tls);
    config.insecure_relay_for_tests = options.insecure_relay_for_tests;
    config.front = front(options.front);
    let running = Coordinator::start(config).await?;
    ready(&format!("coordinator at {}", running.url()));

    let (mut hangup, mut end) = (signal(SignalKind::hangup())?, std::pin::pin!(asked_to_end()));
    loop {
        tokio::select! {
            () = &mut end => break,
            _ = hangup.recv() => {
                running.reload_certificate();
                match options.derp_map.as_deref().map(read_derp_map).transpose() {
                    Ok(map) => running.set_derp_map(map.unwrap_or_default()),
                    Err(error) => tracing::error!("the DERP map stays as it was: {error:#}"),
                }
            }
        }
    }
    activation::notify(Phase::Stopping);
    running.shutdown().await;
    Ok(())
}

/// Does what has to be done before there is a second thread: binds, gives up root, and shuts the door.
pub(crate) fn prepare(options: &mut cli::Relay) -> anyhow::Result<Sockets> {
    if options.print_node {
        return Ok(Sockets::default());
    }
    privileges::raise_file_limit();
    let user = options.user.as_deref().map(privileges::User::find).transpose()?;
    let sockets = match Sockets::passed()? {
        Some(passed) => passed,
        None if options.listen.is_empty() => {
            anyhow::bail!("name an address with --listen, or let systemd pass sockets (ListenStream=)")
        }
        None => Sockets::bind(&options.listen, &options.stun)?,
    };
    (options.listen, options.stun) = sockets.addresses()?;
    let tls = options.tls.tls_cert.iter().chain(&options.tls.tls_key);
    let others = options
        .allow_list
        .iter()
        .chain(&options.mesh_key_file)
        .chain(&options.ca_file)
        .chain(&options.tls.acme_ca_file);
    let files: Vec<PathBuf> = tls.chain(others).cloned().collect();
    if let Some(user) = &user {
        user.take_over(&options.state_dir)?;
        user.become_this()?;
    }
    if let Some(file) = &options.mesh_key_file {
        // Later, no file can be made outside the state directory.
        relay::mesh_key(file)?;
    }
    if let Some(user) = &user {
        privileges::check_readable(&files)?;
        tracing::info!(user = user.name(), "root's privileges are given up");
    }
    if !options.no_sandbox {
        let needs = sandbox::Needs { write: vec![options.state_dir.clone()], read: files };
        tracing::info!("sandbox: {}", sandbox::enter(&needs)?);
    }
    Ok(sockets)
}

/// `mesh relay`.
pub(crate) async fn relay(options: cli::Relay, sockets: Sockets) -> anyhow::Result<()> {
    let mut config = relay::Config::new(options.state_dir, options.listen);
    config.stun = options.stun;
    config.region_id = options.region_id;
    config.certificate = certificate(options.tls);
    config.verify_url = options.verify_url;
    if options.verify_fail_open {
        config.verify_unreachable = Unreachable::Admit;
    }
    config.allow_list = options.allow_list;
    config.mesh_with = options.mesh_with;
    config.mesh_key_file = options.mesh_key_file;
    config.ca_file = options.ca_file;
    config.front = front(options.front);
    if options.redirect_http {
        config.front.redirect_plain_to = config.listen.first().map(std::net::SocketAddr::port);
    }
    if options.print_node {
        return Ok(output::print(&serde_json::to_string_pretty(&relay::describe(&config)?)?)?);
    }
    let running = Relay::start_on(sockets, config).await?;
    ready("relay");
    let (mut hangup, mut end) = (signal(SignalKind::hangup())?, std::pin::pin!(asked_to_end()));
    loop {
        tokio::select! {
            () = &mut end => break,
            _ = hangup.recv() => {
                activation::notify(Phase::Reloading);
                running.reload();
                activation::notify(Phase::Ready);
            }
        }
    }
    activation::notify(Phase::Stopping);
    running.shutdown().await;
    Ok(())
}

fn front(options: cli::Front) -> Front {
    let accept = AcceptLimit { per_second: options.accept_limit, burst: options.accept_burst };
    let (total, per_source) = (options.pending_limit, options.pending_limit_per_address);
    Front {
        metrics_from: options.metrics_from,
        redirect_plain_to: None,
        bootstrap_dns_names: options.bootstrap_dns_names,
        proxies: options.proxy_protocol_from,
        accept,
        limits: Limits { total, per_source, ..Limits::default() },
    }
}

/// `mesh daemon`.
pub(crate) async fn daemon(options: cli::Daemon, socket: PathBuf) -> anyhow::Result<()> {
    let device = match options.tun.as_deref() {
        None => Device::Auto(DEFAULT_TUN.to_owned()),
        Some("userspace") => Device::Userspace,
        Some(name) => Device::Tun(name.to_owned()),
    };
    let mut builder = Node::builder().state_dir(options.state_dir).device(device).port(options.port);
    builder = builder.port_mapping(!options.no_portmap).port_guessing(!options.no_port_guessing);
    if let Some(listen) = options.socks5 {
        builder = builder.socks5(listen);
    }
    if let Some(listen) = options.http_proxy {
        builder = builder.http_proxy(listen);
    }
    if let Some(file) = options.ca_file {
        builder = builder.ca_file(file);
    }
    for endpoint in options.static_endpoint {
        builder = builder.static_endpoint(endpoint);
    }
    if let Some(port) = options.relay_server_port {
        builder = builder.relay_server_port(port);
    }
    for endpoint in options.relay_server_endpoint {
        builder = builder.relay_server_endpoint(endpoint);
    }
    let node = builder.start().await?;
    let api = LocalApi::start(socket, node.clone()).await?;
    ready(&format!("daemon at {}", api.path().display()));
    asked_to_end().await;
    drop(api);
    node.shutdown().await;
    Ok(())
}

fn certificate(tls: cli::Tls) -> Certificate {
    if let Some((certificates, key)) = tls.tls_cert.zip(tls.tls_key) {
        return Certificate::Files(CertificateFiles { certificates, key });
    }
    if tls.acme.is_empty() {
        return Certificate::Generated;
    }
    let mut settings = acme::Settings::new(tls.acme);
    settings.directory = tls.acme_directory;
    settings.email = tls.acme_email;
    settings.ca_file = tls.acme_ca_file;
    settings.agree_to_terms = tls.acme_agree_tos;
    settings.challenge = tls.acme_challenge;
    Certificate::Acme(settings)
}

/// The URL of a server with a certificate for `name`, on the usual port.
fn https(name: &acme::Name) -> String {
    match name {
        acme::Name::Address(IpAddr::V6(address)) => format!("https://[{address}]"),
        acme::Name::Dns(_) | acme::Name::Address(IpAddr::V4(_)) => format!("https://{name}"),
    }
}

/// Reads a DERP map in the form that control servers send.
pub(crate) fn read_derp_map(file: &Path) -> anyhow::Result<DerpMap> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read the DERP map {}", file.display()))?;
    mesh_derp::json::from_slice(&bytes).with_context(|| format!("{} is not a DERP map", file.display()))
}

/// Says that connections are accepted now. Scripts wait for this line.
fn ready(what: &str) {
    drop(output::print(&format!("ready: {what}")));
    activation::notify(Phase::Ready);
}

/// Waits for an interrupt or a request to terminate.
async fn asked_to_end() {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

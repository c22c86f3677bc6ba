//! `mesh-wireguard IFNAME`: a plain WireGuard interface in userspace, for `wg` and `wg-quick`.
//!
//! Goes to the background once the interface is there and its control socket answers, unless `--foreground` is given.
//! Ends when the interface or the control socket is deleted, and on SIGTERM or SIGINT.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use mesh_node::dataplane::Workers;
use mesh_node::wireguard::{ControlSocket, Options, Tunnel};
use tokio::signal::unix::{SignalKind, signal};

/// Told to the process in the background, which has nobody to log to.
const BACKGROUND: &str = "MESH_WIREGUARD_BACKGROUND";
/// For tests: sessions are replaced after this many milliseconds instead of 120 seconds.
const TEST_REKEY_AFTER: &str = "MESH_TEST_REKEY_AFTER_MS";
/// For tests: queues of the device, and sockets on the port, instead of what suits the machine.
const TEST_QUEUES: &str = "MESH_TEST_QUEUES";
/// For tests: so many threads that encrypt and decrypt, always, instead of when one is not enough.
const TEST_WORKERS: &str = "MESH_TEST_WORKERS";

/// A WireGuard interface in userspace, configured with wg or wg-quick.
#[derive(Debug, Parser)]
#[command(name = "mesh-wireguard", version)]
struct Arguments {
    /// Name of the interface to make.
    interface: String,
    /// Stay in the foreground, log to stderr, and print a line beginning "ready" once the interface is there.
    #[arg(short, long)]
    foreground: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = if arguments.foreground { run(&arguments.interface) } else { detach(&arguments.interface) };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With nobody at the other end there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "mesh-wireguard: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Starts this program again in the background, and waits until it is ready.
fn detach(interface: &str) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let mut child = Command::new(program)
        .args([interface, "--foreground"])
        .env(BACKGROUND, "1")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the background process")?;
    let output = child.stdout.take().context("no output to wait for")?;
    let ready = BufReader::new(output).lines().map_while(Result::ok).any(|line| line.starts_with("ready"));
    if ready {
        return Ok(());
    }
    let mut reason = String::new();
    child.stderr.take().context("no reason was given")?.read_to_string(&mut reason)?;
    child.wait()?;
    bail!("{}", reason.trim().trim_start_matches("mesh-wireguard: "))
}

fn run(interface: &str) -> anyhow::Result<()> {
    if std::env::var_os(BACKGROUND).is_some() {
        rustix::process::setsid().context("cannot start a session")?;
    } else {
        let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let mut options = Options::new(mesh_noise::random::SystemRng.array());
    if let Ok(milliseconds) = std::env::var(TEST_REKEY_AFTER) {
        options.timing.rekey_after = Duration::from_millis(milliseconds.parse().context(TEST_REKEY_AFTER)?);
    }
    if let Ok(queues) = std::env::var(TEST_QUEUES) {
        options.sockets = queues.parse().context(TEST_QUEUES)?;
    }
    if let Ok(workers) = std::env::var(TEST_WORKERS) {
        options.workers = Workers::Always(workers.parse().context(TEST_WORKERS)?);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let device = Tunnel::open_device(interface, options.sockets)?;
        let control = ControlSocket::bind(device.name())?;
        let mut tunnel = Tunnel::start(device, options)?;
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let mut stdout = std::io::stdout();
        writeln!(stdout, "ready {interface} {}", control.path().display())?;
        stdout.flush()?;
        tokio::select! {
            ended = tunnel.run(control) => Ok(ended?),
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    })
}

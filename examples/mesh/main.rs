//! `mesh`: parses arguments, prints, and calls the libraries. Whatever knows a protocol lives in them.

mod admin;
mod cli;
mod demo;
mod node;
mod output;
mod serve;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};
use mesh_node::activation::Sockets;

fn main() -> ExitCode {
    let mut cli = Cli::parse();
    start_logging(&cli.command);
    // The kernel changes one thread's user and one thread's sandbox at a time, so this comes before there are others.
    let sockets =
        if let Command::Relay(options) = &mut cli.command { serve::prepare(options) } else { Ok(Sockets::default()) };
    let sockets = match sockets {
        Ok(sockets) => sockets,
        Err(error) => {
            eprintln!("mesh: {}", output::error(&error));
            return ExitCode::FAILURE;
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("mesh: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(cli, sockets)) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has read enough: `mesh status | head -1`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh: {}", output::error(&error));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<output::StdoutError>();
    io.is_some_and(|error| error.0.kind() == std::io::ErrorKind::BrokenPipe)
}

async fn run(cli: Cli, sockets: Sockets) -> anyhow::Result<()> {
    let socket = cli.socket;
    match cli.command {
        Command::Demo(options) => demo::run(&options).await,
        Command::Coordinator(options) => serve::coordinator(*options).await,
        Command::Relay(options) => serve::relay(*options, sockets).await,
        Command::Daemon(options) => serve::daemon(*options, socket).await,
        Command::Admin(options) => admin::run(options).await,
        Command::Up(options) => node::up(socket, options, node::SignIn::AsBefore).await,
        Command::Login(options) => node::up(socket, options, node::SignIn::Anew).await,
        Command::Down => node::down(socket).await,
        Command::Logout => node::logout(socket).await,
        Command::Status(options) => node::status(socket, &options).await,
        Command::Ip { peer } => node::ip(socket, peer).await,
        Command::Ping(options) => node::ping(socket, options).await,
        Command::Set(options) => node::set(socket, &options).await,
        Command::Netcheck(options) => node::netcheck(socket, &options).await,
        Command::Version => node::version(socket).await,
    }
}

/// Logs go to standard error: everything from `info` for what runs on, warnings for the rest. `RUST_LOG` decides otherwise.
fn start_logging(command: &Command) {
    let default = match command {
        Command::Coordinator(_) | Command::Relay(_) | Command::Daemon(_) => "info",
        Command::Demo(_)
        | Command::Admin(_)
        | Command::Up(_)
        | Command::Login(_)
        | Command::Down
        | Command::Logout
        | Command::Status(_)
        | Command::Ip { .. }
        | Command::Ping(_)
        | Command::Set(_)
        | Command::Netcheck(_)
        | Command::Version => "error",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
}

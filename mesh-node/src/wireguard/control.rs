//! The control socket: a Unix stream socket on which `wg` configures an interface.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};

use mesh_noise::wireguard::uapi::{Decoder, Request, UapiError, status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use zeroize::Zeroizing;

use super::Error;

/// Where `wg` looks for control sockets.
const DIRECTORY: &str = "/var/run/wireguard";
/// Requests that wait for the tunnel; a client beyond that waits too.
const WAITING: usize = 16;
/// Clients served at a time; more wait to be accepted.
const CLIENTS: usize = 16;

/// A request on its way to the tunnel, with the way back for the answer's text.
pub(super) type Command = (Request, oneshot::Sender<Zeroizing<String>>);

/// A bound control socket. Its file goes away with it.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Binds the socket on which `wg` looks for the interface `name`.
    ///
    /// # Errors
    /// [`Error::InUse`] if a process answers there already, [`Error::System`] otherwise.
    pub fn bind(name: &str) -> Result<Self, Error> {
        Self::bind_in(Path::new(DIRECTORY), name)
    }

    /// Binds `NAME.sock` in `directory`, for the owner's eyes only. A socket that nobody answers on is replaced.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn bind_in(directory: &Path, name: &str) -> Result<Self, Error> {
        let path = directory.join(format!("{name}.sock"));
        let what = || format!("open the control socket {}", path.display());
        std::fs::create_dir_all(directory).map_err(Error::system(what()))?;
        let is_socket = std::fs::symlink_metadata(&path).is_ok_and(|found| found.file_type().is_socket());
        if is_socket {
            if StdUnixStream::connect(&path).is_ok() {
                return Err(Error::InUse { name: name.into(), path: path.display().to_string() });
            }
            std::fs::remove_file(&path).map_err(Error::system(what()))?;
        }
        // The mode of a socket file is decided when it is bound.
        let before = rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
        let bound = UnixListener::bind(&path);
        rustix::process::umask(before);
        Ok(Self { listener: bound.map_err(Error::system(what()))?, path })
    }

    /// The socket's file. Whoever deletes it asks the tunnel to end.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts clients until dropped; their requests come out of the channel.
    pub(super) fn serve(self) -> (Serving, mpsc::Receiver<Command>) {
        let (commands, receiver) = mpsc::channel(WAITING);
        let path = self.path.clone();
        let task = tokio::spawn(accept(self.listener, commands));
        (Serving { task, path }, receiver)
    }
}

/// A control socket that is being served; stops when dropped.
#[derive(Debug)]
pub(super) struct Serving {
    task: tokio::task::JoinHandle<()>,
    path: PathBuf,
}

impl Serving {
    /// Whether somebody has deleted the socket's file.
    pub(super) fn is_deleted(&self) -> bool {
        std::fs::symlink_metadata(&self.path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
        // Gone already if that is how we were asked to end.
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn accept(listener: UnixListener, commands: mpsc::Sender<Command>) {
    let mut clients = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if clients.len() < CLIENTS => match accepted {
                Ok((stream, _)) => {
                    clients.spawn(answer(stream, commands.clone()));
                }
                Err(error) => {
                    // Out of descriptors, say: the ones in use will come back.
                    tracing::warn!(%error, "control socket");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
            Some(_) = clients.join_next() => {}
        }
    }
}

/// Serves one client until it hangs up or makes no sense.
async fn answer(mut stream: UnixStream, commands: mpsc::Sender<Command>) {
    let mut decoder = Decoder::default();
    let mut chunk = Zeroizing::new([0; 4096]);
    loop {
        let answer = match decoder.next_request() {
            Ok(Some(request)) => {
                let (reply, answer) = oneshot::channel();
                if commands.send((request, reply)).await.is_err() {
                    return;
                }
                let Ok(answer) = answer.await else { return };
                answer
            }
            Ok(None) => {
                match stream.read(&mut *chunk).await {
                    Ok(0) | Err(_) => return,
                    Ok(len) => decoder.push(&chunk[..len]),
                }
                continue;
            }
            Err(error) => {
                tracing::debug!(%error, "refused a configuration");
                let fatal = matches!(error, UapiError::TooLong);
                let sent = stream.write_all(status(Err(&error)).as_bytes()).await;
                if fatal || sent.is_err() {
                    return;
                }
                continue;
            }
        };
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

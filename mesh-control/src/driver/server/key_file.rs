//! The Noise key on disk: `privkey:` and 64 digits, mode 0600, written once.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use mesh_noise::key::MachinePrivate;
use zeroize::Zeroizing;

use super::StartError;
use mesh_noise::random::SystemRng;

/// Reads the key, or draws and keeps a new one if there is no file yet.
pub(super) fn load_or_create(path: &Path) -> Result<MachinePrivate, StartError> {
    let failed = |error| StartError::Io { path: path.to_owned(), error };
    match std::fs::read_to_string(path).map(Zeroizing::new) {
        Ok(text) => text.trim().parse().map_err(|_| StartError::KeyFile { path: path.to_owned() }),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let key = MachinePrivate::generate(&mut SystemRng);
            write(path, &key).map_err(failed)?;
            Ok(key)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Writes a new file and puts it in place only when it is whole and on disk.
fn write(path: &Path, key: &MachinePrivate) -> std::io::Result<()> {
    let draft = path.with_extension("key.new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&draft)?;
    file.write_all(key.to_secret_text().as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    std::fs::rename(&draft, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

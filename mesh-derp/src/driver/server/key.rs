//! Where a relay keeps its keys.

use std::io;
use std::path::Path;

use mesh_noise::key::RelayPrivate;
use mesh_noise::random::SystemRng;

use crate::login::MeshKey;

/// Takes the relay key kept in `state_dir`, or makes one and keeps it there (`relay.key`, readable by its owner only).
///
/// # Errors
/// If the directory cannot be used or what is kept in it is no key.
pub fn load_or_generate_key(state_dir: &Path) -> io::Result<RelayPrivate> {
    let path = state_dir.join("relay.key");
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|error| named(io::Error::new(io::ErrorKind::InvalidData, error))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = RelayPrivate::generate(&mut SystemRng);
            crate::driver::write_private_file(&path, key.to_secret_text().as_bytes()).map_err(named)?;
            Ok(key)
        }
        Err(error) => Err(named(error)),
    }
}

/// Takes the mesh key kept in a file, or makes one and keeps it there, readable by its owner only; says whether it was
/// made. The other relays of the region need a copy of that file.
///
/// # Errors
/// If the file cannot be used or holds no mesh key.
pub fn load_or_generate_mesh_key(path: &Path) -> io::Result<(MeshKey, bool)> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let read = || {
        let text = std::fs::read_to_string(path)?;
        text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    };
    match read() {
        Ok(key) => return Ok((key, false)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(named(error)),
    }
    let key = MeshKey::generate(&mut SystemRng);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    crate::driver::write_private_file(&new, format!("{}\n", key.to_secret_text()).as_bytes()).map_err(named)?;
    // Two relays of one host that are started at once must not each keep a key of their own.
    let linked = std::fs::hard_link(&new, path);
    let _ = std::fs::remove_file(&new);
    match linked {
        Ok(()) => Ok((key, true)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok((read().map_err(named)?, false)),
        Err(error) => Err(named(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mesh_key_is_made_once_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.key");
        let (made, new) = load_or_generate_mesh_key(&path).unwrap();
        assert!(new);
        let (again, new) = load_or_generate_mesh_key(&path).unwrap();
        assert!(!new && again.matches(&made));
        #[cfg(unix)]
        {
            let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
            assert_eq!(mode & 0o777, 0o600);
        }
        for wrong in ["", "12", &"0".repeat(64), &"g".repeat(64)] {
            std::fs::write(&path, wrong).unwrap();
            let error = load_or_generate_mesh_key(&path).unwrap_err().to_string();
            assert!(error.contains("mesh.key: expected 64 hexadecimal digits"), "{error}");
        }
    }

    #[test]
    fn the_key_is_kept_and_damage_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let made = load_or_generate_key(dir.path()).unwrap();
        assert_eq!(load_or_generate_key(dir.path()).unwrap().public(), made.public());
        std::fs::write(dir.path().join("relay.key"), "privkey:12").unwrap();
        let error = load_or_generate_key(dir.path()).unwrap_err().to_string();
        assert!(error.contains("relay.key: expected 64 hexadecimal digits"), "{error}");
    }
}

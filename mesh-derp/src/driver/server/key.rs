//! Where a relay keeps its key.

use std::io;
use std::path::Path;

use mesh_noise::key::RelayPrivate;
use mesh_noise::random::SystemRng;

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

#[cfg(test)]
mod tests {
    use super::*;

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

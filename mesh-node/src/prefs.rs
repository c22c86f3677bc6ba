//! Preferences: what the user has asked for, kept across restarts.

use serde::{Deserialize, Serialize};

/// Which kinds of path may carry a node's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathMode {
    /// Direct when it works, the relay when it does not. The default.
    #[default]
    Auto,
    /// Only relays.
    Relay,
    /// Only direct paths: a peer that cannot be reached directly cannot be reached.
    Direct,
}

impl From<PathMode> for mesh_nat::agent::Mode {
    fn from(mode: PathMode) -> Self {
        match mode {
            PathMode::Auto => Self::Auto,
            PathMode::Relay => Self::Relay,
            PathMode::Direct => Self::Direct,
        }
    }
}

impl std::str::FromStr for PathMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "relay" => Ok(Self::Relay),
            "direct" => Ok(Self::Direct),
            other => Err(format!("expected auto, relay or direct, not {other:?}")),
        }
    }
}

/// What the user has asked for. Stored as `prefs.json` in the state directory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Prefs {
    /// Whether the node should be connected; `mesh up` sets it, `mesh down` clears it.
    pub want_running: bool,
    /// The coordinator's URL.
    pub control_url: Option<String>,
    /// The name to ask for; the system's host name if absent.
    pub hostname: Option<String>,
    /// Which paths may be used.
    pub path_mode: PathMode,
    /// The UDP port on which this node relays for others of its user's, 0 for any; it does not if absent.
    pub relay_server_port: Option<u16>,
}

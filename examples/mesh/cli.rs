//! The command line, as scripts rely on it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use mesh_derp::driver::server::Sibling;
use mesh_derp::map::RegionId;
use mesh_derp::server::Limits;
use mesh_node::acme::{Challenge, LETS_ENCRYPT, Name};
use mesh_node::{coordinator, relay};

/// A private network of your own: node, relay and coordination server in one program.
#[derive(Debug, Parser)]
#[command(name = "mesh", version, propagate_version = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// The daemon's Unix socket, for the commands that talk to one.
    #[arg(long, global = true, env = "MESH_SOCKET", default_value = "/run/mesh/mesh.sock", value_name = "PATH")]
    pub(crate) socket: PathBuf,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Bring up a whole mesh on this host: coordinator, relay, two nodes, and traffic between them.
    Demo(Demo),
    /// Run a coordination server, with a relay and a STUN responder inside.
    Coordinator(Box<Coordinator>),
    /// Run a relay on its own.
    Relay(Box<Relay>),
    /// Run a node; `mesh up` then joins it to a network.
    Daemon(Box<Daemon>),
    /// Administer a coordination server on this host.
    Admin(Admin),
    /// Join a network, or go back to the one left by `down`.
    Up(Up),
    /// Leave the network for now; the node stays registered.
    Down,
    /// Sign in again with a new node key.
    Login(Up),
    /// Sign out: the coordinator forgets this node's key.
    Logout,
    /// Show this node and its peers.
    Status(Status),
    /// Show this node's addresses, or a peer's.
    Ip {
        /// A peer's name or address.
        peer: Option<String>,
    },
    /// Find out how a peer is reached and how long it takes.
    Ping(Ping),
    /// Change a setting of the running node.
    Set(Set),
    /// Look at the network this host is on: UDP, NAT, nearest relay.
    Netcheck(Netcheck),
    /// Print this program's version, and the daemon's.
    Version,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Leave the mesh running until interrupted.
    #[arg(long)]
    pub(crate) keep: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Coordinator {
    /// Where keys, certificate and database live.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
    /// Addresses to accept on, TLS and plain HTTP alike; repeat for IPv4 and IPv6.
    #[arg(long, required = true, value_name = "IP:PORT")]
    pub(crate) listen: Vec<SocketAddr>,
    /// The URL that nodes use to reach this server. Default with --acme: https:// and its first name.
    #[arg(long, required_unless_present = "acme")]
    pub(crate) url: Option<String>,
    /// Addresses of the STUN responder. The next port answers too, unless another one is named here or it is taken: it is
    /// published as a STUN-only node, and shows nodes whether their NAT treats ports of one host alike.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) stun: Vec<SocketAddr>,
    /// The id of the embedded relay's region.
    #[arg(long, default_value_t = coordinator::DEFAULT_REGION, value_name = "N")]
    pub(crate) region_id: RegionId,
    /// Run without the embedded relay (then --derp-map names others).
    #[arg(long)]
    pub(crate) no_relay: bool,
    /// A DERP map (JSON) with further regions; read again on SIGHUP.
    #[arg(long, value_name = "FILE")]
    pub(crate) derp_map: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tls: Tls,
    /// Also publish the relay without certificate check, for test clients that cannot pin.
    #[arg(long)]
    pub(crate) insecure_relay_for_tests: bool,
    #[command(flatten)]
    pub(crate) front: Front,
}

#[derive(Debug, Args)]
pub(crate) struct Tls {
    /// Certificate chain (PEM); read again when it changes and on SIGHUP. Generated and kept in the state directory if not
    /// given.
    #[arg(long, requires = "tls_key", value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, requires = "tls_cert", value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Have a public authority issue and renew a certificate for this name or address; repeat for several. It looks here on
    /// port 443 (TLS) or 80 (HTTP): list both with --listen, unless something in front leads them here.
    #[arg(long, value_name = "DOMAIN", conflicts_with = "tls_cert", requires = "acme_agree_tos")]
    pub(crate) acme: Vec<Name>,
    /// Agree to the authority's terms of service.
    #[arg(long, requires = "acme")]
    pub(crate) acme_agree_tos: bool,
    /// The authority's ACME directory.
    #[arg(long, value_name = "URL", default_value = LETS_ENCRYPT, requires = "acme")]
    pub(crate) acme_directory: String,
    /// Where the authority may write to.
    #[arg(long, value_name = "ADDRESS", requires = "acme")]
    pub(crate) acme_email: Option<String>,
    /// Further certificates (PEM) to trust when talking to the authority.
    #[arg(long, value_name = "FILE", requires = "acme")]
    pub(crate) acme_ca_file: Option<PathBuf>,
    /// Prove names in this way only: tls-alpn-01 or http-01. Default: by the ports listened on, one after the other.
    #[arg(long, value_name = "CHALLENGE", requires = "acme")]
    pub(crate) acme_challenge: Option<Challenge>,
}

#[derive(Debug, Args)]
pub(crate) struct Relay {
    /// Where the relay's key and certificate live.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
    /// Addresses to accept on, TLS and plain HTTP alike. Not needed where systemd passes sockets.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) listen: Vec<SocketAddr>,
    /// Addresses of the STUN responder.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) stun: Vec<SocketAddr>,
    /// The id of this relay's region.
    #[arg(long, default_value_t = relay::DEFAULT_REGION, value_name = "N")]
    pub(crate) region_id: RegionId,
    #[command(flatten)]
    pub(crate) tls: Tls,
    /// Print this relay's DERP-map node, pin included, and exit.
    #[arg(long)]
    pub(crate) print_node: bool,
    /// Ask this URL (http or https) whether a client may connect.
    #[arg(long, value_name = "URL")]
    pub(crate) verify_url: Option<String>,
    /// Let clients in while that URL cannot be reached. Any answer but a yes still turns them away.
    #[arg(long, requires = "verify_url")]
    pub(crate) verify_fail_open: bool,
    /// Only nodes in this file may connect: one nodekey a line, # comments. Followed while the relay runs.
    #[arg(long, value_name = "FILE")]
    pub(crate) allow_list: Option<PathBuf>,
    /// Pass packets on to this other relay of the region; repeat for several. Each relay has to name each other one, and may
    /// name itself: `https://HOST[:PORT][/ADDRESS][#sha256-raw:HEX]`, the pin as --print-node shows it as CertName.
    #[arg(long, value_name = "URL", requires = "mesh_key_file")]
    pub(crate) mesh_with: Vec<Sibling>,
    /// The secret that all relays of the region share. Made if missing; give every other relay a copy.
    #[arg(long, value_name = "FILE")]
    pub(crate) mesh_key_file: Option<PathBuf>,
    /// Further certificates (PEM) to trust in the verify URL and the other relays.
    #[arg(long, value_name = "FILE")]
    pub(crate) ca_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) front: Front,
    /// Send plain HTTP to HTTPS on the first address's port, but for /generate_204, /healthz and /metrics.
    #[arg(long)]
    pub(crate) redirect_http: bool,
    /// Become this user (or UID:GID) once the ports are bound. The state directory is handed over to it; certificate
    /// files have to be readable for it.
    #[arg(long, value_name = "NAME")]
    pub(crate) user: Option<String>,
    /// Do without landlock and seccomp.
    #[arg(long)]
    pub(crate) no_sandbox: bool,
}

/// What stands in front of a relay.
#[derive(Debug, Args)]
pub(crate) struct Front {
    /// A network that may read /metrics, besides this host.
    #[arg(long, value_name = "CIDR")]
    pub(crate) metrics_from: Vec<IpNet>,
    /// Names whose addresses are told at /bootstrap-dns, separated by commas.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) bootstrap_dns_names: Vec<String>,
    /// A proxy that announces its clients with the PROXY protocol, and always has to.
    #[arg(long, value_name = "CIDR")]
    pub(crate) proxy_protocol_from: Vec<IpNet>,
    /// Serve at most so many new connections a second; 0 is no limit.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) accept_limit: u64,
    /// That many may come at once after a silence.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub(crate) accept_burst: u64,
    /// Connections that have not logged in; beyond, the one that is silent longest goes.
    #[arg(long, default_value_t = Limits::default().total, value_name = "N")]
    pub(crate) pending_limit: usize,
    /// The same for one IPv4 address or one IPv6 network of 64 bits.
    #[arg(long, default_value_t = Limits::default().per_source, value_name = "N")]
    pub(crate) pending_limit_per_address: usize,
}

#[derive(Debug, Args)]
pub(crate) struct Daemon {
    /// Where this node's keys and preferences live.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/mesh")]
    pub(crate) state_dir: PathBuf,
    /// Name of the TUN interface, or `userspace` for none. Default: mesh0 with the privilege, else userspace.
    #[arg(long, value_name = "NAME")]
    pub(crate) tun: Option<String>,
    /// The UDP port; 0 takes any.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) port: u16,
    /// Serve a SOCKS5 proxy into the mesh here.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) socks5: Option<SocketAddr>,
    /// Serve an HTTP proxy into the mesh here.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) http_proxy: Option<SocketAddr>,
    /// Further certificate authorities to trust (PEM).
    #[arg(long, value_name = "FILE")]
    pub(crate) ca_file: Option<PathBuf>,
    /// Do not ask the gateway for port mappings.
    #[arg(long)]
    pub(crate) no_portmap: bool,
    /// Do not guess ports where a NAT gives every destination another one.
    #[arg(long)]
    pub(crate) no_port_guessing: bool,
    /// An address at which this node is known to be reachable, e.g. a forwarded port.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) static_endpoint: Vec<SocketAddr>,
    /// Relay UDP for your other nodes on this port, where it can be reached.
    #[arg(long, value_name = "PORT")]
    pub(crate) relay_server_port: Option<u16>,
    /// An address at which that port is known to be reachable.
    #[arg(long, value_name = "IP:PORT", requires = "relay_server_port")]
    pub(crate) relay_server_endpoint: Vec<SocketAddr>,
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// The coordination server.
    #[arg(long, value_name = "URL", env = "MESH_LOGIN_SERVER")]
    pub(crate) login_server: Option<String>,
    /// A pre-authentication key.
    #[arg(long, value_name = "KEY", env = "MESH_AUTH_KEY", hide_env_values = true)]
    pub(crate) auth_key: Option<String>,
    /// This node's name. Default: the host's.
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// How long to wait until the node is up.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
    /// Print JSON, one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Say why packets to this peer take the path that they take: its name or mesh address.
    #[arg(long, value_name = "PEER")]
    pub(crate) why: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Ping {
    /// A peer's name or mesh address.
    pub(crate) peer: String,
    /// How many answers to wait for.
    #[arg(short, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,
    /// Go on until the direct path answers.
    #[arg(long)]
    pub(crate) until_direct: bool,
    /// When to give up.
    #[arg(long, default_value = "10s", value_name = "TIME", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// Size of the probe on the wire in bytes, headers included.
    #[arg(long, value_name = "N")]
    pub(crate) size: Option<usize>,
    /// Print JSON, one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Set {
    /// Which kinds of path data may take.
    #[arg(long, required = true)]
    pub(crate) path: PathMode,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum PathMode {
    /// Direct when there is a direct path, else the relay.
    Auto,
    /// The relay only.
    Relay,
    /// Direct only.
    Direct,
}

#[derive(Debug, Args)]
pub(crate) struct Netcheck {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Measure the regions of this DERP map (JSON); no daemon is needed then.
    #[arg(long, value_name = "FILE")]
    pub(crate) derp_map: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Admin {
    /// The coordinator's state directory; its socket is in there.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
    #[command(subcommand)]
    pub(crate) command: AdminCommand,
    /// How to print.
    #[arg(short, long, global = true, default_value = "text")]
    pub(crate) output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AdminCommand {
    /// The people and services that own nodes.
    #[command(subcommand)]
    Users(UsersCommand),
    /// One-time codes that approve a sign-in on the web page.
    #[command(subcommand)]
    Codes(CodesCommand),
    /// Pre-authentication keys.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// The machines of the network.
    #[command(subcommand)]
    Nodes(NodesCommand),
    /// What the embedded relay has moved and dropped.
    Relay,
}

#[derive(Debug, Subcommand)]
pub(crate) enum UsersCommand {
    /// Add a user.
    Create { name: String },
    /// List the users.
    List,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CodesCommand {
    /// Make a code: good for one sign-in, 10 minutes, 5 tries.
    Create {
        /// Whom the approved node shall belong to. Default: the only user.
        #[arg(long)]
        user: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key. It is shown once and stored hashed.
    Create(KeysCreate),
    /// List the keys, without their secrets.
    List,
}

#[derive(Debug, Args)]
pub(crate) struct KeysCreate {
    /// Whom the nodes shall belong to.
    #[arg(long, value_name = "NAME")]
    pub(crate) user: String,
    /// Let any number of nodes join with it.
    #[arg(long)]
    pub(crate) reusable: bool,
    /// Nodes that joined with it are forgotten when they leave.
    #[arg(long)]
    pub(crate) ephemeral: bool,
    /// Tag the nodes; a tagged node belongs to no user.
    #[arg(long, value_name = "tag:x")]
    pub(crate) tag: Vec<String>,
    /// How long the key can be used.
    #[arg(long, default_value = "24h", value_name = "TIME", value_parser = duration)]
    pub(crate) expiry: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodesCommand {
    /// List the nodes.
    List,
    /// Let a node in that printed a URL.
    Approve {
        /// The URL, or its last part.
        request: String,
        /// Whom the node shall belong to.
        #[arg(long, value_name = "NAME")]
        user: String,
    },
    /// Give a node another name; its addresses stay.
    Rename { node: String, name: String },
    /// Make a node sign in again.
    Expire { node: String },
    /// Forget a node.
    Delete { node: String },
}

/// `500ms`, `30s`, `10m`, `24h` or `7d`; a bare number counts seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| format!("expected a time such as 30s or 24h, not {text:?}"))?;
    let milliseconds = match unit {
        "ms" => Some(number),
        "" | "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        "d" => number.checked_mul(86_400_000),
        _ => return Err(format!("expected a time in ms, s, m, h or d, not {text:?}")),
    };
    milliseconds.map(Duration::from_millis).ok_or_else(|| format!("{text:?} is longer than this program counts"))
}

/// Whether `text` names a peer by address.
pub(crate) fn as_address(text: &str) -> Option<IpAddr> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(duration("7"), Ok(Duration::from_secs(7)));
        for bad in ["", "s", "1y", "-1s", "99999999999999999999s", "9999999999999999999d"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_interface_that_scripts_rely_on_parses() {
        for line in [
            "mesh coordinator --state-dir d --listen 203.0.113.1:80 --listen [2001:db8::1]:80 --url http://203.0.113.1 --stun 203.0.113.1:3478 --region-id 5 --no-relay --derp-map f --tls-cert c --tls-key k --insecure-relay-for-tests",
            "mesh relay --state-dir d --listen 203.0.113.1:443 --stun 203.0.113.1:3478 --print-node --verify-url https://x/verify --verify-fail-open --allow-list f --mesh-with https://b.example:444/192.0.2.7 --mesh-with https://c.example --mesh-key-file k --ca-file c",
            "mesh relay --state-dir d --listen 203.0.113.1:443 --metrics-from 10.0.0.0/8 --bootstrap-dns-names a.example,b.example --proxy-protocol-from 10.1.0.0/16 --accept-limit 500 --accept-burst 1000 --pending-limit 8192 --pending-limit-per-address 2048 --redirect-http --user mesh --no-sandbox",
            "mesh daemon --state-dir d --socket s --tun userspace --port 41641 --socks5 127.0.0.1:1080 --http-proxy 127.0.0.1:8080 --ca-file f --no-portmap --no-port-guessing --static-endpoint 203.0.113.1:4 --relay-server-port 7777 --relay-server-endpoint 203.0.113.1:7777",
            "mesh admin --state-dir d users create alice",
            "mesh admin --state-dir d codes create -o json",
            "mesh admin --state-dir d keys create --user alice --reusable --ephemeral --tag tag:x --expiry 24h -o json",
            "mesh admin --state-dir d nodes list -o json",
            "mesh admin --state-dir d nodes approve http://x/register/abc --user alice",
            "mesh --socket s up --login-server http://203.0.113.1 --auth-key k --hostname h --timeout 30s --json",
            "mesh --socket s status --json",
            "mesh --socket s status --why peer",
            "mesh --socket s ip",
            "mesh --socket s netcheck --json",
            "mesh --socket s down",
            "mesh --socket s logout",
            "mesh --socket s set --path relay",
            "mesh --socket s ping peer -c 3 --until-direct --timeout 10s --size 1200 --json",
            "mesh netcheck --json --derp-map f",
            "mesh demo --keep",
        ] {
            if let Err(error) = Cli::try_parse_from(line.split_whitespace()) {
                panic!("{line}: {error}");
            }
        }
    }
}

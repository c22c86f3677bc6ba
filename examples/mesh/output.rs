//! What people read. Everything here returns text; the commands print it.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};

use comfy_table::{Table, presets};
use mesh_node::local_api::Via;
use mesh_node::netcheck::NetcheckReport;
use mesh_node::status::{NodeState, PathKind, PathStatus, PeerStatus, PortMappingStatus, Status};
use qrcode::QrCode;
use qrcode::render::unicode;

/// Standard output cannot be written to.
#[derive(Debug)]
pub(crate) struct StdoutError(pub(crate) std::io::Error);

impl std::fmt::Display for StdoutError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot write to standard output: {}", self.0)
    }
}

impl std::error::Error for StdoutError {}

/// Prints a line, or several, at once.
pub(crate) fn print(text: &str) -> Result<(), StdoutError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(StdoutError)
}

/// One line that tells an error and its causes, each once: many messages quote their cause already.
pub(crate) fn error(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line.push_str(": ");
            line.push_str(&cause);
        }
    }
    line
}

/// A node's state in a few words.
#[expect(clippy::wildcard_enum_match_arm, reason = "states that this program does not know print as they are")]
pub(crate) fn state(state: &NodeState) -> String {
    match state {
        NodeState::Stopped { error: None } => "stopped; `mesh up` starts it".to_owned(),
        NodeState::Stopped { error: Some(error) } => format!("stopped: {error}"),
        NodeState::NeedsLogin { url } => format!("waiting for approval at {url}"),
        NodeState::Starting { error: None, .. } => "starting".to_owned(),
        NodeState::Starting { error: Some(error), .. } => format!("starting; last failure: {error}"),
        NodeState::Running => "running".to_owned(),
        other => format!("{other:?}"),
    }
}

/// Shows where to approve this node, as text and as a QR code.
pub(crate) fn sign_in(url: &str) -> anyhow::Result<()> {
    let mut code = QrCode::new(url)?.render::<unicode::Dense1x2>().quiet_zone(true).build();
    if std::io::stdout().is_terminal() {
        // Black on white whatever the terminal's colours are: not every camera reads an inverted code.
        let lines: Vec<String> = code.lines().map(|line| format!("\x1b[38;5;16;48;5;231m{line}\x1b[0m")).collect();
        code = lines.join("\n");
    }
    Ok(print(&format!("To let this node in, open\n\n    {url}\n\n{code}\n"))?)
}

/// The table of `mesh status`.
pub(crate) fn status(status: &Status) -> String {
    let mut text = String::new();
    let this = &status.this;
    if this.name.is_empty() {
        let _ = writeln!(text, "this node is {}", state(&status.state));
    } else {
        let addresses: Vec<String> = this.addresses.iter().map(ToString::to_string).collect();
        let _ = writeln!(text, "{} is {}: {}", this.name, state(&status.state), addresses.join(", "));
        let relay = match (this.home_region, this.relay_connected) {
            (Some(region), true) => format!("relay region {region}"),
            (Some(region), false) => format!("relay region {region} (not connected)"),
            (None, _) => "no relay yet".to_owned(),
        };
        let control = match (&status.state, status.control_connected) {
            (NodeState::NeedsLogin { .. }, _) => "signed out by the coordinator",
            (_, true) => "coordinator connected",
            (_, false) => "coordinator out of reach",
        };
        let _ = writeln!(text, "{} device, UDP port {}, {relay}, {control}", this.device, this.port);
        text.push_str(&port_mapping(&this.port_mapping));
    }
    for warning in &status.health {
        let _ = writeln!(text, "warning: {warning}");
    }
    if !status.peers.is_empty() {
        text.push('\n');
        text.push_str(&peers(&status.peers));
    }
    text.trim_end().to_owned()
}

/// What the gateway has given, in a line or two; nothing if it was not asked.
fn port_mapping(mapping: &PortMappingStatus) -> String {
    let mut text = String::new();
    match (mapping.external, &mapping.protocol, &mapping.problem) {
        (Some(external), Some(protocol), _) if mapping.double_nat => {
            let _ = writeln!(
                text,
                "port mapping: {external} by {protocol}, of no use to peers: there is another NAT outside"
            );
        }
        (Some(external), Some(protocol), _) => {
            let _ = writeln!(text, "port mapping: {external} by {protocol}");
        }
        (_, _, Some(problem)) => {
            let _ = writeln!(text, "port mapping: none, {problem}");
        }
        _ => {}
    }
    if let Some(pinhole) = mapping.pinhole {
        let _ = writeln!(text, "IPv6 firewall: open for {pinhole}");
    }
    text
}

/// The table of peers.
pub(crate) fn peers(peers: &[PeerStatus]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["ADDRESS", "NAME", "OWNER", "OS", "PATH", "HANDSHAKE", "RECEIVED", "SENT"]);
    for peer in peers {
        table.add_row([
            peer.addresses.first().map_or_else(|| "-".to_owned(), ToString::to_string),
            peer.name.split('.').next().unwrap_or(&peer.name).to_owned(),
            peer.owner.clone().unwrap_or_else(|| "-".to_owned()),
            peer.os.clone().unwrap_or_else(|| "-".to_owned()),
            peer_path(peer),
            peer.last_handshake.map_or_else(|| "never".to_owned(), since),
            bytes(peer.rx_bytes),
            bytes(peer.tx_bytes),
        ]);
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim().to_owned()).collect();
    lines.join("\n")
}

fn peer_path(peer: &PeerStatus) -> String {
    if peer.online == Some(false) { "offline".to_owned() } else { path(&peer.path) }
}

/// Why packets to one peer go where they go: `mesh status --why`.
pub(crate) fn why(peer: &PeerStatus) -> String {
    let mut text = format!("{}: {}", peer.name.split('.').next().unwrap_or(&peer.name), peer_path(peer));
    let Some(why) = &peer.why else {
        text.push_str(", no more is known yet");
        return text;
    };
    let _ = write!(text, ", because {}", why.reason);
    let _ = write!(text, "\nchanged {}", since(why.since));
    if let Some(ms) = why.rtt_ms {
        let _ = write!(text, ", round trip {ms:.1} ms");
    }
    match why.mtu {
        Some(bytes) => drop(write!(text, ", packets of up to {bytes} bytes")),
        None => text.push_str(", packets of any length that the device has"),
    }
    let _ = write!(text, ", {} addresses known", why.candidates);
    text
}

/// A path in two words.
pub(crate) fn path(path: &PathStatus) -> String {
    let endpoint = || path.endpoint.map_or_else(String::new, |endpoint| endpoint.to_string());
    match path.kind {
        PathKind::None => "none".to_owned(),
        PathKind::Direct => format!("direct {}", endpoint()),
        PathKind::PeerRelay => format!("peer relay {}", endpoint()),
        PathKind::Relay => path.region.map_or_else(|| "relay".to_owned(), |region| format!("relay region {region}")),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// The way that a probe took.
pub(crate) fn via(via: &Via) -> String {
    match via {
        Via::Direct { endpoint } => format!("directly from {endpoint}"),
        Via::PeerRelay { endpoint } => format!("through the peer relay {endpoint}"),
        Via::Relay { region } => format!("through relay region {region}"),
    }
}

/// The report of `mesh netcheck`.
pub(crate) fn netcheck(report: &NetcheckReport) -> String {
    let yes_no = |known: bool| if known { "yes" } else { "no" };
    let mut text = String::new();
    for (family, works, address) in [("IPv4", report.ipv4, report.global_v4), ("IPv6", report.ipv6, report.global_v6)] {
        match address {
            Some(address) => drop(writeln!(text, "{family}: yes, seen as {address}")),
            None => drop(writeln!(text, "{family}: {}", yes_no(works))),
        }
    }
    for line in report.words() {
        let _ = writeln!(text, "{line}");
    }
    let gateway = &report.port_mapping;
    let spoken = [("PCP", gateway.pcp), ("NAT-PMP", gateway.nat_pmp), ("UPnP", gateway.upnp)];
    if spoken.iter().any(|(_, spoken)| spoken.is_some()) {
        let names: Vec<_> = spoken.iter().filter(|(_, spoken)| *spoken == Some(true)).map(|(name, _)| *name).collect();
        let names = if names.is_empty() { "none of PCP, NAT-PMP, UPnP".to_owned() } else { names.join(", ") };
        let _ = writeln!(text, "the gateway speaks: {names}");
    }
    text.push_str(&port_mapping(gateway));
    if report.region_latency_ms.is_empty() {
        text.push_str("no relay answered");
    }
    for (region, ms) in &report.region_latency_ms {
        let mark = if report.preferred_region == Some(*region) { "  (nearest)" } else { "" };
        let _ = writeln!(text, "relay region {region}: {ms:.1} ms{mark}");
    }
    text.trim_end().to_owned()
}

/// A number of bytes with a unit, as people count: `1.5 MB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if count < 1000 {
        return format!("{count} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
    let mut value = count as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// How long ago a second since 1970 was.
#[expect(clippy::disallowed_methods, reason = "the table says how long ago things were")]
fn since(seconds: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let ago = now.saturating_sub(seconds);
    match ago {
        0..=119 => format!("{ago} s ago"),
        120..=7199 => format!("{} min ago", ago / 60),
        _ => format!("{} h ago", ago / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_as_people_do() {
        for (count, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (1_500_000, "1.5 MB"),
            (999_960, "1.0 MB"),
            (12_300_000_000, "12.3 GB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn a_port_mapping_is_told_with_what_it_is_worth() {
        let mut mapping = PortMappingStatus::default();
        assert_eq!(port_mapping(&mapping), "");
        mapping.problem = Some("the gateway speaks neither PCP nor NAT-PMP nor UPnP".to_owned());
        assert_eq!(port_mapping(&mapping), "port mapping: none, the gateway speaks neither PCP nor NAT-PMP nor UPnP\n");
        mapping.external = Some("203.0.113.5:41641".parse().unwrap());
        mapping.protocol = Some("PCP".to_owned());
        assert_eq!(port_mapping(&mapping), "port mapping: 203.0.113.5:41641 by PCP\n");
        mapping.double_nat = true;
        assert!(port_mapping(&mapping).contains("another NAT"));
    }

    #[test]
    fn a_sign_in_url_fits_a_qr_code() {
        assert!(QrCode::new("https://coordinator.example.org:8443/register/0123456789abcdef0123456789abcdef").is_ok());
    }
}

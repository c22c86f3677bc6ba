//! Ordinary programs that put traffic on a network: ping, curl, iperf3 and a web server.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;

use super::{Host, Process};

/// What a host's own counters say of UDP at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UdpSample {
    /// Seconds, from whenever.
    pub(crate) at: f64,
    /// Open sockets over IPv4.
    pub(crate) sockets: usize,
    /// Datagrams sent since the host was made.
    pub(crate) sent: u64,
}

/// Looks at them ten times a second.
pub(crate) struct UdpWatch(Process);

impl UdpWatch {
    const PROGRAM: &str = "import time
while True:
    udp = open('/proc/net/snmp').read().split('Udp: ')[2].split()
    sockets = open('/proc/net/udp').read().count('\\n') - 1
    print(time.monotonic(), sockets, udp[3], flush=True)
    time.sleep(0.1)";

    pub(crate) fn start(host: &Host) -> Self {
        Self(host.spawn("udp", host.command("python3").args(["-c", Self::PROGRAM])))
    }

    /// All that was seen so far, oldest first.
    pub(crate) fn samples(&self) -> Vec<UdpSample> {
        let sample = |line: &str| {
            let mut fields = line.split(' ');
            Some(UdpSample {
                at: fields.next()?.parse().ok()?,
                sockets: fields.next()?.parse().ok()?,
                sent: fields.next()?.parse().ok()?,
            })
        };
        self.0.log().lines().filter_map(sample).collect()
    }
}

/// Sends pings and returns how many were answered.
pub(crate) fn ping(host: &Host, to: &str, count: u32, interval: &str) -> u32 {
    let outcome = host.try_sh(&format!("ping -n -q -c {count} -i {interval} -W 2 {to}"));
    let text = String::from_utf8_lossy(&outcome.stdout).into_owned();
    let received = text.split(", ").find_map(|part| part.strip_suffix(" received"));
    received.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("ping said:\n{text}"))
}

/// Moves bytes over TCP and returns the last part of iperf3's report.
pub(crate) fn iperf3(from: &Host, to: &Host, address: &str, how: &str) -> Value {
    // A log of its own, so that the line waited for is this server's.
    static SERVERS: AtomicUsize = AtomicUsize::new(0);
    let name = format!("iperf3-{}", SERVERS.fetch_add(1, Ordering::Relaxed));
    let mut server = to.spawn(&name, to.command("iperf3").args(["-s", "-1", "--forceflush"]));
    server.wait_line("Server listening", Duration::from_secs(5));
    let report = from.sh(&format!("iperf3 -c {address} -J {how}"));
    serde_json::from_str::<Value>(&report).unwrap()["end"].take()
}

/// Serves one file by HTTP on every address of a host, port 8000.
pub(crate) fn serve(host: &Host, name: &str, body: &[u8]) -> Process {
    let directory = host.dir().join("www");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join(name), body).unwrap();
    let mut command = host.command("python3");
    command.args(["-u", "-m", "http.server", "8000", "--bind", "::", "--directory"]).arg(&directory);
    let mut server = host.spawn("http", &mut command);
    server.wait_line("Serving", Duration::from_secs(20));
    server
}

/// Runs curl with these arguments, ten seconds at most, and returns what it printed, or its complaint.
pub(crate) fn fetch(host: &Host, line: &str) -> Result<String, String> {
    let output = host.try_sh(&format!("curl -g -sS --fail --max-time 10 {line}"));
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Fetches what must be `size` bytes within `seconds`, and returns how long that took.
pub(crate) fn download(host: &Host, url: &str, size: usize, seconds: u32) -> Duration {
    let line = format!("--max-time {seconds} -o /dev/null -w '%{{size_download}} %{{time_total}}' {url}");
    let said = fetch(host, &line).unwrap();
    let (got, took) = said.split_once(' ').expect("two figures");
    assert_eq!(got, size.to_string());
    Duration::from_secs_f64(took.parse().expect("seconds"))
}

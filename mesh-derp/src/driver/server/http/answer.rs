//! The answers themselves.

use std::net::SocketAddr;

use super::super::RelayServer;
use crate::metrics;
use crate::upgrade::{self, RequestHead};

/// What an answer depends on besides the request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circumstances {
    pub(super) peer: SocketAddr,
    pub(super) tls: bool,
    /// Our address it came to.
    pub(super) local: SocketAddr,
    /// Whether the connection may ask again.
    pub(super) keep: bool,
}

/// The bytes of the answer to a request.
pub(super) fn to(relay: &RelayServer, head: &RequestHead, about: &Circumstances) -> Vec<u8> {
    let head_only = head.method == "HEAD";
    let reading = head_only || head.method == "GET";
    let connection = ("Connection", if about.keep { "keep-alive" } else { "close" });
    let text = ("Content-Type", "text/plain; charset=utf-8");
    let plain =
        |status: u16, reason: &str, body: &str| upgrade::response(status, reason, &[text, connection], body, head_only);
    match head.path() {
        "/generate_204" => generate_204(head, connection),
        "/healthz" if relay.is_ending() => plain(503, "Service Unavailable", "about to end\n"),
        "/healthz" => plain(200, "OK", "ok\n"),
        "/metrics" if !relay.may_see_metrics(head, about.peer) => {
            plain(403, "Forbidden", "for this host and the networks of --metrics-from only\n")
        }
        "/metrics" => {
            let kind = ("Content-Type", metrics::CONTENT_TYPE);
            upgrade::response(200, "OK", &[kind, connection], &relay.metrics(), head_only)
        }
        _ if !about.tls
            && let Some(port) = relay.config.public.redirect_plain_to =>
        {
            let place = secure_place(head, about.local, port);
            upgrade::response(302, "Found", &[("Location", &place), text, connection], "use https\n", head_only)
        }
        "/derp" => plain(426, "Upgrade Required", "DERP requires an upgrade\n"),
        "/derp/probe" | "/derp/latency-check" if reading => {
            upgrade::response(200, "OK", &[("Access-Control-Allow-Origin", "*"), connection], "", head_only)
        }
        "/derp/probe" | "/derp/latency-check" => plain(405, "Method Not Allowed", "GET or HEAD only\n"),
        "/bootstrap-dns" if let Some(dns) = &relay.config.public.bootstrap_dns => {
            let kind = ("Content-Type", "application/json");
            upgrade::response(200, "OK", &[kind, connection], &dns.answer(head.query()), head_only)
        }
        "/robots.txt" => plain(200, "OK", "User-agent: *\nDisallow: /\n"),
        "/" => {
            let kind = ("Content-Type", "text/html; charset=utf-8");
            upgrade::response(200, "OK", &[kind, connection], &relay.page(), head_only)
        }
        _ => plain(404, "Not Found", "not found\n"),
    }
}

fn generate_204(head: &RequestHead, connection: (&str, &str)) -> Vec<u8> {
    let echo = head.header("x-tailscale-challenge").filter(|challenge| is_challenge(challenge));
    let echo = echo.map(|challenge| format!("response {challenge}"));
    let mut headers =
        vec![("Cache-Control", "no-cache, no-store, must-revalidate, no-transform, max-age=0"), connection];
    if let Some(echo) = &echo {
        headers.push(("X-Tailscale-Response", echo));
    }
    upgrade::response(204, "No Content", &headers, "", true)
}

/// The same place over HTTPS. Our own address stands for a host that is not named, or not properly.
fn secure_place(head: &RequestHead, local: SocketAddr, port: u16) -> String {
    let proper =
        |host: &&str| !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-[]:".contains(&b));
    let own = SocketAddr::new(local.ip(), port).to_string();
    let host = head.header("host").filter(proper).unwrap_or(&own);
    let name = match host.rsplit_once(':') {
        Some((name, digits)) if digits.bytes().all(|b| b.is_ascii_digit()) => name,
        Some(_) | None => host,
    };
    let query = head.query().map(|query| format!("?{query}")).unwrap_or_default();
    let port = if port == 443 { String::new() } else { format!(":{port}") };
    let target = format!("{}{query}", head.path());
    let target: String = target.chars().filter(char::is_ascii_graphic).collect();
    format!("https://{name}{port}{target}")
}

fn is_challenge(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secure_place_keeps_host_path_and_query() {
        let local = "192.0.2.1:80".parse().unwrap();
        let place = |host: &str, target: &str, port| {
            let text = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            secure_place(&upgrade::parse_request(text.as_bytes()).unwrap().unwrap().0, local, port)
        };
        assert_eq!(place("relay.example", "/x?y=1", 443), "https://relay.example/x?y=1");
        assert_eq!(place("relay.example:80", "/", 3443), "https://relay.example:3443/");
        assert_eq!(place("[2001:db8::1]:80", "/", 443), "https://[2001:db8::1]/");
        assert_eq!(place("[2001:db8::1]", "/", 443), "https://[2001:db8::1]/");
        assert_eq!(place("a/b", "/", 443), "https://192.0.2.1/");
        assert_eq!(place("", "/", 443), "https://192.0.2.1/");
    }

    #[test]
    fn challenges_are_filtered() {
        assert!(is_challenge("ts_relay.example:443-x".replace('_', "-").as_str()));
        assert!(!is_challenge("") && !is_challenge("a b") && !is_challenge(&"a".repeat(65)));
    }
}

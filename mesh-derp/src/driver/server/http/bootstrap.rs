//! `/bootstrap-dns`: addresses of a few names, for nodes whose resolver is broken.
//!
//! ```text
//! GET /bootstrap-dns?q=control.example     {"control.example":["203.0.113.5","2001:db8::5"]}
//! ```
//!
//! The names are the operator's choice. Without `q`, or with one that is not among them, all of them are told. The order of
//! the addresses changes with every look-up, so that those who take the first do not all take the same.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use mesh_noise::random::SystemRng;
use rand_core::Rng;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// How often the names are looked up, and how long one may take (derp.md §12).
const REFRESH: Duration = Duration::from_secs(10 * 60);
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(60);

/// Names and what they stood for when last looked up.
#[derive(Debug)]
pub struct BootstrapDns {
    names: Vec<String>,
    found: RwLock<BTreeMap<String, Vec<IpAddr>>>,
}

impl BootstrapDns {
    /// These names, not looked up yet.
    #[must_use]
    pub fn new(names: Vec<String>) -> Self {
        Self { names, found: RwLock::default() }
    }

    /// Looks the names up now and every ten minutes, for as long as it is polled.
    pub async fn run(&self) -> Infallible {
        let mut ticks = interval(REFRESH);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            for name in &self.names {
                match timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((name.as_str(), 0))).await {
                    Ok(Ok(found)) => self.set(name, found.map(|address| address.ip()).collect()),
                    // What was found before is still the best guess.
                    Ok(Err(error)) => tracing::warn!(%name, %error, "cannot look up a name of --bootstrap-dns-names"),
                    Err(_) => tracing::warn!(%name, "looking up a name of --bootstrap-dns-names takes too long"),
                }
            }
        }
    }

    fn set(&self, name: &str, mut addresses: Vec<IpAddr>) {
        addresses.sort_unstable();
        addresses.dedup();
        shuffle(&mut addresses);
        self.found.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), addresses);
    }

    /// What is told to someone who asks with this query.
    pub(super) fn answer(&self, query: Option<&str>) -> String {
        let found = self.found.read().unwrap_or_else(PoisonError::into_inner);
        let asked = query.and_then(|query| query.split('&').find_map(|part| part.strip_prefix("q=")));
        let json = match asked.and_then(|name| found.get_key_value(name)) {
            Some((name, addresses)) => serde_json::to_string(&BTreeMap::from([(name, addresses)])),
            None => serde_json::to_string(&*found),
        };
        json.unwrap_or_else(|_| "{}".to_owned())
    }
}

fn shuffle(addresses: &mut [IpAddr]) {
    for last in (1..addresses.len()).rev() {
        let other = SystemRng.next_u64() % (last as u64 + 1);
        addresses.swap(last, usize::try_from(other).unwrap_or(last));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_is_told_on_request_and_all_otherwise() {
        let dns = BootstrapDns::new(vec!["a.example".to_owned(), "b.example".to_owned()]);
        assert_eq!(dns.answer(None), "{}");
        dns.set("a.example", vec!["203.0.113.5".parse().unwrap(), "203.0.113.5".parse().unwrap()]);
        dns.set("b.example", vec!["2001:db8::5".parse().unwrap()]);
        let all = r#"{"a.example":["203.0.113.5"],"b.example":["2001:db8::5"]}"#;
        assert_eq!(dns.answer(None), all);
        assert_eq!(dns.answer(Some("q=c.example")), all);
        assert_eq!(dns.answer(Some("x=1&q=a.example")), r#"{"a.example":["203.0.113.5"]}"#);
    }

    #[test]
    fn shuffling_loses_nothing_and_reaches_every_order() {
        let sorted: Vec<IpAddr> = (1..=3).map(|n| IpAddr::from([192, 0, 2, n])).collect();
        let mut orders = std::collections::BTreeSet::new();
        for _ in 0..500 {
            let mut addresses = sorted.clone();
            shuffle(&mut addresses);
            orders.insert(addresses.clone());
            addresses.sort_unstable();
            assert_eq!(addresses, sorted);
        }
        assert_eq!(orders.len(), 6);
    }

    #[tokio::test]
    async fn names_are_looked_up_at_once() {
        let dns = BootstrapDns::new(vec!["localhost".to_owned()]);
        tokio::select! {
            never = dns.run() => match never {},
            () = async {
                while dns.answer(None) == "{}" {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            } => {}
        }
        assert!(dns.answer(Some("q=localhost")).contains("127.0.0.1") || dns.answer(None).contains("::1"));
    }
}

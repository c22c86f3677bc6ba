//! The text that Prometheus reads, as one document ([exposition format
//! 0.0.4](https://prometheus.io/docs/instrumenting/exposition_formats/)).
//!
//! ```text
//! # HELP derp_packets_dropped Packets dropped, by reason.
//! # TYPE derp_packets_dropped counter
//! derp_packets_dropped{reason="unknown_dest"} 3
//! ```
//!
//! Names follow those of the relays in use, `derp_` and `stun_`, where the meaning is the same, so that existing dashboards
//! go on working. `METRICS.md` lists them all.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

/// The media type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whether a number may fall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows, from 0 at the start.
    Counter,
    /// It says how things are now.
    Gauge,
}

/// What one number means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Its name: `derp_accepts`.
    pub name: &'static str,
    /// Tells apart numbers of one name: `reason="unknown_dest",kind="disco"`. Empty for most.
    pub labels: &'static str,
    /// Whether it may fall.
    pub kind: Kind,
    /// A sentence for people.
    pub help: &'static str,
}

/// Whatever has numbers to show.
pub trait Source: fmt::Debug + Send + Sync {
    /// Adds them.
    fn expose(&self, text: &mut Exposition);
}

#[derive(Debug)]
struct Family {
    kind: Kind,
    help: &'static str,
    samples: String,
}

/// A document in the making. Numbers of one name stand together, whatever the order in which they are added.
#[derive(Debug, Default)]
pub struct Exposition {
    families: BTreeMap<&'static str, Family>,
}

impl Exposition {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a number.
    pub fn add(&mut self, metric: Metric, value: impl fmt::Display) {
        let Metric { name, labels, kind, help } = metric;
        let family = self.families.entry(name).or_insert(Family { kind, help, samples: String::new() });
        // Into a string; cannot fail.
        let _ = if labels.is_empty() {
            writeln!(family.samples, "{name} {value}")
        } else {
            writeln!(family.samples, "{name}{{{}}} {value}", labels.trim_end_matches(','))
        };
    }

    /// The text.
    #[must_use]
    pub fn finish(self) -> String {
        let mut text = String::new();
        for (name, Family { kind, help, samples }) in self.families {
            let kind = match kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
            };
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{samples}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_one_name_stand_together() {
        let dropped = |labels| Metric { name: "b_dropped", labels, kind: Kind::Counter, help: "Dropped." };
        let mut text = Exposition::new();
        text.add(dropped("reason=\"x\""), 1);
        text.add(Metric { name: "a_open", labels: "", kind: Kind::Gauge, help: "Open." }, 2);
        text.add(dropped("reason=\"y\""), 3);
        text.add(Metric { name: "c_seconds", labels: "", kind: Kind::Gauge, help: "Time." }, 0.25);
        assert_eq!(
            text.finish(),
            "# HELP a_open Open.\n# TYPE a_open gauge\na_open 2\n\
             # HELP b_dropped Dropped.\n# TYPE b_dropped counter\nb_dropped{reason=\"x\"} 1\nb_dropped{reason=\"y\"} 3\n\
             # HELP c_seconds Time.\n# TYPE c_seconds gauge\nc_seconds 0.25\n"
        );
    }
}

//! Counters that say themselves what they are called in `/metrics`.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter. Relaxed: nothing is decided by it.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Makes a public struct of numbers and the private one in which they are counted. Each number has a name and labels for
/// Prometheus; its documentation is the help text there.
macro_rules! counters {
    (
        $(#[$struct_doc:meta])* pub $public:ident, $atomics:ident:
        $($(#[doc = $doc:literal])+ $name:ident => $kind:ident $metric:literal $({ $($label:ident = $value:literal),+ })?),+ $(,)?
    ) => {
        #[derive(Debug, Default)]
        pub(crate) struct $atomics {
            $(pub(crate) $name: $crate::driver::counter::Count,)+
        }

        $(#[$struct_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
        #[non_exhaustive]
        pub struct $public {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl $atomics {
            pub(crate) fn snapshot(&self) -> $public {
                $public { $($name: self.$name.get(),)+ }
            }
        }

        impl $public {
            /// Adds the numbers to those that Prometheus reads.
            pub fn expose(&self, text: &mut $crate::metrics::Exposition) {
                $(text.add(
                    $crate::metrics::Metric {
                        name: $metric,
                        labels: concat!($($(stringify!($label), "=\"", $value, "\","),+)?),
                        kind: $crate::driver::counter::kinds::$kind,
                        help: concat!($($doc),+).trim_ascii(),
                    },
                    self.$name,
                );)+
            }
        }
    };
}

/// The words of the macro.
#[expect(non_upper_case_globals, reason = "words of the macro's own language")]
pub(crate) mod kinds {
    use crate::metrics::Kind;

    pub(crate) const counter: Kind = Kind::Counter;
    pub(crate) const gauge: Kind = Kind::Gauge;
}

pub(crate) use counters;

//! How long something took, over many runs.

use std::fmt;
use std::time::Duration;

/// Times in order; runs in which it never happened come last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Curve(Vec<Option<Duration>>);

impl FromIterator<Option<Duration>> for Curve {
    fn from_iter<T: IntoIterator<Item = Option<Duration>>>(times: T) -> Self {
        let mut times: Vec<_> = times.into_iter().collect();
        times.sort_by_key(|time| time.unwrap_or(Duration::MAX));
        Self(times)
    }
}

impl Curve {
    /// How many runs there were.
    #[must_use]
    pub const fn runs(&self) -> usize {
        self.0.len()
    }

    /// The time within which this share of all runs was done, from 0 to 1; `None` if that never happened.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a small number")]
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let rank = (self.0.len() as f64 * share).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).copied().flatten()
    }

    /// The median.
    #[must_use]
    pub fn median(&self) -> Option<Duration> {
        self.quantile(0.5)
    }

    /// The longest time.
    #[must_use]
    pub fn slowest(&self) -> Option<Duration> {
        self.quantile(1.0)
    }

    /// The share of all runs that were done within `limit`.
    #[must_use]
    pub fn within(&self, limit: Duration) -> f64 {
        let done = self.0.iter().flatten().filter(|time| **time <= limit).count();
        done as f64 / self.0.len().max(1) as f64
    }
}

impl fmt::Display for Curve {
    /// Median, 90, 99 and 100 per cent.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (share, name) in [(0.5, "median"), (0.9, "p90"), (0.99, "p99"), (1.0, "slowest")] {
            let separator = if share < 1.0 { ", " } else { "" };
            match self.quantile(share) {
                Some(time) => write!(f, "{name} {:.3} s{separator}", time.as_secs_f64())?,
                None => write!(f, "{name} never{separator}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_count_runs_that_never_ended_as_the_slowest() {
        let times = [None, Some(3), Some(1), Some(2)].map(|time| time.map(Duration::from_secs));
        let curve: Curve = times.into_iter().collect();
        assert_eq!(curve.median(), Some(Duration::from_secs(2)));
        assert_eq!((curve.quantile(0.75), curve.slowest()), (Some(Duration::from_secs(3)), None));
        assert!((curve.within(Duration::from_secs(2)) - 0.5).abs() < 1e-9);
        assert_eq!(curve.to_string(), "median 2.000 s, p90 never, p99 never, slowest never");
    }
}

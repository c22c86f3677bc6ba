//! What a wire does to datagrams.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;

/// One direction of a wire; both directions are alike. The default does nothing to what it carries.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// How long every datagram takes.
    pub delay: Duration,
    /// How much longer it may take, evenly distributed and drawn anew for each, so that later ones overtake earlier ones.
    pub jitter: Duration,
    /// How likely a datagram is lost, from 0 to 1.
    pub loss: f64,
    /// The longest IP packet in bytes; longer ones vanish without notice.
    pub mtu: usize,
}

impl Default for Link {
    fn default() -> Self {
        Self { delay: Duration::ZERO, jitter: Duration::ZERO, loss: 0.0, mtu: 1500 }
    }
}

impl Link {
    /// A link that only delays.
    #[must_use]
    pub fn with_delay(delay: Duration) -> Self {
        Self { delay, ..Self::default() }
    }

    /// How long a packet of `length` bytes takes; `None` if it does not arrive.
    pub(super) fn carry(&self, rng: &mut StdRng, length: usize) -> Option<Duration> {
        let lost = self.loss > 0.0 && rng.random_bool(self.loss.clamp(0.0, 1.0));
        (!lost && length <= self.mtu).then(|| self.delay + self.draw(rng))
    }

    fn draw(&self, rng: &mut StdRng) -> Duration {
        if self.jitter.is_zero() { Duration::ZERO } else { self.jitter.mul_f64(rng.random_range(0.0..1.0)) }
    }

    /// Two links one after the other.
    pub(super) fn then(self, next: Self) -> Self {
        Self {
            delay: self.delay + next.delay,
            jitter: self.jitter + next.jitter,
            loss: 1.0 - (1.0 - self.loss) * (1.0 - next.loss),
            mtu: self.mtu.min(next.mtu),
        }
    }

    /// How long a segment of a stream takes: one that is lost is sent again, later each time (RFC 6298 §5.5).
    pub(super) fn carry_reliably(&self, rng: &mut StdRng) -> Duration {
        /// The least wait before a lost segment is repeated on the systems that matter.
        const LEAST_TIMEOUT: Duration = Duration::from_millis(200);
        let mut timeout = LEAST_TIMEOUT + self.delay * 2;
        let mut took = self.delay + self.draw(rng);
        for _ in 0..10 {
            if self.loss <= 0.0 || !rng.random_bool(self.loss.clamp(0.0, 1.0)) {
                break;
            }
            took += timeout;
            timeout *= 2;
        }
        took
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn loss_delay_and_length_are_as_set() {
        let mut rng = StdRng::seed_from_u64(1);
        let link = Link { loss: 0.1, ..Link::with_delay(Duration::from_millis(5)) };
        let arrived = (0..10_000).filter_map(|_| link.carry(&mut rng, 1500)).collect::<Vec<_>>();
        assert!((8_850..9_150).contains(&arrived.len()), "{}", arrived.len());
        assert!(arrived.iter().all(|took| *took == Duration::from_millis(5)));
        assert_eq!(link.carry(&mut rng, 1501), None);
    }

    #[test]
    fn a_lost_segment_arrives_later() {
        let mut rng = StdRng::seed_from_u64(1);
        let link = Link { loss: 0.5, ..Link::with_delay(Duration::from_millis(20)) };
        let took: Vec<_> = (0..1000).map(|_| link.carry_reliably(&mut rng)).collect();
        let late = took.iter().filter(|took| **took >= Duration::from_millis(260)).count();
        assert!((430..570).contains(&late), "{late}");
        assert!(took.iter().all(|took| *took >= Duration::from_millis(20)));
    }
}

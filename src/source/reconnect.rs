//! Reconnecting: how long to wait before a broker is tried again. Pure but for the dice.

use std::time::Duration;

/// The shortest wait.
const WAIT_MIN: Duration = Duration::from_millis(200);
/// The longest wait: a broker that comes back is noticed within it.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// Doublings after which the longest wait is reached.
const DOUBLINGS_MAX: u32 = 5;

/// Counts failures in a row.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// It worked: the next failure is the first again.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// It failed: how long to wait. Half of it is chance, so that many boxes do not come back at the same moment.
    pub(super) fn failed(&mut self) -> Duration {
        let longest = WAIT_MIN.saturating_mul(1 << self.failures.min(DOUBLINGS_MAX)).min(WAIT_MAX);
        self.failures = self.failures.saturating_add(1);
        longest / 2 + (longest / 2).mul_f64(fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_bound_and_begin_anew_after_success() {
        let mut backoff = Backoff::default();
        let first = backoff.failed();
        assert!(first >= WAIT_MIN / 2 && first <= WAIT_MIN, "{first:?}");
        let last = (0..1000).map(|_| backoff.failed()).last().unwrap();
        assert!(last >= WAIT_MAX / 2 && last <= WAIT_MAX, "{last:?}");
        backoff.reset();
        assert!(backoff.failed() <= WAIT_MIN);
    }
}

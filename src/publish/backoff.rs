//! Back-off: how long to wait before the next try. Pure: the caller brings the age and the dice.

use std::time::Duration;

use anyhow::bail;

/// A frame that has been failing for long is tried no sooner than this part of its age again (within the bounds).
const AGE_PART: u32 = 4;
/// A pause lasts at most this part longer than its cause: after an outage of 20 s the next probe is 5 s away at most.
const PAUSE_PART: u32 = 4;

/// Bounds of a wait, with `0 < min <= max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
}

impl Backoff {
    pub(super) fn try_new(min: Duration, max: Duration) -> anyhow::Result<Self> {
        if min.is_zero() {
            bail!("backoff_min is 0s; it must be longer, for example 200ms");
        }
        if min > max {
            bail!("backoff_min ({min:?}) is longer than backoff_max ({max:?})");
        }
        Ok(Self { min, max })
    }

    pub(super) const fn between(min: Duration, max: Duration) -> Self {
        Self { min, max }
    }

    pub(super) fn min(&self) -> Duration {
        self.min
    }

    /// The longest wait after `tries` failures over `age`: doubles with each, and grows with the age.
    pub(super) fn envelope(&self, tries: u32, age: Duration) -> Duration {
        let doubled = self.min.saturating_mul(2_u32.saturating_pow(tries.saturating_add(1)));
        doubled.max(age / AGE_PART).clamp(self.min, self.max)
    }

    /// A wait anywhere between `min` and the envelope; `dice` is in `0.0..1.0`.
    pub(super) fn delay(&self, tries: u32, age: Duration, dice: f64) -> Duration {
        let span = self.envelope(tries, age).saturating_sub(self.min);
        (self.min + span.mul_f64(dice.clamp(0.0, 1.0))).min(self.max)
    }

    /// The wait for the next probe of a pause that has lasted for `paused`. There is one at a time, so half of it is certain.
    pub(super) fn probe(&self, probes: u32, paused: Duration, dice: f64) -> Duration {
        let longest = self.envelope(probes, Duration::ZERO).min((paused / PAUSE_PART).max(self.min));
        let shortest = (longest / 2).max(self.min);
        shortest + longest.saturating_sub(shortest).mul_f64(dice.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bounds_that_make_no_sense_are_refused() {
        let ms = Duration::from_millis;
        assert!(Backoff::try_new(ms(0), ms(1)).is_err());
        assert!(Backoff::try_new(ms(2), ms(1)).is_err());
        assert!(Backoff::try_new(ms(1), ms(1)).is_ok());
    }

    #[test]
    fn probes_are_few_and_one_comes_soon_after_any_outage() {
        let backoff = Backoff::between(Duration::from_millis(200), Duration::from_secs(30));
        for (outage, few) in [(1, 8), (20, 30), (60, 40), (3600, 300)] {
            let outage = Duration::from_secs(outage);
            for dice in [0.0, 0.5, 1.0] {
                let (mut now, mut probes) = (Duration::ZERO, 0);
                while now < outage {
                    now += backoff.probe(probes, now, dice);
                    probes += 1;
                }
                assert!(probes <= few, "{probes} probes within {outage:?}");
                assert!(
                    now.saturating_sub(outage) <= (outage / 4).clamp(backoff.min, backoff.max),
                    "{:?} after {outage:?}",
                    now.saturating_sub(outage)
                );
            }
        }
    }

    proptest! {
        #[test]
        fn a_delay_keeps_its_bounds_and_its_envelope_never_falls(
            min in 1_u64..10_000, more in 0_u64..1_000_000, tries in 0_u32..100, age in 0_u64..1_000_000_000, dice in 0.0..1.0,
        ) {
            let b = Backoff::try_new(Duration::from_millis(min), Duration::from_millis(min + more)).unwrap();
            let age = Duration::from_millis(age);
            let delay = b.delay(tries, age, dice);
            prop_assert!(b.min <= delay && delay <= b.max);
            prop_assert!(delay <= b.envelope(tries, age));
            prop_assert!(b.envelope(tries, age) <= b.envelope(tries + 1, age));
            prop_assert!(b.envelope(tries, age) <= b.envelope(tries, age * 2));
        }
    }
}

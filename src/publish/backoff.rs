//! Back-off: how long to wait before the next try. Pure: the caller brings the age and the dice.

use std::time::Duration;

use anyhow::bail;

/// A frame that has been failing for long is tried no sooner than this part of its age again (within the bounds).
const AGE_PART: u32 = 4;

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

//! How fast and how many: the rate limit, and the concurrency that adapts to what the engine bears. Pure, time is passed in.
//!
//! An attempt must pass two rate limits (the whole box's and its detector's) at one moment: both are looked at before either is
//! charged, so neither loses permits to the other. `governor` does the arithmetic and only knows asking and charging in one: the
//! state kept here for it can be asked without being charged. Waiting is the caller's.

use std::cell::Cell;
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::StateInformationMiddleware;
use governor::nanos::Nanos;
use governor::state::StateStore;
use governor::{Quota, RateLimiter};
use tokio::time::Instant;

/// Latency may double over what the unloaded engine shows, and this much more, before concurrency shrinks.
const LATENCY_SLACK: Duration = Duration::from_millis(10);
/// How long the lowest latency is remembered.
const BASE_WINDOW: Duration = Duration::from_secs(10);
/// At most one shrinking step in this time (or in one latency, if that is longer).
const SHRINK_SPACING: Duration = Duration::from_millis(100);
/// Weight of the newest sample in the smoothed latency.
const SMOOTHING: f64 = 0.2;
/// The longest time between two permits; slower than one in eleven days is not a rate.
const INTERVAL_SECS_MAX: f64 = 1e6;
/// A burst is worth at most so much time: governor counts nanoseconds in 64 bits.
const BURST_TIME_MAX: Duration = Duration::from_hours(24 * 365 * 100);

/// A rate limit (GCRA): at most `rate × window + burst` permits in any window.
#[derive(Debug, Default)]
pub(super) struct RateLimit {
    /// `None`: no limit.
    limiter: Option<RateLimiter<Ask, Account, Watch, StateInformationMiddleware>>,
    burst: u32,
}

impl RateLimit {
    /// `rate` permits per second, 0: no limit. `burst` 0: one second's worth.
    pub(super) fn new(rate: f64, burst: u32) -> Self {
        let mut limit = Self::default();
        limit.set(rate, burst);
        limit
    }

    /// Changes the rate; what was given stays given.
    pub(super) fn set(&mut self, rate: f64, burst: u32) {
        let (account, watch) = self.limiter.take().map_or_else(Default::default, |old| {
            let watch = old.clock().rewound();
            (old.into_state_store(), watch)
        });
        if let Some(quota) = quota(rate, burst) {
            self.burst = quota.burst_size().get();
            self.limiter = Some(RateLimiter::new(quota, account, watch));
        }
    }

    /// `None`: now. Otherwise the moment to ask again.
    pub(super) fn wait(&self, now: Instant) -> Option<Instant> {
        let limiter = self.limiter.as_ref()?;
        let at = limiter.clock().show(now);
        limiter.check_key(&Ask::Look).err().map(|until| now + until.wait_time_from(at))
    }

    /// Takes a permit; only after `wait` said `None` for the same moment.
    pub(super) fn take(&mut self, now: Instant) {
        if let Some(limiter) = &self.limiter {
            limiter.clock().show(now);
            let taken = limiter.check_key(&Ask::Take);
            debug_assert!(taken.is_ok(), "`wait` was not asked");
        }
    }

    /// Whether forgetting this limit would change nothing.
    pub(super) fn is_idle(&self, now: Instant) -> bool {
        self.limiter.as_ref().is_none_or(|limiter| {
            limiter.clock().show(now);
            limiter.check_key(&Ask::Look).is_ok_and(|state| state.remaining_burst_capacity() + 1 == self.burst)
        })
    }
}

/// `None`: no limit.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast of a float saturates")]
fn quota(rate: f64, burst: u32) -> Option<Quota> {
    if rate.is_nan() || rate <= 0.0 {
        return None;
    }
    let interval = Duration::from_secs_f64((1.0 / rate).min(INTERVAL_SECS_MAX));
    let quota = Quota::with_period(interval)?;
    let burst = if burst == 0 { rate.ceil() as u32 } else { burst };
    let most = u32::try_from(BURST_TIME_MAX.as_nanos() / interval.as_nanos()).unwrap_or(u32::MAX);
    Some(quota.allow_burst(NonZeroU32::new(burst.min(most)).unwrap_or(NonZeroU32::MIN)))
}

/// Whether a permit is looked at or taken: governor passes it through as the key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Ask {
    Look,
    Take,
}

/// Until when the permits given so far are paid for. The desk's lock is around it, so it needs no atomics.
#[derive(Debug, Default)]
struct Account(Cell<Option<Nanos>>);

impl StateStore for Account {
    type Key = Ask;

    fn measure_and_replace<T, F, E>(&self, ask: &Ask, f: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let (outcome, paid) = f(self.0.get())?;
        match ask {
            Ask::Look => {}
            Ask::Take => self.0.set(Some(paid)),
        }
        Ok(outcome)
    }
}

/// Shows governor the time that was passed in, since the first one that was.
#[derive(Debug, Default)]
struct Watch {
    origin: Cell<Option<Instant>>,
    now: Cell<Nanos>,
}

impl Watch {
    fn show(&self, now: Instant) -> Nanos {
        let origin = self.origin.get().unwrap_or(now);
        self.origin.set(Some(origin));
        self.now.set(now.saturating_duration_since(origin).into());
        self.now.get()
    }

    /// Shows the origin: where a new limiter that takes over the account has to start.
    fn rewound(&self) -> Self {
        Self { origin: self.origin.clone(), now: Cell::default() }
    }
}

impl Clock for Watch {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        self.now.get()
    }
}

/// The ceiling that leaves `others` of `open_files` (`None`: no limit); at least one, or nothing would ever be published.
pub(super) fn fitting(max: usize, open_files: Option<u64>, others: u64) -> usize {
    let left = open_files.map_or(u64::MAX, |limit| limit.saturating_sub(others));
    max.min(usize::try_from(left).unwrap_or(usize::MAX)).max(1)
}

/// How many attempts may be in flight: doubles each round trip at first, then grows by one, shrinks on errors and when latency
/// inflates. It looks only at rounds in which the limit was used up.
#[derive(Clone, Debug)]
pub(super) struct Concurrency {
    limit: f64,
    max: f64,
    /// Until the first shrinking, each success adds one.
    starting: bool,
    smoothed: Option<f64>,
    /// Lowest latency of the window before, and of this window, in seconds.
    base: (f64, f64),
    window_began: Option<Instant>,
    shrunk_in_window: bool,
    shrunk_at: Option<Instant>,
}

impl Concurrency {
    pub(super) fn new(max: usize) -> Self {
        Self {
            limit: 1.0,
            max: max.max(1) as f64,
            starting: true,
            smoothed: None,
            base: (f64::INFINITY, f64::INFINITY),
            window_began: None,
            shrunk_in_window: false,
            shrunk_at: None,
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and max")]
    pub(super) fn now(&self) -> usize {
        self.limit as usize
    }

    /// A new ceiling.
    pub(super) fn set_max(&mut self, max: usize) {
        self.max = max.max(1) as f64;
        self.limit = self.limit.min(self.max);
    }

    /// From one again: after a pause.
    pub(super) fn restart(&mut self) {
        *self = Self::new(1).with_max(self.max);
    }

    fn with_max(mut self, max: f64) -> Self {
        self.max = max;
        self
    }

    /// An attempt was accepted after `latency`, with `in_flight` attempts (itself among them) at its end.
    pub(super) fn accepted(&mut self, latency: Duration, in_flight: usize, now: Instant) {
        let secs = latency.as_secs_f64();
        self.measure(secs, now);
        let smoothed = self.smoothed.unwrap_or(secs);
        let base = self.base.0.min(self.base.1);
        if smoothed > 2.0 * base + LATENCY_SLACK.as_secs_f64() {
            self.shrink(0.9, now);
        } else if self.starting && 2.0 * in_flight as f64 >= self.limit {
            self.limit = (self.limit + 1.0).min(self.max);
        } else if in_flight as f64 + 1.0 >= self.limit {
            self.limit = (self.limit + 1.0 / self.limit).min(self.max);
        }
    }

    /// An attempt ended in overload: a server's error, or no answer in time.
    pub(super) fn overloaded(&mut self, now: Instant) {
        self.shrink(0.5, now);
    }

    fn shrink(&mut self, factor: f64, now: Instant) {
        let spacing = SHRINK_SPACING.max(Duration::from_secs_f64(self.smoothed.unwrap_or(0.0)));
        if self.shrunk_at.is_some_and(|at| now < at + spacing) {
            return;
        }
        self.limit = (self.limit * factor).max(1.0);
        self.starting = false;
        self.shrunk_in_window = true;
        self.shrunk_at = Some(now);
    }

    fn measure(&mut self, secs: f64, now: Instant) {
        let began = *self.window_began.get_or_insert(now);
        if now >= began + BASE_WINDOW {
            self.base = (self.base.1, f64::INFINITY);
            self.window_began = Some(now);
            // Latency limits us: look again at what it is with little in flight, else the base would creep up for ever.
            if self.shrunk_in_window {
                self.limit = (self.limit / 4.0).max(1.0);
                self.starting = true;
            }
            self.shrunk_in_window = false;
        }
        self.base.1 = self.base.1.min(secs);
        self.smoothed = Some(self.smoothed.map_or(secs, |old| old + SMOOTHING * (secs - old)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_rate_of_zero_never_waits() {
        let now = Instant::now();
        let mut limit = RateLimit::new(0.0, 5);
        for _ in 0..1000 {
            assert_eq!(limit.wait(now), None);
            limit.take(now);
        }
    }

    #[test]
    fn what_was_given_stays_given_and_is_forgotten_when_paid_for() {
        let now = Instant::now();
        let mut limit = RateLimit::new(1.0, 2);
        assert!(limit.is_idle(now));
        limit.take(now);
        limit.take(now);
        assert_eq!(limit.wait(now), Some(now + 1000 * MS));
        limit.set(10.0, 1);
        assert_eq!(limit.wait(now), Some(now + 2000 * MS), "two permits are still to be paid for");
        assert!(!limit.is_idle(now + 1999 * MS) && limit.is_idle(now + 2000 * MS));
        limit.take(now + 2000 * MS);
        assert_eq!(limit.wait(now + 2000 * MS), Some(now + 2100 * MS));
    }

    #[test]
    fn the_slowest_rate_with_the_largest_burst_does_not_overflow() {
        let now = Instant::now();
        let mut limit = RateLimit::new(f64::MIN_POSITIVE, u32::MAX);
        for _ in 0..1000 {
            assert_eq!(limit.wait(now), None);
            limit.take(now);
        }
        assert_eq!(RateLimit::new(f64::MAX, 0).wait(now), None);
    }

    #[test]
    fn a28_the_ceiling_leaves_the_files_that_others_need() {
        assert_eq!(fitting(64, Some(1024), 30), 64);
        assert_eq!(fitting(64, Some(40), 30), 10);
        assert_eq!(fitting(64, Some(30), 30), 1);
        assert_eq!(fitting(64, Some(8), 30), 1);
        assert_eq!(fitting(64, None, 30), 64);
    }

    proptest! {
        #[test]
        fn no_window_holds_more_than_rate_times_window_plus_burst(
            rate in 0.5_f64..200.0, burst in 0_u32..20, gaps in prop::collection::vec(0_u64..400, 1..200),
        ) {
            let mut limit = RateLimit::new(rate, burst);
            let burst = if burst == 0 { rate.ceil().max(1.0) } else { f64::from(burst) };
            let mut now = Instant::now();
            let mut taken = Vec::new();
            for gap in gaps {
                now += MS * u32::try_from(gap).unwrap();
                while limit.wait(now).is_none() {
                    limit.take(now);
                    taken.push(now);
                }
                let at = limit.wait(now).unwrap();
                prop_assert!(at > now, "a wait of nothing would be a busy loop");
                prop_assert!(limit.wait(at).is_none());
            }
            for (i, from) in taken.iter().enumerate() {
                for (j, to) in taken.iter().enumerate().skip(i) {
                    let window = to.duration_since(*from).as_secs_f64();
                    prop_assert!((j - i + 1) as f64 <= rate * window + burst + 1e-3);
                }
            }
        }
    }

    /// Runs `rounds` rounds against an engine whose latency is a function of what is in flight.
    fn drive(c: &mut Concurrency, now: &mut Instant, rounds: usize, latency: impl Fn(usize) -> Duration) {
        for _ in 0..rounds {
            let n = c.now();
            *now += latency(n);
            for _ in 0..n {
                c.accepted(latency(n), n, *now);
            }
        }
    }

    #[test]
    fn it_reaches_the_ceiling_within_a_second_when_the_engine_scales() {
        let (mut c, mut now) = (Concurrency::new(64), Instant::now());
        drive(&mut c, &mut now, 20, |_| 50 * MS);
        assert_eq!(c.now(), 64);
        drive(&mut c, &mut now, 1000, |_| 50 * MS);
        assert_eq!(c.now(), 64);
    }

    #[test]
    fn it_settles_low_when_more_in_flight_only_inflates_latency() {
        let (mut c, mut now) = (Concurrency::new(64), Instant::now());
        let queue = |n: usize| 5 * MS * u32::try_from(n.max(2)).unwrap() / 2;
        for _ in 0..20 {
            drive(&mut c, &mut now, 200, queue);
            assert!(c.now() <= 24, "{}", c.now());
        }
    }

    #[test]
    fn it_finds_a_new_base_when_the_engine_stays_slower() {
        let (mut c, mut now) = (Concurrency::new(64), Instant::now());
        drive(&mut c, &mut now, 40, |_| 20 * MS);
        assert_eq!(c.now(), 64);
        drive(&mut c, &mut now, 20, |_| 200 * MS);
        assert!(c.now() < 20, "{}", c.now());
        drive(&mut c, &mut now, 400, |_| 200 * MS);
        assert!(c.now() >= 60, "{}", c.now());
    }

    #[test]
    fn errors_halve_it_once_and_a_restart_begins_with_one() {
        let (mut c, mut now) = (Concurrency::new(64), Instant::now());
        drive(&mut c, &mut now, 20, |_| 50 * MS);
        for _ in 0..64 {
            c.overloaded(now);
        }
        assert_eq!(c.now(), 32);
        c.restart();
        assert_eq!(c.now(), 1);
        drive(&mut c, &mut now, 20, |_| 50 * MS);
        assert_eq!(c.now(), 64);
    }
}

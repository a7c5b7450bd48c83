//! The last hour, in memory: what the status page draws, and the rates that `status` and `top` show.
//!
//! Not here: anything older, which is Prometheus' work. Nothing of it outlives the process.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::metrics::{DetectorMetrics, Metrics};

/// How long one step of the hour is.
pub const STEP: Duration = Duration::from_secs(30);
/// Steps that are kept: one hour.
pub const STEPS: usize = 120;
/// Rates are means over this time.
const RATE_OVER: Duration = Duration::from_secs(10);

/// See the file's head.
#[derive(Debug, Default)]
pub struct History {
    tracks: Mutex<BTreeMap<Arc<str>, Track>>,
}

/// What one detector did in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Frames published.
    pub published: u64,
    /// The most frames that were pending at a look.
    pub pending: u64,
    /// The longest way from noticed to accepted.
    pub delivery_max: Duration,
}

/// What one detector does now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Now {
    /// Frames published per second.
    pub rate: f64,
    /// Mean way from noticed to accepted of the last frames; `None`: none in the last hour.
    pub delivery: Option<Duration>,
    /// The longest way in this step and the one before; `None`: no frame in them.
    pub delivery_max: Option<Duration>,
}

#[derive(Debug)]
struct Track {
    /// Looks of the last [`RATE_OVER`]: when, and how many were published by then.
    looks: VecDeque<(Instant, u64)>,
    delivery: Option<Duration>,
    delivered: Option<Instant>,
    /// Full steps, oldest first.
    steps: VecDeque<Sample>,
    open: Sample,
    opened: Instant,
    published: u64,
}

impl History {
    /// Looks at every detector. To be called about once a second, by one caller.
    pub fn look(&self, metrics: &Metrics, now: Instant) {
        let mut tracks = self.lock();
        for detector in metrics.detectors() {
            tracks.entry(detector.name.clone()).or_insert_with(|| Track::begin(now)).look(&detector, now);
        }
    }

    /// What a detector does now.
    pub fn now(&self, detector: &str) -> Now {
        self.lock().get(detector).map(Track::now).unwrap_or_default()
    }

    /// A detector's last hour, oldest first: at most [`STEPS`], the last one still going on.
    pub fn hour(&self, detector: &str) -> Vec<Sample> {
        let tracks = self.lock();
        let Some(track) = tracks.get(detector) else { return Vec::new() };
        track.steps.iter().copied().chain([track.open]).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Track>> {
        self.tracks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Track {
    fn begin(now: Instant) -> Self {
        Self {
            looks: VecDeque::new(),
            delivery: None,
            delivered: None,
            steps: VecDeque::new(),
            open: Sample::default(),
            opened: now,
            published: 0,
        }
    }

    fn look(&mut self, detector: &DetectorMetrics, now: Instant) {
        // A box that was suspended has empty steps for that time, but no more of them than an hour holds.
        let mut turned = 0;
        while now.duration_since(self.opened) >= STEP && turned < STEPS {
            self.steps.push_back(std::mem::take(&mut self.open));
            self.opened += STEP;
            turned += 1;
        }
        if turned == STEPS {
            self.opened = now;
        }
        while self.steps.len() >= STEPS {
            self.steps.pop_front();
        }
        let counts = detector.counts();
        self.open.published += counts.published - self.published;
        self.open.pending = self.open.pending.max(u64::try_from(counts.pending).unwrap_or(0));
        self.published = counts.published;
        if let Some((mean, max)) = detector.take_delivery() {
            self.open.delivery_max = self.open.delivery_max.max(max);
            (self.delivery, self.delivered) = (Some(mean), Some(now));
        } else if self
            .delivered
            .is_some_and(|at| now.duration_since(at) > STEP * u32::try_from(STEPS).unwrap_or(u32::MAX))
        {
            self.delivery = None;
        }
        self.looks.push_back((now, counts.published));
        while self.looks.len() > 2 && self.looks.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= RATE_OVER) {
            self.looks.pop_front();
        }
    }

    fn now(&self) -> Now {
        let rate = match (self.looks.front(), self.looks.back()) {
            (Some((from, before)), Some((to, after))) if to > from => {
                (after - before) as f64 / to.duration_since(*from).as_secs_f64()
            }
            (_, _) => 0.0,
        };
        let max = self.steps.back().map_or(Duration::ZERO, |step| step.delivery_max).max(self.open.delivery_max);
        Now { rate, delivery: self.delivery, delivery_max: (!max.is_zero()).then_some(max) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::SourceKind;

    /// One look a second, with so many frames published before each.
    fn run(history: &History, metrics: &Metrics, from: &mut Instant, per_second: &[u64]) {
        for n in per_second {
            *from += Duration::from_secs(1);
            let cam = metrics.detector("Cam");
            cam.received(SourceKind::Directory, *n);
            for _ in 0..*n {
                cam.published(10, Duration::from_millis(*n), Duration::ZERO);
            }
            history.look(metrics, *from);
        }
    }

    #[test]
    fn rates_are_of_the_last_seconds_and_steps_of_the_last_hour() {
        let (history, metrics, mut now) = (History::default(), Metrics::new(), Instant::now());
        assert_eq!(history.now("Cam"), Now::default());
        run(&history, &metrics, &mut now, &[5; 40]);
        assert!((history.now("Cam").rate - 5.0).abs() < 0.01);
        assert_eq!(history.now("Cam").delivery, Some(Duration::from_millis(5)));
        assert_eq!(history.now("Cam").delivery_max, Some(Duration::from_millis(5)));
        let hour = history.hour("Cam");
        assert_eq!(hour.iter().map(|step| step.published).sum::<u64>(), 200);
        assert_eq!((hour.len(), hour[0].published), (2, 150), "{hour:?}");
        run(&history, &metrics, &mut now, &[0; 20]);
        assert!(history.now("Cam").rate.abs() < f64::EPSILON);
        run(&history, &metrics, &mut now, &[0; 60]);
        assert_eq!(history.now("Cam").delivery_max, None, "that was longer ago than two steps");
        assert_eq!(history.now("Cam").delivery, Some(Duration::from_millis(5)));
        run(&history, &metrics, &mut now, &vec![1; 4000]);
        let hour = history.hour("Cam");
        assert_eq!((hour.len(), hour[0].published), (STEPS, 30), "bounded, and the oldest are gone");
    }

    #[test]
    fn a_suspended_box_has_a_gap_of_at_most_an_hour() {
        let (history, metrics, mut now) = (History::default(), Metrics::new(), Instant::now());
        run(&history, &metrics, &mut now, &[3]);
        now += Duration::from_hours(30);
        run(&history, &metrics, &mut now, &[4]);
        let hour = history.hour("Cam");
        assert_eq!(hour.len(), STEPS);
        assert_eq!((hour[0].published, hour[STEPS - 1].published), (0, 4));
        now += STEP;
        run(&history, &metrics, &mut now, &[2]);
        assert_eq!(history.hour("Cam")[STEPS - 2].published, 4);
    }
}

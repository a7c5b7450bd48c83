//! Every metric: name, help, labels and buckets, in this one file. No global recorder: each daemon owns its [`Metrics`].

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusRecorder};

use crate::frame::SourceKind;
use crate::settle::Reason;

/// Names of detectors come from outside: those beyond this many share the label `other`.
const DETECTORS_MAX: usize = 1000;

const META: Metadata<'static> = Metadata::new("framegate", Level::INFO, Some("framegate"));

/// Seconds; from a fast engine on the same box to an attempt's deadline.
const ATTEMPT_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// Seconds; a frame may wait through an outage of days.
const WAIT_BUCKETS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0,
    604_800.0,
];
/// Seconds; reading and encoding one image.
const ENCODE_BUCKETS: &[f64] =
    &[0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0];

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram(&'static [f64]),
}
use Kind::{Counter as C, Gauge as G, Histogram as H};

/// The whole table; tests and the dashboard are held to it. Names without the prefix `framegate_`.
const TABLE: &[(&str, Kind, &str)] = &[
    ("frames_received_total", C, "Frames accepted from their source."),
    ("frames_published_total", C, "Frames that the engine accepted."),
    ("frames_dead_lettered_total", C, "Frames kept as dead letters, by reason."),
    (
        "frames_dropped_total",
        C,
        "Frames dropped by a policy that was switched on, taken away from the drop directory by somebody else, or purged from the spool by an operator, by reason.",
    ),
    (
        "frames_returned_total",
        C,
        "Frames given back to their source when the daemon stopped, the source was removed, or they could not be read.",
    ),
    ("frames_pending", G, "Frames accepted and not yet published, dead-lettered, dropped or returned."),
    (
        "frames_refused_total",
        C,
        "Entries that were never accepted (a symlink, a FIFO, a retained message and the like), by reason.",
    ),
    ("frames_in_flight", G, "Frames being posted to the engine right now."),
    ("published_bytes_total", C, "Bytes of the images that the engine accepted."),
    ("publish_attempts_total", C, "Requests to publish, by status code, or timeout, connect, tls or reset."),
    ("publish_retries_total", C, "Attempts that will be repeated, by reason."),
    ("publish_ambiguous_total", C, "Attempts whose answer was lost: the engine may have the frame twice."),
    ("publish_duration_seconds", H(ATTEMPT_BUCKETS), "Time of one attempt that got an answer."),
    ("frame_delivery_seconds", H(WAIT_BUCKETS), "From noticing a frame to the engine's acceptance."),
    ("frame_age_seconds", H(WAIT_BUCKETS), "From detection to the engine's acceptance."),
    ("encode_duration_seconds", H(ENCODE_BUCKETS), "Reading, checking and encoding one image."),
    ("memory_budget_bytes", G, "encode.memory: bytes that frames in hand may take."),
    ("memory_in_use_bytes", G, "Bytes that frames in hand take."),
    ("concurrency_limit", G, "Attempts that may be in flight at once, as adapted now."),
    ("rate_limited_seconds_total", C, "Time that attempts waited for a rate limit."),
    ("engine_state", G, "1 for the state the engine is in, 0 for the others."),
    ("engine_insecure", G, "1 while the engine's certificate is not verified."),
    ("token_refreshes_total", C, "Logins and renewals, by result."),
    ("token_expiry_timestamp_seconds", G, "When the token in use expires."),
    ("clock_skew_seconds", G, "This box's clock minus the engine's Date."),
    ("detector_up", G, "1 while the detector's source can deliver."),
    ("detector_last_frame_timestamp_seconds", G, "When the detector's last frame was noticed."),
    (
        "detector_silence_alarm_seconds",
        G,
        "The detector's silence_alarm; +Inf where none is set, 0 where the detector is not configured any more.",
    ),
    ("detect_times_corrected_total", C, "Detection times that were absurd and replaced by the time of arrival."),
    ("redelivered_total", C, "Messages that a broker delivered again."),
    ("sessions_lost_total", C, "Times that a broker had forgotten our session, and with it what waited there for us."),
    ("lost_upstream_total", C, "Messages that a broker took away before they were ours: a stream was trimmed."),
    (
        "watch_overflows_total",
        C,
        "Times inotify events were lost, in the kernel or for one directory; a scan followed.",
    ),
    ("watch_errors_total", C, "Directories that could not be watched and are polled instead."),
    ("rescans_total", C, "Full scans of drop directories."),
    ("partial_waits_total", C, "Times an unfinished file was left to its writer."),
    ("settle_errors_total", C, "Files or dead letters that could not be settled at the first try, by operation."),
    ("dead_letters", G, "Dead letters kept."),
    ("dead_letter_bytes", G, "Bytes that the dead letters take."),
    ("dead_letters_purged_total", C, "Dead letters removed to keep the bounds, by reason: age or size."),
    ("spool_frames", G, "Frames in the spool that are not yet settled."),
    ("spool_bytes", G, "Bytes that the spool takes on disk."),
    ("spool_max_bytes", G, "spool.max_size: bytes that the spool may take."),
    ("spool_syncs_total", C, "Groups of frames that were made durable together."),
    ("push_answers_total", C, "Answers of the push server, by status code."),
    ("config_reloads_total", C, "Reloads of the configuration, by result."),
    ("config_last_reload_success_timestamp_seconds", G, "When a configuration was last applied."),
    ("build_info", G, "1, with the version."),
];

/// The labels of those that have some. `detector` is the only one whose values come from outside.
const LABELS: &[(&str, &[&str])] = &[
    ("frames_received_total", &["detector", "source"]),
    ("frames_published_total", &["detector"]),
    ("frames_dead_lettered_total", &["detector", "reason"]),
    ("frames_dropped_total", &["detector", "reason"]),
    ("frames_returned_total", &["detector"]),
    ("frames_pending", &["detector"]),
    ("frames_refused_total", &["detector", "reason"]),
    ("published_bytes_total", &["detector"]),
    ("publish_attempts_total", &["result"]),
    ("publish_retries_total", &["reason"]),
    ("frame_delivery_seconds", &["detector"]),
    ("frame_age_seconds", &["detector"]),
    ("engine_state", &["state"]),
    ("token_refreshes_total", &["kind", "result"]),
    ("detector_up", &["detector"]),
    ("detector_last_frame_timestamp_seconds", &["detector"]),
    ("detector_silence_alarm_seconds", &["detector"]),
    ("redelivered_total", &["detector"]),
    ("sessions_lost_total", &["detector"]),
    ("lost_upstream_total", &["detector", "reason"]),
    ("sessions_lost_total", &["detector"]),
    ("settle_errors_total", &["operation"]),
    ("dead_letters_purged_total", &["reason"]),
    ("push_answers_total", &["status"]),
    ("config_reloads_total", &["result"]),
    ("build_info", &["version"]),
];

/// What there is to know about a metric, for its reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Described {
    /// With the prefix left out.
    pub name: &'static str,
    /// In Prometheus' words.
    pub kind: &'static str,
    /// Of a histogram, in seconds.
    pub buckets: &'static [f64],
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

/// Every metric of ours, in the order of the table.
pub fn described() -> impl Iterator<Item = Described> {
    TABLE.iter().map(|&(name, kind, help)| {
        let (kind, buckets): (_, &[f64]) = match kind {
            C => ("counter", &[]),
            G => ("gauge", &[]),
            H(buckets) => ("histogram", buckets),
        };
        Described { name, kind, buckets, labels: labels_of(name), help }
    })
}

fn labels_of(name: &str) -> &'static [&'static str] {
    LABELS.iter().find(|(of, _)| *of == name).map_or(&[], |(_, labels)| labels)
}

/// All metrics of one daemon. Handles for what is hot are looked up once, here or in [`DetectorMetrics`].
pub struct Metrics {
    recorder: PrometheusRecorder,
    process: metrics_process::Collector,
    detectors: Mutex<HashMap<Arc<str>, Arc<DetectorMetrics>>>,
    /// `frames_in_flight`
    pub in_flight: Gauge,
    /// `publish_duration_seconds`
    pub publish_duration: Histogram,
    /// `encode_duration_seconds`
    pub encode_duration: Histogram,
    /// `publish_ambiguous_total`
    pub ambiguous: Counter,
    /// `memory_in_use_bytes`
    pub memory_in_use: Gauge,
}

impl Metrics {
    /// A registry of its own, with every metric described.
    pub fn new() -> Arc<Self> {
        let mut builder = PrometheusBuilder::new();
        for (name, kind, _) in TABLE {
            if let H(buckets) = kind {
                builder = builder
                    .set_buckets_for_metric(Matcher::Full(format!("framegate_{name}")), buckets)
                    .expect("the table's buckets are not empty");
            }
        }
        let recorder = builder.build_recorder();
        for (name, kind, help) in TABLE {
            let name = format!("framegate_{name}").into();
            let help = (*help).into();
            match kind {
                C => recorder.describe_counter(name, None, help),
                G => recorder.describe_gauge(name, None, help),
                H(_) => recorder.describe_histogram(name, None, help),
            }
        }
        let process = metrics_process::Collector::default();
        metrics::with_local_recorder(&recorder, || process.describe());
        let metrics = Self {
            in_flight: recorder.register_gauge(&key("frames_in_flight", &[]), &META),
            publish_duration: recorder.register_histogram(&key("publish_duration_seconds", &[]), &META),
            encode_duration: recorder.register_histogram(&key("encode_duration_seconds", &[]), &META),
            ambiguous: recorder.register_counter(&key("publish_ambiguous_total", &[]), &META),
            memory_in_use: recorder.register_gauge(&key("memory_in_use_bytes", &[]), &META),
            recorder,
            process,
            detectors: Mutex::default(),
        };
        metrics.gauge("build_info", &[("version", env!("CARGO_PKG_VERSION"))]).set(1.0);
        for name in [
            "watch_overflows_total",
            "rescans_total",
            "watch_errors_total",
            "partial_waits_total",
            "rate_limited_seconds_total",
        ] {
            metrics.counter(name, &[]).absolute(0);
        }
        metrics.ambiguous.absolute(0);
        Arc::new(metrics)
    }

    /// A counter by its name in the table, without the prefix. Looked up: not for the way of each frame.
    pub fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        known(name);
        self.recorder.register_counter(&key(name, labels), &META)
    }

    /// A gauge by its name in the table, without the prefix. Looked up: not for the way of each frame.
    pub fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Gauge {
        known(name);
        self.recorder.register_gauge(&key(name, labels), &META)
    }

    /// The handles of one detector.
    pub fn detector(&self, name: &str) -> Arc<DetectorMetrics> {
        let mut detectors = self.detectors.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = detectors.get(name) {
            return found.clone();
        }
        let label: Arc<str> = if detectors.len() < DETECTORS_MAX { name.into() } else { "other".into() };
        detectors.entry(label.clone()).or_insert_with(|| Arc::new(DetectorMetrics::new(&self.recorder, label))).clone()
    }

    /// Every detector seen so far, by name.
    pub fn detectors(&self) -> Vec<Arc<DetectorMetrics>> {
        let detectors = self.detectors.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = detectors.values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// The text that Prometheus scrapes.
    pub fn render(&self) -> String {
        metrics::with_local_recorder(&self.recorder, || self.process.collect());
        self.recorder.handle().render()
    }

    /// Folds the histograms' samples together. Call it every few seconds: without it they grow without bound.
    pub fn upkeep(&self) {
        self.recorder.handle().run_upkeep();
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// One detector's counts. Keeps the equation `received = published + dead_lettered + dropped + returned + pending`.
pub struct DetectorMetrics {
    /// The label's value.
    pub name: Arc<str>,
    recorder: RecorderParts,
    pending: AtomicI64,
    counts: Counts,
    published: Counter,
    published_bytes: Counter,
    delivery: Histogram,
    age: Histogram,
    pending_gauge: Gauge,
    last_frame: Gauge,
    up: Gauge,
    silence_alarm: Gauge,
    /// By whom it is served now.
    served_by: Mutex<Served>,
    up_now: AtomicU64,
    last_frame_ms: AtomicI64,
    delivered: Deliveries,
}

/// The sources of a detector: one, and two for a moment while a reload replaces one.
#[derive(Default)]
struct Served {
    sources: u32,
    alarm: Option<Duration>,
    /// From when on silence counts: wall clock, milliseconds.
    since_ms: Option<i64>,
}

/// Deliveries since they were last taken.
#[derive(Default)]
struct Deliveries {
    count: AtomicU64,
    micros: AtomicU64,
    micros_max: AtomicU64,
}

#[derive(Default)]
struct Counts {
    received: AtomicU64,
    published: AtomicU64,
    dead_lettered: AtomicU64,
    dropped: AtomicU64,
    returned: AtomicU64,
    refused: AtomicU64,
    /// Of `dead_lettered`, in the order of [`Reason::ALL`].
    by_reason: [AtomicU64; Reason::ALL.len()],
}

/// What `/status` shows of one detector.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[expect(missing_docs, reason = "each is the metric of its name")]
pub struct DetectorCounts {
    pub received: u64,
    pub published: u64,
    pub dead_lettered: u64,
    pub dropped: u64,
    pub returned: u64,
    pub refused: u64,
    pub pending: i64,
    pub up: bool,
    /// A source serves it; of one whose entry a reload took away nothing but the counts is left.
    pub served: bool,
    /// Longer than its `silence_alarm` without a frame.
    pub silent: bool,
    /// Milliseconds since 1970; `None` before the first frame.
    pub last_frame_ms: Option<i64>,
}

/// How a detector is, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// Its source cannot deliver.
    Held,
    /// Longer than its `silence_alarm` without a frame.
    Silent,
    /// Neither.
    Well,
    /// No entry serves it any more.
    Gone,
}

impl Condition {
    /// In a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Condition::Held => "held",
            Condition::Silent => "silent",
            Condition::Well => "well",
            Condition::Gone => "gone",
        }
    }
}

impl DetectorCounts {
    /// How the detector is.
    pub fn condition(&self) -> Condition {
        match (self.served, self.up, self.silent) {
            (true, false, _) => Condition::Held,
            (true, true, true) => Condition::Silent,
            (true, true, false) => Condition::Well,
            // Frames wait in the spool for a detector that has not been heard of since the start.
            (false, _, _) if self.pending > 0 => Condition::Well,
            (false, _, _) => Condition::Gone,
        }
    }
}

/// Handles with labels of few values, one for each, registered when first used.
struct RecorderParts {
    received: [Counter; SourceKind::ALL.len()],
    dead_lettered: Vec<(Reason, Counter)>,
    dropped: Vec<(&'static str, Counter)>,
    refused: Vec<(&'static str, Counter)>,
    returned: Counter,
}

/// The reasons of `frames_dropped_total`.
pub const DROP_REASONS: [&str; 3] = ["max-age", "vanished", "purged"];
/// The reasons of `frames_refused_total`.
pub const REFUSAL_REASONS: [&str; 12] = [
    "symlink",
    "fifo",
    "socket",
    "device",
    "directory",
    "hard-link",
    "unreadable",
    "other-filesystem",
    "too-large",
    "no-name",
    "retained",
    "other-topic",
];

/// A source's service of a detector; dropped, the source has left it.
#[derive(Debug)]
#[must_use]
pub struct Serving(Arc<DetectorMetrics>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.left();
    }
}

impl DetectorMetrics {
    fn new(recorder: &PrometheusRecorder, name: Arc<str>) -> Self {
        let counter = |metric: &'static str, label: Option<(&'static str, &'static str)>| {
            let mut labels = vec![("detector", &*name)];
            labels.extend(label);
            recorder.register_counter(&key(metric, &labels), &META)
        };
        let gauge = |metric: &'static str| recorder.register_gauge(&key(metric, &[("detector", &*name)]), &META);
        let histogram =
            |metric: &'static str| recorder.register_histogram(&key(metric, &[("detector", &*name)]), &META);
        let source = |kind: SourceKind| counter("frames_received_total", Some(("source", kind.as_str())));
        Self {
            recorder: RecorderParts {
                received: SourceKind::ALL.map(source),
                dead_lettered: Reason::ALL
                    .map(|r| (r, counter("frames_dead_lettered_total", Some(("reason", r.as_str())))))
                    .into(),
                dropped: DROP_REASONS.map(|r| (r, counter("frames_dropped_total", Some(("reason", r))))).into(),
                refused: REFUSAL_REASONS.map(|r| (r, counter("frames_refused_total", Some(("reason", r))))).into(),
                returned: counter("frames_returned_total", None),
            },
            published: counter("frames_published_total", None),
            published_bytes: counter("published_bytes_total", None),
            delivery: histogram("frame_delivery_seconds"),
            age: histogram("frame_age_seconds"),
            pending_gauge: gauge("frames_pending"),
            last_frame: gauge("detector_last_frame_timestamp_seconds"),
            up: gauge("detector_up"),
            silence_alarm: gauge("detector_silence_alarm_seconds"),
            served_by: Mutex::default(),
            up_now: AtomicU64::new(0),
            last_frame_ms: AtomicI64::new(0),
            delivered: Deliveries::default(),
            pending: AtomicI64::new(0),
            counts: Counts::default(),
            name,
        }
    }

    /// `n` frames were accepted from `source`.
    pub fn received(&self, source: SourceKind, n: u64) {
        self.recorder.received[source as usize].increment(n);
        self.counts.received.fetch_add(n, Ordering::Relaxed);
        self.add_pending(i64::try_from(n).unwrap_or(0));
        let now = Timestamp::now();
        self.last_frame.set(now.as_millisecond() as f64 / 1e3);
        self.last_frame_ms.store(now.as_millisecond(), Ordering::Relaxed);
    }

    /// The engine accepted one frame.
    pub fn published(&self, image_bytes: u64, delivery: Duration, age: Duration) {
        self.published.increment(1);
        self.published_bytes.increment(image_bytes);
        self.delivery.record(delivery.as_secs_f64());
        let micros = u64::try_from(delivery.as_micros()).unwrap_or(u64::MAX);
        self.delivered.count.fetch_add(1, Ordering::Relaxed);
        self.delivered.micros.fetch_add(micros, Ordering::Relaxed);
        self.delivered.micros_max.fetch_max(micros, Ordering::Relaxed);
        self.age.record(age.as_secs_f64());
        self.counts.published.fetch_add(1, Ordering::Relaxed);
        self.add_pending(-1);
    }

    /// One frame is durably a dead letter.
    pub fn dead_lettered(&self, reason: Reason) {
        if let Some((_, counter)) = self.recorder.dead_lettered.iter().find(|(r, _)| *r == reason) {
            counter.increment(1);
        }
        self.counts.dead_lettered.fetch_add(1, Ordering::Relaxed);
        self.counts.by_reason[reason as usize].fetch_add(1, Ordering::Relaxed);
        self.add_pending(-1);
    }

    /// Dead letters since the start, by reason.
    pub fn dead_lettered_by_reason(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().map(|reason| (reason, self.counts.by_reason[reason as usize].load(Ordering::Relaxed)))
    }

    /// Mean and longest delivery since this was last asked; `None`: nothing was published. For one asker only.
    pub fn take_delivery(&self) -> Option<(Duration, Duration)> {
        let count = self.delivered.count.swap(0, Ordering::Relaxed);
        let micros = self.delivered.micros.swap(0, Ordering::Relaxed);
        let max = self.delivered.micros_max.swap(0, Ordering::Relaxed);
        (count > 0).then(|| (Duration::from_micros(micros / count), Duration::from_micros(max)))
    }

    /// `n` frames were dropped; `reason` is one of [`DROP_REASONS`].
    pub fn dropped(&self, reason: &'static str, n: u64) {
        count(&self.recorder.dropped, reason, n);
        self.counts.dropped.fetch_add(n, Ordering::Relaxed);
        self.add_pending(-i64::try_from(n).unwrap_or(0));
    }

    /// `n` frames went back to their source, which this daemon no longer serves.
    pub fn returned(&self, n: u64) {
        self.recorder.returned.increment(n);
        self.counts.returned.fetch_add(n, Ordering::Relaxed);
        self.add_pending(-i64::try_from(n).unwrap_or(0));
    }

    /// An entry was never accepted; `reason` is one of [`REFUSAL_REASONS`].
    pub fn refused(&self, reason: &'static str) {
        count(&self.recorder.refused, reason, 1);
        self.counts.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// A source serves the detector from now on, with this alarm.
    pub fn served(&self, silence_alarm: Option<Duration>) {
        let mut served = self.served_by();
        served.sources += 1;
        served.alarm = silence_alarm;
        served.since_ms.get_or_insert_with(|| Timestamp::now().as_millisecond());
        self.silence_alarm.set(silence_alarm.map_or(f64::INFINITY, |alarm| alarm.as_secs_f64()));
    }

    /// A source has ended. After the last one the detector is not configured any more, and no alarm may be about it; but a
    /// reload that changes an entry ends its former source after the new one began.
    pub fn left(&self) {
        let mut served = self.served_by();
        served.sources = served.sources.saturating_sub(1);
        if served.sources == 0 {
            *served = Served::default();
            self.up(false);
            self.silence_alarm.set(0.0);
        }
    }

    /// A source serves the detector, with this alarm, until the answer is dropped.
    pub fn serve(self: &Arc<Self>, silence_alarm: Option<Duration>) -> Serving {
        self.served(silence_alarm);
        Serving(self.clone())
    }

    /// Its source has not listened until now, since it has no room: that it heard nothing is no silence.
    pub fn was_not_listened_to(&self) {
        if let Some(since) = &mut self.served_by().since_ms {
            *since = Timestamp::now().as_millisecond();
        }
    }

    /// Whether a source serves the detector now.
    pub fn is_served(&self) -> bool {
        self.served_by().sources > 0
    }

    /// The alarm of the entry that serves it.
    pub fn alarm(&self) -> Option<Duration> {
        self.served_by().alarm
    }

    /// Longer than its alarm without a frame.
    fn is_silent(&self) -> bool {
        let served = self.served_by();
        let (Some(alarm), Some(since)) = (served.alarm, served.since_ms) else { return false };
        let heard = self.last_frame_ms.load(Ordering::Relaxed).max(since);
        let quiet = u64::try_from(Timestamp::now().as_millisecond() - heard).unwrap_or(0);
        Duration::from_millis(quiet) > alarm
    }

    fn served_by(&self) -> MutexGuard<'_, Served> {
        self.served_by.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the detector's source can deliver.
    pub fn up(&self, up: bool) {
        self.up.set(f64::from(u8::from(up)));
        self.up_now.store(u64::from(up), Ordering::Relaxed);
    }

    /// The counts of this moment.
    pub fn counts(&self) -> DetectorCounts {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let last = self.last_frame_ms.load(Ordering::Relaxed);
        DetectorCounts {
            received: get(&self.counts.received),
            published: get(&self.counts.published),
            dead_lettered: get(&self.counts.dead_lettered),
            dropped: get(&self.counts.dropped),
            returned: get(&self.counts.returned),
            refused: get(&self.counts.refused),
            pending: self.pending.load(Ordering::Relaxed),
            up: get(&self.up_now) == 1,
            served: self.is_served(),
            silent: self.is_silent(),
            last_frame_ms: (last != 0).then_some(last),
        }
    }

    fn add_pending(&self, n: i64) {
        self.pending.fetch_add(n, Ordering::Relaxed);
        self.pending_gauge.increment(n as f64);
    }
}

impl fmt::Debug for DetectorMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DetectorMetrics({})", self.name)
    }
}

fn count(handles: &[(&'static str, Counter)], reason: &'static str, n: u64) {
    debug_assert!(handles.iter().any(|(r, _)| *r == reason), "unknown reason {reason}");
    if let Some((_, counter)) = handles.iter().find(|(r, _)| *r == reason) {
        counter.increment(n);
    }
}

fn known(name: &str) {
    debug_assert!(TABLE.iter().any(|(n, ..)| *n == name), "metric {name} is not in the table");
}

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    debug_assert!(
        labels.iter().map(|(label, _)| label).eq(labels_of(name)),
        "the labels of {name} are not in the table"
    );
    let labels: Vec<Label> = labels.iter().map(|(k, v)| Label::new(*k, (*v).to_owned())).collect();
    Key::from_parts(format!("framegate_{name}"), labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_is_what_was_received_and_not_settled() {
        let metrics = Metrics::new();
        let cam = metrics.detector("Cam \"1\"");
        cam.received(SourceKind::Directory, 5);
        cam.published(1, Duration::ZERO, Duration::ZERO);
        cam.dead_lettered(Reason::Rejected);
        cam.dropped("max-age", 1);
        cam.returned(1);
        assert_eq!(cam.counts().pending, 1);
        let text = metrics.render();
        assert!(text.contains(r#"framegate_frames_pending{detector="Cam \"1\""} 1"#), "{text}");
        assert!(text.contains("# HELP framegate_frames_pending "));
    }

    #[test]
    fn a_detector_shows_its_alarm_until_its_last_source_has_left() {
        let metrics = Metrics::new();
        let cam = metrics.detector("Cam");
        let shows = |alarm: &str, up: u8| {
            let text = metrics.render();
            let alarm = format!("framegate_detector_silence_alarm_seconds{{detector=\"Cam\"}} {alarm}\n");
            let up = format!("framegate_detector_up{{detector=\"Cam\"}} {up}\n");
            assert!(text.contains(&alarm) && text.contains(&up), "{alarm}{up}{text}");
        };
        shows("0", 0);
        cam.served(None);
        assert_eq!(cam.counts().condition(), Condition::Held);
        cam.up(true);
        assert_eq!(cam.counts().condition(), Condition::Well);
        shows("inf", 1);
        cam.served(Some(Duration::from_mins(10)));
        cam.left();
        shows("600", 1);
        cam.left();
        shows("0", 0);
        assert_eq!(cam.counts().condition(), Condition::Gone, "which is nobody's trouble");
    }

    #[test]
    fn the_number_of_detector_labels_is_capped() {
        let metrics = Metrics::new();
        for n in 0..DETECTORS_MAX + 10 {
            metrics.detector(&n.to_string()).received(SourceKind::Directory, 1);
        }
        assert_eq!(metrics.detectors().len(), DETECTORS_MAX + 1);
        assert_eq!(metrics.detector("other").counts().received, 10);
    }
}

//! What is measured, as plain data.

use std::time::Duration;

/// One row of the matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub name: &'static str,
    pub about: &'static str,
    pub worker: Worker,
    pub against: Against,
    pub feed: Feed,
    pub tls: bool,
    /// Size of an image, KiB.
    pub kib: usize,
    /// Each has a drop directory and an entry of its own.
    pub detectors: usize,
    /// What the engine takes for each frame.
    pub latency: Duration,
    /// Published in one run.
    pub frames: u64,
}

/// Who takes the frames to the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Worker {
    Daemon,
    Roofline,
    /// The vendor's example in a loop: a `curl` for each frame.
    Curl,
}

/// What the case alternates with; its figures are called `base_…`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Against {
    Nothing,
    /// The roofline over the same files.
    Roofline,
    /// The daemon with a single detector.
    OneDetector,
    /// The daemon with never more than a thousand files.
    ThousandFiles,
}

/// How files come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Feed {
    /// Never: the daemon idles.
    None,
    /// So many are there at the start, or as many as are published.
    Backlog(Option<u64>),
    /// A thousand at once, again as soon as they are published.
    Thousands,
    /// At a steady rate, each renamed into place.
    Renamed,
    /// At a steady rate, each written in place and closed.
    Closed,
}

const CASE: Case = Case {
    name: "",
    about: "",
    worker: Worker::Daemon,
    against: Against::Roofline,
    feed: Feed::Backlog(None),
    tls: false,
    kib: 40,
    detectors: 1,
    latency: Duration::ZERO,
    frames: 10_000,
};

const STEADY: Case = Case { against: Against::Nothing, feed: Feed::Renamed, frames: 5_000, ..CASE };

/// Enough for what one frame costs, where they come by the thousand.
const THOUSANDS_FRAMES: u64 = 50_000;

/// What runs where nothing is chosen.
pub(crate) const HEADLINE: [&str; 4] = ["http-40k", "tls-40k", "steady-renamed", "idle"];

/// All of them, in the order of the report.
pub(crate) const CASES: [Case; 23] = [
    Case { name: "http-40k", about: "a backlog of 40 KiB images over plain HTTP", ..CASE },
    Case { name: "http-8k", about: "of 8 KiB images", kib: 8, frames: 20_000, ..CASE },
    Case { name: "http-200k", about: "of 200 KiB images", kib: 200, frames: 3_000, ..CASE },
    Case { name: "tls-40k", about: "over TLS", tls: true, ..CASE },
    Case { name: "tls-8k", about: "of 8 KiB images over TLS", tls: true, kib: 8, frames: 20_000, ..CASE },
    Case { name: "tls-200k", about: "of 200 KiB images over TLS", tls: true, kib: 200, frames: 3_000, ..CASE },
    Case { name: "detectors-8", about: "of 8 detectors", detectors: 8, ..CASE },
    Case { name: "detectors-64", about: "of 64 detectors", detectors: 64, ..CASE },
    Case { name: "detectors-64-tls", about: "of 64 detectors over TLS", detectors: 64, tls: true, ..CASE },
    Case { name: "latency-5ms", about: "an engine that takes 5 ms", latency: Duration::from_millis(5), ..CASE },
    Case {
        name: "latency-50ms",
        about: "an engine that takes 50 ms",
        latency: Duration::from_millis(50),
        frames: 15_000,
        ..CASE
    },
    Case {
        name: "latency-50ms-tls",
        about: "an engine that takes 50 ms, over TLS",
        latency: Duration::from_millis(50),
        tls: true,
        frames: 15_000,
        ..CASE
    },
    Case { name: "steady-renamed", about: "a steady feed, renamed into place", ..STEADY },
    Case { name: "steady-closed", about: "a steady feed, written in place", feed: Feed::Closed, ..STEADY },
    Case { name: "steady-tls", about: "a steady feed over TLS", tls: true, ..STEADY },
    Case { name: "steady-8k", about: "a steady feed of 8 KiB images", kib: 8, ..STEADY },
    Case { name: "steady-200k", about: "a steady feed of 200 KiB images", kib: 200, ..STEADY },
    Case { name: "steady-64", about: "a steady feed of 64 detectors", detectors: 64, ..STEADY },
    Case { name: "steady-5ms", about: "to an engine that takes 5 ms", latency: Duration::from_millis(5), ..STEADY },
    Case {
        name: "curl-40k",
        about: "a curl for each frame, as the vendor's example has it",
        worker: Worker::Curl,
        against: Against::Nothing,
        frames: 200,
        ..CASE
    },
    Case { name: "idle", about: "nothing to do", against: Against::Nothing, feed: Feed::None, frames: 0, ..CASE },
    Case {
        name: "detectors-500",
        about: "500 detectors against one",
        against: Against::OneDetector,
        detectors: 500,
        ..CASE
    },
    Case {
        name: "million",
        about: "a million files against a thousand at a time",
        against: Against::ThousandFiles,
        feed: Feed::Backlog(Some(1_000_000)),
        kib: 4,
        frames: 1_000_000,
        ..CASE
    },
];

impl Case {
    /// The two sides that take turns; the first one is what the case is measured against.
    pub(crate) fn sides(self) -> (Option<Self>, Self) {
        let base = match self.against {
            Against::Nothing => None,
            Against::Roofline => Some(Self { worker: Worker::Roofline, ..self }),
            Against::OneDetector => Some(Self { detectors: 1, ..self }),
            Against::ThousandFiles => {
                Some(Self { feed: Feed::Thousands, frames: self.frames.min(THOUSANDS_FRAMES), ..self })
            }
        };
        (base, self)
    }
}

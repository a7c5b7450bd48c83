//! A frame: one image with its detector and detection time. Plain data, no I/O.
//!
//! The image's bytes are not in here: they travel beside it as the request body, and only as long as an attempt needs them.

use std::ffi::OsString;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use tokio::time::Instant;

/// One image of one detector, without the bytes.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The same for every attempt, and for a dead letter made from it after a restart.
    pub id: FrameId,
    /// Whose image it is.
    pub detector: Arc<Detector>,
    /// When the face was detected, UTC.
    pub detect_time: Timestamp,
    /// When Framegate noticed it, wall clock.
    pub received_at: Timestamp,
    /// When Framegate noticed it, monotonic clock.
    pub noticed: Instant,
    /// What kind of source it came from.
    pub source: SourceKind,
    /// Its name at the source (a relative path, a message id): any bytes at all, only ever shown escaped.
    pub original_name: OsString,
    /// Size of the image in bytes.
    pub image_bytes: u64,
}

/// What the engine is told about where a frame comes from, and how its frames are treated.
#[derive(Clone, Debug, PartialEq)]
pub struct Detector {
    /// The engine's `detectorName`.
    pub name: Arc<str>,
    /// IANA time zone, the engine's `ianaTimeZone`.
    pub time_zone: Arc<str>,
    /// Attempts per second; 0 means no limit.
    pub rate: f64,
    /// Turns against the other detectors; at least 1.
    pub weight: u32,
}

/// The kinds of source, also the `source` label of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// A drop directory.
    Directory,
    /// `framegate publish`: files named on the command line.
    CommandLine,
    /// A dead letter that was sent back to be published: the `source` label of `frames_received_total` only; the frame
    /// itself goes on saying where it first came from.
    Retry,
    /// Pushed to us over HTTP.
    Push,
    /// A Redis stream.
    Redis,
    /// A NATS `JetStream` consumer.
    Nats,
    /// An MQTT subscription.
    Mqtt,
}

impl SourceKind {
    /// All of them, in the order of their declaration.
    pub const ALL: [SourceKind; 7] = [
        SourceKind::Directory,
        SourceKind::CommandLine,
        SourceKind::Retry,
        SourceKind::Push,
        SourceKind::Redis,
        SourceKind::Nats,
        SourceKind::Mqtt,
    ];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            SourceKind::Directory => "directory",
            SourceKind::CommandLine => "command-line",
            SourceKind::Retry => "retry",
            SourceKind::Push => "push",
            SourceKind::Redis => "redis",
            SourceKind::Nats => "nats",
            SourceKind::Mqtt => "mqtt",
        }
    }

    /// Takes back what [`SourceKind::as_str`] gave.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

/// Twenty-six characters `[0-9a-z]`, unique over restarts and boxes; sorts by time of creation. Safe as a file name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameId(Arc<str>);

impl FrameId {
    /// A new one: milliseconds since 1970, a number that only grows, and a random part drawn at the process's start.
    pub fn generate() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        static PROCESS: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| fastrand::u64(..));
        let millis = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0);
        let count = NEXT.fetch_add(1, Ordering::Relaxed);
        // 48 bits of time, 24 of counting, 56 of the process: 128 bits, five to a character.
        let rest = (u128::from(count & 0xff_ffff) << 56) | u128::from(*PROCESS & 0xff_ffff_ffff_ffff);
        Self::of(millis, rest)
    }

    /// The one of a frame that its source names the same for ever: the same `millis` and `digest` give the same id, so
    /// that a frame which is delivered again becomes no second dead letter.
    pub fn derived(millis: u64, digest: [u8; 10]) -> Self {
        Self::of(millis, digest.iter().fold(0, |bits, byte| (bits << 8) | u128::from(*byte)))
    }

    fn of(millis: u64, rest: u128) -> Self {
        let bits = (u128::from(millis & 0xffff_ffff_ffff) << 80) | rest;
        let text: String = (0..26)
            .map(|i| char::from(b"0123456789abcdefghjkmnpqrstvwxyz"[(bits >> (125 - 5 * i)) as usize & 31]))
            .collect();
        Self(text.into())
    }

    /// Takes back what [`FrameId::as_str`] gave; `None` if it is not of that form.
    pub fn parse(text: &str) -> Option<Self> {
        let ok = text.len() == 26 && text.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase());
        ok.then(|| Self(text.into()))
    }

    /// The text form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FrameId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for FrameId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_sorted_and_parse_back() {
        let ids: Vec<_> = (0..1000).map(|_| FrameId::generate()).collect();
        assert!(ids.windows(2).all(|w| w[0] < w[1]), "later ids sort later");
        assert_eq!(FrameId::parse(ids[0].as_str()).as_ref(), Some(&ids[0]));
        for bad in ["", "../../../etc/passwd", "0123456789ABCDEFGHJKMNPQRS", "0123456789abcdefghjkmnpqr"] {
            assert_eq!(FrameId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_derived_id_is_always_the_same_and_another_one_for_every_other_frame() {
        let id = FrameId::derived(1_700_000_000_000, [7; 10]);
        assert_eq!(id, FrameId::derived(1_700_000_000_000, [7; 10]));
        assert_eq!(FrameId::parse(id.as_str()).as_ref(), Some(&id));
        let mut others = vec![FrameId::derived(1_700_000_000_001, [7; 10])];
        others.extend((0..10).map(|at| {
            let mut digest = [7; 10];
            digest[at] = 8;
            FrameId::derived(1_700_000_000_000, digest)
        }));
        assert!(others.iter().all(|other| *other != id && FrameId::parse(other.as_str()).is_some()));
    }
}

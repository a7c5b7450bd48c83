//! What the simulated engine has seen: counts, accepted frames, times of arrival. All of it bounded.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use tokio::time::Instant;

/// Accepted frames remembered; the oldest go first.
const ACCEPTED_MAX: usize = 1 << 18;
/// Times of arrival remembered; the oldest go first.
const ARRIVALS_MAX: usize = 1 << 20;
/// Violations remembered word for word; all of them are counted.
const VIOLATIONS_MAX: usize = 1_000;

/// Everything counted since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Login requests.
    pub authenticate: u64,
    /// Renewal requests.
    pub renew: u64,
    /// Publish requests.
    pub publish: u64,
    /// Requests for anything else (each of them also a violation).
    pub unknown: u64,
    /// Frames accepted, whether or not the answer was let out.
    pub accepted: u64,
    /// Answers by status, of all requests.
    pub statuses: BTreeMap<u16, u64>,
    /// Connections cut on purpose.
    pub cut: u64,
    /// Publish requests that began and have not ended.
    pub in_flight: u64,
    /// Connections so far.
    pub connections: u64,
    /// Those of them that are open.
    pub open: u64,
    /// Bytes of request bodies.
    pub bytes: u64,
    /// Violations of the contract.
    pub violations: u64,
    /// The first of them, word for word. Tests assert that it is empty.
    pub violation_messages: Vec<String>,
}

/// One accepted frame.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// Counted from 0.
    pub order: u64,
    /// Its `detectorName`.
    pub detector: String,
    /// Its `ianaTimeZone`.
    pub zone: String,
    /// Its `detectTimeUtc`.
    pub time: Timestamp,
    /// SHA-256 of the image.
    pub sha256: [u8; 32],
    /// Size of the image in bytes.
    pub size: usize,
    /// When its request arrived.
    pub arrival: Instant,
    /// When it was accepted.
    pub accepted: Instant,
}

impl Accepted {
    /// The image's SHA-256 in lower-case hexadecimal.
    pub fn sha256_hex(&self) -> String {
        hex(&self.sha256)
    }
}

/// A request's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `POST /api/v1/authenticate`
    Authenticate,
    /// `GET /api/v1/renewToken`
    Renew,
    /// `POST /api/v1/faceEdge/publish`
    Publish,
    /// Anything else.
    Unknown,
}

/// When a request's headers had been read.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// When.
    pub at: Instant,
    /// What.
    pub call: Call,
}

/// The most arrivals in any half-open window of this length: what a rate limit promises to bound.
pub fn busiest(arrivals: &[Arrival], window: Duration) -> usize {
    let mut first = 0;
    let mut most = 0;
    for (last, arrival) in arrivals.iter().enumerate() {
        while arrivals[first].at + window <= arrival.at {
            first += 1;
        }
        most = most.max(last + 1 - first);
    }
    most
}

#[derive(Default)]
pub(super) struct Records {
    pub(super) counts: Counts,
    pub(super) accepted: VecDeque<Accepted>,
    pub(super) arrivals: VecDeque<Arrival>,
}

impl Records {
    pub(super) fn arrived(&mut self, call: Call, at: Instant) {
        match call {
            Call::Authenticate => self.counts.authenticate += 1,
            Call::Renew => self.counts.renew += 1,
            Call::Publish => self.counts.publish += 1,
            Call::Unknown => self.counts.unknown += 1,
        }
        push_bounded(&mut self.arrivals, Arrival { at, call }, ARRIVALS_MAX);
    }

    pub(super) fn violated(&mut self, message: String) {
        self.counts.violations += 1;
        if self.counts.violation_messages.len() < VIOLATIONS_MAX {
            self.counts.violation_messages.push(message);
        }
    }

    pub(super) fn accept(&mut self, frame: Option<Accepted>) {
        if let Some(frame) = frame {
            push_bounded(&mut self.accepted, Accepted { order: self.counts.accepted, ..frame }, ACCEPTED_MAX);
        }
        self.counts.accepted += 1;
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)]))
        .collect()
}

fn push_bounded<T>(list: &mut VecDeque<T>, item: T, max: usize) {
    if list.len() == max {
        list.pop_front();
    }
    list.push_back(item);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_window_is_found() {
        let start = Instant::now();
        let arrivals: Vec<_> = [0u64, 10, 20, 1000, 1001, 1002, 1003, 2000]
            .map(|ms| Arrival { at: start + Duration::from_millis(ms), call: Call::Publish })
            .into();
        assert_eq!(busiest(&arrivals, Duration::from_millis(100)), 4);
        assert_eq!(busiest(&arrivals, Duration::from_secs(1)), 6);
        assert_eq!(busiest(&arrivals, Duration::from_secs(10)), 8);
        assert_eq!(busiest(&[], Duration::from_secs(1)), 0);
    }

    #[test]
    fn hexadecimal_is_lower_case_and_padded() {
        assert_eq!(hex(&[0, 10, 255]), "000aff");
    }
}

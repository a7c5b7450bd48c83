//! What the spool holds, in memory: where each frame lies, which line it stands in, and what became of it.
//!
//! Never does I/O but in a frame's `take`, which runs on an encode thread.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::record::Meta;
use super::store::Spot;
use super::{Disposition, Entry, Intake, Purged, Spool, Which, kind_of, lock};
use crate::frame::{Detector, Frame, FrameId, SourceKind};
use crate::metrics::{DetectorMetrics, Metrics};
use crate::queue::{self, Offer, Ready, Taken};
use crate::settle::{Reason, Receipt, Refusal};
use crate::source::Order;
use crate::source::lanes::{Lanes, Timed};

/// What the spool is told.
#[derive(Debug)]
pub(super) enum News {
    /// What became of a frame.
    Settled(u64, Disposition),
    /// An operator's wish.
    Purge(Which, oneshot::Sender<Purged>),
}

/// See the file's head.
pub(super) struct Index {
    spool: Weak<Spool>,
    intake: Intake,
    metrics: Arc<Metrics>,
    tell: mpsc::UnboundedSender<News>,
    entries: Vec<Arc<Entry>>,
    frames: HashMap<u64, Held>,
    lines: HashMap<Arc<Key>, Line>,
    /// Given back, and in line again at the next look.
    released: Vec<u64>,
    next: u64,
    taken: usize,
    stopping: bool,
    /// Bytes on disk, as the store said last.
    pub bytes: u64,
}

struct Held {
    spot: Spot,
    line: Arc<Key>,
    received_at: Timestamp,
    detect_time: Timestamp,
    noticed: Instant,
    image_bytes: u64,
    /// With the queue, or further on its way.
    taken: bool,
}

/// Whose line it is, and by which entry.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    source: SourceKind,
    entry: String,
    detector: String,
    time_zone: String,
}

struct Line {
    lanes: Lanes<Waiting>,
    sequence: u64,
    terms: Terms,
    detector: Arc<Detector>,
    ready: Ready,
    counts: Arc<DetectorMetrics>,
    frames: u64,
}

/// What an entry says about its frames.
#[derive(Clone, Copy, PartialEq)]
struct Terms {
    rate: f64,
    weight: u32,
    order: Order,
    max_age: Duration,
}

#[derive(Clone, Copy)]
struct Waiting {
    number: u64,
    noticed: Instant,
    time: i64,
}

impl Timed for Waiting {
    fn noticed(&self) -> Instant {
        self.noticed
    }

    fn time(&self) -> i64 {
        self.time
    }
}

impl Index {
    pub(super) fn new(
        spool: Weak<Spool>,
        intake: Intake,
        metrics: Arc<Metrics>,
        tell: mpsc::UnboundedSender<News>,
    ) -> Self {
        Self {
            spool,
            intake,
            metrics,
            tell,
            entries: Vec::new(),
            frames: HashMap::new(),
            lines: HashMap::new(),
            released: Vec::new(),
            next: 0,
            taken: 0,
            stopping: false,
            bytes: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Other entries: lines whose terms changed by it are registered anew.
    pub(super) fn reconfigure(&mut self, entries: &[Arc<Entry>]) {
        self.entries = entries.to_vec();
        for (key, line) in &mut self.lines {
            let terms = terms(&self.entries, key);
            if terms == line.terms {
                continue;
            }
            if (terms.rate, terms.weight) != (line.terms.rate, line.terms.weight) {
                line.detector = detector(key, terms);
                let served = Served { spool: self.spool.clone(), key: key.clone() };
                line.ready = self.intake.register(line.detector.clone(), Arc::new(served));
                line.ready.ready();
            }
            line.terms = terms;
        }
    }

    /// Takes in a frame that is durable. `fresh`: it came just now.
    pub(super) fn add(&mut self, meta: &Meta, spot: Spot, fresh: bool) {
        let number = self.next;
        self.next += 1;
        let source = SourceKind::parse(&meta.source).unwrap_or(SourceKind::Push);
        let key = Key {
            source,
            entry: meta.entry.clone(),
            detector: meta.detector.clone(),
            time_zone: meta.time_zone.clone(),
        };
        let (key, line) = self.line(key);
        line.counts.received(source, 1);
        line.frames += 1;
        let held = Held {
            spot,
            line: key,
            received_at: meta.received_at,
            detect_time: meta.detect_time,
            noticed: Instant::now(),
            image_bytes: meta.image_bytes,
            taken: false,
        };
        self.frames.insert(number, held);
        self.put_in_line(number, fresh);
    }

    /// What became of a frame; gives its place if it is not wanted any more.
    pub(super) fn settled(&mut self, number: u64, disposition: Disposition) -> Option<Spot> {
        let held = self.frames.get_mut(&number)?;
        held.taken = false;
        self.taken -= 1;
        let line = self.lines.get(&held.line)?;
        match disposition {
            Disposition::Accepted | Disposition::Rejected => {}
            // Said by `take`.
            Disposition::Dropped => line.counts.dropped("max-age", 1),
            Disposition::Released if self.stopping => {
                line.counts.returned(1);
                self.forget(number);
                return None;
            }
            Disposition::Released => {
                self.released.push(number);
                return None;
            }
        }
        self.forget(number)
    }

    /// Puts frames that were given back in line again.
    pub(super) fn offer_released(&mut self) {
        for number in std::mem::take(&mut self.released) {
            self.put_in_line(number, false);
        }
    }

    /// Forgets what fits and is not in hand, and counts it.
    pub(super) fn purge(&mut self, which: &Which) -> (Vec<Spot>, Purged) {
        let fits = self.frames.iter().filter(|(_, held)| which.fits(&held.line.detector, held.received_at));
        let (taken, meant): (Vec<_>, Vec<_>) = fits.map(|(number, held)| (*number, held.taken)).partition(|it| it.1);
        let mut gone = Vec::new();
        for (number, _) in meant {
            if let Some(line) = self.frames.get(&number).and_then(|held| self.lines.get(&held.line)) {
                line.counts.dropped("purged", 1);
            }
            gone.extend(self.forget(number));
        }
        let purged = Purged { removed: gone.len() as u64, in_hand: taken.len() as u64 };
        (gone, purged)
    }

    /// Every frame that lies in this segment.
    pub(super) fn in_segment(&self, segment: u64) -> Vec<(u64, Spot)> {
        let inside = self.frames.iter().filter(|(_, held)| held.spot.segment() == segment);
        inside.map(|(number, held)| (*number, held.spot.clone())).collect()
    }

    /// They lie somewhere else now.
    pub(super) fn moved(&mut self, renewed: impl Iterator<Item = (u64, Spot)>) {
        for (number, spot) in renewed {
            if let Some(held) = self.frames.get_mut(&number) {
                held.spot = spot;
            }
        }
    }

    /// Takes everything out of line that nobody has taken hold of, and offers nothing more.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
        let waiting: Vec<u64> = self.frames.iter().filter(|(_, held)| !held.taken).map(|(number, _)| *number).collect();
        for number in waiting {
            if let Some(line) = self.frames.get(&number).and_then(|held| self.lines.get(&held.line)) {
                line.counts.returned(1);
            }
            self.forget(number);
        }
        // Offers that wait for room come back at once; the lines are kept for those in hand.
        for line in self.lines.values_mut() {
            line.lanes = Lanes::default();
        }
    }

    pub(super) fn has_taken(&self) -> bool {
        self.taken > 0
    }

    /// Shows how much there is.
    pub(super) fn show(&self) {
        self.metrics.gauge("spool_frames", &[]).set(self.frames.len() as f64);
        self.metrics.gauge("spool_bytes", &[]).set(self.bytes as f64);
    }

    fn line(&mut self, key: Key) -> (Arc<Key>, &mut Line) {
        let key = self.lines.get_key_value(&key).map_or_else(|| Arc::new(key), |(key, _)| key.clone());
        let line = self.lines.entry(key.clone()).or_insert_with(|| {
            let terms = terms(&self.entries, &key);
            let detector = detector(&key, terms);
            let served = Served { spool: self.spool.clone(), key: key.clone() };
            Line {
                lanes: Lanes::default(),
                sequence: 0,
                terms,
                ready: self.intake.register(detector.clone(), Arc::new(served)),
                detector,
                counts: self.metrics.detector(&key.detector),
                frames: 0,
            }
        });
        (key, line)
    }

    fn put_in_line(&mut self, number: u64, fresh: bool) {
        let Some(held) = self.frames.get(&number) else { return };
        let Some(line) = self.lines.get_mut(&held.line) else { return };
        let time = i64::try_from(held.detect_time.as_nanosecond()).unwrap_or(i64::MAX);
        line.lanes.put(Waiting { number, noticed: held.noticed, time }, fresh, &mut line.sequence);
        line.ready.ready();
    }

    /// Takes a frame out of memory, and its line with the last one. In the lanes it is passed over.
    fn forget(&mut self, number: u64) -> Option<Spot> {
        let held = self.frames.remove(&number)?;
        if let Some(line) = self.lines.get_mut(&held.line) {
            line.frames -= 1;
            if line.frames == 0 {
                self.lines.remove(&held.line);
            }
        }
        Some(held.spot)
    }

    /// The next frame of a line.
    fn offer(&mut self, key: &Arc<Key>, spool: Arc<Spool>) -> Option<Offer> {
        let line = self.lines.get_mut(key)?;
        loop {
            let waiting = line.lanes.next(line.terms.order, Instant::now(), &mut line.sequence)?;
            let Some(held) = self.frames.get_mut(&waiting.number).filter(|held| !held.taken) else { continue };
            held.taken = true;
            self.taken += 1;
            let (tell, number) = (self.tell.clone(), waiting.number);
            // Made here, so that a take that is dropped before it runs is news, too. No news reaches a spool that is gone.
            let receipt =
                Receipt::new(move |disposition| tell.send(News::Settled(number, disposition)).unwrap_or_default());
            let image_bytes = held.image_bytes;
            return Some(Offer { image_bytes, take: Box::new(move |buffer| take(&spool, number, receipt, buffer)) });
        }
    }
}

/// A line as the queue sees it.
struct Served {
    spool: Weak<Spool>,
    key: Arc<Key>,
}

impl queue::Line for Served {
    fn next(&self) -> Option<Offer> {
        let spool = self.spool.upgrade()?;
        let mut index = lock(&spool.index);
        index.offer(&self.key, spool.clone())
    }
}

fn take(spool: &Spool, number: u64, receipt: Receipt, buffer: &mut Vec<u8>) -> Taken {
    let (spot, noticed, detector, max_age) = {
        let index = lock(&spool.index);
        let found = index.frames.get(&number).and_then(|held| Some((held, index.lines.get(&held.line)?)));
        let Some((held, line)) = found else { return Taken::Gone };
        (held.spot.clone(), held.noticed, line.detector.clone(), line.terms.max_age)
    };
    let (meta, whole) = match spot.read(buffer) {
        Ok((Some(meta), whole)) => (meta, whole),
        Ok((None, _)) => {
            tracing::error!("what is known about a frame in the spool cannot be read any more; trying again");
            return Taken::Gone;
        }
        Err(error) => {
            tracing::warn!(%error, "cannot read a frame in the spool; trying again");
            return Taken::Gone;
        }
    };
    let age = Duration::try_from(Timestamp::now().duration_since(meta.detect_time)).unwrap_or_default();
    if whole && meta.flaw.is_none() && !max_age.is_zero() && age > max_age {
        receipt.settle(Disposition::Dropped);
        return Taken::Gone;
    }
    let frame = Frame {
        id: FrameId::parse(&meta.id).unwrap_or_else(FrameId::generate),
        detector,
        detect_time: meta.detect_time,
        received_at: meta.received_at,
        noticed,
        source: SourceKind::parse(&meta.source).unwrap_or(SourceKind::Push),
        original_name: meta.name.into(),
        image_bytes: meta.image_bytes,
    };
    if let Some(flaw) = meta.flaw.filter(|_| whole) {
        let refusal = Refusal { reason: flaw.reason, status: None, message: flaw.message, attempts: 0 };
        return Taken::Flawed(frame, receipt, refusal);
    }
    match (whole, meta.base64) {
        (true, true) => Taken::Base64(frame, receipt),
        (true, false) => Taken::Frame(frame, receipt),
        (false, _) => {
            let message = "the disk gave back something else than was written: it is failing".to_owned();
            let refusal = Refusal { reason: Reason::InternalError, status: None, message, attempts: 0 };
            Taken::Flawed(frame, receipt, refusal)
        }
    }
}

fn terms(entries: &[Arc<Entry>], key: &Key) -> Terms {
    let entry = entries.iter().find(|entry| entry.name == key.entry && kind_of(entry) == Some(key.source));
    entry.map_or(
        // Its entry is gone: it goes out as it came.
        Terms { rate: 0.0, weight: 1, order: Order::default(), max_age: Duration::ZERO },
        |it| Terms { rate: it.rate, weight: it.weight, order: it.order, max_age: it.max_age },
    )
}

fn detector(key: &Key, terms: Terms) -> Arc<Detector> {
    Arc::new(Detector {
        name: key.detector.as_str().into(),
        time_zone: key.time_zone.as_str().into(),
        rate: terms.rate,
        weight: terms.weight,
    })
}

impl fmt::Debug for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Index({} frames)", self.frames.len())
    }
}

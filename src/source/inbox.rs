//! The inbox: messages that a broker delivered and that are not settled with it yet, in one line for each detector.
//!
//! What a message means for its frame is decided here, once for every broker: whose frame it is, when it was detected, and
//! whether it can become one at all. Not here: talking to the broker, and what is said to it when a frame is settled.
//!
//! A delivered message is in memory before the queue gives it room, so the inbox bounds what is asked for.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use jiff::Timestamp;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;

use super::message::{self, Image, Known};
use super::{Entry, Order, Surroundings, Template, believable};
use crate::encode::body;
use crate::frame::{Detector, Frame, FrameId, SourceKind};
use crate::metrics::{DetectorMetrics, Metrics};
use crate::queue::{self, Intake, Offer, Ready, Taken};
use crate::settle::{Disposition, Reason, Receipt, Refusal};

/// Messages of one entry that were delivered and are not settled. More than `publish.max_in_flight` of its default and a
/// line's frames ahead together, so that the engine never waits; few enough that several boxes share a backlog evenly.
const HELD_MAX: usize = 192;
/// Bytes of one entry's messages that stand in line. One message more may come than fits.
const WAITING_BYTES_MAX: u64 = 16 << 20;
/// Messages that one request asks for.
const REQUEST_MAX: usize = 48;
/// Below this many the broker is not asked again while others are in hand: one question for each frame would cost more
/// than the frames.
const REQUEST_MIN: usize = 16;
/// Detectors with a line of their own. Beyond it, lines without frames are taken down.
const LINES_MAX: usize = 1000;
/// One turn in so many goes to the line's oldest frame, the others to its freshest.
const OLDEST_EVERY: u8 = 4;
/// Bytes from a payload's end that tell it from another one of the same name.
const DIGEST_TAIL: usize = 1024;

/// What a broker delivered. `K` is the broker's name of the message, the same for every delivery.
#[derive(Debug)]
pub(super) struct Message<K> {
    pub key: K,
    /// The key as people write it.
    pub name: String,
    /// The image, or the engine's JSON.
    pub payload: Vec<u8>,
    /// `detectorName`, `detectTimeUtc` and `ianaTimeZone` as they stand beside the image.
    pub beside: [Option<String>; 3],
    /// The parts of its subject, where there is one.
    pub levels: Vec<String>,
    /// When the broker got it.
    pub broker_time: Timestamp,
    /// The broker has delivered it before.
    pub again: bool,
    /// It must become a dead letter, and why.
    pub condemned: Option<Refusal>,
}

/// What is to be said to the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is published, or dropped by a policy: acknowledge it.
    Done,
    /// It is durably a dead letter: never deliver it again.
    Dead,
    /// Nothing happened: deliver it again, to whomever.
    Back,
}

/// What frames report. Never more than one for each message held, so bounded by [`HELD_MAX`].
pub(super) type News<K> = UnboundedReceiver<(K, Disposition)>;

/// The messages of one entry.
pub(super) struct Inbox<K> {
    entry: Arc<Entry>,
    template: Option<Template>,
    kind: SourceKind,
    max_frame: u64,
    intake: Intake,
    metrics: Arc<Metrics>,
    tell: UnboundedSender<(K, Disposition)>,
    held: HashMap<K, Held>,
    lines: HashMap<(String, String), Line<K>>,
    /// What the next message may be expected to have, in bytes.
    typical: u64,
    up: bool,
}

struct Held {
    counts: Arc<DetectorMetrics>,
    line: (String, String),
    /// Whether an encode worker has had it: it did not bring the daemon down.
    taken: Arc<AtomicBool>,
    /// It is settled here, and the broker has not confirmed that it knows.
    verdict: Option<Verdict>,
}

struct Line<K> {
    waiting: Arc<Waiting<K>>,
    ready: Ready,
    counts: Arc<DetectorMetrics>,
    held: usize,
}

/// A detector's messages in line.
struct Waiting<K> {
    detector: Arc<Detector>,
    kind: SourceKind,
    order: Order,
    max_age: Duration,
    stack: Mutex<Stack<K>>,
    tell: UnboundedSender<(K, Disposition)>,
}

struct Stack<K> {
    letters: BTreeMap<(Timestamp, K), Letter>,
    bytes: u64,
    turns: u8,
}

/// One message in line.
struct Letter {
    id: FrameId,
    name: String,
    image: Vec<u8>,
    detect_time: Timestamp,
    received_at: Timestamp,
    noticed: Instant,
    flaw: Option<Refusal>,
    taken: Arc<AtomicBool>,
}

impl<K: Copy + Ord + Hash + Send + 'static> Inbox<K> {
    pub(super) fn new(around: &Surroundings, kind: SourceKind) -> (Self, News<K>) {
        let (tell, news) = unbounded_channel();
        let entry = around.entry.clone();
        let template = Template::parse(&entry.name, entry.source.placeholders()).ok();
        let inbox = Self {
            template,
            kind,
            max_frame: around.max_frame,
            intake: around.intake.clone(),
            metrics: around.metrics.clone(),
            tell,
            held: HashMap::new(),
            lines: HashMap::new(),
            typical: around.max_frame,
            up: false,
            entry,
        };
        // From the start on its series are there, and what was lost or came again can be counted.
        if inbox.template.as_ref().is_some_and(Template::is_fixed) {
            inbox.metrics.detector(&inbox.entry.name).up(false);
        }
        inbox.redelivered(0);
        inbox.lost_upstream(0);
        (inbox, news)
    }

    /// How many messages the broker may be asked for now; 0 while others must be settled first.
    pub(super) fn room(&self) -> usize {
        let free = HELD_MAX.saturating_sub(self.held.len());
        if free < REQUEST_MIN {
            return 0;
        }
        let bytes = WAITING_BYTES_MAX.saturating_sub(self.waiting_bytes());
        let fit = usize::try_from(bytes / self.typical.max(1)).unwrap_or(REQUEST_MAX);
        // Where nothing waits, one of any size.
        let least = usize::from(bytes == WAITING_BYTES_MAX);
        fit.max(least).min(free).min(REQUEST_MAX)
    }

    /// Whether this message is in hand.
    pub(super) fn holds(&self, key: K) -> bool {
        self.held.contains_key(&key)
    }

    /// How many messages are in hand, those that the broker does not know to be settled included.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Every message that the broker must know to be in hand, and whether a worker has had it.
    pub(super) fn in_hand(&self) -> impl Iterator<Item = (K, bool)> + '_ {
        let open = self.held.iter().filter(|(_, held)| held.verdict.is_none());
        open.map(|(key, held)| (*key, held.taken.load(Ordering::Relaxed)))
    }

    /// Puts a message in line. One that is in hand already stays as it is.
    pub(super) fn accept(&mut self, message: Message<K>) {
        if message.again {
            self.redelivered(1);
        }
        if self.held.contains_key(&message.key) {
            return;
        }
        let key = message.key;
        self.typical = (self.typical - self.typical / 8).max(message.payload.len() as u64);
        let (line, letter) = self.read(message);
        let (taken, order) = (letter.taken.clone(), (letter.detect_time, key));
        let at = self.line(line.clone());
        at.held += 1;
        at.counts.received(at.waiting.kind, 1);
        let counts = at.counts.clone();
        at.waiting.lock().push(order, letter);
        at.ready.ready();
        self.held.insert(key, Held { counts, line, taken, verdict: None });
    }

    /// A frame was settled: what to say to the broker. Counts what only the source knows.
    pub(super) fn settled(&mut self, key: K, disposition: Disposition) -> Option<Verdict> {
        let held = self.held.get_mut(&key)?;
        let verdict = match disposition {
            Disposition::Accepted => Verdict::Done,
            Disposition::Rejected => Verdict::Dead,
            // Said by the line, for what is too old.
            Disposition::Dropped => {
                held.counts.dropped("max-age", 1);
                Verdict::Done
            }
            Disposition::Released => {
                held.counts.returned(1);
                Verdict::Back
            }
        };
        held.verdict = Some(verdict);
        Some(verdict)
    }

    /// Every message that is settled here and of which the broker has not said that it knows.
    pub(super) fn unconfirmed(&self) -> Vec<(K, Verdict)> {
        self.held.iter().filter_map(|(key, held)| Some((*key, held.verdict?))).collect()
    }

    /// The broker knows: the message is forgotten.
    pub(super) fn confirmed(&mut self, key: K) {
        let Some(held) = self.held.remove(&key) else { return };
        if let Some(line) = self.lines.get_mut(&held.line) {
            line.held -= 1;
        }
    }

    /// Takes those out of line that are not ours any more, and all where there are none left to keep. What a worker has
    /// goes on. Gives how many went.
    pub(super) fn give_back(&mut self, keep: impl Fn(K) -> bool) -> Vec<K> {
        let mut gone = Vec::new();
        for line in self.lines.values() {
            let mut stack = line.waiting.lock();
            let lost: Vec<_> = stack.letters.keys().filter(|(_, key)| !keep(*key)).copied().collect();
            for at in lost {
                stack.remove(at);
                gone.push(at.1);
            }
        }
        for key in &gone {
            if let Some(held) = self.held.get(key) {
                held.counts.returned(1);
            }
            self.confirmed(*key);
        }
        gone
    }

    /// Says whether the broker can be used.
    pub(super) fn up(&mut self, up: bool) {
        self.up = up;
        if self.template.as_ref().is_some_and(Template::is_fixed) {
            self.metrics.detector(&self.entry.name).up(up);
        }
        for line in self.lines.values() {
            line.counts.up(up);
        }
    }

    /// `n` messages were trimmed before we had their content.
    pub(super) fn lost_upstream(&self, n: u64) {
        let labels = [("detector", &*self.entry.name), ("reason", "trimmed")];
        self.metrics.counter("lost_upstream_total", &labels).increment(n);
    }

    fn redelivered(&self, n: u64) {
        self.metrics.counter("redelivered_total", &[("detector", &self.entry.name)]).increment(n);
    }

    fn waiting_bytes(&self) -> u64 {
        self.lines.values().map(|line| line.waiting.lock().bytes).sum()
    }

    /// Whose frame it is, and what it says of itself.
    fn read(&self, message: Message<K>) -> ((String, String), Letter) {
        let Message { key: _, name, payload, beside, levels, broker_time, again: _, condemned } = message;
        let now = Timestamp::now();
        let id = id_of(&self.entry, &name, &beside, &payload, broker_time);
        let [detector_name, detect_time, time_zone] = &beside;
        let known = Known::from_fields(detector_name.as_deref(), detect_time.as_deref(), time_zone.as_deref());
        let found = known.and_then(|known| {
            let (image, known) = message::payload(&payload, known)?;
            let image = match image {
                Image::Raw(_) => None,
                Image::Base64(text) => Some(body::decode(&text).ok_or(message::Flaw {
                    field: Some("expanded"),
                    message: "is not standard padded base64".into(),
                })?),
            };
            Ok((image, known))
        });
        let (image, known, mut flaw) = match found {
            Ok((image, known)) => (image.unwrap_or(payload), known, None),
            Err(flaw) => {
                (payload, Known::default(), Some(refusal(Reason::Unsupported, format!("the message: {flaw}"))))
            }
        };
        let levels: Vec<&[u8]> = levels.iter().map(String::as_bytes).collect();
        let filled = self.template.as_ref().and_then(|it| it.fill(&levels, |_| known.detector_name.clone()));
        if filled.is_none() && flaw.is_none() {
            let why = format!("the message does not say what `{}` stands for", self.entry.name);
            flaw = Some(refusal(Reason::Unsupported, why));
        }
        if image.len() as u64 > self.max_frame && flaw.is_none() {
            let why = format!("{} bytes; `encode.max_frame` is {}", image.len(), self.max_frame);
            flaw = Some(refusal(Reason::TooLarge, why));
        }
        let detect_time = known.detect_time.filter(|time| {
            let believed = believable(*time, now);
            if !believed {
                self.metrics.counter("detect_times_corrected_total", &[]).increment(1);
            }
            believed
        });
        let broker_time = if believable(broker_time, now) { broker_time } else { now };
        let line = (
            filled.unwrap_or_else(|| self.entry.name.clone()),
            known.time_zone.unwrap_or_else(|| self.entry.time_zone.clone()),
        );
        let letter = Letter {
            id,
            name,
            image,
            detect_time: detect_time.unwrap_or(broker_time),
            received_at: now,
            noticed: Instant::now(),
            flaw: condemned.or(flaw),
            taken: Arc::default(),
        };
        (line, letter)
    }

    fn line(&mut self, key: (String, String)) -> &mut Line<K> {
        if !self.lines.contains_key(&key) && self.lines.len() >= LINES_MAX {
            self.lines.retain(|_, line| line.held > 0);
        }
        self.lines.entry(key).or_insert_with_key(|(name, zone)| {
            let entry = &self.entry;
            let detector = Arc::new(Detector {
                name: name.as_str().into(),
                time_zone: zone.as_str().into(),
                rate: entry.rate,
                weight: entry.weight,
            });
            let waiting = Arc::new(Waiting {
                detector: detector.clone(),
                kind: self.kind,
                order: entry.order,
                max_age: entry.max_age,
                stack: Mutex::new(Stack { letters: BTreeMap::new(), bytes: 0, turns: 0 }),
                tell: self.tell.clone(),
            });
            let ready = self.intake.register(detector, waiting.clone());
            let counts = self.metrics.detector(name);
            counts.up(self.up);
            Line { waiting, ready, counts, held: 0 }
        })
    }
}

impl<K: Copy + Ord> Stack<K> {
    fn push(&mut self, at: (Timestamp, K), letter: Letter) {
        self.bytes += letter.image.len() as u64;
        self.letters.insert(at, letter);
    }

    fn remove(&mut self, at: (Timestamp, K)) -> Option<Letter> {
        let letter = self.letters.remove(&at)?;
        self.bytes -= letter.image.len() as u64;
        Some(letter)
    }

    /// The letter whose turn it is.
    fn pop(&mut self, order: Order) -> Option<(K, Letter)> {
        self.turns = (self.turns + 1) % OLDEST_EVERY;
        let oldest = match order {
            Order::OldestFirst => true,
            Order::FreshestFirst => self.turns == 0,
        };
        let at = *if oldest { self.letters.keys().next()? } else { self.letters.keys().next_back()? };
        Some((at.1, self.remove(at)?))
    }
}

impl<K: Copy + Ord + Send + 'static> Waiting<K> {
    fn lock(&self) -> MutexGuard<'_, Stack<K>> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn too_old(&self, letter: &Letter) -> bool {
        let age = Timestamp::now().duration_since(letter.detect_time);
        !self.max_age.is_zero() && Duration::try_from(age).is_ok_and(|age| age > self.max_age)
    }
}

impl<K: Copy + Ord + Send + 'static> queue::Line for Waiting<K> {
    fn next(&self) -> Option<Offer> {
        loop {
            let (key, letter) = self.lock().pop(self.order)?;
            let tell = self.tell.clone();
            // Made here, so that a take that is dropped before it runs is news, too. No news reaches a source that is gone.
            let receipt = Receipt::new(move |disposition| tell.send((key, disposition)).unwrap_or_default());
            if letter.flaw.is_none() && self.too_old(&letter) {
                receipt.settle(Disposition::Dropped);
                continue;
            }
            let (detector, kind) = (self.detector.clone(), self.kind);
            return Some(Offer {
                image_bytes: letter.image.len() as u64,
                take: Box::new(move |buffer| take(letter, detector, kind, receipt, buffer)),
            });
        }
    }
}

fn take(letter: Letter, detector: Arc<Detector>, source: SourceKind, receipt: Receipt, buffer: &mut Vec<u8>) -> Taken {
    let Letter { id, name, image, detect_time, received_at, noticed, flaw, taken } = letter;
    taken.store(true, Ordering::Relaxed);
    let image_bytes = image.len() as u64;
    // The worker's own buffer keeps its size; this one is freed with the letter.
    buffer.extend_from_slice(&image);
    let original_name = name.into();
    let frame = Frame { id, detector, detect_time, received_at, noticed, source, original_name, image_bytes };
    match flaw {
        Some(refusal) => Taken::Flawed(frame, receipt, refusal),
        None => Taken::Frame(frame, receipt),
    }
}

pub(super) fn refusal(reason: Reason, message: String) -> Refusal {
    Refusal { reason, status: None, message, attempts: 0 }
}

/// The same for each delivery of a message. Brokers begin to count anew when their data is lost, so the message's own
/// bytes are part of it.
fn id_of(entry: &Entry, name: &str, beside: &[Option<String>; 3], payload: &[u8], broker_time: Timestamp) -> FrameId {
    let mut context = Context::new(&SHA256);
    let place = entry.place();
    let length = payload.len().to_le_bytes();
    let fields = beside.iter().map(|it| it.as_deref().unwrap_or_default().as_bytes());
    let tail = &payload[payload.len().saturating_sub(DIGEST_TAIL)..];
    for part in [place.as_bytes(), name.as_bytes(), &length, tail].into_iter().chain(fields) {
        context.update(part);
        context.update(b"\0");
    }
    let digest = context.finish();
    let mut short = [0; 10];
    short.copy_from_slice(&digest.as_ref()[..10]);
    FrameId::derived(u64::try_from(broker_time.as_millisecond()).unwrap_or(0), short)
}

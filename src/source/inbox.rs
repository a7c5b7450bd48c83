//! The inbox: messages that a broker delivered and that are not settled with it yet, in one line for each detector.
//!
//! What a message means for its frame is decided here, once for every broker: whose frame it is, when it was detected, and
//! whether it can become one at all. Not here: talking to the broker, and what is said to it when a frame is settled.
//!
//! A delivered message is in memory before the queue gives it room, so the inbox bounds what is asked for.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use jiff::Timestamp;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;

use super::message::{self, Image, Known};
use super::{Entry, Order, Surroundings, Template, believable, believed};
use crate::encode::body;
use crate::frame::{Detector, Frame, FrameId, SourceKind};
use crate::metrics::{DetectorMetrics, Metrics, Serving};
use crate::queue::{self, Intake, Offer, Ready, Taken};
use crate::settle::{Disposition, Reason, Receipt, Refusal};

/// Messages of one entry that were delivered and are not settled. More than `publish.max_in_flight` of its default and a
/// line's frames ahead together, so that the engine never waits; few enough that several boxes share a backlog evenly.
const HELD_MAX: usize = 192;
/// Bytes of one entry's messages that stand in line. How many messages are asked for follows from the largest of the last
/// ones: where a broker counts messages only, a first one that is far larger may come with others like it.
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
/// Settled messages that are remembered: a broker that lost acknowledgements, which it may have confirmed, delivers again.
const REMEMBERED_MAX: usize = 4096;
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
    /// How many of them have a verdict.
    settled: usize,
    /// What became of the last ones, until the process ends.
    remembered: Remembered,
    lines: HashMap<(String, String), Line<K>>,
    /// Bytes that stand in line.
    waiting_bytes: Arc<AtomicU64>,
    /// What the next message may be expected to have, in bytes.
    typical: u64,
    /// Of a detector with a name of its own, from the start on.
    serving: Option<Serving>,
    up: bool,
}

struct Held {
    id: FrameId,
    counts: Arc<DetectorMetrics>,
    line: (String, String),
    /// Whether an encode worker has had it: it did not bring the daemon down.
    taken: Arc<AtomicBool>,
    /// It is settled here, and the broker has not confirmed that it knows.
    verdict: Option<Verdict>,
}

/// Bounded by [`REMEMBERED_MAX`].
#[derive(Default)]
struct Remembered {
    verdicts: HashMap<FrameId, Verdict>,
    order: VecDeque<FrameId>,
}

struct Line<K> {
    waiting: Arc<Waiting<K>>,
    ready: Ready,
    counts: Arc<DetectorMetrics>,
    held: usize,
    /// Its alarm counts as long as the line is there.
    _serving: Serving,
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
    turns: u8,
    /// Of all lines together.
    waiting_bytes: Arc<AtomicU64>,
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
        let mut inbox = Self {
            template,
            kind,
            max_frame: around.max_frame,
            intake: around.intake.clone(),
            metrics: around.metrics.clone(),
            tell,
            held: HashMap::new(),
            settled: 0,
            remembered: Remembered::default(),
            lines: HashMap::new(),
            waiting_bytes: Arc::default(),
            typical: around.max_frame,
            up: false,
            serving: None,
            entry,
        };
        // From the start on its series are there, and what was lost or came again can be counted.
        if inbox.template.as_ref().is_some_and(Template::is_fixed) {
            let counts = inbox.metrics.detector(&inbox.entry.name);
            counts.up(false);
            inbox.serving = Some(counts.serve(inbox.entry.silence_alarm));
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

    /// While there is no room, nothing is asked for, and a detector that is not heard of is not silent. Call it every few seconds.
    pub(super) fn excuse_silence(&self) {
        if self.room() == 0 {
            for line in self.lines.values() {
                line.counts.was_not_listened_to();
            }
        }
    }

    /// Bytes that may be asked for now.
    pub(super) fn room_bytes(&self) -> u64 {
        WAITING_BYTES_MAX.saturating_sub(self.waiting_bytes())
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

    /// Puts a message in line. One that is in hand stays as it is; one that was settled is to be confirmed once more, and
    /// is no frame.
    pub(super) fn accept(&mut self, message: Message<K>) {
        let in_hand = self.held.contains_key(&message.key);
        let id = id_of(&self.entry, &message);
        let known = self.remembered.verdicts.get(&id).copied();
        if message.again || in_hand || known.is_some() {
            self.redelivered(1);
        }
        if in_hand {
            return;
        }
        let key = message.key;
        self.typical = (self.typical - self.typical / 8).max(message.payload.len() as u64);
        let (line, letter) = self.read(message, id.clone());
        let (taken, order) = (letter.taken.clone(), (letter.detect_time, key));
        let at = self.line(line.clone());
        at.held += 1;
        let counts = at.counts.clone();
        if known.is_none() {
            counts.received(at.waiting.kind, 1);
            at.waiting.lock().push(order, letter);
            at.ready.ready();
        }
        self.settled += usize::from(known.is_some());
        self.held.insert(key, Held { id, counts, line, taken, verdict: known });
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
        self.settled += 1;
        if verdict != Verdict::Back {
            self.remembered.add(held.id.clone(), verdict);
        }
        Some(verdict)
    }

    /// How many are settled here without the broker having said that it knows.
    pub(super) fn unconfirmed_len(&self) -> usize {
        self.settled
    }

    /// Every message that is settled here and of which the broker has not said that it knows.
    pub(super) fn unconfirmed(&self) -> Vec<(K, Verdict)> {
        self.held.iter().filter_map(|(key, held)| Some((*key, held.verdict?))).collect()
    }

    /// The broker knows: the message is forgotten.
    pub(super) fn confirmed(&mut self, key: K) {
        let Some(held) = self.held.remove(&key) else { return };
        self.settled -= usize::from(held.verdict.is_some());
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
        self.waiting_bytes.load(Ordering::Relaxed)
    }

    /// Whose frame it is, and what it says of itself.
    fn read(&self, message: Message<K>, id: FrameId) -> ((String, String), Letter) {
        let Message { key: _, name, payload, beside, levels, broker_time, again: _, condemned } = message;
        let now = Timestamp::now();
        let [detector_name, detect_time, time_zone] = &beside;
        let known = Known::from_fields(detector_name.as_deref(), detect_time.as_deref(), time_zone.as_deref());
        let found = known.and_then(|known| {
            let (image, known) = message::payload(&payload, known)?;
            let image = match image {
                Image::Raw(_) => None,
                Image::Base64(text) => {
                    let mut image = Vec::new();
                    if !body::decode(text.as_bytes(), &mut image) {
                        let message = "is not standard padded base64".into();
                        return Err(message::Flaw { field: Some("expanded"), message });
                    }
                    Some(image)
                }
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
        let detector = message::named(&self.entry.name, filled).unwrap_or_else(|why| {
            flaw.get_or_insert_with(|| refusal(Reason::Unsupported, why));
            self.entry.name.clone()
        });
        if image.len() as u64 > self.max_frame && flaw.is_none() {
            let why = format!("{} bytes; `encode.max_frame` is {}", image.len(), self.max_frame);
            flaw = Some(refusal(Reason::TooLarge, why));
        }
        let detect_time = believed(known.detect_time, now, &self.metrics);
        let broker_time = if believable(broker_time, now) { broker_time } else { now };
        let line = (detector, known.time_zone.unwrap_or_else(|| self.entry.time_zone.clone()));
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
                stack: Mutex::new(Stack {
                    letters: BTreeMap::new(),
                    turns: 0,
                    waiting_bytes: self.waiting_bytes.clone(),
                }),
                tell: self.tell.clone(),
            });
            let ready = self.intake.register(detector, waiting.clone());
            let counts = self.metrics.detector(name);
            counts.up(self.up);
            let serving = counts.serve(entry.silence_alarm);
            Line { waiting, ready, counts, held: 0, _serving: serving }
        })
    }
}

impl Remembered {
    fn add(&mut self, id: FrameId, verdict: Verdict) {
        if self.order.len() >= REMEMBERED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.verdicts.remove(&oldest);
        }
        self.order.push_back(id.clone());
        self.verdicts.insert(id, verdict);
    }
}

impl<K: Copy + Ord> Stack<K> {
    fn push(&mut self, at: (Timestamp, K), letter: Letter) {
        self.waiting_bytes.fetch_add(letter.image.len() as u64, Ordering::Relaxed);
        self.letters.insert(at, letter);
    }

    fn remove(&mut self, at: (Timestamp, K)) -> Option<Letter> {
        let letter = self.letters.remove(&at)?;
        self.waiting_bytes.fetch_sub(letter.image.len() as u64, Ordering::Relaxed);
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
fn id_of<K>(entry: &Entry, message: &Message<K>) -> FrameId {
    let Message { name, payload, beside, broker_time, .. } = message;
    let place = entry.place();
    let length = payload.len().to_le_bytes();
    let fields = beside.iter().map(|it| it.as_deref().unwrap_or_default().as_bytes());
    let tail = &payload[payload.len().saturating_sub(DIGEST_TAIL)..];
    let parts = [place.as_bytes(), name.as_bytes(), &length, tail].into_iter().chain(fields);
    id_of_parts(u64::try_from(broker_time.as_millisecond()).unwrap_or(0), parts)
}

/// The same for the same parts.
pub(super) fn id_of_parts<'a>(millis: u64, parts: impl Iterator<Item = &'a [u8]>) -> FrameId {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(part);
        context.update(b"\0");
    }
    let digest = context.finish();
    let mut short = [0; 10];
    short.copy_from_slice(&digest.as_ref()[..10]);
    FrameId::derived(millis, short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::Line as _;
    use crate::source::Health;
    use tokio_util::sync::CancellationToken;

    struct Bench {
        inbox: Inbox<u64>,
        news: News<u64>,
        metrics: Arc<Metrics>,
    }

    impl Bench {
        /// `keys`: further keys of the entry.
        fn new(keys: &str) -> Self {
            let entry = format!(
                "name = '{{field.detectorName}}'\ntime_zone = 'UTC'\n{keys}\nredis = {{ url = 'redis://h', stream = 's' }}"
            );
            let metrics = Metrics::new();
            let around = Surroundings {
                entry: Arc::new(toml::from_str(&entry).unwrap()),
                intake: queue::queue(1 << 20, &metrics).0,
                metrics: metrics.clone(),
                max_frame: 1 << 20,
                health: Health::default(),
                directories: crate::source::directory::Shared::new(metrics.clone()).0,
                sessions: crate::source::Sessions::default(),
                spool: None,
                push: None,
                files: Arc::new(std::path::Path::to_path_buf),
                stop: CancellationToken::new(),
            };
            let (inbox, news) = Inbox::new(&around, SourceKind::Redis);
            Self { inbox, news, metrics }
        }

        /// One of `bytes` that was detected so many seconds ago.
        fn accept(&mut self, key: u64, bytes: usize, seconds_ago: i64) {
            let time = Timestamp::now() - jiff::SignedDuration::from_secs(seconds_ago);
            self.inbox.accept(Message {
                key,
                name: key.to_string(),
                payload: vec![0xff; bytes],
                beside: [Some("Cam".into()), Some(time.to_string()), None],
                levels: Vec::new(),
                broker_time: "2026-01-01T00:00:00Z".parse().unwrap(),
                again: false,
                condemned: None,
            });
        }

        /// What the queue and a worker do: the key of the next frame in line, with its receipt.
        fn taken(&self) -> Option<(u64, Receipt)> {
            let offer = self.inbox.lines.values().find_map(|line| line.waiting.next())?;
            match (offer.take)(&mut Vec::new()) {
                Taken::Frame(frame, receipt) | Taken::Base64(frame, receipt) | Taken::Flawed(frame, receipt, _) => {
                    Some((frame.original_name.to_str()?.parse().ok()?, receipt))
                }
                Taken::Gone => None,
            }
        }

        fn hear(&mut self) -> Option<Verdict> {
            let (key, disposition) = self.news.try_recv().unwrap();
            let verdict = self.inbox.settled(key, disposition);
            self.inbox.confirmed(key);
            verdict
        }
    }

    #[test]
    fn what_is_asked_for_is_bounded_in_messages_and_bytes() {
        let mut bench = Bench::new("");
        assert_eq!(bench.inbox.room(), 16, "nothing is known yet: as many of the largest as fit");
        for key in 0..HELD_MAX as u64 {
            bench.accept(key, 10, 0);
        }
        assert_eq!((bench.inbox.room(), bench.inbox.len()), (0, HELD_MAX));
        let gone = bench.inbox.give_back(|key| key >= REQUEST_MIN as u64);
        assert_eq!((gone.len(), bench.inbox.room()), (REQUEST_MIN, REQUEST_MIN), "grows as messages are settled");

        let mut bench = Bench::new("");
        bench.accept(0, usize::try_from(WAITING_BYTES_MAX).unwrap(), 0);
        assert_eq!((bench.inbox.room(), bench.inbox.room_bytes()), (0, 0));
        drop(bench.taken());
        assert_eq!(bench.inbox.room(), 1, "where nothing waits, one of any size");
    }

    #[test]
    fn nobody_is_silent_while_nothing_is_asked_for() {
        let mut bench = Bench::new("silence_alarm = '1s'");
        bench.accept(0, 10, 0);
        let cam = bench.metrics.detector("Cam");
        let until_silent = || {
            while !cam.counts().silent {
                std::thread::yield_now();
            }
        };
        until_silent();
        bench.inbox.excuse_silence();
        assert!(cam.counts().silent, "there is room, and nothing came");
        for key in 1..HELD_MAX as u64 {
            bench.accept(key, 10, 0);
        }
        until_silent();
        bench.inbox.excuse_silence();
        assert!(!cam.counts().silent, "how should it have been heard?");
    }

    #[test]
    fn the_freshest_goes_first_and_each_fourth_turn_is_the_oldests() {
        for (order, expected) in
            [("freshest-first", [0, 1, 2, 7, 3, 4, 5, 6]), ("oldest-first", [7, 6, 5, 4, 3, 2, 1, 0])]
        {
            let mut bench = Bench::new(&format!("order = '{order}'"));
            for age in [3, 0, 7, 5, 1, 6, 2, 4] {
                bench.accept(age, 10, i64::try_from(age).unwrap());
            }
            let taken: Vec<u64> = std::iter::from_fn(|| bench.taken()).map(|(key, _)| key).collect();
            assert_eq!(taken, expected, "{order}");
        }
    }

    #[test]
    fn every_message_is_counted_once_whatever_becomes_of_it() {
        let mut bench = Bench::new("max_age = '1m'");
        bench.accept(1, 10, 3600);
        bench.accept(2, 10, 0);
        bench.accept(3, 10, 1);
        // Turns: the two fresh ones, then the one that is too old, which the line drops by itself.
        let (first, receipt) = bench.taken().unwrap();
        receipt.settle(Disposition::Accepted);
        let (second, receipt) = bench.taken().unwrap();
        drop(receipt);
        assert_eq!((first, second), (2, 3));
        assert!(bench.taken().is_none());
        let heard: Vec<_> = (0..3).map(|_| bench.hear().unwrap()).collect();
        assert_eq!(heard, [Verdict::Done, Verdict::Back, Verdict::Done]);
        assert_eq!((bench.inbox.len(), bench.inbox.unconfirmed_len()), (0, 0));
        let counts = bench.metrics.detector("Cam").counts();
        // The pipeline counts what was published.
        assert_eq!((counts.received, counts.dropped, counts.returned, counts.pending), (3, 1, 1, 1));
    }

    #[test]
    fn a_message_in_hand_is_not_taken_twice_and_a_settled_one_is_only_confirmed_again() {
        let mut bench = Bench::new("");
        let accept = |bench: &mut Bench| {
            bench.inbox.accept(Message {
                key: 1,
                name: "1".into(),
                payload: b"\xff\xd8".to_vec(),
                beside: [Some("Cam".into()), None, None],
                levels: Vec::new(),
                broker_time: "2026-01-01T00:00:00Z".parse().unwrap(),
                again: false,
                condemned: None,
            });
        };
        accept(&mut bench);
        accept(&mut bench);
        assert_eq!(bench.inbox.len(), 1);
        bench.taken().unwrap().1.settle(Disposition::Rejected);
        assert_eq!(bench.hear(), Some(Verdict::Dead));
        accept(&mut bench);
        assert!(bench.taken().is_none());
        assert_eq!(bench.inbox.unconfirmed(), [(1, Verdict::Dead)]);
        assert_eq!(bench.metrics.detector("Cam").counts().received, 1);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut remembered = Remembered::default();
        let first = FrameId::generate();
        remembered.add(first.clone(), Verdict::Done);
        for _ in 0..REMEMBERED_MAX {
            remembered.add(FrameId::generate(), Verdict::Done);
        }
        assert_eq!((remembered.order.len(), remembered.verdicts.len()), (REMEMBERED_MAX, REMEMBERED_MAX));
        assert!(!remembered.verdicts.contains_key(&first));
    }
}

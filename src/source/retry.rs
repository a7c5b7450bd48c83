//! The retry line: dead letters that an operator sent back to be published, with or without a daemon running then.
//!
//! A pair lies in the `retry` sub-directory of the dead letters until the engine has it or it is a dead letter again, under
//! the same id. Looked at each second by its modification time alone. Rate and weight are those of the detector's entry.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Entry;
use crate::frame::{Detector, Frame, FrameId, SourceKind};
use crate::log::Repeats;
use crate::metrics::{DetectorMetrics, Metrics};
use crate::queue::{self, Intake, Offer, Ready, Taken};
use crate::settle::dead_letter::{DeadLetter, DeadLetters, Listed, Store};
use crate::settle::{Disposition, Receipt};

/// Between two looks at the directory.
const POLL: Duration = Duration::from_secs(1);
/// Frames accepted and not settled; the others wait in the directory.
const HELD_MAX: usize = 1000;
/// File systems stamp coarsely: a modification this young may hide another one behind it.
const STAMP_SETTLED: Duration = Duration::from_secs(2);

type News = (FrameId, Disposition);

/// Publishes what is in the retry line. Returns when stopped and everything in hand is settled.
/// `entries` are those of the configuration of now.
pub async fn run(
    dead_letters: Arc<DeadLetters>,
    entries: Arc<ArcSwap<Vec<Entry>>>,
    intake: Intake,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    let (mut source, mut news) = Source::new(dead_letters.store().clone(), entries, intake, metrics);
    let mut tick = interval(POLL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = tick.tick() => source.look().await,
            Some((id, disposition)) = news.recv() => source.settled(&id, disposition).await,
        }
    }
    source.stop();
    while source.has_offered()
        && let Some((id, disposition)) = news.recv().await
    {
        source.settled(&id, disposition).await;
    }
}

struct Source {
    /// The dead letters.
    store: Store,
    /// Those in the retry line.
    line: Store,
    entries: Arc<ArcSwap<Vec<Entry>>>,
    intake: Intake,
    metrics: Arc<Metrics>,
    /// Never more than one message for each frame offered, so bounded by [`HELD_MAX`].
    tell: UnboundedSender<News>,
    held: HashMap<FrameId, Held>,
    /// Broken on the disk, and reported.
    damaged: HashSet<FrameId>,
    lines: HashMap<LineKey, Line>,
    /// The directory's modification time, when everything of that time is known.
    seen: Option<SystemTime>,
    stopping: bool,
    repeats: Arc<Repeats>,
}

/// A detector's name and time zone.
type LineKey = (String, String);

struct Held {
    letter: Arc<DeadLetter>,
    noticed: Instant,
    standing: Standing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// In its line or with the queue.
    Offered,
    /// Given back: goes in line again at the next look.
    Released,
    /// Settled, but its files could not be removed: they never go in line again.
    Settled,
}

struct Line {
    waiting: Arc<Waiting>,
    ready: Ready,
    counts: Arc<DetectorMetrics>,
}

/// A detector's frames in line.
struct Waiting {
    store: Store,
    detector: Arc<Detector>,
    letters: Mutex<VecDeque<(Arc<DeadLetter>, Instant)>>,
    tell: UnboundedSender<News>,
    repeats: Arc<Repeats>,
}

impl Source {
    fn new(
        store: Store,
        entries: Arc<ArcSwap<Vec<Entry>>>,
        intake: Intake,
        metrics: Arc<Metrics>,
    ) -> (Self, UnboundedReceiver<News>) {
        let (tell, news) = unbounded_channel();
        let source = Self {
            line: store.retry_line(),
            store,
            entries,
            intake,
            metrics,
            tell,
            held: HashMap::new(),
            damaged: HashSet::new(),
            lines: HashMap::new(),
            seen: None,
            stopping: false,
            repeats: Arc::default(),
        };
        (source, news)
    }

    /// Puts given back frames in line again, and new ones where the directory has changed.
    async fn look(&mut self) {
        for (id, standing) in self.held.iter().map(|(id, held)| (id.clone(), held.standing)).collect::<Vec<_>>() {
            match standing {
                Standing::Released => self.offer(&id),
                Standing::Settled => self.clear(&id).await,
                Standing::Offered => {}
            }
        }
        if self.held.len() >= HELD_MAX {
            self.seen = None;
            return;
        }
        let (line, seen) = (self.line.clone(), self.seen);
        let (modified, ids) = match blocking(move || changed(&line, seen)).await {
            Ok(Some(change)) => change,
            Ok(None) => return,
            Err(error) => {
                if let Some(more) = self.repeats.came(&format!("look: {error}"), Instant::now()) {
                    tracing::warn!(%error, directory = %self.line.directory().display(), "cannot look for dead letters to retry{more}");
                }
                return;
            }
        };
        self.seen = modified;
        for id in ids {
            if self.held.len() >= HELD_MAX {
                self.seen = None;
                return;
            }
            if !self.held.contains_key(&id) {
                self.accept(id).await;
            }
        }
    }

    async fn accept(&mut self, id: FrameId) {
        let (store, line, asked) = (self.store.clone(), self.line.clone(), id.clone());
        let read = blocking(move || {
            let kept_again = matches!(store.show(&asked), Some(Listed::Sound(_)));
            // Settled, and then a crash came before the pair was cleared away. The JSON goes last.
            if kept_again || (!line.has_image(&asked) && !store.finish_retry(&asked)?) {
                return line.clear(&asked).map(|()| None);
            }
            Ok(line.show(&asked))
        });
        match read.await {
            Ok(Some(Listed::Sound(letter))) => {
                self.damaged.remove(&id);
                let held = Held { letter: Arc::new(letter), noticed: Instant::now(), standing: Standing::Released };
                self.held.insert(id.clone(), held);
                self.line_of(&id).counts.received(SourceKind::Retry, 1);
                self.offer(&id);
            }
            Ok(Some(Listed::Damaged { id, problem })) => {
                if self.damaged.insert(id.clone()) {
                    tracing::warn!(
                        %id, problem, directory = %self.line.directory().display(),
                        "a dead letter cannot be retried; restore its files or remove them"
                    );
                }
            }
            Ok(None) => {}
            Err(error) => {
                self.seen = None;
                if let Some(more) = self.repeats.came(&format!("leavings: {error}"), Instant::now()) {
                    tracing::warn!(%id, %error, "what is left of a dead letter cannot be removed from the retry line{more}");
                }
            }
        }
    }

    fn offer(&mut self, id: &FrameId) {
        let Some(held) = self.held.get_mut(id) else { return };
        held.standing = Standing::Offered;
        let waiting = (held.letter.clone(), held.noticed);
        let line = self.line_of(id);
        line.waiting.lock().push_back(waiting);
        line.ready.ready();
    }

    /// The line of a held frame.
    fn line_of(&mut self, id: &FrameId) -> &Line {
        let letter = &self.held[id].letter;
        self.lines.entry((letter.detector.clone(), letter.time_zone.clone())).or_insert_with_key(|(name, zone)| {
            // The detector's other frames share its rate limit, which goes by its name. One that is gone has none.
            let entries = self.entries.load();
            let (rate, weight) = Entry::of(name, &entries).map_or((0.0, 1), |entry| (entry.rate, entry.weight));
            let detector =
                Arc::new(Detector { name: name.as_str().into(), time_zone: zone.as_str().into(), rate, weight });
            let waiting = Arc::new(Waiting {
                store: self.line.clone(),
                detector: detector.clone(),
                letters: Mutex::default(),
                tell: self.tell.clone(),
                repeats: self.repeats.clone(),
            });
            let ready = self.intake.register(detector, waiting.clone());
            Line { waiting, ready, counts: self.metrics.detector(name) }
        })
    }

    async fn settled(&mut self, id: &FrameId, disposition: Disposition) {
        match disposition {
            Disposition::Accepted | Disposition::Rejected => self.clear(id).await,
            // Said by `take`: somebody removed the image.
            Disposition::Dropped => {
                self.line_of(id).counts.dropped("vanished", 1);
                self.clear(id).await;
            }
            Disposition::Released if self.stopping => {
                self.line_of(id).counts.returned(1);
                self.held.remove(id);
            }
            Disposition::Released => {
                if let Some(held) = self.held.get_mut(id) {
                    held.standing = Standing::Released;
                }
            }
        }
    }

    /// Removes the files of a settled frame; while that fails, it is held and never offered again.
    async fn clear(&mut self, id: &FrameId) {
        let (line, asked) = (self.line.clone(), id.clone());
        match blocking(move || line.clear(&asked)).await {
            Ok(()) => {
                let Some(gone) = self.held.remove(id) else { return };
                let key = (gone.letter.detector.clone(), gone.letter.time_zone.clone());
                if !self.held.values().any(|held| held.letter.detector == key.0 && held.letter.time_zone == key.1) {
                    self.lines.remove(&key);
                }
            }
            Err(error) => {
                if let Some(held) = self.held.get_mut(id)
                    && held.standing != Standing::Settled
                {
                    held.standing = Standing::Settled;
                    self.metrics.counter("settle_errors_total", &[("operation", "unlink")]).increment(1);
                    if let Some(more) = self.repeats.came(&format!("clear: {error}"), Instant::now()) {
                        tracing::warn!(%id, %error, "a retried dead letter cannot be removed from the retry line; trying again{more}");
                    }
                }
            }
        }
    }

    /// Takes everything out of line that nobody has taken hold of.
    fn stop(&mut self) {
        self.stopping = true;
        for line in self.lines.values() {
            for (letter, _) in line.waiting.lock().drain(..) {
                self.held.remove(&letter.id);
                line.counts.returned(1);
            }
        }
        let released = self.held.extract_if(|_, held| held.standing == Standing::Released);
        for (_, held) in released {
            self.metrics.detector(&held.letter.detector).returned(1);
        }
    }

    fn has_offered(&self) -> bool {
        self.held.values().any(|held| held.standing == Standing::Offered)
    }
}

impl Waiting {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(Arc<DeadLetter>, Instant)>> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl queue::Line for Waiting {
    fn next(&self) -> Option<Offer> {
        let (letter, noticed) = self.lock().pop_front()?;
        let (store, detector, repeats) = (self.store.clone(), self.detector.clone(), self.repeats.clone());
        let (tell, id) = (self.tell.clone(), letter.id.clone());
        // Made here, so that a take that is dropped before it runs is news, too. No news reaches a source that is gone.
        let receipt = Receipt::new(move |disposition| tell.send((id, disposition)).unwrap_or_default());
        Some(Offer {
            image_bytes: letter.image_bytes,
            take: Box::new(move |buffer| take(&store, detector, &letter, noticed, receipt, &repeats, buffer)),
        })
    }
}

fn take(
    store: &Store,
    detector: Arc<Detector>,
    letter: &DeadLetter,
    noticed: Instant,
    receipt: Receipt,
    repeats: &Repeats,
    buffer: &mut Vec<u8>,
) -> Taken {
    match store.read_image(&letter.id, buffer) {
        Ok(()) => {
            let frame = Frame {
                id: letter.id.clone(),
                detector,
                detect_time: letter.detect_time_utc,
                received_at: letter.received_at,
                noticed,
                source: SourceKind::parse(&letter.source).unwrap_or(SourceKind::Retry),
                original_name: letter.original_name.clone().into(),
                image_bytes: buffer.len() as u64,
            };
            Taken::Frame(frame, receipt)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            receipt.settle(Disposition::Dropped);
            Taken::Gone
        }
        Err(error) => {
            if let Some(more) = repeats.came(&format!("read: {error}"), Instant::now()) {
                tracing::warn!(id = %letter.id, %error, "cannot read a dead letter to retry; trying again{more}");
            }
            Taken::Gone
        }
    }
}

/// The ids in line, if the directory may have changed since; with its time, if nothing can hide behind that.
fn changed(line: &Store, seen: Option<SystemTime>) -> io::Result<Option<(Option<SystemTime>, Vec<FrameId>)>> {
    let modified = match std::fs::metadata(line.directory()) {
        Ok(meta) => meta.modified()?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    if seen == Some(modified) {
        return Ok(None);
    }
    let settled = SystemTime::now().duration_since(modified).is_ok_and(|age| age > STAMP_SETTLED);
    Ok(Some((settled.then_some(modified), line.ids()?)))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::Line as _;
    use crate::settle::Reason;
    use crate::settle::dead_letter::tests::{frame, open, refusal};
    use crate::source::directory;

    struct Bench {
        dir: tempfile::TempDir,
        letters: Arc<DeadLetters>,
        metrics: Arc<Metrics>,
        source: Source,
        news: UnboundedReceiver<News>,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (letters, metrics) = open(dir.path());
            let (source, news) = Source::new(letters.store().clone(), entries(), intake(), metrics.clone());
            Self { dir, letters, metrics, source, news }
        }

        /// A dead letter of that image that an operator retries.
        fn retried(&self, image: &[u8]) -> Frame {
            let frame = frame();
            self.letters.keep(&frame, image, &refusal(Reason::Rejected)).unwrap();
            self.letters.store().retry(&frame.id).unwrap();
            frame
        }

        /// What the queue and a worker do.
        fn taken(&self) -> Option<(Taken, Vec<u8>)> {
            let offer = self.source.lines.values().find_map(|line| line.waiting.next())?;
            let mut buffer = Vec::new();
            Some(((offer.take)(&mut buffer), buffer))
        }

        async fn hear(&mut self) {
            let (id, disposition) = self.news.recv().await.unwrap();
            self.source.settled(&id, disposition).await;
        }

        fn in_line(&self) -> usize {
            self.letters.store().retry_line().ids().unwrap().len()
        }
    }

    /// One, for the detector of [`frame`].
    fn entries() -> Arc<ArcSwap<Vec<Entry>>> {
        let entry =
            Entry { rate: 2.5, weight: 3, ..Entry::of_directory(&frame().detector.name, directory::Config::default()) };
        Arc::new(ArcSwap::from_pointee(vec![entry]))
    }

    fn intake() -> Intake {
        crate::queue::queue(1024, &Metrics::new()).0
    }

    #[tokio::test]
    async fn a_retried_dead_letter_is_offered_as_it_was_and_gone_when_accepted() {
        let mut bench = Bench::new();
        let first = bench.retried(b"abc");
        bench.source.look().await;
        bench.source.look().await;
        let Some((Taken::Frame(frame, receipt), image)) = bench.taken() else { panic!("nothing in line") };
        assert!(bench.taken().is_none(), "offered once");
        assert_eq!((frame.id, frame.detect_time, image.as_slice()), (first.id, first.detect_time, b"abc".as_slice()));
        assert_eq!(
            (&frame.detector.name, &frame.detector.time_zone),
            (&first.detector.name, &first.detector.time_zone)
        );
        assert_eq!((frame.source, frame.received_at), (first.source, first.received_at));
        assert_eq!((frame.detector.rate, frame.detector.weight), (2.5, 3), "as its entry says now");
        receipt.settle(Disposition::Accepted);
        bench.hear().await;
        assert_eq!(bench.in_line(), 0);
        assert!(bench.source.held.is_empty() && bench.source.lines.is_empty());
        let text = bench.metrics.render();
        assert!(text.contains(r#"source="retry"} 1"#), "{text}");
    }

    #[tokio::test]
    async fn one_that_is_refused_again_is_a_dead_letter_of_the_same_id_also_after_a_crash_before_clearing() {
        let mut bench = Bench::new();
        let first = bench.retried(b"abc");
        bench.source.look().await;
        let Some((Taken::Frame(frame, receipt), image)) = bench.taken() else { panic!("nothing in line") };
        bench.letters.keep(&frame, &image, &refusal(Reason::Forbidden)).unwrap();
        // As after a crash: another source, which knows nothing.
        let (mut restarted, _news) =
            Source::new(bench.letters.store().clone(), entries(), intake(), bench.metrics.clone());
        restarted.look().await;
        assert!(restarted.held.is_empty());
        assert_eq!(bench.in_line(), 0);
        receipt.settle(Disposition::Rejected);
        bench.hear().await;
        let Some(Listed::Sound(letter)) = bench.letters.store().show(&first.id) else { panic!("not kept") };
        assert_eq!((letter.reason, letter.original_name), (Reason::Forbidden, r"../\xff\u{1b}[31m.jpg".to_owned()));
    }

    #[tokio::test]
    async fn a_released_one_and_one_whose_take_was_dropped_go_in_line_again() {
        let mut bench = Bench::new();
        bench.retried(b"abc");
        bench.source.look().await;
        let Some((Taken::Frame(_, receipt), _)) = bench.taken() else { panic!("nothing in line") };
        drop(receipt);
        bench.hear().await;
        assert!(bench.taken().is_none(), "not before the next look");
        bench.source.look().await;
        drop(bench.source.lines.values().next().unwrap().waiting.next().unwrap());
        bench.hear().await;
        bench.source.look().await;
        assert!(matches!(bench.taken(), Some((Taken::Frame(..), _))));
    }

    #[tokio::test]
    async fn files_that_vanish_or_were_half_cleared_away_are_forgotten() {
        let mut bench = Bench::new();
        let first = bench.retried(b"abc");
        bench.source.look().await;
        let image = bench.dir.path().join(format!("retry/{}.image", first.id));
        std::fs::remove_file(image).unwrap();
        assert!(matches!(bench.taken(), Some((Taken::Gone, _))));
        bench.hear().await;
        assert_eq!((bench.in_line(), bench.source.held.len()), (0, 0));
        assert_eq!(bench.metrics.detector(&first.detector.name).counts().pending, 0);

        let second = bench.retried(b"abc");
        std::fs::remove_file(bench.dir.path().join(format!("retry/{}.image", second.id))).unwrap();
        bench.source.look().await;
        assert_eq!((bench.in_line(), bench.source.held.len()), (0, 0));
    }

    #[tokio::test]
    async fn an_image_that_a_power_cut_left_behind_follows_its_json() {
        let mut bench = Bench::new();
        let id = bench.retried(b"abc").id;
        let image = format!("{id}.image");
        std::fs::rename(bench.dir.path().join("retry").join(&image), bench.dir.path().join(&image)).unwrap();
        bench.letters.tidy().unwrap();
        bench.source.look().await;
        assert!(matches!(bench.taken(), Some((Taken::Frame(..), _))));
    }

    #[tokio::test]
    async fn a_backlog_is_held_as_a_bounded_window() {
        let mut bench = Bench::new();
        let template = bench.retried(b"abc").id;
        let line = bench.letters.store().retry_line();
        let path = |id: &FrameId, kind: &str| line.directory().join(format!("{id}.{kind}"));
        let json = std::fs::read_to_string(path(&template, "json")).unwrap();
        // Not through keep(): a thousand fsyncs prove nothing here.
        for _ in 1..HELD_MAX + 5 {
            let id = FrameId::generate();
            std::fs::write(path(&id, "image"), b"abc").unwrap();
            std::fs::write(path(&id, "json"), json.replace(template.as_str(), id.as_str())).unwrap();
        }
        bench.source.look().await;
        assert_eq!(bench.source.held.len(), HELD_MAX);
        while let Some((taken, _)) = bench.taken() {
            let Taken::Frame(_, receipt) = taken else { panic!("{taken:?}") };
            receipt.settle(Disposition::Accepted);
            bench.hear().await;
        }
        bench.source.look().await;
        assert_eq!(bench.source.held.len(), 5);
    }

    #[tokio::test]
    async fn stopping_returns_what_waits_and_waits_for_what_is_in_hand() {
        let mut bench = Bench::new();
        let name = bench.retried(b"abc").detector.name.clone();
        bench.retried(b"def");
        bench.source.look().await;
        let Some((Taken::Frame(_, receipt), _)) = bench.taken() else { panic!("nothing in line") };
        bench.source.stop();
        assert!(bench.source.has_offered());
        assert!(bench.taken().is_none());
        drop(receipt);
        bench.hear().await;
        assert!(!bench.source.has_offered());
        let counts = bench.metrics.detector(&name).counts();
        assert_eq!((counts.received, counts.returned, counts.pending), (2, 2, 0));
        assert_eq!(bench.in_line(), 2, "and both are there for the next start");
    }

    #[tokio::test]
    async fn run_ends_when_stopped() {
        let bench = Bench::new();
        bench.retried(b"abc");
        let stop = CancellationToken::new();
        let running =
            tokio::spawn(run(bench.letters.clone(), entries(), intake(), bench.metrics.clone(), stop.clone()));
        while !bench.metrics.render().contains(r#"source="retry"} 1"#) {
            tokio::task::yield_now().await;
        }
        stop.cancel();
        running.await.unwrap();
    }
}

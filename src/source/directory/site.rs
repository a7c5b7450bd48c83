//! One drop directory at work: what encode workers, scans and settling share. Everything that blocks is in here and runs
//! on threads where that is allowed.
//!
//! Not here: when things are done (`directory::run`), and who is next (`window`).

use std::collections::{HashMap, HashSet};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use globset::GlobSet;
use jiff::Timestamp;
use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::Config;
use super::claim::{Claim, Root};
use super::detect_time::Finder;
use super::tree::{self, Look};
use super::watch::Watcher;
use super::window::{Added, FRAMES_MAX, Key, Waiting, Window};
use crate::encode::image::{self, Flaw};
use crate::frame::{Detector, Frame, SourceKind};
use crate::metrics::{DetectorMetrics, Metrics};
use crate::queue::{Intake, Line, Offer, Ready, Taken};
use crate::settle::{Disposition, Reason, Receipt, Refusal};
use crate::source::{Entry, Health, State, Template};

/// Detectors that one entry with placeholders may make.
const DETECTORS_MAX: usize = 1000;
/// Unfinished files that are watched over at once; others wait for the next scan.
const YOUNG_MAX: usize = 65_536;
/// Refused entries that are remembered, so that each is counted and said once.
const REFUSED_MAX: usize = 10_000;
/// A file that could not be read or claimed is tried again after this.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The longest wait between two looks at an unfinished file.
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(5);
/// A sub-directory that has been empty for this long may be removed.
const EMPTY_FOR: Duration = Duration::from_mins(1);
/// Endings of files that somebody is still writing.
const PARTIAL: [&[u8]; 4] = [b".tmp", b".part", b".filepart", b"~"];

/// See the file's head.
pub(super) struct Site {
    pub entry: Arc<Entry>,
    pub config: Config,
    pub metrics: Arc<Metrics>,
    pub health: Health,
    intake: Intake,
    include: GlobSet,
    template: Template,
    finder: Finder,
    max_frame: u64,
    /// The drop directory while it can be used.
    pub root: ArcSwapOption<Root>,
    state: Mutex<Inner>,
    settle: mpsc::UnboundedSender<Settled>,
    /// Frames offered or in hand.
    pub outstanding: AtomicUsize,
    /// Told when `outstanding` falls to zero, or a young file is waiting.
    pub changed: Notify,
    pub stopping: AtomicBool,
    /// A frame went back in line without its line being said to be ready: at once would be a busy loop.
    pub put_back: AtomicBool,
    /// Something was missed that a scan will find.
    pub missed: AtomicBool,
    /// Settled frames whose files cannot be removed: while there are any, the detector stays held.
    pub stuck: AtomicUsize,
}

/// What became of a frame that we had claimed.
pub(super) struct Settled {
    pub held: Held,
    pub disposition: Disposition,
    /// Not pending any more, although the file may still be there.
    counted: bool,
}

/// A claimed frame in the pipeline's hands.
#[derive(Clone)]
pub(super) struct Held {
    pub claim: Claim,
    pub detector: Arc<str>,
    look: Look,
    noticed: Instant,
    received_at: Timestamp,
}

struct Inner {
    window: Window,
    young: HashMap<Key, Young>,
    refused: HashMap<Key, (u64, i64)>,
    lines: HashMap<Arc<str>, Registered>,
    /// Counted as waiting, but beyond the window; by detector.
    beyond: HashMap<Arc<str>, i64>,
    scan: u64,
}

struct Registered {
    detector: Arc<Detector>,
    metrics: Arc<DetectorMetrics>,
    ready: Ready,
    /// Received by this source and not settled by it.
    pending: Arc<AtomicI64>,
}

/// A file that is not known to be complete.
struct Young {
    size: u64,
    mtime: i64,
    since: Instant,
    due: Instant,
    looks: u32,
    /// Counted as received already.
    counted: bool,
    /// Renamed into place.
    settled: bool,
    noticed: Instant,
    received_at: Timestamp,
}

/// How a file was noticed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Via {
    Moved,
    Closed,
    /// By this scan; 0 is a scan of one new sub-directory.
    Scan(u64),
}

/// The detector's line in the queue.
struct SiteLine {
    site: Arc<Site>,
    detector: Arc<str>,
}

/// A frame on its way to being taken. Dropped untaken, it goes back in line.
struct Offered {
    site: Arc<Site>,
    detector: Arc<str>,
    waiting: Option<Waiting>,
}

/// What a scan found, by detector.
#[derive(Default)]
pub(super) struct Tally {
    added: HashMap<Arc<str>, i64>,
    no_room: HashMap<Arc<str>, i64>,
}

impl Site {
    pub(super) fn new(
        entry: Arc<Entry>,
        config: Config,
        intake: Intake,
        metrics: Arc<Metrics>,
        max_frame: u64,
        health: Health,
    ) -> anyhow::Result<(Arc<Self>, mpsc::UnboundedReceiver<Settled>)> {
        // Bounded by the frames in hand, which the queue's byte budget bounds.
        let (settle, settled) = mpsc::unbounded_channel();
        let site = Arc::new(Self {
            include: config.globs()?,
            template: Template::parse(&entry.name, entry.source.placeholders()).map_err(anyhow::Error::msg)?,
            finder: Finder::new(&config.detect_time, &entry.time_zone)?,
            state: Mutex::new(Inner {
                window: Window::new(entry.order, FRAMES_MAX),
                young: HashMap::new(),
                refused: HashMap::new(),
                lines: HashMap::new(),
                beyond: HashMap::new(),
                scan: 0,
            }),
            entry,
            config,
            metrics,
            health,
            intake,
            max_frame,
            root: ArcSwapOption::empty(),
            settle,
            outstanding: AtomicUsize::new(0),
            changed: Notify::new(),
            stopping: AtomicBool::new(false),
            put_back: AtomicBool::new(false),
            missed: AtomicBool::new(false),
            stuck: AtomicUsize::new(0),
        });
        if site.template.is_fixed()
            && let Some(name) = site.name_in(b"")
        {
            site.register(&mut site.inner(), &name);
        }
        Ok((site, settled))
    }

    /// The source cannot deliver, and why.
    pub(super) fn hold(&self, why: &str) {
        if self.health.set(State::Held(why.to_owned())) {
            tracing::warn!(detector = %self.entry.name, path = ?self.config.path, "detector held: {why}");
        }
        self.show(false);
    }

    /// The source can deliver, unless there is something left that it cannot remove.
    pub(super) fn deliver(&self) {
        if self.stuck.load(Ordering::Relaxed) > 0 {
            return;
        }
        let was_held = self.health.held().is_some();
        if self.health.set(State::Ok) && was_held {
            tracing::info!(detector = %self.entry.name, path = ?self.config.path, "detector delivers again");
        }
        self.show(true);
    }

    fn show(&self, up: bool) {
        for line in self.inner().lines.values() {
            line.metrics.up(up);
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The line of a detector, made when first needed.
    fn register<'a>(self: &Arc<Self>, inner: &'a mut Inner, name: &str) -> &'a Registered {
        if !inner.lines.contains_key(name) {
            let name: Arc<str> = name.into();
            let detector = Arc::new(Detector {
                name: name.clone(),
                time_zone: self.entry.time_zone.as_str().into(),
                rate: self.entry.rate,
                weight: self.entry.weight,
            });
            let line = Arc::new(SiteLine { site: self.clone(), detector: name.clone() });
            let metrics = self.metrics.detector(&name);
            metrics.up(matches!(self.health.get(), State::Ok));
            let ready = self.intake.register(detector.clone(), line);
            let pending = Arc::new(AtomicI64::new(0));
            inner.lines.insert(name.clone(), Registered { detector, metrics, ready, pending });
        }
        &inner.lines[name]
    }

    /// Whether a name may be an image of ours.
    fn wanted(&self, name: &[u8]) -> bool {
        !name.starts_with(b".")
            && !PARTIAL.iter().any(|ending| name.ends_with(ending))
            && self.include.is_match(Path::new(std::ffi::OsStr::from_bytes(name)))
    }

    /// The name for a file in the directory `dir` below the source's path.
    fn name_in(&self, dir: &[u8]) -> Option<String> {
        let levels: Vec<&[u8]> = dir.split(|b| *b == b'/').filter(|level| !level.is_empty()).collect();
        self.template.fill(&levels, |_| None)
    }

    /// The detector of a directory; `None`: it has no name, or there are too many.
    fn detector_of(&self, inner: &Inner, dir: &[u8]) -> Option<Arc<str>> {
        let name = self.name_in(dir)?;
        match inner.lines.get_key_value(name.as_str()) {
            Some((known, _)) => Some(known.clone()),
            None if inner.lines.len() < DETECTORS_MAX => Some(name.into()),
            None => None,
        }
    }

    // ---- noticing ----

    /// A file may have come. Looks at it and puts it where it belongs.
    pub(super) fn notice(self: &Arc<Self>, dir_fd: BorrowedFd<'_>, key: &Key, via: Via, tally: &mut Tally) {
        if !self.wanted(&key.name) {
            return;
        }
        // Gone again, or not to be seen: the next scan looks once more.
        let Ok(look) = tree::look(dir_fd, &key.name) else { return };
        let mut inner = self.inner();
        if let Some(reason) = self.unfit(&look) {
            return self.refuse(&mut inner, key, &look, reason);
        }
        if inner.refused.get(key) == Some(&(look.ino, look.ctime)) {
            return;
        }
        let Some(detector) = self.detector_of(&inner, &key.dir) else {
            return self.refuse(&mut inner, key, &look, "no-name");
        };
        let (now, wall) = (Instant::now(), Timestamp::now());
        let quiet = self.config.quiet;
        let young = |settled| Young {
            size: look.size,
            mtime: look.mtime,
            since: now,
            due: now + quiet,
            looks: 0,
            counted: false,
            settled,
            noticed: now,
            received_at: wall,
        };
        if let Some(state) = inner.young.get_mut(key) {
            // A writer closed or renamed it: worth a look at once.
            match via {
                Via::Moved | Via::Closed => {
                    state.due = now;
                    state.settled |= via == Via::Moved;
                    self.changed.notify_one();
                }
                Via::Scan(_) => {}
            }
            return;
        }
        let old_enough = || {
            let age = wall.as_nanosecond() - i128::from(look.mtime);
            age >= i128::try_from(quiet.as_nanos()).unwrap_or(i128::MAX)
        };
        let (fresh, settled, scan) = match via {
            Via::Moved => (true, true, 0),
            Via::Closed => (true, false, 0),
            Via::Scan(scan) if old_enough() => (false, true, scan),
            Via::Scan(_) => {
                if !inner.window.knows(key) && inner.young.len() < YOUNG_MAX {
                    inner.young.insert(key.clone(), young(false));
                    self.changed.notify_one();
                }
                return;
            }
        };
        let waiting = Waiting {
            key: key.clone(),
            size: look.size,
            mtime: look.mtime,
            noticed: now,
            received_at: wall,
            still_since: now,
            settled,
            claim: None,
        };
        self.add(&mut inner, &detector, waiting, fresh, scan, false, tally);
    }

    #[expect(clippy::too_many_arguments, reason = "one call for the three ways into line")]
    fn add(
        self: &Arc<Self>,
        inner: &mut Inner,
        detector: &Arc<str>,
        waiting: Waiting,
        fresh: bool,
        scan: u64,
        counted: bool,
        tally: &mut Tally,
    ) {
        self.register(inner, detector);
        let added = inner.window.add(detector, waiting, fresh, scan);
        let line = &inner.lines[detector];
        if added == Added::Known {
            if counted {
                // In line by another way: one file, counted twice.
                line.dropped("vanished");
            }
            return;
        }
        if added != Added::NoRoom {
            line.ready.ready();
        }
        if scan > 0 {
            *tally.added.entry(detector.clone()).or_default() += i64::from(added != Added::NoRoom);
        } else if !counted {
            line.received(1);
        }
        // What stays beyond the window, or goes out of it, is counted there; what this scan will still meet, when it does.
        let beyond = if scan > 0 { &mut tally.no_room } else { &mut inner.beyond };
        match added {
            Added::NoRoom => *beyond.entry(detector.clone()).or_default() += 1,
            Added::InsteadOf { detector, met } => {
                *beyond.entry(detector.clone()).or_default() += i64::from(met);
                if scan > 0 {
                    *tally.added.entry(detector).or_default() -= 1;
                }
            }
            Added::InLine | Added::Known => {}
        }
    }

    /// A claim goes in line: it always has room, since no scan would find it again.
    fn add_claim(self: &Arc<Self>, inner: &mut Inner, detector: &Arc<str>, claim: Claim, look: Look, settled: bool) {
        let now = Instant::now();
        let waiting = Waiting {
            // A key of its own: the place that it came from may have another file by now.
            key: Key { dir: claim.dir.clone(), name: format!("/{}", claim.id).as_bytes().into() },
            size: look.size,
            mtime: look.mtime,
            noticed: now,
            received_at: Timestamp::now(),
            still_since: now,
            settled,
            claim: Some(claim),
        };
        self.register(inner, detector);
        inner.window.put_back(detector, waiting);
        let line = &inner.lines[detector];
        line.received(1);
        line.ready.ready();
    }

    /// An entry that is never taken: counted and said once.
    fn refuse(&self, inner: &mut Inner, key: &Key, look: &Look, reason: &'static str) {
        if inner.refused.get(key) == Some(&(look.ino, look.ctime)) {
            return;
        }
        if inner.refused.len() >= REFUSED_MAX {
            inner.refused.clear();
        }
        let said = inner.refused.insert(key.clone(), (look.ino, look.ctime)).is_some();
        let name = self.name_in(&key.dir).unwrap_or_else(|| self.entry.name.clone());
        self.metrics.detector(&name).refused(reason);
        if said {
            // Whoever changes it again and again must not fill the log.
            return;
        }
        tracing::warn!(
            detector = %name,
            path = ?self.config.path,
            file = ?std::ffi::OsStr::from_bytes(&tree::join(&key.dir, &key.name)),
            "refused and left alone: {}",
            advice(reason)
        );
    }

    /// Looks at files that were not complete. When to look again, if any is left.
    pub(super) fn look_at_young(self: &Arc<Self>) -> Option<Instant> {
        let now = Instant::now();
        let due: Vec<Key> = {
            let inner = self.inner();
            inner.young.iter().filter(|(_, y)| y.due <= now).map(|(key, _)| key.clone()).collect()
        };
        let root = self.root.load_full();
        for key in due {
            let looked = root.as_ref().map(|root| {
                let dir = tree::open_below(root.fd.as_fd(), &key.dir)?;
                tree::look(&dir, &key.name)
            });
            self.look_at_young_one(&key, looked.as_ref(), now);
        }
        self.inner().young.values().map(|y| y.due).min()
    }

    fn look_at_young_one(self: &Arc<Self>, key: &Key, looked: Option<&io::Result<Look>>, now: Instant) {
        let mut inner = self.inner();
        let Some(mut young) = inner.young.remove(key) else { return };
        // No name, or no room for one more: the next scan refuses it and says so.
        let Some(detector) = self.detector_of(&inner, &key.dir) else { return };
        let later = |inner: &mut Inner, young: Young| {
            inner.young.insert(key.clone(), Young { due: now + RETRY_AFTER, ..young });
        };
        let look = match looked {
            Some(Ok(look)) if look.kind == FileType::RegularFile => *look,
            // Nobody can tell whether it is there: the directory is away, no descriptors are left, the disk fails.
            None => return later(&mut inner, young),
            Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => return later(&mut inner, young),
            Some(_) => {
                if young.counted
                    && let Some(line) = inner.lines.get(&detector)
                {
                    line.dropped("vanished");
                }
                return;
            }
        };
        let changed = (look.size, look.mtime) != (young.size, young.mtime);
        if changed {
            (young.size, young.mtime, young.since, young.looks) = (look.size, look.mtime, now, 0);
            if !young.settled {
                young.due = now + self.config.quiet;
                inner.young.insert(key.clone(), young);
                return;
            }
        }
        let settled = young.settled || now >= young.since + self.config.quiet;
        let waiting = Waiting {
            key: key.clone(),
            size: look.size,
            mtime: look.mtime,
            noticed: young.noticed,
            received_at: young.received_at,
            still_since: young.since,
            settled,
            claim: None,
        };
        let looks = young.looks;
        self.add(&mut inner, &detector, waiting, true, 0, young.counted, &mut Tally::default());
        drop(inner);
        tracing::trace!(looks, "an unfinished file is looked at again");
    }

    // ---- scanning ----

    /// Looks at everything. Files are in line as soon as they are seen.
    pub(super) fn scan(self: &Arc<Self>, root: &Arc<Root>, watcher: Option<&Watcher>) -> io::Result<bool> {
        let scan = {
            let mut inner = self.inner();
            inner.scan += 1;
            inner.scan
        };
        self.metrics.counter("rescans_total", &[]).increment(1);
        let mut tally = Tally::default();
        self.adopt(root)?;
        let visited = self.visit(root, &Arc::from(*b""), 0, Via::Scan(scan), watcher, &mut tally);
        let whole = visited.is_ok() && !self.stopping.load(Ordering::Relaxed);
        self.reckon(&tally, whole);
        root.tidy()?;
        visited
    }

    /// Looks at one new sub-directory and what is below it.
    pub(super) fn visit_new(
        self: &Arc<Self>,
        root: &Arc<Root>,
        dir: &Arc<[u8]>,
        watcher: Option<&Watcher>,
    ) -> io::Result<bool> {
        let depth = dir.split(|b| *b == b'/').count();
        let hidden = dir.split(|b| *b == b'/').any(|c| c.starts_with(b"."));
        if hidden || !self.config.recursive {
            return Ok(true);
        }
        let mut tally = Tally::default();
        self.visit(root, dir, depth, Via::Scan(0), watcher, &mut tally)
    }

    /// Whether everything below could be watched.
    fn visit(
        self: &Arc<Self>,
        root: &Arc<Root>,
        dir: &Arc<[u8]>,
        depth: usize,
        via: Via,
        watcher: Option<&Watcher>,
        tally: &mut Tally,
    ) -> io::Result<bool> {
        let fd = match tree::open_below(root.fd.as_fd(), dir) {
            Ok(fd) => fd,
            Err(error) if depth == 0 => return Err(error),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::debug!(%error, dir = ?std::ffi::OsStr::from_bytes(dir), "a sub-directory cannot be opened");
                }
                return Ok(true);
            }
        };
        let look = tree::look_at(&fd)?;
        if look.dev != root.dev {
            let key = Key { dir: dir.clone(), name: Arc::from(*b"") };
            self.refuse(&mut self.inner(), &key, &look, "other-filesystem");
            return Ok(true);
        }
        // Watched first, then looked at: nothing falls in between.
        let mut watched = watcher.is_none_or(|watcher| watcher.add(&fd, dir).is_ok());
        let mut below: Vec<Arc<[u8]>> = Vec::new();
        let mut empty = true;
        tree::each(&fd, |name, kind| {
            empty = false;
            if self.stopping.load(Ordering::Relaxed) {
                return Ok(());
            }
            let unsaid = kind == FileType::Unknown;
            let is_dir = kind == FileType::Directory
                || unsaid && tree::look(&fd, name).is_ok_and(|look| look.kind == FileType::Directory);
            if is_dir && self.config.recursive {
                if !name.starts_with(b".") && depth < tree::DEPTH_MAX {
                    below.push(tree::join(dir, name).into());
                }
            } else {
                let key = Key { dir: dir.clone(), name: name.into() };
                self.notice(fd.as_fd(), &key, via, tally);
            }
            Ok(())
        })?;
        for dir in &below {
            watched &= self.visit(root, dir, depth + 1, via, watcher, tally)?;
        }
        if empty && depth > 0 && self.config.remove_empty_directories {
            remove_if_long_empty(root, dir, &look);
        }
        Ok(watched)
    }

    /// Claims of dead instances go back in line.
    fn adopt(self: &Arc<Self>, root: &Arc<Root>) -> io::Result<()> {
        for claim in root.adopt()? {
            // One that cannot be looked at now is tried again when it is its turn: it is listed only once.
            let look = claim.place(false).and_then(|(place, name)| tree::look(&place, &name)).unwrap_or(NOTHING);
            let mut inner = self.inner();
            let detector = self.detector_of(&inner, &claim.dir).unwrap_or_else(|| self.entry.name.as_str().into());
            self.add_claim(&mut inner, &detector, claim, look, true);
        }
        Ok(())
    }

    /// After a scan: what waits beyond the window is counted as received, and, if it saw everything, what somebody took
    /// away as dropped.
    fn reckon(&self, tally: &Tally, whole: bool) {
        let mut inner = self.inner();
        let names: HashSet<_> = inner.lines.keys().cloned().collect();
        for name in names {
            let added = tally.added.get(&name).copied().unwrap_or(0);
            let before = inner.beyond.get(&name).copied().unwrap_or(0);
            let beyond = tally.no_room.get(&name).copied().unwrap_or(0);
            // Half a scan knows of those that it saw only: some of what it added was beyond the window before.
            let beyond = if whole { beyond } else { beyond.max(before - added) };
            inner.beyond.insert(name.clone(), beyond);
            let line = &inner.lines[&name];
            match added + beyond - before {
                0 => {}
                more @ 1.. => line.received(more.unsigned_abs()),
                fewer => {
                    line.metrics.dropped("vanished", fewer.unsigned_abs());
                    line.pending.fetch_add(fewer, Ordering::Relaxed);
                }
            }
        }
    }

    /// An event or a scan could not be followed: a scan is due soon. What has gone since is no loss.
    pub(super) fn missed_by(&self, error: &io::Error) {
        if error.kind() != io::ErrorKind::NotFound {
            self.missed.store(true, Ordering::Relaxed);
        }
    }

    /// Whether something was missed, or the window has drained while more wait beyond it.
    pub(super) fn wants_scan(&self) -> bool {
        if self.missed.swap(false, Ordering::Relaxed) {
            return true;
        }
        let inner = self.inner();
        inner.window.len() < FRAMES_MAX / 4 && inner.beyond.values().any(|n| *n > 0)
    }

    // ---- taking ----

    /// Runs on an encode worker: reads, checks, claims.
    fn take(self: &Arc<Self>, offered: &mut Offered, buffer: &mut Vec<u8>) -> Taken {
        let Some(waiting) = offered.waiting.clone() else { return Taken::Gone };
        let Some(root) = self.root.load_full() else {
            // Held: back in line, until the directory is there again.
            return Taken::Gone;
        };
        let result = match &waiting.claim {
            Some(claim) => self.take_claimed(claim.clone(), &waiting, buffer),
            None => self.take_file(&root, &waiting, buffer),
        };
        match result {
            Ok(Catch::Whole(claim, look)) => self.frame(offered, &waiting, &claim, look, buffer, None),
            Ok(Catch::Flawed(claim, look, refusal)) => {
                self.frame(offered, &waiting, &claim, look, buffer, Some(refusal))
            }
            Ok(Catch::NotYet(look)) => {
                self.metrics.counter("partial_waits_total", &[]).increment(1);
                self.back_to_young(offered, &waiting, look, None);
                Taken::Gone
            }
            Ok(Catch::Vanished) => {
                self.vanished(offered, &waiting);
                Taken::Gone
            }
            Ok(Catch::Refused(look, reason)) => {
                self.refuse(&mut self.inner(), &waiting.key, &look, reason);
                self.vanished(offered, &waiting);
                Taken::Gone
            }
            Ok(Catch::Stuck(claim, error)) => {
                self.metrics.counter("settle_errors_total", &[("operation", "claim")]).increment(1);
                self.hold(&trouble(&error));
                let mut inner = self.inner();
                if inner.window.forget(&waiting.key) {
                    self.look_again(&mut inner, &waiting.key);
                }
                drop(inner);
                // Back in line when `offered` is dropped.
                offered.waiting = Some(Waiting { key: key_of(&claim), claim: Some(claim), ..waiting });
                Taken::Gone
            }
            Err(error) => {
                self.metrics.counter("settle_errors_total", &[("operation", "claim")]).increment(1);
                self.hold(&trouble(&error));
                let look = Look { size: waiting.size, mtime: waiting.mtime, ..NOTHING };
                // A claim goes back in line as it is: there is nothing in its old place to look at.
                if offered.waiting.as_ref().is_some_and(|waiting| waiting.claim.is_none()) {
                    self.back_to_young(offered, &waiting, look, Some(RETRY_AFTER));
                }
                Taken::Gone
            }
        }
    }

    fn take_file(&self, root: &Arc<Root>, waiting: &Waiting, buffer: &mut Vec<u8>) -> io::Result<Catch> {
        let key = &waiting.key;
        let dir = match tree::open_below(root.fd.as_fd(), &key.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other?,
        };
        let look = match tree::look(&dir, &key.name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other?,
        };
        if let Some(reason) = self.unfit(&look) {
            return Ok(Catch::Refused(look, reason));
        }
        let read = match read(dir.as_fd(), &key.name, &look, buffer) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Ok(Catch::Refused(look, "unreadable"));
            }
            // Another took its place since: a symbolic link, a socket.
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::LOOP | Errno::NXIO)) => {
                return Ok(Catch::NotYet(look));
            }
            other => other?,
        };
        if !read {
            return Ok(Catch::NotYet(look));
        }
        let flaw = image::inspect(buffer).err();
        if flaw.as_ref().is_some_and(|flaw| !self.is_final(flaw, &look, waiting)) {
            return Ok(Catch::NotYet(look));
        }
        let Some(claim) = root.claim(dir.as_fd(), &key.dir, &key.name)? else { return Ok(Catch::Vanished) };
        // From here on it is not at its place any more: trouble must not lose the claim.
        let caught = self.catch(claim.clone(), &look, flaw, waiting, buffer);
        Ok(caught.unwrap_or_else(|error| Catch::Stuck(claim, error)))
    }

    /// What was read has just been claimed: is it still the same?
    fn catch(
        &self,
        claim: Claim,
        read: &Look,
        flaw: Option<Flaw>,
        waiting: &Waiting,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Catch> {
        let (place, name) = claim.place(false)?;
        let claimed = tree::look(&place, &name)?;
        if claimed.same_content(read) {
            return Ok(match flaw {
                None => Catch::Whole(claim, claimed),
                Some(flaw) => Catch::Flawed(claim, claimed, refusal(&flaw)),
            });
        }
        // Rewritten between reading and claiming: what we have is the newer one.
        buffer.clear();
        self.take_claimed(claim, waiting, buffer)
    }

    /// What is ours already: nobody else changes it but a writer that still holds it open.
    fn take_claimed(&self, claim: Claim, waiting: &Waiting, buffer: &mut Vec<u8>) -> io::Result<Catch> {
        let (place, name) = match claim.place(false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other?,
        };
        let look = match tree::look(&place, &name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other?,
        };
        if let Some(reason) = self.unfit(&look) {
            // A race put something else into our hands: it goes back where it was.
            claim.put_back()?;
            return Ok(Catch::Refused(look, reason));
        }
        let whole = read(place.as_fd(), &name, &look, buffer)?;
        match (whole, image::inspect(buffer)) {
            (true, Ok(_)) => Ok(Catch::Whole(claim, look)),
            (true, Err(flaw)) if waiting.claim.is_some() && self.is_final(&flaw, &look, waiting) => {
                Ok(Catch::Flawed(claim, look, refusal(&flaw)))
            }
            (_, _) => {
                // Somebody is writing it: it goes back to him.
                if claim.put_back()? {
                    return Ok(Catch::NotYet(look));
                }
                Ok(Catch::Flawed(claim, look, refusal(&Flaw::Truncated("rewritten while it was taken"))))
            }
        }
    }

    /// Whether nobody is going to mend it any more.
    fn is_final(&self, flaw: &Flaw, look: &Look, waiting: &Waiting) -> bool {
        let unchanged = (look.size, look.mtime) == (waiting.size, waiting.mtime);
        unchanged
            && match flaw {
                Flaw::Unsupported(_) => waiting.settled,
                Flaw::Truncated(_) => waiting.still_since.elapsed() >= self.config.partial_timeout,
            }
    }

    fn unfit(&self, look: &Look) -> Option<&'static str> {
        match look.kind {
            FileType::RegularFile if look.links != 1 => Some("hard-link"),
            FileType::RegularFile if look.size > self.max_frame => Some("too-large"),
            FileType::RegularFile => None,
            FileType::Symlink => Some("symlink"),
            FileType::Fifo => Some("fifo"),
            FileType::Socket => Some("socket"),
            FileType::Directory => Some("directory"),
            FileType::CharacterDevice | FileType::BlockDevice | FileType::Unknown => Some("device"),
        }
    }

    fn frame(
        self: &Arc<Self>,
        offered: &mut Offered,
        waiting: &Waiting,
        claim: &Claim,
        look: Look,
        buffer: &[u8],
        refusal: Option<Refusal>,
    ) -> Taken {
        let now = Timestamp::now();
        let (detect_time, corrected) = self.finder.find(&claim.name, buffer, look.mtime, waiting.received_at, now);
        if corrected {
            self.metrics.counter("detect_times_corrected_total", &[]).increment(1);
        }
        let held = Held {
            claim: claim.clone(),
            detector: offered.detector.clone(),
            look,
            noticed: waiting.noticed,
            received_at: waiting.received_at,
        };
        offered.waiting = None;
        let mut inner = self.inner();
        let again = inner.window.forget(&waiting.key);
        let detector = self.register(&mut inner, &offered.detector).detector.clone();
        if again {
            self.look_again(&mut inner, &waiting.key);
        }
        drop(inner);
        let age = Duration::try_from(now.duration_since(detect_time)).unwrap_or_default();
        if refusal.is_none() && !self.entry.max_age.is_zero() && age > self.entry.max_age {
            self.tell(held, Disposition::Dropped);
            return Taken::Gone;
        }
        let frame = Frame {
            id: claim.id.clone(),
            detector,
            detect_time,
            received_at: waiting.received_at,
            noticed: waiting.noticed,
            source: SourceKind::Directory,
            original_name: std::ffi::OsStr::from_bytes(&tree::join(&claim.dir, &claim.name)).to_owned(),
            image_bytes: look.size,
        };
        let site = self.clone();
        let receipt = Receipt::new(move |disposition| site.tell(held, disposition));
        match refusal {
            None => Taken::Frame(frame, receipt),
            Some(refusal) => Taken::Flawed(frame, receipt, refusal),
        }
    }

    /// Hands a disposition to whoever settles; while nobody does any more, the claim stays for the next start.
    fn tell(&self, held: Held, disposition: Disposition) {
        if self.settle.send(Settled { held, disposition, counted: false }).is_err() {
            self.done();
        }
    }

    fn vanished(&self, offered: &mut Offered, waiting: &Waiting) {
        offered.waiting = None;
        let mut inner = self.inner();
        if let Some(line) = inner.lines.get(&offered.detector) {
            line.dropped("vanished");
        }
        if inner.window.forget(&waiting.key) {
            self.look_again(&mut inner, &waiting.key);
        }
        drop(inner);
        self.done();
    }

    /// The same name came again while its last file was being taken.
    fn look_again(&self, inner: &mut Inner, key: &Key) {
        let now = Instant::now();
        let young = Young {
            size: u64::MAX,
            mtime: 0,
            since: now,
            due: now,
            looks: 0,
            counted: false,
            settled: true,
            noticed: now,
            received_at: Timestamp::now(),
        };
        inner.young.insert(key.clone(), young);
        self.changed.notify_one();
    }

    /// Not complete, or in trouble: looked at again later.
    fn back_to_young(&self, offered: &mut Offered, waiting: &Waiting, look: Look, after: Option<Duration>) {
        offered.waiting = None;
        let now = Instant::now();
        let unchanged = (look.size, look.mtime) == (waiting.size, waiting.mtime);
        let since = if unchanged { waiting.still_since } else { now };
        let quiet = self.config.quiet;
        // A file that has been still for long is looked at more and more rarely, and once at the time-out.
        let pause = after.unwrap_or_else(|| (now - since).clamp(quiet, LOOK_AGAIN_MAX.max(quiet)));
        let mut due = now + pause;
        let end = since + self.config.partial_timeout;
        if after.is_none() && end > now {
            due = due.min(end);
        }
        let mut inner = self.inner();
        let again = inner.window.forget(&waiting.key);
        let young = Young {
            size: look.size,
            mtime: look.mtime,
            since,
            due: if again { now } else { due },
            looks: 1,
            counted: true,
            settled: waiting.settled && unchanged,
            noticed: waiting.noticed,
            received_at: waiting.received_at,
        };
        // A claim has been put back in its place.
        let key = match &waiting.claim {
            Some(claim) => Key { dir: claim.dir.clone(), name: claim.name.clone() },
            None => waiting.key.clone(),
        };
        if inner.young.insert(key, young).is_some_and(|before| before.counted)
            && let Some(line) = inner.lines.get(&offered.detector)
        {
            // Its place was free: the one that was waited for there is gone.
            line.dropped("vanished");
        }
        drop(inner);
        self.changed.notify_one();
        self.done();
    }

    /// One frame less in hand.
    pub(super) fn done(&self) {
        if self.outstanding.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.changed.notify_one();
        }
    }

    // ---- settling ----

    /// Carries out one disposition. An error: try again later.
    pub(super) fn settle(self: &Arc<Self>, settled: &mut Settled) -> io::Result<()> {
        if !settled.counted {
            self.count(settled);
            settled.counted = true;
        }
        let held = &settled.held;
        match settled.disposition {
            Disposition::Accepted => {
                if self.rewritten(held)? {
                    return Ok(());
                }
                match &self.config.archive {
                    Some(archive) if self.config.after_publish == super::AfterPublish::Archive => {
                        super::archive::keep(archive, &held.claim)?;
                    }
                    Some(_) | None => held.claim.remove()?,
                }
            }
            Disposition::Rejected => {
                if self.rewritten(held)? {
                    return Ok(());
                }
                held.claim.remove()?;
            }
            Disposition::Dropped => held.claim.remove()?,
            Disposition::Released => self.release(held),
        }
        Ok(())
    }

    /// The pipeline has counted what it published and dead-lettered; here it stops being pending for this source.
    fn count(&self, settled: &Settled) {
        let inner = self.inner();
        let Some(line) = inner.lines.get(&settled.held.detector) else { return };
        match settled.disposition {
            Disposition::Accepted | Disposition::Rejected => {
                line.pending.fetch_sub(1, Ordering::Relaxed);
            }
            Disposition::Dropped => line.dropped("max-age"),
            Disposition::Released => {}
        }
    }

    /// A writer that still held the file has changed it since it was read: that is another frame.
    fn rewritten(self: &Arc<Self>, held: &Held) -> io::Result<bool> {
        let look = match held.claim.place(false).and_then(|(place, name)| tree::look(&place, &name)) {
            Ok(look) => look,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if look.same_content(&held.look) {
            return Ok(false);
        }
        let claim = held.claim.renew()?;
        // Its writer may be in the middle of it.
        self.add_claim(&mut self.inner(), &held.detector, claim, look, false);
        Ok(true)
    }

    fn release(self: &Arc<Self>, held: &Held) {
        if self.stopping.load(Ordering::Relaxed) {
            put_back(&held.claim);
            return;
        }
        let mut inner = self.inner();
        let waiting = Waiting {
            key: key_of(&held.claim),
            size: held.look.size,
            mtime: held.look.mtime,
            noticed: held.noticed,
            received_at: held.received_at,
            still_since: held.noticed,
            settled: true,
            claim: Some(held.claim.clone()),
        };
        inner.window.put_back(&held.detector, waiting);
        if let Some(line) = inner.lines.get(&held.detector) {
            line.ready.ready();
        }
    }

    /// The drop directory is gone or another: what stood in line by its place there does not any more.
    pub(super) fn forget_all(&self) {
        let mut inner = self.inner();
        let all = inner.window.drain();
        for (detector, waiting) in all {
            if waiting.claim.is_some() {
                inner.window.put_back(&detector, waiting);
            } else if let Some(line) = inner.lines.get(&detector) {
                line.dropped("vanished");
            }
        }
        let young: Vec<_> = inner.young.drain().filter(|(_, y)| y.counted).map(|(key, _)| key).collect();
        for key in young {
            if let Some(line) = self.detector_of(&inner, &key.dir).and_then(|name| inner.lines.get(&name)) {
                line.dropped("vanished");
            }
        }
        for (detector, beyond) in std::mem::take(&mut inner.beyond) {
            if let Some(line) = inner.lines.get(&detector) {
                (0..beyond).for_each(|_| line.dropped("vanished"));
            }
        }
        inner.refused.clear();
    }

    /// The end of this source: what it has in line by claims goes back to its place, and all that it counted is returned.
    pub(super) fn give_back(&self) {
        let mut inner = self.inner();
        for (_, waiting) in inner.window.drain() {
            if let Some(claim) = &waiting.claim {
                put_back(claim);
            }
        }
        for line in inner.lines.values() {
            let pending = line.pending.swap(0, Ordering::Relaxed);
            if pending > 0 {
                line.metrics.returned(pending.unsigned_abs());
            }
            line.metrics.up(false);
        }
        // Ends the lines, which hold this site.
        inner.lines.clear();
    }
}

/// What taking a file came to.
enum Catch {
    Whole(Claim, Look),
    Flawed(Claim, Look, Refusal),
    NotYet(Look),
    Vanished,
    Refused(Look, &'static str),
    /// Claimed, and then something went wrong.
    Stuck(Claim, io::Error),
}

const NOTHING: Look = Look { dev: 0, ino: 0, size: 0, mtime: 0, ctime: 0, links: 0, kind: FileType::Unknown, owner: 0 };

impl Registered {
    fn received(&self, n: u64) {
        self.metrics.received(SourceKind::Directory, n);
        self.pending.fetch_add(i64::try_from(n).unwrap_or(0), Ordering::Relaxed);
    }

    fn dropped(&self, reason: &'static str) {
        self.metrics.dropped(reason, 1);
        self.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Line for SiteLine {
    fn next(&self) -> Option<Offer> {
        // Right after one could not be taken, none is: whoever looks after the directory asks again within a second.
        if self.site.stopping.load(Ordering::Relaxed) || self.site.put_back.load(Ordering::Relaxed) {
            return None;
        }
        let waiting = self.site.inner().window.next(&self.detector, Instant::now())?;
        self.site.outstanding.fetch_add(1, Ordering::AcqRel);
        let image_bytes = waiting.size;
        let mut offered = Offered { site: self.site.clone(), detector: self.detector.clone(), waiting: Some(waiting) };
        Some(Offer { image_bytes, take: Box::new(move |buffer| self::take(&mut offered, buffer)) })
    }
}

fn take(offered: &mut Offered, buffer: &mut Vec<u8>) -> Taken {
    let site = offered.site.clone();
    site.take(offered, buffer)
}

impl Drop for Offered {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            let mut inner = self.site.inner();
            inner.window.put_back(&self.detector, waiting);
            drop(inner);
            self.site.put_back.store(true, Ordering::Relaxed);
            self.site.done();
        }
    }
}

impl Site {
    /// Says again that lines have something: after trouble, now and then.
    pub(super) fn nudge(&self) {
        for line in self.inner().lines.values() {
            line.ready.ready();
        }
    }
}

fn remove_if_long_empty(root: &Root, dir: &[u8], look: &Look) {
    let age = Timestamp::now().as_nanosecond() - i128::from(look.mtime);
    if age < i128::try_from(EMPTY_FOR.as_nanos()).unwrap_or(i128::MAX) {
        return;
    }
    let at = dir.iter().rposition(|b| *b == b'/');
    let (parent, name) = at.map_or((&b""[..], dir), |at| (&dir[..at], &dir[at + 1..]));
    if let Ok(parent) = tree::open_below(root.fd.as_fd(), parent) {
        // Not empty any more, or not ours to remove: it stays.
        rustix::fs::unlinkat(&parent, std::ffi::OsStr::from_bytes(name), AtFlags::REMOVEDIR).ok();
    }
}

/// `false`: it changed while it was read.
fn read(dir: BorrowedFd<'_>, name: &[u8], look: &Look, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let file = tree::open_file(dir, name)?;
    let before = tree::look_at(&file)?;
    if !before.same_content(look) {
        return Ok(false);
    }
    buffer.reserve(usize::try_from(look.size).unwrap_or(0) + 1);
    let mut file = std::fs::File::from(file);
    // One byte more than there should be: a file that grew is noticed without another call.
    (&mut file).take(look.size + 1).read_to_end(buffer)?;
    Ok(buffer.len() as u64 == look.size && tree::look_at(&file)?.same_content(look))
}

/// A claim's own key in line: no file can be called that.
fn key_of(claim: &Claim) -> Key {
    Key { dir: claim.dir.clone(), name: format!("/{}", claim.id).as_bytes().into() }
}

fn put_back(claim: &Claim) {
    match claim.put_back() {
        Ok(true) => {}
        Ok(false) => tracing::debug!(id = %claim.id, "a claim stays for the next start: its place is taken"),
        Err(error) => tracing::debug!(id = %claim.id, %error, "a claim stays for the next start"),
    }
}

fn refusal(flaw: &Flaw) -> Refusal {
    let (reason, message) = match flaw {
        Flaw::Truncated(why) => (Reason::Truncated, why),
        Flaw::Unsupported(why) => (Reason::Unsupported, why),
    };
    Refusal { reason, status: None, message: (*message).to_owned(), attempts: 0 }
}

fn advice(reason: &str) -> &'static str {
    match reason {
        "symlink" => "a symbolic link; only regular files are published",
        "hard-link" => "it has other names (hard links); only files with one name are published",
        "too-large" => "larger than encode.max_frame; raise it if such images are meant to be published",
        "unreadable" => {
            "this service's user may not read it; let its writer make it group-readable (mode 0640, group of the drop directory)"
        }
        "other-filesystem" => "another file system is mounted there; make it a detector of its own",
        "no-name" => "its directory gives no detector name; the placeholders of `name` need more sub-directories",
        "directory" => "a directory with an image's name",
        _ => "not a regular file",
    }
}

fn trouble(error: &io::Error) -> String {
    let what = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::ROFS) => "the file system is read-only; nothing is taken until it can be written",
        Some(Errno::ACCESS | Errno::PERM) => {
            "files cannot be taken from it; make the service's user the owner of the directory"
        }
        Some(Errno::NOSPC | Errno::DQUOT) => "its file system is full",
        Some(Errno::MFILE | Errno::NFILE) => "no file descriptors are left; raise LimitNOFILE",
        Some(_) | None => "files cannot be taken from it",
    };
    format!("{what} ({error})")
}

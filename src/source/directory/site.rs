//! One drop directory at work: what encode workers, scans and settling share. Everything that blocks is in here and runs
//! on threads where that is allowed.
//!
//! Not here: when things are done (`directory::run`), and who is next (`window`).

mod noticing;
mod refused;
mod scanning;
mod settling;
mod taking;
mod trouble;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;
use rustix::fs::FileType;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::claim::{Claim, Root};
use super::config::{Config, Included};
use super::detect_time::Finder;
use super::reserve::Reserve;
use super::settler::Settler;
use super::tree::Look;
use super::window::{Key, Limits, Waiting, Window};
use crate::frame::{Detector, SourceKind};
use crate::metrics::{DetectorMetrics, Metrics};
use crate::queue::{Intake, Ready};
use crate::source::{Entry, Health, State, Template};

pub(super) use self::noticing::Via;
use self::noticing::Young;
use self::refused::Refused;
pub(super) use self::scanning::Tally;
pub(super) use self::settling::Settled;
pub(super) use self::settling::Unsettled;
use self::taking::{Later, SiteLine};
use self::trouble::Troubles;

/// Frames of one drop directory that are not pending any more and whose files are still there: beyond that none are taken, since
/// what a stop finds unsettled comes once more.
const UNSETTLED_MAX: usize = 256;
/// Detectors that one entry with placeholders may make.
const DETECTORS_MAX: usize = 1000;

/// See the file's head.
pub(super) struct Site {
    pub entry: Arc<Entry>,
    pub config: Config,
    pub metrics: Arc<Metrics>,
    pub health: Health,
    intake: Intake,
    included: Included,
    template: Template,
    finder: Finder,
    max_frame: u64,
    /// The drop directory while it can be used.
    pub root: ArcSwapOption<Root>,
    state: Mutex<Inner>,
    troubles: Mutex<Troubles>,
    settler: Settler,
    /// Frames that the settler has.
    unsettled: AtomicUsize,
    /// There were too many of them, and the lines wait until there are fewer.
    awaits_settler: AtomicBool,
    /// What could not be settled, until who tries it again takes it: no more than the frames in hand.
    kept: Mutex<Vec<Settled>>,
    /// Told when there is more of that.
    pub keeps_more: Notify,
    /// Frames offered or in hand.
    pub outstanding: AtomicUsize,
    /// Told when `outstanding` falls to zero while stopping, or a young file is waiting.
    pub changed: Notify,
    pub stopping: AtomicBool,
    /// A frame went back in line without its line being said to be ready: at once would be a busy loop.
    pub put_back: AtomicBool,
    /// Something was missed that a scan will find.
    pub missed: AtomicBool,
    /// Settled frames whose files cannot be removed: while there are any, the detector stays held and takes no more.
    pub stuck: AtomicUsize,
}

struct Inner {
    window: Window,
    young: HashMap<Key, Young>,
    /// Claims that gave trouble and wait for another try.
    later: Vec<Later>,
    refused: Refused,
    lines: HashMap<Arc<str>, Registered>,
    /// Counted as waiting, but beyond the window; by detector.
    beyond: HashMap<Arc<str>, i64>,
    /// Out of the window since the scan began, which may or may not have met them; by detector.
    doubtful: HashMap<Arc<str>, i64>,
    scan: u64,
}

struct Registered {
    detector: Arc<Detector>,
    metrics: Arc<DetectorMetrics>,
    ready: Ready,
    /// Received by this source and not settled by it.
    pending: Arc<AtomicI64>,
}

impl Site {
    pub(super) fn new(
        entry: Arc<Entry>,
        config: Config,
        intake: Intake,
        metrics: Arc<Metrics>,
        max_frame: u64,
        health: Health,
        settler: Settler,
    ) -> anyhow::Result<Arc<Self>> {
        let site = Arc::new(Self {
            included: config.included()?,
            template: Template::parse(&entry.name, entry.source.placeholders()).map_err(anyhow::Error::msg)?,
            finder: Finder::new(&config.detect_time, &entry.time_zone)?,
            state: Mutex::new(Inner {
                window: Window::new(entry.order, Limits::shared_by(1, 1)),
                young: HashMap::new(),
                later: Vec::new(),
                refused: Refused::default(),
                lines: HashMap::new(),
                beyond: HashMap::new(),
                doubtful: HashMap::new(),
                scan: 0,
            }),
            troubles: Mutex::default(),
            entry,
            config,
            metrics,
            health,
            intake,
            max_frame,
            root: ArcSwapOption::empty(),
            settler,
            unsettled: AtomicUsize::new(0),
            awaits_settler: AtomicBool::new(false),
            kept: Mutex::default(),
            keeps_more: Notify::new(),
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
        Ok(site)
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
            metrics.served(self.entry.silence_alarm);
            let ready = self.intake.register(detector.clone(), line);
            let pending = Arc::new(AtomicI64::new(0));
            inner.lines.insert(name.clone(), Registered { detector, metrics, ready, pending });
        }
        &inner.lines[name]
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

    /// One frame less in hand.
    pub(super) fn done(&self) {
        if self.outstanding.fetch_sub(1, Ordering::SeqCst) == 1 && self.stopping.load(Ordering::SeqCst) {
            self.changed.notify_one();
        }
    }

    /// Says again that lines have something: after trouble, now and then.
    pub(super) fn nudge(&self) {
        for line in self.inner().lines.values() {
            line.ready.ready();
        }
    }
}

impl Inner {
    /// The number of the scan that begins, and the reserve that is of no use any more.
    fn begin_scan(&mut self) -> (u64, Reserve) {
        self.scan += 1;
        self.doubtful.clear();
        (self.scan, self.window.begin_scan(self.scan))
    }

    /// Who is next in a detector's line. What waits beyond the window moves up.
    fn next(&mut self, detector: &Arc<str>) -> Option<Waiting> {
        let (came, known) = self.window.top_up(detector);
        if came > 0 {
            *self.beyond.entry(detector.clone()).or_default() -= i64::try_from(came).unwrap_or(0);
        }
        if let Some(line) = self.lines.get(detector) {
            // In line by another way: one file, counted twice.
            (0..known).for_each(|_| line.dropped("vanished"));
        }
        self.window.next(detector, Instant::now())
    }
}

const NOTHING: Look = Look { dev: 0, ino: 0, size: 0, mtime: 0, ctime: 0, links: 0, kind: FileType::Unknown, owner: 0 };

impl Registered {
    fn received(&self, n: u64) {
        self.metrics.received(SourceKind::Directory, n);
        self.pending.fetch_add(i64::try_from(n).unwrap_or(0), Ordering::Relaxed);
    }

    /// It is left alone, or in its place for whoever comes next.
    fn returned(&self, n: u64) {
        self.metrics.returned(n);
        self.pending.fetch_sub(i64::try_from(n).unwrap_or(0), Ordering::Relaxed);
    }

    fn dropped(&self, reason: &'static str) {
        self.metrics.dropped(reason, 1);
        self.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A claim's own key in line: no file can be called that.
fn key_of(claim: &Claim) -> Key {
    Key { dir: claim.dir.clone(), name: format!("/{}", claim.id).as_bytes().into() }
}

#[cfg(test)]
mod tests;

//! Drop directories: where detectors write files, and where each file is claimed, read and finally removed.
//!
//! [`run`] is the clockwork: when to scan, to look again, to settle. Events are hints, scans are the truth. What blocks
//! is in `site` and runs on threads where it may; what is pure is in `window`.

mod archive;
mod claim;
mod config;
mod detect_time;
mod reserve;
mod settler;
mod site;
mod tree;
mod watch;
mod window;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use self::claim::Root;
pub use self::config::{AfterPublish, Config, DetectTime, FromName, Watch, glob};
pub use self::detect_time::Finder;
use self::settler::Settler;
use self::site::{Settled, Site, Tally, Unsettled, Via};
use self::watch::{Event, Events, SharedInotify, Watcher};
use self::window::{Key, Limits};
use super::Surroundings;
use crate::metrics::Metrics;

/// How often the directory itself is looked for, and scanned where events cannot be had.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Events that are handled in one go.
const BATCH: usize = 256;
/// A watched directory is scanned for so large a part of the time at most: one in this many.
const SCAN_SHARE: u32 = 20;
/// However long a scan takes, the next one is not put off for longer.
const SCAN_PAUSE_MAX: Duration = Duration::from_mins(5);
/// Between two tries to remove files that could not be removed.
const SETTLE_AGAIN: Duration = Duration::from_secs(5);
/// How often the archive's old files are looked for.
const ARCHIVE_EVERY: Duration = Duration::from_mins(10);

/// What all drop directories of a daemon have in common. It outlives each of them.
#[derive(Clone)]
pub struct Shared {
    inotify: SharedInotify,
    settler: Settler,
    counts: Arc<Counts>,
    /// What former sources could not settle, so that a reload publishes nothing again.
    unsettled: Unsettled,
}

/// What works for a [`Shared`].
pub struct Service {
    events: watch::Reader,
    settled: settler::Inbox,
}

impl Shared {
    /// Nothing is noticed or settled until its service runs.
    pub fn new(metrics: Arc<Metrics>) -> (Self, Service) {
        let (inotify, events) = SharedInotify::new(metrics);
        let (settler, settled) = settler::settler();
        let (counts, unsettled) = (Arc::default(), Unsettled::default());
        (Self { inotify, settler, counts, unsettled }, Service { events, settled })
    }
}

/// How many drop directories are served, for what they share.
#[derive(Default)]
struct Counts {
    all: AtomicUsize,
    /// Those with more files than their windows hold.
    backlogs: AtomicUsize,
}

/// One of the drop directories that are served.
struct Served {
    counts: Arc<Counts>,
    has_backlog: bool,
}

impl Served {
    /// Until its first scan is over it may have any backlog.
    fn new(counts: Arc<Counts>) -> Self {
        counts.all.fetch_add(1, Ordering::Relaxed);
        counts.backlogs.fetch_add(1, Ordering::Relaxed);
        Self { counts, has_backlog: true }
    }

    fn has_backlog(&mut self, now: bool) {
        match (self.has_backlog, now) {
            (false, true) => drop(self.counts.backlogs.fetch_add(1, Ordering::Relaxed)),
            (true, false) => drop(self.counts.backlogs.fetch_sub(1, Ordering::Relaxed)),
            (true, true) | (false, false) => {}
        }
        self.has_backlog = now;
    }

    /// How many waiting files it may know now.
    fn limits(&self) -> Limits {
        let others = self.counts.backlogs.load(Ordering::Relaxed) - usize::from(self.has_backlog);
        Limits::shared_by(self.counts.all.load(Ordering::Relaxed), others + 1)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.has_backlog(false);
        self.counts.all.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Service {
    /// Serves until `stop`, which comes when no source is left.
    pub async fn run(self, stop: CancellationToken) {
        tokio::join!(self.events.run(stop.clone()), settler::run(self.settled, stop));
    }
}

/// Serves one drop directory until `stop`; returns when everything it had in hand is settled and the rest given back.
/// What could not be settled is left with the others, and what others left of this directory is taken over from there.
pub async fn run(config: Config, around: Surroundings) {
    let Surroundings { entry, intake, metrics, max_frame, health, directories, stop, .. } = around;
    let Shared { inotify, settler, counts, unsettled } = directories;
    let mut served = Served::new(counts);
    let site = match Site::new(entry, config, intake, metrics, max_frame, health.clone(), settler) {
        Ok(made) => made,
        Err(error) => {
            // The configuration was checked before; only a disagreement between the two checks leads here.
            health.set(super::State::Held(format!("{error:#}")));
            tracing::error!("a drop directory cannot be served: {error:#}");
            return stop.cancelled().await;
        }
    };
    let finished = CancellationToken::new();
    let serving = async {
        serve(&site, &mut served, &inotify, &stop).await;
        drain(&site).await;
        finished.cancel();
    };
    tokio::join!(serving, settle_again(&site, &unsettled, &finished), tidy_archive(&site, &stop));
    let last = site.clone();
    // A panic in there would be a bug; the claims are adopted at the next start all the same.
    drop(
        spawn_blocking(move || {
            last.give_back();
            last.root.store(None);
        })
        .await,
    );
}

/// Opens the directory again and again, and serves it as long as it is there.
async fn serve(site: &Arc<Site>, served: &mut Served, inotify: &SharedInotify, stop: &CancellationToken) {
    while !stop.is_cancelled() {
        let path = site.config.path.clone();
        match blocking(move || Root::open(&path)).await {
            Ok(root) => {
                let root = Arc::new(root);
                site.root.store(Some(root.clone()));
                site.directory_trouble(None);
                site.put_back.store(false, Ordering::Relaxed);
                site.nudge();
                serve_root(site, &root, served, inotify, stop).await;
                if !stop.is_cancelled() {
                    site.root.store(None);
                    let gone = site.clone();
                    drop(spawn_blocking(move || gone.forget_all()).await);
                    served.has_backlog(false);
                }
            }
            Err(error) => {
                served.has_backlog(false);
                site.directory_trouble(Some(missing(&error)));
            }
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(LOOK_EVERY), if site.root.load().is_none() => {}
        }
    }
}

/// Serves one directory until it goes away or `stop`.
async fn serve_root(
    site: &Arc<Site>,
    root: &Arc<Root>,
    served: &mut Served,
    inotify: &SharedInotify,
    stop: &CancellationToken,
) {
    let config = &site.config;
    let (mut watcher, mut events) = begin_watch(site, root, inotify);
    let mut look = tokio::time::interval(LOOK_EVERY.min(config.rescan));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut scan: Option<JoinHandle<io::Result<bool>>> = None;
    let mut scan_begun = Instant::now();
    let mut scan_due = Instant::now();
    let mut regular = scan_due;
    let mut young_due: Option<Instant> = None;
    loop {
        if scan.is_none() && scan_due <= Instant::now() {
            site.limit(served.limits());
            scan = Some(begin_scan(site, root, watcher.clone()));
            scan_begun = Instant::now();
            scan_due = scan_begun + next_scan(config, events.is_some());
            regular = scan_due;
        }
        if stop.is_cancelled() {
            break;
        }
        // Fair: a flood of events must not keep unfinished files, the scans and the look at the directory waiting.
        tokio::select! {
            () = stop.cancelled() => break,
            done = async { scan.as_mut().expect("guarded").await }, if scan.is_some() => {
                scan = None;
                served.has_backlog(site.has_backlog());
                match done {
                    Ok(Ok(true)) => {
                        site.directory_trouble(None);
                        // Unless something calls for one sooner. Where all is found by scans, as much time is left between them.
                        if scan_due == regular {
                            let took = scan_begun.elapsed();
                            let times = if events.is_some() { SCAN_SHARE } else { 2 };
                            scan_due = scan_due.max(scan_begun + took + ((times - 1) * took).min(SCAN_PAUSE_MAX));
                        }
                    }
                    Ok(Ok(false)) => {
                        site.directory_trouble(None);
                        (watcher, events) = (None, None);
                        scan_due = Instant::now();
                        exhausted(site);
                    }
                    Ok(Err(error)) => {
                        site.directory_trouble(Some(missing(&error)));
                        site.missed.store(true, Ordering::Relaxed);
                    }
                    Err(error) => {
                        tracing::error!(%error, "a scan failed; the next one is due soon");
                        site.missed.store(true, Ordering::Relaxed);
                    }
                }
                site.nudge();
            }
            batch = next_events(&mut events) => {
                if batch.contains(&Event::Overflow) {
                    scan_due = Instant::now();
                }
                if batch.contains(&Event::Gone) {
                    break;
                }
                let (at, to, with) = (site.clone(), root.clone(), watcher.clone());
                if !blocking(move || Ok(handle(&at, &to, with.as_ref(), batch))).await.unwrap_or(true) {
                    (watcher, events) = (None, None);
                    scan_due = Instant::now();
                    exhausted(site);
                }
            }
            () = site.changed.notified() => young_due = Some(Instant::now()),
            () = sleep_until(young_due) => {
                let at = site.clone();
                young_due = blocking(move || Ok(at.look_at_young())).await.ok().flatten();
            }
            _ = look.tick() => {
                let (path, known) = (config.path.clone(), root.clone());
                if !blocking(move || Ok(known.is_still(&path))).await.unwrap_or(true) {
                    break;
                }
                site.forget_old_trouble();
                site.go_on();
                // What one that goes on finds is not known yet.
                if scan.is_none() && site.wants_scan() {
                    scan_due = Instant::now();
                }
                if site.put_back.swap(false, Ordering::Relaxed) || site.health.held().is_some() {
                    site.nudge();
                }
            }
        }
    }
    if let Some(scan) = scan {
        // It notices `stopping`, or its directory's end, by itself; a second one must not run beside it.
        if stop.is_cancelled() {
            site.stopping.store(true, Ordering::Relaxed);
        }
        drop(scan.await);
    }
}

/// Nothing more is offered; waits until every frame in hand has come back.
async fn drain(site: &Arc<Site>) {
    site.stopping.store(true, Ordering::SeqCst);
    let waiting = site.clone();
    // A panic in there would be a bug; what it held is returned in the end.
    drop(spawn_blocking(move || waiting.return_waiting()).await);
    while site.outstanding.load(Ordering::SeqCst) > 0 {
        tokio::select! {
            () = site.changed.notified() => {}
            // A notification may have been taken by the look that came before.
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
    }
}

/// Carries out, again and again, what the file system refused: that is remembered, and never published again while this
/// process lives.
async fn settle_again(site: &Arc<Site>, unsettled: &Unsettled, finished: &CancellationToken) {
    let mut stuck: Vec<Settled> = Vec::new();
    let mut again = Instant::now();
    loop {
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(again) => {
                if let Some(root) = &*site.root.load() {
                    let taken_over = unsettled.take(root);
                    site.stuck.fetch_add(taken_over.len(), Ordering::Relaxed);
                    stuck.extend(taken_over);
                }
                if stuck.is_empty() {
                    again = Instant::now() + LOOK_EVERY;
                    continue;
                }
                let before = stuck.len();
                stuck = settle_all(site, stuck).await;
                let_go(site, &mut stuck);
                // Those that are kept meanwhile have counted themselves.
                site.stuck.fetch_sub(before - stuck.len(), Ordering::Relaxed);
                stuck.append(&mut site.take_kept());
                again = Instant::now() + SETTLE_AGAIN;
                if stuck.is_empty() {
                    site.settling_trouble(None);
                    site.nudge();
                }
            }
            () = site.keeps_more.notified() => {
                if stuck.is_empty() {
                    again = Instant::now() + SETTLE_AGAIN;
                }
                stuck.append(&mut site.take_kept());
            }
            () = finished.cancelled() => break,
        }
    }
    stuck.append(&mut site.take_kept());
    unsettled.leave(settle_all(site, stuck).await);
}

/// What lies on a file system that is not there any more holds nothing up: it cannot be settled, and what is there now can.
/// If it comes back, its claims are adopted like those of a crash.
fn let_go(site: &Site, stuck: &mut Vec<Settled>) {
    let Some(root) = site.root.load_full() else { return };
    let before = stuck.len();
    stuck.retain(|settled| (settled.held.claim.root.dev, settled.held.claim.root.ino) == (root.dev, root.ino));
    if stuck.len() < before {
        tracing::warn!(
            detector = %site.entry.name, path = ?site.config.path, files = before - stuck.len(),
            "settled files stay behind on a file system that was replaced; where it comes back, they are published once more"
        );
    }
}

/// Those that are still stuck.
async fn settle_all(site: &Arc<Site>, stuck: Vec<Settled>) -> Vec<Settled> {
    let at = site.clone();
    let work = move || stuck.into_iter().filter_map(|one| at.try_to_settle(one)).collect();
    spawn_blocking(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, "settling failed; the claims are found again at the next start");
        Vec::new()
    })
}

fn begin_watch(site: &Arc<Site>, root: &Arc<Root>, inotify: &SharedInotify) -> (Option<Watcher>, Option<Events>) {
    let config = &site.config;
    let poll = |why: &str| {
        tracing::info!(detector = %site.entry.name, path = ?config.path, "polling: {why}");
        (None, None)
    };
    match config.watch {
        Watch::Poll => (None, None),
        Watch::Auto if !watch::tells_all(&root.fd) => {
            poll("this kind of file system does not tell of changes that others make")
        }
        Watch::Auto | Watch::Inotify => {
            if let Some((watcher, events)) = inotify.begin(config.recursive) {
                (Some(watcher), Some(events))
            } else {
                exhausted(site);
                (None, None)
            }
        }
    }
}

/// No more watches are to be had.
fn exhausted(site: &Site) {
    site.metrics.counter("watch_errors_total", &[]).increment(1);
    tracing::warn!(
        detector = %site.entry.name,
        path = ?site.config.path,
        "not every directory can be watched, so they are polled: raise the sysctls fs.inotify.max_user_watches and fs.inotify.max_user_instances"
    );
}

fn begin_scan(site: &Arc<Site>, root: &Arc<Root>, watcher: Option<Watcher>) -> JoinHandle<io::Result<bool>> {
    let (site, root) = (site.clone(), root.clone());
    spawn_blocking(move || site.scan(&root, watcher.as_ref()))
}

/// A tenth more or less, so that many directories are not scanned at the same moment.
fn next_scan(config: &Config, watched: bool) -> Duration {
    let every = if watched { config.rescan } else { config.rescan.min(LOOK_EVERY) };
    every.mul_f64(0.9 + 0.2 * fastrand::f64())
}

/// The next events, as many as there are at once. Never, while nothing is watched. Cancel safe.
async fn next_events(events: &mut Option<Events>) -> Vec<Event> {
    match events {
        Some(events) => events.next(BATCH).await,
        None => std::future::pending().await,
    }
}

/// `false`: a new directory could not be watched.
fn handle(site: &Arc<Site>, root: &Arc<Root>, watcher: Option<&Watcher>, batch: Vec<Event>) -> bool {
    use std::os::fd::AsFd as _;
    let mut watched = true;
    let mut open: Option<(Arc<[u8]>, std::os::fd::OwnedFd)> = None;
    for event in batch {
        let (dir, name, via) = match event {
            Event::Moved { dir, name } => (dir, name, Via::Moved),
            Event::Closed { dir, name } => (dir, name, Via::Closed),
            Event::Directory { dir } => {
                match site.visit_new(root, &dir, watcher) {
                    Ok(all) => watched &= all,
                    Err(error) => site.missed_by(&error),
                }
                continue;
            }
            Event::Overflow | Event::Gone => continue,
        };
        if open.as_ref().is_none_or(|(at, _)| *at != dir) {
            open = match tree::open_below(root.fd.as_fd(), &dir) {
                Ok(fd) => Some((dir.clone(), fd)),
                Err(error) => {
                    site.missed_by(&error);
                    None
                }
            };
        }
        if let Some((_, fd)) = &open {
            site.notice(fd.as_fd(), &Key { dir, name }, via, &mut Tally::default());
        }
    }
    watched
}

/// Removes what lies in the archive for too long, now and then. Beside all else: a large archive takes minutes.
async fn tidy_archive(site: &Arc<Site>, stop: &CancellationToken) {
    let config = &site.config;
    let (Some(archive), false) = (&config.archive, config.archive_max_age.is_zero()) else { return };
    let mut every = tokio::time::interval(ARCHIVE_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = every.tick() => {}
        }
        let (archive, max_age, stop) = (archive.clone(), config.archive_max_age, stop.clone());
        match blocking(move || archive::tidy(&archive, max_age, &stop)).await {
            Ok(0) => {}
            Ok(n) => {
                tracing::info!(detector = %site.entry.name, files = n, "removed from the archive: older than archive_max_age");
            }
            Err(error) => tracing::warn!(detector = %site.entry.name, %error, "the archive cannot be tidied"),
        }
    }
}

fn missing(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::NotFound {
        return "the directory does not exist; it is looked for every second".into();
    }
    let remedy =
        if error.kind() == io::ErrorKind::PermissionDenied { "; make the service's user its owner" } else { "" };
    format!("the directory cannot be used ({error}){remedy}")
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

//! Watching drop directories with inotify. Events are hints: what they miss, the next scan finds.
//!
//! One inotify instance serves all drop directories of a daemon: a user may have 128 of them by default, and a box may have
//! more cameras than that. [`Reader`] reads its events and puts each into the mailbox of whoever watches that directory. The
//! cost is one more task to wake for a file; and when the kernel's queue overflows, every directory is scanned.
//!
//! Not here: what an event's file is good for.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::tree;
use crate::metrics::Metrics;

/// The kernel's events are read in portions of this many bytes: some thousand events.
const BUFFER_BYTES: usize = 64 * 1024;
/// Events that wait for one drop directory: as many as the kernel keeps by default. What is beyond that, a scan finds.
const MAILBOX_EVENTS: usize = 16_384;
/// Before events are read again that could not be read.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// What the kernel told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A file was renamed to this name: complete.
    Moved { dir: Arc<[u8]>, name: Arc<[u8]> },
    /// A writer closed the file.
    Closed { dir: Arc<[u8]>, name: Arc<[u8]> },
    /// There is a new sub-directory.
    Directory { dir: Arc<[u8]> },
    /// Events were lost: everything must be looked at.
    Overflow,
    /// The watched directory itself went away or another was put in its place.
    Gone,
}

/// The inotify instance that all drop directories of a daemon share.
#[derive(Clone, Debug)]
pub(super) struct SharedInotify {
    /// `None`: everything is polled.
    kernel: Option<Watches>,
    listeners: Listeners,
}

/// Reads the events of a [`SharedInotify`].
pub(super) struct Reader {
    inotify: Option<Inotify>,
    listeners: Listeners,
    metrics: Arc<Metrics>,
}

/// The events of one drop directory. Dropped: its watches end.
pub(super) struct Events {
    inbox: mpsc::Receiver<Event>,
    mailbox: Arc<Mailbox>,
    inotify: SharedInotify,
}

/// Adds directories to the watch; may be used while scanning, on another thread.
#[derive(Clone)]
pub(super) struct Watcher {
    kernel: Watches,
    listeners: Listeners,
    mailbox: Arc<Mailbox>,
    recursive: bool,
}

type Listeners = Arc<Mutex<Listening>>;

#[derive(Debug, Default)]
struct Listening {
    /// Whom a watch's events are for: more than one where two paths lead to one directory.
    watches: HashMap<WatchDescriptor, Vec<Listener>>,
    mailboxes: Vec<Arc<Mailbox>>,
}

#[derive(Debug)]
struct Listener {
    /// Below its drop directory.
    dir: Arc<[u8]>,
    mailbox: Arc<Mailbox>,
}

#[derive(Debug)]
struct Mailbox {
    events: mpsc::Sender<Event>,
    /// An event found no room.
    overflown: AtomicBool,
}

impl SharedInotify {
    /// Takes an instance, if the system has one left: without it everything is polled.
    pub(super) fn new(metrics: Arc<Metrics>) -> (Self, Reader) {
        let begun = Inotify::init();
        if let Err(error) = &begun {
            // Each directory that is polled for that reason says so, and what to raise.
            tracing::debug!(%error, "no inotify instance is to be had");
        }
        let inotify = begun.ok();
        let (kernel, listeners) = (inotify.as_ref().map(Inotify::watches), Listeners::default());
        (Self { kernel, listeners: listeners.clone() }, Reader { inotify, listeners, metrics })
    }

    /// Begins to watch nothing. `None`: there is no instance.
    pub(super) fn begin(&self, recursive: bool) -> Option<(Watcher, Events)> {
        let kernel = self.kernel.clone()?;
        let (send, inbox) = mpsc::channel(MAILBOX_EVENTS);
        let mailbox = Arc::new(Mailbox { events: send, overflown: AtomicBool::new(false) });
        lock(&self.listeners).mailboxes.push(mailbox.clone());
        let watcher = Watcher { kernel, listeners: self.listeners.clone(), mailbox: mailbox.clone(), recursive };
        Some((watcher, Events { inbox, mailbox, inotify: self.clone() }))
    }
}

impl Reader {
    /// Hands out events until `stop`.
    pub(super) async fn run(self, stop: CancellationToken) {
        let Self { inotify, listeners, metrics } = self;
        let reading = async {
            let Some(inotify) = inotify else { return std::future::pending().await };
            let mut events =
                inotify.into_event_stream(vec![0; BUFFER_BYTES]).expect("a descriptor that can be waited for");
            loop {
                match events.next().await {
                    Some(Ok(event)) => hand_out(&listeners, &metrics, &event),
                    // Nobody has seen that. Scanning again and again is polling.
                    lost => {
                        tracing::warn!(?lost, "inotify events cannot be read; everything is scanned");
                        overflow(&lock(&listeners), &metrics);
                        tokio::time::sleep(READ_AGAIN).await;
                    }
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = reading => {}
        }
    }
}

fn hand_out(listeners: &Listeners, metrics: &Metrics, event: &inotify::Event<OsString>) {
    let mut listening = lock(listeners);
    if event.mask.contains(EventMask::Q_OVERFLOW) {
        return overflow(&listening, metrics);
    }
    for listener in listening.watches.get(&event.wd).into_iter().flatten() {
        if let Some(meant) = meaning(event.mask, event.name.as_deref(), &listener.dir) {
            listener.mailbox.put(meant, metrics);
        }
    }
    if event.mask.contains(EventMask::IGNORED) {
        listening.watches.remove(&event.wd);
    }
}

/// Everybody must look at everything.
fn overflow(listening: &Listening, metrics: &Metrics) {
    count_overflow(metrics);
    for mailbox in &listening.mailboxes {
        if mailbox.events.try_send(Event::Overflow).is_err() {
            mailbox.lost();
        }
    }
}

fn count_overflow(metrics: &Metrics) {
    metrics.counter("watch_overflows_total", &[]).increment(1);
}

/// What an event in `dir` means; `None`: nothing.
fn meaning(mask: EventMask, name: Option<&OsStr>, dir: &Arc<[u8]>) -> Option<Event> {
    if mask.intersects(EventMask::IGNORED | EventMask::UNMOUNT | EventMask::DELETE_SELF | EventMask::MOVE_SELF) {
        return dir.is_empty().then_some(Event::Gone);
    }
    let name = name?.as_bytes();
    if mask.contains(EventMask::ISDIR) {
        return Some(Event::Directory { dir: tree::join(dir, name).into() });
    }
    let (dir, name) = (dir.clone(), name.into());
    if mask.contains(EventMask::MOVED_TO) {
        Some(Event::Moved { dir, name })
    } else {
        mask.contains(EventMask::CLOSE_WRITE).then_some(Event::Closed { dir, name })
    }
}

impl Mailbox {
    fn put(&self, event: Event, metrics: &Metrics) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send(event)
            && self.lost()
        {
            count_overflow(metrics);
        }
    }

    /// There was no room for an event. Whether that is news.
    fn lost(&self) -> bool {
        let news = !self.overflown.swap(true, Ordering::Relaxed);
        // Whoever has emptied it since then waits for an event before he looks.
        self.events.try_send(Event::Overflow).ok();
        news
    }
}

/// Whether the kernel tells of all changes on this file system: not where others (servers, layers) make them.
pub(super) fn tells_all(dir: impl AsFd) -> bool {
    const NFS: u64 = 0x6969;
    const SMB: u64 = 0x517b;
    const SMB2: u64 = 0xfe53_4d42;
    const CIFS: u64 = 0xff53_4d42;
    const FUSE: u64 = 0x6573_5546;
    const OVERLAY: u64 = 0x794c_7630;
    const NINE_P: u64 = 0x0102_1997;
    const CEPH: u64 = 0x00c3_6400;
    let Ok(stat) = rustix::fs::fstatfs(dir) else { return false };
    #[expect(clippy::allow_attributes, reason = "the type differs between architectures")]
    #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)]
    let kind = stat.f_type as u64 & 0xffff_ffff;
    ![NFS, SMB, SMB2, CIFS, FUSE, OVERLAY, NINE_P, CEPH].contains(&kind)
}

impl Watcher {
    /// Watches the directory that is open as `fd`. Watching it already is no error.
    pub(super) fn add(&self, fd: impl AsFd, dir: &Arc<[u8]>) -> io::Result<()> {
        // Added to what another path to the same directory wants to know.
        let mut mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::MASK_ADD
            | WatchMask::ONLYDIR;
        if self.recursive {
            mask |= WatchMask::CREATE;
        }
        // The open directory itself, whatever its name leads to by now.
        let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
        // The lock is held over the call, so that no event comes before its directory is known.
        let mut listening = lock(&self.listeners);
        if self.mailbox.events.is_closed() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let watch = self.kernel.clone().add(path, mask)?;
        let listeners = listening.watches.entry(watch).or_default();
        match listeners.iter_mut().find(|listener| Arc::ptr_eq(&listener.mailbox, &self.mailbox)) {
            Some(known) => known.dir = dir.clone(),
            None => listeners.push(Listener { dir: dir.clone(), mailbox: self.mailbox.clone() }),
        }
        Ok(())
    }
}

impl Events {
    /// The next events, at least one and at most `max`. Cancel safe.
    pub(super) async fn next(&mut self, max: usize) -> Vec<Event> {
        if self.mailbox.overflown.swap(false, Ordering::Relaxed) {
            return vec![Event::Overflow];
        }
        let mut batch = Vec::new();
        self.inbox.recv_many(&mut batch, max).await;
        batch
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.inbox.close();
        let mut listening = lock(&self.inotify.listeners);
        listening.mailboxes.retain(|mailbox| !Arc::ptr_eq(mailbox, &self.mailbox));
        listening.watches.retain(|watch, listeners| {
            listeners.retain(|listener| !Arc::ptr_eq(&listener.mailbox, &self.mailbox));
            if listeners.is_empty()
                && let Some(kernel) = &self.inotify.kernel
            {
                // It may have ended by itself.
                kernel.clone().remove(watch.clone()).ok();
            }
            !listeners.is_empty()
        });
    }
}

fn lock(listeners: &Listeners) -> MutexGuard<'_, Listening> {
    listeners.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use tempfile::TempDir;

    use super::*;

    /// An instance whose events are read, and a directory.
    struct Bench {
        inotify: SharedInotify,
        home: TempDir,
        stop: CancellationToken,
    }

    impl Bench {
        fn new() -> Self {
            let (inotify, reader) = SharedInotify::new(Metrics::new());
            let stop = CancellationToken::new();
            tokio::spawn(reader.run(stop.clone()));
            Self { inotify, home: tempfile::tempdir().unwrap(), stop }
        }

        fn directory(&self, name: &str) -> PathBuf {
            let path = self.home.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        }

        fn watch(&self, path: &Path, recursive: bool) -> (Watcher, Events) {
            let (watcher, events) = self.inotify.begin(recursive).unwrap();
            watcher.add(tree::open(path).unwrap(), &Arc::from(*b"")).unwrap();
            (watcher, events)
        }

        fn watches(&self) -> usize {
            lock(&self.inotify.listeners).watches.len()
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            self.stop.cancel();
        }
    }

    fn closed(name: &str) -> Event {
        Event::Closed { dir: Arc::from(*b""), name: name.as_bytes().into() }
    }

    #[tokio::test]
    async fn each_directory_hears_of_its_own_files_only() {
        let bench = Bench::new();
        let (one, two) = (bench.directory("one"), bench.directory("two"));
        let ((_one, mut first), (_two, mut second)) = (bench.watch(&one, false), bench.watch(&two, true));
        fs::write(one.join("a.jpg"), "a").unwrap();
        fs::write(two.join("b.jpg"), "b").unwrap();
        fs::create_dir(two.join("below")).unwrap();
        assert_eq!(first.next(9).await, [closed("a.jpg")]);
        let mut heard = second.next(9).await;
        while heard.len() < 2 {
            heard.extend(second.next(9).await);
        }
        assert_eq!(heard, [closed("b.jpg"), Event::Directory { dir: Arc::from(*b"below") }]);
    }

    #[tokio::test]
    async fn two_paths_to_one_directory_both_hear_of_it_until_each_has_ended() {
        let bench = Bench::new();
        let dir = bench.directory("one");
        let (_first, first) = bench.watch(&dir, true);
        let (watcher, mut second) = bench.watch(&dir, false);
        assert_eq!(bench.watches(), 1);
        drop(first);
        fs::write(dir.join("a.jpg"), "a").unwrap();
        assert_eq!(second.next(9).await, [closed("a.jpg")]);
        drop(second);
        assert_eq!(bench.watches(), 0);
        let late = watcher.add(tree::open(&dir).unwrap(), &Arc::from(*b""));
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::BrokenPipe, "a scan that still runs watches nothing more");
    }

    #[tokio::test]
    async fn a_directory_that_goes_away_is_told_and_forgotten() {
        let bench = Bench::new();
        let dir = bench.directory("one");
        let (_watcher, mut events) = bench.watch(&dir, false);
        fs::remove_dir(&dir).unwrap();
        assert_eq!(events.next(1).await, [Event::Gone]);
        while bench.watches() > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn who_does_not_look_into_a_full_mailbox_has_to_scan_and_nobody_else_has() {
        let metrics = Metrics::new();
        let (inotify, _reader) = SharedInotify::new(metrics.clone());
        let ((slow, mut events), (watcher, mut other)) = (inotify.begin(false).unwrap(), inotify.begin(false).unwrap());
        for _ in 0..MAILBOX_EVENTS + 2 {
            slow.mailbox.put(closed("a.jpg"), &metrics);
        }
        assert_eq!(events.next(1).await, [Event::Overflow]);
        assert_eq!(events.next(1).await, [closed("a.jpg")], "what came before is still told");
        assert!(tokio::time::timeout(Duration::from_millis(1), other.next(1)).await.is_err());
        overflow(&lock(&inotify.listeners), &metrics);
        assert_eq!(other.next(1).await, [Event::Overflow]);
        let (waiting, ()) = tokio::join!(other.next(1), async { assert!(watcher.mailbox.lost()) });
        assert_eq!(waiting, [Event::Overflow], "also who has emptied it before it was said to be full");
        let text = metrics.render();
        assert!(text.contains("framegate_watch_overflows_total 2"), "{text}");
    }
}

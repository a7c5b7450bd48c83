//! Noticing: what an event or a scan found is looked at, and stands in line, waits for its writer, or is refused.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::FileType;
use rustix::io::Errno;
use tokio::time::Instant;

use super::super::claim::Claim;
use super::super::tree::{self, Look};
use super::super::window::{Added, Key, Waiting};
use super::refused::Say;
use super::scanning::Tally;
use super::taking::{Later, RETRY_AFTER};
use super::{Inner, NOTHING, Site};
use crate::source::AHEAD_MAX;

/// Unfinished files that are watched over at once; others wait for the next scan.
pub(super) const YOUNG_MAX: usize = 65_536;
/// The longest wait between two looks at an unfinished file.
pub(super) const LOOK_AGAIN_MAX: Duration = Duration::from_secs(5);
/// Endings of files that somebody is still writing.
const PARTIAL: [&[u8]; 4] = [b".tmp", b".part", b".filepart", b"~"];

/// A file that is not known to be complete.
pub(super) struct Young {
    pub size: u64,
    pub mtime: i64,
    pub since: Instant,
    pub due: Instant,
    /// Counted as received already.
    pub counted: bool,
    /// Renamed into place.
    pub settled: bool,
    pub noticed: Instant,
    pub received_at: Timestamp,
}

/// How a file was noticed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::source::directory) enum Via {
    Moved,
    Closed,
    /// By this scan; 0 is a scan of one new sub-directory.
    Scan(u64),
}

impl Site {
    /// Whether a name may be an image of ours.
    fn wanted(&self, name: &[u8]) -> bool {
        !name.starts_with(b".") && !PARTIAL.iter().any(|ending| name.ends_with(ending)) && self.included.has(name)
    }

    /// A file may have come. Looks at it and puts it where it belongs.
    pub(in crate::source::directory) fn notice(
        self: &Arc<Self>,
        dir_fd: BorrowedFd<'_>,
        key: &Key,
        via: Via,
        tally: &mut Tally,
    ) {
        if !self.wanted(&key.name) {
            return;
        }
        let look = match tree::look(dir_fd, &key.name) {
            Ok(look) => look,
            // Gone again, or not to be seen: the next scan looks once more.
            Err(error) => return self.not_seen(&key.dir, tree::look_at(dir_fd), &error, tally),
        };
        let mut inner = self.inner();
        if let Some(reason) = self.unfit(&look) {
            self.refuse(&mut inner, key, &look, reason);
            return;
        }
        let scan = inner.scan;
        if inner.refused.knows(key, &look, scan) {
            return;
        }
        let Some(detector) = self.detector_of(&inner, &key.dir) else {
            self.refuse(&mut inner, key, &look, "no-name");
            return;
        };
        let (now, wall) = (Instant::now(), Timestamp::now());
        let quiet = self.config.quiet;
        let young = |settled| Young {
            size: look.size,
            mtime: look.mtime,
            since: now,
            due: now + quiet,
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
        let (fresh, settled, scan) = match via {
            Via::Moved => (true, true, 0),
            Via::Closed => (true, false, 0),
            Via::Scan(scan) if unchanged_for(&look, quiet, wall) == Some(true) => (false, true, scan),
            // What is wrong with it may yet change, as after a writer closed it; what is whole is published.
            Via::Scan(scan) if unchanged_for(&look, quiet, wall).is_none() => (false, false, scan),
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
            Added::NoRoom => {
                *beyond.entry(detector.clone()).or_default() += 1;
                if scan == 0 {
                    *inner.doubtful.entry(detector.clone()).or_default() += 1;
                }
            }
            Added::InsteadOf { detector, scan: seen } => {
                *beyond.entry(detector.clone()).or_default() += i64::from(scan == 0 || seen == scan);
                if scan > 0 {
                    *tally.added.entry(detector.clone()).or_default() -= 1;
                }
                if scan == 0 || seen == 0 {
                    *inner.doubtful.entry(detector).or_default() += 1;
                }
            }
            Added::InLine | Added::Known => {}
        }
    }

    /// A claim goes in line: it always has room, since no scan would find it again.
    pub(super) fn add_claim(
        self: &Arc<Self>,
        inner: &mut Inner,
        detector: &Arc<str>,
        claim: Claim,
        look: Look,
        settled: bool,
    ) {
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

    /// An entry that is never taken: counted and said once. Whether it is news.
    pub(super) fn refuse(&self, inner: &mut Inner, key: &Key, look: &Look, reason: &'static str) -> bool {
        let (scan, path) = (inner.scan, &self.config.path);
        let name = self.name_in(&key.dir).unwrap_or_else(|| self.entry.name.clone());
        let say = inner.refused.add(key, look, scan);
        match say {
            Say::New | Say::Changed => self.metrics.detector(&name).refused(reason),
            Say::More => {
                tracing::warn!(detector = %name, ?path, "more entries are refused than are remembered; further ones are neither counted nor said");
            }
            Say::Nothing => {}
        }
        if say == Say::New {
            let file = tree::join(&key.dir, &key.name);
            let file = std::ffi::OsStr::from_bytes(&file);
            tracing::warn!(detector = %name, ?path, ?file, "refused and left alone: {}", advice(reason, look));
        }
        say != Say::Nothing
    }

    /// A sub-directory, or what is in it, cannot be looked at.
    pub(super) fn not_seen(&self, dir: &Arc<[u8]>, look: io::Result<Look>, error: &io::Error, tally: &mut Tally) {
        match Errno::from_io_error(error) {
            // Gone since, or another took its place: the next scan sees what there is.
            Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => {}
            Some(Errno::ACCESS | Errno::PERM) => {
                let key = Key { dir: dir.clone(), name: Arc::from(*b"") };
                // Not its time: that changes with what is written into it.
                let look = Look { kind: FileType::Directory, ctime: 0, ..look.unwrap_or(NOTHING) };
                // What lay below is not known to be gone; by the next scan it is not there for us.
                tally.partial |= self.refuse(&mut self.inner(), &key, &look, "unreadable");
            }
            Some(_) | None => {
                let (path, below) = (&self.config.path, std::ffi::OsStr::from_bytes(dir));
                tracing::warn!(detector = %self.entry.name, ?path, ?below, %error, "a sub-directory cannot be looked into; it is tried again at the next scan");
                tally.partial = true;
            }
        }
    }

    /// Looks at files that were not complete. When to look again, if any is left.
    pub(in crate::source::directory) fn look_at_young(self: &Arc<Self>) -> Option<Instant> {
        let now = Instant::now();
        let due: Vec<Key> = {
            let inner = self.inner();
            let mut due: Vec<_> = inner.young.iter().filter(|(_, y)| y.due <= now).collect();
            // The newest comes last, as when they are written one by one.
            due.sort_unstable_by(|(a, x), (b, y)| (x.mtime, &a.dir, &a.name).cmp(&(y.mtime, &b.dir, &b.name)));
            due.into_iter().map(|(key, _)| key.clone()).collect()
        };
        self.put_back_later(now);
        let root = self.root.load_full();
        for key in due {
            let looked = root.as_ref().map(|root| {
                let dir = tree::open_below(root.fd.as_fd(), &key.dir)?;
                tree::look(&dir, &key.name)
            });
            self.look_at_young_one(&key, looked.as_ref(), now);
        }
        let inner = self.inner();
        let later = inner.later.iter().map(|it| it.due);
        inner.young.values().map(|y| y.due).chain(later).min()
    }

    /// Claims that gave trouble go back in line when it is time.
    fn put_back_later(&self, now: Instant) {
        let inner = &mut *self.inner();
        for Later { detector, waiting, .. } in inner.later.extract_if(.., |it| it.due <= now) {
            inner.window.put_back(&detector, waiting);
            if let Some(line) = inner.lines.get(&detector) {
                line.ready.ready();
            }
        }
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
            (young.size, young.mtime, young.since) = (look.size, look.mtime, now);
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
        self.add(&mut inner, &detector, waiting, true, 0, young.counted, &mut Tally::default());
    }

    /// The same name came again while its last file was being taken.
    pub(super) fn look_again(&self, inner: &mut Inner, key: &Key) {
        let now = Instant::now();
        let young = Young {
            size: u64::MAX,
            mtime: 0,
            since: now,
            due: now,
            counted: false,
            settled: true,
            noticed: now,
            received_at: Timestamp::now(),
        };
        inner.young.insert(key.clone(), young);
        self.changed.notify_one();
    }

    /// Not complete, or in trouble: looked at again later.
    pub(super) fn unfit(&self, look: &Look) -> Option<&'static str> {
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
}

/// Whether nobody has changed a file for `quiet`, by our clock. `None`: its times are far ahead of that, and so do not
/// tell.
fn unchanged_for(look: &Look, quiet: Duration, now: Timestamp) -> Option<bool> {
    let now = now.as_nanosecond();
    let ahead = |time: i64| i128::from(time) > now + AHEAD_MAX.as_nanos().cast_signed();
    // A time that a writer sets may be any; the change of the inode is by the clock of who keeps the file.
    let changed = if ahead(look.mtime) { look.ctime } else { look.mtime };
    (!ahead(changed)).then(|| now - i128::from(changed) >= i128::try_from(quiet.as_nanos()).unwrap_or(i128::MAX))
}

fn advice(reason: &str, look: &Look) -> &'static str {
    match reason {
        "symlink" => "a symbolic link; only regular files are published",
        "hard-link" => "it has other names (hard links); only files with one name are published",
        "too-large" => "larger than encode.max_frame; raise it if such images are meant to be published",
        "unreadable" if look.kind == FileType::Directory => {
            "this service's user may not look into it; make that user its owner, or its group its owner's (mode 2770)"
        }
        "unreadable" => {
            "this service's user may not read it; let its writer make it group-readable (mode 0640, group of the drop directory)"
        }
        "other-filesystem" => "another file system is mounted there; make it a detector of its own",
        "no-name" => "its directory gives no detector name; the placeholders of `name` need more sub-directories",
        "directory" => "a directory with an image's name",
        _ => "not a regular file",
    }
}

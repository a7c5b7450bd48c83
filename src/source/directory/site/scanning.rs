//! Scanning: everything below the drop directory is looked at, dead instances' claims are adopted, and what came and went
//! unseen is counted.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::{AtFlags, FileType};

use super::super::claim::Root;
use super::super::tree::{self, Look};
use super::super::watch::Watcher;
use super::super::window::{Key, Limits};
use super::noticing::Via;
use super::{NOTHING, Site};

/// A sub-directory that has been empty for this long may be removed.
const EMPTY_FOR: Duration = Duration::from_mins(1);

/// What a scan found, by detector.
#[derive(Default)]
pub(in crate::source::directory) struct Tally {
    pub(super) added: HashMap<Arc<str>, i64>,
    pub(super) no_room: HashMap<Arc<str>, i64>,
    /// There is something that could not be looked at.
    pub(super) partial: bool,
}

impl Site {
    /// How many waiting files are known from now on.
    pub(in crate::source::directory) fn limit(&self, limits: Limits) {
        self.inner().window.limit(limits);
    }

    /// Looks at everything. Files are in line as soon as they are seen.
    pub(in crate::source::directory) fn scan(
        self: &Arc<Self>,
        root: &Arc<Root>,
        watcher: Option<&Watcher>,
    ) -> io::Result<bool> {
        let (scan, old) = self.inner().begin_scan();
        drop(old);
        self.metrics.counter("rescans_total", &[]).increment(1);
        let mut tally = Tally::default();
        self.adopt(root)?;
        let visited = self.visit(root, &Arc::from(*b""), 0, Via::Scan(scan), watcher, &mut tally);
        let ended = visited.is_ok() && !self.stopping.load(Ordering::Relaxed);
        self.reckon(&tally, ended && !tally.partial);
        let mut reserve = self.inner().window.gathered();
        reserve.sort();
        self.inner().window.end_scan(reserve);
        if ended {
            self.inner().refused.keep_met(scan);
        }
        root.tidy()?;
        visited
    }

    /// Looks at one new sub-directory and what is below it.
    pub(in crate::source::directory) fn visit_new(
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
        let fd = tree::open_below(root.fd.as_fd(), dir)?;
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
            match self.visit(root, dir, depth + 1, via, watcher, tally) {
                Ok(all) => watched &= all,
                Err(error) => self.not_seen(dir, look_below(root, dir), &error, tally),
            }
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
            let look = claim.place().and_then(|(place, name)| tree::look(&place, &name)).unwrap_or(NOTHING);
            let mut inner = self.inner();
            let detector = self.detector_of(&inner, &claim.dir).unwrap_or_else(|| self.entry.name.as_str().into());
            self.add_claim(&mut inner, &detector, claim, look, true);
        }
        Ok(())
    }

    /// After a scan: what waits beyond the window is counted as received, and, if it saw everything, what somebody took
    /// away as dropped.
    pub(super) fn reckon(&self, tally: &Tally, whole: bool) {
        let mut inner = self.inner();
        let names: HashSet<_> = inner.lines.keys().cloned().collect();
        for name in names {
            let added = tally.added.get(&name).copied().unwrap_or(0);
            let before = inner.beyond.get(&name).copied().unwrap_or(0);
            let beyond = tally.no_room.get(&name).copied().unwrap_or(0);
            // Half a scan knows of those that it saw only: some of what it added was beyond the window before.
            let mut beyond = if whole { beyond } else { beyond.max(before - added) };
            // What went out of the window while it looked is there until the next one says otherwise.
            let missing = before - added - beyond;
            beyond += missing.min(inner.doubtful.get(&name).copied().unwrap_or(0)).max(0);
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
    pub(in crate::source::directory) fn missed_by(&self, error: &io::Error) {
        if error.kind() != io::ErrorKind::NotFound {
            self.missed.store(true, Ordering::Relaxed);
        }
    }

    /// Whether there is more than the window holds.
    pub(in crate::source::directory) fn has_backlog(&self) -> bool {
        self.inner().beyond.values().any(|n| *n > 0)
    }

    /// Whether something was missed, or a line runs dry while more of its files wait beyond the window.
    pub(in crate::source::directory) fn wants_scan(&self) -> bool {
        if self.missed.swap(false, Ordering::Relaxed) {
            return true;
        }
        let inner = self.inner();
        inner.beyond.iter().any(|(detector, n)| *n > 0 && inner.window.runs_dry(detector))
    }
}

fn remove_if_long_empty(root: &Root, dir: &[u8], look: &Look) {
    let age = Timestamp::now().as_nanosecond() - i128::from(look.mtime);
    if age < i128::try_from(EMPTY_FOR.as_nanos()).unwrap_or(i128::MAX) {
        return;
    }
    let (parent, name) = split(dir);
    if let Ok(parent) = tree::open_below(root.fd.as_fd(), parent) {
        // Not empty any more, or not ours to remove: it stays.
        rustix::fs::unlinkat(&parent, std::ffi::OsStr::from_bytes(name), AtFlags::REMOVEDIR).ok();
    }
}

/// Looks at a sub-directory without opening it.
fn look_below(root: &Root, dir: &[u8]) -> io::Result<Look> {
    let (parent, name) = split(dir);
    tree::look(tree::open_below(root.fd.as_fd(), parent)?, name)
}

/// A sub-directory's parent, and its name there.
fn split(dir: &[u8]) -> (&[u8], &[u8]) {
    let at = dir.iter().rposition(|b| *b == b'/');
    at.map_or((&b""[..], dir), |at| (&dir[..at], &dir[at + 1..]))
}

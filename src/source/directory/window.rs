//! The window on a drop directory: which waiting files are known, which detector's line each stands in, and who is next.
//! Pure; no I/O.
//!
//! Two lanes for each detector (`lanes`). A backlog of any size is held as its best [`FRAMES_MAX`] files: the rest is
//! only counted, and found again by the next scan.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use tokio::time::Instant;

use super::claim::Claim;
use crate::source::Order;
use crate::source::lanes::{Lanes, Timed};

/// Files held in the window of one source.
pub(super) const FRAMES_MAX: usize = 131_072;

/// A file by the place where it was found.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// Below the drop directory, without slashes around; empty for the directory itself.
    pub dir: Arc<[u8]>,
    pub name: Arc<[u8]>,
}

/// A file in line.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub key: Key,
    pub size: u64,
    /// Nanoseconds since 1970.
    pub mtime: i64,
    /// When it was noticed first.
    pub noticed: Instant,
    pub received_at: Timestamp,
    /// Since when it is known to be unchanged.
    pub still_since: Instant,
    /// Renamed into place, or unchanged for `quiet`: what is wrong with it is not going to change.
    pub settled: bool,
    /// It is ours already.
    pub claim: Option<Claim>,
}

/// What adding a file did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Added {
    /// It stands in line.
    InLine,
    /// It stands in line, and another, which had been counted, went out of the window for it.
    InsteadOf {
        /// Whose line that stood in.
        detector: Arc<str>,
        /// The scan that saw it last; 0: none.
        scan: u64,
    },
    /// It was known.
    Known,
    /// The window is full of better ones.
    NoRoom,
}

/// The lines of one source.
#[derive(Debug)]
pub(super) struct Window {
    order: Order,
    lines: HashMap<Arc<str>, Lanes<Waiting>>,
    known: HashMap<Key, State>,
    max: usize,
    waiting: usize,
    sequence: u64,
}

#[derive(Clone, Copy, Debug)]
struct State {
    /// The scan that saw it last.
    scan: u64,
    /// In an encode worker's hands, or on the way there.
    taken: bool,
    /// It came again while it was taken.
    again: bool,
}

impl Timed for Waiting {
    fn noticed(&self) -> Instant {
        self.noticed
    }

    fn time(&self) -> i64 {
        self.mtime
    }
}

impl Window {
    pub(super) fn new(order: Order, max: usize) -> Self {
        Self { order, lines: HashMap::new(), known: HashMap::new(), max, waiting: 0, sequence: 0 }
    }

    /// How many stand in line.
    pub(super) fn len(&self) -> usize {
        self.waiting
    }

    /// Adds a file to `detector`'s line. `fresh`: it came while we watched. `scan`: the scan that found it (0: none).
    pub(super) fn add(&mut self, detector: &Arc<str>, waiting: Waiting, fresh: bool, scan: u64) -> Added {
        if let Some(state) = self.known.get_mut(&waiting.key) {
            state.scan = state.scan.max(scan);
            state.again |= state.taken && scan == 0;
            return Added::Known;
        }
        let mut added = Added::InLine;
        if self.waiting >= self.max {
            match self.make_room(detector, waiting.mtime, fresh) {
                Some((detector, state)) => {
                    added = Added::InsteadOf { detector, scan: state.scan };
                }
                None => return Added::NoRoom,
            }
        }
        self.known.insert(waiting.key.clone(), State { scan, taken: false, again: false });
        self.put(detector, waiting, fresh);
        added
    }

    /// Puts back what was taken; its place in `known` is still there.
    pub(super) fn put_back(&mut self, detector: &Arc<str>, waiting: Waiting) {
        let state = State { scan: 0, taken: false, again: false };
        self.known.entry(waiting.key.clone()).or_insert(state).taken = false;
        self.put(detector, waiting, false);
    }

    /// Who is next in `detector`'s line.
    pub(super) fn next(&mut self, detector: &str, now: Instant) -> Option<Waiting> {
        let waiting = self.lines.get_mut(detector)?.next(self.order, now, &mut self.sequence)?;
        self.waiting -= 1;
        if let Some(state) = self.known.get_mut(&waiting.key) {
            state.taken = true;
        }
        Some(waiting)
    }

    /// A taken one is not in line any more. `true`: it came again meanwhile and wants another look.
    pub(super) fn forget(&mut self, key: &Key) -> bool {
        self.known.remove(key).is_some_and(|state| state.again)
    }

    /// Whether it is in line or taken.
    pub(super) fn knows(&self, key: &Key) -> bool {
        self.known.contains_key(key)
    }

    /// Everything in line, out of it.
    pub(super) fn drain(&mut self) -> Vec<(Arc<str>, Waiting)> {
        let mut all = Vec::new();
        for (name, line) in &mut self.lines {
            all.extend(line.fresh.drain(..).map(|w| (name.clone(), w)));
            all.extend(std::mem::take(&mut line.backlog).into_values().map(|w| (name.clone(), w)));
        }
        self.waiting = 0;
        for (_, waiting) in &all {
            self.known.remove(&waiting.key);
        }
        all
    }

    fn put(&mut self, detector: &Arc<str>, waiting: Waiting, fresh: bool) {
        self.waiting += 1;
        self.lines.entry(detector.clone()).or_default().put(waiting, fresh, &mut self.sequence);
    }

    /// Takes the worst of the longest line out of the window, if it is worse than a file of `mtime`. Never a claim: no
    /// scan would find it again.
    fn make_room(&mut self, detector: &str, mtime: i64, fresh: bool) -> Option<(Arc<str>, State)> {
        let newest_first = self.order == Order::FreshestFirst;
        // A detector with little gets room at the cost of the one with most.
        let (longest, line) = self.lines.iter_mut().max_by_key(|(_, line)| line.len())?;
        let mut files = line.backlog.iter().filter(|(_, waiting)| waiting.claim.is_none()).map(|(key, _)| *key);
        let edge = if newest_first { files.next() } else { files.next_back() };
        let worst = match edge {
            Some(key) => key.0,
            None if newest_first => line.fresh.front()?.mtime,
            None => line.fresh.back()?.mtime,
        };
        let better = if newest_first { fresh || mtime > worst } else { mtime < worst };
        if **longest == *detector && !better {
            return None;
        }
        let gone = match edge {
            Some(key) => line.backlog.remove(&key)?,
            None if newest_first => line.fresh.pop_front()?,
            None => line.fresh.pop_back()?,
        };
        self.waiting -= 1;
        Some((longest.clone(), self.known.remove(&gone.key)?))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::time::Duration;

    use super::*;
    use crate::source::lanes::FRESH_FOR;

    fn file(n: i64, at: Instant) -> Waiting {
        Waiting {
            key: Key { dir: Arc::from(*b""), name: n.to_string().as_bytes().into() },
            size: 1,
            mtime: n,
            noticed: at,
            received_at: Timestamp::UNIX_EPOCH,
            still_since: at,
            settled: true,
            claim: None,
        }
    }

    fn order(window: &mut Window, now: Instant) -> Vec<i64> {
        std::iter::from_fn(|| window.next("cam", now)).map(|w| w.mtime).collect()
    }

    #[test]
    fn three_fresh_frames_go_for_one_of_the_backlog_each_newest_first() {
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = Window::new(Order::FreshestFirst, 100);
        for n in 1..=4 {
            window.add(&cam, file(n, now), false, 1);
        }
        for n in 11..=16 {
            window.add(&cam, file(n, now), true, 0);
        }
        assert_eq!(order(&mut window, now), [16, 15, 14, 4, 13, 12, 11, 3, 2, 1]);
    }

    #[test]
    fn oldest_first_turns_it_round() {
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = Window::new(Order::OldestFirst, 100);
        for n in [3, 1, 2] {
            window.add(&cam, file(n, now), false, 1);
        }
        for n in 11..=12 {
            window.add(&cam, file(n, now), true, 0);
        }
        assert_eq!(order(&mut window, now), [1, 2, 3, 11, 12]);
    }

    #[test]
    fn what_waited_long_joins_the_backlog_in_its_place() {
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = Window::new(Order::FreshestFirst, 100);
        window.add(&cam, file(5, now), true, 0);
        window.add(&cam, file(7, now), false, 1);
        let later = now + FRESH_FOR + Duration::from_secs(1);
        window.add(&cam, file(9, later), true, 0);
        assert_eq!(order(&mut window, later), [9, 7, 5]);
    }

    #[test]
    fn the_window_keeps_the_best_and_says_what_went() {
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = Window::new(Order::FreshestFirst, 3);
        for n in [1, 2, 3] {
            assert_eq!(window.add(&cam, file(n, now), false, 1), Added::InLine);
        }
        assert_eq!(window.add(&cam, file(3, now), false, 1), Added::Known);
        assert_eq!(window.add(&cam, file(0, now), false, 1), Added::NoRoom);
        let instead = |scan| Added::InsteadOf { detector: cam.clone(), scan };
        assert_eq!(window.add(&cam, file(4, now), false, 2), instead(1));
        assert_eq!(window.add(&cam, file(5, now), true, 0), instead(1));
        assert_eq!(window.add(&Arc::from("other"), file(-9, now), true, 0), instead(1), "others get room");
        assert_eq!(window.len(), 3);
        assert_eq!(order(&mut window, now), [5, 4]);
    }

    #[test]
    fn a_claim_always_has_room_and_never_goes_out_for_a_better_file() {
        let home = tempfile::tempdir().unwrap();
        let root = Arc::new(super::super::claim::Root::open(home.path()).unwrap());
        std::fs::write(home.path().join("a.jpg"), b"image").unwrap();
        let claim = root.claim(root.fd.as_fd(), &Arc::from(*b""), &Arc::from(*b"a.jpg")).unwrap();
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = Window::new(Order::FreshestFirst, 2);
        for n in [10, 11] {
            window.add(&cam, file(n, now), false, 1);
        }
        window.put_back(&cam, Waiting { claim, ..file(1, now) });
        for n in [12, 13, 14] {
            window.add(&cam, file(n, now), false, 1);
        }
        assert_eq!(order(&mut window, now), [14, 13, 1]);
    }

    #[test]
    fn a_file_that_comes_again_while_it_is_taken_wants_another_look() {
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = Window::new(Order::FreshestFirst, 3);
        window.add(&cam, file(1, now), true, 0);
        let taken = window.next("cam", now).unwrap();
        assert_eq!(window.add(&cam, file(1, now), true, 0), Added::Known);
        assert!(window.forget(&taken.key));
        assert!(!window.knows(&taken.key));
    }
}

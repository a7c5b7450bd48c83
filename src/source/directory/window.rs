//! The window on a drop directory: which waiting files are known, which detector's line each stands in, and who is next.
//! Pure; no I/O.
//!
//! Two lanes for each detector (`lanes`). A backlog of any size is held as its best files and a `reserve` of the next best, within
//! [`Limits`] that all drop directories share: the rest is only counted, and found again by the next scan.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use tokio::time::Instant;

use super::claim::Claim;
use super::reserve::Reserve;
use crate::source::Order;
use crate::source::lanes::{Lanes, Timed};

/// Files in the window of one drop directory: few enough for a processor's cache, and as many as are published in a second.
const WINDOW_MAX: usize = 16_384;
/// Files in the windows of all drop directories.
const WINDOWS_MAX: usize = 65_536;
/// However many directories share them, each has as many as are published until a scan brings more.
const WINDOW_LEAST: usize = 256;
/// Files in the reserves of all drop directories.
const RESERVES_MAX: usize = 524_288;
/// However many directories share them.
const RESERVE_LEAST: usize = 1_024;
/// Files that come from the reserve when one is wanted: one in its place, and one more where there is room.
const TOP_UP: usize = 2;

/// How many waiting files one drop directory may know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// In the window, one by one with all that is known of them: some 300 bytes each.
    pub window: usize,
    /// In the reserve: some 60 bytes each.
    pub reserve: usize,
}

impl Limits {
    /// Of each of so many drop directories, so many of which have more than their windows hold.
    pub(super) fn shared_by(directories: usize, backlogs: usize) -> Self {
        let share = |all: usize, sharers: usize| all / sharers.max(1);
        Self {
            window: share(WINDOWS_MAX, directories).clamp(WINDOW_LEAST, WINDOW_MAX),
            reserve: share(RESERVES_MAX, backlogs).max(RESERVE_LEAST),
        }
    }
}

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
    /// The next best of what the last scan saw.
    reserve: Reserve,
    /// The same, of the scan that goes on.
    gathered: Reserve,
    limits: Limits,
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
    pub(super) fn new(order: Order, limits: Limits) -> Self {
        let none = || Reserve::new(order, limits.reserve, 0);
        let (reserve, gathered) = (none(), none());
        Self { order, lines: HashMap::new(), known: HashMap::new(), reserve, gathered, limits, waiting: 0, sequence: 0 }
    }

    /// From the next scan on the reserve keeps to these; what stands in line stays.
    pub(super) fn limit(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// A scan begins, which meets what is in the reserve once more: until it ends there is none. Gives the old one, which is
    /// better dropped while nobody waits.
    pub(super) fn begin_scan(&mut self, scan: u64) -> Reserve {
        self.gathered = Reserve::new(self.order, self.limits.reserve, scan);
        std::mem::replace(&mut self.reserve, Reserve::new(self.order, 0, scan))
    }

    /// What the scan found no room for, to be sorted while others use the window.
    pub(super) fn gathered(&mut self) -> Reserve {
        std::mem::replace(&mut self.gathered, Reserve::new(self.order, self.limits.reserve, 0))
    }

    /// A scan is over. From now on it is topped up from this.
    pub(super) fn end_scan(&mut self, reserve: Reserve) {
        self.reserve = reserve;
    }

    /// Whether so little of `detector` is left in here that a scan is worth it, if there is more beyond.
    pub(super) fn runs_dry(&self, detector: &str) -> bool {
        let left = self.lines.get(detector).map_or(0, Lanes::len);
        (left == 0 || left < self.limits.window / 2 / self.lines.len()) && self.reserve.len_of(detector) == 0
    }

    /// Puts the next best of `detector` in line, where there is room or nothing else. How many came from the reserve, and how
    /// many of them are known: in line by another way since.
    pub(super) fn top_up(&mut self, detector: &Arc<str>) -> (usize, usize) {
        let (mut came, mut known) = (0, 0);
        while came - known < TOP_UP
            && (self.waiting < self.limits.window || self.lines.get(detector).is_none_or(|line| line.len() == 0))
            && let Some(waiting) = self.reserve.next(detector)
        {
            came += 1;
            if self.knows(&waiting.key) {
                known += 1;
                continue;
            }
            self.known.insert(waiting.key.clone(), State { scan: self.reserve.scan(), taken: false, again: false });
            self.put(detector, waiting, false);
        }
        (came, known)
    }

    /// How many stand in line.
    #[cfg(test)]
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
        if self.waiting >= self.limits.window {
            let Some((other, state, gone)) = self.make_room(detector, waiting.mtime, fresh) else {
                if scan > 0 {
                    self.gathered.gather(detector, &waiting);
                }
                return Added::NoRoom;
            };
            if scan == 0 {
                self.reserve.add_first(&other, &gone);
            } else if state.scan == scan {
                self.gathered.gather(&other, &gone);
            }
            added = Added::InsteadOf { detector: other, scan: state.scan };
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

    /// Everything in line, out of it. The reserve is empty then too.
    pub(super) fn drain(&mut self) -> Vec<(Arc<str>, Waiting)> {
        drop(self.begin_scan(0));
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
    fn make_room(&mut self, detector: &str, mtime: i64, fresh: bool) -> Option<(Arc<str>, State, Waiting)> {
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
        Some((longest.clone(), self.known.remove(&gone.key)?, gone))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::fd::AsFd as _;
    use std::time::Duration;

    use super::*;
    use crate::source::lanes::FRESH_FOR;

    /// One of that time and name.
    pub(in crate::source::directory) fn file(n: i64, at: Instant) -> Waiting {
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

    fn a_window(order: Order, max: usize) -> Window {
        Window::new(order, Limits { window: max, reserve: 100 })
    }

    /// A window of `max` after a scan that met 1 to 4.
    fn scanned(cam: &Arc<str>, max: usize, now: Instant) -> Window {
        let mut window = a_window(Order::FreshestFirst, max);
        drop(window.begin_scan(1));
        for n in 1..=4 {
            window.add(cam, file(n, now), false, 1);
        }
        let mut reserve = window.gathered();
        reserve.sort();
        window.end_scan(reserve);
        window
    }

    fn order(window: &mut Window, now: Instant) -> Vec<i64> {
        std::iter::from_fn(|| window.next("cam", now)).map(|w| w.mtime).collect()
    }

    #[test]
    fn three_fresh_frames_go_for_one_of_the_backlog_each_newest_first() {
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = a_window(Order::FreshestFirst, 100);
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
        let mut window = a_window(Order::OldestFirst, 100);
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
        let mut window = a_window(Order::FreshestFirst, 100);
        window.add(&cam, file(5, now), true, 0);
        window.add(&cam, file(7, now), false, 1);
        let later = now + FRESH_FOR + Duration::from_secs(1);
        window.add(&cam, file(9, later), true, 0);
        assert_eq!(order(&mut window, later), [9, 7, 5]);
    }

    #[test]
    fn the_window_keeps_the_best_and_says_what_went() {
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = a_window(Order::FreshestFirst, 3);
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
    fn what_a_scan_saw_beyond_the_window_comes_out_in_order_and_once_without_another_scan() {
        for (order, best_first) in [(Order::FreshestFirst, true), (Order::OldestFirst, false)] {
            let (cam, now) = (Arc::from("cam"), Instant::now());
            let mut window = a_window(order, 3);
            drop(window.begin_scan(1));
            // No file is met in the order in which it is published.
            for n in (0..10).map(|n| n * 7 % 10) {
                window.add(&cam, file(n, now), false, 1);
            }
            let mut reserve = window.gathered();
            reserve.sort();
            window.end_scan(reserve);
            let mut came = 0;
            let published: Vec<i64> = std::iter::from_fn(|| {
                came += window.top_up(&cam).0;
                window.next("cam", now)
            })
            .map(|it| it.mtime)
            .collect();
            let expected: Vec<i64> = if best_first { (0..10).rev().collect() } else { (0..10).collect() };
            assert_eq!((published, came), (expected, 7));
            assert!(window.runs_dry("cam"));
        }
    }

    #[test]
    fn the_next_best_are_those_that_fresh_ones_put_out_of_the_window() {
        let cam = Arc::from("cam");
        let mut window = a_window(Order::FreshestFirst, 3);
        drop(window.begin_scan(1));
        let now = Instant::now();
        for n in 1..=5 {
            window.add(&cam, file(n, now), false, 1);
        }
        let mut reserve = window.gathered();
        reserve.sort();
        window.end_scan(reserve);
        window.add(&cam, file(11, now), true, 0);
        let mut order = Vec::new();
        while let Some(next) = window.next("cam", now) {
            order.push(next.mtime);
            window.top_up(&cam);
        }
        assert_eq!(order, [11, 5, 4, 3, 2, 1]);
    }

    #[test]
    fn one_in_line_by_another_way_does_not_come_again_from_the_reserve() {
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = scanned(&cam, 2, now);
        assert_eq!(window.next("cam", now).map(|it| it.mtime), Some(4));
        window.add(&cam, file(2, now), true, 0);
        assert_eq!(window.next("cam", now).map(|it| it.mtime), Some(2));
        window.forget(&file(4, now).key);
        assert_eq!(window.top_up(&cam), (2, 1), "2 is taken, 1 comes");
    }

    #[test]
    fn directories_share_what_may_be_known_of_files_and_each_has_enough() {
        for (directories, backlogs, window, reserve) in [
            (0, 0, 16_384, 524_288),
            (1, 1, 16_384, 524_288),
            (8, 1, 8_192, 524_288),
            (64, 64, 1_024, 8_192),
            (1_000, 1_000, 256, 1_024),
        ] {
            let limits = Limits::shared_by(directories, backlogs);
            assert_eq!((limits.window, limits.reserve), (window, reserve), "{directories} {backlogs}");
        }
    }

    #[test]
    fn however_many_lines_share_a_window_each_runs_dry() {
        let now = Instant::now();
        let mut window = a_window(Order::FreshestFirst, 4);
        let cams: Vec<Arc<str>> = (0..5).map(|n| n.to_string().into()).collect();
        for (n, cam) in (0..).zip(&cams) {
            window.add(cam, file(n, now), false, 1);
        }
        for cam in &cams {
            while window.next(cam, now).is_some() {}
            assert!(window.runs_dry(cam));
        }
    }

    #[test]
    fn a_line_does_not_stand_still_behind_files_that_came_by_another_way() {
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = scanned(&cam, 1, now);
        for n in [4, 3, 2] {
            assert_eq!(window.next("cam", now).map(|it| it.mtime), Some(n));
            window.add(&cam, file(n - 1, now), true, 0);
        }
        assert_eq!(window.next("cam", now).map(|it| it.mtime), Some(1));
        assert_eq!(window.top_up(&cam), (3, 3), "all of them are taken");
    }

    #[test]
    fn a_claim_always_has_room_and_never_goes_out_for_a_better_file() {
        let home = tempfile::tempdir().unwrap();
        let root = Arc::new(super::super::claim::Root::open(home.path()).unwrap());
        std::fs::write(home.path().join("a.jpg"), b"image").unwrap();
        let claim = root.claim(root.fd.as_fd(), &Arc::from(*b""), &Arc::from(*b"a.jpg")).unwrap();
        let (cam, now) = (Arc::from("cam"), Instant::now());
        let mut window = a_window(Order::FreshestFirst, 2);
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
        let mut window = a_window(Order::FreshestFirst, 3);
        window.add(&cam, file(1, now), true, 0);
        let taken = window.next("cam", now).unwrap();
        assert_eq!(window.add(&cam, file(1, now), true, 0), Added::Known);
        assert!(window.forget(&taken.key));
        assert!(!window.knows(&taken.key));
    }
}

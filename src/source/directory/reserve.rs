//! The reserve: what is next after the window, in one place each: what a scan found no room for there. As little is kept of a file
//! as it takes to put it in line later, so that a large backlog need not be scanned again and again. Pure; no I/O.
//!
//! It holds the best: what is beyond that is only counted (`window`).

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use jiff::Timestamp;
use tokio::time::Instant;

use super::window::{Key, Waiting};
use crate::source::Order;

/// See the file's head.
#[derive(Debug)]
pub(super) struct Reserve {
    order: Order,
    max: usize,
    scan: u64,
    noticed: Instant,
    received_at: Timestamp,
    lines: HashMap<Arc<str>, VecDeque<File>>,
    /// One directory's files mostly come one after the other.
    dirs: Vec<Arc<[u8]>>,
    len: usize,
}

#[derive(Debug)]
struct File {
    mtime: i64,
    /// Index in `dirs`.
    dir: u32,
    size: u32,
    name: Box<[u8]>,
}

impl Reserve {
    /// For what `scan` finds from now on.
    pub(super) fn new(order: Order, max: usize, scan: u64) -> Self {
        let (noticed, received_at) = (Instant::now(), Timestamp::now());
        Self { order, max, scan, noticed, received_at, lines: HashMap::new(), dirs: Vec::new(), len: 0 }
    }

    /// The scan that saw what is in here.
    pub(super) fn scan(&self) -> u64 {
        self.scan
    }

    /// How many there are of this detector.
    pub(super) fn len_of(&self, detector: &str) -> usize {
        self.lines.get(detector).map_or(0, VecDeque::len)
    }

    /// Adds a file that a scan met. They are in no order until [`sort`](Self::sort); when there are too many, the worst of the
    /// longest lines go.
    pub(super) fn gather(&mut self, detector: &Arc<str>, waiting: &Waiting) {
        if let Some(file) = self.file(waiting) {
            if self.len >= self.max {
                self.trim();
            }
            self.len += 1;
            self.lines.entry(detector.clone()).or_default().push_back(file);
        }
    }

    /// Adds, to one that is in order, a file that went out of the window: better than all in here. The worst goes for it. One that
    /// was noticed since is left to the next scan.
    pub(super) fn add_first(&mut self, detector: &Arc<str>, waiting: &Waiting) {
        if waiting.noticed <= self.noticed
            && let Some(file) = self.file(waiting)
        {
            let line = self.lines.entry(detector.clone()).or_default();
            if self.len >= self.max && line.pop_front().is_some() {
                self.len -= 1;
            }
            if self.len < self.max {
                line.push_back(file);
                self.len += 1;
            }
        }
    }

    /// Puts what was gathered in order, as noticed now: one time for all of it.
    pub(super) fn sort(&mut self) {
        (self.noticed, self.received_at) = (Instant::now(), Timestamp::now());
        let order = self.order;
        for line in self.lines.values_mut() {
            line.make_contiguous().sort_unstable_by(|a, b| worst_first(order, a, b));
        }
    }

    /// Takes out the best of a detector's.
    pub(super) fn next(&mut self, detector: &str) -> Option<Waiting> {
        if self.len == 0 {
            return None;
        }
        let File { mtime, dir, size, name } = self.lines.get_mut(detector)?.pop_back()?;
        self.len -= 1;
        Some(Waiting {
            key: Key { dir: self.dirs[dir as usize].clone(), name: name.into() },
            size: size.into(),
            mtime,
            noticed: self.noticed,
            received_at: self.received_at,
            still_since: self.noticed,
            settled: true,
            claim: None,
        })
    }

    /// What is kept of it; `None`: it cannot be put in line by that alone, and the next scan finds it.
    fn file(&mut self, waiting: &Waiting) -> Option<File> {
        if waiting.claim.is_some() || !waiting.settled {
            return None;
        }
        let (size, Key { dir, name }) = (u32::try_from(waiting.size).ok()?, &waiting.key);
        if self.dirs.last() != Some(dir) {
            self.dirs.push(dir.clone());
        }
        let dir = u32::try_from(self.dirs.len() - 1).ok()?;
        Some(File { mtime: waiting.mtime, dir, size, name: (&**name).into() })
    }

    /// Makes room for a quarter more, so that what it costs is shared by many.
    fn trim(&mut self) {
        let most = fair_share(self.lines.values().map(VecDeque::len).collect(), self.max - self.max.div_ceil(4));
        let order = self.order;
        for line in self.lines.values_mut() {
            let gone = line.len().saturating_sub(most);
            if (1..line.len()).contains(&gone) {
                line.make_contiguous().select_nth_unstable_by(gone, |a, b| worst_first(order, a, b));
            }
            line.drain(..gone);
        }
        self.len = self.lines.values().map(VecDeque::len).sum();
    }
}

fn worst_first(order: Order, a: &File, b: &File) -> Ordering {
    match order {
        Order::FreshestFirst => a.mtime.cmp(&b.mtime),
        Order::OldestFirst => b.mtime.cmp(&a.mtime),
    }
}

/// The length that none may exceed so that all of them have room: who has less leaves it to the others.
fn fair_share(mut lengths: Vec<usize>, mut room: usize) -> usize {
    lengths.sort_unstable();
    let mut sharers = lengths.len();
    for length in lengths {
        if length > room / sharers {
            return room / sharers;
        }
        room -= length;
        sharers -= 1;
    }
    usize::MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(n: i64, at: Instant) -> Waiting {
        Waiting {
            key: Key { dir: Arc::from(*b"door"), name: n.to_string().as_bytes().into() },
            size: 7,
            mtime: n,
            noticed: at,
            received_at: Timestamp::UNIX_EPOCH,
            still_since: at,
            settled: true,
            claim: None,
        }
    }

    fn gathered(order: Order, max: usize, files: &[(&str, i64)]) -> Reserve {
        let mut reserve = Reserve::new(order, max, 1);
        for (detector, n) in files {
            reserve.gather(&Arc::from(*detector), &file(*n, Instant::now()));
        }
        reserve.sort();
        reserve
    }

    fn drained(reserve: &mut Reserve, detector: &str) -> Vec<i64> {
        std::iter::from_fn(|| reserve.next(detector)).map(|it| it.mtime).collect()
    }

    #[test]
    fn files_come_out_best_first_with_all_it_takes_to_put_them_in_line() {
        for (order, expected) in [(Order::FreshestFirst, [5, 4, 3, 2, 1]), (Order::OldestFirst, [1, 2, 3, 4, 5])] {
            let mut reserve = gathered(order, 10, &[("a", 3), ("a", 5), ("a", 1), ("b", 9), ("a", 4), ("a", 2)]);
            assert_eq!(drained(&mut reserve, "a"), expected);
            let last = reserve.next("b").expect("one");
            assert_eq!((&*last.key.dir, &*last.key.name, last.size), (&b"door"[..], &b"9"[..], 7));
            assert_eq!((reserve.len, reserve.len_of("a")), (0, 0));
        }
    }

    #[test]
    fn beyond_its_bound_it_keeps_the_best_of_each_and_who_has_little_keeps_all() {
        let many: Vec<(&str, i64)> = (0..1000).map(|n| ("many", n * 7 % 1000)).collect();
        let mut reserve = gathered(Order::FreshestFirst, 100, &[&[("few", 1), ("few", 2)], &many[..]].concat());
        assert!(reserve.len <= 100);
        assert_eq!(drained(&mut reserve, "few"), [2, 1]);
        let many = drained(&mut reserve, "many");
        assert!(many.len() >= 70, "{}", many.len());
        assert!(many.iter().copied().eq((0..1000).rev().take(many.len())), "{many:?}");
    }

    #[test]
    fn what_goes_out_of_the_window_is_next_and_the_worst_makes_room_for_it() {
        let mut reserve = gathered(Order::FreshestFirst, 3, &[("a", 1), ("a", 2)]);
        let cam = Arc::from("a");
        for n in [3, 4] {
            reserve.add_first(&cam, &file(n, reserve.noticed));
        }
        assert_eq!(drained(&mut reserve, "a"), [4, 3, 2]);
    }

    #[test]
    fn what_may_still_change_or_came_later_is_left_to_the_next_scan() {
        let mut reserve = Reserve::new(Order::FreshestFirst, 10, 1);
        let (cam, now) = (Arc::from("a"), reserve.noticed);
        reserve.gather(&cam, &Waiting { settled: false, ..file(1, now) });
        reserve.gather(&cam, &Waiting { size: u64::from(u32::MAX) + 1, ..file(2, now) });
        reserve.add_first(&cam, &file(3, now + std::time::Duration::from_secs(1)));
        assert_eq!(reserve.len, 0);
    }

    #[test]
    fn shares_are_fair() {
        for (lengths, room, share) in [
            (vec![], 5, usize::MAX),
            (vec![2, 3], 5, usize::MAX),
            (vec![9, 1], 5, 4),
            (vec![9, 9, 1], 5, 2),
            (vec![9, 9, 9], 2, 0),
        ] {
            assert_eq!(fair_share(lengths.clone(), room), share, "{lengths:?}");
        }
    }
}

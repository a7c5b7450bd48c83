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
    lines: HashMap<Arc<str>, Line>,
    dirs: Vec<Arc<[u8]>>,
    /// Where each of them is in there.
    places: HashMap<Arc<[u8]>, u32>,
    len: usize,
}

#[derive(Debug, Default)]
struct Line {
    /// The best last, once they are in order.
    files: VecDeque<File>,
    /// What is worse than this was let go.
    edge: Option<i64>,
}

#[derive(Debug)]
struct File {
    mtime: i64,
    /// Index in `dirs`.
    dir: u32,
    size: u32,
    settled: bool,
    name: Box<[u8]>,
}

impl Reserve {
    /// For what `scan` finds from now on.
    pub(super) fn new(order: Order, max: usize, scan: u64) -> Self {
        let (noticed, received_at) = (Instant::now(), Timestamp::now());
        Self {
            order,
            max,
            scan,
            noticed,
            received_at,
            lines: HashMap::new(),
            dirs: Vec::new(),
            places: HashMap::new(),
            len: 0,
        }
    }

    /// The scan that saw what is in here.
    pub(super) fn scan(&self) -> u64 {
        self.scan
    }

    /// How many there are of this detector.
    pub(super) fn len_of(&self, detector: &str) -> usize {
        self.lines.get(detector).map_or(0, |line| line.files.len())
    }

    /// Adds a file that a scan met. They are in no order until [`sort`](Self::sort); when there are too many, the worst of the
    /// longest lines go.
    pub(super) fn gather(&mut self, detector: &Arc<str>, waiting: &Waiting) {
        if self.len >= self.max {
            self.trim();
        }
        let order = self.order;
        let edge = self.lines.get(detector).and_then(|line| line.edge);
        if edge.is_some_and(|edge| worst_first(order, waiting.mtime, edge).is_lt()) {
            return;
        }
        if let Some(file) = self.file(waiting) {
            self.len += 1;
            self.lines.entry(detector.clone()).or_default().files.push_back(file);
        }
    }

    /// Adds, to one that is in order, a file that went out of the window: as a rule better than all in here. The worst goes for
    /// it. One that is not, or was noticed since, is left to the next scan.
    pub(super) fn add_first(&mut self, detector: &Arc<str>, waiting: &Waiting) {
        let order = self.order;
        let next = self.lines.get(detector).and_then(|line| line.files.back());
        if next.is_some_and(|next| worst_first(order, waiting.mtime, next.mtime).is_lt())
            || waiting.noticed > self.noticed
        {
            return;
        }
        if let Some(file) = self.file(waiting) {
            let files = &mut self.lines.entry(detector.clone()).or_default().files;
            if self.len >= self.max && files.pop_front().is_some() {
                self.len -= 1;
            }
            if self.len < self.max {
                files.push_back(file);
                self.len += 1;
            }
        }
    }

    /// Puts what was gathered in order, as noticed now: one time for all of it.
    pub(super) fn sort(&mut self) {
        (self.noticed, self.received_at) = (Instant::now(), Timestamp::now());
        let order = self.order;
        for line in self.lines.values_mut() {
            line.files.make_contiguous().sort_unstable_by(|a, b| worst_first(order, a.mtime, b.mtime));
        }
    }

    /// Takes out the best of a detector's.
    pub(super) fn next(&mut self, detector: &str) -> Option<Waiting> {
        if self.len == 0 {
            return None;
        }
        let File { mtime, dir, size, settled, name } = self.lines.get_mut(detector)?.files.pop_back()?;
        self.len -= 1;
        Some(Waiting {
            key: Key { dir: self.dirs[dir as usize].clone(), name: name.into() },
            size: size.into(),
            mtime,
            noticed: self.noticed,
            received_at: self.received_at,
            still_since: self.noticed,
            settled,
            claim: None,
        })
    }

    /// What is kept of it; `None`: it cannot be put in line by that alone, and the next scan finds it.
    fn file(&mut self, waiting: &Waiting) -> Option<File> {
        if waiting.claim.is_some() {
            return None;
        }
        let (size, Key { dir, name }) = (u32::try_from(waiting.size).ok()?, &waiting.key);
        let known = self.places.get(dir).copied();
        let place = known.or_else(|| u32::try_from(self.dirs.len()).ok())?;
        if known.is_none() {
            self.dirs.push(dir.clone());
            self.places.insert(dir.clone(), place);
        }
        Some(File { mtime: waiting.mtime, dir: place, size, settled: waiting.settled, name: (&**name).into() })
    }

    /// Makes room for a quarter more, so that what it costs is shared by many.
    fn trim(&mut self) {
        let lengths = self.lines.values().map(|line| line.files.len()).collect();
        let most = fair_share(lengths, self.max - self.max.div_ceil(4));
        let order = self.order;
        for Line { files, edge } in self.lines.values_mut() {
            let gone = files.len().saturating_sub(most);
            if (1..files.len()).contains(&gone) {
                let by_time = |a: &File, b: &File| worst_first(order, a.mtime, b.mtime);
                let (_, worst_kept, _) = files.make_contiguous().select_nth_unstable_by(gone, by_time);
                *edge = Some(worst_kept.mtime);
            }
            files.drain(..gone);
        }
        self.len = self.lines.values().map(|line| line.files.len()).sum();
    }
}

fn worst_first(order: Order, a: i64, b: i64) -> Ordering {
    match order {
        Order::FreshestFirst => a.cmp(&b),
        Order::OldestFirst => b.cmp(&a),
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
    use super::super::window::tests::file;
    use super::*;

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
            assert_eq!((&*last.key.dir, &*last.key.name, last.size), (&b""[..], &b"9"[..], 1));
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
    fn worse_ones_that_come_late_do_not_fill_the_room_of_better_ones_that_had_to_go() {
        let best_first: Vec<(&str, i64)> = (0..110).rev().map(|n| ("a", n)).collect();
        let mut reserve = gathered(Order::FreshestFirst, 100, &best_first);
        assert!(drained(&mut reserve, "a").into_iter().eq((35..110).rev()));
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
    fn what_is_no_better_or_came_later_is_left_to_the_next_scan() {
        let mut reserve = Reserve::new(Order::FreshestFirst, 10, 1);
        let (cam, now) = (Arc::from("a"), reserve.noticed);
        reserve.gather(&cam, &Waiting { size: u64::from(u32::MAX) + 1, ..file(2, now) });
        reserve.add_first(&cam, &file(3, now + std::time::Duration::from_secs(1)));
        assert_eq!(reserve.len, 0);
        reserve.gather(&cam, &file(5, now));
        reserve.add_first(&cam, &file(4, now));
        assert_eq!(drained(&mut reserve, "a"), [5]);
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

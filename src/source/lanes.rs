//! A detector's frames in line, in two lanes: what came while we watched (youngest first) and the backlog (newest first);
//! three of the first go for one of the second. Pure; no I/O.
//!
//! Not here: which frames are held at all, and when they are offered (each source has its own way).

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::Order;

/// After this long in the fresh lane, a frame belongs to the backlog.
pub(super) const FRESH_FOR: Duration = Duration::from_secs(30);
/// Turns of the fresh lane for one of the backlog.
const FRESH_TURNS: u8 = 3;

/// What stands in line.
pub(super) trait Timed {
    /// When it was noticed first.
    fn noticed(&self) -> Instant;
    /// What the backlog goes by, nanoseconds since 1970.
    fn time(&self) -> i64;
}

/// See the file's head.
#[derive(Debug)]
pub(super) struct Lanes<T> {
    /// The youngest last.
    pub fresh: VecDeque<T>,
    /// By time, and by a number that keeps those of one time apart.
    pub backlog: BTreeMap<(i64, u64), T>,
    turns: u8,
}

impl<T> Default for Lanes<T> {
    fn default() -> Self {
        Self { fresh: VecDeque::new(), backlog: BTreeMap::new(), turns: 0 }
    }
}

impl<T: Timed> Lanes<T> {
    pub(super) fn len(&self) -> usize {
        self.fresh.len() + self.backlog.len()
    }

    /// Puts one in line. `sequence` counts everything that was ever put in, over all lines.
    pub(super) fn put(&mut self, waiting: T, fresh: bool, sequence: &mut u64) {
        *sequence += 1;
        if fresh {
            self.fresh.push_back(waiting);
        } else {
            self.backlog.insert((waiting.time(), *sequence), waiting);
        }
    }

    /// Takes the next one out of line.
    pub(super) fn next(&mut self, order: Order, now: Instant, sequence: &mut u64) -> Option<T> {
        self.age(now, sequence);
        match order {
            Order::FreshestFirst => {
                if !self.fresh.is_empty() && (self.backlog.is_empty() || self.turns < FRESH_TURNS) {
                    self.turns = self.turns.saturating_add(1).min(FRESH_TURNS);
                    return self.fresh.pop_back();
                }
                self.turns = 0;
                self.backlog.pop_last().map(|(_, waiting)| waiting)
            }
            // The backlog is older than what came since; within the fresh lane the first to come is the oldest.
            Order::OldestFirst => {
                self.backlog.pop_first().map(|(_, waiting)| waiting).or_else(|| self.fresh.pop_front())
            }
        }
    }

    /// What has waited too long to be fresh goes to the backlog.
    fn age(&mut self, now: Instant, sequence: &mut u64) {
        while self.fresh.front().is_some_and(|it| now.saturating_duration_since(it.noticed()) > FRESH_FOR) {
            let Some(waiting) = self.fresh.pop_front() else { return };
            self.put(waiting, false, sequence);
        }
    }
}

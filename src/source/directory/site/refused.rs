//! Entries that are never taken, remembered so that each is counted and said once. Pure; no I/O.

use std::collections::HashMap;

use super::super::tree::Look;
use super::super::window::Key;

/// Refused entries that are remembered. Further ones are left alone without a word.
const REFUSED_MAX: usize = 10_000;

/// See the file's head.
#[derive(Default)]
pub(super) struct Refused {
    entries: HashMap<Key, Entry>,
    /// There were more than fit, and that was said.
    overfull: bool,
}

struct Entry {
    ino: u64,
    ctime: i64,
    /// The scan that met it last, or the last one before it was met.
    scan: u64,
}

/// What is to be done about an entry that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Say {
    /// It is new: count it and say it.
    New,
    /// It was changed: count it. Whoever changes it again and again must not fill the log.
    Changed,
    /// Done already.
    Nothing,
    /// It is the first that does not fit: say so, once for all further ones.
    More,
}

impl Refused {
    /// Whether it is known as it is. `scan`: the one that goes on, or the last one.
    pub(super) fn knows(&mut self, key: &Key, look: &Look, scan: u64) -> bool {
        self.entries.get_mut(key).is_some_and(|entry| {
            entry.scan = scan;
            (entry.ino, entry.ctime) == (look.ino, look.ctime)
        })
    }

    /// Remembers one.
    pub(super) fn add(&mut self, key: &Key, look: &Look, scan: u64) -> Say {
        if self.knows(key, look, scan) {
            return Say::Nothing;
        }
        let room = self.entries.len() < REFUSED_MAX;
        let new = Entry { ino: look.ino, ctime: look.ctime, scan };
        if let Some(entry) = self.entries.get_mut(key) {
            *entry = new;
            return Say::Changed;
        }
        if room {
            self.entries.insert(key.clone(), new);
            return Say::New;
        }
        if std::mem::replace(&mut self.overfull, true) { Say::Nothing } else { Say::More }
    }

    /// Forgets what `scan`, which saw everything, did not meet.
    pub(super) fn keep_met(&mut self, scan: u64) {
        self.entries.retain(|_, entry| entry.scan >= scan);
        self.overfull &= self.entries.len() >= REFUSED_MAX;
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::super::NOTHING;
    use super::*;

    fn key(n: usize) -> Key {
        Key { dir: (*b"").into(), name: n.to_string().as_bytes().into() }
    }

    #[test]
    fn each_is_said_once_and_counted_when_it_changes() {
        let mut refused = Refused::default();
        let changed = Look { ctime: 1, ..NOTHING };
        let said = [&NOTHING, &NOTHING, &changed, &changed].map(|look| refused.add(&key(1), look, 1));
        assert_eq!(said, [Say::New, Say::Nothing, Say::Changed, Say::Nothing]);
    }

    #[test]
    fn beyond_the_bound_it_is_said_once_that_there_are_more_and_scan_after_scan_nothing_is_said_again() {
        let mut refused = Refused::default();
        for scan in 1..=3 {
            let said: Vec<Say> = (0..REFUSED_MAX + 10).map(|n| refused.add(&key(n), &NOTHING, scan)).collect();
            let count = |what: Say| said.iter().filter(|it| **it == what).count();
            let expected = if scan == 1 { (REFUSED_MAX, 1) } else { (0, 0) };
            assert_eq!((count(Say::New), count(Say::More)), expected, "scan {scan}");
            refused.keep_met(scan);
        }
    }

    #[test]
    fn what_a_scan_did_not_meet_makes_room() {
        let mut refused = Refused::default();
        for n in 0..=REFUSED_MAX {
            refused.add(&key(n), &NOTHING, 1);
        }
        // Met by scan 2: one of them, and one that an event told of meanwhile.
        refused.add(&key(7), &NOTHING, 2);
        refused.keep_met(2);
        assert_eq!(refused.add(&key(7), &NOTHING, 2), Say::Nothing);
        assert_eq!(refused.add(&key(8), &NOTHING, 2), Say::New);
    }
}

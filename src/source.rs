//! Sources: where a detector's frames come from, and what is settled there. One `[[detectors]]` entry is one source.
//!
//! Not here: what happens to a frame between its claim and its settlement.

pub mod directory;
pub mod retry;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Open files that an entry keeps: its directory, the hidden one, its lock, its claims, inotify; and one more while it scans.
pub const OPEN_FILES_PER_ENTRY: u64 = 6;

/// One `[[detectors]]` entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Entry {
    /// The engine's `detectorName`. May hold `{path.0}`, `{path.1}`, …: the first, second, … directory below `path`.
    pub name: String,
    /// IANA time zone of the detector.
    pub time_zone: String,
    /// Attempts per second; 0 means no limit.
    pub rate: f64,
    /// Turns against the other detectors; at least 1.
    pub weight: u32,
    /// Which waiting frame goes first.
    pub order: Order,
    /// Frames older than this are dropped, and counted; 0 means never.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_age: Duration,
    /// Say so when no frame came for this long.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub silence_alarm: Option<Duration>,
    /// The drop directory.
    pub directory: directory::Config,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            name: String::new(),
            time_zone: String::new(),
            rate: 0.0,
            weight: 1,
            order: Order::FreshestFirst,
            max_age: Duration::ZERO,
            silence_alarm: None,
            directory: directory::Config::default(),
        }
    }
}

impl Entry {
    /// Of these, the one that a detector of this name belongs to: by its whole name, else by what stands around placeholders.
    pub fn of<'a>(detector: &str, entries: &'a [Entry]) -> Option<&'a Entry> {
        let family = |entry: &&Entry| {
            let (Some(open), Some(close)) = (entry.name.find('{'), entry.name.rfind('}')) else { return false };
            let rest = detector.strip_prefix(&entry.name[..open]);
            rest.is_some_and(|rest| !rest.is_empty() && rest.ends_with(&entry.name[close + 1..]))
        };
        entries.iter().find(|entry| entry.name == detector).or_else(|| entries.iter().find(family))
    }
}

/// Which waiting frame of a detector goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// The newest frame goes before the backlog; the backlog keeps one turn in four and is drained newest to oldest.
    #[default]
    FreshestFirst,
    /// Strictly by time.
    OldestFirst,
}

/// Whether a source can deliver. Cheap to clone; all clones show the same.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Mutex<State>>);

/// What [`Health`] says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It has not looked yet.
    #[default]
    Starting,
    /// It delivers.
    Ok,
    /// It cannot deliver, and why; it recovers by itself.
    Held(String),
}

impl Health {
    /// What it says now.
    pub fn get(&self) -> State {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why it cannot deliver; `None` while it can, and before it has looked.
    pub fn held(&self) -> Option<String> {
        match self.get() {
            State::Held(why) => Some(why),
            State::Starting | State::Ok => None,
        }
    }

    /// Says something else from now on; `true` if that is news.
    pub fn set(&self, state: State) -> bool {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let news = *now != state;
        *now = state;
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detector_belongs_to_the_entry_of_its_name_else_to_the_family_that_it_fits() {
        let entries = ["{path.0}-in", "Lobby-in", "Door"].map(|name| Entry { name: name.into(), ..Entry::default() });
        let of = |detector| Entry::of(detector, &entries).map(|entry| entry.name.as_str());
        assert_eq!(of("Lobby-in"), Some("Lobby-in"));
        assert_eq!(of("Yard-in"), Some("{path.0}-in"));
        assert_eq!(of("Door"), Some("Door"));
        assert_eq!(of("Yard"), None);
        assert_eq!(of(""), None);
    }
}

//! What a reload changes: which detectors go on untouched, which sections are new, and what only a restart can apply.

use super::Settings;
use crate::source::Entry;

/// The difference between two settings. Detectors are indexes into the `detectors` of the old and the new settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "one flag per section that can change alone")]
pub struct Changes {
    /// Equal in both, as (old, new): not to be disturbed.
    pub unchanged: Vec<(usize, usize)>,
    /// The same detector with other options, as (old, new).
    pub changed: Vec<(usize, usize)>,
    /// Only in the new.
    pub added: Vec<usize>,
    /// Only in the old.
    pub removed: Vec<usize>,
    /// Anything in `[engine]`. The contents of its secret files may have changed although this is `false`.
    pub engine: bool,
    /// Anything in `[publish]`.
    pub publish: bool,
    /// `dead_letter.max_size` or `max_age`.
    pub dead_letter_limits: bool,
    /// Anything in `[log]`.
    pub log: bool,
    /// `encode.memory`.
    pub encode_memory: bool,
    /// `shutdown.deadline`.
    pub shutdown: bool,
    /// Keys that changed, but only count after a restart.
    pub needs_restart: Vec<&'static str>,
}

/// Compares two settings.
pub fn diff(old: &Settings, new: &Settings) -> Changes {
    let mut changes = Changes {
        engine: old.engine != new.engine || old.secret_places != new.secret_places,
        publish: old.publish != new.publish,
        dead_letter_limits: (old.dead_letter.max_size, old.dead_letter.max_age)
            != (new.dead_letter.max_size, new.dead_letter.max_age),
        log: old.log != new.log,
        encode_memory: old.encode.memory != new.encode.memory,
        shutdown: old.shutdown != new.shutdown,
        needs_restart: needs_restart(old, new),
        ..Changes::default()
    };
    let mut left: Vec<usize> = (0..old.detectors.len()).collect();
    let mut take = |entry: &Entry, like: fn(&Entry, &Entry) -> bool| {
        let at = left.iter().position(|i| like(&old.detectors[*i], entry))?;
        Some(left.remove(at))
    };
    // Equal ones first, so that none of them is taken for the changed form of another.
    let mut others = Vec::new();
    for (i, entry) in new.detectors.iter().enumerate() {
        match take(entry, Entry::eq) {
            Some(was) => changes.unchanged.push((was, i)),
            None => others.push((i, entry)),
        }
    }
    for (i, entry) in others {
        match take(entry, same) {
            Some(was) => changes.changed.push((was, i)),
            None => changes.added.push(i),
        }
    }
    changes.removed = left;
    changes
}

/// Whether two entries speak of one detector. A name with placeholders may occur several times, for several directories.
fn same(a: &Entry, b: &Entry) -> bool {
    a.name == b.name && (!a.name.contains('{') || a.place() == b.place())
}

fn needs_restart(old: &Settings, new: &Settings) -> Vec<&'static str> {
    [
        ("encode.workers", old.encode.workers != new.encode.workers),
        ("encode.max_frame", old.encode.max_frame != new.encode.max_frame),
        ("admin.listen", old.admin.listen != new.admin.listen),
        ("admin.control", old.admin.control != new.admin.control),
        ("log.format", old.log.format != new.log.format),
        ("spool.directory", old.spool.directory != new.spool.directory),
        ("push.listen", old.push.listen != new.push.listen && old.push.listen.is_some()),
        ("dead_letter.directory", old.dead_letter.directory != new.dead_letter.directory),
    ]
    .into_iter()
    .filter_map(|(key, changed)| changed.then_some(key))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(detectors: &[(&str, &str, u32)]) -> Settings {
        let entry = |(name, path, weight): &(&str, &str, u32)| {
            format!("[[detectors]]\nname = '{name}'\nweight = {weight}\ndirectory = {{ path = '{path}' }}\n")
        };
        toml::from_str(&detectors.iter().map(entry).collect::<Vec<_>>().concat()).unwrap()
    }

    #[test]
    fn nothing_changes_between_equals() {
        let it = settings(&[("A", "/a", 1), ("B", "/b", 1)]);
        assert_eq!(diff(&it, &it), Changes { unchanged: vec![(0, 0), (1, 1)], ..Changes::default() });
    }

    #[test]
    fn detectors_are_unchanged_changed_added_or_removed() {
        let old = settings(&[("A", "/a", 1), ("B", "/b", 1), ("C", "/c", 1), ("{path.0}", "/f", 1)]);
        let new = settings(&[("C", "/c", 1), ("A", "/a", 2), ("{path.0}", "/g", 1), ("D", "/d", 1)]);
        let changes = diff(&old, &new);
        assert_eq!(changes.unchanged, [(2, 0)]);
        assert_eq!(changes.changed, [(0, 1)]);
        assert_eq!(changes.added, [2, 3]);
        assert_eq!(changes.removed, [1, 3]);
    }

    #[test]
    fn sections_are_told_apart_from_what_needs_a_restart() {
        let old = settings(&[]);
        let mut new = old.clone();
        new.publish.rate = 5.0;
        new.encode.workers = 3;
        new.admin.listen = "127.0.0.1:1".parse().unwrap();
        new.dead_letter.directory = "/x".into();
        let needs_restart = vec!["encode.workers", "admin.listen", "dead_letter.directory"];
        assert_eq!(diff(&old, &new), Changes { publish: true, needs_restart, ..Changes::default() });
    }
}

//! What a reload changes in the sections: those that are new, and what only a restart can apply.
//!
//! Not here: detectors, which the daemon compares with those that it runs.

use super::Settings;

/// The difference between two settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Anything in `[engine]`. The contents of its secret files may have changed although this is `false`.
    pub engine: bool,
    /// Anything in `[publish]`.
    pub publish: bool,
    /// Keys that changed, but only count after a restart.
    pub needs_restart: Vec<&'static str>,
}

/// Compares two settings.
pub fn diff(old: &Settings, new: &Settings) -> Changes {
    Changes {
        engine: old.engine != new.engine || old.secret_places != new.secret_places,
        publish: old.publish != new.publish,
        needs_restart: needs_restart(old, new),
    }
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

    #[test]
    fn sections_are_told_apart_from_what_needs_a_restart() {
        let old: Settings = toml::from_str("").unwrap();
        assert_eq!(diff(&old, &old), Changes::default());
        let mut new = old.clone();
        new.publish.rate = 5.0;
        new.encode.workers = 3;
        new.admin.listen = "127.0.0.1:1".parse().unwrap();
        new.dead_letter.directory = "/x".into();
        let needs_restart = vec!["encode.workers", "admin.listen", "dead_letter.directory"];
        assert_eq!(diff(&old, &new), Changes { engine: false, publish: true, needs_restart });
    }
}

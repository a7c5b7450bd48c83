//! Directories that must not contain each other: what one keeps, another would take or tidy away.

use std::path::{Path, PathBuf};

use super::Findings;
use crate::config::{Facts, Settings};
use crate::source::{Entry, directory, spool};

pub(super) fn check(settings: &Settings, facts: &Facts, found: &mut Findings) {
    let place = |key: String, path, drop_of| Place { key, path, real: facts.real(path), drop_of };
    let mut places = vec![place("dead_letter.directory".into(), settings.dead_letter.directory.as_path(), None)];
    if settings.detectors.iter().any(spool::serves) {
        places.push(place("spool.directory".into(), settings.spool.directory.as_path(), None));
    }
    for (i, entry) in settings.detectors.iter().enumerate() {
        let Some(config) = entry.directory() else { continue };
        places.push(place(format!("detectors[{i}].directory.path"), &config.path, Some((entry, config))));
        places.extend(
            config.archive.as_ref().map(|archive| place(format!("detectors[{i}].directory.archive"), archive, None)),
        );
    }
    places.retain(|place| place.path.is_absolute());
    // Sorted by component, whatever contains a place comes before it, the nearest last.
    places.sort_by(|a, b| a.real.cmp(&b.real));
    let mut around: Vec<&Place<'_>> = Vec::new();
    for inner in &places {
        while around.last().is_some_and(|outer| !inner.real.starts_with(&outer.real)) {
            around.pop();
        }
        if let Some(outer) = around.iter().rev().find(|outer| collide(outer, inner)) {
            report_overlap(outer, inner, found);
        }
        around.push(inner);
    }
}

/// Directories of ours that no other may contain.
struct Place<'a> {
    key: String,
    path: &'a Path,
    real: PathBuf,
    drop_of: Option<(&'a Entry, &'a directory::Config)>,
}

fn collide(outer: &Place<'_>, inner: &Place<'_>) -> bool {
    match (outer.drop_of, inner.drop_of) {
        (Some((_, config)), Some(_)) => outer.real == inner.real || config.recursive,
        (Some(_), None) | (None, Some(_)) => true,
        // Archives may share a directory; dead letters and the spool are alone in theirs, for each is tidied by other rules.
        (None, None) => !(is_archive(outer) && is_archive(inner)),
    }
}

fn is_archive(place: &Place<'_>) -> bool {
    place.drop_of.is_none() && place.key.ends_with(".archive")
}

fn report_overlap(outer: &Place<'_>, inner: &Place<'_>, found: &mut Findings) {
    let whose = |place: &Place<'_>| match place.drop_of {
        Some((entry, _)) => format!("the drop directory of `{}`", entry.name),
        None if place.key.starts_with("dead_letter") => "the dead-letter directory".to_owned(),
        None if place.key.starts_with("spool") => "the spool's directory".to_owned(),
        None => "an archive".to_owned(),
    };
    // Told where the detector's entry stands, which is what somebody just wrote.
    let (at, other) = if inner.key.starts_with("dead_letter") { (outer, inner) } else { (inner, outer) };
    let relation = match (inner.real == outer.real, std::ptr::eq(at, inner)) {
        (true, _) => "is also",
        (false, true) => "is inside",
        (false, false) => "contains",
    };
    let wrong = format!("`{}` {relation} {} ({})", at.path.display(), whose(other), other.path.display());
    let right = match (at.drop_of, other.drop_of) {
        (Some(_), Some(_)) => {
            "a frame would be taken twice: write separate directories, or recursive = false for the outer"
        }
        (Some(_) | None, None) | (None, Some(_)) => {
            "what is kept would be published again or tidied away: write separate directories"
        }
    };
    found.problem(&at.key, wrong, right);
}

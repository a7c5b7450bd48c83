//! A detector's queue: what its source finds wrong with its keys, its files, and what two entries share.

use std::collections::HashMap;

use super::Findings;
use crate::config::{Facts, SecretFile, Settings};

pub(super) fn check(settings: &Settings, facts: &Facts, found: &mut Findings) {
    let mut first: HashMap<String, &str> = HashMap::new();
    for (i, entry) in settings.detectors.iter().enumerate() {
        let key = format!("detectors[{i}].{}", entry.source.key());
        for fault in entry.source.faults() {
            found.problem(format!("{key}.{}", fault.key), fault.wrong, fault.right);
        }
        for (name, file, _) in entry.source.files() {
            match facts.secrets.get(file) {
                None | Some(SecretFile::Usable) => {}
                Some(SecretFile::Away(why)) => {
                    found.warning(format!("{key}.{name}"), why, "this detector is held until it is there");
                }
                Some(SecretFile::Unfit(why)) => found.problem(format!("{key}.{name}"), why, ""),
            }
        }
        let Some((shared, fault)) = entry.source.shared() else { continue };
        if let Some(other) = first.insert(shared, &entry.name) {
            let key = if fault.key.is_empty() { key } else { format!("{key}.{}", fault.key) };
            found.problem(key, fault.wrong.replace("another entry", &format!("`{other}`")), fault.right);
        }
    }
}

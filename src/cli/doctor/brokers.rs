//! Brokers: whether each is there, takes the account, and has what is to be read from it.

use super::Line;
use crate::config::Settings;
use crate::source;

pub(super) async fn look(settings: &Settings, lines: &mut Vec<Line>) {
    let files = |file: &std::path::Path| settings.secret_path(file);
    for entry in &settings.detectors {
        let Some(reached) = source::reach(entry, &files).await else { continue };
        let (subject, place) = (format!("detector {}", entry.name), entry.place());
        lines.push(match reached {
            Ok(found) => Line::ok(subject, format!("{place}: {found}")),
            Err(why) => Line::fail(
                subject,
                format!("{place}: {why}"),
                "does the broker run, are the address, the account and what is read there right, does a firewall stand between? frames wait there meanwhile",
            ),
        });
    }
}

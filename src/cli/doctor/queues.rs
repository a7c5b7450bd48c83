//! The way to the broker of each entry that has one: whether it lets us in. Takes nothing from it.

use super::Line;
use crate::config::Settings;

pub(super) async fn look(settings: &Settings, lines: &mut Vec<Line>) {
    for entry in &settings.detectors {
        let Some(reached) = entry.source.reach(&|file| settings.secret_path(file)).await else { continue };
        let (subject, place) = (format!("detector {}", entry.name), entry.place());
        lines.push(match reached {
            Ok(found) => Line::ok(subject, format!("{place}: {found}")),
            Err(error) => {
                let key = entry.source.key();
                let remedy = format!(
                    "does it run, is {key}.url right, does a firewall stand between? then account and CA of this entry"
                );
                Line::fail(subject, format!("{place}: {error:#}"), remedy)
            }
        });
    }
}

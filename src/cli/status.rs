//! `framegate status`: asks the running daemon over its control socket and prints the answer for people or as JSON.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use bytesize::ByteSize;
use jiff::Timestamp;
use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

use crate::admin::page;
use crate::control::{self, Request};
use crate::daemon::Status;

/// Longer names are cut, so that a line fits a terminal.
const NAME_COLUMNS_MAX: usize = 28;

const EXAMPLES: &str = "\
Examples:
  framegate status                      for people
  framegate status --json | jq .engine  for programs
  framegate top                         the same, live

Exit code 1 if no daemon can be asked.";

/// Arguments of `framegate status`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    config: super::ConfigArgs,
    /// The whole status as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let loaded = match super::load(&args.config.config) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let socket = &loaded.settings.admin.control;
    super::print(&if args.json { format!("{:#}\n", answer(socket)?) } else { describe(&ask(socket)?) })
}

/// The status of the daemon that answers on this socket.
pub(super) fn ask(socket: &Path) -> anyhow::Result<Status> {
    serde_json::from_value(answer(socket)?)
        .context("the daemon's answer is of another version; restart it to run the installed one")
}

fn answer(socket: &Path) -> anyhow::Result<serde_json::Value> {
    let answer = control::ask(socket, &Request::Status)?;
    if !answer.ok {
        anyhow::bail!("{}", answer.message);
    }
    Ok(answer.data)
}

fn describe(status: &Status) -> String {
    let mut text = String::new();
    let up = humantime::format_duration(std::time::Duration::from_secs(status.uptime_seconds));
    let mut line = |args: std::fmt::Arguments| text.extend([&*args.to_string(), "\n"]);
    line(format_args!(
        "framegate {} (pid {}), up {up}, metrics at http://{}/metrics",
        status.version, status.pid, status.admin
    ));
    line(format_args!("engine: {}", status.engine.describe()));
    line(format_args!("dead letters: {}, {}", status.dead_letters, ByteSize(status.dead_letter_bytes).display().iec()));
    if status.spool_frames > 0 || status.push.is_some() {
        let bytes = ByteSize(status.spool_bytes).display().iec();
        line(format_args!("spool: {} frames, {bytes}", status.spool_frames));
    }
    if let Some(address) = &status.push {
        line(format_args!("push: {address}"));
    }
    for source in &status.sources {
        if let Some(why) = &source.held {
            let (name, place) = (source.name.escape_debug(), source.place.escape_debug());
            line(format_args!("held: {name} ({place}): {}", printable(why)));
        }
    }
    for detector in status.detectors.iter().filter(|detector| detector.counts.silent) {
        let name = detector.name.escape_debug();
        line(format_args!("silent: {name} has sent nothing for longer than its silence_alarm"));
    }
    if status.detectors.is_empty() {
        line(format_args!("\nno frame has come yet"));
        return text;
    }
    let names: Vec<String> = status.detectors.iter().map(|it| cut(&shown(&it.name), NAME_COLUMNS_MAX)).collect();
    let width = names.iter().map(|name| name.width()).chain(["detector".len()]).max().unwrap_or(0);
    let now = Timestamp::now();
    line(format_args!(
        "\n{:<width$} {:<6} {:>7} {:>8} {:>8} {:>9} {:>6} {:>9}",
        "detector", "state", "per s", "ms", "pending", "published", "dead", "last"
    ));
    for (detector, name) in status.detectors.iter().zip(names) {
        let counts = &detector.counts;
        // `{:<width$}` counts characters, of which some take two columns and some none.
        let gap = " ".repeat(width - name.width());
        line(format_args!(
            "{name}{gap} {:<6} {:>7.1} {:>8} {:>8} {:>9} {:>6} {:>9}",
            counts.condition().as_str(),
            detector.rate,
            detector.delivery_ms.map_or_else(|| "-".into(), |ms| format!("{ms:.1}")),
            counts.pending,
            counts.published,
            counts.dead_lettered,
            ago(counts.last_frame_ms, now),
        ));
    }
    text
}

/// A name as a line holds it: whatever it is made of, it moves no cursor.
pub(super) fn shown(name: &str) -> String {
    name.escape_debug().collect()
}

/// As much of it as fits into so many columns of a terminal.
pub(super) fn cut(text: &str, columns: usize) -> String {
    if text.width() <= columns {
        return text.to_owned();
    }
    let mut left = columns.saturating_sub(1);
    let fits = |c: &char| {
        let rest = left.checked_sub(c.width().unwrap_or(0));
        left = rest.unwrap_or(left);
        rest.is_some()
    };
    text.chars().take_while(fits).chain((columns > 0).then_some('…')).collect()
}

/// Reasons hold names and paths of others: nothing of theirs moves the cursor.
pub(super) fn printable(text: &str) -> String {
    let plain = |c: char| match c {
        '"' | '\'' | '\\' => vec![c],
        c if c.is_control() => vec![' '],
        c => c.escape_debug().collect(),
    };
    text.chars().flat_map(plain).collect()
}

/// How long ago, in its largest unit.
pub(super) fn ago(millis: Option<i64>, now: Timestamp) -> String {
    let Some(millis) = millis else { return "never".into() };
    let seconds = (now.as_millisecond() - millis).max(0) / 1000;
    page::span(Duration::from_secs(seconds.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the daemon would say it.
    fn status(names: &[&str]) -> Status {
        let detector = |name: &&str| {
            serde_json::json!({ "name": name, "rate": 12.34, "delivery_ms": 2.5, "counts": {
                "received": 9, "published": 7, "dead_lettered": 1, "dropped": 0, "returned": 0, "refused": 0,
                "pending": 1, "up": true, "served": true, "silent": false, "last_frame_ms": null } })
        };
        serde_json::from_value(serde_json::json!({
            "version": "1", "pid": 7, "uptime_seconds": 60, "admin": "127.0.0.1:9464",
            "engine": { "state": "open", "since": "2026-11-23T11:00:00Z", "reason": "", "advice": "",
                "concurrency_limit": 1, "in_flight": 0, "waiting": 0, "token_expires": null,
                "clock_skew_seconds": null, "insecure": false },
            "sources": [{ "name": "Door", "place": "/srv/\u{1b}[2J", "held": "gone\u{7}" }],
            "detectors": names.iter().map(detector).collect::<Vec<_>>(),
            "dead_letters": 0, "dead_letter_bytes": 0, "spool_frames": 0, "spool_bytes": 0, "push": null
        }))
        .unwrap()
    }

    #[test]
    fn columns_stay_in_line_and_within_a_narrow_terminal_whatever_the_names() {
        let long = "x".repeat(300);
        for names in [vec!["A"], vec!["Lobby", "Tür", "a\nb", "正門カメラ"], vec![&*long, "B"]] {
            let text = describe(&status(&names));
            assert!(!text.contains(['\u{1b}', '\u{7}']), "{text:?}");
            let table: Vec<&str> = text.split("\n\n").nth(1).unwrap().lines().collect();
            assert_eq!(table.len(), names.len() + 1, "{text}");
            let widths: Vec<usize> = table.iter().map(|line| line.width()).collect();
            assert!(widths.iter().all(|width| *width == widths[0] && *width <= 88), "{widths:?}\n{text}");
        }
        assert!(describe(&status(&[])).contains("no frame has come yet"));
    }
}

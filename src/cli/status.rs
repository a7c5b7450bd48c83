//! `framegate status`: asks the running daemon over its control socket and prints the answer for people or as JSON.

use std::process::ExitCode;

use anyhow::Context as _;
use bytesize::ByteSize;

use crate::control::{self, Request};
use crate::daemon::Status;

/// Arguments of `framegate status`.
#[derive(Debug, clap::Args)]
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
    let answer = control::ask(&loaded.settings.admin.control, &Request::Status)?;
    if !answer.ok {
        anyhow::bail!("{}", answer.message);
    }
    if args.json {
        return super::print(&format!("{:#}\n", answer.data));
    }
    let status: Status = serde_json::from_value(answer.data)
        .context("the daemon's answer is of another version; restart it to run the installed one")?;
    super::print(&describe(&status))
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
            line(format_args!("held: {} ({}): {why}", source.name, source.place));
        }
    }
    for detector in status.detectors.iter().filter(|detector| detector.counts.silent) {
        let name = detector.name.escape_debug();
        line(format_args!("silent: {name} has sent nothing for longer than its silence_alarm"));
    }
    line(format_args!(
        "\n{:<28} {:>10} {:>10} {:>8} {:>8} {:>8} {:>8}  last frame",
        "detector", "received", "published", "per s", "pending", "dead", "dropped"
    ));
    for detector in &status.detectors {
        let counts = &detector.counts;
        let last = counts
            .last_frame_ms
            .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
            .map_or_else(|| "never".into(), |at| at.strftime("%F %T UTC").to_string());
        line(format_args!(
            "{:<28} {:>10} {:>10} {:>8.1} {:>8} {:>8} {:>8}  {last}",
            detector.name.escape_debug().to_string(),
            counts.received,
            counts.published,
            detector.rate,
            counts.pending,
            counts.dead_lettered,
            counts.dropped
        ));
    }
    text
}

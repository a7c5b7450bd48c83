//! `framegate doctor`: on site, looks at everything that goes wrong there, and says for each what to do.
//!
//! It changes nothing and publishes nothing; at the engine it logs in once. What is looked at is in the files below; this one
//! says in which order, as which user, and how it is told.

mod directories;
mod engine;
mod machine;
mod queues;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Context as _;
use rustix::process::geteuid;
use serde::Serialize;

use crate::config::{self, Environment, Loaded};
use crate::control::{self, Request};
use crate::daemon::Status;
use crate::publish::State;

/// The user of the installed unit.
const SERVICE_USER: &str = "framegate";
/// Where systemd puts the installed unit's credentials.
const SERVICE_CREDENTIALS: &str = "/run/credentials/framegate.service";

/// Where systemd takes credentials from that a unit names by their name alone; for root.
const CREDENTIAL_STORE: &str = "/etc/credstore";

const EXAMPLES: &str = "\
Examples:
  sudo framegate doctor            as the service's user, on the installed configuration
  framegate doctor --config framegate.toml --json

Each line is ok, warn or fail; below it stands what to do. Exit code 1 if any line is fail.";

/// Arguments of `framegate doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    config: super::ConfigArgs,
    /// As JSON: a list of objects with subject, outcome, found, remedy
    #[arg(long)]
    json: bool,
    /// Look with this user's rights (root only); without it root looks as `framegate`, if there is such a user
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// What lies in systemd's store of credentials, which only root sees; said by root to the service's user
    #[arg(long, hide = true, value_name = "FILE")]
    stored: Vec<PathBuf>,
}

/// How one thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Line {
    subject: String,
    outcome: Outcome,
    found: String,
    /// What to do, a command where there is one; empty if nothing.
    remedy: String,
}

impl Line {
    fn ok(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self { subject: subject.into(), outcome: Outcome::Ok, found: found.into(), remedy: String::new() }
    }

    fn warn(subject: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { subject: subject.into(), outcome: Outcome::Warn, found: found.into(), remedy: remedy.into() }
    }

    fn fail(subject: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { subject: subject.into(), outcome: Outcome::Fail, found: found.into(), remedy: remedy.into() }
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(code) = as_the_service(args)? {
        return Ok(code);
    }
    let lines = look(&args.config.config, &args.stored)?;
    let text = if args.json { format!("{:#}\n", serde_json::to_value(&lines)?) } else { told(&lines) };
    super::print(&text)?;
    let failed = lines.iter().any(|line| line.outcome == Outcome::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Root may everything, so what it sees says little: the same command once more, as the user that the service has.
fn as_the_service(args: &Args) -> anyhow::Result<Option<ExitCode>> {
    if !geteuid().is_root() || args.user.as_deref() == Some("root") {
        return Ok(None);
    }
    let group = match (&args.user, primary_group(args.user.as_deref().unwrap_or(SERVICE_USER))) {
        (_, Some(group)) => group,
        (Some(named), None) => anyhow::bail!("there is no user `{named}`"),
        (None, None) => return Ok(None),
    };
    let user = args.user.as_deref().unwrap_or(SERVICE_USER);
    let binary = std::env::current_exe().context("cannot tell which program this is")?;
    let mut again = Command::new("setpriv");
    again.args(["--reuid", user, "--regid", &group, "--init-groups", "--"]).arg(binary).arg("doctor");
    again.arg("--config").arg(&args.config.config);
    if args.json {
        again.arg("--json");
    }
    let stored = std::fs::read_dir(CREDENTIAL_STORE).into_iter().flatten().flatten();
    again.args(stored.flat_map(|file| ["--stored".into(), file.file_name()]));
    let status = again
        .status()
        .context("cannot look with the service's rights: `setpriv` (util-linux) is missing; use --user root")?;
    // A code outside of a byte is a signal's.
    Ok(Some(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))))
}

/// The number of a user's group; `None`: there is no such user.
fn primary_group(name: &str) -> Option<String> {
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
    line.split(':').nth(3).map(str::to_owned)
}

/// Everything, in the order in which it should be mended.
fn look(config: &Path, stored: &[PathBuf]) -> anyhow::Result<Vec<Line>> {
    let mut environment = Environment::from_process();
    if environment.credentials_directory.is_none() && Path::new(SERVICE_CREDENTIALS).is_dir() {
        environment.credentials_directory = Some(SERVICE_CREDENTIALS.into());
    }
    let mut lines = Vec::new();
    let loaded = match config::load(config, &environment) {
        Ok(loaded) => loaded,
        Err(problems) => {
            for problem in problems.0 {
                let place = if problem.key.is_empty() { problem.file.clone() } else { problem.key.clone() };
                lines.push(Line::fail(format!("configuration: {place}"), problem.wrong, problem.right));
            }
            return Ok(lines);
        }
    };
    configuration(config, &loaded, &mut lines);
    machine::look(&loaded.settings, &mut lines);
    directories::look(&loaded.settings, &mut lines);
    super::runtime()?.block_on(async {
        queues::look(&loaded.settings, &mut lines).await;
        engine::look(&loaded.settings, stored, &mut lines).await;
    });
    daemon(&loaded, &mut lines);
    Ok(lines)
}

fn configuration(path: &Path, loaded: &Loaded, lines: &mut Vec<Line>) {
    let count = loaded.settings.detectors.len();
    lines.push(Line::ok("configuration", format!("{} is valid: {count} detector entries", path.display())));
    lines.extend(loaded.warnings.iter().map(|warning| Line::warn("configuration", warning, "see `framegate check`")));
}

/// What only the running daemon knows: above all whether the engine takes its frames.
fn daemon(loaded: &Loaded, lines: &mut Vec<Line>) {
    let socket = &loaded.settings.admin.control;
    let status =
        control::ask(socket, &Request::Status).and_then(|answer| Ok(serde_json::from_value::<Status>(answer.data)?));
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            let remedy = "systemctl start framegate; systemctl status framegate says why it does not run";
            return lines.push(Line::warn("daemon", format!("{error:#}"), remedy));
        }
    };
    let up = humantime::format_duration(std::time::Duration::from_secs(status.uptime_seconds));
    lines.push(Line::ok("daemon", format!("runs since {up}, version {}", status.version)));
    lines.push(match status.engine.state {
        State::Open => Line::ok("publishing", published(&status)),
        State::Forbidden | State::Credentials => {
            Line::fail("publishing", status.engine.summary(), engine::remedy(status.engine.state))
        }
        State::Unreachable | State::Rejecting | State::UnexpectedAnswer | State::Throttled | State::Failing => {
            Line::warn("publishing", status.engine.summary(), engine::remedy(status.engine.state))
        }
    });
    for source in &status.sources {
        if let Some(why) = &source.held {
            lines.push(Line::fail(
                format!("detector {}", source.name),
                why,
                "mend what is said above about its directory or broker",
            ));
        }
    }
    for detector in status.detectors.iter().filter(|detector| detector.counts.silent) {
        lines.push(Line::warn(
            format!("detector {}", detector.name),
            "no frame for longer than its silence_alarm",
            "look whether its camera runs and writes here",
        ));
    }
    if status.dead_letters > 0 {
        let found = format!("{} are kept", status.dead_letters);
        lines.push(Line::warn("dead letters", found, "framegate dead-letter list"));
    }
}

fn published(status: &Status) -> String {
    let frames: u64 = status.detectors.iter().map(|detector| detector.counts.published).sum();
    let pending: i64 = status.detectors.iter().map(|detector| detector.counts.pending).sum();
    if frames == 0 {
        return format!("the engine is not known to refuse, but has taken no frame yet; {pending} wait");
    }
    format!("the engine takes frames: {frames} so far, {pending} wait")
}

/// For people: the outcome first, what to do below.
fn told(lines: &[Line]) -> String {
    let colours = super::colours_wanted();
    let shown = |text: &str| text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    let told = |line: &Line| {
        let (word, colour) = match line.outcome {
            Outcome::Ok => ("ok  ", 32),
            Outcome::Warn => ("warn", 33),
            Outcome::Fail => ("fail", 31),
        };
        let word = if colours { format!("\x1b[{colour}m{word}\x1b[0m") } else { word.to_owned() };
        let told = format!("{word}  {}: {}\n", shown(&line.subject), shown(&line.found));
        let remedy = format!("        → {}\n", shown(&line.remedy));
        told + if line.remedy.is_empty() { "" } else { &remedy }
    };
    let text: String = lines.iter().map(told).collect();
    let count = |outcome| lines.iter().filter(|line| line.outcome == outcome).count();
    text + &format!("\n{} ok, {} warn, {} fail\n", count(Outcome::Ok), count(Outcome::Warn), count(Outcome::Fail))
}

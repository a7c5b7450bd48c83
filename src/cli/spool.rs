//! `framegate spool list|purge`: which pushed and MQTT frames wait on disk. Looks at the directory itself; purging is the
//! running daemon's work, or done here where there is none.

use std::io::{self, BufRead, IsTerminal as _, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytesize::ByteSize;
use jiff::Timestamp;

use crate::config::Settings;
use crate::control::{self, Request};
use crate::settle::dead_letter::shown;
use crate::source::spool::{self, Purged};

/// Looks at or removes frames that wait in the spool.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

/// What to do with the frames in the spool.
#[derive(Clone, Debug, clap::Subcommand)]
enum Command {
    /// Lists them, the oldest first
    List {
        /// Which.
        #[command(flatten)]
        which: Which,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Removes them for good; each is counted as dropped
    Purge {
        /// Which.
        #[command(flatten)]
        which: Which,
        /// All of them
        #[arg(long)]
        all: bool,
        /// Does not ask
        #[arg(long, short)]
        yes: bool,
        /// What was done as JSON
        #[arg(long)]
        json: bool,
    },
}

/// Which frames: those that fit all that is given.
#[derive(Clone, Debug, Default, clap::Args)]
struct Which {
    /// Of exactly this detector
    #[arg(long, value_name = "NAME")]
    detector: Option<String>,
    /// Received longer ago than this, such as 2h or 3d
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    older_than: Option<Duration>,
    /// Received less long ago than this
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    newer_than: Option<Duration>,
}

/// Does it with the spool of this configuration.
pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<ExitCode> {
    let output = &mut io::stdout().lock();
    match &args.command {
        Command::List { which, json } => list(which, *json, settings, output),
        Command::Purge { which, all, yes, json } => {
            which.chosen(*all)?;
            if !*yes && !confirmed(which, settings, output)? {
                return Ok(ExitCode::FAILURE);
            }
            let purged = purge(which, settings)?;
            if *json {
                writeln!(output, "{}", serde_json::to_string(&purged)?)?;
            } else {
                writeln!(output, "{} removed.", purged.removed)?;
                if purged.in_hand > 0 {
                    writeln!(
                        output,
                        "{} left alone: the daemon has them in hand; stop it to remove these, too.",
                        purged.in_hand
                    )?;
                }
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn list(which: &Which, json: bool, settings: &Settings, output: &mut impl Write) -> anyhow::Result<ExitCode> {
    let frames = found(which, settings)?;
    if json {
        for frame in &frames {
            writeln!(output, "{}", serde_json::to_string(frame)?)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if frames.is_empty() {
        writeln!(output, "No frames in the spool{}.", if which.is_all() { "" } else { " that fit" })?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(output, "{:26}  {:20}  {:6}  {:>10}  {:20}  FROM", "ID", "RECEIVED", "SOURCE", "SIZE", "DETECTOR")?;
    for frame in &frames {
        writeln!(
            output,
            "{}  {:.0}  {:6}  {:>10}  {:20}  {}",
            frame.id,
            frame.received_at,
            frame.source,
            ByteSize(frame.image_bytes).display().iec().to_string(),
            shown(frame.detector.as_ref()),
            shown(frame.original_name.as_ref()),
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

fn found(which: &Which, settings: &Settings) -> anyhow::Result<Vec<spool::Listed>> {
    let directory = &settings.spool.directory;
    spool::list(directory, &which.filter()).with_context(|| format!("spool in {}", directory.display()))
}

fn confirmed(which: &Which, settings: &Settings, output: &mut impl Write) -> anyhow::Result<bool> {
    let frames = found(which, settings)?.len();
    if frames == 0 {
        return Ok(true);
    }
    let input = io::stdin();
    if !input.is_terminal() {
        bail!("{frames} would be removed for good, and nobody can be asked here: say --yes");
    }
    write!(output, "Remove {frames} for good? [y/N] ")?;
    output.flush()?;
    let mut answer = String::new();
    input.lock().read_line(&mut answer)?;
    let yes = matches!(answer.trim(), "y" | "Y" | "yes");
    if !yes {
        writeln!(output, "Nothing removed.")?;
    }
    Ok(yes)
}

fn purge(which: &Which, settings: &Settings) -> anyhow::Result<Purged> {
    match spool::purge(&settings.spool, &which.filter()) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
        done => return done.with_context(|| format!("spool in {}", settings.spool.directory.display())),
    }
    let answer = control::ask(&settings.admin.control, &Request::PurgeSpool { which: which.filter() })?;
    if !answer.ok {
        bail!("{}", answer.message);
    }
    serde_json::from_value(answer.data)
        .context("the daemon's answer is of another version; restart it to run the installed one")
}

impl Which {
    fn is_all(&self) -> bool {
        self.detector.is_none() && self.older_than.is_none() && self.newer_than.is_none()
    }

    /// Everything must be asked for in so many words.
    fn chosen(&self, all: bool) -> anyhow::Result<()> {
        match (all, self.is_all()) {
            (false, true) => bail!("say which: --detector, --older-than, --newer-than, or --all"),
            (true, false) => bail!("--all means all of them: leave out the filters, or --all"),
            (true, true) | (false, false) => Ok(()),
        }
    }

    fn filter(&self) -> spool::Which {
        // Longer ago than time itself: nothing came before that, and everything after.
        let ago = |age: Duration| Timestamp::now().checked_sub(age).unwrap_or(Timestamp::MIN);
        spool::Which {
            detector: self.detector.clone(),
            before: self.older_than.map(ago),
            after: self.newer_than.map(ago),
        }
    }
}

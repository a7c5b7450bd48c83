//! `framegate top`: the running daemon's status, live in the terminal. Asks as `framegate status` does, and changes nothing.
//!
//! Here are the terminal, the clock and the asking; what is shown and what keys do is in `top/model.rs`, how it looks in
//! `top/draw.rs`.

mod draw;
mod model;

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use crossterm::event::{Event, EventStream, KeyEventKind};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use ratatui::DefaultTerminal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;

use self::model::Model;
use super::status;

/// Between two questions: not so often that the daemon notices, not so rarely that it is not live.
const INTERVAL: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_mins(10);
/// The ages on the screen go on without the daemon.
const REDRAW_EVERY: Duration = Duration::from_secs(1);

const EXAMPLES: &str = "\
Examples:
  framegate top                      the detectors in trouble first
  framegate top --interval 5s        over a slow line
  framegate status                   the same once, for scripts and pipes

Keys: arrows move, s sorts by the next column, r reverses, / filters, space holds, ? helps, q ends.
NO_COLOR=1 leaves the colours out. Exit code 1 if there is no terminal, or no daemon can be asked at the start.";

/// Arguments of `framegate top`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    config: super::ConfigArgs,
    /// How often the daemon is asked
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let told = |time: &Duration| humantime::format_duration(*time).to_string();
    if INTERVAL.contains(&time) {
        Ok(time)
    } else {
        Err(format!("write a time from {} to {}", told(INTERVAL.start()), told(INTERVAL.end())))
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if !io::stdout().is_terminal() {
        bail!("`top` needs a terminal, and its output goes elsewhere; `framegate status` says the same once");
    }
    let loaded = match super::load(&args.config.config) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let socket = loaded.settings.admin.control;
    let mut model = Model::new(status::ask(&socket)?, Timestamp::now(), args.interval, super::colours_wanted());
    let runtime = super::runtime()?;
    let ended = {
        let mut screen = Screen::open()?;
        runtime.block_on(live(&mut screen.0, &mut model, &socket))
    };
    // A daemon that hangs would keep the last question, and us, for half a minute.
    runtime.shutdown_background();
    ended.map(|()| ExitCode::SUCCESS)
}

/// The terminal as ours; whatever ends that, it is given back as it was. Panics are shown on it after that.
struct Screen(DefaultTerminal);

impl Screen {
    fn open() -> anyhow::Result<Self> {
        ratatui::try_init().map(Self).context("cannot use this terminal; `framegate status` needs none")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Shows the model until a key or a signal ends it.
async fn live(terminal: &mut DefaultTerminal, model: &mut Model, socket: &Path) -> anyhow::Result<()> {
    let [mut hangup, mut terminate, mut interrupt] =
        [SignalKind::hangup(), SignalKind::terminate(), SignalKind::interrupt()].map(signal);
    let [hangup, terminate, interrupt] = [&mut hangup, &mut terminate, &mut interrupt];
    let mut keys = EventStream::new();
    let mut every = tokio::time::interval(model.every);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut redraw = tokio::time::interval(REDRAW_EVERY);
    // One question at most: a daemon that hangs is not asked twice.
    let mut asked = FuturesUnordered::new();
    loop {
        model.now = Timestamp::now();
        let area = terminal.draw(|frame| draw::draw(frame, model)).context("cannot draw on this terminal")?.area;
        let page = draw::page(model, area.width, area.height);
        tokio::select! {
            event = keys.next() => match event {
                Some(Ok(Event::Key(key))) if key.kind != KeyEventKind::Release => {
                    if model.key(key, page).is_break() {
                        return Ok(());
                    }
                }
                // A new size, among others: drawn anew.
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error).context("cannot read the terminal's keys"),
                None => return Ok(()),
            },
            _ = every.tick(), if asked.is_empty() && !model.paused => {
                let socket = socket.to_owned();
                asked.push(tokio::task::spawn_blocking(move || status::ask(&socket)));
            }
            Some(answer) = asked.next() => {
                model.now = Timestamp::now();
                model.heard(answer.context("asking failed").flatten().map_err(|error| format!("{error:#}")));
            }
            _ = redraw.tick() => {}
            () = told(hangup) => return Ok(()),
            () = told(terminate) => return Ok(()),
            () = told(interrupt) => return Ok(()),
        }
    }
}

/// Resolves when the signal comes; one that could not be asked for never does.
async fn told(signal: &mut io::Result<tokio::signal::unix::Signal>) {
    match signal {
        Ok(signal) => {
            signal.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}

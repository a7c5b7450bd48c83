//! `framegate publish`: publishes files and directories by hand through the same encoder and publisher as the daemon.
//! The files stay where they are.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{IsTerminal as _, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::StreamExt as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Settings;
use crate::encode::{Encoded, Encoder};
use crate::frame::{Detector, Frame, FrameId, SourceKind};
use crate::log;
use crate::metrics::Metrics;
use crate::publish::{EngineStatus, Outcome, Publisher, State};
use crate::queue::Taken;
use crate::settle::Receipt;
use crate::source::directory::{DetectTime, Finder};
use crate::source::{self, Entry};

/// Without one acceptance for this long, the rest is given up even if the trouble may pass: somebody is waiting at the terminal.
const GIVE_UP_AFTER: Duration = Duration::from_mins(1);
/// How often it is looked at whether the trouble is one that passes.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Files in hand at least, even if the engine is asked one by one: more than the publisher needs to tell a few bad files from an
/// engine that refuses everything.
const IN_HAND_MIN: usize = 10;
/// Open files besides the engine's connections: standard streams, the runtime, the images being read.
const OPEN_FILES_RESERVED: u64 = 16;
/// Failures that are listed one by one; the others are only counted.
const LISTED_MAX: usize = 20;

const EXAMPLES: &str = "\
Examples:
  framegate publish face.jpg                          the configuration has one detector
  framegate publish --detector Lobby a.jpg photos/    directories are searched
  framegate publish --detector Lobby --time-zone UTC photos/

The files stay where they are. Exit code 0 if all were accepted, 1 otherwise.";

/// Arguments of `framegate publish`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    config: super::ConfigArgs,
    /// The detector's name as the engine gets it; needed unless the configuration names exactly one
    #[arg(long, value_name = "NAME")]
    detector: Option<String>,
    /// IANA time zone; otherwise that of the detector in the configuration
    #[arg(long, value_name = "ZONE")]
    time_zone: Option<String>,
    /// Image files, or directories that are searched for *.jpg, *.jpeg, *.png, *.webp and *.bmp
    #[arg(required = true, value_name = "FILE|DIR")]
    paths: Vec<PathBuf>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let loaded = match super::load(&args.config.config) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let _log = log::init(&loaded.settings.log)?;
    let whose = whose(args, &loaded.settings)?;
    let files = find(&args.paths)?;
    super::runtime()?.block_on(publish_all(&loaded.settings, whose, files))
}

/// Whose frames they are, and how their detection time is found.
struct Whose {
    detector: Arc<Detector>,
    finder: Finder,
}

fn whose(args: &Args, settings: &Settings) -> anyhow::Result<Arc<Whose>> {
    let known: Vec<_> = settings.detectors.iter().filter(|d| !d.name.contains('{')).collect();
    let name = match (&args.detector, known.as_slice()) {
        (Some(name), _) => name.clone(),
        (None, [only]) => only.name.clone(),
        (None, _) => bail!("which detector? add `--detector NAME`; the configuration names {}", known.len()),
    };
    let entry = Entry::of(&name, &settings.detectors);
    let zone = match (&args.time_zone, entry) {
        (Some(zone), _) => zone.clone(),
        (None, Some(entry)) => entry.time_zone.clone(),
        (None, None) => bail!("detector `{name}` is not in the configuration; add `--time-zone ZONE`"),
    };
    jiff::tz::db().get(&zone).with_context(|| format!("`{zone}` is no known IANA time zone"))?;
    let rate = entry.map_or(0.0, |e| e.rate);
    let way = if let Some(source::Config::Directory(config)) = entry.map(|e| &e.source) {
        config.detect_time.clone()
    } else {
        // What a queue says of a frame, a file does not.
        DetectTime::default()
    };
    let finder = Finder::new(&way, &zone)?;
    let detector = Arc::new(Detector { name: name.into(), time_zone: zone.into(), rate, weight: 1 });
    Ok(Arc::new(Whose { detector, finder }))
}

/// The files themselves, and the images in directories, in order of their names.
fn find(paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        // Who names a link means what it leads to; links that are found in directories are left.
        let meta = path.metadata().with_context(|| format!("cannot read `{}`", path.display()))?;
        if meta.is_dir() {
            search(path, &mut files)?;
        } else {
            files.push(path.clone());
        }
    }
    if files.is_empty() {
        bail!("no image files found in these directories");
    }
    Ok(files)
}

fn search(dir: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let read = || -> std::io::Result<Vec<_>> { std::fs::read_dir(dir)?.collect() };
    let mut entries = read().with_context(|| format!("cannot list `{}`", dir.display()))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (kind, path) = (entry.file_type()?, entry.path());
        let image = path
            .extension()
            .and_then(|e| e.to_str())
            .is_some_and(|e| ["jpg", "jpeg", "png", "webp", "bmp"].iter().any(|known| e.eq_ignore_ascii_case(known)));
        if kind.is_dir() && !entry.file_name().as_encoded_bytes().starts_with(b".") {
            search(&path, files)?;
        } else if kind.is_file() && image {
            files.push(path);
        }
    }
    Ok(())
}

async fn publish_all(settings: &Settings, whose: Arc<Whose>, files: Vec<PathBuf>) -> anyhow::Result<ExitCode> {
    let metrics = Metrics::new();
    let max_frame = settings.encode.max_frame.as_u64();
    let encoder = Encoder::start(settings.encode.workers, max_frame, metrics.clone());
    let publish = settings.publish.fitting(OPEN_FILES_RESERVED);
    let publisher = Publisher::new(&settings.engine(), settings.engine_secrets(), &publish, metrics)?;
    let background = CancellationToken::new();
    let mut interrupts = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let bar = progress_bar(files.len() as u64);
    let (total, started) = (files.len(), Instant::now());
    let mut failed: Vec<(PathBuf, String)> = Vec::new();

    let work = async {
        let at_once = publish.max_in_flight.max(IN_HAND_MIN) + 2;
        let hand = Hand::default();
        let mut results = futures_util::stream::iter(files)
            .map(|path| async {
                let result = publish_one(&encoder, &publisher, &whose, &path, max_frame, &hand).await;
                (path, result)
            })
            .buffer_unordered(at_once);
        let mut progress = Instant::now();
        let mut look = tokio::time::interval(LOOK_EVERY);
        let mut given_up = false;
        loop {
            let next = tokio::select! {
                next = results.next() => next,
                _ = interrupts.recv() => {
                    hand.stopped.set(true);
                    publisher.stop();
                    continue
                }
                _ = look.tick(), if !given_up => {
                    let stuck = hand.preparing.get() == 0 && publisher.is_stuck();
                    if stuck || progress.elapsed() >= GIVE_UP_AFTER {
                        given_up = true;
                        hand.stopped.set(true);
                        bar.suspend(|| tracing::error!("giving up on the rest: {}", why(&publisher.status(), stuck)));
                        publisher.stop();
                    }
                    continue
                }
            };
            match next {
                None => break,
                Some((_, Ok(()))) => progress = Instant::now(),
                Some((path, Err(why))) => failed.push((path, why)),
            }
            bar.inc(1);
        }
    };
    tokio::select! {
        () = work => {}
        () = publisher.run(background.clone()) => {}
    }
    background.cancel();
    bar.finish_and_clear();
    summary(total, started.elapsed(), &failed)
}

/// Why the rest is given up.
fn why(status: &EngineStatus, stuck: bool) -> String {
    match (status.state, stuck) {
        (State::Open, true) => "the engine refuses each of them, and there is no other to compare them with".to_owned(),
        (State::Open, false) => format!("nothing was accepted for {} s", GIVE_UP_AFTER.as_secs()),
        (_, _) => format!("engine {}", status.describe()),
    }
}

/// What those who prepare files and who waits for them tell each other.
#[derive(Default)]
struct Hand {
    /// Files that are read and encoded: the publisher does not know them yet.
    preparing: Cell<usize>,
    /// No further file is worth being read.
    stopped: Cell<bool>,
}

async fn publish_one(
    encoder: &Encoder,
    publisher: &Publisher,
    whose: &Arc<Whose>,
    path: &Path,
    max_frame: u64,
    hand: &Hand,
) -> Result<(), String> {
    if hand.stopped.get() {
        return Err(left(&publisher.status(), None));
    }
    let (whose, owned) = (whose.clone(), path.to_owned());
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let take = Box::new(move |buffer: &mut Vec<u8>| match read(&owned, max_frame, &whose, buffer) {
        Ok(frame) => Taken::Frame(frame, Receipt::new(|_| {})),
        Err(error) => {
            // The receiver outlives the encoder's answer.
            drop(tell.send(format!("{error:#}")));
            Taken::Gone
        }
    });
    hand.preparing.set(hand.preparing.get() + 1);
    let encoded = encoder.encode(take).await;
    hand.preparing.set(hand.preparing.get() - 1);
    match encoded {
        Encoded::Gone => Err(told.try_recv().unwrap_or_else(|_| "could not be read".into())),
        Encoded::Flawed { refusal, receipt, .. } => {
            drop(receipt);
            Err(format!("{}: {}", refusal.reason, refusal.message))
        }
        Encoded::Ready { frame, body, receipt } => {
            let outcome = publisher.publish(&frame, body.bytes(), || {}).await;
            drop(receipt);
            match outcome {
                Outcome::Accepted => Ok(()),
                Outcome::Refused(refusal) => Err(format!("{}: {}", refusal.reason, refusal.message)),
                Outcome::Released { said } => Err(left(&publisher.status(), said)),
            }
        }
    }
}

/// Why a file was left: the engine's state says most; else what it said to this file.
fn left(status: &EngineStatus, said: Option<String>) -> String {
    match status.state {
        State::Open => said.unwrap_or_else(|| "not tried".to_owned()),
        State::Unreachable
        | State::Credentials
        | State::Forbidden
        | State::Rejecting
        | State::UnexpectedAnswer
        | State::Throttled
        | State::Failing => status.describe(),
    }
}

fn read(path: &Path, max_frame: u64, whose: &Whose, buffer: &mut Vec<u8>) -> anyhow::Result<Frame> {
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits())?;
    let file = File::options().read(true).custom_flags(nonblock).open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        bail!("not a regular file");
    }
    if meta.len() > max_frame {
        bail!("too-large: {} bytes; encode.max_frame is {max_frame}", meta.len());
    }
    file.take(max_frame + 1).read_to_end(buffer)?;
    let name = path.file_name().unwrap_or_default().as_bytes();
    let now = Timestamp::now();
    // An absurd one is replaced by now, as the daemon would replace it by the time of arrival.
    let (detect_time, _corrected) = whose.finder.find(name, buffer, nanoseconds(&meta), now, now);
    Ok(Frame {
        id: FrameId::generate(),
        detector: whose.detector.clone(),
        detect_time,
        received_at: now,
        noticed: Instant::now(),
        source: SourceKind::CommandLine,
        original_name: OsString::from(path),
        image_bytes: buffer.len() as u64,
    })
}

/// When it was modified, since 1970.
fn nanoseconds(meta: &Metadata) -> i64 {
    meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec())
}

fn progress_bar(total: u64) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{bar:40.cyan} {pos}/{len} ({per_sec}, {eta} left)");
    ProgressBar::with_draw_target(Some(total), target)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn summary(total: usize, took: Duration, failed: &[(PathBuf, String)]) -> anyhow::Result<ExitCode> {
    use std::fmt::Write as _;
    let mut text = format!("{} of {total} published in {:.1} s\n", total - failed.len(), took.as_secs_f64());
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for (path, why) in failed.iter().take(LISTED_MAX) {
        writeln!(text, "  failed: {}: {why}", path.display().to_string().escape_debug())?;
    }
    for (_, why) in failed {
        *reasons.entry(why.split(':').next().unwrap_or(why)).or_default() += 1;
    }
    if failed.len() > LISTED_MAX {
        writeln!(text, "  … and {} more", failed.len() - LISTED_MAX)?;
    }
    for (reason, count) in reasons {
        writeln!(text, "{count} × {reason}")?;
    }
    super::print(&text)?;
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_named_by_a_link_is_searched_and_links_in_it_are_not_followed() {
        let place = tempfile::tempdir().unwrap();
        let (real, link) = (place.path().join("real"), place.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::fs::write(real.join("a.jpg"), "x").unwrap();
        std::os::unix::fs::symlink("/", real.join("loop.jpg")).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(find(std::slice::from_ref(&link)).unwrap(), [link.join("a.jpg")]);
    }
}

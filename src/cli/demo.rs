//! `framegate demo`: drawn faces, the simulated engine and the real daemon on loopback, in a temporary directory that is
//! gone afterwards. The configuration is a file like anybody's, read by the same code.

use std::fmt::Write as _;
use std::fs;
use std::io::IsTerminal as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::{self, Environment};
use crate::daemon::{Daemon, Status, Surroundings};
use crate::log;
use crate::metrics::Metrics;
use crate::notify::Notify;
use crate::simulator::{self, Simulator, faces};

/// Different drawings; each frame is one of them with a number of its own inside.
const FACES: u64 = 16;
/// About the size of a face crop from a common camera, in bytes.
const FACE_BYTES: usize = 40 * 1024;
/// How often the display is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(200);
/// How soon a camera that waits for its next frame notices that the demo ends.
const STOP_LOOK_EVERY: Duration = Duration::from_millis(50);
/// While frames wait, without progress for this long, the demo gives up and says what is missing.
const STALLED_AFTER: Duration = Duration::from_mins(1);
const DELIVERY_SUM: &str = "framegate_frame_delivery_seconds_sum";
const DELIVERY_COUNT: &str = "framegate_frame_delivery_seconds_count";
/// Frames that one run may ask for: they are files in the temporary directory until they are published.
const FRAMES_MAX: u64 = 1_000_000;

/// Arguments of `framegate demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  framegate demo
  framegate demo --frames 20000 --detectors 8
  framegate demo --errors 0.3 --rate 200      three in ten attempts fail, nothing is lost")]
pub(super) struct Args {
    /// How many frames
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=FRAMES_MAX))]
    frames: u64,
    /// How many detectors
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    detectors: u64,
    /// Frames written per second, all detectors together; 0 = as fast as the disk allows
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    /// Share of the engine's answers that are errors, 0 to 0.9
    #[arg(long, default_value_t = 0.0)]
    errors: f64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if !(0.0..=0.9).contains(&args.errors) {
        anyhow::bail!("--errors {} is not a share from 0 to 0.9", args.errors);
    }
    if !(args.rate >= 0.0 && args.rate.is_finite()) {
        anyhow::bail!("--rate {} is not a number of frames per second", args.rate);
    }
    let log = log::init(&log::Config { level: "error".into(), ..log::Config::default() })?;
    let runtime = super::runtime()?;
    // Before there is anything that must not be left behind.
    let interrupted = runtime.block_on(async { interruption() })?;
    let home =
        tempfile::Builder::new().prefix("framegate-demo-").tempdir().context("cannot make a temporary directory")?;
    let result = runtime.block_on(demo(args, home.path(), log, interrupted));
    runtime.shutdown_timeout(Duration::from_secs(1));
    home.close().context("cannot remove the demo's temporary directory")?;
    result
}

/// Ctrl-C or SIGTERM, from now on.
fn interruption() -> anyhow::Result<impl Future<Output = ()>> {
    let mut int = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let mut term = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    Ok(async move {
        tokio::select! {
            _ = int.recv() => {}
            _ = term.recv() => {}
        }
    })
}

async fn demo(
    args: &Args,
    home: &Path,
    log: log::Handle,
    interrupted: impl Future<Output = ()>,
) -> anyhow::Result<ExitCode> {
    let engine = Simulator::start(simulator::Options::default()).await?;
    engine.change(|faults| faults.error_rate = args.errors);
    let site = Site::build(home, &engine, args.detectors)?;
    let loaded =
        config::load(&site.config, &Environment::default()).map_err(|problems| anyhow::anyhow!("{problems}"))?;
    let surroundings = Surroundings { config_file: None, log: Some(log), notify: Arc::new(Notify::silent()) };
    let mut daemon = Daemon::start(loaded.settings, surroundings).await?;
    super::print(&format!(
        "{} frames from {} detectors → engine at {} (simulated); metrics at http://{}/metrics\n",
        args.frames,
        args.detectors,
        engine.base_url(),
        daemon.admin()
    ))?;

    let camera = Arc::new(Camera::default());
    let cameras = tokio::task::spawn_blocking({
        let (camera, detectors, frames, rate) = (camera.clone(), site.detectors.clone(), args.frames, args.rate);
        move || camera.shoot(&detectors, frames, rate)
    });
    let metrics = daemon.metrics();
    let (stop, hurry) = (CancellationToken::new(), CancellationToken::new());
    let (_sighup, reloads) = mpsc::channel(1);
    let started = Instant::now();
    let end = tokio::select! {
        end = watch(args, &metrics, &camera) => Ok(end),
        ended = daemon.run(stop.clone(), reloads) => ended.map(|()| End::Interrupted),
        () = interrupted => Ok(End::Interrupted),
    };
    let took = started.elapsed();
    camera.stop.store(true, Ordering::Relaxed);
    cameras.await?.context("cannot write the demo's frames")?;
    let status = daemon.status();
    daemon.stop(hurry).await;
    let text = metrics.render();
    engine.stop().await;
    finish(args, &status, &text, camera.written.load(Ordering::Relaxed), took, end?)
}

/// The drop directories and the configuration that serves them.
struct Site {
    config: PathBuf,
    detectors: Vec<PathBuf>,
}

impl Site {
    fn build(home: &Path, engine: &Simulator, detectors: u64) -> anyhow::Result<Self> {
        let password = home.join("engine-password");
        let file = fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&password)?;
        std::io::Write::write_all(&mut &file, engine.password().as_bytes())?;
        let mut text = format!(
            "[engine]\nbase_url = \"{}\"\nusername = \"{}\"\npassword_file = \"engine-password\"\n\
             [dead_letter]\ndirectory = \"{}\"\n[admin]\nlisten = \"127.0.0.1:0\"\ncontrol = \"{}\"\n",
            engine.base_url(),
            engine.username(),
            home.join("dead-letter").display(),
            home.join("control.sock").display()
        );
        let mut dirs = Vec::new();
        for n in 1..=detectors {
            let dir = home.join(format!("camera-{n}"));
            fs::create_dir(&dir)?;
            write!(
                text,
                "[[detectors]]\nname = \"DemoCam{n}\"\ntime_zone = \"America/Los_Angeles\"\ndirectory = {{ path = \"{}\" }}\n",
                dir.display()
            )?;
            dirs.push(dir);
        }
        let config = home.join("framegate.toml");
        fs::write(&config, text)?;
        Ok(Self { config, detectors: dirs })
    }
}

/// What writes the frames, as face detectors do: under a passing name, then renamed.
#[derive(Default)]
struct Camera {
    written: AtomicU64,
    stop: AtomicBool,
}

impl Camera {
    fn shoot(&self, detectors: &[PathBuf], frames: u64, rate: f64) -> std::io::Result<()> {
        let faces: Vec<_> = (0..FACES.min(frames)).map(|seed| faces::face(seed, FACE_BYTES)).collect();
        let started = std::time::Instant::now();
        for n in 0..frames {
            // The first at once, whatever the rate; one that is due after the end of time, never.
            let due =
                if n == 0 || rate == 0.0 { Ok(Duration::ZERO) } else { Duration::try_from_secs_f64(n as f64 / rate) };
            let due = due.unwrap_or(Duration::MAX);
            while !self.stop.load(Ordering::Relaxed) && started.elapsed() < due {
                std::thread::sleep(due.saturating_sub(started.elapsed()).min(STOP_LOOK_EVERY));
            }
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let pick = |of: usize| usize::try_from(n).unwrap_or(0) % of;
            let dir = &detectors[pick(detectors.len())];
            let part = dir.join(format!("{n:07}.jpg.part"));
            fs::write(&part, faces::face_variant(&faces[pick(faces.len())], n))?;
            fs::rename(&part, dir.join(format!("{n:07}.jpg")))?;
            self.written.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// How a demo ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// Every frame is settled.
    Settled,
    /// Nothing moved for [`STALLED_AFTER`].
    Stalled,
    /// Ctrl-C.
    Interrupted,
}

/// Draws the progress until every frame has been settled, or nothing moves any more.
async fn watch(args: &Args, metrics: &Metrics, camera: &Camera) -> End {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let display = MultiProgress::with_draw_target(target);
    let style =
        |template: &str| ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let all = display.add(ProgressBar::new(args.frames).with_style(style("{bar:40.green} {pos}/{len} {msg}")));
    let mut bars: Vec<ProgressBar> = Vec::new();
    let mut every = tokio::time::interval(DRAW_EVERY);
    let (mut before, mut moved) = (0, Instant::now());
    let mut latency = Latency::default();
    loop {
        every.tick().await;
        let detectors = metrics.detectors();
        let counts: Vec<_> = detectors.iter().map(|d| d.counts()).collect();
        let settled: u64 = counts.iter().map(|c| c.published + c.dead_lettered).sum();
        let rate = (settled - before) as f64 / DRAW_EVERY.as_secs_f64();
        let waiting = camera.written.load(Ordering::Relaxed).saturating_sub(settled);
        if settled != before || waiting == 0 {
            (before, moved) = (settled, Instant::now());
        }
        all.set_position(settled);
        let latency = latency.look(&metrics.render());
        all.set_message(format!("{rate:.0} frames/s, {:.1} ms, {waiting} waiting", latency * 1e3));
        for (n, (detector, count)) in detectors.iter().zip(&counts).enumerate() {
            if bars.len() <= n {
                bars.push(display.add(ProgressBar::new_spinner().with_style(style("  {msg}"))));
            }
            bars[n].set_message(format!(
                "{:<12} {:>8} published, {:>6} pending",
                detector.name, count.published, count.pending
            ));
        }
        let stalled = moved.elapsed() > STALLED_AFTER;
        if settled >= args.frames || stalled {
            all.abandon();
            bars.iter().for_each(ProgressBar::abandon);
            return if stalled { End::Stalled } else { End::Settled };
        }
    }
}

/// From noticed to accepted, of late.
#[derive(Default)]
struct Latency {
    /// Seconds and frames of all so far.
    sum: f64,
    count: f64,
    /// Seconds, the mean of the last that came.
    mean: f64,
}

impl Latency {
    fn look(&mut self, metrics: &str) -> f64 {
        let (sum, count) = (series_sum(metrics, DELIVERY_SUM), series_sum(metrics, DELIVERY_COUNT));
        if count > self.count {
            *self = Self { sum, count, mean: (sum - self.sum) / (count - self.count) };
        }
        self.mean
    }
}

fn finish(
    args: &Args,
    status: &Status,
    metrics: &str,
    written: u64,
    took: Duration,
    end: End,
) -> anyhow::Result<ExitCode> {
    let sum =
        |of: fn(&crate::metrics::DetectorCounts) -> u64| status.detectors.iter().map(|d| of(&d.counts)).sum::<u64>();
    let (published, dead, dropped) = (sum(|c| c.published), sum(|c| c.dead_lettered), sum(|c| c.dropped));
    let pending = written.saturating_sub(published + dead + dropped);
    let lost = if end == End::Settled { pending } else { 0 };
    let attempts = series_sum(metrics, "framegate_publish_attempts_total");
    let mut text = format!(
        "\n{published} published, {lost} lost, {dead} dead letters in {:.1} s ({:.0} frames/s)\n",
        took.as_secs_f64(),
        published as f64 / took.as_secs_f64()
    );
    for detector in &status.detectors {
        writeln!(text, "  {:<12} {:>8} published", detector.name, detector.counts.published)?;
    }
    if published > 0 {
        let mean = Latency::default().look(metrics);
        writeln!(text, "  {:.1} ms from noticed to accepted on average", mean * 1e3)?;
    }
    writeln!(text, "  {attempts:.0} attempts, {:.0} of them repeated", (attempts - published as f64).max(0.0))?;
    match end {
        End::Settled => {}
        End::Stalled => writeln!(
            text,
            "  stalled: nothing moved for {STALLED_AFTER:?}; {pending} of {written} frames were still waiting"
        )?,
        End::Interrupted => {
            writeln!(text, "  interrupted: {pending} of {written} written frames were not published yet")?;
        }
    }
    super::print(&text)?;
    let well = match end {
        End::Settled => published == args.frames && dead == 0,
        End::Stalled => false,
        End::Interrupted => dead == 0,
    };
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn series_sum(metrics: &str, name: &str) -> f64 {
    let ours = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    metrics.lines().filter(ours).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(rate: f64) -> Args {
        Args { frames: 10, detectors: 1, rate, errors: 0.0 }
    }

    #[test]
    fn a_slow_camera_ends_as_soon_as_it_is_stopped_and_no_rate_is_too_small_for_it() {
        let place = tempfile::tempdir().unwrap();
        let camera = Camera::default();
        let directories = [place.path().to_owned()];
        std::thread::scope(|scope| {
            let shooting = scope.spawn(|| camera.shoot(&directories, 2, f64::MIN_POSITIVE));
            while camera.written.load(Ordering::Relaxed) == 0 && !shooting.is_finished() {
                std::thread::yield_now();
            }
            camera.stop.store(true, Ordering::Relaxed);
            shooting.join().expect("no panic").unwrap();
        });
        assert_eq!(camera.written.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_latency_shown_is_that_of_the_frames_that_came_since_the_last_look() {
        let text = |sum: f64, count: u32| {
            format!("{DELIVERY_SUM}{{detector=\"A\"}} {sum}\n{DELIVERY_COUNT}{{detector=\"A\"}} {count}\n")
        };
        let mut latency = Latency::default();
        let shown =
            [text(0.0, 0), text(2.0, 4), text(2.0, 4), text(5.0, 5)].map(|text| format!("{:.1}", latency.look(&text)));
        assert_eq!(shown, ["0.0", "0.5", "0.5", "3.0"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_demo_is_stalled_only_while_frames_wait() {
        let (args, metrics, camera) = (args(0.001), Metrics::new(), Camera::default());
        let patience = 10 * STALLED_AFTER;
        let slow = tokio::time::timeout(patience, watch(&args, &metrics, &camera));
        assert!(slow.await.is_err(), "nothing is written, so nothing is late");
        camera.written.store(1, Ordering::Relaxed);
        let stalled = tokio::time::timeout(patience, watch(&args, &metrics, &camera));
        assert!(stalled.await == Ok(End::Stalled));
    }
}

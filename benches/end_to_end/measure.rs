//! One run of one side of a case: what it took. No statistics.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use tokio::runtime::Runtime;

use crate::case::{Case, Feed, Worker};
use crate::process::Process;
use crate::site::{BUDGET_MIB, CONNECTIONS, Site};

/// Figures by name; the unit is in the name.
pub(crate) type Measures = BTreeMap<String, f64>;

/// One run takes at most this, generating the files apart.
const RUN_MAX: Duration = Duration::from_mins(10);
/// Longer than `quiet`: files are complete when the clock starts.
const SETTLED: Duration = Duration::from_millis(700);
/// Between looks at what the engine has.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How long a daemon that idles is watched.
const IDLE_FOR: Duration = Duration::from_secs(10);
/// So much of a steady feed is not counted: what comes while the daemon still looks through its directory waits for that.
const WARM_UP: Duration = Duration::from_secs(2);
/// Files at once where they come by the thousand.
const THOUSAND: u64 = 1_000;
/// The adaptive limit has been reached with so much of `max_in_flight`.
const REACHED_SHARE: f64 = 0.9;

/// Where runs take place.
pub(crate) struct Place<'a> {
    /// Drop directories are made below it.
    pub parent: &'a Path,
    pub runtime: &'a Runtime,
    /// Of steady feeds, frames/s.
    pub rate: f64,
}

/// Both sides, one after the other.
pub(crate) fn round(case: &Case, place: &Place<'_>, base_first: bool) -> Measures {
    let (base, subject) = case.sides();
    let Some(base) = base else { return side(&subject, place) };
    // Whoever is second has the warmer box: they take turns at that, too.
    let (base, mut all) = if base_first {
        let base = side(&base, place);
        (base, side(&subject, place))
    } else {
        let subject = side(&subject, place);
        (side(&base, place), subject)
    };
    all.insert("throughput_ratio".into(), all["frames_per_second"] / base["frames_per_second"]);
    all.insert("cpu_ratio".into(), all["cpu_micros"] / base["cpu_micros"]);
    all.extend(base.into_iter().map(|(name, value)| (format!("base_{name}"), value)));
    all
}

fn side(case: &Case, place: &Place<'_>) -> Measures {
    let steady = matches!(case.feed, Feed::Renamed | Feed::Closed);
    let site = Site::new(case, place.parent, place.runtime, steady);
    match case.feed {
        Feed::None => idle(case, &site),
        Feed::Backlog(waiting) => {
            fill(&site, waiting.unwrap_or(case.frames));
            if waiting.is_some() {
                written_out();
            }
            let mut run = Run::of(Process::start(&mut site.command(case.worker)), &site);
            run.wait_for(case.frames);
            run.finish(case, waiting.is_none_or(|waiting| waiting == case.frames))
        }
        Feed::Thousands => thousands(case, &site),
        Feed::Renamed | Feed::Closed => steadily(case, &site, place.rate),
    }
}

/// Puts so many images in place, and waits until nobody can take them for unfinished.
pub(crate) fn fill(site: &Site, waiting: u64) {
    for n in 0..waiting {
        fs::write(site.file(n), site.image(n)).expect("a file");
    }
    sleep(SETTLED);
}

/// For those who are measured against a large backlog, which lies on the disk: a file that was never written out is cheaper to
/// remove, and writing out a million beside the run takes a core of it.
fn written_out() {
    rustix::fs::sync();
}

fn idle(case: &Case, site: &Site) -> Measures {
    let begun = Instant::now();
    let process = ready(case, site);
    let start = begun.elapsed();
    let before = process.cpu();
    sleep(IDLE_FOR);
    let cpu = process.cpu().since(before).total();
    Measures::from([
        ("ready_ms".into(), start.as_secs_f64() * 1e3),
        ("idle_cpu_percent".into(), cpu.as_secs_f64() / IDLE_FOR.as_secs_f64() * 100.0),
        ("resident_mib".into(), process.resident_mib()),
    ])
}

/// Starts the daemon and waits until it says that it is ready.
pub(crate) fn ready(case: &Case, site: &Site) -> Process {
    let at = site.path("notify");
    let socket = UnixDatagram::bind(&at).expect("a socket");
    socket.set_read_timeout(Some(RUN_MAX)).expect("a time-out");
    let process = Process::start(site.command(case.worker).env("NOTIFY_SOCKET", &at));
    let mut message = [0; 4096];
    loop {
        let n = socket.recv(&mut message).expect("the daemon gets ready");
        if message[..n].starts_with(b"READY=1") {
            return process;
        }
    }
}

fn thousands(case: &Case, site: &Site) -> Measures {
    let staged = site.path("staged");
    fs::create_dir(&staged).expect("a directory");
    for n in 0..case.frames {
        fs::write(staged.join(n.to_string()), site.image(n)).expect("a file");
    }
    written_out();
    let mut run = Run::of(ready(case, site), site);
    for n in 0..case.frames {
        if n % THOUSAND == 0 {
            run.wait_for(n);
        }
        fs::rename(staged.join(n.to_string()), site.file(n)).expect("a file");
    }
    run.wait_for(case.frames);
    run.finish(case, true)
}

fn steadily(case: &Case, site: &Site, rate: f64) -> Measures {
    let mut run = Run::of(ready(case, site), site);
    let mut closed = HashMap::new();
    let begun = Instant::now();
    for n in 0..case.frames {
        let image = site.image(n);
        sleep_until(begun + Duration::from_secs_f64(n as f64 / rate));
        let at = drop_in(site, case.feed, n, &image);
        closed.insert(sha256(&image), at);
    }
    run.wait_for(case.frames);
    let mut waits: Vec<f64> = site
        .simulator
        .accepted()
        .iter()
        .map(|frame| (closed[&frame.sha256], frame.accepted.into_std()))
        .filter(|(closed, _)| *closed > begun + WARM_UP)
        .map(|(closed, accepted)| accepted.saturating_duration_since(closed).as_secs_f64() * 1e3)
        .collect();
    waits.sort_by(f64::total_cmp);
    let mut measures = run.finish(case, true);
    for (name, share) in [("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999), ("worst_ms", 1.0)] {
        measures.insert(name.into(), quantile(&waits, share));
    }
    measures
}

/// Puts the `n`th image in its directory; when it was complete there.
pub(crate) fn drop_in(site: &Site, feed: Feed, n: u64, image: &[u8]) -> Instant {
    let file = site.file(n);
    if feed == Feed::Closed {
        fs::write(&file, image).expect("a file");
    } else {
        let part = file.with_extension("part");
        fs::write(&part, image).expect("a file");
        fs::rename(part, file).expect("renamed");
    }
    Instant::now()
}

pub(crate) fn sleep_until(due: Instant) {
    sleep(due.saturating_duration_since(Instant::now()));
}

fn sha256(image: &[u8]) -> [u8; 32] {
    digest(&SHA256, image).as_ref().try_into().expect("SHA-256 is 32 bytes")
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a length")]
fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).ceil() as usize]
}

/// A worker at work.
struct Run<'a> {
    process: Process,
    site: &'a Site,
    begun: Instant,
    looks: Vec<Look>,
}

/// What the engine had at a moment.
struct Look {
    seconds: f64,
    accepted: u64,
    in_flight: u64,
}

impl<'a> Run<'a> {
    fn of(process: Process, site: &'a Site) -> Self {
        Self { process, site, begun: Instant::now(), looks: Vec::new() }
    }

    fn wait_for(&mut self, frames: u64) {
        let begun = Instant::now();
        loop {
            let counts = self.site.simulator.counts();
            let (seconds, accepted) = (self.begun.elapsed().as_secs_f64(), counts.accepted);
            self.looks.push(Look { seconds, accepted, in_flight: counts.in_flight });
            if accepted >= frames {
                return;
            }
            assert!(begun.elapsed() < RUN_MAX, "{accepted} of {frames} frames after {RUN_MAX:?}");
            sleep(LOOK_EVERY);
        }
    }

    /// `all`: nothing is to be left.
    fn finish(self, case: &Case, all: bool) -> Measures {
        let begun = Instant::now();
        while all && !self.site.is_empty() {
            assert!(begun.elapsed() < RUN_MAX, "published files are still there after {RUN_MAX:?}");
            sleep(LOOK_EVERY);
        }
        let peak = self.process.peak_mib();
        let cpu = self.process.cpu();
        let accepted = self.site.simulator.counts().accepted;
        assert!(!all || accepted == case.frames, "{accepted} frames: some came twice");
        let last = self.looks.last().expect("one was waited for");
        let micros = |time: Duration| time.as_secs_f64() * 1e6 / accepted as f64;
        let mut measures = Measures::from([
            ("frames_per_second".into(), last.accepted as f64 / last.seconds),
            ("cpu_user_micros".into(), micros(cpu.user)),
            ("cpu_system_micros".into(), micros(cpu.system)),
            ("cpu_micros".into(), micros(cpu.total())),
            ("peak_mib".into(), peak),
        ]);
        if case.worker == Worker::Daemon {
            measures.insert("beyond_budget_mib".into(), peak - f64::from(BUDGET_MIB));
        }
        if let Some(first) = self.looks.iter().find(|look| look.accepted > 0) {
            measures.insert("first_publish_seconds".into(), first.seconds);
        }
        if !case.latency.is_zero() {
            measures.extend(self.against_theory(case.latency).unwrap_or_default());
        }
        measures
    }

    /// An engine that takes its time is used best with `max_in_flight` at once. How soon there were so many, and how near to the
    /// best the throughput was from then on, without the last frames, which leave connections idle.
    fn against_theory(&self, latency: Duration) -> Option<Measures> {
        let last = self.looks.last()?;
        let reached = self.looks.iter().find(|look| look.in_flight as f64 >= REACHED_SHARE * CONNECTIONS as f64)?;
        let end = self.looks.iter().find(|look| look.accepted as f64 >= 0.95 * last.accepted as f64)?;
        let rate = (end.accepted - reached.accepted) as f64 / (end.seconds - reached.seconds);
        let best = CONNECTIONS as f64 / latency.as_secs_f64();
        Some(Measures::from([("reached_seconds".into(), reached.seconds), ("of_theory".into(), rate / best)]))
    }
}

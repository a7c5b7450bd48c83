//! The daemon: builds everything, owns every task, and ends it in order: start → run → reload → drain → deadline.
//!
//! Not here: what a frame goes through (`pipeline`), what a signal or a command line means (`cli`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use arc_swap::ArcSwap;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::admin::page;
use crate::config::{self, Settings};
use crate::control::{Answer, Request};
use crate::encode::Encoder;
use crate::history::History;
use crate::log::Repeats;
use crate::metrics::{Condition, DetectorCounts, DetectorMetrics, Metrics};
use crate::notify::{Notify, Progress, Watchdog};
use crate::pipeline::{self, Stages};
use crate::publish::{self, EngineStatus, Publisher, State};
use crate::queue::{self, Intake};
use crate::settle::dead_letter::DeadLetters;
use crate::source::push::{self, Door};
use crate::source::spool::{self, Spool};
use crate::source::{self, Entry, Health, directory};
use crate::{admin, control, log};

/// Histograms fold their samples, gauges of the engine follow, the dead letters' janitor looks.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
/// How often the last hour is written on.
const HISTORY_EVERY: Duration = Duration::from_secs(1);
/// How often old dead letters are looked for.
const TIDY_EVERY: Duration = Duration::from_mins(1);
/// After the deadline: time for answers already on their way and for sources to take frames back.
const RELEASE_GRACE: Duration = Duration::from_secs(3);
/// While draining: how often the engine's state is looked at, and how many looks in a row must find it away.
const AWAY_LOOK_EVERY: Duration = Duration::from_millis(250);
const AWAY_LOOKS: u32 = 4;
/// Open files that are neither the engine's connections nor a source's: standard streams, the runtime, listeners (fourteen when
/// idle), and the images, scrapes and commands of the moment.
const OPEN_FILES_RESERVED: u64 = 18;
/// A purge of the spool may take this long before whoever asked is told to look again.
const PURGE_MAX: Duration = Duration::from_secs(10);
/// Control requests that may wait for the daemon's turn.
const REQUESTS_MAX: usize = 16;

/// What [`Daemon::start`] needs besides the settings.
pub struct Surroundings {
    /// Read again at a reload; `None` where there is no file (the demo).
    pub config_file: Option<PathBuf>,
    /// Changes the log level at a reload.
    pub log: Option<log::Handle>,
    /// systemd, where it listens.
    pub notify: Arc<Notify>,
}

/// A running daemon.
pub struct Daemon {
    settings: Settings,
    surroundings: Surroundings,
    shared: Arc<Shared>,
    intake: Intake,
    /// Those of now, for frames that are retried.
    entries: Arc<ArcSwap<Vec<Entry>>>,
    sources: Vec<Source>,
    source_tasks: JoinSet<()>,
    directories: directory::Shared,
    /// Outlives each source, so that two do not fight for one.
    sessions: source::Sessions,
    pipeline: JoinSet<()>,
    services: JoinSet<()>,
    stop_pipeline: CancellationToken,
    stop_services: CancellationToken,
    requests: mpsc::Receiver<(Request, oneshot::Sender<Answer>)>,
    /// systemd's socket for pushes, until it is listened on.
    inherited: Option<push::Inherited>,
    beat: Progress,
}

/// What the admin server and `/status` read while the daemon runs.
struct Shared {
    metrics: Arc<Metrics>,
    publisher: Arc<Publisher>,
    dead_letters: Arc<DeadLetters>,
    admin: SocketAddr,
    started: Instant,
    sources: Mutex<Vec<(Arc<Entry>, Health)>>,
    history: History,
    memory: queue::Meter,
    watchdog: Arc<Watchdog>,
    queues: Mutex<Queues>,
}

/// What several entries share. Once there, it lives as long as the daemon: what a spool holds is published whatever the
/// configuration says later.
#[derive(Clone, Default)]
struct Queues {
    spool: Option<Arc<Spool>>,
    push: Option<Arc<Door>>,
}

/// One running source.
struct Source {
    entry: Arc<Entry>,
    health: Health,
    stop: CancellationToken,
}

/// The `/status` document.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names are the documentation of the JSON")]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub uptime_seconds: u64,
    pub admin: SocketAddr,
    pub engine: EngineStatus,
    pub sources: Vec<SourceStatus>,
    pub detectors: Vec<DetectorStatus>,
    pub dead_letters: u64,
    pub dead_letter_bytes: u64,
    /// Frames in the spool, and what they take on disk.
    #[serde(default)]
    pub spool_frames: u64,
    #[serde(default)]
    pub spool_bytes: u64,
    /// `spool.max_size`; 0 where there is no spool.
    #[serde(default)]
    pub spool_max_bytes: u64,
    /// Bytes that frames in hand take, and those that they may take.
    #[serde(default)]
    pub memory_in_use_bytes: u64,
    #[serde(default)]
    pub memory_budget_bytes: u64,
    /// Where frames can be pushed; `null` while they cannot.
    #[serde(default)]
    pub push: Option<String>,
}

/// One `[[detectors]]` entry in `/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names are the documentation of the JSON")]
pub struct SourceStatus {
    pub name: String,
    /// Where its frames come from: a directory's path, a queue's address without secrets.
    pub place: String,
    /// Why it cannot deliver; `null` while it can.
    pub held: Option<String>,
}

/// One detector in `/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names are the documentation of the JSON")]
pub struct DetectorStatus {
    pub name: String,
    /// Frames published per second, of the last seconds.
    pub rate: f64,
    /// Mean way from noticed to accepted of the last frames, milliseconds.
    pub delivery_ms: Option<f64>,
    /// The longest way of the last half a minute to a minute, milliseconds.
    #[serde(default)]
    pub delivery_max_ms: Option<f64>,
    pub counts: DetectorCounts,
}

impl Daemon {
    /// Builds everything and starts it. The directories need not exist yet and the engine may be away.
    ///
    /// # Errors
    /// What cannot heal by itself: the admin address is taken, the dead-letter directory cannot be made, the TLS settings are unusable.
    pub async fn start(settings: Settings, surroundings: Surroundings) -> anyhow::Result<Self> {
        let metrics = Metrics::new();
        let dead_letters = DeadLetters::open(settings.dead_letter.clone(), metrics.clone())?;
        let publisher =
            Publisher::new(&settings.engine(), settings.engine_secrets(), &fitting(&settings), metrics.clone())
                .context("cannot set up publishing to the engine")?;
        tell_ceiling(&settings);
        let encoder = Encoder::start(settings.encode.workers, settings.encode.max_frame.as_u64(), metrics.clone());
        let listener = TcpListener::bind(settings.admin.listen)
            .await
            .with_context(|| format!("cannot listen on admin.listen = \"{}\"", settings.admin.listen))?;
        let admin = listener.local_addr()?;
        let (intake, outlet) = queue::queue(settings.encode.memory.as_u64(), &metrics);
        let watchdog = Watchdog::from_env(surroundings.notify.clone());
        let stop_pipeline = CancellationToken::new();
        let stop_services = CancellationToken::new();

        let shared = Arc::new(Shared {
            metrics: metrics.clone(),
            publisher: publisher.clone(),
            dead_letters: dead_letters.clone(),
            admin,
            started: Instant::now(),
            sources: Mutex::default(),
            history: History::default(),
            memory: intake.meter(),
            watchdog: watchdog.clone(),
            queues: Mutex::default(),
        });
        let (directories, served) = directory::Shared::new(metrics.clone());
        let stages = Stages {
            encoder,
            publisher: publisher.clone(),
            dead_letters,
            metrics,
            repeats: Repeats::default(),
            stop: stop_pipeline.clone(),
        };
        let mut pipeline = JoinSet::new();
        pipeline.spawn(pipeline::run(outlet, Arc::new(stages), watchdog.watch("pipeline")));

        let (ask, requests) = mpsc::channel(REQUESTS_MAX);
        let mut services = JoinSet::new();
        services.spawn({
            let stop = stop_services.clone();
            async move { publisher.run(stop).await }
        });
        services.spawn({
            let (watchdog, stop) = (watchdog.clone(), stop_services.clone());
            async move { watchdog.run(stop).await }
        });
        services.spawn(served.run(stop_services.clone()));
        services.spawn(upkeep(shared.clone(), stop_services.clone()));
        services.spawn(admin::serve(listener, Arc::new(view(&shared)), stop_services.clone()));
        match control::bind(&settings.admin.control) {
            Ok(socket) => {
                services.spawn(control::serve(socket, handler(ask), stop_services.clone()));
            }
            // A convenience: without it the daemon does its work, and says so.
            Err(error) => tracing::error!("`framegate reload` and `status` cannot reach this daemon: {error:#}"),
        }
        let mut daemon = Self {
            beat: watchdog.watch("daemon"),
            entries: Arc::new(ArcSwap::from_pointee(settings.detectors.clone())),
            settings,
            surroundings,
            shared,
            intake,
            sources: Vec::new(),
            source_tasks: JoinSet::new(),
            directories,
            sessions: source::Sessions::default(),
            pipeline,
            services,
            stop_pipeline,
            stop_services,
            requests,
            inherited: None,
        };
        daemon.start_retries();
        let settings = daemon.settings.clone();
        daemon.inherit(&settings)?;
        daemon.share(&settings);
        for entry in daemon.settings.detectors.clone() {
            daemon.start_source(entry);
        }
        daemon.shared.metrics.gauge("config_last_reload_success_timestamp_seconds", &[]).set(now_seconds());
        for result in ["success", "failure"] {
            daemon.shared.metrics.counter("config_reloads_total", &[("result", result)]).absolute(0);
        }
        Ok(daemon)
    }

    /// The metrics of this daemon.
    pub fn metrics(&self) -> Arc<Metrics> {
        self.shared.metrics.clone()
    }

    /// Where `/metrics` is served.
    pub fn admin(&self) -> SocketAddr {
        self.shared.admin
    }

    /// The status of this moment.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// Answers control requests until `stop` is cancelled; `reload` is told of each SIGHUP. Tells systemd how it goes.
    ///
    /// # Errors
    /// A part of the daemon has failed. Nothing but a new start mends that: stop, and say so.
    pub async fn run(&mut self, stop: CancellationToken, mut reload: mpsc::Receiver<()>) -> anyhow::Result<()> {
        self.surroundings.notify.ready(&self.shared.headline());
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let mut said = String::new();
        let mut control_open = true;
        loop {
            self.beat.tick();
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                Some(()) = reload.recv() => { self.reload_from_file(); }
                request = self.requests.recv(), if control_open => match request {
                    Some((request, reply)) => {
                        let answer = self.answer(request).await;
                        // Whoever asked may have gone; the work is done all the same.
                        drop(reply.send(answer));
                    }
                    None => control_open = false,
                },
                _ = tick.tick() => {
                    self.look_at_tasks()?;
                    let headline = self.shared.headline();
                    if headline != said {
                        self.surroundings.notify.status(&headline);
                        said = headline;
                    }
                }
            }
        }
    }

    /// A source ends when a reload takes it out, everything else when we stop.
    fn look_at_tasks(&mut self) -> anyhow::Result<()> {
        while let Some(ended) = self.source_tasks.try_join_next() {
            ended.context("a source failed")?;
        }
        for (what, tasks) in [("a service", &mut self.services), ("the pipeline", &mut self.pipeline)] {
            if let Some(ended) = tasks.try_join_next() {
                ended.with_context(|| format!("{what} failed"))?;
                bail!("{what} ended by itself");
            }
        }
        Ok(())
    }

    /// Takes nothing more, publishes what is in hand until the deadline, gives the rest back. `hurry` cancelled ends at once.
    pub async fn stop(mut self, hurry: CancellationToken) {
        self.surroundings.notify.stopping();
        // Draining has a deadline of its own: nobody needs to watch whether this loop turns.
        drop(self.beat);
        // Whoever asks something now hears at once that nobody answers any more.
        drop(self.requests);
        tracing::info!(deadline = ?self.settings.shutdown.deadline, "stopping: nothing more is taken; frames in hand are published until the deadline");
        for source in &self.sources {
            source.stop.cancel();
        }
        self.stop_pipeline.cancel();
        let deadline = Instant::now() + self.settings.shutdown.deadline;
        let drained = {
            let sources = async { while self.source_tasks.join_next().await.is_some() {} };
            let frames = async { while self.pipeline.join_next().await.is_some() {} };
            let engine = self.shared.publisher.clone();
            tokio::select! {
                ((), ()) = async { tokio::join!(frames, sources) } => true,
                () = tokio::time::sleep_until(deadline) => false,
                () = hurry.cancelled() => false,
                () = engine_stays_away(engine) => false,
            }
        };
        if !drained {
            tracing::info!("giving frames without an answer back to their sources");
            self.shared.publisher.stop();
            let rest = async {
                while self.pipeline.join_next().await.is_some() {}
                while self.source_tasks.join_next().await.is_some() {}
            };
            let released = tokio::select! {
                () = rest => true,
                () = tokio::time::sleep(RELEASE_GRACE) => false,
                // At once means at once: an answer that is still on its way is not waited for.
                () = hurry.cancelled() => false,
            };
            if !released {
                // Receipts drop with the pipeline's tasks: their sources see them released.
                self.pipeline.shutdown().await;
                let sources = async { while self.source_tasks.join_next().await.is_some() {} };
                if tokio::time::timeout(RELEASE_GRACE, sources).await.is_err() {
                    tracing::warn!("a source did not end in time; what it held is found again at the next start");
                }
            }
        }
        self.stop_services.cancel();
        let services = async { while self.services.join_next().await.is_some() {} };
        drop(tokio::time::timeout(RELEASE_GRACE, services).await);
        tracing::info!("stopped");
    }

    /// Takes the socket that systemd handed over, if these settings want it and nobody has it yet.
    fn inherit(&mut self, settings: &Settings) -> anyhow::Result<()> {
        let of_systemd = settings.push.listen.as_deref().map(push::Listen::parse) == Some(Ok(push::Listen::Systemd));
        let pushed = settings.detectors.iter().any(|entry| matches!(entry.source, source::Config::Push(_)));
        if of_systemd && pushed && self.inherited.is_none() && self.shared.queues().push.is_none() {
            self.inherited = Some(push::take_inherited()?);
        }
        Ok(())
    }

    /// Starts what several entries share, if one of them needs it, and tells what is there of these settings.
    fn share(&mut self, settings: &Settings) {
        let entries: Vec<_> = settings.detectors.iter().cloned().map(Arc::new).collect();
        let mut queues = self.shared.queues();
        let wanted = entries.iter().any(|entry| spool::serves(entry));
        if queues.spool.is_none() && (wanted || spool::holds_frames(&settings.spool.directory)) {
            let (spool, inbox) = Spool::new(&settings.spool, self.intake.clone(), self.shared.metrics.clone());
            self.source_tasks.spawn(spool::run(spool.clone(), inbox, self.stop_pipeline.child_token()));
            queues.spool = Some(spool);
        }
        if let Some(spool) = &queues.spool {
            spool.reconfigure(&settings.spool, &entries);
        }
        let pushed = entries.iter().any(|entry| matches!(entry.source, source::Config::Push(_)));
        if let (None, Some(_), Some(spool), true) = (&queues.push, &settings.push.listen, &queues.spool, pushed) {
            let inherited = self.inherited.take();
            let places = settings.secret_places.clone();
            let files = Arc::new(move |file: &Path| places.resolve(file));
            let max_frame = settings.encode.max_frame.as_u64();
            let door = Door::new(&settings.push, files, spool.clone(), self.shared.metrics.clone(), max_frame);
            // Before the first request can come.
            door.reconfigure(&settings.push, &entries);
            self.source_tasks.spawn(push::serve(door.clone(), inherited, self.stop_pipeline.child_token()));
            queues.push = Some(door);
        }
        if let Some(door) = &queues.push {
            door.reconfigure(&settings.push, &entries);
        }
        *self.shared.queues.lock().unwrap_or_else(PoisonError::into_inner) = queues;
    }

    fn start_source(&mut self, entry: Entry) {
        let entry = Arc::new(entry);
        let health = Health::default();
        let stop = CancellationToken::new();
        let places = self.settings.secret_places.clone();
        let Queues { spool, push } = self.shared.queues();
        let around = source::Surroundings {
            entry: entry.clone(),
            intake: self.intake.clone(),
            metrics: self.shared.metrics.clone(),
            directories: self.directories.clone(),
            sessions: self.sessions.clone(),
            max_frame: self.settings.encode.max_frame.as_u64(),
            health: health.clone(),
            spool,
            push,
            files: Arc::new(move |file| places.resolve(file)),
            stop: stop.clone(),
        };
        self.source_tasks.spawn(source::serve(around));
        self.sources.push(Source { entry, health, stop });
        self.publish_sources();
    }

    /// Dead letters that an operator sent back are a source too; it lives as long as the daemon.
    fn start_retries(&mut self) {
        let stop = self.stop_pipeline.child_token();
        let (letters, intake, metrics) =
            (self.shared.dead_letters.clone(), self.intake.clone(), self.shared.metrics.clone());
        self.source_tasks.spawn(source::retry::run(letters, self.entries.clone(), intake, metrics, stop));
    }

    /// Lets `/status` and `/readyz` see the sources of now.
    fn publish_sources(&self) {
        let now = self.sources.iter().map(|s| (s.entry.clone(), s.health.clone())).collect();
        *self.shared.sources.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    async fn answer(&mut self, request: Request) -> Answer {
        match request {
            Request::Reload => self.reload_from_file(),
            Request::Status => match serde_json::to_value(self.shared.status()) {
                Ok(data) => Answer::done("", data),
                Err(error) => Answer::refused(error.to_string()),
            },
            Request::CountDeadLetters => {
                self.shared.dead_letters.changed();
                Answer::done("", serde_json::Value::Null)
            }
            Request::PurgeSpool { which } => self.purge_spool(which).await,
        }
    }

    async fn purge_spool(&self, which: spool::Which) -> Answer {
        let Some(spool) = self.shared.queues().spool else { return Answer::refused("this daemon has no spool") };
        match tokio::time::timeout(PURGE_MAX, spool.purge(which)).await {
            Ok(Ok(purged)) => Answer::done("", serde_json::json!(purged)),
            Ok(Err(why)) => Answer::refused(why),
            Err(_) => Answer::refused("the spool's disk is slow: look again with `framegate spool list`"),
        }
    }

    fn reload_from_file(&mut self) -> Answer {
        let Some(path) = self.surroundings.config_file.clone() else {
            return Answer::refused("this daemon has no configuration file");
        };
        self.surroundings.notify.reloading();
        let result = self.reload(&path);
        self.surroundings.notify.ready(&self.shared.headline());
        let label = if result.is_ok() { "success" } else { "failure" };
        self.shared.metrics.counter("config_reloads_total", &[("result", label)]).increment(1);
        match result {
            Ok(message) => {
                self.shared.metrics.gauge("config_last_reload_success_timestamp_seconds", &[]).set(now_seconds());
                tracing::info!("configuration reloaded: {message}");
                Answer::done(message, serde_json::Value::Null)
            }
            Err(error) => {
                let message = format!("{error:#}");
                tracing::error!("the new configuration is refused, the old one goes on: {message}");
                Answer::refused(message)
            }
        }
    }

    /// Applies what changed and leaves alone what did not. Nothing is applied unless all of it can be.
    fn reload(&mut self, path: &Path) -> anyhow::Result<String> {
        let loaded = config::load(path, &config::Environment::from_process())
            .map_err(|problems| anyhow::anyhow!("{problems}"))?;
        for warning in &loaded.warnings {
            tracing::warn!("{warning}");
        }
        let new = loaded.settings;
        let changes = config::diff(&self.settings, &new);
        // What can fail comes first, the engine last of it: nothing of a refused configuration may count.
        self.inherit(&new)?;
        // Whoever reloads while publishing is paused has mended something, perhaps only inside a secret's file.
        let paused = self.shared.publisher.status().state != State::Open;
        let publish = fitting(&new);
        if changes.engine || publish != fitting(&self.settings) || paused {
            self.shared
                .publisher
                .reconfigure(&new.engine(), new.engine_secrets(), &publish)
                .context("cannot set up publishing to the engine")?;
        }
        if changes.publish {
            tell_ceiling(&new);
        }
        if let Some(log) = &self.surroundings.log
            && let Err(error) = log.set_level(&new.log.level)
        {
            tracing::warn!("log.level stays as it is: {error:#}");
        }
        self.shared.dead_letters.reconfigure(new.dead_letter.max_size, new.dead_letter.max_age);
        self.intake.set_budget(new.encode.memory.as_u64());
        self.share(&new);
        let (gone, kept): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.sources).into_iter().partition(|source| !new.detectors.contains(&source.entry));
        self.sources = kept;
        for source in &gone {
            // It settles what it has in hand, gives the rest back, and ends by itself.
            source.stop.cancel();
        }
        // Sources find their secrets where the new configuration says.
        self.settings = new.clone();
        let mut added = 0;
        for entry in &new.detectors {
            if !self.sources.iter().any(|source| *source.entry == *entry) {
                self.start_source(entry.clone());
                added += 1;
            }
        }
        self.publish_sources();
        self.entries.store(Arc::new(new.detectors.clone()));
        let mut message = format!(
            "{} detector entries unchanged, {added} started, {} stopped",
            self.sources.len() - added,
            gone.len()
        );
        if !changes.needs_restart.is_empty() {
            message.push_str("; needs a restart to take effect: ");
            message.push_str(&changes.needs_restart.join(", "));
        }
        Ok(message)
    }
}

/// `[publish]` as the limit on open files allows it.
fn fitting(settings: &Settings) -> publish::Config {
    let sources = source::OPEN_FILES_PER_ENTRY * settings.detectors.len() as u64;
    settings.publish.fitting(OPEN_FILES_RESERVED + sources)
}

fn tell_ceiling(settings: &Settings) {
    let (asked, now) = (settings.publish.max_in_flight, fitting(settings).max_in_flight);
    if now < asked {
        tracing::warn!(
            "publish.max_in_flight is {asked}, but the limit on open files leaves room for {now}; raise it (systemd: LimitNOFILE, shell: ulimit -n)"
        );
    }
}

impl Shared {
    fn queues(&self) -> Queues {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn sources(&self) -> Vec<(Arc<Entry>, Health)> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn status(&self) -> Status {
        let sources = self.sources();
        let detectors: Vec<_> = self.detectors().map(|it| self.detector_status(&it)).collect();
        let (dead_letters, dead_letter_bytes) = self.dead_letters.totals();
        let Queues { spool, push } = self.queues();
        let (spool_frames, spool_bytes) = spool.as_ref().map_or((0, 0), |spool| spool.totals());
        let (memory_in_use_bytes, memory_budget_bytes) = self.memory.bytes();
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            admin: self.admin,
            engine: self.publisher.status(),
            sources: sources.iter().map(|(entry, health)| Self::source_status(entry, health)).collect(),
            detectors,
            dead_letters,
            dead_letter_bytes,
            spool_frames,
            spool_bytes,
            spool_max_bytes: spool.map_or(0, |spool| spool.max_bytes()),
            memory_in_use_bytes,
            memory_budget_bytes,
            push: push.and_then(|door| door.address()),
        }
    }

    /// Those that are served or ever had a frame. What a family refuses for want of a name is counted by the entry's own
    /// name, which is no detector's.
    fn detectors(&self) -> impl Iterator<Item = Arc<DetectorMetrics>> {
        let detectors = self.metrics.detectors().into_iter();
        detectors.filter(|detector| detector.is_served() || detector.counts().received > 0)
    }

    fn detector_status(&self, detector: &DetectorMetrics) -> DetectorStatus {
        let now = self.history.now(&detector.name);
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        DetectorStatus {
            name: detector.name.to_string(),
            rate: now.rate,
            delivery_ms: now.delivery.map(millis),
            delivery_max_ms: now.delivery_max.map(millis),
            counts: detector.counts(),
        }
    }

    fn source_status(entry: &Entry, health: &Health) -> SourceStatus {
        SourceStatus { name: entry.name.clone(), place: entry.place(), held: health.held() }
    }

    /// What the status page shows.
    fn shown(&self) -> page::Shown {
        let status = self.status();
        let mut dead_lettered = BTreeMap::new();
        for (reason, count) in self.metrics.detectors().iter().flat_map(|detector| detector.dead_lettered_by_reason()) {
            *dead_lettered.entry(reason).or_default() += count;
        }
        let held = |source: &SourceStatus| Some((source.name.clone(), source.place.clone(), source.held.clone()?));
        let Queues { spool, .. } = self.queues();
        page::Shown {
            version: status.version,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            uptime: self.started.elapsed(),
            now: Timestamp::now(),
            engine: status.engine,
            held: status.sources.iter().filter_map(held).collect(),
            detectors: self.detectors().map(|detector| self.row(&detector)).collect(),
            spool: spool.map(|_| (status.spool_frames, status.spool_bytes)),
            dead_letters: (status.dead_letters, status.dead_letter_bytes),
            dead_lettered: dead_lettered.into_iter().collect(),
        }
    }

    /// A detector's row on the status page.
    fn row(&self, detector: &DetectorMetrics) -> page::Row {
        let (counts, now) = (detector.counts(), self.history.now(&detector.name));
        page::Row {
            name: detector.name.to_string(),
            condition: counts.condition(),
            alarm: detector.alarm(),
            rate: now.rate,
            delivery: now.delivery,
            pending: counts.pending,
            last_frame: counts.last_frame_ms.and_then(|ms| Timestamp::from_millisecond(ms).ok()),
            published: counts.published,
            hour: self.history.hour(&detector.name),
        }
    }

    /// One line for `systemctl status`.
    fn headline(&self) -> String {
        let counts = self
            .metrics
            .detectors()
            .iter()
            .map(|d| d.counts())
            .fold((0, 0), |(published, pending), c| (published + c.published, pending + c.pending));
        let held = self.sources().iter().filter(|(_, health)| health.held().is_some()).count();
        let held = if held > 0 { format!("; {held} detectors held") } else { String::new() };
        let state = self.publisher.status().state.as_str();
        format!("engine {state}; {} published, {} pending{held}", counts.0, counts.1)
    }
}

fn view(shared: &Arc<Shared>) -> admin::View {
    let (alive, ready, status, shown) = (shared.clone(), shared.clone(), shared.clone(), shared.clone());
    admin::View {
        metrics: shared.metrics.clone(),
        alive: Box::new(move || alive.watchdog.alive()),
        ready: Box::new(move || {
            let not_ready = |(entry, health): &(Arc<Entry>, Health)| match health.get() {
                source::State::Ok => None,
                source::State::Starting => Some(format!("detector {}: has not looked for frames yet", entry.name)),
                source::State::Held(why) => Some(format!("detector {}: {why}", entry.name)),
            };
            let mut reasons: Vec<_> = ready.sources().iter().filter_map(not_ready).collect();
            if let Err(error) = ready.dead_letters.usable() {
                reasons.push(format!("dead_letter.directory: {error}"));
            }
            // Where an entry uses it, that says so already.
            if let Some(why) = ready.queues().spool.and_then(|spool| spool.held())
                && !reasons.iter().any(|reason| reason.ends_with(&why))
            {
                reasons.push(why);
            }
            reasons
        }),
        status: Box::new(move || serde_json::to_value(status.status()).unwrap_or_default()),
        shown: Box::new(move || shown.shown()),
    }
}

/// Everything that is done now and then.
async fn upkeep(shared: Arc<Shared>, stop: CancellationToken) {
    let mut every = tokio::time::interval(UPKEEP_EVERY);
    let mut look = tokio::time::interval(HISTORY_EVERY);
    let mut tidied: Option<Instant> = None;
    let mut silent = BTreeSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {
                shared.history.look(&shared.metrics, Instant::now());
                tell_silence(&shared.metrics, &mut silent);
                continue;
            }
            _ = every.tick() => shared.metrics.upkeep(),
            () = shared.dead_letters.until_changed() => tidied = None,
        }
        if tidied.is_none_or(|at| at.elapsed() >= TIDY_EVERY) {
            tidied = Some(Instant::now());
            let letters = shared.dead_letters.clone();
            match tokio::task::spawn_blocking(move || letters.tidy()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!("cannot tidy the dead letters: {error:#}"),
                Err(error) => tracing::error!("tidying the dead letters failed: {error}"),
            }
        }
    }
}

/// Says once when a detector has been silent for longer than its alarm, and once when it is heard again. One that is held, or not
/// configured any more, is neither.
fn tell_silence(metrics: &Metrics, silent: &mut BTreeSet<Arc<str>>) {
    for detector in metrics.detectors() {
        match detector.counts().condition() {
            Condition::Silent => {
                if silent.insert(detector.name.clone()) {
                    tracing::warn!(detector = %detector.name, "no frame for longer than its silence_alarm: does its camera run?");
                }
            }
            Condition::Well => {
                if silent.remove(&detector.name) {
                    tracing::info!(detector = %detector.name, "frames come again");
                }
            }
            Condition::Held | Condition::Gone => {
                silent.remove(&detector.name);
            }
        }
    }
}

/// Hands each request to the daemon's own loop and waits for its answer.
fn handler(ask: mpsc::Sender<(Request, oneshot::Sender<Answer>)>) -> control::Handler {
    Arc::new(move |request| {
        let ask = ask.clone();
        Box::pin(async move {
            let (reply, answer) = oneshot::channel();
            if ask.send((request, reply)).await.is_err() {
                return Answer::refused("the daemon is stopping");
            }
            answer.await.unwrap_or_else(|_| Answer::refused("the daemon is stopping"))
        })
    })
}

/// Resolves once the engine has been away, with nothing under way to it, for a while: draining on would help nobody.
async fn engine_stays_away(publisher: Arc<Publisher>) {
    let mut every = tokio::time::interval(AWAY_LOOK_EVERY);
    let mut away = 0;
    while away < AWAY_LOOKS {
        every.tick().await;
        let status = publisher.status();
        away = if status.state == State::Open || status.in_flight > 0 { 0 } else { away + 1 };
    }
}

fn now_seconds() -> f64 {
    Timestamp::now().as_millisecond() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    async fn daemon(home: &Path) -> Daemon {
        let shown = home.display();
        std::fs::write(home.join("password"), "secret").unwrap();
        std::fs::set_permissions(home.join("password"), std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::create_dir(home.join("drop")).unwrap();
        let text = format!(
            "[engine]\nbase_url = 'http://127.0.0.1:9'\nusername = 'u'\npassword_file = 'password'\n\
             [dead_letter]\ndirectory = '{shown}/dead'\n[admin]\nlisten = '127.0.0.1:0'\ncontrol = '{shown}/control'\n\
             [[detectors]]\nname = 'Lobby'\ntime_zone = 'UTC'\ndirectory.path = '{shown}/drop'\n"
        );
        let file = home.join("framegate.toml");
        std::fs::write(&file, text).unwrap();
        let settings = config::load(&file, &config::Environment::default()).unwrap().settings;
        let surroundings = Surroundings { config_file: None, log: None, notify: Arc::new(Notify::silent()) };
        Daemon::start(settings, surroundings).await.unwrap()
    }

    #[tokio::test]
    async fn a_part_that_fails_or_ends_by_itself_ends_the_daemon_with_an_error() {
        type Part = fn(&mut Daemon) -> &mut JoinSet<()>;
        let parts: [(Part, &str); 3] = [
            (|it| &mut it.source_tasks, "a source failed"),
            (|it| &mut it.services, "a service failed"),
            (|it| &mut it.pipeline, "the pipeline failed"),
        ];
        for (part, said) in parts {
            let home = tempfile::tempdir().unwrap();
            let mut daemon = daemon(home.path()).await;
            part(&mut daemon).spawn(async { panic!("on purpose") });
            let (_reload, reloads) = mpsc::channel(1);
            let ended = tokio::time::timeout(PATIENCE, daemon.run(CancellationToken::new(), reloads));
            let error = format!("{:#}", ended.await.expect("it ends by itself").unwrap_err());
            assert!(error.starts_with(said) && error.contains("on purpose"), "{error}");
            daemon.stop(CancellationToken::new()).await;
        }
    }
}

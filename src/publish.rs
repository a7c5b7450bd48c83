//! Publishing: one frame's attempts until the engine has it, or it is plain that the frame is at fault, or the daemon stops.
//!
//! `line` decides who may try when and whose fault a failure is; `desk` is where frames wait for it; `engine` sends; `verdict` says
//! what an answer means; `token` logs in; `limit` and `backoff` are arithmetic. This file ties them together: it waits, sends, logs
//! and counts. No frame is ever held up by a wait in here that `stop` or `reconfigure` would not end, except by its own request in
//! flight.
//!
//! Timers, logins and renewals live in [`Publisher::run`]: without it running, nobody is let through to the engine.

mod backoff;
mod counts;
mod desk;
pub mod engine;
pub mod examine;
mod limit;
mod line;
mod state;
pub mod tls;
mod token;
mod verdict;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::FutureExt as _;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::backoff::Backoff;
use self::counts::Handles;
use self::desk::{Desk, Seat};
use self::engine::Client;
use self::line::{CaseId, Ended, Line, Next, Settings, Signal};
pub use self::state::State;
use self::token::Tokens;
use self::verdict::{Reply, SendError, Verdict, judge};
use crate::frame::Frame;
use crate::metrics::Metrics;
use crate::settle::Refusal;

/// How often a token file is looked at.
const TOKEN_FILE_INTERVAL: Duration = Duration::from_secs(10);
/// Failed attempts are told at most this often, in one line.
const FAILURES_INTERVAL: Duration = Duration::from_mins(1);
/// How often an insecure connection and a lasting pause are said again.
const REMINDER_INTERVAL: Duration = Duration::from_hours(1);
/// No clock skew is known yet.
const NO_SKEW: i64 = i64::MIN;

/// `[publish]`: how fast, how many at once, how often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Attempts per second of the whole box, retries and logins included; 0: no limit.
    pub rate: f64,
    /// Attempts that may follow each other at once after a quiet time; 0: one second's worth of `rate`.
    pub burst: u32,
    /// How many frames are published at a time at most; how many really are follows from the engine's answers.
    pub max_in_flight: usize,
    /// Attempts for one frame that the engine answers with a server error while it takes others; then it becomes a dead letter.
    pub attempts: u32,
    /// The shortest wait before another attempt.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub backoff_min: Duration,
    /// The longest wait before another attempt.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub backoff_max: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            rate: 0.0,
            burst: 0,
            max_in_flight: 64,
            attempts: 8,
            backoff_min: Duration::from_millis(200),
            backoff_max: Duration::from_secs(30),
        }
    }
}

impl Config {
    /// With no more attempts in flight than this process may open files: each is a connection, and `others` are needed for the rest.
    #[must_use]
    pub fn fitting(&self, others: u64) -> Self {
        let open_files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        Self { max_in_flight: limit::fitting(self.max_in_flight, open_files, others), ..self.clone() }
    }

    fn settings(&self) -> anyhow::Result<Settings> {
        if !self.rate.is_finite() || self.rate < 0.0 {
            bail!("publish.rate: {} is no rate; it must be 0 (no limit) or more", self.rate);
        }
        if self.max_in_flight == 0 || self.attempts == 0 {
            bail!("publish.max_in_flight and publish.attempts must be at least 1");
        }
        Ok(Settings {
            rate: self.rate,
            burst: self.burst,
            max_in_flight: self.max_in_flight,
            attempts: self.attempts,
            backoff: Backoff::try_new(self.backoff_min, self.backoff_max).context("publish")?,
        })
    }
}

/// What came of publishing a frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The engine has it.
    Accepted,
    /// The engine takes others, but not this one: a dead letter.
    Refused(Refusal),
    /// The publisher stops; nothing is decided.
    Released {
        /// What came of the last attempt, for people; `None` if there was none.
        said: Option<String>,
    },
}

/// What `/status` says about the engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineStatus {
    /// One of the values of `engine_state`.
    pub state: State,
    /// Since when.
    pub since: Timestamp,
    /// What led to it, for people.
    pub reason: String,
    /// What to do about it; empty if nothing.
    pub advice: String,
    /// Attempts that may be in flight now.
    pub concurrency_limit: usize,
    /// Attempts in flight.
    pub in_flight: usize,
    /// Frames that wait for their turn or their next try.
    pub waiting: usize,
    /// When the token in use expires, if it says so.
    pub token_expires: Option<Timestamp>,
    /// This box's clock minus the engine's.
    pub clock_skew_seconds: Option<f64>,
    /// The certificate is not verified.
    pub insecure: bool,
}

impl EngineStatus {
    /// In one line, for people: what it is, without what to do.
    pub fn summary(&self) -> String {
        let mut text = self.state.as_str().to_owned();
        if !self.reason.is_empty() && self.state != State::Open {
            text.extend([": ", &self.reason]);
        }
        text
    }

    /// In one line, for people.
    pub fn describe(&self) -> String {
        let mut text = self.summary();
        if !self.advice.is_empty() {
            text.extend([" (", &self.advice, ")"]);
        }
        text
    }
}

/// The way to the engine, shared by all frames.
pub struct Publisher {
    live: ArcSwap<Live>,
    desk: Mutex<Desk>,
    /// The next timer is earlier than the one that is slept for.
    timer: Notify,
    /// A token is wanted, or the engine is another.
    token: Notify,
    /// An attempt failed.
    failure: Notify,
    metrics: Arc<Metrics>,
    handles: Handles,
    skew_ms: AtomicI64,
}

/// What a reload replaces.
struct Live {
    client: Client,
    tokens: Tokens,
    insecure: bool,
    replaced: CancellationToken,
}

impl Publisher {
    /// Sets up the client; connects to nothing.
    ///
    /// # Errors
    /// If the configuration cannot work: a URL that is none, a CA file that cannot be read, a rate below zero.
    pub fn new(
        engine: &engine::Config,
        secrets: engine::Secrets,
        publish: &Config,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Arc<Self>> {
        let settings = publish.settings()?;
        let live = Live::new(engine, secrets, publish, &metrics)?;
        let handles = Handles::new(&metrics);
        handles.show_state(State::Open);
        Ok(Arc::new(Self {
            live: ArcSwap::from_pointee(live),
            desk: Mutex::new(Desk {
                line: Line::new(settings),
                seats: HashMap::new(),
                armed: None,
                since: Timestamp::now(),
                failures: 0,
                last_failure: String::new(),
                shown: None,
                held: Duration::ZERO,
            }),
            timer: Notify::new(),
            token: Notify::new(),
            failure: Notify::new(),
            metrics,
            handles,
            skew_ms: AtomicI64::new(NO_SKEW),
        }))
    }

    /// Publishes one frame, however long that takes. `begun` is called when the first attempt gets its slot.
    ///
    /// Dropping the future in the middle gives the slot back; the engine may have the frame then.
    pub async fn publish(&self, frame: &Frame, body: Bytes, begun: impl FnOnce()) -> Outcome {
        let mut begun = Some(begun);
        let mut seat = Seat::take(self, &frame.detector);
        let mut said = None;
        loop {
            match seat.signal().await {
                Signal::Released => return Outcome::Released { said },
                Signal::Refused(refusal) => return Outcome::Refused(refusal),
                Signal::Go { number } => {
                    if let Some(begun) = begun.take() {
                        begun();
                    }
                    let ended = self.attempt(frame, seat.case, number, body.clone()).await;
                    let heard = (ended.verdict != Verdict::Accepted).then(|| ended.verdict.said());
                    if seat.ended(ended) == Next::Accepted {
                        return Outcome::Accepted;
                    }
                    said = heard;
                }
            }
        }
    }

    /// No new attempts: whoever waits gets [`Outcome::Released`]; a request in flight finishes.
    pub fn stop(&self) {
        let mut desk = self.desk();
        desk.line.stop();
        self.turn(&mut desk);
    }

    /// Another configuration: a new client, the state forgotten, a new login. Frames that wait now try the new engine.
    ///
    /// # Errors
    /// As [`Publisher::new`]; then nothing has changed.
    pub fn reconfigure(
        &self,
        engine: &engine::Config,
        secrets: engine::Secrets,
        publish: &Config,
    ) -> anyhow::Result<()> {
        let settings = publish.settings()?;
        let live = Live::new(engine, secrets, publish, &self.metrics)?;
        let mut desk = self.desk();
        let old = self.live.swap(Arc::new(live));
        old.replaced.cancel();
        desk.line.reset(settings, Instant::now());
        self.turn(&mut desk);
        drop(desk);
        self.token.notify_one();
        Ok(())
    }

    /// Whether more waiting is of no use to those that wait: somebody has to change something first, at the engine or here, or
    /// the engine has refused each of them more than once with nothing accepted since. For commands that somebody waits for;
    /// a daemon has all the time there is.
    pub fn is_stuck(&self) -> bool {
        self.desk().line.is_stuck()
    }

    /// How the engine is.
    pub fn status(&self) -> EngineStatus {
        let live = self.live.load();
        let desk = self.desk();
        let state = desk.line.state();
        let skew = self.skew_ms.load(Ordering::Relaxed);
        EngineStatus {
            state,
            since: desk.since,
            reason: desk.line.reason().to_owned(),
            advice: state.advice().to_owned(),
            concurrency_limit: desk.line.concurrency(),
            in_flight: desk.line.in_flight(),
            waiting: desk.line.waiting(),
            token_expires: live.tokens.current().and_then(|token| token.expires),
            clock_skew_seconds: (skew != NO_SKEW).then_some(skew as f64 / 1e3),
            insecure: live.insecure,
        }
    }

    /// The clockwork: timers, tokens, reminders. Ends with `stop`, and then stops the publisher.
    pub async fn run(&self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.keep_time() => {}
            () = self.keep_token() => {}
            () = self.tell_failures() => {}
            () = self.remind() => {}
        }
        self.stop();
    }

    async fn attempt(&self, frame: &Frame, case: CaseId, number: u64, body: Bytes) -> Ended {
        let live = self.live.load_full();
        let Some(token) = live.tokens.current() else {
            // A reload came in between: in line again, until there is a token.
            return Ended { case, number, token: 0, verdict: Verdict::Token, latency: Duration::ZERO };
        };
        let started = Instant::now();
        let result = live.client.publish(token.header.clone(), body).await;
        let latency = started.elapsed();
        let result = result.map(|reply| reply.masking(token.text()));
        let now = SystemTime::now();
        let verdict = judge(&result, now);
        self.count(&result, &verdict, latency, now);
        debug!(frame = %frame.id, detector = &*frame.detector.name, attempt = number, ?latency, ?verdict, "attempt ended");
        Ended { case, number, token: token.generation, verdict, latency }
    }

    fn count(&self, result: &Result<Reply, SendError>, verdict: &Verdict, latency: Duration, now: SystemTime) {
        self.handles.attempt(&self.metrics, result);
        if let Ok(reply) = result {
            self.metrics.publish_duration.record(latency.as_secs_f64());
            self.note_skew(reply.date, now, latency);
        }
        if matches!(verdict, Verdict::Ambiguous(_)) {
            self.metrics.ambiguous.increment(1);
        }
    }

    /// The engine wrote its `Date`, which has whole seconds, about half way through.
    fn note_skew(&self, date: Option<SystemTime>, now: SystemTime, latency: Duration) {
        let Some(date) = date else { return };
        let (here, there) = (now - latency / 2, date + Duration::from_millis(500));
        let millis = |d: Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
        let skew = match here.duration_since(there) {
            Ok(ahead) => millis(ahead),
            Err(behind) => -millis(behind.duration()),
        };
        self.skew_ms.store(skew, Ordering::Relaxed);
        self.handles.skew.set(skew as f64 / 1e3);
    }

    async fn keep_time(&self) {
        loop {
            let wake = {
                let mut desk = self.desk();
                self.turn(&mut desk);
                desk.armed = desk.line.wake();
                desk.armed
            };
            tokio::select! {
                () = self.timer.notified() => {}
                () = until(wake) => {}
            }
        }
    }

    async fn keep_token(&self) {
        loop {
            let live = self.live.load_full();
            tokio::select! {
                () = live.replaced.cancelled() => {}
                () = self.refresh(&live) => {}
            }
        }
    }

    /// Waits until a token is wanted or due, and gets it.
    async fn refresh(&self, live: &Arc<Live>) {
        let wanted = self.desk().line.token_wanted();
        if let Some(renewable) = wanted {
            let result = live.tokens.get(renewable, &|| self.pass().boxed()).await;
            self.new_token(live, result);
            return;
        }
        let renew_at = live.tokens.renew_at();
        let look_at = live.tokens.has_file().then(|| Instant::now() + TOKEN_FILE_INTERVAL);
        tokio::select! {
            () = self.token.notified() => {}
            () = until(renew_at) => match live.tokens.renew_early(&|| self.pass().boxed()).await {
                Ok(token) => self.new_token(live, Ok(token)),
                Err(verdict) => debug!(?verdict, "the token could not be renewed ahead of time; the old one stays in use"),
            },
            () = until(look_at) => {
                if live.tokens.file_changed() {
                    let result = live.tokens.get(false, &|| self.pass().boxed()).await;
                    self.new_token(live, result);
                }
            }
        }
    }

    fn new_token(&self, live: &Arc<Live>, result: Result<token::Token, Verdict>) {
        let mut desk = self.desk();
        if !Arc::ptr_eq(&self.live.load(), live) {
            return;
        }
        match result {
            Ok(token) => desk.line.token_ready(token.generation, token.fresh_login, Instant::now()),
            Err(verdict) => desk.line.token_failed(&verdict, Instant::now()),
        }
        self.turn(&mut desk);
    }

    /// Waits for the rate limit on behalf of a login or renewal.
    async fn pass(&self) {
        loop {
            let at = {
                let mut desk = self.desk();
                let passed = desk.line.urgent(Instant::now());
                // While this waited nobody else was let through or set a timer, and what the engine will answer is not certain.
                self.turn(&mut desk);
                match passed {
                    Ok(()) => return,
                    Err(at) => at,
                }
            };
            sleep_until(at).await;
        }
    }

    async fn tell_failures(&self) {
        loop {
            self.failure.notified().await;
            let (failures, last) = {
                let mut desk = self.desk();
                (std::mem::take(&mut desk.failures), std::mem::take(&mut desk.last_failure))
            };
            warn!(failures, last, "attempts failed and will be repeated");
            sleep(FAILURES_INTERVAL).await;
        }
    }

    async fn remind(&self) {
        loop {
            sleep(REMINDER_INTERVAL).await;
            if self.live.load().insecure {
                warn_insecure();
            }
            let status = self.status();
            if status.state != State::Open {
                warn!(state = status.state.as_str(), since = %status.since, reason = status.reason, advice = status.advice, "publishing is still paused");
            }
        }
    }
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Publisher")
    }
}

impl Live {
    fn new(
        engine: &engine::Config,
        secrets: engine::Secrets,
        publish: &Config,
        metrics: &Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        let client = Client::new(engine, publish.max_in_flight)?;
        let insecure = engine.danger_accept_invalid_certs;
        metrics.gauge("engine_insecure", &[]).set(f64::from(u8::from(insecure)));
        if insecure {
            warn_insecure();
        }
        Ok(Self {
            tokens: Tokens::new(client.clone(), engine.username.clone(), secrets, metrics.clone()),
            client,
            insecure,
            replaced: CancellationToken::new(),
        })
    }
}

fn warn_insecure() {
    warn!(
        "engine.danger_accept_invalid_certs is on: whoever is between here and the engine can read frames and the password; \
         use engine.pin_sha256 (see `framegate pin`) or engine.ca_file"
    );
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;

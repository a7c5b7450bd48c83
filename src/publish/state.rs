//! Who may try now, and whose fault a failure is: the engine's state, the waiting frames in line, suspects and charges.
//! A pure state machine: time is passed in, signals are collected for the caller to send, nothing sleeps in here.
//!
//! *Case*: one frame that wants to be published. *Lane*: the cases of one detector. *Mark*: the number of the newest attempt when something
//! happened; an acceptance proves the engine's health since then only if its own attempt began later, that is, has a higher number.
//!
//! The cost of all this in one place: every attempt takes the one lock around it twice, and a start looks at each detector that has
//! something waiting.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::backoff::Backoff;
use super::limit::{Concurrency, RateLimit};
use super::verdict::Verdict;
use crate::frame::Detector;
use crate::settle::{Reason, Refusal};

/// So many different frames answered 403, with none accepted: it is the permission, not the frames.
const FORBIDDEN_FRAMES: usize = 3;
/// So many different frames answered 400 and the like, with none accepted: it is the request, not the frames.
const REJECTED_FRAMES: usize = 8;
/// So many different frames answered with a server's error, with none accepted in between: an outage. A server that
/// fails three requests in ten at random does so once in fifteen thousand.
const FAILED_FRAMES: usize = 8;
/// So many answers lost in a row, with none accepted: the engine is away.
const LOST_ANSWERS: u32 = 3;
/// Refusals of one frame, each followed by an acceptance of another, until it is a dead letter.
const CONFIRMATIONS: u32 = 2;
/// Failed probes in a row after which a pause is no passing trouble.
const LASTING_PROBES: u32 = 2;
/// The same for an engine that has taken nothing yet and does not answer: it may be starting.
const ABSENT_PROBES: u32 = 5;
/// Between logins that are refused.
const LOGIN_BACKOFF: Backoff = Backoff::between(Duration::from_secs(30), Duration::from_mins(15));

/// What the engine is to us; the label of `engine_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Frames are published.
    Open,
    /// No connection, or no answers.
    Unreachable,
    /// The login is refused.
    Credentials,
    /// 403 for all.
    Forbidden,
    /// 400 and the like for all.
    Rejecting,
    /// Somebody who is not the engine answers.
    UnexpectedAnswer,
    /// The engine asked for patience.
    Throttled,
    /// Server errors for all.
    Failing,
}

impl State {
    /// All of them, for metrics.
    pub const ALL: [State; 8] = [
        State::Open,
        State::Unreachable,
        State::Credentials,
        State::Forbidden,
        State::Rejecting,
        State::UnexpectedAnswer,
        State::Throttled,
        State::Failing,
    ];

    /// The text form, as in metrics and `/status`.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Open => "open",
            State::Unreachable => "unreachable",
            State::Credentials => "credentials",
            State::Forbidden => "forbidden",
            State::Rejecting => "rejecting",
            State::UnexpectedAnswer => "unexpected-answer",
            State::Throttled => "throttled",
            State::Failing => "failing",
        }
    }

    /// What somebody on site can do about it.
    pub fn advice(self) -> &'static str {
        match self {
            State::Open => "",
            State::Unreachable => {
                "check that the engine runs, and the network, DNS and engine.base_url; `framegate doctor` tells them apart"
            }
            State::Credentials => {
                "check engine.username and the password or token file, then `framegate reload`; it is tried again by itself"
            }
            State::Forbidden => "give the engine's user the Face Publishing permission; nothing else is needed here",
            State::Rejecting => {
                "the engine refuses every frame's request: compare its version with Framegate's; see the message for what it misses"
            }
            State::UnexpectedAnswer => {
                "something between here and the engine answers instead of it (a portal, a proxy, another server): check engine.base_url and the certificate or pin"
            }
            State::Throttled => "nothing to do: the engine asked for a pause; if it is frequent, set publish.rate",
            State::Failing => "look at the engine's own logs; frames are kept and it is tried again by itself",
        }
    }

    /// Pauses that one frame might cause by its content, so that another detector's frame is worth a try at once.
    fn may_be_a_frames_fault(self) -> bool {
        match self {
            State::Forbidden | State::Rejecting | State::Failing => true,
            State::Open | State::Unreachable | State::Credentials | State::UnexpectedAnswer | State::Throttled => false,
        }
    }
}

pub(super) type CaseId = u64;

/// What a waiting case is told; it waits for exactly one at a time.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Signal {
    /// Make the attempt with this number.
    Go { number: u64 },
    /// It is this frame.
    Refused(Refusal),
    /// The publisher stops.
    Released,
}

/// What becomes of a case whose attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Accepted,
    /// It is in line again; a signal follows.
    Wait,
}

/// A change of state, for the log and the gauges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) from: State,
    pub(super) to: State,
    pub(super) reason: String,
}

/// One attempt and how it ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) case: CaseId,
    pub(super) number: u64,
    /// Which token it carried.
    pub(super) token: u64,
    pub(super) verdict: Verdict,
    pub(super) latency: Duration,
}

/// The token, as far as the line cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// None, and nobody asked for one. `renewable`: the last one was good until it was refused.
    Missing { renewable: bool },
    /// Somebody has to get one; the line waits for it.
    Wanted { renewable: bool },
    Ready {
        generation: u64,
        /// It comes from a login, not from a renewal or a file.
        fresh_login: bool,
        /// The engine has taken it at least once.
        proven: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In line.
    Ready,
    /// Backing off until then.
    Timed(Instant),
    /// In an attempt.
    Flying,
    /// Between two of these.
    Out,
}

#[derive(Clone, Copy, Debug)]
struct Suspicion {
    reason: Reason,
    mark: u64,
    /// Refusals that an acceptance followed.
    confirmed: u32,
    /// Refusals in all.
    refusals: u32,
    /// Refused, and no acceptance since.
    awaiting: bool,
}

#[derive(Debug)]
struct Case {
    lane: Arc<str>,
    /// Its place in line: the lowest goes first. A new one for every attempt.
    ticket: u64,
    place: Place,
    attempts: u32,
    tries: u32,
    failing_since: Option<Instant>,
    suspicion: Option<Suspicion>,
    charges: u32,
    charged_at: Option<u64>,
    unauthorized: u32,
    status: Option<u16>,
    message: String,
}

#[derive(Debug, Default)]
struct Lane {
    rate: f64,
    limit: RateLimit,
    ready: BTreeMap<u64, CaseId>,
    cases: usize,
    flying: usize,
    suspects: usize,
    /// The newest mark of a refusal that might be the frame's fault.
    refused_at: u64,
}

/// Different frames that were refused in the same way since the last acceptance.
#[derive(Debug, Default)]
struct Streak {
    first: u64,
    cases: HashSet<CaseId>,
}

impl Streak {
    fn add(&mut self, case: CaseId, mark: u64) -> usize {
        if self.cases.is_empty() {
            self.first = mark;
        }
        if self.cases.len() < REJECTED_FRAMES {
            self.cases.insert(case);
        }
        self.cases.len()
    }

    fn accepted(&mut self, number: u64) {
        if number > self.first {
            self.cases.clear();
        }
    }
}

#[derive(Debug)]
struct Pause {
    next_probe: Instant,
    last_probe: Instant,
    probes: u32,
    probing: Option<CaseId>,
    since: Instant,
    /// Lanes refused since this mark had their chance in this pause.
    mark: u64,
}

/// The settings of `[publish]` that matter here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) rate: f64,
    pub(super) burst: u32,
    pub(super) max_in_flight: usize,
    pub(super) attempts: u32,
    pub(super) backoff: Backoff,
}

/// The line in front of the engine.
#[derive(Debug)]
pub(super) struct Line {
    settings: Settings,
    state: State,
    reason: String,
    pause: Option<Pause>,
    token: Token,
    limit: RateLimit,
    concurrency: Concurrency,
    cases: HashMap<CaseId, Case>,
    lanes: HashMap<Arc<str>, Lane>,
    /// Everything that waits, by ticket.
    waiting: BTreeMap<u64, CaseId>,
    timed: BTreeSet<(Instant, CaseId)>,
    /// Suspects waiting for an acceptance, by the mark of their refusal.
    suspects: BTreeSet<(u64, CaseId)>,
    next_id: u64,
    next_ticket: u64,
    /// The newest attempt's number.
    number: u64,
    /// The highest number of an accepted attempt.
    accepted: u64,
    /// Attempts up to this number began under another state or another engine: they change no state.
    stale: u64,
    in_flight: usize,
    forbidden: Streak,
    rejected: Streak,
    failed: Streak,
    lost: u32,
    /// A login or renewal waits for the rate limit and goes first.
    urgent: bool,
    held_since: Option<Instant>,
    held: Duration,
    stopped: bool,
    wake: Option<Instant>,
    signals: Vec<(CaseId, Signal)>,
    changes: Vec<Change>,
}

impl Line {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            settings,
            state: State::Open,
            reason: String::new(),
            pause: None,
            token: Token::Missing { renewable: false },
            limit: RateLimit::new(settings.rate, settings.burst),
            concurrency: Concurrency::new(settings.max_in_flight),
            cases: HashMap::new(),
            lanes: HashMap::new(),
            waiting: BTreeMap::new(),
            timed: BTreeSet::new(),
            suspects: BTreeSet::new(),
            next_id: 0,
            next_ticket: 0,
            number: 0,
            accepted: 0,
            stale: 0,
            in_flight: 0,
            forbidden: Streak::default(),
            rejected: Streak::default(),
            failed: Streak::default(),
            lost: 0,
            urgent: false,
            held_since: None,
            held: Duration::ZERO,
            stopped: false,
            wake: None,
            signals: Vec::new(),
            changes: Vec::new(),
        }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    pub(super) fn reason(&self) -> &str {
        &self.reason
    }

    pub(super) fn concurrency(&self) -> usize {
        self.concurrency.now()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether waiting longer helps none of those that wait.
    pub(super) fn is_stuck(&self) -> bool {
        let Some(pause) = &self.pause else {
            let refused = |case: &Case| case.suspicion.is_some_and(|it| it.awaiting && it.refusals >= CONFIRMATIONS);
            return !self.cases.is_empty() && self.cases.values().all(refused);
        };
        match self.state {
            State::Credentials => true,
            State::Forbidden | State::Rejecting | State::UnexpectedAnswer => pause.probes >= LASTING_PROBES,
            State::Unreachable => self.accepted == 0 && pause.probes >= ABSENT_PROBES,
            State::Open | State::Throttled | State::Failing => false,
        }
    }

    /// When `pump` has to be called again, if nothing happens before.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.wake
    }

    /// Whether a token has to be got now, and if so, whether a renewal is worth a try.
    pub(super) fn token_wanted(&self) -> Option<bool> {
        match self.token {
            Token::Wanted { renewable } => Some(renewable),
            Token::Missing { .. } | Token::Ready { .. } => None,
        }
    }

    /// Signals to send, each to the case that waits for it.
    pub(super) fn take_signals(&mut self) -> Vec<(CaseId, Signal)> {
        std::mem::take(&mut self.signals)
    }

    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Time since the last call during which an attempt was held back by a rate limit and by nothing else.
    pub(super) fn take_held(&mut self) -> Duration {
        std::mem::take(&mut self.held)
    }

    /// A frame gets in line. Call `pump` after.
    pub(super) fn enter(&mut self, detector: &Detector, now: Instant) -> CaseId {
        self.next_id += 1;
        let id = self.next_id;
        let lane = self.lanes.entry(detector.name.clone()).or_default();
        if lane.rate.to_bits() != detector.rate.to_bits() {
            lane.rate = detector.rate;
            lane.limit.set(detector.rate, 0);
        }
        lane.cases += 1;
        self.cases.insert(
            id,
            Case {
                lane: detector.name.clone(),
                ticket: 0,
                place: Place::Out,
                attempts: 0,
                tries: 0,
                failing_since: None,
                suspicion: None,
                charges: 0,
                charged_at: None,
                unauthorized: 0,
                status: None,
                message: String::new(),
            },
        );
        self.put_in_line(id, None, now);
        id
    }

    /// The case is gone, whatever it was doing.
    pub(super) fn leave(&mut self, id: CaseId, now: Instant) {
        self.take_out_of_line(id);
        let Some(case) = self.cases.remove(&id) else { return };
        let Some(lane) = self.lanes.get_mut(&case.lane) else { return };
        lane.cases -= 1;
        if case.suspicion.is_some() {
            lane.suspects -= 1;
        }
        if lane.cases == 0 && lane.limit.is_idle(now) && self.pause.is_none() {
            self.lanes.remove(&case.lane);
        }
    }

    /// The case's task was dropped in the middle of its attempt.
    pub(super) fn abandoned(&mut self, id: CaseId, now: Instant) {
        if self.cases.get(&id).is_some_and(|case| case.place == Place::Flying) {
            self.landed(id);
        }
        if let Some(pause) = &mut self.pause
            && pause.probing == Some(id)
        {
            pause.probing = None;
        }
        self.leave(id, now);
    }

    /// No new attempts; whoever waits is released.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
    }

    /// Another engine, or the same with other settings: open, without a token, slowly.
    pub(super) fn reset(&mut self, settings: Settings, now: Instant) {
        self.settings = settings;
        self.limit.set(settings.rate, settings.burst);
        self.concurrency.set_max(settings.max_in_flight);
        self.token = Token::Missing { renewable: false };
        self.urgent = false;
        self.stale = self.number;
        self.forget_streaks();
        self.open("the configuration was loaded", now);
        let waiting: Vec<CaseId> = self.waiting.values().copied().collect();
        for id in waiting {
            self.take_out_of_line(id);
            self.put_back(id, None);
        }
        for lane in self.lanes.values_mut() {
            (lane.suspects, lane.refused_at) = (0, 0);
        }
        for case in self.cases.values_mut() {
            (case.suspicion, case.charges, case.charged_at) = (None, 0, None);
            (case.tries, case.failing_since, case.unauthorized) = (0, None, 0);
        }
    }

    /// A login or renewal wants to go; it counts against the rate and is served before frames.
    pub(super) fn urgent(&mut self, now: Instant) -> Result<(), Instant> {
        if let Some(at) = self.limit.wait(now) {
            self.urgent = true;
            return Err(at);
        }
        self.urgent = false;
        self.limit.take(now);
        Ok(())
    }

    /// There is a token. `fresh_login`: just from a login.
    pub(super) fn token_ready(&mut self, generation: u64, fresh_login: bool, now: Instant) {
        self.token = Token::Ready { generation, fresh_login, proven: false };
        if let Some(pause) = &mut self.pause {
            pause.next_probe = now;
        }
    }

    /// There is no token, and the line waited for one: that counts as a probe.
    pub(super) fn token_failed(&mut self, verdict: &Verdict, now: Instant) {
        self.token = Token::Missing { renewable: false };
        let (state, until, reason) = match verdict {
            Verdict::Credentials(message) => (State::Credentials, None, message.clone()),
            Verdict::NotOurEngine(what) => (State::UnexpectedAnswer, None, format!("at the login: {what}")),
            Verdict::Unreachable(what) | Verdict::Ambiguous(what) => (State::Unreachable, None, what.clone()),
            Verdict::Transient { status, retry_after, message } => {
                let state = if retry_after.is_some() || *status == 429 { State::Throttled } else { State::Failing };
                (state, *retry_after, format!("login answered {status}: {message}"))
            }
            Verdict::ServerError { status, message }
            | Verdict::Forbidden { status, message }
            | Verdict::Rejected { status, message } => {
                (State::Failing, None, format!("login answered {status}: {message}"))
            }
            Verdict::Accepted | Verdict::Token => (State::Credentials, None, "no token".to_owned()),
        };
        self.probe_failed(state, until, &reason, now);
    }

    /// An attempt ended.
    pub(super) fn ended(&mut self, ended: Ended, now: Instant) -> Next {
        let Ended { case: id, number, token, verdict, latency } = ended;
        let in_flight = self.in_flight;
        self.landed(id);
        let probe = match &mut self.pause {
            Some(pause) if pause.probing == Some(id) => {
                pause.probing = None;
                true
            }
            Some(_) | None => false,
        };
        // An attempt that began before the pause or the reload says nothing about now.
        let speaks = number > self.stale && (self.pause.is_none() || probe);
        self.prove_token(token, &verdict);
        if let Some(case) = self.cases.get_mut(&id) {
            case.attempts += 1;
        }
        match verdict {
            Verdict::Accepted => {
                self.was_accepted(number, latency, in_flight, speaks, now);
                self.leave(id, now);
                return Next::Accepted;
            }
            Verdict::Token => self.unauthorized(id, token, speaks, now),
            Verdict::Credentials(message) => {
                self.engine_trouble(State::Credentials, None, &message, speaks, now);
                self.put_in_line(id, None, now);
            }
            Verdict::Forbidden { status, message } => {
                self.refused(id, Reason::Forbidden, status, &message, speaks, now);
            }
            Verdict::Rejected { status, message } => {
                self.refused(id, Reason::Rejected, status, &message, speaks, now);
            }
            Verdict::ServerError { status, message } => self.server_error(id, status, &message, speaks, now),
            Verdict::Transient { status, retry_after, message } => {
                self.transient(id, status, retry_after, &message, speaks, now);
            }
            Verdict::NotOurEngine(what) => {
                self.engine_trouble(State::UnexpectedAnswer, None, &what, speaks, now);
                self.back_off(id, now);
            }
            Verdict::Unreachable(what) => {
                self.engine_trouble(State::Unreachable, None, &what, speaks, now);
                self.put_in_line(id, None, now);
            }
            Verdict::Ambiguous(what) => {
                self.concurrency.overloaded(now);
                self.lost = self.lost.saturating_add(1);
                if self.lost >= LOST_ANSWERS || probe {
                    self.engine_trouble(State::Unreachable, None, &what, speaks, now);
                }
                self.back_off(id, now);
            }
        }
        Next::Wait
    }

    /// Starts what may start now. Call it after everything that changes something, and at `wake`.
    pub(super) fn pump(&mut self, now: Instant) {
        self.wake = None;
        self.note_held(now, false);
        if self.stopped {
            self.release_all();
            return;
        }
        self.wake_timed(now);
        if self.urgent || self.waiting.is_empty() || self.token_wanted().is_some() {
            return;
        }
        let held = if self.pause.is_some() { self.pump_paused(now) } else { self.pump_open(now) };
        self.note_held(now, held);
    }

    // ---- the line ----

    fn pump_open(&mut self, now: Instant) -> bool {
        while self.in_flight < self.concurrency.now() {
            let mut held = false;
            let mut first: Option<(u64, CaseId)> = None;
            let mut wake = None;
            for lane in self.lanes.values() {
                let Some((&ticket, &id)) = lane.ready.first_key_value() else { continue };
                if lane.suspects > 0 && lane.flying > 0 {
                    continue;
                }
                if let Some(at) = lane.limit.wait(now) {
                    held = true;
                    wake = Some(earlier(wake, at));
                } else if first.is_none_or(|(t, _)| ticket < t) {
                    first = Some((ticket, id));
                }
            }
            if let Some(at) = wake {
                self.wake_at(at);
            }
            let Some((_, id)) = first else { return held };
            if !self.want_token() {
                return false;
            }
            if let Some(at) = self.limit.wait(now) {
                self.wake_at(at);
                return true;
            }
            self.start(id, now);
        }
        false
    }

    /// One probe at a time, from another frame each time.
    fn pump_paused(&mut self, now: Instant) -> bool {
        let Some(pause) = &self.pause else { return false };
        if pause.probing.is_some() {
            return false;
        }
        let (regular, mark) = (pause.next_probe, pause.mark);
        let early = (pause.last_probe + self.settings.backoff.min()).min(regular);
        let fresh = |lane: &Lane| lane.cases > lane.flying && lane.refused_at < mark;
        let has_fresh = self.state.may_be_a_frames_fault() && self.lanes.values().any(fresh);
        if now < early || (now < regular && !has_fresh) {
            self.wake_at(if has_fresh { early } else { regular });
            return false;
        }
        let mut wake = None;
        let mut first = |only_fresh: bool| {
            self.waiting.values().copied().find(|id| {
                let Some(lane) = self.cases.get(id).and_then(|case| self.lanes.get(&case.lane)) else { return false };
                let limited = lane.limit.wait(now);
                wake = limited.map_or(wake, |at| Some(earlier(wake, at)));
                limited.is_none() && (!only_fresh || fresh(lane))
            })
        };
        let mut found = if has_fresh { first(true) } else { None };
        if found.is_none() && now >= regular {
            found = first(false);
        }
        let Some(id) = found else {
            self.wake_at(wake.unwrap_or(regular).max(now + self.settings.backoff.min()));
            return wake.is_some();
        };
        if !self.want_token() {
            return false;
        }
        if let Some(at) = self.limit.wait(now) {
            self.wake_at(at);
            return true;
        }
        if let Some(pause) = &mut self.pause {
            pause.probing = Some(id);
            pause.last_probe = now;
        }
        self.start(id, now);
        false
    }

    fn start(&mut self, id: CaseId, now: Instant) {
        self.take_out_of_line(id);
        let Some(case) = self.cases.get_mut(&id) else { return };
        let Some(lane) = self.lanes.get_mut(&case.lane) else { return };
        case.place = Place::Flying;
        lane.flying += 1;
        lane.limit.take(now);
        self.limit.take(now);
        self.in_flight += 1;
        self.number += 1;
        self.signals.push((id, Signal::Go { number: self.number }));
    }

    fn landed(&mut self, id: CaseId) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let Some(case) = self.cases.get_mut(&id) else { return };
        case.place = Place::Out;
        if let Some(lane) = self.lanes.get_mut(&case.lane) {
            lane.flying = lane.flying.saturating_sub(1);
        }
    }

    /// Puts a case at the end of the line, or lets it back off first.
    fn put_in_line(&mut self, id: CaseId, until: Option<Instant>, now: Instant) {
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        if let Some(case) = self.cases.get_mut(&id) {
            case.ticket = ticket;
        }
        self.put_back(id, until.filter(|at| *at > now));
    }

    /// Puts a case in line at the place that its ticket says.
    fn put_back(&mut self, id: CaseId, until: Option<Instant>) {
        let Some(case) = self.cases.get_mut(&id) else { return };
        self.waiting.insert(case.ticket, id);
        if let Some(at) = until {
            case.place = Place::Timed(at);
            self.timed.insert((at, id));
        } else {
            case.place = Place::Ready;
            if let Some(lane) = self.lanes.get_mut(&case.lane) {
                lane.ready.insert(case.ticket, id);
            }
        }
    }

    /// Whether it was in line.
    fn take_out_of_line(&mut self, id: CaseId) -> bool {
        let Some(case) = self.cases.get_mut(&id) else { return false };
        match case.place {
            Place::Flying | Place::Out => return false,
            Place::Ready => {
                if let Some(lane) = self.lanes.get_mut(&case.lane) {
                    lane.ready.remove(&case.ticket);
                }
            }
            Place::Timed(at) => {
                self.timed.remove(&(at, id));
            }
        }
        if let Some(suspicion) = &mut case.suspicion
            && suspicion.awaiting
        {
            suspicion.awaiting = false;
            self.suspects.remove(&(suspicion.mark, id));
        }
        self.waiting.remove(&case.ticket);
        case.place = Place::Out;
        true
    }

    fn wake_timed(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.timed.first() {
            if at > now {
                // While paused nobody's own back-off counts: the pause decides.
                if self.pause.is_none() {
                    self.wake_at(at);
                }
                return;
            }
            self.timed.remove(&(at, id));
            // A suspect stays one: what is accepted before its turn comes still counts.
            let Some(case) = self.cases.get_mut(&id) else { continue };
            case.place = Place::Ready;
            if let Some(lane) = self.lanes.get_mut(&case.lane) {
                lane.ready.insert(case.ticket, id);
            }
        }
    }

    fn back_off(&mut self, id: CaseId, now: Instant) {
        let Some(case) = self.cases.get_mut(&id) else { return };
        let age = now - *case.failing_since.get_or_insert(now);
        let delay = self.settings.backoff.delay(case.tries, age, fastrand::f64());
        case.tries = case.tries.saturating_add(1);
        self.put_in_line(id, Some(now + delay), now);
    }

    fn release_all(&mut self) {
        let waiting: Vec<CaseId> = self.waiting.values().copied().collect();
        for id in waiting {
            self.take_out_of_line(id);
            self.signals.push((id, Signal::Released));
        }
    }

    fn wake_at(&mut self, at: Instant) {
        self.wake = Some(earlier(self.wake, at));
    }

    fn note_held(&mut self, now: Instant, held: bool) {
        if let Some(since) = self.held_since.take() {
            self.held += now.saturating_duration_since(since);
        }
        self.held_since = held.then_some(now);
    }

    // ---- what an attempt means ----

    fn was_accepted(&mut self, number: u64, latency: Duration, in_flight: usize, speaks: bool, now: Instant) {
        self.accepted = self.accepted.max(number);
        if speaks {
            self.lost = 0;
            if self.pause.is_some() {
                self.open("a frame was accepted", now);
            }
            self.concurrency.accepted(latency, in_flight, now);
        }
        for streak in [&mut self.forbidden, &mut self.rejected] {
            streak.accepted(number);
        }
        // Errors at random have acceptances between them, whichever attempt began first; an outage has none.
        self.failed.cases.clear();
        self.confirm_suspects();
    }

    /// Another frame was accepted after theirs was refused: it is them, or they may try again.
    fn confirm_suspects(&mut self) {
        while let Some(&(mark, id)) = self.suspects.first() {
            if mark >= self.accepted {
                return;
            }
            self.suspects.remove(&(mark, id));
            self.take_out_of_line(id);
            let Some(case) = self.cases.get_mut(&id) else { continue };
            let Some(suspicion) = &mut case.suspicion else { continue };
            suspicion.confirmed += 1;
            if suspicion.confirmed < CONFIRMATIONS {
                self.put_back(id, None);
            } else {
                let refusal = Refusal {
                    reason: suspicion.reason,
                    status: case.status,
                    message: case.message.clone(),
                    attempts: case.attempts,
                };
                self.signals.push((id, Signal::Refused(refusal)));
            }
        }
    }

    /// 400 and the like, or 403.
    fn refused(&mut self, id: CaseId, reason: Reason, status: u16, message: &str, speaks: bool, now: Instant) {
        self.say(id, status, message);
        self.suspect(id, reason, 0, now);
        if !speaks {
            return;
        }
        let (state, frames) = if reason == Reason::Forbidden {
            (State::Forbidden, self.forbidden.add(id, self.number) >= FORBIDDEN_FRAMES)
        } else {
            (State::Rejecting, self.rejected.add(id, self.number) >= REJECTED_FRAMES)
        };
        let text = || format!("status {status} for every frame: {message}");
        match self.state {
            State::Open if frames => self.engine_trouble(state, None, &text(), speaks, now),
            State::Open => {}
            State::Forbidden | State::Rejecting => self.engine_trouble(state, None, &text(), speaks, now),
            // The engine is there again, and says something about this frame.
            State::Unreachable | State::Credentials | State::UnexpectedAnswer | State::Throttled | State::Failing => {
                self.open("the engine answers again", now);
            }
        }
    }

    fn server_error(&mut self, id: CaseId, status: u16, message: &str, speaks: bool, now: Instant) {
        // 500 is no word about load: fewer attempts at once would not help.
        self.say(id, status, message);
        let (number, accepted, attempts) = (self.number, self.accepted, self.settings.attempts.max(1));
        let Some(case) = self.cases.get_mut(&id) else { return };
        // An outage answers 500 to all: a frame is charged once, and again only if another was accepted in between.
        if case.charged_at.is_none_or(|mark| accepted > mark) {
            case.charges += 1;
            case.charged_at = Some(number);
        }
        if case.charges >= attempts {
            self.suspect(id, Reason::ServerError, CONFIRMATIONS - 1, now);
        } else {
            self.back_off(id, now);
        }
        self.failed(id, State::Failing, None, &format!("status {status} for every frame: {message}"), speaks, now);
    }

    fn transient(
        &mut self,
        id: CaseId,
        status: u16,
        retry_after: Option<Duration>,
        message: &str,
        speaks: bool,
        now: Instant,
    ) {
        self.concurrency.overloaded(now);
        self.back_off(id, now);
        let asked = retry_after.is_some() && matches!(status, 429 | 503);
        let state = if asked || status == 429 { State::Throttled } else { State::Failing };
        if asked {
            let reason = format!("status {status} with Retry-After: {message}");
            self.engine_trouble(state, retry_after, &reason, speaks, now);
            self.extend_throttle(retry_after, now);
        } else {
            self.failed(id, state, None, &format!("status {status} for every frame: {message}"), speaks, now);
        }
    }

    /// One more frame that the server could not serve.
    fn failed(&mut self, id: CaseId, state: State, until: Option<Duration>, reason: &str, speaks: bool, now: Instant) {
        if !speaks {
            return;
        }
        self.note_refusal(id);
        if self.failed.add(id, self.number) >= FAILED_FRAMES || self.pause.is_some() {
            self.engine_trouble(state, until, reason, speaks, now);
        }
    }

    fn say(&mut self, id: CaseId, status: u16, message: &str) {
        if let Some(case) = self.cases.get_mut(&id) {
            case.status = Some(status);
            message.clone_into(&mut case.message);
        }
    }

    /// The case waits for an acceptance of another frame, or for its back-off: a lonely frame tries again all the same.
    fn suspect(&mut self, id: CaseId, reason: Reason, confirmed: u32, now: Instant) {
        self.back_off(id, now);
        self.note_refusal(id);
        let mark = self.number;
        let Some(case) = self.cases.get_mut(&id) else { return };
        if case.suspicion.is_none()
            && let Some(lane) = self.lanes.get_mut(&case.lane)
        {
            lane.suspects += 1;
        }
        let refusals = case.suspicion.map_or(0, |old| old.refusals) + 1;
        let before = case.suspicion.filter(|old| old.reason == reason).map_or(0, |old| old.confirmed);
        case.suspicion = Some(Suspicion { reason, mark, confirmed: before.max(confirmed), refusals, awaiting: true });
        self.suspects.insert((mark, id));
    }

    fn note_refusal(&mut self, id: CaseId) {
        let number = self.number;
        if let Some(lane) = self.cases.get(&id).and_then(|case| self.lanes.get_mut(&case.lane)) {
            lane.refused_at = number;
        }
    }

    fn unauthorized(&mut self, id: CaseId, token: u64, speaks: bool, now: Instant) {
        if let Token::Ready { generation, fresh_login, proven } = self.token
            && generation == token
        {
            self.token = Token::Missing { renewable: proven };
            if fresh_login && !proven {
                let reason = "the engine refused the token that it had just given at the login";
                self.engine_trouble(State::Credentials, None, reason, speaks, now);
            }
        }
        let Some(case) = self.cases.get_mut(&id) else { return };
        case.unauthorized += 1;
        if case.unauthorized == 1 { self.put_back(id, None) } else { self.back_off(id, now) }
    }

    fn prove_token(&mut self, token: u64, verdict: &Verdict) {
        let known = match verdict {
            Verdict::Accepted | Verdict::Forbidden { .. } | Verdict::Rejected { .. } | Verdict::ServerError { .. } => {
                true
            }
            Verdict::Token
            | Verdict::Credentials(_)
            | Verdict::Transient { .. }
            | Verdict::NotOurEngine(_)
            | Verdict::Unreachable(_)
            | Verdict::Ambiguous(_) => false,
        };
        if let Token::Ready { generation, proven, .. } = &mut self.token
            && *generation == token
        {
            *proven |= known;
        }
    }

    /// Whether there is a token; else somebody is asked for one.
    fn want_token(&mut self) -> bool {
        if let Token::Missing { renewable } = self.token {
            self.token = Token::Wanted { renewable };
        }
        self.has_token()
    }

    fn has_token(&self) -> bool {
        matches!(self.token, Token::Ready { .. })
    }

    // ---- the engine's state ----

    /// Pauses an open engine; in a pause, this was the probe.
    fn engine_trouble(&mut self, state: State, until: Option<Duration>, reason: &str, speaks: bool, now: Instant) {
        if speaks {
            self.probe_failed(state, until, reason, now);
        }
    }

    fn probe_failed(&mut self, state: State, until: Option<Duration>, reason: &str, now: Instant) {
        let probes = match &self.pause {
            Some(pause) if self.state == state => pause.probes + 1,
            Some(_) | None => 0,
        };
        let since = self.pause.as_ref().map_or(now, |pause| pause.since);
        let mark = self.pause.as_ref().map_or_else(|| self.first_refusal(state), |pause| pause.mark);
        let wait = match (until, state == State::Credentials) {
            (Some(until), _) => until.max(self.settings.backoff.min()),
            // The full time, without dice: many logins with a wrong password may lock the account.
            (None, true) if probes == 0 => LOGIN_BACKOFF.min(),
            (None, true) => LOGIN_BACKOFF.envelope(probes - 1, Duration::ZERO),
            (None, false) => self.settings.backoff.probe(probes, now - since, fastrand::f64()),
        };
        let probing = self.pause.as_ref().and_then(|pause| pause.probing);
        self.pause = Some(Pause { next_probe: now + wait, last_probe: now, probes, probing, since, mark });
        self.enter_state(state, reason);
    }

    /// The mark of the first refusal that led to this state.
    fn first_refusal(&self, state: State) -> u64 {
        match state {
            State::Forbidden => self.forbidden.first,
            State::Rejecting => self.rejected.first,
            State::Failing => self.failed.first,
            State::Open | State::Unreachable | State::Credentials | State::UnexpectedAnswer | State::Throttled => {
                self.number
            }
        }
    }

    /// Answers of attempts that began before the pause may ask for more patience.
    fn extend_throttle(&mut self, retry_after: Option<Duration>, now: Instant) {
        if let (Some(pause), State::Throttled, Some(wait)) = (&mut self.pause, self.state, retry_after) {
            pause.next_probe = pause.next_probe.max(now + wait);
        }
    }

    fn open(&mut self, reason: &str, now: Instant) {
        if let Some(pause) = self.pause.take() {
            let paused = humantime::format_duration(Duration::from_secs((now - pause.since).as_secs()));
            self.enter_state(State::Open, &format!("{reason} after {paused}"));
        }
        self.stale = self.number;
        self.concurrency.restart();
        self.lost = 0;
        self.forget_streaks();
        self.lanes.retain(|_, lane| lane.cases > 0 || !lane.limit.is_idle(now));
    }

    fn forget_streaks(&mut self) {
        for streak in [&mut self.forbidden, &mut self.rejected, &mut self.failed] {
            streak.cases.clear();
        }
    }

    fn enter_state(&mut self, to: State, reason: &str) {
        reason.clone_into(&mut self.reason);
        if self.state != to {
            self.changes.push(Change { from: self.state, to, reason: reason.to_owned() });
            self.state = to;
        }
    }
}

fn earlier(a: Option<Instant>, b: Instant) -> Instant {
    a.map_or(b, |a| a.min(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::verdict::{Reply, judge};
    use proptest::prelude::*;

    const LATENCY: Duration = Duration::from_millis(10);
    const BACKOFF_MAX: Duration = Duration::from_secs(30);

    /// A line, a clock and an engine that is a function.
    struct Sim {
        line: Line,
        now: Instant,
        began: Instant,
        flying: std::collections::VecDeque<(CaseId, u64)>,
        detectors: HashMap<CaseId, u32>,
        accepted: Vec<CaseId>,
        refused: Vec<(CaseId, Refusal)>,
        attempts: Vec<(Instant, CaseId)>,
        generation: u64,
        /// What a login comes to; `None`: it gives a token.
        login: Option<Verdict>,
        logins: u32,
        states: Vec<State>,
    }

    impl Sim {
        fn new() -> Self {
            Self::with(Settings {
                rate: 0.0,
                burst: 0,
                max_in_flight: 8,
                attempts: 3,
                backoff: Backoff::between(Duration::from_millis(200), BACKOFF_MAX),
            })
        }

        fn with(settings: Settings) -> Self {
            let now = Instant::now();
            Self {
                line: Line::new(settings),
                now,
                began: now,
                flying: std::collections::VecDeque::new(),
                detectors: HashMap::new(),
                accepted: Vec::new(),
                refused: Vec::new(),
                attempts: Vec::new(),
                generation: 0,
                login: None,
                logins: 0,
                states: Vec::new(),
            }
        }

        fn enter(&mut self, detector: u32, rate: f64) -> CaseId {
            let detector_name = format!("cam{detector}").into();
            let d = Detector { name: detector_name, time_zone: "UTC".into(), rate, weight: 1 };
            let id = self.line.enter(&d, self.now);
            self.detectors.insert(id, detector);
            id
        }

        /// Lets time pass until `end`, or nothing waits. Panics if something waits and nothing would ever happen.
        fn run(&mut self, span: Duration, mut engine: impl FnMut(CaseId) -> Verdict) {
            let end = self.now + span;
            loop {
                self.line.pump(self.now);
                for (id, signal) in self.line.take_signals() {
                    match signal {
                        Signal::Go { number } => {
                            self.attempts.push((self.now, id));
                            self.flying.push_back((id, number));
                        }
                        Signal::Refused(refusal) => {
                            self.line.leave(id, self.now);
                            self.refused.push((id, refusal));
                        }
                        Signal::Released => self.line.leave(id, self.now),
                    }
                }
                self.states.extend(self.line.take_changes().into_iter().map(|change| change.to));
                assert_eq!(self.line.in_flight(), self.flying.len());
                if self.now >= end {
                    return;
                }
                if self.line.token_wanted().is_some() {
                    self.logins += 1;
                    if let Some(refused) = &self.login {
                        self.line.token_failed(refused, self.now);
                    } else {
                        self.generation += 1;
                        self.line.token_ready(self.generation, true, self.now);
                    }
                } else if let Some((case, number)) = self.flying.pop_front() {
                    self.now += LATENCY / 8;
                    let verdict = engine(case);
                    let ended = Ended { case, number, token: self.generation, verdict, latency: LATENCY };
                    if self.line.ended(ended, self.now) == Next::Accepted {
                        self.accepted.push(case);
                    }
                } else if let Some(wake) = self.line.wake() {
                    assert!(wake > self.now, "a wake-up in the past is a busy loop");
                    self.now = wake.min(end);
                } else {
                    assert_eq!(self.line.waiting(), 0, "stuck: {:?} {:?}", self.line.state, self.line.pause);
                    return;
                }
            }
        }
    }

    fn rejected() -> Verdict {
        Verdict::Rejected { status: 400, message: "no".into() }
    }
    fn forbidden() -> Verdict {
        Verdict::Forbidden { status: 403, message: "no".into() }
    }
    fn server_error() -> Verdict {
        Verdict::ServerError { status: 500, message: "oops".into() }
    }
    fn transient(retry_after: Option<u64>) -> Verdict {
        let retry_after = retry_after.map(Duration::from_secs);
        Verdict::Transient { status: 503, retry_after, message: String::new() }
    }

    const HALF_AN_HOUR: Duration = Duration::from_mins(30);

    #[test]
    fn whatever_is_answered_to_all_for_half_an_hour_pauses_and_loses_nothing() {
        for (verdict, state, attempts_max) in [
            (forbidden(), State::Forbidden, 200),
            (rejected(), State::Rejecting, 200),
            (server_error(), State::Failing, 200),
            (transient(None), State::Failing, 200),
            (transient(Some(60)), State::Throttled, 50),
            (Verdict::NotOurEngine("portal".into()), State::UnexpectedAnswer, 200),
            (Verdict::Unreachable("refused".into()), State::Unreachable, 200),
            (Verdict::Ambiguous("lost".into()), State::Unreachable, 200),
            (Verdict::Token, State::Credentials, 20),
        ] {
            let mut sim = Sim::new();
            for n in 0..100 {
                sim.enter(n % 5, 0.0);
            }
            sim.run(HALF_AN_HOUR, |_| verdict.clone());
            assert_eq!(sim.line.state(), state, "{verdict:?}");
            assert_eq!(sim.states, [state], "one change is told: {verdict:?}");
            assert_eq!((sim.accepted.len(), sim.refused.len()), (0, 0), "{verdict:?}");
            assert!(sim.attempts.len() <= attempts_max, "{} attempts: {verdict:?}", sim.attempts.len());
            let attempts = sim.attempts.len();
            sim.run(HALF_AN_HOUR, |_| Verdict::Accepted);
            assert_eq!((sim.accepted.len(), sim.refused.len()), (100, 0), "{verdict:?}");
            assert_eq!(sim.attempts.len(), attempts + 100, "{verdict:?}");
            assert_eq!(sim.line.state(), State::Open);
        }
    }

    #[test]
    fn one_bad_frame_is_refused_after_the_right_number_of_attempts_and_the_rest_pass() {
        for (verdict, reason, attempts) in [
            (rejected(), Reason::Rejected, 2),
            (forbidden(), Reason::Forbidden, 2),
            (server_error(), Reason::ServerError, 3),
        ] {
            let mut sim = Sim::new();
            let bad = sim.enter(0, 0.0);
            for round in 0..2000 {
                sim.enter(round % 3, 0.0);
                sim.run(Duration::from_millis(20), |id| if id == bad { verdict.clone() } else { Verdict::Accepted });
            }
            let [(id, refusal)] = &sim.refused[..] else { panic!("{verdict:?}: {:?}", sim.refused) };
            assert_eq!((*id, refusal.reason, refusal.attempts), (bad, reason, attempts));
            assert_eq!(sim.accepted.len(), 2000);
            assert!(sim.states.is_empty(), "{:?}", sim.states);
        }
    }

    #[test]
    fn a_lonely_bad_frame_waits_and_tries_again_at_most_every_backoff_max() {
        for verdict in [rejected(), forbidden(), server_error()] {
            let mut sim = Sim::new();
            sim.enter(0, 0.0);
            sim.run(HALF_AN_HOUR, |_| verdict.clone());
            assert!(sim.refused.is_empty());
            assert!((30..150).contains(&sim.attempts.len()), "{}", sim.attempts.len());
            let longest = sim.attempts.windows(2).map(|w| w[1].0 - w[0].0).max().unwrap();
            assert!(longest <= BACKOFF_MAX, "{longest:?}");
        }
    }

    #[test]
    fn a_detector_of_bad_frames_only_slows_no_other_and_fills_the_dead_letters_alone() {
        let mut sim = Sim::new();
        for _ in 0..50 {
            sim.enter(0, 0.0);
            sim.enter(1, 0.0);
        }
        let bad: HashSet<CaseId> = sim.detectors.iter().filter(|(_, d)| **d == 0).map(|(id, _)| *id).collect();
        let engine = |id| if bad.contains(&id) { rejected() } else { Verdict::Accepted };
        for _ in 0..1000 {
            sim.enter(1, 0.0);
            sim.run(Duration::from_millis(100), engine);
        }
        assert_eq!(sim.accepted.len(), 1050);
        assert_eq!(sim.refused.len(), 50);
        assert!(sim.refused.iter().all(|(id, _)| bad.contains(id)));
    }

    #[test]
    fn after_the_permission_is_back_no_suspect_becomes_a_dead_letter() {
        let mut sim = Sim::new();
        for n in 0..40 {
            sim.enter(n % 4, 0.0);
        }
        sim.run(Duration::from_mins(1), |_| forbidden());
        for n in 0..40 {
            sim.enter(n % 4, 0.0);
            sim.run(Duration::from_secs(1), |_| Verdict::Accepted);
        }
        sim.run(Duration::from_mins(1), |_| Verdict::Accepted);
        assert_eq!((sim.accepted.len(), sim.refused.len()), (80, 0));
    }

    #[test]
    fn an_outage_of_500s_charges_a_frame_once() {
        let mut sim = Sim::new();
        for n in 0..20 {
            sim.enter(n % 4, 0.0);
        }
        for _ in 0..2 {
            sim.run(Duration::from_mins(10), |_| server_error());
            assert!(sim.line.cases.values().all(|case| case.charges <= 1));
        }
        sim.run(HALF_AN_HOUR, |_| Verdict::Accepted);
        assert_eq!((sim.accepted.len(), sim.refused.len()), (20, 0));
    }

    #[test]
    fn a_pause_lets_one_probe_through_and_opens_slowly() {
        let mut sim = Sim::new();
        for n in 0..100 {
            sim.enter(n % 5, 0.0);
        }
        sim.run(Duration::from_secs(100), |_| Verdict::Unreachable("away".into()));
        let probes = &sim.attempts[8.min(sim.attempts.len())..];
        let nearest = probes.windows(2).map(|w| w[1].0 - w[0].0).min().unwrap();
        assert!(nearest >= Duration::from_millis(200), "{nearest:?}");
        let tried: HashSet<CaseId> = sim.attempts.iter().map(|(_, id)| *id).collect();
        assert_eq!(tried.len(), sim.attempts.len().min(100), "probes take turns");
        assert_eq!(sim.line.concurrency(), 1);
    }

    #[test]
    fn retry_after_is_kept() {
        let mut sim = Sim::new();
        sim.enter(0, 0.0);
        sim.run(Duration::from_secs(6), |_| transient(Some(7)));
        assert_eq!((sim.line.state(), sim.attempts.len()), (State::Throttled, 1));
        sim.run(Duration::from_secs(2), |_| Verdict::Accepted);
        assert_eq!(sim.accepted.len(), 1);
        assert!(sim.attempts[1].0 - sim.began >= Duration::from_secs(7));
    }

    #[test]
    fn c2_a_retry_after_of_thirty_years_holds_the_engine_for_minutes() {
        let reply = Reply {
            status: 429,
            body: bytes::Bytes::new(),
            complete: true,
            retry_after: Some("1000000000".into()),
            date: None,
        };
        let verdict = judge(&Ok(reply), std::time::SystemTime::now());
        let mut sim = Sim::new();
        sim.enter(0, 0.0);
        sim.run(Duration::from_mins(9), |_| verdict.clone());
        assert_eq!((sim.line.state(), sim.attempts.len()), (State::Throttled, 1), "it is honoured");
        sim.run(Duration::from_mins(2), |_| Verdict::Accepted);
        assert_eq!((sim.accepted.len(), sim.line.state()), (1, State::Open), "and clamped");
    }

    #[test]
    fn c4_a_login_that_is_refused_is_tried_a_few_times_an_hour_and_no_frame_is_lost() {
        /// Thirty seconds apart at first, a quarter of an hour in the end.
        const LOGINS_AN_HOUR: u32 = 9;
        let mut sim = Sim::new();
        sim.login = Some(Verdict::Credentials("wrong password".into()));
        for n in 0..50 {
            sim.enter(n % 5, 0.0);
        }
        for _ in 0..5 {
            let before = sim.logins;
            sim.run(Duration::from_hours(1), |_| Verdict::Accepted);
            assert!((4..=LOGINS_AN_HOUR).contains(&(sim.logins - before)), "{} logins", sim.logins - before);
        }
        assert_eq!((sim.line.state(), sim.attempts.len()), (State::Credentials, 0));
        sim.login = None;
        sim.run(Duration::from_mins(16), |_| Verdict::Accepted);
        assert_eq!((sim.accepted.len(), sim.refused.len()), (50, 0));
    }

    #[test]
    fn a_late_401_for_an_old_token_wants_no_new_one() {
        let mut sim = Sim::new();
        let ids = [sim.enter(0, 0.0), sim.enter(0, 0.0)];
        sim.line.concurrency = Concurrency::new(2);
        sim.line.concurrency.accepted(LATENCY, 1, sim.now);
        sim.line.token_ready(1, true, sim.now);
        sim.line.pump(sim.now);
        assert_eq!(sim.line.in_flight(), 2);
        sim.line.prove_token(1, &Verdict::Accepted);
        sim.line.token_ready(2, true, sim.now);
        for (number, case) in (1..).zip(ids) {
            let ended = Ended { case, number, token: 1, verdict: Verdict::Token, latency: LATENCY };
            assert_eq!(sim.line.ended(ended, sim.now), Next::Wait);
        }
        sim.line.pump(sim.now);
        assert_eq!((sim.line.token_wanted(), sim.line.in_flight(), sim.line.state()), (None, 2, State::Open));
    }

    #[test]
    fn it_is_stuck_when_only_somebody_else_can_help_and_not_before() {
        let soon = Duration::from_secs(20);
        for (verdict, frames, stuck) in [
            (rejected(), 1, true),
            (rejected(), 30, true),
            (forbidden(), 2, true),
            (forbidden(), 30, true),
            (Verdict::NotOurEngine("portal".into()), 1, true),
            (Verdict::Token, 1, true),
            (Verdict::Unreachable("nobody there".into()), 1, true),
            // These may pass.
            (server_error(), 1, false),
            (server_error(), 30, false),
            (transient(Some(600)), 1, false),
        ] {
            let mut sim = Sim::new();
            for n in 0..frames {
                sim.enter(n % 3, 0.0);
            }
            assert!(!sim.line.is_stuck());
            sim.run(soon, |_| verdict.clone());
            assert_eq!(sim.line.is_stuck(), stuck, "{verdict:?} for {frames}");
            sim.run(HALF_AN_HOUR, |_| Verdict::Accepted);
            assert!(!sim.line.is_stuck(), "nobody waits");
            sim.enter(0, 0.0);
            sim.run(soon, |_| Verdict::Unreachable("away".into()));
            assert!(!sim.line.is_stuck(), "it was there before");
        }
    }

    #[test]
    fn it_is_not_stuck_while_one_of_them_may_still_be_accepted() {
        let mut sim = Sim::new();
        sim.enter(0, 0.0);
        sim.run(Duration::from_secs(20), |_| rejected());
        assert!(sim.line.is_stuck());
        sim.enter(1, 0.0);
        assert!(!sim.line.is_stuck());
        sim.run(Duration::ZERO, |_| Verdict::Accepted);
        assert!(!sim.line.is_stuck(), "it is under way");
    }

    #[test]
    fn stopping_releases_whoever_waits() {
        let mut sim = Sim::new();
        for _ in 0..10 {
            sim.enter(0, 0.0);
        }
        sim.line.stop();
        sim.run(HALF_AN_HOUR, |_| Verdict::Accepted);
        assert_eq!((sim.line.waiting(), sim.attempts.len()), (0, 0));
    }

    fn any_verdict() -> impl Strategy<Value = Verdict> {
        prop_oneof![
            4 => Just(Verdict::Accepted),
            1 => Just(Verdict::Token),
            1 => Just(forbidden()),
            1 => Just(rejected()),
            1 => Just(server_error()),
            1 => Just(transient(None)),
            1 => Just(transient(Some(3))),
            1 => Just(Verdict::NotOurEngine(String::new())),
            1 => Just(Verdict::Unreachable(String::new())),
            1 => Just(Verdict::Ambiguous(String::new())),
        ]
    }

    proptest! {
        #[test]
        fn whatever_the_engine_answers_nothing_is_lost_the_rate_holds_and_it_recovers(
            verdicts in prop::collection::vec(any_verdict(), 0..200),
            frames in prop::collection::vec((0_u32..4, 0_u64..300), 1..60),
            rate in prop_oneof![Just(0.0), 5.0..200.0],
        ) {
            let mut sim = Sim::with(Settings { rate, ..Sim::new().line.settings });
            let mut verdicts = verdicts.into_iter();
            for (detector, gap) in &frames {
                sim.enter(*detector, if *detector == 0 { 20.0 } else { 0.0 });
                sim.run(Duration::from_millis(*gap), |_| verdicts.next().unwrap_or(Verdict::Accepted));
            }
            sim.run(Duration::from_hours(10), |_| verdicts.next().unwrap_or(Verdict::Accepted));
            prop_assert_eq!(sim.accepted.len() + sim.refused.len(), frames.len());
            prop_assert_eq!(sim.line.in_flight() + sim.line.waiting() + sim.line.cases.len(), 0);
            prop_assert!(sim.line.timed.is_empty() && sim.line.suspects.is_empty());
            prop_assert!(sim.line.lanes.values().all(|l| l.cases == 0 && l.flying == 0 && l.suspects == 0));
            let slow: Vec<_> = sim.attempts.iter().filter(|(_, id)| sim.detectors[id] == 0).map(|(at, _)| *at).collect();
            for (rate, times) in [(20.0, slow), (rate, sim.attempts.iter().map(|(at, _)| *at).collect())] {
                if rate > 0.0 {
                    for (i, from) in times.iter().enumerate() {
                        for (j, to) in times.iter().enumerate().skip(i) {
                            let allowed = rate * (*to - *from).as_secs_f64() + rate.ceil() + 1e-3;
                            prop_assert!((j - i + 1) as f64 <= allowed);
                        }
                    }
                }
            }
        }
    }
}

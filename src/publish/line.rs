//! The line in front of the engine: who may try now. A pure state machine: time is passed in, signals are collected for the
//! caller to send, nothing sleeps in here. Its parts: `fault` decides whose fault a refusal is, `pause` holds the line and probes.
//!
//! *Case*: one frame that wants to be published. *Lane*: the cases of one detector. *Mark*: the number of the newest attempt when something
//! happened; an acceptance proves the engine's health since then only if its own attempt began later, that is, has a higher number.
//!
//! The cost of all this in one place: every attempt takes the one lock around it twice, and a start looks at each detector that has
//! something waiting if the frame that has waited longest may not go.

mod fault;
mod pause;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

pub(super) use self::fault::Ended;
use self::fault::{Streak, Suspicion};
use self::pause::Pause;
use super::backoff::Backoff;
use super::limit::{Concurrency, RateLimit};
use super::state::{Change, State};
use crate::frame::Detector;
use crate::settle::Refusal;

/// With so many detectors, those that went are looked for; and again at twice as many as were left then.
const LANES_KEPT: usize = 64;

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
    /// So many lanes may be there before the next look for those that went.
    lanes_max: usize,
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

impl Lane {
    /// A suspect of this detector comes alone.
    fn waits_for_itself(&self) -> bool {
        self.suspects > 0 && self.flying > 0
    }
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
            lanes_max: LANES_KEPT,
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
        if self.lanes.len() >= self.lanes_max && self.pause.is_none() {
            self.forget_lanes(now);
        }
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

    /// Forgets detectors that have nothing here any more and owe no rate limit anything.
    fn forget_lanes(&mut self, now: Instant) {
        self.lanes.retain(|_, lane| lane.cases > 0 || !lane.limit.is_idle(now));
        self.lanes_max = LANES_KEPT.max(2 * self.lanes.len());
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
        // A token says nothing about a pause that the engine asked for.
        if let (Some(pause), true) = (&mut self.pause, self.state != State::Throttled) {
            pause.next_probe = now;
        }
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

    fn pump_open(&mut self, now: Instant) -> bool {
        while self.in_flight < self.concurrency.now() {
            let (first, held) = self.who_is_first(now);
            let Some(id) = first else { return held };
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

    /// The first in line that may go, if any; and whether a detector's own rate holds one back, whose time then is a time to wake.
    fn who_is_first(&mut self, now: Instant) -> (Option<CaseId>, bool) {
        // As a rule whoever has waited longest. Only where he may not go is each detector looked at.
        if let Some((_, &id)) = self.waiting.first_key_value()
            && let Some(case) = self.cases.get(&id)
            && case.place == Place::Ready
            && let Some(lane) = self.lanes.get(&case.lane)
            && !lane.waits_for_itself()
            && lane.limit.wait(now).is_none()
        {
            return (Some(id), false);
        }
        let mut first: Option<(u64, CaseId)> = None;
        let mut wake = None;
        for lane in self.lanes.values() {
            let Some((&ticket, &id)) = lane.ready.first_key_value() else { continue };
            if lane.waits_for_itself() {
                continue;
            }
            if let Some(at) = lane.limit.wait(now) {
                wake = Some(earlier(wake, at));
            } else if first.is_none_or(|(t, _)| ticket < t) {
                first = Some((ticket, id));
            }
        }
        if let Some(at) = wake {
            self.wake_at(at);
        }
        (first.map(|(_, id)| id), wake.is_some())
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
}

fn earlier(a: Option<Instant>, b: Instant) -> Instant {
    a.map_or(b, |a| a.min(b))
}

#[cfg(test)]
mod tests;

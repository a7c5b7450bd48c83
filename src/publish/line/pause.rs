//! Pauses: what led to them, one probe at a time, and the slow start after. Time is passed in.

use std::time::Duration;

use tokio::time::Instant;

use super::fault::CONFIRMATIONS;
use super::{Case, CaseId, Lane, Line, Token, earlier};
use crate::publish::backoff::Backoff;
use crate::publish::state::{Change, State};
use crate::publish::verdict::Verdict;

/// Failed probes in a row after which a pause is no passing trouble.
const LASTING_PROBES: u32 = 2;
/// The same for an engine that has taken nothing yet and does not answer: it may be starting.
const ABSENT_PROBES: u32 = 5;
/// Between logins that are refused.
const LOGIN_BACKOFF: Backoff = Backoff::between(Duration::from_secs(30), Duration::from_mins(15));

#[derive(Debug)]
pub(super) struct Pause {
    pub(super) next_probe: Instant,
    pub(super) last_probe: Instant,
    pub(super) probes: u32,
    pub(super) probing: Option<CaseId>,
    pub(super) since: Instant,
    /// Lanes refused since this mark had their chance in this pause.
    pub(super) mark: u64,
}

impl Line {
    /// Whether waiting longer helps none of those that wait.
    pub(in crate::publish) fn is_stuck(&self) -> bool {
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

    /// There is no token, and the line waited for one: that counts as a probe.
    pub(in crate::publish) fn token_failed(&mut self, verdict: &Verdict, now: Instant) {
        self.token = Token::Missing { renewable: false };
        let (state, until, reason) = match verdict {
            Verdict::Credentials(message) => (State::Credentials, None, message.clone()),
            Verdict::NotOurEngine(what) => (State::UnexpectedAnswer, None, format!("at the login: {what}")),
            Verdict::Unread(what) | Verdict::Unreachable(what) | Verdict::Ambiguous(what) => {
                (State::Unreachable, None, what.clone())
            }
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

    /// One probe at a time, from another frame each time.
    pub(super) fn pump_paused(&mut self, now: Instant) -> bool {
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

    /// Pauses an open engine; in a pause, this was the probe.
    pub(super) fn engine_trouble(
        &mut self,
        state: State,
        until: Option<Duration>,
        reason: &str,
        speaks: bool,
        now: Instant,
    ) {
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
    pub(super) fn extend_throttle(&mut self, retry_after: Option<Duration>, now: Instant) {
        if let (Some(pause), State::Throttled, Some(wait)) = (&mut self.pause, self.state, retry_after) {
            pause.next_probe = pause.next_probe.max(now + wait);
        }
    }

    pub(super) fn open(&mut self, reason: &str, now: Instant) {
        if let Some(pause) = self.pause.take() {
            let paused = humantime::format_duration(Duration::from_secs((now - pause.since).as_secs()));
            self.enter_state(State::Open, &format!("{reason} after {paused}"));
        }
        self.stale = self.number;
        self.concurrency.restart();
        self.lost = 0;
        self.forget_streaks();
        self.forget_lanes(now);
    }

    pub(super) fn forget_streaks(&mut self) {
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::tests::{HALF_AN_HOUR, Sim, forbidden, rejected, server_error, transient};
    use super::*;
    use crate::publish::verdict::{Reply, judge};

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
    fn c2_a_token_that_is_renewed_meanwhile_does_not_end_the_pause_that_the_engine_asked_for() {
        let mut sim = Sim::new();
        sim.enter(0, 0.0);
        sim.run(Duration::from_secs(1), |_| transient(Some(60)));
        assert_eq!((sim.line.state(), sim.attempts.len()), (State::Throttled, 1));
        sim.generation += 1;
        sim.line.token_ready(sim.generation, false, sim.now);
        sim.run(Duration::from_secs(58), |_| transient(Some(60)));
        assert_eq!(sim.attempts.len(), 1, "not before the minute is over");
        sim.run(Duration::from_secs(2), |_| Verdict::Accepted);
        assert_eq!(sim.accepted.len(), 1);
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
}

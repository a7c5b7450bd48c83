//! Whose fault a refusal is: the frame's, the token's or the engine's. What each end of an attempt does to the line.
//!
//! A frame is at fault only if it was refused, an attempt that began later was accepted, and the same happened once more: then
//! the engine takes others while it does not take this one. Many different frames refused with none accepted are the engine's
//! trouble: it is paused, and no frame is charged.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

use super::{CaseId, Line, Next, Signal, Token};
use crate::publish::state::State;
use crate::publish::verdict::Verdict;
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
pub(super) const CONFIRMATIONS: u32 = 2;

/// One attempt and how it ended.
#[derive(Debug)]
pub(in crate::publish) struct Ended {
    pub(in crate::publish) case: CaseId,
    pub(in crate::publish) number: u64,
    /// Which token it carried.
    pub(in crate::publish) token: u64,
    pub(in crate::publish) verdict: Verdict,
    pub(in crate::publish) latency: Duration,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Suspicion {
    pub(super) reason: Reason,
    pub(super) mark: u64,
    /// Refusals that an acceptance followed.
    pub(super) confirmed: u32,
    /// Refusals in all.
    pub(super) refusals: u32,
    /// Refused, and no acceptance since.
    pub(super) awaiting: bool,
}

/// Different frames that were refused in the same way since the last acceptance.
#[derive(Debug, Default)]
pub(super) struct Streak {
    pub(super) first: u64,
    pub(super) cases: HashSet<CaseId>,
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

impl Line {
    /// An attempt ended.
    pub(in crate::publish) fn ended(&mut self, ended: Ended, now: Instant) -> Next {
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
            Verdict::Unread(what) => {
                if probe {
                    self.engine_trouble(State::Unreachable, None, &what, speaks, now);
                }
                self.back_off(id, now);
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
            | Verdict::Unread(_)
            | Verdict::Unreachable(_)
            | Verdict::Ambiguous(_) => false,
        };
        if let Token::Ready { generation, proven, .. } = &mut self.token
            && *generation == token
        {
            *proven |= known;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::tests::{BACKOFF_MAX, HALF_AN_HOUR, LATENCY, Sim, forbidden, rejected, server_error};
    use super::*;
    use crate::publish::limit::Concurrency;

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
            assert!(longest <= BACKOFF_MAX + LATENCY, "{longest:?}");
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
}

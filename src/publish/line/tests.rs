//! The line, a clock, and an engine that is a function. Its parts have their own tests beside them.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::fault::Ended;
use super::*;
use crate::publish::state::State;
use crate::publish::verdict::Verdict;
use crate::settle::Refusal;

pub(super) const LATENCY: Duration = Duration::from_millis(10);
pub(super) const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// A line, a clock and an engine that is a function.
pub(super) struct Sim {
    pub(super) line: Line,
    pub(super) now: Instant,
    pub(super) began: Instant,
    pub(super) flying: VecDeque<(CaseId, u64)>,
    pub(super) detectors: HashMap<CaseId, u32>,
    pub(super) accepted: Vec<CaseId>,
    pub(super) refused: Vec<(CaseId, Refusal)>,
    pub(super) attempts: Vec<(Instant, CaseId)>,
    pub(super) generation: u64,
    /// What a login comes to; `None`: it gives a token.
    pub(super) login: Option<Verdict>,
    pub(super) logins: u32,
    pub(super) states: Vec<State>,
}

impl Sim {
    pub(super) fn new() -> Self {
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
            flying: VecDeque::new(),
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

    pub(super) fn enter(&mut self, detector: u32, rate: f64) -> CaseId {
        let detector_name = format!("cam{detector}").into();
        let d = Detector { name: detector_name, time_zone: "UTC".into(), rate, weight: 1 };
        let id = self.line.enter(&d, self.now);
        self.detectors.insert(id, detector);
        id
    }

    /// Lets time pass until `end`, or nothing waits. Panics if something waits and nothing would ever happen.
    pub(super) fn run(&mut self, span: Duration, mut engine: impl FnMut(CaseId) -> Verdict) {
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

pub(super) fn rejected() -> Verdict {
    Verdict::Rejected { status: 400, message: "no".into() }
}
pub(super) fn forbidden() -> Verdict {
    Verdict::Forbidden { status: 403, message: "no".into() }
}
pub(super) fn server_error() -> Verdict {
    Verdict::ServerError { status: 500, message: "oops".into() }
}
pub(super) fn transient(retry_after: Option<u64>) -> Verdict {
    let retry_after = retry_after.map(Duration::from_secs);
    Verdict::Transient { status: 503, retry_after, message: String::new() }
}

pub(super) const HALF_AN_HOUR: Duration = Duration::from_mins(30);

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

#[test]
fn detectors_that_went_are_forgotten_also_where_their_rate_limit_has_to_be_paid_for() {
    let mut sim = Sim::new();
    for detector in 0..5000 {
        sim.enter(detector, 10.0);
        sim.run(Duration::from_millis(20), |_| Verdict::Accepted);
        sim.now += Duration::from_millis(20);
    }
    assert_eq!(sim.accepted.len(), 5000);
    assert!(sim.line.lanes.len() <= 2 * LANES_KEPT, "{} lanes", sim.line.lanes.len());
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

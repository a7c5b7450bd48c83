//! The desk: the line, shared by all frames under one lock, and each frame's seat at it. Not here: who may go, which is `line`'s
//! to say, and what waits for the clock, which is in [`Publisher::run`].

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{info, warn};

use super::Publisher;
use super::line::{CaseId, Ended, Line, Next, Signal};
use super::state::{Change, State};
use super::verdict::Verdict;
use crate::frame::Detector;

/// What changes under the lock.
pub(super) struct Desk {
    pub(super) line: Line,
    pub(super) seats: HashMap<CaseId, oneshot::Sender<Signal>>,
    /// The moment that `run` sleeps until.
    pub(super) armed: Option<Instant>,
    pub(super) since: Timestamp,
    pub(super) failures: u64,
    pub(super) last_failure: String,
    /// What the gauges of attempts in flight and of concurrency say.
    pub(super) shown: Option<(usize, usize)>,
    /// Waiting for rate limits, not yet counted as whole seconds.
    pub(super) held: Duration,
}

impl Publisher {
    pub(super) fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts what may start, tells those it concerns, and shows what changed.
    pub(super) fn turn(&self, desk: &mut Desk) {
        desk.line.pump(Instant::now());
        for (case, signal) in desk.line.take_signals() {
            // A case whose task is gone leaves by its seat's drop.
            if let Some(seat) = desk.seats.remove(&case) {
                drop(seat.send(signal));
            }
        }
        for change in desk.line.take_changes() {
            desk.since = Timestamp::now();
            self.handles.show_state(change.to);
            tell(&change);
        }
        let now = (desk.line.in_flight(), desk.line.concurrency());
        if desk.shown != Some(now) {
            desk.shown = Some(now);
            self.metrics.in_flight.set(now.0 as f64);
            self.handles.concurrency.set(now.1 as f64);
        }
        desk.held += desk.line.take_held();
        if desk.held.as_secs() > 0 {
            self.handles.rate_limited.increment(desk.held.as_secs());
            desk.held = Duration::from_nanos(desk.held.subsec_nanos().into());
        }
        if desk.line.token_wanted().is_some() {
            self.token.notify_one();
        }
        if desk.line.wake().is_some_and(|at| desk.armed.is_none_or(|armed| at < armed)) {
            desk.armed = desk.line.wake();
            self.timer.notify_one();
        }
    }
}

/// A frame's place at the desk; leaves it when dropped, wherever it was.
pub(super) struct Seat<'a> {
    publisher: &'a Publisher,
    pub(super) case: CaseId,
    signal: oneshot::Receiver<Signal>,
    gone: bool,
}

impl<'a> Seat<'a> {
    pub(super) fn take(publisher: &'a Publisher, detector: &Detector) -> Self {
        let mut desk = publisher.desk();
        let case = desk.line.enter(detector, Instant::now());
        let signal = desk.wait(case);
        publisher.turn(&mut desk);
        drop(desk);
        Self { publisher, case, signal, gone: false }
    }

    pub(super) async fn signal(&mut self) -> Signal {
        // The sender is only dropped unsent with the desk itself.
        (&mut self.signal).await.unwrap_or(Signal::Released)
    }

    pub(super) fn ended(&mut self, ended: Ended) -> Next {
        let mut desk = self.publisher.desk();
        let reason = ended.verdict.reason();
        let routine = matches!(ended.verdict, Verdict::Accepted | Verdict::Token);
        let failure = (!routine).then(|| format!("{:?}", ended.verdict));
        let next = desk.line.ended(ended, Instant::now());
        if next == Next::Accepted {
            self.gone = true;
        } else {
            self.signal = desk.wait(self.case);
        }
        self.publisher.turn(&mut desk);
        // In a pause the change of state has said it.
        if let Some(failure) = failure
            && desk.line.state() == State::Open
        {
            desk.failures += 1;
            desk.last_failure = failure;
            self.publisher.failure.notify_one();
        }
        drop(desk);
        if next == Next::Wait {
            self.publisher.metrics.counter("publish_retries_total", &[("reason", reason)]).increment(1);
        }
        next
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        let mut desk = self.publisher.desk();
        desk.seats.remove(&self.case);
        desk.line.abandoned(self.case, Instant::now());
        self.publisher.turn(&mut desk);
    }
}

impl Desk {
    fn wait(&mut self, case: CaseId) -> oneshot::Receiver<Signal> {
        let (tell, hear) = oneshot::channel();
        self.seats.insert(case, tell);
        hear
    }
}

fn tell(change: &Change) {
    let (from, to, reason) = (change.from.as_str(), change.to.as_str(), &change.reason);
    if change.to == State::Open {
        info!(from, reason, "publishing again");
    } else {
        warn!(from, state = to, reason, advice = change.to.advice(), "publishing is paused; frames are kept");
    }
}

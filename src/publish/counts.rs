//! Metrics that are touched for every attempt, looked up once.

use std::sync::OnceLock;

use metrics::{Counter, Gauge};

use super::state::State;
use super::verdict::{Reply, SendError};
use crate::metrics::Metrics;

/// Metrics that are touched for every attempt.
pub(super) struct Handles {
    statuses: Box<[OnceLock<Counter>]>,
    errors: [(&'static str, Counter); 4],
    states: [(State, Gauge); 8],
    pub(super) concurrency: Gauge,
    pub(super) skew: Gauge,
    pub(super) rate_limited: Counter,
}

impl Handles {
    pub(super) fn new(metrics: &Metrics) -> Self {
        let error = |result| (result, metrics.counter("publish_attempts_total", &[("result", result)]));
        Self {
            statuses: std::iter::repeat_with(OnceLock::new).take(1000).collect(),
            errors: ["timeout", "connect", "tls", "reset"].map(error),
            states: State::ALL.map(|state| (state, metrics.gauge("engine_state", &[("state", state.as_str())]))),
            concurrency: metrics.gauge("concurrency_limit", &[]),
            skew: metrics.gauge("clock_skew_seconds", &[]),
            rate_limited: metrics.counter("rate_limited_seconds_total", &[]),
        }
    }

    pub(super) fn attempt(&self, metrics: &Metrics, result: &Result<Reply, SendError>) {
        let error = match result {
            Ok(reply) => {
                let Some(slot) = self.statuses.get(usize::from(reply.status)) else { return };
                let register = || metrics.counter("publish_attempts_total", &[("result", &reply.status.to_string())]);
                slot.get_or_init(register).increment(1);
                return;
            }
            Err(SendError::Timeout { .. }) => "timeout",
            Err(SendError::Connect(_) | SendError::Dns(_)) => "connect",
            Err(SendError::Tls(_) | SendError::Certificate(_)) => "tls",
            Err(SendError::Reset { .. } | SendError::Refused(_)) => "reset",
        };
        if let Some((_, counter)) = self.errors.iter().find(|(name, _)| *name == error) {
            counter.increment(1);
        }
    }

    pub(super) fn show_state(&self, now: State) {
        for (state, gauge) in &self.states {
            gauge.set(f64::from(u8::from(*state == now)));
        }
    }
}

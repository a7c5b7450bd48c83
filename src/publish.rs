//! Stub of publishing: only its configuration.
pub mod engine;

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[publish]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Attempts per second for the whole box; 0 = no limit.
    pub rate: f64,
    /// Attempts that may follow each other at once; 0 = one second's worth.
    pub burst: u32,
    /// Ceiling of the adaptive concurrency.
    pub max_in_flight: usize,
    /// Attempts for one frame while the engine takes others.
    pub attempts: u32,
    /// Shortest wait between attempts.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub backoff_min: Duration,
    /// Longest wait between attempts.
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

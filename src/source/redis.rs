//! A Redis stream: entries read as one of a consumer group.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{State, Surroundings};

/// Serves one entry until it is stopped; returns when everything in hand is settled.
pub async fn run(config: Config, around: Surroundings) {
    around.health.set(State::Held(format!("{} is not built yet", config.place())));
    around.stop.cancelled().await;
}

/// `[detectors.redis]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `redis://HOST:PORT`, `rediss://` for TLS.
    pub url: String,
    /// The stream's key.
    pub stream: String,
    /// The consumer group, created where it is missing.
    pub group: String,
    /// This box's name in the group.
    pub consumer: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { url: String::new(), stream: String::new(), group: "framegate".into(), consumer: "framegate".into() }
    }
}

impl Config {
    /// For people: no secrets.
    pub fn place(&self) -> String {
        format!("{} {}", self.url, self.stream)
    }
}

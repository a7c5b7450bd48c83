//! A NATS `JetStream` stream, pulled through a durable consumer.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{State, Surroundings};

/// Serves one entry until it is stopped; returns when everything in hand is settled.
pub async fn run(config: Config, around: Surroundings) {
    around.health.set(State::Held(format!("{} is not built yet", config.place())));
    around.stop.cancelled().await;
}

/// `[detectors.nats]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `nats://HOST:PORT`, `tls://` for TLS; several servers with commas between them.
    pub url: String,
    /// The stream's name.
    pub stream: String,
    /// The durable consumer, created where it is missing.
    pub consumer: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { url: String::new(), stream: String::new(), consumer: "framegate".into() }
    }
}

impl Config {
    /// For people: no secrets.
    pub fn place(&self) -> String {
        format!("{} {}", self.url, self.stream)
    }
}

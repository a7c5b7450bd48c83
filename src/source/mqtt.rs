//! An MQTT topic: messages are spooled, then acknowledged.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{State, Surroundings};

/// Serves one entry until it is stopped; returns when everything in hand is settled.
pub async fn run(config: Config, around: Surroundings) {
    around.health.set(State::Held(format!("{} is not built yet", config.place())));
    around.stop.cancelled().await;
}

/// `[detectors.mqtt]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `mqtt://HOST:PORT`, `mqtts://` for TLS.
    pub url: String,
    /// What to subscribe to; wildcards are allowed.
    pub topic: String,
    /// The session's name at the broker; no two clients may share one.
    pub client_id: String,
}

impl Config {
    /// For people: no secrets.
    pub fn place(&self) -> String {
        format!("{} {}", self.url, self.topic)
    }
}

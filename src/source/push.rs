//! Frames that others push over HTTP: spooled, then answered.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{State, Surroundings};

/// Serves one entry until it is stopped; returns when everything in hand is settled.
pub async fn run(config: Config, around: Surroundings) {
    around.health.set(State::Held(format!("{} is not built yet", config.place())));
    around.stop.cancelled().await;
}

/// `[detectors.push]`: nothing of its own; where to listen is said in `[push]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {}

impl Config {
    /// For people: no secrets.
    pub fn place(&self) -> String {
        "push".into()
    }
}

//! A NATS `JetStream` stream, pulled through a durable consumer.

mod config;

pub use self::config::Config;
use super::{State, Surroundings};

/// Serves one entry until it is stopped; returns when everything in hand is settled.
pub async fn run(config: Config, around: Surroundings) {
    around.health.set(State::Held(format!("{} is not built yet", config.place())));
    around.stop.cancelled().await;
}

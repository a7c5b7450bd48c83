//! stub
mod config;
pub mod detect_time;
pub use config::*;
use std::sync::Arc;
use crate::{metrics::Metrics, queue::Intake, source::{Entry, Health}};
/// x
pub async fn run(_entry: Arc<Entry>, _intake: Intake, _metrics: Arc<Metrics>, _max_frame: u64, _health: Health, stop: tokio_util::sync::CancellationToken) { stop.cancelled().await }

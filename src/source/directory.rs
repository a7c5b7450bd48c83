//! Stub of drop directories: only their configuration.
mod config;

pub use config::{AfterPublish, Config, DetectTime, FromName, Watch};

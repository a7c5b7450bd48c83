//! Stub of the admin endpoint: only its configuration.
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[admin]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Read-only HTTP.
    pub listen: String,
    /// Control socket.
    pub control: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9464".into(), control: "/run/framegate/control.sock".into() }
    }
}

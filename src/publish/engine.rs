//! Stub of the engine's client: only its configuration.
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[engine]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the engine is.
    pub base_url: String,
    /// The account.
    #[serde(default)]
    pub username: Option<String>,
    /// File with its password.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// File with a ready token.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// For one whole attempt.
    #[serde(default = "timeout", with = "humantime_serde")]
    #[schemars(with = "String")]
    pub timeout: Duration,
    /// For TCP and TLS.
    #[serde(default = "connect_timeout", with = "humantime_serde")]
    #[schemars(with = "String")]
    pub connect_timeout: Duration,
    /// HTTP/2.
    #[serde(default)]
    pub http2: bool,
    /// A proxy.
    #[serde(default)]
    pub proxy: Option<String>,
    /// Trust this CA.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Exactly these public keys.
    #[serde(default)]
    pub pin_sha256: Vec<String>,
    /// No verification.
    #[serde(default)]
    pub danger_accept_invalid_certs: bool,
}

fn timeout() -> Duration {
    Duration::from_secs(10)
}

fn connect_timeout() -> Duration {
    Duration::from_secs(3)
}

//! Stub of the engine's client: only its configuration.
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[engine]`: where it is and how to log in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the engine answers; a path is kept: `https://customer.econnectcloud.com/identities`.
    pub base_url: String,
    /// Who logs in.
    pub username: Option<String>,
    /// File with the password; read again at every login.
    pub password_file: Option<PathBuf>,
    /// File with a ready token, read again when it changes; instead of username and password.
    pub token_file: Option<PathBuf>,
    /// Deadline of one attempt, from connecting to the answer's last byte.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub timeout: Duration,
    /// Deadline of DNS, TCP and TLS together.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub connect_timeout: Duration,
    /// HTTP/2; costs about twice the CPU with bodies of this size.
    pub http2: bool,
    /// Trust this CA (PEM) and no other.
    pub ca_file: Option<PathBuf>,
    /// Exactly these public keys: SHA-256, base64 or hexadecimal, as `framegate pin URL` shows them.
    pub pin_sha256: Vec<String>,
    /// Takes any certificate. Whoever is in between can then read frames and the password.
    pub danger_accept_invalid_certs: bool,
    /// An HTTP proxy to go through. The environment's proxies are not looked at.
    pub proxy: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            base_url: String::new(),
            username: None,
            password_file: None,
            token_file: None,
            timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(3),
            http2: false,
            ca_file: None,
            pin_sha256: Vec::new(),
            danger_accept_invalid_certs: false,
            proxy: None,
        }
    }
}

//! Dead letters. Stub: only their configuration.
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[dead_letter]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where they are kept.
    pub directory: PathBuf,
    /// All of them together.
    #[schemars(with = "String")]
    pub max_size: ByteSize,
    /// How long they are kept.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_age: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            directory: "/var/lib/framegate/dead-letter".into(),
            max_size: ByteSize::gib(1),
            max_age: Duration::from_hours(7 * 24),
        }
    }
}

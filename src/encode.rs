//! Stub of encoding: only its configuration.
use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[encode]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Encode threads; 0 = one per CPU.
    pub workers: usize,
    /// Images and bodies in memory at once.
    #[schemars(with = "String")]
    pub memory: ByteSize,
    /// The largest image.
    #[schemars(with = "String")]
    pub max_frame: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self { workers: 0, memory: ByteSize::mib(256), max_frame: ByteSize::mib(8) }
    }
}

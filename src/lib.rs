//! Framegate: publishes face images from drop directories to the eConnect Identities engine without losing one.
pub mod cli;
pub mod encode;
pub mod frame;
pub mod metrics;
pub mod queue;
pub mod secret;
pub mod settle;
pub mod source;

//! Framegate: publishes face images from drop directories to the eConnect Identities engine without losing one.
pub mod frame;
pub mod metrics;
pub mod publish;
pub mod queue;
pub mod secret;
pub mod settle;

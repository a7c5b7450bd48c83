//! Framegate: publishes face images from drop directories to the eConnect Identities engine without losing one.
pub mod admin;
pub mod control;
pub mod frame;
pub mod log;
pub mod metrics;
pub mod notify;
pub mod queue;
pub mod secret;
pub mod settle;

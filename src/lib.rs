//! Framegate: publishes face images from drop directories to the eConnect Identities engine without losing one.
pub mod admin;
pub mod cli;
pub mod config;
pub mod encode;
pub mod frame;
pub mod log;
pub mod metrics;
pub mod publish;
pub mod queue;
pub mod secret;
pub mod settle;
pub mod source;

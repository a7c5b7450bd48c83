//! Framegate publishes face images from drop directories and frame queues to the eConnect Identities engine without losing one.
//!
//! # The way of a frame
//!
//! ```text
//! source ──► queue ──► encode ──► publish ──► settle
//! (waits)   (turns,    (claim,     (rate, token,  (delete / archive / acknowledge,
//!            bytes)     read, body)  retry, state)  dead letter, or back)
//! ```
//!
//! [`pipeline`] carries each frame along it; [`daemon`] owns every task. The invariants and what is deliberately absent are
//! in `ARCHITECTURE.md`. The modules in reading order; imports go from lower groups to higher ones, or stay in their own:

pub mod frame;
pub mod log;
pub mod notify;
pub mod secret;

pub mod history;
pub mod metrics;
pub mod settle;

pub mod encode;
pub mod publish;
pub mod queue;

pub mod pipeline;
pub mod source;

pub mod admin;
pub mod control;

pub mod config;

pub mod daemon;

pub mod cli;

/// A stand-in engine with faults to order; stands alone.
pub mod simulator;

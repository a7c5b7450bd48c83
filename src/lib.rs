//! Framegate publishes face images from drop directories to the eConnect Identities engine without losing one.
//!
//! # The way of a frame
//!
//! ```text
//! source ──► queue ──► encode ──► publish ──► settle
//! (claims)  (fair,     (bounded    (rate, token,  (delete / archive,
//!           bounded)    workers)    retry, state)  or dead letter)
//! ```
//!
//! [`pipeline`] carries each frame along it; [`daemon`] owns every task. The invariants and what is deliberately absent are
//! in `ARCHITECTURE.md`. The modules in reading order; imports go from lower lines to higher ones only:

pub mod frame;
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
pub mod config;
pub mod control;
pub mod log;
pub mod notify;

pub mod daemon;

pub mod cli;

/// A stand-in engine with faults to order; stands alone.
pub mod simulator;

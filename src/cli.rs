//! The commands.

pub mod dead_letter;

//! The commands: each reads its arguments, does one thing and says how it ended.

pub mod check;

//! Sources: where frames come from.

pub mod retry;

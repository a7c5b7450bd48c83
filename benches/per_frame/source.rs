//! The crate's `source`, as far as the pieces in it need each other.

mod directory;
#[path = "../../src/source/lanes.rs"]
mod lanes;

pub(crate) use framegate::source::Order;

//! Framegate.
fn main() {}

//! The `affinity` command.
fn main() {}

//! What `deploy/` installs: every document is what the Kubernetes API takes it for, without unknown fields, and what
//! they say of each other agrees.
//!
//! Tests that need a tool which builds and tests do without are `ignored`, and say which tool it is. `cargo xtask test`
//! runs them where the tool is there, and says so where it is not.

mod arguments;
mod chart;
mod manifests;
mod objects;
mod overlays;

//! The objects that `deploy/` installs: every document is valid for the Kubernetes API, without unknown fields, and the
//! documents are consistent with each other.
//!
//! Tests that need a tool which other builds and tests do not need are `ignored`, and name the tool. `cargo xtask test` runs
//! them if the tool is installed, and reports it if not.

mod arguments;
mod chart;
mod manifests;
mod objects;
mod overlays;

//! The agent and the CLI of affinity.

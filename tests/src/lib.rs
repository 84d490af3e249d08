//! The lab: real network namespaces with real clients and real pods, in which the dataplane is tested, shown and measured; and
//! the packet builder for tests that need no network.
//!
//! * [`apiserver`] is a double of a cluster's API.
//! * [`mod@bench`] measures.
//! * [`dice`] is chance that can be repeated.
//! * [`lab`] brings up clients, a node or two and pods, and runs the `affinity` command on the first node.
//! * [`kubeproxy`] writes the rules that kube-proxy would write for the same services, for comparison.
//! * [`proxy`] puts services into effect in a lab of two nodes, by those rules or by `affinity`.
//! * [`callers`] are clients of every kind in such a lab: outside, in pods, on the node.
//! * [`story`] sets a scene for the tests that are told once and hold for every hook, family and protocol.
//! * [`packet`] builds frames, and checks the checksums of any frame.
//! * [`mod@patience`] is how long tests wait.
//! * [`kernel`] runs frames through the kernel programs and the model, from the same state.
//!
//! Everything here needs root, and Debian's iproute2, util-linux, ethtool and tcpdump. Nothing leaves the
//! namespaces that a lab made, and nothing of them stays when the lab is dropped.

pub mod apiserver;
pub mod bench;
pub mod callers;
pub mod dice;
pub mod kernel;
pub mod kubeproxy;
pub mod lab;
pub mod packet;
pub mod patience;
pub mod proxy;
pub mod story;

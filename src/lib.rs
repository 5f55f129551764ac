//! spotter gives every Kubernetes node on EC2 a soft landing.
//!
//! Data flows one way:
//!
//! ```text
//! source (imds) -> notice -> policy -> termination (cordon, drain, release) -> cluster
//!                                           \-> record on the Node     \-> ops (logs, metrics, events)
//! ```
//!
//! `notice`, `policy` and `plan` are pure: no clock, no I/O, no async. `cluster` and `source` talk to the outside and
//! know the pure modules only. `termination` runs what `plan` decides. `app` wires everything together.
//! A test (`tests/it/architecture.rs`) checks these arrows.

pub mod app;
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod notice;
pub mod ops;
pub mod plan;
pub mod policy;
pub mod rehearsal;
pub mod source;
pub mod termination;

//! What operators see of spotter, and how they stop it: logs, metrics, probes, signals.

pub mod admin;
pub mod log;
pub mod metrics;
pub mod shutdown;

/// The version of this build.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The git revision of this build, where whoever built it set `GIT_REVISION`.
pub const REVISION: &str = match option_env!("GIT_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

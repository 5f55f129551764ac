//! The integration tests: one binary, a module per capability.
//!
//! What needs a real API server asks [`support::controlplane::shared`] and is skipped, in one line for the whole run,
//! where the control plane was not built.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, unreachable_pub)]

mod admin;
mod agent_drain;
mod agent_hold;
mod architecture;
mod cluster_client;
mod config;
mod controlplane;
mod field_mock;
mod imds_source;
mod mock_imds;
mod readme;
mod support;

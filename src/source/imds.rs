//! The instance metadata service, read on the instance itself: IMDSv2 only, never v1.
//!
//! [`Imds`] is the client, [`run`] polls it until it is told to stop. Two loops run side by side, so that whatever
//! happens to the slow paths never delays the one that has two minutes.
//!
//! Intervals stay far below what AWS allows (1,024 packets a second and interface for DNS, NTP and metadata
//! together: "Use the Instance Metadata Service to access instance metadata").

mod client;
mod health;
mod metrics;
mod poll;
mod track;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use client::{BaseUrl, DEFAULT_URL, Error, Identity, Imds, Path};
pub use health::{Health, STALE_AFTER};
pub use metrics::Metrics;

use crate::notice::Report;

/// How often each path is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `spot/instance-action`. One second by default: half of it is lost on average, of two minutes.
    pub poll_interval: Duration,
    /// `events/recommendations/rebalance` and `autoscaling/target-lifecycle-state`. Two seconds by default.
    pub rebalance_interval: Duration,
    /// `events/maintenance/scheduled`, and its history where needed. 30 seconds by default: it is planned days ahead.
    pub maintenance_interval: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            poll_interval: Duration::from_secs(1),
            rebalance_interval: Duration::from_secs(2),
            maintenance_interval: Duration::from_secs(30),
        }
    }
}

/// Polls until `cancel`, and reports what is new, changed or gone: a notice that stays as it is makes one report.
///
/// After the first good answer about a kind, [`Report::Synced`] tells that all of it has been reported: what a record
/// remembers besides is no longer there.
///
/// A full channel makes the polls wait; a failing metadata service never ends them. Returns when cancelled, or when
/// nobody receives the reports any more, which is the one error.
pub async fn run(
    imds: &Imds,
    identity: &Identity,
    settings: &Settings,
    reports: mpsc::Sender<Report>,
    health: &Health,
    cancel: CancellationToken,
) -> Result<(), Abandoned> {
    let fast = poll::Spot::new(imds, &identity.instance, settings, health);
    let slow = poll::Slow::new(imds, &identity.instance, settings);
    let both = async { tokio::try_join!(fast.run(&reports), slow.run(&reports)).map(|_| ()) };
    cancel.run_until_cancelled(both).await.unwrap_or(Ok(()))
}

/// Nobody receives the reports of the source any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nobody receives the notices of the metadata service any more")]
pub struct Abandoned;

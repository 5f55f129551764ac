//! What the source counts. The label sets are closed, and every series exists at 0 from the start.

use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::Path;
use crate::notice::{Kind, Source};

/// How a request ended, as the label `code`.
const CODES: [&str; 8] = ["200", "401", "403", "404", "4xx", "5xx", "timeout", "error"];

/// The kinds that the metadata service can announce.
const KINDS: [Kind; 4] =
    [Kind::SpotInterruption, Kind::RebalanceRecommendation, Kind::ScheduledMaintenance, Kind::AsgTermination];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    path: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    source: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NoticeLabels {
    kind: &'static str,
    source: &'static str,
}

const SOURCE: SourceLabels = SourceLabels { source: Source::Imds.as_str() };

/// The counters of the source. A clone counts into the same series.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    healthy: Family<SourceLabels, Gauge>,
    last_success: Family<SourceLabels, Gauge<f64, AtomicU64>>,
    notices: Family<NoticeLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All series, at 0.
    pub fn new() -> Self {
        let metrics = Self {
            requests: Family::default(),
            healthy: Family::default(),
            last_success: Family::default(),
            notices: Family::default(),
        };
        for path in Path::LABELS {
            for code in CODES {
                let _ = metrics.requests.get_or_create(&RequestLabels { path, code });
            }
        }
        let _ = metrics.healthy.get_or_create(&SOURCE);
        let _ = metrics.last_success.get_or_create(&SOURCE);
        for kind in KINDS {
            let _ = metrics.notices.get_or_create(&notice_labels(kind));
        }
        metrics
    }

    /// Adds the series to a registry that sets no prefix.
    pub fn register(&self, registry: &mut Registry) {
        let Self { requests, healthy, last_success, notices } = self;
        registry.register(
            "spotter_imds_requests",
            "Requests to the instance metadata service, by what was read and how it ended",
            requests.clone(),
        );
        registry.register(
            "spotter_source_healthy",
            "1 while the source would see an interruption, 0 while it would not",
            healthy.clone(),
        );
        registry.register(
            "spotter_source_last_success_timestamp_seconds",
            "When the source last had a good answer, in seconds since 1970",
            last_success.clone(),
        );
        registry.register("spotter_notices", "Notices seen, each once, by kind", notices.clone());
    }

    pub(super) fn requested(&self, path: &'static str, code: &'static str) {
        self.requests.get_or_create(&RequestLabels { path, code }).inc();
    }

    pub(super) fn healthy(&self, healthy: bool) {
        self.healthy.get_or_create(&SOURCE).set(i64::from(healthy));
    }

    pub(super) fn succeeded(&self, at: Timestamp) {
        self.last_success.get_or_create(&SOURCE).set(at.as_millisecond() as f64 / 1_000.0);
    }

    pub(super) fn noticed(&self, kind: Kind) {
        self.notices.get_or_create(&notice_labels(kind)).inc();
    }
}

fn notice_labels(kind: Kind) -> NoticeLabels {
    NoticeLabels { kind: kind.as_str(), source: SOURCE.source }
}

/// The label for an answer with this status.
pub(super) fn code_label(status: u16) -> &'static str {
    match status {
        200..=299 => "200",
        401 => "401",
        403 => "403",
        404 => "404",
        400..=499 => "4xx",
        500..=599 => "5xx",
        _ => "error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_exists_from_the_start() {
        let mut registry = Registry::default();
        Metrics::new().register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("spotter_imds_requests_total{path=\"token\",code=\"timeout\"} 0"), "{text}");
        assert!(text.contains("spotter_source_healthy{source=\"imds\"} 0"), "{text}");
        assert!(text.contains("spotter_source_last_success_timestamp_seconds{source=\"imds\"} 0"), "{text}");
        assert!(text.contains("spotter_notices_total{kind=\"asg-termination\",source=\"imds\"} 0"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("spotter_imds_requests_total")).count(), 48);
    }
}

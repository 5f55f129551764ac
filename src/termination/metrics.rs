//! What the termination counts. Label sets are closed, and every series stands at 0 from the start.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::{
    notice::Kind,
    plan::{Answer, drain::Progress},
    termination::{
        Phase, Record,
        tell::{Ending, ReleaseReason},
    },
};

/// From 5 ms to 150 s: from the API server's fastest answer to beyond the two minutes.
const STAGE_BUCKETS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 30.0, 60.0, 150.0];
/// Time left when drained, below zero where it was too late.
const MARGIN_BUCKETS: [f64; 11] = [-30.0, -10.0, 0.0, 5.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 110.0];

/// A point in a termination that is timed from the notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stamp {
    Seen,
    Cordoned,
    FirstEviction,
    LastEviction,
    Drained,
}

impl Stamp {
    const ALL: [Self; 5] = [Self::Seen, Self::Cordoned, Self::FirstEviction, Self::LastEviction, Self::Drained];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Seen => "seen",
            Self::Cordoned => "cordoned",
            Self::FirstEviction => "first_eviction",
            Self::LastEviction => "last_eviction",
            Self::Drained => "drained",
        }
    }
}

/// Why a notice was not acted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dropped {
    Policy,
    Filtered,
    Cancelled,
}

impl Dropped {
    const ALL: [Self; 3] = [Self::Policy, Self::Filtered, Self::Cancelled];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Filtered => "filtered",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What became of a pod.
const POD_OUTCOMES: [&str; 4] = ["evicted", "deleted_at_deadline", "left", "skipped"];

type Labels = [(&'static str, &'static str); 1];
type Labels2 = [(&'static str, &'static str); 2];

/// The metrics of all terminations of a process.
#[derive(Debug, Clone)]
pub struct Metrics {
    dropped: Family<Labels2, Counter>,
    terminations: Family<Labels2, Counter>,
    active: Family<Labels2, Gauge>,
    stages: Family<Labels2, Histogram, fn() -> Histogram>,
    margin: Family<Labels, Histogram, fn() -> Histogram>,
    evictions: Family<Labels, Counter>,
    pods: Family<Labels, Counter>,
    blocked: Gauge,
    released: Family<Labels, Counter>,
    conflicts: Counter,
    write_failures: Counter<u64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn at_zero<S, M: Default, C>(family: &Family<S, M, C>, labels: impl IntoIterator<Item = S>)
where
    S: Clone + std::hash::Hash + Eq + EncodeLabelSet,
    C: prometheus_client::metrics::family::MetricConstructor<M>,
{
    for label in labels {
        drop(family.get_or_create(&label));
    }
}

fn by_kind(name: &'static str, values: &[&'static str]) -> Vec<Labels2> {
    Kind::ALL.iter().flat_map(|kind| values.iter().map(|value| [("kind", kind.as_str()), (name, *value)])).collect()
}

impl Metrics {
    /// All series, at 0.
    pub fn new() -> Self {
        let metrics = Self {
            dropped: Family::default(),
            terminations: Family::default(),
            active: Family::default(),
            stages: Family::new_with_constructor(|| Histogram::new(STAGE_BUCKETS)),
            margin: Family::new_with_constructor(|| Histogram::new(MARGIN_BUCKETS)),
            evictions: Family::default(),
            pods: Family::default(),
            blocked: Gauge::default(),
            released: Family::default(),
            conflicts: Counter::default(),
            write_failures: Counter::default(),
        };
        at_zero(&metrics.dropped, by_kind("reason", &Dropped::ALL.map(Dropped::as_str)));
        at_zero(&metrics.terminations, by_kind("outcome", &Ending::ALL.map(Ending::as_str)));
        at_zero(&metrics.active, by_kind("phase", &Phase::ALL.map(Phase::as_str)));
        for labels in by_kind("stage", &Stamp::ALL.map(Stamp::as_str)) {
            drop(metrics.stages.get_or_create(&labels));
        }
        for kind in Kind::ALL {
            drop(metrics.margin.get_or_create(&[("kind", kind.as_str())]));
        }
        at_zero(&metrics.evictions, RESULTS.map(|result| [("result", result)]));
        at_zero(&metrics.pods, POD_OUTCOMES.map(|outcome| [("outcome", outcome)]));
        at_zero(&metrics.released, ReleaseReason::ALL.map(|reason| [("reason", reason.as_str())]));
        metrics
    }

    /// Names them for the world.
    pub fn register(&self, registry: &mut Registry) {
        let Self {
            dropped,
            terminations,
            active,
            stages,
            margin,
            evictions,
            pods,
            blocked,
            released,
            conflicts,
            write_failures,
        } = self;
        registry.register("spotter_notices_dropped", "Notices that were not acted on", dropped.clone());
        registry.register("spotter_terminations", "Terminations that ended, by outcome", terminations.clone());
        registry.register("spotter_terminations_active", "Terminations on record now, by phase", active.clone());
        let help = "Seconds from seeing the notice to each stage";
        registry.register("spotter_termination_stage_seconds", help, stages.clone());
        let help = "Seconds left to the deadline when the last pod was gone";
        registry.register("spotter_termination_margin_seconds", help, margin.clone());
        registry.register("spotter_evictions", "Answers to evictions and deletions", evictions.clone());
        registry.register("spotter_pods", "What became of the pods of drained nodes", pods.clone());
        registry.register("spotter_pods_blocked", "Pods that cannot be evicted now", blocked.clone());
        registry.register("spotter_cordons_released", "Nodes given back", released.clone());
        let help = "Claims that met another owner of the same fields";
        registry.register("spotter_claim_conflicts", help, conflicts.clone());
        let help = "Writes on the Node that failed, and were tried again";
        registry.register("spotter_node_write_failures", help, write_failures.clone());
    }

    pub(super) fn dropped(&self, kind: Kind, why: Dropped) {
        self.dropped.get_or_create(&[("kind", kind.as_str()), ("reason", why.as_str())]).inc();
    }

    pub(super) fn ended(&self, kind: Option<Kind>, ending: Ending) {
        let kind = kind.unwrap_or(Kind::Manual);
        self.terminations.get_or_create(&[("kind", kind.as_str()), ("outcome", ending.as_str())]).inc();
    }

    /// This record is on the Node now.
    pub(super) fn active(&self, record: &Record) {
        // A rewrite may change the leading kind: the gauges are set, not moved.
        self.active_end();
        self.active.get_or_create(&[("kind", record.leading_kind().as_str()), ("phase", record.phase.as_str())]).set(1);
    }

    /// Nothing of this is on record any more. A process has one node's record at most.
    pub(super) fn active_end(&self) {
        for labels in by_kind("phase", &Phase::ALL.map(Phase::as_str)) {
            self.active.get_or_create(&labels).set(0);
        }
    }

    pub(super) fn stage(&self, kind: Kind, stamp: Stamp, seconds: f64) {
        self.stages.get_or_create(&[("kind", kind.as_str()), ("stage", stamp.as_str())]).observe(seconds);
    }

    pub(super) fn margin(&self, kind: Kind, seconds: f64) {
        self.margin.get_or_create(&[("kind", kind.as_str())]).observe(seconds);
    }

    /// `unready`: the pod is running and not ready, which may keep a budget from ever letting it go.
    pub(super) fn answered(&self, answer: &Answer, unready: bool) {
        self.evictions.get_or_create(&[("result", result(answer, unready))]).inc();
    }

    pub(super) fn progress(&self, progress: Progress) {
        self.blocked.set(i64::try_from(progress.blocked).unwrap_or(i64::MAX));
    }

    pub(super) fn pods(&self, progress: Progress) {
        let counts =
            [progress.gone.saturating_sub(progress.deleted), progress.deleted, progress.left, progress.skipped];
        for (outcome, count) in POD_OUTCOMES.into_iter().zip(counts) {
            self.pods.get_or_create(&[("outcome", outcome)]).inc_by(count as u64);
        }
    }

    pub(super) fn released(&self, reason: ReleaseReason) {
        self.released.get_or_create(&[("reason", reason.as_str())]).inc();
    }

    pub(super) fn conflict(&self) {
        self.conflicts.inc();
    }

    pub(super) fn write_failed(&self) {
        self.write_failures.inc();
    }
}

const RESULTS: [&str; 9] =
    ["accepted", "gone", "budget", "multiple_budgets", "unhealthy", "throttled", "forbidden", "timeout", "error"];

fn result(answer: &Answer, unready: bool) -> &'static str {
    match answer {
        // A budget that is still being processed says nothing about the pod.
        Answer::Budget { retry_after: None, .. } if unready => "unhealthy",
        Answer::Accepted => "accepted",
        Answer::Gone | Answer::Replaced => "gone",
        Answer::Budget { .. } => "budget",
        Answer::MultipleBudgets { .. } => "multiple_budgets",
        Answer::Throttled { .. } => "throttled",
        Answer::Forbidden { .. } => "forbidden",
        Answer::Unknown { .. } => "timeout",
        Answer::NamespaceTerminating | Answer::Failed { .. } => "error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f20_every_series_exists_from_the_start_and_no_label_names_a_node() {
        let mut registry = Registry::default();
        let metrics = Metrics::new();
        metrics.register(&mut registry);
        let text = |registry: &Registry| {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
            text
        };
        let before = text(&registry);
        metrics.dropped(Kind::SpotInterruption, Dropped::Policy);
        metrics.ended(Some(Kind::SpotInterruption), Ending::Drained);
        metrics.answered(&Answer::Accepted, false);
        metrics.stage(Kind::SpotInterruption, Stamp::Cordoned, 0.1);
        metrics.released(ReleaseReason::Expired);
        let after = text(&registry);
        assert_eq!(before.lines().count(), after.lines().count());
        assert!(
            after.contains(r#"spotter_terminations_total{kind="spot-interruption",outcome="drained"} 1"#),
            "{after}"
        );
        assert!(!after.contains("node=") && !after.contains("pod="));
    }
}

//! What happens to each pod of a node that will end, and when. Pure: no clock, no I/O.
//!
//! [`classify`] judges pods one by one, [`budget`] does the arithmetic of the deadline, and [`drain`] is the state
//! machine that turns what was seen into what is to be done.

pub mod budget;
pub mod classify;
pub mod drain;

use std::{
    collections::BTreeMap,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

/// A point on the process's monotonic clock: the time since an origin that the edge chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Moment(pub Duration);

impl Moment {
    /// The moment `span` later; the end of time where that overflows.
    pub fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span))
    }

    /// The moment `span` earlier; the origin where that would be before it.
    pub fn before(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(span))
    }

    /// How long it is from `earlier` to here; zero where `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// A number of 0 up to 1 that hangs on `seed` alone: spreads waits without chance, so that tests can repeat them.
pub fn spread(seed: &impl Hash) -> f64 {
    let mut hasher = DefaultHasher::new();
    seed.hash(&mut hasher);
    (hasher.finish() % 1024) as f64 / 1024.0
}

/// The UID of a pod: its identity, where its name may be given to another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(pub String);

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who made a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// No controller: nothing will make it again.
    None,
    /// The node itself: a static pod, or its mirror.
    Node,
    DaemonSet,
    /// Any other controller, by kind.
    Controller(String),
}

/// What the API server says of one pod, as far as a drain needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    pub uid: PodUid,
    pub namespace: String,
    pub name: String,
    pub owner: Owner,
    /// `kubernetes.io/config.mirror` is set.
    pub mirror: bool,
    pub has_empty_dir: bool,
    /// Phase Succeeded or Failed: its containers have ended for good.
    pub finished: bool,
    /// Its Ready condition is true.
    pub ready: bool,
    /// Seconds, from `spec.terminationGracePeriodSeconds` (30 where absent).
    pub grace_seconds: u32,
    /// `spec.priority`, 0 where absent.
    pub priority: i32,
    /// Present where the pod is being deleted: when its time is up (`metadata.deletionTimestamp`).
    pub terminating_until: Option<Moment>,
    /// Annotations that begin with `spotter.dev/`, by the rest of the key.
    pub annotations: BTreeMap<String, String>,
}

impl PodFacts {
    /// `namespace/name`, as people write it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// How the API server answered an eviction or a deletion.
///
/// What each answer looks like on the wire is decided in `cluster::pods`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// 201 or 200: the pod is being terminated.
    Accepted,
    /// 404: no such pod.
    Gone,
    /// 409 on the UID precondition: another pod has its name now.
    Replaced,
    /// 429 with a `DisruptionBudget` cause: a budget allows no eviction now.
    Budget { message: String, retry_after: Option<Duration> },
    /// 500: more than one budget covers the pod, which the eviction API does not support.
    MultipleBudgets { message: String },
    /// 429 without a Status: the API server's own flow control.
    Throttled { retry_after: Option<Duration> },
    /// 403 with a `NamespaceTerminating` cause: the pod goes with its namespace.
    NamespaceTerminating,
    /// 401 or any other 403.
    Forbidden { message: String },
    /// No answer: timed out or the connection was lost. It may have been carried out.
    Unknown { message: String },
    /// Anything else.
    Failed { message: String },
}

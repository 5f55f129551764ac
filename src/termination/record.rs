//! The durable state of a termination: one JSON annotation on the Node (`spotter.dev/termination`).
//!
//! It is written in the request that cordons, read at start, and enough to go on from. Readers ignore fields that they
//! do not know, so that a version reads what its successor wrote.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    cluster::Manager,
    notice::{Kind, Notice},
    plan::drain::Progress,
    policy::standing::Stage,
};

/// The version of the format. A reader refuses a greater one's record only if it does not parse.
const VERSION: u32 = 1;

/// How many names of pods that were left a record holds: annotations are limited to 256 KiB in all.
const MOST_LEFT_NAMES: usize = 20;

/// Where a termination stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Work begins at a known time; the node is not cordoned.
    Scheduled,
    /// Cordoned on advice.
    Watching,
    Draining,
    /// Every pod that was to go is gone.
    Drained,
    /// The time was up before every pod was gone.
    Incomplete,
}

impl Phase {
    /// Every phase, for metrics.
    pub const ALL: [Self; 5] = [Self::Scheduled, Self::Watching, Self::Draining, Self::Drained, Self::Incomplete];

    /// The word in the record and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Watching => "watching",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Incomplete => "incomplete",
        }
    }

    /// Whether the drain is over.
    pub const fn is_ended(self) -> bool {
        matches!(self, Self::Drained | Self::Incomplete)
    }

    /// Whether the node takes no new pods.
    pub const fn is_cordoned(self) -> bool {
        !matches!(self, Self::Scheduled)
    }

    /// Whether everything that was to be done is done, and only the machine's end is awaited.
    pub const fn is_settled(self) -> bool {
        matches!(self, Self::Watching | Self::Drained | Self::Incomplete)
    }

    /// Whether pods move or have moved: load balancers are told then.
    pub const fn is_drain(self) -> bool {
        matches!(self, Self::Draining | Self::Drained | Self::Incomplete)
    }

    /// What a stage begins as.
    pub fn beginning(stage: Stage) -> Option<Self> {
        match stage {
            Stage::Nothing => None,
            Stage::Scheduled => Some(Self::Scheduled),
            Stage::Watching => Some(Self::Watching),
            Stage::Draining => Some(Self::Draining),
        }
    }
}

/// How a drain ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    pub ended_at: Timestamp,
    /// Pods that were to go.
    pub pods: usize,
    pub gone: usize,
    /// Of these, deleted at their latest start.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub deleted: usize,
    /// Names of pods that were left, twenty at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<String>,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl Outcome {
    pub fn new(ended_at: Timestamp, progress: Progress, mut left: Vec<String>) -> Self {
        left.truncate(MOST_LEFT_NAMES);
        Self { ended_at, pods: progress.total, gone: progress.gone, deleted: progress.deleted, left }
    }
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub v: u32,
    pub id: String,
    pub holder: Manager,
    /// The most pressing first.
    pub kinds: Vec<Kind>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// Whether the power goes at the deadline.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hard: bool,
    pub phase: Phase,
    pub started_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    pub notices: Vec<Notice>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_over_from: Option<Manager>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
}

impl Record {
    /// A record of a termination that begins now. Its content is filled in by the caller.
    pub fn begin(id: String, holder: Manager, phase: Phase, started_at: Timestamp) -> Self {
        Self {
            v: VERSION,
            id,
            holder,
            kinds: Vec::new(),
            deadline: None,
            hard: false,
            phase,
            started_at,
            boot_id: None,
            notices: Vec::new(),
            taken_over_from: None,
            outcome: None,
        }
    }

    /// Reads the annotation; the error says what is wrong with it.
    pub fn parse(annotation: &str) -> Result<Self, String> {
        serde_json::from_str(annotation).map_err(|error| format!("annotation spotter.dev/termination: {error}"))
    }

    /// The annotation's text.
    pub fn to_json(&self) -> String {
        // Strings, numbers and times only: serialising them cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The kind that the label `spotter.dev/terminating` shows.
    pub fn leading_kind(&self) -> Kind {
        self.kinds.first().copied().unwrap_or(Kind::Manual)
    }

    /// Whether it was written before the machine booted the last time.
    pub fn is_of_earlier_boot(&self, boot_now: &str) -> bool {
        self.boot_id.as_deref().is_some_and(|then| !boot_now.is_empty() && then != boot_now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_a_later_version_wrote() {
        let text = r#"{"v":2,"id":"x","holder":"queue","kinds":["spot-interruption"],"deadline":"2026-11-20T08:17:02Z","hard":true,
            "phase":"draining","startedAt":"2026-11-20T08:15:02Z","bootId":"b","notices":[],"hooks":[{"name":"h"}],"waves":3}"#;
        let record = Record::parse(text).unwrap();
        assert_eq!((record.holder, record.phase, record.hard), (Manager::Queue, Phase::Draining, true));
        assert!(record.is_of_earlier_boot("c"));
        assert!(!record.is_of_earlier_boot("b") && !record.is_of_earlier_boot(""));
        assert_eq!(Record::parse(&record.to_json()).unwrap(), record);
    }

    #[test]
    fn a_malformed_annotation_is_named() {
        let error = Record::parse(r#"{"v":1,"id":3}"#).unwrap_err();
        assert!(error.starts_with("annotation spotter.dev/termination: invalid type"), "{error}");
    }
}

//! What AWS announces: one [`Notice`] says that one instance will end, why, and until when work is possible.
//!
//! Everything here is pure: bytes and words in, notices out. Time is passed in, never read.

pub mod decode;

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Why an instance will end. The words are the ones that users see in labels, metrics and the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// EC2 takes a spot instance back; two minutes are left unless it hibernates.
    SpotInterruption,
    /// EC2 expects that a spot instance may be taken back; advice, with no end time.
    RebalanceRecommendation,
    /// EC2 will reboot, stop or retire the instance at a known time.
    ScheduledMaintenance,
    /// An Auto Scaling group ends the instance.
    AsgTermination,
    /// The instance is already stopping or shutting down.
    InstanceStateChange,
    /// A person asked for it.
    Manual,
}

impl Kind {
    /// Every kind, in the order in which tables show them.
    pub const ALL: [Self; 6] = [
        Self::SpotInterruption,
        Self::RebalanceRecommendation,
        Self::ScheduledMaintenance,
        Self::AsgTermination,
        Self::InstanceStateChange,
        Self::Manual,
    ];

    /// The word used in labels, metrics, annotations and options.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SpotInterruption => "spot-interruption",
            Self::RebalanceRecommendation => "rebalance-recommendation",
            Self::ScheduledMaintenance => "scheduled-maintenance",
            Self::AsgTermination => "asg-termination",
            Self::InstanceStateChange => "instance-state-change",
            Self::Manual => "manual",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An EC2 instance id, `i-…`. Its length and digits are not checked: AWS has changed both before.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(String);

impl InstanceId {
    /// Accepts `i-` followed by at least one letter or digit.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("i-")?;
        (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_alphanumeric())).then(|| Self(text.to_owned()))
    }

    /// Reads a Node's `spec.providerID`: `aws:///ZONE/i-x`, `aws:////i-x` or a bare `i-x`.
    /// Fargate (`fargate-ip-…`) and hybrid nodes (`eks-hybrid:///…`) are no instances and give `None`.
    pub fn from_provider_id(provider_id: &str) -> Option<Self> {
        let last = match provider_id.strip_prefix("aws://") {
            Some(path) => path.rsplit('/').next()?,
            None => provider_id,
        };
        Self::parse(last)
    }

    /// The id as AWS writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which notice this is. A newer version of the same notice has the same id and replaces the older one;
/// two different ids of one node are merged.
///
/// IMDS: `spot-interruption`, `rebalance-recommendation`, `asg-termination` (one of each per instance) and the
/// `EventId` of a maintenance event.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NoticeId(pub String);

impl fmt::Display for NoticeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a notice was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The instance metadata service, read on the instance itself.
    Imds,
}

impl Source {
    /// The word used in metrics and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Imds => "imds",
        }
    }
}

/// The instant after which the machine may be gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type", content = "at")]
pub enum Deadline {
    /// Chosen by AWS: after it there is no power.
    Hard(Timestamp),
    /// Chosen by us or by a schedule: after it nothing is certain, but nothing is cut off either.
    Soft(Timestamp),
    /// Soft, and as long as the pods of the node need: the longest grace among them and a minute.
    SoftByGrace,
}

impl Deadline {
    /// The instant, where there is one.
    pub fn at(self) -> Option<Timestamp> {
        match self {
            Self::Hard(at) | Self::Soft(at) => Some(at),
            Self::SoftByGrace => None,
        }
    }

    /// Whether the power goes at that instant.
    pub fn is_hard(self) -> bool {
        matches!(self, Self::Hard(_))
    }
}

/// What kind of maintenance is planned; the codes are those of the EC2 scheduled events page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MaintenanceCode {
    InstanceStop,
    InstanceRetirement,
    InstanceReboot,
    SystemReboot,
    SystemMaintenance,
    /// A code that this version does not know: reported, not acted on.
    Other(String),
}

impl MaintenanceCode {
    /// Reads the `Code` of a scheduled event. Total: an unknown word is kept as it is.
    pub fn parse(code: &str) -> Self {
        match code {
            "instance-stop" => Self::InstanceStop,
            "instance-retirement" => Self::InstanceRetirement,
            "instance-reboot" => Self::InstanceReboot,
            "system-reboot" => Self::SystemReboot,
            "system-maintenance" => Self::SystemMaintenance,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// One announcement that one instance will end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Notice {
    pub id: NoticeId,
    pub kind: Kind,
    pub instance: InstanceId,
    pub source: Source,
    /// When AWS says that it gave the notice; the moment we saw it where AWS does not say.
    pub noticed_at: Timestamp,
    pub deadline: Deadline,
    /// Only for [`Kind::ScheduledMaintenance`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maintenance: Option<MaintenanceCode>,
    /// A few words for people, for instance `terminate` or `system-reboot: scheduled reboot`.
    pub detail: String,
}

/// Why a notice is no longer open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Withdrawal {
    /// AWS says that it will not happen.
    Cancelled,
    /// AWS says that it has happened and is over.
    Completed,
    /// It is no longer listed, without a word why.
    Vanished,
}

/// What a source tells the termination of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// A notice is there: new, or a new version of one seen before.
    Seen(Notice),
    /// A notice that was there is no longer open.
    Withdrawn(NoticeId, Withdrawal),
    /// The source has told, for the first time since it started, all that it knows of this kind.
    Synced(Kind),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn provider_ids_of_every_shape() {
        let id = |text| InstanceId::from_provider_id(text).map(|id| id.to_string());
        assert_eq!(id("aws:///eu-central-1b/i-0a1b2c"), Some("i-0a1b2c".into()));
        assert_eq!(id("aws:////i-0a1b2c"), Some("i-0a1b2c".into()));
        assert_eq!(id("i-0a1b2c"), Some("i-0a1b2c".into()));
        for not_an_instance in [
            "",
            "i-",
            "aws:///eu-central-1b/fargate-ip-10-0-0-1",
            "eks-hybrid:///r/c/mi-1",
            "kind://x",
            "i-a/b",
            "aws://",
        ] {
            assert_eq!(id(not_an_instance), None, "{not_an_instance}");
        }
    }
}

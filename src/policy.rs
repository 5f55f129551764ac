//! The policy: what a notice makes us do, and when. Pure, and the only place that decides it.

pub mod standing;

use std::{collections::BTreeMap, time::Duration};

use jiff::{SignedDuration, Timestamp};

use crate::notice::{Deadline, Kind, MaintenanceCode, Notice};

/// What to do about a notice. Ordered: a drain is more than a cordon, and a cordon more than nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Response {
    Ignore,
    /// Take no new pods.
    Cordon,
    /// Take no new pods, and move those that are there.
    Drain,
}

impl Response {
    /// Reads the word that options and annotations use.
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "ignore" => Some(Self::Ignore),
            "cordon" => Some(Self::Cordon),
            "drain" => Some(Self::Drain),
            _ => None,
        }
    }

    /// The word that options and annotations use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::Cordon => "cordon",
            Self::Drain => "drain",
        }
    }
}

/// A hard deadline that passed this long ago says nothing about the machine any more: it has outlived it, or a queue
/// was down. Ten minutes are far beyond any delivery delay and far below a machine's life.
const STALE_AFTER: SignedDuration = SignedDuration::from_mins(10);

/// How long after its deadline a machine must be alive before we believe that it stays.
pub const OUTLIVED_AFTER: SignedDuration = SignedDuration::from_mins(5);

/// The policy table with the times that belong to it.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Kind to response; a kind that is missing here is ignored.
    pub table: BTreeMap<Kind, Response>,
    /// How long a cordon on advice is kept when no interruption follows.
    pub release_after: Duration,
    /// How long before scheduled maintenance its drain begins.
    pub lead_time: Duration,
    /// Whether the instance is a spot instance: one that is stopped or retired there does not come back to wait for.
    pub spot_instance: bool,
}

/// What one notice asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    pub response: Response,
    /// From when on.
    pub from: Timestamp,
    /// Until when, where it ends by itself.
    pub until: Option<Timestamp>,
}

/// Why a notice is not acted on at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Its deadline passed long ago.
    Stale,
    /// It is advice that is older than the time a cordon on advice is kept.
    OldAdvice,
    /// Its deadline passed, and the Node became Ready after it.
    Outlived,
    /// A maintenance code that this version does not know.
    UnknownCode(String),
}

impl Policy {
    /// What `notice` asks for. `annotation` is the Node's own word (`spotter.dev/response`), which goes before the table.
    pub fn decide(&self, notice: &Notice, annotation: Option<Response>) -> Decision {
        let response = annotation.or_else(|| self.table.get(&notice.kind).copied()).unwrap_or(Response::Ignore);
        let from = match (&notice.maintenance, notice.deadline.at()) {
            (Some(code), Some(start)) if !self.at_once(code) => earlier(start, self.lead_time),
            _ => notice.noticed_at,
        };
        let advice = notice.kind == Kind::RebalanceRecommendation && response == Response::Cordon;
        Decision { response, from, until: advice.then(|| later(notice.noticed_at, self.release_after)) }
    }

    /// Whether a notice is worth being looked at. `ready_since` is when the Node last became Ready, where that is known.
    pub fn admit(&self, notice: &Notice, ready_since: Option<Timestamp>, now: Timestamp) -> Result<(), Refusal> {
        if let Some(MaintenanceCode::Other(code)) = &notice.maintenance {
            return Err(Refusal::UnknownCode(code.clone()));
        }
        if let Deadline::Hard(at) = notice.deadline
            && now.duration_since(at) > STALE_AFTER
        {
            return Err(Refusal::Stale);
        }
        if notice.kind == Kind::RebalanceRecommendation && now >= later(notice.noticed_at, self.release_after) {
            return Err(Refusal::OldAdvice);
        }
        if let (Some(at), Some(since)) = (notice.deadline.at(), ready_since)
            && now.duration_since(at) > OUTLIVED_AFTER
            && since > at
        {
            return Err(Refusal::Outlived);
        }
        Ok(())
    }

    /// A spot instance that is stopped or retired at a date is lost anyway: its work had better move while there is time.
    fn at_once(&self, code: &MaintenanceCode) -> bool {
        self.spot_instance && matches!(code, MaintenanceCode::InstanceStop | MaintenanceCode::InstanceRetirement)
    }
}

fn later(at: Timestamp, span: Duration) -> Timestamp {
    at.saturating_add(SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX)).unwrap_or(Timestamp::MAX)
}

fn earlier(at: Timestamp, span: Duration) -> Timestamp {
    at.saturating_sub(SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX)).unwrap_or(Timestamp::MIN)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::notice::{InstanceId, NoticeId, Source};

    pub(crate) fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    pub(crate) fn notice(kind: Kind, deadline: Deadline) -> Notice {
        Notice {
            id: NoticeId(kind.as_str().into()),
            kind,
            instance: InstanceId::parse("i-0a1b2c").unwrap(),
            source: Source::Imds,
            noticed_at: at(0),
            deadline,
            maintenance: None,
            detail: String::new(),
        }
    }

    pub(crate) fn maintenance(id: &str, code: &str, start: i64) -> Notice {
        Notice {
            id: NoticeId(id.into()),
            maintenance: Some(MaintenanceCode::parse(code)),
            ..notice(Kind::ScheduledMaintenance, Deadline::Soft(at(start)))
        }
    }

    pub(crate) fn policy() -> Policy {
        Policy {
            table: BTreeMap::from([
                (Kind::SpotInterruption, Response::Drain),
                (Kind::RebalanceRecommendation, Response::Cordon),
                (Kind::ScheduledMaintenance, Response::Drain),
                (Kind::AsgTermination, Response::Drain),
            ]),
            release_after: Duration::from_secs(1800),
            lead_time: Duration::from_secs(900),
            spot_instance: false,
        }
    }

    #[test]
    fn f18_the_table_alone_decides_and_the_nodes_word_goes_before_it() {
        let rebalance = notice(Kind::RebalanceRecommendation, Deadline::SoftByGrace);
        assert_eq!(policy().decide(&rebalance, None).response, Response::Cordon);
        assert_eq!(policy().decide(&rebalance, Some(Response::Drain)).response, Response::Drain);
        assert_eq!(policy().decide(&rebalance, Some(Response::Ignore)).response, Response::Ignore);
        let state_change = notice(Kind::InstanceStateChange, Deadline::Soft(at(30)));
        assert_eq!(policy().decide(&state_change, None).response, Response::Ignore, "not in the table");
    }

    #[test]
    fn maintenance_begins_its_lead_time_before_its_start_unless_a_spot_instance_is_lost() {
        let reboot = maintenance("e-1", "system-reboot", 7200);
        let stop = maintenance("e-2", "instance-stop", 7200);
        assert_eq!(policy().decide(&reboot, None).from, at(7200 - 900));
        assert_eq!(policy().decide(&stop, None).from, at(7200 - 900));
        let spot = Policy { spot_instance: true, ..policy() };
        assert_eq!(spot.decide(&reboot, None).from, at(7200 - 900));
        assert_eq!(spot.decide(&stop, None).from, at(0));
    }

    #[test]
    fn old_news_is_refused() {
        let spot = notice(Kind::SpotInterruption, Deadline::Hard(at(120)));
        assert_eq!(policy().admit(&spot, None, at(100)), Ok(()));
        assert_eq!(policy().admit(&spot, None, at(300)), Ok(()), "a deadline in the past still counts");
        assert_eq!(policy().admit(&spot, None, at(721)), Err(Refusal::Stale));
        assert_eq!(policy().admit(&spot, Some(at(200)), at(500)), Err(Refusal::Outlived));
        assert_eq!(policy().admit(&spot, Some(at(-200)), at(500)), Ok(()));
        let advice = notice(Kind::RebalanceRecommendation, Deadline::SoftByGrace);
        assert_eq!(policy().admit(&advice, None, at(1799)), Ok(()));
        assert_eq!(policy().admit(&advice, None, at(1800)), Err(Refusal::OldAdvice));
        let unknown = maintenance("e-3", "quantum-drift", 7200);
        assert_eq!(policy().admit(&unknown, None, at(0)), Err(Refusal::UnknownCode("quantum-drift".into())));
    }
}

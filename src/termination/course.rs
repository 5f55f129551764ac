//! What to do next about a node: what is held against what the notices ask for. Pure.

use jiff::{SignedDuration, Timestamp};

use crate::{
    notice::Deadline,
    policy::standing::Standing,
    termination::record::{Phase, Record},
};

/// A deadline that is earlier by less than this is the same one, read from another clock.
const SAME_DEADLINE: SignedDuration = SignedDuration::from_secs(5);

/// What is to be done with a node that we hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Move {
    Stay,
    /// Write the record anew: the phase holds, the notices or the deadline are others.
    Rewrite,
    /// Enter this phase.
    Enter(Phase),
    /// Give up our fields.
    Release,
}

/// The next move for a node that we hold.
pub(super) fn next_move(record: &Record, standing: &Standing) -> Move {
    let Some(wanted) = Phase::beginning(standing.stage) else { return Move::Release };
    if record.phase.is_ended() && wanted == Phase::Draining {
        // A drain that ended is joined by what comes late, unless that asks for more than was done.
        return if asks_for_more(record, standing) { Move::Enter(Phase::Draining) } else { Move::Stay };
    }
    if record.phase != wanted {
        return Move::Enter(wanted);
    }
    // A drain by grace gets its deadline when the pods are known: its record is not out of date for that.
    let deadline_moved = match standing.deadline {
        Some(Deadline::SoftByGrace) | None => false,
        Some(deadline) => deadline.at() != record.deadline || deadline.is_hard() != record.hard,
    };
    if deadline_moved || record.kinds != standing.kinds { Move::Rewrite } else { Move::Stay }
}

/// Whether the notices ask for more than the record's holder does, or did: a drain over a cordon, the end of power over
/// a deadline of our own, or a deadline more than five seconds earlier.
pub(super) fn asks_for_more(record: &Record, standing: &Standing) -> bool {
    let Some(wanted) = Phase::beginning(standing.stage) else { return false };
    let rank = |phase: Phase| match phase {
        Phase::Scheduled => 0,
        Phase::Watching => 1,
        Phase::Draining | Phase::Drained | Phase::Incomplete => 2,
    };
    if rank(wanted) != rank(record.phase) {
        return rank(wanted) > rank(record.phase);
    }
    if wanted != Phase::Draining || record.phase == Phase::Drained {
        return false;
    }
    match (standing.deadline, record.deadline) {
        (Some(Deadline::Hard(_)), _) if !record.hard => true,
        (Some(deadline), Some(known)) if deadline.is_hard() == record.hard => {
            deadline.at().is_some_and(|at| known.duration_since(at) > SAME_DEADLINE)
        }
        _ => false,
    }
}

/// A record this old, of a drain in which no pod is stopping, has no holder any more.
const HOLDER_SILENT: SignedDuration = SignedDuration::from_secs(15);

/// Whether `record` is old enough that its holder should have asked a pod to stop.
pub(super) fn may_be_silent(record: &Record, now: Timestamp) -> bool {
    record.phase == Phase::Draining && now.duration_since(record.started_at) > HOLDER_SILENT
}

/// Whether the holder of `record` is gone, where `terminating` pods of the node are stopping and `remaining` are there.
pub(super) fn holder_is_gone(record: &Record, terminating: usize, remaining: usize, now: Timestamp) -> bool {
    may_be_silent(record, now) && terminating == 0 && remaining > 0
}

/// Whether a record that is read at start is about a machine that has since come back past its deadline, booted or
/// woken: there is nothing to go on with, only to see whether it has outlived the notice.
pub(super) fn is_over(record: &Record, boot_now: &str, ready_since: Option<Timestamp>, now: Timestamp) -> bool {
    let Some(deadline) = record.deadline.filter(|deadline| *deadline < now) else { return false };
    record.is_of_earlier_boot(boot_now) || ready_since.is_some_and(|since| since > deadline)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::Manager,
        notice::Kind,
        policy::{standing::Stage, tests::at},
    };

    fn record(phase: Phase, deadline: Option<Deadline>) -> Record {
        Record {
            kinds: vec![Kind::SpotInterruption],
            deadline: deadline.and_then(Deadline::at),
            hard: deadline.is_some_and(Deadline::is_hard),
            ..Record::begin("x".into(), Manager::Agent, phase, at(0))
        }
    }

    fn standing(stage: Stage, deadline: Option<Deadline>) -> Standing {
        Standing { stage, kinds: vec![Kind::SpotInterruption], deadline, changes_at: None }
    }

    fn hard(seconds: i64) -> Option<Deadline> {
        Some(Deadline::Hard(at(seconds)))
    }

    fn soft(seconds: i64) -> Option<Deadline> {
        Some(Deadline::Soft(at(seconds)))
    }

    #[test]
    fn the_next_move_of_every_phase() {
        use Move::*;
        use Stage::{Draining, Nothing, Scheduled, Watching};
        let by_grace = Some(Deadline::SoftByGrace);
        let cases = [
            (Phase::Scheduled, soft(900), Scheduled, soft(900), Stay),
            (Phase::Scheduled, soft(900), Scheduled, soft(1900), Rewrite),
            (Phase::Scheduled, soft(900), Draining, soft(900), Enter(Phase::Draining)),
            (Phase::Scheduled, soft(900), Nothing, None, Release),
            (Phase::Watching, None, Watching, by_grace, Stay),
            (Phase::Watching, None, Draining, hard(120), Enter(Phase::Draining)),
            (Phase::Watching, None, Nothing, None, Release),
            (Phase::Draining, hard(120), Draining, hard(120), Stay),
            (Phase::Draining, hard(120), Draining, hard(60), Rewrite),
            (Phase::Draining, hard(120), Draining, hard(180), Rewrite),
            (Phase::Draining, soft(90), Draining, by_grace, Stay),
            (Phase::Draining, soft(900), Scheduled, soft(90_000), Enter(Phase::Scheduled)),
            (Phase::Draining, hard(120), Watching, None, Enter(Phase::Watching)),
            (Phase::Draining, hard(120), Nothing, None, Release),
            (Phase::Drained, hard(120), Draining, hard(120), Stay),
            (Phase::Drained, hard(120), Draining, hard(60), Stay),
            (Phase::Drained, soft(900), Draining, hard(120), Stay),
            (Phase::Incomplete, soft(900), Draining, soft(900), Stay),
            (Phase::Incomplete, soft(900), Draining, hard(120), Enter(Phase::Draining)),
            (Phase::Drained, soft(900), Scheduled, soft(90_000), Enter(Phase::Scheduled)),
            (Phase::Drained, hard(120), Nothing, None, Release),
        ];
        for (phase, known, stage, deadline, expected) in cases {
            let found = next_move(&record(phase, known), &standing(stage, deadline));
            assert_eq!(found, expected, "{phase:?} {known:?} -> {stage:?} {deadline:?}");
        }
    }

    #[test]
    fn a_follower_takes_over_only_for_more() {
        use Stage::{Draining, Watching};
        let cases = [
            (Phase::Watching, None, Draining, hard(120), true),
            (Phase::Watching, None, Watching, None, false),
            (Phase::Draining, hard(120), Draining, hard(120), false),
            (Phase::Draining, hard(120), Draining, hard(116), false),
            (Phase::Draining, hard(120), Draining, hard(114), true),
            (Phase::Draining, soft(60), Draining, hard(120), true),
            (Phase::Draining, hard(120), Draining, soft(60), false),
            (Phase::Draining, hard(120), Watching, None, false),
            (Phase::Drained, soft(60), Draining, hard(120), false),
        ];
        for (phase, known, stage, deadline, expected) in cases {
            let found = asks_for_more(&record(phase, known), &standing(stage, deadline));
            assert_eq!(found, expected, "{phase:?} {known:?} -> {stage:?} {deadline:?}");
        }
    }

    #[test]
    fn a_holder_is_gone_when_nothing_moves() {
        let draining = record(Phase::Draining, hard(120));
        assert!(!holder_is_gone(&draining, 0, 3, at(15)));
        assert!(holder_is_gone(&draining, 0, 3, at(16)));
        assert!(!holder_is_gone(&draining, 1, 3, at(60)));
        assert!(!holder_is_gone(&draining, 0, 0, at(60)));
        assert!(!holder_is_gone(&record(Phase::Drained, hard(120)), 0, 3, at(60)));
    }

    #[test]
    fn a_record_of_a_machine_that_came_back_is_over_after_its_deadline() {
        let old = Record { boot_id: Some("a".into()), ..record(Phase::Draining, soft(60)) };
        assert!(is_over(&old, "b", None, at(61)));
        assert!(!is_over(&old, "b", None, at(59)), "rebooted within the two minutes: the power still goes");
        assert!(!is_over(&old, "a", Some(at(-100)), at(61)));
        assert!(is_over(&old, "a", Some(at(3600)), at(3700)), "woken from hibernation with the same boot id");
    }
}

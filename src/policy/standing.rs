//! The open notices of one node, and what they ask for together.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::{
    notice::{Deadline, Kind, Notice, NoticeId, Withdrawal},
    policy::{OUTLIVED_AFTER, Policy, Refusal, Response},
};

/// What the notices of a node ask for together. Ordered: the later, the more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Nothing,
    /// Work will begin at a known time.
    Scheduled,
    /// Cordoned, on advice.
    Watching,
    Draining,
}

/// See [`Notices::standing`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    pub stage: Stage,
    /// The kinds that ask for this stage, the most pressing first.
    pub kinds: Vec<Kind>,
    /// The deadline of the most pressing.
    pub deadline: Option<Deadline>,
    /// When time alone will change this.
    pub changes_at: Option<Timestamp>,
}

/// What a report changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Known already.
    Same,
    New,
    /// Another version of a known notice.
    Updated,
    /// Not acted on.
    Refused(Refusal),
}

/// The notices of one node. Bounded: one entry for each id, and sources give a node a handful of them.
#[derive(Debug)]
pub struct Notices {
    policy: Policy,
    entries: BTreeMap<NoticeId, Entry>,
    /// Listed by a source, and not acted on.
    refused: BTreeMap<NoticeId, Notice>,
    /// The kinds of which a source has told all that it knows.
    synced: BTreeSet<Kind>,
}

#[derive(Debug, Clone)]
struct Entry {
    notice: Notice,
    /// Read from a record; no source has repeated it since.
    remembered: bool,
    /// No source lists it any more, and none said why.
    vanished: bool,
    /// It was acted on to its end: this version of it starts nothing again.
    spent: bool,
}

impl Notices {
    pub fn new(policy: Policy) -> Self {
        Self { policy, entries: BTreeMap::new(), refused: BTreeMap::new(), synced: BTreeSet::new() }
    }

    /// The policy, for what depends on it besides.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Takes in a notice that a source reads. The newest version of a notice replaces the older one.
    pub fn see(&mut self, notice: Notice, ready_since: Option<Timestamp>, now: Timestamp) -> Change {
        if let Some(known) = self.entries.get_mut(&notice.id)
            && same_version(&known.notice, &notice)
        {
            known.remembered = false;
            known.vanished = false;
            return Change::Same;
        }
        if let Err(refusal) = self.policy.admit(&notice, ready_since, now) {
            self.refused.insert(notice.id.clone(), notice);
            return Change::Refused(refusal);
        }
        let entry = Entry { notice, remembered: false, vanished: false, spent: false };
        match self.entries.insert(entry.notice.id.clone(), entry) {
            None => Change::New,
            Some(_) => Change::Updated,
        }
    }

    /// Judges anew what was seen before the Node was known, and drops what is not to be acted on. To be called before
    /// the Node's record is remembered: what that names was admitted once, and ends by other rules.
    pub fn review(&mut self, ready_since: Option<Timestamp>, now: Timestamp) -> Vec<(Notice, Refusal)> {
        let mut dropped = Vec::new();
        self.entries.retain(|id, entry| match self.policy.admit(&entry.notice, ready_since, now) {
            Err(refusal) if !entry.remembered => {
                self.refused.insert(id.clone(), entry.notice.clone());
                dropped.push((entry.notice.clone(), refusal));
                false
            }
            _ => true,
        });
        dropped
    }

    /// Takes in a notice from a record. A source will repeat it, or [`Notices::synced`] will tell that it did not.
    /// Where the sources have told all before the record was read, it has vanished already: returns it then, if it
    /// asks for nothing any more.
    pub fn remember(&mut self, notice: Notice) -> Option<Notice> {
        let (id, kind) = (notice.id.clone(), notice.kind);
        if self.entries.contains_key(&id) {
            return None;
        }
        // Too old to be acted on anew, but listed: what was done about it stands.
        let listed = self.refused.get(&id).is_some_and(|refused| same_version(refused, &notice));
        self.entries.insert(id.clone(), Entry { notice, remembered: !listed, vanished: false, spent: false });
        if !listed && self.synced.contains(&kind) { self.withdraw(&id, Withdrawal::Vanished) } else { None }
    }

    /// A source has told all that it knows of `kind`: what was remembered and not repeated has vanished.
    pub fn synced(&mut self, kind: Kind) -> Vec<Notice> {
        self.synced.insert(kind);
        let forgotten = |entry: &&Entry| entry.remembered && entry.notice.kind == kind;
        let ids: Vec<NoticeId> = self.entries.values().filter(forgotten).map(|entry| entry.notice.id.clone()).collect();
        ids.iter().filter_map(|id| self.withdraw(id, Withdrawal::Vanished)).collect()
    }

    /// A notice is no longer open; returns it if it asks for nothing any more.
    ///
    /// A notice with a hard deadline that merely vanished keeps asking until the machine has outlived it: nobody has
    /// said that the power stays.
    pub fn withdraw(&mut self, id: &NoticeId, why: Withdrawal) -> Option<Notice> {
        self.refused.remove(id);
        let entry = self.entries.get_mut(id)?;
        if why == Withdrawal::Vanished && entry.notice.deadline.is_hard() {
            entry.vanished = true;
            entry.remembered = false;
            return None;
        }
        self.entries.remove(id).map(|entry| entry.notice)
    }

    /// Open notices that the machine has outlived have been acted on to their end. `outlived` is asked for each: its
    /// deadline, where it has one of its own, and whether no source lists it any more. Says whether there was one.
    pub fn spend(&mut self, outlived: impl Fn(Option<Timestamp>, bool) -> bool) -> bool {
        let mut any = false;
        for entry in self.entries.values_mut().filter(|entry| !entry.spent) {
            entry.spent = outlived(entry.notice.deadline.at(), entry.vanished);
            any |= entry.spent;
        }
        self.entries.retain(|_, entry| !(entry.spent && entry.vanished));
        any
    }

    /// The open notices, for the record.
    pub fn list(&self) -> Vec<Notice> {
        self.open().map(|entry| entry.notice.clone()).collect()
    }

    fn open(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().filter(|entry| !entry.spent)
    }

    /// What the open notices ask for at `now`; `annotation` is the Node's own word.
    pub fn standing(&self, annotation: Option<Response>, now: Timestamp) -> Standing {
        let mut changes_at: Option<Timestamp> = None;
        let mut changes = |at: Timestamp| changes_at = Some(changes_at.map_or(at, |known| known.min(at)));
        let mut asking: Vec<(Stage, &Notice)> = Vec::new();
        for Entry { notice, .. } in self.open() {
            let decision = self.policy.decide(notice, annotation);
            if decision.response == Response::Ignore || decision.until.is_some_and(|until| now >= until) {
                continue;
            }
            if let Some(until) = decision.until {
                changes(until);
            }
            let stage = match decision.response {
                _ if now < decision.from => Stage::Scheduled,
                Response::Drain => Stage::Draining,
                _ => Stage::Watching,
            };
            if stage == Stage::Scheduled {
                changes(decision.from);
            }
            asking.push((stage, notice));
        }
        let stage = asking.iter().map(|(stage, _)| *stage).max().unwrap_or(Stage::Nothing);
        let mut pressing: Vec<&Notice> =
            asking.iter().filter(|(s, _)| *s == stage).map(|(_, notice)| *notice).collect();
        pressing.sort_by_key(|notice| urgency(notice.deadline));
        let mut kinds: Vec<Kind> = Vec::new();
        for notice in &pressing {
            if !kinds.contains(&notice.kind) {
                kinds.push(notice.kind);
            }
        }
        Standing { stage, kinds, deadline: pressing.first().map(|notice| notice.deadline), changes_at }
    }
}

/// Whether two notices of one id say the same. The time at which IMDS was read is no part of a spot notice.
fn same_version(known: &Notice, new: &Notice) -> bool {
    let advice = new.kind == Kind::RebalanceRecommendation;
    known.deadline == new.deadline && known.detail == new.detail && (!advice || known.noticed_at == new.noticed_at)
}

/// Hard before soft, early before late, and what has no time of its own at the end.
fn urgency(deadline: Deadline) -> (u8, Timestamp) {
    match deadline {
        Deadline::Hard(at) => (0, at),
        Deadline::Soft(at) => (1, at),
        Deadline::SoftByGrace => (2, Timestamp::MAX),
    }
}

/// What is known of a machine whose deadline has passed.
#[derive(Debug, Clone, Copy)]
pub struct Survivor<'a> {
    pub deadline: Timestamp,
    /// The boot id in the record, and the Node's now.
    pub boot_then: Option<&'a str>,
    pub boot_now: &'a str,
    /// Since when the Node is Ready, if it is.
    pub ready_since: Option<Timestamp>,
    /// No source lists the notice any more.
    pub vanished: bool,
}

impl Survivor<'_> {
    /// Whether the machine has outlived its deadline: some minutes past it, Ready, and either booted anew, or Ready
    /// anew (hibernation keeps the boot id), or no longer announced to end.
    pub fn has_outlived(&self, now: Timestamp) -> bool {
        let Some(since) = self.ready_since else { return false };
        let booted = self.boot_then.is_some_and(|then| !self.boot_now.is_empty() && then != self.boot_now);
        now.duration_since(self.deadline) >= OUTLIVED_AFTER && (booted || since > self.deadline || self.vanished)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::{at, maintenance, notice, policy};

    fn notices(list: impl IntoIterator<Item = Notice>) -> Notices {
        let mut notices = Notices::new(policy());
        for notice in list {
            assert_eq!(notices.see(notice, None, at(0)), Change::New);
        }
        notices
    }

    fn spot(deadline: i64) -> Notice {
        notice(Kind::SpotInterruption, Deadline::Hard(at(deadline)))
    }

    fn advice() -> Notice {
        notice(Kind::RebalanceRecommendation, Deadline::SoftByGrace)
    }

    fn asg() -> Notice {
        notice(Kind::AsgTermination, Deadline::SoftByGrace)
    }

    fn all_vanished(notices: &Notices) -> bool {
        notices.open().all(|entry| entry.vanished)
    }

    fn stage(notices: &Notices, now: i64) -> Stage {
        notices.standing(None, at(now)).stage
    }

    #[test]
    fn nothing_open_asks_for_nothing() {
        assert_eq!(stage(&notices([]), 0), Stage::Nothing);
    }

    #[test]
    fn f17_advice_ends_by_itself_and_is_not_taken_twice() {
        let mut notices = notices([advice()]);
        assert_eq!(stage(&notices, 0), Stage::Watching);
        assert_eq!(notices.standing(None, at(0)).changes_at, Some(at(1800)));
        assert_eq!(stage(&notices, 1800), Stage::Nothing);
        assert_eq!(notices.see(advice(), None, at(1801)), Change::Same, "IMDS lists it for ever");
        assert_eq!(stage(&notices, 1801), Stage::Nothing);
    }

    #[test]
    fn advice_that_becomes_an_interruption_drains_with_its_deadline() {
        let notices = notices([advice(), spot(120)]);
        let standing = notices.standing(None, at(0));
        assert_eq!(standing.stage, Stage::Draining);
        assert_eq!(standing.kinds, [Kind::SpotInterruption], "advice does not ask for a drain");
        assert_eq!(standing.deadline, Some(Deadline::Hard(at(120))));
    }

    #[test]
    fn the_earliest_hard_deadline_wins_between_notices_and_the_newest_version_within_one() {
        let mut notices = notices([asg(), spot(120)]);
        assert_eq!(notices.standing(None, at(0)).deadline, Some(Deadline::Hard(at(120))));
        assert_eq!(notices.standing(None, at(0)).kinds, [Kind::SpotInterruption, Kind::AsgTermination]);
        assert_eq!(notices.see(spot(180), None, at(1)), Change::Updated);
        assert_eq!(notices.standing(None, at(1)).deadline, Some(Deadline::Hard(at(180))), "moved later by AWS");
    }

    #[test]
    fn f4_the_same_notice_again_changes_nothing() {
        let mut notices = notices([spot(120)]);
        let again = Notice { noticed_at: at(2), ..spot(120) };
        assert_eq!(notices.see(again, None, at(2)), Change::Same);
    }

    #[test]
    fn maintenance_is_scheduled_then_drained_and_follows_its_date() {
        let mut notices = notices([maintenance("e-1", "system-reboot", 7200)]);
        assert_eq!(stage(&notices, 0), Stage::Scheduled);
        assert_eq!(notices.standing(None, at(0)).changes_at, Some(at(6300)));
        assert_eq!(stage(&notices, 6300), Stage::Draining);
        assert_eq!(notices.see(maintenance("e-1", "system-reboot", 90_000), None, at(6400)), Change::Updated);
        assert_eq!(stage(&notices, 6400), Stage::Scheduled, "moved later");
        assert!(notices.withdraw(&NoticeId("e-1".into()), Withdrawal::Cancelled).is_some());
        assert_eq!(stage(&notices, 6500), Stage::Nothing);
    }

    #[test]
    fn the_nodes_own_word_brakes() {
        let notices = notices([spot(120)]);
        assert_eq!(notices.standing(Some(Response::Ignore), at(0)).stage, Stage::Nothing);
        assert_eq!(notices.standing(Some(Response::Cordon), at(0)).stage, Stage::Watching);
    }

    #[test]
    fn an_interruption_that_vanishes_is_believed_until_the_machine_outlived_it() {
        let mut notices = notices([spot(120)]);
        assert_eq!(notices.withdraw(&NoticeId("spot-interruption".into()), Withdrawal::Vanished), None);
        assert_eq!(stage(&notices, 10), Stage::Draining);
        assert!(notices.spend(|_, vanished| vanished));
        assert_eq!(stage(&notices, 1000), Stage::Nothing);
        assert_eq!(notices.see(spot(2000), None, at(1000)), Change::New, "a new one is a new one");
    }

    #[test]
    fn only_what_was_outlived_is_spent() {
        let tomorrow = maintenance("e-2", "instance-stop", 90_000);
        let mut notices = notices([maintenance("e-1", "system-reboot", 900), tomorrow.clone(), spot(120)]);
        let outlived = |deadline: Option<Timestamp>, _| deadline.is_some_and(|deadline| deadline < at(1200));
        assert!(notices.spend(outlived));
        assert!(!notices.spend(outlived), "once");
        assert_eq!(notices.list(), [tomorrow]);
        assert_eq!(stage(&notices, 1300), Stage::Scheduled);
    }

    #[test]
    fn what_a_record_remembers_and_no_source_repeats_has_vanished() {
        let mut notices = Notices::new(policy());
        for notice in [maintenance("e-1", "system-reboot", 7200), maintenance("e-2", "system-reboot", 7200), spot(120)]
        {
            assert_eq!(notices.remember(notice), None);
        }
        assert_eq!(notices.see(maintenance("e-2", "system-reboot", 7200), None, at(0)), Change::Same);
        let gone = notices.synced(Kind::ScheduledMaintenance);
        assert_eq!(gone.iter().map(|notice| notice.id.0.as_str()).collect::<Vec<_>>(), ["e-1"]);
        assert_eq!(notices.list().len(), 2);
        assert!(notices.synced(Kind::SpotInterruption).is_empty());
        assert_eq!(stage(&notices, 0), Stage::Draining);
    }

    #[test]
    fn a_record_that_is_read_after_the_sources_have_told_all_is_judged_the_same() {
        let mut notices = Notices::new(policy());
        assert_eq!(notices.see(asg(), None, at(0)), Change::New);
        for kind in Kind::ALL {
            assert!(notices.synced(kind).is_empty());
        }
        let event = maintenance("e-1", "system-reboot", 7200);
        assert_eq!(notices.remember(event.clone()), Some(event));
        assert_eq!(notices.remember(asg()), None, "still listed");
        assert_eq!(notices.remember(spot(120)), None, "nobody has said that the power stays");
        assert_eq!(notices.list(), [asg(), spot(120)]);
        assert!(!all_vanished(&notices));
        assert_eq!(stage(&notices, 0), Stage::Draining);
    }

    #[test]
    fn an_old_notice_that_is_still_listed_has_not_vanished_from_the_record() {
        let mut notices = Notices::new(policy());
        assert_eq!(notices.see(spot(0), None, at(601)), Change::Refused(Refusal::Stale));
        assert!(notices.synced(Kind::SpotInterruption).is_empty());
        assert_eq!(stage(&notices, 601), Stage::Nothing);
        assert_eq!(notices.remember(spot(0)), None);
        assert!(!all_vanished(&notices));
        assert_eq!(notices.withdraw(&spot(0).id, Withdrawal::Vanished), None);
        assert!(all_vanished(&notices));
    }

    #[test]
    fn what_was_seen_before_the_node_was_known_is_judged_by_it() {
        let mut notices = Notices::new(policy());
        assert_eq!(notices.see(maintenance("e-1", "system-reboot", 0), None, at(400)), Change::New);
        assert_eq!(notices.see(asg(), None, at(400)), Change::New);
        notices.remember(maintenance("e-2", "system-reboot", 0));
        assert!(notices.review(Some(at(-100)), at(400)).is_empty(), "Ready since before: it waits for its reboot");
        let refused = notices.review(Some(at(60)), at(400));
        assert_eq!(refused, [(maintenance("e-1", "system-reboot", 0), Refusal::Outlived)]);
        assert_eq!(notices.list().len(), 2);
        notices.synced(Kind::ScheduledMaintenance);
        assert_eq!(notices.remember(maintenance("e-1", "system-reboot", 0)), None, "listed: what was done stands");
    }

    #[test]
    fn a_machine_has_outlived_its_deadline() {
        let survivor = Survivor {
            deadline: at(0),
            boot_then: Some("a"),
            boot_now: "a",
            ready_since: Some(at(-1000)),
            vanished: false,
        };
        assert!(!survivor.has_outlived(at(10_000)), "a drained node that waits for somebody else's hook stays");
        assert!(Survivor { boot_now: "b", ..survivor }.has_outlived(at(300)), "rebooted");
        assert!(!Survivor { boot_now: "b", ..survivor }.has_outlived(at(299)));
        assert!(!Survivor { boot_now: "", ..survivor }.has_outlived(at(300)), "unknown is not other");
        assert!(Survivor { ready_since: Some(at(60)), ..survivor }.has_outlived(at(300)), "hibernated");
        assert!(Survivor { vanished: true, ..survivor }.has_outlived(at(300)));
        assert!(!Survivor { vanished: true, ready_since: None, ..survivor }.has_outlived(at(300)));
    }
}

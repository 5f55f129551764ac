//! What is open, and what of an answer is news. Pure: no clock, no I/O.

use std::{collections::BTreeMap, mem};

use jiff::{SignedDuration, Timestamp};

use crate::notice::{
    Deadline, Notice, NoticeId, Report, Withdrawal,
    decode::imds::maintenance::{Entry, Events},
};

/// Polls in a row that must say 404 before a single notice counts as gone: one alone may be a hiccup of the service.
const ABSENT_POLLS: u8 = 2;

/// Polls in a row in which a maintenance event must be in neither list before it counts as gone.
const MISSING_POLLS: u8 = 3;

/// Two recommendations whose times are closer than this are one: a service that fills in the time of the request
/// would otherwise make a new one with each poll.
const SAME_RECOMMENDATION: SignedDuration = SignedDuration::from_secs(60);

/// The one notice of a path that is 404 as long as there is none.
#[derive(Debug, Default)]
pub(super) struct Single {
    /// As it was told.
    open: Option<Notice>,
    absent: u8,
}

impl Single {
    /// When the notice that is open was seen first; `now` where none is. A body without a usable time is counted from
    /// here, so that its deadline does not move with each poll.
    pub(super) fn first_seen(&self, now: Timestamp) -> Timestamp {
        self.open.as_ref().map_or(now, |open| open.noticed_at)
    }

    /// The path shows a notice.
    pub(super) fn present(&mut self, mut notice: Notice, now: Timestamp) -> Option<Report> {
        self.absent = 0;
        if let Some(open) = &self.open {
            if is_the_same(open, &notice, now) {
                notice = open.clone();
            }
            if *open == notice {
                return None;
            }
        }
        self.open = Some(notice.clone());
        Some(Report::Seen(notice))
    }

    /// The path says 404.
    pub(super) fn absent(&mut self) -> Option<Report> {
        self.absent = self.absent.saturating_add(1);
        if self.absent < ABSENT_POLLS {
            return None;
        }
        self.open.take().map(|open| Report::Withdrawn(open.id, Withdrawal::Vanished))
    }

    /// The path says nothing that can be used.
    pub(super) fn unclear(&mut self) {
        self.absent = 0;
    }
}

/// Whether `shown` differs from `open` only by a time that is not to be believed.
///
/// AWS sets the end of an instance once. A mock that counts two minutes from each request must not push it out for
/// ever, so a later time counts only once the earlier one is past (the machine was stopped, and has a new notice).
fn is_the_same(open: &Notice, shown: &Notice, now: Timestamp) -> bool {
    if open.detail != shown.detail {
        return false;
    }
    match (open.deadline, shown.deadline) {
        (Deadline::Hard(held), Deadline::Hard(at)) => at > held && now < held,
        (Deadline::SoftByGrace, Deadline::SoftByGrace) => {
            shown.noticed_at.duration_since(open.noticed_at).abs() < SAME_RECOMMENDATION
        }
        _ => false,
    }
}

/// The maintenance events that are open, by id.
#[derive(Debug, Default)]
pub(super) struct Maintenance {
    /// As they were told, and for how many polls running they have been missing.
    open: BTreeMap<NoticeId, (Notice, u8)>,
    warned: Vec<String>,
}

impl Maintenance {
    /// What the list of scheduled events says that is news.
    pub(super) fn scheduled(&mut self, events: &Events) -> Vec<Report> {
        let mut news = Vec::new();
        for (id, entry) in &events.entries {
            match entry {
                Entry::Open(notice) => news.extend(self.present(notice)),
                Entry::Ended(why) => news.extend(self.end(id, *why)),
                Entry::Unclear => {
                    if let Some((_, missing)) = self.open.get_mut(id) {
                        *missing = 0;
                    }
                }
            }
        }
        news
    }

    /// Open events that the list does not have: only for these the history is worth a request.
    pub(super) fn is_any_missing(&self, scheduled: &Events) -> bool {
        self.open.keys().any(|id| !scheduled.entries.contains_key(id))
    }

    /// What the history says of the open events that the list does not have.
    pub(super) fn history(&mut self, scheduled: &Events, history: &Events) -> Vec<Report> {
        let gone: Vec<_> = self.open.keys().filter(|id| !scheduled.entries.contains_key(*id)).cloned().collect();
        gone.iter()
            .filter_map(|id| match history.entries.get(id) {
                Some(Entry::Ended(why)) => self.end(id, *why),
                _ => self.miss(id),
            })
            .collect()
    }

    /// Those of the warnings that the last list did not have.
    pub(super) fn new_warnings(&mut self, warnings: Vec<String>) -> Vec<String> {
        let before = mem::replace(&mut self.warned, warnings);
        self.warned.iter().filter(|warning| !before.contains(warning)).cloned().collect()
    }

    fn present(&mut self, notice: &Notice) -> Option<Report> {
        let mut notice = notice.clone();
        if let Some((open, missing)) = self.open.get_mut(&notice.id) {
            *missing = 0;
            notice.noticed_at = open.noticed_at;
            if *open == notice {
                return None;
            }
        }
        self.open.insert(notice.id.clone(), (notice.clone(), 0));
        Some(Report::Seen(notice))
    }

    fn end(&mut self, id: &NoticeId, why: Withdrawal) -> Option<Report> {
        self.open.remove(id).map(|_| Report::Withdrawn(id.clone(), why))
    }

    fn miss(&mut self, id: &NoticeId) -> Option<Report> {
        let (_, missing) = self.open.get_mut(id)?;
        *missing = missing.saturating_add(1);
        if *missing < MISSING_POLLS {
            return None;
        }
        self.end(id, Withdrawal::Vanished)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notice::{InstanceId, Kind, MaintenanceCode, Source};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn notice(kind: Kind, deadline: Deadline, noticed_at: i64) -> Notice {
        Notice {
            id: NoticeId(kind.as_str().into()),
            kind,
            instance: InstanceId::parse("i-0a").unwrap(),
            source: Source::Imds,
            noticed_at: at(noticed_at),
            deadline,
            maintenance: None,
            detail: "terminate".into(),
        }
    }

    fn spot(deadline: i64) -> Notice {
        notice(Kind::SpotInterruption, Deadline::Hard(at(deadline)), 1_000)
    }

    fn event(id: &str, start: i64) -> (NoticeId, Entry) {
        let notice = Notice {
            id: NoticeId(id.into()),
            maintenance: Some(MaintenanceCode::SystemReboot),
            ..notice(Kind::ScheduledMaintenance, Deadline::Soft(at(start)), 1_000)
        };
        (notice.id.clone(), Entry::Open(notice))
    }

    fn list(entries: &[(NoticeId, Entry)]) -> Events {
        Events { entries: entries.iter().cloned().collect(), warnings: Vec::new() }
    }

    #[test]
    fn f4_a_notice_that_stays_is_told_once() {
        let mut tracked = Single::default();
        assert_eq!(tracked.present(spot(1_120), at(1_000)), Some(Report::Seen(spot(1_120))));
        for now in 1_001..1_200 {
            assert_eq!(tracked.present(spot(1_120), at(now)), None);
        }
    }

    #[test]
    fn an_end_moves_closer_but_not_away_before_it_is_past() {
        let mut tracked = Single::default();
        tracked.present(spot(1_120), at(1_000));
        assert_eq!(tracked.present(spot(1_121), at(1_001)), None, "a service that counts from each request");
        assert_eq!(tracked.present(spot(1_100), at(1_002)), Some(Report::Seen(spot(1_100))));
        let hibernate = Notice { detail: "hibernate".into(), ..spot(1_110) };
        assert_eq!(tracked.present(hibernate.clone(), at(1_003)), Some(Report::Seen(hibernate)));
        assert_eq!(tracked.present(spot(9_000), at(8_880)), Some(Report::Seen(spot(9_000))), "the next life");
    }

    #[test]
    fn recommendations_that_differ_by_seconds_are_one() {
        let rebalance = |second| notice(Kind::RebalanceRecommendation, Deadline::SoftByGrace, second);
        let mut tracked = Single::default();
        assert!(tracked.present(rebalance(1_000), at(1_000)).is_some());
        assert_eq!(tracked.present(rebalance(1_059), at(1_059)), None);
        assert_eq!(tracked.present(rebalance(1_060), at(1_060)), Some(Report::Seen(rebalance(1_060))));
    }

    #[test]
    fn gone_takes_two_polls_running() {
        let mut tracked = Single::default();
        assert_eq!((tracked.absent(), tracked.absent(), tracked.absent()), (None, None, None));
        tracked.present(spot(1_120), at(1_000));
        assert_eq!(tracked.absent(), None);
        tracked.unclear();
        assert_eq!(tracked.absent(), None);
        assert_eq!(tracked.present(spot(1_120), at(1_003)), None);
        assert_eq!(tracked.absent(), None);
        assert_eq!(tracked.absent(), Some(Report::Withdrawn(spot(0).id, Withdrawal::Vanished)));
        assert_eq!(tracked.absent(), None);
        assert!(tracked.present(spot(1_120), at(1_009)).is_some(), "a new one");
    }

    #[test]
    fn a_body_without_a_time_is_counted_from_when_it_was_first_seen() {
        let mut tracked = Single::default();
        assert_eq!(tracked.first_seen(at(1_000)), at(1_000));
        tracked.present(spot(1_115), at(1_000));
        assert_eq!(tracked.first_seen(at(1_050)), at(1_000));
    }

    #[test]
    fn maintenance_is_moved_and_ends() {
        let mut tracked = Maintenance::default();
        let (id, other) = (NoticeId("a".into()), NoticeId("b".into()));
        let both = list(&[event("a", 5_000), event("b", 6_000)]);
        assert_eq!(tracked.scheduled(&both).len(), 2);
        assert_eq!(tracked.scheduled(&both), []);
        let moved = list(&[event("a", 9_000), event("b", 6_000)]);
        assert!(
            matches!(&tracked.scheduled(&moved)[..], [Report::Seen(notice)] if notice.deadline == Deadline::Soft(at(9_000)))
        );

        // It is gone from the list, and the history tells why.
        let left = list(&[event("b", 6_000)]);
        assert_eq!(tracked.scheduled(&left), []);
        assert!(tracked.is_any_missing(&left));
        let history = list(&[
            (id.clone(), Entry::Ended(Withdrawal::Completed)),
            (other.clone(), Entry::Ended(Withdrawal::Cancelled)),
        ]);
        assert_eq!(tracked.history(&left, &history), [Report::Withdrawn(id, Withdrawal::Completed)]);
        assert!(!tracked.is_any_missing(&left));

        // It ends in the list itself.
        let ended = list(&[(other.clone(), Entry::Ended(Withdrawal::Cancelled))]);
        assert_eq!(tracked.scheduled(&ended), [Report::Withdrawn(other, Withdrawal::Cancelled)]);
        assert_eq!(tracked.scheduled(&ended), []);
    }

    #[test]
    fn an_event_in_neither_list_vanishes_after_three_polls_running() {
        let mut tracked = Maintenance::default();
        let (none, one) = (Events::default(), list(&[event("a", 5_000)]));
        tracked.scheduled(&one);
        let miss = |tracked: &mut Maintenance| {
            assert_eq!(tracked.scheduled(&none), []);
            tracked.history(&none, &none)
        };
        assert_eq!((miss(&mut tracked), miss(&mut tracked)), (vec![], vec![]));
        assert_eq!(tracked.scheduled(&one), [], "there it is again, as it was");
        assert_eq!((miss(&mut tracked), miss(&mut tracked)), (vec![], vec![]));
        // An entry that cannot be read is still there.
        assert_eq!(tracked.scheduled(&list(&[(NoticeId("a".into()), Entry::Unclear)])), []);
        assert_eq!((miss(&mut tracked), miss(&mut tracked)), (vec![], vec![]));
        assert_eq!(miss(&mut tracked), [Report::Withdrawn(NoticeId("a".into()), Withdrawal::Vanished)]);
    }

    #[test]
    fn warnings_are_said_once() {
        let mut tracked = Maintenance::default();
        assert_eq!(tracked.new_warnings(vec!["x".into()]), ["x"]);
        assert_eq!(tracked.new_warnings(vec!["x".into(), "y".into()]), ["y"]);
        assert!(tracked.new_warnings(vec![]).is_empty());
        assert_eq!(tracked.new_warnings(vec!["x".into()]), ["x"]);
    }
}

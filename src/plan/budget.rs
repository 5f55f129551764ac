//! The arithmetic of the deadline.

use std::time::Duration;

use crate::plan::Moment;

/// Where a deadline is already past when we learn of it, this much is still tried: the machine answers, so it lives.
const PAST_DEADLINE_WORK: Duration = Duration::from_secs(10);

/// The least grace is a second, and then the pod must be seen gone: a shorter time is treated like none.
const LEAST_WORK: Duration = Duration::from_millis(1500);

/// What a soft deadline of our own adds to the longest grace of the node's pods.
pub const SOFT_SLACK: Duration = Duration::from_secs(60);

/// Until when work on a node is possible, on the monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The power goes.
    Hard(Moment),
    /// Chosen by us or a schedule.
    Soft(Moment),
    /// To be set when the pods are known: the longest grace among them and [`SOFT_SLACK`].
    ByGrace,
}

/// The time that a drain has.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// When this limit became known.
    pub known_at: Moment,
    pub limit: Limit,
    /// What is kept free before the limit, for clocks that differ and answers that travel.
    pub margin: Duration,
}

impl Budget {
    /// Whether the power goes at the end.
    pub fn is_hard(&self) -> bool {
        matches!(self.limit, Limit::Hard(_))
    }

    /// The limit, where it is set.
    pub fn at(&self) -> Option<Moment> {
        match self.limit {
            Limit::Hard(at) | Limit::Soft(at) => Some(at),
            Limit::ByGrace => None,
        }
    }

    /// When the work ends, done or not: half a margin before the limit. A pod whose grace was cut ends a whole margin
    /// before it, and the API server says so a moment later: with the same end it would be reported as left.
    pub fn end(&self) -> Option<Moment> {
        let end = self.at()?.before(self.margin / 2);
        let least = self.known_at.after(LEAST_WORK);
        Some(if end >= least { end } else { self.known_at.after(PAST_DEADLINE_WORK) })
    }

    /// The grace to send with an eviction at `now`, in seconds, for a pod whose own is `own`.
    /// `None` means: send no grace, so that the pod's own holds.
    pub fn eviction_grace(&self, own: u32, now: Moment) -> Option<u32> {
        self.is_hard().then(|| self.clamp(own, now))
    }

    /// The pod's own grace, cut to what is left; never below 1, for 0 would remove the pod's object before its process.
    pub fn clamp(&self, own: u32, now: Moment) -> u32 {
        let Some(at) = self.at() else { return own.max(1) };
        let left = at.before(self.margin).since(now).as_secs();
        own.min(u32::try_from(left).unwrap_or(u32::MAX)).max(1)
    }

    /// The last moment at which a pod that a budget protects must be asked to stop, to have its grace, or half of the
    /// time that there was, before the limit.
    pub fn latest_start(&self, own: u32) -> Option<Moment> {
        let at = self.at()?;
        let half = at.since(self.known_at) / 2;
        let needed = Duration::from_secs(own.into()).min(half);
        Some(at.before(needed).before(self.margin).max(self.known_at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: u64) -> Moment {
        Moment(Duration::from_secs(1000 + seconds))
    }

    fn hard(at: u64) -> Budget {
        Budget { known_at: s(0), limit: Limit::Hard(s(at)), margin: Duration::from_secs(2) }
    }

    #[test]
    fn f15_grace_fits_the_time_that_is_left() {
        let two_minutes = hard(120);
        assert_eq!(two_minutes.eviction_grace(30, s(0)), Some(30), "never more than the pod's own");
        assert_eq!(two_minutes.eviction_grace(600, s(0)), Some(118));
        assert_eq!(two_minutes.eviction_grace(600, s(100)), Some(18));
        assert_eq!(two_minutes.eviction_grace(600, s(119)), Some(1));
        assert_eq!(two_minutes.eviction_grace(600, s(500)), Some(1));
        assert_eq!(two_minutes.eviction_grace(0, s(0)), Some(1), "0 would remove the object before the process");
        let soft = Budget { limit: Limit::Soft(s(120)), ..two_minutes };
        assert_eq!(soft.eviction_grace(600, s(0)), None);
    }

    #[test]
    fn latest_start_leaves_the_grace_or_half_of_the_time() {
        assert_eq!(hard(120).latest_start(30), Some(s(88)));
        assert_eq!(hard(120).latest_start(600), Some(s(58)), "not at once, however long the grace");
        assert_eq!(hard(24).latest_start(60), Some(s(10)));
        assert_eq!(hard(3).latest_start(60), Some(s(0)), "never before the limit was known");
        assert_eq!(hard(0).latest_start(60), Some(s(0)));
    }

    #[test]
    fn work_ends_half_a_margin_before_the_limit_or_shortly_after_a_limit_in_the_past() {
        assert_eq!(hard(120).end(), Some(s(119)), "a pod killed at 118 is seen gone before the end");
        assert_eq!(hard(3).end(), Some(s(2)));
        assert_eq!(hard(1).end(), Some(s(10)));
        assert_eq!(Budget { limit: Limit::ByGrace, ..hard(1) }.end(), None);
    }
}

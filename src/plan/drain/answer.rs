//! What each answer of the API server means for the pod that was asked.

use std::time::Duration;

use crate::plan::{
    Answer, Moment, PodUid,
    drain::{
        Ask, Drain, Effect, News,
        pod::{Request, State},
    },
};

/// Budgets change when replacements become ready elsewhere, which takes seconds: ask again after one, and never wait
/// longer than five.
const BUDGET_RETRY: Duration = Duration::from_secs(1);
const BUDGET_RETRY_MOST: Duration = Duration::from_secs(5);
/// What does not heal by waiting (two budgets, a missing right) is still looked at again: people repair things.
const STUCK_RETRY: Duration = Duration::from_secs(5);
const STUCK_RETRY_MOST: Duration = Duration::from_secs(15);
/// An API server that has just started refuses what it allows a moment later, when it has read its roles: the first
/// refusal of a right is asked again soon, and not told.
const FORBIDDEN_RETRY: Duration = Duration::from_millis(500);
/// A lost answer says nothing about the pod: ask again soon, on another connection.
const LOST_RETRY: Duration = Duration::from_millis(100);
const LOST_RETRY_MOST: Duration = Duration::from_secs(2);
/// The API server's own Retry-After when it throttles, where the answer does not carry it.
const THROTTLED_RETRY: Duration = Duration::from_secs(1);
/// How far the API server's own cache of pods is behind, at most and by far.
const CACHE_LAG: Duration = Duration::from_secs(5);

const DELETE_RETRY_MOST: Duration = Duration::from_secs(1);
/// Whatever the other side asks for, nothing waits longer: a deadline is near, and a number may be wrong.
const OUTSIDE_WAIT_MOST: Duration = Duration::from_secs(60);

/// A wait that was asked for from outside, as far as it is followed.
fn bounded(wait: Duration) -> Duration {
    wait.min(OUTSIDE_WAIT_MOST)
}

/// Why a pod cannot be evicted now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A disruption budget allows none.
    Budget,
    /// A disruption budget protects a pod that is running and not ready; it may never become evictable.
    Unhealthy,
    /// Several budgets cover it.
    MultipleBudgets,
    /// Its namespace is being deleted, and it goes with it.
    NamespaceTerminating,
    /// We may not.
    Forbidden,
    /// The API server failed.
    Failing,
}

impl Why {
    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Budget => "blocked by a disruption budget",
            Self::Unhealthy => {
                "blocked by a disruption budget while not ready (unhealthyPodEvictionPolicy: AlwaysAllow would let it go)"
            }
            Self::MultipleBudgets => {
                "covered by more than one disruption budget, which the eviction API does not support"
            }
            Self::NamespaceTerminating => "its namespace is being deleted",
            Self::Forbidden => "refused by the API server",
            Self::Failing => "the API server failed",
        }
    }
}

/// What to do after an answer without effect.
struct Setback {
    wait: Duration,
    why: Option<(Why, String)>,
}

impl Drain {
    pub(super) fn answered(&mut self, uid: &PodUid, ask: Ask, answer: Answer, now: Moment, effects: &mut Vec<Effect>) {
        let Some(index) = self.find(uid) else { return };
        // No request of this drain: nothing is known of it, and nothing waits for it.
        let Some(request) = self.pods[index].request.take() else { return };
        self.in_flight = self.in_flight.saturating_sub(1);
        let Request { sent_at, grace, before } = request;
        if !matches!(self.pods[index].state, State::Asked(_)) {
            // It went, or was given up, while the request was under way.
            if answer == Answer::Accepted {
                self.accepted(index, request, now);
            }
            return;
        }
        match answer {
            Answer::Throttled { .. } => self.window.throttled(sent_at, now),
            Answer::Unknown { .. } => {}
            _ => self.window.answered(),
        }
        match answer {
            Answer::Accepted => {
                effects.extend(self.pods[index].tell_deletion());
                self.accepted(index, request, now);
            }
            Answer::Gone if self.may_be_too_new(index, now) => {
                let wait = self.pods[index].back_off(LOST_RETRY, LOST_RETRY_MOST);
                self.pods[index].set_back(now.after(wait), grace, before);
                self.judge(index, now, effects);
            }
            Answer::Gone | Answer::Replaced => self.gone(index, false, now, effects),
            other => {
                if !matches!(other, Answer::Unknown { .. }) {
                    // It was not carried out.
                    self.pods[index].deletion = None;
                }
                let mut setback = self.setback(index, other);
                if ask == Ask::Delete {
                    // A deletion that came to nothing has no time to wait long.
                    setback.wait = setback.wait.min(DELETE_RETRY_MOST);
                }
                self.pods[index].set_back(now.after(setback.wait), grace, before);
                // It may have been annotated while it was asked.
                self.judge(index, now, effects);
                if self.pods[index].state != State::Skipped {
                    self.tell(index, setback.why, now, effects);
                }
            }
        }
    }

    /// For a node's own requests the API server looks into a cache of pods first, which may not know a pod yet that we
    /// were already shown: its 404 is then no news, and the watch tells what is true.
    fn may_be_too_new(&self, index: usize, now: Moment) -> bool {
        now.since(self.pods[index].seen_at) < CACHE_LAG
    }

    fn accepted(&mut self, index: usize, request: Request, now: Moment) {
        self.stamps.first_accepted.get_or_insert(now);
        self.stamps.last_accepted = Some(now);
        self.pods[index].accepted(request);
    }

    /// How long to wait after `answer`, and what a person should know about it.
    fn setback(&self, index: usize, answer: Answer) -> Setback {
        let pod = &self.pods[index];
        let plain = |base, most| pod.back_off(base, most);
        match answer {
            Answer::Budget { message, retry_after } => {
                // A budget that is still being processed (it says when to come back) says nothing about the pod.
                let ready = pod.facts.ready || retry_after.is_some();
                let why = if ready { Why::Budget } else { Why::Unhealthy };
                let wait = retry_after.map(bounded).unwrap_or_else(|| plain(BUDGET_RETRY, BUDGET_RETRY_MOST));
                Setback { wait, why: Some((why, message)) }
            }
            Answer::MultipleBudgets { message } => {
                Setback { wait: plain(STUCK_RETRY, STUCK_RETRY_MOST), why: Some((Why::MultipleBudgets, message)) }
            }
            Answer::Throttled { retry_after } => {
                // Later by up to half again, so that those who were refused together do not return together.
                let wait = retry_after.map_or(THROTTLED_RETRY, bounded);
                Setback { wait: wait.mul_f64(1.0 + 0.5 * pod.spread()), why: None }
            }
            Answer::NamespaceTerminating => {
                let message = "waiting for it to go with its namespace".to_owned();
                Setback { wait: STUCK_RETRY, why: Some((Why::NamespaceTerminating, message)) }
            }
            Answer::Forbidden { message } => {
                Setback { wait: plain(FORBIDDEN_RETRY, STUCK_RETRY_MOST), why: Some((Why::Forbidden, message)) }
            }
            Answer::Failed { message } => {
                Setback { wait: plain(BUDGET_RETRY, BUDGET_RETRY_MOST), why: Some((Why::Failing, message)) }
            }
            Answer::Unknown { .. } | Answer::Accepted | Answer::Gone | Answer::Replaced => {
                Setback { wait: plain(LOST_RETRY, LOST_RETRY_MOST), why: None }
            }
        }
    }

    fn tell(&mut self, index: usize, why: Option<(Why, String)>, now: Moment, effects: &mut Vec<Effect>) {
        let latest = self.budget.latest_start(self.pods[index].facts.grace_seconds);
        let pod = &mut self.pods[index];
        let Some((why, message)) = why else { return };
        let first = pod.blocked.replace(why) != Some(why);
        pod.last_message.clone_from(&message);
        if why == Why::Forbidden && first {
            return;
        }
        if !pod.told.contains(&why) {
            pod.told.push(why);
            let waits = latest.map(|latest| latest.since(now));
            effects.push(pod.note(News::Blocked { why, message, waits }));
        }
    }
}

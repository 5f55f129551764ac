//! What is seen of the pods, and what a drain makes of it.

use std::time::Duration;

use crate::plan::{
    Moment, PodFacts, PodUid,
    classify::{Classified, Verdict, classify},
    drain::{
        Drain, Effect, News,
        pod::{Pod, State},
    },
};

/// Pods that are gone and still known by their UID, for news of them that come late. A controller whose pods are bound
/// to a closed node makes new ones for as long as they are evicted: the older ones are only counted.
const GONE_KEPT: usize = 512;
/// So many pods that were bound late are asked at once. Then each waits, one after the other, a second longer for each
/// further so many: such a controller would otherwise be answered as fast as it can make pods.
const LATE_AT_ONCE: u64 = 64;
/// The longest time between two of them, in seconds.
const LATE_GAP_MOST: u64 = 10;
/// The least that they wait, where a deadline is too near to let them queue.
const LATE_GAP_LEAST: Duration = Duration::from_secs(1);

impl Drain {
    pub(super) fn find(&self, uid: &PodUid) -> Option<usize> {
        self.pods.iter().position(|pod| pod.facts.uid == *uid)
    }

    pub(super) fn listed(&mut self, list: Vec<PodFacts>, now: Moment, effects: &mut Vec<Effect>) {
        for index in 0..self.pods.len() {
            if !list.iter().any(|facts| facts.uid == self.pods[index].facts.uid) {
                self.gone(index, false, now, effects);
            }
        }
        for facts in list {
            self.seen(facts, now, effects);
        }
        if !self.listed {
            self.listed = true;
            self.unsorted = true;
            // A list that comes after the end brings no new time.
            if !self.is_over(now) {
                self.settle_limit(now);
            }
        }
    }

    pub(super) fn seen(&mut self, facts: PodFacts, now: Moment, effects: &mut Vec<Effect>) {
        let Some(index) = self.find(&facts.uid) else { return self.appeared(facts, now, effects) };
        let pod = &mut self.pods[index];
        let annotation = |facts: &PodFacts| facts.annotations.get("evict").cloned();
        let relabelled = annotation(&pod.facts) != annotation(&facts);
        pod.update(facts);
        match pod.state {
            State::Skipped => pod.gone_at = None,
            _ if pod.facts.finished => self.gone(index, true, now, effects),
            // A UID never comes back: this picture is older than the news.
            State::Gone { proven: true, .. } => {}
            State::Gone { proven: false, .. } => {
                pod.seen_at = now;
                pod.reopen(now);
            }
            _ => {}
        }
        if self.pods[index].is_gone() {
            return;
        }
        if let Some(value) = self.judge(index, now, effects).filter(|_| relabelled) {
            effects.push(self.pods[index].note(News::BadAnnotation(value)));
        }
    }

    fn appeared(&mut self, facts: PodFacts, now: Moment, effects: &mut Vec<Effect>) {
        let Classified { verdict, bad_annotation } = classify(&facts, &self.settings.rules);
        let (tier, skip) = match verdict {
            Verdict::Skip(skip) => (None, Some(skip)),
            Verdict::Evict(tier) => (Some(tier), None),
        };
        let mut pod = Pod::new(facts, tier, now);
        if let Some(value) = bad_annotation {
            effects.push(pod.note(News::BadAnnotation(value)));
        }
        if let Some(skip) = skip {
            effects.push(pod.note(News::Skipped(skip)));
        }
        if self.listed && matches!(pod.state, State::Due { .. }) {
            pod.state = State::Due { at: self.late_start(pod.facts.grace_seconds, now) };
        }
        self.pods.push(pod);
    }

    /// When a pod that was bound late is asked: its grace before the deadline at the latest.
    fn late_start(&mut self, own: u32, now: Moment) -> Moment {
        let gap = (self.late / LATE_AT_ONCE).min(LATE_GAP_MOST);
        self.late = self.late.saturating_add(1);
        if gap == 0 {
            return now;
        }
        self.late_until = now.max(self.late_until).after(Duration::from_secs(gap));
        let latest = self.budget.latest_start(own).map(|latest| latest.max(now.after(LATE_GAP_LEAST)));
        latest.map_or(self.late_until, |latest| latest.min(self.late_until))
    }

    /// Judges a pod again that nobody asked to stop yet: its annotation may be another now. Returns a value that is
    /// none of the known words.
    pub(super) fn judge(&mut self, index: usize, now: Moment, effects: &mut Vec<Effect>) -> Option<String> {
        let pod = &mut self.pods[index];
        let Classified { verdict, bad_annotation } = classify(&pod.facts, &self.settings.rules);
        match (pod.state, verdict) {
            (State::Due { .. }, Verdict::Skip(skip)) => {
                pod.state = State::Skipped;
                pod.blocked = None;
                effects.push(pod.note(News::Skipped(skip)));
            }
            (State::Due { .. }, Verdict::Evict(tier)) if tier != pod.tier => {
                pod.tier = tier;
                self.unsorted = true;
            }
            (State::Skipped, Verdict::Evict(tier)) => {
                pod.tier = tier;
                pod.reopen(now);
                self.unsorted = true;
            }
            _ => {}
        }
        bad_annotation
    }

    pub(super) fn gone(&mut self, index: usize, proven: bool, now: Moment, effects: &mut Vec<Effect>) {
        let pod = &mut self.pods[index];
        if pod.gone(proven, now) {
            self.stamps.last_gone = Some(now);
            effects.extend(pod.tell_deletion());
            effects.push(pod.note(News::Gone));
        }
    }

    /// Forgets the pods that went first, where many did. What is under way is still to be answered, and kept.
    pub(super) fn forget(&mut self) {
        let past = |pod: &Pod| pod.gone_at.filter(|_| pod.request.is_none());
        let mut surplus = self.pods.iter().filter_map(past).count().saturating_sub(GONE_KEPT);
        while surplus > 0 {
            let times = self.pods.iter().enumerate().filter_map(|(index, pod)| Some((past(pod)?, index)));
            let Some((_, oldest)) = times.min() else { return };
            self.pods.remove(oldest).count(&mut self.forgotten);
            surplus -= 1;
        }
    }
}

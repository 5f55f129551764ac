//! The drain of one node as a state machine: `(state, input, now) -> (state, effects)`.
//!
//! It starts after the claim, and knows nothing of clocks, connections or tasks: the edge tells it what was seen and
//! answered ([`Input`]), does what it says ([`Effect`]), and comes back at [`Drain::next_wake`]. Each pod goes
//!
//! ```text
//! Due -> Asked -> Terminating -> Gone
//!   ^------'  blocked, throttled, lost: asked again, until its latest start; then deleted, or left
//! ```
//!
//! A pod that is to do something before it is evicted is held in `Due` until then.

mod answer;
mod pod;

use std::time::Duration;

use crate::plan::{
    Answer, Moment, PodFacts, PodUid,
    budget::{Budget, Limit, SOFT_SLACK},
    classify::{Classified, Rules, Skip, Verdict, classify},
};
pub use answer::Why;
use pod::{Pod, State};

/// What happens to a pod that a budget still protects at its latest start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtDeadline {
    /// Delete under a hard deadline, leave otherwise.
    Auto,
    Delete,
    Leave,
}

/// What an operator chose.
#[derive(Debug, Clone)]
pub struct Settings {
    pub rules: Rules,
    pub margin: Duration,
    pub at_deadline: AtDeadline,
    /// Most evictions and deletions under way at once.
    pub max_in_flight: usize,
}

/// Which request was, or is to be, sent for a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Evict,
    Delete,
}

/// What the edge saw.
#[derive(Debug, Clone)]
pub enum Input {
    /// All pods of the node, at the beginning or after the watch was lost.
    Listed(Vec<PodFacts>),
    /// One pod appeared or changed.
    Seen(PodFacts),
    /// One pod's object is gone.
    Gone(PodUid),
    /// The answer to an [`Effect::Evict`] or [`Effect::Delete`].
    Answered { pod: PodUid, ask: Ask, answer: Answer },
    /// The deadline is another now.
    Deadline(Limit),
    /// Nothing but time.
    Tick,
}

/// The pod that a request is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub namespace: String,
    pub name: String,
    pub uid: PodUid,
}

/// What the edge is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Send an eviction. No grace: the pod's own holds.
    Evict { pod: Target, grace_seconds: Option<u32> },
    /// Set the `DisruptionTarget` condition with this message, then delete.
    Delete { pod: Target, grace_seconds: u32, message: String },
    /// Tell people.
    Note(Note),
}

/// News about one pod that a person may want to hear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    pub pod: Target,
    pub news: News,
}

/// See [`Note`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// It is not touched. Told once, when it is first seen.
    Skipped(Skip),
    /// `spotter.dev/evict` has this value, which is none of `never`, `first`, `last`.
    BadAnnotation(String),
    /// It cannot be evicted now. Told once for each reason.
    Blocked { why: Why, message: String, waits: Option<Duration> },
    /// Its latest start was reached, and it was deleted.
    DeletedAtDeadline { message: String },
    /// It is gone, or its containers have ended.
    Gone,
    /// The time is up and it is still there.
    Left { message: String },
}

/// How a drain stands, in numbers of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Pods that are to go.
    pub total: usize,
    pub gone: usize,
    pub terminating: usize,
    pub blocked: usize,
    pub left: usize,
    pub skipped: usize,
    /// Of those that are gone: deleted at their latest start.
    pub deleted: usize,
}

/// When things happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stamps {
    pub first_accepted: Option<Moment>,
    pub last_accepted: Option<Moment>,
    pub last_gone: Option<Moment>,
}

/// The state of one node's drain.
#[derive(Debug)]
pub struct Drain {
    settings: Settings,
    budget: Budget,
    /// In the order in which they are asked.
    pods: Vec<Pod>,
    listed: bool,
    in_flight: usize,
    window: Window,
    stamps: Stamps,
    finished: bool,
}

/// The limit on requests in flight: halved when the API server throttles, grown by one for each full window answered.
#[derive(Debug)]
struct Window {
    size: f64,
    most: f64,
    cut_at: Option<Moment>,
}

/// However much the API server throttles, this many requests stay in flight.
const LEAST_IN_FLIGHT: f64 = 4.0;

impl Window {
    fn new(most: usize) -> Self {
        let most = most.max(1) as f64;
        Self { size: most, most, cut_at: None }
    }

    /// One cut for each burst: answers to requests that were sent before the last cut do not count again.
    fn throttled(&mut self, sent_at: Moment, now: Moment) {
        if self.cut_at.is_none_or(|cut| sent_at >= cut) {
            self.size = (self.size / 2.0).max(LEAST_IN_FLIGHT).min(self.most);
            self.cut_at = Some(now);
        }
    }

    fn answered(&mut self) {
        self.size = (self.size + 1.0 / self.size).min(self.most);
    }

    fn has_room(&self, in_flight: usize) -> bool {
        (in_flight as f64) < self.size.floor()
    }
}

impl Drain {
    /// A drain that begins at `now`, when its limit became known.
    pub fn new(settings: Settings, limit: Limit, now: Moment) -> Self {
        let budget = Budget { known_at: now, limit, margin: settings.margin };
        let window = Window::new(settings.max_in_flight);
        Self {
            settings,
            budget,
            pods: Vec::new(),
            listed: false,
            in_flight: 0,
            window,
            stamps: Stamps::default(),
            finished: false,
        }
    }

    /// One step: takes in what was seen, and says what is to be done.
    pub fn step(&mut self, input: Input, now: Moment) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Listed(pods) => self.listed(pods, now, &mut effects),
            Input::Seen(facts) => self.seen(facts, now, &mut effects),
            Input::Gone(uid) => {
                if let Some(index) = self.find(&uid) {
                    self.gone(index, now, &mut effects);
                }
            }
            Input::Answered { pod, ask, answer } => self.answered(&pod, ask, answer, now, &mut effects),
            Input::Deadline(limit) => self.set_limit(limit, now),
            Input::Tick => {}
        }
        if self.listed {
            self.end_if_due(now, &mut effects);
            self.ask_all(now, &mut effects);
            self.finished = self.pods.iter().all(|pod| pod.state.is_settled());
        }
        effects
    }

    /// Whether every pod has gone, is left alone, or was left at the end. It can become false again when a pod is bound
    /// late or the deadline moves.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Whether listed.
    pub fn was_listed(&self) -> bool {
        self.listed
    }

    /// Whether requests are under way.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The names of the pods that were left.
    pub fn left(&self) -> Vec<String> {
        self.pods
            .iter()
            .filter(|pod| matches!(pod.state, State::Left { .. }))
            .map(|pod| pod.facts.full_name())
            .collect()
    }

    /// Whether this pod is known, and not ready.
    pub fn is_unready(&self, uid: &PodUid) -> bool {
        self.find(uid).is_some_and(|index| !self.pods[index].facts.ready)
    }

    /// How it stands.
    pub fn progress(&self) -> Progress {
        let mut progress = Progress::default();
        for pod in &self.pods {
            match &pod.state {
                State::Skipped => {
                    progress.skipped += 1;
                    continue;
                }
                State::Gone => progress.gone += 1,
                State::Left { .. } => progress.left += 1,
                State::Terminating { .. } => progress.terminating += 1,
                State::Due { .. } | State::Asked { .. } => progress.blocked += usize::from(pod.blocked.is_some()),
            }
            progress.total += 1;
            progress.deleted += usize::from(pod.deletion_told && pod.state == State::Gone);
        }
        progress
    }

    /// When things happened.
    pub fn stamps(&self) -> Stamps {
        self.stamps
    }

    /// Until when the work goes on.
    pub fn end(&self) -> Option<Moment> {
        self.budget.end()
    }

    /// The limit that holds now.
    pub fn limit(&self) -> Limit {
        self.budget.limit
    }

    /// When to come back with [`Input::Tick`] if nothing happens before.
    pub fn next_wake(&self) -> Option<Moment> {
        if !self.listed || self.finished {
            return None;
        }
        let room = self.window.has_room(self.in_flight);
        let pods = self.pods.iter().filter_map(|pod| match pod.state {
            State::Due { at } if room && pod.deleted => Some(at),
            State::Due { at } if room => Some(self.delete_at(pod).map_or(at, |latest| at.min(latest))),
            State::Terminating { retry_at, .. } if room => retry_at,
            _ => None,
        });
        pods.chain(self.budget.end()).min()
    }

    fn find(&self, uid: &PodUid) -> Option<usize> {
        self.pods.iter().position(|pod| pod.facts.uid == *uid)
    }

    fn listed(&mut self, list: Vec<PodFacts>, now: Moment, effects: &mut Vec<Effect>) {
        for index in 0..self.pods.len() {
            if !list.iter().any(|facts| facts.uid == self.pods[index].facts.uid) {
                self.gone(index, now, effects);
            }
        }
        for facts in list {
            self.seen(facts, now, effects);
        }
        if !self.listed {
            self.listed = true;
            self.pods.sort_by_key(Pod::order);
            self.settle_limit(now);
        }
    }

    fn seen(&mut self, facts: PodFacts, now: Moment, effects: &mut Vec<Effect>) {
        match self.find(&facts.uid) {
            Some(index) => {
                let ended = facts.finished;
                self.pods[index].update(facts);
                if ended {
                    self.gone(index, now, effects);
                }
            }
            None => self.appeared(facts, now, effects),
        }
    }

    fn appeared(&mut self, facts: PodFacts, now: Moment, effects: &mut Vec<Effect>) {
        let Classified { verdict, bad_annotation } = classify(&facts, &self.settings.rules);
        let (tier, skip) = match verdict {
            Verdict::Skip(skip) => (None, Some(skip)),
            Verdict::Evict(tier) => (Some(tier), None),
        };
        let pod = Pod::new(facts, tier, now);
        if let Some(value) = bad_annotation {
            effects.push(pod.note(News::BadAnnotation(value)));
        }
        if let Some(skip) = skip {
            effects.push(pod.note(News::Skipped(skip)));
        }
        self.pods.push(pod);
    }

    fn gone(&mut self, index: usize, now: Moment, effects: &mut Vec<Effect>) {
        let pod = &mut self.pods[index];
        if matches!(pod.state, State::Gone | State::Skipped) {
            return;
        }
        // The answer to a request under way still comes, and is counted then.
        pod.state = State::Gone;
        pod.blocked = None;
        self.stamps.last_gone = Some(now);
        effects.extend(pod.tell_deletion());
        effects.push(pod.note(News::Gone));
    }

    fn set_limit(&mut self, limit: Limit, now: Moment) {
        self.budget = Budget { known_at: now, limit, margin: self.settings.margin };
        if self.listed {
            self.settle_limit(now);
        }
        for pod in &mut self.pods {
            pod.limit_changed(now);
        }
    }

    fn settle_limit(&mut self, now: Moment) {
        if self.budget.limit == Limit::ByGrace {
            let open = self.pods.iter().filter(|pod| !pod.state.is_settled());
            let longest = open.map(|pod| pod.facts.grace_seconds).max().unwrap_or(0);
            self.budget.limit = Limit::Soft(now.after(Duration::from_secs(longest.into())).after(SOFT_SLACK));
        }
    }

    /// When a pod that could not be evicted is deleted instead, if it ever is.
    fn delete_at(&self, pod: &Pod) -> Option<Moment> {
        let delete = match self.settings.at_deadline {
            AtDeadline::Auto => self.budget.is_hard(),
            AtDeadline::Delete => true,
            AtDeadline::Leave => false,
        };
        // Asked at least once: budgets are respected for as long as there is time to.
        if delete && pod.was_asked() { self.budget.latest_start(pod.facts.grace_seconds) } else { None }
    }

    fn end_if_due(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        if self.budget.end().is_none_or(|end| now < end) {
            return;
        }
        for pod in self.pods.iter_mut().filter(|pod| !pod.state.is_settled()) {
            effects.push(pod.leave());
        }
    }

    fn ask_all(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        for pod in &mut self.pods {
            pod.forget_past_retry(now);
        }
        // Deletions first: they are the ones that have no time left.
        for index in 0..self.pods.len() {
            if !self.window.has_room(self.in_flight) {
                return;
            }
            if let State::Due { at } = self.pods[index].state
                && self.delete_at(&self.pods[index]).is_some_and(|latest| now >= latest)
                && (now >= at || !self.pods[index].deleted)
            {
                self.delete(index, now, effects);
            }
        }
        for index in 0..self.pods.len() {
            if !self.window.has_room(self.in_flight) {
                return;
            }
            let due = match self.pods[index].state {
                State::Due { at } => now >= at,
                State::Terminating { until, asked, retry_at } => {
                    retry_at.is_none() && self.is_too_long(index, until, asked, now)
                }
                _ => false,
            };
            if due {
                self.evict(index, now, effects);
            }
        }
    }

    /// Whether a terminating pod would outlast a hard deadline, and asking again would shorten its time.
    fn is_too_long(&self, index: usize, until: Moment, asked: Option<u32>, now: Moment) -> bool {
        let Budget { limit: Limit::Hard(limit), margin, .. } = self.budget else { return false };
        // Deletion timestamps are whole seconds of another clock: a second of difference is none.
        let outlasts = until > limit.before(margin).after(Duration::from_millis(1500));
        let grace = self.budget.clamp(self.pods[index].facts.grace_seconds, now);
        outlasts && asked.is_none_or(|asked| grace < asked)
    }

    fn evict(&mut self, index: usize, now: Moment, effects: &mut Vec<Effect>) {
        let pod = &mut self.pods[index];
        let grace_seconds = self.budget.eviction_grace(pod.facts.grace_seconds, now);
        pod.asked(grace_seconds, now);
        self.in_flight += 1;
        effects.push(Effect::Evict { pod: pod.target(), grace_seconds });
    }

    fn delete(&mut self, index: usize, now: Moment, effects: &mut Vec<Effect>) {
        let pod = &mut self.pods[index];
        let grace_seconds = self.budget.clamp(pod.facts.grace_seconds, now);
        let message = pod.delete_message(grace_seconds);
        pod.deleted = true;
        pod.deletion = Some(message.clone());
        pod.asked(Some(grace_seconds), now);
        self.in_flight += 1;
        effects.push(Effect::Delete { pod: pod.target(), grace_seconds, message });
    }
}

#[cfg(test)]
mod tests;

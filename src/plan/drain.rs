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
mod seen;
mod window;

use std::time::Duration;

use crate::plan::{
    Answer, Moment, PodFacts, PodUid,
    budget::{Budget, Limit, SOFT_SLACK},
    classify::{Rules, Skip},
};
pub use answer::Why;
use pod::{Pod, State};
use window::Window;

/// How long a drain whose deadline hangs on its pods waits for their list.
const UNLISTED_WORK: Duration = SOFT_SLACK.saturating_add(Duration::from_secs(30));
/// A soft deadline that is nearer than this when it becomes known (a maintenance whose start has passed) is no deadline:
/// the machine goes when the drain is done, so the pods have their own grace.
const LEAST_SOFT_WORK: Duration = Duration::from_secs(10);
/// Moments that come from the wall clock differ a little each time they are computed, and deadlines by seconds.
const SAME_LIMIT: Duration = Duration::from_millis(500);

/// Whether both say the same.
fn is_same(a: Limit, b: Limit) -> bool {
    match (a, b) {
        (Limit::Hard(a), Limit::Hard(b)) | (Limit::Soft(a), Limit::Soft(b)) => a.since(b).max(b.since(a)) < SAME_LIMIT,
        _ => a == b,
    }
}

/// The limit that holds where `told` becomes known at `now`.
fn effective(told: Limit, now: Moment) -> Limit {
    match told {
        Limit::Soft(at) if at < now.after(LEAST_SOFT_WORK) => Limit::ByGrace,
        _ => told,
    }
}

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
    /// The limit as it was told last.
    told: Limit,
    /// In the order in which they are asked.
    pods: Vec<Pod>,
    unsorted: bool,
    /// Pods that are not among `pods` any more.
    forgotten: Progress,
    /// How many pods were bound late, and until when those that wait for each other are asked.
    late: u64,
    late_until: Moment,
    listed: bool,
    in_flight: usize,
    window: Window,
    stamps: Stamps,
    finished: bool,
}

impl Drain {
    /// A drain that begins at `now`, when its limit became known.
    pub fn new(settings: Settings, limit: Limit, now: Moment) -> Self {
        let budget = Budget { known_at: now, limit: effective(limit, now), margin: settings.margin };
        let window = Window::new(settings.max_in_flight);
        Self {
            settings,
            budget,
            told: limit,
            pods: Vec::new(),
            unsorted: false,
            forgotten: Progress::default(),
            late: 0,
            late_until: now,
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
                    self.gone(index, true, now, &mut effects);
                }
            }
            Input::Answered { pod, ask, answer } => self.answered(&pod, ask, answer, now, &mut effects),
            Input::Deadline(limit) => self.set_limit(limit, now, &mut effects),
            Input::Tick => {}
        }
        if self.is_over(now) {
            for pod in self.pods.iter_mut().filter(|pod| !pod.state.is_settled()) {
                effects.push(pod.leave());
            }
        }
        if self.listed {
            self.ask_all(now, &mut effects);
        }
        self.forget();
        self.finished = (self.listed || self.is_over(now)) && self.pods.iter().all(|pod| pod.state.is_settled());
        effects
    }

    /// Whether every pod has gone, is left alone, or was left at the end; or the end came before the pods were listed
    /// (see [`Self::was_listed`]). It can become false again when a pod is bound late or the deadline moves.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Whether the pods of the node were listed. Where a drain ends without, nothing was asked of any pod.
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
        let mut progress = self.forgotten;
        for pod in &self.pods {
            pod.count(&mut progress);
        }
        progress
    }

    /// When things happened.
    pub fn stamps(&self) -> Stamps {
        self.stamps
    }

    /// Until when the work goes on.
    pub fn end(&self) -> Option<Moment> {
        let unlisted = self.budget.known_at.after(UNLISTED_WORK);
        Some(self.budget.end().unwrap_or(unlisted))
    }

    fn is_over(&self, now: Moment) -> bool {
        self.end().is_some_and(|end| now >= end)
    }

    /// The limit that holds now.
    pub fn limit(&self) -> Limit {
        self.budget.limit
    }

    /// When to come back with [`Input::Tick`] if nothing happens before.
    pub fn next_wake(&self) -> Option<Moment> {
        if self.finished {
            return None;
        }
        if !self.listed {
            return self.end();
        }
        let room = self.window.has_room(self.in_flight);
        let pods = self.pods.iter().filter_map(|pod| match pod.state {
            State::Due { at } if room && pod.deleted => Some(at),
            State::Due { at } if room => Some(self.delete_at(pod).map_or(at, |latest| at.min(latest))),
            State::Terminating { retry_at, .. } if room => retry_at,
            _ => None,
        });
        pods.chain(self.end()).min()
    }

    fn set_limit(&mut self, limit: Limit, now: Moment, effects: &mut Vec<Effect>) {
        // Told again: what was known since then stays known since then.
        if is_same(limit, self.told) || is_same(limit, self.budget.limit) {
            return;
        }
        self.told = limit;
        self.budget = Budget { known_at: now, limit: effective(limit, now), margin: self.settings.margin };
        for index in 0..self.pods.len() {
            self.pods[index].limit_changed(now);
            self.judge(index, now, effects);
        }
        if self.listed {
            self.settle_limit(now);
        }
        for pod in &mut self.pods {
            let latest = self.budget.latest_start(pod.facts.grace_seconds);
            if let (State::Due { at }, Some(latest)) = (&mut pod.state, latest) {
                *at = latest.max(now).min(*at);
            }
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

    fn ask_all(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        if std::mem::take(&mut self.unsorted) {
            self.pods.sort_by_key(Pod::order);
        }
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

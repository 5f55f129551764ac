//! One pod of a drain.

use std::time::Duration;

use crate::plan::{
    Moment, PodFacts,
    classify::Tier,
    drain::{Effect, News, Note, Progress, Target, answer::Why},
};

/// Where a pod stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Not ours to touch.
    Skipped,
    /// To be asked at `at`.
    Due { at: Moment },
    /// A request is under way.
    Asked(Request),
    /// It is stopping. `asked` is the grace that we asked for; `None` where somebody else did, or it is its own.
    Terminating { until: Moment, asked: Option<u32>, retry_at: Option<Moment> },
    /// `proven`: the watch said so, or its containers have ended. Otherwise it was concluded from an answer or from a
    /// list, which may come from a cache that is behind, and a pod that is seen again is taken up again.
    Gone { proven: bool, stopping: Stopping },
    /// The time was up.
    Left { stopping: Stopping },
}

/// Where a pod had been asked to stop: until when, and with which grace.
type Stopping = Option<(Moment, Option<u32>)>;

/// A request under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) sent_at: Moment,
    pub(super) grace: Option<u32>,
    pub(super) before: Before,
}

impl Request {
    /// Until when a pod whose own grace is `own` has to stop once the request is accepted, and the grace that this is.
    fn granted(&self, own: u32) -> (Moment, Option<u32>) {
        let seconds = self.grace.unwrap_or(own);
        // Counted from when it was sent: the server's clock for it started no earlier, so it ends no earlier either.
        (self.sent_at.after(Duration::from_secs(seconds.into())), Some(seconds))
    }
}

/// What a pod under request was before, for when the request comes to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    Due,
    Terminating { until: Moment, asked: Option<u32> },
}

impl State {
    /// Nothing is expected to happen to it any more.
    pub(super) fn is_settled(&self) -> bool {
        matches!(self, Self::Skipped | Self::Gone { .. } | Self::Left { .. })
    }
}

#[derive(Debug)]
pub(super) struct Pod {
    pub(super) facts: PodFacts,
    pub(super) tier: Tier,
    pub(super) state: State,
    /// The request under way, also where the pod went, or was given up, meanwhile.
    pub(super) request: Option<Request>,
    /// When it was first seen, or seen again after it had been taken for gone.
    pub(super) seen_at: Moment,
    /// When it was found to be gone.
    pub(super) gone_at: Option<Moment>,
    /// Requests that were answered without effect, for the back-off.
    pub(super) tries: u32,
    /// Why it cannot be evicted now.
    pub(super) blocked: Option<Why>,
    /// The reasons that people were told.
    pub(super) told: Vec<Why>,
    /// A deletion was sent.
    pub(super) deleted: bool,
    /// What to tell people when that deletion proves to have been carried out.
    pub(super) deletion: Option<String>,
    /// They were told.
    pub(super) deletion_told: bool,
    /// What the API server said last, for the record of why.
    pub(super) last_message: String,
}

impl Pod {
    /// A pod that is to go (`tier`), or is left alone.
    pub(super) fn new(facts: PodFacts, tier: Option<Tier>, now: Moment) -> Self {
        let state = match (tier, facts.terminating_until) {
            (None, _) => State::Skipped,
            (Some(_), Some(until)) => State::Terminating { until, asked: None, retry_at: None },
            (Some(_), None) => State::Due { at: now },
        };
        Self {
            facts,
            tier: tier.unwrap_or(Tier::Normal),
            state,
            request: None,
            seen_at: now,
            gone_at: None,
            tries: 0,
            blocked: None,
            told: Vec::new(),
            deleted: false,
            deletion: None,
            deletion_told: false,
            last_message: String::new(),
        }
    }

    /// Tier by tier; critical pods (of high priority) last, as the kubelet does on shutdown; within that the longest
    /// grace first, because it needs the time most.
    pub(super) fn order(&self) -> (Tier, i32, std::cmp::Reverse<u32>) {
        (self.tier, self.facts.priority, std::cmp::Reverse(self.facts.grace_seconds))
    }

    pub(super) fn target(&self) -> Target {
        Target { namespace: self.facts.namespace.clone(), name: self.facts.name.clone(), uid: self.facts.uid.clone() }
    }

    pub(super) fn note(&self, news: News) -> Effect {
        Effect::Note(Note { pod: self.target(), news })
    }

    /// Takes in a newer picture of the same pod.
    pub(super) fn update(&mut self, facts: PodFacts) {
        self.facts = facts;
        let Some(until) = self.facts.terminating_until else { return };
        match &mut self.state {
            // Somebody else asked it to stop.
            State::Due { .. } => {
                self.state = State::Terminating { until, asked: None, retry_at: None };
                self.blocked = None;
            }
            State::Terminating { until: known, asked: None, .. } => *known = until,
            _ => {}
        }
    }

    pub(super) fn was_asked(&self) -> bool {
        self.tries > 0 || self.deleted
    }

    pub(super) fn asked(&mut self, grace: Option<u32>, now: Moment) {
        let before = match self.state {
            State::Terminating { until, asked, .. } => Before::Terminating { until, asked },
            _ => Before::Due,
        };
        let request = Request { sent_at: now, grace, before };
        self.request = Some(request);
        self.state = State::Asked(request);
    }

    /// A request was accepted. Where the pod went, or was given up, before, this is kept for when it is taken up again.
    pub(super) fn accepted(&mut self, request: Request) {
        let (until, asked) = request.granted(self.facts.grace_seconds);
        match &mut self.state {
            State::Gone { stopping, .. } | State::Left { stopping } => *stopping = Some((until, asked)),
            State::Asked(_) => {
                self.blocked = None;
                self.tries = 0;
                self.state = State::Terminating { until, asked, retry_at: None };
            }
            State::Skipped | State::Due { .. } | State::Terminating { .. } => {}
        }
    }

    fn stopping(&self) -> Stopping {
        match self.state {
            State::Terminating { until, asked, .. }
            | State::Asked(Request { before: Before::Terminating { until, asked }, .. }) => Some((until, asked)),
            State::Gone { stopping, .. } | State::Left { stopping } => stopping,
            State::Skipped | State::Due { .. } | State::Asked(_) => None,
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        matches!(self.state, State::Gone { .. })
    }

    /// It went. False where this is no news.
    pub(super) fn gone(&mut self, proven: bool, now: Moment) -> bool {
        self.gone_at.get_or_insert(now);
        let stopping = self.stopping();
        let news = !matches!(self.state, State::Skipped | State::Gone { .. });
        self.state = match self.state {
            State::Skipped => State::Skipped,
            State::Gone { proven: known, .. } => State::Gone { proven: proven || known, stopping },
            // The answer to a request under way still comes, and is counted then.
            _ => State::Gone { proven, stopping },
        };
        if news {
            self.blocked = None;
        }
        news
    }

    /// It is to go after all: back to where it stood.
    pub(super) fn reopen(&mut self, now: Moment) {
        let stopping = self.stopping().or(self.facts.terminating_until.map(|until| (until, None)));
        self.gone_at = None;
        self.state = match (self.request, stopping) {
            (Some(request), _) => State::Asked(request),
            (None, Some((until, asked))) => State::Terminating { until, asked, retry_at: None },
            (None, None) => State::Due { at: now },
        };
    }

    /// Counts it.
    pub(super) fn count(&self, progress: &mut Progress) {
        match &self.state {
            State::Skipped => {
                progress.skipped += 1;
                return;
            }
            State::Gone { .. } => progress.gone += 1,
            State::Left { .. } => progress.left += 1,
            State::Terminating { .. } => progress.terminating += 1,
            State::Due { .. } | State::Asked(_) => progress.blocked += usize::from(self.blocked.is_some()),
        }
        progress.total += 1;
        progress.deleted += usize::from(self.deletion_told && self.is_gone());
    }

    /// A request came to nothing: back to where the pod stood, to be asked again at `at`.
    pub(super) fn set_back(&mut self, at: Moment, grace: Option<u32>, before: Before) {
        self.tries = self.tries.saturating_add(1);
        self.state = match (before, self.facts.terminating_until) {
            (Before::Terminating { until, asked }, _) => State::Terminating { until, asked, retry_at: Some(at) },
            // The answer was lost, but the pod was seen to stop.
            (Before::Due, Some(until)) => State::Terminating { until, asked: grace, retry_at: Some(at) },
            (Before::Due, None) => State::Due { at },
        };
    }

    /// A retry whose time has come needs no timer any more.
    pub(super) fn forget_past_retry(&mut self, now: Moment) {
        if let State::Terminating { retry_at, .. } = &mut self.state
            && retry_at.is_some_and(|at| now >= at)
        {
            *retry_at = None;
        }
    }

    /// A new deadline: what was left is tried again, what waited is asked again soon.
    pub(super) fn limit_changed(&mut self, now: Moment) {
        match self.state {
            State::Left { .. } => self.reopen(now),
            State::Terminating { until, asked, .. } => {
                self.state = State::Terminating { until, asked, retry_at: None };
            }
            _ => {}
        }
    }

    /// The deletion that was sent has been carried out, as far as anybody can tell.
    pub(super) fn tell_deletion(&mut self) -> Option<Effect> {
        let message = self.deletion.take().filter(|_| !self.deletion_told)?;
        self.deletion_told = true;
        Some(self.note(News::DeletedAtDeadline { message }))
    }

    pub(super) fn leave(&mut self) -> Effect {
        let message = match (&self.state, &self.blocked) {
            (State::Terminating { .. }, _) => "it was asked to stop and is still running".to_owned(),
            (_, Some(why)) => format!("{}: {}", why.as_str(), self.last_message),
            _ => "the API server gave no answer in time".to_owned(),
        };
        self.state = State::Left { stopping: self.stopping() };
        self.note(News::Left { message })
    }

    pub(super) fn delete_message(&self, grace_seconds: u32) -> String {
        let why = match &self.blocked {
            Some(why) => format!("{} ({})", why.as_str(), self.last_message),
            None => "it could not be evicted in time".to_owned(),
        };
        format!("{why}; deleted with {grace_seconds} s of grace before the node ends")
    }

    /// Waits `base`, grown by half for each try up to `most`, spread by a fifth to either side so that many pods, or
    /// many agents, do not ask in step. The spread is a function of pod and try, not of chance.
    pub(super) fn back_off(&self, base: Duration, most: Duration) -> Duration {
        let grown = base.as_secs_f64() * 1.5_f64.powi(self.tries.min(20).try_into().unwrap_or(20));
        Duration::from_secs_f64(grown.min(most.as_secs_f64()) * (0.8 + 0.4 * self.spread()))
    }

    /// Between 0 and 1.
    pub(super) fn spread(&self) -> f64 {
        crate::plan::spread(&(&self.facts.uid, self.tries))
    }
}

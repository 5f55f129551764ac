//! The drain at work: the state machine of [`crate::plan::drain`], fed by the pods' watch, carried out on the cluster.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tracing::{debug, info};

use crate::{
    clock::Clock,
    cluster::{Identity, PodEvent, PodRef},
    notice::Deadline,
    plan::{
        Answer, Moment, PodFacts, PodUid,
        budget::Limit,
        classify::{Verdict, classify},
        drain::{self, Ask, Drain, Effect, Input, Stamps, Target},
    },
    policy::standing::{Stage, Standing},
    termination::{Hold, Outcome, Phase, Record, Settings, Termination, tell},
};

/// As its node, an agent is a flow of its own at the API server: all pods of a full node (110) at once are fine.
const IN_FLIGHT_AS_NODE: usize = 110;
/// Otherwise all agents share one flow and its queue: each keeps to a little.
const IN_FLIGHT_DIRECT: usize = 16;

/// A request may take the API server 10 s where many pods share a budget; never more than a quarter of what is left.
const LONGEST_REQUEST: Duration = Duration::from_secs(10);
const SHORTEST_REQUEST: Duration = Duration::from_secs(1);

/// The reason of the `DisruptionTarget` condition of a deleted pod.
const DISRUPTION_REASON: &str = "TerminationByNodeEnd";

/// The answer to a request for one pod.
#[derive(Debug)]
pub(super) struct Answered {
    pod: PodUid,
    ask: Ask,
    answer: Answer,
    /// What else a person should know, once.
    aside: Option<String>,
}

/// A drain under way, or just ended.
#[derive(Debug)]
pub(super) struct Work {
    machine: Drain,
    began_at: Moment,
    /// The process stops: nothing new is asked.
    stopping: bool,
}

impl Work {
    pub(super) fn begin(settings: drain::Settings, limit: Limit, now: Moment) -> Self {
        Self { machine: Drain::new(settings, limit, now), began_at: now, stopping: false }
    }

    pub(super) fn began_at(&self) -> Moment {
        self.began_at
    }

    /// The pods are watched until the end of the work, also when all are gone: pods may be bound late.
    pub(super) fn wants_pods(&self, now: Moment) -> bool {
        !self.stopping && (!self.machine.is_finished() || self.machine.end().is_some_and(|end| now < end))
    }

    pub(super) fn is_finished(&self) -> bool {
        self.machine.is_finished()
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.machine.progress().blocked > 0
    }

    pub(super) fn stop_asking(&mut self) {
        self.stopping = true;
    }

    /// When there is something to do without news: for the drain, or, after it, closing the pods' watch.
    pub(super) fn next_wake(&self, now: Moment) -> Option<Moment> {
        if self.machine.is_finished() { self.machine.end().filter(|end| now < *end) } else { self.machine.next_wake() }
    }

    pub(super) fn progress(&self) -> drain::Progress {
        self.machine.progress()
    }

    pub(super) fn stamps(&self) -> Stamps {
        self.machine.stamps()
    }

    pub(super) fn outcome(&self, now: Timestamp) -> Outcome {
        Outcome::new(now, self.machine.progress(), self.machine.left())
    }

    /// The deadline by the wall clock, where it is known.
    pub(super) fn deadline(&self, clock: &Clock) -> Option<Timestamp> {
        let (Limit::Hard(at) | Limit::Soft(at)) = self.machine.limit() else { return None };
        let now = clock.now();
        let span = |a: Moment, b: Moment| SignedDuration::try_from(a.since(b)).unwrap_or(SignedDuration::MAX);
        let wall = clock.wall();
        let exact = if at >= now { wall.saturating_add(span(at, now)) } else { wall.saturating_sub(span(now, at)) };
        exact.ok()?.round(jiff::Unit::Second).ok()
    }
}

impl Termination {
    pub(super) fn drain_settings(&self) -> drain::Settings {
        let by_identity = match self.cluster.identity() {
            Identity::Node => IN_FLIGHT_AS_NODE,
            Identity::Direct => IN_FLIGHT_DIRECT,
        };
        let max_in_flight = self.settings.max_in_flight.unwrap_or(by_identity);
        let Settings { rules, margin, at_deadline, .. } = self.settings.clone();
        drain::Settings { rules, margin, at_deadline, max_in_flight }
    }

    /// Until when the drain may work. What a former process resolved is in the record, and is not stretched.
    pub(super) fn limit_of(&self, record: &Record, standing: &Standing) -> Limit {
        match (standing.deadline, record.deadline) {
            (Some(Deadline::Hard(at)), _) => Limit::Hard(self.clock.moment(at)),
            (Some(Deadline::Soft(at)), _) => Limit::Soft(self.clock.moment(at)),
            (_, Some(at)) => Limit::Soft(self.clock.moment(at)),
            _ => Limit::ByGrace,
        }
    }

    /// Tells a running drain that the notices have another deadline now.
    pub(super) fn move_deadline(&mut self, standing: &Standing) {
        let Some(deadline) = standing.deadline.filter(|deadline| *deadline != Deadline::SoftByGrace) else { return };
        let Hold::Ours(record) = &self.hold else { return };
        if deadline.at() == record.deadline && deadline.is_hard() == record.hard {
            return;
        }
        let limit = self.limit_of(record, standing);
        self.feed(Input::Deadline(limit));
    }

    /// Pods among `pods` that a drain would move.
    pub(super) fn remaining(&self, pods: &[PodFacts]) -> usize {
        let rules = &self.settings.rules;
        pods.iter().filter(|pod| matches!(classify(pod, rules).verdict, Verdict::Evict(_))).count()
    }

    pub(super) fn pod_event(&mut self, event: PodEvent) {
        match event {
            PodEvent::Listed(pods) => {
                debug!(pods = pods.len(), "listed the pods of the node");
                self.feed(Input::Listed(pods));
            }
            PodEvent::Seen(pod) => self.feed(Input::Seen(pod)),
            PodEvent::Gone(uid) => self.feed(Input::Gone(uid)),
            PodEvent::Trouble { message } => self.warned.once(&format!("the watch of the node's pods: {message}")),
        }
    }

    pub(super) fn answered(&mut self, Answered { pod, ask, answer, aside }: Answered) {
        let unready = self.work.as_ref().is_some_and(|work| work.machine.is_unready(&pod));
        self.metrics.answered(&answer, unready);
        if let Some(aside) = aside {
            self.warned.once(&aside);
        }
        self.feed(Input::Answered { pod, ask, answer });
    }

    /// Lets the drain look at the clock, where it wanted to be woken by now.
    pub(super) fn tick(&mut self) {
        let now = self.clock.now();
        if self.work.as_ref().and_then(|work| work.machine.next_wake()).is_some_and(|wake| wake <= now) {
            self.feed(Input::Tick);
        }
    }

    fn feed(&mut self, input: Input) {
        let now = self.clock.now();
        let Some(work) = &mut self.work else { return };
        let listed = matches!(input, Input::Listed(_));
        let was_finished = work.machine.is_finished();
        let effects = work.machine.step(input, now);
        let (stopping, finished) = (work.stopping, work.machine.is_finished());
        let left = work.machine.end().map_or(LONGEST_REQUEST, |end| end.since(now));
        let limit = (left / 4).clamp(SHORTEST_REQUEST, LONGEST_REQUEST);
        self.metrics.progress(work.machine.progress());
        for effect in effects {
            match effect {
                Effect::Note(note) => self.tell_note(note),
                _ if stopping => {}
                effect if self.settings.dry_run => self.tell_rehearsed(&effect),
                effect => self.carry_out(effect, limit),
            }
        }
        if self.settings.dry_run && listed {
            self.end_rehearsal();
        } else if finished && !was_finished {
            self.tell_finished();
        }
    }

    fn carry_out(&mut self, effect: Effect, limit: Duration) {
        let cluster = self.cluster.clone();
        match effect {
            Effect::Evict { pod, grace_seconds } => {
                self.requests.spawn(async move {
                    let answer = cluster.evict(&pod_ref(&pod), grace_seconds, limit).await;
                    Answered { pod: pod.uid, ask: Ask::Evict, answer, aside: None }
                });
            }
            Effect::Delete { pod, grace_seconds, message } => {
                self.requests.spawn(async move {
                    let target = pod_ref(&pod);
                    // The condition tells controllers why; a pod that cannot be marked is deleted all the same.
                    let marked = cluster.mark(&target, DISRUPTION_REASON, &message, limit).await;
                    let aside = match &marked {
                        Answer::Forbidden { message } => {
                            Some(format!("deleted pods do not get the condition DisruptionTarget: {message}"))
                        }
                        _ => None,
                    };
                    let answer = match marked {
                        answer @ (Answer::Gone | Answer::Replaced) => answer,
                        _ => cluster.delete(&target, Some(grace_seconds), limit).await,
                    };
                    Answered { pod: pod.uid, ask: Ask::Delete, answer, aside }
                });
            }
            Effect::Note(note) => self.tell_note(note),
        }
    }

    /// A dry run: says what it would do, reads the pods to say it truthfully, and writes nothing.
    pub(super) fn rehearse(&mut self, standing: &Standing) -> bool {
        let Some(phase) = Phase::beginning(standing.stage) else { return false };
        let kind = standing.kinds.first().map_or("", |kind| kind.as_str());
        let cordon = phase.is_cordoned();
        info!(kind, phase = phase.as_str(), cordon, "dry run: would write the record on the Node");
        self.hold = Hold::Rehearsed(phase);
        if standing.stage == Stage::Draining {
            let limit = match standing.deadline {
                Some(Deadline::Hard(at)) => Limit::Hard(self.clock.moment(at)),
                Some(Deadline::Soft(at)) => Limit::Soft(self.clock.moment(at)),
                _ => Limit::ByGrace,
            };
            // Nothing is sent, so nothing is answered: without a limit every pod is told at once.
            let settings = drain::Settings { max_in_flight: usize::MAX, ..self.drain_settings() };
            self.work = Some(Work::begin(settings, limit, self.clock.now()));
        } else {
            self.metrics.ended(standing.kinds.first().copied(), tell::Ending::DryRun);
        }
        true
    }

    fn end_rehearsal(&mut self) {
        let annotation = self.annotation();
        let standing = self.notices.standing(annotation, self.clock.wall());
        let progress = self.work.as_ref().map(Work::progress).unwrap_or_default();
        info!(pods = progress.total, skipped = progress.skipped, "dry run: nothing was changed");
        self.metrics.ended(standing.kinds.first().copied(), tell::Ending::DryRun);
        self.work = None;
    }
}

fn pod_ref(pod: &Target) -> PodRef {
    PodRef { namespace: pod.namespace.clone(), name: pod.name.clone(), uid: pod.uid.clone() }
}

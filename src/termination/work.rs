//! The drain at work: the state machine of [`crate::plan::drain`], fed by the pods' watch, carried out on the cluster.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;
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

/// The condition on a pod that is deleted is a courtesy: it does not take the pod's time.
const MARK_LIMIT: Duration = Duration::from_secs(1);

/// A condition that is written faster than this costs the pod no second of its grace: the margin covers it.
const SOON: Duration = Duration::from_millis(300);

/// How often people hear how a drain stands that takes longer.
const WORD_EVERY: Duration = Duration::from_secs(10);
/// The same after the two minutes of an interruption: what takes longer is not watched by the second.
const WORD_EVERY_LONG: Duration = Duration::from_secs(60);
const LONG_DRAIN: Duration = Duration::from_secs(150);

/// The reason of the `DisruptionTarget` condition of a deleted pod.
const DISRUPTION_REASON: &str = "TerminationByNodeEnd";

/// The answer to a request for one pod.
#[derive(Debug)]
pub(super) struct Answered {
    /// Of which drain; an answer that comes after its end is counted, and no more.
    work: u64,
    pod: PodUid,
    ask: Ask,
    answer: Answer,
    /// What else a person should know, once.
    aside: Option<String>,
}

/// A drain under way, or just ended.
#[derive(Debug)]
pub(super) struct Work {
    number: u64,
    machine: Drain,
    began_at: Moment,
    /// The deadline that the machine was told last, as the notices have it: telling it again would move the latest
    /// starts.
    told: Option<Deadline>,
    /// When people hear next how it stands.
    next_word: Moment,
    /// The process stops: nothing new is asked.
    stopping: bool,
}

impl Work {
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
        if self.machine.is_finished() {
            return self.machine.end().filter(|end| now < *end);
        }
        self.machine.next_wake().into_iter().chain([self.next_word]).min()
    }

    /// How it ended: only a node whose pods were seen can be drained.
    pub(super) fn ending(&self) -> Phase {
        let drained = self.machine.was_listed() && self.machine.progress().left == 0;
        if drained { Phase::Drained } else { Phase::Incomplete }
    }

    pub(super) fn was_listed(&self) -> bool {
        self.machine.was_listed()
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
    /// A drain of its own, with a watch of its own: the list that the former one was given is not given again.
    pub(super) fn start_work(&mut self, settings: drain::Settings, limit: Limit, told: Option<Deadline>) {
        let now = self.clock.now();
        self.works += 1;
        self.pod_feed = None;
        let machine = Drain::new(settings, limit, now);
        let next_word = now.after(WORD_EVERY);
        self.work = Some(Work { number: self.works, machine, began_at: now, told, next_word, stopping: false });
    }

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
        self.limit(standing.deadline, record.deadline)
    }

    fn limit(&self, deadline: Option<Deadline>, counted: Option<Timestamp>) -> Limit {
        match (deadline, counted) {
            (Some(Deadline::Hard(at)), _) => Limit::Hard(self.clock.moment(at)),
            (Some(Deadline::Soft(at)), _) => Limit::Soft(self.clock.moment(at)),
            (_, Some(at)) => Limit::Soft(self.clock.moment(at)),
            _ => Limit::ByGrace,
        }
    }

    /// Tells a running drain that the notices have another deadline now.
    pub(super) fn move_deadline(&mut self, standing: &Standing) {
        let Some(deadline) = standing.deadline.filter(|deadline| *deadline != Deadline::SoftByGrace) else { return };
        let (Hold::Ours(record), Some(work)) = (&self.hold, &mut self.work) else { return };
        let counted = record.deadline;
        if work.told.replace(deadline) == Some(deadline) {
            return;
        }
        let limit = self.limit(Some(deadline), counted);
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

    pub(super) fn answered(&mut self, Answered { work, pod, ask, answer, aside }: Answered) {
        let unready = self.work.as_ref().is_some_and(|work| work.machine.is_unready(&pod));
        self.metrics.answered(&answer, unready);
        if let Some(aside) = aside {
            self.warned.once(&aside);
        }
        if self.work.as_ref().is_some_and(|current| current.number == work) {
            self.feed(Input::Answered { pod, ask, answer });
        }
    }

    /// Lets the drain look at the clock, where it wanted to be woken by now.
    pub(super) fn tick(&mut self) {
        let now = self.clock.now();
        if self.work.as_ref().and_then(|work| work.machine.next_wake()).is_some_and(|wake| wake <= now) {
            self.feed(Input::Tick);
        }
        if let Some(work) = &mut self.work
            && !work.machine.is_finished()
            && work.next_word <= now
        {
            let long = now.since(work.began_at) > LONG_DRAIN;
            work.next_word = now.after(if long { WORD_EVERY_LONG } else { WORD_EVERY });
            self.tell_progress();
        }
    }

    fn feed(&mut self, input: Input) {
        let now = self.clock.now();
        let Some(work) = &mut self.work else { return };
        let listed = matches!(input, Input::Listed(_));
        let was_finished = work.machine.is_finished();
        let first_list = listed && !work.machine.was_listed();
        let effects = work.machine.step(input, now);
        let (stopping, finished) = (work.stopping, work.machine.is_finished());
        let left = work.machine.end().map_or(LONGEST_REQUEST, |end| end.since(now));
        let limit = (left / 4).clamp(SHORTEST_REQUEST, LONGEST_REQUEST);
        self.metrics.progress(work.machine.progress());
        if first_list {
            self.tell_listed();
        }
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
        let (cluster, work) = (self.cluster.clone(), self.works);
        match effect {
            Effect::Evict { pod, grace_seconds } => {
                self.requests.spawn(async move {
                    let answer = cluster.evict(&pod_ref(&pod), grace_seconds, limit).await;
                    Answered { work, pod: pod.uid, ask: Ask::Evict, answer, aside: None }
                });
            }
            Effect::Delete { pod, grace_seconds, message } => {
                self.requests.spawn(async move {
                    let target = pod_ref(&pod);
                    let began = Instant::now();
                    // The condition tells controllers why; a pod that cannot be marked is deleted all the same.
                    let marked = cluster.mark(&target, DISRUPTION_REASON, &message, limit.min(MARK_LIMIT)).await;
                    let aside = match &marked {
                        Answer::Forbidden { message } => {
                            Some(format!("deleted pods do not get the condition DisruptionTarget: {message}"))
                        }
                        _ => None,
                    };
                    let answer = match marked {
                        answer @ (Answer::Gone | Answer::Replaced) => answer,
                        _ => {
                            // The grace was counted before the condition was written.
                            let spent = u32::try_from(began.elapsed().as_millis().div_ceil(1000)).unwrap_or(u32::MAX);
                            let late = if began.elapsed() < SOON { 0 } else { spent };
                            let grace_seconds = grace_seconds.saturating_sub(late).max(1);
                            cluster.delete(&target, Some(grace_seconds), limit).await
                        }
                    };
                    Answered { work, pod: pod.uid, ask: Ask::Delete, answer, aside }
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
            let limit = self.limit(standing.deadline, None);
            // Nothing is sent, so nothing is answered: without a limit every pod is told at once.
            let settings = drain::Settings { max_in_flight: usize::MAX, ..self.drain_settings() };
            self.start_work(settings, limit, standing.deadline);
        } else {
            self.metrics.ended(standing.kinds.first().copied(), tell::Ending::DryRun);
        }
        true
    }

    fn end_rehearsal(&mut self) {
        let annotation = self.annotation();
        let standing = self.notices.standing(annotation, self.clock.wall());
        let progress = self.work.as_ref().map(Work::progress).unwrap_or_default();
        info!(
            pods = progress.total,
            skipped = progress.skipped,
            "dry run: nothing was changed; still watching for notices, Ctrl-C ends it"
        );
        self.metrics.ended(standing.kinds.first().copied(), tell::Ending::DryRun);
        self.work = None;
    }
}

fn pod_ref(pod: &Target) -> PodRef {
    PodRef { namespace: pod.namespace.clone(), name: pod.name.clone(), uid: pod.uid.clone() }
}

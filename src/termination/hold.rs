//! Writing on the Node: the claim, the record, the take-over and the release.
//!
//! One server-side apply by our own field manager carries the whole of what we want of the Node. What each answer means
//! was tried on a real API server; the short of it is beside each arm of [`Termination::refused`].

use std::time::Duration;

use tracing::{debug, error, info, warn};

use crate::{
    cluster::{ApplyError, Class, Error as ClusterError, Manager, NodeEvent, NodeFacts, NodeIntent},
    notice::Deadline,
    plan::Moment,
    policy::standing::{Stage, Standing, Survivor},
    termination::{
        Error, Hold, Phase, Record, Termination,
        course::{self, Move},
        tell::ReleaseReason,
        termination_id,
        work::Work,
    },
};

/// The first try of a write waits this long for its answer, a repeat longer: a slow server is better than none.
pub(super) const FIRST_LIMIT: Duration = Duration::from_millis(1500);
pub(super) const REPEAT_LIMIT: Duration = Duration::from_secs(3);

/// Waits between tries of a write: from 50 ms, doubling, to one second.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// A missing right is looked at again this often: somebody may be granting it.
const FORBIDDEN_WAIT: Duration = Duration::from_secs(5);

/// How often a machine that may have outlived its deadline is looked at.
const SURVIVOR_LOOK: Duration = Duration::from_secs(20);

/// A drain that is still going after this long is one in which people may interfere: the Node is watched from then on.
const NODE_WATCH_AFTER: Duration = Duration::from_secs(10);

/// The tries of the write that is to be done.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    pub(super) not_before: Option<Moment>,
    count: u32,
    pub(super) force: bool,
    pub(super) taken_over_from: Option<Manager>,
}

impl Attempts {
    fn limit(&self) -> Duration {
        if self.count == 0 { FIRST_LIMIT } else { REPEAT_LIMIT }
    }

    fn wait(&mut self, now: Moment, wait: Duration) {
        self.count = self.count.saturating_add(1);
        self.not_before = Some(now.after(wait));
    }

    fn back_off(&mut self, now: Moment) {
        let wait = LONGEST_WAIT.min(FIRST_WAIT * 2_u32.pow(self.count.min(8)));
        self.wait(now, wait);
    }
}

impl Termination {
    /// One step towards what the notices ask for; says whether another may follow at once.
    pub(super) async fn step(&mut self) -> Result<bool, Error> {
        if self.node.is_none() {
            self.look_up();
            return Ok(false);
        }
        let now = self.clock.now();
        if self.write.not_before.is_some_and(|at| now < at) {
            return Ok(false);
        }
        self.write.not_before = None;
        self.spend_if_outlived();
        let annotation = self.annotation();
        let standing = self.notices.standing(annotation, self.clock.wall());
        match &self.hold {
            Hold::Nobody if standing.stage == Stage::Nothing => Ok(false),
            Hold::Nobody if self.settings.dry_run => Ok(self.rehearse(&standing)),
            Hold::Nobody => self.claim(&standing).await,
            Hold::Rehearsed(phase) => {
                if Phase::beginning(standing.stage) != Some(*phase) {
                    self.hold = Hold::Nobody;
                    self.work = None;
                    return Ok(true);
                }
                Ok(false)
            }
            Hold::Theirs(record) => {
                let record = record.clone();
                self.follow(record, &standing).await
            }
            Hold::Ours(record) => {
                let record = record.clone();
                self.go_on(record, &standing).await
            }
        }
    }

    /// The claim: nothing is read before it, and nothing waits in front of it.
    async fn claim(&mut self, standing: &Standing) -> Result<bool, Error> {
        let Some(phase) = Phase::beginning(standing.stage) else { return Ok(false) };
        let now = self.clock.wall();
        let record = Record::begin(termination_id(&self.instance, now), Manager::Agent, phase, now);
        self.uncordoned = false;
        self.write_record(record, standing).await
    }

    /// The next move of a termination that is ours.
    async fn go_on(&mut self, mut record: Record, standing: &Standing) -> Result<bool, Error> {
        if let Some(ended) = self.ended(&record, standing) {
            return self.write_record(ended, standing).await;
        }
        match course::next_move(&record, standing) {
            Move::Stay => {
                if record.phase == Phase::Draining && self.work.is_none() {
                    self.begin_work(&record, standing);
                    return Ok(true);
                }
                Ok(false)
            }
            Move::Rewrite => {
                // The drain learns of another deadline before the record does: it has no time to lose.
                self.move_deadline(standing);
                self.write_record(record, standing).await
            }
            Move::Enter(phase) => {
                if phase == Phase::Draining {
                    // People who uncordoned a node said no to the advice, not to what follows now.
                    self.uncordoned = false;
                }
                record.phase = phase;
                record.outcome = None;
                self.work = None;
                self.write_record(record, standing).await
            }
            Move::Release => self.release(&record).await,
        }
    }

    /// The record of a drain that has just ended, or whose end turned out otherwise later.
    fn ended(&self, record: &Record, standing: &Standing) -> Option<Record> {
        let work = self.work.as_ref().filter(|work| work.is_finished())?;
        let outcome = work.outcome(self.clock.wall());
        let phase = if outcome.left.is_empty() { Phase::Drained } else { Phase::Incomplete };
        let over = record.phase.is_ended() || standing.stage == Stage::Draining;
        (over && phase != record.phase).then(|| Record { phase, outcome: Some(outcome), ..record.clone() })
    }

    /// Writes `record`, brought up to date with the notices, as all that we want of the Node.
    async fn write_record(&mut self, mut record: Record, standing: &Standing) -> Result<bool, Error> {
        let Some(node) = self.node.clone() else { return Ok(false) };
        let before = match &self.hold {
            Hold::Ours(known) => Some(known.phase),
            _ => None,
        };
        self.fill(&mut record, standing, &node);
        let intent = NodeIntent {
            uid: Some(node.uid.clone()),
            // After the claim every write is fenced by the version last seen, so that it never undoes what it has not
            // seen. The claim is not: it is exclusive by its field manager.
            resource_version: before.map(|_| node.resource_version.clone()),
            record: Some(record.to_json()),
            unschedulable: record.phase.is_cordoned() && !self.uncordoned,
            kind_label: Some(record.leading_kind().as_str()),
            exclude_from_load_balancers: record.phase.is_drain() && self.settings.exclude_from_load_balancers,
        };
        let Attempts { force, count, .. } = self.write;
        if record.phase == Phase::Draining && self.work.is_none() {
            self.cluster.expect_drain();
        }
        match self.cluster.apply(&intent, Manager::Agent, force, count, self.write.limit()).await {
            Ok(node) => {
                self.check_instance_or_release(&node).await?;
                if let Some(other) = self.write.taken_over_from.take() {
                    self.clear_other(other, &node).await;
                }
                self.write = Attempts::default();
                self.node = Some(node);
                self.written(record, before, standing);
                Ok(true)
            }
            Err(problem) => self.refused(problem, standing).await,
        }
    }

    fn fill(&self, record: &mut Record, standing: &Standing, node: &NodeFacts) {
        if standing.stage != Stage::Nothing {
            record.kinds.clone_from(&standing.kinds);
        }
        record.notices = self.notices.list();
        if let Some(deadline) = standing.deadline {
            record.hard = deadline.is_hard();
            record.deadline = match deadline {
                Deadline::SoftByGrace => self.work.as_ref().and_then(|work| work.deadline(&self.clock)),
                other => other.at(),
            };
        }
        record.boot_id = Some(node.boot_id.clone()).filter(|id| !id.is_empty());
        if self.write.taken_over_from.is_some() {
            record.taken_over_from = self.write.taken_over_from;
        }
    }

    /// The Node carries `record` now.
    fn written(&mut self, record: Record, before: Option<Phase>, standing: &Standing) {
        if before.is_none() {
            self.enter_span(&record);
        }
        let now = self.clock.now();
        self.metrics.active(&record, before);
        self.tell_written(&record, before, now);
        let drains = record.phase == Phase::Draining && self.work.is_none();
        self.hold = Hold::Ours(record.clone());
        if drains {
            self.begin_work(&record, standing);
        }
        if !record.phase.is_drain() {
            self.work = None;
        }
    }

    /// What an answer other than 200 means.
    async fn refused(&mut self, problem: ApplyError, standing: &Standing) -> Result<bool, Error> {
        let now = self.clock.now();
        match problem {
            // The other mode's handler wrote the record. Whether it is alive, and of this boot, its record tells.
            ApplyError::HeldBy(other) => {
                self.metrics.conflict();
                let Some(node) = self.read_again().await? else { return Ok(false) };
                self.meet(other, &node, standing);
                Ok(true)
            }
            // GitOps or a person owns one of the fields: the machine ends all the same, so we take it.
            ApplyError::Conflict(fields) => {
                self.metrics.conflict();
                for field in &fields {
                    warn!(field = field.field, manager = field.manager, "taking over a field of the Node");
                }
                self.write.force = true;
                self.write.back_off(now);
                self.write.not_before = (self.write.count > 2).then_some(now.after(LONGEST_WAIT));
                Ok(self.write.not_before.is_none())
            }
            // The Node is gone, is another of the same name, or has changed since we read it.
            ApplyError::Stale | ApplyError::WrongUid => {
                if self.write.count > 3 {
                    self.write.wait(now, LONGEST_WAIT);
                    return Ok(false);
                }
                self.write.count += 1;
                let known = self.node.as_ref().map(|node| node.uid.clone());
                let Some(node) = self.read_again().await? else { return Ok(false) };
                if known.is_some_and(|uid| uid != node.uid) {
                    self.node_replaced();
                } else {
                    self.compare(&node);
                }
                Ok(true)
            }
            ApplyError::Other(problem) => {
                self.write_failed(&problem, now);
                Ok(false)
            }
        }
    }

    fn write_failed(&mut self, problem: &ClusterError, now: Moment) {
        self.metrics.write_failed();
        match problem.class() {
            Class::Retry => {
                warn!(tries = self.write.count + 1, "cannot write on the Node, trying again: {problem}");
                self.write.back_off(now);
            }
            Class::Gone => {
                info!("the Node is gone");
                self.node_gone();
            }
            Class::Blocked | Class::Fatal => {
                if self.write.count.is_multiple_of(6) {
                    error!("cannot write on the Node: {problem}");
                }
                self.write.wait(now, FORBIDDEN_WAIT);
            }
        }
    }

    /// Reads the Node anew after a write that did not fit it. `None`: it is gone, or cannot be read now.
    async fn read_again(&mut self) -> Result<Option<NodeFacts>, Error> {
        match self.cluster.node(REPEAT_LIMIT).await {
            Ok(node) => {
                self.check_instance(&node)?;
                let known = self.node.replace(node.clone());
                debug!(
                    old = known.map(|node| node.resource_version),
                    new = node.resource_version,
                    "read the Node again"
                );
                Ok(Some(node))
            }
            Err(problem) => {
                let now = self.clock.now();
                self.write_failed(&problem, now);
                Ok(None)
            }
        }
    }

    /// Something on the Node changed since our last write; who has it now?
    fn compare(&mut self, node: &NodeFacts) {
        let Hold::Ours(ours) = &self.hold else { return };
        if ours.phase.is_cordoned() && !node.unschedulable && !self.uncordoned {
            self.uncordoned = true;
            self.tell_uncordoned();
        }
        let theirs = node.record().and_then(|text| Record::parse(text).ok()).filter(|r| r.holder != Manager::Agent);
        if let Some(theirs) = theirs {
            self.metrics.active_end(ours);
            self.tell_followed(&theirs);
            self.work = None;
            self.hold = Hold::Theirs(theirs);
        }
    }

    /// Gives up our fields, under both managers: what a take-over left behind goes as well.
    async fn release(&mut self, record: &Record) -> Result<bool, Error> {
        let Some(node) = self.node.clone() else { return Ok(false) };
        let annotated = self.annotation().is_some();
        let nothing = NodeIntent { uid: Some(node.uid.clone()), ..NodeIntent::default() };
        for manager in [Manager::Agent, Manager::Agent.other()] {
            match self.cluster.apply(&nothing, manager, false, self.write.count, self.write.limit()).await {
                Ok(node) => self.node = Some(node),
                Err(problem) => return self.refused_release(problem).await,
            }
        }
        let reason = if annotated { ReleaseReason::Manual } else { self.ended_by };
        self.metrics.active_end(record);
        self.tell_released(record, reason);
        self.forget();
        Ok(true)
    }

    async fn refused_release(&mut self, problem: ApplyError) -> Result<bool, Error> {
        match problem {
            ApplyError::Stale | ApplyError::WrongUid => {
                self.node_replaced();
                self.read_again().await?;
                Ok(false)
            }
            ApplyError::Other(problem) => {
                let now = self.clock.now();
                self.write_failed(&problem, now);
                Ok(false)
            }
            // An empty apply owns nothing that could be in conflict.
            ApplyError::HeldBy(_) | ApplyError::Conflict(_) => {
                let now = self.clock.now();
                self.write.back_off(now);
                Ok(false)
            }
        }
    }

    /// A claim that turns out to be on another machine's Node is given back before anything else happens.
    async fn check_instance_or_release(&mut self, node: &NodeFacts) -> Result<(), Error> {
        let checked = self.check_instance(node);
        if checked.is_err() {
            let nothing = NodeIntent { uid: Some(node.uid.clone()), ..NodeIntent::default() };
            if let Err(problem) = self.cluster.apply(&nothing, Manager::Agent, false, 0, REPEAT_LIMIT).await {
                error!(?problem, "cannot give back the claim on another machine's Node; uncordon it by hand");
            }
        }
        checked
    }

    pub(super) fn node_event(&mut self, event: NodeEvent) -> Result<(), Error> {
        match event {
            NodeEvent::Deleted => {
                info!("the Node was deleted");
                self.node_gone();
            }
            NodeEvent::Changed(node) => {
                let known = self.node.as_ref();
                if known.is_some_and(|known| known.uid != node.uid) {
                    self.check_instance(&node)?;
                    self.node_replaced();
                } else if known.is_some_and(|known| is_older(&node.resource_version, &known.resource_version)) {
                    return Ok(());
                }
                self.node_changed(&node);
                self.node = Some(node);
            }
        }
        Ok(())
    }

    fn node_changed(&mut self, node: &NodeFacts) {
        match &self.hold {
            Hold::Ours(_) => self.compare(node),
            Hold::Theirs(_) => match node.record().map(Record::parse) {
                Some(Ok(record)) if record.holder != Manager::Agent => self.hold = Hold::Theirs(record),
                // Released, or not readable any more.
                _ => self.hold = Hold::Nobody,
            },
            Hold::Nobody | Hold::Rehearsed(_) => {}
        }
    }

    /// The Node object is gone: what we held went with it. The notices stay open for a Node of the same machine.
    fn node_gone(&mut self) {
        self.node_replaced();
        self.node = None;
        self.node_feed = None;
        self.health.set(Err("the Node is gone".into()));
    }

    fn node_replaced(&mut self) {
        if let Hold::Ours(record) = &self.hold {
            self.metrics.active_end(record);
        }
        self.hold = Hold::Nobody;
        self.work = None;
        self.node_feed = None;
        self.write = Attempts::default();
    }

    /// Nothing is held any more.
    fn forget(&mut self) {
        self.hold = Hold::Nobody;
        self.work = None;
        self.write = Attempts::default();
        self.uncordoned = false;
        self.ended_by = ReleaseReason::Expired;
    }

    /// From when on the Node is watched, if at all.
    pub(super) fn node_feed_due(&self) -> Option<Moment> {
        self.node.as_ref()?;
        let now = self.clock.now();
        match &self.hold {
            // Without a claim only a brake keeps notices open: watch for its end.
            Hold::Nobody | Hold::Rehearsed(_) => (!self.notices.list().is_empty()).then_some(now),
            Hold::Theirs(_) => Some(now),
            Hold::Ours(record) => match record.phase {
                Phase::Scheduled | Phase::Watching => Some(now),
                Phase::Draining => match &self.work {
                    Some(work) if work.is_blocked() => Some(now),
                    Some(work) => Some(work.began_at().after(NODE_WATCH_AFTER)),
                    None => Some(now),
                },
                // The machine usually ends with its deadline; one that does not is worth a look.
                Phase::Drained | Phase::Incomplete => {
                    Some(record.deadline.map_or(now, |deadline| self.clock.moment(deadline)))
                }
            },
        }
    }

    /// When a machine that should be gone is looked at next.
    pub(super) fn next_look(&self) -> Option<Moment> {
        let Hold::Ours(Record { phase, deadline: Some(deadline), .. }) = &self.hold else { return None };
        let from = self.clock.moment(*deadline).after(crate::policy::OUTLIVED_AFTER.unsigned_abs());
        phase.is_ended().then(|| from.max(self.clock.now().after(SURVIVOR_LOOK)))
    }

    /// A machine that has outlived its deadline has nothing open any more: the next move is a release.
    fn spend_if_outlived(&mut self) {
        let (Hold::Ours(record), Some(node)) = (&self.hold, &self.node) else { return };
        let Some(deadline) = record.deadline.filter(|_| record.phase.is_ended()) else { return };
        let survivor = Survivor {
            deadline,
            boot_then: record.boot_id.as_deref(),
            boot_now: &node.boot_id,
            ready_since: node.ready.as_ref().filter(|ready| ready.ready).map(|ready| ready.since),
            all_vanished: self.notices.all_vanished(),
        };
        if survivor.has_outlived(self.clock.wall()) {
            self.ended_by = ReleaseReason::Expired;
            self.notices.spend();
        }
    }

    fn begin_work(&mut self, record: &Record, standing: &Standing) {
        let limit = self.limit_of(record, standing);
        self.work = Some(Work::begin(self.drain_settings(), limit, self.clock.now()));
        self.tell_drain_started(record);
    }
}

/// Whether resource version `a` is of an earlier moment than `b`. They are counters (and may be compared, since
/// Kubernetes 1.35 by contract); what is none is taken for news.
fn is_older(a: &str, b: &str) -> bool {
    matches!((a.parse::<u64>(), b.parse::<u64>()), (Ok(a), Ok(b)) if a < b)
}

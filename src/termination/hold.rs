//! Writing on the Node: the claim, the record, the take-over and the release.
//!
//! One server-side apply by our own field manager carries the whole of what we want of the Node. What each answer means
//! was tried on a real API server; the short of it is beside each arm of [`Termination::refused`].

use std::time::Duration;

use tracing::{debug, error, info, warn};

use crate::{
    cluster::{ApplyError, Class, Error as ClusterError, Manager, NodeEvent, NodeFacts, NodeIntent},
    notice::Deadline,
    plan::{Moment, spread},
    policy::standing::{Stage, Standing},
    termination::{
        Error, Hold, Phase, Record, Termination,
        course::{self, Move},
        termination_id,
    },
};

/// The first try of a write waits this long for its answer, a repeat longer: a slow server is better than none.
pub(super) const FIRST_LIMIT: Duration = Duration::from_millis(1500);
pub(super) const REPEAT_LIMIT: Duration = Duration::from_secs(3);

/// The same while a drain is under way, whose events wait meanwhile.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// Waits between tries of a write: from 50 ms, doubling, to one second.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// An API server that has just started refuses what it allows a moment later: so many refusals are asked again soon.
const REFUSALS: u32 = 6;
/// A missing right is looked at again this often: somebody may be granting it.
const FORBIDDEN_WAIT: Duration = Duration::from_secs(5);

/// A drain that is still going after this long is one in which people may interfere: the Node is watched from then on.
const NODE_WATCH_AFTER: Duration = Duration::from_secs(10);

/// The tries of the write that is to be done.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    pub(super) not_before: Option<Moment>,
    pub(super) count: u32,
    pub(super) force: bool,
    pub(super) taken_over_from: Option<Manager>,
}

impl Attempts {
    pub(super) fn limit(&self) -> Duration {
        if self.count == 0 { FIRST_LIMIT } else { REPEAT_LIMIT }
    }

    fn wait(&mut self, now: Moment, wait: Duration) {
        self.count = self.count.saturating_add(1);
        self.not_before = Some(now.after(wait));
    }

    /// The waits of many agents drift apart: an API server that comes back is not met by all of them at once.
    pub(super) fn back_off(&mut self, now: Moment) {
        let wait = LONGEST_WAIT.min(FIRST_WAIT * 2_u32.pow(self.count.min(8)));
        self.wait(now, wait.mul_f64(0.75 + 0.5 * spread(&now.0)));
    }
}

impl Termination {
    /// Lets others have a turn before the next write.
    pub(super) fn pause_writes(&mut self) {
        let now = self.clock.now();
        self.write.back_off(now);
    }

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
            Hold::Theirs(_) if standing.stage == Stage::Nothing => {
                // Nothing to wait for any more; the next claim meets the holder again.
                self.hold = Hold::Nobody;
                self.holder_look = None;
                Ok(true)
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
        self.seen_at.get_or_insert(self.clock.now());
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
                if self.is_to_keep_deadline(&record) {
                    return self.write_record(record, standing).await;
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
        let phase = work.ending();
        let over = record.phase.is_ended() || standing.stage == Stage::Draining;
        (over && phase != record.phase).then(|| Record { phase, outcome: Some(outcome), ..record.clone() })
    }

    /// A drain by grace learns its deadline from its pods. One that takes longer than a moment has it in its record, so
    /// that it is not stretched by a restart, and others know it.
    fn is_to_keep_deadline(&self, record: &Record) -> bool {
        let Some(work) = &self.work else { return false };
        record.phase == Phase::Draining
            && record.deadline.is_none()
            && work.deadline(&self.clock).is_some()
            && self.clock.now() >= work.began_at().after(NODE_WATCH_AFTER)
    }

    /// Writes `record`, brought up to date with the notices, as all that we want of the Node.
    async fn write_record(&mut self, mut record: Record, standing: &Standing) -> Result<bool, Error> {
        self.cleared().await;
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
        // A drain under way is not kept waiting for long.
        let busy = self.work.as_ref().is_some_and(|work| !work.is_finished());
        let limit = if busy { BUSY_LIMIT } else { self.write.limit() };
        match self.cluster.apply(&intent, Manager::Agent, force, count, limit).await {
            Ok(node) => {
                // What was just written is ours.
                self.hold = Hold::Ours(record.clone());
                self.check_instance_or_give_back(&node).await?;
                self.node = Some(node.clone());
                if let Some(other) = self.write.taken_over_from.take() {
                    self.clear_other(other, &node);
                }
                self.write = Attempts::default();
                self.written(record, before);
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
            // What was counted from the pods' grace once is kept.
            let counted = record.deadline.filter(|_| !record.hard);
            record.hard = deadline.is_hard();
            record.deadline = match deadline {
                Deadline::SoftByGrace => self.work.as_ref().and_then(|work| work.deadline(&self.clock)).or(counted),
                other => other.at(),
            };
        }
        record.boot_id = Some(node.boot_id.clone()).filter(|id| !id.is_empty());
        if self.write.taken_over_from.is_some() {
            record.taken_over_from = self.write.taken_over_from;
        }
    }

    /// The Node carries `record` now.
    fn written(&mut self, record: Record, before: Option<Phase>) {
        if before.is_none() {
            self.enter_span(&record);
        }
        let now = self.clock.now();
        self.metrics.active(&record);
        self.tell_written(&record, before, now);
        if !record.phase.is_drain() {
            self.work = None;
        }
        // The drain begins with the next step: the answer may carry a word of the Node's own that says not to.
        self.hold = Hold::Ours(record);
    }

    /// What an answer other than 200 means.
    async fn refused(&mut self, problem: ApplyError, standing: &Standing) -> Result<bool, Error> {
        let now = self.clock.now();
        match problem {
            // The other mode's handler wrote the record. Whether it is alive, and of this boot, its record tells.
            ApplyError::HeldBy(other) => {
                self.metrics.conflict();
                // The server looks at the conflict before the uid: the held Node may be another than the known one.
                let Some((node, replaced)) = self.read_again().await? else { return Ok(false) };
                if replaced {
                    self.node_replaced();
                }
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
                let Some((node, replaced)) = self.read_again().await? else { return Ok(false) };
                if replaced {
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

    pub(super) fn write_failed(&mut self, problem: &ClusterError, now: Moment) {
        self.metrics.write_failed();
        self.tell_waiting(&problem.to_string(), self.write.count.is_multiple_of(20) && self.write.count > 0);
        match problem.class() {
            Class::Retry => {
                let tries = self.write.count + 1;
                if self.write.count.is_multiple_of(30) {
                    warn!(tries, "cannot write on the Node, trying again: {problem}");
                } else {
                    debug!(tries, "cannot write on the Node, trying again: {problem}");
                }
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
                let soon = FIRST_WAIT * 2_u32.pow(self.write.count.min(REFUSALS));
                self.write.wait(now, if self.write.count < REFUSALS { soon } else { FORBIDDEN_WAIT });
            }
        }
    }

    /// Reads the Node anew after a write that did not fit it, and says whether it is another under the same name.
    /// `None`: it is gone, or cannot be read now.
    pub(super) async fn read_again(&mut self) -> Result<Option<(NodeFacts, bool)>, Error> {
        match self.cluster.node(REPEAT_LIMIT).await {
            Ok(node) => {
                self.check_instance_or_give_back(&node).await?;
                let known = self.node.replace(node.clone());
                let replaced = known.as_ref().is_some_and(|known| known.uid != node.uid);
                self.recorder.set_node(&node.uid);
                let old = known.map(|node| node.resource_version);
                debug!(old, new = node.resource_version, replaced, "read the Node again");
                Ok(Some((node, replaced)))
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
        self.compare_holder(node);
    }

    /// Whether the record is another handler's by now.
    pub(super) fn compare_holder(&mut self, node: &NodeFacts) {
        if let Some(Ok(theirs)) = node.record().map(Record::parse)
            && theirs.holder != Manager::Agent
        {
            self.lost_to(theirs);
        }
    }

    pub(super) async fn node_event(&mut self, event: NodeEvent) -> Result<(), Error> {
        match event {
            NodeEvent::Deleted => {
                info!("the Node was deleted");
                self.node_gone();
            }
            NodeEvent::Changed(node) => {
                // The cloud controller may come late: a claim by name alone can turn out to be on another machine's Node.
                self.check_instance_or_give_back(&node).await?;
                let known = self.node.as_ref();
                if known.is_some_and(|known| known.uid != node.uid) {
                    self.recorder.set_node(&node.uid);
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
                // Released, or not readable any more: what our notices ask for is ours to do, at once.
                _ => {
                    self.hold = Hold::Nobody;
                    self.write = Attempts::default();
                }
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

    pub(super) fn node_replaced(&mut self) {
        self.metrics.active_end();
        self.hold = Hold::Nobody;
        self.work = None;
        self.node_feed = None;
        self.write = Attempts::default();
    }

    /// From when on the Node is watched, if at all.
    pub(super) fn node_feed_due(&self, now: Moment) -> Option<Moment> {
        self.node.as_ref()?;
        match &self.hold {
            // Something is asked for, and not done: the Node's own word is the brake. Watch for its end.
            Hold::Nobody | Hold::Rehearsed(_) => {
                (self.notices.standing(None, self.clock.wall()).stage != Stage::Nothing).then_some(now)
            }
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

    fn begin_work(&mut self, record: &Record, standing: &Standing) {
        let limit = self.limit_of(record, standing);
        self.start_work(self.drain_settings(), limit, standing.deadline);
        self.tell_drain_started(record);
    }
}

/// Whether resource version `a` is of an earlier moment than `b`. They are counters (and may be compared, since
/// Kubernetes 1.35 by contract); what is none is taken for news.
fn is_older(a: &str, b: &str) -> bool {
    matches!((a.parse::<u64>(), b.parse::<u64>()), (Ok(a), Ok(b)) if a < b)
}

//! The end of a termination whose machine goes on: everything that we wrote is given up, and nothing else.

use std::time::Duration;

use tracing::error;

use crate::{
    cluster::{ApplyError, Manager, NodeFacts, NodeIntent},
    plan::Moment,
    policy::{Response, standing::Survivor},
    termination::{
        Error, Hold, Record, Termination,
        hold::{Attempts, REPEAT_LIMIT},
        tell::ReleaseReason,
    },
};

/// How often a machine that may have outlived its deadline is looked at.
const SURVIVOR_LOOK: Duration = Duration::from_secs(20);

impl Termination {
    /// Gives up our fields, under both managers: what a take-over left behind goes as well.
    ///
    /// Fenced like every write after the claim, so that what the other handler has claimed since is not given up. Our
    /// own fields go last: until then the record says that there is something to give up.
    pub(super) async fn release(&mut self, record: &Record) -> Result<bool, Error> {
        // Whatever becomes of the write: nothing more is asked of any pod.
        self.work = None;
        let braked = self.annotation() == Some(Response::Ignore);
        for manager in [Manager::Agent.other(), Manager::Agent] {
            let Some(node) = &self.node else { return Ok(false) };
            let nothing = NodeIntent::release(node);
            match self.cluster.apply(&nothing, manager, false, self.write.count, self.write.limit()).await {
                Ok(node) => self.node = Some(node),
                Err(problem) => return self.refused_release(problem).await,
            }
        }
        let reason = if braked { ReleaseReason::Manual } else { self.ended_by };
        self.metrics.active_end();
        self.tell_released(record, reason);
        self.forget();
        Ok(true)
    }

    /// A claim that turns out to be on another machine's Node is given back before the process ends. Only that: the
    /// Node may be held by its own machine's agent, which has the same name as we.
    pub(super) async fn check_instance_or_give_back(&mut self, node: &NodeFacts) -> Result<(), Error> {
        let checked = self.check_instance(node);
        let Hold::Ours(ours) = &self.hold else { return checked };
        let on_record = node.record().and_then(|text| Record::parse(text).ok());
        if checked.is_err() && on_record.is_some_and(|record| record.id == ours.id) {
            let nothing = NodeIntent::release(node);
            if let Err(problem) = self.cluster.apply(&nothing, Manager::Agent, false, 0, REPEAT_LIMIT).await {
                error!(?problem, "cannot give back the claim on another machine's Node; uncordon it by hand");
            }
        }
        checked
    }

    async fn refused_release(&mut self, problem: ApplyError) -> Result<bool, Error> {
        match problem {
            ApplyError::Stale | ApplyError::WrongUid => {
                let Some((node, replaced)) = self.read_again().await? else { return Ok(false) };
                if replaced {
                    self.node_replaced();
                } else {
                    self.compare_holder(&node);
                }
                Ok(true)
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

    /// Nothing is held any more.
    fn forget(&mut self) {
        self.hold = Hold::Nobody;
        self.work = None;
        self.write = Attempts::default();
        self.uncordoned = false;
        self.seen_at = None;
        self.ended_by = ReleaseReason::Expired;
    }

    /// When a machine that should be gone is looked at next.
    pub(super) fn next_look(&self) -> Option<Moment> {
        let Hold::Ours(Record { phase, deadline: Some(deadline), .. }) = &self.hold else { return None };
        let from = self.clock.moment(*deadline).after(crate::policy::OUTLIVED_AFTER.unsigned_abs());
        phase.is_settled().then(|| from.max(self.clock.now().after(SURVIVOR_LOOK)))
    }

    /// What the machine has outlived is not open any more; where nothing else is, the next move is a release.
    pub(super) fn spend_if_outlived(&mut self) {
        let (Hold::Ours(record), Some(node)) = (&self.hold, &self.node) else { return };
        let Some(deadline) = record.deadline.filter(|_| record.phase.is_settled()) else { return };
        let now = self.clock.wall();
        let spent = self.notices.spend(|own, vanished| {
            let survivor = Survivor {
                deadline: own.unwrap_or(deadline),
                boot_then: record.boot_id.as_deref(),
                boot_now: &node.boot_id,
                ready_since: node.ready_since(),
                vanished,
            };
            survivor.has_outlived(now)
        });
        if spent {
            self.ended_by = ReleaseReason::Expired;
        }
    }
}

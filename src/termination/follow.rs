//! The node is another handler's: follow its record, or take over from it.

use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use crate::{
    cluster::{Manager, NodeFacts, NodeIntent, PodEvent},
    policy::standing::{Stage, Standing},
    termination::{
        Error, Hold, Phase, Record, Termination, course,
        hold::{Attempts, FIRST_LIMIT, REPEAT_LIMIT},
    },
};

/// How often a silent holder is looked at.
const HOLDER_LOOK: Duration = Duration::from_secs(5);

impl Termination {
    /// The record is another handler's: follow it, or take over.
    pub(super) fn meet(&mut self, other: Manager, node: &NodeFacts, standing: &Standing) {
        let record = match node.record().map(Record::parse) {
            Some(Ok(record)) if record.holder != Manager::Agent => record,
            // Unreadable, or nobody's: it says nothing that we could follow.
            _ => return self.take_over(other, "its record cannot be read"),
        };
        if record.is_of_earlier_boot(&node.boot_id) {
            self.take_over(other, "its record is of an earlier boot");
        } else if course::asks_for_more(&record, standing) {
            self.take_over(other, "our notice asks for more");
        } else {
            self.lost_to(record);
        }
    }

    /// Another handler holds the Node from now on.
    pub(super) fn lost_to(&mut self, record: Record) {
        self.metrics.active_end();
        self.tell_followed(&record);
        self.work = None;
        self.write = Attempts::default();
        self.holder_look = None;
        self.hold = Hold::Theirs(record);
    }

    fn take_over(&mut self, other: Manager, why: &'static str) {
        self.write.force = true;
        self.write.taken_over_from = Some(other);
        self.metrics.active_end();
        self.tell_taken_over(other, why);
        self.work = None;
        self.hold = Hold::Nobody;
    }

    /// A forced apply leaves the old holder co-owner of what had the same value: clear that, so that a release frees it.
    /// Beside the drain, which is not kept waiting for it; where it fails, the release does it.
    pub(super) fn clear_other(&mut self, other: Manager, node: &NodeFacts) {
        let nothing = NodeIntent::release(node);
        let cluster = self.cluster.clone();
        self.clearing = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let cleared = cluster.apply(&nothing, other, false, 0, FIRST_LIMIT).await;
            cleared.inspect_err(|problem| debug!(%problem, "cannot clear the fields of the former holder")).ok()
        })));
    }

    /// The next write goes on from what that one left. It has its answer long before, but on an empty node.
    pub(super) async fn cleared(&mut self) {
        if let Some(clearing) = self.clearing.take()
            && let Ok(Some(node)) = clearing.await
        {
            self.node = Some(node);
        }
    }

    /// Follows a holder's record; takes over from one that is gone or does less than our notices ask for.
    pub(super) async fn follow(&mut self, record: Record, standing: &Standing) -> Result<bool, Error> {
        let other = record.holder;
        if course::asks_for_more(&record, standing) {
            self.take_over(other, "our notice asks for more");
            return Ok(true);
        }
        if standing.stage != Stage::Draining || record.phase != Phase::Draining {
            self.holder_look = None;
            return Ok(false);
        }
        let now = self.clock.now();
        if self.holder_look.is_some_and(|at| now < at) {
            return Ok(false);
        }
        self.holder_look = Some(now.after(HOLDER_LOOK));
        if course::may_be_silent(&record, self.clock.wall()) {
            let mut watch = self.cluster.watch_pods();
            if let Ok(PodEvent::Listed(pods)) = tokio::time::timeout(REPEAT_LIMIT, watch.next()).await {
                let remaining = self.remaining(&pods);
                let terminating = pods.iter().filter(|pod| pod.terminating_until.is_some()).count();
                if course::holder_is_gone(&record, terminating, remaining, self.clock.wall()) {
                    self.take_over(other, "it does nothing");
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

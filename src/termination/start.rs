//! The beginning: read the Node once, see whose machine it is, and go on where a former process stopped.

use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info, warn};

use crate::{
    cluster::{Error as ClusterError, Manager, NodeFacts},
    notice::{InstanceId, Withdrawal},
    plan::Moment,
    termination::{Error, Hold, Phase, Record, Termination, course},
};

/// How long to wait after a failed look at the Node, doubling.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// The same while a notice waits for it.
const URGENT_WAIT: Duration = Duration::from_secs(1);

/// The look at our own Node, repeated until it succeeds.
#[derive(Debug, Default)]
pub(super) struct Lookup {
    pub(super) task: Option<AbortOnDropHandle<Result<NodeFacts, ClusterError>>>,
    not_before: Option<Moment>,
    failures: u32,
}

impl Lookup {
    /// The result of the look under way; never, where there is none.
    pub(super) async fn next(
        task: &mut Option<AbortOnDropHandle<Result<NodeFacts, ClusterError>>>,
    ) -> Result<NodeFacts, ClusterError> {
        let Some(handle) = task else { return std::future::pending().await };
        let result = handle.await;
        *task = None;
        match result {
            Ok(found) => found,
            // Only a panic or an abort ends the task otherwise: wait for the next look.
            Err(_) => std::future::pending().await,
        }
    }

    /// When to look next, where the Node is unknown.
    pub(super) fn due(&self, unknown: bool) -> Option<Moment> {
        if unknown && self.task.is_none() { self.not_before } else { None }
    }

    /// Somebody waits for the Node.
    pub(super) fn hurry(&mut self) {
        self.not_before = None;
        self.failures = 0;
    }
}

impl Termination {
    /// Starts a look at the Node where it is not known and none is under way.
    pub(super) fn look_up(&mut self) {
        let now = self.clock.now();
        if self.node.is_some() || self.start.task.is_some() || self.start.not_before.is_some_and(|at| now < at) {
            return;
        }
        let cluster = self.cluster.clone();
        let task = tokio::spawn(async move { cluster.identify().await });
        self.start.task = Some(AbortOnDropHandle::new(task));
    }

    pub(super) fn looked_up(&mut self, found: Result<NodeFacts, ClusterError>) -> Result<(), Error> {
        let node = match found {
            Ok(node) => node,
            Err(error) => {
                self.look_again(&error.to_string());
                return Ok(());
            }
        };
        self.check_instance(&node)?;
        if node.provider_id.is_empty() {
            self.look_again(&format!("Node {} has no providerID yet; waiting for the cloud controller", node.name));
            if self.notices.list().is_empty() {
                return Ok(());
            }
            // There is no time to wait: the Node's name comes from the machine itself.
        }
        info!(node = node.name, provider_id = node.provider_id, "Node found");
        self.health.set(Ok(()));
        self.start = Lookup::default();
        self.recorder.set_node(&node.uid);
        // What was noticed before the Node was known could not be held against it.
        for (notice, refusal) in self.notices.review(node.ready_since(), self.clock.wall()) {
            self.tell_refused(&notice, &refusal);
        }
        self.resume(&node);
        self.node = Some(node);
        Ok(())
    }

    fn look_again(&mut self, message: &str) {
        let often = self.start.failures.is_multiple_of(10);
        if !self.tell_waiting(message, often) && often {
            warn!("cannot read the own Node yet: {message}");
        }
        self.health.set(Err(message.to_owned()));
        let longest = if self.notices.list().is_empty() { LONGEST_WAIT } else { URGENT_WAIT };
        let wait = longest.min(FIRST_WAIT * 2_u32.pow(self.start.failures.min(6)));
        self.start.failures = self.start.failures.saturating_add(1);
        self.start.not_before = Some(self.clock.now().after(wait));
    }

    /// Refuses a Node that stands for another machine (peer fault F30: names are no identity, providerID is).
    pub(super) fn check_instance(&mut self, node: &NodeFacts) -> Result<(), Error> {
        let named = InstanceId::from_provider_id(&node.provider_id);
        if node.provider_id.is_empty() || named.as_ref() == Some(&self.instance) {
            return Ok(());
        }
        let error = Error::WrongInstance {
            node: node.name.clone(),
            provider_id: node.provider_id.clone(),
            instance: self.instance.clone(),
        };
        self.health.set(Err(error.to_string()));
        self.tell_wrong_instance(&error);
        Err(error)
    }

    /// Goes on with a termination of a former process.
    fn resume(&mut self, node: &NodeFacts) {
        let Some(annotation) = node.record() else { return };
        let mut record = match Record::parse(annotation) {
            Ok(record) => record,
            Err(problem) => {
                error!("{problem}; it is ignored, and replaced by the next claim");
                return;
            }
        };
        if record.holder != Manager::Agent {
            return;
        }
        if self.settings.dry_run {
            // It belongs to a process that works, beside which this one only says what it would do.
            info!(id = record.id, phase = record.phase.as_str(), "dry run: would go on from the record on the Node");
            return;
        }
        let vanished: Vec<_> = record.notices.iter().filter_map(|n| self.notices.remember(n.clone())).collect();
        let ready_since = node.ready_since();
        if record.phase == Phase::Draining && course::is_over(&record, &node.boot_id, ready_since, self.clock.wall()) {
            record.phase = Phase::Incomplete;
        }
        self.uncordoned = record.phase.is_cordoned() && !node.unschedulable;
        self.enter_span(&record);
        self.seen_at = Some(self.clock.now());
        self.metrics.active(&record);
        self.span.in_scope(|| info!(phase = record.phase.as_str(), "resumed from the record on the Node"));
        self.hold = Hold::Ours(record);
        for notice in vanished {
            self.withdrawn(&notice, Withdrawal::Vanished);
        }
    }
}

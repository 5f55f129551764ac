//! Holding a node: the claim and its record, people and other handlers in between, restarts, and giving it back.
//!
//! Everything runs against a real API server with the agent's own token and rights, and counts requests in the audit
//! log. Rows of the list of known faults (F4, F9 and so on) are named where a test stands for one.

mod advice;
mod claim;
mod handlers;
mod identity;
mod people;
mod planned;
mod restart;
mod survivor;

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use spotter::{
    cluster::Manager,
    notice::{Deadline, InstanceId, Kind, Notice, NoticeId, Source},
    rehearsal::imds::Change,
    termination::{Phase, Record},
};

use crate::support::{
    agent::{PATIENCE, Running, Seat},
    audit::Requests,
    controlplane::ControlPlane,
    eventually,
    fleet::{Budget, NewPod, TestNode, World},
};

const RECORD: &str = "spotter.dev/termination";
const LABEL: &str = "spotter.dev/terminating";
const NO_BALANCER: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

/// A world with one node and a seat for its agent.
struct Scene {
    cp: &'static ControlPlane,
    world: World,
    node: TestNode,
    seat: Seat,
}

impl Scene {
    async fn new(cp: &'static ControlPlane, name: &str) -> Self {
        Self::with(cp, name, json!({})).await
    }

    /// With a patch on top of the usual node.
    async fn with(cp: &'static ControlPlane, name: &str, patch: Value) -> Self {
        let world = World::new(cp, name).await;
        let node = world.node_with("a", patch).await;
        let seat = Seat::new(&world, &node).await;
        Self { cp, world, node, seat }
    }

    async fn get(&self) -> Node {
        self.world.get_node(&self.node).await
    }

    async fn record(&self) -> Option<Record> {
        record(&self.get().await)
    }

    /// Waits until the Node is like this.
    async fn until(&self, what: &str, is: impl Fn(&Node) -> bool) -> Node {
        let (is, nodes, name) = (&is, &self.world.nodes(), &self.node.name);
        eventually(what, PATIENCE, || async move { nodes.get(name).await.ok().filter(|node| is(node)) }).await
    }

    async fn until_phase(&self, phase: Phase) -> Record {
        let is = |node: &Node| record(node).is_some_and(|record| record.phase == phase);
        record(&self.until(&format!("{phase:?}"), is).await).unwrap()
    }

    async fn until_released(&self) -> Node {
        self.until("no record is left", |node| record_text(node).is_none()).await
    }

    async fn requests(&self) -> Requests {
        self.cp.audit().agent(&self.node.name).await
    }

    async fn patches(&self) -> usize {
        self.requests().await.count("patch", "nodes")
    }

    async fn evictions(&self) -> usize {
        self.requests().await.count("create", "pods/eviction")
    }

    /// Gives the agent time to do what it must not do: some rounds of all its polls.
    async fn idle(&self) {
        const PATHS: [&str; 2] = ["spot/instance-action", "events/maintenance/scheduled"];
        let before = PATHS.map(|path| self.seat.imds.requests(path));
        eventually("it polls on", PATIENCE, || async {
            PATHS.iter().zip(before).all(|(path, before)| self.seat.imds.requests(path) >= before + 6).then_some(())
        })
        .await;
    }

    /// An interruption that ends the machine in `seconds`.
    fn interrupt(&self, seconds: i64) -> Timestamp {
        let time = whole(Timestamp::now() + SignedDuration::from_secs(seconds));
        self.seat.imds.apply(Change::Spot { action: "terminate".into(), time });
        time
    }

    fn advise(&self) {
        self.seat.imds.apply(Change::Rebalance { noticed_at: Timestamp::now() });
    }

    /// A pod that a budget protects for ever.
    async fn protected_pod(&self) {
        self.world.run(&self.node, NewPod::new("db")).await;
        self.world.budget("db", "db", Budget::MinAvailable(1)).await;
    }

    /// A merge patch under this field manager, as kubectl sends it.
    async fn patch(&self, manager: &str, patch: Value) {
        let params = PatchParams { field_manager: Some(manager.into()), ..PatchParams::default() };
        self.world.nodes().patch(&self.node.name, &params, &Patch::Merge(patch)).await.expect("patched");
    }

    async fn annotate(&self, key: &str, value: impl Into<Value>) {
        self.patch("kubectl-annotate", json!({"metadata": {"annotations": {key: value.into()}}})).await;
    }

    async fn cordon(&self) {
        self.patch("kubectl-cordon", json!({"spec": {"unschedulable": true}})).await;
    }

    async fn uncordon(&self) {
        self.patch("kubectl-cordon", json!({"spec": {"unschedulable": null}})).await;
    }

    /// A server-side apply as this manager; what is left out is given up.
    async fn apply(&self, manager: &str, force: bool, patch: Value) {
        let mut body = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.node.name}});
        crate::support::fleet::merge(&mut body, patch);
        let params = PatchParams { force, ..PatchParams::apply(manager) };
        self.world.nodes().patch(&self.node.name, &params, &Patch::Apply(body)).await.expect("applied");
    }

    /// Writes a record as its holder would.
    async fn write(&self, record: &Record, force: bool) {
        let body = json!({
            "metadata": {"annotations": {RECORD: record.to_json()}, "labels": {LABEL: record.leading_kind().as_str()}},
            "spec": if record.phase.is_cordoned() { json!({"unschedulable": true}) } else { json!({}) },
        });
        self.apply(record.holder.as_str(), force, body).await;
    }

    /// A record about an interruption that ends, or ended, the machine at `deadline`.
    fn interruption(&self, holder: Manager, phase: Phase, deadline: Timestamp) -> Record {
        let mut record = Record::begin("x-1".into(), holder, phase, Timestamp::now());
        record.kinds = vec![Kind::SpotInterruption];
        record.deadline = Some(deadline);
        record.hard = true;
        record.boot_id = Some(self.node.boot_id.clone());
        record.notices = vec![Notice {
            id: NoticeId("spot-interruption".into()),
            kind: Kind::SpotInterruption,
            instance: InstanceId::parse(&self.node.instance_id).unwrap(),
            source: Source::Imds,
            noticed_at: deadline - SignedDuration::from_secs(120),
            deadline: Deadline::Hard(deadline),
            maintenance: None,
            detail: "terminate".into(),
        }];
        record
    }

    /// An agent that has cordoned the node on advice.
    async fn watching(&self, args: &[&str]) -> Running {
        let agent = self.seat.ready(args).await;
        self.advise();
        self.until_phase(Phase::Watching).await;
        agent
    }
}

fn whole(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap()
}

fn seconds_from_now(seconds: i64) -> Timestamp {
    whole(Timestamp::now() + SignedDuration::from_secs(seconds))
}

fn record_text(node: &Node) -> Option<&String> {
    node.metadata.annotations.as_ref()?.get(RECORD)
}

fn record(node: &Node) -> Option<Record> {
    Record::parse(record_text(node)?).ok()
}

fn cordoned(node: &Node) -> bool {
    node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false)
}

fn label<'a>(node: &'a Node, name: &str) -> Option<&'a str> {
    node.metadata.labels.as_ref()?.get(name).map(String::as_str)
}

/// Whether a field manager owns anything of the Node by an apply.
fn owns(node: &Node, manager: &str) -> bool {
    let entries = node.metadata.managed_fields.iter().flatten();
    entries.into_iter().any(|entry| {
        let fields = entry.fields_v1.as_ref().map(|fields| fields.0.to_string()).unwrap_or_default();
        entry.manager.as_deref() == Some(manager) && fields != "{}"
    })
}

/// A Ready condition that holds since then, for [`World::node_with`].
fn ready_since(at: Timestamp) -> Value {
    let at = whole(at).to_string();
    json!({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
        "lastHeartbeatTime": at, "lastTransitionTime": at}]}})
}

/// Long enough that nothing of a test reaches it.
const FAR: i64 = 100;
const SECOND: Duration = Duration::from_secs(1);

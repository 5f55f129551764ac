//! One node with an agent's rights, a metadata service that the test steers, and what people and machines see of it.

use std::{net::SocketAddr, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Event;
use kube::{Api, api::ListParams};
use serde_json::Value;
use spotter::rehearsal::imds::{Change, Control, Machine, MockImds};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::support::{
    audit::Requests,
    controlplane::ControlPlane,
    eventually,
    fleet::{TestNode, World},
    keeper::free_port,
    kubelet::Kubelet,
    process::{Answer, Process, wait_http},
    rights::{Agent, Rights},
};

/// Long enough for any machine: only a failing test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Stage<'a> {
    pub cp: &'a ControlPlane,
    pub world: World,
    pub node: TestNode,
    pub kubelet: Kubelet,
    pub agent: Agent,
    /// The metadata service.
    pub imds: Control,
    pub imds_url: String,
    /// Where the agent's metrics are.
    pub admin: SocketAddr,
    _imds: DropGuard,
}

impl<'a> Stage<'a> {
    /// A node with a kubelet, and an agent that acts as the node.
    pub async fn new(cp: &'a ControlPlane, name: &str) -> Self {
        Self::with(cp, name, Rights::Node).await
    }

    pub async fn with(cp: &'a ControlPlane, name: &str, rights: Rights) -> Self {
        let world = World::new(cp, name).await;
        let node = world.node("a").await;
        let agent = world.agent(&node, rights).await;
        Self::set(cp, world, node, agent).await
    }

    /// An agent that lacks these rights, each as `(resource, verb)`.
    pub async fn without(cp: &'a ControlPlane, name: &str, rights: Rights, missing: &[(&str, &str)]) -> Self {
        let world = World::new(cp, name).await;
        let node = world.node("a").await;
        let agent = world.agent_without(&node, rights, missing).await;
        Self::set(cp, world, node, agent).await
    }

    async fn set(cp: &'a ControlPlane, world: World, node: TestNode, agent: Agent) -> Self {
        let kubelet = world.kubelet(&node);
        let machine = Machine { instance_id: node.instance_id.clone(), ..Machine::default() };
        let mock = MockImds::bind(([127, 0, 0, 1], 0).into(), machine).await.unwrap();
        let (imds, imds_url) = (mock.control(), mock.url());
        let cancel = CancellationToken::new();
        let serving = mock.serve(cancel.clone());
        // On a thread of its own: some tests block theirs while they restart a server.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        std::thread::spawn(move || runtime.block_on(serving));
        let admin = ([127, 0, 0, 1], free_port()).into();
        Self { cp, world, node, kubelet, agent, imds, imds_url, admin, _imds: cancel.drop_guard() }
    }

    /// Starts the agent, with short polls.
    pub fn start(&self, more: &[&str]) -> Process {
        let (listen, imds) = (self.admin.to_string(), &self.imds_url);
        let often =
            ["--poll-interval", "100ms", "--rebalance-poll-interval", "100ms", "--maintenance-poll-interval", "100ms"];
        Process::spotter(["run", "--mode", "agent", "--node-name", &self.node.name, "--imds-url", imds])
            .args(["--listen", &listen])
            .args(often)
            .args(more)
            .env("KUBECONFIG", &self.agent.kubeconfig)
            .start()
    }

    /// The same, and waits until it knows its Node.
    pub async fn started(&self, more: &[&str]) -> Process {
        let spotter = self.start(more);
        spotter.wait_for_line("Node found", PATIENCE).await;
        spotter
    }

    /// A spot interruption that ends the machine in so many seconds (or has ended it).
    pub fn interrupt(&self, seconds: i64) -> Timestamp {
        let time = in_seconds(seconds);
        self.imds.apply(Change::Spot { action: "terminate".into(), time });
        time
    }

    /// A maintenance that begins in so many seconds: a soft deadline.
    pub fn maintain(&self, seconds: i64) {
        let change = Change::Maintenance {
            id: "instance-event-1".into(),
            code: "system-reboot".into(),
            start: in_seconds(seconds),
        };
        self.imds.apply(change);
    }

    /// The Auto Scaling group ends the instance: soft, for as long as the pods need.
    pub fn scale_in(&self) {
        self.imds.apply(Change::TargetState("Terminated".into()));
    }

    /// The record on the Node.
    pub async fn record(&self) -> Option<Value> {
        let node = self.world.get_node(&self.node).await;
        let text = node.metadata.annotations?.remove("spotter.dev/termination")?;
        Some(serde_json::from_str(&text).expect("JSON"))
    }

    /// Waits until the record has this phase.
    pub async fn phase(&self, phase: &str) -> Value {
        eventually(&format!("the record says {phase}"), PATIENCE, || async {
            self.record().await.filter(|record| record["phase"] == phase)
        })
        .await
    }

    /// Events of this reason about the object of this name.
    pub async fn events(&self, name: &str, reason: &str) -> Vec<Event> {
        let namespace = if name == self.node.name { "default" } else { &self.world.namespace };
        let events: Api<Event> = Api::namespaced(self.world.client().clone(), namespace);
        let mine = ListParams::default().fields(&format!("involvedObject.name={name},reason={reason}"));
        events.list(&mine).await.expect("a list").items
    }

    /// The message of the first such event, as soon as there is one.
    pub async fn event(&self, name: &str, reason: &str) -> String {
        let what = format!("an event {reason} about {name}");
        let first = || async { self.events(name, reason).await.into_iter().next() };
        eventually(&what, PATIENCE, first).await.message.unwrap_or_default()
    }

    /// What the agent has asked the API server, its events (and what tests ask with its token) left out.
    pub async fn asked(&self) -> Requests {
        let all = self.cp.audit().agent(&self.node.name).await;
        all.only(|request| request.resource != "events" && request.user_agent.starts_with("spotter/"))
    }

    /// The agent's metrics.
    pub async fn metrics(&self) -> Answer {
        wait_http(self.admin, "/metrics", PATIENCE).await
    }

    /// How often evictions and deletions were answered like this.
    pub async fn answers(&self, result: &str) -> f64 {
        self.metrics().await.metric("spotter_evictions_total", &[("result", result)]).expect("a series of its own")
    }
}

/// From now, as IMDS writes it: whole seconds.
fn in_seconds(seconds: i64) -> Timestamp {
    Timestamp::from_second((Timestamp::now() + SignedDuration::from_secs(seconds)).as_second()).unwrap()
}

/// The reason of a pod's `DisruptionTarget` condition.
pub fn disruption(pod: &k8s_openapi::api::core::v1::Pod) -> Option<String> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == "DisruptionTarget")?.reason.clone()
}

/// The process has neither panicked nor ended.
pub fn assert_well(spotter: &Process) {
    let output = spotter.output();
    println!("{output}");
    assert!(spotter.exited().is_none() && !output.contains("panicked"), "{output}");
}

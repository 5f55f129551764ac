//! The agent as a process, on a node of its own, with a metadata service that the test holds in its hands.

use std::{net::SocketAddr, time::Duration};

use spotter::rehearsal::imds::{Control, Machine, MockImds};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    fleet::{TestNode, World},
    keeper::free_port,
    process::{Answer, Process, http_get},
    rights::{self, Rights},
};

/// Long enough for any machine: only a failing test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What every agent of the tests is started with: a tenth of a second is the shortest interval that it takes.
const QUICK: [&str; 3] =
    ["--poll-interval=100ms", "--rebalance-poll-interval=100ms", "--maintenance-poll-interval=100ms"];

/// Where agents can be started, one after the other: a node, its metadata service, the rights.
pub struct Seat {
    pub imds: Control,
    pub imds_url: String,
    pub access: rights::Agent,
    /// `--node-name`
    pub node_name: String,
    _serving: AbortOnDropHandle<()>,
}

impl Seat {
    /// With the rights of an agent that acts as its own node, on the machine that the node stands for.
    pub async fn new(world: &World, node: &TestNode) -> Self {
        Self::with(world.agent(node, Rights::Node).await, node, &node.instance_id).await
    }

    /// With other rights, or on another machine.
    pub async fn with(access: rights::Agent, node: &TestNode, instance_id: &str) -> Self {
        let machine =
            Machine { instance_id: instance_id.to_owned(), life_cycle: "on-demand".into(), ..Machine::default() };
        let mock = MockImds::bind(SocketAddr::from(([127, 0, 0, 1], 0)), machine).await.expect("a port");
        let (imds, imds_url) = (mock.control(), mock.url());
        let serving = tokio::spawn(async move { mock.serve(CancellationToken::new()).await.expect("it serves") });
        Self { imds, imds_url, access, node_name: node.name.clone(), _serving: AbortOnDropHandle::new(serving) }
    }

    /// Starts an agent; does not wait for anything.
    pub fn start(&self, args: &[&str]) -> Running {
        let admin = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let process = Process::spotter(["run", "--mode", "agent", "--node-name", &self.node_name])
            .args(["--imds-url", &self.imds_url, "--listen", &admin.to_string()])
            .args(QUICK)
            .args(args)
            .env("KUBECONFIG", &self.access.kubeconfig)
            .start();
        Running { process, admin }
    }

    /// Starts an agent and waits until it knows its node and has looked once at everything that can be announced.
    pub async fn ready(&self, args: &[&str]) -> Running {
        const PATHS: [&str; 3] =
            ["spot/instance-action", "events/maintenance/scheduled", "events/recommendations/rebalance"];
        let before = PATHS.map(|path| self.imds.requests(path));
        let agent = self.start(args);
        agent.process.wait_for_line("Node found", PATIENCE).await;
        super::eventually("it polls", PATIENCE, || async {
            let polled = PATHS.iter().zip(before).all(|(path, before)| self.imds.requests(path) > before + 1);
            polled.then_some(())
        })
        .await;
        agent
    }
}

/// A running agent.
pub struct Running {
    pub process: Process,
    pub admin: SocketAddr,
}

impl Running {
    /// `/readyz`, `/metrics` and the like.
    pub async fn get(&self, path: &str) -> Answer {
        super::eventually("the admin server answers", PATIENCE, || async { http_get(self.admin, path).await.ok() })
            .await
    }

    /// The sum of a metric's samples with these labels.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.get("/metrics").await.metric(name, labels).unwrap_or_else(|| panic!("no metric {name} {labels:?}"))
    }

    pub async fn line(&self, part: &str) {
        self.process.wait_for_line(part, PATIENCE).await;
    }

    /// How many lines hold this.
    pub fn count(&self, part: &str) -> usize {
        self.process.lines().iter().filter(|line| line.text.contains(part)).count()
    }

    /// SIGTERM; it must end well.
    pub async fn stop(&self) {
        self.process.terminate();
        let status = self.process.wait(PATIENCE).await;
        assert!(status.success(), "{status}:\n{}", self.process.output());
    }
}

//! Real parts for tests: a control plane, a fleet of nodes and pods, a kubelet, the agent's rights, the audit log,
//! and the program itself as a child process.
//!
//! A test reads like this:
//!
//! ```ignore
//! #[tokio::test]
//! async fn a_notice_empties_the_node() {
//!     let Some(cp) = support::controlplane::shared() else { return };
//!     let world = World::new(cp, "empties").await;
//!     let node = world.node("a").await;
//!     world.run_many(&node, 3, |i| NewPod::new(format!("web-{i}")).grace(30)).await;
//!     let kubelet = world.kubelet(&node);
//!     let agent = world.agent(&node, Rights::Node).await;
//!     let imds = MetadataMock::spot(&node, Duration::ZERO, Duration::from_secs(120));
//!     let spotter = Process::spotter(&["run", "--mode", "agent", "--node-name", &node.name, "--imds-url", &imds.url])
//!         .env("KUBECONFIG", &agent.kubeconfig)
//!         .start();
//!     spotter.wait_for_line("drained", Duration::from_secs(20)).await;
//!     assert_eq!(kubelet.stops().len(), 3);
//!     assert_eq!(cp.audit().agent(&node.name).await.count("create", "pods/eviction"), 3);
//! }
//! ```

// Not every test binary that shares this module uses all of it.
#![allow(dead_code)]

#[path = "support/agent.rs"]
pub mod agent;
#[path = "support/audit.rs"]
pub mod audit;
#[path = "support/bare.rs"]
pub mod bare;
#[path = "support/controlplane.rs"]
pub mod controlplane;
#[path = "support/fleet.rs"]
pub mod fleet;
#[path = "support/imds.rs"]
pub mod imds;
#[path = "support/keeper.rs"]
pub mod keeper;
#[path = "support/kubelet.rs"]
pub mod kubelet;
#[path = "support/process.rs"]
pub mod process;
#[path = "support/rights.rs"]
pub mod rights;

use std::{future::Future, time::Duration};

/// Asks until there is an answer; panics with `what` after `limit`.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> F,
) -> T {
    let end = tokio::time::Instant::now() + limit;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(tokio::time::Instant::now() < end, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Runs a future to its end on a thread and runtime of its own: for synchronous code that runs inside another runtime.
pub fn block_on_thread<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    std::thread::spawn(move || runtime.block_on(future)).join().expect("the thread ended well")
}

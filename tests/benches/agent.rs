//! Agent mode against a real API server: prints what README and design promise, beside a bare client on the same server.
//!
//!     KUBEBUILDER_ASSETS=$(tests/controlplane/build.sh) cargo bench --bench agent
//!
//! RUNS and PODS (environment) change the number of runs and the pods on the node.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, unreachable_pub)]

#[path = "../it/support.rs"]
mod support;

use std::time::Duration;

use support::{
    bare::{self, Took},
    controlplane::{ControlPlane, shared},
    fleet::{NewPod, World},
    rights::Rights,
};

/// How long a pod takes to end.
const EXIT: Duration = Duration::from_secs(3);

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let Some(cp) = shared() else { return };
    let (runs, pods) = (number("RUNS", 10), number("PODS", 110));
    println!("{runs} runs, one node with {pods} pods each, kube-apiserver with its default limits");
    let mut bare = Vec::new();
    for run in 0..runs {
        bare.push(bare_client(cp, run, pods).await);
    }
    print("bare client: claim", bare.iter().map(|took| took.claim));
    print("bare client: claim -> last eviction accepted", bare.iter().map(|took| took.all));
}

/// One run of the bare client, with the agent's rights and as its node.
async fn bare_client(cp: &ControlPlane, run: usize, pods: usize) -> Took {
    let world = World::new(cp, &format!("bare-{run}")).await;
    let node = world.node("a").await;
    // Long enough that the kubelet's own requests do not compete with the evictions.
    world.run_many(&node, pods, |i| NewPod::new(format!("web-{i}")).exits_after(EXIT)).await;
    let kubelet = world.kubelet(&node);
    let agent = world.agent(&node, Rights::Node).await;
    let mut config = agent.config().await;
    config.auth_info.impersonate = Some(format!("system:node:{}", node.name));
    let took = bare::evict_all(&config, &node.name, &world.namespace).await;
    assert_eq!(took.evictions, pods);
    kubelet.ended(pods, Duration::from_secs(60)).await;
    took
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Median, 95th percentile and worst of several times.
fn print(what: &str, times: impl Iterator<Item = Duration>) {
    let mut times: Vec<_> = times.collect();
    times.sort();
    let at = |part: f64| {
        let place = (part * times.len() as f64).ceil() as usize;
        times[place.clamp(1, times.len()) - 1].as_secs_f64() * 1000.0
    };
    println!("{what:<50} median {:7.1} ms   p95 {:7.1} ms   worst {:7.1} ms", at(0.5), at(0.95), at(1.0));
}

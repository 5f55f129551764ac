//! The agent against a real API server, from the notice to the end.

use std::time::Duration;

use crate::support::{
    controlplane,
    fleet::{NewPod, World},
    imds::MetadataMock,
    process::Process,
    rights::Rights,
};

#[tokio::test]
async fn a_notice_empties_the_node() {
    let Some(cp) = controlplane::shared() else { return };
    let world = World::new(cp, "empties").await;
    let node = world.node("a").await;
    world.run_many(&node, 110, |i| NewPod::new(format!("web-{i}")).grace(30)).await;
    let kubelet = world.kubelet(&node);
    let agent = world.agent(&node, Rights::Node).await;
    let imds = MetadataMock::spot(&node, Duration::ZERO, Duration::from_secs(120)).await;
    let spotter = Process::spotter(["run", "--mode", "agent", "--node-name", &node.name, "--imds-url", &imds.url])
        .env("KUBECONFIG", &agent.kubeconfig)
        .args(["--listen", "off"])
        .start();
    spotter.wait_for_line("termination finished", Duration::from_secs(20)).await;
    println!("{}", spotter.output());
    assert_eq!(kubelet.ended(110, Duration::from_secs(5)).await.len(), 110);
    let requests = cp.audit().agent(&node.name).await;
    println!("{:#?}", requests.summary());
    assert_eq!(requests.count("create", "pods/eviction"), 110);
}

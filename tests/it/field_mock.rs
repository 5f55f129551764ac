//! The agent with amazon-ec2-metadata-mock, the IMDS mock that users of the field already have: a service that spotter
//! did not write.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use crate::support::{
    agent::PATIENCE,
    controlplane::shared,
    eventually,
    fleet::{NewPod, TestNode, World},
    imds::MetadataMock,
    process::Process,
    rights::Rights,
};

async fn agent(world: &World, node: &TestNode, imds: &MetadataMock) -> Process {
    let access = world.agent(node, Rights::Node).await;
    Process::spotter(["run", "--mode", "agent", "--node-name", &node.name, "--imds-url", &imds.url, "--listen", "off"])
        .env("KUBECONFIG", &access.kubeconfig)
        .start()
}

/// The record on the Node, when it has this phase.
async fn record(world: &World, node: &TestNode, phase: &str) -> Value {
    eventually(&format!("phase {phase}"), PATIENCE, || async {
        let node = world.get_node(node).await;
        let record: Value = serde_json::from_str(node.metadata.annotations?.get("spotter.dev/termination")?).ok()?;
        (record["phase"] == phase).then_some(record)
    })
    .await
}

#[tokio::test]
async fn a_spot_interruption_empties_the_node() {
    let Some(cp) = shared() else { return };
    let world = World::new(cp, "field-spot").await;
    let node = world.node("a").await;
    world.run_many(&node, 5, |i| NewPod::new(format!("web-{i}"))).await;
    let kubelet = world.kubelet(&node);
    let imds = MetadataMock::spot(&node, Duration::ZERO, Duration::from_secs(120)).await;
    let _spotter = agent(&world, &node, &imds).await;
    let record = record(&world, &node, "drained").await;
    assert_eq!((&record["kinds"][0], &record["hard"]), (&"spot-interruption".into(), &true.into()), "{record}");
    assert_eq!(kubelet.ended(5, PATIENCE).await.len(), 5);
    // It lists a rebalance recommendation too, and both for ever: one termination all the same.
    assert_eq!(cp.audit().agent(&node.name).await.count("create", "pods/eviction"), 5);
}

#[tokio::test]
async fn a_maintenance_event_is_scheduled() {
    let Some(cp) = shared() else { return };
    let world = World::new(cp, "field-events").await;
    let node = world.node("a").await;
    let start = Timestamp::now() + SignedDuration::from_hours(3);
    let imds = MetadataMock::events(&node, Duration::ZERO, "system-reboot", start).await;
    let _spotter = agent(&world, &node, &imds).await;
    let record = record(&world, &node, "scheduled").await;
    assert_eq!(record["deadline"].as_str().unwrap()[..16], start.to_string()[..16], "{record}");
    assert_ne!(world.get_node(&node).await.spec.unwrap().unschedulable, Some(true));
}

#[tokio::test]
async fn an_auto_scaling_termination_drains_with_the_pods_own_grace() {
    let Some(cp) = shared() else { return };
    let world = World::new(cp, "field-asg").await;
    let node = world.node("a").await;
    world.run(&node, NewPod::new("web").grace(77)).await;
    let kubelet = world.kubelet(&node);
    let imds = MetadataMock::asg(&node, Duration::ZERO).await;
    let _spotter = agent(&world, &node, &imds).await;
    record(&world, &node, "drained").await;
    assert_eq!(kubelet.ended(1, PATIENCE).await[0].graces, [77]);
}

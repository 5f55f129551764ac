//! An API server that sends connections away, restarts, freezes, or is not there: no eviction is lost.

use std::{collections::BTreeSet, time::Duration};

use serde_json::json;

use crate::{
    agent_drain::stage::{PATIENCE, Stage, assert_well},
    support::{
        controlplane::{ControlPlane, Options, available},
        fleet::{Budget, NewPod},
    },
};

#[tokio::test]
async fn goaway_loses_no_eviction() {
    if !available() {
        return;
    }
    // The most that the server takes.
    let apiserver_args = vec!["--goaway-chance=0.02".to_owned()];
    let cp = ControlPlane::start(Options { apiserver_args, ..Options::default() });
    let stage = Stage::new(&cp, "goaway").await;
    stage.world.run_many(&stage.node, 110, |i| NewPod::new(format!("web-{i}"))).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(120);
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["gone"], 110, "{record}");
    let evictions = stage.asked().await.of("create", "pods/eviction");
    let names: BTreeSet<_> = evictions.iter().map(|request| &request.name).collect();
    assert_eq!((names.len(), evictions.iter().filter(|request| request.code == 201).count()), (110, 110));
    assert!(!spotter.output().contains("WARN"), "{}", spotter.output());
    assert_well(&spotter);
}

/// A node with pods that go and pods that a budget holds, so that the drain lasts.
async fn lasting<'a>(cp: &'a ControlPlane, name: &str) -> Stage<'a> {
    let stage = Stage::new(cp, name).await;
    stage
        .world
        .run_many(&stage.node, 20, |i| NewPod::new(format!("free-{i}")).exits_after(Duration::from_secs(2)))
        .await;
    stage.world.run_many(&stage.node, 5, |i| NewPod::new(format!("stuck-{i}")).grace(10)).await;
    stage.world.budget("stuck", "stuck", Budget::MinAvailable(5)).await;
    stage
}

#[tokio::test]
async fn a_restart_in_the_middle_loses_nothing() {
    if !available() {
        return;
    }
    let cp = ControlPlane::start(Options::default());
    let stage = lasting(&cp, "restart").await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(25);
    stage.event("stuck-0", "EvictionBlocked").await;
    cp.kill_apiserver();
    tokio::time::sleep(Duration::from_secs(1)).await;
    cp.restart_apiserver();
    let record = stage.phase("drained").await;
    assert_eq!((&record["outcome"]["gone"], &record["outcome"]["deleted"]), (&json!(25), &json!(5)), "{record}");
    for stop in stage.kubelet.ended(25, PATIENCE).await {
        assert!(!stop.sigkilled, "{stop:?}");
    }
    assert_well(&spotter);
}

#[tokio::test]
async fn a_server_that_freezes_in_the_middle_or_at_the_claim_loses_nothing() {
    if !available() {
        return;
    }
    let cp = ControlPlane::start(Options::default());
    let stage = lasting(&cp, "freeze").await;
    let spotter = stage.started(&[]).await;
    // At the very start: the connection is open, and nobody answers on it.
    cp.freeze();
    stage.interrupt(30);
    spotter.wait_for_line("notice", PATIENCE).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    cp.thaw();
    spotter.wait_for_line("cordoned", PATIENCE).await;
    stage.event("stuck-0", "EvictionBlocked").await;
    cp.freeze();
    tokio::time::sleep(Duration::from_secs(6)).await;
    cp.thaw();
    let record = stage.phase("drained").await;
    assert_eq!((&record["outcome"]["gone"], &record["outcome"]["deleted"]), (&json!(25), &json!(5)), "{record}");
    assert_well(&spotter);
}

#[tokio::test]
async fn a_server_that_is_down_at_start_is_waited_for() {
    if !available() {
        return;
    }
    let cp = ControlPlane::start(Options::default());
    let stage = Stage::new(&cp, "down").await;
    stage.world.run_many(&stage.node, 5, |i| NewPod::new(format!("web-{i}"))).await;
    cp.kill_apiserver();
    let spotter = stage.start(&[]);
    stage.interrupt(120);
    let line = spotter.wait_for_line("cannot read the own Node yet", PATIENCE).await.text;
    assert!(line.contains(&cp.server.url) && line.contains("refused"), "{line}");
    spotter.wait_for_line("notice", PATIENCE).await;
    cp.restart_apiserver();
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["gone"], 5, "{record}");
    assert_well(&spotter);
}

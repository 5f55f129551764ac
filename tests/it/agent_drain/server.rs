//! An API server that sends connections away, restarts, freezes, or is not there: no eviction is lost.

use std::{collections::BTreeSet, time::Duration};

use jiff::Timestamp;
use serde_json::json;

use crate::{
    agent_drain::stage::{PATIENCE, Stage, assert_well},
    support::{
        controlplane::{ControlPlane, Options, available, shared},
        eventually,
        fleet::{Budget, NewPod},
        rights::apply,
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
    let line = spotter.wait_for_line("a notice waits, and the Node is not cordoned", PATIENCE).await.text;
    assert!(line.contains(&cp.server.url) && line.contains("refused"), "{line}");
    spotter.wait_for_line("notice", PATIENCE).await;
    cp.restart_apiserver();
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["gone"], 5, "{record}");
    assert_well(&spotter);
}

/// A webhook that never answers keeps every eviction on the wire for ten seconds: what is written on the Node meanwhile
/// does not wait behind them.
#[tokio::test]
async fn f1_a_write_on_the_node_does_not_wait_for_evictions() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "stalled").await;
    let deaf = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/", deaf.local_addr().unwrap());
    let webhook = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": stage.world.namespace}, "webhooks": [{"name": "deaf.spotter.test", "clientConfig": {"url": url},
            "admissionReviewVersions": ["v1"], "sideEffects": "None", "failurePolicy": "Fail", "timeoutSeconds": 10,
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": stage.world.namespace}},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"],
                "resources": ["pods/eviction"]}]}]});
    stage.world.run_many(&stage.node, 60, |i| NewPod::new(format!("web-{i}"))).await;
    apply(stage.world.client(), &webhook).await;
    // In force a moment after it is stored.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let spotter = stage.started(&[]).await;
    stage.scale_in();
    let in_flight = [("target", "kubernetes")];
    eventually("all evictions are on the wire", PATIENCE, || async {
        stage.metrics().await.metric("spotter_requests_in_flight", &in_flight).is_some_and(|n| n >= 60.0).then_some(())
    })
    .await;
    let told = Timestamp::now();
    stage.interrupt(100);
    eventually("the escalation stands on the Node", PATIENCE, || async {
        stage.record().await.filter(|record| record["kinds"][0] == "spot-interruption")
    })
    .await;
    assert_eq!(stage.metrics().await.metric("spotter_requests_in_flight", &in_flight).map(|n| n >= 60.0), Some(true));
    // The audit log shows a request when it was answered.
    let asked = eventually("the evictions are answered", PATIENCE, || async {
        let asked = stage.asked().await;
        (asked.count("create", "pods/eviction") >= 60).then_some(asked)
    })
    .await;
    let writes = asked.of("patch", "nodes");
    let write = writes.iter().find(|request| request.received > told).expect("the escalation");
    assert!(write.answered.duration_since(told).as_millis() < 5_000, "{told} {write:?}");
    let evictions = asked.of("create", "pods/eviction");
    let meanwhile = evictions.iter().filter(|r| r.received < write.received && r.answered > write.answered).count();
    assert!(meanwhile >= 60, "only {meanwhile} were on the wire: {write:?}");
    assert_well(&spotter);
}

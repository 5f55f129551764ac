//! Disruption budgets: respected for as long as there is time, and not longer.

use std::time::Duration;

use k8s_openapi::api::{core::v1::Namespace, policy::v1::PodDisruptionBudget};
use kube::{Api, api::DeleteParams};
use serde_json::json;

use crate::{
    agent_drain::stage::{PATIENCE, Stage, assert_well, disruption},
    support::{
        controlplane::{ControlPlane, Options, available, shared},
        eventually,
        fleet::{Budget, NewPod},
    },
};

impl Stage<'_> {
    async fn delete_budget(&self, name: &str) {
        let budgets: Api<PodDisruptionBudget> = Api::namespaced(self.world.client().clone(), &self.world.namespace);
        budgets.delete(name, &DeleteParams::default()).await.unwrap();
    }
}

/// Together, because each waits for its deadline.
#[tokio::test]
async fn f15_f29_a_budget_is_respected_until_the_latest_start_and_not_longer() {
    let Some(cp) = shared() else { return };
    tokio::join!(a_budget_that_allows_nothing(cp), ten_replicas(cp), unready_pods(cp), a_replaced_pod(cp));
}

/// Every pod gets its SIGTERM, with a grace that ends before the deadline, and the condition.
async fn a_budget_that_allows_nothing(cp: &ControlPlane) {
    let stage = Stage::new(cp, "never").await;
    let names = ["web-0", "web-1", "web-2", "web-3"];
    // They use all the grace that they get, and an object outlives its process: a finalizer.
    for name in names {
        stage.world.run(&stage.node, NewPod::new(name).grace(60).never_exits().finalizer("test/kept")).await;
    }
    stage.world.run(&stage.node, NewPod::new("free").grace(60)).await;
    stage.world.budget("all", "web", Budget::MinAvailable(4)).await;
    let spotter = stage.started(&[]).await;
    let deadline = stage.interrupt(25);
    let record = stage.phase("drained").await;
    let outcome = &record["outcome"];
    assert_eq!(outcome, &json!({"endedAt": outcome["endedAt"], "pods": 5, "gone": 5, "deleted": 4}));
    for name in names {
        let stop = stage.kubelet.stop(name).expect("it got SIGTERM");
        assert!(stop.kill_at < deadline && stop.grace() >= 8, "{stop:?} {deadline}");
        assert!(stop.exited.is_some_and(|at| at < deadline), "{stop:?} {deadline}");
        let pod = stage.world.pods().get(name).await.unwrap();
        assert_eq!(disruption(&pod).as_deref(), Some("TerminationByNodeEnd"));
        let budget = "The disruption budget all needs 4 healthy pods and has 4 currently";
        for reason in ["EvictionBlocked", "DeletedAtDeadline"] {
            let message = stage.event(name, reason).await;
            assert!(message.contains(budget), "{reason}: {message}");
        }
        assert_eq!(stage.events(name, "EvictionBlocked").await.len(), 1, "told once");
    }
    let asked = stage.asked().await;
    assert_eq!((asked.count("delete", "pods"), asked.count("patch", "pods/status")), (4, 4), "{:?}", asked.summary());
    assert!(asked.count("create", "pods/eviction") <= 5 + 4 * 12, "{:?}", asked.summary());
    for name in names {
        asked.only(|request| request.name == name).assert_order(("patch", "pods/status"), ("delete", "pods"));
    }
    let metrics = stage.metrics().await;
    let pods = |outcome| metrics.metric("spotter_pods_total", &[("outcome", outcome)]).unwrap();
    assert_eq!((pods("evicted"), pods("deleted_at_deadline"), pods("left")), (1.0, 4.0, 0.0));
    assert!(stage.answers("budget").await >= 4.0 && stage.answers("unhealthy").await == 0.0);
    assert_well(&spotter);
}

/// A long grace is no reason to delete at once.
async fn ten_replicas(cp: &ControlPlane) {
    let stage = Stage::new(cp, "replicas").await;
    stage.world.run_many(&stage.node, 10, |i| NewPod::new(format!("web-{i}")).grace(600)).await;
    stage.world.budget("all", "web", Budget::MinAvailable(9)).await;
    let spotter = stage.started(&[]).await;
    let seen = jiff::Timestamp::now();
    stage.interrupt(40);
    let record = stage.phase("drained").await;
    let asked = stage.asked().await;
    let deletions = asked.of("delete", "pods");
    assert_eq!((deletions.len(), &record["outcome"]["deleted"]), (9, &json!(9)), "{record}");
    // Half of the time is theirs, and a margin of 2 s; the notice says whole seconds.
    let earliest = seen + jiff::SignedDuration::from_secs(17);
    assert!(deletions.iter().all(|request| request.received > earliest), "{seen} {deletions:?}");
    let accepted = asked.of("create", "pods/eviction").only(|request| request.code == 201);
    assert_eq!(accepted.len(), 1, "what the budget allowed");
    assert_well(&spotter);
}

#[tokio::test]
async fn a_budget_that_frees_up_is_evicted_and_not_deleted() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "frees").await;
    let elsewhere = stage.world.node("b").await;
    stage.world.run_many(&stage.node, 2, |i| NewPod::new(format!("web-{i}"))).await;
    stage.world.run(&stage.node, NewPod::new("db-0")).await;
    // Two budgets cover this one: an answer of its own, which heals when one is gone.
    stage.world.run(&stage.node, NewPod::new("twice-0")).await;
    stage.world.budget("web", "web", Budget::MinAvailable(2)).await;
    stage.world.budget("db", "db", Budget::MinAvailable(1)).await;
    stage.world.budget("twice-1", "twice", Budget::MinAvailable(0)).await;
    stage.world.budget("twice-2", "twice", Budget::MinAvailable(0)).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(120);
    for (pod, part) in [("web-0", "budget web needs 2"), ("db-0", "budget db needs 1"), ("twice-0", "more than one")] {
        let message = stage.event(pod, "EvictionBlocked").await;
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(stage.metrics().await.metric("spotter_pods_blocked", &[]), Some(4.0));
    // Capacity elsewhere, a budget that goes, and one of two that goes.
    stage.world.run_many(&elsewhere, 2, |i| NewPod::new(format!("web-{}", i + 2))).await;
    stage.delete_budget("db").await;
    stage.delete_budget("twice-1").await;
    let record = stage.phase("drained").await;
    assert!(record["outcome"].get("deleted").is_none(), "{record}");
    assert_eq!(stage.world.pod_names().await, ["web-2", "web-3"]);
    assert_eq!(stage.asked().await.count("delete", "pods"), 0);
    assert_eq!(stage.answers("accepted").await, 4.0);
    assert!(stage.answers("multiple_budgets").await >= 1.0 && stage.answers("budget").await >= 3.0);
    assert_eq!(stage.metrics().await.metric("spotter_pods_blocked", &[]), Some(0.0));
    assert_well(&spotter);
}

/// Without controllers budgets are never processed: Retry-After 10 is obeyed, but not beyond the latest start.
#[tokio::test]
async fn a_budget_that_is_still_being_processed_is_waited_for_only_while_there_is_time() {
    if !available() {
        return;
    }
    let cp = ControlPlane::start(Options { without_controllers: true, ..Options::default() });
    let stage = Stage::new(&cp, "behind").await;
    stage.world.run(&stage.node, NewPod::new("web-0").not_ready().grace(5)).await;
    stage.world.unprocessed_budget("web", "web", Budget::MinAvailable(0)).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(12);
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["deleted"], 1, "{record}");
    assert!(stage.event("web-0", "EvictionBlocked").await.contains("still being processed"));
    assert!(!stage.event("web-0", "EvictionBlocked").await.contains("not ready"), "nothing is known about that");
    assert_eq!(stage.asked().await.count("create", "pods/eviction"), 1, "not asked again before ten seconds");
    assert_eq!((stage.answers("budget").await, stage.answers("unhealthy").await), (1.0, 0.0));
    assert_well(&spotter);
}

/// They may never become evictable: told apart, and counted apart.
async fn unready_pods(cp: &ControlPlane) {
    let stage = Stage::new(cp, "unready").await;
    stage.world.run(&stage.node, NewPod::new("web-0").not_ready().grace(5)).await;
    stage.world.run(&stage.node, NewPod::new("web-1").not_ready().grace(5)).await;
    stage.world.budget("web", "web", Budget::MinAvailable(2)).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(9);
    let message = stage.event("web-0", "EvictionBlocked").await;
    assert!(message.contains("unhealthyPodEvictionPolicy") && message.contains("budget web"), "{message}");
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["deleted"], 2, "{record}");
    assert!(stage.answers("unhealthy").await >= 2.0 && stage.answers("budget").await == 0.0);
    assert_well(&spotter);
}

/// A blocked pod is deleted and made again under its name: only the watch tells, and the new one is asked by its own
/// uid.
async fn a_replaced_pod(cp: &ControlPlane) {
    let stage = Stage::new(cp, "replaced").await;
    stage.world.run(&stage.node, NewPod::new("web-0")).await;
    // Keeps the drain going.
    stage.world.run(&stage.node, NewPod::new("slow").exits_after(Duration::from_secs(6))).await;
    stage.world.budget("web", "web", Budget::MinAvailable(1)).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(90);
    stage.event("web-0", "EvictionBlocked").await;
    let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    stage.world.pods().delete("web-0", &now).await.unwrap();
    let second = NewPod::new("web-0").exits_after(Duration::from_secs(2));
    let second = stage.world.run(&stage.node, second).await;
    stage.delete_budget("web").await;
    eventually("the new one is told to stop", PATIENCE, || async {
        stage.kubelet.stop("web-0").filter(|stop| Some(&stop.uid) == second.metadata.uid.as_ref())
    })
    .await;
    assert_eq!(stage.asked().await.count("delete", "pods"), 0);
    assert_well(&spotter);
}

#[tokio::test]
async fn a_namespace_that_ends_takes_its_pods_along() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "ending").await;
    stage.world.run(&stage.node, NewPod::new("web-0")).await;
    let namespaces: Api<Namespace> = Api::all(stage.world.client().clone());
    namespaces.delete(&stage.world.namespace, &DeleteParams::default()).await.unwrap();
    let spotter = stage.started(&[]).await;
    stage.interrupt(90);
    spotter.wait_for_line("its namespace is being deleted", PATIENCE).await;
    // No controller ends namespaces here: the test deletes the pod in its place.
    stage.world.pods().delete("web-0", &DeleteParams::default()).await.unwrap();
    let record = stage.phase("drained").await;
    assert_eq!((&record["outcome"]["gone"], &record["outcome"]["deleted"]), (&json!(1), &json!(null)), "{record}");
    assert_well(&spotter);
}

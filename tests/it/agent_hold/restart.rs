//! The process ends at any point and another one goes on.

use std::collections::BTreeMap;

use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::{Api, api::DeleteParams};
use spotter::{cluster::Manager, termination::Phase};

use super::*;
use crate::support::controlplane;

#[tokio::test]
async fn f11_a_drain_that_was_killed_goes_on_where_it_was() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "killed").await;
    let _kubelet = scene.world.kubelet(&scene.node);
    scene.world.run_many(&scene.node, 3, |i| NewPod::new(format!("web-{i}"))).await;
    scene.world.run(&scene.node, NewPod::new("slow").never_exits().grace(3)).await;
    scene.protected_pod().await;
    let agent = scene.seat.ready(&[]).await;
    scene.interrupt(FAR);
    agent.line("EvictionBlocked").await;
    let first = scene.record().await.unwrap();
    eventually("the others are asked", PATIENCE, || async { (scene.evictions().await >= 5).then_some(()) }).await;
    agent.process.kill();
    agent.process.wait(PATIENCE).await;

    let again = scene.seat.start(&[]);
    again.line("resumed from the record on the Node").await;
    again.line("EvictionBlocked").await;
    let budgets: Api<PodDisruptionBudget> = Api::namespaced(scene.world.client().clone(), &scene.world.namespace);
    budgets.delete("db", &DeleteParams::default()).await.unwrap();
    let last = scene.until_phase(Phase::Drained).await;
    assert_eq!((last.id, last.started_at, last.deadline), (first.id, first.started_at, first.deadline));
    let mut asked: BTreeMap<String, usize> = BTreeMap::new();
    for request in scene.requests().await.of("create", "pods/eviction").iter() {
        *asked.entry(request.name.clone()).or_default() += 1;
    }
    assert!(asked.remove("db").is_some_and(|times| times > 1));
    assert!(asked.len() == 4 && asked.values().all(|times| *times == 1), "asked again: {asked:?}");
}

#[tokio::test]
async fn f11_a_drained_node_is_not_drained_again_and_joined_by_late_notices() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "ended").await;
    let agent = scene.seat.ready(&[]).await;
    scene.interrupt(FAR);
    let record = scene.until_phase(Phase::Drained).await;
    agent.process.kill();
    agent.process.wait(PATIENCE).await;

    // A pod that a DaemonSet would not have, and that nobody asks to go.
    scene.world.run(&scene.node, NewPod::new("late")).await;
    let mark = cp.audit().mark().await;
    let again = scene.seat.ready(&[]).await;
    scene.seat.imds.apply(Change::TargetState("Terminated".into()));
    again.line("kind=asg-termination").await;
    scene.idle().await;
    let asked = cp.audit().agent_since(&scene.node.name, mark).await;
    assert_eq!(asked.count("create", "pods/eviction"), 0);
    assert_eq!(asked.count("patch", "nodes"), 0);
    assert!(asked.count("list", "pods") + asked.count("watch", "pods") <= 1, "{:?}", asked.summary());
    assert_eq!(scene.record().await.unwrap(), record);
}

#[tokio::test]
async fn f21_a_drain_that_is_asked_to_stop_leaves_a_true_record() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "stopped").await;
    let _kubelet = scene.world.kubelet(&scene.node);
    scene.world.run(&scene.node, NewPod::new("web")).await;
    scene.protected_pod().await;
    let agent = scene.seat.ready(&[]).await;
    scene.interrupt(FAR);
    agent.line("EvictionBlocked").await;
    agent.stop().await;
    let evictions = scene.evictions().await;
    let record = scene.record().await.unwrap();
    assert_eq!((record.phase, record.outcome), (Phase::Draining, None));
    let node = scene.get().await;
    assert!(cordoned(&node) && label(&node, LABEL).is_some());
    tokio::time::sleep(SECOND * 2).await;
    assert_eq!(scene.evictions().await, evictions);
    assert_eq!(agent.count("stopping; the record on the Node says where to go on"), 1);
}

#[tokio::test]
async fn f8_a_dry_run_leaves_a_record_alone_that_it_finds() {
    let Some(cp) = controlplane::shared() else { return };
    for phase in [Phase::Draining, Phase::Drained] {
        let scene = Scene::new(cp, "dry").await;
        scene.world.run(&scene.node, NewPod::new("web")).await;
        let record = scene.interruption(Manager::Agent, phase, seconds_from_now(-600));
        scene.write(&record, false).await;
        let agent = scene.seat.ready(&["--dry-run"]).await;
        scene.interrupt(FAR);
        agent.line("dry run: nothing was changed").await;
        scene.idle().await;
        let asked = scene.requests().await;
        let written = asked.only(|r| !["get", "list", "watch"].contains(&r.verb.as_str()));
        assert_eq!(written.summary(), BTreeMap::new());
        assert_eq!(scene.record().await, Some(record));
    }
}

#[tokio::test]
async fn a_deadline_that_was_counted_from_the_pods_is_not_stretched_by_a_restart() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "by-grace").await;
    scene.protected_pod().await;
    let agent = scene.seat.ready(&[]).await;
    scene.seat.imds.apply(Change::TargetState("Terminated".into()));
    let begun = scene.until_phase(Phase::Draining).await;
    assert_eq!(begun.deadline, None, "the claim does not wait for the pods");
    let node = scene.until("the deadline is known", |node| record(node).is_some_and(|r| r.deadline.is_some())).await;
    let known = record(&node).unwrap();
    assert_eq!((&known.id, known.phase, known.hard), (&begun.id, Phase::Draining, false));
    assert_eq!(scene.patches().await, 2);
    agent.process.kill();
    agent.process.wait(PATIENCE).await;

    let again = scene.seat.start(&[]);
    again.line("EvictionBlocked").await;
    again.line(&format!("drain started deadline=\"{}\"", known.deadline.unwrap())).await;
    scene.idle().await;
    assert_eq!(scene.record().await, Some(known));
    assert_eq!(scene.patches().await, 2);
}

//! People cordon, uncordon and annotate in between.

use serde_json::json;
use spotter::termination::Phase;

use super::*;
use crate::support::controlplane;

const RESPONSE: &str = "spotter.dev/response";

#[tokio::test]
async fn f9_a_persons_cordon_before_the_claim_survives_the_release() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "cordoned").await;
    scene.cordon().await;
    let agent = scene.watching(&[]).await;
    scene.seat.imds.apply(Change::RebalanceGone);
    let node = scene.until_released().await;
    agent.line("released the Node").await;
    assert!(cordoned(&scene.get().await));
    assert!(!owns(&node, "spotter-agent") && label(&node, LABEL).is_none());
}

#[tokio::test]
async fn f25_a_node_that_a_person_has_cordoned_is_drained_all_the_same() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "cordoned-drain").await;
    let _kubelet = scene.world.kubelet(&scene.node);
    scene.world.run(&scene.node, NewPod::new("web")).await;
    scene.cordon().await;
    let _agent = scene.seat.ready(&[]).await;
    scene.interrupt(FAR);
    scene.until_phase(Phase::Drained).await;
    assert_eq!(scene.evictions().await, 1);
}

#[tokio::test]
async fn a_persons_uncordon_is_kept_until_an_interruption_comes() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "uncordoned").await;
    let agent = scene.watching(&["--policy-asg-termination=cordon"]).await;
    scene.uncordon().await;
    agent.line("somebody uncordoned the Node").await;

    // Another notice that asks for a cordon only: the record is written anew.
    scene.seat.imds.apply(Change::TargetState("Terminated".into()));
    let node = scene.until("both kinds", |node| record(node).is_some_and(|r| r.kinds.len() == 2)).await;
    assert!(!cordoned(&node));
    // Nor does a restart forget it.
    agent.stop().await;
    let again = scene.seat.ready(&["--policy-asg-termination=cordon"]).await;
    scene.seat.imds.apply(Change::TargetState("InService".into()));
    let node = scene.until("one kind", |node| record(node).is_some_and(|r| r.kinds.len() == 1)).await;
    assert!(!cordoned(&node));

    scene.interrupt(FAR);
    scene.until_phase(Phase::Drained).await;
    assert!(cordoned(&scene.get().await), "no to the advice was no to the advice");
    drop(again);
}

#[tokio::test]
async fn a_person_who_edits_the_record_does_not_stop_the_termination() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "edited").await;
    let agent = scene.watching(&[]).await;
    let id = scene.record().await.unwrap().id;
    scene.annotate(RECORD, "mine now").await;
    scene.interrupt(FAR);
    assert_eq!(scene.until_phase(Phase::Drained).await.id, id);
    assert_eq!(agent.metric("spotter_claim_conflicts_total", &[]).await, 1.0);

    // And one who removes it.
    scene.annotate(RECORD, json!(null)).await;
    scene.idle().await;
    assert!(agent.process.exited().is_none());
}

#[tokio::test]
async fn a_claim_that_finds_the_word_ignore_is_given_back_at_once() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "ignore").await;
    scene.world.run(&scene.node, NewPod::new("web")).await;
    let agent = scene.seat.ready(&[]).await;
    // An idle agent does not watch its Node: it learns of this by the answer to its claim.
    scene.annotate(RESPONSE, "ignore").await;
    scene.interrupt(FAR);
    agent.line("released the Node").await;
    let node = scene.until_released().await;
    assert!(!cordoned(&node) && label(&node, LABEL).is_none() && label(&node, NO_BALANCER).is_none());
    scene.idle().await;
    assert_eq!((scene.patches().await, scene.evictions().await), (3, 0));
    assert_eq!(agent.count("drain started"), 0, "{}", agent.process.output());
    assert_eq!(agent.metric("spotter_cordons_released_total", &[("reason", "manual")]).await, 1.0);

    // Without the word the notice, which is still there, counts again.
    scene.annotate(RESPONSE, json!(null)).await;
    scene.until_phase(Phase::Draining).await;
}

#[tokio::test]
async fn a_word_that_stood_there_before_the_start_is_known_without_a_claim() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::with(cp, "ignored", json!({"metadata": {"annotations": {RESPONSE: "ignore"}}})).await;
    let agent = scene.seat.ready(&[]).await;
    scene.interrupt(FAR);
    agent.line("response=\"ignore\"").await;
    scene.idle().await;
    assert_eq!((scene.patches().await, scene.evictions().await), (0, 0));
    assert_eq!(agent.metric("spotter_notices_dropped_total", &[("reason", "policy")]).await, 1.0);
}

#[tokio::test]
async fn the_word_ignore_brakes_a_running_drain() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "brake").await;
    scene.protected_pod().await;
    let agent = scene.seat.ready(&[]).await;
    scene.interrupt(20);
    agent.line("EvictionBlocked").await;
    scene.annotate(RESPONSE, "ignore").await;
    let node = scene.until_released().await;
    assert!(!cordoned(&node) && label(&node, NO_BALANCER).is_none());
    agent.line("released the Node").await;
    let evictions = scene.evictions().await;
    tokio::time::sleep(SECOND * 3).await;
    let asked = scene.requests().await;
    assert_eq!(asked.count("create", "pods/eviction"), evictions);
    assert_eq!(asked.count("delete", "pods") + asked.count("patch", "pods/status"), 0);
    assert_eq!(scene.world.pod_names().await, ["db"]);
}

#[tokio::test]
async fn the_word_cordon_turns_a_drain_into_a_cordon() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "to-cordon").await;
    scene.protected_pod().await;
    let agent = scene.seat.ready(&[]).await;
    scene.interrupt(FAR);
    agent.line("EvictionBlocked").await;
    let id = scene.record().await.unwrap().id;
    scene.annotate(RESPONSE, "cordon").await;
    assert_eq!(scene.until_phase(Phase::Watching).await.id, id);
    let node = scene.get().await;
    assert!(cordoned(&node) && label(&node, NO_BALANCER).is_none());
    let evictions = scene.evictions().await;
    tokio::time::sleep(SECOND * 3).await;
    assert_eq!(scene.evictions().await, evictions);
}

#[tokio::test]
async fn a_malformed_word_is_named_and_not_followed() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::with(cp, "bad-word", json!({"metadata": {"annotations": {RESPONSE: "Ignore!"}}})).await;
    let agent = scene.seat.ready(&[]).await;
    scene.interrupt(FAR);
    scene.until_phase(Phase::Drained).await;
    assert_eq!(agent.count("annotation spotter.dev/response=\"Ignore!\""), 1, "{}", agent.process.output());
}

//! A machine that outlives its deadline gets its node back; one that only waits does not.

use serde_json::json;
use spotter::{cluster::Manager, termination::Phase};

use super::*;
use crate::support::{controlplane, fleet::merge};

const LONG_AGO: i64 = -600;

/// An agent starts on a node with this record, which an earlier process of it left behind, and a pod that stays.
async fn scene_of(cp: &'static ControlPlane, name: &str, ready: i64) -> Scene {
    let scene = Scene::with(cp, name, ready_since(seconds_from_now(ready))).await;
    scene.world.run(&scene.node, NewPod::new("web")).await;
    scene
}

async fn assert_given_back(scene: &Scene, agent: &Running) -> Node {
    agent.line("released the Node").await;
    let node = scene.until_released().await;
    assert!(!owns(&node, "spotter-agent") && label(&node, LABEL).is_none());
    assert_eq!(agent.metric("spotter_cordons_released_total", &[("reason", "expired")]).await, 1.0);
    let asked = scene.requests().await;
    assert_eq!(asked.count("create", "pods/eviction") + asked.count("delete", "pods"), 0);
    node
}

#[tokio::test]
async fn a_machine_that_booted_anew_gets_its_node_back() {
    let Some(cp) = controlplane::shared() else { return };
    for phase in [Phase::Draining, Phase::Drained, Phase::Watching] {
        let scene = scene_of(cp, "booted", -300).await;
        let mut record = scene.interruption(Manager::Agent, phase, seconds_from_now(LONG_AGO));
        record.boot_id = Some("before".into());
        scene.write(&record, false).await;
        let agent = scene.seat.ready(&[]).await;
        assert!(!cordoned(&assert_given_back(&scene, &agent).await), "{phase:?}");
    }
}

#[tokio::test]
async fn a_machine_that_woke_from_hibernation_gets_its_node_back() {
    let Some(cp) = controlplane::shared() else { return };
    for phase in [Phase::Draining, Phase::Drained] {
        let scene = scene_of(cp, "woken", -300).await;
        scene.write(&scene.interruption(Manager::Agent, phase, seconds_from_now(LONG_AGO)), false).await;
        let agent = scene.seat.ready(&[]).await;
        assert!(!cordoned(&assert_given_back(&scene, &agent).await), "{phase:?}");
    }
}

#[tokio::test]
async fn a_notice_that_is_listed_no_more_gives_the_node_back_but_not_a_persons_cordon() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = scene_of(cp, "unlisted", -3600).await;
    scene.cordon().await;
    scene.write(&scene.interruption(Manager::Agent, Phase::Incomplete, seconds_from_now(LONG_AGO)), false).await;
    let agent = scene.seat.ready(&[]).await;
    assert!(cordoned(&assert_given_back(&scene, &agent).await));
}

#[tokio::test]
async fn a_drained_machine_whose_notice_is_still_listed_stays_cordoned() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = scene_of(cp, "waits", -3600).await;
    let deadline = seconds_from_now(LONG_AGO);
    let record = scene.interruption(Manager::Agent, Phase::Drained, deadline);
    scene.write(&record, false).await;
    scene.seat.imds.apply(Change::Spot { action: "terminate".into(), time: deadline });
    let agent = scene.seat.ready(&[]).await;
    scene.idle().await;
    assert_eq!((scene.patches().await, scene.evictions().await), (0, 0), "{}", agent.process.output());
    assert_eq!(scene.record().await, Some(record));
}

#[tokio::test]
async fn a_machine_that_comes_back_under_the_running_agent_gets_its_node_back() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = scene_of(cp, "flips", -3600).await;
    let deadline = seconds_from_now(LONG_AGO);
    scene.write(&scene.interruption(Manager::Agent, Phase::Drained, deadline), false).await;
    scene.seat.imds.apply(Change::Spot { action: "terminate".into(), time: deadline });
    let agent = scene.seat.ready(&[]).await;
    let mut status = ready_since(seconds_from_now(-1));
    merge(&mut status, json!({"status": {"nodeInfo": scene.get().await.status.unwrap().node_info}}));
    let params = PatchParams::default();
    scene.world.nodes().patch_status(&scene.node.name, &params, &Patch::Strategic(status)).await.unwrap();
    assert_given_back(&scene, &agent).await;
    // IMDS goes on listing the notice; it starts nothing again.
    scene.idle().await;
    assert!(scene.record().await.is_none());
}

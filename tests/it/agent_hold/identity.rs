//! Whose Node it is: names are no identity.

use k8s_openapi::api::core::v1::Event;
use kube::{Api, api::ListParams};
use serde_json::json;
use spotter::{cluster::Manager, termination::Phase};

use super::*;
use crate::support::{controlplane, rights::Rights};

const OTHER: &str = "i-0fffffffffffffff1";

fn other_machine() -> Value {
    json!({"spec": {"providerID": format!("aws:///eu-central-1a/{OTHER}")}})
}

/// It ended with 1, and said which Node, which machine it stands for, and which machine this is.
async fn assert_refused(scene: &Scene, agent: &Running, named: &str, this: &str) {
    let status = agent.process.wait(PATIENCE).await;
    assert_eq!(status.code(), Some(1), "{}", agent.process.output());
    for part in [scene.node.name.as_str(), named, this, "refusing to act"] {
        assert!(agent.process.output().contains(part), "{part}: {}", agent.process.output());
    }
}

#[tokio::test]
async fn f30_another_machines_node_is_refused_at_the_start() {
    let Some(cp) = controlplane::shared() else { return };
    let world = World::new(cp, "wrong").await;
    let node = world.node("a").await;
    let access = world.agent(&node, Rights::Node).await;
    let seat = Seat::with(access, &node, OTHER).await;
    let scene = Scene { cp, world, node, seat };
    scene.interrupt(FAR);
    let agent = scene.seat.start(&[]);
    assert_refused(&scene, &agent, &scene.node.instance_id, OTHER).await;
    assert_eq!((scene.patches().await, scene.evictions().await), (0, 0));
}

#[tokio::test]
async fn f30_a_node_that_was_made_again_for_the_same_machine_is_claimed() {
    let Some(cp) = controlplane::shared() else { return };
    let mut scene = Scene::new(cp, "again").await;
    let agent = scene.seat.ready(&[]).await;
    scene.node = scene.world.replace_node(&scene.node, json!({})).await;
    scene.advise();
    scene.until_phase(Phase::Watching).await;
    // And once more while it is held: what was held went with it.
    scene.node = scene.world.replace_node(&scene.node, json!({})).await;
    let record = scene.until_phase(Phase::Watching).await;
    assert_eq!(record.boot_id.as_ref(), Some(&scene.node.boot_id));
    assert!(agent.process.exited().is_none());
    scene.interrupt(FAR);
    scene.until_phase(Phase::Drained).await;
    // People who describe the new Node see what happens to it.
    let events: Api<Event> = Api::namespaced(scene.world.client().clone(), "default");
    let about = ListParams::default().fields(&format!("involvedObject.uid={}", scene.node.uid));
    eventually("an event", PATIENCE, || async {
        let all = events.list(&about).await.expect("a list").items;
        all.iter().any(|event| event.reason.as_deref() == Some("Drained")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn f30_a_node_that_was_made_again_in_a_young_drain_is_drained_with_a_list_of_its_own() {
    let Some(cp) = controlplane::shared() else { return };
    let mut scene = Scene::new(cp, "young").await;
    let _kubelet = scene.world.kubelet(&scene.node);
    scene.world.run(&scene.node, NewPod::new("slow").exits_after(std::time::Duration::from_secs(5))).await;
    let _agent = scene.seat.ready(&[]).await;
    scene.interrupt(FAR);
    scene.until_phase(Phase::Draining).await;
    eventually("it is evicted", PATIENCE, || async { (scene.evictions().await == 1).then_some(()) }).await;
    // Before the Node is watched: the next write finds out.
    scene.node = scene.world.replace_node(&scene.node, json!({})).await;
    scene.seat.imds.apply(Change::TargetState("Terminated".into()));
    scene.until_phase(Phase::Draining).await;
    scene.world.run(&scene.node, NewPod::new("after")).await;
    scene.until_phase(Phase::Drained).await;
    assert_eq!(scene.evictions().await, 2);
}

#[tokio::test]
async fn f30_a_node_that_was_made_again_for_another_machine_is_refused() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "others").await;
    let agent = scene.seat.ready(&[]).await;
    scene.world.replace_node(&scene.node, other_machine()).await;
    scene.cordon().await;
    scene.interrupt(FAR);
    assert_refused(&scene, &agent, OTHER, &scene.node.instance_id).await;
    let node = scene.get().await;
    assert!(cordoned(&node), "a person's");
    assert!(record(&node).is_none() && label(&node, LABEL).is_none());
    assert_eq!(scene.requests().await.only(|r| r.verb == "patch" && r.code == 200).len(), 0);
}

#[tokio::test]
async fn f30_a_held_node_that_became_another_machines_is_refused() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "held-others").await;
    let agent = scene.watching(&[]).await;
    scene.world.replace_node(&scene.node, other_machine()).await;
    assert_refused(&scene, &agent, OTHER, &scene.node.instance_id).await;
    assert!(!cordoned(&scene.get().await));
}

#[tokio::test]
async fn f30_a_conflict_on_a_node_with_another_uid_is_compared_before_it_is_followed() {
    let Some(cp) = controlplane::shared() else { return };
    // The server names the conflict before it looks at the uid.
    let mut scene = Scene::new(cp, "held-uid").await;
    let agent = scene.seat.ready(&[]).await;
    scene.node = scene.world.replace_node(&scene.node, json!({})).await;
    let deadline = seconds_from_now(FAR);
    scene.write(&scene.interruption(Manager::Queue, Phase::Draining, deadline), false).await;
    scene.interrupt(FAR);
    agent.line("following it").await;

    scene.world.replace_node(&scene.node, other_machine()).await;
    assert_refused(&scene, &agent, OTHER, &scene.node.instance_id).await;
    assert_eq!(scene.evictions().await, 0);
}

#[tokio::test]
async fn f30_a_held_node_of_another_machine_is_not_followed() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "held-wrong").await;
    let agent = scene.seat.ready(&[]).await;
    scene.world.replace_node(&scene.node, other_machine()).await;
    scene.write(&scene.interruption(Manager::Queue, Phase::Watching, seconds_from_now(FAR)), false).await;
    scene.interrupt(FAR);
    assert_refused(&scene, &agent, OTHER, &scene.node.instance_id).await;
    let record = scene.record().await.unwrap();
    assert_eq!(record.holder, Manager::Queue);
}

#[tokio::test]
async fn without_a_provider_id_it_waits_and_acts_when_a_notice_comes() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::with(cp, "no-provider", json!({"spec": {"providerID": null}})).await;
    let agent = scene.seat.start(&[]);
    agent.line("has no providerID yet").await;
    scene.idle().await;
    assert_eq!(agent.count("Node found"), 0);
    scene.interrupt(FAR);
    scene.until_phase(Phase::Drained).await;
}

#[tokio::test]
async fn a_claim_without_a_provider_id_is_given_back_when_it_turns_out_wrong() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::with(cp, "late-provider", json!({"spec": {"providerID": null}})).await;
    let agent = scene.seat.start(&[]);
    agent.line("has no providerID yet").await;
    scene.advise();
    scene.until_phase(Phase::Watching).await;
    scene.patch("cloud", other_machine()).await;
    scene.interrupt(FAR);
    assert_refused(&scene, &agent, OTHER, &scene.node.instance_id).await;
    let node = scene.until_released().await;
    assert!(!cordoned(&node));
    assert_eq!(scene.evictions().await, 0);
}

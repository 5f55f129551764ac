//! The other mode holds the node, or takes it over.

use jiff::SignedDuration;
use serde_json::json;
use spotter::{cluster::Manager, termination::Phase};

use super::*;
use crate::support::controlplane;

const QUEUE: &str = "spotter-queue";

async fn assert_taken_over(scene: &Scene, agent: &Running, why: &str) {
    agent.line(why).await;
    let node = scene
        .until("ours, and theirs cleared", |node| {
            record(node).is_some_and(|r| r.holder == Manager::Agent) && !owns(node, QUEUE)
        })
        .await;
    let taken = record(&node).unwrap();
    assert_eq!(taken.taken_over_from, Some(Manager::Queue));
    assert!(cordoned(&node));
    assert_eq!(agent.count("taking over the Node"), 1, "{}", agent.process.output());
}

#[tokio::test]
async fn a_node_that_is_held_is_followed_and_claimed_when_it_is_given_back() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "follow").await;
    let _kubelet = scene.world.kubelet(&scene.node);
    scene.world.run(&scene.node, NewPod::new("web")).await;
    let agent = scene.seat.ready(&[]).await;
    let deadline = seconds_from_now(FAR);
    let theirs = scene.interruption(Manager::Queue, Phase::Draining, deadline);
    scene.write(&theirs, false).await;
    scene.seat.imds.apply(Change::Spot { action: "terminate".into(), time: deadline });
    agent.line("another handler holds the Node; following it").await;
    scene.idle().await;
    assert_eq!((scene.patches().await, scene.evictions().await), (1, 0), "one claim, refused");
    assert_eq!(scene.record().await.unwrap(), theirs);
    assert_eq!(agent.metric("spotter_claim_conflicts_total", &[]).await, 1.0);

    scene.apply(QUEUE, false, json!({})).await;
    let ours = scene.until_phase(Phase::Drained).await;
    assert_eq!((ours.holder, ours.taken_over_from), (Manager::Agent, None));
    assert_eq!(scene.evictions().await, 1);
}

#[tokio::test]
async fn a_drained_node_of_the_other_handler_is_followed_by_a_late_notice() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "follow-late").await;
    scene.world.run(&scene.node, NewPod::new("late")).await;
    let agent = scene.seat.ready(&[]).await;
    let theirs = scene.interruption(Manager::Queue, Phase::Drained, seconds_from_now(FAR));
    scene.write(&theirs, false).await;
    scene.interrupt(FAR - 30);
    agent.line("following it").await;
    scene.idle().await;
    assert_eq!((scene.patches().await, scene.evictions().await), (1, 0));
}

#[tokio::test]
async fn a_drain_over_a_cordon_takes_the_node_over() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "more").await;
    let agent = scene.seat.ready(&[]).await;
    let mut theirs = scene.interruption(Manager::Queue, Phase::Watching, seconds_from_now(FAR));
    (theirs.deadline, theirs.hard) = (None, false);
    scene.write(&theirs, false).await;
    scene.interrupt(FAR);
    assert_taken_over(&scene, &agent, "our notice asks for more").await;
    scene.until_phase(Phase::Drained).await;
    // Refused, forced, theirs cleared, ended; one read between the first two, and none of the writes in vain.
    assert_eq!(scene.patches().await, 4);
}

#[tokio::test]
async fn an_earlier_deadline_takes_over_also_from_a_holder_that_is_followed() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "earlier").await;
    scene.world.run(&scene.node, NewPod::new("web")).await;
    let agent = scene.seat.ready(&["--drain-at-deadline=leave"]).await;
    let theirs = scene.interruption(Manager::Queue, Phase::Draining, seconds_from_now(FAR));
    scene.write(&theirs, false).await;
    scene.interrupt(FAR);
    agent.line("following it").await;
    let deadline = scene.interrupt(FAR - 20);
    assert_taken_over(&scene, &agent, "our notice asks for more").await;
    assert_eq!(scene.record().await.unwrap().deadline, Some(deadline));
    eventually("it is evicted", PATIENCE, || async { (scene.evictions().await == 1).then_some(()) }).await;
}

#[tokio::test]
async fn a_record_of_an_earlier_boot_is_taken_over() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "boot").await;
    let agent = scene.seat.ready(&[]).await;
    let mut theirs = scene.interruption(Manager::Queue, Phase::Drained, seconds_from_now(-3600));
    theirs.boot_id = Some("before".into());
    scene.write(&theirs, false).await;
    scene.interrupt(FAR);
    assert_taken_over(&scene, &agent, "of an earlier boot").await;
    assert_eq!(scene.record().await.unwrap().boot_id.as_ref(), Some(&scene.node.boot_id));
}

#[tokio::test]
async fn a_holder_that_does_nothing_is_taken_over() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "silent").await;
    let _kubelet = scene.world.kubelet(&scene.node);
    scene.world.run(&scene.node, NewPod::new("web")).await;
    let agent = scene.seat.ready(&[]).await;
    let deadline = seconds_from_now(FAR);
    let mut theirs = scene.interruption(Manager::Queue, Phase::Draining, deadline);
    theirs.started_at = Timestamp::now() - SignedDuration::from_secs(13);
    scene.write(&theirs, false).await;
    scene.seat.imds.apply(Change::Spot { action: "terminate".into(), time: deadline });
    agent.line("following it").await;
    assert_taken_over(&scene, &agent, "it does nothing").await;
    scene.until_phase(Phase::Drained).await;
}

#[tokio::test]
async fn a_record_that_says_nothing_is_taken_over() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "nonsense").await;
    let agent = scene.seat.ready(&[]).await;
    scene.apply(QUEUE, false, json!({"metadata": {"annotations": {RECORD: "{}"}}})).await;
    scene.interrupt(FAR);
    assert_taken_over(&scene, &agent, "its record cannot be read").await;
}

#[tokio::test]
async fn the_old_holder_follows_the_one_that_took_over() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "lost").await;
    scene.world.run(&scene.node, NewPod::new("web")).await;
    let agent = scene.watching(&[]).await;
    let theirs = scene.interruption(Manager::Queue, Phase::Draining, seconds_from_now(FAR));
    scene.write(&theirs, true).await;
    scene.apply("spotter-agent", false, json!({})).await;
    agent.line("following it").await;
    assert_eq!(agent.metric("spotter_terminations_active", &[]).await, 0.0);
    // What is withdrawn now was ours once, and is theirs to give back.
    scene.seat.imds.apply(Change::RebalanceGone);
    agent.line("notice withdrawn").await;
    scene.idle().await;
    let node = scene.get().await;
    assert_eq!(record(&node), Some(theirs));
    assert!(cordoned(&node));
    assert_eq!((scene.patches().await, scene.evictions().await), (1, 0));
}

#[tokio::test]
async fn a_release_does_not_give_up_what_another_handler_has_claimed_since() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "fenced").await;
    let _kubelet = scene.world.kubelet(&scene.node);
    scene.world.run(&scene.node, NewPod::new("web").never_exits()).await;
    let agent = scene.seat.ready(&[]).await;
    scene.seat.imds.apply(Change::TargetState("Terminated".into()));
    scene.until_phase(Phase::Draining).await;
    eventually("it is evicted", PATIENCE, || async { (scene.evictions().await == 1).then_some(()) }).await;
    // A young drain does not watch the Node: nothing tells the agent that it was taken over.
    let theirs = scene.interruption(Manager::Queue, Phase::Draining, seconds_from_now(FAR));
    scene.write(&theirs, true).await;
    scene.seat.imds.apply(Change::TargetState("InService".into()));
    agent.line("following it").await;
    scene.idle().await;
    let node = scene.get().await;
    assert_eq!(record(&node), Some(theirs));
    assert!(cordoned(&node) && label(&node, LABEL).is_some());
    assert_eq!(agent.count("released the Node"), 0);
}

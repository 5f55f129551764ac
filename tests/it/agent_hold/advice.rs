//! A rebalance recommendation: a cordon that is watched, becomes a drain, or ends.

use spotter::{notice::Kind, termination::Phase};

use super::*;
use crate::support::controlplane;

#[tokio::test]
async fn f18_advice_cordons_and_never_evicts() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "advice").await;
    scene.world.run(&scene.node, NewPod::new("web")).await;
    let agent = scene.watching(&[]).await;
    scene.idle().await;
    let node = scene.get().await;
    assert!(cordoned(&node));
    assert_eq!(label(&node, LABEL), Some("rebalance-recommendation"));
    assert_eq!(label(&node, NO_BALANCER), None);
    assert_eq!(record(&node).unwrap().deadline, None);
    let asked = scene.requests().await;
    assert_eq!(asked.count("patch", "nodes"), 1);
    assert_eq!(asked.count("create", "pods/eviction") + asked.count("list", "pods") + asked.count("watch", "pods"), 0);
    assert_eq!(agent.metric("spotter_terminations_active", &[("phase", "watching")]).await, 1.0);
}

#[tokio::test]
async fn advice_becomes_an_interruption_of_the_same_termination() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "advice-spot").await;
    let kubelet = scene.world.kubelet(&scene.node);
    scene.world.run(&scene.node, NewPod::new("web").grace(600).never_exits()).await;
    let agent = scene.watching(&[]).await;
    let first = scene.record().await.unwrap();
    let deadline = scene.interrupt(FAR);
    let second = scene.until_phase(Phase::Draining).await;
    assert_eq!((second.id, second.started_at), (first.id, first.started_at));
    assert_eq!((second.deadline, second.hard), (Some(deadline), true));
    assert_eq!(second.kinds, [Kind::SpotInterruption]);
    assert_eq!(second.notices.len(), 2);
    let node = scene.get().await;
    assert!(cordoned(&node));
    assert_eq!((label(&node, LABEL), label(&node, NO_BALANCER)), (Some("spot-interruption"), Some("")));
    let stop = eventually("it is told to stop", PATIENCE, || async { kubelet.stops().pop() }).await;
    assert!(stop.grace() < FAR, "{}", stop.grace());
    assert_eq!(scene.evictions().await, 1);
    assert_eq!(agent.count("drain started"), 1);
}

#[tokio::test]
async fn f9_f17_advice_without_an_interruption_is_given_back_once() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "advice-ends").await;
    let agent = scene.watching(&["--rebalance-release-after=2s"]).await;
    let node = scene.until_released().await;
    assert!(!cordoned(&node) && label(&node, LABEL).is_none());
    assert!(!owns(&node, "spotter-agent"));
    assert_eq!(agent.metric("spotter_cordons_released_total", &[("reason", "expired")]).await, 1.0);
    let patches = scene.patches().await;
    assert_eq!(patches, 3, "the claim, and the release under both names");

    // IMDS lists it for ever; nothing is done about it again, not after a restart either.
    scene.idle().await;
    agent.stop().await;
    let again = scene.seat.ready(&["--rebalance-release-after=2s"]).await;
    again.line("the advice is older than rebalance-release-after").await;
    scene.idle().await;
    assert_eq!(scene.patches().await, patches);
    assert_eq!(again.count("notice not acted on"), 1);
    assert_eq!(again.metric("spotter_cordons_released_total", &[]).await, 0.0);
}

#[tokio::test]
async fn f4_the_same_notice_read_again_and_again_is_one_termination() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "again").await;
    let agent = scene.seat.ready(&[]).await;
    scene.advise();
    scene.seat.imds.apply(Change::TargetState("Terminated".into()));
    scene.interrupt(FAR);
    scene.until_phase(Phase::Drained).await;
    scene.idle().await;
    let patches = scene.patches().await;
    scene.idle().await;
    assert_eq!(scene.patches().await, patches);
    assert_eq!(agent.count("drain started"), 1, "{}", agent.process.output());
    assert_eq!(agent.count("termination finished"), 1);
}

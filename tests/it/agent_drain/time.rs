//! Deadlines: soft ones, hard ones, one that becomes the other, near ones and past ones.

use std::time::Duration;

use serde_json::json;

use crate::{
    agent_drain::stage::{PATIENCE, Stage, assert_well},
    support::{
        controlplane::{ControlPlane, shared},
        eventually,
        fleet::{Budget, NewPod},
    },
};

#[tokio::test]
async fn a_closer_deadline_shortens_what_would_outlast_it_and_nothing_else() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "closer").await;
    for (name, grace) in [("long-0", 600), ("long-1", 300), ("short-0", 20)] {
        stage.world.run(&stage.node, NewPod::new(name).grace(grace).never_exits()).await;
    }
    let spotter = stage.started(&[]).await;
    stage.scale_in();
    eventually("all are told to stop", PATIENCE, || async { (stage.kubelet.stops().len() == 3).then_some(()) }).await;
    for (name, own) in [("long-0", 600), ("long-1", 300), ("short-0", 20)] {
        assert_eq!(stage.kubelet.stop(name).unwrap().graces, [own], "{name}: its own under a soft deadline");
    }
    let deadline = stage.interrupt(30);
    eventually("the long ones are told again", PATIENCE, || async {
        let twice = |name| stage.kubelet.stop(name).is_some_and(|stop| stop.graces.len() == 2);
        (twice("long-0") && twice("long-1")).then_some(())
    })
    .await;
    for name in ["long-0", "long-1"] {
        let stop = stage.kubelet.stop(name).unwrap();
        assert!(stop.kill_at < deadline && stop.grace() > 15, "{stop:?} {deadline}");
    }
    let record = stage.record().await.unwrap();
    assert_eq!(record["kinds"], json!(["spot-interruption", "asg-termination"]), "{record}");
    let asked = stage.asked().await.of("create", "pods/eviction");
    assert_eq!(asked.len(), 5, "the short one fits");
    assert_eq!(asked.only(|request| request.name == "short-0").len(), 1);
    // The process is killed rather than waited for: the rest is shown elsewhere.
    assert_well(&spotter);
}

#[tokio::test]
async fn a_soft_deadline_sends_no_grace_and_reports_what_is_left() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "soft").await;
    stage.world.run(&stage.node, NewPod::new("web-0").grace(600)).await;
    stage.world.run(&stage.node, NewPod::new("stuck-0")).await;
    stage.world.run(&stage.node, NewPod::new("slow").grace(600).never_exits()).await;
    stage.world.budget("stuck", "stuck", Budget::MinAvailable(1)).await;
    let spotter = stage.started(&[]).await;
    stage.maintain(14);
    let record = stage.phase("incomplete").await;
    let full = |name: &str| format!("{}/{name}", stage.world.namespace);
    let mut left: Vec<_> =
        record["outcome"]["left"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    left.sort_unstable();
    assert_eq!(left, [full("slow"), full("stuck-0")], "{record}");
    assert_eq!((&record["outcome"]["pods"], &record["outcome"]["gone"]), (&json!(3), &json!(1)));
    for name in ["web-0", "slow"] {
        assert_eq!(stage.kubelet.stop(name).unwrap().graces, [600], "{name}: its own");
    }
    assert!(stage.kubelet.stop("stuck-0").is_none(), "left in peace");
    let message = stage.event(&stage.node.name, "PodsLeft").await;
    assert!(message.contains(&full("slow")) && message.contains(&full("stuck-0")), "{message}");
    assert!(stage.event("stuck-0", "LeftAtDeadline").await.contains("budget stuck"));
    assert_eq!(stage.asked().await.count("delete", "pods"), 0);
    let metrics = stage.metrics().await;
    assert_eq!(
        metrics.metric("spotter_terminations_total", &[("kind", "scheduled-maintenance"), ("outcome", "left_pods")]),
        Some(1.0)
    );
    assert_eq!(metrics.metric("spotter_pods_total", &[("outcome", "left")]), Some(2.0));

    // The interruption that follows takes up what was left.
    let deadline = stage.interrupt(12);
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["deleted"], 1, "{record}");
    for name in ["slow", "stuck-0"] {
        let stop = stage.kubelet.stop(name).unwrap();
        assert!(stop.exited.is_some_and(|at| at < deadline), "{stop:?} {deadline}");
    }
    assert_well(&spotter);
}

#[tokio::test]
async fn f15_a_notice_in_the_past_and_one_that_ends_in_three_seconds() {
    let Some(cp) = shared() else { return };
    tokio::join!(near(cp, "past", -5, 1), near(cp, "three", 4, 2));
}

/// The machine answers, so it lives: what can be done is done, with `most` seconds of grace.
async fn near(cp: &ControlPlane, name: &str, seconds: i64, most: i64) {
    let stage = Stage::new(cp, name).await;
    stage.world.run_many(&stage.node, 3, |i| NewPod::new(format!("web-{i}")).grace(60)).await;
    stage.world.run(&stage.node, NewPod::new("deaf").grace(60).never_exits()).await;
    stage.world.run(&stage.node, NewPod::new("stuck-0").grace(60)).await;
    stage.world.budget("stuck", "stuck", Budget::MinAvailable(1)).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(seconds);
    let record = stage.phase("drained").await;
    assert_eq!((&record["outcome"]["gone"], &record["outcome"]["deleted"]), (&json!(5), &json!(1)), "{name}: {record}");
    for stop in stage.kubelet.ended(5, PATIENCE).await {
        assert!((1..=most).contains(&stop.grace()), "{name}: {stop:?}");
    }
    assert_well(&spotter);
}

#[tokio::test]
async fn a_notice_that_is_long_past_is_refused_with_a_reason() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "stale").await;
    stage.world.run(&stage.node, NewPod::new("web-0")).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(-3600);
    spotter.wait_for_line("notice not acted on", PATIENCE).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(stage.record().await.is_none() && stage.kubelet.stops().is_empty());
    let dropped = stage.metrics().await.metric("spotter_notices_dropped_total", &[("reason", "filtered")]);
    assert_eq!(dropped, Some(1.0), "once, however often it is read");
    assert_well(&spotter);
}

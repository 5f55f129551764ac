//! Which pods go: each is judged alone, as the real server shows it.

use crate::{
    agent_drain::stage::{PATIENCE, Stage, assert_well},
    support::{controlplane::shared, eventually, fleet::NewPod},
};

#[tokio::test]
async fn f32_odd_pods_do_not_stop_the_others() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "odd").await;
    let annotated = |name: &str, word: &str| NewPod::new(name).annotation("spotter.dev/evict", word);
    for pod in [
        NewPod::new("mirror").mirror(),
        NewPod::new("daemon").daemon_set(),
        NewPod::new("own"),
        NewPod::new("succeeded").job().phase("Succeeded"),
        NewPod::new("failed").job().phase("Failed"),
        annotated("never", "never"),
        annotated("first", "first"),
        annotated("last", "last"),
        annotated("nonsense", "if you like"),
        NewPod::new("scratch").empty_dir(),
        NewPod::new("bare").unmanaged(),
        NewPod::new("pending").phase("Pending"),
        NewPod::new("plain"),
        NewPod::new("urgent").priority(100_000),
        NewPod::new("zero").grace(0),
    ] {
        stage.world.run(&stage.node, pod).await;
    }
    let own = ["--pod-name", "own", "--pod-namespace", &stage.world.namespace];
    // One at a time, so that the order can be seen.
    let spotter = stage.started(&[&own[..], &["--drain-max-in-flight", "1", "--log-level", "debug"]].concat()).await;
    stage.interrupt(120);
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["pods"], 9, "{record}");
    assert_eq!(
        stage.world.pod_names().await,
        ["daemon", "failed", "mirror", "never", "own", "succeeded"],
        "{}",
        spotter.output()
    );
    let evicted: Vec<_> = stage.asked().await.of("create", "pods/eviction").iter().map(|r| r.name.clone()).collect();
    assert_eq!(evicted.len(), 9, "{evicted:?}");
    let place = |name: &str| evicted.iter().position(|pod| pod == name).expect("evicted");
    assert_eq!((place("first"), place("last")), (0, 8), "{evicted:?}");
    assert_eq!(place("urgent"), 7, "what is important goes late: {evicted:?}");
    assert_eq!(stage.kubelet.stop("zero").map(|stop| stop.grace()), Some(1), "never 0, which would skip the process");
    assert!(stage.event("nonsense", "BadAnnotation").await.contains("if you like"));
    let output = spotter.output();
    for reason in [
        "mirror pod",
        "owned by a DaemonSet",
        "this process runs in it",
        "finished",
        "annotated spotter.dev/evict=never",
    ] {
        assert!(output.contains(&format!("left alone: {reason}")), "{reason} in {output}");
    }
    assert_eq!(stage.metrics().await.metric("spotter_pods_total", &[("outcome", "skipped")]), Some(7.0));
    assert_well(&spotter);
}

#[tokio::test]
async fn f32_skipped_by_choice() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "skip").await;
    stage.world.run(&stage.node, NewPod::new("scratch").empty_dir()).await;
    stage.world.run(&stage.node, NewPod::new("bare").unmanaged()).await;
    stage.world.run(&stage.node, NewPod::new("plain")).await;
    let spotter = stage.started(&["--drain-empty-dir", "skip", "--drain-unmanaged", "skip", "--events=false"]).await;
    stage.interrupt(60);
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["pods"], 1, "{record}");
    assert_eq!(stage.world.pod_names().await, ["bare", "scratch"]);
    let output = spotter.output();
    assert!(output.contains("drain-empty-dir=skip") && output.contains("drain-unmanaged=skip"), "{output}");
    assert_eq!(cp.audit().agent(&stage.node.name).await.count("create", "events"), 0, "they are off");
    assert_well(&spotter);
}

/// A Job's finalizer keeps the objects; their containers have ended. A pod bound late is seen on the same watch.
#[tokio::test]
async fn finalizers_late_pods_and_pods_that_others_delete() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "late").await;
    let long = std::time::Duration::from_secs(3);
    stage.world.run(&stage.node, NewPod::new("kept").job().finalizer("test/kept")).await;
    stage.world.run(&stage.node, NewPod::new("killed").job().grace(1).never_exits().finalizer("test/kept")).await;
    stage.world.run(&stage.node, NewPod::new("others").exits_after(long).grace(20)).await;
    stage.world.pods().delete("others", &Default::default()).await.unwrap();
    let spotter = stage.started(&[]).await;
    stage.interrupt(60);
    spotter.wait_for_line("drain started", PATIENCE).await;
    stage.world.run(&stage.node, NewPod::new("bound-late").exits_after(std::time::Duration::from_secs(1))).await;
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["pods"], 4, "{record}");
    assert_eq!(stage.world.pod_names().await, ["kept", "killed"]);
    assert!(stage.kubelet.stop("others").unwrap().exited.is_some(), "it was waited for");
    // After the end, too: the node still lives.
    stage.world.run(&stage.node, NewPod::new("after-the-end").exits_after(std::time::Duration::from_secs(1))).await;
    eventually("it is gone", PATIENCE, || async { (stage.world.pod_names().await.len() == 2).then_some(()) }).await;
    let asked = stage.asked().await;
    let lists = asked.only(|r| r.verb == "list" || r.uri.contains("sendInitialEvents"));
    assert_eq!(lists.len(), 1, "{:?}", asked.summary());
    assert_eq!(asked.count("create", "pods/eviction"), 4, "none for what somebody else deleted");
    assert_well(&spotter);
}

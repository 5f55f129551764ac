//! The drain against a real API server, with the agent's own rights: what is asked, in which order, and how it ends.

mod budgets;
mod ends;
mod rights;
mod server;
mod sorts;
mod stage;
mod time;

use std::{collections::BTreeMap, time::Duration};

use serde_json::json;
use spotter::rehearsal::imds::Fault;

use crate::support::{audit::Request, controlplane::shared, eventually, fleet::NewPod, process::http};
use stage::{PATIENCE, Stage, assert_well};

#[tokio::test]
async fn f20_f26_f27_a_full_node_costs_113_requests_and_every_number_is_true() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "full").await;
    let graces = [5, 30, 60, 600];
    stage.world.run_many(&stage.node, 110, |i| NewPod::new(format!("web-{i}")).grace(graces[i % 4])).await;
    let spotter = stage.started(&[]).await;
    let series = |text: &str| {
        let samples = text.lines().filter(|line| line.starts_with("spotter_") && !line.starts_with("spotter_imds"));
        samples
            .filter_map(|line| line.rsplit_once(' '))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    };
    let before: BTreeMap<String, String> = series(&stage.metrics().await.body);
    stage.interrupt(120);
    spotter.wait_for_line("termination finished", PATIENCE).await;
    let record = stage.phase("drained").await;
    assert_eq!((&record["outcome"]["pods"], &record["outcome"]["gone"]), (&json!(110), &json!(110)));
    assert!(record["outcome"].get("left").is_none() && record["hard"] == true, "{record}");
    let stops = stage.kubelet.ended(110, PATIENCE).await;
    for stop in &stops {
        let own = graces[stop.name.strip_prefix("web-").unwrap().parse::<usize>().unwrap() % 4];
        assert!(stop.graces.len() == 1 && stop.grace() <= own.min(118).try_into().unwrap(), "{stop:?}");
    }

    // A busy server ends a watch that it cannot feed fast enough; such a one goes on where it was, and lists nothing.
    let goes_on = |r: &Request| r.verb == "watch" && !r.uri.contains("sendInitialEvents");
    let asked = stage.asked().await.only(|request| !goes_on(request));
    let expected: BTreeMap<_, _> =
        [("get nodes", 1), ("patch nodes", 2), ("watch pods", 1), ("create pods/eviction", 110)].into();
    assert_eq!(asked.summary(), expected.into_iter().map(|(name, count)| (name.to_owned(), count)).collect());
    let evictions = asked.of("create", "pods/eviction");
    assert!(evictions.iter().all(|request| request.code == 201));
    let applies = asked.of("patch", "nodes");
    assert!(applies[0].answered < evictions[0].received, "nothing is evicted before the claim");
    assert!(applies[1].received > evictions.iter().map(|request| request.answered).max().unwrap());

    let metrics = stage.metrics().await;
    let kind = ("kind", "spot-interruption");
    for (name, labels, value) in [
        ("spotter_evictions_total", vec![("result", "accepted")], 110.0),
        ("spotter_evictions_total", vec![], 110.0),
        ("spotter_terminations_total", vec![kind, ("outcome", "drained")], 1.0),
        ("spotter_terminations_total", vec![], 1.0),
        ("spotter_pods_total", vec![("outcome", "evicted")], 110.0),
        // The agent's own pod, which a DaemonSet owns.
        ("spotter_pods_total", vec![("outcome", "skipped")], 1.0),
        ("spotter_pods_total", vec![], 111.0),
        ("spotter_pods_blocked", vec![], 0.0),
        ("spotter_terminations_active", vec![kind, ("phase", "drained")], 1.0),
        ("spotter_terminations_active", vec![], 1.0),
        ("spotter_termination_margin_seconds_count", vec![kind], 1.0),
    ] {
        assert_eq!(metrics.metric(name, &labels), Some(value), "{name} {labels:?}");
    }
    for stage in ["seen", "cordoned", "first_eviction", "last_eviction", "drained"] {
        let count = metrics.metric("spotter_termination_stage_seconds_count", &[kind, ("stage", stage)]);
        assert_eq!(count, Some(1.0), "{stage}");
    }
    let after = series(&metrics.body);
    let calls = |name: &str| name.starts_with("spotter_kubernetes_requests");
    for name in after.keys().filter(|name| !calls(name)) {
        assert!(before.contains_key(name), "{name} did not exist at the start");
    }
    for name in ["spotter_evictions_total", "spotter_terminations_total", "spotter_pods_total"] {
        assert!(before.iter().all(|(series, value)| !series.starts_with(name) || value == "0"), "{before:?}");
    }
    for word in [stage.node.name.as_str(), &stage.node.instance_id, "web-", &stage.world.namespace] {
        assert!(!metrics.body.contains(word), "{word} in a label");
    }
    for method in ["POST", "PUT", "DELETE"] {
        for path in ["/metrics", "/drain", "/livez"] {
            let code = http(stage.admin, method, path, &[]).await.unwrap().code;
            assert!(matches!(code, 404 | 405), "{method} {path}: {code}");
        }
    }
    assert_well(&spotter);
}

#[tokio::test]
async fn an_idle_agent_asks_nothing() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "idle").await;
    stage.world.run(&stage.node, NewPod::new("web")).await;
    let spotter = stage.started(&[]).await;
    let mark = cp.audit().mark().await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let asked = cp.audit().agent_since(&stage.node.name, mark).await;
    assert!(asked.is_empty(), "{:?}", asked.summary());
    assert_well(&spotter);
}

/// Fewer requests at a time are allowed than there are pods: a dry run names them all nevertheless.
#[tokio::test]
async fn f8_a_dry_run_writes_nothing_and_names_every_pod() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "dry").await;
    stage.world.run_many(&stage.node, 12, |i| NewPod::new(format!("web-{i}")).grace(600)).await;
    stage.world.run(&stage.node, NewPod::new("odd").annotation("spotter.dev/evict", "perhaps")).await;
    let before = stage.world.get_node(&stage.node).await;
    let spotter = stage.started(&["--dry-run", "--drain-max-in-flight", "4"]).await;
    stage.imds.apply(spotter::rehearsal::imds::Change::Rebalance { noticed_at: jiff::Timestamp::now() });
    spotter.wait_for_line("dry run: would write the record", PATIENCE).await;
    stage.interrupt(120);
    spotter.wait_for_line("dry run: nothing was changed", PATIENCE).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let output = spotter.output();
    assert_eq!(output.matches("dry run: would evict").count(), 13, "{output}");
    for part in ["phase=\"watching\"", "phase=\"draining\"", "/web-11", "left alone: owned by a DaemonSet", "perhaps"] {
        assert!(output.contains(part), "{part} in {output}");
    }
    assert_eq!(stage.world.get_node(&stage.node).await, before);
    assert!(stage.kubelet.stops().is_empty());
    spotter.terminate();
    assert!(spotter.wait(PATIENCE).await.success(), "{}", spotter.output());
    let asked = cp.audit().agent(&stage.node.name).await;
    assert!(
        !asked.is_empty() && asked.iter().all(|r| matches!(r.verb.as_str(), "get" | "list" | "watch")),
        "{asked:?}"
    );
}

#[tokio::test]
async fn the_metadata_service_may_die_after_the_notice() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "imds-down").await;
    stage.world.run_many(&stage.node, 5, |i| NewPod::new(format!("web-{i}")).exits_after(Duration::from_secs(2))).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(60);
    eventually("pods are told to stop", PATIENCE, || async { (!stage.kubelet.stops().is_empty()).then_some(()) }).await;
    stage.imds.fault("*", Fault::Status(500));
    stage.phase("drained").await;
    assert_eq!(stage.answers("accepted").await, 5.0);
    assert_well(&spotter);
}

/// The server stands still while 30 evictions are on their way: they are answered before the agent goes.
#[tokio::test]
async fn f21_sigterm_lets_evictions_be_answered() {
    if !crate::support::controlplane::available() {
        return;
    }
    let cp = crate::support::controlplane::ControlPlane::start(Default::default());
    let stage = Stage::new(&cp, "sigterm").await;
    stage
        .world
        .run_many(&stage.node, 30, |i| NewPod::new(format!("web-{i}")).exits_after(Duration::from_secs(5)))
        .await;
    let spotter = stage.started(&["--log-level", "debug"]).await;
    stage.interrupt(60);
    spotter.wait_for_line("listed the pods of the node", PATIENCE).await;
    cp.freeze();
    spotter.terminate();
    tokio::time::sleep(Duration::from_millis(300)).await;
    cp.thaw();
    let status = spotter.wait(PATIENCE).await;
    assert!(status.success() && !spotter.output().contains("panicked"), "{}", spotter.output());
    let asked = stage.asked().await.of("create", "pods/eviction");
    assert_eq!(asked.len(), 30, "none is left out, none is sent twice");
    assert_eq!(stage.record().await.expect("a record")["phase"], "draining", "the next process goes on");
    let again = stage.started(&[]).await;
    stage.phase("drained").await;
    assert_well(&again);
    assert_eq!(stage.asked().await.count("create", "pods/eviction"), 30, "what is stopping is not asked again");
}

//! The tests' own machinery does what tests believe of it.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

use crate::support::{
    bare,
    controlplane::{ControlPlane, Options, available, shared},
    eventually,
    fleet::{NewPod, World},
    imds::MetadataMock,
    keeper::keeper,
    process::http_get,
    rights::Rights,
};

const VICTIM: &str = "SPOTTER_TEST_VICTIM";

/// Plays the test process that is killed: starts a child, says where everything is, and waits. Only when asked to.
#[test]
fn victim() {
    if std::env::var_os(VICTIM).is_none() {
        return;
    }
    let mut child = keeper().spawn(Command::new("sleep").arg("600"));
    println!("\nVICTIM {} {}", child.id(), keeper().dir().display());
    child.wait().unwrap();
}

#[tokio::test]
async fn a_killed_test_process_leaves_nothing_behind() {
    let mut tests = Command::new(std::env::current_exe().unwrap())
        .args(["controlplane::harness::victim", "--exact", "--nocapture"])
        .env(VICTIM, "1")
        .env_remove("KUBEBUILDER_ASSETS")
        .env_remove("SPOTTER_REQUIRE_REAL")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(tests.stdout.take().unwrap()).lines().map_while(Result::ok);
    let words =
        lines.filter_map(|line| line.strip_prefix("VICTIM ").map(str::to_owned)).next().expect("the victim's line");
    let (pid, dir) = words.split_once(' ').unwrap();
    let running = || Path::new("/proc").join(pid).join("exe").exists();
    assert!(running() && Path::new(dir).is_dir());
    tests.kill().unwrap();
    tests.wait().unwrap();
    eventually("the child and the directory are gone", Duration::from_secs(10), || async {
        (!running() && !Path::new(dir).exists()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_kubelet_ends_pods_as_they_were_told() {
    let Some(cp) = shared() else { return };
    let world = World::new(cp, "kubelet").await;
    let node = world.node("a").await;
    let kubelet = world.kubelet(&node);
    world.run(&node, NewPod::new("quick").grace(20)).await;
    world.run(&node, NewPod::new("stubborn").grace(1).never_exits()).await;
    world.run(&node, NewPod::new("held").job().finalizer("test/held")).await;
    world.run(&node, NewPod::new("bystander")).await;
    let pods = world.pods();
    for name in ["quick", "stubborn", "held"] {
        pods.delete(name, &DeleteParams::default()).await.unwrap();
    }
    kubelet.ended(3, Duration::from_secs(10)).await;
    let quick = kubelet.stop("quick").unwrap();
    assert_eq!((quick.grace(), quick.sigkilled), (20, false));
    let stubborn = kubelet.stop("stubborn").unwrap();
    assert_eq!((stubborn.grace(), stubborn.sigkilled), (1, true));
    assert!(kubelet.stop("bystander").is_none());
    eventually("only the held pod's object stays, finished", Duration::from_secs(5), || async {
        let phase = pods.get("held").await.unwrap().status.unwrap().phase;
        (phase.as_deref() == Some("Succeeded") && world.pod_names().await == ["bystander", "held"]).then_some(())
    })
    .await;
}

#[tokio::test]
async fn every_sort_of_pod_can_be_made() {
    let Some(cp) = shared() else { return };
    let world = World::new(cp, "sorts").await;
    let node = world.node("a").await;
    let mirror = world.run(&node, NewPod::new("mirror").mirror()).await;
    assert!(mirror.metadata.annotations.unwrap().contains_key("kubernetes.io/config.mirror"));
    assert_eq!(world.run(&node, NewPod::new("urgent").priority(5000)).await.spec.unwrap().priority, Some(5000));
    let critical = NewPod::new("critical").daemon_set().priority_class("system-node-critical");
    assert_eq!(world.run(&node, critical).await.spec.unwrap().priority, Some(2_000_001_000));
    world.run(&node, NewPod::new("scratch").empty_dir().unmanaged()).await;
    let done = world.run(&node, NewPod::new("done").phase("Succeeded")).await;
    assert_eq!(done.status.unwrap().phase.as_deref(), Some("Succeeded"));
    let new = world.replace_node(&node, json!({})).await;
    assert!(new.uid != node.uid && new.boot_id != node.boot_id && new.name == node.name);
}

#[tokio::test]
async fn a_full_node_is_evicted_by_the_bare_client_and_the_audit_log_tells() {
    let Some(cp) = shared() else { return };
    let world = World::new(cp, "bare").await;
    let node = world.node("a").await;
    world.run_many(&node, 110, |i| NewPod::new(format!("web-{i}"))).await;
    let kubelet = world.kubelet(&node);
    let agent = world.agent(&node, Rights::Node).await;
    let mut config = agent.config().await;
    config.auth_info.impersonate = Some(format!("system:node:{}", node.name));
    let took = bare::evict_all(&config, &node.name, &world.namespace).await;
    assert_eq!(took.evictions, 110);
    let audit = cp.audit().agent(&node.name).await;
    assert_eq!(audit.count("patch", "nodes"), 1);
    assert_eq!(audit.count("list", "pods"), 1);
    assert_eq!(audit.count("create", "pods/eviction"), 110);
    audit.assert_order(("patch", "nodes"), ("create", "pods/eviction"));
    kubelet.ended(110, Duration::from_secs(20)).await;
    world.empty(Duration::from_secs(20)).await;
}

#[tokio::test]
async fn the_api_server_can_freeze_and_restart() {
    if !available() {
        return;
    }
    let cp =
        ControlPlane::start(Options { apiserver_args: vec!["--goaway-chance=0.02".to_owned()], ..Options::default() });
    let world = World::new(&cp, "restart").await;
    let node = world.node("a").await;
    cp.freeze();
    let cordon = Patch::Merge(json!({"spec": {"unschedulable": true}}));
    let nodes = world.nodes();
    let params = PatchParams::default();
    let patch = nodes.patch(&node.name, &params, &cordon);
    assert!(tokio::time::timeout(Duration::from_millis(500), patch).await.is_err(), "nobody answers");
    cp.thaw();
    cp.kill_apiserver();
    assert!(nodes.get(&node.name).await.is_err(), "nobody listens");
    cp.restart_apiserver();
    assert_eq!(world.get_node(&node).await.metadata.uid, Some(node.uid));
    let dir = cp.dir().to_owned();
    drop(cp);
    assert!(!dir.exists());
}

#[tokio::test]
async fn the_metadata_mock_speaks_of_this_node() {
    let Some(cp) = shared() else { return };
    let world = World::new(cp, "imds").await;
    let node = world.node("a").await;
    let imds = MetadataMock::spot(&node, Duration::ZERO, Duration::from_secs(120)).await;
    assert_eq!(imds.get("instance-id").await.as_deref(), Some(node.instance_id.as_str()));
    assert_eq!(imds.get("placement/region").await.as_deref(), Some("eu-central-1"));
    let action = imds.get("spot/instance-action").await.expect("a notice");
    assert!(action.contains("terminate"), "{action}");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(imds.get("spot/instance-action").await, Some(action), "the time is fixed");
    assert_eq!(http_get(imds.address, "/latest/meta-data/instance-id").await.unwrap().code, 401);
}

//! The claim, its record, and what can be in its way.

use serde_json::json;
use spotter::{cluster::Manager, notice::Kind, termination::Phase};

use super::*;
use crate::support::{
    controlplane,
    process::http_get,
    rights::{Rights, apply},
};

#[tokio::test]
async fn the_claim_is_the_first_request_and_the_record_tells_everything() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "claim").await;
    let kubelet = scene.world.kubelet(&scene.node);
    scene.world.run_many(&scene.node, 3, |i| NewPod::new(format!("web-{i}"))).await;
    let agent = scene.seat.ready(&["--events=false"]).await;
    let before = cp.audit().mark().await;
    let deadline = scene.interrupt(FAR);

    let record = scene.until_phase(Phase::Drained).await;
    let node = scene.get().await;
    assert!(cordoned(&node));
    assert_eq!(label(&node, LABEL), Some("spot-interruption"));
    assert_eq!(label(&node, NO_BALANCER), Some(""));
    assert_eq!((record.holder, &record.kinds[..]), (Manager::Agent, &[Kind::SpotInterruption][..]));
    assert_eq!((record.deadline, record.hard), (Some(deadline), true));
    assert_eq!(record.boot_id.as_ref(), Some(&scene.node.boot_id));
    assert!(record.id.starts_with(&scene.node.instance_id), "{}", record.id);
    assert!(record.started_at < Timestamp::now() && record.notices.len() == 1);
    let outcome = record.outcome.unwrap();
    assert_eq!((outcome.pods, outcome.gone, outcome.deleted, outcome.left.len()), (3, 3, 0, 0));
    assert_eq!(kubelet.stops().len(), 3);

    scene.idle().await;
    let asked = cp.audit().agent_since(&scene.node.name, before).await;
    assert_eq!((asked[0].verb.as_str(), asked[0].resource.as_str(), asked[0].code), ("patch", "nodes", 200));
    assert_eq!(asked.count("patch", "nodes"), 2, "the claim and the end: {:?}", asked.summary());
    assert_eq!(asked.count("create", "pods/eviction"), 3);
    assert_eq!(asked.count("get", "nodes") + asked.count("watch", "nodes"), 0, "{:?}", asked.summary());
    assert_eq!(agent.metric("spotter_terminations_total", &[("outcome", "drained")]).await, 1.0);
    agent.stop().await;
    assert_eq!(scene.record().await.unwrap().phase, Phase::Drained);
}

#[tokio::test]
async fn a_field_that_gitops_owns_is_taken_by_force() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "gitops").await;
    scene.apply("gitops", false, json!({"spec": {"unschedulable": false}})).await;
    let agent = scene.seat.ready(&[]).await;
    scene.interrupt(FAR);
    scene.until_phase(Phase::Drained).await;
    assert!(cordoned(&scene.get().await));
    assert_eq!(agent.metric("spotter_claim_conflicts_total", &[]).await, 1.0);
    assert_eq!(agent.count("taking over a field of the Node"), 1, "{}", agent.process.output());
    agent.line("gitops").await;
    assert_eq!(scene.patches().await, 3, "refused, forced, ended");
}

#[tokio::test]
async fn a_malformed_record_is_named_and_replaced() {
    let Some(cp) = controlplane::shared() else { return };
    let scene =
        Scene::with(cp, "malformed", json!({"metadata": {"annotations": {RECORD: "{\"v\":1,\"id\":3}"}}})).await;
    let agent = scene.seat.ready(&[]).await;
    agent.line("annotation spotter.dev/termination: invalid type").await;
    assert_eq!(scene.patches().await, 0);
    scene.interrupt(FAR);
    scene.until_phase(Phase::Drained).await;
}

#[tokio::test]
async fn without_the_right_to_patch_it_names_the_right_and_goes_on_once_it_is_granted() {
    let Some(cp) = controlplane::shared() else { return };
    let world = World::new(cp, "forbidden").await;
    let node = world.node("a").await;
    let access = world.agent_without(&node, Rights::Node, &[("nodes", "patch")]).await;
    let seat = Seat::with(access, &node, &node.instance_id).await;
    let scene = Scene { cp, world, node, seat };
    scene.world.run(&scene.node, NewPod::new("web")).await;
    let agent = scene.seat.ready(&[]).await;
    scene.interrupt(FAR);
    agent.line("not allowed to patch nodes").await;
    assert!(agent.process.exited().is_none());
    assert_eq!(scene.evictions().await, 0, "nothing before the claim");

    let account = format!("spotter-agent-{}", scene.node.name);
    let name = format!("{account}-granted");
    let (group, version) = ("rbac.authorization.k8s.io", "rbac.authorization.k8s.io/v1");
    let rules = json!([{"apiGroups": [""], "resources": ["nodes"], "verbs": ["impersonate-on:associated-node:patch"]}]);
    let role = json!({"apiVersion": version, "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules});
    let binding = json!({"apiVersion": version, "kind": "ClusterRoleBinding", "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": "kube-system"}]});
    for object in [role, binding] {
        apply(scene.world.client(), &object).await;
    }
    scene.until_phase(Phase::Draining).await;
}

#[tokio::test]
async fn it_is_ready_when_it_knows_its_instance_and_its_node() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::with(cp, "ready", json!({"spec": {"providerID": null}})).await;
    scene.seat.imds.fault("*", spotter::rehearsal::imds::Fault::Status(500));
    let agent = scene.seat.start(&[]);
    let not_ready = |part: &'static str| {
        let admin = agent.admin;
        eventually(part, PATIENCE, move || async move {
            let answer = http_get(admin, "/readyz").await.ok()?;
            (answer.code == 503 && answer.body.contains(part)).then_some(())
        })
    };
    not_ready("which instance this is").await;
    scene.seat.imds.fault("*", None);
    not_ready("has no providerID yet").await;
    assert_eq!(agent.get("/livez").await.code, 200);
    let provider = format!("aws:///eu-central-1a/{}", scene.node.instance_id);
    scene.patch("cloud", json!({"spec": {"providerID": provider}})).await;
    crate::support::process::wait_http(agent.admin, "/readyz", PATIENCE).await;
    assert_eq!(scene.patches().await, 0);
}

#[tokio::test]
async fn a_node_that_others_write_all_the_time_is_written_in_the_end() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "busy").await;
    let agent = scene.watching(&["--log-level=debug"]).await;
    let id = scene.record().await.unwrap().id;
    let mut others = tokio::task::JoinSet::new();
    for other in 0..6 {
        let (nodes, name) = (scene.world.nodes(), scene.node.name.clone());
        others.spawn(async move {
            for count in 0.. {
                let label = json!({"metadata": {"labels": {format!("test/other-{other}"): count.to_string()}}});
                let _ = nodes.patch(&name, &PatchParams::default(), &Patch::Merge(label)).await;
            }
        });
    }
    scene.interrupt(FAR);
    eventually("five writes in vain, or a lucky one", PATIENCE, || async {
        (agent.count("read the Node again") >= 5 || agent.count("drain started") > 0).then_some(())
    })
    .await;
    drop(others);
    assert_eq!(scene.until_phase(Phase::Drained).await.id, id);
}

#[tokio::test]
async fn under_its_own_name_behind_the_admission_policy_it_holds_and_gives_back() {
    let Some(cp) = controlplane::shared() else { return };
    let world = World::new(cp, "direct").await;
    let node = world.node("a").await;
    let access = world.agent(&node, Rights::Direct).await;
    let seat = Seat::with(access, &node, &node.instance_id).await;
    let scene = Scene { cp, world, node, seat };
    let agent = scene.seat.start(&[]);
    agent.line("acting with the credentials' own rights").await;
    agent.line("Node found").await;
    scene.seat.imds.apply(Change::TargetState("Terminated".into()));
    scene.until_phase(Phase::Drained).await;
    let node = scene.get().await;
    assert!(cordoned(&node) && label(&node, NO_BALANCER).is_some());
    scene.seat.imds.apply(Change::TargetState("InService".into()));
    let node = scene.until_released().await;
    assert!(!cordoned(&node) && label(&node, NO_BALANCER).is_none() && !owns(&node, "spotter-agent"));
}

//! Every drain ends, and a brake is one, whatever cannot be read or written meanwhile.

use k8s_openapi::api::rbac::v1::ClusterRole;
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;

use super::stage::{PATIENCE, Stage};
use crate::support::{
    controlplane::shared,
    eventually,
    fleet::{Budget, NewPod},
    rights::Rights,
};

#[tokio::test]
async fn a_drain_whose_pods_cannot_be_listed_ends_and_says_so() {
    let Some(cp) = shared() else { return };
    let missing = [("pods", "watch"), ("pods", "list")];
    let stage = Stage::without(cp, "blind", Rights::Node, &missing).await;
    stage.world.run(&stage.node, NewPod::new("web-0")).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(8);
    let record = stage.phase("incomplete").await;
    assert_eq!(record["outcome"]["gone"], json!(0), "{record}");
    spotter.wait_for_line("could not be listed: none was moved", PATIENCE).await;
    assert!(stage.event(&stage.node.name, "PodsLeft").await.contains("could not be listed"));
}

/// Takes the right to patch Nodes away from the agent.
async fn revoke(stage: &Stage<'_>) {
    let roles: Api<ClusterRole> = Api::all(stage.world.client().clone());
    let name = format!("spotter-agent-{}", stage.node.name);
    let mut role = roles.get(&name).await.unwrap();
    let rules = role.rules.as_mut().unwrap();
    for rule in rules.iter_mut().filter(|rule| rule.resources.as_ref().is_some_and(|all| all[0] == "nodes")) {
        rule.verbs.retain(|verb| !verb.ends_with(":patch"));
    }
    rules.retain(|rule| !rule.verbs.is_empty());
    roles.replace(&name, &PostParams::default(), &role).await.unwrap();
}

#[tokio::test]
async fn a_brake_holds_before_it_can_be_written() {
    let Some(cp) = shared() else { return };
    let stage = Stage::without(cp, "brake", Rights::Node, &[]).await;
    stage.world.run(&stage.node, NewPod::new("stuck-0").label("app", "stuck").grace(5)).await;
    stage.world.budget("stuck", "stuck", Budget::MinAvailable(1)).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(30);
    stage.event("stuck-0", "EvictionBlocked").await;
    revoke(&stage).await;
    let manager = PatchParams { field_manager: Some("kubectl-annotate".into()), ..PatchParams::default() };
    let ignore = Patch::Merge(json!({"metadata": {"annotations": {"spotter.dev/response": "ignore"}}}));
    stage.world.nodes().patch(&stage.node.name, &manager, &ignore).await.unwrap();
    // The release is refused for want of the right, which may take the API server a moment to know.
    let released = || async {
        stage.asked().await.iter().any(|r| r.verb == "patch" && r.resource == "nodes" && r.code == 403).then_some(())
    };
    let written = || async { stage.record().await.is_none().then_some(()) };
    eventually("the release is tried", PATIENCE, || async {
        if written().await.is_some() { Some(()) } else { released().await }
    })
    .await;
    let asked = stage.asked().await.count("create", "pods/eviction");
    // Past the deadline.
    tokio::time::sleep(std::time::Duration::from_secs(32)).await;
    let after = stage.asked().await;
    assert!(after.count("create", "pods/eviction") <= asked + 1, "{}", spotter.output());
    assert_eq!(after.count("delete", "pods"), 0, "{}", spotter.output());
    assert!(stage.kubelet.stops().is_empty());
}

//! What the agent may, what it says where it may not, and as whom it acts.

use std::time::Duration;

use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::{
    agent_drain::stage::{PATIENCE, Stage, assert_well, disruption},
    support::{
        controlplane::{ControlPlane, shared},
        fleet::{Budget, NewPod, World, object},
        process::Process,
        rights::{Rights, apply},
    },
};

/// Together, because each waits for its deadline.
#[tokio::test]
async fn each_missing_right_is_named_and_the_rest_goes_on() {
    let Some(cp) = shared() else { return };
    tokio::join!(
        without_evictions(cp),
        without_deletions(cp),
        without_conditions(cp),
        without_the_watch(cp),
        without_the_list(cp),
        without_the_list_and_the_watch(cp),
        without_events(cp),
        without_the_node(cp, "no-get", "get"),
        without_the_node(cp, "no-patch", "patch"),
    );
}

/// Two pods, one of them behind a budget, under a deadline that is near, and one right too few.
async fn drained_without<'a>(cp: &'a ControlPlane, name: &str, verb: &str, resource: &str) -> (Stage<'a>, Process) {
    let stage = Stage::without(cp, name, Rights::Node, &[(resource, verb)]).await;
    stage.world.run(&stage.node, NewPod::new("free-0").finalizer("test/kept")).await;
    stage.world.run(&stage.node, NewPod::new("stuck-0").grace(5).finalizer("test/kept")).await;
    stage.world.budget("stuck", "stuck", Budget::MinAvailable(1)).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(10);
    (stage, spotter)
}

fn assert_named(spotter: &Process, verb: &str, resource: &str) {
    let (output, words) = (spotter.output(), format!("not allowed to {verb} {resource}"));
    assert!(output.contains(&words) && output.contains("README, permissions"), "{words} is not in\n{output}");
    assert_well(spotter);
}

/// Pods are deleted at their latest start.
async fn without_evictions(cp: &ControlPlane) {
    let (stage, spotter) = drained_without(cp, "no-evict", "create", "pods/eviction").await;
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["deleted"], 2, "{record}");
    assert_named(&spotter, "create", "pods/eviction");
    assert!(stage.answers("forbidden").await >= 2.0);
    assert!(stage.event("free-0", "EvictionBlocked").await.contains("not allowed to create pods/eviction"));
}

async fn without_deletions(cp: &ControlPlane) {
    let (stage, spotter) = drained_without(cp, "no-delete", "delete", "pods").await;
    let record = stage.phase("incomplete").await;
    assert_eq!(record["outcome"]["left"], json!([format!("{}/stuck-0", stage.world.namespace)]), "{record}");
    assert_named(&spotter, "delete", "pods");
    assert!(!spotter.output().contains("DeletedAtDeadline"), "that would be a lie: {}", spotter.output());
    let metrics = stage.metrics().await;
    let pods = |outcome| metrics.metric("spotter_pods_total", &[("outcome", outcome)]).unwrap();
    assert_eq!((pods("evicted"), pods("deleted_at_deadline"), pods("left")), (1.0, 0.0, 1.0));
}

/// Deleted all the same, and the right is named.
async fn without_conditions(cp: &ControlPlane) {
    let (stage, spotter) = drained_without(cp, "no-mark", "patch", "pods/status").await;
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["deleted"], 1, "{record}");
    assert_named(&spotter, "patch", "pods/status");
    assert_eq!(disruption(&stage.world.pods().get("stuck-0").await.unwrap()), None);
}

/// They are listed again.
async fn without_the_watch(cp: &ControlPlane) {
    let (stage, spotter) = drained_without(cp, "no-watch", "watch", "pods").await;
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["gone"], 2, "{record}");
    assert_named(&spotter, "watch", "pods");
    let lists = stage.asked().await.count("list", "pods");
    assert!((2..=10).contains(&lists), "{lists}");
}

/// The list is a watch on servers that can stream it: nothing is missing.
async fn without_the_list(cp: &ControlPlane) {
    let (stage, spotter) = drained_without(cp, "no-list", "list", "pods").await;
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["gone"], 2, "{record}");
    assert_well(&spotter);
}

/// No pod is known, so none is evicted: whoever looks for the reason finds it in the log.
async fn without_the_list_and_the_watch(cp: &ControlPlane) {
    let stage = Stage::without(cp, "no-pods", Rights::Node, &[("pods", "list"), ("pods", "watch")]).await;
    stage.world.run(&stage.node, NewPod::new("web-0")).await;
    let spotter = stage.started(&[]).await;
    stage.interrupt(10);
    let line = spotter.wait_for_line("not allowed to ", PATIENCE).await.text;
    let named = |verb| line.contains(&format!("not allowed to {verb} pods"));
    assert!((named("list") || named("watch")) && line.contains("README, permissions"), "{line}");
    let output = spotter.output();
    assert!(stage.kubelet.stops().is_empty(), "{output}");
    assert_well(&spotter);
}

async fn without_events(cp: &ControlPlane) {
    let (stage, spotter) = drained_without(cp, "no-events", "create", "events").await;
    let record = stage.phase("drained").await;
    assert_eq!(record["outcome"]["gone"], 2, "{record}");
    assert_named(&spotter, "create", "events");
    let output = spotter.output();
    assert_eq!(output.matches("not allowed to create events").count(), 1, "once: {output}");
}

/// Nothing is evicted without a claim; once the right is there, it goes on.
async fn without_the_node(cp: &ControlPlane, name: &str, verb: &str) {
    let stage = Stage::without(cp, name, Rights::Node, &[("nodes", verb)]).await;
    stage.world.run(&stage.node, NewPod::new("web-0")).await;
    let spotter = stage.start(&[]);
    stage.interrupt(120);
    spotter.wait_for_line(&format!("not allowed to {verb} nodes"), PATIENCE).await;
    assert_named(&spotter, verb, "nodes");
    assert!(stage.kubelet.stops().is_empty());
    grant(&stage.world, &format!("spotter-agent-{}", stage.node.name), "nodes", verb).await;
    stage.phase("drained").await;
    assert_well(&spotter);
}

async fn grant(world: &World, role: &str, resource: &str, verb: &str) {
    type Role = k8s_openapi::api::rbac::v1::ClusterRole;
    let roles: Api<Role> = Api::all(world.client().clone());
    let mut role: Role = roles.get(role).await.unwrap();
    let verb = format!("impersonate-on:associated-node:{verb}");
    let rule = json!({"apiGroups": [""], "resources": [resource], "verbs": [verb]});
    role.rules.get_or_insert_default().push(object(rule));
    let name = role.metadata.name.clone().unwrap();
    roles.replace(&name, &PostParams::default(), &role).await.unwrap();
}

/// Once at the start, by its time; once while a budget holds a pod back, by the deletion of the pod that it is bound to.
#[tokio::test]
async fn a_token_that_ends_in_the_middle_is_read_again_from_its_file() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "token").await;
    stage.world.run(&stage.node, NewPod::new("stuck-0")).await;
    stage.world.budget("stuck", "stuck", Budget::MinAvailable(1)).await;
    let good = std::fs::read_to_string(&stage.agent.token_file).unwrap();
    stage.agent.set_token(&cp.server.expired_token());
    let spotter = stage.start(&[]);
    spotter.wait_for_line("refused the credentials (401", PATIENCE).await;
    // A rotation: no request fails from here on, and nothing is restarted.
    stage.agent.set_token(&good);
    spotter.wait_for_line("Node found", PATIENCE).await;
    stage.interrupt(120);
    stage.event("stuck-0", "EvictionBlocked").await;
    let own: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(stage.world.client().clone(), "kube-system");
    let now = kube::api::DeleteParams { grace_period_seconds: Some(0), ..Default::default() };
    own.delete(&format!("spotter-agent-{}", stage.node.name), &now).await.unwrap();
    spotter.wait_for_line("refused by the API server: the API server", PATIENCE).await;
    let fresh = stage.world.agent(&stage.node, Rights::Node).await;
    stage.agent.set_token(&std::fs::read_to_string(&fresh.token_file).unwrap());
    let budgets: Api<k8s_openapi::api::policy::v1::PodDisruptionBudget> =
        Api::namespaced(stage.world.client().clone(), &stage.world.namespace);
    budgets.delete("stuck", &Default::default()).await.unwrap();
    stage.phase("drained").await;
    assert!(!spotter.output().contains(good.trim()), "the token is never logged");
    assert_well(&spotter);
}

#[tokio::test]
async fn the_identity_is_found_out_and_said() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "as-node").await;
    let spotter = stage.started(&[]).await;
    let line = format!("acting as system:node:{}", stage.node.name);
    assert!(spotter.output().contains(&line), "{}", spotter.output());
    drop(spotter);

    let stage = Stage::with(cp, "fallback", Rights::Direct).await;
    stage.world.run_many(&stage.node, 3, |i| NewPod::new(format!("web-{i}"))).await;
    let spotter = stage.started(&[]).await;
    let line = "the API server does not allow acting as the own node";
    assert!(spotter.output().contains(line) && spotter.output().contains("cannot impersonate"), "{}", spotter.output());
    stage.interrupt(60);
    stage.phase("drained").await;
    let asked = stage.asked().await;
    let refused = asked.only(|request| request.code == 403);
    assert_eq!(refused.len(), 1, "asked once: {:?}", refused.summary());
    assert_well(&spotter);
    drop(spotter);

    let spotter = stage.start(&["--identity", "node"]);
    let line = spotter.wait_for_line("cannot impersonate", PATIENCE).await.text;
    assert!(
        line.contains("grant the impersonation of the own node") && line.contains("identity auto or direct"),
        "{line}"
    );
    assert_well(&spotter);
}

/// 60 pods, 16 at a time, while the server's flow control lets through one or two and refuses the others.
#[tokio::test]
async fn flow_control_is_no_budget() {
    let Some(cp) = shared() else { return };
    let stage = Stage::without(cp, "apf", Rights::Direct, &[]).await;
    let name = format!("test-{}", stage.node.name);
    let level = json!({"apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "PriorityLevelConfiguration",
        "metadata": {"name": name}, "spec": {"type": "Limited", "limited": {"nominalConcurrencyShares": 1,
            "borrowingLimitPercent": 0, "lendablePercent": 0, "limitResponse": {"type": "Reject"}}}});
    let schema = json!({"apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "FlowSchema",
        "metadata": {"name": name}, "spec": {"priorityLevelConfiguration": {"name": name}, "matchingPrecedence": 500,
            "rules": [{"subjects": [{"kind": "User", "user": {"name": stage.agent.user}}], "resourceRules": [
                {"verbs": ["create"], "apiGroups": [""], "resources": ["pods/eviction"], "namespaces": ["*"]}]}]}});
    stage.world.run_many(&stage.node, 60, |i| NewPod::new(format!("web-{i}"))).await;
    apply(stage.world.client(), &level).await;
    apply(stage.world.client(), &schema).await;
    // In force a moment after it is stored.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let spotter = stage.started(&["--identity", "direct"]).await;
    stage.interrupt(120);
    stage.phase("drained").await;
    assert_eq!(stage.answers("accepted").await, 60.0);
    assert!(stage.answers("throttled").await > 0.0, "the test makes the server refuse some");
    assert_eq!(stage.answers("budget").await + stage.answers("error").await, 0.0);
    assert!(!spotter.output().contains("EvictionBlocked"), "{}", spotter.output());
    assert_well(&spotter);
}

#[tokio::test]
async fn a_full_node_is_drained_directly_at_the_servers_default_limits() {
    let Some(cp) = shared() else { return };
    let stage = Stage::with(cp, "direct", Rights::Direct).await;
    stage.world.run_many(&stage.node, 60, |i| NewPod::new(format!("web-{i}"))).await;
    let spotter = stage.started(&["--identity", "direct"]).await;
    assert!(spotter.output().contains("acting with the credentials' own rights"), "{}", spotter.output());
    stage.interrupt(120);
    stage.phase("drained").await;
    assert_eq!(stage.answers("accepted").await, 60.0);
    assert!(!spotter.output().contains("EvictionBlocked"), "{}", spotter.output());
    let asked = stage.asked().await;
    assert_eq!(asked.count("patch", "nodes"), 2, "{:?}", asked.summary());
    assert!(asked.iter().all(|request| request.impersonated.is_none()));
    assert_well(&spotter);
}

/// What the token of one node's agent can reach besides what the identity tests try: other nodes' status, pods' bodies,
/// events, tokens, exec and bindings.
#[tokio::test]
async fn f31_a_stolen_token_reaches_nothing_else() {
    let Some(cp) = shared() else { return };
    let stage = Stage::new(cp, "stolen").await;
    let (world, other) = (&stage.world, stage.world.node("b").await);
    world.run(&stage.node, NewPod::new("mine-0")).await;
    world.run(&other, NewPod::new("theirs-0")).await;
    let before = world.pods().get("theirs-0").await.unwrap();
    let pods = format!("/api/v1/namespaces/{}/pods", world.namespace);
    let label = json!({"metadata": {"labels": {"a": "b"}}});
    let post =
        |path: String, body: serde_json::Value| http::Request::post(path).body(body.to_string().into_bytes()).unwrap();
    let patch = |path: String, body: &serde_json::Value| {
        let kind = "application/merge-patch+json";
        http::Request::patch(path).header("content-type", kind).body(body.to_string().into_bytes()).unwrap()
    };
    let get = |path: &str| http::Request::get(path).body(Vec::new()).unwrap();
    for client in [
        stage.agent.as_node(&stage.node.name).await,
        stage.agent.client().await,
        stage.agent.as_node(&other.name).await,
    ] {
        let tries = [
            patch(format!("/api/v1/nodes/{}", other.name), &label),
            patch(format!("/api/v1/nodes/{}/status", other.name), &json!({"status": {"phase": "x"}})),
            patch(format!("{pods}/theirs-0"), &label),
            patch(format!("{pods}/mine-0"), &label),
            post(format!("{pods}/mine-0/exec?command=id"), json!({})),
            post(
                format!("{pods}/theirs-0/eviction"),
                json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "theirs-0"}}),
            ),
            post(pods.clone(), json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "new"}})),
            post(
                "/api/v1/namespaces/kube-system/serviceaccounts/default/token".into(),
                json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}),
            ),
            get("/api/v1/secrets"),
            get("/api/v1/configmaps"),
            get("/api/v1/nodes"),
            get("/api/v1/pods"),
            http::Request::delete(format!("/api/v1/nodes/{}", other.name)).body(Vec::new()).unwrap(),
        ];
        for request in tries {
            let what = format!("{} {}", request.method(), request.uri());
            match client.request_text(request).await {
                Err(kube::Error::Api(status)) => assert_eq!(status.code, 403, "{what}: {}", status.message),
                other => panic!("{what}: {other:?}"),
            }
        }
    }
    let after = world.pods().get("theirs-0").await.unwrap();
    assert_eq!(after.metadata.resource_version, before.metadata.resource_version);
    assert!(
        world.nodes().patch(&other.name, &PatchParams::default(), &Patch::Merge(json!({}))).await.is_ok(),
        "it is still there"
    );
    // Whatever was asked is decided by now: an accepted eviction or deletion would stand in the pod.
    for (name, pod) in [("theirs-0", after), ("mine-0", world.pods().get("mine-0").await.unwrap())] {
        assert_eq!(pod.metadata.deletion_timestamp, None, "{name} was told to stop");
    }
}

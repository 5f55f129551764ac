//! How the server answers evictions.

use k8s_openapi::api::{core::v1::Pod, policy::v1::Eviction};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
    core::Status,
};
use serde_json::{Value, json};

use crate::support::{
    controlplane::{ControlPlane, Options, available, shared},
    fleet::{Budget, NewPod, World, object},
};

async fn evict(pods: &Api<Pod>, name: &str, options: Value) -> Result<Status, Box<Status>> {
    let eviction: Eviction = object(json!({"metadata": {"name": name}, "deleteOptions": options}));
    match pods.create_subresource("eviction", name, &PostParams::default(), &eviction).await {
        Ok(status) => Ok(status),
        Err(kube::Error::Api(status)) => Err(status),
        Err(error) => panic!("no answer: {error}"),
    }
}

#[tokio::test]
async fn a_budget_that_allows_nothing_is_a_429_with_a_cause() {
    let Some(cp) = shared() else { return };
    let world = World::new(cp, "budget").await;
    let node = world.node("a").await;
    let made = world.run_many(&node, 2, |i| NewPod::new(format!("web-{i}"))).await;
    world.budget("web", "web", Budget::MinAvailable(2)).await;
    let pods = world.pods();
    let status = evict(&pods, "web-0", json!({})).await.expect_err("blocked");
    assert_eq!((status.code, status.reason.as_str()), (429, "TooManyRequests"));
    let details = status.details.expect("details");
    assert_eq!(details.retry_after_seconds, 0);
    assert_eq!(details.causes[0].reason, "DisruptionBudget");
    assert_eq!(details.causes[0].message, "The disruption budget web needs 2 healthy pods and has 2 currently");
    // Even a wrong uid is answered by the budget.
    let wrong = json!({"preconditions": {"uid": made[1].metadata.uid}});
    assert_eq!(evict(&pods, "web-0", wrong).await.expect_err("blocked").code, 429);
}

#[tokio::test]
async fn two_budgets_are_a_500_without_details() {
    let Some(cp) = shared() else { return };
    let world = World::new(cp, "two-budgets").await;
    let node = world.node("a").await;
    world.run(&node, NewPod::new("web-0")).await;
    world.budget("one", "web", Budget::MinAvailable(0)).await;
    world.budget("two", "web", Budget::MinAvailable(0)).await;
    let status = evict(&world.pods(), "web-0", json!({})).await.expect_err("refused");
    assert_eq!((status.code, status.details.is_none()), (500, true));
    assert!(status.message.contains("more than one PodDisruptionBudget"), "{}", status.message);
}

#[tokio::test]
async fn uid_grace_and_missing_pods() {
    let Some(cp) = shared() else { return };
    let world = World::new(cp, "answers").await;
    let node = world.node("a").await;
    let made = world.run_many(&node, 2, |i| NewPod::new(format!("web-{i}")).grace(30)).await;
    let pods = world.pods();
    assert_eq!(evict(&pods, "nobody", json!({})).await.expect_err("missing").code, 404);
    let wrong = json!({"preconditions": {"uid": made[1].metadata.uid}});
    let status = evict(&pods, "web-0", wrong).await.expect_err("another pod");
    assert!(status.code == 409 && status.message.contains("UID in the precondition"), "{status:?}");

    let right = json!({"gracePeriodSeconds": 20, "preconditions": {"uid": made[0].metadata.uid}});
    evict(&pods, "web-0", right).await.expect("accepted");
    let pod = pods.get("web-0").await.unwrap();
    assert_eq!(pod.metadata.deletion_grace_period_seconds, Some(20));
    let conditions = pod.status.and_then(|status| status.conditions).unwrap_or_default();
    assert!(
        conditions
            .iter()
            .any(|c| c.type_ == "DisruptionTarget" && c.reason.as_deref() == Some("EvictionByEvictionAPI"))
    );

    // Asked again: shorter is taken, longer is not.
    evict(&pods, "web-0", json!({"gracePeriodSeconds": 5})).await.expect("accepted");
    evict(&pods, "web-0", json!({"gracePeriodSeconds": 25})).await.expect("accepted");
    assert_eq!(pods.get("web-0").await.unwrap().metadata.deletion_grace_period_seconds, Some(5));

    let delete = DeleteParams { grace_period_seconds: Some(7), ..DeleteParams::default() };
    let delete =
        delete.preconditions(kube::api::Preconditions { uid: made[0].metadata.uid.clone(), resource_version: None });
    let answer = pods.delete("web-1", &delete).await;
    assert!(matches!(answer, Err(kube::Error::Api(status)) if status.code == 409), "a DELETE minds the uid too");
}

#[tokio::test]
async fn a_budget_that_is_not_processed_asks_for_ten_seconds() {
    if !available() {
        return;
    }
    let cp = ControlPlane::start(Options { without_controllers: true, ..Options::default() });
    let world = World::new(&cp, "behind").await;
    let node = world.node("a").await;
    world.run(&node, NewPod::new("web-0")).await;
    world.unprocessed_budget("web", "web", Budget::MinAvailable(0)).await;
    let status = evict(&world.pods(), "web-0", json!({})).await.expect_err("not yet");
    let details = status.details.expect("details");
    assert_eq!((status.code, details.retry_after_seconds), (429, 10));
    assert_eq!(details.causes[0].message, "The disruption budget web is still being processed by the server.");
}

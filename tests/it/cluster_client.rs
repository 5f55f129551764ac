//! What the Kubernetes adapter puts on the wire, and what it makes of the answers: real sockets, bodies as a real
//! API server (1.37) sent them.

// clippy.toml allows these in test functions only, not in what they share.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod tls;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Body, extract::State, response::Response};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use spotter::{
    clock::Clock,
    cluster::{
        About, ApplyError, Class, Cluster, EventNote, Identity, IdentityChoice, Manager, Metrics, NodeEvent,
        NodeIntent, PodEvent, PodRef, Settings,
    },
    plan::{Answer, PodUid},
};
use tokio_util::sync::CancellationToken;

const SECOND: Duration = Duration::from_secs(1);
const NODE: &str = r#"{"kind":"Node","apiVersion":"v1","metadata":{"name":"n1","uid":"nu","resourceVersion":"7"},"spec":{"providerID":"aws:///z/i-1"},"status":{}}"#;
const NO_IMPERSONATION: &str = r#"{"kind":"Status","status":"Failure","message":"users \"system:node:n1\" is forbidden: User \"system:serviceaccount:kube-system:spotter-agent\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope","reason":"Forbidden","code":403}"#;

/// One request as it arrived.
#[derive(Debug, Clone)]
struct Seen {
    method: String,
    path: String,
    query: String,
    user: Option<String>,
    agent: String,
    content_type: String,
    body: Value,
}

/// What the server answers: a status and a body, which stays open where `hold` is set.
struct Reply {
    code: u16,
    body: String,
    hold: bool,
}

fn reply(code: u16, body: impl Into<String>) -> Reply {
    Reply { code, body: body.into(), hold: false }
}

type Handler = Arc<dyn Fn(&Seen, usize) -> Reply + Send + Sync>;

/// An API server whose answers the test decides: by the request, and by how many came before it.
struct Server {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    registry: Registry,
    kubeconfig: tempfile::NamedTempFile,
}

#[derive(Clone)]
struct Shared {
    handler: Handler,
    seen: Arc<Mutex<Vec<Seen>>>,
}

async fn serve(State(shared): State<Shared>, request: axum::extract::Request) -> Response {
    let (head, body) = request.into_parts();
    let header = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let seen = Seen {
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        user: header("impersonate-user"),
        agent: header("user-agent").unwrap_or_default(),
        content_type: header("content-type").unwrap_or_default(),
        body: serde_json::from_slice(&body).unwrap_or_default(),
    };
    let before = {
        let mut all = shared.seen.lock().unwrap();
        all.push(seen.clone());
        all.len() - 1
    };
    let Reply { code, body, hold } = (shared.handler)(&seen, before);
    let head = futures::stream::iter([Ok::<_, std::io::Error>(body)]);
    let body = match hold {
        true => Body::from_stream(futures::StreamExt::chain(head, futures::stream::pending())),
        false => Body::from_stream(head),
    };
    Response::builder().status(code).body(body).unwrap()
}

fn kubeconfig(url: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": url, "insecure-skip-tls-verify": true}}],
        "users": [{"name": "u", "user": {"token": "t"}}]});
    std::fs::write(file.path(), text.to_string()).unwrap();
    file
}

async fn connect(kubeconfig: PathBuf, identity: IdentityChoice, registry: &mut Registry) -> Cluster {
    let metrics = Metrics::new();
    metrics.register(registry);
    let settings =
        Settings { kubeconfig: Some(kubeconfig), context: None, node: "n1".into(), identity, manager: Manager::Agent };
    Cluster::new(settings, Clock::new(), metrics).await.unwrap()
}

impl Server {
    async fn start(handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> (Self, Cluster) {
        Self::start_as(IdentityChoice::Auto, handler).await
    }

    async fn start_as(
        identity: IdentityChoice,
        handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static,
    ) -> (Self, Cluster) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let shared = Shared { handler: Arc::new(handler), seen: seen.clone() };
        let app = Router::new().fallback(serve).with_state(shared);
        tokio::spawn(async move { axum::serve(listener, app).await });
        let kubeconfig = kubeconfig(&url);
        let mut registry = Registry::default();
        let cluster = connect(kubeconfig.path().to_owned(), identity, &mut registry).await;
        (Self { url, seen, registry, kubeconfig }, cluster)
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }
}

fn pod() -> PodRef {
    PodRef { namespace: "shop".into(), name: "web-0".into(), uid: PodUid("u-1".into()) }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(5), future).await.expect("nothing happened in 5 s")
}

#[tokio::test]
async fn an_eviction_carries_grace_and_uid_where_the_server_reads_them() {
    let (server, cluster) = Server::start(|_, _| reply(201, r#"{"kind":"Status","status":"Success"}"#)).await;
    assert_eq!(cluster.evict(&pod(), Some(17), SECOND).await, Answer::Accepted);
    assert_eq!(cluster.evict(&pod(), None, SECOND).await, Answer::Accepted);
    let seen = server.seen();
    assert_eq!(
        (seen[0].method.as_str(), seen[0].path.as_str()),
        ("POST", "/api/v1/namespaces/shop/pods/web-0/eviction")
    );
    assert_eq!(seen[0].user.as_deref(), Some("system:node:n1"));
    assert!(seen[0].agent.starts_with("spotter/") && seen[0].agent.ends_with(" (agent)"), "{}", seen[0].agent);
    assert_eq!(
        seen[0].body,
        json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "web-0", "namespace": "shop"},
            "deleteOptions": {"gracePeriodSeconds": 17, "preconditions": {"uid": "u-1"}}})
    );
    assert_eq!(seen[1].body["deleteOptions"], json!({"preconditions": {"uid": "u-1"}}));
    let metrics = server.metrics();
    let counted = r#"spotter_kubernetes_requests_total{verb="create",resource="pods/eviction",code="2xx"} 2"#;
    assert!(metrics.contains(counted), "{metrics}");
    assert!(metrics.contains(r#"spotter_requests_in_flight{target="kubernetes"} 0"#), "{metrics}");
    assert!(metrics.contains(r#"spotter_kubernetes_requests_total{verb="apply",resource="nodes",code="409"} 0"#));
}

#[tokio::test]
async fn mark_and_delete_are_bound_to_the_uid() {
    let (server, cluster) = Server::start(|_, _| reply(200, r#"{"kind":"Pod","metadata":{"name":"web-0"}}"#)).await;
    assert_eq!(cluster.mark(&pod(), "SpotterDeadline", "why", SECOND).await, Answer::Accepted);
    assert_eq!(cluster.delete(&pod(), Some(9), SECOND).await, Answer::Accepted);
    let seen = server.seen();
    assert_eq!(
        (seen[0].method.as_str(), seen[0].path.as_str()),
        ("PATCH", "/api/v1/namespaces/shop/pods/web-0/status")
    );
    assert_eq!(seen[0].content_type, "application/strategic-merge-patch+json");
    assert_eq!(seen[0].body["metadata"], json!({"uid": "u-1"}));
    let condition = &seen[0].body["status"]["conditions"][0];
    assert_eq!((&condition["type"], &condition["status"]), (&json!("DisruptionTarget"), &json!("True")));
    assert_eq!((&condition["reason"], &condition["message"]), (&json!("SpotterDeadline"), &json!("why")));
    assert!(condition["lastTransitionTime"].as_str().unwrap().ends_with('Z'));
    assert_eq!((seen[1].method.as_str(), seen[1].path.as_str()), ("DELETE", "/api/v1/namespaces/shop/pods/web-0"));
    assert_eq!(seen[1].body, json!({"gracePeriodSeconds": 9, "preconditions": {"uid": "u-1"}}));
}

#[tokio::test]
async fn an_apply_is_exactly_the_intent() {
    let (server, cluster) = Server::start(|_, _| reply(200, NODE)).await;
    let intent = NodeIntent {
        uid: Some("nu".into()),
        record: Some("{}".into()),
        unschedulable: true,
        kind_label: Some("spot-interruption"),
        exclude_from_load_balancers: true,
        ..NodeIntent::default()
    };
    let facts = cluster.apply(&intent, Manager::Agent, false, 0, SECOND).await.unwrap();
    assert_eq!((facts.uid.as_str(), facts.resource_version.as_str()), ("nu", "7"));
    cluster.apply(&NodeIntent::default(), Manager::Queue, true, 1, SECOND).await.unwrap();
    let seen = server.seen();
    assert_eq!((seen[0].method.as_str(), seen[0].path.as_str()), ("PATCH", "/api/v1/nodes/n1"));
    assert_eq!(seen[0].content_type, "application/apply-patch+yaml");
    assert_eq!(seen[0].query, "&fieldManager=spotter-agent");
    assert_eq!(
        seen[0].body,
        json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "n1", "uid": "nu", "annotations": {"spotter.dev/termination": "{}"}, "labels": {
                "spotter.dev/terminating": "spot-interruption", "node.kubernetes.io/exclude-from-external-load-balancers": ""}},
            "spec": {"unschedulable": true}})
    );
    assert_eq!(seen[1].query, "&force=true&fieldManager=spotter-queue");
    assert_eq!(seen[1].body, json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}));
}

#[tokio::test]
async fn a_held_node_names_its_holder() {
    let held = json!({"kind": "Status", "status": "Failure", "reason": "Conflict", "code": 409, "details": {"causes": [
        {"reason": "FieldManagerConflict", "message": "conflict with \"spotter-queue\"",
         "field": ".metadata.annotations.spotter.dev/termination"}]}});
    let (_server, cluster) = Server::start(move |_, _| reply(409, held.to_string())).await;
    let refused = cluster.apply(&NodeIntent::default(), Manager::Agent, false, 0, SECOND).await;
    assert!(matches!(refused, Err(ApplyError::HeldBy(Manager::Queue))), "{refused:?}");
}

#[tokio::test]
async fn without_impersonation_auto_acts_directly_and_stays_so() {
    let (server, cluster) = Server::start(|seen, _| match seen.user {
        Some(_) => reply(403, NO_IMPERSONATION),
        None => reply(200, NODE),
    })
    .await;
    assert_eq!(cluster.identity(), Identity::Node);
    cluster.identify().await.unwrap();
    assert_eq!(cluster.identity(), Identity::Direct);
    cluster.node(SECOND).await.unwrap();
    let users: Vec<_> = server.seen().into_iter().map(|seen| seen.user).collect();
    assert_eq!(users, [Some("system:node:n1".to_owned()), None, None]);
}

#[tokio::test]
async fn a_later_refusal_of_impersonation_costs_one_request() {
    let (server, cluster) = Server::start(|seen, _| match seen.user {
        Some(_) => reply(403, NO_IMPERSONATION),
        None => reply(201, "{}"),
    })
    .await;
    assert_eq!(cluster.evict(&pod(), None, SECOND).await, Answer::Accepted);
    assert_eq!(cluster.identity(), Identity::Direct);
    assert_eq!(server.seen().len(), 2);
}

const BUDGET: &str = r#"{"kind":"Status","status":"Failure","message":"Cannot evict pod","reason":"TooManyRequests","details":{"causes":[{"reason":"DisruptionBudget","message":"b"}]},"code":429}"#;
const FORBIDDEN: &str = r#"{"kind":"Status","status":"Failure","message":"nodes \"n1\" is forbidden: User \"x\" cannot get resource","reason":"Forbidden","code":403}"#;

#[tokio::test]
async fn only_an_answer_that_proves_the_right_changes_the_identity() {
    let status = |code: u16| format!(r#"{{"kind":"Status","status":"Failure","message":"m","code":{code}}}"#);
    for (code, body, proves) in [
        (201, "{}".to_owned(), true),
        (404, status(404), true),
        (409, status(409), true),
        (422, status(422), true),
        (429, BUDGET.to_owned(), true),
        (429, "Too many requests, please try again later.".to_owned(), false),
        (429, status(429), false),
        (401, status(401), false),
        (403, FORBIDDEN.to_owned(), false),
        (500, status(500), false),
        (503, "no".to_owned(), false),
    ] {
        let expected = if proves { Identity::Direct } else { Identity::Node };
        let answer = body.clone();
        let (_server, cluster) = Server::start(move |seen, _| match seen.user {
            Some(_) => reply(403, NO_IMPERSONATION),
            None => reply(code, answer.clone()),
        })
        .await;
        let result = cluster.evict(&pod(), None, SECOND).await;
        assert_eq!(cluster.identity(), expected, "an eviction, {code} {body}: {result:?}");
        let throttled = matches!(result, Answer::Throttled { .. });
        assert_eq!(throttled, code == 429 && !proves, "what passes is tried again: {code} {body}: {result:?}");

        let answer = body.clone();
        let (_server, cluster) = Server::start(move |seen, _| match seen.user {
            Some(_) => reply(403, NO_IMPERSONATION),
            None if code == 201 => reply(200, NODE),
            None => reply(code, answer.clone()),
        })
        .await;
        let _ = cluster.identify().await;
        assert_eq!(cluster.identity(), expected, "the Node, {code} {body}");
    }
}

#[tokio::test]
async fn a_watch_changes_the_identity_only_where_it_is_allowed() {
    for (code, expected) in [(200, Identity::Direct), (429, Identity::Node), (503, Identity::Node)] {
        let (server, cluster) = Server::start(move |seen, _| match seen.user {
            Some(_) => reply(403, NO_IMPERSONATION),
            None => Reply { code, body: bookmark(4), hold: code == 200 },
        })
        .await;
        let event = within(cluster.watch_pods().next()).await;
        assert_eq!(event == PodEvent::Listed(Vec::new()), code == 200, "{event:?}");
        assert_eq!((cluster.identity(), server.seen()[1].user.as_deref()), (expected, None), "{code}");
    }
}

#[tokio::test]
async fn rights_that_move_to_the_own_node_are_found_again() {
    let moved = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let now = moved.clone();
    let (server, cluster) = Server::start(move |seen, _| {
        let moved = now.load(std::sync::atomic::Ordering::Relaxed);
        match (&seen.user, moved) {
            (Some(_), false) => reply(403, NO_IMPERSONATION),
            (None, true) => reply(403, FORBIDDEN),
            _ => reply(200, NODE),
        }
    })
    .await;
    cluster.identify().await.unwrap();
    assert_eq!(cluster.identity(), Identity::Direct);
    moved.store(true, std::sync::atomic::Ordering::Relaxed);
    cluster.node(SECOND).await.unwrap();
    assert_eq!(cluster.identity(), Identity::Node);
    assert_eq!(server.seen().len(), 4, "once in vain each time");
}

#[tokio::test]
async fn a_refusal_in_both_identities_changes_nothing() {
    let (server, cluster) = Server::start(|seen, before| match (&seen.user, before) {
        (Some(_), _) => reply(403, NO_IMPERSONATION),
        (None, 1) => reply(200, NODE),
        _ => reply(403, FORBIDDEN),
    })
    .await;
    cluster.identify().await.unwrap();
    let error = cluster.node(SECOND).await.unwrap_err();
    assert!(error.to_string().starts_with("not allowed to get nodes: nodes"), "{error}");
    assert_eq!((cluster.identity(), server.seen().len()), (Identity::Direct, 4));
}

#[tokio::test]
async fn a_node_that_is_not_there_names_the_option() {
    let (_server, cluster) = Server::start(|_, _| reply(404, r#"{"kind":"Status","code":404}"#)).await;
    let error = cluster.node(SECOND).await.unwrap_err();
    assert!(error.is_not_found());
    assert_eq!(error.to_string(), r#"there is no Node "n1"; check --node-name"#);
}

#[tokio::test]
async fn a_forced_identity_is_an_error_that_says_what_to_do() {
    let (server, cluster) = Server::start_as(IdentityChoice::Node, |_, _| reply(403, NO_IMPERSONATION)).await;
    let error = cluster.identify().await.unwrap_err();
    assert!(error.is_forbidden() && error.class() == Class::Blocked);
    let text = error.to_string();
    assert!(text.contains("not allowed to get nodes as system:node:n1") && text.contains("auto or direct"), "{text}");
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn refusals_name_the_missing_permission() {
    let forbidden = r#"{"kind":"Status","status":"Failure","message":"pods \"web-0\" is forbidden: User \"x\" cannot create resource \"pods/eviction\"","reason":"Forbidden","code":403}"#;
    let (_server, cluster) = Server::start(move |_, before| match before {
        0 => reply(403, forbidden),
        1 => reply(403, forbidden),
        _ => reply(401, r#"{"kind":"Status","message":"Unauthorized","code":401}"#),
    })
    .await;
    let Answer::Forbidden { message } = cluster.evict(&pod(), None, SECOND).await else { panic!() };
    assert!(message.starts_with("not allowed to create pods/eviction as system:node:n1: pods \"web-0\""), "{message}");
    assert!(message.ends_with("grant it (README, permissions)"), "{message}");
    let refused = cluster.apply(&NodeIntent::default(), Manager::Agent, false, 0, SECOND).await.unwrap_err();
    assert!(refused.to_string().starts_with("not allowed to patch nodes as system:node:n1"), "{refused}");
    let error = cluster.node(SECOND).await.unwrap_err();
    assert!(error.to_string().contains("expired"), "{error}");
}

#[tokio::test]
async fn no_answer_and_no_server_are_unknown() {
    let (server, cluster) = Server::start(|_, _| Reply { code: 201, body: "{".into(), hold: true }).await;
    let limit = Duration::from_millis(100);
    assert!(matches!(cluster.evict(&pod(), None, limit).await, Answer::Unknown { .. }));
    assert!(server.metrics().contains(r#"verb="create",resource="pods/eviction",code="timeout"} 1"#));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let config = kubeconfig(&url);
    let mut registry = Registry::default();
    let cluster = connect(config.path().to_owned(), IdentityChoice::Auto, &mut registry).await;
    let error = cluster.node(SECOND).await.unwrap_err();
    assert_eq!(error.class(), Class::Retry);
    assert!(
        error.to_string().starts_with(&format!("cannot reach the API server {url}: Connection refused")),
        "{error}"
    );
}

fn raw_pod(name: &str, version: u64) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "resourceVersion": version.to_string()},
        "spec": {}, "status": {"phase": "Running"}})
}

fn event(kind: &str, object: Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}

fn bookmark(version: u64) -> String {
    let metadata =
        json!({"resourceVersion": version.to_string(), "annotations": {"k8s.io/initial-events-end": "true"}});
    event("BOOKMARK", json!({"kind": "Pod", "metadata": metadata}))
}

#[tokio::test]
async fn a_streaming_list_is_one_request_and_goes_on_from_where_it_broke() {
    let (server, cluster) = Server::start(|_, before| match before {
        // The odd one can not be read, and must not take the others with it.
        0 => reply(
            200,
            event("ADDED", raw_pod("a", 3))
                + &event("ADDED", json!({"metadata": {"name": "odd", "uid": 5}}))
                + &event("ADDED", raw_pod("b", 4))
                + &bookmark(9)
                + &event("MODIFIED", raw_pod("a", 11)),
        ),
        1 => Reply { hold: true, ..reply(200, event("DELETED", raw_pod("b", 12))) },
        _ => reply(500, ""),
    })
    .await;
    let mut watch = cluster.watch_pods();
    let PodEvent::Listed(pods) = within(watch.next()).await else { panic!() };
    assert_eq!(pods.iter().map(|pod| pod.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert!(matches!(within(watch.next()).await, PodEvent::Trouble { message } if message.contains("odd")));
    assert!(matches!(within(watch.next()).await, PodEvent::Seen(pod) if pod.name == "a"));
    assert_eq!(within(watch.next()).await, PodEvent::Gone(PodUid("uid-b".into())));
    let queries: Vec<_> = server.seen().into_iter().map(|seen| seen.query).collect();
    assert_eq!(queries.len(), 2);
    for part in
        ["fieldSelector=spec.nodeName%3Dn1", "sendInitialEvents=true", "allowWatchBookmarks=true", "NotOlderThan"]
    {
        assert!(queries[0].contains(part), "{}", queries[0]);
    }
    assert!(queries[1].contains("resourceVersion=11") && !queries[1].contains("sendInitialEvents"), "{}", queries[1]);
}

#[tokio::test]
async fn without_streaming_lists_it_lists_and_watches_and_remembers() {
    let list = json!({"metadata": {"resourceVersion": "20"}, "items": [raw_pod("a", 3)]}).to_string();
    let (server, cluster) = Server::start(move |seen, before| {
        let expired = event("ERROR", json!({"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410}));
        match (seen.query.contains("sendInitialEvents"), seen.query.contains("watch=true")) {
            (true, _) => reply(422, r#"{"kind":"Status","message":"sendInitialEvents is forbidden","code":422}"#),
            (false, false) => reply(200, list.clone()),
            (false, true) if before == 2 => reply(200, expired),
            (false, true) => Reply { hold: true, ..reply(200, "") },
        }
    })
    .await;
    let mut watch = cluster.watch_pods();
    assert!(matches!(within(watch.next()).await, PodEvent::Listed(pods) if pods.len() == 1));
    // The version was too old: everything again.
    assert!(matches!(within(watch.next()).await, PodEvent::Listed(pods) if pods.len() == 1));
    let seen = server.seen();
    let kinds: Vec<_> =
        seen.iter().map(|seen| (seen.query.contains("sendInitial"), seen.query.contains("watch="))).collect();
    assert_eq!(kinds, [(true, true), (false, false), (false, true), (false, false)]);
    assert!(seen[2].query.contains("resourceVersion=20"), "{}", seen[2].query);
}

#[tokio::test]
async fn a_server_that_ignores_streaming_lists_is_found_out_within_a_second() {
    let list = json!({"metadata": {"resourceVersion": "20"}, "items": []}).to_string();
    let (_server, cluster) = Server::start(move |seen, _| match seen.query.contains("watch=true") {
        true => Reply { hold: true, ..reply(200, "") },
        false => reply(200, list.clone()),
    })
    .await;
    let before = std::time::Instant::now();
    assert_eq!(within(cluster.watch_pods().next()).await, PodEvent::Listed(Vec::new()));
    assert!(before.elapsed() >= SECOND && before.elapsed() < 2 * SECOND, "{:?}", before.elapsed());
}

#[tokio::test]
async fn trouble_of_the_watch_is_told_once_and_passes() {
    let (_server, cluster) = Server::start(|_, before| match before {
        0..=2 => reply(503, "apiserver is shutting down"),
        _ => Reply { hold: true, ..reply(200, bookmark(1)) },
    })
    .await;
    let mut watch = cluster.watch_pods();
    let trouble = within(watch.next()).await;
    assert!(matches!(&trouble, PodEvent::Trouble { message } if message.contains("shutting down")), "{trouble:?}");
    assert_eq!(within(watch.next()).await, PodEvent::Listed(Vec::new()));
}

#[tokio::test]
async fn the_node_is_read_again_where_the_watch_is_too_old() {
    let missing = r#"{"kind":"Status","message":"nodes \"n1\" not found","reason":"NotFound","code":404}"#;
    let (server, cluster) = Server::start(move |seen, before| match before {
        0 => reply(410, r#"{"kind":"Status","message":"too old","code":410}"#),
        1 => reply(200, NODE),
        // The same Node again is no change.
        2 => reply(
            200,
            event("ADDED", serde_json::from_str(NODE).unwrap())
                + &event("ERROR", json!({"kind": "Status", "code": 410})),
        ),
        _ if !seen.query.contains("watch") => reply(404, missing),
        _ => reply(500, ""),
    })
    .await;
    let mut watch = cluster.watch_node("1".into());
    assert!(matches!(within(watch.next()).await, NodeEvent::Changed(facts) if facts.resource_version == "7"));
    assert_eq!(within(watch.next()).await, NodeEvent::Deleted);
    let seen = server.seen();
    assert!(seen[0].query.contains("resourceVersion=1") && seen[2].query.ends_with("resourceVersion="));
    assert!(seen[0].query.contains("fieldSelector=metadata.name%3Dn1"));
}

#[tokio::test]
async fn events_are_sent_in_the_background_and_drained_at_the_end() {
    let (server, cluster) = Server::start(|_, before| match before {
        0 => reply(403, "no"),
        _ => reply(201, "{}"),
    })
    .await;
    let recorder = cluster.recorder();
    recorder.set_node("nu");
    for about in [About::Node, About::Pod(pod()), About::Node] {
        recorder.publish(EventNote { about, warning: false, reason: "Cordoned", message: "m".into() });
    }
    let cancel = CancellationToken::new();
    cancel.cancel();
    within(recorder.run(cancel)).await;
    let mut paths: Vec<_> = server.seen().into_iter().map(|seen| seen.path).collect();
    paths.sort();
    let (node, shop) = ("/api/v1/namespaces/default/events", "/api/v1/namespaces/shop/events");
    assert_eq!(paths, [node, node, shop]);
    for _ in 0..1_001 {
        recorder.publish(EventNote { about: About::Node, warning: false, reason: "Many", message: "m".into() });
    }
    assert!(server.metrics().contains("spotter_events_dropped_total 1"), "{}", server.metrics());
    assert!(server.url.starts_with("http://") && server.kubeconfig.path().exists());
}

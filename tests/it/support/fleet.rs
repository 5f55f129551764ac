//! Nodes, pods and budgets, made by an administrator. A [`World`] per test keeps tests apart on one server.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, ServiceAccount},
    policy::v1::PodDisruptionBudget,
    scheduling::v1::PriorityClass,
};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use super::{
    controlplane::{ControlPlane, Server},
    eventually,
    kubelet::{EXIT_AFTER, Kubelet},
    rights::now,
};

/// Requests in flight while a fleet is built.
const IN_FLIGHT: usize = 32;

/// A test's own namespace and node names on a server that others may use too.
pub struct World {
    pub server: Arc<Server>,
    /// The namespace of this test's pods.
    pub namespace: String,
    client: Client,
}

/// A node that [`World::node`] made.
#[derive(Clone, Debug)]
pub struct TestNode {
    pub name: String,
    pub uid: String,
    /// As in its providerID.
    pub instance_id: String,
    pub boot_id: String,
}

/// A budget's one rule.
#[derive(Clone, Copy, Debug)]
pub enum Budget {
    MinAvailable(u32),
    /// Needs real controllers behind the pods; with made-up owners it allows nothing.
    MaxUnavailable(u32),
}

impl World {
    /// A namespace `<name>-<number>` with its default ServiceAccount.
    pub async fn new(cp: &ControlPlane, name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let namespace = format!("{name}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let client = cp.server.admin();
        let namespaces: Api<Namespace> = Api::all(client.clone());
        namespaces.create(&PostParams::default(), &object(json!({"metadata": {"name": namespace}}))).await.unwrap();
        // The controller makes it too, a little later; pods cannot be created before.
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &namespace);
        let made = accounts.create(&PostParams::default(), &object(json!({"metadata": {"name": "default"}}))).await;
        assert!(made.is_ok() || accounts.get_opt("default").await.unwrap().is_some(), "{made:?}");
        Self { server: cp.server.clone(), namespace, client }
    }

    /// The administrator's client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// All nodes.
    pub fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    /// This test's pods.
    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// A Ready node `<namespace>-<suffix>` with a providerID and a boot id.
    pub async fn node(&self, suffix: &str) -> TestNode {
        self.node_with(suffix, json!({})).await
    }

    /// The same with a patch (JSON merge) on top: labels, annotations, another or no providerID.
    pub async fn node_with(&self, suffix: &str, patch: Value) -> TestNode {
        let name = format!("{}-{suffix}", self.namespace);
        let instance_id = format!("i-{:017x}", fingerprint(&name));
        let boot_id = uuid(&format!("{name}/boot"));
        let mut node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {
                "kubernetes.io/hostname": name, "topology.kubernetes.io/zone": "eu-central-1a",
                "node.kubernetes.io/instance-type": "m7i.large", "karpenter.sh/capacity-type": "spot"}},
            "spec": {"providerID": format!("aws:///eu-central-1a/{instance_id}")},
            "status": {
                "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
                    "lastHeartbeatTime": now(), "lastTransitionTime": now()}],
                "capacity": {"pods": "250", "cpu": "2", "memory": "8Gi"},
                "allocatable": {"pods": "250", "cpu": "2", "memory": "8Gi"},
                "nodeInfo": {"bootID": boot_id, "machineID": "", "systemUUID": "", "kernelVersion": "6.1", "osImage": "Linux",
                    "containerRuntimeVersion": "containerd://2", "kubeletVersion": "v1.37.2", "kubeProxyVersion": "",
                    "operatingSystem": "linux", "architecture": "amd64"}}
        });
        merge(&mut node, patch);
        let made = self.nodes().create(&PostParams::default(), &object(node)).await.expect("a node");
        TestNode { name, uid: made.metadata.uid.expect("a uid"), instance_id, boot_id }
    }

    /// The node as it is now.
    pub async fn get_node(&self, node: &TestNode) -> Node {
        self.nodes().get(&node.name).await.expect("the node is there")
    }

    /// Deletes the node and makes it again under its name, with another uid and boot: a machine that came back.
    pub async fn replace_node(&self, node: &TestNode, patch: Value) -> TestNode {
        let suffix = node.name.strip_prefix(&format!("{}-", self.namespace)).expect("one of this world");
        self.nodes().delete(&node.name, &DeleteParams::default()).await.expect("deleted");
        let boot_id = uuid(&format!("{}/boot/{}", node.name, node.uid));
        let mut all = json!({"status": {"nodeInfo": {"bootID": boot_id}}});
        merge(&mut all, patch);
        let made = self.node_with(suffix, all).await;
        TestNode { boot_id, ..made }
    }

    /// One pod, Running and Ready unless it says otherwise.
    pub async fn run(&self, node: &TestNode, pod: NewPod) -> Pod {
        if let Some(value) = pod.priority {
            self.priority_class(value).await;
        }
        create_pod(&self.client, &self.namespace, node, &pod).await
    }

    /// Many pods, many at a time; 110 take about half a second.
    pub async fn run_many(&self, node: &TestNode, count: usize, make: impl Fn(usize) -> NewPod) -> Vec<Pod> {
        let pods: Vec<_> = (0..count).map(make).collect();
        stream::iter(&pods).map(|pod| self.run(node, pod.clone())).buffered(IN_FLIGHT).collect().await
    }

    /// The names of this test's pods that still are there, sorted.
    pub async fn pod_names(&self) -> Vec<String> {
        let list = self.pods().list(&ListParams::default()).await.expect("a list");
        let mut names: Vec<_> = list.items.into_iter().filter_map(|pod| pod.metadata.name).collect();
        names.sort();
        names
    }

    /// Waits until none of this test's pods is left.
    pub async fn empty(&self, limit: Duration) {
        eventually("all pods are gone", limit, || async { self.pod_names().await.is_empty().then_some(()) }).await;
    }

    /// A budget for the pods with this `app` label; returns when the disruption controller has counted them.
    pub async fn budget(&self, name: &str, app: &str, budget: Budget) {
        self.unprocessed_budget(name, app, budget).await;
        let budgets: Api<PodDisruptionBudget> = Api::namespaced(self.client.clone(), &self.namespace);
        let matching = ListParams::default().labels(&format!("app={app}"));
        let ready = |pod: &Pod| pod.metadata.deletion_timestamp.is_none() && is_ready(pod);
        let pods = self.pods().list(&matching).await.expect("a list").items.iter().filter(|pod| ready(pod)).count();
        let (budgets, pods) = (&budgets, i32::try_from(pods).expect("few"));
        eventually("the budget is processed", Duration::from_secs(30), || async move {
            let status = budgets.get(name).await.expect("the budget").status?;
            let failed = status.conditions.iter().flatten().any(|c| c.reason == "SyncFailed");
            (failed || status.observed_generation == Some(1) && status.current_healthy == pods).then_some(())
        })
        .await;
    }

    /// A budget, without waiting for the controller.
    pub async fn unprocessed_budget(&self, name: &str, app: &str, budget: Budget) {
        let (key, value) = match budget {
            Budget::MinAvailable(n) => ("minAvailable", n),
            Budget::MaxUnavailable(n) => ("maxUnavailable", n),
        };
        let object = object(json!({"metadata": {"name": name},
            "spec": {key: value, "selector": {"matchLabels": {"app": app}}}}));
        let budgets: Api<PodDisruptionBudget> = Api::namespaced(self.client.clone(), &self.namespace);
        budgets.create(&PostParams::default(), &object).await.expect("a budget");
    }

    /// A kubelet for this node, on a thread of its own.
    pub fn kubelet(&self, node: &TestNode) -> Kubelet {
        Kubelet::start(&self.server, &[&node.name])
    }

    async fn priority_class(&self, value: i32) {
        let classes: Api<PriorityClass> = Api::all(self.client.clone());
        let class = object(json!({"metadata": {"name": format!("priority-{value}")}, "value": value}));
        match classes.create(&PostParams::default(), &class).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => panic!("cannot make a priority class: {error}"),
        }
    }
}

/// A pod to be made: owned by a ReplicaSet (that does not exist), 30 s of grace, ends 50 ms after SIGTERM.
#[derive(Clone, Debug)]
pub struct NewPod {
    name: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    owner: Option<(&'static str, &'static str)>,
    finalizers: Vec<String>,
    priority: Option<i32>,
    spec: Value,
    phase: &'static str,
    ready: bool,
    ip: &'static str,
}

impl NewPod {
    /// A pod of this name; its `app` label is the name without a trailing number (`web-3`: `web`).
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        let app = name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('-').to_owned();
        Self {
            labels: [("app".to_owned(), if app.is_empty() { name.clone() } else { app })].into(),
            name,
            annotations: BTreeMap::new(),
            owner: Some(("apps/v1", "ReplicaSet")),
            finalizers: Vec::new(),
            priority: None,
            spec: json!({"terminationGracePeriodSeconds": 30, "automountServiceAccountToken": false,
                "containers": [{"name": "main", "image": "test"}]}),
            phase: "Running",
            ready: true,
            ip: "10.1.2.3",
        }
    }

    /// terminationGracePeriodSeconds.
    pub fn grace(self, seconds: u64) -> Self {
        self.spec(json!({"terminationGracePeriodSeconds": seconds}))
    }

    /// How long the processes work on after SIGTERM (cut at the grace by SIGKILL).
    pub fn exits_after(self, span: Duration) -> Self {
        self.annotation(EXIT_AFTER, span.as_millis())
    }

    /// Ignores SIGTERM: ends by SIGKILL, when the grace is over.
    pub fn never_exits(self) -> Self {
        self.annotation(EXIT_AFTER, "never")
    }

    pub fn label(mut self, key: &str, value: impl ToString) -> Self {
        self.labels.insert(key.to_owned(), value.to_string());
        self
    }

    pub fn annotation(mut self, key: &str, value: impl ToString) -> Self {
        self.annotations.insert(key.to_owned(), value.to_string());
        self
    }

    /// A priority; its class is made where it is missing.
    pub fn priority(mut self, value: i32) -> Self {
        self.priority = Some(value);
        self.spec(json!({"priorityClassName": format!("priority-{value}")}))
    }

    /// One of the built-in classes, `system-node-critical` for instance.
    pub fn priority_class(self, name: &str) -> Self {
        self.spec(json!({"priorityClassName": name}))
    }

    /// Keeps the object after its processes have ended.
    pub fn finalizer(mut self, name: &str) -> Self {
        self.finalizers.push(name.to_owned());
        self
    }

    /// Owned by a DaemonSet.
    pub fn daemon_set(mut self) -> Self {
        self.owner = Some(("apps/v1", "DaemonSet"));
        self
    }

    /// Owned by a Job.
    pub fn job(mut self) -> Self {
        self.owner = Some(("batch/v1", "Job"));
        self
    }

    /// Owned by nobody.
    pub fn unmanaged(mut self) -> Self {
        self.owner = None;
        self
    }

    /// A static pod's mirror: only the kubelet can end it.
    pub fn mirror(mut self) -> Self {
        self.owner = Some(("v1", "Node"));
        self.annotation("kubernetes.io/config.mirror", "made-by-the-test")
            .annotation("kubernetes.io/config.source", "file")
            .annotation("kubernetes.io/config.hash", "made-by-the-test")
    }

    /// With an emptyDir volume.
    pub fn empty_dir(self) -> Self {
        self.spec(json!({"volumes": [{"name": "scratch", "emptyDir": {}}]}))
    }

    /// In this phase (`Pending`, `Succeeded`, `Failed`), not Ready.
    pub fn phase(mut self, phase: &'static str) -> Self {
        self.phase = phase;
        self.ready = phase == "Running";
        self
    }

    /// Running, but not Ready.
    pub fn not_ready(mut self) -> Self {
        self.ready = false;
        self
    }

    /// Under this address.
    pub fn ip(mut self, ip: &'static str) -> Self {
        self.ip = ip;
        self
    }

    /// Runs as this ServiceAccount.
    pub fn service_account(self, name: &str) -> Self {
        self.spec(json!({"serviceAccountName": name}))
    }

    /// Anything else, merged into the spec.
    pub fn spec(mut self, patch: Value) -> Self {
        merge(&mut self.spec, patch);
        self
    }

    fn body(&self, namespace: &str, node: &TestNode) -> Value {
        let mut spec = self.spec.clone();
        spec["nodeName"] = json!(node.name);
        let owners = self.owner.map(|(version, kind)| {
            // A Node as owner must be the real one.
            let (name, uid) = match kind {
                "Node" => (node.name.clone(), node.uid.clone()),
                _ => {
                    let name = &self.labels["app"];
                    (name.clone(), uuid(&format!("{namespace}/{kind}/{name}")))
                }
            };
            json!([{"apiVersion": version, "kind": kind, "name": name, "uid": uid, "controller": true}])
        });
        json!({"apiVersion": "v1", "kind": "Pod", "spec": spec, "metadata": {
            "name": self.name, "labels": self.labels, "annotations": self.annotations, "finalizers": self.finalizers,
            "ownerReferences": owners}})
    }

    fn status(&self) -> Value {
        let condition = |kind: &str, status: bool| {
            let status = if status { "True" } else { "False" };
            json!({"type": kind, "status": status, "lastTransitionTime": now()})
        };
        json!({"status": {
            "phase": self.phase, "startTime": now(), "podIP": self.ip, "podIPs": [{"ip": self.ip}],
            "conditions": [condition("PodScheduled", true), condition("ContainersReady", self.ready),
                condition("Ready", self.ready)]}})
    }
}

/// Creates a pod on a node and gives it the status that a kubelet would have reported.
pub(super) async fn create_pod(client: &Client, namespace: &str, node: &TestNode, pod: &NewPod) -> Pod {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let (api, body) = (&pods, &object(pod.body(namespace, node)));
    // Admission learns of new priority classes and accounts a moment after they are stored.
    let name = eventually("the pod is admitted", Duration::from_secs(10), || async move {
        match api.create(&PostParams::default(), body).await {
            Ok(made) => made.metadata.name,
            Err(kube::Error::Api(status)) if status.code == 403 && status.message.contains("found") => None,
            Err(error) => panic!("cannot make a pod: {error}"),
        }
    })
    .await;
    pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(pod.status())).await.expect("its status")
}

/// Whether the pod's Ready condition is True.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Deletes all objects that are named, without grace. For cleaning up between runs of a benchmark.
pub async fn delete_pods(pods: &Api<Pod>) {
    let names = pods.list(&ListParams::default()).await.expect("a list");
    let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    let deletions = names.items.iter().filter_map(|pod| pod.metadata.name.as_deref()).map(|name| {
        let now = &now;
        async move {
            match pods.delete(name, now).await {
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
                other => other.map(|_| ()),
            }
        }
    });
    stream::iter(deletions).buffer_unordered(IN_FLIGHT).try_collect::<()>().await.expect("deleted");
}

/// A typed object from JSON.
pub fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("a well-formed object")
}

/// JSON merge patch (RFC 7386).
pub fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let target = target.as_object_mut().expect("made one");
    for (key, value) in patch {
        if value.is_null() {
            target.remove(&key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// The same number for the same name (FNV-1a).
fn fingerprint(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn uuid(name: &str) -> String {
    let hash = fingerprint(name);
    format!("{:08x}-{:04x}-4000-8000-{:012x}", hash >> 32, (hash >> 16) & 0xffff, hash & 0xffff_ffff_ffff)
}

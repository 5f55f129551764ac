//! The agent's rights, as a chart would give them: ServiceAccounts, tokens bound to a pod of the agent's node, and
//! kubeconfig files that hold nothing else.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use k8s_openapi::{
    api::{
        authentication::v1::TokenRequest,
        core::v1::{Node, Pod, ServiceAccount},
    },
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

use super::{
    controlplane::{Server, client},
    eventually,
    fleet::{NewPod, TestNode, World, create_pod},
    keeper::keeper,
};

const NODE: &str = include_str!("../../../fixtures/rbac/agent-node.yaml");
const DIRECT: &str = include_str!("../../../fixtures/rbac/agent-direct.yaml");
/// The name that the fixtures use.
const NAME: &str = "spotter-agent";
const NAMESPACE: &str = "kube-system";

/// How the agent is allowed to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// As its own node: fixtures/rbac/agent-node.yaml.
    Node,
    /// Under its own name, behind the admission policy: fixtures/rbac/agent-direct.yaml.
    Direct,
}

impl Rights {
    /// Both fixtures name one account; on a shared server each needs its own.
    fn account(self) -> &'static str {
        match self {
            Self::Node => NAME,
            Self::Direct => "spotter-agent-direct",
        }
    }

    fn objects(self, account: &str) -> Vec<Value> {
        let text = match self {
            Self::Node => NODE,
            Self::Direct => DIRECT,
        };
        serde_saphyr::from_multiple(&text.replace(NAME, account)).expect("the fixture is YAML")
    }
}

/// An agent's identity on one node.
pub struct Agent {
    /// The node that the token is bound to.
    pub node: String,
    /// The file for `KUBECONFIG` or `--kubeconfig`.
    pub kubeconfig: PathBuf,
    /// The token's file, which the kubeconfig names; see [`Agent::set_token`].
    pub token_file: PathBuf,
    /// The user name that the server sees.
    pub user: String,
}

impl Agent {
    /// A client with exactly these rights, under the account's own name.
    pub async fn client(&self) -> Client {
        client(self.config().await)
    }

    /// A client that sends `Impersonate-User: system:node:<node>`.
    pub async fn as_node(&self, node: &str) -> Client {
        let mut config = self.config().await;
        config.auth_info.impersonate = Some(format!("system:node:{node}"));
        client(config)
    }

    /// kube's configuration from the file.
    pub async fn config(&self) -> kube::Config {
        let file = Kubeconfig::read_from(&self.kubeconfig).expect("its own file");
        let mut config =
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.expect("valid");
        config.default_retry = false;
        config
    }

    /// Replaces the token, as a rotation does: renamed into place, seen by clients that read the file again.
    pub fn set_token(&self, token: &str) {
        let beside = self.token_file.with_extension("new");
        std::fs::write(&beside, token).expect("a file");
        std::fs::rename(beside, &self.token_file).expect("renamed");
    }
}

impl World {
    /// An agent for this node, with a pod of its own there (DaemonSet-owned, in kube-system) and a token bound to it.
    pub async fn agent(&self, node: &TestNode, rights: Rights) -> Agent {
        let agent = self.agent_of(node, rights.account()).await;
        if rights == Rights::Direct {
            self.policy_stands(&agent).await;
        }
        agent
    }

    /// The same with single rights taken away, each as `(resource, verb)`: `("pods/eviction", "create")`.
    /// The account is the node's own, so that other tests keep their rights; no admission policy watches it.
    pub async fn agent_without(&self, node: &TestNode, rights: Rights, missing: &[(&str, &str)]) -> Agent {
        let account = format!("{NAME}-{}", node.name);
        for mut object in rights.objects(&account) {
            let kind = object["kind"].as_str().unwrap_or_default().to_owned();
            if kind == "ClusterRole" {
                remove(&mut object, missing);
            }
            if !kind.starts_with("ValidatingAdmission") {
                apply(self.client(), &object).await;
            }
        }
        self.agent_of(node, &account).await
    }

    async fn agent_of(&self, node: &TestNode, account: &str) -> Agent {
        let name = format!("{NAME}-{}", node.name);
        let pod = NewPod::new(&name).daemon_set().service_account(account);
        let pod = create_pod(self.client(), NAMESPACE, node, &pod).await;
        let token = bound_token(self.client(), account, &pod).await;
        let dir = keeper().subdir("agent");
        let token_file = dir.join("token");
        std::fs::write(&token_file, token).expect("a file");
        let kubeconfig_file = dir.join("kubeconfig");
        std::fs::write(&kubeconfig_file, kubeconfig(&self.server, &json!({"tokenFile": token_file}))).expect("a file");
        Agent {
            node: node.name.clone(),
            kubeconfig: kubeconfig_file,
            token_file,
            user: format!("system:serviceaccount:{NAMESPACE}:{account}"),
        }
    }

    /// Policies work a moment after they are stored.
    async fn policy_stands(&self, agent: &Agent) {
        let nodes: Api<Node> = Api::all(agent.client().await);
        let forbidden = json!({"metadata": {"labels": {"test/policy": "probe"}}});
        let (nodes, forbidden) = (&nodes, &forbidden);
        eventually("the admission policy works", Duration::from_secs(20), || async move {
            let dry = PatchParams { dry_run: true, ..PatchParams::default() };
            let answer = nodes.patch(&agent.node, &dry, &Patch::Merge(forbidden)).await;
            matches!(answer, Err(kube::Error::Api(status)) if status.code == 403 && status.message.contains("ValidatingAdmissionPolicy")).then_some(())
        })
        .await;
    }
}

/// Stores both sets of rights, and waits until they are in force.
pub(super) async fn install(server: &Arc<Server>) {
    let admin = server.admin();
    let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(admin.clone());
    eventually("the server makes kube-system", Duration::from_secs(30), || async {
        namespaces.get_opt(NAMESPACE).await.expect("readable").map(|_| ())
    })
    .await;
    for rights in [Rights::Node, Rights::Direct] {
        for object in rights.objects(rights.account()) {
            apply(&admin, &object).await;
        }
    }
}

/// Takes verbs out of a ClusterRole. A rule for several resources is split first.
fn remove(role: &mut Value, missing: &[(&str, &str)]) {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut rules = Vec::new();
    let mut removed = 0;
    for rule in list(&role["rules"]) {
        for resource in list(&rule["resources"]) {
            let gone = |verb: &Value| {
                missing
                    .iter()
                    .any(|(r, v)| resource == *r && verb.as_str().is_some_and(|s| s.rsplit(':').next() == Some(*v)))
            };
            let (gone, verbs): (Vec<_>, Vec<_>) = list(&rule["verbs"]).into_iter().partition(gone);
            removed += gone.len();
            if !verbs.is_empty() {
                rules.push(json!({"apiGroups": rule["apiGroups"], "resources": [resource], "verbs": verbs}));
            }
        }
    }
    assert_eq!(removed, missing.len(), "not all of {missing:?} are in the role");
    role["rules"] = Value::Array(rules);
}

/// A server-side apply of any object.
pub async fn apply(client: &Client, object: &Value) {
    let object: DynamicObject = serde_json::from_value(object.clone()).expect("an object");
    let types = object.types.clone().expect("kind and version");
    let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(&types).expect("a kind"));
    let name = object.metadata.name.clone().expect("a name");
    let api: Api<DynamicObject> = match &object.metadata.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    api.patch(&name, &PatchParams::apply("tests").force(), &Patch::Apply(&object)).await.expect("applied");
}

/// A token of this account that lives as long as the pod does, and names its node.
pub async fn bound_token(client: &Client, account: &str, pod: &Pod) -> String {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
    let request: TokenRequest = serde_json::from_value(json!({
        "spec": {"audiences": [], "expirationSeconds": 3600, "boundObjectRef":
            {"apiVersion": "v1", "kind": "Pod", "name": pod.metadata.name, "uid": pod.metadata.uid}}
    }))
    .expect("a request");
    let answer = accounts.create_token_request(account, &PostParams::default(), &request).await.expect("a token");
    answer.status.expect("answered").token
}

/// A kubeconfig file's content for this server and this user, and nothing else.
pub fn kubeconfig(server: &Server, user: &Value) -> String {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server.url, "certificate-authority": server.ca}}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    });
    // JSON is YAML.
    config.to_string()
}

impl Server {
    /// A token of `spotter-agent` that this server signed and that ended an hour ago: answered with 401.
    pub fn expired_token(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs();
        let issuer = "https://kubernetes.default.svc";
        let claims = json!({
            "iss": issuer, "aud": [issuer], "sub": format!("system:serviceaccount:{NAMESPACE}:{NAME}"),
            "iat": now - 7200, "nbf": now - 7200, "exp": now - 3600,
            "kubernetes.io": {"namespace": NAMESPACE, "serviceaccount": {"name": NAME, "uid": "0"}},
        });
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let text = format!("{}.{}", part(json!({"alg": "ES256", "typ": "JWT"})), part(claims));
        let random = ring::rand::SystemRandom::new();
        let signature = self.token_key.sign(&random, text.as_bytes()).expect("signed");
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// Now, as Kubernetes writes it (whole seconds).
pub fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

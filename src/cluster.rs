//! The Kubernetes adapter: everything that spotter asks the API server, in the words of the rest of the program.
//!
//! [`Cluster`] is cheap to clone. Each call takes its own time limit, is counted in [`Metrics`], and answers with what
//! to do: [`Answer`](crate::plan::Answer) for a pod, [`ApplyError`] for the claim, [`Error`] with its [`Class`] for the rest.
//!
//! Rights (cluster-wide): nodes get, watch, patch; pods list, watch, delete; pods/eviction create; pods/status patch;
//! events create. As its own node (`Identity::Node`) the API server narrows all of them to that node and its pods.

mod access;
mod decode;
mod error;
mod events;
mod identity;
mod metrics;
mod node;
mod node_watch;
mod pod_watch;
mod pods;
mod status;
mod token;
mod transport;
mod watch;

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{HeaderName, HeaderValue, Response};
use hyper::body::Bytes;
use kube::client::Body;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

pub use self::{
    error::{Class, Error, FieldConflict},
    events::{About, EventNote, Recorder},
    metrics::Metrics,
    node::{ApplyError, NodeFacts, NodeIntent, RECORD_ANNOTATION, Ready, TERMINATING_LABEL},
    node_watch::{NodeEvent, NodeWatch},
    pod_watch::{PodEvent, PodWatch},
    pods::PodRef,
};
use self::{
    status::Status,
    token::TokenFile,
    transport::{Lane, causes},
};
use crate::clock::Clock;

/// As whom to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IdentityChoice {
    /// As the own node where the API server allows it, otherwise directly.
    #[default]
    Auto,
    /// As the own node or not at all.
    Node,
    /// With the rights of the credentials themselves.
    Direct,
}

/// As whom requests are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// `Impersonate-User: system:node:<name>`: the API server binds every right to the own node.
    Node,
    /// Without impersonation.
    Direct,
}

/// The field managers of spotter's two modes. A claim excludes by this name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Manager {
    Agent,
    Queue,
}

impl Manager {
    /// The field manager.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "spotter-agent",
            Self::Queue => "spotter-queue",
        }
    }

    /// The other mode.
    pub const fn other(self) -> Self {
        match self {
            Self::Agent => Self::Queue,
            Self::Queue => Self::Agent,
        }
    }

    const fn mode(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Queue => "queue",
        }
    }
}

/// Which API server, which node, as whom.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `None`: in a pod its ServiceAccount, otherwise `KUBECONFIG` or `~/.kube/config`.
    pub kubeconfig: Option<PathBuf>,
    /// `None`: the current context.
    pub context: Option<String>,
    /// The name of the own Node.
    pub node: String,
    pub identity: IdentityChoice,
    /// Ours.
    pub manager: Manager,
}

/// Every kind of request that is ever sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    GetNode,
    ApplyNode,
    WatchNode,
    ListPods,
    WatchPods,
    Evict,
    MarkPod,
    DeletePod,
    CreateEvent,
}

impl Call {
    const ALL: [Self; 9] = [
        Self::GetNode,
        Self::ApplyNode,
        Self::WatchNode,
        Self::ListPods,
        Self::WatchPods,
        Self::Evict,
        Self::MarkPod,
        Self::DeletePod,
        Self::CreateEvent,
    ];

    /// For metrics.
    const fn verb(self) -> &'static str {
        match self {
            Self::GetNode => "get",
            Self::ApplyNode => "apply",
            Self::WatchNode | Self::WatchPods => "watch",
            Self::ListPods => "list",
            Self::Evict | Self::CreateEvent => "create",
            Self::MarkPod => "patch",
            Self::DeletePod => "delete",
        }
    }

    /// The verb of the permission: RBAC knows an apply as a patch.
    const fn right(self) -> &'static str {
        match self {
            Self::ApplyNode => "patch",
            _ => self.verb(),
        }
    }

    const fn resource(self) -> &'static str {
        match self {
            Self::GetNode | Self::ApplyNode | Self::WatchNode => "nodes",
            Self::ListPods | Self::WatchPods | Self::DeletePod => "pods",
            Self::Evict => "pods/eviction",
            Self::MarkPod => "pods/status",
            Self::CreateEvent => "events",
        }
    }
}

/// A whole answer.
struct Reply {
    code: u16,
    /// From the header, where it was given in seconds.
    retry_after: Option<Duration>,
    body: Bytes,
    /// As whom it was asked.
    identity: Identity,
}

impl Reply {
    fn is_success(&self) -> bool {
        (200..300).contains(&self.code)
    }

    fn status(&self) -> Status {
        Status::read(&self.body)
    }

    /// Whether only a request that its sender was allowed to make is answered so. The flow control and a broken server
    /// answer before anybody looks at rights.
    fn proves_authorization(&self) -> bool {
        match self.code {
            404 | 409 | 422 => true,
            429 => self.status().cause("DisruptionBudget").is_some(),
            _ => self.is_success(),
        }
    }
}

struct Inner {
    node: String,
    choice: IdentityChoice,
    manager: Manager,
    /// For messages.
    server: String,
    client: kube::Client,
    ahead: transport::Ahead,
    /// Sent with every request in each identity.
    as_node: Vec<(HeaderName, HeaderValue)>,
    as_itself: Vec<(HeaderName, HeaderValue)>,
    /// Where the credentials are a token in a file.
    token: Option<TokenFile>,
    direct: AtomicBool,
    /// Whether the identity was logged.
    announced: AtomicBool,
    /// Whether the server does not support streaming lists.
    lists_only: AtomicBool,
    clock: Clock,
    metrics: Metrics,
}

/// The API server, seen from one node.
#[derive(Clone)]
pub struct Cluster(Arc<Inner>);

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("server", &self.0.server).field("node", &self.0.node).finish_non_exhaustive()
    }
}

impl Cluster {
    /// Reads the credentials and builds the client. Sends no request; a kubeconfig with an exec plugin runs it.
    ///
    /// # Errors
    /// No usable configuration, a proxy in it, credentials that cannot be read, a node name that is none.
    pub async fn new(settings: Settings, clock: Clock, metrics: Metrics) -> Result<Self, Error> {
        let Settings { kubeconfig, context, node, identity: choice, manager } = settings;
        access::check_node_name(&node)?;
        let mut config = access::load(kubeconfig.as_deref(), context).await?;
        let agent = format!("spotter/{} ({})", env!("CARGO_PKG_VERSION"), manager.mode());
        let agent = HeaderValue::try_from(agent).map_err(|error| Error::config("the user agent", &error))?;
        config.headers.push((http::header::USER_AGENT, agent));
        let as_itself = access::take_impersonation(&mut config)?;
        let token = TokenFile::take(&mut config)?;
        let as_node = access::impersonate(&format!("system:node:{node}"))?;
        let (client, ahead) = transport::client(&config)?;
        let inner = Inner {
            client,
            ahead,
            server: config.cluster_url.to_string().trim_end_matches('/').to_owned(),
            node,
            choice,
            manager,
            as_node: vec![as_node],
            as_itself,
            token,
            direct: AtomicBool::new(choice == IdentityChoice::Direct),
            announced: AtomicBool::new(false),
            lists_only: AtomicBool::new(false),
            clock,
            metrics,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// The name of the own Node.
    pub fn node_name(&self) -> &str {
        &self.0.node
    }

    /// As whom requests are sent now.
    pub fn identity(&self) -> Identity {
        if self.0.direct.load(Ordering::Relaxed) { Identity::Direct } else { Identity::Node }
    }

    /// Says that a claim is about to be followed by a list of the pods and their evictions: their connections are opened
    /// meanwhile. Sends no request, and does not wait.
    pub fn expect_drain(&self) {
        self.0.ahead.open();
    }

    async fn once(
        &self,
        call: Call,
        lane: Lane,
        request: &Outgoing,
        identity: Identity,
        until: Instant,
        limit: Duration,
    ) -> Result<Reply, Error> {
        let _in_flight = self.0.metrics.start();
        let answer = timeout_at(until, async {
            let response = self.send(call, lane, request, identity).await?;
            let code = response.status().as_u16();
            let retry_after = retry_after(response.headers());
            let body = response.into_body().collect_bytes().await;
            let body = body.map_err(|error| self.broken(call, &error))?;
            Ok(Reply { code, retry_after, body, identity })
        });
        match answer.await {
            Ok(Ok(reply)) => {
                self.0.metrics.answered(call, reply.code);
                Ok(reply)
            }
            Ok(Err(error)) => {
                self.0.metrics.failed(call);
                Err(error)
            }
            Err(_) => {
                self.0.metrics.timed_out(call);
                Err(self.late(call, limit))
            }
        }
    }

    /// Sends a request and gives the answer's head; the body is still to come. A token that was renewed since it was
    /// read costs one more request, and is no failure.
    async fn send(
        &self,
        call: Call,
        lane: Lane,
        request: &Outgoing,
        identity: Identity,
    ) -> Result<Response<Body>, Error> {
        let token = self.0.token.as_ref().map(TokenFile::header);
        let response = self.send_with(call, lane, request, identity, token.as_ref()).await?;
        if response.status() == http::StatusCode::UNAUTHORIZED
            && let (Some(file), Some(used)) = (&self.0.token, &token)
            && let Some(renewed) = file.instead_of(used)
        {
            return self.send_with(call, lane, request, identity, Some(&renewed)).await;
        }
        Ok(response)
    }

    async fn send_with(
        &self,
        call: Call,
        lane: Lane,
        request: &Outgoing,
        identity: Identity,
        token: Option<&HeaderValue>,
    ) -> Result<Response<Body>, Error> {
        let mut outgoing = request.clone().map(Body::from);
        let headers = match identity {
            Identity::Node => &self.0.as_node,
            Identity::Direct => &self.0.as_itself,
        };
        for (name, value) in headers {
            outgoing.headers_mut().append(name.clone(), value.clone());
        }
        if let Some(token) = token {
            outgoing.headers_mut().insert(http::header::AUTHORIZATION, token.clone());
        }
        outgoing.extensions_mut().insert(lane);
        self.0.client.send(outgoing).await.map_err(|error| self.broken(call, &error))
    }

    fn broken(&self, call: Call, error: &kube::Error) -> Error {
        if let Some(auth) = causes(error).find_map(|cause| cause.downcast_ref::<kube::client::AuthError>()) {
            return Error::config("the credentials", auth);
        }
        Error::transport(&self.0.server, call, error)
    }

    fn late(&self, call: Call, limit: Duration) -> Error {
        Error::Timeout { server: self.0.server.clone(), verb: call.verb(), resource: call.resource(), limit }
    }

    /// The error for an answer that is no success.
    fn refusal(&self, call: Call, reply: &Reply) -> Error {
        let status = reply.status();
        match reply.code {
            401 => Error::Unauthorized { server: self.0.server.clone(), message: status.message },
            403 => {
                let forced = self.0.choice == IdentityChoice::Node && status.is_impersonation_refused();
                let user = match reply.identity {
                    Identity::Node => Some(format!("system:node:{}", self.0.node)),
                    Identity::Direct => None,
                };
                Error::Forbidden {
                    verb: call.right(),
                    resource: call.resource(),
                    user,
                    message: status.message,
                    advice: if forced { error::GRANT_IMPERSONATION } else { error::GRANT },
                }
            }
            404 if call.resource() == "nodes" => {
                Error::NotFound { message: format!("there is no Node {:?}; check --node-name", self.0.node) }
            }
            404 => Error::NotFound { message: format!("{} not found: {}", call.resource(), status.message) },
            code => Error::Api { verb: call.verb(), resource: call.resource(), code, message: status.message },
        }
    }
}

/// A request before it is given an identity and a connection.
type Outgoing = http::Request<Vec<u8>>;

/// A request that cannot be built: only a name that is none can cause it.
fn unbuildable(error: kube::core::request::Error) -> Error {
    Error::config("a request", &error)
}

/// The longest wait that a server is obeyed in: no answer may put off a pod until after the end of its node.
const PAUSE_MOST: Duration = Duration::from_secs(60);

/// The wait that an answer asks for.
fn pause(seconds: u64) -> Duration {
    Duration::from_secs(seconds).min(PAUSE_MOST)
}

fn retry_after(headers: &http::HeaderMap) -> Option<Duration> {
    let seconds = headers.get(http::header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(pause(seconds))
}

/// A number of 0 up to 1 that differs each time. Spreads retries; nothing secret hangs on it.
fn jitter() -> f64 {
    use std::hash::{BuildHasher, Hasher};
    let random = std::hash::RandomState::new().build_hasher().finish();
    f64::from(u32::try_from(random >> 32).unwrap_or_default()) / f64::from(u32::MAX)
}

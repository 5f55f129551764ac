//! The bare client: evicts the pods of one node as fast as the server lets it, with nothing around it. What spotter is
//! compared with.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream::FuturesUnordered};
use http::{Request, Response};
use hyper_util::{
    client::legacy::{Client as Hyper, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use k8s_openapi::api::{
    core::v1::{Node, Pod},
    policy::v1::Eviction,
};
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams, PostParams},
    client::{Body, ConfigExt},
    core::Status,
};
use serde_json::json;
use tower::{BoxError, Service, ServiceBuilder};

use super::{controlplane::install_tls, fleet::object};

type Connection = Hyper<hyper_rustls::HttpsConnector<HttpConnector>, Body>;

/// kube over HTTP/2: one client, its requests spread over several connections.
pub fn http2_client(config: &kube::Config, connections: usize) -> Client {
    install_tls();
    let connection = || -> Connection {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        let tls = config.rustls_client_config().expect("TLS");
        let https = hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(tls).https_only().enable_http2();
        Hyper::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .http2_only(true)
            .build(https.wrap_connector(http))
    };
    let spread = Spread { connections: (0..connections).map(|_| connection()).collect(), next: Arc::default() };
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().expect("a token"))
        .layer(config.extra_headers_layer().expect("headers"))
        .map_err(BoxError::from)
        .service(spread);
    Client::new(service, config.default_namespace.clone())
}

/// Hands requests to connections in turn: a server allows 100 streams on one.
#[derive(Clone)]
struct Spread {
    connections: Vec<Connection>,
    next: Arc<AtomicUsize>,
}

impl Service<Request<Body>> for Spread {
    type Response = Response<hyper::body::Incoming>;
    type Error = hyper_util::client::legacy::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        Box::pin(self.connections[turn].request(request))
    }
}

/// What a run took.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// Start of the apply to its answer.
    pub claim: Duration,
    /// Start of the apply to the last accepted eviction.
    pub all: Duration,
    /// Accepted evictions.
    pub evictions: usize,
}

/// Cordons the node by a server-side apply, lists its pods in `namespace`, and evicts them all at once, over three
/// connections opened for it: one for the apply and the list, two for the evictions. The identity is the config's.
///
/// # Panics
/// When the server refuses anything: there is nothing to compare with then.
pub async fn evict_all(config: &kube::Config, node: &str, namespace: &str) -> Took {
    let control = http2_client(config, 1);
    let evictions = http2_client(config, 2);
    let start = Instant::now();
    let nodes: Api<Node> = Api::all(control.clone());
    let cordon =
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}, "spec": {"unschedulable": true}});
    // The connections are opened meanwhile; the answers do not matter.
    let warm = |_| evictions.request_text(Request::get("/version").body(Vec::new()).expect("a request"));
    let warm = futures::future::join_all((0..2).map(warm));
    let apply = PatchParams::apply("bare-client");
    let (claimed, _) =
        futures::join!(async { nodes.patch(node, &apply, &Patch::Apply(cordon)).await.map(|_| start.elapsed()) }, warm);
    let claim = claimed.expect("cordoned");
    let fields = ListParams::default().fields(&format!("spec.nodeName={node}")).match_any();
    let pods = Api::<Pod>::all(control.clone()).list_metadata(&fields).await.expect("a list").items;
    let mut accepted: FuturesUnordered<_> = pods
        .iter()
        .filter(|pod| pod.metadata.namespace.as_deref() == Some(namespace))
        .map(|pod| {
            let api: Api<Pod> = Api::namespaced(evictions.clone(), namespace);
            async move {
                let name = pod.metadata.name.as_deref().expect("a name");
                let eviction: Eviction = object(json!({"metadata": {"name": name, "namespace": namespace},
                    "deleteOptions": {"preconditions": {"uid": pod.metadata.uid}}}));
                api.create_subresource::<_, Status>("eviction", name, &PostParams::default(), &eviction).await
            }
        })
        .collect();
    let mut count = 0;
    while let Some(answer) = accepted.next().await {
        answer.expect("accepted");
        count += 1;
    }
    Took { claim, all: start.elapsed(), evictions: count }
}

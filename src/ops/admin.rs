//! The admin server: probes and metrics. It only reads: nobody can make spotter do anything through it.

use std::{collections::VecDeque, fmt, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use super::metrics::{Exposition, MetricsRegistry};

/// Says whether a part is ready, and if not, why not. Asked at every probe, so it must be quick.
pub type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Connections at once. When another one comes, the oldest goes: whoever holds connections open must not keep the
/// kubelet's probe out, for that would get the agent restarted.
const MAX_CONNECTIONS: usize = 64;

/// How long a client may take to say what it wants; the kubelet takes a millisecond.
const HEADER_TIME: Duration = Duration::from_secs(5);

/// How long a connection lives at most, with the answer written and read. Prometheus gives up after 10 s by default.
const CONNECTION_TIME: Duration = Duration::from_secs(15);

/// The longest request head; the least that hyper allows.
const MAX_HEAD_BYTES: usize = 8192;

/// Before the next try when a connection cannot be accepted, usually for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the server shows.
#[derive(Clone)]
pub struct Admin {
    metrics: Arc<MetricsRegistry>,
    checks: Vec<Check>,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("checks", &self.checks.len()).finish_non_exhaustive()
    }
}

impl Admin {
    /// Ready at once, as long as no check is added.
    pub fn new(metrics: Arc<MetricsRegistry>) -> Self {
        Self { metrics, checks: Vec::new() }
    }

    /// Ready only when this check agrees, too.
    #[must_use]
    pub fn ready_when(mut self, check: Check) -> Self {
        self.checks.push(check);
        self
    }

    fn router(self) -> Router {
        Router::new()
            .route("/livez", get(async || "ok\n"))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .fallback(async || (StatusCode::NOT_FOUND, "not found: there are /livez, /readyz and /metrics\n"))
            .with_state(self)
    }
}

async fn readyz(State(admin): State<Admin>) -> (StatusCode, String) {
    let reasons: Vec<String> = admin.checks.iter().filter_map(|check| check().err()).collect();
    if reasons.is_empty() {
        return (StatusCode::OK, "ok\n".to_owned());
    }
    (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
}

async fn metrics(State(admin): State<Admin>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let exposition = Exposition::negotiate(accept);
    match admin.metrics.encode(exposition) {
        Ok(page) => ([(header::CONTENT_TYPE, exposition.content_type())], page).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// Serves on `listen` until `stop`, as one of `tasks`, and gives the address that it got.
/// An address that cannot be had is a warning and `None`: a node is better drained unseen than not at all.
pub async fn spawn(
    listen: SocketAddr,
    admin: Admin,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> Option<SocketAddr> {
    let bound = async {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        Ok::<_, std::io::Error>((listener, address))
    };
    match bound.await {
        Ok((listener, address)) => {
            info!(%address, "probes and metrics are served");
            tasks.spawn(serve(listener, admin.router(), stop));
            Some(address)
        }
        Err(error) => {
            warn!("cannot listen on {listen} (--listen): {error}; there are no probes and no metrics");
            None
        }
    }
}

async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    let mut oldest_first: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => oldest_first.retain(|connection| !connection.is_finished()),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    if oldest_first.len() >= MAX_CONNECTIONS
                        && let Some(oldest) = oldest_first.pop_front()
                    {
                        oldest.abort();
                    }
                    oldest_first.push_back(connections.spawn(timeout(CONNECTION_TIME, answer(stream, router.clone()))));
                }
                Err(_) => sleep(ACCEPT_PAUSE).await,
            },
        }
    }
}

/// One request on one connection. Without keep-alive nobody holds one for nothing, and probes and scrapes are seconds
/// apart anyway.
async fn answer(stream: TcpStream, router: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .keep_alive(false)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // A client that goes away, or speaks something else, is its own business.
    let _ = connection.await;
}

//! The connections to the API server.
//!
//! kube's own client speaks HTTP/1.1 only: a connection for each request in flight. This one speaks HTTP/2 on a few
//! connections, one set for each purpose ([`Lane`]), so that a burst of evictions or many watches can never stand in
//! front of the claim. A server that does not speak HTTP/2 is spoken to in HTTP/1.1 for the rest of the process.

use std::{
    error::Error as StdError,
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Uri};
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::{
    client::legacy::{
        Client as HyperClient, Error as HyperError,
        connect::{Connection, HttpConnector},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use kube::{
    Config,
    client::{Body, ConfigExt},
};
use rustls::{AlertDescription, ClientConfig};
use tokio::{net::TcpStream, task::JoinError, time::Instant};
use tokio_util::task::AbortOnDropHandle;
use tower::{BoxError, Service, ServiceBuilder, retry::Policy, retry::RetryLayer};
use tracing::{debug, info};

use super::error::Error;

/// TCP and TLS together. A frozen server accepts TCP and then says nothing: without this limit the handshake, and
/// every request that waits for the same connection, would hang.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// The server allows 100 streams on a connection; 110 evictions at once fit on two. A third brings nothing.
const EVICTION_CONNECTIONS: usize = 2;
/// How long an unanswered ping may take before the connection counts as dead.
const PING_LIMIT: Duration = Duration::from_secs(2);
/// Pings of connections with work on them: a dead peer is noticed after at most 4 s.
const PING_BUSY: Duration = Duration::from_secs(2);
/// Pings of the control connection while nothing happens; they also keep it alive in load balancers and NAT tables.
const PING_IDLE: Duration = Duration::from_secs(5);
/// Eviction connections are closed after this: between two terminations nobody needs them.
const EVICTIONS_IDLE: Duration = Duration::from_secs(30);
/// A connection opened ahead is worth nothing later: the server may have given it up meanwhile.
const AHEAD_LIMIT: Duration = Duration::from_secs(2);
/// Tries of a request that the server provably did not process (GOAWAY, refused stream).
const TRIES: u8 = 6;
/// Pauses before a connect is tried again. Short and few: how long to wait for a server is the caller's decision.
const CONNECT_PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(80)];

/// What a request is for, and thereby which connections it uses. Travels in the request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// Claim, record, own Node: one connection that is never shared with bulk work and stays open.
    Control,
    /// Evictions, conditions, deletions.
    Evictions,
    /// Watches, lists and events.
    Watches,
}

type Http = HyperClient<Connector, Body>;

/// Builds the whole stack. The caller has taken impersonation out of `config`; it is set for each request.
pub(super) fn client(config: &Config) -> Result<(kube::Client, Ahead), Error> {
    let fault = |error: kube::Error| Error::config("the Kubernetes client", &error);
    let connections = Connections::new(config)?;
    let ahead = Ahead {
        server: config.cluster_url.clone(),
        connectors: connections.0.ahead.clone(),
        http1: connections.0.http1.clone(),
    };
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(fault)?)
        .layer(config.extra_headers_layer().map_err(fault)?)
        .map_err(BoxError::from)
        .layer(RetryLayer::new(Repeat::new(connections.0.http1.clone())))
        .service(connections);
    Ok((kube::Client::new(service, config.default_namespace.clone()), ahead))
}

/// Opens the connections of a drain while its claim is under way, so that the list and the evictions need not wait for
/// theirs. No request is sent.
pub(super) struct Ahead {
    server: Uri,
    connectors: Arc<[Connector]>,
    http1: Arc<AtomicBool>,
}

impl Ahead {
    pub(super) fn open(&self) {
        if !self.http1.load(Ordering::Relaxed) {
            self.connectors.iter().for_each(|connector| connector.open_ahead(self.server.clone()));
        }
    }
}

/// Picks the connection for each request. Small, because each request holds several clones of it while it is under way.
#[derive(Clone)]
struct Connections(Arc<Lanes>);

struct Lanes {
    control: Http,
    evictions: Vec<Http>,
    watches: Http,
    plain: Http,
    /// Of the evictions and the watches.
    ahead: Arc<[Connector]>,
    /// Set once it is known that the server does not speak HTTP/2.
    http1: Arc<AtomicBool>,
    next: AtomicUsize,
}

impl Connections {
    fn new(config: &Config) -> Result<Self, Error> {
        let tls = config.rustls_client_config().map_err(|error| Error::config("TLS", &error))?;
        let name = config.tls_server_name.as_deref();
        let h2 = Connector::new(tls.clone(), name, true)?;
        let h1 = Connector::new(tls, name, false)?;
        let multiplexed = |connector: &Connector, ping: Duration, while_idle: bool, idle: Option<Duration>| {
            HyperClient::builder(TokioExecutor::new())
                .timer(TokioTimer::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(idle)
                .http2_only(true)
                .http2_keep_alive_interval(ping)
                .http2_keep_alive_timeout(PING_LIMIT)
                .http2_keep_alive_while_idle(while_idle)
                .build(connector.clone())
        };
        let ahead: Arc<[_]> = (0..=EVICTION_CONNECTIONS).map(|_| h2.apart()).collect();
        let bulk = |connector: &Connector| multiplexed(connector, PING_BUSY, false, Some(EVICTIONS_IDLE));
        let (for_evictions, for_watches) = ahead.split_at(EVICTION_CONNECTIONS);
        // Without TLS there is no negotiation: nobody serves HTTP/2 in the clear to a client that did not ask.
        let clear = config.cluster_url.scheme_str() == Some("http");
        let lanes = Lanes {
            control: multiplexed(&h2, PING_IDLE, true, None),
            evictions: for_evictions.iter().map(bulk).collect(),
            watches: bulk(for_watches.first().unwrap_or(&h2)),
            plain: HyperClient::builder(TokioExecutor::new())
                .timer(TokioTimer::new())
                .pool_timer(TokioTimer::new())
                .build(h1),
            http1: Arc::new(AtomicBool::new(clear)),
            ahead: ahead.clone(),
            next: AtomicUsize::default(),
        };
        Ok(Self(Arc::new(lanes)))
    }
}

impl Lanes {
    fn pick(&self, lane: Lane) -> &Http {
        if self.http1.load(Ordering::Relaxed) {
            return &self.plain;
        }
        match lane {
            Lane::Control => &self.control,
            Lane::Watches => &self.watches,
            Lane::Evictions => {
                let turn = self.next.fetch_add(1, Ordering::Relaxed);
                self.evictions.get(turn % self.evictions.len().max(1)).unwrap_or(&self.control)
            }
        }
    }
}

impl Service<Request<Body>> for Connections {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = HyperError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, HyperError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), HyperError>> {
        Poll::Ready(Ok(()))
    }

    /// Each request is a task: whichever request comes first opens the connection for all, and one that its owner
    /// does not poll for a while (a watch, while the claim is awaited) would hold up the others.
    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let lane = request.extensions().get::<Lane>().copied().unwrap_or(Lane::Control);
        let task = AbortOnDropHandle::new(tokio::spawn(self.0.pick(lane).request(request)));
        Box::pin(async move {
            match task.await.map_err(JoinError::try_into_panic) {
                Ok(answer) => answer,
                Err(Ok(panic)) => std::panic::resume_unwind(panic),
                // Only the end of the runtime cancels it.
                Err(Err(_)) => std::future::pending().await,
            }
        })
    }
}

/// TCP and TLS within [`CONNECT_LIMIT`], and the assurance that HTTP/2 was agreed on where it is to be spoken.
#[derive(Clone)]
struct Connector {
    https: HttpsConnector<HttpConnector>,
    http2: bool,
    /// Being opened since, before anybody asked for it.
    ahead: Arc<Mutex<Option<(Instant, Connecting)>>>,
}

type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;
type Connecting = AbortOnDropHandle<Result<Stream, BoxError>>;

impl Connector {
    fn new(tls: ClientConfig, server_name: Option<&str>, http2: bool) -> Result<Self, Error> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        // Nagle's algorithm costs 40 ms on the first request of each connection, and on the claim.
        tcp.set_nodelay(true);
        // For HTTP/1.1, which has no pings: a peer that vanished ends a watch after about 16 s.
        tcp.set_keepalive(Some(Duration::from_secs(10)));
        tcp.set_keepalive_interval(Some(Duration::from_secs(2)));
        tcp.set_keepalive_retries(Some(3));
        let mut builder = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
        if let Some(name) = server_name {
            let name = name.to_owned().try_into();
            let name = name.map_err(|error| Error::config("tls-server-name in the kubeconfig", &error))?;
            builder = builder.with_server_name_resolver(FixedServerNameResolver::new(name));
        }
        let https =
            if http2 { builder.enable_http2().wrap_connector(tcp) } else { builder.enable_http1().wrap_connector(tcp) };
        Ok(Self { https, http2, ahead: Arc::default() })
    }

    /// The same for other connections: what is opened ahead for the one is not for the other.
    fn apart(&self) -> Self {
        Self { ahead: Arc::default(), ..self.clone() }
    }

    fn open_ahead(&self, server: Uri) {
        let connecting = AbortOnDropHandle::new(tokio::spawn(self.clone().connect(server)));
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), connecting));
    }

    fn take_ahead(&self) -> Option<Connecting> {
        let (since, connecting) = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (since.elapsed() < AHEAD_LIMIT).then_some(connecting)
    }

    fn connect(mut self, server: Uri) -> impl Future<Output = Result<Stream, BoxError>> + Send + 'static {
        let connecting = self.https.call(server);
        let http2 = self.http2;
        async move {
            let Ok(connected) = tokio::time::timeout(CONNECT_LIMIT, connecting).await else {
                let text = format!("no connection within {} s", CONNECT_LIMIT.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text).into());
            };
            let stream = connected?;
            // A server that ignores the negotiation would be sent an HTTP/2 preface that it cannot read.
            if http2 && !stream.connected().is_negotiated_h2() {
                return Err(NoHttp2.into());
            }
            Ok(stream)
        }
    }
}

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.https.poll_ready(context)
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let ahead = self.take_ahead();
        let connecting = self.clone().connect(server);
        Box::pin(async move {
            if let Some(ahead) = ahead
                && let Ok(Ok(stream)) = ahead.await
            {
                return Ok(stream);
            }
            connecting.await
        })
    }
}

#[derive(Debug)]
struct NoHttp2;

impl fmt::Display for NoHttp2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the server did not agree on HTTP/2")
    }
}

impl StdError for NoHttp2 {}

/// Sends a request again where the server provably did not process it, POST included. Everything else is the
/// caller's decision: after a lost connection nobody knows what was carried out.
#[derive(Clone)]
struct Repeat {
    tries_left: u8,
    connects: usize,
    http1: Arc<AtomicBool>,
}

impl Repeat {
    fn new(http1: Arc<AtomicBool>) -> Self {
        Self { tries_left: TRIES - 1, connects: 0, http1 }
    }
}

type Pause = Pin<Box<dyn Future<Output = ()> + Send>>;

impl<R> Policy<Request<Body>, R, HyperError> for Repeat {
    type Future = Pause;

    fn retry(&mut self, _: &mut Request<Body>, result: &mut Result<R, HyperError>) -> Option<Pause> {
        let error = result.as_ref().err()?;
        self.tries_left = self.tries_left.checked_sub(1)?;
        if !self.http1.load(Ordering::Relaxed) && refuses_http2(error) {
            info!("the API server does not speak HTTP/2: using HTTP/1.1");
            self.http1.store(true, Ordering::Relaxed);
            return Some(Box::pin(std::future::ready(())));
        }
        if is_unprocessed(error) {
            debug!(%error, "the API server closed the connection before it read the request: sending it again");
            return Some(Box::pin(std::future::ready(())));
        }
        if error.is_connect() {
            let pause = *CONNECT_PAUSES.get(self.connects)?;
            self.connects += 1;
            return Some(Box::pin(tokio::time::sleep(pause)));
        }
        None
    }

    fn clone_request(&mut self, request: &Request<Body>) -> Option<Request<Body>> {
        let mut copy = Request::new(request.body().try_clone()?);
        *copy.method_mut() = request.method().clone();
        *copy.uri_mut() = request.uri().clone();
        *copy.headers_mut() = request.headers().clone();
        *copy.extensions_mut() = request.extensions().clone();
        Some(copy)
    }
}

/// A graceful GOAWAY that came before the request, or a refused stream (RFC 9113, 8.7): never processed.
fn is_unprocessed(error: &HyperError) -> bool {
    causes(error).filter_map(|cause| cause.downcast_ref::<h2::Error>()).any(|cause| {
        let graceful = cause.is_go_away() && cause.is_remote() && cause.reason() == Some(h2::Reason::NO_ERROR);
        graceful || cause.reason() == Some(h2::Reason::REFUSED_STREAM)
    })
}

fn refuses_http2(error: &HyperError) -> bool {
    causes(error).any(|cause| {
        let alert = cause.downcast_ref::<rustls::Error>();
        matches!(alert, Some(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)))
            || cause.is::<NoHttp2>()
    })
}

/// An error and everything under it, the inside of I/O errors included (which `source` leaves out).
pub(super) fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&current| {
        let inside = current.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        inside.map(|inner| inner as &(dyn StdError + 'static)).or_else(|| current.source())
    })
}

/// Whether a failed exchange ended before the request could have been sent, or cannot tell.
pub(super) fn never_sent(error: &(dyn StdError + 'static)) -> bool {
    causes(error).any(|cause| cause.downcast_ref::<HyperError>().is_some_and(HyperError::is_connect))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_inside_an_io_error_is_found() {
        let deep = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, NoHttp2));
        assert!(causes(&deep).any(|cause| cause.is::<NoHttp2>()));
        assert_eq!(causes(&deep).last().unwrap().to_string(), "the server did not agree on HTTP/2");
    }
}

//! The client: a token, and GETs that carry it.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use reqwest::{Method, StatusCode, Url, header::HeaderValue};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    health::Health,
    metrics::{Metrics, code_label},
};
use crate::notice::InstanceId;

/// Where the service is on every instance with IPv4. IPv6 (where enabled): `http://[fd00:ec2::254]`.
pub const DEFAULT_URL: &str = "http://169.254.169.254";

/// Longest wait for one request, its body included. The service is on the host itself: a good answer takes a few
/// milliseconds, and the spot path must be free again for its next poll.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest body that is read. The longest real one, a list of scheduled events, has a few kilobytes.
const BODY_LIMIT: usize = 256 * 1024;

/// Lifetime that is asked for a token, in seconds: the most that the service gives (six hours).
const TOKEN_TTL_SECONDS: u64 = 21_600;

/// A token is replaced this long before it ends, or after nine tenths of a shorter life. Until it really ends it is
/// still good, so a refresh that fails costs nothing.
const TOKEN_REFRESH_AHEAD: Duration = Duration::from_secs(300);

/// Waits between attempts to learn the identity, doubled up to the longest.
const IDENTITY_RETRY: Duration = Duration::from_millis(250);
const IDENTITY_RETRY_LONGEST: Duration = Duration::from_secs(5);

/// A failure that goes on is logged this often.
pub(super) const LOG_AGAIN: Duration = Duration::from_secs(30);

const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";

/// What can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    InstanceId,
    InstanceType,
    Zone,
    Region,
    LifeCycle,
    Spot,
    Rebalance,
    Scheduled,
    History,
    TargetState,
}

impl Path {
    /// The values of the label `path`, `token` among them.
    pub(super) const LABELS: [&'static str; 6] = ["token", "identity", "spot", "rebalance", "maintenance", "asg"];

    /// Below `/latest/meta-data/`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InstanceId => "instance-id",
            Self::InstanceType => "instance-type",
            Self::Zone => "placement/availability-zone",
            Self::Region => "placement/region",
            Self::LifeCycle => "instance-life-cycle",
            Self::Spot => "spot/instance-action",
            Self::Rebalance => "events/recommendations/rebalance",
            Self::Scheduled => "events/maintenance/scheduled",
            Self::History => "events/maintenance/history",
            Self::TargetState => "autoscaling/target-lifecycle-state",
        }
    }

    const fn label(self) -> &'static str {
        match self {
            Self::InstanceId | Self::InstanceType | Self::Zone | Self::Region | Self::LifeCycle => "identity",
            Self::Spot => "spot",
            Self::Rebalance => "rebalance",
            Self::Scheduled | Self::History => "maintenance",
            Self::TargetState => "asg",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why there was no answer that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The HTTP client could not be built.
    #[error("cannot build the client for the instance metadata service: {0}")]
    Client(#[source] reqwest::Error),
    /// The PUT for a token was swallowed. That is what the service does when the hop limit is too low.
    #[error(
        "the instance metadata service at {url} did not answer the request for a token within {} s. Not on EC2? \
         A hop limit of 1 (HttpPutResponseHopLimit) also swallows this request from pods outside the host network: \
         run with hostNetwork: true, or raise the limit to 2", REQUEST_TIMEOUT.as_secs()
    )]
    TokenTimeout { url: String },
    /// No answer in time, for a request that had a token.
    #[error("the instance metadata service at {url} did not answer {path} within {} s", REQUEST_TIMEOUT.as_secs())]
    Timeout { url: String, path: &'static str },
    /// No connection, or it broke.
    #[error("the instance metadata service at {url} cannot be reached for {path}: {cause}")]
    Unreachable { url: String, path: &'static str, cause: String },
    /// An answer, but not the one asked for.
    #[error("the instance metadata service answered {status} to {path}{}", hint(*.status, .path))]
    Status { path: &'static str, status: u16 },
    /// The right status with a body that cannot be right.
    #[error("the instance metadata service answered {path} with {reason}: is something else answering in its place?")]
    Body { path: &'static str, reason: String },
}

const TOKEN_PATH: &str = "api/token";

fn hint(status: u16, path: &str) -> &'static str {
    match (status, path == TOKEN_PATH) {
        (401, _) => ": it did not accept a token that it had just given out",
        (403, _) => ": it is switched off for this instance (HttpEndpoint), or the request came through a proxy",
        (404 | 405, true) => ": it does not know IMDSv2, and version 1 is never used",
        (404, false) => ": this is missing on no instance",
        (429 | 503, _) => ": too many requests from this instance",
        (300..=399, _) => ": redirects are not followed",
        _ => "",
    }
}

/// Where the metadata service is: `http`, a host, at most a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl(String);

impl BaseUrl {
    /// Checks what a person configured. The error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|error| format!("`{text}` is not a URL: {error}"))?;
        let wrong = if url.scheme() != "http" {
            "the metadata service speaks plain http"
        } else if url.host_str().is_none_or(str::is_empty) {
            "a host is missing"
        } else if !url.username().is_empty() || url.password().is_some() {
            "a user has no meaning here"
        } else if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            "only host and port belong here: the paths are added"
        } else {
            return Ok(Self(url.as_str().trim_end_matches('/').to_owned()));
        };
        Err(format!("`{text}`: {wrong}, for instance {DEFAULT_URL} or http://[fd00:ec2::254]"))
    }

    /// Without a slash at its end.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for BaseUrl {
    /// [`DEFAULT_URL`].
    fn default() -> Self {
        Self(DEFAULT_URL.to_owned())
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What this instance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub instance: InstanceId,
    /// For instance `m7g.2xlarge`.
    pub instance_type: Option<String>,
    /// For instance `eu-central-1b`.
    pub zone: Option<String>,
    /// For instance `eu-central-1`.
    pub region: Option<String>,
    /// Whether `instance-life-cycle` says `spot`.
    pub spot: bool,
}

#[derive(Clone)]
struct Token {
    value: HeaderValue,
    refresh_at: Instant,
    ends_at: Instant,
}

/// The client. It keeps one connection alive for each request that runs at the same time: two at most in [`run`].
///
/// [`run`]: super::run
pub struct Imds {
    http: reqwest::Client,
    base: BaseUrl,
    // Never held across an await: a request for a token that hangs must not stop the other loop.
    token: Mutex<Option<Token>>,
    pub(super) metrics: Metrics,
}

impl fmt::Debug for Imds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Imds").field("base", &self.base).finish_non_exhaustive()
    }
}

impl Imds {
    /// A client that goes straight to `base`: no proxy, whatever the environment says, and no redirects.
    pub fn new(base: BaseUrl, metrics: Metrics) -> Result<Self, Error> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .http1_only()
            .tcp_nodelay(true)
            .timeout(REQUEST_TIMEOUT)
            .user_agent(concat!("spotter/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(Error::Client)?;
        Ok(Self { http, base, token: Mutex::new(None), metrics })
    }

    /// Reads who this instance is. Only the instance id must be there.
    pub async fn identity(&self) -> Result<Identity, Error> {
        let path = Path::InstanceId;
        let id = self.get(path).await?.ok_or(Error::Status { path: path.as_str(), status: 404 })?;
        let instance = InstanceId::parse(id.trim()).ok_or_else(|| {
            let begins: String = id.trim().chars().filter(|c| !c.is_control()).take(40).collect();
            Error::Body { path: path.as_str(), reason: format!("`{begins}`, which is no instance id") }
        })?;
        Ok(Identity {
            instance,
            instance_type: self.word(Path::InstanceType).await?,
            zone: self.word(Path::Zone).await?,
            region: self.word(Path::Region).await?,
            spot: self.word(Path::LifeCycle).await?.as_deref() == Some("spot"),
        })
    }

    /// Asks for the identity until it is known; `None` when cancelled. Logs the first failure, and one each 30 s;
    /// `health` learns the cause, for the readiness probe.
    pub async fn wait_for_identity(&self, health: &Health, cancel: &CancellationToken) -> Option<Identity> {
        cancel.run_until_cancelled(self.identity_at_last(health)).await
    }

    async fn identity_at_last(&self, health: &Health) -> Identity {
        let (mut wait, mut logged) = (IDENTITY_RETRY, None::<Instant>);
        loop {
            let error = match self.identity().await {
                Ok(identity) => return identity,
                Err(error) => error,
            };
            if logged.is_none_or(|at| at.elapsed() >= LOG_AGAIN) {
                logged = Some(Instant::now());
                tracing::warn!(
                    %error,
                    "cannot learn which instance this is from {} (--imds-url); it is tried again",
                    self.base
                );
            } else {
                tracing::debug!(%error, "cannot learn which instance this is");
            }
            health.failed(error.to_string());
            tokio::time::sleep(wait).await;
            wait = wait.saturating_mul(2).min(IDENTITY_RETRY_LONGEST);
        }
    }

    async fn word(&self, path: Path) -> Result<Option<String>, Error> {
        Ok(self.get(path).await?.map(|body| body.trim().to_owned()))
    }

    /// The body under `/latest/meta-data/`; `None` for 404. At most two requests for tokens and two GETs.
    pub async fn get(&self, path: Path) -> Result<Option<String>, Error> {
        let token = self.token().await?;
        let answer = self.get_with(path, token.clone()).await;
        let Err(Error::Status { status: 401, .. }) = answer else { return answer };
        // The service forgot the token (it was restarted, or the instance came back from hibernation).
        self.forget(&token);
        let token = self.token().await?;
        self.get_with(path, token).await
    }

    async fn get_with(&self, path: Path, token: HeaderValue) -> Result<Option<String>, Error> {
        let url = format!("{}/latest/meta-data/{path}", self.base);
        let request = self.http.get(url).header(TOKEN_HEADER, token);
        let (status, _, body) = self.send(request, path.label(), path.as_str()).await?;
        match status {
            StatusCode::OK => body.map(Some).map_err(|reason| Error::Body { path: path.as_str(), reason }),
            StatusCode::NOT_FOUND => Ok(None),
            other => Err(Error::Status { path: path.as_str(), status: other.as_u16() }),
        }
    }

    /// A token that is good now, asked for only where there is none or its end is near.
    async fn token(&self) -> Result<HeaderValue, Error> {
        let held = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let now = Instant::now();
        match held {
            Some(token) if now < token.refresh_at => Ok(token.value),
            Some(token) if now < token.ends_at => Ok(self.new_token().await.unwrap_or(token.value)),
            _ => self.new_token().await,
        }
    }

    async fn new_token(&self) -> Result<HeaderValue, Error> {
        let asked_at = Instant::now();
        let url = format!("{}/latest/{TOKEN_PATH}", self.base);
        let request = self.http.request(Method::PUT, url).header(TTL_HEADER, TOKEN_TTL_SECONDS);
        let (status, ttl, body) = self.send(request, "token", TOKEN_PATH).await?;
        if status != StatusCode::OK {
            return Err(Error::Status { path: TOKEN_PATH, status: status.as_u16() });
        }
        let bad = |reason: String| Error::Body { path: TOKEN_PATH, reason };
        let text = body.map_err(bad)?;
        // A page where the token should be would only give 401 from here on.
        if text.trim().is_empty() || text.trim().contains(char::is_whitespace) {
            return Err(bad("no token".into()));
        }
        let mut value = HeaderValue::from_str(text.trim()).map_err(|_| bad("no token".into()))?;
        value.set_sensitive(true);
        let ttl = Duration::from_secs(ttl.unwrap_or(TOKEN_TTL_SECONDS).min(TOKEN_TTL_SECONDS));
        let token = Token {
            value: value.clone(),
            refresh_at: asked_at + ttl.saturating_sub(TOKEN_REFRESH_AHEAD).max(ttl * 9 / 10).min(ttl),
            ends_at: asked_at + ttl,
        };
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
        Ok(value)
    }

    /// Drops the token, unless the other loop has replaced it already.
    fn forget(&self, value: &HeaderValue) {
        let mut held = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        if held.as_ref().is_some_and(|token| token.value == *value) {
            *held = None;
        }
    }

    /// Sends, reads the body to its end so that the connection can be used again, and counts. Gives the status, the
    /// lifetime that the answer tells, and the body or what is wrong with it.
    async fn send(
        &self,
        request: reqwest::RequestBuilder,
        label: &'static str,
        path: &'static str,
    ) -> Result<(StatusCode, Option<u64>, Result<String, String>), Error> {
        let answer = async {
            let mut response = request.send().await?;
            let status = response.status();
            let ttl = response.headers().get(TTL_HEADER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
            let mut body = Vec::new();
            while let Some(chunk) = response.chunk().await? {
                if body.len() + chunk.len() > BODY_LIMIT {
                    return Ok((status, ttl, Err(format!("more than {} KiB", BODY_LIMIT / 1024))));
                }
                body.extend_from_slice(&chunk);
            }
            Ok((status, ttl, String::from_utf8(body).map_err(|_| "bytes that are no text".to_owned())))
        };
        let answer: reqwest::Result<_> = answer.await;
        let code = match &answer {
            Ok((status, ..)) => code_label(status.as_u16()),
            Err(error) if error.is_timeout() => "timeout",
            Err(_) => "error",
        };
        self.metrics.requested(label, code);
        answer.map_err(|error| self.failure(&error, path))
    }

    fn failure(&self, error: &reqwest::Error, path: &'static str) -> Error {
        let url = self.base.to_string();
        match (error.is_timeout(), path == TOKEN_PATH) {
            (true, true) => Error::TokenTimeout { url },
            (true, false) => Error::Timeout { url, path },
            (false, _) => Error::Unreachable { url, path, cause: innermost(error) },
        }
    }
}

/// The last cause in the chain: "connection refused" rather than "error sending request".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for good in [DEFAULT_URL, "http://[fd00:ec2::254]", "http://[fd00:ec2::254]/", "http://127.0.0.1:1338"] {
            assert_eq!(BaseUrl::parse(good).unwrap().as_str(), good.trim_end_matches('/'));
        }
        for (bad, why) in [
            ("https://169.254.169.254", "plain http"),
            ("169.254.169.254", "not a URL"),
            ("http://", "not a URL"),
            ("http://user@host", "a user"),
            ("http://host/latest", "only host and port"),
            ("http://host?x=1", "only host and port"),
        ] {
            let error = BaseUrl::parse(bad).unwrap_err();
            assert!(error.contains(why) && error.contains(bad), "{error}");
        }
    }
}

//! The API server's audit log: the best judge of how many requests there were, and what came first.

use std::{
    collections::BTreeMap,
    io::{Read, Seek, SeekFrom},
    ops::Deref,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use jiff::Timestamp;
use kube::Client;
use serde_json::Value;

use super::eventually;

/// A position in the log: what was asked before it does not count.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mark(u64);

/// One request. Every request appears once, a watch as soon as it was answered.
#[derive(Clone, Debug)]
pub struct Request {
    /// When the server had read the request (its own clock, which is ours; microseconds).
    pub received: Timestamp,
    /// When it had answered; for a watch that is still open, when it began to answer.
    pub answered: Timestamp,
    /// get, list, watch, create, update, patch, delete, deletecollection
    pub verb: String,
    /// `pods`, with the subresource where there is one: `pods/eviction`; empty for `/version` and the like.
    pub resource: String,
    pub namespace: String,
    pub name: String,
    pub uri: String,
    /// The answer's status.
    pub code: u16,
    /// Who authenticated.
    pub user: String,
    /// As whom it acted, where it impersonated somebody.
    pub impersonated: Option<String>,
    /// The node of a bound token.
    pub token_node: Option<String>,
    pub user_agent: String,
}

impl Request {
    fn parse(line: &str) -> Option<(String, Self)> {
        let event: Value = serde_json::from_str(line).ok()?;
        let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
        let time = |pointer: &str| text(pointer)?.parse().ok();
        let resource = text("/objectRef/resource").unwrap_or_default();
        let request = Self {
            received: time("/requestReceivedTimestamp")?,
            answered: time("/stageTimestamp")?,
            verb: text("/verb")?,
            resource: match text("/objectRef/subresource") {
                Some(sub) => format!("{resource}/{sub}"),
                None => resource,
            },
            namespace: text("/objectRef/namespace").unwrap_or_default(),
            name: text("/objectRef/name").unwrap_or_default(),
            uri: text("/requestURI").unwrap_or_default(),
            code: event
                .pointer("/responseStatus/code")
                .and_then(Value::as_u64)
                .and_then(|c| c.try_into().ok())
                .unwrap_or(0),
            user: text("/user/username").unwrap_or_default(),
            impersonated: text("/impersonatedUser/username"),
            token_node: text("/user/extra/authentication.kubernetes.io~1node-name/0"),
            user_agent: text("/userAgent").unwrap_or_default(),
        };
        Some((text("/auditID")?, request))
    }

    fn is(&self, verb: &str, resource: &str) -> bool {
        self.verb == verb && self.resource == resource
    }
}

/// Requests in the order in which the server received them.
#[derive(Clone, Debug, Default)]
pub struct Requests(Vec<Request>);

impl Deref for Requests {
    type Target = [Request];

    fn deref(&self) -> &[Request] {
        &self.0
    }
}

impl Requests {
    /// How many, whatever the answer: `count("create", "pods/eviction")`.
    pub fn count(&self, verb: &str, resource: &str) -> usize {
        self.iter().filter(|r| r.is(verb, resource)).count()
    }

    /// Those of one sort.
    pub fn of(&self, verb: &str, resource: &str) -> Self {
        self.only(|r| r.is(verb, resource))
    }

    /// Those for which this is true.
    pub fn only(&self, keep: impl Fn(&Request) -> bool) -> Self {
        Self(self.iter().filter(|r| keep(r)).cloned().collect())
    }

    /// `"patch nodes" -> 2` and so on: one comparison for a whole run.
    pub fn summary(&self) -> BTreeMap<String, usize> {
        let mut all = BTreeMap::new();
        for request in self.iter() {
            *all.entry(format!("{} {}", request.verb, request.resource)).or_default() += 1;
        }
        all
    }

    /// Panics unless all of `first` were answered before any of `then` came. Each is `(verb, resource)`, and each must
    /// have been asked at all.
    pub fn assert_order(&self, first: (&str, &str), then: (&str, &str)) {
        let last = self.of(first.0, first.1).iter().map(|r| r.answered).max();
        let next = self.of(then.0, then.1).iter().map(|r| r.received).min();
        assert!(last.is_some() && next.is_some() && last < next, "{first:?} until {last:?}, {then:?} from {next:?}");
    }

    /// From the moment the first request came to the moment the last was answered.
    pub fn span(&self) -> Duration {
        let (Some(from), Some(to)) = (self.iter().map(|r| r.received).min(), self.iter().map(|r| r.answered).max())
        else {
            return Duration::ZERO;
        };
        to.duration_since(from).try_into().unwrap_or(Duration::ZERO)
    }
}

/// The log of one server.
pub struct Audit {
    log: PathBuf,
    admin: Client,
}

impl Audit {
    pub(super) fn new(log: PathBuf, admin: Client) -> Self {
        Self { log, admin }
    }

    /// Now: everything that was answered before lies before it.
    pub async fn mark(&self) -> Mark {
        self.flush().await;
        Mark(std::fs::metadata(&self.log).expect("the log").len())
    }

    /// All requests with a token of the agent on this node, impersonating or not.
    pub async fn agent(&self, node: &str) -> Requests {
        self.agent_since(node, Mark::default()).await
    }

    /// The same since a mark.
    pub async fn agent_since(&self, node: &str, mark: Mark) -> Requests {
        // The name is looked for first: parsing the whole log of a shared server takes long.
        self.read(mark, node).await.only(|r| r.token_node.as_deref() == Some(node))
    }

    /// All requests since a mark.
    pub async fn since(&self, mark: Mark) -> Requests {
        self.read(mark, "").await
    }

    async fn read(&self, mark: Mark, part: &str) -> Requests {
        self.flush().await;
        let mut file = std::fs::File::open(&self.log).expect("the log");
        file.seek(SeekFrom::Start(mark.0)).expect("a position");
        let mut text = String::new();
        file.read_to_string(&mut text).expect("UTF-8");
        // A watch has two events, when it is answered and when it ends.
        let mut requests = BTreeMap::new();
        for (id, request) in text.lines().filter(|line| line.contains(part)).filter_map(Request::parse) {
            requests.entry(id).or_insert(request);
        }
        let mut requests: Vec<_> = requests.into_values().collect();
        requests.sort_by_key(|r| r.received);
        Requests(requests)
    }

    /// Asks something recognisable, and waits until it stands in the log: what was answered before stands there too.
    async fn flush(&self) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mark = format!("/version?flush={}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let from = std::fs::metadata(&self.log).expect("the log").len();
        let request = http::Request::get(&mark).body(Vec::new()).expect("a request");
        self.admin.request_text(request).await.expect("the server answers");
        let (log, mark) = (&self.log, &mark);
        eventually("the audit log is flushed", Duration::from_secs(10), || async move {
            let mut file = std::fs::File::open(log).expect("the log");
            file.seek(SeekFrom::Start(from)).expect("a position");
            let mut text = String::new();
            file.read_to_string(&mut text).expect("UTF-8");
            text.contains(&format!("{mark}\"")).then_some(())
        })
        .await;
    }
}

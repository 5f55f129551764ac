//! The list and watch of the pods on the own node.

use std::{collections::VecDeque, fmt, pin::Pin, sync::atomic::Ordering, time::Duration};

use futures::{Stream, StreamExt, stream};
use kube::core::{Request, params::ListParams};
use tokio::time::{Instant, timeout_at};
use tracing::{debug, info};

use super::{
    Call, Cluster, Error, Lane,
    decode::{PodList, RawPod},
    unbuildable,
    watch::{Backoff, Feed, Frame, params},
};
use crate::plan::{PodFacts, PodUid};

const PODS: &str = "/api/v1/pods";
/// A server with streaming lists ends one of a node's pods within milliseconds; others never do.
const LIST_END_LIMIT: Duration = Duration::from_secs(1);
/// For the plain list.
const LIST_LIMIT: Duration = Duration::from_secs(5);

/// After so many refusals in a row the right to watch is missing.
const REFUSALS: u32 = 3;
/// Between two lists where the right to watch is missing.
const BLIND_PAUSE: Duration = Duration::from_secs(2);

/// What became of the pods on the own node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodEvent {
    /// All pods, complete: at first, and after the watch had to begin anew. What is missing is gone.
    Listed(Vec<PodFacts>),
    /// This pod is new, or like this now.
    Seen(PodFacts),
    /// This pod is gone.
    Gone(PodUid),
    /// The watch is interrupted, or something could not be read. It goes on by itself; the same trouble is told once.
    Trouble { message: String },
}

/// Watches the pods of the own node for ever, whatever happens to the connection.
pub struct PodWatch(Pin<Box<dyn Stream<Item = PodEvent> + Send>>);

impl fmt::Debug for PodWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PodWatch")
    }
}

impl PodWatch {
    /// The next event. Nothing is lost where the future is dropped, but nothing happens either while it is not polled.
    pub async fn next(&mut self) -> PodEvent {
        match self.0.next().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

impl Cluster {
    /// Lists the pods of the own node and watches them. Rights: list and watch pods.
    pub fn watch_pods(&self) -> PodWatch {
        let follower = Follower {
            cluster: self.clone(),
            version: None,
            feed: None,
            ready: VecDeque::new(),
            pause: false,
            refusals: 0,
            backoff: Backoff::default(),
            trouble: None,
        };
        PodWatch(Box::pin(stream::unfold(follower, |mut follower| async {
            let event = follower.next().await;
            Some((event, follower))
        })))
    }
}

struct Follower {
    cluster: Cluster,
    /// What was seen last; `None` where everything must be listed.
    version: Option<String>,
    feed: Option<Feed<RawPod>>,
    /// Events that are not yet fetched.
    ready: VecDeque<PodEvent>,
    /// Whether to wait before the next try.
    pause: bool,
    /// How often in a row the right to watch was refused. An API server that has just started refuses it for a moment;
    /// where it goes on we may list but not watch: then the pods are listed again and again.
    refusals: u32,
    backoff: Backoff,
    /// The trouble that was last told.
    trouble: Option<String>,
}

impl Follower {
    async fn next(&mut self) -> PodEvent {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return event;
            }
            if std::mem::take(&mut self.pause) {
                let blind = self.refusals >= REFUSALS;
                let wait = if blind { BLIND_PAUSE } else { self.backoff.next() };
                tokio::time::sleep(wait).await;
            }
            let Err(message) = self.advance().await else { continue };
            self.feed = None;
            self.pause = true;
            if self.trouble.as_ref() == Some(&message) {
                debug!(cause = %message, "the watch of the pods is still interrupted");
            } else {
                self.trouble = Some(message.clone());
                self.ready.push_back(PodEvent::Trouble { message });
            }
        }
    }

    async fn advance(&mut self) -> Result<(), String> {
        let Some(feed) = &mut self.feed else { return self.connect().await };
        let Some(frame) = feed.next().await.map_err(|cause| format!("the watch of the pods broke: {cause}"))? else {
            self.feed = None;
            self.pause = true;
            return Ok(());
        };
        let clock = self.cluster.0.clock;
        match frame {
            Frame::Seen(pod) => {
                self.version = Some(pod.metadata.resource_version.clone());
                self.ready.push_back(PodEvent::Seen(pod.facts(&clock)));
            }
            Frame::Deleted(pod) => {
                self.version = Some(pod.metadata.resource_version);
                self.ready.push_back(PodEvent::Gone(PodUid(pod.metadata.uid)));
            }
            Frame::Bookmark { version, .. } => self.version = Some(version),
            Frame::Malformed { version, message } => {
                self.version = Some(version).filter(|version| !version.is_empty()).or(self.version.take());
                self.ready.push_back(PodEvent::Trouble { message: format!("pod {message}") });
            }
            Frame::Refused { code, message } => {
                debug!(code, cause = %message, "the watch of the pods is too old: listing them again");
                self.feed = None;
                self.version = None;
                self.pause = true;
                return Ok(());
            }
        }
        self.recovered();
        Ok(())
    }

    async fn connect(&mut self) -> Result<(), String> {
        let Some(version) = &self.version else { return self.list().await.map_err(|error| error.to_string()) };
        match self.cluster.open(Call::WatchPods, PODS, &params(&self.selector()), version).await {
            Ok(feed) => {
                self.feed = Some(feed);
                self.refusals = 0;
            }
            Err(error) if error.is_version_refused() => self.version = None,
            Err(error) if error.is_forbidden() => {
                self.refusals = self.refusals.saturating_add(1);
                if self.refusals >= REFUSALS {
                    self.version = None;
                }
                return Err(error.to_string());
            }
            Err(error) => return Err(error.to_string()),
        }
        Ok(())
    }

    async fn list(&mut self) -> Result<(), Error> {
        if !self.cluster.0.lists_only.load(Ordering::Relaxed) {
            match self.streaming_list().await? {
                Streamed::Listed => return Ok(()),
                Streamed::Unsupported { why } => {
                    self.cluster.0.lists_only.store(true, Ordering::Relaxed);
                    info!(why, "the API server has no streaming lists: listing and watching instead");
                }
                Streamed::NotNow => {}
            }
        }
        self.plain_list().await
    }

    /// List and watch in one request: the pods as they are, a bookmark, and what happens to them from there on.
    async fn streaming_list(&mut self) -> Result<Streamed, Error> {
        let params = params(&self.selector()).initial_events();
        let mut feed = match self.cluster.open::<RawPod>(Call::WatchPods, PODS, &params, "0").await {
            Ok(feed) => feed,
            Err(error) => {
                // Rights and load say nothing about what the server can do; the plain list has the better error.
                return match error.code() {
                    Some(401 | 403 | 408 | 429) => Ok(Streamed::NotNow),
                    Some(400..=499) => Ok(Streamed::Unsupported { why: error.to_string() }),
                    _ => Err(error),
                };
            }
        };
        let until = Instant::now() + LIST_END_LIMIT;
        let clock = self.cluster.0.clock;
        let mut pods = Vec::new();
        let mut troubles = Vec::new();
        loop {
            let Ok(frame) = timeout_at(until, feed.next()).await else {
                return Ok(Streamed::Unsupported { why: "no end of the list within 1 s".to_owned() });
            };
            match frame {
                Ok(Some(Frame::Seen(pod))) => put(&mut pods, pod.facts(&clock)),
                Ok(Some(Frame::Deleted(pod))) => pods.retain(|known| known.uid.0 != pod.metadata.uid),
                Ok(Some(Frame::Bookmark { version, list_end: true })) => {
                    self.version = Some(version);
                    break;
                }
                Ok(Some(Frame::Bookmark { .. })) => {}
                Ok(Some(Frame::Malformed { message, .. })) => troubles.push(format!("pod {message}")),
                Ok(Some(Frame::Refused { .. }) | None) | Err(_) => return Ok(Streamed::NotNow),
            }
        }
        self.feed = Some(feed);
        self.listed(pods, troubles);
        Ok(Streamed::Listed)
    }

    /// From the server's cache, where the pods are indexed by node.
    async fn plain_list(&mut self) -> Result<(), Error> {
        let params = ListParams::default().fields(&self.selector()).match_any();
        let request = Request::new(PODS).list(&params).map_err(unbuildable)?;
        let call = Call::ListPods;
        let reply = self.cluster.exchange(call, Lane::Watches, request, LIST_LIMIT).await?;
        if !reply.is_success() {
            return Err(self.cluster.refusal(call, &reply));
        }
        let list = PodList::read(&reply.body).map_err(|error| Error::Malformed {
            verb: call.verb(),
            resource: call.resource(),
            cause: error.to_string(),
        })?;
        let clock = self.cluster.0.clock;
        self.version = Some(list.resource_version);
        self.listed(list.pods.into_iter().map(|pod| pod.facts(&clock)).collect(), list.malformed);
        Ok(())
    }

    fn listed(&mut self, pods: Vec<PodFacts>, troubles: Vec<String>) {
        self.recovered();
        self.ready.push_back(PodEvent::Listed(pods));
        self.ready.extend(troubles.into_iter().map(|message| PodEvent::Trouble { message }));
    }

    fn recovered(&mut self) {
        self.backoff.reset();
        self.trouble = None;
    }

    fn selector(&self) -> String {
        format!("spec.nodeName={}", self.cluster.node_name())
    }
}

enum Streamed {
    Listed,
    /// It did not work now; nothing is known about later.
    NotNow,
    /// The server will not do it.
    Unsupported {
        why: String,
    },
}

fn put(pods: &mut Vec<PodFacts>, pod: PodFacts) {
    match pods.iter_mut().find(|known| known.uid == pod.uid) {
        Some(known) => *known = pod,
        None => pods.push(pod),
    }
}

//! Kubernetes events: what `kubectl describe` shows of a termination. Never in the way of it.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc, Mutex as StdMutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use jiff::Timestamp;
use kube::core::{Request, params::PostParams};
use serde_json::{Value, json};
use tokio::{
    sync::{Mutex, mpsc},
    time::{Instant, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Call, Cluster, Error, Lane, Manager, PodRef, pods::seconds, unbuildable};

/// Ten terminations of a full node; what does not fit is dropped, not waited for.
const QUEUE: usize = 1_000;
/// Requests at a time: events share a connection with the watches.
const IN_FLIGHT: usize = 4;
const LIMIT: Duration = Duration::from_secs(5);
/// How long the first events after a silence wait. They come with a claim, when the API server is to have time for the
/// list and the evictions, which are accepted within a quarter of a second.
const BEHIND: Duration = Duration::from_millis(500);
/// How long the queued events of a stopping process are worth.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// The API server refuses longer ones.
const MESSAGE_LIMIT: usize = 1_024;

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum About {
    /// The own Node.
    Node,
    Pod(PodRef),
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventNote {
    pub about: About,
    /// Warning rather than Normal.
    pub warning: bool,
    /// One word in CamelCase, for machines.
    pub reason: &'static str,
    /// A sentence, for people.
    pub message: String,
}

/// Takes events at any time and sends them when there is time. Cheap to clone.
#[derive(Clone)]
pub struct Recorder(Arc<Shared>);

struct Shared {
    cluster: Cluster,
    node_uid: StdMutex<String>,
    queue: mpsc::Sender<(EventNote, Timestamp)>,
    waiting: Mutex<mpsc::Receiver<(EventNote, Timestamp)>>,
    /// Whether it was already said that events are dropped.
    overflown: AtomicBool,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recorder")
    }
}

impl Cluster {
    /// A recorder of events about the own Node and its pods. Right: create events.
    pub fn recorder(&self) -> Recorder {
        let (queue, waiting) = mpsc::channel(QUEUE);
        Recorder(Arc::new(Shared {
            cluster: self.clone(),
            node_uid: StdMutex::default(),
            queue,
            waiting: Mutex::new(waiting),
            overflown: AtomicBool::new(false),
        }))
    }
}

impl Recorder {
    /// Queues an event. Never waits: where too many are queued it is dropped, and counted.
    pub fn publish(&self, note: EventNote) {
        if self.0.queue.try_send((note, self.0.cluster.0.clock.wall())).is_ok() {
            return;
        }
        self.0.cluster.0.metrics.event_dropped();
        if !self.0.overflown.swap(true, Ordering::Relaxed) {
            warn!("more than {QUEUE} Kubernetes events are waiting: further ones are dropped");
        }
    }

    /// The UID under which the Node's events are filed from now on.
    pub fn set_node(&self, uid: &str) {
        uid.clone_into(&mut self.0.node_uid.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Sends what is published until `cancel`, and then for at most 2 s what is still queued. A failure to send is
    /// said once for each kind of failure; nothing waits for it and nothing is sent twice.
    pub async fn run(&self, cancel: CancellationToken) {
        let mut waiting = self.0.waiting.lock().await;
        let mut said = BTreeSet::new();
        let mut sending = FuturesUnordered::new();
        let mut begin = Instant::now();
        loop {
            tokio::select! {
                biased;
                Some(result) = sending.next(), if !sending.is_empty() => report(&mut said, result),
                () = cancel.cancelled() => break,
                Some((note, at)) = waiting.recv(), if sending.len() < IN_FLIGHT => {
                    if sending.is_empty() {
                        begin = Instant::now() + BEHIND;
                    }
                    sending.push(self.send(note, at, begin));
                }
            }
        }
        let until = Instant::now() + DRAIN_LIMIT;
        let drained = timeout_at(until, async {
            loop {
                while sending.len() < IN_FLIGHT
                    && let Ok((note, at)) = waiting.try_recv()
                {
                    sending.push(self.send(note, at, begin));
                }
                let Some(result) = sending.next().await else { break };
                report(&mut said, result);
            }
        });
        if drained.await.is_err() {
            warn!("{} Kubernetes events were not sent before the end", waiting.len() + sending.len());
        }
    }

    async fn send(&self, note: EventNote, at: Timestamp, not_before: Instant) -> Result<(), Error> {
        sleep_until(not_before).await;
        let cluster = &self.0.cluster;
        let node_uid = self.0.node_uid.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (namespace, body) = event(note, at, &cluster.0.node, &node_uid, cluster.0.manager);
        let body = serde_json::to_vec(&body).map_err(|error| Error::config("an event", &error))?;
        let request = Request::new(format!("/api/v1/namespaces/{namespace}/events"));
        let request = request.create(&PostParams::default(), body).map_err(unbuildable)?;
        let reply = cluster.exchange(Call::CreateEvent, Lane::Watches, request, LIMIT).await?;
        if reply.is_success() { Ok(()) } else { Err(cluster.refusal(Call::CreateEvent, &reply)) }
    }
}

fn report(said: &mut BTreeSet<String>, result: Result<(), Error>) {
    let Err(error) = result else { return };
    let kind = match &error {
        Error::Unreachable { .. } | Error::Lost { .. } | Error::Timeout { .. } => "no answer".to_owned(),
        other => other.code().map_or_else(|| other.to_string(), |code| code.to_string()),
    };
    if said.insert(kind) {
        warn!(%error, "a Kubernetes event could not be written; the same failure is not logged again");
    } else {
        debug!(%error, "a Kubernetes event could not be written");
    }
}

/// The event and the namespace that it belongs to: the pod's own, or `default` for the Node, which has none.
fn event(note: EventNote, at: Timestamp, node: &str, node_uid: &str, manager: Manager) -> (String, Value) {
    let EventNote { about, warning, reason, mut message } = note;
    if message.len() > MESSAGE_LIMIT {
        message.truncate(message.floor_char_boundary(MESSAGE_LIMIT - '…'.len_utf8()));
        message.push('…');
    }
    let (namespace, name, object) = match about {
        About::Node => {
            let object = json!({ "apiVersion": "v1", "kind": "Node", "name": node, "uid": node_uid });
            ("default".to_owned(), node.to_owned(), object)
        }
        About::Pod(PodRef { namespace, name, uid }) => {
            let object =
                json!({ "apiVersion": "v1", "kind": "Pod", "namespace": namespace, "name": name, "uid": uid.0 });
            (namespace, name, object)
        }
    };
    let at = seconds(at);
    let body = json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": { "generateName": format!("{name}."), "namespace": namespace },
        "involvedObject": object,
        "type": if warning { "Warning" } else { "Normal" },
        "reason": reason,
        "message": message,
        "source": { "component": manager.as_str(), "host": node },
        "reportingComponent": format!("spotter.dev/{}", manager.mode()),
        "reportingInstance": node,
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    });
    (namespace, body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PodUid;

    #[test]
    fn events_are_filed_under_the_object_that_they_are_about() {
        let at = "2026-11-23T01:02:03.9Z".parse().unwrap();
        let note = EventNote { about: About::Node, warning: false, reason: "Cordoned", message: "m".into() };
        let (namespace, body) = event(note, at, "n1", "nu", Manager::Agent);
        assert_eq!(namespace, "default");
        assert_eq!(body["involvedObject"], json!({"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "nu"}));
        assert_eq!((&body["type"], &body["reportingComponent"]), (&json!("Normal"), &json!("spotter.dev/agent")));
        assert_eq!(body["firstTimestamp"], "2026-11-23T01:02:03Z");

        let pod = PodRef { namespace: "shop".into(), name: "web-0".into(), uid: PodUid("u".into()) };
        let note = EventNote { about: About::Pod(pod), warning: true, reason: "Left", message: "ä".repeat(1_000) };
        let (namespace, body) = event(note, at, "n1", "", Manager::Queue);
        assert_eq!(namespace, "shop");
        assert_eq!(body["metadata"], json!({"generateName": "web-0.", "namespace": "shop"}));
        assert_eq!((&body["type"], &body["source"]["component"]), (&json!("Warning"), &json!("spotter-queue")));
        assert!(body["message"].as_str().unwrap().len() <= MESSAGE_LIMIT);
    }
}

//! The watch of the own Node.

use std::{fmt, pin::Pin};

use futures::{Stream, StreamExt, stream};
use tracing::{debug, warn};

use super::{
    Call, Cluster, Error, NodeFacts,
    decode::RawNode,
    watch::{Backoff, Feed, Frame, params},
};

/// What became of the own Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeEvent {
    /// It is like this now. A Node that is created anew under the name comes with another UID.
    Changed(NodeFacts),
    /// It is gone.
    Deleted,
}

/// Watches the own Node for ever, whatever happens to the connection.
pub struct NodeWatch(Pin<Box<dyn Stream<Item = NodeEvent> + Send>>);

impl fmt::Debug for NodeWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeWatch")
    }
}

impl NodeWatch {
    /// The next change. Nothing is lost where the future is dropped.
    pub async fn next(&mut self) -> NodeEvent {
        match self.0.next().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

impl Cluster {
    /// Watches the own Node from a resourceVersion on; an empty one reads the Node first. Right: watch nodes (get, too).
    pub fn watch_node(&self, from: String) -> NodeWatch {
        let from = Some(from).filter(|from| !from.is_empty());
        let follower = Follower {
            cluster: self.clone(),
            version: from.clone(),
            told: from,
            feed: None,
            pause: false,
            present: true,
            backoff: Backoff::default(),
            trouble: None,
        };
        NodeWatch(Box::pin(stream::unfold(follower, |mut follower| async {
            let event = follower.next().await;
            Some((event, follower))
        })))
    }
}

struct Follower {
    cluster: Cluster,
    /// Where the watch goes on; `None` where the Node must be read.
    version: Option<String>,
    /// The version of the Node that was last told.
    told: Option<String>,
    feed: Option<Feed<RawNode>>,
    /// Whether to wait before the next try.
    pause: bool,
    /// Whether the Node was there when last seen.
    present: bool,
    backoff: Backoff,
    /// The trouble that was last logged.
    trouble: Option<String>,
}

impl Follower {
    async fn next(&mut self) -> NodeEvent {
        loop {
            if std::mem::take(&mut self.pause) {
                tokio::time::sleep(self.backoff.next()).await;
            }
            match self.advance().await {
                Ok(Some(event)) => return event,
                Ok(None) => {}
                Err(message) => {
                    self.feed = None;
                    self.pause = true;
                    if self.trouble.as_ref() == Some(&message) {
                        debug!(cause = %message, "the watch of the own node is still interrupted");
                    } else {
                        warn!(cause = %message, "the watch of the own node is interrupted");
                        self.trouble = Some(message);
                    }
                }
            }
        }
    }

    async fn advance(&mut self) -> Result<Option<NodeEvent>, String> {
        let Some(feed) = &mut self.feed else { return self.connect().await };
        let frame = feed.next().await?;
        if !matches!(frame, None | Some(Frame::Refused { .. })) {
            self.backoff.reset();
            self.trouble = None;
        }
        match frame {
            None => {
                self.feed = None;
                self.pause = true;
            }
            Some(Frame::Seen(node)) => {
                let facts = node.facts();
                self.version = Some(facts.resource_version.clone());
                return Ok(self.changed(facts));
            }
            Some(Frame::Deleted(node)) => {
                self.version = Some(node.metadata.resource_version);
                self.present = false;
                return Ok(Some(NodeEvent::Deleted));
            }
            Some(Frame::Bookmark { version, .. }) => self.version = Some(version),
            Some(Frame::Malformed { version, message }) => {
                warn!(cause = %message, "an event of the own node was left out");
                if !version.is_empty() {
                    self.version = Some(version);
                }
            }
            Some(Frame::Refused { code, message }) => {
                debug!(code, cause = %message, "the watch of the own node is too old: reading it again");
                self.feed = None;
                self.version = None;
                self.pause = true;
            }
        }
        Ok(None)
    }

    async fn connect(&mut self) -> Result<Option<NodeEvent>, String> {
        let Some(version) = &self.version else { return self.read().await };
        let params = params(&format!("metadata.name={}", self.cluster.node_name()));
        match self.cluster.open(Call::WatchNode, "/api/v1/nodes", &params, version).await {
            Ok(feed) => self.feed = Some(feed),
            Err(error) if error.is_version_refused() => self.version = None,
            Err(error) => return Err(error.to_string()),
        }
        Ok(None)
    }

    async fn read(&mut self) -> Result<Option<NodeEvent>, String> {
        match self.cluster.node(super::identity::IDENTIFY_LIMIT).await {
            Ok(facts) => {
                // Not from this Node's own version: where it has not changed for long, that one is too old for ever.
                // Without a version the server begins with the Node as it is, and needs no right to list.
                self.version = Some(String::new());
                Ok(self.changed(facts))
            }
            Err(Error::NotFound { .. }) => {
                self.pause = true;
                let was_present = std::mem::replace(&mut self.present, false);
                Ok(was_present.then_some(NodeEvent::Deleted))
            }
            Err(error) => Err(error.to_string()),
        }
    }
    fn changed(&mut self, facts: NodeFacts) -> Option<NodeEvent> {
        self.present = true;
        let known = self.told.replace(facts.resource_version.clone());
        (known.as_ref() != Some(&facts.resource_version)).then_some(NodeEvent::Changed(facts))
    }
}

//! What the watches of nodes and pods share: opening, reading event by event, and waiting before the next try.

use std::{future::poll_fn, marker::PhantomData, pin::Pin, time::Duration};

use hyper::body::Body as _;
use kube::{
    client::Body,
    core::{Request, params::WatchParams},
};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::{Instant, timeout, timeout_at};

use super::{Call, Cluster, Error, Identity, Lane, Outgoing, Reply, decode::Notes, jitter, unbuildable};

/// Until the head of the answer is there.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// How long the server shall keep a watch open (kube allows up to 294 s).
const WATCH_SECONDS: u32 = 290;
/// A watch that outlives what was asked for is dead: HTTP/1.1 has no pings.
const SILENCE_LIMIT: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 15);
/// An object is at most 3 MiB (etcd's limit is 1.5 MiB); a line beyond this is no event.
const LINE_LIMIT: usize = 16 * 1024 * 1024;
/// First wait before a watch is opened again.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(2);

/// One event of a watch.
#[derive(Debug)]
pub(super) enum Frame<T> {
    /// Added or modified.
    Seen(T),
    Deleted(T),
    /// The server is at this version, and all that came before was sent.
    Bookmark {
        version: String,
        list_end: bool,
    },
    /// The server ends the watch; 410 means that the version is too old.
    Refused {
        code: u16,
        message: String,
    },
    /// An event that cannot be read. The watch goes on without it.
    Malformed {
        version: String,
        message: String,
    },
}

/// Parameters that select by a field.
pub(super) fn params(field: &str) -> WatchParams {
    WatchParams { bookmarks: true, ..WatchParams::default() }.fields(field).timeout(WATCH_SECONDS)
}

impl Cluster {
    /// Opens a watch. Where the server refuses it, the error has its code.
    pub(super) async fn open<T: DeserializeOwned>(
        &self,
        call: Call,
        path: &str,
        params: &WatchParams,
        version: &str,
    ) -> Result<Feed<T>, Error> {
        let request = Request::new(path).watch(params, version).map_err(unbuildable)?;
        let identity = self.identity();
        let reply = match self.head(call, &request, identity).await? {
            Ok(feed) => return Ok(feed),
            Err(reply) => reply,
        };
        let Some(other) = self.alternative(&reply) else { return Err(self.refusal(call, &reply)) };
        match self.head(call, &request, other).await? {
            Ok(feed) => {
                self.switch(other, &reply);
                Ok(feed)
            }
            Err(again) => Err(self.refusal(call, &self.choose(reply, again))),
        }
    }

    async fn head<T: DeserializeOwned>(
        &self,
        call: Call,
        request: &Outgoing,
        identity: Identity,
    ) -> Result<Result<Feed<T>, Reply>, Error> {
        let until = Instant::now() + OPEN_LIMIT;
        let in_flight = self.0.metrics.start();
        let response = match timeout_at(until, self.send(call, Lane::Watches, request, identity)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                self.0.metrics.failed(call);
                return Err(error);
            }
            Err(_) => {
                self.0.metrics.timed_out(call);
                return Err(self.late(call, OPEN_LIMIT));
            }
        };
        drop(in_flight);
        let code = response.status().as_u16();
        self.0.metrics.answered(call, code);
        if response.status().is_success() {
            return Ok(Ok(Feed::new(response.into_body())));
        }
        let body =
            timeout_at(until, response.into_body().collect_bytes()).await.map_err(|_| self.late(call, OPEN_LIMIT))?;
        let body = body.map_err(|error| self.broken(call, &error))?;
        Ok(Err(Reply { code, retry_after: None, body, identity }))
    }
}

/// The events of one open watch.
pub(super) struct Feed<T> {
    body: Body,
    buffer: Vec<u8>,
    /// How much of the buffer holds no line end.
    searched: usize,
    object: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Feed<T> {
    fn new(body: Body) -> Self {
        Self { body, buffer: Vec::new(), searched: 0, object: PhantomData }
    }

    /// The next event; `None` where the server has ended the watch in an orderly way. Nothing is lost where the
    /// future is dropped.
    ///
    /// # Errors
    /// Why the watch broke.
    pub(super) async fn next(&mut self) -> Result<Option<Frame<T>>, String> {
        loop {
            if let Some(line) = self.line() {
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(Some(read(&line)));
            }
            if self.buffer.len() > LINE_LIMIT {
                return Err("an event of more than 16 MiB".to_owned());
            }
            let frame = poll_fn(|context| Pin::new(&mut self.body).poll_frame(context));
            match timeout(SILENCE_LIMIT, frame).await {
                Err(_) => return Err("silent for longer than it was to last".to_owned()),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(super::error::deepest(&error)),
                Ok(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
            }
        }
    }

    fn line(&mut self) -> Option<Vec<u8>> {
        let unsearched = self.buffer.get(self.searched..)?;
        let Some(end) = unsearched.iter().position(|&byte| byte == b'\n') else {
            self.searched = self.buffer.len();
            return None;
        };
        let rest = self.buffer.split_off(self.searched + end + 1);
        self.searched = 0;
        Some(std::mem::replace(&mut self.buffer, rest))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Kind {
    Added,
    Modified,
    Deleted,
    Bookmark,
    Error,
}

#[derive(Deserialize)]
struct Event<T> {
    r#type: Kind,
    object: T,
}

/// What bookmarks, Statuses and objects that cannot be read whole are asked for.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Outline {
    metadata: OutlineMetadata,
    code: u16,
    message: String,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct OutlineMetadata {
    name: String,
    namespace: String,
    resource_version: String,
    annotations: Notes,
}

fn read<T: DeserializeOwned>(line: &[u8]) -> Frame<T> {
    // Bookmarks and errors hold something else than T, which the first attempt need not survive.
    match serde_json::from_slice::<Event<T>>(line) {
        Ok(Event { r#type: Kind::Added | Kind::Modified, object }) => Frame::Seen(object),
        Ok(Event { r#type: Kind::Deleted, object }) => Frame::Deleted(object),
        Ok(_) => outline(line, "no event"),
        Err(error) => outline(line, &error.to_string()),
    }
}

fn outline<T>(line: &[u8], fault: &str) -> Frame<T> {
    match serde_json::from_slice::<Event<Outline>>(line) {
        Ok(Event { r#type: Kind::Error, object }) => Frame::Refused { code: object.code, message: object.message },
        Ok(Event { r#type: Kind::Bookmark, object }) => {
            let list_end = object.metadata.annotations.list_end;
            Frame::Bookmark { version: object.metadata.resource_version, list_end }
        }
        Ok(Event { object: Outline { metadata, .. }, .. }) => {
            let message = format!("{}/{} cannot be read: {fault}", metadata.namespace, metadata.name);
            Frame::Malformed { version: metadata.resource_version, message }
        }
        Err(_) => Frame::Malformed { version: String::new(), message: format!("an event cannot be read: {fault}") },
    }
}

/// Waits that double up to 2 s, each cut by up to half at random so that the watches of many nodes do not come back
/// together.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    pub(super) fn next(&mut self) -> Duration {
        let wait = BACKOFF_FIRST.saturating_mul(1 << self.failures.min(8)).min(BACKOFF_LAST);
        self.failures = self.failures.saturating_add(1);
        wait.mul_f64(0.5 + jitter() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::decode::RawPod;

    fn frame(line: &str) -> Frame<RawPod> {
        read(line.as_bytes())
    }

    #[test]
    fn events_of_every_kind() {
        assert!(matches!(frame(r#"{"type":"ADDED","object":{"metadata":{"name":"a"}}}"#), Frame::Seen(_)));
        assert!(matches!(frame(r#"{"type":"DELETED","object":{"metadata":{"name":"a"}}}"#), Frame::Deleted(_)));
        let end = r#"{"type":"BOOKMARK","object":{"kind":"Pod","apiVersion":"v1","metadata":{"resourceVersion":"42","annotations":{"k8s.io/initial-events-end":"true"}},"spec":{"containers":null},"status":{}}}"#;
        assert!(matches!(frame(end), Frame::Bookmark { version, list_end: true } if version == "42"));
        let plain = r#"{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"43"}}}"#;
        assert!(matches!(frame(plain), Frame::Bookmark { version, list_end: false } if version == "43"));
        let expired = r#"{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"too old resource version: 1 (2)","reason":"Expired","code":410}}"#;
        assert!(matches!(frame(expired), Frame::Refused { code: 410, .. }));
    }

    #[test]
    fn a_malformed_object_is_named_and_skipped() {
        let odd = r#"{"type":"MODIFIED","object":{"metadata":{"name":"a","namespace":"n","resourceVersion":"9"},"spec":{"priority":"high"}}}"#;
        match frame(odd) {
            Frame::Malformed { version, message } => {
                assert_eq!(version, "9");
                assert!(message.starts_with("n/a cannot be read"), "{message}");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(frame("<html>"), Frame::Malformed { .. }));
        assert!(matches!(frame(r#"{"type":"LATER","object":{}}"#), Frame::Malformed { .. }));
    }

    #[tokio::test]
    async fn lines_are_put_together_from_any_pieces() {
        let text = "{\"type\":\"ADDED\",\"object\":{\"metadata\":{\"name\":\"a\"}}}\n\n{\"type\":\"DELETED\",\"object\":{}}\n{\"cut";
        let mut feed: Feed<RawPod> = Feed::new(Body::empty());
        let mut lines = Vec::new();
        for byte in text.bytes() {
            feed.buffer.push(byte);
            lines.extend(feed.line());
        }
        assert_eq!(lines.len(), 3);
        assert_eq!(feed.buffer, b"{\"cut");
        let mut feed: Feed<RawPod> = Feed::new(Body::from(text.as_bytes().to_vec()));
        assert!(matches!(feed.next().await, Ok(Some(Frame::Seen(_)))));
        assert!(matches!(feed.next().await, Ok(Some(Frame::Deleted(_)))));
        // An event that the connection cut short is none.
        assert!(matches!(feed.next().await, Ok(None)));
    }

    #[test]
    fn waits_grow_to_two_seconds_and_begin_anew() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..8).map(|_| backoff.next()).collect();
        assert!(waits[0] >= Duration::from_millis(50) && waits[0] <= Duration::from_millis(100));
        assert!(waits[7] >= Duration::from_secs(1) && waits[7] <= Duration::from_secs(2));
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(100));
    }
}

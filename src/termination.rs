//! Everything spotter does for one node, from the first notice to the end.
//!
//! One task owns one node ([`Termination::run`]). It takes in what the sources report, what the API server shows and
//! answers, asks the pure parts what that means, and does it:
//!
//! - the open notices say what is asked for ([`crate::policy::standing`]), `course` what to do about it;
//! - `hold` writes on the Node: claim and record; `release` gives it back; `follow` is for a node that another handler
//!   holds;
//! - `work` drives the drain's state machine ([`crate::plan::drain`]) with the pods of the node;
//! - `start` reads the Node at the beginning and goes on where a former process stopped;
//! - `tell` is what people hear of it.
//!
//! Where lifecycle hooks are completed later: after [`Phase::Drained`] or [`Phase::Incomplete`] is written, while the
//! pods' watch is still open. Where executors are asked for a checkpoint later: a pod waits in the drain's `Due` state.

mod course;
mod follow;
mod hold;
mod metrics;
mod record;
mod release;
mod start;
mod tell;
mod work;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::Span;

use crate::{
    clock::Clock,
    cluster::{Cluster, EventNote, NodeEvent, NodeFacts, PodEvent, Recorder},
    notice::{InstanceId, Report},
    plan::{Moment, classify::Rules, drain},
    policy::{Policy, Response, standing::Notices},
};
pub use metrics::Metrics;
pub use record::{Outcome, Phase, Record};
use work::Work;

/// Even when nothing is due, the wall clock is looked at this often: it jumps when a machine wakes from hibernation.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// How long answers to requests under way are awaited when the process is asked to stop.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Steps in a row before others get a turn: a claim that meets everything that can be in its way takes six.
const MOST_STEPS: usize = 8;

/// Pod events wait here while the task is busy; a node has a few hundred pods at most.
const FEED_CAPACITY: usize = 1024;

/// What an operator chose.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Nothing is written anywhere.
    pub dry_run: bool,
    /// Whether Kubernetes events are published.
    pub events: bool,
    /// Whether a drain tells load balancers to leave the node out.
    pub exclude_from_load_balancers: bool,
    pub rules: Rules,
    pub margin: Duration,
    pub at_deadline: drain::AtDeadline,
    /// Most evictions under way at once; by default what the identity at the API server allows.
    pub max_in_flight: Option<usize>,
}

/// Why a termination's task cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "Node {node} has providerID {provider_id:?}, but this machine is instance {instance}: refusing to act on another \
         machine's Node; check --node-name"
    )]
    WrongInstance { node: String, provider_id: String, instance: InstanceId },
    #[error("a request task failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Whether the task knows its Node, for readiness.
#[derive(Debug, Clone)]
pub struct Health(Arc<Mutex<Result<(), String>>>);

impl Health {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Err("the Node has not been read yet".into()))))
    }

    fn set(&self, state: Result<(), String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Ready, or what is missing.
    pub fn check(&self) -> Result<(), String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Who has the node.
#[derive(Debug)]
enum Hold {
    Nobody,
    Ours(Record),
    /// Another handler has it; we follow its record.
    Theirs(Record),
    /// A dry run has said what it would do.
    Rehearsed(Phase),
}

/// What [`Termination::new`] needs.
#[derive(Debug)]
pub struct Parts {
    pub cluster: Cluster,
    pub clock: Clock,
    pub settings: Settings,
    pub policy: Policy,
    pub recorder: Recorder,
    pub metrics: Metrics,
    pub instance: InstanceId,
}

/// The task of one node.
#[derive(Debug)]
pub struct Termination {
    cluster: Cluster,
    clock: Clock,
    settings: Settings,
    recorder: Recorder,
    metrics: Metrics,
    health: Health,
    instance: InstanceId,
    notices: Notices,
    /// The Node as last seen; unknown at the beginning, and after it was deleted.
    node: Option<NodeFacts>,
    hold: Hold,
    /// A person has uncordoned the node since we cordoned it: we do not cordon it again.
    uncordoned: bool,
    write: hold::Attempts,
    /// When a holder that may be gone is looked at next.
    holder_look: Option<Moment>,
    /// The write that takes a former holder's name off the Node.
    clearing: Option<AbortOnDropHandle<Option<NodeFacts>>>,
    start: start::Lookup,
    work: Option<Work>,
    /// How many drains there were: answers are told apart by it.
    works: u64,
    requests: JoinSet<work::Answered>,
    node_feed: Option<Feed<NodeEvent>>,
    pod_feed: Option<Feed<PodEvent>>,
    /// When the notice that leads the termination was seen; stages are timed from here.
    seen_at: Option<Moment>,
    /// Events that wait until the claim is through: nothing stands in front of it.
    announcements: Vec<EventNote>,
    /// Why the notices ask for nothing any more, for the release.
    ended_by: tell::ReleaseReason,
    span: Span,
    warned: tell::Warned,
}

impl Termination {
    pub fn new(parts: Parts) -> Self {
        let Parts { cluster, clock, settings, policy, recorder, metrics, instance } = parts;
        Self {
            cluster,
            clock,
            settings,
            recorder,
            metrics,
            health: Health::new(),
            instance,
            notices: Notices::new(policy),
            node: None,
            hold: Hold::Nobody,
            uncordoned: false,
            write: hold::Attempts::default(),
            holder_look: None,
            clearing: None,
            start: start::Lookup::default(),
            work: None,
            works: 0,
            requests: JoinSet::new(),
            node_feed: None,
            pod_feed: None,
            seen_at: None,
            announcements: Vec::new(),
            ended_by: tell::ReleaseReason::Expired,
            span: Span::none(),
            warned: tell::Warned::default(),
        }
    }

    /// For readiness.
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// Works until `cancel`, or until the sources end.
    pub async fn run(mut self, mut reports: mpsc::Receiver<Report>, cancel: CancellationToken) -> Result<(), Error> {
        loop {
            self.act().await?;
            let wake = self.next_wake();
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                report = reports.recv() => match report {
                    Some(report) => self.take_in(report),
                    None => break,
                },
                Some(answer) = self.requests.join_next() => self.answered(answer?),
                found = start::Lookup::next(&mut self.start.task) => self.looked_up(found)?,
                event = Feed::next(&mut self.pod_feed) => self.pod_event(event),
                event = Feed::next(&mut self.node_feed) => self.node_event(event).await?,
                () = sleep_until(wake) => {}
            }
            self.tick();
        }
        self.stop().await
    }

    /// Lets requests under way be answered, so that the record stays true and nothing is asked twice.
    async fn stop(mut self) -> Result<(), Error> {
        let last = Instant::now() + LAST_ANSWERS;
        if let Some(work) = &mut self.work {
            work.stop_asking();
        }
        while let Ok(Some(answer)) = tokio::time::timeout_at(last, self.requests.join_next()).await {
            self.answered(answer?);
        }
        if self.work.as_ref().is_some_and(Work::is_finished) {
            self.act().await?;
        }
        self.tell_stop();
        Ok(())
    }

    /// Does what is to be done about the node now, one step after the other.
    async fn act(&mut self) -> Result<(), Error> {
        // Each step changes what is held; more than a few in a row would mean that two of them undo each other, or that
        // the Node changes faster than it can be written.
        let mut more = true;
        for _ in 0..MOST_STEPS {
            more = self.step().await?;
            if !more {
                break;
            }
        }
        if more {
            self.pause_writes();
        }
        self.open_feeds();
        self.announce();
        Ok(())
    }

    /// The Node's own word, where it is one.
    fn annotation(&mut self) -> Option<Response> {
        let word = self.node.as_ref()?.annotations.get("response")?;
        let response = Response::parse(word);
        if response.is_none() {
            let message = format!(
                "annotation spotter.dev/response={word:?} of the Node is none of ignore, cordon, drain; not followed"
            );
            self.warned.once(&message);
        }
        response
    }

    fn next_wake(&mut self) -> Instant {
        let now = self.clock.now();
        let annotation = self.annotation();
        let standing = self.notices.standing(annotation, self.clock.wall());
        let times = [
            Some(now.after(LONGEST_SLEEP)),
            standing.changes_at.map(|at| self.clock.moment(at)),
            self.write.not_before,
            self.start.due(self.node.is_none()),
            self.work.as_ref().and_then(|work| work.next_wake(now)),
            self.node_feed_due(now).filter(|_| self.node_feed.is_none()),
            self.next_look(),
            self.holder_look.filter(|_| matches!(self.hold, Hold::Theirs(_))),
        ];
        let wake = times.into_iter().flatten().min().unwrap_or(now);
        // A wake that is due and changes nothing must not spin.
        self.clock.instant(wake.max(now.after(Duration::from_millis(1))))
    }

    /// Opens the watches that are needed now, and closes the others.
    fn open_feeds(&mut self) {
        let now = self.clock.now();
        if self.node_feed_due(now).is_some_and(|due| due <= now) {
            if self.node_feed.is_none()
                && let Some(node) = &self.node
            {
                let mut watch = self.cluster.watch_node(node.resource_version.clone());
                self.node_feed =
                    Some(Feed::open(|events| async move { while events.send(watch.next().await).await.is_ok() {} }));
            }
        } else if self.work.is_none() {
            self.node_feed = None;
        }
        let wanted = self.work.as_ref().is_some_and(|work| work.wants_pods(now));
        if wanted && self.pod_feed.is_none() {
            let mut watch = self.cluster.watch_pods();
            self.pod_feed =
                Some(Feed::open(|events| async move { while events.send(watch.next().await).await.is_ok() {} }));
        } else if !wanted {
            self.pod_feed = None;
        }
    }
}

/// Events of a watch that runs in a task of its own, and ends with this.
#[derive(Debug)]
struct Feed<T> {
    events: mpsc::Receiver<T>,
    _task: AbortOnDropHandle<()>,
}

impl<T: Send + 'static> Feed<T> {
    fn open<F>(run: impl FnOnce(mpsc::Sender<T>) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, events) = mpsc::channel(FEED_CAPACITY);
        Self { events, _task: AbortOnDropHandle::new(tokio::spawn(run(sender))) }
    }

    /// The next event; never, where there is no feed.
    async fn next(feed: &mut Option<Self>) -> T {
        if let Some(feed) = feed
            && let Some(event) = feed.events.recv().await
        {
            return event;
        }
        std::future::pending().await
    }
}

/// `i-0a1b2c-1800000000`: unique for a node, and readable.
fn termination_id(instance: &InstanceId, now: Timestamp) -> String {
    format!("{instance}-{}", now.as_second())
}

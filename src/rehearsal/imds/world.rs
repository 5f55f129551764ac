//! What can be read at the moment, and what was asked.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::mpsc;

use super::{Machine, Shared as SharedWorld, bodies};

pub(super) const SPOT: &str = "spot/instance-action";
pub(super) const TERMINATION_TIME: &str = "spot/termination-time";
pub(super) const REBALANCE: &str = "events/recommendations/rebalance";
pub(super) const TARGET_STATE: &str = "autoscaling/target-lifecycle-state";
pub(super) const SCHEDULED: &str = "events/maintenance/scheduled";
pub(super) const HISTORY: &str = "events/maintenance/history";

/// Stands for every path in [`Control::fault`].
const EVERY_PATH: &str = "*";

/// Something that becomes readable, or no longer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Spot {
        action: String,
        time: Timestamp,
    },
    SpotGone,
    Rebalance {
        noticed_at: Timestamp,
    },
    RebalanceGone,
    /// `InService`, `Terminated`, `Warmed:Stopped` and the like.
    TargetState(String),
    /// A new event, or a new date for the one with this id.
    Maintenance {
        id: String,
        code: String,
        start: Timestamp,
    },
    /// The event moves from the list to the history.
    MaintenanceEnded {
        id: String,
        ending: Ending,
    },
}

/// How a maintenance event ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Cancelled,
    Completed,
}

/// How a path misbehaves, until it is told otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Answers as usual, this much later.
    Delay(Duration),
    /// Answers this status, with the page that the real service has for it.
    Status(u16),
    /// Answers 200 with this body.
    Body(String),
}

/// A change, as it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happening {
    /// From here on a request sees it.
    pub at: Timestamp,
    /// One line for a person.
    pub text: String,
}

/// When a path last changed what it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readable {
    /// On the monotonic clock of this process.
    pub at: Instant,
    /// By the wall clock.
    pub wall: Timestamp,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) connections: AtomicU64,
    identity_document: String,
    world: Mutex<World>,
}

#[derive(Debug, Default)]
struct World {
    /// Below `meta-data/`.
    bodies: BTreeMap<String, String>,
    scheduled: Vec<Value>,
    history: Vec<Value>,
    /// Each with its end.
    tokens: BTreeMap<String, Instant>,
    longest_token: Option<Duration>,
    faults: BTreeMap<String, Fault>,
    requests: BTreeMap<String, u64>,
    readable: BTreeMap<String, Readable>,
    listener: Option<mpsc::UnboundedSender<Happening>>,
}

/// The handle on a running mock. A clone is the same handle.
///
/// Paths are those below `/latest/meta-data/`, for instance `spot/instance-action`, and `api/token`.
#[derive(Debug, Clone)]
pub struct Control {
    pub(super) shared: SharedWorld,
}

impl Control {
    pub(super) fn new(machine: &Machine) -> Self {
        let world = World { bodies: bodies::metadata(machine), ..World::default() };
        let control = Self {
            shared: Arc::new(Shared {
                connections: AtomicU64::new(0),
                identity_document: bodies::identity_document(machine, Timestamp::now()),
                world: Mutex::new(world),
            }),
        };
        control.world().show_events();
        control
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.shared.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self, to: mpsc::UnboundedSender<Happening>) {
        self.world().listener = Some(to);
    }

    /// Changes what can be read, remembers when, and tells it.
    pub fn apply(&self, change: Change) {
        let mut world = self.world();
        let (path, text) = world.apply(change);
        let readable = Readable { at: Instant::now(), wall: Timestamp::now() };
        world.readable.insert(path.to_owned(), readable);
        if let Some(listener) = &world.listener {
            // Nobody listens any more: nobody misses it.
            let _ = listener.send(Happening { at: readable.wall, text });
        }
    }

    /// Shows `body` at `path`, whatever it is.
    pub fn set(&self, path: &str, body: impl Into<String>) {
        let mut world = self.world();
        world.bodies.insert(path.to_owned(), body.into());
        world.readable.insert(path.to_owned(), Readable { at: Instant::now(), wall: Timestamp::now() });
    }

    /// Makes `path` a 404.
    pub fn remove(&self, path: &str) {
        self.world().bodies.remove(path);
    }

    /// Makes `path`, or every path for `*`, misbehave; `None` heals it.
    pub fn fault(&self, path: &str, fault: impl Into<Option<Fault>>) {
        let mut world = self.world();
        match fault.into() {
            Some(fault) => drop(world.faults.insert(path.to_owned(), fault)),
            None => drop(world.faults.remove(path)),
        }
    }

    /// Forgets every token, as the service does when it restarts.
    pub fn drop_tokens(&self) {
        self.world().tokens.clear();
    }

    /// Gives tokens that live at most this long, and says so in the answer.
    pub fn longest_token(&self, ttl: Duration) {
        self.world().longest_token = Some(ttl);
    }

    /// How often `path` was asked for, whatever the answer was.
    pub fn requests(&self, path: &str) -> u64 {
        self.world().requests.get(path).copied().unwrap_or(0)
    }

    /// How many connections were made.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// When `path` last changed what it shows; `None` if it never did.
    pub fn readable(&self, path: &str) -> Option<Readable> {
        self.world().readable.get(path).copied()
    }

    /// Counts a request and says how it is to be misanswered.
    pub(super) fn requested(&self, path: &str) -> Option<Fault> {
        let mut world = self.world();
        *world.requests.entry(path.to_owned()).or_default() += 1;
        world.faults.get(path).or_else(|| world.faults.get(EVERY_PATH)).cloned()
    }

    /// A new token and the lifetime that it really has.
    pub(super) fn new_token(&self, asked: Duration) -> (String, Duration) {
        let mut world = self.world();
        let ttl = world.longest_token.map_or(asked, |longest| longest.min(asked));
        let now = Instant::now();
        world.tokens.retain(|_, end| *end > now);
        // Not a secret: only unlike the one before.
        let random = |_| format!("{:016x}", RandomState::new().hash_one(world.tokens.len()));
        let token = format!("AQAEA{}==", (0..3).map(random).collect::<String>());
        world.tokens.insert(token.clone(), now + ttl);
        (token, ttl)
    }

    /// The time that a token has left; `None` where it is unknown or has ended.
    pub(super) fn token_left(&self, token: &str) -> Option<Duration> {
        let end = *self.world().tokens.get(token)?;
        end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// The body at a path below `meta-data/`, or the names below it where it is a folder.
    pub(super) fn body(&self, path: &str) -> Option<String> {
        let world = self.world();
        if let Some(body) = world.bodies.get(path) {
            return Some(body.clone());
        }
        let folder = if path.is_empty() { String::new() } else { format!("{}/", path.trim_end_matches('/')) };
        let mut names: Vec<String> = Vec::new();
        for below in world.bodies.keys().filter_map(|full| full.strip_prefix(&folder)) {
            let name = below.split_once('/').map_or(below.to_owned(), |(first, _)| format!("{first}/"));
            if names.last() != Some(&name) {
                names.push(name);
            }
        }
        (!names.is_empty()).then(|| names.join("\n"))
    }

    pub(super) fn identity_document(&self) -> &str {
        &self.shared.identity_document
    }
}

impl World {
    /// The path that changed, and a line about it.
    fn apply(&mut self, change: Change) -> (&'static str, String) {
        match change {
            Change::Spot { action, time } => {
                self.bodies.insert(SPOT.into(), bodies::instance_action(&action, time));
                // "Present only if the Spot Instance has been marked for termination" (instance metadata categories).
                if action == "terminate" {
                    self.bodies.insert(TERMINATION_TIME.into(), bodies::rfc3339(time));
                } else {
                    self.bodies.remove(TERMINATION_TIME);
                }
                (SPOT, format!("readable: spot interruption, {action} at {}", bodies::rfc3339(time)))
            }
            Change::SpotGone => {
                self.bodies.remove(SPOT);
                self.bodies.remove(TERMINATION_TIME);
                (SPOT, "withdrawn: spot interruption".into())
            }
            Change::Rebalance { noticed_at } => {
                self.bodies.insert(REBALANCE.into(), bodies::rebalance(noticed_at));
                (REBALANCE, "readable: rebalance recommendation".into())
            }
            Change::RebalanceGone => {
                self.bodies.remove(REBALANCE);
                (REBALANCE, "withdrawn: rebalance recommendation".into())
            }
            Change::TargetState(state) => {
                let what = if state == "InService" { "withdrawn" } else { "readable" };
                let text = format!("{what}: target lifecycle state {state}");
                self.bodies.insert(TARGET_STATE.into(), state);
                (TARGET_STATE, text)
            }
            Change::Maintenance { id, code, start } => {
                self.scheduled.retain(|event| event["EventId"] != id.as_str());
                self.scheduled.push(bodies::event(&id, &code, start));
                self.show_events();
                (SCHEDULED, format!("readable: maintenance {id}, {code} at {}", bodies::rfc3339(start)))
            }
            Change::MaintenanceEnded { id, ending } => (SCHEDULED, self.end_event(&id, ending)),
        }
    }

    fn end_event(&mut self, id: &str, ending: Ending) -> String {
        let (state, word) = match ending {
            Ending::Cancelled => ("canceled", "[Canceled]"),
            Ending::Completed => ("completed", "[Completed]"),
        };
        for mut event in self.scheduled.extract_if(.., |event| event["EventId"] == id) {
            let description = event["Description"].as_str().unwrap_or_default();
            event["Description"] = format!("{word} {description}").into();
            event["State"] = state.into();
            self.history.push(event);
        }
        self.show_events();
        format!("withdrawn: maintenance {id}, {state}")
    }

    fn show_events(&mut self) {
        for (path, events) in [(SCHEDULED, &self.scheduled), (HISTORY, &self.history)] {
            self.bodies.insert(path.into(), Value::from(events.as_slice()).to_string());
        }
    }
}

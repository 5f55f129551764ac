//! A small kubelet: ends the pods of its nodes as they were told to end, and writes down how it went.
//!
//! It runs on a thread of its own, so that a busy test does not delay it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt, pin_mut};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions, WatchEvent, WatchParams},
};
use serde_json::json;
use tokio::{sync::oneshot, task::JoinSet, time::Instant};

use super::{controlplane::Server, eventually};

/// The pod's annotation that says how many milliseconds it works on after SIGTERM, or `never`.
pub const EXIT_AFTER: &str = "test/exit-after";
const DEFAULT_EXIT: Duration = Duration::from_millis(50);

/// How one pod ended.
#[derive(Clone, Debug)]
pub struct Stop {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// When the kubelet saw the deletion: the process got SIGTERM.
    pub sigterm: Timestamp,
    /// deletionGracePeriodSeconds, and every later value.
    pub graces: Vec<i64>,
    /// deletionTimestamp, the last one seen: SIGKILL comes at the latest then.
    pub kill_at: Timestamp,
    /// When the processes had ended.
    pub exited: Option<Timestamp>,
    /// Ended by SIGKILL and not by themselves.
    pub sigkilled: bool,
    exit_at: Instant,
    first_seen: Instant,
}

impl Stop {
    /// The grace that counts in the end, in seconds.
    pub fn grace(&self) -> i64 {
        *self.graces.last().expect("at least one")
    }
}

type Stops = Arc<Mutex<BTreeMap<String, Stop>>>;

/// Ends when dropped.
pub struct Kubelet {
    stops: Stops,
    _stop: oneshot::Sender<()>,
}

impl Kubelet {
    /// A kubelet for these nodes.
    pub fn start(server: &Arc<Server>, nodes: &[&str]) -> Self {
        let stops = Stops::default();
        let (stop, stopped) = oneshot::channel::<()>();
        let (server, nodes, shared) =
            (server.clone(), nodes.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>(), stops.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        std::thread::spawn(move || {
            runtime.block_on(async move {
                let client = server.admin();
                let mut loops = JoinSet::new();
                for node in nodes {
                    loops.spawn(serve(client.clone(), node, shared.clone()));
                }
                // An error is the drop of the sender.
                let _ = stopped.await;
            });
        });
        Self { stops, _stop: stop }
    }

    /// All pods that were told to end, in the order of their SIGTERM.
    pub fn stops(&self) -> Vec<Stop> {
        let mut stops: Vec<_> = self.stops.lock().unwrap().values().cloned().collect();
        stops.sort_by_key(|stop| stop.sigterm);
        stops
    }

    /// The last stop of a pod of this name, or None where it was not told to end.
    pub fn stop(&self, name: &str) -> Option<Stop> {
        self.stops().into_iter().rfind(|stop| stop.name == name)
    }

    /// Waits until so many pods have ended.
    pub async fn ended(&self, count: usize, limit: Duration) -> Vec<Stop> {
        eventually(&format!("{count} pods have ended"), limit, || async {
            let stops = self.stops();
            (stops.iter().filter(|stop| stop.exited.is_some()).count() >= count).then_some(stops)
        })
        .await
    }
}

/// Watches one node's pods for ever, through restarts of the server.
async fn serve(client: Client, node: String, stops: Stops) {
    let pods: Api<Pod> = Api::all(client.clone());
    let mut exits = JoinSet::new();
    let fields = format!("spec.nodeName={node}");
    loop {
        if let Ok(list) = pods.list(&ListParams::default().fields(&fields)).await {
            let version = list.metadata.resource_version.clone().unwrap_or_default();
            list.items.iter().for_each(|pod| see(&client, &stops, &mut exits, pod));
            if let Ok(events) = pods.watch(&WatchParams::default().fields(&fields), &version).await {
                pin_mut!(events);
                while let Some(Ok(event)) = events.next().await {
                    if let WatchEvent::Added(pod) | WatchEvent::Modified(pod) = event {
                        see(&client, &stops, &mut exits, &pod);
                    }
                    while exits.try_join_next().is_some() {}
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Notes a pod that is to end, and starts or shortens its last moments.
fn see(client: &Client, stops: &Stops, exits: &mut JoinSet<()>, pod: &Pod) {
    let meta = &pod.metadata;
    let (Some(deletion), Some(uid)) = (&meta.deletion_timestamp, &meta.uid) else { return };
    let grace = meta.deletion_grace_period_seconds.unwrap_or(0);
    let now = Instant::now();
    let mut stops_now = stops.lock().unwrap();
    let stop = stops_now.entry(uid.clone()).or_insert_with(|| Stop {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
        uid: uid.clone(),
        sigterm: Timestamp::now(),
        graces: Vec::new(),
        kill_at: deletion.0,
        exited: None,
        sigkilled: false,
        exit_at: now + Duration::from_secs(86_400),
        first_seen: now,
    });
    if stop.exited.is_some() || stop.graces.last() == Some(&grace) {
        return;
    }
    stop.graces.push(grace);
    stop.kill_at = deletion.0;
    let own = exit_after(pod).map(|span| stop.first_seen + span);
    let kill = now + Duration::from_secs(u64::try_from(grace).unwrap_or(0));
    let exit_at = own.map_or(kill, |own| own.min(kill));
    if exit_at < stop.exit_at {
        stop.exit_at = exit_at;
        stop.sigkilled = own.is_none_or(|own| own > kill);
        let keep_object = meta.finalizers.as_ref().is_some_and(|list| !list.is_empty());
        exits.spawn(exit(client.clone(), stops.clone(), uid.clone(), exit_at, keep_object));
    }
}

/// At the end of a pod's processes: reports it where the object stays, and takes the object away.
async fn exit(client: Client, stops: Stops, uid: String, at: Instant, report: bool) {
    tokio::time::sleep_until(at).await;
    let stop = {
        let mut stops = stops.lock().unwrap();
        let stop = stops.get_mut(&uid).expect("noted before");
        if stop.exited.is_some() || stop.exit_at != at {
            return;
        }
        stop.exited = Some(Timestamp::now());
        stop.clone()
    };
    let pods: Api<Pod> = Api::namespaced(client, &stop.namespace);
    if report {
        let phase = if stop.sigkilled { "Failed" } else { "Succeeded" };
        let status = json!({"metadata": {"uid": uid}, "status": {"phase": phase}});
        let _ = pods.patch_status(&stop.name, &PatchParams::default(), &Patch::Strategic(status)).await;
    }
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid: Some(uid), resource_version: None }),
        ..DeleteParams::default()
    };
    loop {
        match pods.delete(&stop.name, &params).await {
            Err(kube::Error::Api(status)) if status.code != 404 && status.code != 409 => {}
            Err(error) if !matches!(error, kube::Error::Api(_)) => {}
            _ => return,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// None for a pod that ignores SIGTERM.
fn exit_after(pod: &Pod) -> Option<Duration> {
    match pod.metadata.annotations.as_ref().and_then(|all| all.get(EXIT_AFTER)) {
        None => Some(DEFAULT_EXIT),
        Some(text) => text.parse().ok().map(Duration::from_millis),
    }
}

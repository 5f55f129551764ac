//! The composition root: builds the adapters, wires the source to the termination, supervises the tasks.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context, anyhow};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    clock::Clock,
    cluster::{self, Cluster, IdentityChoice, Manager, Recorder},
    config::{AtDeadline, Config, EvictOrSkip, Identity},
    ops::{
        admin::{self, Admin},
        metrics::MetricsRegistry,
        shutdown::Signals,
    },
    plan::{classify, drain},
    policy::Policy,
    source::imds::{self, Imds},
    termination::{self, Termination},
};

/// Reports wait here while the termination is busy with one write. A node has a handful of notices; a full channel
/// only makes the polls wait.
const REPORTS: usize = 64;

/// How long tasks may take to end once they were asked to.
const LAST_WORDS: Duration = Duration::from_secs(8);

/// Runs until it is told to stop, or a task that must not end does.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let signals = Signals::catch().context("cannot catch signals")?;
    tokio::select! {
        done = agent(&config, &stop) => done,
        () = signals.watch(stop.clone()) => Ok(()),
    }
}

/// The metrics of every part, and the registry that shows them.
struct Metrics {
    cluster: cluster::Metrics,
    imds: imds::Metrics,
    termination: termination::Metrics,
    registry: Arc<MetricsRegistry>,
}

impl Metrics {
    fn new(config: &Config) -> Self {
        let (cluster, imds, termination) = (cluster::Metrics::new(), imds::Metrics::new(), termination::Metrics::new());
        let mut registry = MetricsRegistry::new(config.mode.as_str());
        cluster.register(registry.parts());
        imds.register(registry.parts());
        termination.register(registry.parts());
        Self { cluster, imds, termination, registry: Arc::new(registry) }
    }
}

async fn agent(config: &Config, stop: &CancellationToken) -> anyhow::Result<()> {
    if config.dry_run {
        info!("dry run: nothing is written anywhere");
    }
    let metrics = Metrics::new(config);
    let health = imds::Health::new();
    let tasks = TaskTracker::new();
    let base = imds::BaseUrl::parse(&config.imds.url).map_err(anyhow::Error::msg)?;
    let source = Imds::new(base, metrics.imds.clone())?;
    let clock = Clock::new();
    let cluster = Cluster::new(cluster_settings(config), clock, metrics.cluster.clone()).await?;

    // The admin server comes first, so that a probe can say what the agent waits for.
    let identified = Arc::new(OnceLock::new());
    if let Some(listen) = config.ops.listen {
        let admin = admin(&metrics, health.clone(), identified.clone());
        admin::spawn(listen, admin, &tasks, stop.clone()).await;
    }

    let Some(identity) = source.wait_for_identity(&health, stop).await else { return Ok(()) };
    let imds::Identity { instance, instance_type, zone, spot, .. } = &identity;
    info!(%instance, instance_type, zone, spot, "this instance");

    let recorder = cluster.recorder();
    let termination = Termination::new(termination::Parts {
        cluster,
        clock,
        settings: termination_settings(config),
        policy: policy(config, identity.spot),
        recorder: recorder.clone(),
        metrics: metrics.termination,
        instance: identity.instance.clone(),
    });
    let _ = identified.set(termination.health());
    let outcome = supervise(config, source, identity, health, termination, recorder, stop).await;
    stop.cancel();
    tasks.close();
    if tokio::time::timeout(LAST_WORDS, tasks.wait()).await.is_err() {
        warn!("some tasks did not end in time");
    }
    outcome
}

fn admin(metrics: &Metrics, source: imds::Health, node: Arc<OnceLock<termination::Health>>) -> Admin {
    Admin::new(metrics.registry.clone()).ready_when(Arc::new(move || source.check())).ready_when(Arc::new(move || {
        match node.get() {
            Some(health) => health.check(),
            None => Err("the instance metadata service has not told yet which instance this is".into()),
        }
    }))
}

/// Runs the source, the termination and the event recorder; the first that ends by itself ends the process.
async fn supervise(
    config: &Config,
    source: Imds,
    identity: imds::Identity,
    health: imds::Health,
    termination: Termination,
    recorder: Recorder,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let (sender, reports) = mpsc::channel(REPORTS);
    let settings = imds::Settings {
        poll_interval: config.imds.poll_interval,
        rebalance_interval: config.imds.rebalance_poll_interval,
        maintenance_interval: config.imds.maintenance_poll_interval,
    };
    // Events are the last to stop: what the others say at their end is to be heard.
    let last = CancellationToken::new();
    let mut recording = JoinSet::new();
    recording.spawn({
        let last = last.clone();
        async move { recorder.run(last).await }
    });
    let mut tasks = JoinSet::new();
    let polling = stop.child_token();
    tasks.spawn(async move {
        let ended = imds::run(&source, &identity, &settings, sender, &health, polling).await;
        ended.context("the metadata source")
    });
    let working = stop.child_token();
    tasks.spawn(async move { termination.run(reports, working).await.map_err(anyhow::Error::from) });

    let mut outcome = Ok(());
    while let Some(ended) = tasks.join_next().await {
        let ended = ended.context("a task of the agent failed").flatten();
        if outcome.is_ok() {
            outcome = match ended {
                Ok(()) if !stop.is_cancelled() => Err(anyhow!("a task of the agent ended that should not")),
                ended => ended,
            };
        }
        stop.cancel();
    }
    last.cancel();
    let _ = tokio::time::timeout(LAST_WORDS, recording.join_next()).await;
    outcome
}

fn cluster_settings(config: &Config) -> cluster::Settings {
    cluster::Settings {
        kubeconfig: config.kubernetes.kubeconfig.clone(),
        context: config.kubernetes.context.clone(),
        node: config.node_name.clone(),
        identity: match config.kubernetes.identity {
            Identity::Auto => IdentityChoice::Auto,
            Identity::Node => IdentityChoice::Node,
            Identity::Direct => IdentityChoice::Direct,
        },
        manager: Manager::Agent,
    }
}

fn policy(config: &Config, spot_instance: bool) -> Policy {
    Policy {
        table: config.policy.clone(),
        release_after: config.rebalance_release_after,
        lead_time: config.maintenance_lead_time,
        spot_instance,
    }
}

fn termination_settings(config: &Config) -> termination::Settings {
    let treatment = |choice| match choice {
        EvictOrSkip::Evict => classify::Treatment::Evict,
        EvictOrSkip::Skip => classify::Treatment::Skip,
    };
    let rules = classify::Rules {
        empty_dir: treatment(config.drain.empty_dir),
        unmanaged: treatment(config.drain.unmanaged),
        own_pod: config.pod.as_ref().map(|pod| (pod.namespace.clone(), pod.name.clone())),
    };
    let at_deadline = match config.drain.at_deadline {
        AtDeadline::Auto => drain::AtDeadline::Auto,
        AtDeadline::Delete => drain::AtDeadline::Delete,
        AtDeadline::Leave => drain::AtDeadline::Leave,
    };
    termination::Settings {
        dry_run: config.dry_run,
        events: config.kubernetes.events && !config.dry_run,
        exclude_from_load_balancers: config.kubernetes.exclude_from_load_balancers,
        rules,
        margin: config.drain.margin,
        at_deadline,
        max_in_flight: config.drain.max_in_flight,
    }
}

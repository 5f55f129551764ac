//! One validated [`Config`] from flags, environment, file and defaults, in this order of precedence.
//!
//! Everything that is wrong is said at once, with the place where it can be changed and the way out.

mod file;
pub mod options;
mod sources;
mod values;

use std::{collections::BTreeMap, ffi::OsString, fmt, net::SocketAddr, path::PathBuf, time::Duration};

use crate::{notice::Kind, policy::Response};

pub use self::sources::Origin;
use self::{options::variable, sources::Sources, values::Reader};

/// What `spotter run` is to do. Every value in it has been checked.
#[derive(Debug, Clone)]
pub struct Config {
    pub mode: Mode,
    /// The node to look after.
    pub node_name: String,
    /// The pod spotter runs in, where that is known.
    pub pod: Option<PodName>,
    /// Change nothing anywhere.
    pub dry_run: bool,
    pub imds: Imds,
    pub kubernetes: Kubernetes,
    /// An entry for every kind.
    pub policy: BTreeMap<Kind, Response>,
    /// A rebalance recommendation of this age without an interruption is over.
    pub rebalance_release_after: Duration,
    /// How long before its start scheduled maintenance is acted on.
    pub maintenance_lead_time: Duration,
    pub drain: Drain,
    pub ops: Ops,
    /// Each option with the value that counts and where it came from, in the order of reading.
    pub settings: Vec<Setting>,
    /// What a person should look at, though it stops nothing. To be logged once logging works.
    pub warnings: Vec<String>,
}

/// How spotter learns of notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One on each node, from that node's instance metadata.
    Agent,
}

impl Mode {
    /// The word of the configuration and of metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
        }
    }
}

/// A pod by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
}

/// How to read the instance metadata service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imds {
    /// `http://HOST[:PORT]`, without a slash at the end.
    pub url: String,
    /// For `spot/instance-action`.
    pub poll_interval: Duration,
    /// For the rebalance recommendation and the Auto Scaling target state.
    pub rebalance_poll_interval: Duration,
    pub maintenance_poll_interval: Duration,
}

/// How to reach the API server, and what to write there besides the drain itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kubernetes {
    /// `None`: in a pod its ServiceAccount, otherwise `KUBECONFIG` or `~/.kube/config`.
    pub kubeconfig: Option<PathBuf>,
    /// `None`: the kubeconfig's current one.
    pub context: Option<String>,
    pub identity: Identity,
    pub events: bool,
    pub exclude_from_load_balancers: bool,
}

/// As whom to speak to the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// As the node where the server allows it, otherwise directly.
    Auto,
    /// As the node, by constrained impersonation (Kubernetes 1.36 and later).
    Node,
    /// As who we are.
    Direct,
}

/// What a drain does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drain {
    pub at_deadline: AtDeadline,
    /// Kept free before the deadline.
    pub margin: Duration,
    pub empty_dir: EvictOrSkip,
    pub unmanaged: EvictOrSkip,
    /// Evictions on the wire at once; `None`: what fits the identity.
    pub max_in_flight: Option<usize>,
}

/// What becomes of pods that could not be evicted in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtDeadline {
    /// Delete under a hard deadline, leave otherwise.
    Auto,
    Delete,
    Leave,
}

/// What becomes of a class of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvictOrSkip {
    Evict,
    Skip,
}

/// How spotter is watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ops {
    /// Where probes and metrics are served; `None`: nowhere.
    pub listen: Option<SocketAddr>,
    pub log_format: LogFormat,
    pub log_level: LogLevel,
}

/// Log lines for people or for machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// The least important line that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// One option as it counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub name: &'static str,
    /// As it was written; secrets are redacted.
    pub value: String,
    pub origin: Origin,
}

/// Everything that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    pub problems: Vec<String>,
    /// What may have led to them, for instance a misspelt variable.
    pub warnings: Vec<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.len() {
            1 => f.write_str("the configuration has an error:")?,
            count => write!(f, "the configuration has {count} errors:")?,
        }
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        for warning in &self.warnings {
            write!(f, "\n  note: {warning}")?;
        }
        Ok(())
    }
}

impl Config {
    /// Reads flags (by option name), environment and the file that they name.
    pub fn load(
        flags: BTreeMap<&'static str, String>,
        environment: impl Iterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(Sources::gather(flags, environment));
        let config = read(&mut reader);
        let Reader { mut sources, problems, settings } = reader;
        let warnings = std::mem::take(&mut sources.warnings);
        match config {
            Some(config) if problems.is_empty() => Ok(Self { settings, warnings, ..config }),
            _ => Err(ConfigError { problems, warnings }),
        }
    }

    /// What differs from the defaults, in one line for the log: `mode=agent (flag) listen=off (SPOTTER_LISTEN)`.
    pub fn summary(&self) -> String {
        let given = self.settings.iter().filter_map(|Setting { name, value, origin }| {
            let origin = match origin {
                Origin::Flag => "flag".to_owned(),
                Origin::Environment => variable(name),
                Origin::File { .. } => "file".to_owned(),
                Origin::Default | Origin::Unset => return None,
            };
            Some(format!("{name}={value} ({origin})"))
        });
        given.collect::<Vec<_>>().join(" ")
    }
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A week: whatever is longer is a typing error rather than a wish.
const WEEK: Duration = seconds(7 * 24 * 3600);

fn read(reader: &mut Reader) -> Option<Config> {
    let mode = mode(reader);
    reader.text("config");
    // What the agent needs is said together with a missing or misspelt mode; other modes will not need it.
    let node_name = node_name(reader);
    let pod = pod(reader);
    let dry_run = reader.boolean("dry-run");
    let imds = imds(reader);
    let kubernetes = kubernetes(reader);
    let policy = policy(reader);
    let rebalance_release_after = reader.duration("rebalance-release-after", seconds(1), WEEK);
    let maintenance_lead_time = reader.duration("maintenance-lead-time", Duration::ZERO, WEEK);
    let drain = drain(reader);
    let ops = ops(reader);
    Some(Config {
        mode: mode?,
        node_name: node_name?,
        pod: pod?,
        dry_run: dry_run?,
        imds: imds?,
        kubernetes: kubernetes?,
        policy: policy?,
        rebalance_release_after: rebalance_release_after?,
        maintenance_lead_time: maintenance_lead_time?,
        drain: drain?,
        ops: ops?,
        settings: Vec::new(),
        warnings: Vec::new(),
    })
}

fn mode(reader: &mut Reader) -> Option<Mode> {
    let text = reader.required("mode", "agent")?;
    match text.as_str() {
        "agent" => return Some(Mode::Agent),
        "queue" | "watch" => reader.reject("mode", &text, "not in this version; give agent"),
        _ => reader.reject("mode", &text, "give agent"),
    }
    None
}

fn node_name(reader: &mut Reader) -> Option<String> {
    let agent = !matches!(reader.sources.get("mode").text.as_str(), "queue" | "watch");
    let text = if agent { reader.required("node-name", "NAME") } else { reader.text("node-name") };
    reader.kubernetes_name("node-name", text)?
}

fn pod(reader: &mut Reader) -> Option<Option<PodName>> {
    let name = reader.text("pod-name");
    let name = reader.kubernetes_name("pod-name", name);
    let namespace = reader.text("pod-namespace");
    let namespace = reader.kubernetes_name("pod-namespace", namespace);
    match (name?, namespace?) {
        (Some(name), Some(namespace)) => Some(Some(PodName { namespace, name })),
        (None, None) => Some(None),
        (Some(name), None) => {
            reader.reject("pod-name", &name, "means nothing without its namespace; give pod-namespace too");
            None
        }
        (None, Some(namespace)) => {
            reader.reject("pod-namespace", &namespace, "means nothing without the pod's name; give pod-name too");
            None
        }
    }
}

fn imds(reader: &mut Reader) -> Option<Imds> {
    let url = reader.imds_url("imds-url");
    // Below a tenth of a second IMDS throttles; above ten of the 120 seconds too many are gone.
    let poll_interval = reader.duration("poll-interval", ms(100), seconds(10));
    let rebalance_poll_interval = reader.duration("rebalance-poll-interval", ms(100), seconds(60));
    let maintenance_poll_interval = reader.duration("maintenance-poll-interval", ms(100), seconds(600));
    Some(Imds {
        url: url?,
        poll_interval: poll_interval?,
        rebalance_poll_interval: rebalance_poll_interval?,
        maintenance_poll_interval: maintenance_poll_interval?,
    })
}

fn kubernetes(reader: &mut Reader) -> Option<Kubernetes> {
    let kubeconfig = reader.text("kubeconfig").filter(|path| !path.is_empty()).map(PathBuf::from);
    let context = reader.text("context").filter(|context| !context.is_empty());
    let identities = [("auto", Identity::Auto), ("node", Identity::Node), ("direct", Identity::Direct)];
    let identity = reader.word("identity", &identities);
    let events = reader.boolean("events");
    let exclude_from_load_balancers = reader.boolean("exclude-from-load-balancers");
    Some(Kubernetes {
        kubeconfig,
        context,
        identity: identity?,
        events: events?,
        exclude_from_load_balancers: exclude_from_load_balancers?,
    })
}

fn policy(reader: &mut Reader) -> Option<BTreeMap<Kind, Response>> {
    let words = [Response::Ignore, Response::Cordon, Response::Drain].map(|response| (response.as_str(), response));
    let mut policy = BTreeMap::new();
    for kind in Kind::ALL {
        let response = match kind {
            Kind::SpotInterruption => reader.word("policy-spot-interruption", &words),
            Kind::RebalanceRecommendation => reader.word("policy-rebalance-recommendation", &words),
            Kind::ScheduledMaintenance => reader.word("policy-scheduled-maintenance", &words),
            Kind::AsgTermination => reader.word("policy-asg-termination", &words),
            // No source of the agent gives these two; who does give one wants the node empty.
            Kind::InstanceStateChange | Kind::Manual => Some(Response::Drain),
        };
        if let Some(response) = response {
            policy.insert(kind, response);
        }
    }
    (policy.len() == Kind::ALL.len()).then_some(policy)
}

fn drain(reader: &mut Reader) -> Option<Drain> {
    let at_deadline = [("auto", AtDeadline::Auto), ("delete", AtDeadline::Delete), ("leave", AtDeadline::Leave)];
    let evict_or_skip = [("evict", EvictOrSkip::Evict), ("skip", EvictOrSkip::Skip)];
    let at_deadline = reader.word("drain-at-deadline", &at_deadline);
    let margin = reader.duration("drain-margin", Duration::ZERO, seconds(30));
    let empty_dir = reader.word("drain-empty-dir", &evict_or_skip);
    let unmanaged = reader.word("drain-unmanaged", &evict_or_skip);
    let max_in_flight = reader.auto_or_number("drain-max-in-flight", 1, 1000);
    Some(Drain {
        at_deadline: at_deadline?,
        margin: margin?,
        empty_dir: empty_dir?,
        unmanaged: unmanaged?,
        max_in_flight: max_in_flight?,
    })
}

fn ops(reader: &mut Reader) -> Option<Ops> {
    let levels = [
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warn),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ];
    let listen = reader.listen("listen");
    let log_format = reader.word("log-format", &[("text", LogFormat::Text), ("json", LogFormat::Json)]);
    let log_level = reader.word("log-level", &levels);
    Some(Ops { listen: listen?, log_format: log_format?, log_level: log_level? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT: [(&str, &str); 2] = [("mode", "agent"), ("node-name", "n1")];

    fn load(flags: &[(&'static str, &str)], environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let flags = AGENT.iter().chain(flags).map(|(name, value)| (*name, (*value).to_owned())).collect();
        Config::load(flags, environment.iter().map(|(key, value)| (key.into(), value.into())))
    }

    #[test]
    fn the_defaults_are_those_of_the_table() {
        let config = load(&[], &[]).unwrap();
        assert_eq!(config.imds.url, "http://169.254.169.254");
        assert_eq!(config.imds.poll_interval, seconds(1));
        assert_eq!(config.kubernetes.identity, Identity::Auto);
        assert!(config.kubernetes.events && config.kubernetes.exclude_from_load_balancers && !config.dry_run);
        assert_eq!(config.policy[&Kind::SpotInterruption], Response::Drain);
        assert_eq!(config.policy[&Kind::RebalanceRecommendation], Response::Cordon);
        assert_eq!(config.policy.len(), Kind::ALL.len());
        assert_eq!(config.drain.at_deadline, AtDeadline::Auto);
        assert_eq!(config.drain.max_in_flight, None);
        assert_eq!(config.ops.listen, Some("0.0.0.0:9465".parse().unwrap()));
        assert_eq!(config.summary(), "mode=agent (flag) node-name=n1 (flag)");
    }

    #[test]
    fn every_option_of_the_table_is_read_once() {
        let mut read: Vec<&str> = load(&[], &[]).unwrap().settings.iter().map(|setting| setting.name).collect();
        let mut table: Vec<&str> = options::OPTIONS.iter().map(|spec| spec.name).collect();
        read.sort_unstable();
        table.sort_unstable();
        assert_eq!(read, table);
    }

    #[test]
    fn flag_beats_environment_beats_file_beats_default() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "drain: {margin: 3s}\nlisten: off\npoll-interval: 3s\nevents: false\n").unwrap();
        let path = file.path().to_str().unwrap();
        let config = load(
            &[("poll-interval", "5s"), ("config", path)],
            &[("SPOTTER_POLL_INTERVAL", "4s"), ("SPOTTER_DRAIN_MARGIN", "4s"), ("SPOTTER_LISTEN", "")],
        )
        .unwrap();
        assert_eq!(config.imds.poll_interval, seconds(5));
        assert_eq!(config.drain.margin, seconds(4));
        assert_eq!(config.ops.listen, None);
        assert!(!config.kubernetes.events);
        let origin = |name| config.settings.iter().find(|s| s.name == name).unwrap().origin.clone();
        assert_eq!(origin("poll-interval"), Origin::Flag);
        assert_eq!(origin("drain-margin"), Origin::Environment);
        assert_eq!(origin("events"), Origin::File { key: "events".to_owned() });
        assert_eq!(origin("identity"), Origin::Default);
        assert_eq!(origin("context"), Origin::Unset);
        assert!(config.summary().contains("drain-margin=4s (SPOTTER_DRAIN_MARGIN)"), "{}", config.summary());
    }

    #[test]
    fn a_pod_has_both_names_or_none() {
        let both = load(&[("pod-name", "p"), ("pod-namespace", "s")], &[]).unwrap();
        assert_eq!(both.pod, Some(PodName { namespace: "s".to_owned(), name: "p".to_owned() }));
        let problems = load(&[("pod-name", "p")], &[]).unwrap_err().problems;
        assert_eq!(
            problems,
            ["pod-name = p (flag --pod-name): means nothing without its namespace; give pod-namespace too"]
        );
    }

    #[test]
    fn modes_that_will_come_are_named_as_such() {
        let error = Config::load(BTreeMap::from([("mode", "queue".to_owned())]), std::iter::empty()).unwrap_err();
        assert_eq!(error.problems, ["mode = queue (flag --mode): not in this version; give agent"]);
        let error = Config::load(BTreeMap::new(), std::iter::empty()).unwrap_err();
        assert_eq!(error.problems.len(), 2, "{error}");
    }
}

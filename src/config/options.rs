//! The one table of options: flags, environment variables, file keys, help and documentation come from it.

use std::fmt::Write as _;

/// What environment variables begin with.
pub const ENVIRONMENT_PREFIX: &str = "SPOTTER_";

/// The heading that an option stands under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    Run,
    Imds,
    Kubernetes,
    Policy,
    Drain,
    Ops,
}

impl Group {
    /// Every group, in the order in which help and documentation show them.
    pub const ALL: [Self; 6] = [Self::Run, Self::Imds, Self::Kubernetes, Self::Policy, Self::Drain, Self::Ops];

    /// The heading.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Run => "What to run",
            Self::Imds => "Instance metadata",
            Self::Kubernetes => "Kubernetes",
            Self::Policy => "What to do about a notice",
            Self::Drain => "Drain",
            Self::Ops => "Logs, probes and metrics",
        }
    }
}

/// One option, as people see it. What its values must be like is said where they are read, in `config`.
#[derive(Debug, Clone, Copy)]
pub struct OptionSpec {
    /// The flag without its dashes; the file key.
    pub name: &'static str,
    /// What the value is like, for help: a placeholder, or the words it may be.
    pub value_name: &'static str,
    /// The value where nobody gives one; `None`: unset.
    pub default: Option<&'static str>,
    pub help: &'static str,
    pub group: Group,
    /// The flag alone means `true`.
    pub boolean: bool,
    /// The value is never shown: not in errors, not in logs.
    pub secret: bool,
}

impl OptionSpec {
    const fn new(group: Group, name: &'static str, value_name: &'static str) -> Self {
        Self { name, value_name, default: None, help: "", group, boolean: false, secret: false }
    }

    const fn switch(group: Group, name: &'static str) -> Self {
        Self { name, value_name: "true|false", default: None, help: "", group, boolean: true, secret: false }
    }

    const fn or(mut self, default: &'static str) -> Self {
        self.default = Some(default);
        self
    }

    const fn help(mut self, help: &'static str) -> Self {
        self.help = help;
        self
    }

    /// The environment variable that sets it.
    pub fn variable(&self) -> String {
        variable(self.name)
    }
}

/// The environment variable of the option `name`.
pub fn variable(name: &str) -> String {
    format!("{ENVIRONMENT_PREFIX}{}", name.to_ascii_uppercase().replace('-', "_"))
}

/// The option called `name`.
pub fn find(name: &str) -> Option<&'static OptionSpec> {
    OPTIONS.iter().find(|spec| spec.name == name)
}

/// How alike two names must be (Jaro-Winkler, 0 to 1) before one is offered for the other: below this the offers
/// were no longer what anybody could have meant.
const ALIKE: f64 = 0.75;

/// The option whose name is most like `name`.
pub fn nearest(name: &str) -> Option<&'static OptionSpec> {
    let likeness = |spec: &OptionSpec| strsim::jaro_winkler(name, spec.name);
    let best = OPTIONS.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(best) >= ALIKE).then_some(best)
}

/// The table of the README: every option with its default and what it does.
pub fn markdown() -> String {
    let mut table = String::from("| option | default | what it does |\n|---|---|---|\n");
    for group in Group::ALL {
        // Writing to a String cannot fail.
        let _ = writeln!(table, "| **{}** | | |", group.title());
        for spec in OPTIONS.iter().filter(|spec| spec.group == group) {
            let values = spec.value_name.replace('|', "\\|");
            let default = spec.default.map_or_else(String::new, |default| format!("`{default}`"));
            let _ = writeln!(table, "| `--{}` *{values}* | {default} | {} |", spec.name, spec.help);
        }
    }
    table
}

/// Every option of `spotter run`.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new(Group::Run, "mode", "agent")
        .help("What to run. agent: one on each node, reads that node's instance metadata. Required"),
    OptionSpec::new(Group::Run, "config", "FILE")
        .help("YAML file with any of these options; flags and environment win"),
    OptionSpec::new(Group::Run, "node-name", "NAME")
        .help("The Kubernetes node to look after (spec.nodeName). Required by the agent"),
    OptionSpec::new(Group::Run, "pod-name", "NAME").help("The pod spotter runs in, which a drain leaves alone"),
    OptionSpec::new(Group::Run, "pod-namespace", "NAMESPACE").help("The namespace of that pod"),
    OptionSpec::switch(Group::Run, "dry-run").or("false").help("Say what would be done, and change nothing anywhere"),
    OptionSpec::new(Group::Imds, "imds-url", "URL")
        .or("http://169.254.169.254")
        .help("Where the instance metadata service is"),
    OptionSpec::new(Group::Imds, "poll-interval", "DURATION")
        .or("1s")
        .help("How often to ask for a spot interruption; 100ms to 10s"),
    OptionSpec::new(Group::Imds, "rebalance-poll-interval", "DURATION")
        .or("2s")
        .help("How often to ask for a rebalance recommendation and the Auto Scaling state; 100ms to 1m"),
    OptionSpec::new(Group::Imds, "maintenance-poll-interval", "DURATION")
        .or("30s")
        .help("How often to ask for scheduled maintenance; 100ms to 10m"),
    OptionSpec::new(Group::Kubernetes, "kubeconfig", "FILE").help(
        "Kubeconfig file; otherwise the pod's own ServiceAccount, otherwise KUBECONFIG, otherwise ~/.kube/config",
    ),
    OptionSpec::new(Group::Kubernetes, "context", "NAME").help("Context of the kubeconfig; otherwise its current one"),
    OptionSpec::new(Group::Kubernetes, "identity", "auto|node|direct")
        .or("auto")
        .help("Act as the node (Kubernetes 1.36 and later), directly, or as the node where that is allowed"),
    OptionSpec::switch(Group::Kubernetes, "events").or("true").help("Write Kubernetes events on nodes and pods"),
    OptionSpec::switch(Group::Kubernetes, "exclude-from-load-balancers")
        .or("true")
        .help("Label a node that is drained so that load balancers let go of it"),
    OptionSpec::new(Group::Policy, "policy-spot-interruption", "ignore|cordon|drain")
        .or("drain")
        .help("EC2 takes the spot instance back in two minutes"),
    OptionSpec::new(Group::Policy, "policy-rebalance-recommendation", "ignore|cordon|drain")
        .or("cordon")
        .help("EC2 expects to take the spot instance back"),
    OptionSpec::new(Group::Policy, "policy-scheduled-maintenance", "ignore|cordon|drain")
        .or("drain")
        .help("EC2 will reboot, stop or retire the instance at a known time"),
    OptionSpec::new(Group::Policy, "policy-asg-termination", "ignore|cordon|drain")
        .or("drain")
        .help("An Auto Scaling group ends the instance"),
    OptionSpec::new(Group::Policy, "rebalance-release-after", "DURATION")
        .or("30m")
        .help("Uncordon when a rebalance recommendation is this old and no interruption came; 1s to 168h"),
    OptionSpec::new(Group::Policy, "maintenance-lead-time", "DURATION")
        .or("15m")
        .help("How long before scheduled maintenance the drain begins; 0s to 168h"),
    OptionSpec::new(Group::Drain, "drain-at-deadline", "auto|delete|leave")
        .or("auto")
        .help("Pods that cannot be evicted in time: delete or leave them. auto: delete where the power goes"),
    OptionSpec::new(Group::Drain, "drain-margin", "DURATION")
        .or("2s")
        .help("Time kept free before the deadline; 0s to 30s"),
    OptionSpec::new(Group::Drain, "drain-empty-dir", "evict|skip")
        .or("evict")
        .help("Pods with emptyDir volumes, whose contents end with the pod"),
    OptionSpec::new(Group::Drain, "drain-unmanaged", "evict|skip")
        .or("evict")
        .help("Pods without a controller, which nothing makes again"),
    OptionSpec::new(Group::Drain, "drain-max-in-flight", "auto|NUMBER")
        .or("auto")
        .help("Evictions on the wire at once, 1 to 1000. auto: 110 as the node, 16 otherwise"),
    OptionSpec::new(Group::Ops, "listen", "IP:PORT|off")
        .or("0.0.0.0:9465")
        .help("Where /livez, /readyz and /metrics are served"),
    OptionSpec::new(Group::Ops, "log-format", "text|json").or("text").help("Log lines for people or for machines"),
    OptionSpec::new(Group::Ops, "log-level", "error|warn|info|debug|trace")
        .or("info")
        .help("The least important line that is logged; RUST_LOG overrides it, target by target"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_option_is_explained() {
        for (at, spec) in OPTIONS.iter().enumerate() {
            assert!(!OPTIONS[..at].iter().any(|other| other.name == spec.name), "{} twice", spec.name);
            assert!(!spec.help.is_empty(), "{} has no help", spec.name);
            assert!(spec.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'), "{}", spec.name);
            assert_eq!(spec.boolean, spec.value_name == "true|false", "{}", spec.name);
        }
    }

    #[test]
    fn the_nearest_name_is_the_one_meant_or_none() {
        let near = |name| nearest(name).map(|spec| spec.name);
        assert_eq!(near("drain-at-dedline"), Some("drain-at-deadline"));
        assert_eq!(near("pol-interval"), Some("poll-interval"));
        assert_eq!(near("zzz"), None);
    }

    #[test]
    fn the_table_has_a_row_for_each_option() {
        let table = markdown();
        assert_eq!(table.lines().count(), 2 + Group::ALL.len() + OPTIONS.len());
        assert!(table.contains("| `--identity` *auto\\|node\\|direct* | `auto` |"), "{table}");
    }
}

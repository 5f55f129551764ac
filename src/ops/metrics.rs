//! The registry of metrics, and the two text formats that Prometheus reads.

use std::fmt::{self, Write as _};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::{Metric, Registry},
};

use super::{REVISION, VERSION};

/// How the metrics are written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposition {
    /// What Prometheus asks for first, since 2.5.
    OpenMetrics,
    /// The older format, which everything reads: curl, agents of monitoring vendors.
    Text,
}

impl Exposition {
    /// What a client gets that sent this `Accept` header.
    pub fn negotiate(accept: Option<&str>) -> Self {
        match accept {
            Some(accept) if accept.contains("application/openmetrics-text") => Self::OpenMetrics,
            _ => Self::Text,
        }
    }

    /// The `Content-Type` that goes with it.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Every metric of the process. Filled by the wiring, then only read.
#[derive(Debug)]
pub struct MetricsRegistry {
    registry: Registry,
}

impl MetricsRegistry {
    /// A registry with what every mode shows: `spotter_build_info` and `process_…`.
    pub fn new(mode: &'static str) -> Self {
        let mut registry = Registry::default();
        let build = Info::new([("version", VERSION), ("revision", REVISION), ("mode", mode)]);
        registry.register("spotter_build", "What is running here", build);
        registry.register_collector(Box::new(Process));
        Self { registry }
    }

    /// Adds a metric under its whole name, without `_total` and without a full stop after the help text: both are
    /// added when it is shown.
    pub fn register(&mut self, name: &'static str, help: &'static str, metric: impl Metric) {
        self.registry.register(name, help, metric);
    }

    /// Where the parts of the program register theirs, under the same rule.
    pub fn parts(&mut self) -> &mut Registry {
        &mut self.registry
    }

    /// All metrics as they are now.
    pub fn encode(&self, exposition: Exposition) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        let out = sorted(&out);
        match exposition {
            Exposition::OpenMetrics => Ok(out),
            Exposition::Text => to_plain_text(&out),
        }
    }
}

/// The samples of each family in the order of their labels: the maps that hold them have no order, and two pages
/// could not be compared. What belongs to one set of labels (the buckets of a histogram) stays in its own order.
fn sorted(page: &str) -> String {
    let mut lines: Vec<_> = page.lines().collect();
    for samples in lines.chunk_by_mut(|a, b| a.starts_with('#') == b.starts_with('#')) {
        if samples.first().is_some_and(|line| !line.starts_with('#')) {
            samples.sort_by_cached_key(|line| labels(line));
        }
    }
    let mut out = lines.join("\n");
    out.push('\n');
    out
}

/// The labels of a sample, without the limit of a bucket.
fn labels(line: &str) -> String {
    let Some((from, to)) = line.find('{').zip(line.rfind('}')) else { return String::new() };
    let labels = line.get(from + 1..to).unwrap_or_default();
    let is_limit = |label: &&str| !label.starts_with("le=\"");
    labels
        .split_inclusive("\",")
        .filter(is_limit)
        .map(|label| label.trim_end_matches(','))
        .collect::<Vec<_>>()
        .join(",")
}

/// Turns OpenMetrics into the older format: there a family is called as its samples are (`_total`, `_info`), there
/// are no units and no end mark, and `info` and `unknown` are types that Prometheus refuses the whole page for.
fn to_plain_text(open_metrics: &str) -> Result<String, fmt::Error> {
    let mut out = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                _ => ("", kind),
            };
            if let Some((_, help)) = help.take().filter(|(of, _)| *of == name) {
                writeln!(out, "# HELP {name}{suffix} {help}")?;
            }
            writeln!(out, "# TYPE {name}{suffix} {kind}")?;
        } else if !line.starts_with('#') {
            writeln!(out, "{line}")?;
        }
    }
    Ok(out)
}

/// What the kernel says of this process, read when it is asked for. What cannot be read is left out.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Readings { cpu_seconds, start_time_seconds, resident_bytes, open_fds } = Readings::take();
        if let Some(value) = cpu_seconds {
            let metric = ConstCounter::new(value);
            let help = "CPU time used, user and system, in seconds.";
            metric.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, metric.metric_type())?)?;
        }
        let gauges = [
            ("process_start_time_seconds", "When the process began, in seconds since 1970.", start_time_seconds),
            ("process_resident_memory_bytes", "Memory that is resident.", resident_bytes),
            ("process_open_fds", "File descriptors that are open.", open_fds),
        ];
        for (name, help, value) in gauges {
            let Some(value) = value else { continue };
            let metric = ConstGauge::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)?;
        }
        Ok(())
    }
}

/// Clock ticks a second in `/proc/PID/stat`: USER_HZ, which is 100 on every architecture that EC2 has.
const USER_HZ: f64 = 100.0;

#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Readings {
    cpu_seconds: Option<f64>,
    start_time_seconds: Option<f64>,
    resident_bytes: Option<f64>,
    open_fds: Option<f64>,
}

impl Readings {
    fn take() -> Self {
        let read = |path| std::fs::read_to_string(path).ok();
        let ticks = read("/proc/self/stat").and_then(|stat| stat_ticks(&stat));
        let boot = read("/proc/stat").and_then(|stat| field(&stat, "btime"));
        Self {
            cpu_seconds: ticks.map(|(cpu, _)| cpu / USER_HZ),
            start_time_seconds: ticks.zip(boot).map(|((_, start), boot)| boot + start / USER_HZ),
            resident_bytes: read("/proc/self/status")
                .and_then(|status| field(&status, "VmRSS:"))
                .map(|kib| kib * 1024.0),
            open_fds: open_fds(),
        }
    }
}

/// CPU time (utime and stime) and start time, in ticks, from `/proc/PID/stat`: fields 14, 15 and 22 of proc(5).
/// The second field, the name, is in brackets and can hold anything, so counting begins behind it.
fn stat_ticks(stat: &str) -> Option<(f64, f64)> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = behind_name.split_ascii_whitespace().collect();
    let ticks = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    Some((ticks(14)? + ticks(15)?, ticks(22)?))
}

/// The number behind `key` in lines of `key number …`.
fn field(text: &str, key: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

fn open_fds() -> Option<f64> {
    let count = std::fs::read_dir("/proc/self/fd").ok()?.count();
    // The directory itself was open while it was read. A process has nowhere near 2^32 of them.
    u32::try_from(count.saturating_sub(1)).ok().map(f64::from)
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::{counter::Counter, family::Family, histogram::Histogram};

    use super::*;

    #[test]
    fn open_metrics_has_everything_and_ends_properly() {
        let mut metrics = MetricsRegistry::new("agent");
        let notices = Family::<[(&'static str, &'static str); 1], Counter>::default();
        metrics.register("spotter_notices", "Notices seen", notices.clone());
        notices.get_or_create(&[("kind", "manual")]).inc();
        let page = metrics.encode(Exposition::OpenMetrics).unwrap();
        assert!(page.contains("# TYPE spotter_build info\n"), "{page}");
        assert!(page.contains(&format!(
            "spotter_build_info{{version=\"{VERSION}\",revision=\"{REVISION}\",mode=\"agent\"}} 1\n"
        )));
        assert!(page.contains("# HELP spotter_notices Notices seen.\n# TYPE spotter_notices counter\n"));
        assert!(page.contains("spotter_notices_total{kind=\"manual\"} 1\n"));
        assert!(page.ends_with("# EOF\n"));
    }

    #[test]
    fn every_page_is_in_the_same_order() {
        let buckets = r#"a_bucket{x="1",le="2.0"} 1
a_bucket{x="1",le="10.0"} 1
a_sum{x="1"} 1
"#;
        let page =
            |first: &str, second: &str| format!("# TYPE a histogram\n{first}{second}# TYPE b gauge\nb 1\n# EOF\n");
        let other = buckets.replace("x=\"1\"", "x=\"0,}\"");
        assert_eq!(sorted(&page(buckets, &other)), page(&other, buckets));
        assert_eq!(sorted(&page(&other, buckets)), page(&other, buckets));
    }

    #[test]
    fn the_older_format_names_families_like_their_samples() {
        let mut metrics = MetricsRegistry::new("agent");
        metrics.register("spotter_notices", "Notices seen", Counter::<u64>::default());
        metrics.register("spotter_wait_seconds", "Waits", Histogram::new([1.0]));
        let page = metrics.encode(Exposition::Text).unwrap();
        assert!(
            page.contains("# HELP spotter_notices_total Notices seen.\n# TYPE spotter_notices_total counter\n"),
            "{page}"
        );
        assert!(page.contains("# TYPE spotter_build_info gauge\nspotter_build_info{"), "{page}");
        assert!(page.contains("# TYPE spotter_wait_seconds histogram\n"), "{page}");
        assert!(page.contains("spotter_wait_seconds_bucket{le=\"+Inf\"} 0\n"), "{page}");
        assert!(!page.contains("EOF") && !page.contains("# UNIT"), "{page}");
        for line in page.lines().filter(|line| line.starts_with("# TYPE ")) {
            let kind = line.rsplit(' ').next().unwrap();
            assert!(["counter", "gauge", "histogram", "summary", "untyped"].contains(&kind), "{line}");
        }
    }

    #[test]
    fn the_format_is_the_one_asked_for() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.4,*/*;q=0.2";
        assert_eq!(Exposition::negotiate(Some(prometheus)), Exposition::OpenMetrics);
        assert_eq!(Exposition::negotiate(Some("*/*")), Exposition::Text);
        assert_eq!(Exposition::negotiate(None), Exposition::Text);
    }

    #[test]
    fn proc_is_read_as_documented() {
        let stat = "7 (a) b (c) S 1 1 1 0 -1 4194304 1 2 3 4 250 50 0 0 20 0 1 0 9000 1 2";
        assert_eq!(stat_ticks(stat), Some((300.0, 9000.0)));
        for broken in ["", "7 (a)", "7 (a) S 1 2 3", "no brackets"] {
            assert_eq!(stat_ticks(broken), None, "{broken}");
        }
        assert_eq!(field("VmPeak:\t 9 kB\nVmRSS:\t    8123 kB\n", "VmRSS:"), Some(8123.0));
        assert_eq!(field("cpu 1\n", "btime"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_plausible_readings() {
        let readings = Readings::take();
        let now = jiff::Timestamp::now().as_second() as f64;
        assert!(
            readings.start_time_seconds.is_some_and(|start| start <= now + 2.0 && start > now - 3600.0),
            "{readings:?}"
        );
        assert!(readings.resident_bytes.is_some_and(|bytes| bytes > 100_000.0), "{readings:?}");
        assert!(readings.open_fds.is_some_and(|fds| fds >= 1.0) && readings.cpu_seconds.is_some(), "{readings:?}");
        let page = MetricsRegistry::new("agent").encode(Exposition::Text).unwrap();
        for name in [
            "process_cpu_seconds_total",
            "process_resident_memory_bytes",
            "process_open_fds",
            "process_start_time_seconds",
        ] {
            assert!(page.lines().any(|line| line.starts_with(&format!("{name} "))), "{name} in {page}");
        }
    }
}

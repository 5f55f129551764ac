//! Log lines on stderr: text for people, JSON for machines.

use std::{
    fmt,
    io::{self, IsTerminal},
};

use jiff::Timestamp;
use tracing::{Event, Level, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    Layer, Registry,
    filter::Targets,
    fmt::{
        FmtContext, FormatEvent, FormatFields, MakeWriter,
        format::{DefaultFields, Writer},
        time::FormatTime,
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use crate::config::{LogFormat, LogLevel};

/// Starts logging for the whole process, and gives what a person should know about that; to be logged as warnings.
/// `RUST_LOG` (`debug`, or `spotter=trace,kube=debug`; no spans, no patterns) overrides `level`.
///
/// A second call changes nothing.
pub fn init(format: LogFormat, level: LogLevel) -> Vec<String> {
    let rust_log = std::env::var("RUST_LOG").unwrap_or_default();
    let (targets, warning) = filter(level, &rust_log);
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let subscriber = tracing_subscriber::registry().with(lines(format, colour, io::stderr)).with(targets);
    // Only fails where logging was started before, which then goes on.
    let _ = subscriber.try_init();
    warning.into_iter().collect()
}

/// Our own lines from `level` on, other crates' only from warning on: what they say below that is about their insides.
fn filter(level: LogLevel, rust_log: &str) -> (Targets, Option<String>) {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let usual = Targets::new().with_default(level.min(LevelFilter::WARN)).with_target("spotter", level);
    if rust_log.trim().is_empty() {
        return (usual, None);
    }
    match rust_log.parse() {
        Ok(targets) => (targets, None),
        Err(error) => {
            let warning = format!(
                "RUST_LOG = {rust_log:?} is ignored: {error}; write a level or `target=level,…`, for instance spotter=debug,kube=info"
            );
            (usual, Some(warning))
        }
    }
}

fn lines<W>(format: LogFormat, colour: bool, writer: W) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_timer(Utc).with_writer(writer);
    match format {
        LogFormat::Text => layer.with_ansi(colour).event_format(Plain).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_span_list(false).boxed(),
    }
}

/// `TIME LEVEL message key=value`. What a span carries is for machines: it would push the message out of a person's
/// sight on every line of a termination.
#[derive(Debug, Clone, Copy)]
struct Plain;

impl<S> FormatEvent<S, DefaultFields> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, DefaultFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = *event.metadata().level();
        let ((dim, colour), reset) = match (writer.has_ansi_escapes(), level) {
            (false, _) => (("", ""), ""),
            (true, Level::ERROR) => (("\u{1b}[2m", "\u{1b}[31m"), "\u{1b}[0m"),
            (true, Level::WARN) => (("\u{1b}[2m", "\u{1b}[33m"), "\u{1b}[0m"),
            (true, Level::INFO) => (("\u{1b}[2m", "\u{1b}[32m"), "\u{1b}[0m"),
            (true, Level::DEBUG) => (("\u{1b}[2m", "\u{1b}[34m"), "\u{1b}[0m"),
            (true, Level::TRACE) => (("\u{1b}[2m", "\u{1b}[35m"), "\u{1b}[0m"),
        };
        write!(writer, "{dim}")?;
        Utc.format_time(&mut writer)?;
        write!(writer, "{reset} {colour}{:>5}{reset} ", level.as_str())?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// RFC 3339 in UTC with milliseconds: sorts as text, and can be laid beside the API server's audit log.
#[derive(Debug, Clone, Copy)]
struct Utc;

impl FormatTime for Utc {
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        write!(w, "{:.3}", Timestamp::now())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, colour: bool) -> String {
        let captured = Captured::default();
        let writer = captured.clone();
        let (targets, _) = filter(LogLevel::Info, "");
        let subscriber =
            tracing_subscriber::registry().with(lines(format, colour, move || writer.clone())).with(targets);
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!(target: "spotter", "termination", node = "n1");
            let _entered = span.enter();
            tracing::info!(target: "spotter::app", pods = 3, "drained");
            tracing::debug!(target: "spotter::app", "not shown");
            tracing::info!(target: "hyper_util::client", "not shown");
        });
        let bytes = captured.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_lines_are_flat_and_carry_their_span() {
        let text = logged(LogFormat::Json, false);
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["message"], "drained");
        assert_eq!(line["pods"], 3);
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["target"], "spotter::app");
        assert_eq!((&line["span"]["node"], line.get("spans")), (&"n1".into(), None));
        let time = line["timestamp"].as_str().unwrap();
        assert!(time.ends_with('Z') && time.len() == "2026-01-02T03:04:05.678Z".len(), "{time}");
        assert!(time.parse::<Timestamp>().is_ok());
    }

    #[test]
    fn text_is_coloured_only_where_it_was_asked_for() {
        let plain = logged(LogFormat::Text, false);
        let (time, rest) = plain.split_once(' ').unwrap();
        assert_eq!(rest, " INFO drained pods=3\n", "the message comes first, and no span");
        assert!(time.parse::<Timestamp>().is_ok(), "{time}");
        assert!(!plain.contains('\u{1b}') && !plain.contains("not shown"), "{plain}");
        assert!(logged(LogFormat::Text, true).contains('\u{1b}'));
    }

    #[test]
    fn rust_log_overrides_and_nonsense_is_a_warning() {
        let (targets, warning) = filter(LogLevel::Error, "");
        assert!(warning.is_none() && !targets.would_enable("kube_client", &Level::WARN));
        let (targets, _) = filter(LogLevel::Debug, "");
        assert!(targets.would_enable("spotter::app", &Level::DEBUG));
        assert!(targets.would_enable("h2", &Level::WARN) && !targets.would_enable("h2", &Level::INFO));
        let (targets, warning) = filter(LogLevel::Info, "warn,spotter=trace");
        assert!(warning.is_none() && targets.would_enable("spotter::app", &Level::TRACE));
        let (targets, warning) = filter(LogLevel::Info, "spotter=loud");
        assert!(warning.is_some_and(|warning| warning.contains("RUST_LOG = \"spotter=loud\"")));
        assert!(targets.would_enable("spotter", &Level::INFO));
    }
}

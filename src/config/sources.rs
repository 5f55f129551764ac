//! Where values come from: flags, then environment, then file, then default.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fmt,
};

use super::{
    file::{self, Content, Entry},
    options::{ENVIRONMENT_PREFIX, OPTIONS, find, nearest, variable},
    values::shown,
};

/// Where the value of an option came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Flag,
    Environment,
    /// With the key as the file has it.
    File {
        key: String,
    },
    Default,
    /// Nobody gave one, and there is no default.
    Unset,
}

/// What an error points at: the place where a person can change the value.
#[derive(Debug)]
pub(super) struct Place<'a> {
    pub(super) name: &'a str,
    pub(super) origin: &'a Origin,
    pub(super) file: &'a str,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.origin {
            Origin::Flag => write!(f, "flag --{}", self.name),
            Origin::Environment => write!(f, "environment variable {}", variable(self.name)),
            Origin::File { key } => write!(f, "{key} in {}", self.file),
            Origin::Default => f.write_str("default"),
            Origin::Unset => f.write_str("unset"),
        }
    }
}

/// A value nobody has judged yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Raw {
    pub(super) text: String,
    pub(super) origin: Origin,
}

/// All that was given, the winner for each option, and what was wrong with giving it.
#[derive(Debug, Default)]
pub(super) struct Sources {
    values: BTreeMap<&'static str, Raw>,
    /// The file's path, for messages; empty without one.
    pub(super) file: String,
    /// The file could not be read, so what is missing may well stand in it.
    pub(super) file_unread: bool,
    pub(super) problems: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl Sources {
    /// Gathers everything; the file is the one that flag, or else environment, names.
    pub(super) fn gather(
        flags: BTreeMap<&'static str, String>,
        environment: impl Iterator<Item = (OsString, OsString)>,
    ) -> Self {
        let mut sources = Self::default();
        for (name, text) in flags {
            sources.values.insert(name, Raw { text, origin: Origin::Flag });
        }
        sources.add_environment(environment);
        if let Some(raw) = sources.values.get("config") {
            sources.file = raw.text.clone();
            let read = std::fs::read_to_string(&raw.text).map_err(|error| error.to_string());
            match read.and_then(|text| file::read(&text)) {
                Ok(entries) => sources.add_file(entries),
                Err(why) => {
                    let place = Place { name: "config", origin: &raw.origin, file: "" };
                    sources.problems.push(format!("config = {} ({place}): {why}", shown("config", &raw.text)));
                    sources.file_unread = true;
                }
            }
        }
        sources
    }

    /// The value that counts for `name`, with the default where nobody gave one.
    pub(super) fn get(&self, name: &str) -> Raw {
        match self.values.get(name) {
            Some(raw) => raw.clone(),
            None => match find(name).and_then(|spec| spec.default) {
                Some(default) => Raw { text: default.to_owned(), origin: Origin::Default },
                None => Raw { text: String::new(), origin: Origin::Unset },
            },
        }
    }

    fn add_environment(&mut self, environment: impl Iterator<Item = (OsString, OsString)>) {
        // Sorted, so that the same mistakes always give the same message.
        let given: BTreeMap<String, OsString> = environment
            .filter(|(_, value)| !value.is_empty())
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value)))
            .filter(|(key, _)| key.starts_with(ENVIRONMENT_PREFIX))
            .collect();
        for (key, value) in given {
            match OPTIONS.iter().find(|spec| spec.variable() == key) {
                Some(spec) => match value.into_string() {
                    Ok(text) => {
                        self.values.entry(spec.name).or_insert(Raw { text, origin: Origin::Environment });
                    }
                    Err(_) => self.problems.push(format!("{} (environment variable {key}): not UTF-8", spec.name)),
                },
                None if is_service_link(&key, &value) => {}
                None => self.warnings.push(unknown_variable(&key)),
            }
        }
    }

    fn add_file(&mut self, entries: Vec<Entry>) {
        let mut seen: BTreeMap<&'static str, String> = BTreeMap::new();
        for entry in entries {
            let place = format!("{} in {}", entry.written, self.file);
            let Some(spec) = find(&entry.name) else {
                // `drain:` with all its members commented out.
                let is_group = OPTIONS.iter().any(|spec| spec.name.starts_with(&format!("{}-", entry.name)));
                if entry.content != Content::Null || !is_group {
                    self.problems
                        .push(format!("{place}: no such option{}", offer(&entry.name, |name| name.to_owned())));
                }
                continue;
            };
            if spec.name == "config" {
                self.problems.push(format!("{place}: a file cannot name another one; remove it"));
                continue;
            }
            if let Some(first) = seen.insert(spec.name, entry.written.clone()) {
                self.problems.push(format!("{place}: {} was given before, as {first}; keep one", spec.name));
                continue;
            }
            match entry.content {
                Content::Null => {}
                Content::List => self.problems.push(format!("{place}: expected one value, not a list")),
                Content::Text(text) => {
                    let origin = Origin::File { key: entry.written };
                    self.values.entry(spec.name).or_insert(Raw { text, origin });
                }
            }
        }
    }
}

/// What Kubernetes puts into the environment of every pod for a Service called `spotter` or `spotter-…`:
/// `…_SERVICE_HOST`, `…_SERVICE_PORT[_NAME]`, `…_PORT` and `…_PORT_8080_TCP[_PROTO|_PORT|_ADDR]`.
/// <https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables>
fn is_service_link(key: &str, value: &OsStr) -> bool {
    let is_url =
        || value.to_str().is_some_and(|value| ["tcp://", "udp://", "sctp://"].iter().any(|p| value.starts_with(p)));
    let is_port = |rest: &str| {
        let mut words = rest.split('_');
        words.next().is_some_and(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
            && matches!(words.next(), Some("TCP" | "UDP" | "SCTP"))
    };
    key.ends_with("_SERVICE_HOST")
        || key.ends_with("_SERVICE_PORT")
        || key.contains("_SERVICE_PORT_")
        || key == "SPOTTER_PORT"
        || (key.ends_with("_PORT") && is_url())
        || key.match_indices("_PORT_").any(|(at, found)| is_port(&key[at + found.len()..]))
}

fn unknown_variable(key: &str) -> String {
    let name = key.trim_start_matches(ENVIRONMENT_PREFIX).to_ascii_lowercase().replace('_', "-");
    format!("environment variable {key} is not one of spotter's{}", offer(&name, variable))
}

fn offer(name: &str, written: impl Fn(&str) -> String) -> String {
    match nearest(name) {
        Some(spec) => format!("; did you mean {}?", written(spec.name)),
        None => "; `spotter run --help` lists them".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Sources {
        Sources::gather(BTreeMap::new(), pairs.iter().map(|(key, value)| (key.into(), value.into())))
    }

    #[test]
    fn service_links_are_ignored_and_typing_errors_are_not() {
        for (key, value) in [
            ("SPOTTER_SERVICE_HOST", "10.0.0.1"),
            ("SPOTTER_SERVICE_PORT", "9465"),
            ("SPOTTER_SERVICE_PORT_METRICS", "9465"),
            ("SPOTTER_PORT", "tcp://10.0.0.1:9465"),
            ("SPOTTER_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
            ("SPOTTER_PORT_8080_TCP_ADDR", "10.0.0.1"),
            ("SPOTTER_QUEUE_PORT_8080_UDP_PROTO", "udp"),
            ("SPOTTER_QUEUE_SERVICE_HOST", "10.0.0.1"),
            ("SPOTTER_QUEUE_PORT", "tcp://10.0.0.1:9465"),
            ("OTHER", "x"),
        ] {
            let sources = environment(&[(key, value)]);
            assert!(sources.warnings.is_empty() && sources.problems.is_empty(), "{key}: {sources:?}");
        }
        assert_eq!(
            environment(&[("SPOTTER_POL_INTERVAL", "1s")]).warnings,
            ["environment variable SPOTTER_POL_INTERVAL is not one of spotter's; did you mean SPOTTER_POLL_INTERVAL?"]
        );
        assert!(environment(&[("SPOTTER_ZZZ", "1")]).warnings[0].ends_with("`spotter run --help` lists them"));
    }

    #[test]
    fn an_empty_variable_counts_as_unset() {
        let sources = environment(&[("SPOTTER_POLL_INTERVAL", ""), ("SPOTTER_MODE", "")]);
        assert_eq!(sources.get("poll-interval"), Raw { text: "1s".to_owned(), origin: Origin::Default });
        assert_eq!(sources.get("mode").origin, Origin::Unset);
    }

    #[test]
    fn a_file_complains_about_each_key() {
        let mut sources = Sources { file: "f.yaml".to_owned(), ..Sources::default() };
        let text = "drain: {atDedline: delete}\nconfig: x\nlisten: [a]\npollInterval: 1s\npoll-interval: 2s\nops: {zzz: 1}\nlog:\n";
        sources.add_file(file::read(text).unwrap());
        assert_eq!(
            sources.problems,
            [
                "drain.atDedline in f.yaml: no such option; did you mean drain-at-deadline?",
                "config in f.yaml: a file cannot name another one; remove it",
                "listen in f.yaml: expected one value, not a list",
                "poll-interval in f.yaml: poll-interval was given before, as pollInterval; keep one",
                "ops.zzz in f.yaml: no such option; `spotter run --help` lists them",
            ]
        );
    }
}

//! Judges values one by one, and remembers what is wrong with each.

use std::{net::SocketAddr, time::Duration};

use jiff::SignedDuration;

use super::{
    Setting,
    options::find,
    sources::{Origin, Place, Raw, Sources},
};

/// What is shown of a secret.
const REDACTED: &str = "(redacted)";

/// Reads options as types. A value that is no good becomes a problem and `None`, and reading goes on, so that a
/// person sees everything that is wrong at once.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) sources: Sources,
    pub(super) problems: Vec<String>,
    pub(super) settings: Vec<Setting>,
}

impl Reader {
    pub(super) fn new(mut sources: Sources) -> Self {
        let problems = std::mem::take(&mut sources.problems);
        Self { sources, problems, settings: Vec::new() }
    }

    /// The value as text; `None` where there is none.
    pub(super) fn text(&mut self, name: &'static str) -> Option<String> {
        let Raw { text, origin } = self.sources.get(name);
        let value = shown(name, &text);
        self.settings.push(Setting { name, value, origin: origin.clone() });
        (origin != Origin::Unset).then_some(text)
    }

    /// Text that must be there.
    pub(super) fn required(&mut self, name: &'static str, example: &str) -> Option<String> {
        let text = self.text(name);
        if text.is_none() && !self.sources.file_unread {
            let variable = super::options::variable(name);
            self.problems
                .push(format!("{name} is missing: give --{name} {example}, {variable}, or `{name}:` in the file"));
        }
        text
    }

    /// Records that `text`, the value of `name`, is no good.
    pub(super) fn reject(&mut self, name: &'static str, text: &str, why: &str) {
        let origin = self.sources.get(name).origin;
        let place = Place { name, origin: &origin, file: &self.sources.file };
        self.problems.push(format!("{name} = {} ({place}): {why}", shown(name, text)));
    }

    /// One of several words. Only for options with a default.
    pub(super) fn word<T: Copy>(&mut self, name: &'static str, words: &[(&str, T)]) -> Option<T> {
        let text = self.text(name)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let list: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.reject(name, &text, &format!("give {}", one_of(&list)));
        }
        found
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, name: &'static str) -> Option<bool> {
        self.word(name, &[("true", true), ("false", false)])
    }

    /// A span like `500ms`, `1s` or `1h30m`, within bounds. Only for options with a default.
    pub(super) fn duration(&mut self, name: &'static str, least: Duration, most: Duration) -> Option<Duration> {
        let text = self.text(name)?;
        let bounds = format!("give {} to {}", span(least), span(most));
        let Ok(signed) = text.parse::<SignedDuration>() else {
            let bare = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            let unit = if bare { "no unit" } else { "not a duration" };
            self.reject(name, &text, &format!("{unit}; {bounds}, for instance 500ms, 1s or 1h30m"));
            return None;
        };
        let why = match Duration::try_from(signed) {
            Err(_) => "negative",
            Ok(duration) if duration < least => "too short",
            Ok(duration) if duration > most => "too long",
            Ok(duration) => return Some(duration),
        };
        self.reject(name, &text, &format!("{why}; {bounds}"));
        None
    }

    /// `auto` (the inner `None`) or a whole number within bounds.
    pub(super) fn auto_or_number(&mut self, name: &'static str, least: usize, most: usize) -> Option<Option<usize>> {
        let text = self.text(name)?;
        if text == "auto" {
            return Some(None);
        }
        match text.parse::<usize>() {
            Ok(number) if (least..=most).contains(&number) => Some(Some(number)),
            _ => {
                self.reject(name, &text, &format!("give auto or a number from {least} to {most}"));
                None
            }
        }
    }

    /// `off` (the inner `None`) or an address to listen on.
    pub(super) fn listen(&mut self, name: &'static str) -> Option<Option<SocketAddr>> {
        let text = self.text(name)?;
        // A YAML 1.1 tool on the way turns `off` into `false`.
        if text == "off" || text == "false" {
            return Some(None);
        }
        match text.parse() {
            Ok(address) => Some(Some(address)),
            Err(_) => {
                self.reject(name, &text, "give IP:PORT, for instance 0.0.0.0:9465 or [::]:9465, or off");
                None
            }
        }
    }

    /// A name as Kubernetes gives it to nodes, pods and namespaces: a DNS-1123 subdomain.
    pub(super) fn kubernetes_name(&mut self, name: &'static str, text: Option<String>) -> Option<Option<String>> {
        let Some(text) = text else { return Some(None) };
        let edge = |c: Option<u8>| c.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let inside = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        let bytes = text.as_bytes();
        if bytes.len() <= 253
            && edge(bytes.first().copied())
            && edge(bytes.last().copied())
            && bytes.iter().all(|&b| inside(b))
        {
            return Some(Some(text));
        }
        self.reject(name, &text, "not a Kubernetes name; those have small letters, digits, `-` and `.`");
        None
    }

    /// An address of the instance metadata service: `http://HOST[:PORT]`, and nothing else. Gives it without a slash.
    pub(super) fn imds_url(&mut self, name: &'static str) -> Option<String> {
        let text = self.text(name)?;
        match judge_imds_url(&text) {
            Ok(url) => Some(url),
            Err(why) => {
                // Somebody's password is not to end in a log.
                let text = if text.contains('@') { REDACTED } else { &text };
                self.reject(
                    name,
                    text,
                    &format!("{why}; give http://HOST[:PORT], for instance http://169.254.169.254"),
                );
                None
            }
        }
    }
}

fn judge_imds_url(text: &str) -> Result<String, &'static str> {
    // http::Uri drops a fragment without a word.
    if text.contains('#') {
        return Err("no fragment is possible here");
    }
    let uri: http::Uri = text.parse().map_err(|_| "not a URL")?;
    match uri.scheme_str() {
        Some("http") => {}
        // The service has no certificate; over TLS nothing would ever be read.
        Some("https") => return Err("the instance metadata service speaks http only"),
        _ => return Err("not an http URL"),
    }
    let authority = uri.authority().ok_or("no host")?;
    if authority.as_str().contains('@') {
        return Err("no credentials are possible here");
    }
    if authority.host().is_empty() {
        return Err("no host");
    }
    let port_given = !authority.as_str().ends_with(authority.host());
    if port_given && matches!(authority.port_u16(), None | Some(0)) {
        return Err("not a port");
    }
    if uri.query().is_some() || !matches!(uri.path(), "" | "/") {
        return Err("no path or query is possible here");
    }
    Ok(format!("http://{authority}"))
}

/// The value as it may be shown.
pub(super) fn shown(name: &str, text: &str) -> String {
    match find(name) {
        Some(spec) if spec.secret && !text.is_empty() => REDACTED.to_owned(),
        _ if text.is_empty() || text.contains(char::is_control) => format!("{text:?}"),
        _ => text.to_owned(),
    }
}

fn one_of(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

fn span(duration: Duration) -> String {
    match SignedDuration::try_from(duration) {
        Ok(signed) => format!("{signed:#}"),
        Err(_) => format!("{duration:?}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn reader(name: &'static str, value: &str) -> Reader {
        Reader::new(Sources::gather(BTreeMap::from([(name, value.to_owned())]), std::iter::empty()))
    }

    const LEAST: Duration = Duration::from_millis(100);
    const MOST: Duration = Duration::from_secs(7200);

    #[test]
    fn durations_as_people_write_them() {
        for (text, millis) in [("500ms", 500), ("1s", 1000), ("2m", 120_000), ("1h30m", 5_400_000), ("1.5s", 1500)] {
            let mut reader = reader("poll-interval", text);
            assert_eq!(reader.duration("poll-interval", LEAST, MOST), Some(Duration::from_millis(millis)), "{text}");
            assert!(reader.problems.is_empty());
        }
        for (text, why) in [
            ("5", "no unit; give 100ms to 2h, for instance 500ms, 1s or 1h30m"),
            ("fast", "not a duration; give 100ms to 2h, for instance 500ms, 1s or 1h30m"),
            ("", "not a duration; give 100ms to 2h, for instance 500ms, 1s or 1h30m"),
            ("-1s", "negative; give 100ms to 2h"),
            ("1s ago", "negative; give 100ms to 2h"),
            ("99ms", "too short; give 100ms to 2h"),
            ("3h", "too long; give 100ms to 2h"),
        ] {
            let mut reader = reader("poll-interval", text);
            assert_eq!(reader.duration("poll-interval", LEAST, MOST), None, "{text}");
            let shown = if text.is_empty() { "\"\"" } else { text };
            assert_eq!(reader.problems, [format!("poll-interval = {shown} (flag --poll-interval): {why}")]);
        }
    }

    #[test]
    fn imds_urls() {
        for (text, url) in [
            ("http://169.254.169.254", "http://169.254.169.254"),
            ("http://169.254.169.254/", "http://169.254.169.254"),
            ("http://[fd00:ec2::254]", "http://[fd00:ec2::254]"),
            ("http://[::1]:1338/", "http://[::1]:1338"),
            ("http://localhost:1338", "http://localhost:1338"),
        ] {
            assert_eq!(judge_imds_url(text).as_deref(), Ok(url), "{text}");
        }
        for bad in [
            "",
            "169.254.169.254",
            "https://169.254.169.254",
            "ftp://x",
            "http://",
            "http://u:p@x",
            "http://x/latest",
            "http://x?y",
            "http://x/#y",
            "http://x:0",
            "http://x:99999",
            "http://x:",
            "http://a b",
        ] {
            assert!(judge_imds_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_to_listen_on() {
        let listen = |text| reader("listen", text).listen("listen");
        assert_eq!(listen("off"), Some(None));
        assert_eq!(listen("false"), Some(None));
        assert_eq!(listen("[::]:1"), Some(Some("[::]:1".parse().unwrap())));
        for bad in ["9465", ":9465", "localhost:9465", "1.2.3.4", "1.2.3.4:99999", ""] {
            assert_eq!(listen(bad), None, "{bad}");
        }
    }

    #[test]
    fn kubernetes_names() {
        let judge = |text: &str| {
            let mut reader = reader("node-name", text);
            let given = reader.text("node-name");
            reader.kubernetes_name("node-name", given).is_some()
        };
        for good in ["ip-10-0-0-1.eu-central-1.compute.internal", "i-0abc", "a"] {
            assert!(judge(good), "{good}");
        }
        for bad in ["", "$(NODE_NAME)", "Node", "a/b", "-a", "a-", "a b", &"a".repeat(254)] {
            assert!(!judge(bad), "{bad}");
        }
    }

    #[test]
    fn numbers_or_auto() {
        let number = |text| reader("drain-max-in-flight", text).auto_or_number("drain-max-in-flight", 1, 1000);
        assert_eq!(number("auto"), Some(None));
        assert_eq!(number("1000"), Some(Some(1000)));
        for bad in ["0", "1001", "-1", "many", ""] {
            assert_eq!(number(bad), None, "{bad}");
        }
    }
}

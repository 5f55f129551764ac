//! The configuration file: YAML, nested as people like it, flattened to the names of options.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// One value of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The key as it is written, with dots between the levels: `drain.atDeadline`.
    pub(super) written: String,
    /// The same as the name of an option: `drain-at-deadline`.
    pub(super) name: String,
    pub(super) content: Content,
}

/// What stands behind a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    /// Nothing: the key counts as not given.
    Null,
    Text(String),
    List,
}

/// Reads a file's text; an error says where and what.
pub(super) fn read(text: &str) -> Result<Vec<Entry>, String> {
    // YAML 1.2 booleans: `off` and `no` stay the words that they are. Duplicate keys are errors by default.
    let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
    let root: Option<Node> = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| error.render_with_formatter(&serde_saphyr::UserMessageFormatter))?;
    let mut entries = Vec::new();
    match root {
        None | Some(Node::Null) => {}
        Some(Node::Map(members)) => flatten("", "", members, &mut entries),
        Some(Node::Scalar(_) | Node::List) => return Err("expected `key: value` lines".to_owned()),
    }
    Ok(entries)
}

fn flatten(written_above: &str, name_above: &str, members: Vec<(String, Node)>, entries: &mut Vec<Entry>) {
    for (key, node) in members {
        let joined = |above: &str, separator: char, key: &str| {
            if above.is_empty() { key.to_owned() } else { format!("{above}{separator}{key}") }
        };
        let written = joined(written_above, '.', &key);
        let name = joined(name_above, '-', &kebab(&key));
        let content = match node {
            Node::Map(below) => {
                flatten(&written, &name, below, entries);
                continue;
            }
            Node::Null => Content::Null,
            Node::Scalar(text) => Content::Text(text),
            Node::List => Content::List,
        };
        entries.push(Entry { written, name, content });
    }
}

/// `atDeadline` -> `at-deadline`, `imdsURL` -> `imds-url`; kebab-case stays as it is.
fn kebab(key: &str) -> String {
    let mut out = String::with_capacity(key.len() + 4);
    let mut after_small = false;
    for c in key.chars() {
        if c.is_ascii_uppercase() && after_small {
            out.push('-');
        }
        after_small = c.is_ascii_lowercase() || c.is_ascii_digit();
        out.push(c.to_ascii_lowercase());
    }
    out
}

enum Node {
    Null,
    Scalar(String),
    List,
    Map(Vec<(String, Node)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value or a map")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        while seq.next_element::<Node>()?.is_some() {}
        Ok(Node::List)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut members = Vec::new();
        while let Some((key, value)) = map.next_entry::<Node, Node>()? {
            let key = match key {
                Node::Scalar(key) => key,
                Node::Null => "null".to_owned(),
                Node::List | Node::Map(_) => return Err(serde::de::Error::custom("a key must be a word")),
            };
            members.push((key, value));
        }
        Ok(Node::Map(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<(String, Content)> {
        read(text).unwrap().into_iter().map(|entry| (entry.name, entry.content)).collect()
    }

    fn text(value: &str) -> Content {
        Content::Text(value.to_owned())
    }

    #[test]
    fn nested_and_flat_keys_mean_the_same() {
        let expected = vec![("drain-at-deadline".to_owned(), text("delete"))];
        assert_eq!(names("drain: {atDeadline: delete}"), expected);
        assert_eq!(names("drain:\n  at-deadline: delete\n"), expected);
        assert_eq!(names("drain-at-deadline: delete"), expected);
        assert_eq!(names("drainAtDeadline: delete"), expected);
        assert_eq!(read("drain: {atDeadline: delete}").unwrap()[0].written, "drain.atDeadline");
    }

    #[test]
    fn values_keep_their_spelling() {
        for (yaml, value) in
            [("5", "5"), ("true", "true"), ("off", "off"), ("no", "no"), ("1h30m", "1h30m"), ("'7'", "7")]
        {
            assert_eq!(names(&format!("k: {yaml}")), [("k".to_owned(), text(value))], "{yaml}");
        }
        assert_eq!(names("k:\nl: [1, 2]"), [("k".to_owned(), Content::Null), ("l".to_owned(), Content::List)]);
    }

    #[test]
    fn an_empty_file_sets_nothing_and_broken_ones_say_where() {
        for empty in ["", "# nothing\n", "---\n", "{}"] {
            assert_eq!(names(empty), [], "{empty:?}");
        }
        assert!(read("just words").unwrap_err().contains("key: value"));
        assert!(read("- a\n- b").unwrap_err().contains("key: value"));
        let broken = read("mode: agent\nlisten: [1\n").unwrap_err();
        assert!(broken.contains("line") && !broken.trim().contains('\n'), "{broken}");
        let twice = read("mode: agent\nmode: agent\n").unwrap_err();
        assert!(twice.contains("mode") && twice.contains("line 2") && !twice.contains("Policy"), "{twice}");
    }

    #[test]
    fn capitals_become_dashes() {
        for (key, name) in [("imdsURL", "imds-url"), ("imdsUrl", "imds-url"), ("a-b", "a-b"), ("Mode", "mode")] {
            assert_eq!(kebab(key), name);
        }
    }
}

//! The import rules of the crate, and the sizes of its files and functions, checked on the text of `src`.
//!
//! Test modules (`#[cfg(test)]`) are left out of the import rules; a file's length counts all its lines.

use std::{collections::BTreeSet, fs, path::Path};

const PURE: &[&str] = &["notice", "policy", "plan"];
/// May know everything.
const TOP: &[&str] = &["app", "cli", "main", "lib"];
/// What each other module may know, besides itself and the pure ones.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("notice", &[]),
    ("policy", &[]),
    ("plan", &[]),
    ("clock", &[]),
    ("config", &["clock"]),
    ("cluster", &["config", "clock"]),
    ("aws", &["config", "clock"]),
    ("source", &["config", "clock"]),
    ("ops", &["config", "clock"]),
    ("termination", &["cluster", "aws", "clock"]),
    ("rehearsal", &["clock"]),
];
/// The crates that pure modules may use; `serde_json` in modules called `decode` only.
const PURE_CRATES: &[&str] = &["std", "core", "alloc", "serde", "jiff"];
const MAX_FILE: usize = 500;
const MAX_FUNCTION: usize = 60;
const MAX_MAIN: usize = 60;

#[test]
fn modules_know_only_what_they_may() {
    let crates = dependencies(&fs::read_to_string(root().join("Cargo.toml")).unwrap());
    assert!(crates.contains("tokio") && crates.contains("serde_json"), "{crates:?}");
    let faults: Vec<_> = sources().iter().flat_map(|(path, text)| import_faults(path, text, &crates)).collect();
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn files_and_functions_are_short() {
    let faults: Vec<_> = sources().iter().flat_map(|(path, text)| size_faults(path, text)).collect();
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files under src, by their path from there.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                let name = path.strip_prefix(root().join("src")).unwrap().display().to_string();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// The names, as Rust sees them, of the crates under `[dependencies]`.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let lines = manifest.lines().skip_while(|line| *line != "[dependencies]").skip(1);
    let lines = lines.take_while(|line| !line.starts_with('['));
    lines.filter_map(|line| line.split_once('=')).map(|(name, _)| name.trim().replace('-', "_")).collect()
}

/// `plan/drain.rs`: `[plan, drain]`.
fn module_of(path: &str) -> Vec<String> {
    path.trim_end_matches(".rs").split('/').filter(|part| *part != "mod").map(str::to_owned).collect()
}

fn import_faults(path: &str, text: &str, crates: &BTreeSet<String>) -> Vec<String> {
    let module = module_of(path);
    let layer = module[0].as_str();
    // A file of tests is declared `#[cfg(test)] mod tests;` by its parent.
    if TOP.contains(&layer) || module.last().is_some_and(|last| last == "tests") {
        return Vec::new();
    }
    let Some((_, may)) = MAY_KNOW.iter().find(|(name, _)| *name == layer) else {
        return vec![format!("src/{path}: the module `{layer}` has no rule in tests/it/architecture.rs")];
    };
    let mut faults = BTreeSet::new();
    for used in paths(&without_tests(&mask(text))) {
        let first = used[0].as_str();
        let known = match first {
            "crate" => used.get(1).cloned(),
            "super" => {
                let up = used.iter().take_while(|part| *part == "super").count();
                // From `plan/drain`, `super` is `plan`, and `super::super` is the crate.
                if up >= module.len() { used.get(up).cloned() } else { None }
            }
            _ => None,
        };
        if let Some(known) = known {
            let allowed = known == layer || PURE.contains(&known.as_str()) || may.contains(&known.as_str());
            if known == "*" || !allowed {
                faults.insert(format!("src/{path}: `{layer}` may not know `{known}`"));
            }
        } else if PURE.contains(&layer) && crates.contains(first) {
            let decodes = first == "serde_json" && module.iter().any(|part| part == "decode");
            if !PURE_CRATES.contains(&first) && !decodes {
                faults.insert(format!("src/{path}: `{layer}` is pure and may not use `{first}`"));
            }
        }
        if PURE.contains(&layer) && first == "std" {
            let io = ["fs", "io", "net", "process", "thread", "env"];
            let clock = ["Instant", "SystemTime"];
            if used.get(1).is_some_and(|part| io.contains(&part.as_str()))
                || used.iter().any(|p| clock.contains(&p.as_str()))
            {
                faults.insert(format!("src/{path}: `{layer}` is pure and may not use `{}`", used.join("::")));
            }
        }
    }
    faults.into_iter().collect()
}

fn size_faults(path: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let lines = text.lines().count();
    let limit = if path == "main.rs" { MAX_MAIN } else { MAX_FILE };
    if lines > limit {
        faults.push(format!("src/{path}: {lines} lines, more than {limit}"));
    }
    for (name, length) in functions(&without_tests(&mask(text))) {
        if length > MAX_FUNCTION {
            faults.push(format!("src/{path}: fn {name} has {length} lines, more than {MAX_FUNCTION}"));
        }
    }
    faults
}

/// The same text with comments, strings and character literals blanked, so that words and braces in it are code.
fn mask(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match (chars[at], chars.get(at + 1).copied()) {
            ('/', Some('/')) => find(&chars, at, |c| c[0] == '\n'),
            ('/', Some('*')) => block_comment(&chars, at),
            ('"', _) => string(&chars, at),
            ('r', Some('"' | '#')) if at == 0 || !is_word(chars[at - 1]) || chars[at - 1] == 'b' => {
                raw_string(&chars, at)
            }
            ('\'', _) => character(&chars, at),
            _ => at,
        };
        if end == at {
            out.push(chars[at]);
            at += 1;
        }
        while at < end {
            out.push(if chars[at] == '\n' { '\n' } else { ' ' });
            at += 1;
        }
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn find(chars: &[char], from: usize, is: impl Fn(&[char]) -> bool) -> usize {
    (from..chars.len()).find(|at| is(&chars[*at..])).unwrap_or(chars.len())
}

fn block_comment(chars: &[char], from: usize) -> usize {
    let (mut at, mut depth) = (from, 0_usize);
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) if depth == 1 => return at + 2,
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    at
}

fn string(chars: &[char], from: usize) -> usize {
    let mut at = from + 1;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

fn raw_string(chars: &[char], from: usize) -> usize {
    let hashes = chars[from + 1..].iter().take_while(|c| **c == '#').count();
    // `r#name` is an identifier.
    if chars.get(from + 1 + hashes) != Some(&'"') {
        return from;
    }
    let close = |c: &[char]| c[0] == '"' && c[1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
    (find(chars, from + 2 + hashes, close) + 1 + hashes).min(chars.len())
}

/// The end of a character literal; `from` itself for a lifetime.
fn character(chars: &[char], from: usize) -> usize {
    match (chars.get(from + 1), chars.get(from + 2)) {
        (Some('\\'), _) => (find(chars, from + 3, |c| c[0] == '\'') + 1).min(chars.len()),
        (Some(_), Some('\'')) => from + 3,
        _ => from,
    }
}

/// Blanks every item under `#[cfg(test)]`: up to its closing brace or semicolon.
fn without_tests(masked: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut text = masked.to_owned();
    while let Some(from) = text.find(MARK) {
        let mut depth = 0_usize;
        let mut end = text.len();
        for (at, c) in text[from + MARK.len()..].char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 && (c == '}' || c == ';') {
                end = from + MARK.len() + at + 1;
                break;
            }
        }
        let blank: String = text[from..end].chars().filter(|c| *c == '\n').collect();
        text.replace_range(from..end, &blank);
    }
    text
}

/// All paths in masked code, those of nested `use` trees written out: `use crate::{a, b::c};` gives crate::a and
/// crate::b::c. A name that stands alone is no path.
fn paths(masked: &str) -> Vec<Vec<String>> {
    let tokens = tokens(masked);
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let after = if at == 0 { "" } else { tokens[at - 1].as_str() };
        let is_name = tokens[at].starts_with(is_word);
        if tokens[at] == "use" {
            at = tree(&tokens, at + 1, &[], &mut found);
        } else if is_name && after != "::" && after != "." && tokens.get(at + 1).is_some_and(|t| t == "::") {
            let mut path = vec![tokens[at].clone()];
            at += 1;
            while tokens.get(at).is_some_and(|t| t == "::")
                && tokens.get(at + 1).is_some_and(|t| t.starts_with(is_word))
            {
                path.push(tokens[at + 1].clone());
                at += 2;
            }
            found.push(path);
        } else {
            at += 1;
        }
    }
    found
}

/// Reads one use tree from `at`; returns where it ends.
fn tree(tokens: &[String], mut at: usize, prefix: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let mut path = prefix.to_vec();
    while let Some(token) = tokens.get(at) {
        match token.as_str() {
            "::" => at += 1,
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|t| t != "}") {
                    at = tree(tokens, at, &path, found);
                    if tokens.get(at).is_some_and(|t| t == ",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            // The new name after `as` is none of the path.
            "as" => at += 2,
            word if word == "*" || word.starts_with(is_word) => {
                path.push(token.clone());
                at += 1;
            }
            _ => break,
        }
    }
    if path.len() > prefix.len() {
        found.push(path);
    } else if tokens.get(at).is_some_and(|t| t != "}" && t != ",") {
        at += 1;
    }
    at
}

fn tokens(masked: &str) -> Vec<String> {
    let chars: Vec<char> = masked.chars().collect();
    let mut out = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let end = if is_word(chars[at]) {
            find(&chars, at, |c| !is_word(c[0]))
        } else if chars[at..].starts_with(&[':', ':']) {
            at + 2
        } else {
            at + 1
        };
        if !chars[at].is_whitespace() {
            out.push(chars[at..end].iter().collect());
        }
        at = end;
    }
    out
}

/// Every function with a body, and its lines from `fn` to the closing brace.
fn functions(masked: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (from, _) in masked.match_indices("fn ") {
        if masked[..from].ends_with(is_word) {
            continue;
        }
        let name: String = masked[from + 3..].chars().take_while(|c| is_word(*c)).collect();
        let mut depth = 0_usize;
        for (at, c) in masked[from..].char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 1 => {
                    found.push((name, masked[from..=from + at].lines().count()));
                    break;
                }
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ';' if depth == 0 && !masked[from..from + at].ends_with(|c: char| c.is_ascii_digit() || is_word(c)) => {
                    break;
                }
                _ => {}
            }
        }
    }
    found
}

mod the_checker {
    use super::*;

    fn faults(path: &str, text: &str) -> Vec<String> {
        let crates = ["tokio", "serde", "serde_json", "jiff", "kube"].map(str::to_owned).into();
        import_faults(path, text, &crates)
    }

    #[test]
    fn finds_forbidden_modules_however_they_are_written() {
        for text in [
            "use crate::cluster;",
            "use crate::cluster::Client as C;",
            "use crate::{clock::Clock, termination::{Run, self}};",
            "pub(crate) use crate::aws::*;",
            "fn f() { crate::ops::log() }",
            "type A = Vec<crate::source::B>;",
            "use super::cluster;",
            "use crate::*;",
        ] {
            assert_eq!(faults("source.rs", text).is_empty(), text.contains("source"), "{text}");
        }
        assert_eq!(faults("plan/drain.rs", "use super::super::clock::Clock;").len(), 1);
        assert_eq!(faults("termination.rs", "use crate::source::Imds;").len(), 1);
        assert_eq!(faults("cluster/pods.rs", "use crate::{termination, aws};").len(), 2);
        assert_eq!(faults("rehearsal/api.rs", "use crate::config::Config;").len(), 1);
        assert_eq!(faults("unknown.rs", "").len(), 1);
    }

    #[test]
    fn keeps_pure_modules_pure() {
        for text in [
            "use tokio::time::Instant;",
            "use crate::clock::Clock;",
            "fn f() { serde_json::from_str(x) }",
            "use std::time::Instant;",
            "use std::{collections::BTreeMap, time::SystemTime};",
            "fn f() { std::fs::read(x) }",
            "async fn f() { kube::Api::all(x) }",
        ] {
            assert_eq!(faults("plan/drain.rs", text).len(), 1, "{text}");
        }
    }

    #[test]
    fn lets_the_rest_pass() {
        for (path, text) in [
            (
                "plan/drain.rs",
                "use std::time::Duration; use super::Moment; use crate::notice::Kind; use jiff::Timestamp;",
            ),
            ("notice/decode.rs", "use serde_json::Value; use super::Notice;"),
            (
                "policy.rs",
                "// use tokio::x\n/* crate::app::f /* */ */ const A: &str = \"kube::Api \\\" tokio::\"; const Q: char = '\"';",
            ),
            ("policy.rs", "const R: &str = r#\"crate::app::x \" tokio::y\"#; fn f<'a>(x: &'a str) {}"),
            ("policy.rs", "#[cfg(test)]\nmod tests { use super::*; use tokio::time; mod x { use crate::app; } }"),
            (
                "termination/run.rs",
                "use crate::{cluster::Cluster, clock::Clock, plan::drain::State}; use super::record;",
            ),
            ("app.rs", "use crate::{source, cluster, ops}; use tokio::net;"),
        ] {
            assert_eq!(faults(path, text), Vec::<String>::new(), "{path}: {text}");
        }
        // What follows a test module counts again.
        let text = "#[cfg(test)]\nmod tests { const S: &str = \"}\"; }\nuse tokio::time;";
        assert_eq!(faults("plan.rs", text).len(), 1);
    }

    #[test]
    fn measures_files_and_functions() {
        let lines = |n: usize| "    x();\n".repeat(n);
        let long = format!(
            "impl A {{\n    fn short(&self) -> [u8; 4] {{}}\n    async fn long() {{\n{}    }}\n}}\n",
            lines(59)
        );
        assert_eq!(size_faults("a.rs", &long), ["src/a.rs: fn long has 61 lines, more than 60"]);
        assert!(size_faults("a.rs", &format!("fn f() {{\n{}}}\n", lines(58))).is_empty());
        assert!(size_faults("a.rs", "trait T { fn a(&self) -> u8; }\nfn b() { \"{\"; }\n").is_empty());
        assert_eq!(size_faults("a.rs", &"//\n".repeat(501)), ["src/a.rs: 501 lines, more than 500"]);
        assert_eq!(size_faults("main.rs", &"//\n".repeat(61)), ["src/main.rs: 61 lines, more than 60"]);
        let test = format!("#[cfg(test)]\nmod tests {{\n    fn long() {{\n{}    }}\n}}\n", lines(90));
        assert!(size_faults("a.rs", &test).is_empty());
    }
}

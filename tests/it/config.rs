//! The command line and the configuration as a person meets them: the real binary, its words and its exit codes.
//! No call here gets as far as the work itself.

#![allow(clippy::expect_used, reason = "a helper that fails is a test that fails")]

use std::process::Command;

struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn spotter(arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
    let output = Command::new(env!("CARGO_BIN_EXE_spotter"))
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// The message of a configuration that must be refused, line by line.
fn refused(arguments: &[&str], environment: &[(&str, &str)]) -> Vec<String> {
    let outcome = spotter(arguments, environment);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert_eq!(outcome.stdout, "");
    outcome.stderr.lines().map(|line| line.trim().to_owned()).collect()
}

fn file(text: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("spotter.yaml");
    std::fs::write(&path, text).expect("a file");
    let path = path.to_str().expect("UTF-8").to_owned();
    (dir, path)
}

#[test]
fn an_unknown_flag_names_the_nearest() {
    let outcome = spotter(&["run", "--mode", "agent", "--pol-interval", "1s"], &[]);
    assert_eq!(outcome.code, Some(2));
    assert!(
        outcome.stderr.contains("'--pol-interval'") && outcome.stderr.contains("'--poll-interval'"),
        "{}",
        outcome.stderr
    );
    assert_eq!(outcome.stdout, "");
}

#[test]
fn an_unknown_verb_and_none_at_all_are_wrong_usage() {
    let unknown = spotter(&["rum"], &[]);
    assert_eq!(unknown.code, Some(2));
    assert!(unknown.stderr.contains("'run'"), "{}", unknown.stderr);
    let none = spotter(&[], &[]);
    assert_eq!(none.code, Some(2));
    assert!(none.stderr.contains("Usage: spotter"), "{}", none.stderr);
}

#[test]
fn help_and_version_go_to_stdout_and_are_fine() {
    for arguments in [&["--help"][..], &["run", "--help"], &["--version"], &["version"]] {
        let outcome = spotter(arguments, &[]);
        assert_eq!(outcome.code, Some(0), "{arguments:?}: {}", outcome.stderr);
        assert_eq!(outcome.stderr, "", "{arguments:?}");
        assert!(outcome.stdout.contains("spotter"), "{arguments:?}: {}", outcome.stdout);
    }
    assert_eq!(spotter(&["--version"], &[]).stdout, spotter(&["version"], &[]).stdout);
}

#[test]
fn an_unknown_file_key_names_file_key_and_the_nearest() {
    let (_dir, path) = file("mode: agent\nnodeName: n1\ndrain:\n  atDedline: delete\n");
    assert_eq!(
        refused(&["run", "--config", &path], &[]),
        [
            "spotter: the configuration has an error:".to_owned(),
            format!("drain.atDedline in {path}: no such option; did you mean drain-at-deadline?"),
        ]
    );
}

#[test]
fn every_error_is_said_at_once_with_its_place() {
    let (_dir, path) = file("mode: agent\nnodeName: n1\ndrain: {margin: 1m}\n");
    let lines = refused(
        &["run", "--config", &path, "--poll-interval", "50ms"],
        &[("SPOTTER_IDENTITY", "me"), ("SPOTTER_PORT", "tcp://10.0.0.1:1"), ("SPOTTER_NODENAME", "n2")],
    );
    assert_eq!(
        lines,
        [
            "spotter: the configuration has 3 errors:".to_owned(),
            "poll-interval = 50ms (flag --poll-interval): too short; give 100ms to 10s".to_owned(),
            "identity = me (environment variable SPOTTER_IDENTITY): give auto, node or direct".to_owned(),
            format!("drain-margin = 1m (drain.margin in {path}): too long; give 0s to 30s"),
            "note: environment variable SPOTTER_NODENAME is not one of spotter's; did you mean SPOTTER_NODE_NAME?"
                .to_owned(),
        ]
    );
}

#[test]
fn an_empty_variable_counts_as_unset() {
    let lines = refused(&["run", "--node-name", "n1"], &[("SPOTTER_MODE", ""), ("SPOTTER_POLL_INTERVAL", "")]);
    assert_eq!(lines[1..], ["mode is missing: give --mode agent, SPOTTER_MODE, or `mode:` in the file"]);
}

#[test]
fn only_the_value_that_counts_is_judged() {
    let (_dir, path) = file("mode: queue\nlisten: nonsense\npollInterval: 3h\n");
    let environment = [("SPOTTER_LISTEN", "off"), ("SPOTTER_POLL_INTERVAL", "2h"), ("SPOTTER_CONFIG", &path)];
    let lines = refused(&["run", "--poll-interval", "1s"], &environment);
    assert_eq!(lines[1..], [format!("mode = queue (mode in {path}): not in this version; give agent")]);
}

/// What is missing may stand in the file, so it is not called missing.
#[test]
fn a_file_that_cannot_be_read_is_the_only_error() {
    let lines = refused(&["run", "--config", "/nowhere/s.yaml"], &[]);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[1].starts_with("config = /nowhere/s.yaml (flag --config): No such file"), "{lines:?}");
    let (_dir, path) = file("mode: [agent\n");
    let lines = refused(&["run"], &[("SPOTTER_CONFIG", &path)]);
    assert_eq!(lines.len(), 2, "{lines:?}");
    let place = format!("config = {path} (environment variable SPOTTER_CONFIG): ");
    assert!(lines[1].starts_with(&place) && lines[1].contains("line 1"), "{lines:?}");
}

//! The README's tables are what the binary really has.

use prometheus_client::{encoding::text, registry::Registry};
use spotter::{
    cluster,
    config::options,
    ops::metrics::{Exposition, MetricsRegistry},
    source::imds,
    termination,
};

const README: &str = include_str!("../../README.md");

#[test]
fn every_option_stands_in_the_readme() {
    let table = options::markdown();
    assert!(README.contains(table.trim()), "the table of options in README.md should be:\n\n{table}");
}

#[test]
fn every_metric_stands_in_the_readme() {
    let table = metrics();
    assert!(README.contains(table.trim()), "the table of metrics in README.md should be:\n\n{table}");
}

#[test]
fn the_two_commands_come_first() {
    let block = README.split("```").nth(1).unwrap();
    let commands: Vec<_> = block.lines().filter(|line| line.starts_with("cargo ")).collect();
    assert!(commands.iter().any(|line| line.starts_with("cargo test")), "{commands:?}");
    assert!(README.lines().count() < 350);
}

/// A row for each metric: name, labels, help.
fn metrics() -> String {
    let mut registry = MetricsRegistry::new("agent");
    let parts: &mut Registry = registry.parts();
    cluster::Metrics::new().register(parts);
    imds::Metrics::new().register(parts);
    termination::Metrics::new().register(parts);
    let mut probe = String::new();
    text::encode(&mut probe, parts).unwrap();
    let page = registry.encode(Exposition::Text).unwrap();
    let mut rows = Vec::new();
    for line in page.lines() {
        let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) else { continue };
        let sample = page
            .lines()
            .find(|line| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name}_bucket{{")));
        let labels = sample.map(labels_of).unwrap_or_default();
        rows.push(format!("| `{name}` | {labels} | {} |", help.trim_end_matches('.')));
    }
    rows.sort();
    format!("| metric | labels | |\n|---|---|---|\n{}\n", rows.join("\n"))
}

fn labels_of(sample: &str) -> String {
    let inside = sample.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map_or("", |(inside, _)| inside);
    let names =
        inside.split(',').filter_map(|pair| pair.split_once('=')).map(|(name, _)| name).filter(|name| *name != "le");
    names.collect::<Vec<_>>().join(", ")
}

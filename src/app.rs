//! The composition root: builds the adapters, wires the sources, supervises the tasks.

use anyhow::bail;

use crate::config::Config;

/// Runs until it is told to stop.
pub async fn run(config: Config) -> anyhow::Result<()> {
    bail!("{} mode is not wired yet", config.mode.as_str())
}

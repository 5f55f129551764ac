//! `spotter imds`: a mock of the instance metadata service for local use.

use anyhow::bail;
use clap::{ArgMatches, Command};

/// The options of the verb.
pub fn command() -> Command {
    Command::new("imds").about("A mock instance metadata service, for trying things out")
}

/// Serves until it is told to stop.
pub async fn run(_matches: &ArgMatches) -> anyhow::Result<()> {
    bail!("the mock is not here yet")
}

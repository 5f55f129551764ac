//! `spotter run`: the work itself.

use std::collections::BTreeMap;

use clap::{Arg, ArgMatches, Command};
use tracing::{error, info, warn};

use super::{EXIT_USAGE, Failure, failed};
use crate::{
    app,
    config::{
        Config,
        options::{Group, OPTIONS, OptionSpec},
    },
    ops::{REVISION, VERSION, log},
};

const EXAMPLES: &str = "\
Each option can also be an environment variable (--poll-interval: SPOTTER_POLL_INTERVAL) or stand in the file of
--config (poll-interval: 1s); a flag wins over the environment, the environment over the file.

Example:
  spotter run --mode agent --node-name ip-10-0-0-1.ec2.internal --dry-run";

/// The options of the verb, from the one table.
pub(super) fn command() -> Command {
    let mut command = Command::new("run")
        .about("Look after a node: wait for notices, cordon and drain in time")
        .after_help(EXAMPLES)
        .arg_required_else_help(false);
    for group in Group::ALL {
        command = command.next_help_heading(group.title());
        for spec in OPTIONS.iter().filter(|spec| spec.group == group) {
            command = command.arg(argument(spec));
        }
    }
    command
}

/// Values are taken as they are: `config` judges them all, wherever they come from.
fn argument(spec: &'static OptionSpec) -> Arg {
    let help = match spec.default {
        Some(default) => format!("{} [default: {default}]", spec.help),
        None => spec.help.to_owned(),
    };
    let argument = Arg::new(spec.name).long(spec.name).value_name(spec.value_name).help(help).allow_hyphen_values(true);
    if spec.boolean { argument.num_args(0..=1).require_equals(true).default_missing_value("true") } else { argument }
}

/// Reads the configuration, starts logging, and works until told to stop.
pub(super) async fn run(matches: &ArgMatches) -> Result<(), Failure> {
    let config = Config::load(flags(matches), std::env::vars_os()).map_err(|error| Failure {
        exit_code: EXIT_USAGE,
        message: error.to_string(),
        told: false,
    })?;
    let warnings = log::init(config.ops.log_format, config.ops.log_level);
    info!(version = VERSION, revision = REVISION, options = config.summary(), "spotter starts");
    for warning in warnings.iter().chain(&config.warnings) {
        warn!("{warning}");
    }
    app::run(config).await.map_err(|reason| {
        let failure = failed(&reason);
        error!("{}", failure.message);
        Failure { told: true, ..failure }
    })
}

fn flags(matches: &ArgMatches) -> BTreeMap<&'static str, String> {
    let value = |spec: &OptionSpec| matches.get_one::<String>(spec.name).cloned();
    OPTIONS.iter().filter_map(|spec| Some((spec.name, value(spec)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(arguments: &[&str]) -> BTreeMap<&'static str, String> {
        let arguments = ["run"].iter().chain(arguments);
        flags(&command().try_get_matches_from(arguments).unwrap())
    }

    #[test]
    fn only_what_was_given_counts_as_a_flag() {
        assert!(given(&[]).is_empty());
        let flags = given(&["--dry-run", "--events=false", "--drain-margin", "-1s", "--listen="]);
        let expected = [("dry-run", "true"), ("drain-margin", "-1s"), ("events", "false"), ("listen", "")];
        assert_eq!(flags, expected.map(|(name, value)| (name, value.to_owned())).into());
    }

    #[test]
    fn help_has_every_group_and_option() {
        let help = command().render_help().to_string();
        for group in Group::ALL {
            assert!(help.contains(group.title()), "{help}");
        }
        for spec in OPTIONS {
            assert!(help.contains(&format!("--{}", spec.name)), "{} in {help}", spec.name);
        }
    }
}

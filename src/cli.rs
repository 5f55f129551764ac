//! The command line: verbs, help and exit codes.

pub mod imds;
mod run;

use std::{
    ffi::{OsStr, OsString},
    io::{self, IsTerminal, Write},
    path::Path,
};

use clap::{
    ArgMatches, ColorChoice, Command,
    error::{ContextKind, ContextValue, ErrorKind},
};

use crate::{
    config::{LogFormat, LogLevel, options::find},
    ops::{REVISION, VERSION, log},
    rehearsal::imds::ScriptKind,
};

/// The program's name, and what a kubectl plugin of it is called.
const NAME: &str = "spotter";
const PLUGIN: &str = "kubectl-spotter";

/// It was tried and failed; the message says what and what to do.
const EXIT_FAILED: u8 = 1;
/// Wrong usage or configuration: nothing was tried.
const EXIT_USAGE: u8 = 2;

/// Why the process ends other than well.
#[derive(Debug)]
pub struct Failure {
    pub exit_code: u8,
    pub message: String,
    /// Whether a person has already been told.
    pub told: bool,
}

impl Failure {
    /// Says it on stderr, unless somebody did.
    pub fn tell(&self) {
        if !self.told {
            // Where stderr is closed nobody listens.
            let _ = writeln!(io::stderr(), "{NAME}: {}", self.message);
        }
    }
}

/// Reads the command line and does what it says.
pub async fn run(arguments: impl IntoIterator<Item = OsString>) -> Result<(), Failure> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let matches = match command(arguments.first()).try_get_matches_from(&arguments) {
        Ok(matches) => matches,
        Err(error) => return explain(&hinted(error, &arguments)),
    };
    match matches.subcommand() {
        Some(("run", matches)) => run::run(matches).await,
        Some(("imds", matches)) => imds(matches).await,
        // `command` demands a verb, and `version` is the only one left.
        _ => print(&format!("{NAME} {}\n", version())),
    }
}

/// The command line's grammar.
fn command(called: Option<&OsString>) -> Command {
    let command = Command::new(NAME)
        .about("A soft landing for Kubernetes nodes on EC2")
        .version(version())
        .color(if colour() { ColorChoice::Auto } else { ColorChoice::Never })
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .max_term_width(120)
        .subcommand(run::command())
        .subcommand(imds::command())
        .subcommand(Command::new("version").about("Print the version"));
    let stem = called.and_then(|path| Path::new(path).file_stem());
    if stem == Some(OsStr::new(PLUGIN)) { command.bin_name("kubectl spotter") } else { command }
}

fn version() -> String {
    match REVISION {
        "unknown" => VERSION.to_owned(),
        revision => format!("{VERSION} ({revision})"),
    }
}

fn colour() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && io::stderr().is_terminal()
}

/// Says what was meant by a word that stands alone: `--dry-run yes`, `imds spot`.
fn hinted(mut error: clap::Error, arguments: &[OsString]) -> clap::Error {
    let Some(ContextValue::String(word)) = error.get(ContextKind::InvalidArg).cloned() else { return error };
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let before = arguments.windows(2).find_map(|pair| match pair {
        [before, at] if at.to_str() == Some(&word) => before.to_str(),
        _ => None,
    });
    let option = before.and_then(|before| find(before.strip_prefix("--")?)).filter(|spec| spec.boolean);
    let mean = match option {
        Some(option) if arguments.get(1).is_some_and(|verb| verb == "run") => {
            let no = ["false", "no", "off", "0", "n"].contains(&word.as_str());
            format!("--{}={}", option.name, !no)
        }
        _ if arguments.get(1).is_some_and(|verb| verb == "imds") && ScriptKind::parse(&word).is_ok() => {
            format!("--notice {word}")
        }
        _ => return error,
    };
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![format!("write {mean}").into()]));
    error
}

/// Help and version were asked for and go to stdout; everything else is wrong usage.
fn explain(error: &clap::Error) -> Result<(), Failure> {
    let printed = error.print();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => printed.or_else(|error| unwritable(&error)),
        _ => Err(Failure { exit_code: EXIT_USAGE, message: error.render().to_string(), told: true }),
    }
}

async fn imds(matches: &ArgMatches) -> Result<(), Failure> {
    for warning in log::init(LogFormat::Text, LogLevel::Info) {
        tracing::warn!("{warning}");
    }
    imds::run(matches).await.map_err(|error| match error.downcast_ref::<clap::Error>() {
        Some(usage) => Failure { exit_code: EXIT_USAGE, message: usage.to_string().trim_end().to_owned(), told: false },
        None => failed(&error),
    })
}

fn failed(error: &anyhow::Error) -> Failure {
    Failure { exit_code: EXIT_FAILED, message: format!("{error:#}"), told: false }
}

fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).or_else(|error| unwritable(&error))
}

/// A reader that has seen enough (`| head`) is no failure.
fn unwritable(error: &io::Error) -> Result<(), Failure> {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return Ok(());
    }
    Err(Failure { exit_code: EXIT_FAILED, message: format!("cannot write the output: {error}"), told: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_sound() {
        command(None).debug_assert();
    }

    #[test]
    fn a_word_that_stands_alone_is_explained() {
        let told = |line: &str| {
            let arguments: Vec<OsString> = line.split(' ').map(Into::into).collect();
            let error = command(None).try_get_matches_from(&arguments).unwrap_err();
            hinted(error, &arguments).to_string()
        };
        for (line, hint) in [
            ("spotter run --dry-run yes", "write --dry-run=true\n"),
            ("spotter run --events off", "write --events=false\n"),
            ("spotter imds spot", "write --notice spot\n"),
        ] {
            let text = told(line);
            assert!(text.contains(hint), "{text}");
        }
        assert!(!told("spotter run --node-name a yes").contains("write"));
    }

    #[test]
    fn a_plugin_shows_itself_as_one() {
        let usage = |called: &str| {
            let called = OsString::from(called);
            command(Some(&called))
                .try_get_matches_from([called, "run".into(), "--nonsense".into()])
                .unwrap_err()
                .to_string()
        };
        assert!(usage("/usr/local/bin/kubectl-spotter").contains("Usage: kubectl spotter run"));
        assert!(usage("/usr/local/bin/spotter").contains("Usage: spotter run"));
    }
}

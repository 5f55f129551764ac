//! The verb `imds`: a metadata service for trying things out.

use std::{io::Write, net::SocketAddr};

use anyhow::Context;
use clap::{Arg, ArgAction, ArgMatches, Command, builder::PossibleValuesParser, error::ErrorKind};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use crate::{
    notice::InstanceId,
    rehearsal::imds::{Happening, Machine, MockImds, ScriptKind, Scripted},
};

const LONG_ABOUT: &str = "\
Answers like the instance metadata service of EC2 (IMDSv2), so that the agent can be tried without EC2.

Tokens are enforced as the real service does. Notices come by the options: each --notice begins one, and the options
after it, up to the next --notice, belong to it.";

const EXAMPLES: &str = "\
Examples:
  A spot interruption after ten seconds, with two minutes to go:
    spotter imds --notice spot --after 10s --deadline 120s

  A rebalance recommendation that becomes an interruption:
    spotter imds --notice rebalance --after 5s --notice spot --after 1m

  A reboot that is moved to a later time, and then cancelled (the short form of the options):
    spotter imds --notice maintenance,event-id=e1,deadline=10m \\
                 --notice maintenance,event-id=e1,deadline=1h,after=30s,cancel-after=1m

  Point the agent at it:
    spotter run --mode agent --imds-url http://127.0.0.1:1338 --node-name NODE";

/// The options that belong to the `--notice` before them: name, placeholder, help.
const NOTICE_OPTIONS: [(&str, &str, &str); 8] = [
    ("after", "DURATION", "It can be read this long after the start [default: at once]"),
    (
        "deadline",
        "DURATION",
        "spot, maintenance: the time from there to the end, or to the start of the maintenance [default: 120s]",
    ),
    (
        "action",
        "WORD",
        "spot: terminate, stop or hibernate [default: terminate]; asg: the target lifecycle state [default: Terminated]",
    ),
    ("until", "DURATION", "spot, rebalance, asg: it is taken back this long after it could be read [default: never]"),
    ("code", "CODE", "maintenance: the event code [default: system-reboot]"),
    (
        "event-id",
        "ID",
        "maintenance: the event; a second notice with the same id gives it a new date [default: one for each]",
    ),
    ("cancel-after", "DURATION", "maintenance: it is cancelled this long after it could be read"),
    ("complete-after", "DURATION", "maintenance: it is completed this long after it could be read"),
];

/// `spotter imds` and its options.
pub fn command() -> Command {
    let command = Command::new("imds")
        .about("Run a mock of the EC2 instance metadata service")
        .long_about(LONG_ABOUT)
        .after_help(EXAMPLES)
        .arg(
            Arg::new("listen")
                .long("listen")
                .value_name("IP:PORT")
                .help("Where to listen; port 0 takes a free one")
                .default_value("127.0.0.1:1338")
                .value_parser(|text: &str| {
                    let no = "an address and a port are needed, for instance 127.0.0.1:1338";
                    text.parse::<SocketAddr>().map_err(|_| no)
                }),
        )
        .args(machine_options())
        .arg(
            Arg::new("notice")
                .long("notice")
                .value_name("KIND[,KEY=VALUE]...")
                .help(
                    "A notice: spot, rebalance, maintenance or asg. Its properties are the options below, or follow it \
                     as KEY=VALUE",
                )
                .action(ArgAction::Append),
        );
    NOTICE_OPTIONS.into_iter().fold(command, |command, (name, value, help)| {
        let arg =
            Arg::new(name).long(name).value_name(value).help(help).help_heading("Options of the notice before them");
        command.arg(arg.action(ArgAction::Append))
    })
}

/// What the instance claims to be.
fn machine_options() -> [Arg; 4] {
    let machine = Machine::default();
    [
        Arg::new("instance-id")
            .long("instance-id")
            .value_name("ID")
            .help("The instance it claims to be: that of the providerID of the node to try")
            .default_value(machine.instance_id)
            .value_parser(|text: &str| {
                InstanceId::parse(text).map(|id| id.to_string()).ok_or("an instance id is i- and letters or digits")
            }),
        Arg::new("instance-type")
            .long("instance-type")
            .value_name("TYPE")
            .help("Its type")
            .default_value(machine.instance_type),
        Arg::new("zone")
            .long("zone")
            .value_name("ZONE")
            .help("Its Availability Zone; the Region follows from it")
            .default_value(machine.zone)
            .value_parser(|text: &str| {
                let machine = Machine { zone: text.to_owned(), ..Machine::default() };
                machine.region().map(|_| machine.zone).ok_or("a zone is needed, for instance eu-central-1b")
            }),
        Arg::new("life-cycle")
            .long("life-cycle")
            .value_name("WORD")
            .help("How it was bought")
            .default_value(machine.life_cycle)
            .value_parser(PossibleValuesParser::new(["spot", "on-demand", "scheduled", "capacity-block"])),
    ]
}

/// Serves until SIGINT or SIGTERM. Prints the address, and a line for each notice that comes or goes.
///
/// Wrong options are a [`clap::Error`] inside the error, so that the caller can tell them from a failure.
pub async fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let script = script(matches)?;
    let word = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let machine = Machine {
        instance_id: word("instance-id"),
        instance_type: word("instance-type"),
        zone: word("zone"),
        life_cycle: word("life-cycle"),
    };
    let listen = matches.get_one::<SocketAddr>("listen").copied().context("--listen has no value")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;

    let (tell, happenings) = mpsc::unbounded_channel();
    let mock = MockImds::bind(listen, machine)
        .await
        .with_context(|| format!("cannot listen on {listen} (--listen)"))?
        .script(script)
        .tell(tell);
    print(&format!("listening on {}", mock.url()));

    let cancel = CancellationToken::new();
    let stop = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        cancel.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        served = mock.serve(cancel.clone()) => served.context("the mock of the metadata service failed"),
        () = tell_all(happenings) => Ok(()),
        () = stop => Ok(()),
    }
}

async fn tell_all(mut happenings: mpsc::UnboundedReceiver<Happening>) {
    while let Some(Happening { at, text }) = happenings.recv().await {
        print(&format!("{} {text}", at.strftime("%Y-%m-%dT%H:%M:%S.%3fZ")));
    }
    // The server is the only sender: it says itself why it ended.
    std::future::pending().await
}

/// A line on stdout. Where nobody reads it any more, the mock goes on.
fn print(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

/// Pairs each option with the `--notice` before it, by their places on the command line.
pub fn script(matches: &ArgMatches) -> Result<Vec<Scripted>, clap::Error> {
    let names = NOTICE_OPTIONS.iter().map(|(name, ..)| *name).chain(["notice"]);
    let mut given: Vec<(usize, &str, &String)> = names
        .flat_map(|name| {
            let places = matches.indices_of(name).into_iter().flatten();
            places.zip(matches.get_many(name).into_iter().flatten()).map(move |(place, value)| (place, name, value))
        })
        .collect();
    given.sort_by_key(|(place, ..)| *place);

    let mut script: Vec<Scripted> = Vec::new();
    for (_, name, value) in given {
        let done = match (name, script.last_mut()) {
            ("notice", _) => notice(value).map(|notice| script.push(notice)),
            (_, Some(notice)) => notice.set(name, value),
            (_, None) => Err(format!(
                "it belongs to a notice, and no --notice comes before it; write for instance --notice spot --{name} {value}"
            )),
        };
        done.map_err(|why| {
            command().bin_name("spotter imds").error(ErrorKind::ValueValidation, format!("--{name} {value}: {why}"))
        })?;
    }
    Ok(script)
}

/// `spot` or `spot,after=10s,deadline=2m`.
fn notice(text: &str) -> Result<Scripted, String> {
    let mut parts = text.split(',').map(str::trim);
    let mut notice = Scripted::new(ScriptKind::parse(parts.next().unwrap_or_default())?);
    for part in parts {
        let (name, value) = part.split_once('=').ok_or_else(|| format!("`{part}` is not KEY=VALUE"))?;
        notice.set(name.trim(), value.trim())?;
    }
    Ok(notice)
}

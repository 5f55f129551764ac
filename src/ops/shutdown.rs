//! Stopping: the first signal asks for it, the second one insists.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// SIGTERM (from the kubelet) and SIGINT (from a keyboard), caught from the moment this is made.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// What a shell reports for a process that a signal ended: 128 and the number of the signal.
const EXIT_TERMINATED: i32 = 128 + 15;
const EXIT_INTERRUPTED: i32 = 128 + 2;

impl Signals {
    /// Catches the signals. Needs a tokio runtime.
    pub fn catch() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Cancels `stop` at the first signal and ends the process at the second. Never returns: run it beside the work,
    /// and drop or abort it when the work is done; who waits for it waits for ever.
    pub async fn watch(mut self, stop: CancellationToken) {
        let (name, _) = self.next().await;
        info!(signal = name, "stopping; once more to stop at once");
        stop.cancel();
        let (name, code) = self.next().await;
        warn!(signal = name, "stopped at once");
        std::process::exit(code)
    }

    async fn next(&mut self) -> (&'static str, i32) {
        // `recv` gives None only when no more signals can be received; then there is nothing to wait for either.
        tokio::select! {
            Some(()) = self.terminate.recv() => ("SIGTERM", EXIT_TERMINATED),
            Some(()) = self.interrupt.recv() => ("SIGINT", EXIT_INTERRUPTED),
            else => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Lines},
        process::{Child, ChildStdout, Command, Stdio},
    };

    use super::*;

    /// Not a test: the process that the tests below send signals to. Anywhere else it returns at once.
    #[test]
    fn victim() {
        if std::env::var_os("SHUTDOWN_VICTIM").is_none() {
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let stop = CancellationToken::new();
            let watch = Signals::catch().unwrap().watch(stop.clone());
            println!("\ncaught");
            let asked = async {
                stop.cancelled().await;
                println!("\nasked");
                std::future::pending::<()>().await;
            };
            tokio::join!(watch, asked);
        });
    }

    fn victim_process() -> (Child, Lines<BufReader<ChildStdout>>) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "ops::shutdown::tests::victim", "--nocapture"])
            .env("SHUTDOWN_VICTIM", "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        (child, lines)
    }

    #[test]
    fn the_first_signal_asks_and_the_second_insists() {
        for (first, second, code) in [("TERM", "TERM", 143), ("INT", "INT", 130), ("TERM", "INT", 130)] {
            let (mut child, mut lines) = victim_process();
            let mut send = |signal: &str, after: &str| {
                assert!(lines.any(|line| line.unwrap() == after), "{after} never came");
                let kill = format!("kill -{signal} {}", child.id());
                assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
            };
            send(first, "caught");
            send(second, "asked");
            assert_eq!(child.wait().unwrap().code(), Some(code), "{first}, {second}");
        }
    }
}

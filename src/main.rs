//! The process: TLS provider, runtime, exit code. The work is in the library.

use std::{fs::OpenOptions, io::Write, process::ExitCode, time::Duration};

use spotter::cli::{self, Failure};

/// How long a name lookup that nobody waits for may keep the process.
const STRAGGLERS: Duration = Duration::from_millis(100);

/// Where the kubelet picks up why a container ended; it shows in `kubectl describe pod`.
const TERMINATION_LOG: &str = "/dev/termination-log";

fn main() -> ExitCode {
    // Only fails where one is installed already, and nothing runs before this.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return end(&Failure { exit_code: 1, message: format!("cannot start: {error}"), told: false });
        }
    };
    let outcome = runtime.block_on(cli::run(std::env::args_os()));
    runtime.shutdown_timeout(STRAGGLERS);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => end(&failure),
    }
}

fn end(failure: &Failure) -> ExitCode {
    failure.tell();
    // Best effort: outside a pod there is no such file, and it is not to be made.
    if let Ok(mut log) = OpenOptions::new().write(true).truncate(true).open(TERMINATION_LOG) {
        let _ = log.write_all(failure.message.as_bytes());
    }
    ExitCode::from(failure.exit_code)
}

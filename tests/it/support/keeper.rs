//! Nothing outlives the tests: every child process and every file belongs to one keeper per test process.
//!
//! The test harness runs no destructors of statics, and a killed process runs none at all. So two small programs wait
//! for the end of this one on pipes that only it holds open: `cat` leads the process group that all children join, and
//! a shell kills that group and removes the directory.

use std::{
    io::{BufRead, BufReader},
    net::TcpListener,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::process::{Pid, Signal, kill_process};

const SCRIPT: &str = r#"
mkdir -p "$1" && echo ready
cat >/dev/null
kill -9 "-$2"
while ! rm -rf "$1" 2>/dev/null; do sleep 0.1; done
"#;

/// The directory and the process group of this test process.
pub struct Keeper {
    dir: PathBuf,
    group: i32,
    // Both hold the write end of a pipe; they are never waited for.
    _leader: Child,
    _shell: Child,
}

/// The keeper of this test process.
pub fn keeper() -> &'static Keeper {
    static KEEPER: OnceLock<Keeper> = OnceLock::new();
    KEEPER.get_or_init(Keeper::start)
}

impl Keeper {
    fn start() -> Self {
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").subsec_nanos();
        let dir = std::env::temp_dir().join(format!("spotter-it-{}-{nanos:09}", std::process::id()));
        // Groups of their own, so that Ctrl-C reaches the tests and not the keeper.
        let leader = Command::new("cat")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("cat starts");
        let group = i32::try_from(leader.id()).expect("a process id");
        let mut shell = Command::new("sh")
            .process_group(0)
            .args(["-c", SCRIPT, "keeper"])
            .arg(&dir)
            .arg(group.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh starts");
        let mut ready = String::new();
        BufReader::new(shell.stdout.take().expect("piped")).read_line(&mut ready).expect("the shell answers");
        assert_eq!(ready, "ready\n", "cannot make {}", dir.display());
        Self { dir, group, _leader: leader, _shell: shell }
    }

    /// The directory that is removed at the end.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A new directory inside it.
    pub fn subdir(&self, name: &str) -> PathBuf {
        let dir = self.dir.join(format!("{name}-{}", next()));
        std::fs::create_dir(&dir).expect("a directory");
        dir
    }

    /// A file with this content inside it, readable by its owner only.
    pub fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.subdir("file").join(name);
        std::fs::write(&path, content).expect("a file");
        path
    }

    /// Starts a child that ends with this test process at the latest.
    pub fn spawn(&self, command: &mut Command) -> Child {
        command.process_group(self.group).spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"))
    }
}

fn next() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A loopback port that nobody listens on. Taken below the range of outgoing connections, which would otherwise
/// occupy it now and then between this call and its use.
pub fn free_port() -> u16 {
    let offset = std::process::id().wrapping_mul(251);
    loop {
        let port = u16::try_from(12_000 + offset.wrapping_add(next()) % 20_000).expect("below 32,000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Sends a signal to a child. A child that is gone is fine.
pub fn signal(child: &Child, signal: Signal) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

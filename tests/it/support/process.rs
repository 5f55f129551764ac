//! A program as a child process: its lines as they come, signals, memory, CPU time and its HTTP endpoints.

use std::{
    ffi::{OsStr, OsString},
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};

use jiff::Timestamp;
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    eventually,
    keeper::{keeper, signal},
};

/// A line of output.
#[derive(Clone, Debug)]
pub struct Line {
    /// When it was read.
    pub at: Timestamp,
    /// Whether it came from stderr.
    pub stderr: bool,
    pub text: String,
}

/// What is to be started.
pub struct Starter {
    command: Command,
}

impl Starter {
    /// Sets an environment variable.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Adds arguments.
    pub fn args<I: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = I>) -> Self {
        self.command.args(args);
        self
    }

    /// Starts it.
    pub fn start(mut self) -> Process {
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = keeper().spawn(&mut self.command);
        let lines = Lines::default();
        let readers = vec![
            collect(child.stdout.take().expect("piped"), false, &lines),
            collect(child.stderr.take().expect("piped"), true, &lines),
        ];
        Process { child: Mutex::new(child), lines, readers: Mutex::new(readers) }
    }
}

type Lines = Arc<Mutex<Vec<Line>>>;

fn collect(stream: impl Read + Send + 'static, stderr: bool, lines: &Lines) -> JoinHandle<()> {
    let lines = lines.clone();
    std::thread::spawn(move || {
        for text in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&text).into_owned();
            lines.lock().unwrap().push(Line { at: Timestamp::now(), stderr, text });
        }
    })
}

/// A running program. Dropped, it is killed.
pub struct Process {
    child: Mutex<Child>,
    lines: Lines,
    readers: Mutex<Vec<JoinHandle<()>>>,
}

impl Process {
    /// The `spotter` program of this build, with a clean environment: only `PATH`, `HOME` and what the test sets.
    pub fn spotter<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>) -> Starter {
        Self::program(env!("CARGO_BIN_EXE_spotter"), args)
    }

    /// Any program, with the same clean environment. `HOME` is an empty directory.
    pub fn program<I: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = I>) -> Starter {
        let mut command = Command::new(program);
        let path: OsString = std::env::var_os("PATH").unwrap_or_default();
        let home: PathBuf = keeper().subdir("home");
        command.args(args).env_clear().env("PATH", path).env("HOME", &home).current_dir(home);
        Starter { command }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    /// All lines so far.
    pub fn lines(&self) -> Vec<Line> {
        self.lines.lock().unwrap().clone()
    }

    /// All output so far, as one text.
    pub fn output(&self) -> String {
        self.lines().iter().map(|line| format!("{}\n", line.text)).collect()
    }

    /// The first line that holds `part`, or a panic with the whole output. Ends early where the program ends.
    pub async fn wait_for_line(&self, part: &str, limit: Duration) -> Line {
        let end = tokio::time::Instant::now() + limit;
        loop {
            let over = self.exited().is_some() || tokio::time::Instant::now() >= end;
            if let Some(line) = self.lines.lock().unwrap().iter().find(|line| line.text.contains(part)) {
                return line.clone();
            }
            assert!(!over, "no line with {part:?} within {limit:?} (exit {:?}):\n{}", self.exited(), self.output());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Its exit status where it has ended; all its output has been read then.
    pub fn exited(&self) -> Option<ExitStatus> {
        let status = self.child.lock().unwrap().try_wait().expect("its own child")?;
        self.readers.lock().unwrap().drain(..).for_each(|reader| reader.join().expect("the reader ends"));
        Some(status)
    }

    /// Waits for its end, or panics with the whole output.
    pub async fn wait(&self, limit: Duration) -> ExitStatus {
        let end = tokio::time::Instant::now() + limit;
        loop {
            if let Some(status) = self.exited() {
                return status;
            }
            assert!(tokio::time::Instant::now() < end, "still running after {limit:?}:\n{}", self.output());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// SIGSTOP: the process stands still.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Any signal.
    pub fn signal(&self, which: Signal) {
        let mut child = self.child.lock().unwrap();
        // A child that was waited for has no process id any more.
        if matches!(child.try_wait(), Ok(None)) {
            signal(&child, which);
        }
    }

    /// Its memory now.
    pub fn memory(&self) -> Memory {
        let text = self.proc("status");
        let kib = |key: &str| {
            let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("no {key} in {text}"));
            line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).expect("a number") * 1024
        };
        Memory { resident: kib("VmRSS:"), anonymous: kib("RssAnon:"), peak: kib("VmHWM:") }
    }

    /// The CPU time that it has used, user and system; counted by the kernel in steps of 10 ms.
    pub fn cpu(&self) -> Duration {
        let text = self.proc("stat");
        // The name in parentheses may hold anything; the fields are counted from its end (proc_pid_stat(5)).
        let fields: Vec<_> = text.rsplit_once(')').expect("a name").1.split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|n| n.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 10)
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.pid())).expect("the process runs")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.lock().unwrap().wait();
        if std::thread::panicking() {
            // Captured by the harness, shown with the failed test.
            println!("--- output of process {}\n{}", self.pid(), self.output());
        }
    }
}

/// In bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// VmRSS
    pub resident: u64,
    /// RssAnon
    pub anonymous: u64,
    /// VmHWM, the highest VmRSS so far
    pub peak: u64,
}

/// An HTTP answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub code: u16,
    pub headers: String,
    pub body: String,
}

impl Answer {
    /// The value of a metric in the text format: `metric("spotter_notices_total", &[("kind", "manual")])`. The sample must
    /// have all these labels; others do not matter, and the values of several samples are added up.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let mut values = self.body.lines().filter_map(|line| sample(line, name, labels)).peekable();
        values.peek()?;
        Some(values.sum())
    }
}

fn sample(line: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let rest = line.strip_prefix(name)?;
    let (set, value) = match rest.strip_prefix('{') {
        Some(rest) => rest.rsplit_once('}')?,
        None => ("", rest.strip_prefix(' ')?),
    };
    let set = format!(",{set},");
    let all = labels.iter().all(|(key, value)| set.contains(&format!(",{key}=\"{value}\",")));
    // A timestamp or an exemplar may follow.
    if all { value.split_whitespace().next()?.parse().ok() } else { None }
}

/// One HTTP/1.1 GET on a connection of its own.
pub async fn http_get(address: SocketAddr, path: &str) -> std::io::Result<Answer> {
    http(address, "GET", path, &[]).await
}

/// One HTTP/1.1 request without a body on a connection of its own.
pub async fn http(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)]) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect(address).await?;
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    // HTTP/1.0, so that the answer is neither chunked nor kept open.
    let head = format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\n{headers}Content-Length: 0\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await?;
    let text = String::from_utf8_lossy(&bytes);
    let bad = || std::io::Error::other(format!("not HTTP: {text}"));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(bad)?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(bad)?;
    Ok(Answer { code, headers: head.to_owned(), body: body.to_owned() })
}

/// Waits until something answers there with 200.
pub async fn wait_http(address: SocketAddr, path: &str, limit: Duration) -> Answer {
    eventually(&format!("http://{address}{path} answers 200"), limit, || async {
        http_get(address, path).await.ok().filter(|answer| answer.code == 200)
    })
    .await
}

#[test]
fn metric_values_are_found_by_name_and_labels() {
    let body = "# TYPE a counter\na{kind=\"x\",node=\"n\"} 2\na{kind=\"y\"} 3 1700000000\nab 7\nc 0.5\n".to_owned();
    let answer = Answer { code: 200, headers: String::new(), body };
    assert_eq!(answer.metric("a", &[("kind", "x")]), Some(2.0));
    assert_eq!(answer.metric("a", &[]), Some(5.0));
    assert_eq!(answer.metric("a", &[("kind", "z")]), None);
    assert_eq!(answer.metric("c", &[]), Some(0.5));
}

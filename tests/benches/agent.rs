//! Agent mode against a real API server: prints what README and design promise, beside a bare client on the same server.
//!
//!     export KUBEBUILDER_ASSETS=$(tests/controlplane/build.sh)
//!     tests/benches/dist.sh && cargo bench --bench agent -- [--quick] [cordon] [drain] [footprint]
//!
//! The program that is measured: SPOTTER_BIN, otherwise the `dist` build where there is one, otherwise the release build
//! that cargo makes for the benchmark. It has the rights that the chart gives it, the server its default limits.
//!
//! NOTICES, RUNS and PODS (environment) change the number of trials and the pods on the node. Everything listens on
//! loopback and ends by itself.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, unreachable_pub)]

#[path = "../it/support.rs"]
mod support;
#[path = "table.rs"]
mod table;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use jiff::{SignedDuration, Timestamp};
use spotter::rehearsal::imds::{Change, Control, Machine, MockImds};
use tokio_util::sync::{CancellationToken, DropGuard};

use support::{
    audit::Requests,
    bare,
    controlplane::{ControlPlane, Options, available},
    fleet::{NewPod, TestNode, World},
    keeper::free_port,
    kubelet::Kubelet,
    process::{Process, wait_http},
    rights::{Agent, Rights},
};
use table::{Sample, ms, row, section};

/// How long a pod takes to end: long enough that the kubelet's own requests do not compete with the evictions.
const EXIT: Duration = Duration::from_secs(3);
/// From the notice to the end of the machine.
const LEFT: SignedDuration = SignedDuration::from_secs(120);
/// The default of `--poll-interval`.
const POLL: Duration = Duration::from_secs(1);
/// How long the idle agent is watched.
const IDLE: Duration = Duration::from_secs(20);
/// What can be measured alone, by its name as an argument.
const PARTS: [&str; 3] = ["cordon", "drain", "footprint"];
const SPOT: &str = "spot/instance-action";

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let parts: Vec<_> = arguments.iter().filter(|argument| *argument != "--quick").collect();
    let unknown = parts.iter().find(|part| !PARTS.contains(&part.as_str()));
    assert!(unknown.is_none(), "{unknown:?} is none of --quick, {}", PARTS.join(", "));
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|name| *name == part);
    if !available() {
        return;
    }
    // Elsewhere the controllers do not share the API server's cores, nor the agent's.
    let cp = &ControlPlane::start(Options { without_controllers: true, ..Options::default() });
    let (notices, runs) = if quick { (5, 3) } else { (30, 20) };
    let (notices, runs, pods) = (number("NOTICES", notices), number("RUNS", runs), number("PODS", 110));
    let program = Program::find();
    table::machine();
    println!("measured: {program}");
    println!(
        "kube-apiserver and etcd on the same cores, with default limits; the agent as its own node with a ServiceAccount's bound token"
    );

    if wanted("cordon") {
        notice_to_cordon(cp, &program, notices).await;
    }
    if wanted("drain") {
        claim_to_last_eviction(cp, &program, runs, pods).await;
    }
    if wanted("footprint") {
        footprint(cp, &program, pods).await;
    }
    println!("\nload at the end: {}", table::load());
}

/// An idle agent on a node without pods sees a notice. The phases are spread evenly over the poll interval, each at a
/// random place in its share: the mean of few trials is then that of many.
async fn notice_to_cordon(cp: &ControlPlane, program: &Program, trials: usize) {
    section(&format!("notice readable -> cordon written, {trials} notices to idle agents, polling each {POLL:?}"));
    let mut all = Vec::new();
    let mut own = Vec::new();
    for trial in 0..trials {
        let stage = Stage::new(cp, &format!("cordon-{trial}"), 0).await;
        let (control, running) = stage.start(program, &[]).await;
        let phase = POLL.mul_f64((trial as f64 + random()) / trials as f64);
        // The poll that sees nothing, and then the one before which the notice is set.
        next_poll(&control).await;
        tokio::time::sleep(phase).await;
        let readable = stage.interrupt(&control);
        running.wait_for_line("cordoned", POLL + Duration::from_secs(10)).await;
        let cordon = stage.requests(cp).await.of("patch", "nodes").first().expect("a claim").answered;
        let took = span(readable, cordon);
        all.push(took);
        own.push(took.saturating_sub(POLL.saturating_sub(phase)));
    }
    let all = Sample::new(all);
    row("mean", &ms(all.mean()), &at_most(POLL / 2 + Duration::from_millis(10), all.mean()));
    row("median", &ms(all.median()), "");
    row("worst", &ms(all.worst()), &at_most(POLL + Duration::from_millis(30), all.worst()));
    let own = Sample::new(own);
    row("of that after the poll came due, median", &ms(own.median()), "");
    row("of that after the poll came due, worst", &ms(own.worst()), "");
}

/// What one drain took, by the audit log's clock.
struct Drain {
    /// The claim came, and was answered.
    claim: Duration,
    /// The claim came, and the pods were asked for.
    listed: Duration,
    /// The claim came, and the first eviction came.
    first: Duration,
    /// The claim came, and the last eviction came.
    sent: Duration,
    /// The claim came, and the last eviction was accepted.
    all: Duration,
}

impl Drain {
    fn of(requests: &Requests, pods: usize) -> Self {
        let claim = requests.of("patch", "nodes").first().expect("a claim").clone();
        let evictions = requests.of("create", "pods/eviction").only(|r| r.code == 201);
        assert_eq!(evictions.len(), pods, "{:?}", requests.summary());
        let (first, sent) = (evictions.first().expect("there are pods"), evictions.last().expect("there are pods"));
        let last = evictions.iter().map(|r| r.answered).max().expect("there are pods");
        let after = |at| span(claim.received, at);
        let list = requests.iter().find(|r| r.resource == "pods").expect("a list or a watch");
        Self {
            claim: after(claim.answered),
            listed: after(list.received),
            first: after(first.received),
            sent: after(sent.received),
            all: after(last),
        }
    }
}

/// One of the times of a drain.
type Measure = fn(&Drain) -> Duration;

/// Spotter and the bare client in turn, each on a node of its own.
async fn claim_to_last_eviction(cp: &ControlPlane, program: &Program, runs: usize, pods: usize) {
    section(&format!("claim -> last of {pods} evictions accepted, {runs} runs each in turn"));
    let (mut ours, mut bare, mut seen, mut used) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut requests = BTreeMap::new();
    for run in 0..runs {
        // Who comes first changes, so that neither has the warmer server.
        for spotter in [run % 2 == 0, run % 2 != 0] {
            if spotter {
                let end = drain_with_spotter(cp, program, run, pods).await;
                ours.push(end.drain);
                seen.push(end.since_readable);
                used.push(end.cpu);
                requests = end.requests;
            } else {
                bare.push(drain_with_bare_client(cp, run, pods).await);
            }
        }
    }
    let sample = |drains: &[Drain], what: Measure| Sample::new(drains.iter().map(what).collect());
    let (limit, worst) = (Duration::from_millis(200), Duration::from_millis(250));
    let all = sample(&ours, |drain| drain.all);
    let reference = sample(&bare, |drain| drain.all);
    row("spotter: median", &ms(all.median()), &at_most(limit, all.median()));
    row("spotter: 95th percentile", &ms(all.part(0.95)), &at_most(worst, all.part(0.95)));
    row("spotter: worst", &ms(all.worst()), "");
    row("bare client: median", &ms(reference.median()), "");
    row("bare client: 95th percentile", &ms(reference.part(0.95)), "");
    row("bare client: worst", &ms(reference.worst()), "");
    let ratio = all.median().as_secs_f64() / reference.median().as_secs_f64();
    row("ratio of the medians", &format!("{ratio:.2}"), "");
    let stages: [(&str, Measure); 4] = [
        ("claim answered", |drain| drain.claim),
        ("list received", |drain| drain.listed),
        ("first eviction received", |drain| drain.first),
        ("last eviction received", |drain| drain.sent),
    ];
    for (name, what) in stages {
        let (ours, bare) = (sample(&ours, what).median(), sample(&bare, what).median());
        row(&format!("median until {name}"), &ms(ours), &format!("bare client {}", ms(bare)));
    }
    row("spotter: CPU of a drain, median", &ms(Sample::new(used).median()), "");
    let seen = Sample::new(seen);
    row("notice just after a poll -> last, median", &ms(seen.median()), "");
    row(
        "notice just after a poll -> last, worst",
        &ms(seen.worst()),
        &at_most(Duration::from_millis(1400), seen.worst()),
    );
    println!("  requests of one drain:");
    for (what, count) in &requests {
        row(&format!("  {what}"), &count.to_string(), "");
    }
    let counted: usize = requests.iter().filter(|(what, _)| what.as_str() != "create events").map(|(_, n)| n).sum();
    row("  all without events", &counted.to_string(), &format!("{} or {}", pods + 3, pods + 4));
}

/// What a drain by spotter was like.
struct Ended {
    drain: Drain,
    /// The notice could be read, and the last eviction was accepted.
    since_readable: Duration,
    /// From the notice to the last pod's end.
    cpu: Duration,
    requests: BTreeMap<String, usize>,
}

async fn drain_with_spotter(cp: &ControlPlane, program: &Program, run: usize, pods: usize) -> Ended {
    let stage = Stage::new(cp, &format!("drain-{run}"), pods).await;
    let (control, running) = stage.start(program, &[]).await;
    next_poll(&control).await;
    let before = stage.requests(cp).await.len();
    let used = cpu(&running);
    let readable = stage.interrupt(&control);
    running.wait_for_line("termination finished", Duration::from_secs(60)).await;
    let used = cpu(&running) - used;
    let mut requests = stage.requests(cp).await;
    let first = requests[before..].first().expect("a claim").received;
    requests = requests.only(|r| r.received >= first);
    let last = requests.of("create", "pods/eviction").iter().map(|r| r.answered).max().expect("evictions");
    Ended {
        drain: Drain::of(&requests, pods),
        since_readable: span(readable, last),
        cpu: used,
        requests: requests.summary(),
    }
}

/// With the agent's rights, and as its node too.
async fn drain_with_bare_client(cp: &ControlPlane, run: usize, pods: usize) -> Drain {
    let stage = Stage::new(cp, &format!("bare-{run}"), pods).await;
    let mut config = stage.agent.config().await;
    config.auth_info.impersonate = Some(format!("system:node:{}", stage.node.name));
    let took = bare::evict_all(&config, &stage.node.name, &stage.world.namespace).await;
    assert_eq!(took.evictions, pods);
    stage.kubelet.ended(pods, Duration::from_secs(60)).await;
    Drain::of(&stage.requests(cp).await, pods)
}

/// What an agent costs while nothing happens, and at its busiest.
async fn footprint(cp: &ControlPlane, program: &Program, pods: usize) {
    section(&format!("footprint: {} s idle, then a drain of {pods} pods", IDLE.as_secs()));
    let stage = Stage::new(cp, "footprint", pods).await;
    let listen = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let (control, running) = stage.start(program, &["--listen", &listen.to_string()]).await;
    wait_http(listen, "/readyz", Duration::from_secs(10)).await;
    next_poll(&control).await;

    let asked = stage.requests(cp).await.len();
    let (began, used) = (Instant::now(), cpu(&running));
    // As a kubelet would.
    for _ in 0..2 {
        tokio::time::sleep(IDLE / 2).await;
        wait_http(listen, "/livez", Duration::from_secs(5)).await;
    }
    let per_second = (cpu(&running) - used).as_secs_f64() * 1000.0 / began.elapsed().as_secs_f64();
    let idle = running.memory();
    wait_http(listen, "/metrics", Duration::from_secs(5)).await;
    let scraped = running.memory();
    let asked = stage.requests(cp).await.len() - asked;

    stage.interrupt(&control);
    let mut anonymous = 0;
    let end = Instant::now() + Duration::from_secs(60);
    while !running.output().contains("termination finished") {
        assert!(Instant::now() < end, "no end:\n{}", running.output());
        anonymous = anonymous.max(running.memory().anonymous);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let active = running.memory();

    let at_most =
        |megabytes: f64, bytes: u64| verdict(&format!("< {megabytes} MB"), table::megabytes(bytes) < megabytes);
    let megabytes = |bytes: u64| format!("{:.1} MB", table::megabytes(bytes));
    row("idle: resident", &megabytes(idle.resident), &at_most(8.0, idle.resident));
    row("idle: anonymous", &megabytes(idle.anonymous), &at_most(3.0, idle.anonymous));
    row("idle: resident after a scrape of /metrics", &megabytes(scraped.resident), &at_most(8.0, scraped.resident));
    row("idle: CPU per second", &format!("{per_second:.2} ms"), &verdict("< 2 ms", per_second < 2.0));
    row("idle: requests to the API server", &asked.to_string(), &verdict("none", asked == 0));
    row("drain: resident, highest", &megabytes(active.peak), &at_most(10.0, active.peak));
    row("drain: anonymous, highest", &megabytes(anonymous), &at_most(3.0, anonymous));
    row("binary", &megabytes(program.size), &at_most(11.0, program.size));
}

/// A node with its pods, its kubelet and an identity for its agent.
struct Stage {
    world: World,
    node: TestNode,
    kubelet: Kubelet,
    agent: Agent,
}

/// A running agent and its metadata service.
struct Running {
    process: Process,
    _imds: DropGuard,
}

impl std::ops::Deref for Running {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl Stage {
    async fn new(cp: &ControlPlane, name: &str, pods: usize) -> Self {
        let world = World::new(cp, name).await;
        let node = world.node("a").await;
        world.run_many(&node, pods, |i| NewPod::new(format!("web-{i}")).exits_after(EXIT)).await;
        let kubelet = world.kubelet(&node);
        let agent = world.agent(&node, Rights::Node).await;
        Self { world, node, kubelet, agent }
    }

    /// Starts an agent with the default intervals, and waits until it knows its node.
    async fn start(&self, program: &Program, args: &[&str]) -> (Control, Running) {
        let machine = Machine { instance_id: self.node.instance_id.clone(), ..Machine::default() };
        let mock = MockImds::bind(SocketAddr::from(([127, 0, 0, 1], 0)), machine).await.expect("a free port");
        let (control, url) = (mock.control(), mock.url());
        let cancel = CancellationToken::new();
        tokio::spawn(mock.serve(cancel.clone()));
        // The last of two values would be an error: the default here is off, so that no port is taken.
        let listen: &[&str] = if args.is_empty() { &["--listen", "off"] } else { args };
        let process = Process::program(&program.path, ["run", "--mode", "agent", "--node-name", &self.node.name])
            .args(["--imds-url", &url])
            .args(listen)
            .env("KUBECONFIG", &self.agent.kubeconfig)
            .start();
        process.wait_for_line("Node found", Duration::from_secs(20)).await;
        (control, Running { process, _imds: cancel.drop_guard() })
    }

    /// Shows a spot interruption; returns when it could be read.
    fn interrupt(&self, control: &Control) -> Timestamp {
        control.apply(Change::Spot { action: "terminate".into(), time: Timestamp::now() + LEFT });
        control.readable(SPOT).expect("just set").wall
    }

    /// All that the agent of this node has asked so far.
    async fn requests(&self, cp: &ControlPlane) -> Requests {
        cp.audit().agent(&self.node.name).await
    }
}

/// Waits for the beginning of the next poll.
async fn next_poll(control: &Control) {
    let before = control.requests(SPOT);
    let end = Instant::now() + 10 * POLL;
    while control.requests(SPOT) == before {
        assert!(Instant::now() < end, "the agent does not poll");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What is measured.
struct Program {
    path: PathBuf,
    size: u64,
    what: &'static str,
    /// The sources have changed since it was built.
    old: bool,
}

impl Program {
    fn find() -> Self {
        let built = Path::new(env!("CARGO_BIN_EXE_spotter"));
        let target = built.ancestors().nth(2).expect("target/release/spotter");
        let dist = [
            target.join(format!("{}-unknown-linux-gnu/dist/spotter", std::env::consts::ARCH)),
            target.join("dist/spotter"),
        ];
        let given = std::env::var_os("SPOTTER_BIN").map(PathBuf::from);
        let (path, what) = match (given, dist.into_iter().find(|path| path.exists())) {
            (Some(path), _) => (path, "SPOTTER_BIN"),
            (None, Some(path)) => (path, "the dist build"),
            (None, None) => {
                (built.to_owned(), "the release build; tests/benches/dist.sh makes the one that is shipped")
            }
        };
        let about = |path: &Path| path.metadata().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let changed = ["src", "Cargo.toml", "Cargo.lock"].map(|name| last_change(&root.join(name))).into_iter().max();
        let old = about(&path).modified().ok() < changed;
        Self { size: about(&path).len(), old, what, path }
    }
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let short = self.path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap_or(&self.path);
        write!(f, "{} ({})", short.display(), self.what)?;
        if self.old { f.write_str("; OLDER than the sources: build it again") } else { Ok(()) }
    }
}

/// When a file, or anything below a directory, was last changed.
fn last_change(path: &Path) -> SystemTime {
    let below = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| last_change(&entry.path()));
    let own = path.metadata().and_then(|about| about.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    below.fold(own, SystemTime::max)
}

/// The CPU time of all its threads. The scheduler's own account is exact; that in `stat` comes in steps of 10 ms.
fn cpu(process: &Process) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.pid())).expect("it runs");
    let nanoseconds = tasks.map(|task| {
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    nanoseconds.sum::<Option<u64>>().map_or_else(|| process.cpu(), Duration::from_nanos)
}

fn at_most(limit: Duration, found: Duration) -> String {
    verdict(&format!("<= {}", ms(limit)), found <= limit)
}

fn verdict(target: &str, met: bool) -> String {
    format!("{target:<14} {}", if met { "met" } else { "MISSED" })
}

fn span(from: Timestamp, to: Timestamp) -> Duration {
    to.duration_since(from).try_into().unwrap_or(Duration::ZERO)
}

/// From 0 up to 1.
fn random() -> f64 {
    use std::hash::{BuildHasher, Hasher};
    let bits = std::hash::RandomState::new().build_hasher().finish();
    f64::from(u32::try_from(bits >> 32).expect("32 bits")) / f64::from(u32::MAX)
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

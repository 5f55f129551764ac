//! etcd, kube-apiserver and kube-controller-manager, as real as they come.
//!
//! [`shared`] starts one for the whole test binary. A test that breaks its server starts its own with
//! [`ControlPlane::start`].

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, Once, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use rustix::process::Signal;

use super::{
    audit::Audit,
    block_on_thread,
    keeper::{free_port, keeper, signal},
    rights,
};

/// What to say where the control plane was not built.
const HOW: &str = "export KUBEBUILDER_ASSETS=$(tests/controlplane/build.sh)";
const ADMIN_TOKEN: &str = "admin-token";
/// Two busy cores need much longer than the usual second and a half.
const START_LIMIT: Duration = Duration::from_secs(120);
const AUDIT_POLICY: &str = r#"{"apiVersion":"audit.k8s.io/v1","kind":"Policy","omitStages":["RequestReceived"],
"rules":[{"level":"None","resources":[{"group":"coordination.k8s.io"}]},{"level":"Metadata"}]}"#;
/// Budgets are real, and so is what stands behind real workloads. No node lifecycle, no garbage collector: the tests
/// say what happens to nodes, and may give pods owners that do not exist.
const CONTROLLERS: &str = "disruption-controller,serviceaccount-controller,replicaset-controller,deployment-controller";

/// The control plane that all tests share; `None`, and one line for the whole run, where it was not built.
///
/// # Panics
/// Where `SPOTTER_REQUIRE_REAL=1` demands it and it was not built, or it does not start.
pub fn shared() -> Option<&'static ControlPlane> {
    static SHARED: OnceLock<ControlPlane> = OnceLock::new();
    available().then(|| SHARED.get_or_init(|| ControlPlane::start(Options::default())))
}

/// Whether the programs were built. Says so once where they were not.
pub fn available() -> bool {
    if assets().is_some() {
        return true;
    }
    let text = format!("tests that need a real API server were skipped; to run them: {HOW}");
    assert!(std::env::var_os("SPOTTER_REQUIRE_REAL").is_none_or(|v| v != "1"), "{text}");
    static SAID: Once = Once::new();
    // Not by a macro, which the harness would capture, and in one piece.
    let line = format!("\nspotter: {text}\n");
    SAID.call_once(|| std::io::stderr().write_all(line.as_bytes()).expect("stderr is open"));
    false
}

/// A program of the control plane, or None where it was not built.
pub fn asset(name: &str) -> Option<PathBuf> {
    Some(assets()?.join(name))
}

fn assets() -> Option<PathBuf> {
    std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from).filter(|dir| dir.join("kube-apiserver").exists())
}

/// How a control plane differs from the shared one.
#[derive(Default)]
pub struct Options {
    /// Appended to the API server's arguments, for instance `--goaway-chance=0.02`.
    pub apiserver_args: Vec<String>,
    /// Leaves the controller manager out: budgets are then never processed.
    pub without_controllers: bool,
}

/// Where the server is and how its administrator enters. Cheap to share.
pub struct Server {
    /// `https://127.0.0.1:PORT`
    pub url: String,
    /// The certificate authority's file.
    pub ca: PathBuf,
    /// The key that signs ServiceAccount tokens.
    pub(super) token_key: EcdsaKeyPair,
    audit_log: PathBuf,
}

impl Server {
    /// The administrator's configuration (system:masters, exempt from flow control: only for the tests' own use).
    pub fn admin_config(&self) -> kube::Config {
        let mut config = self.config();
        config.auth_info.token = Some(ADMIN_TOKEN.to_owned().into());
        config
    }

    /// A configuration without an identity.
    pub fn config(&self) -> kube::Config {
        let mut config = kube::Config::new(self.url.parse().expect("a URL"));
        config.root_cert_file = Some(self.ca.clone());
        // kube would repeat 429 and 503 silently, up to 15 times.
        config.default_retry = false;
        config
    }

    /// A client with the administrator's rights.
    pub fn admin(&self) -> kube::Client {
        client(self.admin_config())
    }

    /// The audit log.
    pub fn audit(&self) -> Audit {
        Audit::new(self.audit_log.clone(), self.admin())
    }
}

/// kube's stock client for a configuration.
pub fn client(config: kube::Config) -> kube::Client {
    install_tls();
    kube::Client::try_from(config).expect("a client")
}

/// Chooses the TLS implementation, once for the process.
pub fn install_tls() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A running control plane. Dropped, its processes and files are gone; a shared one ends with the test process.
pub struct ControlPlane {
    pub server: Arc<Server>,
    dir: PathBuf,
    apiserver_args: Vec<String>,
    etcd: Mutex<Child>,
    apiserver: Mutex<Child>,
    controllers: Mutex<Option<Child>>,
}

impl ControlPlane {
    /// Starts a control plane and waits until it answers: two seconds, four where both cores are busy.
    ///
    /// # Panics
    /// Where the programs were not built (ask [`available`] first) or do not start.
    pub fn start(options: Options) -> Self {
        install_tls();
        let dir = keeper().subdir("controlplane");
        let etcd_url = format!("http://127.0.0.1:{}", free_port());
        let etcd = spawn(&dir, "etcd", &etcd_args(&dir, &etcd_url, &format!("http://127.0.0.1:{}", free_port())));
        let token_key = write_keys(&dir);
        std::fs::write(dir.join("tokens.csv"), format!("{ADMIN_TOKEN},admin,admin,system:masters\n")).unwrap();
        std::fs::write(dir.join("audit.json"), AUDIT_POLICY).unwrap();
        let port = free_port();
        let mut apiserver_args = apiserver_args(&dir, &etcd_url, port);
        apiserver_args.extend(options.apiserver_args);
        let apiserver = spawn(&dir, "kube-apiserver", &apiserver_args);
        let server = Arc::new(Server {
            url: format!("https://127.0.0.1:{port}"),
            ca: dir.join("apiserver.crt"),
            token_key,
            audit_log: dir.join("audit.log"),
        });
        let plane = Self {
            server,
            dir,
            apiserver_args,
            etcd: Mutex::new(etcd),
            apiserver: Mutex::new(apiserver),
            controllers: Mutex::new(None),
        };
        plane.wait_ready();
        if !options.without_controllers {
            *plane.controllers.lock().unwrap() = Some(plane.start_controllers());
        }
        let server = plane.server.clone();
        block_on_thread(async move { rights::install(&server).await });
        plane
    }

    /// The audit log of this server.
    pub fn audit(&self) -> Audit {
        self.server.audit()
    }

    /// Kills the API server (SIGKILL): connections break, nothing listens.
    pub fn kill_apiserver(&self) {
        end(&mut self.apiserver.lock().unwrap());
    }

    /// Starts the API server again on the same port, with the same certificate, and waits until it answers.
    pub fn restart_apiserver(&self) {
        let mut child = self.apiserver.lock().unwrap();
        end(&mut child);
        *child = spawn(&self.dir, "kube-apiserver", &self.apiserver_args);
        drop(child);
        self.wait_ready();
    }

    /// Asks the API server to end (SIGTERM), as an upgrade of the control plane does. Does not wait.
    pub fn terminate_apiserver(&self) {
        signal(&self.apiserver.lock().unwrap(), Signal::TERM);
    }

    /// Stops the API server in its tracks: connections stay open, nobody answers.
    pub fn freeze(&self) {
        signal(&self.apiserver.lock().unwrap(), Signal::STOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        signal(&self.apiserver.lock().unwrap(), Signal::CONT);
    }

    /// The directory with the logs (`kube-apiserver.log`, `etcd.log`, ...).
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn wait_ready(&self) {
        let end = Instant::now() + START_LIMIT;
        loop {
            if let Some(status) = self.apiserver.lock().unwrap().try_wait().expect("its own child") {
                panic!("kube-apiserver ended ({status}):\n{}", tail(&self.dir.join("kube-apiserver.log")));
            }
            let server = self.server.clone();
            if server.ca.exists() && block_on_thread(async move { ready(&server).await }) {
                return;
            }
            assert!(
                Instant::now() < end,
                "kube-apiserver is not ready:\n{}",
                tail(&self.dir.join("kube-apiserver.log"))
            );
            std::thread::sleep(Duration::from_millis(25));
        }
    }

    fn start_controllers(&self) -> Child {
        let kubeconfig = self.dir.join("controllers.kubeconfig");
        std::fs::write(&kubeconfig, rights::kubeconfig(&self.server, &serde_json::json!({"token": ADMIN_TOKEN})))
            .expect("a file");
        let args = [
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--controllers={CONTROLLERS}"),
            "--leader-elect=false".to_owned(),
            "--secure-port=0".to_owned(),
            "--kube-api-qps=1000".to_owned(),
            "--kube-api-burst=1000".to_owned(),
        ];
        spawn(&self.dir, "kube-controller-manager", &args)
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // A start that failed has poisoned a lock; a second panic here would hide why.
        if let Some(child) = self.controllers.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            end(child);
        }
        for child in [&self.apiserver, &self.etcd] {
            end(&mut child.lock().unwrap_or_else(PoisonError::into_inner));
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

async fn ready(server: &Server) -> bool {
    let request = http::Request::get("/readyz").body(Vec::new()).expect("a request");
    let answer = tokio::time::timeout(Duration::from_secs(2), server.admin().request_text(request)).await;
    // The verbose text of a server that is not ready holds the word too.
    matches!(answer, Ok(Ok(text)) if text == "ok")
}

fn end(child: &mut Child) {
    signal(child, Signal::KILL);
    let _ = child.wait();
}

fn spawn(dir: &Path, program: &str, args: &[String]) -> Child {
    let log = File::options().create(true).append(true).open(dir.join(format!("{program}.log"))).expect("a log");
    let mut command = Command::new(asset(program).expect("KUBEBUILDER_ASSETS is set"));
    command.args(args).current_dir(dir).stdin(Stdio::null());
    command.stdout(log.try_clone().expect("a handle")).stderr(log);
    keeper().spawn(&mut command)
}

fn etcd_args(dir: &Path, clients: &str, peers: &str) -> Vec<String> {
    vec![
        format!("--data-dir={}", dir.join("etcd").display()),
        "--unsafe-no-fsync".to_owned(),
        format!("--listen-client-urls={clients}"),
        format!("--advertise-client-urls={clients}"),
        format!("--listen-peer-urls={peers}"),
        format!("--initial-advertise-peer-urls={peers}"),
        format!("--initial-cluster=default={peers}"),
        "--log-level=warn".to_owned(),
        // Alone, it need not wait a second before it elects itself.
        "--heartbeat-interval=20".to_owned(),
        "--election-timeout=200".to_owned(),
    ]
}

fn apiserver_args(dir: &Path, etcd: &str, port: u16) -> Vec<String> {
    let file = |name: &str| dir.join(name).display().to_string();
    [
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--disable-admission-plugins=TaintNodesByCondition",
        "--audit-log-maxsize=10000",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain([
        format!("--secure-port={port}"),
        format!("--etcd-servers={etcd}"),
        format!("--cert-dir={}", dir.display()),
        format!("--service-account-key-file={}", file("tokens.pub")),
        format!("--service-account-signing-key-file={}", file("tokens.key")),
        format!("--token-auth-file={}", file("tokens.csv")),
        format!("--audit-policy-file={}", file("audit.json")),
        format!("--audit-log-path={}", file("audit.log")),
    ])
    .collect()
}

/// Makes the key that signs ServiceAccount tokens, and writes both halves as PEM.
fn write_keys(dir: &Path) -> EcdsaKeyPair {
    // What stands before the point in every SubjectPublicKeyInfo of a P-256 key (RFC 5480).
    const SPKI: [u8; 26] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48,
        0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
    ];
    let random = ring::rand::SystemRandom::new();
    let private = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, private.as_ref(), &random).expect("its own");
    let public = [SPKI.as_slice(), key.public_key().as_ref()].concat();
    let pem = |label: &str, der: &[u8]| {
        let text = STANDARD.encode(der);
        let lines: Vec<_> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).expect("ASCII")).collect();
        format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
    };
    std::fs::write(dir.join("tokens.key"), pem("PRIVATE KEY", private.as_ref())).expect("a file");
    std::fs::write(dir.join("tokens.pub"), pem("PUBLIC KEY", &public)).expect("a file");
    key
}

fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

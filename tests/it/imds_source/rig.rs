//! A mock that serves, a client for it, and what is watched.

// Helpers of tests are outside what `allow-unwrap-in-tests` covers.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub, missing_debug_implementations)]

use std::{net::SocketAddr, time::Duration};

use prometheus_client::registry::Registry;
use spotter::{
    notice::{InstanceId, Notice, Report, Withdrawal},
    rehearsal::imds::{Control, Machine, MockImds},
    source::imds::{self, BaseUrl, Health, Identity, Imds, Metrics, Settings},
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// Long enough for any machine: only a failing test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A mock that serves, and a client for it.
pub struct Rig {
    pub control: Control,
    pub address: SocketAddr,
    pub imds: Imds,
    pub registry: Registry,
    pub stop_mock: CancellationToken,
    pub tasks: JoinSet<()>,
}

impl Rig {
    pub async fn new() -> Self {
        Self::on("127.0.0.1:0").await
    }

    pub async fn on(address: &str) -> Self {
        let mock = MockImds::bind(address.parse().unwrap(), Machine::default()).await.unwrap();
        let (metrics, mut registry) = (Metrics::new(), Registry::default());
        metrics.register(&mut registry);
        let mut rig = Self {
            control: mock.control(),
            address: mock.address(),
            imds: Imds::new(BaseUrl::parse(&mock.url()).unwrap(), metrics).unwrap(),
            registry,
            stop_mock: CancellationToken::new(),
            tasks: JoinSet::new(),
        };
        rig.serve(mock);
        rig
    }

    pub fn serve(&mut self, mock: MockImds) {
        self.control = mock.control();
        let serving = mock.serve(self.stop_mock.clone());
        self.tasks.spawn(async { serving.await.unwrap() });
    }

    pub fn metric(&self, series: &str) -> f64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let line = text.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("{series}: {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    pub fn requests(&self, path: &str, code: &str) -> f64 {
        self.metric(&format!("spotter_imds_requests_total{{path=\"{path}\",code=\"{code}\"}}"))
    }

    /// Polls every 20 ms while `script` runs.
    pub async fn poll<T>(&self, script: impl AsyncFnOnce(&Self, &mut Watcher) -> T) -> T {
        let cancel = CancellationToken::new();
        let (sender, reports) = mpsc::channel(16);
        let mut watcher = Watcher { reports, health: Health::new() };
        let (identity, health) = (identity(), watcher.health.clone());
        let often = Duration::from_millis(20);
        let settings = Settings { poll_interval: often, rebalance_interval: often, maintenance_interval: often };
        let polling = imds::run(&self.imds, &identity, &settings, sender, &health, cancel.clone());
        let script = async {
            let result = script(self, &mut watcher).await;
            cancel.cancel();
            result
        };
        let both = async { tokio::join!(polling, script) };
        let (ended, result) = tokio::time::timeout(PATIENCE, both).await.expect("what was waited for did not happen");
        assert_eq!(ended, Ok(()));
        result
    }

    /// Until `path` was asked for `more` times from now on.
    pub async fn asked(&self, path: &str, more: u64) {
        let enough = self.control.requests(path) + more;
        until(|| self.control.requests(path) >= enough).await;
    }
}

pub struct Watcher {
    pub reports: mpsc::Receiver<Report>,
    pub health: Health,
}

impl Watcher {
    /// The next report that is news.
    async fn news(&mut self) -> Option<Report> {
        loop {
            match self.reports.recv().await {
                Some(Report::Synced(_)) => {}
                other => return other,
            }
        }
    }

    pub async fn seen(&mut self) -> Notice {
        match self.news().await {
            Some(Report::Seen(notice)) => notice,
            other => panic!("a notice was expected, not {other:?}"),
        }
    }

    pub async fn withdrawn(&mut self) -> (String, Withdrawal) {
        match self.news().await {
            Some(Report::Withdrawn(id, why)) => (id.0, why),
            other => panic!("a withdrawal was expected, not {other:?}"),
        }
    }

    pub fn nothing(&mut self) {
        while let Ok(report) = self.reports.try_recv() {
            assert!(matches!(report, Report::Synced(_)), "{report:?}");
        }
    }
}

pub async fn until(mut reached: impl FnMut() -> bool) {
    while !reached() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn identity() -> Identity {
    let instance = InstanceId::parse("i-0a1b2c3d4e5f60718").unwrap();
    Identity { instance, instance_type: None, zone: None, region: None, spot: true }
}

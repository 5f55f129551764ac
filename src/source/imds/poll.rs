//! The two loops.

use std::{collections::BTreeSet, time::Duration};

use jiff::Timestamp;
use tokio::{sync::mpsc, time::Instant};

use super::{
    Abandoned, Settings,
    client::{Error, Imds, LOG_AGAIN, Path},
    health::Health,
    metrics::Metrics,
    track::{Maintenance, Single},
};
use crate::notice::{
    InstanceId, Kind, Notice, NoticeId, Report,
    decode::imds::{
        self as decode, Decoded, Unreadable,
        lifecycle::{self, Followed},
    },
};

/// The spot path is never asked less often than this, whatever fails: its notice is worth two minutes.
const SPOT_BACK_OFF: Duration = Duration::from_secs(2);

/// The other paths are asked again at the latest after this while they fail. For maintenance that is sooner than its
/// usual 30 s.
const SLOW_BACK_OFF: Duration = Duration::from_secs(5);

/// A path, its schedule, and whether it works.
#[derive(Debug)]
struct Schedule {
    path: Path,
    kind: Kind,
    every: Duration,
    longest_wait: Duration,
    next: Instant,
    /// Whether all that the path knows has been told once.
    synced: bool,
    failures: u32,
    logged: Option<Instant>,
}

impl Schedule {
    /// The first poll is due at once.
    fn new(path: Path, kind: Kind, every: Duration, longest_wait: Duration) -> Self {
        Self { path, kind, every, longest_wait, next: Instant::now(), synced: false, failures: 0, logged: None }
    }

    /// To be told after the first answer and what it brought.
    fn first_sync(&mut self) -> Option<Report> {
        let first = !std::mem::replace(&mut self.synced, true);
        first.then_some(Report::Synced(self.kind))
    }

    /// Takes note of how the poll that began at `began` went, and plans the next one.
    fn after(&mut self, began: Instant, failure: Option<&Error>) {
        match failure {
            None if self.failures > 0 => {
                if self.logged.take().is_some() {
                    tracing::info!(path = %self.path, failures = self.failures, "the instance metadata service answers again");
                }
                self.failures = 0;
            }
            None => {}
            Some(error) => {
                self.failures = self.failures.saturating_add(1);
                if self.logged.is_none_or(|at| at.elapsed() >= LOG_AGAIN) {
                    self.logged = Some(Instant::now());
                    tracing::warn!(path = %self.path, failures = self.failures, %error, "cannot read the instance metadata");
                } else {
                    tracing::debug!(path = %self.path, failures = self.failures, %error, "cannot read the instance metadata");
                }
            }
        }
        self.next = began + wait(self.every, self.failures, self.longest_wait);
    }
}

/// How long after the start of a poll the next one starts: the interval, doubled with each failure up to `longest`.
fn wait(every: Duration, failures: u32, longest: Duration) -> Duration {
    if failures == 0 {
        return every;
    }
    let doubled = every.saturating_mul(2u32.saturating_pow(failures - 1));
    doubled.min(longest)
}

/// Sends reports on, and says and counts what they are.
#[derive(Debug)]
struct Reporter<'a> {
    metrics: &'a Metrics,
    open: BTreeSet<NoticeId>,
}

impl<'a> Reporter<'a> {
    fn new(metrics: &'a Metrics) -> Self {
        Self { metrics, open: BTreeSet::new() }
    }

    async fn send(
        &mut self,
        news: impl IntoIterator<Item = Report>,
        to: &mpsc::Sender<Report>,
    ) -> Result<(), Abandoned> {
        for report in news {
            match &report {
                Report::Seen(notice) => {
                    let Notice { id, kind, deadline, detail, instance, .. } = notice;
                    let is_new = self.open.insert(id.clone());
                    if is_new {
                        self.metrics.noticed(*kind);
                    }
                    let deadline = deadline.at().map_or_else(|| "none".to_owned(), |at| at.to_string());
                    let what = if is_new { "a notice" } else { "a notice has changed" };
                    tracing::debug!(%id, %kind, %instance, %deadline, detail, "{what}");
                }
                Report::Withdrawn(id, why) => {
                    self.open.remove(id);
                    tracing::debug!(%id, ?why, "a notice is no longer open");
                }
                Report::Synced(_) => {}
            }
            to.send(report).await.map_err(|_| Abandoned)?;
        }
        Ok(())
    }
}

/// The loop that has two minutes.
#[derive(Debug)]
pub(super) struct Spot<'a> {
    imds: &'a Imds,
    instance: &'a InstanceId,
    health: &'a Health,
    schedule: Schedule,
    tracked: Single,
    warned: Option<String>,
}

impl<'a> Spot<'a> {
    pub(super) fn new(imds: &'a Imds, instance: &'a InstanceId, settings: &Settings, health: &'a Health) -> Self {
        let every = settings.poll_interval;
        let schedule = Schedule::new(Path::Spot, Kind::SpotInterruption, every, every.max(SPOT_BACK_OFF));
        Self { imds, instance, health, schedule, tracked: Single::default(), warned: None }
    }

    pub(super) async fn run(mut self, reports: &mpsc::Sender<Report>) -> Result<(), Abandoned> {
        let mut reporter = Reporter::new(&self.imds.metrics);
        loop {
            tokio::time::sleep_until(self.schedule.next).await;
            let began = Instant::now();
            let answer = self.poll().await;
            self.schedule.after(began, answer.as_ref().err());
            match answer {
                Ok(news) => {
                    self.health.succeeded();
                    self.imds.metrics.succeeded(now());
                    reporter.send(news.into_iter().chain(self.schedule.first_sync()), reports).await?;
                }
                Err(error) => self.health.failed(error.to_string()),
            }
            self.imds.metrics.healthy(self.health.check().is_ok());
        }
    }

    async fn poll(&mut self) -> Result<Option<Report>, Error> {
        let instance = self.instance;
        let answer = self.imds.get(Path::Spot).await;
        let now = now();
        let first_seen = self.tracked.first_seen(now);
        single(&mut self.tracked, &mut self.warned, Path::Spot, answer, now, |body| {
            decode::spot(body, first_seen, instance)
        })
    }
}

/// In whole milliseconds: these times end up in logs and in the record of the node.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

/// One poll of a path that is 404 or one document.
fn single(
    tracked: &mut Single,
    warned: &mut Option<String>,
    path: Path,
    answer: Result<Option<String>, Error>,
    now: Timestamp,
    decode: impl FnOnce(&str) -> Result<Decoded, Unreadable>,
) -> Result<Option<Report>, Error> {
    let body = match answer {
        Ok(Some(body)) => body,
        Ok(None) => {
            *warned = None;
            return Ok(tracked.absent());
        }
        Err(error) => {
            tracked.unclear();
            return Err(error);
        }
    };
    match decode(&body) {
        Ok(Decoded { notice, warning }) => {
            if let Some(flaw) = warning.as_ref().filter(|_| warning != *warned) {
                tracing::warn!(%path, flaw, "the notice is not as it should be");
            }
            *warned = warning;
            Ok(tracked.present(notice, now))
        }
        Err(reason) => {
            tracked.unclear();
            Err(unreadable(path, reason))
        }
    }
}

fn unreadable(path: Path, reason: Unreadable) -> Error {
    Error::Body { path: path.as_str(), reason: reason.0 }
}

/// The loop for everything that can wait. Its paths are asked one after the other: on one connection.
#[derive(Debug)]
pub(super) struct Slow<'a> {
    imds: &'a Imds,
    instance: &'a InstanceId,
    schedules: [Schedule; 3],
    rebalance: Single,
    rebalance_warned: Option<String>,
    lifecycle: Followed,
    maintenance: Maintenance,
}

impl<'a> Slow<'a> {
    pub(super) fn new(imds: &'a Imds, instance: &'a InstanceId, settings: &Settings) -> Self {
        let schedule = |path, kind, every| Schedule::new(path, kind, every, SLOW_BACK_OFF);
        Self {
            imds,
            instance,
            schedules: [
                schedule(Path::Rebalance, Kind::RebalanceRecommendation, settings.rebalance_interval),
                schedule(Path::TargetState, Kind::AsgTermination, settings.rebalance_interval),
                schedule(Path::Scheduled, Kind::ScheduledMaintenance, settings.maintenance_interval),
            ],
            rebalance: Single::default(),
            rebalance_warned: None,
            lifecycle: Followed::default(),
            maintenance: Maintenance::default(),
        }
    }

    pub(super) async fn run(mut self, reports: &mpsc::Sender<Report>) -> Result<(), Abandoned> {
        let mut reporter = Reporter::new(&self.imds.metrics);
        loop {
            let due = (0..self.schedules.len()).min_by_key(|&index| self.schedules[index].next).unwrap_or(0);
            tokio::time::sleep_until(self.schedules[due].next).await;
            let began = Instant::now();
            let mut news = Vec::new();
            let polled = match self.schedules[due].path {
                Path::Rebalance => self.poll_rebalance(&mut news).await,
                Path::TargetState => self.poll_target_state(&mut news).await,
                _ => self.poll_maintenance(&mut news).await,
            };
            self.schedules[due].after(began, polled.as_ref().err());
            if polled.is_ok() {
                news.extend(self.schedules[due].first_sync());
            }
            reporter.send(news, reports).await?;
        }
    }

    async fn poll_rebalance(&mut self, news: &mut Vec<Report>) -> Result<(), Error> {
        let path = Path::Rebalance;
        let answer = self.imds.get(path).await;
        let now = now();
        let instance = self.instance;
        let report = single(&mut self.rebalance, &mut self.rebalance_warned, path, answer, now, |body| {
            decode::rebalance(body, now, instance)
        })?;
        news.extend(report);
        Ok(())
    }

    async fn poll_target_state(&mut self, news: &mut Vec<Report>) -> Result<(), Error> {
        let path = Path::TargetState;
        // 404: not in a group, or no longer. What was known stays.
        let Some(body) = self.imds.get(path).await? else { return Ok(()) };
        let state = lifecycle::target_state(&body).map_err(|reason| unreadable(path, reason))?;
        let before = std::mem::take(&mut self.lifecycle);
        let (followed, report) = lifecycle::advance(before, state, now(), self.instance);
        self.lifecycle = followed;
        news.extend(report);
        Ok(())
    }

    async fn poll_maintenance(&mut self, news: &mut Vec<Report>) -> Result<(), Error> {
        let scheduled = self.events(Path::Scheduled).await?;
        let warnings = scheduled.warnings.clone();
        for flaw in self.maintenance.new_warnings(warnings) {
            tracing::warn!(path = %Path::Scheduled, flaw, "a maintenance event is not as it should be");
        }
        news.extend(self.maintenance.scheduled(&scheduled));
        if self.maintenance.is_any_missing(&scheduled) {
            let history = self.events(Path::History).await?;
            news.extend(self.maintenance.history(&scheduled, &history));
        }
        Ok(())
    }

    /// One of the two lists; a service that does not have it has no events.
    async fn events(&self, path: Path) -> Result<decode::maintenance::Events, Error> {
        let Some(body) = self.imds.get(path).await? else { return Ok(decode::maintenance::Events::default()) };
        decode::maintenance::maintenance(&body, now(), self.instance).map_err(|reason| unreadable(path, reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failing_paths_are_asked_again_soon() {
        let seconds = |every: u64, longest: u64| -> Vec<f64> {
            let wait = |failures| wait(Duration::from_secs(every), failures, Duration::from_secs(longest));
            (0..5).map(|failures| wait(failures).as_secs_f64()).collect()
        };
        assert_eq!(seconds(1, 2), [1.0, 1.0, 2.0, 2.0, 2.0], "spot");
        assert_eq!(seconds(2, 5), [2.0, 2.0, 4.0, 5.0, 5.0], "rebalance");
        assert_eq!(seconds(30, 5), [30.0, 5.0, 5.0, 5.0, 5.0], "maintenance");
        assert_eq!(wait(Duration::from_secs(1), u32::MAX, SPOT_BACK_OFF), SPOT_BACK_OFF);
    }
}

//! The IMDS source against the mock, over real sockets.

// Helpers of tests are outside what `allow-unwrap-in-tests` covers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod rig;

use std::{process::Command, time::Duration};

use jiff::{SignedDuration, Timestamp};
use spotter::{
    notice::{Deadline, Kind, Report, Withdrawal},
    rehearsal::imds::{Change, Ending, Fault, Machine, MockImds},
    source::imds::{self, Abandoned, Error, Health, Path, Settings},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use rig::{PATIENCE, Rig, identity, until};

const SPOT: &str = "spot/instance-action";
const REBALANCE: &str = "events/recommendations/rebalance";
const SCHEDULED: &str = "events/maintenance/scheduled";
const HISTORY: &str = "events/maintenance/history";
const TARGET_STATE: &str = "autoscaling/target-lifecycle-state";
const TOKEN: &str = "api/token";
const HTML: &str = "<html><body>Sign in to go on</body></html>";

fn in_seconds(seconds: i64) -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second() + seconds).unwrap()
}

fn spot(seconds: i64) -> Change {
    Change::Spot { action: "terminate".into(), time: in_seconds(seconds) }
}

fn maintenance(id: &str, seconds: i64) -> Change {
    Change::Maintenance { id: id.into(), code: "system-reboot".into(), start: in_seconds(seconds) }
}

#[tokio::test]
async fn the_identity_of_the_instance() {
    let rig = Rig::new().await;
    let identity = rig.imds.identity().await.unwrap();
    assert_eq!(identity.instance.as_str(), "i-0a1b2c3d4e5f60718");
    assert_eq!(identity.instance_type.as_deref(), Some("m7g.2xlarge"));
    assert_eq!(identity.zone.as_deref(), Some("eu-central-1b"));
    assert_eq!(identity.region.as_deref(), Some("eu-central-1"));
    assert!(identity.spot);

    for path in ["instance-type", "placement/availability-zone", "placement/region", "instance-life-cycle"] {
        rig.control.remove(path);
    }
    rig.control.set("instance-id", "i-0f1e\n");
    let identity = rig.imds.identity().await.unwrap();
    assert_eq!(identity.instance.as_str(), "i-0f1e");
    assert_eq!((identity.instance_type, identity.zone, identity.region), (None, None, None));
    assert!(!identity.spot);

    rig.control.set("instance-id", HTML);
    let error = rig.imds.identity().await.unwrap_err().to_string();
    assert!(error.contains("instance-id") && error.contains("<html>"), "{error}");
    rig.control.remove("instance-id");
    assert!(matches!(rig.imds.identity().await, Err(Error::Status { path: "instance-id", status: 404 })));
}

/// The environment of a process cannot be changed safely while it runs, so the test above runs in another one.
#[test]
fn no_proxy_is_ever_used() {
    let mut other = Command::new(std::env::current_exe().unwrap());
    other.args(["--exact", "imds_source::the_identity_of_the_instance"]).env_remove("NO_PROXY").env_remove("no_proxy");
    for name in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"] {
        other.env(name, "http://127.0.0.1:9");
    }
    let output = other.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[tokio::test]
async fn the_identity_is_waited_for() {
    let rig = Rig::new().await;
    rig.control.fault("*", Fault::Status(503));
    let (cancel, health) = (CancellationToken::new(), Health::new());
    let healing = async {
        until(|| rig.control.requests(TOKEN) >= 2).await;
        rig.control.fault("*", None);
    };
    let (identity, ()) = tokio::join!(rig.imds.wait_for_identity(&health, &cancel), healing);
    assert_eq!(identity.unwrap().instance, self::identity().instance);
    cancel.cancel();
    rig.control.fault("*", Fault::Status(503));
    assert_eq!(rig.imds.wait_for_identity(&health, &cancel).await, None);
}

#[tokio::test]
async fn over_ipv6() {
    let rig = Rig::on("[::1]:0").await;
    assert!(rig.address.is_ipv6());
    assert_eq!(rig.imds.identity().await.unwrap().region.as_deref(), Some("eu-central-1"));
}

#[tokio::test]
async fn one_token_serves_until_it_nears_its_end() {
    let rig = Rig::new().await;
    rig.poll(async |rig, _| rig.asked(SPOT, 20).await).await;
    assert!(rig.control.requests(TOKEN) <= 2, "{}", rig.control.requests(TOKEN));

    // A service that gives three seconds instead of the six hours asked for.
    rig.control.longest_token(Duration::from_secs(3));
    rig.control.drop_tokens();
    rig.poll(async |rig, _| rig.asked(TOKEN, 3).await).await;
    // Two loops may each meet the dropped token; nothing else was ever refused.
    let refused: f64 = ["spot", "rebalance", "maintenance", "asg"].iter().map(|path| rig.requests(path, "401")).sum();
    assert!(refused <= 2.0, "{refused}");
}

#[tokio::test]
async fn a_refused_token_is_replaced_once() {
    let rig = Rig::new().await;
    assert_eq!(rig.imds.get(Path::Spot).await.unwrap(), None);
    rig.control.drop_tokens();
    assert_eq!(rig.imds.get(Path::Spot).await.unwrap(), None);
    assert_eq!((rig.control.requests(TOKEN), rig.control.requests(SPOT)), (2, 3));
    assert_eq!(rig.requests("spot", "401"), 1.0);

    rig.control.fault(SPOT, Fault::Status(401));
    let error = rig.imds.get(Path::Spot).await.unwrap_err();
    assert!(matches!(error, Error::Status { status: 401, .. }), "{error}");
    assert_eq!((rig.control.requests(TOKEN), rig.control.requests(SPOT)), (3, 5));
}

#[tokio::test]
async fn there_is_no_way_back_to_version_1() {
    let rig = Rig::new().await;
    for (status, part) in
        [(404, "version 1 is never used"), (403, "HttpEndpoint"), (503, "too many"), (302, "redirects")]
    {
        rig.control.fault(TOKEN, Fault::Status(status));
        let error = rig.imds.get(Path::Spot).await.unwrap_err().to_string();
        assert!(error.contains(part) && error.contains(&status.to_string()), "{error}");
    }
    rig.control.fault(TOKEN, Fault::Body(HTML.into()));
    assert!(matches!(rig.imds.get(Path::Spot).await, Err(Error::Body { path: "api/token", .. })));
    assert_eq!(rig.control.requests(SPOT), 0);
}

#[tokio::test]
async fn a_swallowed_request_for_a_token_names_the_hop_limit() {
    let rig = Rig::new().await;
    rig.control.fault(TOKEN, Fault::Delay(Duration::from_secs(600)));
    let error = rig.imds.get(Path::Spot).await.unwrap_err();
    assert!(matches!(error, Error::TokenTimeout { .. }), "{error:?}");
    assert!(error.to_string().contains("HttpPutResponseHopLimit"), "{error}");
    assert_eq!(rig.requests("token", "timeout"), 1.0);
}

#[tokio::test]
async fn a_body_without_end_is_not_read() {
    let rig = Rig::new().await;
    rig.control.fault(SPOT, Fault::Body("x".repeat(300 * 1024)));
    let error = rig.imds.get(Path::Spot).await.unwrap_err().to_string();
    assert!(error.contains("256 KiB") && error.contains(SPOT), "{error}");
    rig.control.fault(SPOT, None);
    assert_eq!(rig.imds.get(Path::Spot).await.unwrap(), None);
}

#[tokio::test]
async fn connections_are_kept() {
    let rig = Rig::new().await;
    for _ in 0..20 {
        // 404 with its page, 200 with a body, 500 with a page.
        assert_eq!(rig.imds.get(Path::Spot).await.unwrap(), None);
        rig.imds.get(Path::Scheduled).await.unwrap();
        rig.control.fault(REBALANCE, Fault::Status(500));
        assert!(rig.imds.get(Path::Rebalance).await.is_err());
    }
    assert_eq!(rig.control.connections(), 1, "one after the other: one connection");

    rig.control.fault(REBALANCE, None);
    rig.poll(async |rig, _| rig.asked(SPOT, 100).await).await;
    assert!(rig.control.connections() <= 2, "two loops: {} connections", rig.control.connections());
}

#[tokio::test]
async fn f4_a_notice_that_stays_makes_one_report() {
    let rig = Rig::new().await;
    rig.poll(async |rig, watcher| {
        rig.asked(SPOT, 3).await;
        watcher.nothing();
        rig.control.apply(spot(120));
        let notice = watcher.seen().await;
        assert_eq!((notice.kind, notice.detail.as_str()), (Kind::SpotInterruption, "terminate"));
        assert_eq!(notice.instance, identity().instance);
        assert!(notice.deadline.is_hard());

        rig.control.apply(Change::TargetState("Terminated".into()));
        assert_eq!(watcher.seen().await.kind, Kind::AsgTermination);
        rig.asked(TARGET_STATE, 20).await;
        rig.asked(SPOT, 20).await;
        watcher.nothing();
        assert_eq!(watcher.health.check(), Ok(()));

        rig.control.apply(Change::SpotGone);
        assert_eq!(watcher.withdrawn().await, ("spot-interruption".into(), Withdrawal::Vanished));
        rig.asked(SPOT, 10).await;
        watcher.nothing();
    })
    .await;
    assert_eq!(rig.metric("spotter_notices_total{kind=\"spot-interruption\",source=\"imds\"}"), 1.0);
    assert_eq!(rig.metric("spotter_notices_total{kind=\"asg-termination\",source=\"imds\"}"), 1.0);
    assert_eq!(rig.metric("spotter_source_healthy{source=\"imds\"}"), 1.0);
    let last = rig.metric("spotter_source_last_success_timestamp_seconds{source=\"imds\"}");
    assert!((Timestamp::now().as_second() as f64 - last).abs() < 60.0, "{last}");
}

/// The mock that the field uses counts two minutes from each request.
#[tokio::test]
async fn f4_an_end_that_moves_away_with_each_poll_makes_one_report() {
    let rig = Rig::new().await;
    rig.poll(async |rig, watcher| {
        rig.control.apply(spot(120));
        let first = watcher.seen().await;
        for later in 121..=126 {
            rig.control.apply(spot(later));
            rig.asked(SPOT, 2).await;
        }
        watcher.nothing();
        // Closer is believed at once.
        rig.control.apply(spot(60));
        assert!(watcher.seen().await.deadline.at() < first.deadline.at());
    })
    .await;
}

#[tokio::test]
async fn a_rebalance_recommendation_comes_and_goes() {
    let rig = Rig::new().await;
    rig.poll(async |rig, watcher| {
        let noticed_at = in_seconds(-300);
        rig.control.apply(Change::Rebalance { noticed_at });
        let notice = watcher.seen().await;
        assert_eq!((notice.kind, notice.noticed_at), (Kind::RebalanceRecommendation, noticed_at));
        assert_eq!(notice.deadline, Deadline::SoftByGrace);
        rig.asked(REBALANCE, 10).await;
        watcher.nothing();
        rig.control.apply(Change::RebalanceGone);
        assert_eq!(watcher.withdrawn().await, ("rebalance-recommendation".into(), Withdrawal::Vanished));
    })
    .await;
}

#[tokio::test]
async fn the_service_goes_down_and_comes_back() {
    let mut rig = Rig::new().await;
    let again = rig.address;
    rig.imds.identity().await.unwrap();
    rig.stop_mock.cancel();
    while rig.tasks.join_next().await.is_some() {}
    rig.stop_mock = CancellationToken::new();
    let mock = MockImds::bind(again, Machine::default()).await.unwrap();
    let control = mock.control();
    rig.control = control.clone();
    control.apply(spot(120));
    // It listens and does not answer: requests hang. Only then does it serve.
    let serving = mock.serve(rig.stop_mock.clone());
    rig.poll(async move |rig, watcher| {
        until(|| rig.requests("spot", "timeout") + rig.requests("token", "timeout") >= 1.0).await;
        watcher.nothing();
        let notice = async {
            let notice = watcher.seen().await;
            rig.stop_mock.cancel();
            notice
        };
        let (served, notice) = tokio::join!(serving, notice);
        served.unwrap();
        assert_eq!(notice.kind, Kind::SpotInterruption);
        // And gone again: refused, which loses nothing that was seen.
        until(|| rig.requests("spot", "error") >= 2.0).await;
        watcher.nothing();
    })
    .await;
}

#[tokio::test]
async fn a_slow_path_that_hangs_never_delays_the_spot_path() {
    let rig = Rig::new().await;
    for path in [REBALANCE, SCHEDULED, TARGET_STATE] {
        rig.control.fault(path, Fault::Delay(Duration::from_secs(600)));
    }
    rig.poll(async |rig, watcher| {
        rig.asked(SPOT, 30).await;
        // Each of these hangs for a second before it is given up: thirty spot polls did not wait for them.
        let slow: u64 = [REBALANCE, SCHEDULED, TARGET_STATE].iter().map(|path| rig.control.requests(path)).sum();
        assert!(slow < 15, "{slow}");
        rig.control.apply(spot(120));
        assert_eq!(watcher.seen().await.kind, Kind::SpotInterruption);
    })
    .await;
}

#[tokio::test]
async fn what_is_no_answer_is_no_notice_and_loses_none() {
    let rig = Rig::new().await;
    rig.poll(async |rig, watcher| {
        for fault in [
            Fault::Body(HTML.into()),
            Fault::Body(String::new()),
            Fault::Body("[]".into()),
            Fault::Status(500),
            Fault::Status(503),
            Fault::Status(403),
            Fault::Status(302),
        ] {
            let paths = [SPOT, REBALANCE, TARGET_STATE, SCHEDULED];
            for path in paths {
                // An empty list is a good answer to one of them.
                let wrong_list = path == SCHEDULED && fault == Fault::Body("[]".into());
                rig.control.fault(path, if wrong_list { Fault::Body("{}".into()) } else { fault.clone() });
            }
            for path in paths {
                rig.asked(path, 1).await;
            }
            // Healed in between, so that the waits stay short.
            for path in paths {
                rig.control.fault(path, None);
            }
            for path in paths {
                rig.asked(path, 1).await;
            }
        }
        watcher.nothing();
        rig.control.apply(spot(120));
        assert_eq!(watcher.seen().await.kind, Kind::SpotInterruption);
        // What was seen stays, whatever comes in between.
        for fault in [Fault::Body(HTML.into()), Fault::Status(500)] {
            rig.control.fault(SPOT, fault);
            rig.asked(SPOT, 2).await;
        }
        rig.control.fault(SPOT, None);
        rig.asked(SPOT, 2).await;
        watcher.nothing();
    })
    .await;
    assert!(rig.requests("spot", "5xx") >= 2.0 && rig.requests("asg", "403") >= 1.0);
}

#[tokio::test]
async fn a_flawed_interruption_is_told_once_and_keeps_its_deadline() {
    let rig = Rig::new().await;
    rig.control.set(SPOT, r#"{"action":"terminate","time":"soon"}"#);
    rig.poll(async |rig, watcher| {
        let notice = watcher.seen().await;
        let left = notice.deadline.at().unwrap().duration_since(notice.noticed_at);
        assert_eq!(left, SignedDuration::from_secs(115));
        rig.asked(SPOT, 20).await;
        watcher.nothing();
    })
    .await;
}

#[tokio::test]
async fn hibernation_is_now_and_a_past_time_is_past() {
    let rig = Rig::new().await;
    rig.poll(async |rig, watcher| {
        rig.control.apply(Change::Spot { action: "hibernate".into(), time: in_seconds(120) });
        let notice = watcher.seen().await;
        assert_eq!(notice.deadline, Deadline::Hard(notice.noticed_at));
        rig.asked(SPOT, 10).await;
        watcher.nothing();
        rig.control.apply(Change::SpotGone);
        watcher.withdrawn().await;
        let past = in_seconds(-3_600);
        rig.control.apply(Change::Spot { action: "stop".into(), time: past });
        assert_eq!(watcher.seen().await.deadline, Deadline::Hard(past));
        rig.asked(SPOT, 10).await;
        watcher.nothing();
    })
    .await;
}

#[tokio::test]
async fn maintenance_is_moved_cancelled_completed_and_vanishes() {
    let rig = Rig::new().await;
    rig.poll(async |rig, watcher| {
        rig.control.apply(maintenance("event-a", 3_600));
        let first = watcher.seen().await;
        assert_eq!((first.id.0.as_str(), first.kind), ("event-a", Kind::ScheduledMaintenance));
        rig.asked(SCHEDULED, 10).await;
        watcher.nothing();
        assert_eq!(rig.control.requests(HISTORY), 0, "the history is read only when an event is gone");

        rig.control.apply(maintenance("event-a", 7_200));
        let moved = watcher.seen().await;
        assert!(moved.id == first.id && moved.deadline.at() > first.deadline.at());
        assert_eq!(moved.noticed_at, first.noticed_at);

        rig.control.apply(maintenance("event-b", 3_600));
        assert_eq!(watcher.seen().await.id.0, "event-b");
        rig.control.apply(Change::MaintenanceEnded { id: "event-a".into(), ending: Ending::Cancelled });
        assert_eq!(watcher.withdrawn().await, ("event-a".into(), Withdrawal::Cancelled));
        rig.control.apply(Change::MaintenanceEnded { id: "event-b".into(), ending: Ending::Completed });
        assert_eq!(watcher.withdrawn().await, ("event-b".into(), Withdrawal::Completed));

        rig.control.apply(maintenance("event-c", 3_600));
        watcher.seen().await;
        let asked = rig.control.requests(HISTORY);
        rig.control.set(SCHEDULED, "[]");
        assert_eq!(watcher.withdrawn().await, ("event-c".into(), Withdrawal::Vanished));
        assert_eq!(rig.control.requests(HISTORY) - asked, 3);
        rig.asked(SCHEDULED, 10).await;
        watcher.nothing();
    })
    .await;
}

#[tokio::test]
async fn the_group_wants_the_instance_and_wants_it_no_more() {
    let rig = Rig::new().await;
    rig.control.set(TARGET_STATE, "Warmed:Running\n");
    rig.poll(async |rig, watcher| {
        for state in ["Warmed:Running", "InService\n", "Standby", "InService", "Detached", "InService"] {
            rig.control.set(TARGET_STATE, state);
            rig.asked(TARGET_STATE, 2).await;
        }
        watcher.nothing();
        rig.control.set(TARGET_STATE, "Terminated\n");
        let notice = watcher.seen().await;
        assert_eq!((notice.id.0.as_str(), notice.detail.as_str()), ("asg-termination", "Terminated"));
        rig.control.fault(TARGET_STATE, Fault::Body(HTML.into()));
        rig.asked(TARGET_STATE, 2).await;
        rig.control.fault(TARGET_STATE, None);
        rig.asked(TARGET_STATE, 2).await;
        watcher.nothing();
        rig.control.set(TARGET_STATE, "InService");
        assert_eq!(watcher.withdrawn().await, ("asg-termination".into(), Withdrawal::Cancelled));
        rig.asked(TARGET_STATE, 3).await;
        rig.control.set(TARGET_STATE, "Warmed:Stopped");
        assert_eq!(watcher.seen().await.detail, "Warmed:Stopped");
    })
    .await;
}

#[tokio::test]
async fn a_new_process_is_told_when_all_has_been_told() {
    let rig = Rig::new().await;
    rig.control.apply(spot(120));
    rig.control.apply(maintenance("event-a", 3_600));
    rig.control.fault(TARGET_STATE, Fault::Status(500));
    rig.poll(async |rig, watcher| {
        rig.asked(TARGET_STATE, 3).await;
        let mut reports = Vec::new();
        while let Ok(report) = watcher.reports.try_recv() {
            reports.push(report);
        }
        let position = |wanted: &Report| reports.iter().position(|report| report == wanted);
        for kind in [Kind::SpotInterruption, Kind::ScheduledMaintenance] {
            let seen = reports.iter().position(|report| matches!(report, Report::Seen(notice) if notice.kind == kind));
            assert!(seen.is_some() && seen < position(&Report::Synced(kind)), "{kind}: {reports:?}");
        }
        assert!(position(&Report::Synced(Kind::RebalanceRecommendation)).is_some(), "nothing is an answer, too");
        assert_eq!(position(&Report::Synced(Kind::AsgTermination)), None, "no answer is none");
        rig.control.fault(TARGET_STATE, None);
        rig.asked(TARGET_STATE, 3).await;
        assert_eq!(watcher.reports.try_recv(), Ok(Report::Synced(Kind::AsgTermination)));
        watcher.nothing();
    })
    .await;
}

#[tokio::test]
async fn a_source_that_nobody_listens_to_ends() {
    let rig = Rig::new().await;
    rig.control.apply(spot(120));
    let (sender, receiver) = mpsc::channel(1);
    drop(receiver);
    let (identity, settings, health) = (identity(), Settings::default(), Health::new());
    let running = imds::run(&rig.imds, &identity, &settings, sender, &health, CancellationToken::new());
    assert_eq!(tokio::time::timeout(PATIENCE, running).await.unwrap(), Err(Abandoned));
}

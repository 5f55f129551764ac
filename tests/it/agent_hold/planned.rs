//! Scheduled maintenance and Auto Scaling: what is announced ahead, moved, and called off.

use serde_json::json;
use spotter::{
    cluster::Manager,
    notice::{Kind, MaintenanceCode},
    rehearsal::imds::Ending,
    termination::Phase,
};

use super::*;
use crate::support::controlplane;

const SCHEDULED: &str = "events/maintenance/scheduled";
const HOUR: i64 = 3600;

impl Scene {
    fn maintenance(&self, start: Timestamp) {
        self.seat.imds.apply(Change::Maintenance { id: "e-1".into(), code: "system-reboot".into(), start });
    }
}

#[tokio::test]
async fn maintenance_is_recorded_drained_moved_and_called_off() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "maintenance").await;
    scene.protected_pod().await;
    let agent = scene.seat.ready(&[]).await;
    let start = seconds_from_now(HOUR);
    scene.maintenance(start);
    let first = scene.until_phase(Phase::Scheduled).await;
    assert_eq!((first.deadline, first.hard, &first.kinds[..]), (Some(start), false, &[Kind::ScheduledMaintenance][..]));
    let node = scene.get().await;
    assert!(!cordoned(&node) && label(&node, NO_BALANCER).is_none());
    assert_eq!(label(&node, LABEL), Some("scheduled-maintenance"));
    scene.idle().await;
    assert_eq!((scene.patches().await, scene.evictions().await), (1, 0));

    // Within the lead time of 15 minutes.
    scene.maintenance(seconds_from_now(HOUR / 6));
    assert_eq!(scene.until_phase(Phase::Draining).await.id, first.id);
    assert!(cordoned(&scene.get().await));
    agent.line("EvictionBlocked").await;

    let later = seconds_from_now(2 * HOUR);
    scene.maintenance(later);
    let moved = scene.until_phase(Phase::Scheduled).await;
    assert_eq!((moved.id, moved.deadline), (first.id, Some(later)));
    let node = scene.get().await;
    assert!(!cordoned(&node) && label(&node, NO_BALANCER).is_none());

    scene.seat.imds.apply(Change::MaintenanceEnded { id: "e-1".into(), ending: Ending::Cancelled });
    let node = scene.until_released().await;
    assert!(label(&node, LABEL).is_none() && !owns(&node, "spotter-agent"));
    agent.line("withdrawn").await;
    assert_eq!(agent.metric("spotter_cordons_released_total", &[("reason", "cancelled")]).await, 1.0);
    let patches = scene.patches().await;
    scene.idle().await;
    assert_eq!(scene.patches().await, patches, "F9: once");
}

#[tokio::test]
async fn maintenance_begins_when_its_lead_time_is_reached() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "lead").await;
    let _agent = scene.seat.ready(&["--maintenance-lead-time=60s"]).await;
    scene.maintenance(seconds_from_now(63));
    let scheduled = scene.until_phase(Phase::Scheduled).await;
    assert_eq!(scene.until_phase(Phase::Drained).await.id, scheduled.id);
    assert_eq!(scene.patches().await, 3);
}

#[tokio::test]
async fn f9_maintenance_that_was_over_while_the_agent_was_down_is_given_back_at_the_start() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "over").await;
    scene.cordon().await;
    let agent = scene.seat.ready(&[]).await;
    scene.maintenance(seconds_from_now(600));
    scene.until_phase(Phase::Drained).await;
    agent.stop().await;
    scene.seat.imds.apply(Change::MaintenanceEnded { id: "e-1".into(), ending: Ending::Completed });
    let again = scene.seat.ready(&[]).await;
    let node = scene.until_released().await;
    assert!(cordoned(&node), "a person's cordon stays");
    again.line("released the Node").await;
    let patches = scene.patches().await;
    scene.idle().await;
    assert_eq!(scene.patches().await, patches);
}

#[tokio::test]
async fn a_record_that_is_read_long_after_imds_is_judged_the_same() {
    let Some(cp) = controlplane::shared() else { return };
    // The Node counts only when it says whose it is; by then the metadata service has long told that there is nothing.
    let scene = Scene::with(cp, "late-record", json!({"spec": {"providerID": null}})).await;
    let mut record = scene.interruption(Manager::Agent, Phase::Scheduled, seconds_from_now(HOUR));
    record.hard = false;
    record.kinds = vec![Kind::ScheduledMaintenance];
    let notice = &mut record.notices[0];
    notice.id.0 = "e-1".into();
    notice.kind = Kind::ScheduledMaintenance;
    notice.deadline = Deadline::Soft(seconds_from_now(HOUR));
    notice.maintenance = Some(MaintenanceCode::SystemReboot);
    scene.write(&record, false).await;
    let agent = scene.seat.start(&[]);
    agent.line("has no providerID yet").await;
    scene.idle().await;
    assert_eq!(scene.patches().await, 0);
    let provider = format!("aws:///eu-central-1a/{}", scene.node.instance_id);
    scene.patch("cloud", json!({"spec": {"providerID": provider}})).await;
    agent.line("released the Node").await;
    scene.until_released().await;
}

#[tokio::test]
async fn events_that_cannot_be_understood_are_reported_and_change_nothing() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "bad-events").await;
    let agent = scene.seat.ready(&[]).await;
    let event = |id: &str, code: &str, start: &str| json!({"EventId": id, "Code": code, "NotBefore": start, "NotAfter": "", "Description": "x", "State": "active"});
    let unknown = event("e-unknown", "instance-teleport", "21 Jan 2040 09:00:43 GMT");
    let undated = event("e-undated", "system-reboot", "soon");
    scene.seat.imds.set(SCHEDULED, json!([unknown, undated, 3]).to_string());
    agent.line("unknown maintenance code \"instance-teleport\"").await;
    agent.line("event e-undated: `NotBefore` is missing or not a date: `soon`").await;
    scene.idle().await;
    assert_eq!(scene.patches().await, 0);
    assert_eq!(agent.count("e-undated"), 1, "said once: {}", agent.process.output());

    let good = event("e-good", "system-reboot", "21 Jan 2040 09:00:43 GMT");
    scene.seat.imds.set(SCHEDULED, json!([undated, good, unknown]).to_string());
    let record = scene.until_phase(Phase::Scheduled).await;
    assert_eq!(record.notices.len(), 1);
    assert_eq!(record.notices[0].id.0, "e-good");
}

#[tokio::test]
async fn auto_scaling_drains_softly_and_gives_back_what_returns_to_service() {
    let Some(cp) = controlplane::shared() else { return };
    let scene = Scene::new(cp, "asg").await;
    let kubelet = scene.world.kubelet(&scene.node);
    scene.world.run(&scene.node, NewPod::new("web").grace(600)).await;
    scene.seat.imds.apply(Change::TargetState("InService".into()));
    let agent = scene.seat.ready(&[]).await;
    scene.idle().await;
    scene.seat.imds.apply(Change::TargetState("Terminated\n".into()));
    let record = scene.until_phase(Phase::Drained).await;
    assert_eq!((record.hard, &record.kinds[..]), (false, &[Kind::AsgTermination][..]));
    assert!(record.deadline.is_some_and(|at| at > seconds_from_now(500)), "as long as its pods need");
    let stops = kubelet.stops();
    assert_eq!(stops[0].graces, [600], "no grace in the eviction: the pod's own");
    let node = scene.get().await;
    assert!(cordoned(&node) && label(&node, NO_BALANCER).is_some());

    scene.seat.imds.apply(Change::TargetState("InService".into()));
    let node = scene.until_released().await;
    assert!(!cordoned(&node) && label(&node, NO_BALANCER).is_none());
    assert_eq!(agent.metric("spotter_cordons_released_total", &[("reason", "cancelled")]).await, 1.0);
}

//! What people hear of a termination: log lines, Kubernetes events, metrics.

use std::collections::BTreeSet;

use jiff::Timestamp;
use tracing::{debug, error, info, info_span, warn};

use crate::{
    cluster::{About, EventNote, Manager, NodeFacts, PodRef},
    notice::{Deadline, Kind, Notice, Report, Withdrawal},
    plan::{
        Moment,
        drain::{self, Effect, News, Note},
    },
    policy::{
        Refusal, Response,
        standing::{Change, Stage},
    },
    termination::{
        Error, Hold, Phase, Record, Termination,
        metrics::{Dropped, Stamp},
        work::Work,
    },
};

/// How a termination ended, for the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    Drained,
    LeftPods,
    Cancelled,
    Released,
    TakenOver,
    DryRun,
}

impl Ending {
    pub(super) const ALL: [Self; 6] =
        [Self::Drained, Self::LeftPods, Self::Cancelled, Self::Released, Self::TakenOver, Self::DryRun];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Drained => "drained",
            Self::LeftPods => "left_pods",
            Self::Cancelled => "cancelled",
            Self::Released => "released",
            Self::TakenOver => "taken_over",
            Self::DryRun => "dry_run",
        }
    }
}

/// Why a node was given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReleaseReason {
    /// The advice was not followed by an interruption, or the machine has outlived its deadline.
    Expired,
    /// AWS took the notice back, or it is over.
    Cancelled,
    /// `spotter.dev/response` on the Node.
    Manual,
}

impl ReleaseReason {
    pub(super) const ALL: [Self; 3] = [Self::Expired, Self::Cancelled, Self::Manual];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::Manual => "manual",
        }
    }
}

/// Warnings that were given, so that each is given once. Bounded.
#[derive(Debug, Default)]
pub(super) struct Warned(BTreeSet<String>);

impl Warned {
    pub(super) fn once(&mut self, message: &str) {
        if self.0.len() < 256 && self.0.insert(message.to_owned()) {
            warn!("{message}");
        }
    }

    /// The same for what cannot be worse.
    pub(super) fn once_as_error(&mut self, message: &str) {
        if self.0.len() < 256 && self.0.insert(message.to_owned()) {
            error!("{message}");
        }
    }
}

impl Termination {
    /// Takes in what a source reports.
    pub(super) fn take_in(&mut self, report: Report) {
        match report {
            Report::Seen(notice) => self.noticed(notice),
            Report::Withdrawn(id, why) => {
                if let Some(notice) = self.notices.withdraw(&id, why) {
                    self.withdrawn(&notice, why);
                }
            }
            Report::Synced(kind) => {
                for notice in self.notices.synced(kind) {
                    self.withdrawn(&notice, Withdrawal::Vanished);
                }
            }
        }
    }

    fn noticed(&mut self, notice: Notice) {
        let now = self.clock.wall();
        let ready_since = self.node.as_ref().and_then(NodeFacts::ready_since);
        let (kind, id, detail) = (notice.kind, notice.id.clone(), notice.detail.clone());
        let deadline = notice.deadline.at();
        let age = now.duration_since(notice.noticed_at).as_secs_f64().max(0.0);
        let change = self.notices.see(notice.clone(), ready_since, now);
        match change {
            Change::Same => return,
            Change::Refused(refusal) => return self.tell_refused(&notice, &refusal),
            Change::New | Change::Updated => {}
        }
        let response = self.response_to(&notice);
        let deadline_text = deadline.map_or_else(|| "none".to_owned(), |at| at.to_string());
        info!(%kind, %id, detail, deadline = deadline_text, response = response.as_str(), new = change == Change::New, "notice");
        if response == Response::Ignore {
            self.metrics.dropped(kind, Dropped::Policy);
            return;
        }
        self.metrics.stage(kind, Stamp::Seen, age);
        let busy = matches!(&self.hold, Hold::Ours(record) if record.phase.is_drain());
        if !busy {
            self.seen_at = Some(self.clock.now());
        }
        self.start.hurry();
        let merged = if busy { "TerminationMerged" } else { "NoticeReceived" };
        self.node_event_note(false, merged, format!("{kind} ({detail}), deadline {deadline_text}"));
    }

    pub(super) fn tell_refused(&self, notice: &Notice, refusal: &Refusal) {
        let Notice { kind, id, detail, .. } = notice;
        self.metrics.dropped(*kind, Dropped::Filtered);
        warn!(%kind, %id, detail, "notice not acted on: {}", refusal_text(refusal));
    }

    /// Says that a notice asks for something, and the Node is not even cordoned; `now` or, once, when it is too late.
    /// Whether that is so.
    pub(super) fn tell_waiting(&mut self, why: &str, now: bool) -> bool {
        let annotation = self.annotation();
        let standing = self.notices.standing(annotation, self.clock.wall());
        let held = matches!(&self.hold, Hold::Ours(record) if record.phase.is_cordoned());
        let (false, Some(kind), true) = (held, standing.kinds.first(), standing.stage >= Stage::Watching) else {
            return false;
        };
        let left = standing.deadline.and_then(Deadline::at).map(|at| at.duration_since(self.clock.wall()).as_secs());
        if left.is_some_and(|left| left <= 0) {
            let message = format!("the deadline of the {kind} has passed, and nothing was drained: {why}");
            self.warned.once_as_error(&message);
        } else if now {
            error!(%kind, seconds_left = left, "a notice waits, and the Node is not cordoned: {why}");
        }
        true
    }

    fn response_to(&mut self, notice: &Notice) -> Response {
        let annotation = self.annotation();
        self.notices.policy().decide(notice, annotation).response
    }

    pub(super) fn withdrawn(&mut self, notice: &Notice, why: Withdrawal) {
        let word = match why {
            Withdrawal::Cancelled => "cancelled",
            Withdrawal::Completed => "completed",
            Withdrawal::Vanished => "no longer listed",
        };
        info!(kind = %notice.kind, id = %notice.id, why = word, "notice withdrawn");
        self.ended_by = ReleaseReason::Cancelled;
        if notice.kind == Kind::ScheduledMaintenance {
            self.node_event_note(false, "MaintenanceCancelled", format!("{}: {word}", notice.detail));
        }
        if matches!(self.hold, Hold::Nobody) {
            self.metrics.dropped(notice.kind, Dropped::Cancelled);
        }
    }

    fn node_event_note(&mut self, warning: bool, reason: &'static str, message: String) {
        if self.settings.events {
            self.announcements.push(EventNote { about: About::Node, warning, reason, message });
        }
    }

    /// Publishes the Node's events, in their order.
    pub(super) fn announce(&mut self) {
        self.announcements.drain(..).for_each(|note| self.recorder.publish(note));
    }

    pub(super) fn enter_span(&mut self, record: &Record) {
        let node = self.cluster.node_name();
        let kind = record.leading_kind();
        self.span = info_span!("termination", id = record.id, node, instance = %self.instance, %kind);
    }

    fn seconds_since_seen(&self, at: Moment) -> f64 {
        self.seen_at.map_or(0.0, |seen| at.since(seen).as_secs_f64())
    }

    /// The Node carries this record now.
    pub(super) fn tell_written(&mut self, record: &Record, before: Option<Phase>, now: Moment) {
        let kind = record.leading_kind();
        let was_cordoned = before.is_some_and(Phase::is_cordoned);
        let deadline = text_of(record.deadline);
        if record.phase.is_cordoned() && !was_cordoned {
            let seconds = self.seconds_since_seen(now);
            self.metrics.stage(kind, Stamp::Cordoned, seconds);
            let ms = (seconds * 1000.0).round() as u64;
            self.span.in_scope(|| info!(phase = record.phase.as_str(), deadline, after_ms = ms, "cordoned"));
            self.node_event_note(false, "Cordoned", format!("{kind}: no new pods; deadline {deadline}"));
        } else if record.phase == Phase::Scheduled {
            let annotation = self.annotation();
            let begins = text_of(self.notices.standing(annotation, self.clock.wall()).changes_at);
            self.span.in_scope(|| info!(phase = "scheduled", starts = deadline, begins, "work will begin at its time"));
        } else if before != Some(record.phase) {
            self.span.in_scope(|| info!(phase = record.phase.as_str(), deadline, "entered phase"));
        } else {
            self.span.in_scope(|| info!(phase = record.phase.as_str(), deadline, "record brought up to date"));
        }
    }

    pub(super) fn tell_drain_started(&mut self, record: &Record) {
        let deadline = text_of(record.deadline);
        self.span.in_scope(|| info!(deadline, hard = record.hard, "drain started"));
        if let Some(at) = record.deadline.filter(|_| record.hard) {
            let left = at.duration_since(self.clock.wall()).as_secs();
            if left <= 0 {
                let hibernates = self.notices.list().iter().any(|notice| notice.detail == "hibernate");
                let why = if hibernates { "hibernation gives no time" } else { "the deadline is past" };
                self.span.in_scope(|| warn!(seconds_left = left, "{why}: every pod gets one second of grace"));
            }
        }
        self.node_event_note(false, "DrainStarted", format!("{}: deadline {deadline}", record.leading_kind()));
    }

    /// The pods of the node are known.
    pub(super) fn tell_listed(&self) {
        let Some(progress) = self.work.as_ref().map(Work::progress) else { return };
        let (pods, skipped) = (progress.total, progress.skipped);
        self.span.in_scope(|| info!(pods, skipped, "pods listed; all that are to go are asked now"));
    }

    /// How a drain stands that takes longer than people like to wait for a word.
    pub(super) fn tell_progress(&self) {
        let Some(work) = &self.work else { return };
        let drain::Progress { total: pods, gone, terminating, blocked, .. } = work.progress();
        if work.was_listed() {
            self.span.in_scope(|| info!(pods, gone, terminating, blocked, "draining"));
        } else {
            self.span.in_scope(|| warn!("draining: the pods of the node could not be listed yet"));
        }
    }

    /// The drain came to its end: the numbers that count, once.
    pub(super) fn tell_finished(&mut self) {
        let (Some(work), Hold::Ours(record)) = (&self.work, &self.hold) else { return };
        if record.phase.is_ended() {
            return;
        }
        let kind = record.leading_kind();
        let (progress, stamps) = (work.progress(), work.stamps());
        let left = work.outcome(self.clock.wall()).left;
        let (outcome, listed) = (work.ending(), work.was_listed());
        let ms = |at: Option<Moment>| at.map(|at| (self.seconds_since_seen(at) * 1000.0).round() as u64);
        for (stamp, at) in [(Stamp::FirstEviction, stamps.first_accepted), (Stamp::LastEviction, stamps.last_accepted)]
        {
            if let Some(at) = at {
                self.metrics.stage(kind, stamp, self.seconds_since_seen(at));
            }
        }
        let margin = record.deadline.map(|at| tenths(at.duration_since(self.clock.wall()).as_secs_f64()));
        if outcome == Phase::Drained {
            let at = stamps.last_gone.unwrap_or_else(|| self.clock.now());
            self.metrics.stage(kind, Stamp::Drained, self.seconds_since_seen(at));
            if let Some(margin) = margin {
                self.metrics.margin(kind, margin);
            }
        }
        self.metrics.pods(progress);
        self.metrics.ended(Some(kind), if outcome == Phase::Drained { Ending::Drained } else { Ending::LeftPods });
        if !listed {
            self.span
                .in_scope(|| error!("the time is up, and the pods of the node could not be listed: none was moved"));
        }
        self.span.in_scope(|| {
            info!(
                outcome = outcome.as_str(),
                pods = progress.total,
                gone = progress.gone,
                deleted = progress.deleted,
                left = progress.left,
                skipped = progress.skipped,
                first_eviction_ms = ms(stamps.first_accepted),
                last_eviction_ms = ms(stamps.last_accepted),
                drained_ms = ms(stamps.last_gone),
                margin_s = margin,
                "termination finished"
            );
        });
        let message = format!(
            "{} of {} pods gone, {} deleted at their latest start",
            progress.gone, progress.total, progress.deleted
        );
        if !listed {
            let message = "the pods of the node could not be listed: none was moved".to_owned();
            self.node_event_note(true, "PodsLeft", message);
        } else if left.is_empty() {
            self.node_event_note(progress.deleted > 0, "Drained", message);
        } else {
            self.node_event_note(true, "PodsLeft", format!("{message}; left: {}", left.join(", ")));
        }
    }

    pub(super) fn tell_note(&mut self, note: Note) {
        let Note { pod, news } = note;
        let name = format!("{}/{}", pod.namespace, pod.name);
        let (warning, reason, message) = match news {
            News::Skipped(skip) => {
                if self.settings.dry_run {
                    info!(pod = name, "dry run: left alone: {}", skip.as_str());
                } else {
                    self.span.in_scope(|| debug!(pod = name, "left alone: {}", skip.as_str()));
                }
                return;
            }
            News::Gone => {
                self.span.in_scope(|| debug!(pod = name, "gone"));
                return;
            }
            News::BadAnnotation(value) => {
                let text =
                    format!("annotation spotter.dev/evict={value:?} is none of never, first, last; not followed");
                (true, "BadAnnotation", text)
            }
            News::Blocked { why, message, waits } => {
                let until = waits.map_or_else(String::new, |wait| format!("; retried for {} s", wait.as_secs()));
                (true, "EvictionBlocked", format!("{}: {message}{until}", why.as_str()))
            }
            News::DeletedAtDeadline { message } => (true, "DeletedAtDeadline", message),
            News::Left { message } => (true, "LeftAtDeadline", message),
        };
        self.span.in_scope(|| warn!(pod = name, reason, "{message}"));
        if self.settings.events {
            let about = About::Pod(PodRef { namespace: pod.namespace, name: pod.name, uid: pod.uid });
            self.recorder.publish(EventNote { about, warning, reason, message });
        }
    }

    /// What a dry run would have done.
    pub(super) fn tell_rehearsed(&self, effect: &Effect) {
        if let Effect::Evict { pod, grace_seconds } = effect {
            let grace = grace_seconds.map_or_else(|| "its own".to_owned(), |seconds| format!("{seconds} s"));
            info!(pod = format!("{}/{}", pod.namespace, pod.name), grace, "dry run: would evict");
        }
    }

    pub(super) fn tell_released(&mut self, record: &Record, reason: ReleaseReason) {
        self.metrics.released(reason);
        if !record.phase.is_ended() {
            let ending = if reason == ReleaseReason::Expired { Ending::Released } else { Ending::Cancelled };
            self.metrics.ended(Some(record.leading_kind()), ending);
        }
        self.span.in_scope(|| info!(reason = reason.as_str(), phase = record.phase.as_str(), "released the Node"));
        let message = format!("{}: {}", record.leading_kind(), reason.as_str());
        self.node_event_note(false, "Released", message);
    }

    pub(super) fn tell_followed(&self, record: &Record) {
        self.metrics.ended(Some(record.leading_kind()), Ending::TakenOver);
        let holder = record.holder.as_str();
        info!(id = record.id, holder, phase = record.phase.as_str(), "another handler holds the Node; following it");
    }

    pub(super) fn tell_taken_over(&mut self, from: Manager, why: &'static str) {
        warn!(from = from.as_str(), why, "taking over the Node");
        self.node_event_note(true, "TakenOver", format!("from {}: {why}", from.as_str()));
    }

    pub(super) fn tell_uncordoned(&self) {
        self.span.in_scope(|| warn!("somebody uncordoned the Node; it is not cordoned again for this notice"));
    }

    /// The log has it as the reason why the process ends.
    pub(super) fn tell_wrong_instance(&mut self, problem: &Error) {
        self.node_event_note(true, "WrongInstance", problem.to_string());
        self.announce();
    }

    pub(super) fn tell_stop(&self) {
        if let (Hold::Ours(record), Some(progress)) = (&self.hold, self.work.as_ref().map(Work::progress)) {
            let phase = record.phase.as_str();
            info!(
                phase,
                gone = progress.gone,
                pods = progress.total,
                "stopping; the record on the Node says where to go on"
            );
        }
    }
}

/// Seconds for people.
fn tenths(seconds: f64) -> f64 {
    (seconds * 10.0).round() / 10.0
}

fn text_of(at: Option<Timestamp>) -> String {
    at.map_or_else(|| "not fixed".to_owned(), |at| at.to_string())
}

fn refusal_text(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Stale => "its deadline passed more than ten minutes ago".to_owned(),
        Refusal::OldAdvice => "the advice is older than rebalance-release-after".to_owned(),
        Refusal::Outlived => "its deadline passed, and the Node became Ready after it".to_owned(),
        Refusal::UnknownCode(code) => format!("unknown maintenance code {code:?}"),
    }
}

//! Getting pods to go: evict, mark, delete, and what each answer means.

use std::{fmt, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::policy::v1::Eviction,
    apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, Preconditions},
};
use kube::core::{
    Request,
    params::{DeleteParams, Patch, PatchParams, PostParams, Preconditions as DeletePreconditions},
};
use serde_json::json;

use super::{Call, Cluster, Error, Lane, Outgoing, Reply, pause, status::Status, unbuildable};
use crate::plan::{Answer, PodUid};

/// How long to wait after a 429 of the flow control that does not say so itself; it says 1 s wherever it does.
const THROTTLE_PAUSE: Duration = Duration::from_secs(1);

/// One pod, and no other that gets its name later.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodRef {
    pub namespace: String,
    pub name: String,
    pub uid: PodUid,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Cluster {
    /// Asks for the eviction of exactly this pod, within its budgets. `None`: its own grace.
    ///
    /// Right: create pods/eviction. A timeout says nothing about the outcome: the server may take 10 s where many
    /// evictions hit one budget.
    pub async fn evict(&self, pod: &PodRef, grace_seconds: Option<u32>, limit: Duration) -> Answer {
        self.ask(Call::Evict, eviction(pod, grace_seconds), limit).await
    }

    /// Sets the condition `DisruptionTarget`, so that a Job does not count the deletion that follows as a failure.
    ///
    /// Right: patch pods/status.
    pub async fn mark(&self, pod: &PodRef, reason: &str, message: &str, limit: Duration) -> Answer {
        let condition = json!({
            "type": "DisruptionTarget", "status": "True", "reason": reason, "message": message,
            "lastTransitionTime": seconds(self.0.clock.wall()),
        });
        let patch = json!({ "metadata": { "uid": pod.uid.0 }, "status": { "conditions": [condition] } });
        let params = PatchParams { field_manager: Some(self.0.manager.as_str().to_owned()), ..PatchParams::default() };
        let request = pods(pod).patch_subresource("status", &pod.name, &params, &Patch::Strategic(patch));
        self.ask(Call::MarkPod, request.map_err(unbuildable), limit).await
    }

    /// Deletes exactly this pod, past all budgets. `None`: its own grace.
    ///
    /// Right: delete pods.
    pub async fn delete(&self, pod: &PodRef, grace_seconds: Option<u32>, limit: Duration) -> Answer {
        let params = DeleteParams {
            grace_period_seconds: grace_seconds,
            preconditions: Some(DeletePreconditions { uid: Some(pod.uid.0.clone()), resource_version: None }),
            ..DeleteParams::default()
        };
        self.ask(Call::DeletePod, pods(pod).delete(&pod.name, &params).map_err(unbuildable), limit).await
    }

    async fn ask(&self, call: Call, request: Result<Outgoing, Error>, limit: Duration) -> Answer {
        let reply = match request {
            Ok(request) => self.exchange(call, Lane::Evictions, request, limit).await,
            Err(error) => Err(error),
        };
        match reply {
            Ok(reply) => classify(&reply, || self.refusal(call, &reply).to_string()),
            Err(error) if error.is_unknown() => Answer::Unknown { message: error.to_string() },
            Err(error) => Answer::Failed { message: error.to_string() },
        }
    }
}

/// What an answer to an eviction, a deletion or a patch means. `explain` puts a refusal into words.
fn classify(reply: &Reply, explain: impl FnOnce() -> String) -> Answer {
    if reply.is_success() {
        // Whatever the body is: a Status, the Eviction or the Pod.
        return Answer::Accepted;
    }
    let status = reply.status();
    match reply.code {
        404 => Answer::Gone,
        409 if is_uid_precondition(&status.message) => Answer::Replaced,
        422 if status.causes().iter().any(|cause| cause.field == "metadata.uid") => Answer::Replaced,
        429 => too_many(&status, reply.retry_after),
        403 if status.cause("NamespaceTerminating").is_some() => Answer::NamespaceTerminating,
        401 | 403 => Answer::Forbidden { message: explain() },
        500 if status.message.contains("more than one PodDisruptionBudget") => {
            Answer::MultipleBudgets { message: status.message }
        }
        _ => Answer::Failed { message: explain() },
    }
}

/// A budget says so in its cause; everything else is the flow control (plain text, no Status).
fn too_many(status: &Status, header: Option<Duration>) -> Answer {
    let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
    let retry_after = (seconds > 0).then(|| pause(seconds)).or(header);
    match status.cause("DisruptionBudget") {
        Some(cause) => {
            let message = if cause.message.is_empty() { &status.message } else { &cause.message };
            Answer::Budget { message: message.clone(), retry_after }
        }
        None => Answer::Throttled { retry_after: Some(retry_after.unwrap_or(THROTTLE_PAUSE)) },
    }
}

/// `the UID in the precondition (a) does not match the UID in record (b)`, and the storage layer's
/// `Precondition failed: UID in precondition: a, UID in object meta: b`.
fn is_uid_precondition(message: &str) -> bool {
    message.contains("UID in the precondition") || message.contains("UID in precondition")
}

fn eviction(pod: &PodRef, grace_seconds: Option<u32>) -> Result<Outgoing, Error> {
    let eviction = Eviction {
        metadata: ObjectMeta {
            name: Some(pod.name.clone()),
            namespace: Some(pod.namespace.clone()),
            ..ObjectMeta::default()
        },
        delete_options: Some(DeleteOptions {
            grace_period_seconds: grace_seconds.map(i64::from),
            preconditions: Some(Preconditions { uid: Some(pod.uid.0.clone()), resource_version: None }),
            ..DeleteOptions::default()
        }),
    };
    let body = serde_json::to_vec(&eviction).map_err(|error| Error::config("an eviction", &error))?;
    pods(pod).create_subresource("eviction", &pod.name, &PostParams::default(), body).map_err(unbuildable)
}

fn pods(pod: &PodRef) -> Request {
    Request::new(format!("/api/v1/namespaces/{}/pods", pod.namespace))
}

/// As Kubernetes writes times in objects: whole seconds.
pub(super) fn seconds(at: Timestamp) -> String {
    Timestamp::from_second(at.as_second()).unwrap_or(at).to_string()
}

#[cfg(test)]
mod tests {
    use hyper::body::Bytes;

    use super::*;
    use crate::cluster::Identity;

    fn answer(code: u16, body: &'static str) -> Answer {
        answer_with(code, body, None)
    }

    fn answer_with(code: u16, body: &'static str, retry_after: Option<u64>) -> Answer {
        let reply = Reply {
            code,
            retry_after: retry_after.map(Duration::from_secs),
            body: Bytes::from_static(body.as_bytes()),
            identity: Identity::Node,
        };
        classify(&reply, || "explained".to_owned())
    }

    #[test]
    fn success_of_every_shape() {
        for body in [
            r#"{"kind":"Status","status":"Success"}"#,
            r#"{"kind":"Pod","metadata":{},"status":{"phase":"Running"}}"#,
            "",
        ] {
            assert_eq!(answer(201, body), Answer::Accepted);
            assert_eq!(answer(200, body), Answer::Accepted);
        }
    }

    #[test]
    fn a_budget_that_allows_none() {
        let body = r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"Cannot evict pod as it would violate the pod's disruption budget.","reason":"TooManyRequests","details":{"causes":[{"reason":"DisruptionBudget","message":"The disruption budget b0 does not allow evicting pods currently"}]},"code":429}"#;
        let message = "The disruption budget b0 does not allow evicting pods currently".to_owned();
        assert_eq!(answer(429, body), Answer::Budget { message, retry_after: None });
    }

    #[test]
    fn a_budget_that_is_behind_says_when_to_ask_again() {
        let body = r#"{"status":"Failure","message":"Cannot evict pod as it would violate the pod's disruption budget.","reason":"TooManyRequests","details":{"causes":[{"reason":"DisruptionBudget","message":"The disruption budget beh is still being processed by the server."}],"retryAfterSeconds":10},"code":429}"#;
        let message = "The disruption budget beh is still being processed by the server.".to_owned();
        assert_eq!(answer(429, body), Answer::Budget { message, retry_after: Some(Duration::from_secs(10)) });
    }

    #[test]
    fn flow_control_is_no_budget() {
        let text = "Too many requests, please try again later.\n";
        assert_eq!(answer(429, text), Answer::Throttled { retry_after: Some(THROTTLE_PAUSE) });
        assert_eq!(answer_with(429, text, Some(3)), Answer::Throttled { retry_after: Some(Duration::from_secs(3)) });
    }

    #[test]
    fn no_server_puts_a_pod_off_for_longer_than_a_minute() {
        let minute = Some(Duration::from_secs(60));
        let body = r#"{"details":{"causes":[{"reason":"DisruptionBudget","message":"b"}],"retryAfterSeconds":86400},"code":429}"#;
        assert_eq!(answer(429, body), Answer::Budget { message: "b".into(), retry_after: minute });
        let headers = |value: &'static str| {
            let name = http::header::RETRY_AFTER;
            super::super::retry_after(&http::HeaderMap::from_iter([(name, http::HeaderValue::from_static(value))]))
        };
        assert_eq!((headers("86400"), headers("18446744073709551615")), (minute, minute));
        assert_eq!((headers("7"), headers("Fri, 31 Dec 1999 23:59:59 GMT")), (Some(Duration::from_secs(7)), None));
    }

    #[test]
    fn two_budgets_are_told_from_other_failures() {
        let body = r#"{"kind":"Status","status":"Failure","message":"This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.","code":500}"#;
        assert!(matches!(answer(500, body), Answer::MultipleBudgets { .. }));
        assert_eq!(answer(500, "boom"), Answer::Failed { message: "explained".into() });
        assert_eq!(answer(503, ""), Answer::Failed { message: "explained".into() });
    }

    #[test]
    fn a_pod_that_is_gone_or_another() {
        assert_eq!(answer(404, r#"{"kind":"Status","reason":"NotFound","code":404}"#), Answer::Gone);
        for message in [
            "Operation cannot be fulfilled on pods \\\"a\\\": the UID in the precondition (x) does not match the UID in record (y). The object might have been deleted and then recreated",
            "Precondition failed: UID in precondition: x, UID in object meta: y",
        ] {
            let body = format!(r#"{{"kind":"Status","reason":"Conflict","message":"{message}","code":409}}"#);
            assert_eq!(answer(409, Box::leak(body.into_boxed_str())), Answer::Replaced);
        }
        let other = r#"{"kind":"Status","reason":"Conflict","message":"Operation cannot be fulfilled on poddisruptionbudgets","code":409}"#;
        assert!(matches!(answer(409, other), Answer::Failed { .. }));
        let marked = r#"{"reason":"Invalid","details":{"causes":[{"reason":"FieldValueInvalid","field":"metadata.uid"}]},"code":422}"#;
        assert_eq!(answer(422, marked), Answer::Replaced);
    }

    #[test]
    fn refusals() {
        let terminating = r#"{"kind":"Status","reason":"Forbidden","message":"…","details":{"causes":[{"reason":"NamespaceTerminating","message":"namespace a is being terminated","field":"metadata.namespace"}]},"code":403}"#;
        assert_eq!(answer(403, terminating), Answer::NamespaceTerminating);
        assert!(matches!(answer(403, "{}"), Answer::Forbidden { .. }));
        assert!(matches!(answer(401, "{}"), Answer::Forbidden { .. }));
    }

    #[test]
    fn times_are_whole_seconds() {
        let at: Timestamp = "2026-11-23T01:02:03.456Z".parse().unwrap();
        assert_eq!(seconds(at), "2026-11-23T01:02:03Z");
    }
}

//! The own Node: what it says, and the claim.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use kube::core::{
    Request,
    params::{GetParams, Patch, PatchParams},
};
use serde_json::{Map, Value, json};

use super::{
    Call, Cluster, Error, FieldConflict, Lane, Manager, Outgoing, Reply, decode::RawNode, status::Status, unbuildable,
};

/// The annotation that holds the record of a termination.
pub const RECORD_ANNOTATION: &str = "spotter.dev/termination";
/// The label that says why the node ends.
pub const TERMINATING_LABEL: &str = "spotter.dev/terminating";
/// Load balancers take such a node out of their targets.
const EXCLUDE_LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// As the API server names the record in a conflict.
const RECORD_FIELD: &str = ".metadata.annotations.spotter.dev/termination";

/// The Ready condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// Its status is True (False and Unknown are not).
    pub ready: bool,
    /// Since when.
    pub since: Timestamp,
}

/// What the API server says of the own Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    pub name: String,
    pub uid: String,
    pub resource_version: String,
    /// Empty: the cloud controller has not set it yet.
    pub provider_id: String,
    pub unschedulable: bool,
    pub ready: Option<Ready>,
    pub boot_id: String,
    /// Annotations that begin with `spotter.dev/`, by the rest of the key.
    pub annotations: BTreeMap<String, String>,
}

impl NodeFacts {
    /// The record of a termination, as it was written.
    pub fn record(&self) -> Option<&str> {
        self.annotations.get("termination").map(String::as_str)
    }

    /// Since when it is Ready; `None` where it is not.
    pub fn ready_since(&self) -> Option<Timestamp> {
        self.ready.filter(|ready| ready.ready).map(|ready| ready.since)
    }
}

/// Everything that a manager wants of the Node. What is left out is given up: the default releases the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeIntent {
    /// Refused (422) where the Node has another.
    pub uid: Option<String>,
    /// Refused (409) where the Node has another.
    pub resource_version: Option<String>,
    pub record: Option<String>,
    /// Set to true, or left out; never set to false.
    pub unschedulable: bool,
    /// The value of `spotter.dev/terminating`.
    pub kind_label: Option<&'static str>,
    /// Sets `node.kubernetes.io/exclude-from-external-load-balancers`.
    pub exclude_from_load_balancers: bool,
}

impl NodeIntent {
    /// Gives up everything, on this Node as it was last seen and on no other.
    pub fn release(node: &NodeFacts) -> Self {
        let (uid, resource_version) = (Some(node.uid.clone()), Some(node.resource_version.clone()));
        Self { uid, resource_version, ..Self::default() }
    }

    fn body(&self, node: &str) -> Value {
        let Self { uid, resource_version, record, unschedulable, kind_label, exclude_from_load_balancers } = self;
        let mut metadata = Map::from_iter([("name".to_owned(), json!(node))]);
        if let Some(uid) = uid {
            metadata.insert("uid".to_owned(), json!(uid));
        }
        if let Some(version) = resource_version {
            metadata.insert("resourceVersion".to_owned(), json!(version));
        }
        if let Some(record) = record {
            metadata.insert("annotations".to_owned(), json!({ RECORD_ANNOTATION: record }));
        }
        let mut labels = Map::new();
        if let Some(kind) = kind_label {
            labels.insert(TERMINATING_LABEL.to_owned(), json!(kind));
        }
        if *exclude_from_load_balancers {
            labels.insert(EXCLUDE_LABEL.to_owned(), json!(""));
        }
        if !labels.is_empty() {
            metadata.insert("labels".to_owned(), Value::Object(labels));
        }
        let mut body = json!({ "apiVersion": "v1", "kind": "Node", "metadata": metadata });
        if *unschedulable {
            body["spec"] = json!({ "unschedulable": true });
        }
        body
    }
}

/// Why an apply was not taken.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApplyError {
    /// The record belongs to spotter's other mode.
    #[error("the node is held by {}", .0.as_str())]
    HeldBy(Manager),
    /// Another field manager (GitOps, a person) has set one of the fields to another value.
    #[error("owned by others: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    Conflict(Vec<FieldConflict>),
    /// The Node is not there, or its resourceVersion is not the given one.
    #[error("the node has changed or is gone")]
    Stale,
    /// The Node has another UID.
    #[error("another node has this name now")]
    WrongUid,
    #[error(transparent)]
    Other(#[from] Error),
}

impl Cluster {
    /// Reads the own Node.
    ///
    /// # Errors
    /// [`Error::is_not_found`], [`Error::is_forbidden`] (verb get), or no answer within `limit`.
    pub async fn node(&self, limit: Duration) -> Result<NodeFacts, Error> {
        let reply = self.exchange(Call::GetNode, Lane::Control, get_request(&self.0.node)?, limit).await?;
        read(self, &reply)
    }

    /// Applies `intent` server-side as `as_manager`: the claim, the record, the release.
    ///
    /// `attempt` 0 goes over the control connection, which carries nothing else. Repeats go over others, so that a
    /// dead connection that nobody has noticed yet does not hold up the claim.
    ///
    /// # Errors
    /// Where the server refuses it, why; the rest as [`ApplyError::Other`].
    pub async fn apply(
        &self,
        intent: &NodeIntent,
        as_manager: Manager,
        force: bool,
        attempt: u32,
        limit: Duration,
    ) -> Result<NodeFacts, ApplyError> {
        let params = PatchParams { force, ..PatchParams::apply(as_manager.as_str()) };
        let patch = Patch::Apply(intent.body(&self.0.node));
        let request = nodes().patch(&self.0.node, &params, &patch).map_err(unbuildable)?;
        let lane = if attempt == 0 { Lane::Control } else { Lane::Evictions };
        let reply = self.exchange(Call::ApplyNode, lane, request, limit).await?;
        if reply.is_success() {
            return Ok(facts(Call::ApplyNode, &reply)?);
        }
        let refused = refused(reply.code, &reply.status(), as_manager);
        Err(refused.unwrap_or_else(|| self.refusal(Call::ApplyNode, &reply).into()))
    }
}

/// The refusals that the claim answers to (tried on Kubernetes 1.37; the conflict is checked before the UID).
fn refused(code: u16, status: &Status, as_manager: Manager) -> Option<ApplyError> {
    match code {
        409 => {
            let conflicts: Vec<_> =
                status.causes().iter().filter(|cause| cause.reason == "FieldManagerConflict").collect();
            if conflicts.is_empty() {
                return status.causes().is_empty().then_some(ApplyError::Stale);
            }
            let other = as_manager.other();
            let conflicts: Vec<_> = conflicts
                .into_iter()
                .map(|cause| FieldConflict { field: cause.field.clone(), manager: quoted(&cause.message) })
                .collect();
            let held = |conflict: &FieldConflict| conflict.field == RECORD_FIELD && conflict.manager == other.as_str();
            Some(if conflicts.iter().any(held) { ApplyError::HeldBy(other) } else { ApplyError::Conflict(conflicts) })
        }
        422 => status.causes().iter().any(|cause| cause.field == "metadata.uid").then_some(ApplyError::WrongUid),
        _ => None,
    }
}

/// The first quoted words of `conflict with "kubectl-cordon" using v1`.
fn quoted(message: &str) -> String {
    message.split('"').nth(1).unwrap_or(message).to_owned()
}

fn nodes() -> Request {
    Request::new("/api/v1/nodes")
}

pub(super) fn get_request(node: &str) -> Result<Outgoing, Error> {
    nodes().get(node, &GetParams::default()).map_err(unbuildable)
}

/// The Node in an answer to a GET.
pub(super) fn read(cluster: &Cluster, reply: &Reply) -> Result<NodeFacts, Error> {
    if reply.is_success() { facts(Call::GetNode, reply) } else { Err(cluster.refusal(Call::GetNode, reply)) }
}

fn facts(call: Call, reply: &Reply) -> Result<NodeFacts, Error> {
    let malformed = |cause: String| Error::Malformed { verb: call.verb(), resource: call.resource(), cause };
    let node: RawNode = serde_json::from_slice(&reply.body).map_err(|error| malformed(error.to_string()))?;
    if node.metadata.uid.is_empty() {
        return Err(malformed("it is no Node".to_owned()));
    }
    Ok(node.facts())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conflict(causes: Value) -> Status {
        let body = json!({"kind": "Status", "status": "Failure", "reason": "Conflict", "code": 409,
            "message": "Apply failed", "details": {"causes": causes}});
        Status::read(body.to_string().as_bytes())
    }

    fn cause(manager: &str, field: &str) -> Value {
        json!({"reason": "FieldManagerConflict", "message": format!("conflict with \"{manager}\" using v1"), "field": field})
    }

    #[test]
    fn each_refusal_of_the_claim() {
        let by_queue =
            conflict(json!([cause("kubectl-cordon", ".spec.unschedulable"), cause("spotter-queue", RECORD_FIELD)]));
        assert!(matches!(refused(409, &by_queue, Manager::Agent), Some(ApplyError::HeldBy(Manager::Queue))));
        // A conflict with our own name on the record is none that we could follow.
        assert!(matches!(refused(409, &by_queue, Manager::Queue), Some(ApplyError::Conflict(all)) if all.len() == 2));

        let by_person = conflict(json!([cause("kubectl-annotate", RECORD_FIELD)]));
        let Some(ApplyError::Conflict(all)) = refused(409, &by_person, Manager::Agent) else { panic!() };
        assert_eq!(all, [FieldConflict { field: RECORD_FIELD.into(), manager: "kubectl-annotate".into() }]);

        let missing = br#"{"kind":"Status","status":"Failure","message":"Operation cannot be fulfilled on nodes \"n1\": uid mismatch: the provided object specified uid u, and no existing object was found","reason":"Conflict","details":{"name":"n1","kind":"nodes"},"code":409}"#;
        assert!(matches!(refused(409, &Status::read(missing), Manager::Agent), Some(ApplyError::Stale)));

        let uid = br#"{"kind":"Status","status":"Failure","message":"Node \"n1\" is invalid","reason":"Invalid","details":{"name":"n1","kind":"Node","causes":[{"reason":"FieldValueInvalid","message":"Invalid value","field":"metadata.uid"}]},"code":422}"#;
        assert!(matches!(refused(422, &Status::read(uid), Manager::Agent), Some(ApplyError::WrongUid)));
        assert!(refused(422, &Status::default(), Manager::Agent).is_none());
        assert!(refused(500, &Status::default(), Manager::Agent).is_none());
    }

    #[test]
    fn the_body_is_the_intent_and_nothing_else() {
        assert_eq!(
            NodeIntent::default().body("n1"),
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
        );
        let whole = NodeIntent {
            uid: Some("u".into()),
            resource_version: Some("5".into()),
            record: Some("{}".into()),
            unschedulable: true,
            kind_label: Some("manual"),
            exclude_from_load_balancers: true,
        };
        assert_eq!(
            whole.body("n1"),
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "uid": "u", "resourceVersion": "5",
                "annotations": {"spotter.dev/termination": "{}"},
                "labels": {"spotter.dev/terminating": "manual", "node.kubernetes.io/exclude-from-external-load-balancers": ""}},
                "spec": {"unschedulable": true}})
        );
    }
}

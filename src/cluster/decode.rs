//! Objects as far as they are needed: nothing else of them is ever built, however large they are.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use jiff::Timestamp;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};

use super::node::{NodeFacts, Ready};
use crate::{
    clock::Clock,
    plan::{Owner, PodFacts, PodUid},
};

/// Of all annotations only these are kept, by the rest of their keys.
const PREFIX: &str = "spotter.dev/";
const MIRROR: &str = "kubernetes.io/config.mirror";
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";
/// What the API server itself fills in where a pod says nothing.
const DEFAULT_GRACE_SECONDS: u32 = 30;

/// Annotations, filtered while they are read.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) ours: BTreeMap<String, String>,
    pub(super) mirror: bool,
    /// The bookmark that ends a streaming list.
    pub(super) list_end: bool,
}

impl<'de> Deserialize<'de> for Notes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Filter;
        impl<'de> Visitor<'de> for Filter {
            type Value = Notes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of annotations")
            }

            fn visit_unit<E>(self) -> Result<Notes, E> {
                Ok(Notes::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Notes, A::Error> {
                let mut notes = Notes::default();
                while let Some(key) = map.next_key::<Cow<'_, str>>()? {
                    if let Some(rest) = key.strip_prefix(PREFIX) {
                        let value = map.next_value::<String>()?;
                        notes.ours.insert(rest.to_owned(), value);
                        continue;
                    }
                    map.next_value::<IgnoredAny>()?;
                    notes.mirror |= key == MIRROR;
                    notes.list_end |= key == INITIAL_EVENTS_END;
                }
                Ok(notes)
            }
        }
        deserializer.deserialize_any(Filter)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Metadata {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) uid: String,
    pub(super) resource_version: String,
    deletion_timestamp: Option<Timestamp>,
    pub(super) annotations: Notes,
    owner_references: Option<Vec<OwnerReference>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OwnerReference {
    kind: String,
    controller: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Condition {
    r#type: String,
    status: String,
    last_transition_time: Option<Timestamp>,
}

/// A Pod.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawPod {
    pub(super) metadata: Metadata,
    spec: PodSpec,
    status: PodStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodSpec {
    termination_grace_period_seconds: Option<i64>,
    priority: Option<i32>,
    volumes: Option<Vec<Volume>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Volume {
    empty_dir: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PodStatus {
    phase: String,
    conditions: Option<Vec<Condition>>,
}

impl RawPod {
    pub(super) fn facts(self, clock: &Clock) -> PodFacts {
        let Self { metadata, spec, status } = self;
        let grace = spec
            .termination_grace_period_seconds
            .map_or(DEFAULT_GRACE_SECONDS, |seconds| u32::try_from(seconds.max(0)).unwrap_or(u32::MAX));
        let conditions = status.conditions.unwrap_or_default();
        PodFacts {
            uid: PodUid(metadata.uid),
            namespace: metadata.namespace,
            name: metadata.name,
            owner: owner(metadata.owner_references.unwrap_or_default()),
            mirror: metadata.annotations.mirror,
            has_empty_dir: spec.volumes.unwrap_or_default().iter().any(|volume| volume.empty_dir.is_some()),
            finished: matches!(status.phase.as_str(), "Succeeded" | "Failed"),
            ready: conditions.iter().any(|condition| condition.r#type == "Ready" && condition.status == "True"),
            grace_seconds: grace,
            priority: spec.priority.unwrap_or_default(),
            terminating_until: metadata.deletion_timestamp.map(|at| clock.moment(at)),
            annotations: metadata.annotations.ours,
        }
    }
}

fn owner(references: Vec<OwnerReference>) -> Owner {
    match references.into_iter().find(|reference| reference.controller == Some(true)) {
        None => Owner::None,
        Some(reference) => match reference.kind.as_str() {
            "Node" => Owner::Node,
            "DaemonSet" => Owner::DaemonSet,
            _ => Owner::Controller(reference.kind),
        },
    }
}

/// A Node.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawNode {
    pub(super) metadata: Metadata,
    spec: NodeSpec,
    status: NodeStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct NodeSpec {
    #[serde(rename = "providerID")]
    provider_id: String,
    unschedulable: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct NodeStatus {
    conditions: Option<Vec<Condition>>,
    node_info: NodeInfo,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct NodeInfo {
    #[serde(rename = "bootID")]
    boot_id: String,
}

impl RawNode {
    pub(super) fn facts(self) -> NodeFacts {
        let Self { metadata, spec, status } = self;
        let ready = status.conditions.unwrap_or_default().into_iter().find(|condition| condition.r#type == "Ready");
        NodeFacts {
            name: metadata.name,
            uid: metadata.uid,
            resource_version: metadata.resource_version,
            provider_id: spec.provider_id,
            unschedulable: spec.unschedulable.unwrap_or_default(),
            ready: ready
                .and_then(|ready| Some(Ready { ready: ready.status == "True", since: ready.last_transition_time? })),
            boot_id: status.node_info.boot_id,
            annotations: metadata.annotations.ours,
        }
    }
}

/// A list whose items are read one by one where they cannot be read together: one bad object hides no other.
#[derive(Debug)]
pub(super) struct PodList {
    pub(super) resource_version: String,
    pub(super) pods: Vec<RawPod>,
    /// What could not be read, in words.
    pub(super) malformed: Vec<String>,
}

impl PodList {
    pub(super) fn read(body: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct List<T> {
            #[serde(default)]
            metadata: Metadata,
            items: Option<Vec<T>>,
        }
        if let Ok(list) = serde_json::from_slice::<List<RawPod>>(body) {
            return Ok(Self {
                resource_version: list.metadata.resource_version,
                pods: list.items.unwrap_or_default(),
                malformed: Vec::new(),
            });
        }
        let list = serde_json::from_slice::<List<serde_json::Value>>(body)?;
        let mut pods = Vec::new();
        let mut malformed = Vec::new();
        for item in list.items.unwrap_or_default() {
            let name = item.pointer("/metadata/name").and_then(serde_json::Value::as_str).unwrap_or("?").to_owned();
            match serde_json::from_value(item) {
                Ok(pod) => pods.push(pod),
                Err(error) => malformed.push(format!("pod {name} cannot be read: {error}")),
            }
        }
        Ok(Self { resource_version: list.metadata.resource_version, pods, malformed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Moment;

    const POD: &str = r#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":"web-0","namespace":"shop","uid":"u-1",
        "resourceVersion":"12","deletionTimestamp":"2030-01-01T00:00:00Z","deletionGracePeriodSeconds":30,
        "labels":{"app":"web"},"annotations":{"spotter.dev/evict":"last","other/huge":"…","kubernetes.io/config.mirror":"x"},
        "ownerReferences":[{"apiVersion":"v1","kind":"Foo","name":"f","uid":"z"},
          {"apiVersion":"apps/v1","kind":"StatefulSet","name":"web","uid":"o","controller":true}],
        "managedFields":[{"manager":"m","fieldsV1":{"f:metadata":{}}}]},
        "spec":{"volumes":[{"name":"a","emptyDir":{}},{"name":"b","secret":{}}],"terminationGracePeriodSeconds":45,
          "priority":1000,"containers":[{"name":"c"}]},
        "status":{"phase":"Running","conditions":[{"type":"Ready","status":"True","lastTransitionTime":null}]}}"#;

    #[test]
    fn a_pod_is_read_as_far_as_a_drain_needs_it() {
        let clock = Clock::new();
        let facts = serde_json::from_str::<RawPod>(POD).unwrap().facts(&clock);
        assert_eq!(facts.full_name(), "shop/web-0");
        assert_eq!(facts.uid, PodUid("u-1".into()));
        assert_eq!(facts.owner, Owner::Controller("StatefulSet".into()));
        assert!(facts.mirror && facts.has_empty_dir && facts.ready && !facts.finished);
        assert_eq!((facts.grace_seconds, facts.priority), (45, 1000));
        assert!(facts.terminating_until.unwrap() > Moment(clock.now().0));
        assert_eq!(facts.annotations, BTreeMap::from([("evict".to_owned(), "last".to_owned())]));
    }

    #[test]
    fn a_bare_pod_gets_the_servers_defaults() {
        let facts = serde_json::from_str::<RawPod>(
            r#"{"metadata":{"annotations":null,"ownerReferences":null},"spec":{"volumes":null},"status":{"phase":"Failed"}}"#,
        )
        .unwrap()
        .facts(&Clock::new());
        assert_eq!((facts.owner, facts.grace_seconds, facts.priority), (Owner::None, 30, 0));
        assert!(facts.finished && !facts.ready && !facts.has_empty_dir && facts.terminating_until.is_none());
    }

    #[test]
    fn owners_that_matter() {
        let owner_of = |kind: &str, controller: bool| {
            owner(vec![OwnerReference { kind: kind.to_owned(), controller: Some(controller) }])
        };
        assert_eq!(owner_of("Node", true), Owner::Node);
        assert_eq!(owner_of("DaemonSet", true), Owner::DaemonSet);
        assert_eq!(owner_of("DaemonSet", false), Owner::None);
    }

    #[test]
    fn a_node_is_read_as_far_as_needed() {
        let node = r#"{"metadata":{"name":"n1","uid":"nu","resourceVersion":"7","labels":{"spotter.dev/terminating":"manual","a":"b"},
            "annotations":{"spotter.dev/termination":"{}","spotter.dev/response":"ignore","volumes.kubernetes.io/x":"true"}},
            "spec":{"providerID":"aws:///eu-central-1a/i-1","unschedulable":true,"taints":[]},
            "status":{"conditions":[{"type":"MemoryPressure","status":"False"},
              {"type":"Ready","status":"False","lastTransitionTime":"2026-11-23T00:00:00Z"}],
              "nodeInfo":{"bootID":"b-1"},"images":[{"names":["a"]}]}}"#;
        let facts = serde_json::from_str::<RawNode>(node).unwrap().facts();
        assert_eq!((facts.name.as_str(), facts.uid.as_str(), facts.resource_version.as_str()), ("n1", "nu", "7"));
        assert_eq!((facts.provider_id.as_str(), facts.boot_id.as_str()), ("aws:///eu-central-1a/i-1", "b-1"));
        assert!(facts.unschedulable && !facts.ready.unwrap().ready);
        assert_eq!(facts.record(), Some("{}"));
        assert_eq!(facts.annotations.len(), 2);
    }

    #[test]
    fn one_bad_pod_does_not_hide_the_list() {
        let list = format!(
            r#"{{"metadata":{{"resourceVersion":"9"}},"items":[{POD},{{"metadata":{{"name":"bad","uid":7}}}}]}}"#
        );
        let list = PodList::read(list.as_bytes()).unwrap();
        assert_eq!((list.resource_version.as_str(), list.pods.len(), list.malformed.len()), ("9", 1, 1));
        assert!(list.malformed[0].contains("bad"));
        assert!(PodList::read(b"<html>").is_err());
    }
}

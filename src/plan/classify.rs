//! Each pod is judged alone: nothing about one pod stops the others (peer fault F32).

use crate::plan::{Owner, PodFacts};

/// What to do with pods that lose something when they are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    Evict,
    Skip,
}

/// What an operator chose about pods that are not plain.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Pods with an `emptyDir` volume: its data is lost with the machine anyway.
    pub empty_dir: Treatment,
    /// Pods without a controller: nobody makes them again, and the machine takes them anyway.
    pub unmanaged: Treatment,
    /// Namespace and name of the pod that runs this process.
    pub own_pod: Option<(String, String)>,
}

/// Why a pod is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skip {
    /// The kubelet runs it from a file; the API server has only its picture.
    Mirror,
    /// Its controller would put it back at once.
    DaemonSet,
    /// It is the pod that is doing the draining.
    OwnPod,
    /// Its containers have ended.
    Finished,
    /// `spotter.dev/evict: never`.
    Annotated,
    EmptyDir,
    Unmanaged,
}

impl Skip {
    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mirror => "mirror pod",
            Self::DaemonSet => "owned by a DaemonSet",
            Self::OwnPod => "this process runs in it",
            Self::Finished => "finished",
            Self::Annotated => "annotated spotter.dev/evict=never",
            Self::EmptyDir => "has an emptyDir volume (drain-empty-dir=skip)",
            Self::Unmanaged => "has no controller (drain-unmanaged=skip)",
        }
    }
}

/// In which order evictions are sent. All are sent at once; the order counts where requests in flight are limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    First,
    Normal,
    Last,
}

/// What is to be done with a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Skip(Skip),
    Evict(Tier),
}

/// A verdict, and what a person should know about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classified {
    pub verdict: Verdict,
    /// The value of `spotter.dev/evict` where it is none of the known words.
    pub bad_annotation: Option<String>,
}

/// Judges one pod.
pub fn classify(pod: &PodFacts, rules: &Rules) -> Classified {
    let (tier, never, bad_annotation) = match pod.annotations.get("evict").map(String::as_str) {
        None => (Tier::Normal, false, None),
        Some("first") => (Tier::First, false, None),
        Some("last") => (Tier::Last, false, None),
        Some("never") => (Tier::Normal, true, None),
        Some(other) => (Tier::Normal, false, Some(other.to_owned())),
    };
    let own = rules.own_pod.as_ref().is_some_and(|(namespace, name)| *namespace == pod.namespace && *name == pod.name);
    let skip = if pod.mirror || pod.owner == Owner::Node {
        Some(Skip::Mirror)
    } else if pod.owner == Owner::DaemonSet {
        Some(Skip::DaemonSet)
    } else if own {
        Some(Skip::OwnPod)
    } else if pod.finished {
        Some(Skip::Finished)
    } else if never {
        Some(Skip::Annotated)
    } else if pod.has_empty_dir && rules.empty_dir == Treatment::Skip {
        Some(Skip::EmptyDir)
    } else if pod.owner == Owner::None && rules.unmanaged == Treatment::Skip {
        Some(Skip::Unmanaged)
    } else {
        None
    };
    Classified { verdict: skip.map_or(Verdict::Evict(tier), Verdict::Skip), bad_annotation }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::plan::PodUid;

    pub(crate) fn pod(name: &str) -> PodFacts {
        PodFacts {
            uid: PodUid(format!("uid-{name}")),
            namespace: "shop".into(),
            name: name.into(),
            owner: Owner::Controller("ReplicaSet".into()),
            mirror: false,
            has_empty_dir: false,
            finished: false,
            ready: true,
            grace_seconds: 30,
            priority: 0,
            terminating_until: None,
            annotations: BTreeMap::new(),
        }
    }

    pub(crate) fn rules() -> Rules {
        Rules {
            empty_dir: Treatment::Evict,
            unmanaged: Treatment::Evict,
            own_pod: Some(("kube-system".into(), "spotter-x".into())),
        }
    }

    fn annotated(value: &str) -> PodFacts {
        PodFacts { annotations: BTreeMap::from([("evict".into(), value.into())]), ..pod("a") }
    }

    #[test]
    fn f32_every_pod_is_judged_alone() {
        let plain = rules();
        let careful = Rules { empty_dir: Treatment::Skip, unmanaged: Treatment::Skip, ..rules() };
        let cases = [
            (pod("a"), &plain, Verdict::Evict(Tier::Normal)),
            (PodFacts { mirror: true, ..pod("a") }, &plain, Verdict::Skip(Skip::Mirror)),
            (PodFacts { owner: Owner::Node, ..pod("a") }, &plain, Verdict::Skip(Skip::Mirror)),
            (PodFacts { owner: Owner::DaemonSet, ..pod("a") }, &plain, Verdict::Skip(Skip::DaemonSet)),
            (PodFacts { owner: Owner::None, ..pod("a") }, &plain, Verdict::Evict(Tier::Normal)),
            (PodFacts { owner: Owner::None, ..pod("a") }, &careful, Verdict::Skip(Skip::Unmanaged)),
            (PodFacts { has_empty_dir: true, ..pod("a") }, &plain, Verdict::Evict(Tier::Normal)),
            (PodFacts { has_empty_dir: true, ..pod("a") }, &careful, Verdict::Skip(Skip::EmptyDir)),
            (PodFacts { finished: true, ..pod("a") }, &plain, Verdict::Skip(Skip::Finished)),
            (PodFacts { namespace: "kube-system".into(), ..pod("spotter-x") }, &plain, Verdict::Skip(Skip::OwnPod)),
            (pod("spotter-x"), &plain, Verdict::Evict(Tier::Normal)),
            (annotated("never"), &plain, Verdict::Skip(Skip::Annotated)),
            (annotated("first"), &plain, Verdict::Evict(Tier::First)),
            (annotated("last"), &plain, Verdict::Evict(Tier::Last)),
            (annotated("Never"), &plain, Verdict::Evict(Tier::Normal)),
        ];
        for (pod, rules, expected) in cases {
            assert_eq!(classify(&pod, rules).verdict, expected, "{pod:?}");
        }
        assert_eq!(classify(&annotated("Never"), &plain).bad_annotation.as_deref(), Some("Never"));
    }
}

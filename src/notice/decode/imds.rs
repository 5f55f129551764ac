//! The bodies of the instance metadata service.
//!
//! [`spot`] and [`rebalance`] read one document each; [`maintenance`] reads the list of scheduled events and its
//! history; [`lifecycle`] follows the word that Auto Scaling shows. The shapes are those of the AWS pages
//! "Spot Instance interruption notices", "EC2 instance rebalance recommendations" and "Instance metadata categories".

pub mod lifecycle;
pub mod maintenance;

use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value};

use super::super::{Deadline, InstanceId, Kind, Notice, NoticeId, Source};

/// The id of the one interruption notice that an instance can have.
pub const SPOT_ID: &str = "spot-interruption";
/// The id of the one rebalance recommendation that an instance can have.
pub const REBALANCE_ID: &str = "rebalance-recommendation";
/// The id of the one Auto Scaling termination that an instance can have.
pub const ASG_ID: &str = "asg-termination";

/// What is assumed to be left of the two minutes where the body does not say when they end: 120 s, less the time
/// that the notice may have been readable before it was read (a poll and its retries).
const ASSUMED_LEFT: SignedDuration = SignedDuration::from_secs(115);

/// Longest text of others that goes into [`Notice::detail`], in characters: it ends up in an annotation and in logs.
const DETAIL_CHARS: usize = 200;

/// Why a body is no answer of the metadata service at all. It never stands for "no notice".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable(pub String);

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unreadable {}

/// A notice, and what was wrong with its text where something was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    pub notice: Notice,
    /// Names the field, for a person. A notice with a flaw is still a notice.
    pub warning: Option<String>,
}

/// Reads `spot/instance-action`: `{"action":"terminate","time":"2026-11-20T08:17:02Z"}`.
///
/// A document with either field is a notice, whatever the other one looks like: a lost interruption costs more than
/// a needless drain. AWS does not say when it gave the notice, so it is taken to be given at `seen_at`.
/// Hibernation begins at once, without the two minutes ("Hibernate interrupted Spot Instances").
pub fn spot(body: &str, seen_at: Timestamp, instance: &InstanceId) -> Result<Decoded, Unreadable> {
    let document = object(body)?;
    if !document.contains_key("action") && !document.contains_key("time") {
        return Err(Unreadable("a JSON object without `action` and `time`".into()));
    }
    let mut flaws = Vec::new();
    let action = match document.get("action").and_then(Value::as_str) {
        Some(action) if !action.trim().is_empty() => words(action),
        _ => {
            flaws.push("`action` is missing or not a word: taken as a termination".to_owned());
            "unknown".to_owned()
        }
    };
    let deadline = if action == "hibernate" {
        seen_at
    } else {
        time(&document, "time").unwrap_or_else(|flaw| {
            flaws.push(format!("{flaw}: {} s are assumed to be left", ASSUMED_LEFT.as_secs()));
            seen_at.saturating_add(ASSUMED_LEFT).unwrap_or(seen_at)
        })
    };
    let notice = Notice {
        id: NoticeId(SPOT_ID.into()),
        kind: Kind::SpotInterruption,
        instance: instance.clone(),
        source: Source::Imds,
        noticed_at: seen_at,
        deadline: Deadline::Hard(deadline),
        maintenance: None,
        detail: action,
    };
    Ok(Decoded { notice, warning: join(&flaws) })
}

/// Reads `events/recommendations/rebalance`: `{"noticeTime":"2026-11-20T08:10:40Z"}`.
///
/// A time in the future is our clock's fault or a mistake: the notice counts from `seen_at`.
pub fn rebalance(body: &str, seen_at: Timestamp, instance: &InstanceId) -> Result<Decoded, Unreadable> {
    let document = object(body)?;
    if !document.contains_key("noticeTime") {
        return Err(Unreadable("a JSON object without `noticeTime`".into()));
    }
    let (noticed_at, warning) = match time(&document, "noticeTime") {
        Ok(at) => (at.min(seen_at), None),
        Err(flaw) => (seen_at, Some(format!("{flaw}: counted from the moment it was seen"))),
    };
    let notice = Notice {
        id: NoticeId(REBALANCE_ID.into()),
        kind: Kind::RebalanceRecommendation,
        instance: instance.clone(),
        source: Source::Imds,
        noticed_at,
        deadline: Deadline::SoftByGrace,
        maintenance: None,
        detail: "rebalance recommendation".into(),
    };
    Ok(Decoded { notice, warning })
}

fn object(body: &str) -> Result<Map<String, Value>, Unreadable> {
    match parse(body)? {
        Value::Object(document) => Ok(document),
        other => Err(Unreadable(format!("{} where a JSON object was expected", shape(&other)))),
    }
}

fn parse(body: &str) -> Result<Value, Unreadable> {
    let body = body.trim();
    if body.is_empty() {
        return Err(Unreadable("an empty body".into()));
    }
    serde_json::from_str(body).map_err(|error| {
        let begins: String = body.chars().filter(|c| !c.is_control()).take(40).collect();
        Unreadable(format!("not JSON ({error}); it begins `{begins}`"))
    })
}

/// A time field of a document: RFC 3339, with any offset. The error is a clause that names the field.
fn time(document: &Map<String, Value>, field: &str) -> Result<Timestamp, String> {
    match document.get(field) {
        None => Err(format!("`{field}` is missing")),
        Some(Value::String(text)) => {
            text.trim().parse().map_err(|_| format!("`{field}` is not a time: `{}`", words(text)))
        }
        Some(other) => Err(format!("`{field}` is {}, not a time", shape(other))),
    }
}

fn shape(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Text of others, fit for one line of a log or an annotation.
fn words(text: &str) -> String {
    let line: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).take(DETAIL_CHARS).collect();
    line.trim_end().to_owned()
}

fn join(flaws: &[String]) -> Option<String> {
    (!flaws.is_empty()).then(|| flaws.join("; "))
}

#[cfg(test)]
mod tests;

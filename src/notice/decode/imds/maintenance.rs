//! The lists under `events/maintenance/scheduled` and `events/maintenance/history`.
//!
//! Source: "Scheduled events for your instances" (Amazon EC2 user guide). Both lists have one shape:
//! `[{"NotBefore":"21 Jan 2019 09:00:43 GMT","Code":"system-reboot","Description":"…","EventId":"instance-event-…",
//! "NotAfter":"…","State":"active"}]`.

use std::collections::BTreeMap;

use jiff::{Timestamp, fmt::rfc2822};
use serde_json::{Map, Value};

use super::{Unreadable, parse, shape, words};
use crate::notice::{Deadline, InstanceId, Kind, MaintenanceCode, Notice, NoticeId, Source, Withdrawal};

/// What one entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// It will happen.
    Open(Notice),
    /// It is over, or will not happen.
    Ended(Withdrawal),
    /// It is there, but what it says is not clear: a warning tells.
    Unclear,
}

/// A list, entry by entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Events {
    /// Every entry that has an id. Of two with one id the last one counts.
    pub entries: BTreeMap<NoticeId, Entry>,
    /// One clause for each flaw, naming the event and the field.
    pub warnings: Vec<String>,
}

/// Reads either list. Each entry is judged alone: a bad one never hides another.
pub fn maintenance(body: &str, seen_at: Timestamp, instance: &InstanceId) -> Result<Events, Unreadable> {
    let list = match parse(body)? {
        Value::Array(list) => list,
        other => return Err(Unreadable(format!("{} where a JSON array was expected", shape(&other)))),
    };
    let mut events = Events::default();
    for (number, entry) in (1..).zip(&list) {
        let Value::Object(fields) = entry else {
            events.warnings.push(format!("entry {number} is {}, not an event", shape(entry)));
            continue;
        };
        let Some(id) = text(fields, "EventId") else {
            events.warnings.push(format!("entry {number} has no `EventId`"));
            continue;
        };
        let id = NoticeId(id);
        let entry = entry_of(&id, fields, seen_at, instance, &mut events.warnings);
        events.entries.insert(id, entry);
    }
    Ok(events)
}

fn entry_of(
    id: &NoticeId,
    fields: &Map<String, Value>,
    seen_at: Timestamp,
    instance: &InstanceId,
    warnings: &mut Vec<String>,
) -> Entry {
    let description = text(fields, "Description").unwrap_or_default();
    let state = text(fields, "State");
    if let Some(why) = ended(state.as_deref(), &description) {
        return Entry::Ended(why);
    }
    // What is listed is planned: a state that says neither "over" nor "off" is taken as active.
    if !state.as_deref().is_some_and(|state| state.eq_ignore_ascii_case("active")) {
        let state = state.unwrap_or_default();
        warnings.push(format!("event {id}: `State` is `{state}`, not a known word: taken as active"));
    }
    let Some(code) = text(fields, "Code") else {
        warnings.push(format!("event {id}: `Code` is missing: ignored"));
        return Entry::Unclear;
    };
    let not_before = text(fields, "NotBefore").unwrap_or_default();
    let Some(start) = date(&not_before) else {
        warnings.push(format!("event {id}: `NotBefore` is missing or not a date: `{not_before}`: ignored"));
        return Entry::Unclear;
    };
    let detail = if description.is_empty() { code.clone() } else { words(&format!("{code}: {description}")) };
    Entry::Open(Notice {
        id: id.clone(),
        kind: Kind::ScheduledMaintenance,
        instance: instance.clone(),
        source: Source::Imds,
        noticed_at: seen_at,
        deadline: Deadline::Soft(start),
        maintenance: Some(MaintenanceCode::parse(&code)),
        detail,
    })
}

/// The state says that it is over, or the description begins with it in brackets.
fn ended(state: Option<&str>, description: &str) -> Option<Withdrawal> {
    let in_brackets = description.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(word, _)| word);
    [state, in_brackets].into_iter().flatten().find_map(|word| match word.to_ascii_lowercase().as_str() {
        "completed" => Some(Withdrawal::Completed),
        "canceled" | "cancelled" => Some(Withdrawal::Cancelled),
        _ => None,
    })
}

/// A field that is text and not empty, as one line.
fn text(fields: &Map<String, Value>, name: &str) -> Option<String> {
    fields.get(name).and_then(Value::as_str).map(words).filter(|text| !text.is_empty())
}

/// `21 Jan 2019 09:00:43 GMT`, with or without a weekday and a leading zero; RFC 3339 is taken too.
fn date(text: &str) -> Option<Timestamp> {
    static PARSER: rfc2822::DateTimeParser = rfc2822::DateTimeParser::new().relaxed_weekday(true);
    PARSER.parse_timestamp(text).ok().or_else(|| text.parse().ok())
}

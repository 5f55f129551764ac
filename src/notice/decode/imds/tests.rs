//! The fixtures under `fixtures/imds`, and text of any kind.

use proptest::prelude::*;
use serde_json::json;

use super::{
    lifecycle::target_state,
    maintenance::{Entry, maintenance},
    *,
};
use crate::notice::{MaintenanceCode, Withdrawal};

fn instance() -> InstanceId {
    InstanceId::parse("i-0a1b2c3d4e5f60718").unwrap()
}

fn seen_at() -> Timestamp {
    "2026-11-20T08:15:03Z".parse().unwrap()
}

/// What was made of a body, in the words of the fixtures.
fn outcome(path: &str, body: &str) -> Value {
    let one = |decoded: Result<Decoded, Unreadable>| match decoded {
        Ok(Decoded { notice, warning }) => json!({ "notice": notice, "warning": warning }),
        Err(error) => json!({ "error": error.to_string() }),
    };
    match path {
        "spot" => one(spot(body, seen_at(), &instance())),
        "rebalance" => one(rebalance(body, seen_at(), &instance())),
        "asg" => match target_state(body) {
            Ok(state) => json!({ "state": state.to_string() }),
            Err(error) => json!({ "error": error.to_string() }),
        },
        "maintenance" => match maintenance(body, seen_at(), &instance()) {
            Ok(events) => json!({
                "entries": events.entries.iter().map(|(id, entry)| (id.0.clone(), match entry {
                    Entry::Open(notice) => json!({ "open": notice }),
                    Entry::Ended(why) => json!({ "ended": why }),
                    Entry::Unclear => json!("unclear"),
                })).collect::<Map<_, _>>(),
                "warnings": events.warnings,
            }),
            Err(error) => json!({ "error": error.to_string() }),
        },
        other => panic!("no decoder for `{other}`"),
    }
}

/// Each fixture holds the path, the body as it came, and what is to be made of it.
#[test]
fn every_fixture_has_its_outcome() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/imds");
    let mut seen = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let file = file.unwrap().path();
        let fixture: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        let (path, body) = (fixture["path"].as_str().unwrap(), fixture["body"].as_str().unwrap());
        let made = outcome(path, body);
        assert_eq!(made, fixture["outcome"], "{}: {made:#}", file.display());
        seen += 1;
    }
    assert!(seen >= 30, "only {seen} fixtures were found");
}

#[test]
fn a_hibernation_has_no_two_minutes() {
    let decoded = spot(r#"{"action":"hibernate","time":"2026-11-20T08:17:02Z"}"#, seen_at(), &instance()).unwrap();
    assert_eq!(decoded.notice.deadline, Deadline::Hard(seen_at()));
}

#[test]
fn dates_of_the_scheduled_events() {
    for (text, at) in [
        ("21 Jan 2019 09:00:43 GMT", "2019-01-21T09:00:43Z"),
        ("4 Dec 2026 09:00:43 GMT", "2026-12-04T09:00:43Z"),
        ("04 Dec 2026 09:00:43 GMT", "2026-12-04T09:00:43Z"),
        ("Fri, 4 Dec 2026 09:00:43 GMT", "2026-12-04T09:00:43Z"),
        ("2026-12-04T09:00:43Z", "2026-12-04T09:00:43Z"),
    ] {
        let body = json!([{"NotBefore": text, "Code": "system-reboot", "EventId": "e", "State": "active"}]).to_string();
        let events = maintenance(&body, seen_at(), &instance()).unwrap();
        let Some(Entry::Open(notice)) = events.entries.get(&NoticeId("e".into())) else { panic!("{text}: {events:?}") };
        assert_eq!(notice.deadline, Deadline::Soft(at.parse().unwrap()), "{text}");
        assert_eq!(notice.maintenance, Some(MaintenanceCode::SystemReboot));
    }
}

#[test]
fn a_long_description_is_cut() {
    let description = "\u{1F980}\n".repeat(5_000);
    let body = json!([{"NotBefore": "4 Dec 2026 09:00:43 GMT", "Code": "x", "EventId": "e", "State": "active",
        "Description": description}])
    .to_string();
    let events = maintenance(&body, seen_at(), &instance()).unwrap();
    let Some(Entry::Open(notice)) = events.entries.get(&NoticeId("e".into())) else { panic!("{events:?}") };
    assert!(notice.detail.chars().count() <= DETAIL_CHARS && !notice.detail.contains('\n'));
    assert_eq!(notice.maintenance, Some(MaintenanceCode::Other("x".into())));
}

fn any_word() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
        Just(json!(["x"])),
        Just(json!("active")),
        Just(json!("canceled")),
        Just(json!("9999-12-31T23:59:59Z")),
        Just(json!("-009999-01-02T00:00:00Z")),
        Just(json!("31 Dec 9999 23:59:59 GMT")),
    ]
}

proptest! {
    #[test]
    fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let body = String::from_utf8_lossy(&bytes);
        for path in ["spot", "rebalance", "asg", "maintenance"] {
            let _ = outcome(path, &body);
        }
    }

    /// A document with either field is never lost, whatever is in it and whenever it is read.
    #[test]
    fn an_interruption_is_never_lost(
        action in proptest::option::of(any_word()),
        time in any_word(),
        second in -377_705_023_201i64..=253_402_207_200,
    ) {
        let at = Timestamp::from_second(second).unwrap();
        let mut document = json!({ "time": time });
        if let Some(action) = action {
            document["action"] = action;
        }
        let decoded = spot(&document.to_string(), at, &instance()).unwrap();
        prop_assert!(decoded.notice.deadline.is_hard());
        prop_assert!(decoded.notice.detail.chars().count() <= DETAIL_CHARS);
    }

    #[test]
    fn entries_are_judged_one_by_one(
        junk in proptest::collection::vec((any_word(), any_word(), any_word(), any_word()), 0..6),
        place in 0usize..6,
    ) {
        let mut list: Vec<Value> = junk
            .into_iter()
            .map(|(id, code, start, state)| json!({"EventId": id, "Code": code, "NotBefore": start, "State": state}))
            .collect();
        list.insert(place.min(list.len()), json!({"EventId": "instance-event-good-and-long-enough", "State": "active",
            "Code": "instance-stop", "NotBefore": "4 Dec 2026 09:00:43 GMT"}));
        let events = maintenance(&Value::Array(list).to_string(), seen_at(), &instance()).unwrap();
        let good = events.entries.get(&NoticeId("instance-event-good-and-long-enough".into()));
        let stays = matches!(good, Some(Entry::Open(_)));
        prop_assert!(stays);
    }

    #[test]
    fn ends_are_told_apart(state in "[Cc]ancell?ed|[Cc]ompleted") {
        let body = json!([{"EventId": "e", "State": state}]).to_string();
        let events = maintenance(&body, seen_at(), &instance()).unwrap();
        let why = if state.to_lowercase() == "completed" { Withdrawal::Completed } else { Withdrawal::Cancelled };
        prop_assert_eq!(events.entries.get(&NoticeId("e".into())), Some(&Entry::Ended(why)));
    }
}

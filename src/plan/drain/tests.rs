//! Tables and properties of the drain, on a virtual clock.

mod again;
mod world;

use std::collections::BTreeMap;

use super::*;
use crate::plan::{
    Owner,
    classify::tests::{pod, rules},
};

const START: u64 = 10_000;

fn s(seconds: u64) -> Moment {
    ms(seconds * 1000)
}

fn ms(millis: u64) -> Moment {
    Moment(Duration::from_millis(START * 1000 + millis))
}

fn settings() -> Settings {
    Settings { rules: rules(), margin: Duration::from_secs(2), at_deadline: AtDeadline::Auto, max_in_flight: 110 }
}

fn graceful(name: &str, grace_seconds: u32) -> PodFacts {
    PodFacts { grace_seconds, ..pod(name) }
}

fn hard(at: u64) -> Drain {
    Drain::new(settings(), Limit::Hard(s(at)), s(0))
}

fn uid(name: &str) -> PodUid {
    PodUid(format!("uid-{name}"))
}

fn answer(drain: &mut Drain, name: &str, ask: Ask, answer: Answer, now: Moment) -> Vec<Effect> {
    drain.step(Input::Answered { pod: uid(name), ask, answer }, now)
}

fn budget() -> Answer {
    Answer::Budget {
        message: "The disruption budget b0 does not allow evicting pods currently".into(),
        retry_after: None,
    }
}

/// `evict a 30`, `delete a 10`: the requests among the effects.
fn requests(effects: &[Effect]) -> Vec<String> {
    let grace = |seconds: Option<u32>| seconds.map_or("own".into(), |seconds| seconds.to_string());
    let words = effects.iter().filter_map(|effect| match effect {
        Effect::Evict { pod, grace_seconds } => Some(format!("evict {} {}", pod.name, grace(*grace_seconds))),
        Effect::Delete { pod, grace_seconds, .. } => Some(format!("delete {} {grace_seconds}", pod.name)),
        Effect::Note(_) => None,
    });
    words.collect()
}

fn news(effects: &[Effect]) -> Vec<&News> {
    effects.iter().filter_map(|e| if let Effect::Note(note) = e { Some(&note.news) } else { None }).collect()
}

#[test]
fn all_pods_are_asked_at_once_in_order_of_tier_priority_and_need() {
    let tier =
        |name, word: &str| PodFacts { annotations: BTreeMap::from([("evict".into(), word.into())]), ..pod(name) };
    let critical = PodFacts { priority: 2_000_000_000, ..pod("critical") };
    let list = vec![tier("last", "last"), critical, pod("plain"), graceful("slow", 100), tier("first", "first")];
    let effects = hard(120).step(Input::Listed(list), s(0));
    assert_eq!(
        requests(&effects),
        ["evict first 30", "evict slow 100", "evict plain 30", "evict critical 30", "evict last 30"]
    );
}

#[test]
fn nothing_is_asked_before_the_list_is_complete() {
    let mut drain = hard(120);
    assert_eq!(drain.step(Input::Seen(pod("a")), s(0)), []);
    assert_eq!(drain.step(Input::Tick, s(1)), []);
    assert!(!drain.is_finished());
    assert_eq!(requests(&drain.step(Input::Listed(vec![pod("a")]), s(1))), ["evict a 30"]);
}

#[test]
fn f6_accepted_is_not_gone() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![pod("a")]), s(0));
    answer(&mut drain, "a", Ask::Evict, Answer::Accepted, s(0));
    assert!(!drain.is_finished());
    drain.step(Input::Gone(uid("a")), s(5));
    assert!(drain.is_finished());
    assert_eq!(drain.stamps(), Stamps { first_accepted: Some(s(0)), last_accepted: Some(s(0)), last_gone: Some(s(5)) });
}

#[test]
fn an_empty_node_is_drained_at_once() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![PodFacts { owner: Owner::DaemonSet, ..pod("a") }]), s(0));
    assert!(drain.is_finished());
    assert_eq!(drain.next_wake(), None);
}

#[test]
fn a_pod_whose_containers_have_ended_is_gone_whatever_holds_its_object() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![pod("a")]), s(0));
    answer(&mut drain, "a", Ask::Evict, Answer::Accepted, s(0));
    drain.step(Input::Seen(PodFacts { finished: true, terminating_until: Some(s(30)), ..pod("a") }), s(3));
    assert!(drain.is_finished());
}

#[test]
fn f29_a_budget_is_respected_until_the_latest_start_and_not_longer() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![pod("a")]), s(0));
    let effects = answer(&mut drain, "a", Ask::Evict, budget(), s(0));
    assert!(
        matches!(news(&effects)[..], [News::Blocked { why: Why::Budget, waits: Some(wait), .. }] if wait.as_secs() == 88)
    );
    let mut evictions = 0;
    loop {
        let wake = drain.next_wake().unwrap();
        let effects = drain.step(Input::Tick, wake);
        if requests(&effects) == ["evict a 30"] {
            evictions += 1;
            assert_eq!(news(&answer(&mut drain, "a", Ask::Evict, budget(), wake)), Vec::<&News>::new(), "told once");
            continue;
        }
        assert_eq!(wake, s(88));
        assert_eq!(requests(&effects), ["delete a 30"]);
        assert!(news(&effects).is_empty(), "told when it is true");
        break;
    }
    assert!((15..60).contains(&evictions), "asked {evictions} times in 88 s");
    let effects = answer(&mut drain, "a", Ask::Delete, Answer::Accepted, s(88));
    assert!(matches!(news(&effects)[..], [News::DeletedAtDeadline { .. }]));
    assert_eq!(news(&drain.step(Input::Gone(uid("a")), s(100))), [&News::Gone]);
    assert!(drain.is_finished());
    assert_eq!(drain.progress(), Progress { total: 1, gone: 1, deleted: 1, ..Progress::default() });
}

#[test]
fn f15_ten_replicas_with_a_long_grace_are_not_all_deleted_at_once() {
    let mut drain = hard(120);
    let names: Vec<String> = (0..10).map(|n| format!("p{n}")).collect();
    drain.step(Input::Listed(names.iter().map(|name| graceful(name, 600)).collect()), s(0));
    for name in &names {
        answer(&mut drain, name, Ask::Evict, budget(), s(0));
    }
    let effects = drain.step(Input::Tick, s(57));
    assert!(requests(&effects).iter().all(|request| request.starts_with("evict")), "{effects:?}");
}

#[test]
fn a_soft_deadline_leaves_what_a_budget_protects_and_sends_no_grace() {
    let mut drain = Drain::new(settings(), Limit::ByGrace, s(0));
    let effects = drain.step(Input::Listed(vec![graceful("a", 40), graceful("b", 10)]), s(0));
    assert_eq!(requests(&effects), ["evict a own", "evict b own"]);
    assert_eq!(drain.limit(), Limit::Soft(s(100)), "the longest grace and a minute");
    answer(&mut drain, "a", Ask::Evict, budget(), s(0));
    answer(&mut drain, "b", Ask::Evict, Answer::Replaced, s(0));
    while let Some(wake) = drain.next_wake() {
        if requests(&drain.step(Input::Tick, wake)) == ["evict a own"] {
            answer(&mut drain, "a", Ask::Evict, budget(), wake);
        }
    }
    assert_eq!(drain.left(), ["shop/a"]);
    assert!(drain.is_finished());
}

#[test]
fn a_closer_deadline_shortens_what_would_outlast_it_and_takes_up_what_was_left() {
    let mut drain = Drain::new(settings(), Limit::Soft(s(1000)), s(0));
    drain.step(Input::Listed(vec![graceful("long", 600), graceful("short", 20), graceful("stuck", 30)]), s(0));
    answer(&mut drain, "long", Ask::Evict, Answer::Accepted, s(0));
    answer(&mut drain, "short", Ask::Evict, Answer::Accepted, s(0));
    answer(&mut drain, "stuck", Ask::Evict, Answer::MultipleBudgets { message: "m".into() }, s(0));
    let effects = drain.step(Input::Deadline(Limit::Hard(s(122))), s(2));
    assert_eq!(requests(&effects), ["evict long 118"], "the short one fits, the stuck one waits");
    answer(&mut drain, "long", Ask::Evict, Answer::Accepted, s(2));
    assert_eq!(requests(&drain.step(Input::Tick, s(3))), Vec::<String>::new(), "asked once");
    assert_eq!(requests(&drain.step(Input::Deadline(Limit::Hard(s(62))), s(4))), ["evict long 56"]);
}

#[test]
fn pods_that_others_delete_are_waited_for_unless_they_would_outlast_the_power() {
    let dying = |name, until| PodFacts { terminating_until: Some(s(until)), ..graceful(name, 600) };
    let effects = hard(120).step(Input::Listed(vec![dying("soon", 60), dying("late", 600)]), s(0));
    assert_eq!(requests(&effects), ["evict late 118"]);
}

#[test]
fn a_late_pod_is_treated_like_the_others_also_after_the_end_of_the_drain() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![]), s(0));
    assert!(drain.is_finished());
    assert_eq!(requests(&drain.step(Input::Seen(graceful("late", 600)), s(10))), ["evict late 108"]);
    assert!(!drain.is_finished());
}

#[test]
fn a_deadline_in_the_past_still_evicts() {
    let mut drain = Drain::new(settings(), Limit::Hard(s(0)), s(60));
    let effects = drain.step(Input::Listed(vec![pod("a"), pod("b")]), s(60));
    assert_eq!(requests(&effects), ["evict a 1", "evict b 1"]);
    assert_eq!(requests(&answer(&mut drain, "a", Ask::Evict, budget(), s(60))), ["delete a 1"]);
}

#[test]
fn throttling_halves_the_window_once_for_each_burst_and_is_no_budget() {
    let mut drain = Drain::new(Settings { max_in_flight: 16, ..settings() }, Limit::Hard(s(120)), s(0));
    let names: Vec<String> = (0..40).map(|n| format!("p{n:02}")).collect();
    let effects = drain.step(Input::Listed(names.iter().map(|name| pod(name)).collect()), s(0));
    assert_eq!(requests(&effects).len(), 16);
    for name in &names[..16] {
        let effects = answer(&mut drain, name, Ask::Evict, Answer::Throttled { retry_after: None }, ms(100));
        assert_eq!(news(&effects), Vec::<&News>::new());
        assert!(drain.in_flight() <= 16);
    }
    assert_eq!(drain.in_flight(), 8);
    assert_eq!(drain.progress().blocked, 0);
}

#[test]
fn a_lost_answer_is_asked_again_unless_the_pod_is_seen_to_stop() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![pod("a"), pod("b")]), s(0));
    drain.step(Input::Seen(PodFacts { terminating_until: Some(s(30)), ..pod("b") }), s(1));
    let lost = || Answer::Unknown { message: "timed out".into() };
    answer(&mut drain, "a", Ask::Evict, lost(), s(2));
    answer(&mut drain, "b", Ask::Evict, lost(), s(2));
    assert_eq!(requests(&drain.step(Input::Tick, s(3))), ["evict a 30"]);
    assert_eq!(drain.progress().terminating, 1);
}

#[test]
fn a_missing_right_is_told_once_and_does_not_stop_the_others() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![pod("a"), pod("b")]), s(0));
    let forbidden = || Answer::Forbidden { message: "not allowed to create pods/eviction".into() };
    assert!(news(&answer(&mut drain, "a", Ask::Evict, forbidden(), s(0))).is_empty(), "a server that just started");
    answer(&mut drain, "b", Ask::Evict, Answer::Accepted, s(0));
    for (at, told) in [(1, 1), (10, 0)] {
        assert_eq!(requests(&drain.step(Input::Tick, s(at))), ["evict a 30"]);
        assert_eq!(news(&answer(&mut drain, "a", Ask::Evict, forbidden(), s(at))).len(), told);
    }
    assert_eq!(requests(&drain.step(Input::Tick, s(88))), ["delete a 30"]);
    assert_eq!(news(&answer(&mut drain, "a", Ask::Delete, forbidden(), s(88))).len(), 0);
    drain.step(Input::Gone(uid("a")), s(89));
    assert_eq!(drain.progress().deleted, 0, "it went by itself");
}

#[test]
fn a_pod_that_was_left_while_stopping_is_not_asked_again_unless_it_would_outlast_the_power() {
    let mut drain = Drain::new(settings(), Limit::Soft(s(60)), s(0));
    drain.step(Input::Listed(vec![graceful("short", 70), graceful("long", 600)]), s(0));
    for name in ["short", "long"] {
        answer(&mut drain, name, Ask::Evict, Answer::Accepted, s(0));
    }
    drain.step(Input::Tick, s(60));
    assert_eq!(drain.left().len(), 2);
    assert_eq!(requests(&drain.step(Input::Deadline(Limit::Hard(s(180))), s(60))), ["evict long 118"]);
}

#[test]
fn what_is_left_at_the_end_is_named() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![pod("a"), pod("b")]), s(0));
    answer(&mut drain, "a", Ask::Evict, Answer::Accepted, s(0));
    let effects = drain.step(Input::Tick, s(119));
    assert_eq!(news(&effects).iter().filter(|news| matches!(news, News::Left { .. })).count(), 2);
    assert_eq!(drain.left(), ["shop/a", "shop/b"]);
    drain.step(Input::Gone(uid("a")), s(119));
    assert_eq!(drain.left(), ["shop/b"], "told as it is, also after the end");
}

/// Seen on Kubernetes 1.37: a pod that was bound late was answered with 404 while it was there.
#[test]
fn a_pod_that_was_just_seen_is_not_gone_because_of_a_404() {
    let mut drain = hard(120);
    drain.step(Input::Listed(Vec::new()), s(0));
    drain.step(Input::Seen(pod("late")), s(10));
    assert!(news(&answer(&mut drain, "late", Ask::Evict, Answer::Gone, s(10))).is_empty());
    assert!(!drain.is_finished());
    assert_eq!(requests(&drain.step(Input::Tick, s(11))), ["evict late 30"]);
    answer(&mut drain, "late", Ask::Evict, Answer::Gone, s(15));
    assert!(drain.is_finished(), "after a while it is believed, for where the watch is broken");
}

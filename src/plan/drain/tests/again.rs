//! What is told late, twice, wrongly or without end.

use super::*;

fn annotated(name: &str, value: &str) -> PodFacts {
    PodFacts { annotations: BTreeMap::from([("evict".into(), value.into())]), ..pod(name) }
}

fn nothing(effects: &[Effect]) -> bool {
    requests(effects).is_empty()
}

#[test]
fn a_drain_whose_pods_are_never_listed_ends_too() {
    for (limit, end) in [(Limit::Hard(s(120)), 119), (Limit::Soft(s(60)), 59), (Limit::ByGrace, 90)] {
        let mut drain = Drain::new(settings(), limit, s(0));
        drain.step(Input::Seen(pod("a")), s(1));
        assert_eq!(drain.next_wake(), Some(s(end)));
        drain.step(Input::Tick, s(end - 1));
        assert!(!drain.is_finished());
        drain.step(Input::Tick, s(end));
        assert!(drain.is_finished() && !drain.was_listed());
        assert_eq!((drain.next_wake(), drain.left()), (None, vec!["shop/a".to_owned()]));
        assert!(nothing(&drain.step(Input::Listed(vec![pod("a"), pod("b")]), s(end + 1))));
        assert!(drain.is_finished() && drain.was_listed());
        assert_eq!(drain.left(), ["shop/a", "shop/b"]);
    }
}

#[test]
fn a_list_that_comes_late_is_taken_up_and_a_later_deadline_waits_for_it() {
    let mut drain = Drain::new(settings(), Limit::ByGrace, s(0));
    assert_eq!(requests(&drain.step(Input::Listed(vec![pod("a")]), s(89))), ["evict a own"]);
    assert_eq!(drain.limit(), Limit::Soft(s(89 + 30 + 60)));
    let mut drain = hard(120);
    drain.step(Input::Tick, s(119));
    drain.step(Input::Deadline(Limit::Hard(s(300))), s(119));
    assert!(!drain.is_finished());
    assert_eq!(requests(&drain.step(Input::Listed(vec![pod("a")]), s(150))), ["evict a 30"]);
}

#[test]
fn a_pod_that_a_list_or_an_answer_did_not_know_is_taken_up_when_it_is_seen() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![pod("listed"), pod("stopping"), pod("asked")]), s(0));
    answer(&mut drain, "listed", Ask::Evict, budget(), s(0));
    answer(&mut drain, "stopping", Ask::Evict, Answer::Accepted, s(0));
    drain.step(Input::Listed(vec![]), ms(500));
    assert!(drain.is_finished());
    let again = drain.step(Input::Listed(vec![pod("listed"), pod("stopping"), pod("asked")]), ms(600));
    assert_eq!(requests(&again), ["evict listed 30"], "one is stopping, and one is being asked");
    assert_eq!((drain.progress().terminating, drain.in_flight()), (1, 2));
    answer(&mut drain, "asked", Ask::Evict, Answer::Accepted, s(1));
    answer(&mut drain, "listed", Ask::Evict, Answer::Gone, s(9));
    let stop = PodFacts { terminating_until: Some(s(40)), ..pod("listed") };
    drain.step(Input::Seen(stop), s(10));
    assert_eq!(drain.progress(), Progress { total: 3, terminating: 3, ..Progress::default() });
}

#[test]
fn what_the_watch_says_is_gone_and_what_has_ended_stays_gone() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![pod("a"), pod("b")]), s(0));
    drain.step(Input::Gone(uid("a")), s(1));
    drain.step(Input::Seen(PodFacts { finished: true, ..pod("b") }), s(1));
    let effects = drain.step(Input::Listed(vec![pod("a"), pod("b")]), s(2));
    assert_eq!(effects, []);
    assert!(drain.is_finished());
}

#[test]
fn an_answer_that_comes_after_the_end_is_remembered() {
    let mut drain = Drain::new(settings(), Limit::Soft(s(60)), s(0));
    drain.step(Input::Listed(vec![pod("a"), pod("b")]), s(0));
    drain.step(Input::Tick, s(60));
    answer(&mut drain, "a", Ask::Evict, Answer::Accepted, s(61));
    assert!(nothing(&drain.step(Input::Deadline(Limit::Soft(s(200))), s(62))), "the other is being asked");
    assert_eq!((drain.progress().terminating, drain.in_flight()), (1, 1));
}

#[test]
fn a_wait_that_was_asked_for_is_followed_for_a_minute_at_most() {
    let endless = Some(Duration::MAX);
    for word in
        [Answer::Throttled { retry_after: endless }, Answer::Budget { message: "m".into(), retry_after: endless }]
    {
        let mut drain = Drain::new(settings(), Limit::Soft(s(1000)), s(0));
        drain.step(Input::Listed(vec![pod("a")]), s(0));
        answer(&mut drain, "a", Ask::Evict, word, s(0));
        let wake = drain.next_wake().unwrap();
        assert!((s(60)..=s(90)).contains(&wake), "{wake:?}");
    }
}

#[test]
fn pods_that_are_made_again_for_ever_are_asked_slowly_and_forgotten() {
    let mut drain = Drain::new(settings(), Limit::Soft(s(500_000)), s(0));
    drain.step(Input::Listed(vec![PodFacts { owner: Owner::DaemonSet, ..pod("daemon") }]), s(0));
    let mut now = s(0);
    for n in 0..5000 {
        let name = format!("again-{n}");
        let mut effects = drain.step(Input::Seen(pod(&name)), now);
        if nothing(&effects) {
            now = drain.next_wake().unwrap();
            effects = drain.step(Input::Tick, now);
        } else {
            assert!(n < 64, "{n}");
        }
        assert_eq!(requests(&effects).len(), 1);
        answer(&mut drain, &name, Ask::Evict, Answer::Accepted, now);
        drain.step(Input::Gone(uid(&name)), now);
        assert!(drain.pods.len() <= 514);
    }
    assert_eq!(drain.progress(), Progress { total: 5000, gone: 5000, skipped: 1, ..Progress::default() });
    assert!(now > s(40_000), "one in ten seconds, at last");
}

#[test]
fn many_late_pods_are_all_asked_before_a_hard_deadline() {
    let mut drain = Drain::new(Settings { max_in_flight: 1000, ..settings() }, Limit::Hard(s(120)), s(0));
    drain.step(Input::Listed(vec![]), s(0));
    let mut asked = 0;
    for n in 0..400 {
        asked += requests(&drain.step(Input::Seen(pod(&format!("p{n}"))), s(1))).len();
    }
    assert_eq!(asked, 64);
    assert_eq!(requests(&drain.step(Input::Tick, s(10))).len(), 9, "one in a second");
    assert_eq!(requests(&drain.step(Input::Tick, s(88))).len(), 400 - 64 - 9, "their grace before the deadline");
}

#[test]
fn an_annotation_counts_for_as_long_as_a_pod_was_not_asked_to_stop() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![pod("blocked"), pod("asked"), annotated("kept", "never")]), s(0));
    answer(&mut drain, "blocked", Ask::Evict, budget(), s(0));
    let effects = drain.step(Input::Seen(annotated("blocked", "never")), ms(100));
    assert_eq!(news(&effects), [&News::Skipped(Skip::Annotated)]);
    assert!(drain.step(Input::Seen(annotated("asked", "never")), ms(100)).is_empty(), "it may stop already");
    let effects = answer(&mut drain, "asked", Ask::Evict, budget(), ms(200));
    assert_eq!(news(&effects), [&News::Skipped(Skip::Annotated)]);
    assert!(nothing(&drain.step(Input::Tick, s(88))));
    assert!(drain.is_finished());
    assert_eq!(requests(&drain.step(Input::Seen(pod("kept")), s(90))), ["evict kept 28"]);
    assert_eq!(drain.progress(), Progress { total: 1, skipped: 2, ..Progress::default() });
}

#[test]
fn an_annotation_changes_the_order_of_what_was_not_asked_and_a_bad_one_is_told_once() {
    let mut drain = Drain::new(Settings { max_in_flight: 1, ..settings() }, Limit::Hard(s(120)), s(0));
    drain.step(Input::Listed(vec![pod("a"), pod("b"), pod("c")]), s(0));
    drain.step(Input::Seen(annotated("c", "first")), ms(10));
    let effects = drain.step(Input::Seen(annotated("b", "frist")), ms(10));
    assert_eq!(news(&effects), [&News::BadAnnotation("frist".into())]);
    assert!(drain.step(Input::Seen(annotated("b", "frist")), ms(20)).is_empty());
    assert_eq!(requests(&answer(&mut drain, "a", Ask::Evict, Answer::Accepted, ms(50))), ["evict c 30"]);
}

#[test]
fn a_deadline_that_is_told_again_moves_nothing() {
    let mut drain = hard(120);
    drain.step(Input::Listed(vec![pod("a")]), s(0));
    answer(&mut drain, "a", Ask::Evict, budget(), s(0));
    for second in 1..200 {
        // The wall clock and ours do not run quite alike.
        let asked = requests(&drain.step(Input::Deadline(Limit::Hard(ms(120_000 + second % 7))), s(second)));
        assert!(second < 88 || drain.pods[0].deleted, "deleted when its time has come");
        if asked.iter().any(|request| request.starts_with("evict")) {
            answer(&mut drain, "a", Ask::Evict, budget(), s(second));
        }
    }
    assert!(drain.is_finished());
}

#[test]
fn a_soft_deadline_that_has_passed_is_none() {
    for at in [0, 60, 69] {
        let mut drain = Drain::new(settings(), Limit::Soft(s(at)), s(60));
        drain.step(Input::Listed(vec![graceful("a", 100)]), s(60));
        assert_eq!(drain.limit(), Limit::Soft(s(220)));
        drain.step(Input::Deadline(Limit::Soft(s(at))), s(100));
        assert_eq!(drain.limit(), Limit::Soft(s(220)));
    }
    let mut drain = Drain::new(settings(), Limit::Soft(s(1000)), s(0));
    drain.step(Input::Listed(vec![graceful("a", 100)]), s(0));
    drain.step(Input::Deadline(Limit::Soft(s(5))), s(10));
    assert_eq!(drain.limit(), Limit::Soft(s(170)));
}

//! Properties: a random world around the drain.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// A pod of the random world.
#[derive(Debug, Clone)]
struct Actor {
    grace: u32,
    /// Seconds that it takes to exit once asked.
    exits_after: u32,
    /// Second until which its budget allows nothing.
    blocked_until: u32,
    /// Which of its answers are lost, throttled or failed, by turn.
    faults: Vec<u8>,
    appears_at: u32,
    skipped: bool,
}

fn actors() -> impl Strategy<Value = Vec<Actor>> {
    let actor = (0..700_u32, 0..200_u32, 0..200_u32, prop::collection::vec(0..6_u8, 0..6), 0..60_u32, any::<bool>())
        .prop_map(|(grace, exits_after, blocked_until, faults, appears, late)| Actor {
            grace,
            exits_after,
            blocked_until: if blocked_until < 80 { 0 } else { blocked_until },
            faults,
            appears_at: if late { appears } else { 0 },
            skipped: appears % 7 == 0,
        });
    prop::collection::vec(actor, 0..30)
}

/// What the watch of the random world does.
#[derive(Debug, Clone, Default)]
struct Watch {
    /// The second at which the first list comes, if it does.
    list_at: Option<u32>,
    /// How many milliseconds later the pods are listed again, and which of them that list does not know: a cache that
    /// is behind. A true list comes a moment later, also while requests are under way.
    relist: Option<(u64, Vec<usize>)>,
    /// Pods that were asked to stop are shown so.
    shows_stopping: bool,
    /// The deadline is told again every so many seconds.
    retold_every: Option<u32>,
}

impl Watch {
    fn plain() -> Self {
        Self { list_at: Some(0), ..Self::default() }
    }
}

fn watches() -> impl Strategy<Value = Watch> {
    let list_at = prop_oneof![4 => Just(Some(0)), 2 => (0..100_u32).prop_map(Some), 1 => Just(None)];
    let relist = prop::option::of((prop_oneof![1..150_u64, 1..120_000_u64], prop::collection::vec(0..30_usize, 0..8)));
    (list_at, relist, any::<bool>(), prop::option::of(1..20_u32)).prop_map(
        |(list_at, relist, shows_stopping, retold_every)| Watch { list_at, relist, shows_stopping, retold_every },
    )
}

/// What comes next in the random world.
#[derive(Debug, Clone)]
enum Event {
    /// A list without these pods.
    List(Vec<usize>),
    Deadline(Limit),
    Retold,
    Appears(usize),
    Shown(usize),
    Answer(usize, Ask, Option<u32>),
    Exits(usize),
}

/// The world around a drain: answers after 50 ms, kills after the grace.
struct World {
    drain: Drain,
    actors: Vec<Actor>,
    now: u64,
    watch: Watch,
    listed: bool,
    /// By the time at which they come.
    events: Vec<(u64, Event)>,
    appeared: BTreeSet<usize>,
    exits: BTreeMap<usize, u64>,
    exited: BTreeSet<usize>,
    /// Until when pods were told to stop.
    stopping: BTreeMap<usize, Moment>,
    turn: Vec<usize>,
    in_flight: BTreeSet<usize>,
    granted: BTreeMap<usize, u32>,
    /// The deadline that the drain was told last.
    told: Limit,
    /// The one that holds.
    limit: Limit,
    most: usize,
}

impl World {
    fn facts(&self, index: usize) -> PodFacts {
        let actor = &self.actors[index];
        let owner = if actor.skipped { Owner::DaemonSet } else { Owner::Controller("Job".into()) };
        let terminating_until = self.stopping.get(&index).copied().filter(|_| self.watch.shows_stopping);
        PodFacts { owner, terminating_until, ..graceful(&format!("p{index}"), actor.grace) }
    }

    fn check(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            let (pod, ask, grace) = match effect {
                Effect::Evict { pod, grace_seconds } => (pod, Ask::Evict, grace_seconds),
                Effect::Delete { pod, grace_seconds, .. } => (pod, Ask::Delete, Some(grace_seconds)),
                Effect::Note(_) => continue,
            };
            let index: usize = pod.name[1..].parse().unwrap();
            let actor = &self.actors[index];
            assert!(self.listed, "asked before the list");
            assert!(!actor.skipped, "a skipped pod was asked");
            assert!(self.in_flight.insert(index), "asked while being asked");
            assert!(self.in_flight.len() <= self.most);
            let now = ms(self.now);
            if let Limit::Hard(limit) = self.limit {
                let grace = grace.expect("a grace under a hard deadline");
                assert!(grace >= 1 && grace <= actor.grace.max(1), "grace {grace} of {}", actor.grace);
                let end = now.after(Duration::from_secs(grace.into()));
                assert!(grace == 1 || end <= limit.before(Duration::from_secs(2)), "grace {grace} past the deadline");
                if ask == Ask::Delete {
                    assert!(now >= self.drain.budget.latest_start(actor.grace).unwrap());
                }
            } else {
                assert_eq!((ask, grace), (Ask::Evict, None), "soft: the pod's own grace, and no deletion");
            }
            if let (Some(granted), Some(grace)) = (self.granted.get(&index), grace) {
                assert!(grace < *granted, "asked again without a reason");
            } else {
                assert!(!self.granted.contains_key(&index), "asked again without a reason");
            }
            self.events.push((self.now + 50, Event::Answer(index, ask, grace)));
        }
    }

    fn answer(&mut self, index: usize, ask: Ask, grace: Option<u32>) {
        self.in_flight.remove(&index);
        let turn = self.turn[index];
        self.turn[index] += 1;
        let actor = self.actors[index].clone();
        let message = String::new;
        let gone = self.exits.get(&index).is_some_and(|at| *at <= self.now);
        let answer = match actor.faults.get(turn) {
            _ if gone => Answer::Gone,
            Some(0) => Answer::Throttled { retry_after: None },
            Some(1) => Answer::Failed { message: message() },
            Some(2) => Answer::Forbidden { message: message() },
            Some(3) => Answer::Unknown { message: message() },
            _ if ask == Ask::Evict
                && self.now < u64::from(actor.blocked_until) * 1000
                && !self.granted.contains_key(&index) =>
            {
                budget()
            }
            _ => Answer::Accepted,
        };
        if answer == Answer::Accepted {
            let seconds = grace.unwrap_or(actor.grace);
            self.granted.insert(index, seconds);
            let exit = self.now + u64::from(seconds.min(actor.exits_after)) * 1000;
            let known = self.exits.entry(index).or_insert(exit);
            let sooner = exit < *known;
            *known = (*known).min(exit);
            if sooner || !self.stopping.contains_key(&index) {
                self.events.push((*known, Event::Exits(index)));
            }
            let until = ms(self.now).after(Duration::from_secs(seconds.into()));
            let known = self.stopping.entry(index).or_insert(until);
            *known = until.min(*known);
            if self.watch.shows_stopping {
                self.events.push((self.now + 20, Event::Shown(index)));
            }
        }
        let uid = uid(&format!("p{index}"));
        let effects = self.drain.step(Input::Answered { pod: uid, ask, answer }, ms(self.now));
        self.check(effects);
    }

    /// The pods that are there, but for those that a list does not know.
    fn list(&mut self, unknown: &[usize]) -> Input {
        self.listed = true;
        let there = self.appeared.difference(&self.exited).filter(|index| !unknown.contains(index));
        Input::Listed(there.map(|index| self.facts(*index)).collect())
    }

    fn happens(&mut self, event: Event) {
        let retold = matches!(event, Event::Retold);
        let input = match event {
            Event::Answer(index, ask, grace) => return self.answer(index, ask, grace),
            Event::List(unknown) => self.list(&unknown),
            Event::Deadline(limit) => {
                self.told = limit;
                self.limit = limit;
                Input::Deadline(limit)
            }
            Event::Retold => {
                let every = u64::from(self.watch.retold_every.unwrap()) * 1000;
                if !self.drain.is_finished() {
                    self.events.push((self.now + every, Event::Retold));
                }
                Input::Deadline(self.told)
            }
            Event::Appears(index) => {
                self.appeared.insert(index);
                Input::Seen(self.facts(index))
            }
            Event::Shown(index) if self.exited.contains(&index) => return,
            Event::Shown(index) => Input::Seen(self.facts(index)),
            Event::Exits(index) if !self.exited.insert(index) => return,
            Event::Exits(index) => Input::Gone(uid(&format!("p{index}"))),
        };
        let retold = retold.then_some(self.drain.budget.known_at);
        let effects = self.drain.step(input, ms(self.now));
        assert!(retold.is_none_or(|at| at == self.drain.budget.known_at), "nothing new was told");
        if !self.drain.budget.is_hard() {
            self.limit = self.drain.limit();
        }
        self.check(effects);
    }

    /// Runs until nothing happens any more.
    fn run(&mut self, escalation: Option<(u64, Limit)>) {
        let millis = |seconds: u32| u64::from(seconds) * 1000;
        if let Some(at) = self.watch.list_at {
            self.events.push((millis(at), Event::List(Vec::new())));
        }
        for index in 0..self.actors.len() {
            let at = self.actors[index].appears_at;
            if at == 0 {
                self.appeared.insert(index);
            } else {
                self.events.push((millis(at), Event::Appears(index)));
            }
        }
        if let (Some(first), Some((at, unknown))) = (self.watch.list_at, self.watch.relist.clone()) {
            self.events.push((millis(first) + at, Event::List(unknown)));
            self.events.push((millis(first) + at + 20, Event::List(Vec::new())));
        }
        self.events.extend(self.watch.retold_every.map(|every| (millis(every), Event::Retold)));
        self.events.extend(escalation.map(|(at, limit)| (at, Event::Deadline(limit))));
        for _ in 0..200_000 {
            let wake = self.drain.next_wake().map(|wake| wake.since(ms(0)).as_nanos().div_ceil(1_000_000) as u64);
            let event = (0..self.events.len()).min_by_key(|index| self.events[*index].0);
            let at = event.map(|index| self.events[index].0);
            let Some(next) = wake.into_iter().chain(at).min() else { return };
            self.now = self.now.max(next);
            match event.filter(|_| at == Some(next)) {
                Some(index) => {
                    let (_, event) = self.events.remove(index);
                    self.happens(event);
                }
                None => {
                    let effects = self.drain.step(Input::Tick, ms(self.now));
                    self.check(effects);
                }
            }
        }
        panic!("the drain never came to rest");
    }
}

fn world(actors: Vec<Actor>, watch: Watch, limit: Limit, most: usize) -> World {
    let settings = Settings { max_in_flight: most, ..settings() };
    World {
        drain: Drain::new(settings, limit, ms(0)),
        turn: vec![0; actors.len()],
        actors,
        now: 0,
        watch,
        listed: false,
        events: Vec::new(),
        appeared: BTreeSet::new(),
        exits: BTreeMap::new(),
        exited: BTreeSet::new(),
        stopping: BTreeMap::new(),
        in_flight: BTreeSet::new(),
        granted: BTreeMap::new(),
        told: limit,
        limit,
        most,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_drain_under_a_hard_deadline_keeps_its_rules_and_ends(actors in actors(), watch in watches(), deadline in 0..200_u64, most in 1..40_usize) {
        let mut world = world(actors, watch, Limit::Hard(s(deadline)), most);
        world.run(None);
        prop_assert!(world.drain.is_finished());
        prop_assert_eq!(world.drain.in_flight(), 0);
    }

    #[test]
    fn a_soft_drain_that_becomes_hard_keeps_its_rules_and_ends(actors in actors(), watch in watches(), at in 0..100_u64, left in 1..150_u64) {
        let mut world = world(actors, watch, Limit::ByGrace, 110);
        world.run(Some((at * 1000, Limit::Hard(s(at + left)))));
        prop_assert!(world.drain.is_finished());
    }

    #[test]
    fn under_a_hard_deadline_every_pod_is_told_to_stop(blocked in prop::collection::vec(any::<bool>(), 1..20), deadline in 6..200_u64) {
        let actors = blocked.iter().map(|blocked| Actor {
            grace: 60, exits_after: 3, blocked_until: if *blocked { 1000 } else { 0 }, faults: vec![], appears_at: 0, skipped: false,
        });
        let mut world = world(actors.collect(), Watch::plain(), Limit::Hard(s(deadline)), 110);
        world.run(None);
        prop_assert_eq!(world.granted.len(), blocked.len(), "each was asked, and accepted");
    }
}

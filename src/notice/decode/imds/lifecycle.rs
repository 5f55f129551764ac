//! The word under `autoscaling/target-lifecycle-state`: where Auto Scaling wants the instance to be.
//!
//! Source: "Retrieve the target lifecycle state through instance metadata" (Amazon EC2 Auto Scaling user guide).

use std::fmt;

use jiff::Timestamp;

use super::{ASG_ID, Unreadable};
use crate::notice::{Deadline, InstanceId, Kind, Notice, NoticeId, Report, Source, Withdrawal};

/// Longest word that is taken for a state; the longest of today's has 17 letters. Longer text is somebody else's page.
const LONGEST: usize = 64;

/// A target lifecycle state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    InService,
    /// A terminating hook waits, or the instance is about to go.
    Terminated,
    /// In a warm pool, or on the way there: `Warmed:Stopped`, `Warmed:Running` and the like.
    Warmed(String),
    /// `Standby`, `Detached`, and words that this version does not know.
    Other(String),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InService => f.write_str("InService"),
            Self::Terminated => f.write_str("Terminated"),
            Self::Warmed(word) | Self::Other(word) => f.write_str(word),
        }
    }
}

/// Reads the body; a newline at its end is usual.
pub fn target_state(body: &str) -> Result<State, Unreadable> {
    let word = body.trim();
    if word.is_empty() {
        return Err(Unreadable("an empty body".into()));
    }
    let of_a_state = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_');
    if word.len() > LONGEST || !word.chars().all(of_a_state) {
        let begins: String = word.chars().filter(|c| !c.is_control()).take(40).collect();
        return Err(Unreadable(format!("not a lifecycle state; it begins `{begins}`")));
    }
    Ok(match word {
        "InService" => State::InService,
        "Terminated" => State::Terminated,
        _ if word.starts_with("Warmed:") => State::Warmed(word.to_owned()),
        _ => State::Other(word.to_owned()),
    })
}

/// What is known of the target state: the last word, and the notice that was made of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Followed {
    /// `None` before the first answer.
    pub last: Option<State>,
    /// The notice that is open.
    pub open: Option<Notice>,
}

/// The next word: what is known after it, and what is to be said.
///
/// - `Terminated` is a notice, also as the first word, because the process may have been restarted; but not after a
///   `Warmed:*` that was none, because then the machine leaves the warm pool and has nothing on it.
/// - `Warmed:*` is a notice after `InService` only. As the first word it is a machine that warms up.
/// - `InService` after a notice withdraws it. Any other word says nothing.
pub fn advance(before: Followed, now: State, seen_at: Timestamp, instance: &InstanceId) -> (Followed, Option<Report>) {
    let ends = match (&now, &before.last) {
        (State::Terminated, Some(State::Warmed(_))) => before.open.is_some(),
        (State::Terminated, _) => true,
        (State::Warmed(_), Some(State::InService)) => true,
        (State::Warmed(_), _) => before.open.is_some(),
        (State::InService | State::Other(_), _) => false,
    };
    if ends {
        let detail = now.to_string();
        let known = before.last.is_some() && before.open.as_ref().is_some_and(|open| open.detail == detail);
        if known {
            return (Followed { last: Some(now), open: before.open }, None);
        }
        let noticed_at = before.open.map_or(seen_at, |open| open.noticed_at);
        let notice = notice(noticed_at, detail, instance);
        return (Followed { last: Some(now), open: Some(notice.clone()) }, Some(Report::Seen(notice)));
    }
    match (&now, before.open) {
        (State::InService, Some(open)) => {
            (Followed { last: Some(now), open: None }, Some(Report::Withdrawn(open.id, Withdrawal::Cancelled)))
        }
        (_, open) => (Followed { last: Some(now), open }, None),
    }
}

fn notice(noticed_at: Timestamp, detail: String, instance: &InstanceId) -> Notice {
    Notice {
        id: NoticeId(ASG_ID.into()),
        kind: Kind::AsgTermination,
        instance: instance.clone(),
        source: Source::Imds,
        noticed_at,
        deadline: Deadline::SoftByGrace,
        maintenance: None,
        detail,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn instance() -> InstanceId {
        InstanceId::parse("i-0a1b2c3d").unwrap()
    }

    /// Feeds the words and writes down what is said after each: `+word`, `-`, or `.` for nothing.
    fn follow(words: &[&str]) -> String {
        let mut followed = Followed::default();
        let mut said = Vec::new();
        for (second, word) in words.iter().enumerate() {
            let at = Timestamp::from_second(1_000 + second as i64).unwrap();
            let (next, report) = advance(followed, target_state(word).unwrap(), at, &instance());
            followed = next;
            said.push(match report {
                Some(Report::Seen(notice)) => format!("+{}", notice.detail),
                Some(Report::Withdrawn(_, why)) => {
                    assert_eq!(why, Withdrawal::Cancelled);
                    "-".into()
                }
                Some(Report::Synced(_)) | None => ".".into(),
            });
        }
        said.join(" ")
    }

    #[test]
    fn only_a_way_out_is_a_notice() {
        for (words, said) in [
            (&["InService", "InService\n", "Terminated", "Terminated\n"][..], ". . +Terminated ."),
            (&["Terminated", "Terminated"], "+Terminated ."),
            (&["InService", "Warmed:Stopped", "Warmed:Stopped"], ". +Warmed:Stopped ."),
            (&["Warmed:Stopped", "InService"], ". ."),
            (&["Warmed:Stopped", "Terminated"], ". ."),
            (&["Warmed:Running", "InService", "Terminated"], ". . +Terminated"),
            (&["InService", "Warmed:Stopped", "Terminated"], ". +Warmed:Stopped +Terminated"),
            (&["InService", "Terminated", "InService", "Terminated"], ". +Terminated - +Terminated"),
            (&["InService", "Warmed:Hibernated", "InService"], ". +Warmed:Hibernated -"),
            (&["Standby", "Detached", "InService", "Entering-something"], ". . . ."),
            (&["InService", "Standby", "Terminated"], ". . +Terminated"),
            (&["InService", "Terminated", "Detached", "InService"], ". +Terminated . -"),
        ] {
            assert_eq!(follow(words), said, "{words:?}");
        }
    }

    #[test]
    fn the_first_sight_is_kept() {
        let first = Timestamp::from_second(1_000).unwrap();
        let later = Timestamp::from_second(2_000).unwrap();
        let (followed, _) = advance(Followed::default(), State::Terminated, first, &instance());
        // Another process goes on from the record: it tells the notice once, with its old time.
        let resumed = Followed { last: None, open: followed.open };
        let (followed, report) = advance(resumed.clone(), State::Terminated, later, &instance());
        assert!(matches!(report, Some(Report::Seen(notice)) if notice.noticed_at == first));
        assert_eq!(advance(followed, State::Terminated, later, &instance()).1, None);
        // And where the group changed its mind in between, it withdraws it.
        let (_, report) = advance(resumed, State::InService, later, &instance());
        assert_eq!(report, Some(Report::Withdrawn(NoticeId(ASG_ID.into()), Withdrawal::Cancelled)));
    }

    #[test]
    fn pages_are_no_states() {
        let long = "a".repeat(65);
        for body in ["", "\n", "<html><body>sign in</body></html>", "In Service", &long, "Términated"] {
            assert!(target_state(body).is_err(), "{body}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_judged(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = target_state(&String::from_utf8_lossy(&bytes));
        }
    }
}

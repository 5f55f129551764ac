//! Notices that come and go by themselves.

use std::{fmt, time::Duration};

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use super::world::{Change, Control, Ending};

/// Time between a spot notice, or one of maintenance, and its end, where the script does not say it.
const USUAL_DEADLINE: Duration = Duration::from_secs(120);

/// What [`Scripted::set`] knows.
const PROPERTIES: [&str; 8] =
    ["after", "deadline", "action", "until", "code", "event-id", "cancel-after", "complete-after"];

/// What EC2 does to a spot instance.
const SPOT_ACTIONS: [&str; 3] = ["terminate", "stop", "hibernate"];

/// The codes of scheduled events.
const CODES: [&str; 5] =
    ["instance-reboot", "system-reboot", "system-maintenance", "instance-retirement", "instance-stop"];

/// What kind of notice a script shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScriptKind {
    Spot,
    Rebalance,
    Maintenance,
    Asg,
}

impl ScriptKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Spot, Self::Rebalance, Self::Maintenance, Self::Asg];

    /// As an option takes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Spot => "spot",
            Self::Rebalance => "rebalance",
            Self::Maintenance => "maintenance",
            Self::Asg => "asg",
        }
    }

    /// Reads one; the error lists them all.
    pub fn parse(word: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word).ok_or_else(|| {
            let all = Self::ALL.map(Self::as_str).join(", ");
            format!("`{word}` is no kind of notice: it is one of {all}")
        })
    }
}

impl fmt::Display for ScriptKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One notice of a script: when it can be read, what it says, and when it is taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scripted {
    pub kind: ScriptKind,
    /// From the start to the moment at which it can be read. Nothing: at once.
    pub after: Option<Duration>,
    /// From then to the end of the instance, or to the start of the maintenance. Two minutes if nothing is said.
    pub deadline: Option<Duration>,
    /// Spot: the action, `terminate` if nothing is said. Asg: the target state, `Terminated` if nothing is said.
    pub action: Option<String>,
    /// Maintenance: the code, `system-reboot` if nothing is said.
    pub code: Option<String>,
    /// Maintenance: the event; a second notice with the same one gives it a new date.
    pub event_id: Option<String>,
    /// Time between the moment at which it can be read and its end, and for maintenance how it ends.
    pub ends: Option<(Duration, Ending)>,
}

impl Scripted {
    /// A notice that can be read at once, and stays.
    pub fn new(kind: ScriptKind) -> Self {
        Self { kind, after: None, deadline: None, action: None, code: None, event_id: None, ends: None }
    }

    /// Sets one property by its name: `after`, `deadline`, `action`, `code`, `event-id`, `until`, `cancel-after` or
    /// `complete-after`. The error is a sentence about the value, or about a property that this kind does not have.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        use ScriptKind::{Asg, Maintenance, Rebalance, Spot};
        let fits: &[ScriptKind] = match name {
            "after" => &ScriptKind::ALL,
            "deadline" => &[Spot, Maintenance],
            "action" => &[Spot, Asg],
            "until" => &[Spot, Rebalance, Asg],
            "code" | "event-id" | "cancel-after" | "complete-after" => &[Maintenance],
            _ => return Err(format!("`{name}` is no property of a notice: it is one of {}", PROPERTIES.join(", "))),
        };
        let kind = self.kind;
        if !fits.contains(&kind) {
            let fits: Vec<_> = fits.iter().map(|kind| kind.as_str()).collect();
            return Err(format!("`{name}` has no meaning for a {kind} notice, only for {}", fits.join(", ")));
        }
        match name {
            "after" => once(&mut self.after, name, duration(value)?),
            "deadline" => once(&mut self.deadline, name, duration(value)?),
            "action" if kind == Spot => once(&mut self.action, name, one_of(value, &SPOT_ACTIONS)?),
            "action" => once(&mut self.action, name, word(value)?),
            "code" => once(&mut self.code, name, one_of(value, &CODES)?),
            "event-id" => once(&mut self.event_id, name, word(value)?),
            "complete-after" => once(&mut self.ends, name, (duration(value)?, Ending::Completed)),
            _ => once(&mut self.ends, name, (duration(value)?, Ending::Cancelled)),
        }
    }

    fn appears(&self) -> Duration {
        self.after.unwrap_or_default()
    }

    /// What becomes readable at `now`. `number` makes an event id where the script gives none.
    fn beginning(&self, number: usize, now: Timestamp) -> Change {
        let deadline = SignedDuration::try_from(self.deadline.unwrap_or(USUAL_DEADLINE)).unwrap_or(SignedDuration::MAX);
        let time = now.saturating_add(deadline).unwrap_or(Timestamp::MAX);
        let action = |usual: &str| self.action.clone().unwrap_or_else(|| usual.to_owned());
        match self.kind {
            ScriptKind::Spot => Change::Spot { action: action("terminate"), time },
            ScriptKind::Rebalance => Change::Rebalance { noticed_at: now },
            ScriptKind::Asg => Change::TargetState(action("Terminated")),
            ScriptKind::Maintenance => Change::Maintenance {
                id: self.id(number),
                code: self.code.clone().unwrap_or_else(|| "system-reboot".into()),
                start: time,
            },
        }
    }

    fn end(&self, number: usize, ending: Ending) -> Change {
        match self.kind {
            ScriptKind::Spot => Change::SpotGone,
            ScriptKind::Rebalance => Change::RebalanceGone,
            ScriptKind::Asg => Change::TargetState("InService".into()),
            ScriptKind::Maintenance => Change::MaintenanceEnded { id: self.id(number), ending },
        }
    }

    fn id(&self, number: usize) -> String {
        self.event_id.clone().unwrap_or_else(|| format!("instance-event-{:017x}", 0xc1d_2e3f_4051_6000 + number))
    }
}

fn once<T>(slot: &mut Option<T>, name: &str, value: T) -> Result<(), String> {
    match slot {
        Some(_) => Err(format!("`{name}` is given twice, or contradicts another option, for one notice")),
        None => {
            *slot = Some(value);
            Ok(())
        }
    }
}

fn word(value: &str) -> Result<String, String> {
    if value.is_empty() { Err("a word is missing".into()) } else { Ok(value.to_owned()) }
}

fn one_of(value: &str, known: &[&str]) -> Result<String, String> {
    if known.contains(&value) {
        return Ok(value.to_owned());
    }
    Err(format!("EC2 has no `{value}` there: it is one of {}", known.join(", ")))
}

/// `10s`, `2m`, `500ms`, `1h30m`.
fn duration(value: &str) -> Result<Duration, String> {
    let no = || format!("`{value}` is no duration: write for instance 10s, 2m or 500ms");
    let signed: SignedDuration = value.parse().map_err(|_| no())?;
    Duration::try_from(signed).map_err(|_| no())
}

/// Plays the notices at their times, counted from the first poll of this future.
pub(super) async fn play(script: &[Scripted], control: &Control) {
    let start = Instant::now();
    let mut steps: Vec<(Duration, usize, Option<Ending>)> = Vec::new();
    for (number, notice) in script.iter().enumerate() {
        steps.push((notice.appears(), number, None));
        if let Some((later, ending)) = notice.ends {
            steps.push((notice.appears().saturating_add(later), number, Some(ending)));
        }
    }
    // Stable: what comes at one time comes in the order in which it was written.
    steps.sort_by_key(|(at, ..)| *at);
    for (at, number, ending) in steps {
        // A time that the clock cannot hold never comes.
        let Some(at) = start.checked_add(at) else { return };
        tokio::time::sleep_until(at).await;
        let Some(notice) = script.get(number) else { continue };
        control.apply(match ending {
            None => notice.beginning(number, Timestamp::now()),
            Some(ending) => notice.end(number, ending),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_are_checked() {
        let mut spot = Scripted::new(ScriptKind::Spot);
        spot.set("after", "500ms").unwrap();
        spot.set("deadline", "2m").unwrap();
        assert_eq!((spot.after, spot.deadline), (Some(Duration::from_millis(500)), Some(Duration::from_secs(120))));
        for (kind, name, value, part) in [
            (ScriptKind::Spot, "code", "x", "only for maintenance"),
            (ScriptKind::Rebalance, "deadline", "2m", "only for spot, maintenance"),
            (ScriptKind::Spot, "deadline", "soon", "no duration"),
            (ScriptKind::Spot, "after", "-3s", "no duration"),
            (ScriptKind::Spot, "after", "10", "no duration"),
            (ScriptKind::Maintenance, "until", "3s", "only for spot, rebalance, asg"),
            (ScriptKind::Asg, "colour", "red", "no property of a notice: it is one of after, deadline, action"),
            (ScriptKind::Spot, "action", "explode", "one of terminate, stop, hibernate"),
            (
                ScriptKind::Maintenance,
                "code",
                "reboot",
                "instance-reboot, system-reboot, system-maintenance, instance-r",
            ),
            (ScriptKind::Asg, "action", "", "missing"),
        ] {
            let error = Scripted::new(kind).set(name, value).unwrap_err();
            assert!(error.contains(part), "{name}={value}: {error}");
        }
        let error = spot.set("after", "1s").unwrap_err();
        assert!(error.contains("twice"), "{error}");
    }
}

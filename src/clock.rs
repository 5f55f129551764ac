//! The two clocks of the edges: durations run on the monotonic one, AWS and Kubernetes speak of the other.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::plan::Moment;

/// Reads both clocks, and translates between them at the moment of the call, so that a step of the wall clock
/// never moves a deadline that was already translated.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    origin: Instant,
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock {
    /// A clock whose origin lies a day back, so that moments shortly before now can be expressed.
    pub fn new() -> Self {
        let now = Instant::now();
        Self { origin: now.checked_sub(Duration::from_secs(86_400)).unwrap_or(now) }
    }

    /// Now, on the monotonic clock.
    pub fn now(&self) -> Moment {
        Moment(self.origin.elapsed())
    }

    /// Now, by the wall clock.
    pub fn wall(&self) -> Timestamp {
        Timestamp::now()
    }

    /// The moment at which the wall clock will show, or has shown, `at`.
    pub fn moment(&self, at: Timestamp) -> Moment {
        let ahead = at.duration_since(self.wall());
        let span = ahead.unsigned_abs();
        if ahead.is_negative() { self.now().before(span) } else { self.now().after(span) }
    }

    /// The instant to sleep until.
    pub fn instant(&self, moment: Moment) -> Instant {
        self.origin.checked_add(moment.0).unwrap_or_else(|| Instant::now() + Duration::from_secs(86_400 * 365))
    }
}

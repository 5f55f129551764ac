//! Whether the source can still see an interruption.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// The longest time without a good answer on the spot path that still counts as healthy: a dozen polls at the
/// default interval, which rides out a restart of the service or a burst of throttling, and an eighth of the two
/// minutes, so that a blind node is noticed while somebody could still act.
pub const STALE_AFTER: Duration = Duration::from_secs(15);

/// Shared between the source and the readiness probe. A clone is the same thing.
#[derive(Debug, Clone)]
pub struct Health {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    last_success: Instant,
    succeeded: bool,
    cause: Option<String>,
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

impl Health {
    /// Healthy for [`STALE_AFTER`] from now, until the first answers have come or failed.
    pub fn new() -> Self {
        let state = State { last_success: Instant::now(), succeeded: false, cause: None };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// `Err` with the cause, in words, where the spot path has had no good answer for [`STALE_AFTER`].
    pub fn check(&self) -> Result<(), String> {
        self.check_at(Instant::now())
    }

    fn check_at(&self, now: Instant) -> Result<(), String> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let silent = now.saturating_duration_since(state.last_success);
        if silent < STALE_AFTER {
            return Ok(());
        }
        let what = if state.succeeded { "no good answer" } else { "no answer yet" };
        let cause = state.cause.as_deref().unwrap_or("it has not been asked");
        Err(format!("{what} from the instance metadata service for {} s: {cause}", silent.as_secs()))
    }

    pub(super) fn succeeded(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = State { last_success: Instant::now(), succeeded: true, cause: None };
    }

    pub(super) fn failed(&self, cause: String) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).cause = Some(cause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_turns_after_the_limit_and_back_at_once() {
        let health = Health::new();
        let start = health.state.lock().unwrap().last_success;
        health.failed("refused".into());
        assert_eq!(health.check_at(start + STALE_AFTER - Duration::from_millis(1)), Ok(()));
        let cause = health.clone().check_at(start + STALE_AFTER).unwrap_err();
        assert!(cause.contains("no answer yet") && cause.contains("15 s") && cause.contains("refused"), "{cause}");
        health.succeeded();
        assert_eq!(health.check(), Ok(()));
        let cause = health.check_at(Instant::now() + STALE_AFTER * 2).unwrap_err();
        assert!(cause.contains("no good answer") && !cause.contains("refused"), "{cause}");
    }
}

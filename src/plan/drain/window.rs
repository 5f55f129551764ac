//! How many requests are under way at once.

use crate::plan::Moment;

/// The limit on requests in flight: halved when the API server throttles, grown by one for each full window answered.
#[derive(Debug)]
pub(super) struct Window {
    size: f64,
    most: f64,
    cut_at: Option<Moment>,
}

/// However much the API server throttles, this many requests stay in flight.
const LEAST_IN_FLIGHT: f64 = 4.0;

impl Window {
    pub(super) fn new(most: usize) -> Self {
        let most = most.max(1) as f64;
        Self { size: most, most, cut_at: None }
    }

    /// One cut for each burst: answers to requests that were sent before the last cut do not count again.
    pub(super) fn throttled(&mut self, sent_at: Moment, now: Moment) {
        if self.cut_at.is_none_or(|cut| sent_at >= cut) {
            self.size = (self.size / 2.0).max(LEAST_IN_FLIGHT).min(self.most);
            self.cut_at = Some(now);
        }
    }

    pub(super) fn answered(&mut self) {
        self.size = (self.size + 1.0 / self.size).min(self.most);
    }

    pub(super) fn has_room(&self, in_flight: usize) -> bool {
        (in_flight as f64) < self.size.floor()
    }
}

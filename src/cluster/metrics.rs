//! Counts of the requests to the API server.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::Call;

/// Every code that a request can be counted under: the interesting ones by number, the others by class.
const CODES: [&str; 10] = ["2xx", "401", "403", "404", "409", "422", "429", "4xx", "5xx", "timeout"];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    verb: &'static str,
    resource: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TargetLabels {
    target: &'static str,
}

/// How the exchange with the API server is counted.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    in_flight: Family<TargetLabels, Gauge>,
    kubernetes: Gauge,
    events_dropped: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Every series exists from the start, at 0.
    pub fn new() -> Self {
        let requests = Family::<RequestLabels, Counter>::default();
        for call in Call::ALL {
            for code in CODES.into_iter().chain(["error"]) {
                let labels = RequestLabels { verb: call.verb(), resource: call.resource(), code };
                drop(requests.get_or_create(&labels));
            }
        }
        let in_flight = Family::<TargetLabels, Gauge>::default();
        let kubernetes = in_flight.get_or_create(&TargetLabels { target: "kubernetes" }).clone();
        Self { requests, in_flight, kubernetes, events_dropped: Counter::default() }
    }

    /// Makes the series visible.
    pub fn register(&self, registry: &mut Registry) {
        let Self { requests, in_flight, kubernetes: _, events_dropped } = self;
        registry.register(
            "spotter_kubernetes_requests",
            "Requests to the Kubernetes API server, by outcome (error: no answer)",
            requests.clone(),
        );
        registry.register("spotter_requests_in_flight", "Requests that wait for an answer", in_flight.clone());
        registry.register(
            "spotter_events_dropped",
            "Kubernetes events that were not sent because too many were waiting",
            events_dropped.clone(),
        );
    }

    /// Counts a request as in flight until the guard is dropped.
    pub(super) fn start(&self) -> InFlight {
        self.kubernetes.inc();
        InFlight(self.kubernetes.clone())
    }

    pub(super) fn answered(&self, call: Call, status: u16) {
        let code = match status {
            200..=299 => "2xx",
            401 => "401",
            403 => "403",
            404 => "404",
            409 => "409",
            422 => "422",
            429 => "429",
            500.. => "5xx",
            _ => "4xx",
        };
        self.count(call, code);
    }

    pub(super) fn timed_out(&self, call: Call) {
        self.count(call, "timeout");
    }

    pub(super) fn failed(&self, call: Call) {
        self.count(call, "error");
    }

    pub(super) fn event_dropped(&self) {
        self.events_dropped.inc();
    }

    fn count(&self, call: Call, code: &'static str) {
        let labels = RequestLabels { verb: call.verb(), resource: call.resource(), code };
        self.requests.get_or_create(&labels).inc();
    }
}

pub(super) struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

//! The API server's answers that are no objects.

use serde::Deserialize;

/// As much of a text answer as is shown.
const SHOWN: usize = 300;

/// A `Status` object, or what a proxy or the flow control said in plain text.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Status {
    pub(super) message: String,
    pub(super) code: Option<u16>,
    pub(super) details: Option<Details>,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Details {
    causes: Option<Vec<Cause>>,
    pub(super) retry_after_seconds: u64,
}

#[derive(Debug, Default, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Cause {
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) field: String,
}

impl Status {
    /// Total: what is no Status becomes one with its text as the message and no details.
    pub(super) fn read(body: &[u8]) -> Self {
        serde_json::from_slice(body).unwrap_or_else(|_| {
            let text = String::from_utf8_lossy(body);
            let message = text.trim().chars().take(SHOWN).collect();
            Self { message, code: None, details: None }
        })
    }

    pub(super) fn causes(&self) -> &[Cause] {
        self.details.as_ref().and_then(|details| details.causes.as_deref()).unwrap_or_default()
    }

    pub(super) fn cause(&self, reason: &str) -> Option<&Cause> {
        self.causes().iter().find(|cause| cause.reason == reason)
    }

    /// `cannot impersonate resource "users"` (no such right), `cannot impersonate:associated-node`,
    /// `cannot impersonate-on:associated-node:…` (constrained impersonation).
    pub(super) fn is_impersonation_refused(&self) -> bool {
        self.message.contains("cannot impersonate")
    }
}

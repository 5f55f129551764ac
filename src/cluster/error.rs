//! What can go wrong with the API server, in words for the person who has to do something about it.

use std::{error::Error as StdError, fmt, io, time::Duration};

use super::{Call, transport};

/// What to do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Nobody knows, or it will pass: try again.
    Retry,
    /// A person must change something (rights, credentials) before it can work; it may then work without a restart.
    Blocked,
    /// The object is not there (any more).
    Gone,
    /// It will never work.
    Fatal,
}

/// A request that the API server refused, or that did not reach it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The client could not be built.
    #[error("{0}")]
    Config(String),
    /// 403.
    #[error("not allowed to {verb} {resource}{}: {message}; {advice}", .user.as_ref().map(|user| format!(" as {user}")).unwrap_or_default())]
    Forbidden {
        verb: &'static str,
        resource: &'static str,
        user: Option<String>,
        message: String,
        advice: &'static str,
    },
    /// 401.
    #[error(
        "the API server {server} refused the credentials (401: {message}): the token or certificate has expired, is not for this cluster, or the pod that it is bound to was deleted"
    )]
    Unauthorized { server: String, message: String },
    /// 404.
    #[error("{message}")]
    NotFound { message: String },
    /// Any other answer that is no success.
    #[error("the API server answered {code} to {verb} {resource}: {message}")]
    Api { verb: &'static str, resource: &'static str, code: u16, message: String },
    /// No connection: the request was not sent.
    #[error("cannot reach the API server {server}: {cause}")]
    Unreachable { server: String, cause: String },
    /// The connection broke while the answer was awaited: the request may have been carried out.
    #[error("lost the connection to the API server {server} while waiting for {verb} {resource}: {cause}")]
    Lost { server: String, verb: &'static str, resource: &'static str, cause: String },
    /// No answer in time: the request may have been carried out.
    #[error("no answer from the API server {server} to {verb} {resource} within {} ms", .limit.as_millis())]
    Timeout { server: String, verb: &'static str, resource: &'static str, limit: Duration },
    /// An answer that cannot be read.
    #[error("the API server's answer to {verb} {resource} cannot be read: {cause}")]
    Malformed { verb: &'static str, resource: &'static str, cause: String },
}

/// What to do about a plain 403.
pub(super) const GRANT: &str = "grant it (README, permissions)";
/// What to do where impersonation was demanded and is refused.
pub(super) const GRANT_IMPERSONATION: &str = "grant the impersonation of the own node (README, permissions; Kubernetes 1.36 or later), or choose the identity auto or direct";

impl Error {
    pub(super) fn config(what: &str, cause: &(dyn StdError + 'static)) -> Self {
        Self::Config(format!("cannot set up {what}: {}", chain(cause)))
    }

    /// For an exchange that failed below HTTP.
    pub(super) fn transport(server: &str, call: Call, cause: &(dyn StdError + 'static)) -> Self {
        let server = server.to_owned();
        if transport::never_sent(cause) {
            Self::Unreachable { server, cause: deepest(cause) }
        } else {
            Self::Lost { server, verb: call.verb(), resource: call.resource(), cause: deepest(cause) }
        }
    }

    /// What to do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Config(_) => Class::Fatal,
            Self::Forbidden { .. } | Self::Unauthorized { .. } => Class::Blocked,
            Self::NotFound { .. } => Class::Gone,
            Self::Unreachable { .. } | Self::Lost { .. } | Self::Timeout { .. } | Self::Malformed { .. } => {
                Class::Retry
            }
            Self::Api { code, .. } => match code {
                408 | 409 | 410 | 429 | 500..=599 => Class::Retry,
                _ => Class::Fatal,
            },
        }
    }

    /// 404.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// 403.
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Forbidden { .. })
    }

    /// The HTTP status, where there was an answer.
    pub(super) fn code(&self) -> Option<u16> {
        match self {
            Self::Forbidden { .. } => Some(403),
            Self::Unauthorized { .. } => Some(401),
            Self::NotFound { .. } => Some(404),
            Self::Api { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// A watch must begin anew: the version is too old (410), or not one of this server (400, 422 after a restore).
    pub(super) fn is_version_refused(&self) -> bool {
        matches!(self.code(), Some(400 | 410 | 422))
    }

    /// Whether the server was asked and nobody knows what it did.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Lost { .. } | Self::Timeout { .. })
    }
}

/// Which part of an apply another field manager holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldConflict {
    /// For instance `.spec.unschedulable`.
    pub field: String,
    /// For instance `kubectl-cordon`.
    pub manager: String,
}

impl fmt::Display for FieldConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}", self.field, self.manager)
    }
}

/// The deepest cause, which names what happened (`Connection refused`), where the upper ones only say that it did.
pub(super) fn deepest(error: &(dyn StdError + 'static)) -> String {
    let closed = |cause: &(dyn StdError + 'static)| {
        let inner = cause.downcast_ref::<h2::Error>().and_then(h2::Error::get_io);
        inner.or(cause.downcast_ref()).is_some_and(|io| io.kind() == io::ErrorKind::UnexpectedEof)
    };
    if transport::causes(error).any(closed) {
        return "the server closed it".to_owned();
    }
    match transport::causes(error).last().map(ToString::to_string) {
        // hyper's words for a request that waited for the connection that another one was opening.
        Some(text) if text == "request was canceled" => "the connection could not be opened".to_owned(),
        // What is left of a connection whose pings were not answered.
        Some(text) if text.contains("broken pipe") => "the connection is dead".to_owned(),
        text => text.unwrap_or_default(),
    }
}

/// All causes, the repeated ones left out.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = String::new();
    for cause in transport::causes(error) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

//! What to do about a notice.

/// What spotter does about a notice of one kind, from the least to the most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Response {
    /// Nothing but counting it.
    Ignore,
    /// No new pods on the node; the running ones stay.
    Cordon,
    /// Cordon, then evict the pods.
    Drain,
}

impl Response {
    /// Reads the word of the configuration and of annotations.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "ignore" => Some(Self::Ignore),
            "cordon" => Some(Self::Cordon),
            "drain" => Some(Self::Drain),
            _ => None,
        }
    }

    /// The word of the configuration and of annotations.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::Cordon => "cordon",
            Self::Drain => "drain",
        }
    }
}

//! (in the making)

pub mod imds;

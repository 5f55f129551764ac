//! From what AWS sends to notices. Total: any text gives a notice or a reason why it is none, and nothing panics.

pub mod imds;

//! Where notices come from. A source reads, decodes and reports; it decides nothing.

pub mod imds;

//! Stand-ins for the services around spotter. They speak real HTTP on loopback: what breaks in this field is what goes
//! over the wire.

pub mod imds;

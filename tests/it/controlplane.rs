//! The facts about the API server that everything else is built on, and the tests' own machinery.

mod eviction;
mod harness;
mod identity;

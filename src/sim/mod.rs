//! The simulated kernel that drives the pure state machines of `core`: by random schedules with a
//! virtual clock, and by the bytes of a fuzzer.
//!
//! This folder exists in tests and under the fuzzer only.

pub mod fuzz;
#[cfg(test)]
mod schedule;

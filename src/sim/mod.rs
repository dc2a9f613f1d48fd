//! One simulated kernel, and two drivers that run the state machines of `core` on it.
//!
//! `kernel` holds processes, channels, listeners and clients as plain data, and the promises that
//! are checked after each step. `schedule` drives it by random schedules, which it shrinks when they
//! fail. `fuzz` drives it by the bytes of a fuzzer. Decisions of the crate do not belong here: this
//! folder exists in tests and under the fuzzer only.

pub mod fuzz;
// The random schedules use more of it than the fuzzer.
#[cfg_attr(not(test), allow(dead_code))]
mod kernel;
#[cfg(test)]
mod schedule;

//! Simulates a kernel, and runs the state machines of `core` on it with two drivers.
//!
//! `kernel` stores processes, channels, listeners and clients as plain data, and checks the crate's
//! guarantees after each step. `schedule` drives the kernel with random schedules, and shrinks a
//! schedule that fails. `fuzz` drives the kernel with a fuzzer's input.
//!
//! The folder is compiled only for tests and for the fuzzer, so it must not contain any logic that
//! the library needs.

pub mod fuzz;
// The fuzzer uses only a part of `kernel`, so a build without tests contains dead code.
#[cfg_attr(not(test), allow(dead_code))]
mod kernel;
#[cfg(test)]
mod schedule;

//! All `libc` calls and all `unsafe` code of the crate.
//!
//! A function belongs here if it calls `libc`, or if it only prepares a call to `libc`. Functions
//! return a plain `io::Error`, and the caller adds the operation that failed. Decisions, frames and
//! callbacks belong elsewhere.
//!
//! - descriptors: `fd` (by number), `file` (relative to a directory), `owner` (which process owns a
//!   handle after a fork)
//! - sockets: `listen`, `socket` (bytes and descriptors), `channel` (which a worker inherits),
//!   `option`, `queue`, `bind`, `socket_file`, `std_accept`
//! - processes: `process`, `threads`, `env`, `own_program` (the path of this program)
//! - signals: `signal` (as a readable descriptor), `signal_mask`, `errno` (which a handler preserves)
//! - waiting: `poll`
//! - memory: `shared_number` (which two processes share)
//! - logs: `log` (writes to descriptors that other processes share)
//! - systems: `linux` and `bsd`, which have the same items
//!
//! The module of the system for which the crate is compiled is called `platform`. Differences
//! between systems or architectures belong in `linux` and `bsd`, except for the ways in which `log`
//! writes.

pub(crate) mod bind;
pub(crate) mod channel;
pub(crate) mod connection;
pub(crate) mod env;
mod errno;
pub(crate) mod fd;
pub(crate) mod file;
pub(crate) mod listen;
pub(crate) mod log;
mod option;
pub(crate) mod own_program;
pub(crate) mod owner;
pub(crate) mod poll;
pub(crate) mod process;
pub(crate) mod queue;
pub(crate) mod signal;
pub(crate) mod signal_mask;
pub(crate) mod socket;
pub(crate) mod socket_file;
pub(crate) mod std_accept;
pub(crate) mod threads;

#[cfg_attr(any(target_os = "linux", target_os = "android"), path = "linux/mod.rs")]
#[cfg_attr(
    not(any(target_os = "linux", target_os = "android")),
    path = "bsd/mod.rs"
)]
mod platform;
pub(crate) use platform::{filter, interruptible_accept, parent_death_signal, shared_number};

use std::io;
use std::time::Duration;

/// Returns the result of a system call, or the last OS error if the result is -1.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Repeats a call while signals interrupt it.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Returns the time of `CLOCK_MONOTONIC`. All processes of the system share this clock, unless they
/// are in different time namespaces (time_namespaces(7)).
pub(crate) fn monotonic_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // Ignore the result, because every system has this clock.
    // SAFETY: the pointer is valid for writes of a `timespec`.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

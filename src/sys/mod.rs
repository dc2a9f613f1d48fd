//! The system calls, and all the `unsafe` of the crate.
//!
//! What is unsafe here, and where: descriptors by number (`fd`), adding to the poller (`poll`),
//! signal handlers (`signal`), making processes (`process`) and what they do before they execute
//! their program (`child`), calls with raw buffers (`socket`), making and naming sockets (`listen`,
//! `queue`), the environment of a child (`env`), a page that a fork wipes (`owner`), calls without a
//! wrapper (`parent`, `threads`), a handler that changes what a call is about (`interrupt`). Functions
//! return `io::Error`; the caller says what it tried.

pub(crate) mod bind;
mod child;
pub(crate) mod env;
pub(crate) mod fd;
#[cfg_attr(not(target_os = "linux"), path = "no_interrupt.rs")]
pub(crate) mod interrupt;
pub(crate) mod listen;
pub(crate) mod owner;
pub(crate) mod parent;
pub(crate) mod poll;
pub(crate) mod process;
pub(crate) mod queue;
pub(crate) mod signal;
pub(crate) mod socket;
pub(crate) mod socket_file;
pub(crate) mod threads;

use std::io;
use std::time::Duration;

/// The result of a system call that says -1 when it fails.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Repeats a call that a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The time since some moment in the past, as all processes of the system have it.
pub(crate) fn monotonic_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is writable. The clock is there on every system.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// No signals at all.
fn empty_set() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data.
    let mut set = unsafe { std::mem::zeroed() };
    // SAFETY: the set is writable.
    unsafe { libc::sigemptyset(&raw mut set) };
    set
}

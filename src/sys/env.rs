//! Environment variables of a forked child that executes no program.
//!
//! This crate never changes the master's environment, because other threads may read it at any
//! time.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

/// Sets a variable in a child that has just been forked. The variable must satisfy [`is_valid`].
pub(crate) fn set(name: &OsStr, value: &OsStr) {
    // SAFETY: this process has one thread, because `fork` copies only the calling thread. No other
    // thread was changing the environment at the fork either: the master does not fork such a child
    // if `has_other_threads` reports another thread. If the system does not report the number of
    // threads, the application must ensure this.
    unsafe { std::env::set_var(name, value) };
}

/// Removes a variable in a child that has just been forked.
pub(crate) fn remove(name: &str) {
    // SAFETY: this process has one thread, and no other thread was changing the environment at the
    // fork. See `set` for the reasons.
    unsafe { std::env::remove_var(name) };
}

/// Returns whether an environment can contain this variable.
pub(crate) fn is_valid(name: &OsStr, value: &OsStr) -> bool {
    let (name, value) = (name.as_bytes(), value.as_bytes());
    !name.is_empty() && !name.iter().any(|byte| matches!(byte, 0 | b'=')) && !value.contains(&0)
}

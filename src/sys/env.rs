//! Environment variables that are read once, and those that a worker is born with.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

/// Removes a variable and returns its value.
pub(crate) fn take(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name)?;
    // SAFETY: `init` and `listen_fds` demand to be called before the program starts threads, so
    // nothing reads the environment meanwhile.
    unsafe { std::env::remove_var(name) };
    Some(value)
}

/// In a child that has just been forked: sets a variable that `is_valid`.
pub(crate) fn set(name: &OsStr, value: &OsStr) {
    // SAFETY: this process has one thread.
    unsafe { std::env::set_var(name, value) };
}

/// Whether there can be such a variable.
pub(crate) fn is_valid(name: &OsStr, value: &OsStr) -> bool {
    let (name, value) = (name.as_bytes(), value.as_bytes());
    !name.is_empty() && !name.iter().any(|byte| matches!(byte, 0 | b'=')) && !value.contains(&0)
}

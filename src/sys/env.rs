//! Environment variables of a child that executes nothing. Nothing else changes the environment: other
//! threads may read it at any time.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

/// Sets a variable that `is_valid`, in a child that has just been forked.
pub(crate) fn set(name: &OsStr, value: &OsStr) {
    // SAFETY: this process has one thread; and its parent had one when it forked, where the system says
    // how many there are (`has_other_threads`), so that no other thread was changing the environment.
    unsafe { std::env::set_var(name, value) };
}

/// Removes a variable, in a child that has just been forked.
pub(crate) fn remove(name: &str) {
    // SAFETY: as for `set`.
    unsafe { std::env::remove_var(name) };
}

/// Whether there can be such a variable.
pub(crate) fn is_valid(name: &OsStr, value: &OsStr) -> bool {
    let (name, value) = (name.as_bytes(), value.as_bytes());
    !name.is_empty() && !name.iter().any(|byte| matches!(byte, 0 | b'=')) && !value.contains(&0)
}

//! Environment variables that are read once.

use std::ffi::OsString;

/// Removes a variable and returns its value.
pub(crate) fn take(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name)?;
    // SAFETY: `init` and `listen_fds` demand to be called before the program starts threads, so
    // nothing reads the environment meanwhile.
    unsafe { std::env::remove_var(name) };
    Some(value)
}

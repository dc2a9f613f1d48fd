//! The calling thread's `errno`, for code that must leave it unchanged.

#[cfg(any(target_os = "illumos", target_os = "solaris"))]
use libc::___errno as location;
#[cfg(any(target_os = "android", target_os = "netbsd", target_os = "openbsd"))]
use libc::__errno as location;
#[cfg(any(target_os = "linux", target_os = "dragonfly"))]
use libc::__errno_location as location;
#[cfg(any(target_os = "freebsd", target_vendor = "apple"))]
use libc::__error as location;

/// Returns the value. Async-signal-safe.
pub(super) fn get() -> libc::c_int {
    // SAFETY: the function has no preconditions.
    let location = unsafe { location() };
    // SAFETY: the pointer is valid for reads while the thread runs.
    unsafe { *location }
}

/// Sets the value. Async-signal-safe.
pub(super) fn set(value: libc::c_int) {
    // SAFETY: the function has no preconditions.
    let location = unsafe { location() };
    // SAFETY: the pointer is valid for writes while the thread runs.
    unsafe { *location = value };
}

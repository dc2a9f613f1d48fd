//! Socket flags and `accept` for macOS, whose socket calls take no flags. A flag of 0 makes the
//! caller apply the setting after the call.

use std::os::fd::RawFd;

pub(in crate::sys) const SOCK_CLOEXEC: libc::c_int = 0;
pub(in crate::sys) const SOCK_NONBLOCK: libc::c_int = 0;
pub(in crate::sys) const MSG_CMSG_CLOEXEC: libc::c_int = 0;
/// macOS lacks this flag, so the caller blocks SIGPIPE instead.
pub(in crate::sys) const MSG_NOSIGNAL: libc::c_int = 0;

/// A value that the `si_code` of no signal has. On macOS, the `si_code` does not distinguish the
/// kernel's signals from those of kill(2). It is 0 for both.
pub(in crate::sys) const SI_KERNEL: libc::c_int = libc::c_int::MIN;

/// The number of bytes in one unit of `ru_maxrss`.
pub(in crate::sys) const MAX_RSS_UNIT: u64 = 1;

pub(super) fn accept(listener: RawFd) -> libc::c_int {
    let (address, size) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: null pointers are allowed, and no address is written then.
    unsafe { libc::accept(listener, address, size) }
}

//! macOS: socket calls take no flags. The value 0 makes the caller set them afterwards.

use std::os::fd::RawFd;

pub(in crate::sys) const SOCK_CLOEXEC: libc::c_int = 0;
pub(in crate::sys) const SOCK_NONBLOCK: libc::c_int = 0;
pub(in crate::sys) const MSG_CMSG_CLOEXEC: libc::c_int = 0;
/// The caller blocks SIGPIPE instead.
pub(in crate::sys) const MSG_NOSIGNAL: libc::c_int = 0;

/// The unit of `ru_maxrss` in bytes.
pub(in crate::sys) const MAX_RSS_UNIT: u64 = 1;

pub(super) fn accept(listener: RawFd) -> libc::c_int {
    let (address, size) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the pointers are null, so no address is written.
    unsafe { libc::accept(listener, address, size) }
}

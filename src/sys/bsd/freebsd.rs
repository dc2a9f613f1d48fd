//! Socket flags and `accept` for the BSDs, whose socket calls take the same flags as on Linux.

use std::os::fd::RawFd;

pub(in crate::sys) use libc::{MSG_CMSG_CLOEXEC, MSG_NOSIGNAL, SOCK_CLOEXEC, SOCK_NONBLOCK};

/// The `si_code` of a signal that the kernel itself sends.
pub(in crate::sys) const SI_KERNEL: libc::c_int = 0x1_0006;

/// The number of bytes in one unit of `ru_maxrss`.
pub(in crate::sys) const MAX_RSS_UNIT: u64 = 1024;

pub(super) fn accept(listener: RawFd) -> libc::c_int {
    let (address, size) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: null pointers are allowed, and no address is written then.
    unsafe { libc::accept4(listener, address, size, SOCK_CLOEXEC) }
}

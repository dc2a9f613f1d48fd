//! Steps of a child between `fork` and `execve`. All functions here are async-signal-safe.

use std::io;
use std::os::fd::RawFd;

use crate::sys::check;
pub(in crate::sys) use crate::sys::process::child::reset_signal_by_libc as reset_signal;

/// Drops all supplementary groups.
pub(in crate::sys) fn drop_groups() -> io::Result<()> {
    // SAFETY: the kernel reads no element of an empty list.
    check(unsafe { libc::setgroups(0, std::ptr::null()) }).map(drop)
}

pub(in crate::sys) fn set_group(gid: libc::gid_t) -> io::Result<()> {
    // SAFETY: setgid accesses no memory of this process.
    check(unsafe { libc::setgid(gid) }).map(drop)
}

pub(in crate::sys) fn set_user(uid: libc::uid_t) -> io::Result<()> {
    // SAFETY: setuid accesses no memory of this process.
    check(unsafe { libc::setuid(uid) }).map(drop)
}

/// Does nothing, because this system does not have Linux's capabilities.
pub(in crate::sys) fn drop_capabilities() -> io::Result<()> {
    Ok(())
}

/// Returns `false`, so the caller closes the descriptors one by one.
pub(in crate::sys) fn close_range(_first: RawFd, _last: RawFd) -> bool {
    false
}

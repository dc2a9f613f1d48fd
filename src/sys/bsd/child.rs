//! Steps of a child between `fork` and `execve`. All functions here are async-signal-safe.

use std::io;
use std::os::fd::RawFd;

use crate::sys::check;
pub(in crate::sys) use crate::sys::process::child::set_disposition_by_libc as set_disposition;

/// Drops all supplementary groups.
pub(in crate::sys) fn drop_groups() -> io::Result<()> {
    // SAFETY: the kernel reads no element of an empty list.
    check(unsafe { libc::setgroups(0, std::ptr::null()) }).map(drop)
}

/// Returns whether the ids of this process are the given ones. `None` stands for any id.
///
/// macOS does not report the saved ids. They may differ from the others if the process has changed
/// its ids, or if its program has a set-user-ID or set-group-ID bit (issetugid(2)). In these cases,
/// returns `false`.
pub(in crate::sys) fn has_ids(uid: Option<libc::uid_t>, gid: Option<libc::gid_t>) -> bool {
    // SAFETY: getuid has no preconditions.
    let real_user = unsafe { libc::getuid() };
    // SAFETY: geteuid has no preconditions.
    let effective_user = unsafe { libc::geteuid() };
    // SAFETY: getgid has no preconditions.
    let real_group = unsafe { libc::getgid() };
    // SAFETY: getegid has no preconditions.
    let effective_group = unsafe { libc::getegid() };
    // SAFETY: issetugid has no preconditions.
    let has_changed = unsafe { libc::issetugid() } != 0;
    !has_changed
        && uid.is_none_or(|uid| [real_user, effective_user] == [uid; 2])
        && gid.is_none_or(|gid| [real_group, effective_group] == [gid; 2])
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
///
/// # Safety
///
/// The call has no effect. It is unsafe on Linux.
pub(in crate::sys) unsafe fn close_range(_first: RawFd, _last: RawFd) -> bool {
    false
}

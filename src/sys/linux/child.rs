//! Steps of a child between `fork` and `execve`, by system calls of the kernel itself.
//!
//! The C library's functions would take locks, or act on threads of which this process has only a copy.
//! All functions here are async-signal-safe.

use std::io;
use std::os::fd::RawFd;

use super::MAX_SIGNAL;

#[cfg(not(any(target_arch = "arm", target_arch = "x86")))]
use libc::{SYS_setgroups, SYS_setresgid, SYS_setresuid};
// The plain calls of these architectures take users and groups of 16 bits.
#[cfg(any(target_arch = "arm", target_arch = "x86"))]
use libc::{
    SYS_setgroups32 as SYS_setgroups, SYS_setresgid32 as SYS_setresgid,
    SYS_setresuid32 as SYS_setresuid,
};

fn check(result: libc::c_long) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Resets a signal to its default. The C library may take a lock for this, which another thread held
/// when this child was forked.
pub(in crate::sys) fn reset_signal(signal: libc::c_int) {
    /// All zeroes are the default disposition. The kernel's structure is shorter everywhere.
    const DEFAULT: [u64; 8] = [0; 8];
    /// The length of the kernel's set of signals in bytes.
    const SET_LENGTH: usize = MAX_SIGNAL as usize / 8;
    let (new, old) = (DEFAULT.as_ptr(), std::ptr::null_mut::<u64>());
    // SAFETY: the new action lives through the call, and the old one is not requested.
    unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, SET_LENGTH) };
}

/// Drops all supplementary groups.
pub(in crate::sys) fn drop_groups() -> io::Result<()> {
    // SAFETY: an empty list is not read.
    check(unsafe { libc::syscall(SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) })
}

pub(in crate::sys) fn set_group(gid: libc::gid_t) -> io::Result<()> {
    // SAFETY: setresgid takes three integers.
    check(unsafe { libc::syscall(SYS_setresgid, gid, gid, gid) })
}

pub(in crate::sys) fn set_user(uid: libc::uid_t) -> io::Result<()> {
    // SAFETY: setresuid takes three integers.
    check(unsafe { libc::syscall(SYS_setresuid, uid, uid, uid) })
}

/// Empties the permitted, effective and inheritable sets of capabilities, and so the ambient set.
///
/// A change of the user does not always do this (capabilities(7)): not with SECBIT_NO_SETUID_FIXUP or
/// SECBIT_KEEP_CAPS, and not if the parent was not root. It never empties the inheritable set.
///
/// A kernel without capabilities has no other user, so `set_user` fails first.
pub(in crate::sys) fn drop_capabilities() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    /// `_LINUX_CAPABILITY_VERSION_3`: sets of 64 bits, since Linux 2.6.26.
    const VERSION: u32 = 0x2008_0522;
    /// Effective, permitted and inheritable: first their low halves, then their high halves.
    const NONE: [u32; 6] = [0; 6];
    let mut header = Header {
        version: VERSION,
        pid: 0,
    };
    // SAFETY: the header is writable, and the sets have the length of this version.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, NONE.as_ptr()) })
}

/// Closes all descriptors from `first` to `last`. Returns whether the kernel has close_range(2), since
/// Linux 5.9.
pub(in crate::sys) fn close_range(first: RawFd, last: RawFd) -> bool {
    // SAFETY: this child does not use the descriptors any more.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) == 0 }
}

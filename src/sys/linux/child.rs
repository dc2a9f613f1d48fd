//! Steps of a child between `fork` and `execve`, made by direct system calls.
//!
//! The C library's functions would take locks, or act on threads that exist only in the parent. All
//! functions here are async-signal-safe.

use std::io;
use std::os::fd::RawFd;

use super::MAX_SIGNAL;
use crate::sys::process::child::Disposition;

#[cfg(not(any(target_arch = "arm", target_arch = "x86")))]
use libc::{SYS_setgroups, SYS_setresgid, SYS_setresuid};
// On these architectures, the calls without `32` in their names take user and group ids of 16 bits.
#[cfg(any(target_arch = "arm", target_arch = "x86"))]
use libc::{
    SYS_setgroups32 as SYS_setgroups, SYS_setresgid32 as SYS_setresgid,
    SYS_setresuid32 as SYS_setresuid,
};

pub(super) fn check(result: libc::c_long) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets a signal's disposition. Bypasses the C library, because its function may wait for a lock
/// that another thread held when this child was forked.
pub(in crate::sys) fn set_disposition(signal: libc::c_int, disposition: Disposition) {
    /// The index of the disposition in the kernel's structure. On MIPS, the flags come first.
    const DISPOSITION: usize = cfg!(any(target_arch = "mips", target_arch = "mips64")) as usize;
    /// The length of the kernel's signal set in bytes.
    const SET_LENGTH: usize = MAX_SIGNAL as usize / 8;
    // The kernel's structure, without flags and with an empty mask. On every architecture, the
    // structure is shorter than this array.
    let mut action = [0usize; 16];
    action[DISPOSITION] = disposition.value();
    let (new, old) = (action.as_ptr(), std::ptr::null_mut::<usize>());
    // SAFETY: the pointer is valid for reads of the new action, and the old action is not
    // requested.
    unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, SET_LENGTH) };
}

/// Drops all supplementary groups.
pub(in crate::sys) fn drop_groups() -> io::Result<()> {
    // SAFETY: the kernel reads no element of an empty list.
    check(unsafe { libc::syscall(SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) })
}

/// Returns whether the real, the effective and the saved ids of this process are the given ones.
/// `None` stands for any id.
pub(in crate::sys) fn has_ids(uid: Option<libc::uid_t>, gid: Option<libc::gid_t>) -> bool {
    let (mut users, mut groups) = ([0; 3], [0; 3]);
    let [real, effective, saved] = users.each_mut().map(std::ptr::from_mut);
    // Use the C library, because these two functions only make the system call.
    // SAFETY: the pointers are valid for writes of one id each.
    let has_users = unsafe { libc::getresuid(real, effective, saved) } == 0;
    let [real, effective, saved] = groups.each_mut().map(std::ptr::from_mut);
    // SAFETY: the pointers are valid for writes of one id each.
    let has_groups = unsafe { libc::getresgid(real, effective, saved) } == 0;
    has_users
        && has_groups
        && uid.is_none_or(|uid| users == [uid; 3])
        && gid.is_none_or(|gid| groups == [gid; 3])
}

pub(in crate::sys) fn set_group(gid: libc::gid_t) -> io::Result<()> {
    // SAFETY: setresgid accesses no memory of this process.
    check(unsafe { libc::syscall(SYS_setresgid, gid, gid, gid) })
}

pub(in crate::sys) fn set_user(uid: libc::uid_t) -> io::Result<()> {
    // SAFETY: setresuid accesses no memory of this process.
    check(unsafe { libc::syscall(SYS_setresuid, uid, uid, uid) })
}

/// Empties the permitted, effective and inheritable capability sets. The kernel then also empties
/// the ambient set.
///
/// A change of the user does not always empty the sets (capabilities(7)). With
/// SECBIT_NO_SETUID_FIXUP or SECBIT_KEEP_CAPS, or if the parent was not root, capabilities stay.
/// The inheritable set always stays.
///
/// On a kernel without capabilities, this call fails. Such a kernel (without `CONFIG_MULTIUSER`)
/// has no user except root, so `set_user` has already failed for any other user.
pub(in crate::sys) fn drop_capabilities() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    /// `_LINUX_CAPABILITY_VERSION_3`, which has sets of 64 bits and exists since Linux 2.6.26.
    const VERSION: u32 = 0x2008_0522;
    /// The empty effective, permitted and inheritable capability sets: first their low halves, then
    /// their high halves.
    const NONE: [u32; 6] = [0; 6];
    let mut header = Header {
        version: VERSION,
        pid: 0,
    };
    // SAFETY: the header is valid for writes, and the sets have the length of this version.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, NONE.as_ptr()) })
}

/// Closes all descriptors from `first` to `last`. Returns `false` if the call fails, for instance
/// because the kernel has no close_range(2) (before Linux 5.9).
///
/// # Safety
///
/// This process must no longer use the descriptors.
pub(in crate::sys) unsafe fn close_range(first: RawFd, last: RawFd) -> bool {
    // SAFETY: the caller guarantees that nothing uses the descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) == 0 }
}

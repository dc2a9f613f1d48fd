//! The flags for referring to a file without access to its contents, and a change of a file's mode
//! that does not affect a file that has replaced the expected one.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use crate::sys::check;
use crate::sys::file::{FileStatus, c_string, status_at};

/// The flag that opens a file without access to its contents. Opening with this flag needs no
/// permission on the file.
pub(in crate::sys) const NAME_ONLY: libc::c_int = libc::O_PATH;

/// The flags that select a symbolic link's own status. With an empty name, they select the status
/// of the descriptor.
pub(in crate::sys) const STATUS_FLAGS: libc::c_int =
    libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH;

/// Changes a file's mode if the file still has this status. Neither follows a symbolic link nor
/// touches a file that has replaced the expected one.
pub(crate) fn change_mode_at(
    directory: &OwnedFd,
    name: &OsStr,
    status: FileStatus,
    mode: libc::mode_t,
) -> io::Result<()> {
    /// The system call number of fchmodat2(2), for which `libc` has a constant only on some
    /// targets. The number is the same on all architectures that Rust supports except MIPS. On
    /// MIPS, no system call has this number, so the call below fails.
    const FCHMODAT2: libc::c_long = 452;
    let name = c_string(name)?;
    // Open with `O_PATH`, because open(2) fails for a socket file with any other access mode.
    let flags = NAME_ONLY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: the name is zero-terminated and lives through the call.
    let number = check(unsafe { libc::openat(directory.as_raw_fd(), name.as_ptr(), flags) })?;
    // SAFETY: the kernel has just opened the descriptor for this call.
    let file = unsafe { OwnedFd::from_raw_fd(number) };
    if status_at(&file, OsStr::new(""))? != status {
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
    }
    let empty = c"".as_ptr();
    // SAFETY: the name is zero-terminated, and the descriptor is open and owned here.
    let changed = unsafe { libc::syscall(FCHMODAT2, number, empty, mode, libc::AT_EMPTY_PATH) };
    if changed == 0 {
        return Ok(());
    }
    // The call fails before Linux 6.6, for example. After any failure, use the descriptor's entry
    // in /proc, because this entry refers to the same file.
    let path = c_string(format!("/proc/self/fd/{number}").as_ref())?;
    // SAFETY: the path is zero-terminated and lives through the call.
    check(unsafe { libc::chmod(path.as_ptr(), mode) })?;
    Ok(())
}

//! Descriptors by number, where they cannot be avoided.

use std::ffi::CString;
use std::fs::Metadata;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::check;

/// Takes ownership of the descriptor that the master left for this process, if it is a socket.
///
/// # Errors
///
/// The number is not an open descriptor, or not that of a stream socket.
pub(crate) fn adopt_channel(number: RawFd) -> io::Result<UnixStream> {
    // SAFETY: F_GETFD only reads the flags, whatever the number is.
    check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: the descriptor is open, and nobody else in this process knows of it: `init` runs
    // once, and has consumed the variable that named it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    let stream = UnixStream::from(fd);
    let outcome = stream.local_addr().and_then(|_| {
        close_on_exec(number)?;
        stream.set_nonblocking(true)
    });
    if let Err(error) = outcome {
        // It is somebody else's after all: leave it open.
        std::mem::forget(stream);
        return Err(error);
    }
    Ok(stream)
}

pub(crate) fn close_on_exec(number: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD changes no memory.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(())
}

pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>, nonblocking: bool) -> io::Result<()> {
    // SAFETY: F_GETFL only reads the flags.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    let wanted = if nonblocking {
        flags | libc::O_NONBLOCK
    } else {
        flags & !libc::O_NONBLOCK
    };
    // SAFETY: F_SETFL changes no memory.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, wanted) })?;
    Ok(())
}

/// Makes a copy of a descriptor that is known by its number alone; its own number is `at_least`.
///
/// # Errors
///
/// The number is not an open descriptor, or there are no descriptors left.
pub(crate) fn duplicate(number: RawFd, at_least: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC changes no memory, whatever the number is.
    let copy = check(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, at_least) })?;
    Ok(adopt(copy))
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Changes the mode of a file, if `is_it` says that it is the right one: not of what a link leads
/// to, which somebody may have put in its place.
#[cfg(target_os = "linux")]
pub(crate) fn change_mode(
    path: &Path,
    mode: u32,
    is_it: impl FnOnce(&Metadata) -> bool,
) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;

    let path = c_path(path)?;
    // The file itself, and not what it is to others: a socket cannot be opened.
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: the path is zero-terminated.
    let number = check(unsafe { libc::open(path.as_ptr(), flags) })?;
    let file = std::fs::File::from(adopt(number));
    if !is_it(&file.metadata()?) {
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
    }
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::set_permissions(name, std::fs::Permissions::from_mode(mode))
}

/// Changes the mode of a file: not of what a link leads to, which somebody may have put in its
/// place.
#[cfg(not(target_os = "linux"))]
pub(crate) fn change_mode(
    path: &Path,
    mode: u32,
    _is_it: impl FnOnce(&Metadata) -> bool,
) -> io::Result<()> {
    let path = c_path(path)?;
    let mode = libc::mode_t::try_from(mode).unwrap_or(0);
    let flags = libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the path is zero-terminated.
    check(unsafe { libc::fchmodat(libc::AT_FDCWD, path.as_ptr(), mode, flags) })?;
    Ok(())
}

/// How many descriptors this process may have.
#[allow(
    clippy::useless_conversion,
    reason = "the type is not the same on all systems"
)]
pub(crate) fn limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure is writable.
    match check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }) {
        Ok(_) => u64::try_from(limit.rlim_cur).unwrap_or(u64::MAX),
        Err(_) => u64::MAX,
    }
}

/// Adopts descriptors that the kernel has just made for this process.
pub(super) fn adopt(number: RawFd) -> OwnedFd {
    // SAFETY: the caller got the number from the kernel a moment ago and keeps no copy.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Whether the other side of a connection is gone for good, and has left nothing to read: both
/// directions are shut, or an error such as a reset is pending. A client that only stopped sending
/// still waits for its answer.
pub(crate) fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one valid pollfd is passed, and the call does not wait.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    if ready <= 0 || poll.revents & (libc::POLLHUP | libc::POLLERR) == 0 {
        return false;
    }
    let mut byte = 0u8;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: one byte is written at most, into a live buffer.
    let read = unsafe { libc::recv(fd.as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
    read <= 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    #[test]
    fn who_left_a_message_is_not_gone() {
        let (here, mut there) = UnixStream::pair().unwrap();
        assert!(!is_hung_up(here.as_fd()));
        there.write_all(b"goodbye").unwrap();
        drop(there);
        assert!(!is_hung_up(here.as_fd()), "it can still be heard");
        let (here, there) = UnixStream::pair().unwrap();
        drop(there);
        assert!(is_hung_up(here.as_fd()));
    }
}

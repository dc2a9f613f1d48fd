//! Functions for descriptors that are known only by their numbers, and for the flags of any
//! descriptor.

use std::io;
use std::mem::ManuallyDrop;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use super::owner::Owner;
use super::{check, option};

/// The first number after standard input, output and error. The descriptors that systemd passes
/// begin at this number (`SD_LISTEN_FDS_START` in sd_listen_fds(3)).
pub(crate) const LISTEN_FDS_START: usize = 3;

/// Reads bytes from a socket without removing them and without waiting.
///
/// # Errors
///
/// Returns an error if the number is not an open socket, and `WouldBlock` if there is nothing to
/// read yet.
pub(crate) fn peek(number: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the pointer is valid for writes of the buffer's length.
    let read = unsafe { libc::recv(number, buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Takes ownership of the descriptors `first` to `first + count - 1`. The process that executed
/// this program left them open.
///
/// # Errors
///
/// Returns an error, and takes no descriptor, if one of them is not open or is marked as
/// close-on-exec. A marked descriptor cannot have been passed, because `execve` would have closed
/// it.
pub(crate) fn adopt_passed(first: usize, count: usize) -> io::Result<Vec<OwnedFd>> {
    let numbers = first..first.saturating_add(count);
    let numbers = numbers.map(|number| RawFd::try_from(number).unwrap_or(RawFd::MAX));
    for number in numbers.clone() {
        // SAFETY: F_GETFD changes no memory and accepts any number.
        let flags = check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
        if flags & libc::FD_CLOEXEC != 0 {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
    }
    for number in numbers.clone() {
        close_on_exec(number)?;
    }
    // SAFETY: the descriptors are open, and no other code of this process knows them.
    Ok(numbers
        .map(|number| unsafe { OwnedFd::from_raw_fd(number) })
        .collect())
}

pub(crate) fn close_on_exec(number: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD changes no memory.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(())
}

pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>, nonblocking: bool) -> io::Result<()> {
    set_status_flag(fd.as_raw_fd(), libc::O_NONBLOCK, nonblocking)
}

/// Returns a descriptor's status flags (`F_GETFL` in fcntl(2)).
pub(super) fn status_flags(number: RawFd) -> io::Result<libc::c_int> {
    // SAFETY: F_GETFL only reads the flags.
    check(unsafe { libc::fcntl(number, libc::F_GETFL) })
}

pub(super) fn set_status_flag(number: RawFd, flag: libc::c_int, set: bool) -> io::Result<()> {
    let flags = status_flags(number)?;
    let wanted = if set { flags | flag } else { flags & !flag };
    if wanted == flags {
        return Ok(());
    }
    // SAFETY: F_SETFL changes no memory.
    check(unsafe { libc::fcntl(number, libc::F_SETFL, wanted) })?;
    Ok(())
}

/// Duplicates a descriptor that is known only by its number. The copy is closed on exec, and its
/// number is at least `at_least`.
///
/// # Errors
///
/// Returns an error if the number is not an open descriptor, or if no descriptor is free.
pub(crate) fn duplicate(number: RawFd, at_least: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC changes no memory and accepts any number.
    let copy = check(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, at_least) })?;
    // SAFETY: the kernel has just opened the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Closes the descriptor with this number, and gives the number to a copy of `new` that is closed
/// on exec. A value that owned the old descriptor now owns the copy.
pub(crate) fn replace(number: RawFd, new: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: dup2 changes no memory.
    check(unsafe { libc::dup2(new.as_raw_fd(), number) })?;
    close_on_exec(number)
}

/// Creates a socket that carries no data. If a value still owns a descriptor that must be closed,
/// [`replace`] gives the descriptor's number to a copy of this socket. The value can then use or
/// close the number without affecting another descriptor.
pub(crate) fn inert() -> io::Result<OwnedFd> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    // Ignore errors, because some systems shut down only connected sockets. On those systems,
    // reading fails instead of returning end-of-file.
    let _ = socket.shutdown(Shutdown::Both);
    Ok(socket.into())
}

/// Returns this process's descriptor limit, or `u64::MAX` if the limit cannot be read.
#[allow(
    clippy::useless_conversion,
    reason = "the type is not the same on all systems"
)]
pub(crate) fn limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is valid for writes of an `rlimit`.
    match check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }) {
        Ok(_) => u64::try_from(limit.rlim_cur).unwrap_or(u64::MAX),
        Err(_) => u64::MAX,
    }
}

/// A descriptor that its owner can close without waiting, even if no other copy is left.
///
/// Closing the last copy of a socket with SO_LINGER waits for the peer, even if the socket is
/// non-blocking. Other processes may already have closed their copies, so any copy may be the last.
/// To avoid the wait, dropping this value first disables SO_LINGER.
#[derive(Debug)]
pub(crate) struct NoLingerFd {
    fd: ManuallyDrop<OwnedFd>,
    owner: Owner,
}

impl NoLingerFd {
    /// Converts the value into a plain descriptor. SO_LINGER keeps its setting.
    pub(crate) fn into_owned_fd(self) -> OwnedFd {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: neither `fd` nor the value that contained it is used again.
        unsafe { ManuallyDrop::take(&mut this.fd) }
    }
}

impl From<OwnedFd> for NoLingerFd {
    fn from(fd: OwnedFd) -> Self {
        let fd = ManuallyDrop::new(fd);
        let owner = Owner::current();
        Self { fd, owner }
    }
}

impl AsFd for NoLingerFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for NoLingerFd {
    fn drop(&mut self) {
        // Change the option only in the owner, because a forked child shares the socket and its
        // options.
        if self.owner.is_current() {
            disable_linger(self.fd.as_fd());
        }
        // SAFETY: `fd` is not used again.
        unsafe { ManuallyDrop::drop(&mut self.fd) };
    }
}

/// Disables SO_LINGER if it would make `close` wait.
fn disable_linger(fd: BorrowedFd<'_>) {
    // SAFETY: every bit pattern is a valid `linger`.
    let linger: io::Result<libc::linger> =
        unsafe { option::get(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER) };
    let Ok(mut linger) = linger else {
        return;
    };
    // Keep a linger time of zero, because `close` then resets the connection without waiting.
    if linger.l_onoff != 0 && linger.l_linger != 0 {
        linger.l_onoff = 0;
        let _ = option::set(fd, libc::SOL_SOCKET, libc::SO_LINGER, &linger);
    }
}

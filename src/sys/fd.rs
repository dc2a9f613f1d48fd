//! Descriptors by number, where they cannot be avoided.

use std::ffi::{CString, OsStr};
use std::io::{self, Read as _};
use std::mem::ManuallyDrop;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;

use super::check;
use super::owner::Owner;

/// Looks at what can be read from a socket that is known by its number alone, and leaves it there.
///
/// # Errors
///
/// The number is not an open descriptor, or not that of a socket, or nothing can be read.
pub(crate) fn peek(number: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: at most the buffer's length is written, into it.
    let read = unsafe { libc::recv(number, buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Takes ownership of the descriptor that the master left for this process, and reads the welcome
/// that `peek` has found there.
pub(crate) fn adopt_channel(number: RawFd, preamble: &mut [u8]) -> io::Result<UnixStream> {
    // SAFETY: the descriptor is open, and nobody else in this process knows of it: `init` runs
    // once, and has consumed the variable that named it.
    let mut stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(number) });
    close_on_exec(number)?;
    stream.read_exact(preamble)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// Takes ownership of as many descriptors as whoever executed this program has left open for it, from
/// number `first` on.
///
/// # Errors
///
/// One of them is not open; or closed on exec, as what has been opened since is: nothing with this
/// mark has come through an `execve`. Then none is taken.
pub(crate) fn adopt_passed(first: usize, count: usize) -> io::Result<Vec<OwnedFd>> {
    let numbers = first..first.saturating_add(count);
    let numbers = numbers.map(|number| RawFd::try_from(number).unwrap_or(RawFd::MAX));
    for number in numbers.clone() {
        // SAFETY: F_GETFD changes no memory, whatever the number is.
        let flags = check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
        if flags & libc::FD_CLOEXEC != 0 {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
    }
    for number in numbers.clone() {
        close_on_exec(number)?;
    }
    // They are open, and the caller's: nobody else in this process knows of them.
    Ok(numbers.map(adopt).collect())
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
    if wanted == flags {
        return Ok(());
    }
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

/// Puts a copy of `new` in the place of a descriptor that is known by its number, which is closed in
/// this process. Owners of the number have the copy from now on.
pub(crate) fn replace(number: RawFd, new: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: dup2 changes no memory.
    check(unsafe { libc::dup2(new.as_raw_fd(), number) })?;
    close_on_exec(number)
}

/// Makes a descriptor that nothing can be done with. A copy of it keeps a number from being used again
/// as long as a value that does not know of its end may use or close it.
pub(crate) fn inert() -> io::Result<OwnedFd> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    // Where only connected sockets can be shut down, reading fails instead of ending.
    let _ = socket.shutdown(Shutdown::Both);
    Ok(socket.into())
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.as_bytes())?)
}

/// What a descriptor of a directory or file has to be good for here: to name it.
#[cfg(target_os = "linux")]
const NAME_ONLY: libc::c_int = libc::O_PATH;
#[cfg(not(target_os = "linux"))]
const NAME_ONLY: libc::c_int = libc::O_RDONLY;

/// Opens a directory: whatever becomes of its name, its files can be named relative to it.
pub(crate) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let path = c_string(path.as_os_str())?;
    let flags = NAME_ONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: the path is zero-terminated.
    let number = check(unsafe { libc::open(path.as_ptr(), flags) })?;
    Ok(adopt(number))
}

/// With an empty name, the status is that of the descriptor itself.
#[cfg(target_os = "linux")]
const STATUS_FLAGS: libc::c_int = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH;
#[cfg(not(target_os = "linux"))]
const STATUS_FLAGS: libc::c_int = libc::AT_SYMLINK_NOFOLLOW;

/// Which file it is, of all in the system, and what it may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileStatus {
    pub(crate) device: libc::dev_t,
    pub(crate) inode: libc::ino_t,
    pub(crate) mode: libc::mode_t,
}

impl FileStatus {
    pub(crate) fn is_socket(self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFSOCK
    }

    /// Whether it is the same file, though it may be used for other things now.
    pub(crate) fn is_same(self, other: Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

impl From<libc::stat> for FileStatus {
    fn from(stat: libc::stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            mode: stat.st_mode,
        }
    }
}

/// The status of a file itself, and not of what it leads to if it is a link.
pub(crate) fn status_at(directory: &OwnedFd, name: &OsStr) -> io::Result<FileStatus> {
    let name = c_string(name)?;
    // SAFETY: stat is plain data.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the name is zero-terminated, and the structure writable.
    check(unsafe {
        libc::fstatat(
            directory.as_raw_fd(),
            name.as_ptr(),
            &raw mut stat,
            STATUS_FLAGS,
        )
    })?;
    Ok(stat.into())
}

pub(crate) fn remove_at(directory: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let name = c_string(name)?;
    // SAFETY: the name is zero-terminated.
    check(unsafe { libc::unlinkat(directory.as_raw_fd(), name.as_ptr(), 0) })?;
    Ok(())
}

/// Changes the mode of a file, if it is still this one: not of what somebody may have put in its
/// place, nor of what a link leads to.
#[cfg(target_os = "linux")]
pub(crate) fn change_mode_at(
    directory: &OwnedFd,
    name: &OsStr,
    status: FileStatus,
    mode: libc::mode_t,
) -> io::Result<()> {
    /// Newer than the constant of `libc`; the same on all architectures.
    const FCHMODAT2: libc::c_long = 452;
    let name = c_string(name)?;
    // The file itself, and not what it is to others: a socket cannot be opened.
    let flags = NAME_ONLY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: the name is zero-terminated.
    let number = check(unsafe { libc::openat(directory.as_raw_fd(), name.as_ptr(), flags) })?;
    let file = adopt(number);
    if status_at(&file, OsStr::new(""))? != status {
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
    }
    let empty = c"".as_ptr();
    // SAFETY: the name is zero-terminated.
    let changed = unsafe { libc::syscall(FCHMODAT2, number, empty, mode, libc::AT_EMPTY_PATH) };
    if changed == 0 {
        return Ok(());
    }
    let path = c_string(format!("/proc/self/fd/{number}").as_ref())?;
    // SAFETY: the path is zero-terminated.
    check(unsafe { libc::chmod(path.as_ptr(), mode) })?;
    Ok(())
}

/// Changes the mode of a file: not of what a link leads to.
#[cfg(not(target_os = "linux"))]
pub(crate) fn change_mode_at(
    directory: &OwnedFd,
    name: &OsStr,
    _status: FileStatus,
    mode: libc::mode_t,
) -> io::Result<()> {
    let name = c_string(name)?;
    let flags = libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the name is zero-terminated.
    check(unsafe { libc::fchmodat(directory.as_raw_fd(), name.as_ptr(), mode, flags) })?;
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

/// A descriptor of what other processes may have, too. If they are gone, closing this one is the end
/// of it, and the end of a socket with SO_LINGER waits for the peer, though the socket be set not to
/// block. Who has it as his own may want that; in passing it would be a way to hold up this process.
#[derive(Debug)]
pub(crate) struct NoLingerFd {
    fd: ManuallyDrop<OwnedFd>,
    owner: Owner,
}

impl NoLingerFd {
    /// Makes it this process's own.
    pub(crate) fn claim(self) -> OwnedFd {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: neither it nor what it was in is used again.
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
        // The option is the socket's, and so the owner's, too.
        if self.owner.is_current() {
            do_not_linger(&self.fd);
        }
        // SAFETY: it is not used again.
        unsafe { ManuallyDrop::drop(&mut self.fd) };
    }
}

/// Makes closing a socket something that does not wait.
fn do_not_linger(fd: &OwnedFd) {
    let mut linger = libc::linger {
        l_onoff: 0,
        l_linger: 0,
    };
    let mut size = libc::socklen_t::try_from(size_of_val(&linger)).unwrap_or(0);
    // SAFETY: value and size are writable, and the size is that of the value.
    let got = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw mut linger).cast(),
            &raw mut size,
        )
    };
    // With a time of zero it is the end at once.
    if got == 0 && linger.l_onoff != 0 && linger.l_linger != 0 {
        linger.l_onoff = 0;
        // SAFETY: the value lives through the call, and its size is given.
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const linger).cast(),
                size,
            )
        };
    }
}

/// Adopts descriptors that are this process's, and nobody else's in it.
pub(super) fn adopt(number: RawFd) -> OwnedFd {
    // SAFETY: the caller got the number from the kernel, or from whoever executed this program, and
    // keeps no copy.
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

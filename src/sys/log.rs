//! Writes to a descriptor that other processes share, without blocking and without raising signals.
//!
//! The flag `O_NONBLOCK` belongs to the open file description. This module never sets the flag on a
//! shared open file description, because the writes of the other processes would then fail with
//! EAGAIN. The kind of file decides how this module writes without blocking:
//!
//! | target | method | may wait |
//! |---|---|---|
//! | socket | `send` with `MSG_DONTWAIT` | never |
//! | file | `write` | for the disk only |
//! | pipe, terminal | `write` to a separate, non-blocking open file description (Linux) | never |
//! | pipe, if that fails | `pwritev2`, `RWF_NOWAIT` (Linux 6.5, not for a FIFO) | never |
//! | all others | `poll`, then `write` of at most `PIPE_BUF` bytes | see `write_if_ready` |

use std::fs::{File, Metadata};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::rc::Rc;

use super::fd;
use super::poll;
use super::retry;
use super::socket::{SEND_FLAGS, without_signals};

/// The destination of log lines. The variant determines how lines are written.
#[derive(Debug)]
pub(crate) enum Target {
    /// A standard descriptor, by its number, that could not be duplicated because the system lacked
    /// descriptors or memory. The next write tries to duplicate it again.
    NotDuplicated(RawFd),
    /// A descriptor that is closed or not open for writing. Each write fails with EBADF.
    Closed,
    /// A stream socket.
    Stream(Rc<File>),
    /// A socket that keeps messages separate. Each line is one message.
    Datagrams(Rc<File>),
    /// A regular file. A write waits only for the disk.
    File(Rc<File>),
    /// A pipe or terminal that this process has opened again, so that only this process uses the
    /// non-blocking open file description.
    Own(Rc<File>),
    /// A pipe, terminal or other device whose open file description other processes may share.
    Shared(Rc<File>, WriteMethod),
}

/// How to write without blocking to an open file description that other processes may share.
///
/// The variants are in the order in which they are tried. On Linux, `Reopen` is tried first for a
/// pipe, and for a terminal if opening its device again leads to the same terminal. For any other
/// file, only `Poll` is used. A method that turns out to be unsupported is replaced by the next
/// one for all later writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteMethod {
    /// Open the file again through `/proc/self/fd`, with a non-blocking open file description. If
    /// this succeeds, the target becomes `Target::Own`.
    Reopen,
    /// Call pwritev2(2) with `RWF_NOWAIT`.
    NoWait,
    /// Write only if `poll` reports that the file is writable. See `write_if_ready` for the cases
    /// in which the write still waits.
    Poll,
}

/// The maximum size of one write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteLimit {
    /// One line of any length.
    Line,
    /// This number of bytes.
    Bytes(usize),
}

/// The signals that a write can raise for this thread, each with the error with which the write
/// then fails. The signals are blocked during the write. SIGTTOU has 0 instead of an error number,
/// because the write then does not fail: a background process that blocks SIGTTOU may write to a
/// terminal even if `tostop` is set (termios(3)).
const RAISED_BY_WRITE: [(libc::c_int, libc::c_int); 3] = [
    (libc::SIGPIPE, libc::EPIPE),
    (libc::SIGXFSZ, libc::EFBIG),
    (libc::SIGTTOU, 0),
];

impl Target {
    pub(crate) fn stdout() -> Self {
        Self::standard(libc::STDOUT_FILENO)
    }

    pub(crate) fn stderr() -> Self {
        Self::standard(libc::STDERR_FILENO)
    }

    /// Returns the target for a copy of a standard descriptor.
    fn standard(number: RawFd) -> Self {
        match fd::duplicate(number, libc::STDERR_FILENO + 1) {
            Ok(fd) => Self::new(fd),
            Err(error) if is_lack(&error) => Self::NotDuplicated(number),
            Err(_) => Self::Closed,
        }
    }

    /// Returns the target that fits the kind of file of `fd`. Writes nothing.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        let is_writable = is_open_for_writing(fd.as_fd());
        let file = File::from(fd);
        let Some(metadata) = file.metadata().ok().filter(|_| is_writable) else {
            return Self::Closed;
        };
        let kind = metadata.file_type();
        if kind.is_socket() {
            return if is_stream(&file) {
                Self::Stream(Rc::new(file))
            } else {
                Self::Datagrams(Rc::new(file))
            };
        }
        if kind.is_file() {
            return Self::File(Rc::new(file));
        }
        let is_same_when_opened = kind.is_fifo() || file.is_terminal() && is_own_device(&metadata);
        let method = if is_same_when_opened && cfg!(any(target_os = "linux", target_os = "android"))
        {
            WriteMethod::Reopen
        } else {
            WriteMethod::Poll
        };
        Self::Shared(Rc::new(file), method)
    }

    /// Returns the file to wait for when a write would block. Returns `None` if no file is open.
    pub(crate) fn file(&self) -> Option<&Rc<File>> {
        match self {
            Self::NotDuplicated(_) | Self::Closed => None,
            Self::Stream(file)
            | Self::Datagrams(file)
            | Self::File(file)
            | Self::Own(file)
            | Self::Shared(file, _) => Some(file),
        }
    }

    /// Returns whether this target writes to `file`. A copy of the same descriptor is a different
    /// file.
    pub(crate) fn is(&self, file: &Rc<File>) -> bool {
        self.file().is_some_and(|own| Rc::ptr_eq(own, file))
    }

    /// Returns the maximum size of one [`write`](Self::write).
    pub(crate) fn write_limit(&self) -> WriteLimit {
        match self {
            // Treat a descriptor that is not duplicated yet as a message socket, because it may be
            // one.
            Self::Datagrams(_) | Self::NotDuplicated(_) => WriteLimit::Line,
            Self::Closed | Self::Stream(_) | Self::File(_) => WriteLimit::Bytes(usize::MAX),
            // The kernel writes up to this length to a pipe in one piece, so the lines of several
            // processes do not mix (pipe(7)).
            Self::Own(_) | Self::Shared(..) => WriteLimit::Bytes(libc::PIPE_BUF),
        }
    }

    /// Writes as many of `bytes` as the file takes without blocking, and returns their number. The
    /// caller passes at most one [`write_limit`](Self::write_limit). Raises no signal.
    ///
    /// # Errors
    ///
    /// Returns `WouldBlock` if the file takes no bytes at present. Returns ENXIO if a pipe has no
    /// reader at present, and EMFILE if a standard descriptor still cannot be duplicated. Also
    /// returns the system's other errors.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        without_signals(&RAISED_BY_WRITE, || retry(|| self.write_once(bytes)))
    }

    fn write_once(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Closed => Err(io::Error::from_raw_os_error(libc::EBADF)),
            Self::NotDuplicated(number) => {
                *self = Self::standard(*number);
                if let Self::NotDuplicated(_) = self {
                    return Err(io::Error::from_raw_os_error(libc::EMFILE));
                }
                let length = match self.write_limit() {
                    WriteLimit::Line => bytes.len(),
                    WriteLimit::Bytes(most) => most.min(bytes.len()),
                };
                self.write_once(&bytes[..length])
            }
            Self::Stream(file) | Self::Datagrams(file) => send(file.as_fd(), bytes),
            Self::File(file) | Self::Own(file) => (&**file).write(bytes),
            Self::Shared(file, WriteMethod::Reopen) => match reopen(file) {
                Ok(own) => {
                    let written = (&own).write(bytes);
                    *self = Self::Own(Rc::new(own));
                    written
                }
                // The pipe has no reader at present. Keep `WriteMethod::Reopen`, because a reader
                // may open the pipe later.
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Err(error),
                Err(error) if is_lack(&error) => write_shared(file, bytes),
                Err(_) => {
                    *self = Self::Shared(Rc::clone(file), WriteMethod::NoWait);
                    self.write_once(bytes)
                }
            },
            Self::Shared(file, WriteMethod::NoWait) => match no_wait::write(file.as_fd(), bytes) {
                Err(error) if no_wait::is_missing(&error) => {
                    *self = Self::Shared(Rc::clone(file), WriteMethod::Poll);
                    self.write_once(bytes)
                }
                written => written,
            },
            Self::Shared(file, WriteMethod::Poll) => write_if_ready(file, bytes),
        }
    }
}

/// Returns whether an error means that the system lacks descriptors or memory. A later attempt may
/// succeed.
fn is_lack(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    [libc::EMFILE, libc::ENFILE, libc::ENOMEM]
        .map(Some)
        .contains(&number)
}

fn is_open_for_writing(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: F_GETFL only reads the flags.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    flags != -1 && matches!(flags & libc::O_ACCMODE, libc::O_WRONLY | libc::O_RDWR)
}

fn is_stream(socket: &File) -> bool {
    let mut kind: libc::c_int = 0;
    let mut size = libc::socklen_t::try_from(size_of_val(&kind)).unwrap_or(0);
    // SAFETY: both pointers are valid for writes, and `size` is the size of `kind`.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TYPE,
            (&raw mut kind).cast(),
            &raw mut size,
        )
    };
    got == 0 && kind == libc::SOCK_STREAM
}

/// Returns whether opening a terminal's device again opens the same terminal. `/dev/tty` and
/// `/dev/tty0` can open another terminal, and `/dev/ptmx` creates one.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn is_own_device(metadata: &Metadata) -> bool {
    let device = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    !matches!(device, (5, 0 | 2) | (4, 0))
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn is_own_device(_metadata: &Metadata) -> bool {
    false
}

/// Opens a pipe or terminal again, with a non-blocking open file description that only this process
/// has.
///
/// # Errors
///
/// Returns ENXIO if a pipe has no reader, and ENOENT or `NotFound` if `/proc` is not available.
/// Returns EACCES if the process has no permission, for example for a pipe that was created before
/// the process changed its user. Also returns the system's other errors.
fn reopen(file: &File) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;

    let own = File::options()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let (shared, opened) = (file.metadata()?, own.metadata()?);
    // Check that both are the same file, because another file system may be mounted at `/proc`.
    if (shared.dev(), shared.ino()) != (opened.dev(), opened.ino()) {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(own)
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the pointer is valid for reads of the buffer's length.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            SEND_FLAGS,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Writes without a new descriptor to an open file description that other processes may share. Uses
/// `pwritev2`, or `poll` and `write` if `pwritev2` is not supported.
fn write_shared(file: &File, bytes: &[u8]) -> io::Result<usize> {
    match no_wait::write(file.as_fd(), bytes) {
        Err(error) if no_wait::is_missing(&error) => write_if_ready(file, bytes),
        written => written,
    }
}

/// Writes if `poll` reports that the file is writable. Returns `WouldBlock` if it is not.
///
/// A writable pipe has space for `PIPE_BUF` bytes (poll(2), pipe(7)). The write still waits in two
/// cases. Another process may fill this space between `poll` and `write`. A writable terminal may
/// have less space than the line needs, or may be stopped between the two calls.
fn write_if_ready(mut file: &File, bytes: &[u8]) -> io::Result<usize> {
    if poll::is_writable(file.as_fd())? {
        file.write(bytes)
    } else {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod no_wait {
    use std::os::fd::AsRawFd as _;

    use super::{BorrowedFd, io};
    use crate::sys::platform::is_unavailable;

    /// Writes without waiting, even if the open file description is blocking.
    pub(super) fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
        /// One half of the offset -1, which selects the file's current offset (pwritev2(2)).
        const CURRENT: libc::c_long = -1;
        let vector = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: the vector points to a live buffer of the given length, which is only read.
        let written = unsafe {
            libc::syscall(
                libc::SYS_pwritev2,
                fd.as_raw_fd(),
                &raw const vector,
                1,
                CURRENT,
                CURRENT,
                libc::RWF_NOWAIT,
            )
        };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Returns whether an error of `write` means that the kernel, the kind of file or a sandbox
    /// does not support `RWF_NOWAIT`.
    pub(super) fn is_missing(error: &io::Error) -> bool {
        is_unavailable(error) || error.raw_os_error() == Some(libc::EOPNOTSUPP)
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod no_wait {
    use super::{BorrowedFd, io};

    pub(super) fn write(_fd: BorrowedFd<'_>, _bytes: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn is_missing(_error: &io::Error) -> bool {
        true
    }
}

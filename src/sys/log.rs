//! Writing to a descriptor that is shared with other processes, without waiting and without signals.
//!
//! `O_NONBLOCK` belongs to the open file description, which other processes share, so it is never set
//! there. The ways to write without it, best first:
//!
//! | target | way | may wait |
//! |---|---|---|
//! | socket | `send` with `MSG_DONTWAIT` | never |
//! | file | `write` | for the disk only |
//! | pipe, terminal | a nonblocking description of its own, opened through `/proc/self/fd` (Linux) | never |
//! | pipe that may not be opened | `pwritev2` with `RWF_NOWAIT` (Linux 6.5, and not for a FIFO) | never |
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

/// Where log lines go.
#[derive(Debug)]
pub(crate) enum Target {
    /// A standard descriptor that could not be duplicated for lack of descriptors.
    NotDuplicated(RawFd),
    /// Closed, or not open for writing.
    Closed,
    /// A socket for a stream of bytes.
    Stream(Rc<File>),
    /// A socket for messages: each line is one.
    Datagrams(Rc<File>),
    /// A regular file, which takes everything or has no space.
    File(Rc<File>),
    /// A pipe or terminal, by a description of this process that does not block.
    Own(Rc<File>),
    /// A pipe, terminal or other device, by a description that other processes share.
    Shared(Rc<File>, Way),
}

/// How to write to a shared description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Reopen,
    NoWait,
    Poll,
}

/// The most that one write takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Line,
    Bytes(usize),
}

/// Signals that a write raises for this thread, each with its error. SIGTTOU has none: a terminal with
/// `tostop` takes output of a background process while the process blocks the signal (tty(4)).
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

    /// Duplicates a standard descriptor.
    fn standard(number: RawFd) -> Self {
        match fd::duplicate(number, libc::STDERR_FILENO + 1) {
            Ok(fd) => Self::new(fd),
            Err(error) if is_lack(&error) => Self::NotDuplicated(number),
            Err(_) => Self::Closed,
        }
    }

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
        let way = if is_same_when_opened && cfg!(target_os = "linux") {
            Way::Reopen
        } else {
            Way::Poll
        };
        Self::Shared(Rc::new(file), way)
    }

    /// The descriptor to wait for when a write would block.
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

    /// Whether this is the descriptor that is written to.
    pub(crate) fn is(&self, file: &Rc<File>) -> bool {
        self.file().is_some_and(|own| Rc::ptr_eq(own, file))
    }

    pub(crate) fn unit(&self) -> Unit {
        match self {
            // One of them may turn out to be the other.
            Self::Datagrams(_) | Self::NotDuplicated(_) => Unit::Line,
            Self::Closed | Self::Stream(_) | Self::File(_) => Unit::Bytes(usize::MAX),
            // The lines of several processes do not mix in a pipe up to this length (pipe(7)).
            Self::Own(_) | Self::Shared(..) => Unit::Bytes(libc::PIPE_BUF),
        }
    }

    /// Writes what fits of `bytes`, which is no more than [`unit`](Self::unit).
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
                let length = match self.unit() {
                    Unit::Line => bytes.len(),
                    Unit::Bytes(most) => most.min(bytes.len()),
                };
                self.write_once(&bytes[..length])
            }
            Self::Stream(file) | Self::Datagrams(file) => send(file.as_fd(), bytes),
            Self::File(file) | Self::Own(file) => (&**file).write(bytes),
            Self::Shared(file, Way::Reopen) => match reopen(file) {
                Ok(own) => {
                    let written = (&own).write(bytes);
                    *self = Self::Own(Rc::new(own));
                    written
                }
                // A pipe has no reader at present.
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Err(error),
                Err(error) if is_lack(&error) => write_shared(file, bytes),
                Err(_) => {
                    *self = Self::Shared(Rc::clone(file), Way::NoWait);
                    self.write_once(bytes)
                }
            },
            Self::Shared(file, Way::NoWait) => match no_wait::write(file.as_fd(), bytes) {
                Err(error) if no_wait::is_missing(&error) => {
                    *self = Self::Shared(Rc::clone(file), Way::Poll);
                    self.write_once(bytes)
                }
                written => written,
            },
            Self::Shared(file, Way::Poll) => write_if_ready(file, bytes),
        }
    }
}

/// Whether the system has no descriptor or memory left, which may pass.
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
    // SAFETY: value and size are writable, and the size is that of the value.
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

/// Whether opening a terminal's device again leads to the same terminal. The devices `/dev/tty`,
/// `/dev/ptmx` and `/dev/tty0` stand for a terminal that depends on who opens them, or create one.
#[cfg(target_os = "linux")]
fn is_own_device(metadata: &Metadata) -> bool {
    let device = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    !matches!(device, (5, 0 | 2) | (4, 0))
}

#[cfg(not(target_os = "linux"))]
fn is_own_device(_metadata: &Metadata) -> bool {
    false
}

/// Opens a pipe or terminal once more, with a description that this process alone has.
///
/// # Errors
///
/// Among others: ENXIO if it is a pipe without a reader; EACCES if it belongs to another user, as a
/// pipe does that was created before the process changed its user; ENOENT without `/proc`.
fn reopen(file: &File) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;

    let own = File::options()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let (shared, opened) = (file.metadata()?, own.metadata()?);
    // Something else may be mounted at `/proc`.
    if (shared.dev(), shared.ino()) != (opened.dev(), opened.ino()) {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(own)
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the buffer is valid for its length through the call.
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

/// Writes to a shared description, in the best way that needs no new descriptor.
fn write_shared(file: &File, bytes: &[u8]) -> io::Result<usize> {
    match no_wait::write(file.as_fd(), bytes) {
        Err(error) if no_wait::is_missing(&error) => write_if_ready(file, bytes),
        written => written,
    }
}

/// Writes if the descriptor is ready to take at least something.
///
/// A pipe that is ready has space for `PIPE_BUF` bytes (poll(2), pipe(7)). One race remains: if another
/// process takes this space between the two calls, the write waits until the reader has read as much. A
/// terminal that is ready may have less space than the line, or be stopped between the two calls; the
/// write waits then, too.
fn write_if_ready(mut file: &File, bytes: &[u8]) -> io::Result<usize> {
    if poll::is_writable(file.as_fd())? {
        file.write(bytes)
    } else {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

#[cfg(target_os = "linux")]
mod no_wait {
    use std::os::fd::AsRawFd as _;

    use super::{BorrowedFd, io};

    /// Writes without waiting, whatever the description's flags are.
    pub(super) fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
        /// Both halves of the offset -1, which stands for the current one (pwritev2(2)).
        const CURRENT: libc::c_long = -1;
        let vector = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: the vector describes a live buffer, which is only read.
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

    /// Whether the kernel, the kind of file or a sandbox does not support this.
    pub(super) fn is_missing(error: &io::Error) -> bool {
        let number = error.raw_os_error();
        [
            libc::EOPNOTSUPP,
            libc::ENOSYS,
            libc::EINVAL,
            libc::EPERM,
            libc::EACCES,
        ]
        .map(Some)
        .contains(&number)
    }
}

#[cfg(not(target_os = "linux"))]
mod no_wait {
    use super::{BorrowedFd, io};

    pub(super) fn write(_fd: BorrowedFd<'_>, _bytes: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn is_missing(_error: &io::Error) -> bool {
        true
    }
}

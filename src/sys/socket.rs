//! Sends and receives bytes and descriptors over Unix sockets.

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};

use sendfd::SendWithFd;

use super::fd::NoLingerFd;
use super::platform::socket::{MSG_CMSG_CLOEXEC, MSG_NOSIGNAL, SCM_PIDFD, abstract_address};
use super::signal_mask::SignalSet;
use super::{option, retry};

/// Shuts down the sending direction. The peer reads end-of-file after everything that was written.
pub(crate) fn shutdown_write(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: shutdown changes no memory of this process.
    super::check(unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) })?;
    Ok(())
}

/// The flags of a send that never waits, and that raises no SIGPIPE if the system has a flag for
/// that.
pub(super) const SEND_FLAGS: libc::c_int = MSG_NOSIGNAL | libc::MSG_DONTWAIT;

/// Writes bytes and descriptors, and returns the number of written bytes. If any bytes were
/// written, all descriptors were sent with them. Without descriptors, the call never waits. With
/// descriptors, the call waits if the socket is blocking, because `sendfd` takes no flags.
pub(crate) fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    send_with_flags(socket, bytes, fds, SEND_FLAGS)
}

/// Writes like [`send`], but waits if the socket is blocking, even without descriptors.
pub(crate) fn send_blocking(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    send_with_flags(socket, bytes, fds, SEND_FLAGS & !libc::MSG_DONTWAIT)
}

/// Maximum total length in bytes of two pieces that are copied into one buffer and sent with
/// send(2). Longer pieces are sent with sendmsg(2) and two vectors.
///
/// The value is not critical. On Linux on x86-64, both ways take about 1 µs up to 500 bytes, and
/// differ by less than the noise. A larger value needs more stack for the buffer.
const MAX_COPY: usize = 256;

/// Writes two pieces in order, without waiting, and returns the number of written bytes.
pub(crate) fn send_two(socket: &UnixStream, pieces: [&[u8]; 2]) -> io::Result<usize> {
    let (first, length) = (pieces[0].len(), pieces[0].len() + pieces[1].len());
    if length <= MAX_COPY {
        let mut whole = [0; MAX_COPY];
        whole[..first].copy_from_slice(pieces[0]);
        whole[first..length].copy_from_slice(pieces[1]);
        return send(socket, &whole[..length], &[]);
    }
    let mut vectors = pieces.map(|piece| libc::iovec {
        iov_base: piece.as_ptr().cast_mut().cast(),
        iov_len: piece.len(),
    });
    // SAFETY: all zeroes is a valid, empty `msghdr`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len() as _;
    // SAFETY: the vectors point to the pieces, which live longer than this call.
    unsafe { send_message(socket, &message) }
}

fn send_with_flags(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: libc::c_int,
) -> io::Result<usize> {
    if !fds.is_empty() {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        return without_sigpipe(|| retry(|| socket.send_with_fd(bytes, &fds)));
    }
    without_sigpipe_unless_flagged(|| {
        // SAFETY: the pointer is valid for reads of the buffer's length.
        let sent = unsafe {
            libc::send(
                socket.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                flags,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    })
}

/// Sends a message with one descriptor, without waiting.
///
/// The crate `sendfd` can also send a descriptor, but its function raises SIGPIPE. Blocking the
/// signal would take two more system calls for each connection.
pub(crate) fn send_one(
    socket: &impl AsRawFd,
    bytes: &[u8],
    fd: BorrowedFd<'_>,
) -> io::Result<usize> {
    let size = libc::c_uint::try_from(size_of::<RawFd>()).unwrap_or(0);
    // The element type aligns the header.
    let mut control = [0u64; 4];
    // SAFETY: CMSG_SPACE only computes a length.
    let space = unsafe { libc::CMSG_SPACE(size) };
    debug_assert!(space as usize <= size_of_val(&control));
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zeroes is a valid, empty `msghdr`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = space as _;
    // SAFETY: the control buffer has space for one header and one number.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: CMSG_LEN only computes a length.
    let length = unsafe { libc::CMSG_LEN(size) };
    // SAFETY: all zeroes is a valid `cmsghdr`.
    let mut content: libc::cmsghdr = unsafe { std::mem::zeroed() };
    content.cmsg_len = length as _;
    content.cmsg_level = libc::SOL_SOCKET;
    content.cmsg_type = libc::SCM_RIGHTS;
    // SAFETY: the pointer is aligned, and is valid for writes of a header in the buffer.
    unsafe { header.write(content) };
    // SAFETY: the buffer contains the header and the data that follow it.
    let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
    // SAFETY: the buffer has space for one number, and the write allows an unaligned address.
    unsafe { data.write_unaligned(fd.as_raw_fd()) };
    // SAFETY: the vectors and the control buffer live longer than this call.
    unsafe { send_message(socket, &message) }
}

/// Sends a message without waiting.
///
/// # Safety
///
/// The message's pointers must be valid for reads of the given lengths.
unsafe fn send_message(socket: &impl AsRawFd, message: &libc::msghdr) -> io::Result<usize> {
    without_sigpipe_unless_flagged(|| {
        // SAFETY: the caller guarantees that the message's pointers are valid.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), message, SEND_FLAGS) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    })
}

/// Sends a datagram to a Unix socket without waiting. The address is a path or, on Linux, an
/// abstract name after `@`. If the receiver's queue is full, returns an error of the kind
/// `WouldBlock`.
pub(crate) fn send_datagram(address: &OsStr, bytes: &[u8]) -> io::Result<()> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => abstract_address(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    retry(|| socket.send_to_addr(bytes, &address))?;
    Ok(())
}

/// Repeats a call while signals interrupt it, without raising SIGPIPE. The call must pass
/// `MSG_NOSIGNAL`.
fn without_sigpipe_unless_flagged<T>(call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    if MSG_NOSIGNAL == 0 {
        without_sigpipe(|| retry(call))
    } else {
        retry(call)
    }
}

/// Runs a call, and suppresses the SIGPIPE that the call may raise for this thread.
fn without_sigpipe<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    without_signals(&[(libc::SIGPIPE, libc::EPIPE)], call)
}

/// Runs a call, and suppresses signals that the call may raise for this thread.
///
/// Each element of `signals` is a signal, and the error number with which the call fails when it
/// raises this signal. The signals are blocked on this thread during the call. If the call fails
/// with a signal's error number, the pending signal is consumed, unless the caller had already
/// blocked it.
pub(super) fn without_signals<T>(
    signals: &[(libc::c_int, libc::c_int)],
    call: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let mut blocked = SignalSet::empty();
    for (signal, _) in signals {
        blocked.add(*signal);
    }
    let previous = blocked.block();
    let result = call();
    let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
    let raised = signals.iter().find(|(_, error)| errno == Some(*error));
    if let Some((signal, _)) = raised.filter(|(signal, _)| !previous.contains(*signal)) {
        consume(*signal);
    }
    previous.set_as_mask();
    result
}

/// Consumes a signal that this thread blocks, if the signal is pending.
fn consume(signal: libc::c_int) {
    if SignalSet::pending().contains(signal) {
        let awaited = SignalSet::only(signal);
        let mut number = 0;
        // SAFETY: both pointers are valid, and the signal is blocked. The call returns immediately,
        // because the signal is pending.
        unsafe { libc::sigwait(awaited.as_ptr(), &raw mut number) };
    }
}

/// Maximum number of descriptors of one received message.
///
/// A faulty peer can send more descriptors than the protocol allows, up to the kernel's limit of
/// 253 (`SCM_MAX_FD`). With space for fewer, the kernel would close the others within the call, and
/// closing a socket can wait for its peer.
const MAX_RECEIVED_FDS: usize = 256;

/// Makes the socket deliver out-of-band data in order with all other data. Without this option, the
/// next receiving call would skip the out-of-band data, and the kernel would close the descriptors
/// that came with these data during that call.
pub(crate) fn enable_oob_inline(socket: &UnixStream) -> io::Result<()> {
    option::set_int(socket.as_fd(), libc::SO_OOBINLINE, 1)
}

/// Sets the size of the send buffer, in bytes. The system may choose a larger size.
pub(crate) fn set_send_buffer(socket: &UnixStream, bytes: i32) -> io::Result<()> {
    option::set_int(socket.as_fd(), libc::SO_SNDBUF, bytes)
}

/// The number of bytes, and the descriptors, of one received message.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub(crate) bytes: usize,
    pub(crate) fds: Vec<NoLingerFd>,
    /// Whether the kernel has closed other descriptors of the message. The most likely reason is
    /// that this process has no descriptor free.
    pub(crate) lost_fds: bool,
}

/// Returns whether a send's error means that the system lacks a resource at the moment.
pub(crate) fn is_exhaustion(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(
        errno,
        Some(libc::ETOOMANYREFS | libc::ENOBUFS | libc::ENOMEM)
    )
}

/// Receives the available bytes, up to the length of `buffer`, without waiting. Received
/// descriptors are closed on exec.
///
/// The crate `sendfd` can also receive descriptors, but its function neither reports lost
/// descriptors nor makes the kernel set close-on-exec. If a thread forked before a later call set
/// the flag, its child would inherit the descriptors.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Piece> {
    // SAFETY: the vector is the buffer.
    unsafe { receive_vectored(socket, &mut [vector(buffer.as_mut_ptr(), buffer.len())]) }
}

/// The space for received bytes.
pub(crate) struct Space<'a> {
    /// The buffer to which the bytes are appended.
    pub(crate) buffer: &'a mut Vec<u8>,
    /// The maximum number of bytes.
    pub(crate) max: usize,
}

impl Space<'_> {
    fn reserve(&mut self) -> libc::iovec {
        self.buffer.reserve_exact(self.max);
        let spare = &mut self.buffer.spare_capacity_mut()[..self.max];
        vector(spare.as_mut_ptr().cast(), spare.len())
    }
}

/// Receives like [`receive`], but appends the bytes to `first`, and the rest to `second`. `bytes`
/// of the result counts both.
///
/// The spaces need not be initialized, so a large buffer occupies only the memory that received
/// bytes have filled.
pub(crate) fn receive_into(
    socket: BorrowedFd<'_>,
    mut first: Space<'_>,
    mut second: Space<'_>,
) -> io::Result<Piece> {
    let mut vectors = [first.reserve(), second.reserve()];
    // If `first` has no space, pass only one vector to save work in the kernel.
    let unused = usize::from(first.max == 0);
    // SAFETY: the vectors are the reserved spaces of the two buffers.
    let piece = unsafe { receive_vectored(socket, &mut vectors[unused..]) }?;
    let in_first = piece.bytes.min(first.max);
    // SAFETY: the kernel fills the first vector before the second, so these bytes of the reserved
    // space are initialized.
    unsafe { first.buffer.set_len(first.buffer.len() + in_first) };
    let in_second = piece.bytes - in_first;
    // SAFETY: the kernel has put the other bytes into the second vector.
    unsafe { second.buffer.set_len(second.buffer.len() + in_second) };
    Ok(piece)
}

fn vector(start: *mut u8, length: usize) -> libc::iovec {
    libc::iovec {
        iov_base: start.cast(),
        iov_len: length,
    }
}

/// Receives into vectors.
///
/// # Safety
///
/// The vectors must be valid for writes.
unsafe fn receive_vectored(
    socket: BorrowedFd<'_>,
    vectors: &mut [libc::iovec],
) -> io::Result<Piece> {
    // Set MSG_DONTWAIT, because another process that shares the socket may have cleared O_NONBLOCK.
    const FLAGS: libc::c_int = libc::MSG_DONTWAIT | MSG_CMSG_CLOEXEC;
    // The space for the descriptors and a header, in elements of `u64`. This element type aligns
    // the header.
    const CONTROL: usize = MAX_RECEIVED_FDS * size_of::<RawFd>() / size_of::<u64>() + 4;
    let mut control = [const { MaybeUninit::<u64>::uninit() }; CONTROL];
    let fds = MAX_RECEIVED_FDS * size_of::<RawFd>();
    // SAFETY: CMSG_SPACE only computes a length.
    let space = unsafe { libc::CMSG_SPACE(u32::try_from(fds).unwrap_or(0)) };
    debug_assert!(space as usize <= size_of_val(&control));
    // SAFETY: all zeroes is a valid, empty `msghdr`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len() as _;
    message.msg_control = control.as_mut_ptr().cast();
    let bytes = retry(|| {
        message.msg_controllen = space as _;
        // SAFETY: the caller guarantees that the vectors are valid for writes, and the control buffer
        // has the given length.
        let read = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, FLAGS) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    })?;
    let fds = adopt_all(&message);
    if MSG_CMSG_CLOEXEC == 0 {
        for fd in &fds {
            let _ = super::fd::close_on_exec(fd.as_fd().as_raw_fd());
        }
    }
    Ok(Piece {
        bytes,
        fds,
        lost_fds: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Takes ownership of a message's descriptors. Closes process descriptors, because the protocol
/// does not use them.
fn adopt_all(message: &libc::msghdr) -> Vec<NoLingerFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled in the message, whose control buffer is alive.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: the pointer is not null, so it points to a header in the message's buffer.
        let libc::cmsghdr {
            cmsg_len,
            cmsg_level,
            cmsg_type,
            ..
        } = unsafe { *header };
        // SAFETY: CMSG_LEN only computes a length.
        let empty = unsafe { libc::CMSG_LEN(0) } as usize;
        // SAFETY: the header is in the message's buffer, and its data follow it.
        let mut data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
        let has_fds = cmsg_type == libc::SCM_RIGHTS || cmsg_type == SCM_PIDFD;
        if cmsg_level == libc::SOL_SOCKET && has_fds {
            #[allow(
                clippy::unnecessary_cast,
                reason = "the type is not the same on all systems"
            )]
            let length = cmsg_len as usize - empty;
            for _ in 0..length / size_of::<RawFd>() {
                // SAFETY: the header's length includes this number, and the read allows an
                // unaligned address.
                let number = unsafe { data.read_unaligned() };
                // SAFETY: the kernel has opened the descriptor for this message.
                let fd = unsafe { OwnedFd::from_raw_fd(number) };
                if cmsg_type == libc::SCM_RIGHTS {
                    fds.push(fd.into());
                }
                // SAFETY: the result is the next number's address, or the end of the data.
                data = unsafe { data.add(1) };
            }
        }
        // SAFETY: message and header are unchanged since the kernel filled them in.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    fds
}

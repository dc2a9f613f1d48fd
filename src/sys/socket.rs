//! Bytes and descriptors over a channel.

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::time::Duration;

use sendfd::SendWithFd;

use super::fd::NoLingerFd;
use super::{empty_set, retry};

/// Never waits; and never raises SIGPIPE, where the system has a flag for that.
#[cfg(not(target_vendor = "apple"))]
pub(super) const SEND_FLAGS: libc::c_int = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
#[cfg(target_vendor = "apple")]
pub(super) const SEND_FLAGS: libc::c_int = libc::MSG_DONTWAIT;

/// Writes what fits of `bytes`. If anything is written, all of `fds` have left with it.
pub(crate) fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    send_with_flags(socket, bytes, fds, SEND_FLAGS)
}

/// The same, as patient as the socket is.
pub(crate) fn send_waiting(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    send_with_flags(socket, bytes, fds, SEND_FLAGS & !libc::MSG_DONTWAIT)
}

/// What is no longer than this is sent in one piece: to copy it costs less than to say where it is.
const SHORT: usize = 256;

/// Writes what fits of two pieces, the first before the second.
pub(crate) fn send_two(socket: &UnixStream, pieces: [&[u8]; 2]) -> io::Result<usize> {
    let (first, length) = (pieces[0].len(), pieces[0].len() + pieces[1].len());
    if length <= SHORT {
        let mut whole = [0; SHORT];
        whole[..first].copy_from_slice(pieces[0]);
        whole[first..length].copy_from_slice(pieces[1]);
        return send(socket, &whole[..length], &[]);
    }
    let mut vectors = pieces.map(|piece| libc::iovec {
        iov_base: piece.as_ptr().cast_mut().cast(),
        iov_len: piece.len(),
    });
    // SAFETY: all zeroes is a valid msghdr, of nothing.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len() as _;
    let call = || {
        // SAFETY: the message points to live buffers of the given lengths, which are only read.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, SEND_FLAGS) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    };
    if cfg!(target_vendor = "apple") {
        without_sigpipe(|| retry(call))
    } else {
        retry(call)
    }
}

fn send_with_flags(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: libc::c_int,
) -> io::Result<usize> {
    if fds.is_empty() {
        let call = || {
            // SAFETY: the buffer is valid for its length through the call.
            let sent = unsafe {
                libc::send(
                    socket.as_raw_fd(),
                    bytes.as_ptr().cast(),
                    bytes.len(),
                    flags,
                )
            };
            usize::try_from(sent).map_err(|_| io::Error::last_os_error())
        };
        return if cfg!(target_vendor = "apple") {
            without_sigpipe(|| retry(call))
        } else {
            retry(call)
        };
    }
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    without_sigpipe(|| retry(|| socket.send_with_fd(bytes, &fds)))
}

/// Sends a message with one descriptor, without waiting. `sendfd` has this, too, but raises SIGPIPE:
/// to block that would take two calls more for each connection.
#[cfg(not(target_vendor = "apple"))]
pub(crate) fn send_one(
    socket: &impl AsRawFd,
    bytes: &[u8],
    fd: BorrowedFd<'_>,
) -> io::Result<usize> {
    let size = libc::c_uint::try_from(size_of::<RawFd>()).unwrap_or(0);
    // Of numbers, because the header has to be aligned.
    let mut control = [0u64; 4];
    // SAFETY: computes a length.
    let space = unsafe { libc::CMSG_SPACE(size) };
    debug_assert!(space as usize <= size_of_val(&control));
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zeroes is a valid msghdr, of nothing.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = space as _;
    // SAFETY: the message has room for one header and one number.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: computes a length.
    let length = unsafe { libc::CMSG_LEN(size) };
    // SAFETY: all zeroes is a valid header.
    let mut content: libc::cmsghdr = unsafe { std::mem::zeroed() };
    content.cmsg_len = length as _;
    content.cmsg_level = libc::SOL_SOCKET;
    content.cmsg_type = libc::SCM_RIGHTS;
    // SAFETY: the header is in the buffer, and aligned.
    unsafe { header.write(content) };
    // SAFETY: the number follows the header, in the buffer.
    let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
    // SAFETY: as above; nothing says that it is aligned.
    unsafe { data.write_unaligned(fd.as_raw_fd()) };
    retry(|| {
        // SAFETY: the message points to live buffers of the given lengths.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, SEND_FLAGS) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    })
}

#[cfg(target_vendor = "apple")]
pub(crate) fn send_one(
    socket: &impl SendWithFd,
    bytes: &[u8],
    fd: BorrowedFd<'_>,
) -> io::Result<usize> {
    without_sigpipe(|| retry(|| socket.send_with_fd(bytes, &[fd.as_raw_fd()])))
}

/// Sends a datagram to a Unix socket: a path, or on Linux an abstract name after `@`. Waits for room in
/// the receiver's queue, but not longer than `patience`.
pub(crate) fn send_datagram(address: &OsStr, bytes: &[u8], patience: Duration) -> io::Result<()> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => abstract_address(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(patience))?;
    retry(|| socket.send_to_addr(bytes, &address))?;
    Ok(())
}

#[cfg(target_os = "linux")]
fn abstract_address(name: &[u8]) -> io::Result<SocketAddr> {
    <SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name)
}

#[cfg(not(target_os = "linux"))]
fn abstract_address(_name: &[u8]) -> io::Result<SocketAddr> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Runs a call that may raise SIGPIPE in a program that did not ignore it: blocks the signal on
/// this thread, and takes it back if the call raised it.
fn without_sigpipe<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let mut pipe = empty_set();
    // SAFETY: the set is initialised.
    unsafe { libc::sigaddset(&raw mut pipe, libc::SIGPIPE) };
    let mut previous = pipe;
    // SAFETY: both sets are initialised.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const pipe, &raw mut previous) };
    let result = call();
    // SAFETY: the set is initialised.
    let was_blocked = unsafe { libc::sigismember(&raw const previous, libc::SIGPIPE) } == 1;
    let raised = matches!(&result, Err(error) if error.kind() == io::ErrorKind::BrokenPipe);
    if raised && !was_blocked {
        let mut pending = empty_set();
        // SAFETY: the set is writable.
        unsafe { libc::sigpending(&raw mut pending) };
        // SAFETY: the set is initialised.
        if unsafe { libc::sigismember(&raw const pending, libc::SIGPIPE) } == 1 {
            let mut signal = 0;
            // SAFETY: SIGPIPE is blocked and pending, so this returns at once.
            unsafe { libc::sigwait(&raw const pipe, &raw mut signal) };
        }
    }
    // SAFETY: the set is initialised.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const previous, std::ptr::null_mut()) };
    result
}

/// As many descriptors as the kernel lets anybody send at once (253), whatever we agreed on: those for
/// which there is no room it closes within our call, and the end of a socket may be waited for there.
const MOST_AT_ONCE: usize = 256;

/// Makes whatever the other side sends come in its place. What is sent out of band the kernel would
/// else leave out, and close the descriptors that are with it within our call.
pub(crate) fn read_all_in_line(socket: &UnixStream) -> io::Result<()> {
    let yes: libc::c_int = 1;
    // SAFETY: the option's value is an integer that lives through the call.
    super::check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_OOBINLINE,
            (&raw const yes).cast(),
            libc::socklen_t::try_from(size_of_val(&yes)).unwrap_or(0),
        )
    })?;
    Ok(())
}

/// What one call has read.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub(crate) bytes: usize,
    pub(crate) fds: Vec<NoLingerFd>,
    /// There were more descriptors, and the kernel has closed them: for lack of room in this
    /// process, most likely.
    pub(crate) lost_fds: bool,
}

/// Whether the system has run out of something that sending needs, for now.
pub(crate) fn is_exhaustion(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(
        errno,
        Some(libc::ETOOMANYREFS | libc::ENOBUFS | libc::ENOMEM)
    )
}

/// Reads what is there, at most `buffer`. Descriptors are closed on exec.
///
/// `sendfd` has this, too, but tells neither of lost descriptors nor lets the kernel mark them: a
/// thread that forks between the call and the mark would give them to its child.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Piece> {
    receive_into(socket, &mut Vec::new(), 0, buffer)
}

/// The same; the first bytes go to the end of `long`, at most `missing`, and `buffer` gets the rest.
/// `bytes` counts them all.
pub(crate) fn receive_into(
    socket: BorrowedFd<'_>,
    long: &mut Vec<u8>,
    missing: usize,
    buffer: &mut [u8],
) -> io::Result<Piece> {
    // Never waits, whatever somebody else who has the socket, too, has made of it.
    #[cfg(not(target_vendor = "apple"))]
    const FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    #[cfg(target_vendor = "apple")]
    const FLAGS: libc::c_int = libc::MSG_DONTWAIT;
    // For the descriptors and a header; of numbers, because the header has to be aligned.
    const CONTROL: usize = MOST_AT_ONCE * size_of::<RawFd>() / size_of::<u64>() + 4;
    let mut control = [const { MaybeUninit::<u64>::uninit() }; CONTROL];
    let fds = MOST_AT_ONCE * size_of::<RawFd>();
    // SAFETY: computes a length.
    let space = unsafe { libc::CMSG_SPACE(u32::try_from(fds).unwrap_or(0)) };
    debug_assert!(space as usize <= size_of_val(&control));
    long.reserve_exact(missing);
    let spare = &mut long.spare_capacity_mut()[..missing];
    let mut vectors = [
        libc::iovec {
            iov_base: spare.as_mut_ptr().cast(),
            iov_len: spare.len(),
        },
        libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        },
    ];
    // SAFETY: all zeroes is a valid msghdr, of nothing.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // Of one buffer the kernel makes less.
    let vectors = if missing > 0 {
        &mut vectors[..]
    } else {
        &mut vectors[1..]
    };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len() as _;
    message.msg_control = control.as_mut_ptr().cast();
    let bytes = retry(|| {
        message.msg_controllen = space as _;
        // SAFETY: the message points to live buffers of the given lengths.
        let read = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, FLAGS) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    })?;
    // SAFETY: so many bytes have been written there, in the room that there was.
    unsafe { long.set_len(long.len() + bytes.min(missing)) };
    let fds = adopt_all(&message);
    if cfg!(target_vendor = "apple") {
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

/// `SCM_PIDFD`: the kernel adds a descriptor of the sender's process, if somebody who has the socket,
/// too, has asked for it.
#[cfg(target_os = "linux")]
const PIDFD: libc::c_int = 4;
#[cfg(not(target_os = "linux"))]
const PIDFD: libc::c_int = libc::SCM_RIGHTS;

/// Takes ownership of the descriptors that came with a message.
fn adopt_all(message: &libc::msghdr) -> Vec<NoLingerFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled in the message.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: it is not null, and so it points to a header in the message's buffer.
        let libc::cmsghdr {
            cmsg_len,
            cmsg_level,
            cmsg_type,
            ..
        } = unsafe { *header };
        // SAFETY: computes a length.
        let empty = unsafe { libc::CMSG_LEN(0) } as usize;
        // SAFETY: the data follow the header.
        let mut data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
        let brings_fds = cmsg_type == libc::SCM_RIGHTS || cmsg_type == PIDFD;
        if cmsg_level == libc::SOL_SOCKET && brings_fds {
            #[allow(clippy::unnecessary_cast, reason = "not the same type everywhere")]
            let length = cmsg_len as usize - empty;
            for _ in 0..length / size_of::<RawFd>() {
                // SAFETY: so many numbers are there; nothing says that they are aligned.
                let fd = super::fd::adopt(unsafe { data.read_unaligned() });
                if cmsg_type == libc::SCM_RIGHTS {
                    fds.push(fd.into());
                }
                // SAFETY: the next number, or the end.
                data = unsafe { data.add(1) };
            }
        }
        // SAFETY: both are as the kernel has left them.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    fds
}

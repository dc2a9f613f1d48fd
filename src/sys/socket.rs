//! Bytes and descriptors over a channel.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use sendfd::{RecvWithFd as _, SendWithFd as _};

use super::retry;
use super::signal::empty_set;

/// How many descriptors travel with one call. Even, because `sendfd` panics on an odd number when
/// more than that arrive; surplus ones are closed by the kernel.
pub(crate) const MAX_FDS_PER_CALL: usize = 64;

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

/// Reads what is there, at most `buffer`. Descriptors are adopted before anything can fail.
pub(crate) fn receive(
    socket: &UnixStream,
    buffer: &mut [u8],
    fds: &mut impl Extend<OwnedFd>,
) -> io::Result<usize> {
    let mut numbers = [-1; MAX_FDS_PER_CALL];
    let (read, count) = retry(|| socket.recv_with_fd(buffer, &mut numbers))?;
    let received = numbers.iter().take(count);
    let received: Vec<_> = received.map(|number| super::fd::adopt(*number)).collect();
    for fd in &received {
        // `sendfd` does not ask the kernel to do it.
        super::fd::close_on_exec(fd.as_raw_fd())?;
    }
    fds.extend(received);
    Ok(read)
}

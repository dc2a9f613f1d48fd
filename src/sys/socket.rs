//! Bytes and descriptors over a socket, and what a listener's backlog lets in.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use sendfd::{RecvWithFd as _, SendWithFd as _};

use super::{check, retry};

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
    // SAFETY: sigset_t is plain data.
    let mut pipe: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is writable.
    unsafe { libc::sigemptyset(&raw mut pipe) };
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
        // SAFETY: sigset_t is plain data.
        let mut pending: libc::sigset_t = unsafe { std::mem::zeroed() };
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

/// Whether `accept` failed because of the one connection that it would have returned: the next one
/// may be well. The list is that of accept(2).
pub(crate) fn lost_before_accept(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EINTR
                | libc::ENETDOWN
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
        )
    )
}

/// Sets how many connections may wait to be accepted. `listen` may be called again for this.
pub(crate) fn set_backlog(listener: &TcpListener, backlog: libc::c_int) -> io::Result<()> {
    // SAFETY: listen takes two integers.
    check(unsafe { libc::listen(listener.as_raw_fd(), backlog) })?;
    Ok(())
}

/// Lets no new connection into the backlog, while handshakes under way complete: a packet filter
/// on the listener drops what asks for a new connection (SYN without ACK). Clients ask again after
/// a second and then find the port closed, or somebody else's. Without it, whoever comes between
/// the last `accept` and `close` would be connected and then reset.
#[cfg(target_os = "linux")]
pub(crate) fn shut_door(listener: &TcpListener) -> io::Result<()> {
    /// Offset of the flags in the TCP header, where the filter's view of a packet begins.
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, FLAGS, 0, 0),
        statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, SYN | ACK, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, SYN, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, u32::MAX, 0, 0),
    ];
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap_or(0),
        filter: program.as_mut_ptr(),
    };
    let size = libc::socklen_t::try_from(size_of_val(&filter)).unwrap_or(0);
    // SAFETY: the option takes a sock_fprog, which points to a live program of the given length.
    check(unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size,
        )
    })?;
    Ok(())
}

/// Undoes `shut_door`.
#[cfg(target_os = "linux")]
pub(crate) fn open_door(listener: &TcpListener) -> io::Result<()> {
    let unused: libc::c_int = 0;
    let size = libc::socklen_t::try_from(size_of_val(&unused)).unwrap_or(0);
    // SAFETY: the option ignores its value.
    check(unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            (&raw const unused).cast(),
            size,
        )
    })?;
    Ok(())
}

/// Elsewhere the backlog is emptied with the door open.
#[cfg(not(target_os = "linux"))]
pub(crate) fn shut_door(_listener: &TcpListener) -> io::Result<()> {
    Ok(())
}

/// Undoes `shut_door`.
#[cfg(not(target_os = "linux"))]
pub(crate) fn open_door(_listener: &TcpListener) -> io::Result<()> {
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::net::TcpStream;
    use std::time::Duration;

    #[test]
    fn a_shut_door_keeps_newcomers_out_and_whoever_is_in() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let address = listener.local_addr().unwrap();
            let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(50));
            let _early = connect().unwrap();
            shut_door(&listener).unwrap();
            let error = connect().unwrap_err();
            assert_eq!(
                error.kind(),
                io::ErrorKind::TimedOut,
                "not refused: ignored"
            );
            listener.accept().unwrap();
            open_door(&listener).unwrap();
            connect().unwrap();
        }
    }
}

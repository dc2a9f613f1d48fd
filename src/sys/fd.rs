//! Functions for descriptors that are known only by their numbers, and for the flags of any
//! descriptor.

use std::io;
use std::mem::ManuallyDrop;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use super::owner::Owner;
use super::platform::socket as platform;
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

/// The reason why the poller has reported an idle connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IdleEvent {
    /// The peer has sent something.
    Data,
    /// The peer has hung up, or the connection has failed.
    HangUp,
    /// The connection is still idle.
    Nothing,
}

/// Returns the reason why the poller has reported an idle connection.
///
/// The poller also reports urgent data, which [`peek`] does not see, and a socket with a message in
/// its error queue. If such a connection were awaited again without a change, the poller would
/// report it again at once, and the process would spin. Urgent data is therefore treated as data.
/// The first message of the error queue is discarded.
pub(crate) fn idle_event(connection: BorrowedFd<'_>) -> IdleEvent {
    match peek(connection.as_raw_fd(), &mut [0]) {
        Ok(0) => IdleEvent::HangUp,
        Ok(_) => IdleEvent::Data,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let found = poll_now(connection, libc::POLLPRI);
            if found & libc::POLLERR != 0 {
                platform::discard_socket_error(connection.as_raw_fd());
            }
            match found & libc::POLLPRI {
                0 => IdleEvent::Nothing,
                _ => IdleEvent::Data,
            }
        }
        Err(_) => IdleEvent::HangUp,
    }
}

/// Returns which of the events, and of POLLHUP and POLLERR, a descriptor reports at this moment.
fn poll_now(fd: BorrowedFd<'_>, events: libc::c_short) -> libc::c_short {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: the pointer is valid for reads and writes of one `pollfd`.
    match unsafe { libc::poll(&raw mut poll, 1, 0) } {
        1 => poll.revents,
        _ => 0,
    }
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
    // Adopting the descriptors is sound, because they are open and no other code of this process
    // knows them.
    Ok(numbers.map(adopt).collect())
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
    Ok(adopt(copy))
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

/// Takes ownership of a descriptor that no other code of this process owns.
pub(super) fn adopt(number: RawFd) -> OwnedFd {
    // SAFETY: the caller received the number from the kernel, or from the process that executed
    // this program, and keeps no copy.
    unsafe { OwnedFd::from_raw_fd(number) }
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

/// Returns whether a connection's peer is gone: the peer has reset the connection, or both
/// directions are shut down and nothing is left to read.
///
/// After a reset, unread bytes do not count, because RFC 9293 (section 3.10.7.4) discards them.
///
/// The result is `false` for a TCP client that has closed its socket without a reset. The kernel
/// then knows only that the client has stopped sending, and a client that has only stopped sending
/// still waits for its answer.
pub(crate) fn is_closed_by_peer(fd: BorrowedFd<'_>) -> bool {
    // A connection that has failed always hangs up, too. POLLERR alone means that there is a
    // message in the error queue.
    match poll_now(fd, 0) {
        found if found & libc::POLLHUP == 0 => false,
        found if found & libc::POLLERR != 0 => true,
        _ => !matches!(peek(fd.as_raw_fd(), &mut [0]), Ok(1..)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    #[test]
    fn connection_with_unread_bytes_is_not_closed_by_peer() {
        let (here, mut there) = UnixStream::pair().unwrap();
        assert!(!is_closed_by_peer(here.as_fd()));
        there.write_all(b"goodbye").unwrap();
        drop(there);
        assert!(!is_closed_by_peer(here.as_fd()), "bytes are left to read");
        let (here, there) = UnixStream::pair().unwrap();
        drop(there);
        assert!(is_closed_by_peer(here.as_fd()));
    }

    fn tcp_pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener.accept().unwrap().0, there)
    }

    #[test]
    fn reset_connection_with_unread_bytes_is_closed_by_peer() {
        let (here, mut there) = tcp_pair();
        there.write_all(b"request").unwrap();
        let (l_onoff, l_linger) = (1, 0);
        let reset = libc::linger { l_onoff, l_linger };
        option::set(there.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &reset).unwrap();
        drop(there);
        assert!(is_closed_by_peer(here.as_fd()));
    }

    #[test]
    fn urgent_data_of_an_idle_connection_is_data() {
        let (here, there) = tcp_pair();
        assert_eq!(idle_event(here.as_fd()), IdleEvent::Nothing);
        // SAFETY: the pointer is valid for reads of one byte.
        let sent = unsafe { libc::send(there.as_raw_fd(), b"!".as_ptr().cast(), 1, libc::MSG_OOB) };
        assert_eq!(sent, 1);
        poll_until(&here, libc::POLLPRI);
        assert_eq!(idle_event(here.as_fd()), IdleEvent::Data);
    }

    fn poll_until(socket: &TcpStream, event: libc::c_short) {
        while poll_now(socket.as_fd(), event) & event == 0 {
            std::thread::yield_now();
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn error_queue_does_not_end_an_idle_connection() {
        let (mut here, mut there) = tcp_pair();
        let flags = libc::SOF_TIMESTAMPING_TX_SOFTWARE | libc::SOF_TIMESTAMPING_SOFTWARE;
        let flags = libc::c_int::try_from(flags).unwrap();
        option::set_int(here.as_fd(), libc::SO_TIMESTAMPING, flags).unwrap();
        here.write_all(b"answer").unwrap();
        poll_until(&here, libc::POLLERR);
        assert!(!is_closed_by_peer(here.as_fd()));
        assert_eq!(idle_event(here.as_fd()), IdleEvent::Nothing);
        assert_eq!(poll_now(here.as_fd(), 0), 0, "the error queue is not empty");
        there.write_all(b"request").unwrap();
        poll_until(&here, libc::POLLIN);
        assert_eq!(idle_event(here.as_fd()), IdleEvent::Data);
        drop(there);
    }

    #[test]
    fn connection_whose_peer_has_stopped_sending_is_not_closed_by_peer() {
        let (here, there) = tcp_pair();
        there.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!is_closed_by_peer(here.as_fd()));
    }
}

//! The state of a connection, and the options that accept(2) sets.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use super::fd::{peek, set_nonblocking};
use super::option;
use super::platform::socket as platform;

/// Returns whether a descriptor is a stream socket that does not listen.
pub(crate) fn is_connection(fd: BorrowedFd<'_>) -> bool {
    let number = fd.as_raw_fd();
    let is_stream = option::get_int(number, libc::SO_TYPE).ok() == Some(libc::SOCK_STREAM);
    is_stream && option::get_int(number, libc::SO_ACCEPTCONN).ok() == Some(0)
}

/// Resets the options that an application may have changed to their values after accept(2):
/// blocking mode and no timeouts. Other options stay, because only the application knows them.
///
/// # Errors
///
/// Returns the system's error, for instance if the client has reset the connection.
pub(crate) fn reset_options(connection: BorrowedFd<'_>) -> io::Result<()> {
    set_nonblocking(connection, false)?;
    let never = libc::timeval {
        tv_sec: 0,
        tv_usec: 0,
    };
    for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        option::set(connection, libc::SOL_SOCKET, name, &never)?;
    }
    Ok(())
}

/// Returns the address of a TCP connection's peer. Returns `None` for any other socket, for a
/// connection that has been reset, or if no descriptor is free for a temporary copy.
pub(crate) fn peer_addr(connection: BorrowedFd<'_>) -> Option<SocketAddr> {
    let connection = TcpStream::from(connection.try_clone_to_owned().ok()?);
    connection.peer_addr().ok()
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

/// Discards the first message of a socket's error queue, if there is one. The application may have
/// requested such messages (`SO_TIMESTAMPING`, `MSG_ZEROCOPY`, `IP_RECVERR`). While the queue is not
/// empty, poll(2) reports the socket as ready, although reading returns `WouldBlock`. A process that
/// waits for the socket would spin.
pub(crate) fn discard_socket_error(socket: BorrowedFd<'_>) {
    if poll_now(socket, 0) & libc::POLLERR != 0 {
        platform::discard_socket_error(socket.as_raw_fd());
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::net::TcpListener;
    use std::os::fd::AsFd as _;
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

//! Closes a connection whose client may still be sending.
//!
//! If a socket is closed while received bytes are unread, or if bytes arrive after it was closed,
//! TCP resets the connection. The reset can discard bytes that the client has not read yet, and
//! makes the client's writes fail. The worker therefore reads until the client closes the
//! connection, within limits.
//!
//! A worker that blocks waits here first, but only briefly. If the client has not closed by then,
//! the worker's shell holds the connection (`shell::lingering`), and the worker serves the next
//! client.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crate::core::worker::LINGER_TIMEOUT;
use crate::sys;

/// Maximum time for which `wait_briefly` waits.
///
/// With a shorter time, more connections linger, which takes about 15 more system calls for each:
/// over loopback, fewer than 1 in 100 connections take longer than this. With a longer time, the
/// clients of a distant network hold the worker for longer. Clients that close after 20 ms had 730
/// connections per second with two workers, and 90 if `finish` waited for the end (`http_server`
/// without keep-alive, 16 clients).
const FIRST_WAIT: Duration = Duration::from_millis(1);
/// Maximum time for which a client may send nothing while `wait` waits for it.
///
/// A worker that blocks serves no other client during this time, so a longer time would let a few
/// silent clients occupy all workers. A client that pauses for longer, for example because a packet
/// was lost twice, may lose its answer. nginx, which does not block, allows 5 seconds
/// (`lingering_timeout`).
const SILENCE_MAX: Duration = Duration::from_secs(1);
/// Maximum number of bytes that are discarded.
///
/// The limit bounds the CPU time that a fast client can cost: over loopback on x86-64, 60 MiB take
/// about 0.03 seconds. A smaller limit would disconnect clients with large requests.
pub(super) const DISCARD_MAX: usize = 64 << 20;
/// Maximum number of bytes per read.
///
/// The buffer is on the stack. With a larger one, each worker occupies more memory. With a smaller
/// one, a large request takes more system calls. 16 KiB would take half of the CPU time.
const READ_SIZE: usize = 4 << 10;

/// Waits until the client closes the connection or a limit is reached.
pub(super) fn wait(connection: BorrowedFd<'_>) {
    let mut bytes_left = DISCARD_MAX;
    // Ignore an error: if the wait fails, the remaining bytes cannot be read.
    let _ = wait_for_end(connection, SILENCE_MAX, LINGER_TIMEOUT, &mut bytes_left);
}

/// Waits for at most `FIRST_WAIT` until the client closes the connection. Subtracts the number of
/// discarded bytes from `bytes_left`. Returns whether the client may send more.
pub(super) fn wait_briefly(connection: BorrowedFd<'_>, bytes_left: &mut usize) -> bool {
    wait_for_end(connection, FIRST_WAIT, FIRST_WAIT, bytes_left).unwrap_or(true)
}

/// Waits until the client closes the connection or a limit is reached. Returns whether the client
/// may send more.
fn wait_for_end(
    connection: BorrowedFd<'_>,
    silence_max: Duration,
    timeout: Duration,
    bytes_left: &mut usize,
) -> io::Result<bool> {
    let start = Instant::now();
    let mut silence_end = start + silence_max;
    loop {
        let end = silence_end.min(start + timeout);
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(true);
        }
        // A signal may end the wait early, so check the time again.
        let [is_readable] = sys::poll::wait_readable([connection], Some(left))?;
        if is_readable {
            match discard(connection, bytes_left) {
                Discarded::Bytes => silence_end = Instant::now() + silence_max,
                Discarded::Nothing => {}
                Discarded::Last => return Ok(false),
            }
        }
    }
}

/// The result of one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Discarded {
    Bytes,
    /// Nothing has arrived.
    Nothing,
    /// The client has closed the connection, or the maximum number of bytes is reached.
    Last,
}

/// Reads and discards bytes that have arrived, and subtracts their number from `bytes_left`.
pub(super) fn discard(connection: BorrowedFd<'_>, bytes_left: &mut usize) -> Discarded {
    match sys::socket::receive(connection, &mut [0; READ_SIZE]) {
        Ok(piece) => {
            *bytes_left = bytes_left.saturating_sub(piece.bytes);
            match piece.bytes > 0 && *bytes_left > 0 {
                true => Discarded::Bytes,
                false => Discarded::Last,
            }
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            sys::connection::discard_socket_error(connection);
            Discarded::Nothing
        }
        Err(_) => Discarded::Last,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_are_discarded_until_the_client_closes() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut left = DISCARD_MAX;
        assert_eq!(discard(here.as_fd(), &mut left), Discarded::Nothing);
        there.write_all(&[0; 100]).unwrap();
        assert_eq!(discard(here.as_fd(), &mut left), Discarded::Bytes);
        assert_eq!(left, DISCARD_MAX - 100);
        drop(there);
        assert_eq!(discard(here.as_fd(), &mut left), Discarded::Last);
    }

    #[test]
    fn discarding_ends_at_the_limit() {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(&[0; 100]).unwrap();
        assert_eq!(discard(here.as_fd(), &mut 100), Discarded::Last);
    }

    #[test]
    fn wait_ends_at_once_if_the_client_has_closed() {
        let (here, there) = UnixStream::pair().unwrap();
        drop(there);
        let start = Instant::now();
        wait(here.as_fd());
        assert!(start.elapsed() < SILENCE_MAX);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn message_in_the_error_queue_does_not_keep_a_finished_connection_ready() {
        use nix::sys::socket::{TimestampingFlag, setsockopt, sockopt};
        use std::net::{TcpListener, TcpStream};

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut here, _) = listener.accept().unwrap();
        let flags = TimestampingFlag::SOF_TIMESTAMPING_TX_SOFTWARE
            | TimestampingFlag::SOF_TIMESTAMPING_SOFTWARE;
        setsockopt(&here, sockopt::Timestamping, &flags).unwrap();
        here.write_all(b"answer").unwrap();
        let ready = |time| sys::poll::wait_readable([here.as_fd()], time).unwrap();
        assert_eq!(ready(None), [true], "no message");
        assert_eq!(discard(here.as_fd(), &mut 100), Discarded::Nothing);
        assert_eq!(ready(Some(Duration::ZERO)), [false]);
    }
}

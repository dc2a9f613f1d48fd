//! Closes a connection whose client may still be sending.
//!
//! If a socket is closed while received bytes are unread, or if bytes arrive after it was closed,
//! TCP resets the connection. The reset can discard bytes that the client has not read yet, and
//! makes the client's writes fail. The functions here therefore read until the client closes the
//! connection, within limits.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::runtime::event_loop::EventLoop;
use crate::sys;
use crate::sys::poll::Interest;
use crate::worker::Worker;

/// Maximum time for which a client may send nothing while `blocking` waits for it.
///
/// A worker that blocks serves no other client during this time, so a longer time would let a few
/// silent clients occupy all workers. A client that pauses for longer, for example because a packet
/// was lost twice, may lose its answer. nginx, which does not block, allows 5 seconds
/// (`lingering_timeout`).
const SILENCE_MAX: Duration = Duration::from_secs(1);
/// Maximum time from the call of `finish` until the connection is closed.
///
/// A longer time would let a client that sends one byte a second occupy a worker for longer. A
/// shorter time would disconnect clients that send a large request slowly. nginx allows 30 seconds
/// (`lingering_time`).
const TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of bytes that are discarded.
///
/// The limit bounds the CPU time that a fast client can cost: over loopback on x86-64, 60 MB take
/// about 0.1 seconds. A smaller limit would disconnect clients with large requests.
const DISCARD_MAX: usize = 64 << 20;
/// Maximum number of bytes per read. The buffer is on the stack, which is small on some threads.
const READ_SIZE: usize = 16 << 10;

/// Waits until the client closes the connection or a limit is reached.
pub(super) fn blocking(connection: BorrowedFd<'_>) {
    // Ignore an error: if the wait fails, the remaining bytes cannot be read.
    let _ = wait_for_end(connection);
}

fn wait_for_end(connection: BorrowedFd<'_>) -> io::Result<()> {
    let start = Instant::now();
    let mut silence_end = start + SILENCE_MAX;
    let mut bytes_left = DISCARD_MAX;
    loop {
        let end = silence_end.min(start + TIMEOUT);
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        // A signal may end the wait early, so check the time again.
        let [is_readable] = sys::poll::wait_readable([connection], Some(left))?;
        if is_readable {
            if !discard(connection, &mut bytes_left) {
                return Ok(());
            }
            silence_end = Instant::now() + SILENCE_MAX;
        }
    }
}

/// Lets the loop read until the client closes the connection or a limit is reached. If the system
/// cannot watch the connection, the connection is closed at once.
pub(super) fn in_loop<S: AsFd + 'static>(event_loop: &EventLoop<Worker>, connection: S) {
    let timer = Rc::new(Cell::new(None));
    let own_timer = Rc::clone(&timer);
    let mut bytes_left = DISCARD_MAX;
    let read = move |worker: &Worker, connection: &S| {
        if discard(connection.as_fd(), &mut bytes_left) {
            return Some(Interest::Readable);
        }
        if let Some(timer) = own_timer.get() {
            worker.clear_timer(timer);
        }
        None
    };
    if let Ok(watch) = event_loop.watch(connection, Interest::Readable, read) {
        let end = event_loop.set_timeout(TIMEOUT, move |worker| worker.unwatch(watch));
        timer.set(Some(end));
    }
}

/// Reads and discards bytes that have arrived, and subtracts their number from `bytes_left`.
/// Returns whether the client may send more.
fn discard(connection: BorrowedFd<'_>, bytes_left: &mut usize) -> bool {
    match sys::socket::receive(connection, &mut [0; READ_SIZE]) {
        Ok(piece) => {
            *bytes_left = bytes_left.saturating_sub(piece.bytes);
            piece.bytes > 0 && *bytes_left > 0
        }
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_are_discarded_until_the_client_closes() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut left = DISCARD_MAX;
        assert!(discard(here.as_fd(), &mut left), "nothing has arrived");
        there.write_all(&[0; 100]).unwrap();
        assert!(discard(here.as_fd(), &mut left));
        assert_eq!(left, DISCARD_MAX - 100);
        drop(there);
        assert!(!discard(here.as_fd(), &mut left), "the client has closed");
    }

    #[test]
    fn discarding_ends_at_the_limit() {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(&[0; 100]).unwrap();
        assert!(!discard(here.as_fd(), &mut 100));
    }

    #[test]
    fn wait_ends_at_once_if_the_client_has_closed() {
        let (here, there) = UnixStream::pair().unwrap();
        drop(there);
        let start = Instant::now();
        blocking(here.as_fd());
        assert!(start.elapsed() < SILENCE_MAX);
    }
}

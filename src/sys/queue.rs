//! Connections on their way from the master to one worker: a socketpair of which the worker has one
//! end and the master both.
//!
//! A message is one connection. The worker takes one with each call; and so can the master, if it
//! wants it back. The kernel sees to it that each goes to one of the two, and keeps for the master
//! what a worker that dies has not taken.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use super::fd::NoLingerFd;
use super::{check, socket};

/// What the kernel uses for connections that are in the queue; more than are given to a worker that
/// speaks the truth, and the most that one that does not can pile up.
const ROOM: libc::c_int = 16 << 10;
/// Messages in order and one by one, as long as there is room; outside Linux datagrams do all that,
/// too.
#[cfg(target_os = "linux")]
const KIND: libc::c_int = libc::SOCK_SEQPACKET;
#[cfg(not(target_os = "linux"))]
const KIND: libc::c_int = libc::SOCK_DGRAM;
/// How long a message is: the connection's place among all.
const LENGTH: usize = size_of::<u64>();

/// Both ends.
#[derive(Debug)]
pub(crate) struct Queue {
    writer: UnixDatagram,
    reader: OwnedFd,
}

impl Queue {
    pub(crate) fn new() -> io::Result<Self> {
        let [writer, reader] = pair()?;
        for end in [&writer, &reader] {
            super::fd::set_nonblocking(end.as_fd(), true)?;
        }
        super::listen::set_option(&writer, libc::SOL_SOCKET, libc::SO_SNDBUF, ROOM)?;
        #[cfg(target_os = "linux")]
        lock_filter(&reader)?;
        // The worker is to take and not to give.
        // SAFETY: shutdown takes two integers.
        check(unsafe { libc::shutdown(reader.as_raw_fd(), libc::SHUT_WR) })?;
        let writer = writer.into();
        Ok(Self { writer, reader })
    }

    /// The worker's end.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        self.reader.try_clone()
    }

    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.writer.as_fd(), self.reader.as_fd()]
    }

    /// Puts in a connection.
    ///
    /// # Errors
    ///
    /// There is no room, or the worker has made its end useless, or the system has run out of
    /// something.
    pub(crate) fn give(&self, place: u64, connection: &NoLingerFd) -> io::Result<()> {
        let message = place.to_le_bytes();
        socket::send_one(&self.writer, &message, connection.as_fd()).map(drop)
    }

    /// Takes out the first connection, as `take` does.
    pub(crate) fn reclaim(&self) -> io::Result<Taken> {
        take(self.reader.as_fd())
    }

    /// How many connections are in it; `None` where the system does not tell.
    #[cfg(target_os = "linux")]
    pub(crate) fn count(&self) -> Option<u64> {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the call writes one integer.
        let counted =
            unsafe { libc::ioctl(self.reader.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        check(counted).ok()?;
        Some(u64::try_from(bytes).ok()? / LENGTH as u64)
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn count(&self) -> Option<u64> {
        None
    }
}

/// Keeps the worker from having the kernel cut or drop messages, also those that are taken back. Linux
/// has been able to for long; what only emulates it may not be.
#[cfg(target_os = "linux")]
fn lock_filter(reader: &OwnedFd) -> io::Result<()> {
    match super::listen::set_option(reader, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(()),
        outcome => outcome,
    }
}

/// What came of taking out of a queue.
#[derive(Debug)]
pub(crate) enum Taken {
    Connection(u64, NoLingerFd),
    Nothing,
    /// The master has closed it.
    End,
}

/// Takes out the first connection, if there is one.
///
/// # Errors
///
/// There is no descriptor free; the connection stays where it is.
pub(crate) fn take(queue: BorrowedFd<'_>) -> io::Result<Taken> {
    // Without room the kernel would take the message out and drop the connection.
    drop(super::fd::duplicate(queue.as_raw_fd(), 0)?);
    let mut place = [0; LENGTH];
    match socket::receive(queue, &mut place) {
        Ok(piece) => match piece.fds.into_iter().next() {
            Some(connection) => Ok(Taken::Connection(u64::from_le_bytes(place), connection)),
            None if piece.bytes == 0 => Ok(Taken::End),
            // Another thread was faster to use the last one.
            None => Err(io::Error::from_raw_os_error(libc::EMFILE)),
        },
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Taken::Nothing),
        Err(error) => Err(error),
    }
}

fn pair() -> io::Result<[OwnedFd; 2]> {
    #[cfg(not(target_vendor = "apple"))]
    let kind = KIND | libc::SOCK_CLOEXEC;
    #[cfg(target_vendor = "apple")]
    let kind = KIND;
    let mut ends = [-1; 2];
    // SAFETY: the call writes two numbers.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) })?;
    let ends = ends.map(super::fd::adopt);
    if cfg!(target_vendor = "apple") {
        for end in &ends {
            super::fd::close_on_exec(end.as_raw_fd())?;
        }
    }
    Ok(ends)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    fn connection(name: u8) -> (UnixStream, NoLingerFd) {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(&[name]).unwrap();
        (here, OwnedFd::from(there).into())
    }

    fn name(connection: NoLingerFd) -> u8 {
        let mut byte = [0];
        UnixStream::from(connection.claim())
            .read_exact(&mut byte)
            .unwrap();
        byte[0]
    }

    /// The place and the name of what is taken back.
    fn back(queue: &Queue) -> Option<(u64, u8)> {
        match queue.reclaim().unwrap() {
            Taken::Connection(place, connection) => Some((place, name(connection))),
            Taken::Nothing | Taken::End => None,
        }
    }

    #[test]
    fn each_connection_is_taken_once_by_either_side() {
        let queue = Queue::new().unwrap();
        let worker = queue.share().unwrap();
        let clients: Vec<_> = (0..3).map(connection).collect();
        for (place, (_, connection)) in clients.iter().enumerate() {
            queue.give(place as u64 + 7, connection).unwrap();
        }
        if cfg!(target_os = "linux") {
            assert_eq!(queue.count(), Some(3));
        }
        let Ok(Taken::Connection(7, first)) = take(worker.as_fd()) else {
            panic!("the first one");
        };
        assert_eq!(name(first), 0);
        assert_eq!(back(&queue), Some((8, 1)));
        // The worker is gone; what it has not taken is not.
        drop(worker);
        assert_eq!(back(&queue), Some((9, 2)));
        assert_eq!(back(&queue), None);
    }

    #[test]
    fn a_queue_has_room_for_an_honest_worker_and_not_much_more() {
        let queue = Queue::new().unwrap();
        let (_client, connection) = connection(0);
        let given = (0..1000).take_while(|place| queue.give(*place, &connection).is_ok());
        let given = given.count();
        assert!((16..200).contains(&given), "{given}");
    }

    #[test]
    fn a_worker_can_make_its_end_useless_only_for_itself() {
        let queue = Queue::new().unwrap();
        let worker = UnixDatagram::from(queue.share().unwrap());
        let (_client, connection) = connection(0);
        assert!(worker.send(b"to the master").is_err());
        queue.give(1, &connection).unwrap();
        worker.shutdown(std::net::Shutdown::Both).unwrap();
        let error = queue.give(2, &connection).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(back(&queue), Some((1, 0)));
        assert_eq!(back(&queue), None);
    }

    #[test]
    fn the_end_is_told() {
        let queue = Queue::new().unwrap();
        let worker = queue.share().unwrap();
        assert!(matches!(take(worker.as_fd()), Ok(Taken::Nothing)));
        drop(queue);
        assert!(matches!(take(worker.as_fd()), Ok(Taken::End)));
    }
}

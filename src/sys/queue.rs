//! The hand-off queue, which holds the connections that the master has dispatched to one worker.
//!
//! A queue is a socketpair. The worker has a copy of the reader, and the master keeps both ends.
//! Each message is one connection. Both processes receive from the reader, so the kernel gives each
//! connection to exactly one of them. The master can reclaim a connection until the worker receives
//! it. If the worker exits, the connections that it has not received stay in the queue.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;

use super::fd::NoLingerFd;
use super::platform::socket::{self as platform, QUEUE_TYPE, SOCK_CLOEXEC};
use super::{check, filter, option, socket};
use crate::types::connection_id::ConnectionId;

/// The size of a queue's send buffer, in bytes as the kernel counts them (`SO_SNDBUF` in
/// socket(7)).
///
/// With this value, an empty queue takes at least 16 and fewer than 200 connections on every
/// supported system. A smaller buffer could reject connections that the dispatcher may send ahead
/// of time. With a larger buffer, more connections accumulate in the queue of a worker that reports
/// that it is idle without receiving any.
const SEND_BUFFER: libc::c_int = 16 << 10;

/// The length of a message in bytes.
const MESSAGE_LENGTH: usize = 16;

/// The information in a message about its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    /// The number by which the master keeps the order of the connections.
    pub(crate) sequence: u64,
    /// The connection's id if the master holds a copy.
    pub(crate) held: Option<ConnectionId>,
    /// The number of times that the connection has been parked.
    pub(crate) times_parked: u32,
}

impl Label {
    fn encode(self) -> [u8; MESSAGE_LENGTH] {
        let held = self.held.map_or(NOT_HELD, |held| held.0);
        let mut bytes = [0; MESSAGE_LENGTH];
        bytes[..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..12].copy_from_slice(&held.to_le_bytes());
        bytes[12..].copy_from_slice(&self.times_parked.to_le_bytes());
        bytes
    }

    fn decode(bytes: [u8; MESSAGE_LENGTH]) -> Self {
        // The master writes all messages, so every number is valid.
        let number = |at: usize| {
            let bytes = bytes[at..].first_chunk();
            u32::from_le_bytes(bytes.copied().unwrap_or_default())
        };
        let held = number(8);
        Self {
            sequence: u64::from(number(0)) | u64::from(number(4)) << 32,
            held: (held != NOT_HELD).then_some(ConnectionId(held)),
            times_parked: number(12),
        }
    }
}

/// The number that stands for a connection of which the master holds no copy. No connection has
/// this id, because ids are at most `POLL_NUMBER_MAX`.
const NOT_HELD: u32 = u32::MAX;

/// Both ends of a queue. Only the master holds both. The worker gets a copy of the reader.
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
        option::set_int(writer.as_fd(), libc::SO_SNDBUF, SEND_BUFFER)?;
        lock_filter(&reader)?;
        // Shut down the worker's direction, because the worker must not send.
        // SAFETY: shutdown accesses no memory of this process.
        check(unsafe { libc::shutdown(reader.as_raw_fd(), libc::SHUT_WR) })?;
        let writer = writer.into();
        Ok(Self { writer, reader })
    }

    /// Returns a copy of the reader for the worker.
    pub(crate) fn worker_end(&self) -> io::Result<OwnedFd> {
        self.reader.try_clone()
    }

    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.writer.as_fd(), self.reader.as_fd()]
    }

    /// Appends a connection to the queue.
    ///
    /// # Errors
    ///
    /// Returns an error if the queue is full, if the worker has shut down its end, or if the system
    /// lacks a resource.
    pub(crate) fn send(&self, label: Label, connection: BorrowedFd<'_>) -> io::Result<()> {
        socket::send_one(&self.writer, &label.encode(), connection).map(drop)
    }

    /// Removes the first connection from the queue, like [`receive`] in the worker.
    pub(crate) fn reclaim(&self) -> io::Result<Dequeued> {
        receive(self.reader.as_fd())
    }

    /// Returns the number of connections in the queue. Returns `None` if the system does not report
    /// this number.
    pub(crate) fn count(&self) -> Option<u64> {
        Some(platform::readable_bytes(&self.reader)? / MESSAGE_LENGTH as u64)
    }
}

/// Returns whether a queue is known to contain no connection. Needs no free descriptor.
pub(crate) fn is_empty(queue: &OwnedFd) -> bool {
    platform::readable_bytes(queue) == Some(0)
}

/// Prevents the worker from attaching a filter that truncates or drops messages, because the master
/// could not reclaim their connections.
///
/// Linux has this lock since 3.9, but emulators of its system calls may lack it.
fn lock_filter(reader: &OwnedFd) -> io::Result<()> {
    match filter::lock_filter(reader) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(()),
        outcome => outcome,
    }
}

/// The result of receiving from a queue.
#[derive(Debug)]
pub(crate) enum Dequeued {
    Connection(Label, NoLingerFd),
    /// The message of a connection that the kernel has dropped, because another thread has taken
    /// the last free descriptor.
    Lost(Label),
    /// The queue is empty.
    Empty,
    /// The master has closed the queue.
    Closed,
}

/// Removes the first connection from a queue, if there is one.
///
/// # Errors
///
/// Returns EMFILE if no descriptor is free. This function checks for a free descriptor before it
/// receives, so the connection stays in the queue. If another thread takes the last descriptor
/// after the check, the result is `Dequeued::Lost`. Also returns the system's other errors.
pub(crate) fn receive(queue: BorrowedFd<'_>) -> io::Result<Dequeued> {
    // Check first that a descriptor is free. Without one, the kernel would remove the message and
    // drop its connection.
    drop(super::fd::duplicate(queue.as_raw_fd(), 0)?);
    let mut message = [0; MESSAGE_LENGTH];
    match socket::receive(queue, &mut message) {
        Ok(piece) => match piece.fds.into_iter().next() {
            Some(connection) => Ok(Dequeued::Connection(Label::decode(message), connection)),
            None if piece.bytes == 0 => Ok(Dequeued::Closed),
            // Another thread has used the last descriptor since the check, so the kernel has
            // dropped the connection.
            None => Ok(Dequeued::Lost(Label::decode(message))),
        },
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Dequeued::Empty),
        Err(error) => Err(error),
    }
}

fn pair() -> io::Result<[OwnedFd; 2]> {
    let mut ends = [-1; 2];
    let kind = QUEUE_TYPE | SOCK_CLOEXEC;
    // SAFETY: the pointer is valid for writes of two numbers.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) })?;
    // SAFETY: the kernel has just opened the descriptors for this call.
    let ends = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
    if SOCK_CLOEXEC == 0 {
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
        UnixStream::from(connection.into_owned_fd())
            .read_exact(&mut byte)
            .unwrap();
        byte[0]
    }

    fn label(sequence: u64) -> Label {
        Label {
            sequence,
            held: None,
            times_parked: 0,
        }
    }

    /// Returns the sequence number and the name of the connection that the master reclaims.
    fn reclaimed(queue: &Queue) -> Option<(u64, u8)> {
        match queue.reclaim().unwrap() {
            Dequeued::Connection(label, connection) => Some((label.sequence, name(connection))),
            Dequeued::Lost(_) | Dequeued::Empty | Dequeued::Closed => None,
        }
    }

    #[test]
    fn each_connection_is_received_or_reclaimed_once() {
        let queue = Queue::new().unwrap();
        let worker = queue.worker_end().unwrap();
        let clients: Vec<_> = (0..3).map(connection).collect();
        for (index, (_, connection)) in clients.iter().enumerate() {
            queue
                .send(label(index as u64 + 7), connection.as_fd())
                .unwrap();
        }
        if cfg!(any(target_os = "linux", target_os = "android")) {
            assert_eq!(queue.count(), Some(3));
        }
        let Ok(Dequeued::Connection(label, first)) = receive(worker.as_fd()) else {
            panic!("the first connection is missing");
        };
        assert_eq!(label.sequence, 7);
        assert_eq!(name(first), 0);
        assert_eq!(reclaimed(&queue), Some((8, 1)));
        // Close the worker's end, as the worker's exit would. The last connection must stay in the
        // queue.
        drop(worker);
        assert_eq!(reclaimed(&queue), Some((9, 2)));
        assert_eq!(reclaimed(&queue), None);
    }

    #[test]
    fn label_survives_its_message() {
        for held in [None, Some(ConnectionId(0)), Some(ConnectionId(0x0102_0304))] {
            let label = Label {
                sequence: 0x0102_0304_0506_0708,
                held,
                times_parked: 9,
            };
            assert_eq!(Label::decode(label.encode()), label);
        }
    }

    #[test]
    fn queue_takes_a_bounded_number_of_connections() {
        let queue = Queue::new().unwrap();
        let (_client, connection) = connection(0);
        let sent = (0..1000)
            .take_while(|sequence| queue.send(label(*sequence), connection.as_fd()).is_ok());
        let sent = sent.count();
        assert!((16..200).contains(&sent), "{sent}");
    }

    #[test]
    fn worker_that_shuts_down_its_end_loses_no_connection() {
        let queue = Queue::new().unwrap();
        let worker = UnixDatagram::from(queue.worker_end().unwrap());
        let (_client, connection) = connection(0);
        assert!(worker.send(b"to the master").is_err());
        queue.send(label(1), connection.as_fd()).unwrap();
        worker.shutdown(std::net::Shutdown::Both).unwrap();
        let error = queue.send(label(2), connection.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(reclaimed(&queue), Some((1, 0)));
        assert_eq!(reclaimed(&queue), None);
    }

    #[test]
    fn worker_receives_the_end_of_a_closed_queue() {
        let queue = Queue::new().unwrap();
        let worker = queue.worker_end().unwrap();
        assert!(matches!(receive(worker.as_fd()), Ok(Dequeued::Empty)));
        drop(queue);
        assert!(matches!(receive(worker.as_fd()), Ok(Dequeued::Closed)));
    }
}

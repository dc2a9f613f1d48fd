//! Ends `accept` calls of code that this crate does not control.
//!
//! shutdown(2) would end the calls of all processes that share the listener, and lose its backlog.
//! Instead, the number of this process's descriptor becomes a copy of the *stub*, a socket that
//! does not listen. From then on, `accept` on the number fails with EINVAL, as if the listener had
//! been shut down. A call that already waits still waits for the listener, so a signal interrupts
//! it. The standard library (EINTR) or the kernel (SA_RESTART) then repeats the call, which fails.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use super::file::socket_id_of;
use super::listen::{self, Family};
use super::platform::blocked_threads;
use super::{fd, option};
use crate::types::socket_id::SocketId;

/// Maximum number of attempts to interrupt the calls that wait. The caller makes one every 10 ms.
///
/// An attempt is repeated while a thread of the process is running, because the thread may be about
/// to wait. A thread that computes without end must not delay the caller without end. With fewer
/// attempts, a thread that waits for a processor could be missed. No benchmark chose this value.
const MAX_ATTEMPTS: u32 = 100;

/// The `accept` calls on a copy of a listener that other code owns.
#[derive(Debug)]
pub(crate) struct StdAccept {
    /// The number of the copy. The other code may have closed it.
    number: RawFd,
    listener: SocketId,
    stub: OwnedFd,
    attempts: u32,
}

impl StdAccept {
    /// Returns a blocking copy of the listener for other code, and the value that ends its calls.
    ///
    /// # Errors
    ///
    /// Returns an error if no descriptor is free.
    pub(crate) fn new(listener: BorrowedFd<'_>) -> io::Result<(Self, OwnedFd)> {
        let kind = listen::socket_kind(listener.as_raw_fd())?;
        let stub = stub(kind.family)?;
        let copy = listener.try_clone_to_owned()?;
        fd::set_nonblocking(copy.as_fd(), false)?;
        let accept = Self {
            number: copy.as_raw_fd(),
            listener: socket_id_of(copy.as_raw_fd())?,
            stub,
            attempts: 0,
        };
        Ok((accept, copy))
    }

    /// Returns whether the other code still has its copy.
    pub(crate) fn is_open(&self) -> bool {
        self.refers_to(Some(self.listener))
    }

    /// Makes all later `accept` calls on the copy fail. Then call [`interrupt`](Self::interrupt).
    pub(crate) fn end(&self) {
        // Check first, because another descriptor has the number if the other code has closed its
        // copy. The check is not atomic, so the other code must not close the copy now.
        if self.is_open() {
            // The call cannot fail, because both descriptors are open.
            let _ = fd::replace(self.number, self.stub.as_fd());
        }
    }

    /// Interrupts the calls that wait. Returns whether the caller must call again after 10 ms,
    /// because a call may still be waiting.
    pub(crate) fn interrupt(&mut self) -> bool {
        self.attempts += 1;
        // The other code closes its copy only when none of its threads uses the copy.
        let is_used = self.refers_to(socket_id_of(self.stub.as_raw_fd()).ok());
        is_used && blocked_threads::interrupt(self.number) && self.attempts < MAX_ATTEMPTS
    }

    fn refers_to(&self, socket: Option<SocketId>) -> bool {
        socket_id_of(self.number).ok() == socket
    }
}

/// Returns a socket on which `accept` fails with EINVAL.
pub(crate) fn stub(family: Family) -> io::Result<OwnedFd> {
    match family {
        // An unbound socket still has a local address, which other code may ask for.
        Family::Internet => listen::open(&SocketAddr::from(([0; 4], 0)), libc::SOCK_STREAM),
        Family::Unix | Family::Other => Ok(UnixStream::pair()?.0.into()),
    }
}

/// The part of a local address that a listener and its connections have in common: the port, or the
/// path of a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocalName(Vec<u8>);

impl LocalName {
    /// Returns the name of a stream socket, or `None` for other descriptors.
    pub(crate) fn of(number: RawFd) -> Option<Self> {
        let kind = listen::socket_kind(number)
            .ok()
            .filter(|kind| kind.is_stream)?;
        // SAFETY: all zeroes is a valid `sockaddr_storage`.
        let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        let mut size = option::size_of_value(&address);
        // SAFETY: both pointers are valid for writes, and `size` is the address's size.
        super::check(unsafe {
            libc::getsockname(number, (&raw mut address).cast(), &raw mut size)
        })
        .ok()?;
        let size = usize::try_from(size).ok()?.min(size_of_val(&address));
        // SAFETY: every byte of the value is initialized, because it was zeroed before the call.
        let bytes = unsafe { std::slice::from_raw_parts((&raw const address).cast::<u8>(), size) };
        // On all systems, the port or the path follows the family in the address.
        let name = match kind.family {
            Family::Internet => bytes.get(2..4)?,
            Family::Unix | Family::Other => bytes.get(2..)?,
        };
        Some(Self(name.to_vec()))
    }
}

/// Returns whether this process has a connection of a listener with one of these names.
///
/// If the system does not list the open descriptors, checks the first 1,024 numbers.
pub(crate) fn has_connection(listeners: &[LocalName]) -> bool {
    let is_connection = |number: RawFd| {
        let listens = listen::socket_kind(number).is_ok_and(|kind| kind.listens);
        !listens && LocalName::of(number).is_some_and(|name| listeners.contains(&name))
    };
    match std::fs::read_dir("/dev/fd") {
        Ok(entries) => {
            let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            let mut numbers = names.filter_map(|name| name.parse().ok());
            numbers.any(is_connection)
        }
        Err(_) => (0..1024).any(is_connection),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    #[test]
    fn end_ends_waiting_calls_and_spares_other_copies() {
        for _ in 0..20 {
            let (listener, address) = listener();
            let (mut accept, copy) = StdAccept::new(listener.as_fd()).unwrap();
            let copy = TcpListener::from(copy);
            let errors: Vec<_> = thread::scope(|scope| {
                let threads = [(); 3].map(|()| scope.spawn(|| copy.accept().unwrap_err()));
                accept.end();
                // Do not wait for `interrupt` to return `false`, because other tests keep threads
                // of this process running.
                while !threads.iter().all(|thread| thread.is_finished()) {
                    accept.interrupt();
                    thread::sleep(Duration::from_millis(10));
                }
                threads.map(|thread| thread.join().unwrap()).into()
            });
            let errnos: Vec<_> = errors.iter().map(io::Error::raw_os_error).collect();
            assert_eq!(errnos, [Some(libc::EINVAL); 3]);
            let _client = TcpStream::connect(address).unwrap();
            listener.accept().unwrap();
        }
    }

    #[test]
    fn end_leaves_a_descriptor_alone_that_has_the_number_of_a_closed_copy() {
        let (listener, _) = listener();
        let (mut accept, copy) = StdAccept::new(listener.as_fd()).unwrap();
        let (other, peer) = UnixStream::pair().unwrap();
        fd::replace(copy.as_raw_fd(), other.as_fd()).unwrap();
        drop(other);
        assert!(!accept.is_open());
        accept.end();
        assert!(!accept.interrupt());
        peer.set_nonblocking(true).unwrap();
        let error = io::Read::read(&mut &peer, &mut [0]).unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::WouldBlock,
            "{copy:?} was closed"
        );
    }

    #[test]
    fn connections_are_found_until_all_copies_are_closed() {
        let (listener, address) = listener();
        let names = [LocalName::of(listener.as_raw_fd()).unwrap()];
        assert!(!has_connection(&names));
        let _client = TcpStream::connect(address).unwrap();
        let connection = listener.accept().unwrap().0;
        let copy = connection.try_clone().unwrap();
        drop(connection);
        assert!(has_connection(&names));
        drop(copy);
        assert!(!has_connection(&names));
    }
}

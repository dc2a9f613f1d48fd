//! The sockets that share one port, and the selection among them.
//!
//! The kernel asks a program that is attached to the whole group for the index of the socket that gets a
//! connection. It lets every member attach another program, and each worker has a member. So the
//! shards of the workers are locked (`SO_LOCK_FILTER`), which cannot be undone. The group has one
//! more member, the *selector*, which no worker gets: the master changes the selection through it.
//!
//! A worker can still detach the program, which the lock does not prevent, or make its shard listen
//! no more. The kernel then chooses by a hash among all members, or by indexes that have moved. So
//! it may choose the selector, where no connection comes otherwise: the master notices, resets
//! the connection, and attaches the program again.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};

use crate::runtime::event_loop::Token;
use crate::sys;
use crate::sys::poll::{Interest, Poller, Registered};
use crate::types::endpoint::BindFlags;
use crate::wire::frame::HandleId;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Member {
    Selector,
    Shard(usize),
}

#[derive(Debug)]
pub(crate) struct ShardGroup {
    selector: Registered<OwnedFd>,
    /// The members in the order of the kernel, which appends one that begins to listen. When one
    /// ends, the last one gets its index.
    order: Vec<Member>,
}

impl ShardGroup {
    /// Adds the selector to a group of which the first shard is the only member, and locks that.
    pub(crate) fn new(
        first: &OwnedFd,
        flags: &BindFlags,
        poller: &Poller,
        handle: HandleId,
    ) -> io::Result<Self> {
        let address = sys::listen::local_addr(first).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let selector = sys::listen::listen_as_selector(&address, flags)?;
        sys::filter::lock_filter(first)?;
        let key = Token::Selector(handle.0).key();
        Ok(Self {
            selector: poller.add(selector, key, Some(Interest::Readable))?,
            order: vec![Member::Shard(0), Member::Selector],
        })
    }

    /// The number of the selector's descriptor.
    pub(crate) fn number(&self) -> RawFd {
        self.selector.as_fd().as_raw_fd()
    }

    /// Adds a shard that has just begun to listen. The selection does not change.
    pub(crate) fn add(&mut self, shard: usize) {
        self.order.push(Member::Shard(shard));
    }

    /// A shard that was shut down listens again.
    pub(crate) fn readd(&mut self, shard: usize) {
        let own = Member::Shard(shard);
        if let Some(index) = self.order.iter().position(|member| *member == own) {
            self.order.swap_remove(index);
            self.order.push(own);
        }
    }

    /// Distributes new connections evenly among these shards.
    pub(crate) fn select(&self, shards: &[usize]) -> io::Result<()> {
        // Accepting may have failed before.
        self.selector.set_interest(Some(Interest::Readable))?;
        sys::filter::select_sockets(&self.selector, &self.indexes(shards))
    }

    fn indexes(&self, shards: &[usize]) -> Vec<usize> {
        let members = self.order.iter().enumerate();
        let chosen = members.filter_map(|(index, member)| match member {
            Member::Shard(shard) => shards.contains(shard).then_some(index),
            Member::Selector => None,
        });
        chosen.collect()
    }

    /// Ignores new connections until `admit`: the selector, which drops them, is selected.
    pub(crate) fn ignore(&self) -> io::Result<()> {
        sys::filter::attach_syn_filter(&self.selector)?;
        let own = |member: &Member| *member == Member::Selector;
        let index = self.order.iter().position(own);
        sys::filter::select_sockets(&self.selector, index.as_slice())
    }

    /// Ends `ignore`, before `select`.
    pub(crate) fn admit(&self) -> io::Result<()> {
        sys::filter::detach_syn_filter(&self.selector)
    }

    /// Resets the connections that reached the selector, at most `at_most` of them. Returns how many.
    pub(crate) fn reset(&self, at_most: u64) -> u64 {
        for count in 0..at_most {
            match sys::listen::accept(&*self.selector) {
                Ok(connection) => drop(connection),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return count,
                Err(error) if sys::listen::is_connection_error(&error) => {}
                Err(_) => {
                    // For lack of descriptors it would stay readable, and keep the loop.
                    let _ = self.selector.set_interest(None);
                    return count;
                }
            }
        }
        at_most
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    /// Which of the shards gets a connection, of which there is one.
    fn chosen(address: &std::net::SocketAddr, shards: &[OwnedFd]) -> usize {
        let _client = std::net::TcpStream::connect(address).unwrap();
        let accepts = |shard: &OwnedFd| sys::listen::accept(shard).is_ok();
        let chosen = shards.iter().position(accepts);
        chosen.expect("not the selector")
    }

    /// A connection that was accepted from a socket that was shut down carries data.
    fn assert_open(address: &std::net::SocketAddr, shard: &OwnedFd) {
        use std::io::{Read as _, Write as _};
        let mut client = std::net::TcpStream::connect(address).unwrap();
        let mut accepted = std::net::TcpStream::from(sys::listen::accept(shard).unwrap());
        accepted.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn selection_follows_shards_that_are_shut_down_and_listen_again() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let flags = BindFlags::default();
            let listen = sys::listen::listen_tcp;
            let found = sys::listen::PortSharing::Create;
            let first = listen(&any.parse().unwrap(), &flags, found).unwrap();
            let address = sys::listen::local_addr(&first).unwrap();
            let again = listen(&address, &flags, found).unwrap_err();
            assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
            let poller = Poller::new().unwrap();
            let mut group = ShardGroup::new(&first, &flags, &poller, HandleId(1)).unwrap();
            let join = sys::listen::PortSharing::Join;
            let mut shards = vec![first];
            for shard in 1..4 {
                shards.push(listen(&address, &flags, join).unwrap());
                group.add(shard);
            }
            for is_shut in [None, Some(0), Some(2), Some(0), Some(3), Some(1)] {
                if let Some(shard) = is_shut {
                    let own = &shards[shard];
                    assert!(!sys::poll::has_hung_up(own.as_fd()).unwrap());
                    // In both directions, once more when it is shut.
                    for _ in 0..2 {
                        let _ = nix::sys::socket::shutdown(
                            own.as_raw_fd(),
                            nix::sys::socket::Shutdown::Both,
                        );
                    }
                    assert!(sys::poll::has_hung_up(own.as_fd()).unwrap());
                    sys::listen::listen_again(own, &address, 16).unwrap();
                    group.readd(shard);
                    group.select(&[shard]).unwrap();
                    assert_open(&address, own);
                }
                for shard in 0..4 {
                    group.select(&[shard]).unwrap();
                    assert_eq!(chosen(&address, &shards), shard, "after {is_shut:?}");
                }
            }
        }
    }
}

//! The sockets that share one port, and the program that selects among them.
//!
//! A BPF program is attached to the group. For each new connection, the program returns the index
//! of the socket that receives it. The kernel lets every member of the group attach another
//! program, and each worker has a member. Therefore, the workers' shards are locked with
//! `SO_LOCK_FILTER`, which cannot be undone. The group has one more member, the *selector*, which
//! no worker receives. The master changes the selection through the selector.
//!
//! Despite the lock, a worker can detach the program; the kernel then chooses among all members by
//! a hash. A worker can also shut its shard down; the members' indexes then change, but the program
//! still returns the old ones. In both cases, the kernel may choose the selector, which normally
//! receives no connection. When the selector receives a connection, the master closes it. If the
//! listener is open, the master also attaches the program again.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};

use crate::runtime::token::Token;
use crate::sys;
use crate::sys::poll::{Interest, Poller, Registered};
use crate::types::endpoint::BindFlags;
use crate::types::handle::HandleId;

/// A socket of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Member {
    Selector,
    /// The shard with this index in the order in which the master opened the shards.
    Shard(usize),
}

#[derive(Debug)]
pub(crate) struct ShardGroup {
    selector: Registered<OwnedFd>,
    /// The members, in the kernel's order. The kernel appends a member that starts to listen. If a
    /// member is removed, the last member takes its index.
    order: Vec<Member>,
}

/// The result of [`ShardGroup::reset`].
#[derive(Debug, Default)]
pub(crate) struct Reset {
    /// The number of connections that were closed or that failed while they were accepted.
    pub(crate) count: u64,
    /// The reason why accepting failed. More connections may wait in this case.
    pub(crate) failure: Option<io::Error>,
}

impl ShardGroup {
    /// Creates the group of the first shard, adds the selector, and locks the first shard.
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

    /// Returns the selector's descriptor number.
    pub(crate) fn number(&self) -> RawFd {
        self.selector.as_fd().as_raw_fd()
    }

    /// Adds a shard that has just started to listen. The new shard receives no connections until
    /// `select` chooses it.
    pub(crate) fn add(&mut self, shard: usize) {
        self.order.push(Member::Shard(shard));
    }

    /// Moves a shard to its new index after it was shut down and listens again.
    pub(crate) fn readd(&mut self, shard: usize) {
        let own = Member::Shard(shard);
        if let Some(index) = self.order.iter().position(|member| *member == own) {
            self.order.swap_remove(index);
            self.order.push(own);
        }
    }

    /// Distributes new connections evenly among the given shards.
    pub(crate) fn select(&self, shards: &[usize]) -> io::Result<()> {
        // Watch the selector again, because `reset` may have stopped the watch.
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

    /// Ignores new connections until `admit`. The BPF program chooses the selector for all of them,
    /// and the selector's SYN filter drops them.
    pub(crate) fn ignore(&self) -> io::Result<()> {
        sys::filter::attach_syn_filter(&self.selector)?;
        let own = |member: &Member| *member == Member::Selector;
        let index = self.order.iter().position(own);
        sys::filter::select_sockets(&self.selector, index.as_slice())
    }

    /// Detaches the SYN filter that `ignore` has attached. The caller must call `select` next,
    /// because the BPF program still chooses the selector for all new connections.
    pub(crate) fn admit(&self) -> io::Result<()> {
        sys::filter::detach_syn_filter(&self.selector)
    }

    /// Accepts and closes at most `at_most` connections that have reached the selector. The kernel
    /// resets those whose clients have already sent something.
    ///
    /// If accepting fails, for instance because no descriptor is free, the selector is no longer
    /// watched until `select`, because it stays readable and would keep the loop busy.
    pub(crate) fn reset(&self, at_most: u64) -> Reset {
        let mut reset = Reset::default();
        while reset.count < at_most {
            match sys::listen::accept(&*self.selector) {
                Ok(connection) => drop(connection),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if sys::listen::is_connection_error(&error) => {}
                Err(error) => {
                    let _ = self.selector.set_interest(None);
                    reset.failure = Some(error);
                    break;
                }
            }
            reset.count += 1;
        }
        reset
    }
}

#[cfg(test)]
#[cfg(any(target_os = "linux", target_os = "android"))]
mod tests {
    use super::*;

    /// Connects once, and returns the index of the shard that receives the connection.
    fn chosen(address: &std::net::SocketAddr, shards: &[OwnedFd]) -> usize {
        let _client = std::net::TcpStream::connect(address).unwrap();
        let accepts = |shard: &OwnedFd| sys::listen::accept(shard).is_ok();
        let chosen = shards.iter().position(accepts);
        chosen.expect("a shard receives the connection, not the selector")
    }

    /// Asserts that a connection accepted from this shard transfers data.
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
                    // Shut the socket down twice, to check that the second shutdown changes
                    // nothing.
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

//! The state of one listener.
//!
//! A listener that the application does not retain lives as long as workers serve it:
//!
//! ```text
//!   from           event                                                        to
//!   -------------  -----------------------------------------------------------  ---------
//!   (none)         the first worker listens on the address                      Open
//!   Open           all workers that serve it disconnect                         Draining
//!   Open, Draining the last worker that serves it exits or releases it          Unbound
//!   Draining       another worker listens on the address                        Open
//!   Draining       the backlog is empty (round robin)                           Unbound
//!   Draining       the grace period is over (shared, sharded)                   Emptying
//!   Emptying       another worker listens on the address                        Open
//!   Emptying       the last worker has released it                              Unbound
//!   Unbound        the last worker has released it                              (removed)
//! ```
//!
//! - `Emptying` is the stage of listeners whose backlog only their workers see. A sharded listener also
//!   gets there if its last serving worker exits while others are disconnecting. A UDP socket gets there
//!   at once, since no client waits for an answer to a queued datagram.
//! - A Unix path, whose file is removed, cannot open again. Neither can a borrowed listener, which
//!   continues without this master. The next worker gets a new listener.
//!
//! A retained listener, in contrast, stays open. Without workers, new connections wait in its backlog.
//!
//! ```text
//!   from     event                                                                to
//!   -------  -------------------------------------------------------------------  -------
//!   Open     all workers that serve it disconnect (round robin)                   Pausing
//!   Pausing  they have received all accepted connections, or exited               Open
//!   Pausing  another worker listens on the address                                Open
//! ```
//!
//! When the application releases it, the first table applies again.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::member::Members;
use crate::config::policy::SchedulingPolicy;
use crate::core::dispatch::Dispatcher;
use crate::types::address::Address;
use crate::types::endpoint::Kind;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;
use crate::wire::frame::HandleKey;

/// See the [module](self) for the transitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Open,
    /// New connections are kept out. The backlog is treated as empty no earlier than at this time, the
    /// end of the grace period for handshakes; `None` when that is over.
    Draining(Option<Time>),
    /// The workers close the listener when they find its backlog empty.
    Emptying,
    /// All workers that serve it disconnect. Nothing more is accepted, and they receive the connections
    /// that have been accepted.
    Pausing,
    Unbound,
}

/// Whether the master accepts connections from the backlog.
///
/// ```text
/// from          event                                           to
/// ------------  ----------------------------------------------  ----------
/// Watched       the listener is readable, drains or pauses      Ready
/// Ready         the dispatcher has capacity                     Accepting
/// Accepting     the backlog is empty, or the batch is complete  Watched, or Ready without capacity
/// Accepting     accepting failed                                BackingOff
/// BackingOff    the time is over                                Ready
/// any           a borrowed listener is returned                 Closed
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AcceptState {
    /// The poller reports when there is a connection.
    Watched,
    /// There may be a connection: accept when the dispatcher has capacity.
    Ready,
    /// The shell is accepting.
    Accepting,
    /// Accepting failed. The next attempt is at this time.
    BackingOff(Time),
    /// Nothing more is accepted. Further connections are for other owners of the socket.
    Closed,
}

/// The processes that may have a copy of the listening socket.
///
/// ```text
///   the master opens it ----> Sole --- MasterListener::as_fd ---> Borrowed
///   a descriptor that the application names (ListenOptions::fd) -> Borrowed
///   Master::listen with a socket --------------------------------> Adopted
/// ```
///
/// There is no way back: the master cannot learn that no other process has a copy. A listener that is
/// not `Sole` never gets a SYN filter, and is never shut down, because both affect all copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ownership {
    /// The master, and workers that close their copies when they exit. Any other copy is unintended and
    /// is shut down with the listener.
    Sole,
    /// The application may have given a copy to any process.
    Borrowed,
    /// It was open before the master got it, and may have other names.
    Adopted,
}

#[derive(Debug)]
pub(super) struct Listener<C> {
    pub(super) key: HandleKey,
    /// The bound address, with the real port; `None` for a Unix path.
    pub(super) address: Option<SocketAddr>,
    pub(super) policy: SchedulingPolicy,
    pub(super) ownership: Ownership,
    pub(super) stage: Stage,
    pub(super) accept_state: AcceptState,
    /// The poller watches it.
    pub(super) watched: bool,
    pub(super) members: Members,
    pub(super) dispatcher: Dispatcher<C>,
    /// The master has accepted a connection.
    pub(super) has_accepted: bool,
    /// The system lacks a resource for dispatching; the next attempt is at this time.
    pub(super) dispatch_from: Option<Time>,
    /// A process has shut it down. This is not reported again before this time.
    pub(super) hang_up_from: Option<Time>,
    /// How many `MasterListener`s of it the application has.
    pub(super) retained_by: u32,
    /// The worker of each shard. A shard of a worker that exited keeps its backlog for the next worker.
    pub(super) shards: Vec<Option<WorkerId>>,
    /// Workers whose shards get no new connections, with the time at which they must drain these shards.
    pub(super) departing: BTreeSet<(Time, WorkerId)>,
    /// The shard to which new connections are sent while no worker serves. The next worker gets it.
    pub(super) spare_shard: Option<usize>,
}

impl<C> Listener<C> {
    /// Returns a listener that is open and has no workers.
    pub(super) fn new(
        key: HandleKey,
        address: Option<SocketAddr>,
        policy: SchedulingPolicy,
    ) -> Self {
        let ownership = match key.endpoint.is_borrowed() {
            true => Ownership::Borrowed,
            false => Ownership::Sole,
        };
        Self {
            key,
            address,
            policy,
            ownership,
            stage: Stage::Open,
            accept_state: AcceptState::Watched,
            watched: false,
            members: Members::new(),
            dispatcher: Dispatcher::new(),
            has_accepted: false,
            dispatch_from: None,
            hang_up_from: None,
            retained_by: 0,
            shards: Vec::new(),
            departing: BTreeSet::new(),
            spare_shard: None,
        }
    }

    /// Returns the time at which `tick` is needed at the latest.
    pub(super) fn deadline(&self) -> Option<Time> {
        let back_off = match self.accept_state {
            AcceptState::BackingOff(until) => Some(until),
            AcceptState::Watched
            | AcceptState::Ready
            | AcceptState::Accepting
            | AcceptState::Closed => None,
        };
        let grace = match (self.stage, self.accept_state, self.policy) {
            (Stage::Draining(grace), AcceptState::Watched, _)
            | (Stage::Draining(grace), _, SchedulingPolicy::Shared | SchedulingPolicy::Sharded) => {
                grace
            }
            _ => None,
        };
        let departing = self.departing.first().map(|(time, _)| *time);
        let rebalance = self.dispatcher.rebalance_deadline();
        let rebalance = rebalance.filter(|_| self.may_dispatch());
        let all = [
            back_off,
            grace,
            departing,
            self.dispatch_from,
            self.hang_up_from,
            rebalance,
        ];
        all.into_iter().fold(None, earlier)
    }

    /// Returns the address as the application is notified of it.
    pub(super) fn public_address(&self) -> Address {
        Address::new(&self.key.endpoint, self.address)
    }

    /// Whether connections may be dispatched, and reclaimed for other workers.
    pub(super) fn may_dispatch(&self) -> bool {
        self.stage != Stage::Unbound && self.dispatch_from.is_none()
    }

    /// Returns how many more connections may be accepted now.
    pub(super) fn capacity(&self) -> u64 {
        match self.stage {
            Stage::Pausing => 0,
            Stage::Open | Stage::Draining(_) | Stage::Emptying | Stage::Unbound => {
                self.dispatcher.capacity()
            }
        }
    }

    /// Whether new connections are kept out in a way that cannot be undone.
    pub(super) fn is_closed_for_good(&self) -> bool {
        let is_path = self.key.endpoint.kind == Kind::Unix && self.is_sole();
        is_path && self.stage != Stage::Open
    }

    pub(super) fn is_sole(&self) -> bool {
        self.ownership == Ownership::Sole
    }

    /// Whether the master accepts, and workers have no copies.
    pub(super) fn master_accepts(&self) -> bool {
        self.policy == SchedulingPolicy::RoundRobin
    }

    /// Whether it stays open without workers.
    pub(super) fn outlives_workers(&self) -> bool {
        self.is_retained() && self.stage != Stage::Unbound
    }

    pub(super) fn is_retained(&self) -> bool {
        self.retained_by > 0
    }
}

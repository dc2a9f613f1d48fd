//! The state of one listener.
//!
//! If the application does not retain a listener, the listener exists only while workers have it:
//!
//! ```text
//!   from           event                                                        to
//!   -------------  -----------------------------------------------------------  ---------
//!   (none)         the first worker listens on the address                      Open
//!   Open           all workers that serve it disconnect                         Draining
//!   Open, Draining the last worker that serves it exits or releases it          Unbound
//!   Draining       another worker listens on the address                        Open
//!   Draining       the backlog and the queues are empty (round robin)           Unbound
//!   Draining       the grace period ends (shared, sharded)                      Emptying
//!   Emptying       another worker listens on the address                        Open
//!   Emptying       the last worker has released it                              Unbound
//!   Unbound        the last worker has released it                              (removed)
//! ```
//!
//! - `Emptying` is for listeners whose backlog is visible only to their workers. A sharded listener
//!   also enters this stage if its last serving worker exits or releases it while others are
//!   disconnecting. A UDP socket enters this stage immediately, because UDP has no handshakes and
//!   so needs no grace period.
//! - A draining listener never returns to `Open` if its Unix path has been removed, or if it is
//!   borrowed and has been returned to the application. The next worker then receives a new
//!   listener.
//!
//! A retained listener stays open without workers, and new connections wait in its backlog.
//!
//! ```text
//!   from     event                                                                to
//!   -------  -------------------------------------------------------------------  -------
//!   Open     all workers that serve it disconnect (round robin)                   Pausing
//!   Pausing  they have received all accepted connections, or exited               Open
//!   Pausing  another worker listens on the address                                Open
//! ```
//!
//! Once the application releases a retained listener, the first table applies.

use std::net::SocketAddr;

use super::hand_off::HandOff;
use super::member::Members;
use super::parked::ReadyQueue;
use crate::core::dispatch::Dispatcher;
use crate::types::address::Address;
use crate::types::endpoint::{Kind, Parking};
use crate::types::handle::HandleKey;
use crate::types::ordered_set::OrderedSet;
use crate::types::policy::SchedulingPolicy;
use crate::types::time::{Time, earlier};
use crate::types::user::User;
use crate::types::worker_id::WorkerId;

/// The interval between two sweeps of a draining or pausing listener's waiting connections. The
/// poller does not watch these connections, so it does not report when their clients hang up. While
/// no listener drains or pauses, no sweep is scheduled, so that an idle master does not wake up.
///
/// The shell checks 2 connections in each iteration, so 100 connections take about one second. A
/// longer interval delays the end of a drain. A shorter one wakes the master more often while a
/// worker is busy. No benchmark chose this value.
pub(super) const SWEEP_INTERVAL: Time = Time::from_millis(20);

/// The stage of a listener. See the [module](self) for the transitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The listener receives new connections.
    Open,
    /// New connections are kept out, unless a process outside the cluster may have a copy of the
    /// socket. The value is the end of the grace period for handshakes and idle connections. Until
    /// then, an empty backlog does not close the listener. The value is `None` if the period has
    /// ended or none is needed.
    Draining(Option<Time>),
    /// The workers close the listener when they find its backlog empty.
    Emptying,
    /// All serving workers are disconnecting. The master accepts nothing more, and the workers
    /// receive the connections that it has accepted.
    Pausing,
    /// The listener is closed for new connections. Its entry stays until the last worker has
    /// released it.
    Unbound,
}

/// The state of accepting connections from the backlog.
///
/// ```text
/// from          event                                           to
/// ------------  ----------------------------------------------  ----------
/// Watched       the listener is readable, drains or pauses      Ready
/// Ready         the dispatcher has capacity                     Accepting
/// Accepting     the backlog is empty, or the batch is complete  Watched, or Ready without capacity
/// Accepting     accepting failed                                BackingOff
/// any           another process shuts the listener down         BackingOff
/// BackingOff    the back-off delay ends                         Ready
/// any           a borrowed listener is returned                 Closed
/// any           the listener closes                             Ready
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AcceptState {
    /// The poller reports when the backlog has a connection.
    Watched,
    /// The backlog may have a connection, which the master accepts once the dispatcher has
    /// capacity.
    Ready,
    /// The shell is accepting connections.
    Accepting,
    /// Accepting failed, or another process shut the listener down. The value is the time of the
    /// next attempt.
    BackingOff(Time),
    /// The master accepts nothing more, and leaves new connections to the socket's other owners.
    Closed,
}

/// The processes that may have a copy of the listening socket.
///
/// | from | event | to |
/// |---|---|---|
/// | (none) | the master opens the socket | `Sole` |
/// | (none) | the application passes the socket, or names its descriptor | `Joint` |
/// | `Sole` | `MasterListener::as_fd` | `Joint` |
/// | any | `MasterListener::set_foreign_copies(true)` | `Joint` |
/// | any | `MasterListener::set_foreign_copies(false)` | `Sole` |
///
/// The master cannot find out whether another process still has a copy, so only the application can
/// return a listener to `Sole`. SYN filters and shutdowns are only for `Sole` listeners, because
/// both affect all copies of the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// Only the master and its workers have copies. A copy in any other process is unintended, so
    /// the master shuts it down together with the listener.
    Sole,
    /// A process outside the cluster may have a copy.
    Joint,
}

#[derive(Debug)]
pub(super) struct Listener<C> {
    pub(super) key: HandleKey,
    /// The bound address, with the real port. `None` for a Unix socket.
    pub(super) address: Option<SocketAddr>,
    pub(super) policy: SchedulingPolicy,
    pub(super) ownership: Ownership,
    pub(super) stage: Stage,
    pub(super) accept_state: AcceptState,
    /// Whether the poller watches the listener.
    pub(super) watched: bool,
    pub(super) members: Members,
    pub(super) dispatcher: Dispatcher<HandOff<C>>,
    /// The connections whose clients have sent something while the master held them, and that the
    /// dispatcher does not have yet.
    pub(super) ready: ReadyQueue,
    pub(super) parking: Parking,
    /// The worker that last received an idle connection of another worker. Only for listeners whose
    /// workers accept.
    pub(super) last_receiver: Option<WorkerId>,
    /// Whether the master has ever accepted a connection from the listener.
    pub(super) has_accepted: bool,
    /// The time of the next attempt to dispatch, after the system lacked a resource. If workers
    /// accept, the time of the next attempt to move to them the idle connections of other workers.
    pub(super) dispatch_from: Option<Time>,
    /// The time at which clients of waiting connections were last checked for a hang-up.
    pub(super) swept_at: Time,
    /// The time at which the master begins to watch for shutdowns again, after another process has
    /// shut the listener down. `None` if no such time is set. Only for listeners whose workers
    /// accept.
    pub(super) hang_up_from: Option<Time>,
    /// The time of the next attempt to select the shards, after the system lacked a resource.
    pub(super) select_from: Option<Time>,
    /// The number of the application's `MasterListener`s for this listener.
    pub(super) retained_by: u32,
    /// Whether a worker or the application has requested the listener's address. `false` only for a
    /// passed socket that has not been requested yet.
    pub(super) is_requested: bool,
    /// The worker of each shard, or `None` for a free shard. When a worker exits, its shard keeps
    /// the backlog for the next worker.
    pub(super) shards: Vec<Option<WorkerId>>,
    /// The workers whose shards receive no new connections, each with the time at which the master
    /// sends it `ListenerClosed`, so that the worker drains its shard.
    pub(super) departing: OrderedSet<(Time, WorkerId)>,
    /// The shard that receives new connections while no worker serves a retained listener. The next
    /// worker receives this shard.
    pub(super) spare_shard: Option<usize>,
    /// The free shards whose workers ended without draining them. Clients may wait in their
    /// backlogs.
    pub(super) abandoned_shards: Vec<usize>,
}

impl<C> Listener<C> {
    /// Creates an open listener without workers.
    pub(super) fn new(
        key: HandleKey,
        address: Option<SocketAddr>,
        policy: SchedulingPolicy,
    ) -> Self {
        let ownership = match key.endpoint.is_borrowed() {
            true => Ownership::Joint,
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
            ready: ReadyQueue::new(),
            parking: Parking::default(),
            last_receiver: None,
            has_accepted: false,
            dispatch_from: None,
            swept_at: Time::ZERO,
            hang_up_from: None,
            select_from: None,
            retained_by: 0,
            is_requested: true,
            shards: Vec::new(),
            departing: OrderedSet::new(),
            abandoned_shards: Vec::new(),
            spare_shard: None,
        }
    }

    /// Returns the latest time at which `tick` must be called.
    pub(super) fn deadline(&self) -> Option<Time> {
        let back_off = match self.accept_state {
            AcceptState::BackingOff(until) => Some(until),
            AcceptState::Watched
            | AcceptState::Ready
            | AcceptState::Accepting
            | AcceptState::Closed => None,
        };
        let grace = match (self.stage, self.accept_state, self.policy) {
            (Stage::Draining(grace), AcceptState::Watched | AcceptState::Closed, _)
            | (Stage::Draining(grace), _, SchedulingPolicy::Shared | SchedulingPolicy::Sharded) => {
                grace
            }
            _ => None,
        };
        let departing = self.departing.first().map(|(time, _)| time);
        let rebalance = self.dispatcher.rebalance_deadline();
        let rebalance = rebalance.filter(|_| self.may_dispatch());
        let sweep = self.is_ending_with_waiting();
        let sweep = sweep.then(|| self.swept_at.saturating_add(SWEEP_INTERVAL));
        let all = [
            back_off,
            grace,
            departing,
            self.dispatch_from,
            self.hang_up_from,
            self.select_from,
            rebalance,
            sweep,
        ];
        all.into_iter().fold(None, earlier)
    }

    /// Returns whether connections wait in the master although the listener drains or pauses. A
    /// hang-up of their clients may then be the only event that continues the drain.
    fn is_ending_with_waiting(&self) -> bool {
        let is_ending = matches!(self.stage, Stage::Draining(_) | Stage::Pausing);
        is_ending && self.dispatcher.has_waiting()
    }

    /// Returns the address in the form that the application receives.
    pub(super) fn public_address(&self) -> Address {
        Address::new(&self.key.endpoint, self.address)
    }

    /// Returns whether connections may be dispatched, and reclaimed for other workers.
    pub(super) fn may_dispatch(&self) -> bool {
        self.stage != Stage::Unbound && self.dispatch_from.is_none()
    }

    /// Returns whether the backlog may have a connection for which the dispatcher needs capacity.
    pub(super) fn may_have_backlog(&self) -> bool {
        self.accept_state == AcceptState::Ready && !self.holds_new()
    }

    /// Returns whether the master holds new connections until their clients send something. A
    /// draining listener does not, because it would close the connections whose clients have sent
    /// something that the poller has not reported.
    pub(super) fn holds_new(&self) -> bool {
        let stays_open = matches!(self.stage, Stage::Open | Stage::Pausing);
        stays_open && self.parking.waits_for_data()
    }

    /// Returns how many more connections the master may accept now. `space` is the number of
    /// further connections that the master may hold, or `None` if it holds none at all.
    pub(super) fn capacity(&self, space: Option<u64>) -> u64 {
        match (self.stage, space) {
            (Stage::Pausing, _) => 0,
            // The master holds new connections, so it does not need an idle worker. If no worker
            // serves the listener, leave them in the backlog.
            (Stage::Open, Some(space)) if self.holds_new() => match self.members.is_served() {
                true => space,
                false => 0,
            },
            // Accept one connection even if no worker is idle, because only `accept` shows whether
            // the backlog is empty. The drain would otherwise wait for a worker that may never be
            // idle again, for example because it has no free descriptor.
            (Stage::Draining(_), _) if !self.dispatcher.has_waiting() => {
                self.dispatcher.capacity().max(1)
            }
            (Stage::Open | Stage::Draining(_) | Stage::Emptying | Stage::Unbound, _) => {
                self.dispatcher.capacity()
            }
        }
    }

    /// Returns whether the connection that a worker of this user has parked must close, because all
    /// workers that serve the listener have other users. While the listener pauses, its workers are
    /// disconnecting, so the connection waits for the next worker.
    pub(super) fn excludes(&self, parked_by: Option<User>) -> bool {
        self.stage != Stage::Pausing && self.members.excludes(parked_by)
    }

    /// Returns whether the poller must not watch the listener, because it is a Unix listener that a
    /// drain has shut down, which cannot be undone, or is pausing.
    pub(super) fn is_unwatchable(&self) -> bool {
        let is_sole_unix = self.key.endpoint.kind == Kind::Unix && self.is_sole();
        is_sole_unix && self.stage != Stage::Open
    }

    pub(super) fn is_sole(&self) -> bool {
        self.ownership == Ownership::Sole
    }

    /// Returns whether the master accepts the connections and workers have no copies of the socket.
    pub(super) fn master_accepts(&self) -> bool {
        self.policy == SchedulingPolicy::RoundRobin
    }

    /// Returns whether the listener stays open without workers.
    pub(super) fn outlives_workers(&self) -> bool {
        self.is_retained() && self.stage != Stage::Unbound
    }

    pub(super) fn is_retained(&self) -> bool {
        self.retained_by > 0
    }
}

//! How listeners open, are shared, drain and close.
//!
//! The life of a listener:
//!
//! ```text
//!              first worker asks            last worker leaves
//!   (nothing) ------------------> Open ---------------------------> Draining
//!                                  |  <---- a new worker asks ------    |
//!                                  |                                    | backlog empty
//!                                  | last worker dies or closes         v
//!                                  +------------------------------> Unbound --> (nothing)
//!                                                                      when all have let go
//!
//! A shared listener is Emptying between Draining and Unbound: only its workers see its backlog. So
//! is a sharded one of which the last worker that serves has died while others are disconnecting.
//! UDP sockets are Emptying, too, until the last worker has let go. There is no way back for Unix
//! paths, which are gone, and for listeners that the master's program has lent, which go on without
//! us: for these a new worker gets a new listener.
//!
//! A listener that the master's program keeps goes no further than this:
//!
//!              the last ones are to leave, round robin
//!   Open ---------------------------------------------> Pausing
//!     <--------------------------------------------------'
//!       they have taken what was accepted, or died; or a new worker asks
//!
//! With nobody to serve it, it is Open, and newcomers wait in the kernel's queue. When the program
//! lets go of it, all is as above again.
//! ```

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::{Action, Attachment, MasterCore};
use crate::config::settings::SchedulingPolicy;
use crate::core::dispatch::{Dispatched, RoundRobin, Sequenced};
use crate::error::Error;
use crate::runtime::timers::{Time, earlier};
use crate::sys::errno;
use crate::types::address::Address;
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Place};
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{Bound, FrameError, HandleId, HandleKey, ToWorker};

/// How many connections are accepted from one listener before the others get their turn.
pub(crate) const ACCEPT_BATCH: u64 = 64;
/// How long a listener rests when accepting failed: without a pause a full table of descriptors
/// would make the loop spin, since the listener stays readable.
const ACCEPT_RETRY: Time = Duration::from_millis(100);
/// How long a draining listener must have been closed to newcomers before it counts as empty, if
/// it was ever used: handshakes that are under way over a network complete in that time.
const DRAIN_GRACE: Time = Duration::from_millis(100);
/// The most listeners one worker may have.
const MAX_LISTENERS: usize = 64;
/// The highest number of a listener, with which it can still travel through the poller.
const MAX_HANDLE: u32 = (1 << 29) - 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Open,
    /// Nobody new comes in. Empty no earlier than this; `None` when that time is over.
    Draining(Option<Time>),
    /// A shared listener that the workers close when they find it empty.
    Emptying,
    /// All who serve it leave. Nothing more is accepted; what has been accepted they still serve.
    Pausing,
    Unbound,
}

/// What is known of the backlog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AcceptState {
    /// Perhaps empty: the poller tells.
    Watched,
    /// Not empty, or not known to be: accept when somebody is idle.
    Ready,
    /// The shell is accepting.
    Accepting,
    /// Accepting failed; not before this time again.
    BackingOff(Time),
    /// Nothing is accepted any more: what comes is for others.
    Closed,
}

/// Which processes may have the listening socket.
///
/// ```text
///   the master opens it ----> Sole --- MasterListener::as_fd ---> Lent
///   a descriptor that the application names (ListenOptions::fd) --> Lent
///   Master::listen with a socket ---------------------------------> Adopted
/// ```
///
/// There is no way back: the master cannot learn that no other process has a copy. A listener that is
/// not `Sole` never gets a SYN filter, and is never shut down, because both concern all copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ownership {
    /// The master, and workers that give it up when they end. Other copies are not intended: they end
    /// with the listener.
    Sole,
    /// The application may have given a copy to any process.
    Borrowed,
    /// It was open before the master got it, and may have other names.
    Adopted,
}

#[derive(Debug)]
pub(super) struct Handle<C> {
    pub(super) key: HandleKey,
    /// With the real port; none for a Unix path.
    pub(super) address: Option<SocketAddr>,
    pub(super) policy: SchedulingPolicy,
    pub(super) stage: Stage,
    pub(super) accept_state: AcceptState,
    pub(super) watched: bool,
    /// Whoever may still take or refuse something.
    pub(super) members: BTreeSet<WorkerId>,
    /// The members that want no more, and whose queues are not closed yet.
    pub(super) leaving: BTreeSet<WorkerId>,
    /// The members whose programs have it.
    pub(super) listening: BTreeSet<WorkerId>,
    /// The members that have not been told that nothing more comes.
    pub(super) serving: BTreeSet<WorkerId>,
    pub(super) connections: RoundRobin<C>,
    /// The system had no room for what was to be given; it is tried again then.
    pub(super) gives_from: Option<Time>,
    /// Which worker has which shard. What is left in the shard of a worker that died waits for the
    /// next one.
    pub(super) shards: Vec<Option<WorkerId>>,
    /// Workers to whose shards nobody new is sent, and when they are to be told.
    pub(super) departing: BTreeSet<(Time, WorkerId)>,
    /// The shard to which newcomers are sent while nobody serves; the next worker gets it.
    pub(super) spare: Option<usize>,
    pub(super) accepted: bool,
    /// How many `MasterListener`s of it the program has.
    pub(super) keepers: u32,
    pub(super) ownership: Ownership,
    /// A process has shut it down; not reported again before this time.
    pub(super) hang_up_from: Option<Time>,
}

impl<C> Handle<C> {
    /// When `tick` is needed at the latest.
    pub(super) fn deadline(&self) -> Option<Time> {
        let rest = match self.accept_state {
            AcceptState::BackingOff(until) => Some(until),
            AcceptState::Watched
            | AcceptState::Ready
            | AcceptState::Accepting
            | AcceptState::Closed => None,
        };
        let quiet = match (self.stage, self.accept_state, self.policy) {
            (Stage::Draining(quiet), AcceptState::Watched, _)
            | (Stage::Draining(quiet), _, SchedulingPolicy::Shared | SchedulingPolicy::Sharded) => {
                quiet
            }
            _ => None,
        };
        let departing = self.departing.first().map(|(time, _)| *time);
        let look = self.connections.rebalance_deadline();
        let look = look.filter(|_| self.is_balanced());
        let all = [
            rest,
            quiet,
            departing,
            self.gives_from,
            self.hang_up_from,
            look,
        ];
        all.into_iter().fold(None, earlier)
    }

    /// Whether workers are given what others have in their queues.
    pub(super) fn is_balanced(&self) -> bool {
        self.stage != Stage::Unbound && self.gives_from.is_none()
    }

    /// How many more connections may be accepted now.
    fn room(&self) -> u64 {
        match self.stage {
            Stage::Pausing => 0,
            Stage::Open | Stage::Draining(_) | Stage::Emptying | Stage::Unbound => {
                self.connections.room()
            }
        }
    }

    /// Whether its door has been shut in a way that cannot be undone.
    fn is_shut_for_good(&self) -> bool {
        let is_path = self.key.endpoint.kind == Kind::Unix && self.is_sole();
        is_path && self.stage != Stage::Open
    }

    fn is_sole(&self) -> bool {
        self.ownership == Ownership::Sole
    }

    /// Whether the master accepts, and workers have no copies.
    pub(super) fn master_accepts(&self) -> bool {
        self.policy == SchedulingPolicy::RoundRobin
    }

    /// Whether it stays although no worker has it.
    pub(super) fn stays(&self) -> bool {
        self.is_kept() && self.stage != Stage::Unbound
    }

    fn is_kept(&self) -> bool {
        self.keepers > 0
    }
}

// What happens to listeners.
impl<C> MasterCore<C> {
    pub(crate) fn bound(&mut self, handle: HandleId, result: Result<Option<SocketAddr>, i32>) {
        let Some((key, worker, request)) = self.binding.remove(&handle) else {
            return;
        };
        match result {
            Err(errno) => {
                let result = Err(errno);
                self.send(
                    worker,
                    ToWorker::Reply { request, result },
                    Attachment::None,
                );
            }
            Ok(address) => {
                let policy = self.policy_of(&key.endpoint);
                let shards = match policy {
                    SchedulingPolicy::Sharded => vec![Some(worker)],
                    SchedulingPolicy::RoundRobin | SchedulingPolicy::Shared => Vec::new(),
                };
                let open = self.open(handle, key, address, policy);
                open.shards = shards;
                self.join(worker, request, handle);
                if policy == SchedulingPolicy::RoundRobin {
                    self.watch(handle, true);
                }
            }
        }
    }

    /// A listener is there.
    fn open(
        &mut self,
        handle: HandleId,
        key: HandleKey,
        address: Option<SocketAddr>,
        policy: SchedulingPolicy,
    ) -> &mut Handle<C> {
        let mut connections = RoundRobin::new();
        if self.chooses {
            connections.use_scheduler();
        }
        let open = Handle {
            key: key.clone(),
            address,
            policy,
            stage: Stage::Open,
            accept_state: AcceptState::Watched,
            watched: false,
            members: BTreeSet::new(),
            leaving: BTreeSet::new(),
            listening: BTreeSet::new(),
            serving: BTreeSet::new(),
            connections,
            gives_from: None,
            shards: Vec::new(),
            departing: BTreeSet::new(),
            spare: None,
            accepted: false,
            keepers: 0,
            ownership: match key.endpoint.is_borrowed() {
                true => Ownership::Borrowed,
                false => Ownership::Sole,
            },
            hang_up_from: None,
        };
        let can_listen_again = key.endpoint.kind != Kind::Udp && !key.endpoint.is_borrowed();
        if !open.master_accepts() && can_listen_again {
            self.actions.push_back(Action::WatchHangUp { handle });
        }
        self.keys.insert(key, handle);
        self.handles.insert(handle, open)
    }

    /// The application has had a descriptor of this listener, and may have given it away.
    pub(crate) fn mark_borrowed(&mut self, handle: HandleId) {
        if let Some(entry) = self.handles.get_mut(&handle) {
            if entry.ownership == Ownership::Sole {
                entry.ownership = Ownership::Borrowed;
            }
        }
    }

    /// Whether only this master, and its workers, have the listener as far as is known.
    pub(crate) fn is_sole(&self, handle: HandleId) -> bool {
        self.handles.get(&handle).is_some_and(Handle::is_sole)
    }

    /// Whether the application named the descriptor, which it may shut down itself.
    pub(crate) fn is_borrowed(&self, handle: HandleId) -> bool {
        let entry = self.handles.get(&handle);
        entry.is_some_and(|entry| entry.key.endpoint.is_borrowed())
    }

    pub(crate) fn master_accepts(&self, handle: HandleId) -> bool {
        self.handles
            .get(&handle)
            .is_some_and(Handle::master_accepts)
    }

    /// Another process has shut the listener down, or a shard of it. The shell has tried to make it
    /// listen again.
    pub(crate) fn was_shut_down(&mut self, handle: HandleId, outcome: io::Result<()>) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        let address = Address::new(&entry.key.endpoint, entry.address).to_string();
        let again = self.now.saturating_add(ACCEPT_RETRY);
        if entry.master_accepts() {
            entry.accept_state = AcceptState::BackingOff(again);
            self.watch(handle, false);
        } else if entry.key.endpoint.kind == Kind::Tcp {
            entry.hang_up_from = Some(again);
        }
        self.error(None, Error::ShutDown { address, outcome });
        self.steer(handle);
        self.balance(handle);
        self.resume_if_served(handle);
    }

    pub(super) fn watch_hang_up_if_due(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        if entry.hang_up_from.is_some_and(|time| time <= self.now) {
            entry.hang_up_from = None;
            self.actions.push_back(Action::WatchHangUp { handle });
        }
    }

    /// `count` connections did not reach a shard, and were reset.
    pub(crate) fn misdirected(&mut self, handle: HandleId, count: u64) {
        self.ledger.accepted += count;
        self.ledger.dropped += count;
        let Some(entry) = self.handles.get(&handle) else {
            return;
        };
        // While it drains, the selector is selected: what comes there completes a handshake by SYN
        // cookie.
        if count > 0 && entry.stage == Stage::Open {
            let address = Address::new(&entry.key.endpoint, entry.address).to_string();
            self.error(None, Error::Misdirected { address, count });
            self.steer(handle);
        }
    }

    /// No copy of the listener could be made for the worker that asked for it.
    pub(crate) fn share_failed(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        request: u32,
        errno: i32,
    ) {
        self.leave_handle(handle, worker);
        let result = Err(errno);
        self.send(
            worker,
            ToWorker::Reply { request, result },
            Attachment::None,
        );
    }

    pub(crate) fn readable(&mut self, handle: HandleId) {
        if let Some(entry) = self.handles.get_mut(&handle) {
            if entry.accept_state == AcceptState::Watched && entry.stage != Stage::Unbound {
                entry.accept_state = AcceptState::Ready;
                self.pull(handle);
            }
        }
    }

    pub(crate) fn accepted(&mut self, handle: HandleId, connection: C) {
        self.ledger.accepted += 1;
        match self.handles.get_mut(&handle) {
            Some(entry) if entry.stage != Stage::Unbound => {
                entry.accepted = true;
                entry.connections.push(connection);
                self.distribute(handle);
            }
            _ => self.ledger.dropped += 1,
        }
    }

    /// As many as were wanted have been accepted; there may be more.
    pub(crate) fn accept_done(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        if entry.accept_state == AcceptState::Accepting {
            // With room left, this was a full batch: the poller brings the rest in its turn.
            let more = entry.room() > 0;
            entry.accept_state = if more {
                AcceptState::Watched
            } else {
                AcceptState::Ready
            };
            self.watch(handle, more);
            self.balance(handle);
            self.resume_if_served(handle);
        }
    }

    /// Whether the door of this listener may be shut.
    pub(crate) fn is_ending(&self, handle: HandleId) -> bool {
        let entry = self.handles.get(&handle);
        entry.is_none_or(|entry| entry.stage != Stage::Open)
    }

    /// The backlog is empty.
    pub(crate) fn drained(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        if entry.accept_state == AcceptState::Accepting {
            // While nobody is idle, nobody need know who comes.
            let anyone = entry.room() > 0;
            entry.accept_state = if anyone {
                AcceptState::Watched
            } else {
                AcceptState::Ready
            };
            // The poller would say again and again that a shut door is shut.
            let shut_for_good = entry.is_shut_for_good();
            self.watch(handle, anyone && !shut_for_good);
            self.balance(handle);
            self.unbind_if_drained(handle);
            self.resume_if_served(handle);
        }
    }

    pub(crate) fn accept_failed(&mut self, handle: HandleId, source: io::Error) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        if entry.accept_state == AcceptState::Accepting {
            entry.accept_state = AcceptState::BackingOff(self.now.saturating_add(ACCEPT_RETRY));
            let address = Address::new(&entry.key.endpoint, entry.address).to_string();
            self.watch(handle, false);
            self.error(None, Error::Accept { address, source });
            self.balance(handle);
            self.resume_if_served(handle);
        }
    }
}

// What happens to queues.
impl<C> MasterCore<C> {
    /// This could not be put into a worker's queue: for lack of something in the system, or else
    /// because of this worker.
    pub(crate) fn not_dispatched(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connection: Sequenced<C>,
        is_exhausted: bool,
    ) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            self.ledger.dropped += 1;
            return;
        };
        if is_exhausted {
            entry
                .gives_from
                .get_or_insert(self.now.saturating_add(ACCEPT_RETRY));
        }
        let takes_more = is_exhausted;
        entry
            .connections
            .not_dispatched(worker, connection, takes_more);
        self.offer(handle);
    }

    /// The client of a connection that was to be put into a worker's queue has hung up.
    pub(crate) fn hung_up(&mut self, handle: HandleId, worker: WorkerId) {
        self.ledger.closed_by_peer += 1;
        if let Some(entry) = self.handles.get_mut(&handle) {
            entry.connections.hung_up(worker);
            self.offer(handle);
        }
    }

    /// There is no descriptor to take anything back with.
    pub(crate) fn cannot_reclaim(&mut self, handle: HandleId) {
        if let Some(entry) = self.handles.get_mut(&handle) {
            entry
                .gives_from
                .get_or_insert(self.now.saturating_add(ACCEPT_RETRY));
        }
    }

    /// These have been taken out of a worker's queue, which is empty then or not.
    pub(crate) fn reclaimed(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connections: Vec<Sequenced<C>>,
        is_empty: bool,
    ) {
        if let Some(entry) = self.handles.get_mut(&handle) {
            let reclaimed = entry.connections.reclaimed(worker, connections, is_empty);
            self.taken(reclaimed);
            self.offer(handle);
        }
    }

    /// So many connections are in a worker's queue.
    pub(crate) fn counted(&mut self, handle: HandleId, worker: WorkerId, queued: u64) {
        if let Some(entry) = self.handles.get_mut(&handle) {
            let taken = entry.connections.counted(worker, queued);
            self.taken(taken);
            if taken != 0 {
                self.recheck_if_draining(handle);
            }
        }
    }

    /// So many more connections are known to be taken.
    pub(super) fn taken(&mut self, more: i64) {
        self.ledger.taken = self.ledger.taken.saturating_add_signed(more);
    }

    /// A worker's queue is closed, and this was in it.
    pub(crate) fn queue_closed(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connections: Vec<Sequenced<C>>,
    ) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        entry.leaving.remove(&worker);
        if entry.members.remove(&worker) {
            let taken = entry.connections.leave(worker, connections);
            let past = entry.connections.forget(worker);
            if let (Some(worker), Some(past)) = (self.workers.get_mut(&worker), past) {
                worker.past.add(&past);
            }
            self.taken(taken);
            self.offer(handle);
        }
        self.forget_if_abandoned(handle);
    }

    fn forget_if_abandoned(&mut self, handle: HandleId) {
        let abandoned = |entry: &&Handle<C>| entry.members.is_empty() && !entry.stays();
        if let Some(entry) = self.handles.get(&handle).filter(abandoned) {
            if !entry.master_accepts() {
                self.close_socket(handle);
            }
            self.handles.remove(&handle);
        }
    }
}

// What the program keeps.
impl<C> MasterCore<C> {
    /// Keeps the first listener that workers have opened there and that is not kept yet, or else one
    /// that is; but for a free port not that. Otherwise the shell opens one; then comes `kept`.
    pub(crate) fn keep(&mut self, endpoint: &Endpoint) -> Option<HandleId> {
        let there = || self.handles_at(endpoint);
        let free = there().find(|handle| !self.handles[handle].is_kept());
        let kept = || there().next().filter(|_| !endpoint.is_any_port());
        let handle = free.or_else(kept)?;
        let entry = self.handles.get_mut(&handle)?;
        entry.keepers += 1;
        if self.reopen(handle) {
            self.pause(handle);
        }
        Some(handle)
    }

    /// The listeners of an endpoint, by index.
    fn handles_at<'a>(&'a self, endpoint: &'a Endpoint) -> impl Iterator<Item = HandleId> + 'a {
        let key = |index| HandleKey {
            endpoint: endpoint.clone(),
            index,
        };
        (0..).map_while(move |index| self.keys.get(&key(index)).copied())
    }

    /// The program keeps this listener, which is new.
    pub(crate) fn kept(
        &mut self,
        handle: HandleId,
        endpoint: Endpoint,
        address: Option<SocketAddr>,
        policy: SchedulingPolicy,
    ) {
        self.is_policy_frozen = true;
        let count = self.handles_at(&endpoint).count();
        let index = u32::try_from(count).unwrap_or(u32::MAX);
        let open = self.open(handle, HandleKey { endpoint, index }, address, policy);
        open.keepers = 1;
        // Nobody watches it as long as there is nobody to take what comes.
        open.accept_state = AcceptState::Ready;
        if policy == SchedulingPolicy::Sharded {
            (open.shards, open.spare) = (vec![None], Some(0));
        }
    }

    /// The same of one that was open before it came to us.
    pub(crate) fn adopted(
        &mut self,
        handle: HandleId,
        endpoint: Endpoint,
        address: Option<SocketAddr>,
    ) {
        let policy = match self.policy {
            // Whoever opened it has not said that it is to have others beside it.
            SchedulingPolicy::Sharded => SchedulingPolicy::Shared,
            policy @ (SchedulingPolicy::RoundRobin | SchedulingPolicy::Shared) => policy,
        };
        self.kept(handle, endpoint, address, policy);
        if let Some(entry) = self.handles.get_mut(&handle) {
            entry.ownership = Ownership::Adopted;
        }
        if let Some(address) = address.filter(|address| address.ip().is_unspecified()) {
            let endpoint = Endpoint::new(Kind::Tcp, Place::Port(address.port()));
            let key = HandleKey { endpoint, index: 0 };
            self.keys.get_or_insert_with(key, || handle);
        }
    }

    /// Where the file of a Unix socket is.
    pub(crate) fn path_of(&self, handle: HandleId) -> Option<PathBuf> {
        match &self.handles.get(&handle)?.key.endpoint.place {
            Place::Path(path) => Some(path.clone()),
            Place::Ip(_) | Place::Port(_) | Place::Fd(_) => None,
        }
    }

    /// What a kept listener is called.
    pub(crate) fn address_of(&self, handle: HandleId) -> Option<Address> {
        let entry = self.handles.get(&handle)?;
        Some(Address::new(&entry.key.endpoint, entry.address))
    }

    /// The program lets go of a listener: it is now as any other, and closes if nobody serves it.
    pub(crate) fn release(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        entry.keepers -= 1;
        if entry.is_kept() {
            return;
        }
        if entry.serving.is_empty() {
            let leaving = None;
            self.close_unserved(handle, leaving);
            self.forget_if_abandoned(handle);
        } else if entry.stage == Stage::Pausing {
            entry.stage = Stage::Open;
            self.begin_drain(handle);
        }
    }

    /// All who serve a kept listener are to leave. Newcomers wait for the next worker.
    fn pause(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        match entry.policy {
            SchedulingPolicy::RoundRobin => {
                entry.stage = Stage::Pausing;
                if entry.accept_state == AcceptState::Watched {
                    entry.accept_state = AcceptState::Ready;
                }
                self.watch(handle, false);
                self.resume_if_served(handle);
            }
            SchedulingPolicy::Shared | SchedulingPolicy::Sharded => {
                self.end_all(handle, false);
            }
        }
    }

    /// Lets those go who leave a kept listener, if they have taken all that was accepted.
    fn resume_if_served(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        if entry.stage != Stage::Pausing || entry.accept_state == AcceptState::Accepting {
            return;
        }
        if entry.connections.in_hand() == 0 {
            entry.stage = Stage::Open;
            self.end_all(handle, true);
        } else {
            self.count_if_none_waits(handle);
        }
    }
}

// How it is decided.
impl<C> MasterCore<C> {
    pub(super) fn listen(
        &mut self,
        worker: WorkerId,
        request: u32,
        key: HandleKey,
        flags: BindFlags,
    ) -> Result<(), FrameError> {
        if self.handles_of(worker).count() >= MAX_LISTENERS {
            let result = Err(errno::EMFILE);
            self.send(
                worker,
                ToWorker::Reply { request, result },
                Attachment::None,
            );
            return Ok(());
        }
        match self.keys.get(&key) {
            Some(handle) => {
                let handle = *handle;
                if self.handles[&handle].leaving.contains(&worker) {
                    // There has been no descriptor to empty its old queue with.
                    let result = Err(errno::EMFILE);
                    self.send(
                        worker,
                        ToWorker::Reply { request, result },
                        Attachment::None,
                    );
                    return Ok(());
                }
                let has_it = self.handles[&handle].members.contains(&worker);
                if has_it && self.handles[&handle].ownership == Ownership::Adopted {
                    // By its port, and once more by its address.
                    let result = Err(errno::EADDRINUSE);
                    self.send(
                        worker,
                        ToWorker::Reply { request, result },
                        Attachment::None,
                    );
                    return Ok(());
                }
                if has_it {
                    return Err(FrameError::State("listens twice with one index"));
                }
                match self.shard_for(handle, worker) {
                    true => self.join(worker, request, handle),
                    false => self.actions.push_back(Action::BindShard {
                        handle,
                        flags,
                        worker,
                        request,
                    }),
                }
            }
            None => {
                let handle = self.next_handle();
                let endpoint = key.endpoint.clone();
                let policy = self.policy_of(&endpoint);
                self.binding.insert(handle, (key, worker, request));
                self.actions.push_back(Action::Bind {
                    handle,
                    endpoint,
                    flags,
                    policy,
                });
            }
        }
        Ok(())
    }

    pub(crate) fn policy_of(&self, endpoint: &Endpoint) -> SchedulingPolicy {
        match (endpoint.kind, self.policy) {
            // Whoever reads from the one socket gets the datagram.
            (Kind::Udp, _) => SchedulingPolicy::Shared,
            (kind, SchedulingPolicy::Sharded)
                if kind == Kind::Unix || endpoint.is_borrowed() || !cfg!(target_os = "linux") =>
            {
                SchedulingPolicy::Shared
            }
            (Kind::Tcp | Kind::Unix, policy) => policy,
        }
    }

    /// A number that no listener has: a worker may ask so often that they begin anew.
    pub(crate) fn next_handle(&mut self) -> HandleId {
        loop {
            self.last_handle = self.last_handle % MAX_HANDLE + 1;
            let handle = HandleId(self.last_handle);
            if !self.handles.contains_key(&handle) && !self.binding.contains_key(&handle) {
                return handle;
            }
        }
    }

    pub(super) fn join(&mut self, worker: WorkerId, request: u32, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        let serving = entry.serving.clone();
        let relieved = if self.reopen(handle) {
            serving
        } else {
            BTreeSet::new()
        };
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        entry.members.insert(worker);
        entry.serving.insert(worker);
        entry.connections.join(worker);
        let (policy, address) = (entry.policy, entry.address);
        for worker in relieved {
            self.end(handle, worker, false);
        }
        let result = Ok(Bound {
            handle,
            policy,
            address,
        });
        let with = match policy {
            SchedulingPolicy::RoundRobin => Attachment::Queue(handle),
            SchedulingPolicy::Shared => Attachment::Listener(handle),
            SchedulingPolicy::Sharded => Attachment::Shard(handle, self.shard_of(handle, worker)),
        };
        self.send(worker, ToWorker::Reply { request, result }, with);
        self.steer(handle);
    }

    /// Lets newcomers in again where all who serve leave. Returns whether that was so.
    fn reopen(&mut self, handle: HandleId) -> bool {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return false;
        };
        match entry.stage {
            Stage::Open | Stage::Unbound => return false,
            Stage::Pausing => {}
            Stage::Draining(_) | Stage::Emptying => {
                if entry.key.endpoint.kind == Kind::Tcp && entry.is_sole() {
                    self.actions.push_back(Action::DetachSynFilter { handle });
                }
            }
        }
        entry.stage = Stage::Open;
        self.steer(handle);
        true
    }

    /// Gives what waits to whoever can take it.
    pub(super) fn distribute(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        while entry.gives_from.is_none() {
            let Some(given) = entry.connections.distribute(self.now) else {
                break;
            };
            let Dispatched {
                worker,
                placed,
                has_waited,
            } = given;
            self.actions.push_back(Action::Dispatch {
                handle,
                worker,
                connection: placed,
                has_waited,
            });
        }
    }

    /// Takes connections back that lie in one worker's queue although another one is idle. Returns
    /// whether there are any.
    pub(super) fn balance(&mut self, handle: HandleId) -> bool {
        let Some(entry) = self.handles.get(&handle) else {
            return false;
        };
        let from = entry.connections.to_reclaim(self.now);
        let from = from.filter(|_| entry.is_balanced());
        if let Some((worker, at_most)) = from {
            self.actions.push_back(Action::Reclaim {
                handle,
                worker,
                at_most,
            });
        }
        from.is_some()
    }

    pub(super) fn reclaim_all(&mut self, handle: HandleId, worker: WorkerId) {
        self.actions.push_back(Action::Reclaim {
            handle,
            worker,
            at_most: usize::MAX,
        });
    }

    /// Accepts if there is something and someone to take it.
    pub(super) fn pull(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        if entry.accept_state != AcceptState::Ready || entry.stage == Stage::Unbound {
            return;
        }
        let room = entry.room();
        if room > 0 && entry.gives_from.is_none() {
            entry.accept_state = AcceptState::Accepting;
            let at_most = room.min(ACCEPT_BATCH);
            self.actions.push_back(Action::Accept { handle, at_most });
        } else {
            // Level-triggered: left in the poller it would wake the loop until someone is idle.
            self.watch(handle, false);
        }
    }

    pub(super) fn watch(&mut self, handle: HandleId, watched: bool) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        if entry.watched != watched && entry.stage != Stage::Unbound {
            entry.watched = watched;
            self.actions.push_back(if watched {
                Action::Watch { handle }
            } else {
                Action::Unwatch { handle }
            });
        }
    }

    /// All who serve this listener are to leave.
    pub(super) fn begin_drain(&mut self, handle: HandleId) {
        let now = self.now;
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        if entry.is_kept() {
            return self.pause(handle);
        }
        let shared = entry.policy != SchedulingPolicy::RoundRobin;
        match entry.key.endpoint.kind {
            // It stays until the last worker has let go of it, so that a new one can have it. Nobody
            // waits for an answer to what is in its queue.
            Kind::Udp => self.finish_drain(handle),
            Kind::Tcp | Kind::Unix if entry.key.endpoint.is_borrowed() => {
                self.give_back(handle);
            }
            Kind::Unix if entry.is_sole() => {
                // From now on nobody finds the way, and so there is no handshake to wait for.
                entry.stage = Stage::Draining(None);
                self.forget_key(handle);
                self.actions.push_back(Action::RemoveFile { handle });
                if !shared {
                    // Workers that accept for themselves would take it for a failure.
                    self.actions.push_back(Action::AttachSynFilter { handle });
                }
                self.finish_drain(handle);
            }
            Kind::Tcp | Kind::Unix => {
                // What workers accept themselves is not known here.
                let grace = if entry.accepted || shared {
                    DRAIN_GRACE
                } else {
                    Time::ZERO
                };
                entry.stage = Stage::Draining(Some(now.saturating_add(grace)));
                self.keep_newcomers_out(handle);
                if !shared {
                    self.recheck(handle);
                } // Otherwise the workers go on accepting until the time has come.
            }
        }
    }

    /// Lets no new connections in, or sends them where another owner may accept them.
    fn keep_newcomers_out(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get(&handle) else {
            return;
        };
        if entry.is_sole() {
            self.actions.push_back(Action::AttachSynFilter { handle });
        } else if entry.policy == SchedulingPolicy::Sharded {
            // `MasterListener::as_fd` is the first shard.
            let shards = vec![0];
            self.actions
                .push_back(Action::SelectShards { handle, shards });
        }
    }

    /// Lets go of a listener that the master's program has lent. It stays open there, and with it
    /// its backlog; only what has been accepted is ours to serve.
    fn give_back(&mut self, handle: HandleId) {
        self.forget_key(handle);
        self.watch(handle, false);
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        match entry.policy {
            SchedulingPolicy::RoundRobin => {
                entry.stage = Stage::Draining(None);
                entry.accept_state = AcceptState::Closed;
                self.unbind_if_drained(handle);
            }
            SchedulingPolicy::Shared | SchedulingPolicy::Sharded => {
                self.end_all(handle, false);
                self.unbind(handle);
            }
        }
    }

    /// Whoever asks for the same from now on gets another listener.
    fn forget_key(&mut self, handle: HandleId) {
        self.keys.retain(|_, other| *other != handle);
    }

    /// The time that handshakes are given is over.
    pub(super) fn finish_drain(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        match entry.policy {
            SchedulingPolicy::RoundRobin => self.recheck(handle),
            SchedulingPolicy::Shared | SchedulingPolicy::Sharded => {
                // Only the workers see what is left: they close when they find nothing.
                entry.stage = Stage::Emptying;
                let shard = None;
                self.actions.push_back(Action::Unblock { handle, shard });
                let serving: Vec<_> = entry.serving.iter().copied().collect();
                for worker in serving {
                    let drain = true;
                    self.send(
                        worker,
                        ToWorker::ListenerClosed { handle, drain },
                        Attachment::None,
                    );
                }
            }
        }
    }

    /// Accepts although the poller has not said that there is something: only `accept` itself
    /// tells for sure that the backlog is empty.
    pub(super) fn recheck(&mut self, handle: HandleId) {
        if let Some(entry) = self.handles.get_mut(&handle) {
            match entry.accept_state {
                AcceptState::Watched => entry.accept_state = AcceptState::Ready,
                AcceptState::Closed => return self.unbind_if_drained(handle),
                AcceptState::Ready | AcceptState::Accepting | AcceptState::BackingOff(_) => {}
            }
            self.pull(handle);
        }
    }

    /// Something has changed on which the end of a drain may have waited.
    pub(super) fn recheck_if_draining(&mut self, handle: HandleId) {
        let stage = self.handles.get(&handle).map(|entry| entry.stage);
        match stage {
            Some(Stage::Draining(None)) => self.recheck(handle),
            Some(Stage::Pausing) => self.resume_if_served(handle),
            Some(Stage::Open | Stage::Draining(Some(_)) | Stage::Emptying | Stage::Unbound)
            | None => {}
        }
    }

    /// Ends a draining listener whose backlog was just found empty. As long as a connection is on
    /// its way to a worker, the others stay: it may come back.
    pub(super) fn unbind_if_drained(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get(&handle) else {
            return;
        };
        let over = match entry.stage {
            Stage::Draining(quiet) => quiet.is_none_or(|quiet| quiet <= self.now),
            Stage::Open | Stage::Emptying | Stage::Pausing | Stage::Unbound => false,
        };
        if !over {
            return;
        }
        if entry.connections.in_hand() == 0 {
            self.unbind(handle);
        } else {
            self.count_if_none_waits(handle);
        }
    }

    /// A busy worker may have taken all and not said so yet.
    fn count_if_none_waits(&mut self, handle: HandleId) {
        let entry = self.handles.get(&handle);
        if let Some(entry) = entry.filter(|entry| !entry.connections.has_waiting()) {
            let counts = entry.connections.with_queues();
            let counts = counts.map(|worker| Action::CountQueued { handle, worker });
            self.actions.extend(counts);
        }
    }

    fn end_all(&mut self, handle: HandleId, drain: bool) {
        let entry = self.handles.get(&handle);
        let serving = entry.map_or_else(BTreeSet::new, |entry| entry.serving.clone());
        for worker in serving {
            self.end(handle, worker, drain);
        }
    }

    pub(super) fn end(&mut self, handle: HandleId, worker: WorkerId, drain: bool) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        if !entry.serving.remove(&worker) {
            return;
        }
        match (entry.policy, drain) {
            // What is in its shard's backlog is only for this worker. Whose handshake is under way
            // is let in.
            (SchedulingPolicy::Sharded, false) => {
                entry
                    .departing
                    .insert((self.now.saturating_add(DRAIN_GRACE), worker));
                return self.steer(handle);
            }
            (SchedulingPolicy::RoundRobin, false) => {
                entry.connections.end(worker);
                self.reclaim_all(handle, worker);
            }
            _ => entry.connections.end(worker),
        }
        self.send(
            worker,
            ToWorker::ListenerClosed { handle, drain },
            Attachment::None,
        );
    }

    /// Closes the listener. Members stay until they say that they let go of what they hold.
    pub(super) fn unbind(&mut self, handle: HandleId) {
        self.end_all(handle, true);
        if let Some(entry) = self.handles.get_mut(&handle) {
            if entry.stage != Stage::Unbound {
                entry.stage = Stage::Unbound;
                entry.accept_state = AcceptState::Ready;
                self.ledger.dropped += entry.connections.drop_waiting();
                let master_accepts = entry.master_accepts();
                self.forget_key(handle);
                if master_accepts {
                    self.close_socket(handle);
                } // Otherwise when the last worker has closed its copy.
            }
        }
    }

    fn close_socket(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get(&handle) else {
            return;
        };
        if entry.is_sole() && entry.key.endpoint.kind != Kind::Udp {
            // A process that a worker has forked may have a copy. Clients would wait there for ever.
            self.actions.push_back(Action::StopListening { handle });
        }
        self.actions.push_back(Action::Unbind { handle });
    }

    /// No worker serves the listener any more, and the application does not retain it. `leaving` is
    /// about to close its copy.
    fn close_unserved(&mut self, handle: HandleId, leaving: Option<WorkerId>) {
        let Some(entry) = self.handles.get(&handle) else {
            return;
        };
        let mut others = entry.members.iter().filter(|own| Some(**own) != leaving);
        let are_leaving = others.next().is_some();
        match (entry.policy, entry.stage) {
            (SchedulingPolicy::Sharded, Stage::Unbound) => {}
            (SchedulingPolicy::Sharded, _) if are_leaving => self.empty_shards(handle),
            _ => self.unbind(handle),
        }
    }

    /// Workers that are disconnecting still serve their shards. The listener ends with the last of them,
    /// unless another worker asks for it before.
    fn empty_shards(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        entry.stage = Stage::Emptying;
        let departing = std::mem::take(&mut entry.departing);
        self.keep_newcomers_out(handle);
        let shard = None;
        self.actions.push_back(Action::Unblock { handle, shard });
        for (_, worker) in departing {
            let drain = true;
            self.send(
                worker,
                ToWorker::ListenerClosed { handle, drain },
                Attachment::None,
            );
        }
    }

    /// The worker lets go of the listener, or has let go of everything. With round robin what it has
    /// not taken comes back first.
    pub(super) fn leave_handle(&mut self, handle: HandleId, worker: WorkerId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        entry.listening.remove(&worker);
        entry.serving.remove(&worker);
        entry.connections.end(worker);
        let policy = entry.policy;
        match (entry.serving.is_empty(), entry.is_kept(), entry.stage) {
            // What has been accepted waits for the next worker, too.
            (true, true, Stage::Pausing) => entry.stage = Stage::Open,
            (true, false, _) => self.close_unserved(handle, Some(worker)),
            _ => {}
        }
        match policy {
            SchedulingPolicy::RoundRobin => {
                let entry = self.handles.get_mut(&handle);
                // Not once more for who dies while his queue cannot be closed.
                if entry.is_some_and(|entry| entry.leaving.insert(worker)) {
                    let close = Action::CloseQueue { handle, worker };
                    self.actions.push_back(close);
                }
            }
            SchedulingPolicy::Shared => self.queue_closed(handle, worker, Vec::new()),
            SchedulingPolicy::Sharded => {
                self.leave_shard(handle, worker);
                self.queue_closed(handle, worker, Vec::new());
            }
        }
    }

    // Shards.

    /// Whether there is a shard for this worker, one that somebody has left behind perhaps. Always,
    /// where there are none.
    fn shard_for(&mut self, handle: HandleId, worker: WorkerId) -> bool {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return false;
        };
        let free = entry.shards.iter().position(|shard| shard.is_none());
        // Who has come while nobody served comes first.
        match entry.spare.take().or(free) {
            Some(shard) => entry.shards[shard] = Some(worker),
            None => return entry.policy != SchedulingPolicy::Sharded,
        }
        true
    }

    /// The number of this worker's shard.
    fn shard_of(&self, handle: HandleId, worker: WorkerId) -> usize {
        let entry = self.handles.get(&handle);
        let shards = entry.map_or(&[][..], |entry| &entry.shards);
        let own = shards.iter().position(|shard| *shard == Some(worker));
        own.unwrap_or(usize::MAX)
    }

    /// One more shard has been bound.
    pub(crate) fn shard_bound(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        request: u32,
        result: Result<(), i32>,
    ) {
        match (result, self.handles.get_mut(&handle)) {
            (Ok(()), Some(entry)) => {
                entry.shards.push(None);
                // The new shard, too.
                self.actions.push_back(Action::WatchHangUp { handle });
                // Or another one, that has become free meanwhile.
                self.shard_for(handle, worker);
                self.join(worker, request, handle);
            }
            (result, _) => {
                let result = Err(result.err().unwrap_or(errno::EINVAL));
                self.send(
                    worker,
                    ToWorker::Reply { request, result },
                    Attachment::None,
                );
            }
        }
    }

    /// Sends newcomers to the shards of those who serve; if nobody does, to that of the next worker.
    fn steer(&mut self, handle: HandleId) {
        self.choose_spare(handle);
        let Some(entry) = self.handles.get(&handle) else {
            return;
        };
        match entry.stage {
            Stage::Open | Stage::Pausing => {}
            Stage::Draining(_) | Stage::Emptying | Stage::Unbound => return,
        }
        let serves = |shard: &Option<WorkerId>| shard.is_some_and(|w| entry.serving.contains(&w));
        let shards = entry.shards.iter().enumerate();
        let shards = shards.filter(|(_, shard)| serves(shard));
        let shards = shards.map(|(number, _)| number);
        let shards: Vec<_> = shards.chain(entry.spare).collect();
        if !shards.is_empty() {
            self.actions
                .push_back(Action::SelectShards { handle, shards });
        }
    }

    /// Nobody serves a kept listener: one of its shards is to wait for the next worker. If none is
    /// free, whoever leaves his lets go of it as it is.
    fn choose_spare(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        let is_wanted = entry.stays() && entry.serving.is_empty() && entry.spare.is_none();
        if !is_wanted || entry.shards.is_empty() {
            return;
        }
        let free = entry.shards.iter().position(Option::is_none);
        let spare = free.unwrap_or_default();
        entry.spare = Some(spare);
        if let Some(worker) = entry.shards[spare].take() {
            entry.departing.retain(|(_, other)| *other != worker);
            let drain = false;
            self.send(
                worker,
                ToWorker::ListenerClosed { handle, drain },
                Attachment::None,
            );
        }
    }

    /// Tells those to whose shards nobody comes any more to empty them.
    pub(super) fn let_go_of_shards(&mut self, handle: HandleId) {
        loop {
            let Some(entry) = self.handles.get_mut(&handle) else {
                return;
            };
            let due = |(time, _): &&(Time, WorkerId)| *time <= self.now;
            let Some(&(time, worker)) = entry.departing.first().filter(due) else {
                return;
            };
            entry.departing.remove(&(time, worker));
            let shard = Some(self.shard_of(handle, worker));
            self.actions.push_back(Action::Unblock { handle, shard });
            let drain = true;
            self.send(
                worker,
                ToWorker::ListenerClosed { handle, drain },
                Attachment::None,
            );
        }
    }

    /// A worker has left its shard. With what is in its backlog, if it has not emptied it, the next
    /// worker gets it. It stays bound meanwhile: the others keep their numbers.
    fn leave_shard(&mut self, handle: HandleId, worker: WorkerId) {
        let shard = self.shard_of(handle, worker);
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        entry
            .departing
            .retain(|(_, departing)| *departing != worker);
        if let Some(shard) = entry.shards.get_mut(shard) {
            *shard = None;
        }
        self.steer(handle);
    }

    /// Offers what waits to others, or lets go of it if there will be none.
    fn offer(&mut self, handle: HandleId) {
        let Some(entry) = self.handles.get_mut(&handle) else {
            return;
        };
        if entry.stage == Stage::Unbound {
            self.ledger.dropped += entry.connections.drop_waiting();
        } else {
            self.distribute(handle);
            self.pull(handle);
            self.balance(handle);
            self.recheck_if_draining(handle);
        }
    }
}

#[cfg(test)]
#[allow(clippy::wildcard_enum_match_arm)]
mod tests {
    use super::*;
    use crate::core::event::Event;
    use crate::wire::frame::ToMaster;
    use std::os::unix::process::ExitStatusExt;

    /// The number of the listener for a port.
    fn listen(core: &mut MasterCore<u32>, worker: WorkerId, port: u16) -> HandleId {
        let endpoint = Endpoint::new(Kind::Tcp, Place::Port(port));
        let listen = ToMaster::Listen {
            request: 1,
            key: HandleKey { endpoint, index: 0 },
            flags: BindFlags::default(),
        };
        core.frame(worker, listen);
        let is_bind = |action: &Action<u32>| matches!(action, Action::Bind { .. });
        let bind = std::iter::from_fn(|| core.next_action()).find(is_bind);
        let Some(Action::Bind { handle, .. }) = bind else {
            unreachable!("nobody has it yet");
        };
        core.bound(handle, Ok(None));
        handle
    }

    #[test]
    fn numbers_of_listeners_begin_anew_and_leave_out_those_in_use() {
        let mut core = MasterCore::new(SchedulingPolicy::RoundRobin);
        let worker = online(&mut core);
        assert_eq!(listen(&mut core, worker, 1), HandleId(1));
        core.last_handle = MAX_HANDLE - 1;
        assert_eq!(listen(&mut core, worker, 2), HandleId(MAX_HANDLE));
        assert_eq!(listen(&mut core, worker, 3), HandleId(2));
    }

    #[test]
    fn worker_ids_end_and_are_never_used_again() {
        let mut core = MasterCore::<u32>::new(SchedulingPolicy::RoundRobin);
        core.last_worker = WorkerId::MAX - 1;
        let last = core.next_worker_id();
        assert_eq!(last, Some(WorkerId::new(WorkerId::MAX)));
        core.forked(last.unwrap());
        assert_eq!(core.next_worker_id(), None);
    }

    /// A listener with a scheduler, and a worker that takes connections.
    fn scheduled(core: &mut MasterCore<u32>) -> (HandleId, WorkerId) {
        core.use_scheduler();
        let worker = online(core);
        let handle = listen(core, worker, 1);
        let (taken, open) = (0, 0);
        core.frame(
            worker,
            ToMaster::Idle {
                handle,
                taken,
                open,
            },
        );
        while core.next_action().is_some() {}
        (handle, worker)
    }

    fn given(core: &mut MasterCore<u32>) -> Vec<(u32, bool)> {
        let actions = std::iter::from_fn(|| core.next_action());
        let given = actions.filter_map(|action| match action {
            Action::Dispatch {
                connection,
                has_waited,
                ..
            } => Some((connection.1, has_waited)),
            _ => None,
        });
        given.collect()
    }

    #[test]
    fn clients_of_connections_that_have_waited_are_checked_before_the_dispatch() {
        let mut core = MasterCore::new(SchedulingPolicy::RoundRobin);
        let (handle, worker) = scheduled(&mut core);
        for client in 1..=17 {
            core.accepted(handle, client);
            let (handle, place, _) = core.unscheduled().unwrap();
            core.choose(handle, place, Some(worker));
        }
        let at_once: Vec<_> = (1..=16).map(|client| (client, false)).collect();
        assert_eq!(given(&mut core), at_once);
        let ready = ToMaster::Idle {
            handle,
            taken: 1,
            open: 0,
        };
        core.frame(worker, ready);
        assert_eq!(given(&mut core), [(17, true)]);
        assert_eq!(core.ledger().in_hand(), 16);
        core.hung_up(handle, worker);
        assert_eq!(core.ledger().in_hand(), 15);
        assert_eq!(core.ledger().closed_by_peer, 1);
    }

    #[test]
    fn sweeps_check_a_few_connections_and_all_in_turn() {
        let mut core = MasterCore::new(SchedulingPolicy::RoundRobin);
        let (first, worker) = scheduled(&mut core);
        let second = listen(&mut core, worker, 2);
        (0..3).for_each(|client| core.accepted(first, client));
        (3..5).for_each(|client| core.accepted(second, client));
        let mut checked = Vec::new();
        for _ in 0..4 {
            core.sweep(2, |client| {
                checked.push(*client);
                false
            });
        }
        // A listener has its turn in each call, and goes on where it was.
        assert_eq!(checked, [0, 1, 3, 4, 2, 3, 0, 1]);
        // Each begins where it was, and the next one at the beginning.
        for _ in 0..2 {
            core.sweep(usize::MAX, |client| client % 2 == 0);
        }
        assert_eq!(core.ledger().closed_by_peer, 3);
        assert_eq!(core.in_hand(), 2);
    }

    fn online(core: &mut MasterCore<u32>) -> WorkerId {
        let worker = core.next_worker_id().unwrap();
        core.forked(worker);
        core.frame(worker, ToMaster::Online);
        worker
    }

    fn port(port: u16) -> Endpoint {
        Endpoint::new(Kind::Tcp, Place::Port(port))
    }

    fn ip(text: &str) -> Endpoint {
        Endpoint::new(Kind::Tcp, Place::Ip(text.parse().unwrap()))
    }

    fn keep(core: &mut MasterCore<u32>, endpoint: Endpoint) -> HandleId {
        let (handle, policy) = (core.next_handle(), core.policy_of(&endpoint));
        core.kept(handle, endpoint, None, policy);
        handle
    }

    fn ask(core: &mut MasterCore<u32>, worker: WorkerId, endpoint: Endpoint) -> Vec<Action<u32>> {
        let listen = ToMaster::Listen {
            request: 1,
            key: HandleKey { endpoint, index: 0 },
            flags: BindFlags::default(),
        };
        core.frame(worker, listen);
        actions(core)
    }

    fn actions(core: &mut MasterCore<u32>) -> Vec<Action<u32>> {
        std::iter::from_fn(|| core.next_action()).collect()
    }

    /// The shard that a worker gets.
    fn shard(actions: &[Action<u32>]) -> Option<usize> {
        actions.iter().find_map(|action| match action {
            Action::Send {
                with: Attachment::Shard(_, shard),
                ..
            } => Some(*shard),
            _ => None,
        })
    }

    /// Where newcomers go in the end.
    fn steered(actions: &[Action<u32>]) -> Option<&[usize]> {
        actions.iter().rev().find_map(|action| match action {
            Action::SelectShards { shards, .. } => Some(&shards[..]),
            _ => None,
        })
    }

    fn is_closing(actions: &[Action<u32>]) -> bool {
        actions.iter().any(|action| {
            matches!(
                action,
                Action::AttachSynFilter { .. } | Action::Unbind { .. } | Action::RemoveFile { .. }
            )
        })
    }

    #[test]
    fn who_hangs_up_may_be_the_last_that_a_listener_waits_for() {
        let mut core = MasterCore::new(SchedulingPolicy::RoundRobin);
        let worker = online(&mut core);
        // Lent by the program: it is given back when what was accepted has been served.
        let lent = Endpoint::new(Kind::Tcp, Place::Fd(3));
        let asked = ask(&mut core, worker, lent);
        assert!(matches!(asked[..], [Action::Bind { .. }]), "{asked:?}");
        let handle = HandleId(1);
        core.bound(handle, Ok(None));
        core.accepted(handle, 7);
        core.disconnect_all(true);
        assert!(!is_closing(&actions(&mut core)), "somebody waits");
        core.sweep(8, |_| false);
        assert!(!is_closing(&actions(&mut core)));
        core.sweep(8, |_| true);
        assert!(is_closing(&actions(&mut core)));
        assert_eq!(core.ledger().closed_by_peer, 1);
    }

    #[test]
    fn a_kept_listener_has_no_end_before_it_is_let_go_of() {
        for policy in [
            SchedulingPolicy::RoundRobin,
            SchedulingPolicy::Shared,
            SchedulingPolicy::Sharded,
        ] {
            let mut core = MasterCore::new(policy);
            let handle = keep(&mut core, port(1));
            for dies in [true, false] {
                let worker = online(&mut core);
                assert!(!is_closing(&ask(&mut core, worker, port(1))));
                if !dies {
                    core.disconnect_all(true);
                }
                core.channel_closed(worker);
                core.exited(worker, ExitStatusExt::from_raw(0));
                assert!(!is_closing(&actions(&mut core)));
                core.queue_closed(handle, worker, Vec::new());
            }
            let events: Vec<_> = std::iter::from_fn(|| core.next_event()).collect();
            let last = events.last().map(|emit| &emit.event);
            assert!(matches!(last, Some(Event::Disconnected)), "{policy:?}");
            core.release(handle);
            assert!(is_closing(&actions(&mut core)));
            assert_eq!(core.sizes().handles, 0);
        }
    }

    #[test]
    fn the_last_to_leave_serves_what_has_been_accepted_and_no_more() {
        let mut core = MasterCore::new(SchedulingPolicy::RoundRobin);
        let handle = keep(&mut core, port(1));
        let worker = online(&mut core);
        ask(&mut core, worker, port(1));
        let ready = |taken| ToMaster::Idle {
            handle,
            taken,
            open: 0,
        };
        core.frame(worker, ready(0));
        let accepts = |actions: &[Action<u32>]| {
            let is_accept = |action: &Action<u32>| matches!(action, Action::Accept { .. });
            actions.iter().any(is_accept)
        };
        let ends = |actions: &[Action<u32>]| {
            actions.iter().any(|action| {
                matches!(
                    action,
                    Action::Send {
                        frame: ToWorker::ListenerClosed { .. },
                        ..
                    }
                )
            })
        };
        assert!(accepts(&actions(&mut core)));
        // It is accepted when the worker has been told to leave.
        core.disconnect(worker);
        assert!(!ends(&actions(&mut core)));
        core.accepted(handle, 7);
        core.accept_done(handle);
        let given = actions(&mut core);
        assert!(given.iter().any(|a| matches!(a, Action::Dispatch { .. })));
        assert!(!ends(&given) && !accepts(&given));
        core.readable(handle);
        assert!(!accepts(&actions(&mut core)));
        core.frame(worker, ready(1));
        let last = actions(&mut core);
        assert!(ends(&last) && !accepts(&last) && !is_closing(&last));
    }

    #[test]
    fn listener_that_was_lent_is_neither_filtered_nor_shut_down() {
        for policy in [
            SchedulingPolicy::RoundRobin,
            SchedulingPolicy::Shared,
            SchedulingPolicy::Sharded,
        ] {
            for is_lent in [false, true] {
                let mut core = MasterCore::new(policy);
                let handle = keep(&mut core, port(1));
                let worker = online(&mut core);
                ask(&mut core, worker, port(1));
                if is_lent {
                    core.mark_borrowed(handle);
                }
                core.release(handle);
                core.disconnect_all(true);
                let mut all = actions(&mut core);
                core.drained(handle);
                core.channel_closed(worker);
                core.exited(worker, ExitStatusExt::from_raw(0));
                all.extend(actions(&mut core));
                core.queue_closed(handle, worker, Vec::new());
                all.extend(actions(&mut core));
                let has = |is: fn(&Action<u32>) -> bool| all.iter().any(is);
                let filtered = has(|action| matches!(action, Action::AttachSynFilter { .. }));
                let stopped = has(|action| matches!(action, Action::StopListening { .. }));
                assert_eq!((filtered, stopped), (!is_lent, !is_lent), "{policy:?}");
                assert!(has(|action| matches!(action, Action::Unbind { .. })));
                assert_eq!(core.sizes().handles, 0);
            }
        }
    }

    #[test]
    fn sharded_listener_opens_again_while_a_worker_empties_its_shard() {
        let mut core = MasterCore::new(SchedulingPolicy::Sharded);
        let first = online(&mut core);
        ask(&mut core, first, port(1));
        let handle = HandleId(1);
        core.bound(handle, Ok(None));
        let second = online(&mut core);
        ask(&mut core, second, port(1));
        core.shard_bound(handle, second, 1, Ok(()));
        core.disconnect(first);
        actions(&mut core);
        // The only one that serves dies.
        core.channel_closed(second);
        let emptying = actions(&mut core);
        let shuts = |action: &Action<u32>| matches!(action, Action::AttachSynFilter { .. });
        assert!(emptying.iter().any(shuts), "{emptying:?}");
        assert!(core.is_bound(handle));
        // A worker that asks now gets the same listener.
        let third = online(&mut core);
        let joined = ask(&mut core, third, port(1));
        assert_eq!(
            (shard(&joined), steered(&joined)),
            (Some(1), Some(&[1][..]))
        );
        let opens = |action: &Action<u32>| matches!(action, Action::DetachSynFilter { .. });
        assert!(joined.iter().any(opens), "{joined:?}");
        // It ends with the last of its workers.
        core.channel_closed(first);
        assert!(!is_closing(&actions(&mut core)));
        core.channel_closed(third);
        assert!(is_closing(&actions(&mut core)));
        assert_eq!(core.sizes().handles, 0);
    }

    #[test]
    fn who_comes_while_nobody_serves_goes_to_the_shard_of_the_next_worker() {
        let mut core = MasterCore::new(SchedulingPolicy::Sharded);
        let handle = keep(&mut core, port(1));
        let first = online(&mut core);
        assert_eq!(shard(&ask(&mut core, first, port(1))), Some(0));
        let second = online(&mut core);
        ask(&mut core, second, port(1));
        core.shard_bound(handle, second, 1, Ok(()));
        let bound = actions(&mut core);
        assert_eq!(
            (shard(&bound), steered(&bound)),
            (Some(1), Some(&[0, 1][..]))
        );
        // Both leave: the first lets go of its shard as it is.
        core.disconnect_all(false);
        assert_eq!(steered(&actions(&mut core)), Some(&[0][..]));
        core.frame(second, ToMaster::Release { handle });
        assert_eq!(steered(&actions(&mut core)), Some(&[0][..]));
        let third = online(&mut core);
        let joined = ask(&mut core, third, port(1));
        assert_eq!(
            (shard(&joined), steered(&joined)),
            (Some(0), Some(&[0][..]))
        );
        // While one more is being bound for the fifth, the others die.
        let fourth = online(&mut core);
        assert_eq!(shard(&ask(&mut core, fourth, port(1))), Some(1));
        let fifth = online(&mut core);
        assert_eq!(shard(&ask(&mut core, fifth, port(1))), None);
        core.channel_closed(fourth);
        core.channel_closed(third);
        assert_eq!(steered(&actions(&mut core)), Some(&[0][..]));
        core.shard_bound(handle, fifth, 1, Ok(()));
        let bound = actions(&mut core);
        assert_eq!((shard(&bound), steered(&bound)), (Some(0), Some(&[0][..])));
    }

    #[test]
    fn an_adopted_listener_is_found_by_its_address_and_perhaps_its_port() {
        let mut core = MasterCore::new(SchedulingPolicy::Sharded);
        let mut adopt = |text: &str| {
            let handle = core.next_handle();
            core.adopted(handle, ip(text), text.parse().ok());
            handle
        };
        let (all, both) = (adopt("0.0.0.0:80"), adopt("[::]:80"));
        let again = adopt("[::]:80");
        let one = adopt("127.0.0.1:81");
        let mut given = |endpoint| {
            let worker = online(&mut core);
            let asked = ask(&mut core, worker, endpoint);
            asked.into_iter().find_map(|action| match action {
                Action::Send {
                    with: Attachment::Listener(handle),
                    ..
                } => Some(handle),
                _ => None,
            })
        };
        assert_eq!(given(port(80)), Some(all), "the first");
        assert_eq!(given(ip("0.0.0.0:80")), Some(all));
        assert_eq!(given(ip("[::]:80")), Some(both));
        assert_eq!(given(ip("127.0.0.1:81")), Some(one));
        assert_eq!(given(port(81)), None);
        let worker = online(&mut core);
        ask(&mut core, worker, port(80));
        let twice = ask(&mut core, worker, ip("0.0.0.0:80"));
        let is_error = |action: &Action<u32>| {
            let Action::Send { frame, .. } = action else {
                return false;
            };
            matches!(frame, ToWorker::Reply { result, .. } if *result == Err(errno::EADDRINUSE))
        };
        assert!(twice.iter().any(is_error) && core.is_connected(worker));
        core.release(again);
        core.release(all);
        assert!(core.is_bound(all), "somebody has it");
        assert!(!core.is_bound(again));
    }
}

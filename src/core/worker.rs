//! Every decision of the worker. Pure, like [`master_core`](crate::core::master): facts come in as
//! method calls, and [`Action`]s and [`Event`]s go out.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;

use crate::config::settings::SchedulingPolicy;
use crate::types::endpoint::{BindFlags, Endpoint, Kind};
use crate::types::errno;
use crate::types::message::Message;
use crate::types::sorted_map::SortedMap;
use crate::wire::frame::{FrameError, HandleId, HandleKey, ToMaster, ToWorker};

/// What the program calls a listener; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ListenerId(pub(crate) u32);

/// The highest number of a listener, with which it can still travel through the poller.
const MAX_LISTENER: u32 = (1 << 29) - 1;

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Send(ToMaster),
    /// Close this worker's copy of a shared listener or socket, or its queue.
    CloseListener(ListenerId),
    /// Let nobody new into the backlog of a listener of which the master knows nothing.
    AttachSynFilter(ListenerId),
    /// Close the channel once everything queued is written.
    CloseChannel,
}

#[derive(Debug)]
pub(crate) enum Event {
    /// Whatever is in the backlog or the queue of this listener is for its callback.
    Look(ListenerId),
    Message(Message),
    Disconnect,
}

/// The answer to `listen`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Listen {
    Pending,
    /// Open, or ended already because the worker leaves.
    Done(Option<SocketAddr>),
    /// The errno.
    Failed(i32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Asked,
    /// Given up before the answer came; it closes when it comes.
    Abandoned,
    Failed(i32),
    /// The master knows it by this handle; it knows nothing of the worker's own listeners.
    Open(Option<HandleId>),
    /// Nothing more comes; what has come may still be taken.
    Ending(Option<HandleId>),
    Closed,
}

#[derive(Debug)]
struct Entry {
    kind: Kind,
    /// What the master was asked for; `None` for the worker's own listeners.
    key: Option<HandleKey>,
    address: Option<SocketAddr>,
    policy: SchedulingPolicy,
    stage: Stage,
    /// Served by a callback.
    served: bool,
    /// How many connections have been taken out of the queue.
    taken: u64,
    /// The master believes that the queue is not looked at, or that it is, and was empty when so
    /// many had been taken.
    said: Said,
    /// In the program's hands.
    open: u64,
    /// How many of these the program allows.
    most: Option<u64>,
    /// What is beyond is taken and dropped, instead of being left to others.
    drops: bool,
    /// It keeps the program running.
    referenced: bool,
    /// The master knows that the program has it.
    announced: bool,
}

/// The last word that the master has had about a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// That nothing more is wanted; or none yet, which is the same.
    Enough,
    /// That it was empty when so many had been taken, and so many were open.
    Empty(u64, u32),
}

impl Entry {
    fn handle(&self) -> Option<HandleId> {
        match self.stage {
            Stage::Open(handle) | Stage::Ending(handle) => handle,
            Stage::Asked | Stage::Abandoned | Stage::Failed(_) | Stage::Closed => None,
        }
    }

    fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Open(_) | Stage::Ending(_))
    }

    fn has_queue(&self) -> bool {
        self.key.is_some() && self.policy == SchedulingPolicy::RoundRobin
    }
}

#[derive(Debug)]
pub(crate) struct WorkerCore {
    connected: bool,
    /// This worker has said that it wants to leave.
    asked: bool,
    /// The master has told it to, or has agreed.
    told: bool,
    /// It leaves without waiting for its connections.
    killed: bool,
    closing: bool,
    /// The channel keeps the program running.
    referenced: bool,
    /// How many connections callbacks may hold, once it is known that there are no descriptors for
    /// more.
    most: Option<u64>,
    /// There was no descriptor for a connection: queues are left alone for a while.
    resting: bool,
    last_listener: u32,
    listeners: SortedMap<ListenerId, Entry>,
    /// The indices in use, by the endpoint as it was asked for.
    indices: SortedMap<Endpoint, BTreeSet<u32>>,
    /// Connections in the program's hands.
    open: u64,
    actions: VecDeque<Action>,
    events: VecDeque<Event>,
}

impl WorkerCore {
    /// The first thing a worker says is that it is online.
    pub(crate) fn new() -> Self {
        Self {
            connected: true,
            asked: false,
            told: false,
            killed: false,
            closing: false,
            referenced: true,
            most: None,
            resting: false,
            last_listener: 0,
            listeners: SortedMap::new(),
            indices: SortedMap::new(),
            open: 0,
            actions: VecDeque::from([Action::Send(ToMaster::Online)]),
            events: VecDeque::new(),
        }
    }

    // What the shell asks.

    /// Whether `next_action` would return one.
    pub(crate) fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    pub(crate) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub(crate) fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connected
    }

    /// `None` until the channel is closed.
    pub(crate) fn exited_after_disconnect(&self) -> Option<bool> {
        (!self.connected).then_some(self.told)
    }

    /// Whether the worker should end whatever the program still waits for: it was cut off without
    /// a word, or wants to be gone at once.
    pub(crate) fn must_exit(&self) -> bool {
        !self.connected && (!self.told || self.killed)
    }

    /// Whether the cluster gives the program no more reason to go on.
    pub(crate) fn is_finished(&self) -> bool {
        // One that is being closed has its `disconnect` event still to come.
        let channel = self.connected && (self.referenced || self.closing);
        let listens = |entry: &Entry| entry.referenced && entry.is_open();
        let busy = channel || self.open > 0 || self.listeners.values().any(listens);
        self.must_exit() || !busy
    }

    /// Whether the channel, or a listener, keeps the program running.
    pub(crate) fn reference(&mut self, listener: Option<ListenerId>, referenced: bool) {
        match listener {
            None => self.referenced = referenced,
            Some(listener) => {
                if let Some(entry) = self.listeners.get_mut(&listener) {
                    entry.referenced = referenced;
                }
            }
        }
    }

    pub(crate) fn listen_result(&self, listener: ListenerId) -> Listen {
        match self.listeners.get(&listener) {
            Some(entry) => match entry.stage {
                Stage::Asked => Listen::Pending,
                Stage::Failed(errno) => Listen::Failed(errno),
                Stage::Open(_) | Stage::Ending(_) | Stage::Abandoned | Stage::Closed => {
                    Listen::Done(entry.address)
                }
            },
            None => Listen::Pending,
        }
    }

    /// Whether the program can expect no further connection.
    pub(crate) fn has_ended(&self, listener: ListenerId) -> bool {
        match self.listeners.get(&listener) {
            Some(entry) => match entry.stage {
                // One that is ending ends when accepting finds it empty.
                Stage::Asked | Stage::Open(_) | Stage::Ending(_) => false,
                Stage::Failed(_) | Stage::Abandoned | Stage::Closed => true,
            },
            None => true,
        }
    }

    /// Whether the program has not let go of it.
    pub(crate) fn is_known(&self, listener: ListenerId) -> bool {
        self.listeners.contains_key(&listener)
    }

    pub(crate) fn is_datagram(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(|entry| entry.kind == Kind::Udp)
    }

    /// Whether a callback waits for connections or datagrams.
    pub(crate) fn serves_any(&self) -> bool {
        self.listeners.values().any(|entry| entry.served)
    }

    /// Whether its connections come by a queue.
    pub(crate) fn has_queue(&self, listener: ListenerId) -> bool {
        self.listeners.get(&listener).is_some_and(Entry::has_queue)
    }

    /// Whether an empty backlog or queue means the end of this listener.
    pub(crate) fn is_ending(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(|entry| matches!(entry.stage, Stage::Ending(_)))
    }

    // What the program does.

    /// Asks the master to listen, or to bind a socket for datagrams.
    pub(crate) fn listen(&mut self, endpoint: Endpoint, flags: BindFlags) -> ListenerId {
        let used = self
            .indices
            .get_or_insert_with(endpoint.clone(), BTreeSet::new);
        let free = |index: &u32| !used.contains(index);
        let index = (0..).find(free).unwrap_or(u32::MAX);
        used.insert(index);
        let kind = endpoint.kind;
        let key = HandleKey { endpoint, index };
        let asked = key.clone();
        let listener = self.add(kind, Some(key), Stage::Asked, SchedulingPolicy::RoundRobin);
        let asks = self.listeners.get(&listener).map(|entry| entry.stage) == Some(Stage::Asked);
        if asks {
            self.send(ToMaster::Listen {
                request: listener.0,
                key: asked,
                flags,
            });
        }
        listener
    }

    /// Takes note of a socket of which the master knows nothing.
    pub(crate) fn listen_alone(&mut self, kind: Kind) -> ListenerId {
        self.add(kind, None, Stage::Open(None), SchedulingPolicy::Shared)
    }

    /// Whether listeners end as soon as they are asked for.
    pub(crate) fn is_leaving(&self) -> bool {
        self.told || self.closing || !self.connected
    }

    /// A number that no listener has. Numbers begin anew when all have been used.
    fn next_listener(&mut self) -> ListenerId {
        loop {
            self.last_listener = self.last_listener % MAX_LISTENER + 1;
            let listener = ListenerId(self.last_listener);
            if !self.listeners.contains_key(&listener) {
                return listener;
            }
        }
    }

    /// A worker that leaves gets listeners that are closed already.
    fn add(
        &mut self,
        kind: Kind,
        key: Option<HandleKey>,
        stage: Stage,
        policy: SchedulingPolicy,
    ) -> ListenerId {
        let listener = self.next_listener();
        let gone = self.is_leaving();
        let entry = Entry {
            kind,
            key,
            address: None,
            policy,
            stage: if gone { Stage::Closed } else { stage },
            served: false,
            taken: 0,
            said: Said::Enough,
            open: 0,
            most: None,
            drops: false,
            referenced: true,
            announced: false,
        };
        self.listeners.insert(listener, entry);
        listener
    }

    /// The program has its listener.
    pub(crate) fn listening(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if let (Some(handle), false) = (entry.handle(), entry.announced) {
            entry.announced = true;
            self.send(ToMaster::Listening { handle });
        }
    }

    /// The queue of this listener was looked at, and empty, and the program waits for what comes:
    /// the master is to know.
    pub(crate) fn found_empty(&mut self, listener: ListenerId) {
        let leaves = self.leaves_to_others(listener);
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        let is_news = !matches!(entry.said, Said::Empty(taken, _) if taken == entry.taken);
        if is_news && !leaves {
            self.say_empty(listener);
        }
    }

    fn say_empty(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if let (Stage::Open(Some(handle)), true) = (entry.stage, entry.has_queue()) {
            let (taken, open) = (entry.taken, u32::try_from(entry.open).unwrap_or(u32::MAX));
            entry.said = Said::Empty(taken, open);
            self.send(ToMaster::Idle {
                handle,
                taken,
                open,
            });
        }
    }

    /// Nothing more is to be given to a listener that is better left to others.
    fn revoke_if_full(&mut self, listener: ListenerId) {
        let leaves = self.leaves_to_others(listener);
        if let Some(entry) = self.listeners.get_mut(&listener).filter(|_| leaves) {
            let said = std::mem::replace(&mut entry.said, Said::Enough);
            if let (Some(handle), true) = (entry.handle(), said != Said::Enough) {
                self.send(ToMaster::Pause { handle });
            }
        }
    }

    /// From now on connections go to a callback.
    pub(crate) fn serve(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.served = true;
            self.look(listener);
        }
    }

    /// Lets the callback have what there is.
    pub(crate) fn look(&mut self, listener: ListenerId) {
        let entry = self.listeners.get(&listener);
        let open = entry.is_some_and(|entry| entry.served && entry.is_open());
        if open && !self.leaves_to_others(listener) && !self.is_datagram(listener) {
            self.events.push_back(Event::Look(listener));
        }
    }

    pub(crate) fn is_served(&self, listener: ListenerId) -> bool {
        self.listeners
            .get(&listener)
            .is_some_and(|entry| entry.served)
    }

    /// The program has a connection. Returns whether it is one too many, and to be dropped.
    pub(crate) fn connection_opened(&mut self, listener: ListenerId) -> bool {
        self.open += 1;
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return false;
        };
        let full = entry.most.is_some_and(|most| entry.open >= most);
        entry.open += 1;
        entry.taken += u64::from(entry.has_queue());
        let over = entry.drops && full;
        self.revoke_if_full(listener);
        over
    }

    /// The program has a connection that comes from elsewhere.
    pub(crate) fn connection_adopted(&mut self) {
        self.open += 1;
    }

    pub(crate) fn connection_closed(&mut self, listener: Option<ListenerId>) {
        let full: Vec<_> = self.left_to_others().collect();
        self.open = self.open.saturating_sub(1);
        if let Some(entry) = listener.and_then(|id| self.listeners.get_mut(&id)) {
            entry.open = entry.open.saturating_sub(1);
            // What the master knows of an idle worker is to be roughly right.
            let half = |open: u32| entry.open <= u64::from(open) / 2;
            if matches!(entry.said, Said::Empty(taken, open) if taken == entry.taken && half(open))
            {
                listener.into_iter().for_each(|id| self.say_empty(id));
            }
        }
        self.rebalance_deadline(full);
    }

    /// The listeners that are better left to others now.
    fn left_to_others(&self) -> impl Iterator<Item = ListenerId> + '_ {
        let limited = self.most.is_some() || self.resting;
        let all = self.listeners.iter();
        let all = all.filter(move |(_, entry)| limited || entry.most.is_some());
        let all = all.map(|(listener, _)| *listener);
        all.filter(|listener| self.leaves_to_others(*listener))
    }

    /// Some that were left to others may need it no longer.
    fn rebalance_deadline(&mut self, listeners: Vec<ListenerId>) {
        for listener in listeners {
            self.look(listener);
        }
    }

    /// From now on the program wants to have at most so many connections of this listener at a
    /// time.
    pub(crate) fn set_most(&mut self, listener: ListenerId, most: Option<u64>) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if self.told && !entry.drops {
            return; // It serves what is left, however many it has.
        }
        entry.most = most;
        self.revoke_if_full(listener);
        self.look(listener);
    }

    /// What is beyond that is to be dropped.
    pub(crate) fn drop_beyond(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.drops = true;
            self.look(listener);
        }
    }

    /// Whether a listener is better left to others now: it has as many connections as the program
    /// wants, or there are no descriptors. One that ends has nobody else to leave them to.
    pub(crate) fn leaves_to_others(&self, listener: ListenerId) -> bool {
        let Some(entry) = self.listeners.get(&listener) else {
            return false;
        };
        let full = entry.most.is_some_and(|most| entry.open >= most) && !entry.drops;
        let scarce = entry.served && self.most.is_some_and(|most| self.open >= most);
        let unable = entry.has_queue() && (self.resting || scarce);
        match entry.stage {
            Stage::Open(_) => full || unable,
            // Nothing is lost by waiting until there are descriptors.
            Stage::Ending(_) => entry.has_queue() && self.resting,
            Stage::Asked | Stage::Abandoned | Stage::Failed(_) | Stage::Closed => false,
        }
    }

    /// The descriptors are running out: from now on no more connections are asked for than are
    /// held at this moment.
    pub(crate) fn descriptors_run_out(&mut self) {
        // One at a time must do where there is hardly any to begin with.
        let held = self.open.max(1);
        self.most = Some(self.most.map_or(held, |most| most.min(held)));
        self.revoke_all();
    }

    /// There are plenty of descriptors again.
    pub(crate) fn descriptors_suffice(&mut self) {
        if self.most.is_some() {
            let full: Vec<_> = self.left_to_others().collect();
            self.most = None;
            self.rebalance_deadline(full);
        }
    }

    /// There is no descriptor at all: what is in the queues is for others.
    pub(crate) fn descriptors_lack(&mut self) {
        self.resting = true;
        self.revoke_all();
    }

    fn revoke_all(&mut self) {
        let full: Vec<_> = self.left_to_others().collect();
        for listener in full {
            self.revoke_if_full(listener);
        }
    }

    /// Some time has passed since then, and there may be room again.
    pub(crate) fn rested(&mut self) {
        let left: Vec<_> = self.left_to_others().collect();
        self.resting = false;
        self.rebalance_deadline(left);
    }

    /// The answer to a `Listen` came without the descriptor, for which there was no room.
    pub(crate) fn listener_lost(
        &mut self,
        request: u32,
        handle: HandleId,
    ) -> Result<(), FrameError> {
        let result = Err(errno::EMFILE);
        self.frame(ToWorker::Reply { request, result })?;
        self.send(ToMaster::Release { handle });
        Ok(())
    }

    /// Closes a listener. The master takes back what is in its queue.
    pub(crate) fn close(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        match (entry.stage, entry.handle()) {
            // The index stays taken: the master may have bound it.
            (Stage::Asked, _) => entry.stage = Stage::Abandoned,
            (_, Some(handle)) => {
                entry.stage = Stage::Closed;
                let key = entry.key.clone();
                self.send(ToMaster::Release { handle });
                self.actions.push_back(Action::CloseListener(listener));
                self.release(key.as_ref());
            }
            (Stage::Open(None) | Stage::Ending(None), None) => {
                entry.stage = Stage::Closed;
                self.actions.push_back(Action::CloseListener(listener));
            }
            (_, None) => {}
        }
    }

    /// The program has let go of the listener.
    pub(crate) fn forget(&mut self, listener: ListenerId) {
        self.close(listener);
        let answered = |entry: &Entry| entry.stage != Stage::Abandoned;
        if self.listeners.get(&listener).is_some_and(answered) {
            self.listeners.remove(&listener);
        }
    }

    /// The program waits for events in general. If the worker leaves, the channel closes when there
    /// is nothing left to wait for. Not before: a program that blocks may have something to say
    /// after its last connection.
    pub(crate) fn wait_for_events(&mut self) {
        self.close_unserved();
        if self.is_done() {
            self.close_channel();
        }
    }

    /// Closes the listeners that nobody is going to serve, if the worker leaves.
    pub(crate) fn close_unserved(&mut self) {
        if self.told {
            let unserved = |(_, entry): &(&ListenerId, &Entry)| !entry.served && entry.is_open();
            let unserved: Vec<_> = self
                .listeners
                .iter()
                .filter(unserved)
                .map(|(id, _)| *id)
                .collect();
            for listener in unserved {
                self.close(listener);
            }
        }
    }

    /// Whether a worker that leaves has nothing left to wait for.
    pub(crate) fn is_done(&self) -> bool {
        let may_leave = self.told && self.connected && !self.closing;
        may_leave && self.open == 0 && !self.listeners.values().any(Entry::is_open)
    }

    pub(crate) fn disconnect(&mut self) {
        if self.connected && !self.asked && !self.told {
            self.asked = true;
            self.send(ToMaster::DisconnectRequest);
        }
    }

    /// Leaves without waiting for connections; the master is asked all the same, so that it knows.
    pub(crate) fn kill(&mut self) {
        self.killed = true;
        self.disconnect();
        if self.told {
            self.close_channel();
        }
    }

    /// Closes the channel without a word to the master.
    pub(crate) fn close_channel(&mut self) {
        if self.connected && !self.closing {
            self.closing = true;
            self.actions.push_back(Action::CloseChannel);
        }
    }

    // What happens.

    pub(crate) fn channel_closed(&mut self) {
        if !self.connected {
            return;
        }
        self.connected = false;
        for entry in self.listeners.values_mut() {
            if !matches!(entry.stage, Stage::Failed(_)) {
                entry.stage = Stage::Closed;
            }
        }
        let all = self.listeners.keys().copied().map(Action::CloseListener);
        self.actions.extend(all);
        self.events.push_back(Event::Disconnect);
    }

    pub(crate) fn message(&mut self, message: Message) {
        self.events.push_back(Event::Message(message));
    }

    /// A frame of the master; a message that may have descriptors comes by `message`. Returns the listener
    /// that its descriptor, if it is one, belongs to.
    pub(crate) fn frame(&mut self, frame: ToWorker) -> Result<Option<ListenerId>, FrameError> {
        match frame {
            ToWorker::Reply { request, result } => {
                let listener = ListenerId(request);
                let Some(entry) = self.listeners.get_mut(&listener) else {
                    return Err(FrameError::State("answer to a question never asked"));
                };
                let abandoned = match entry.stage {
                    Stage::Asked => false,
                    Stage::Abandoned => true,
                    Stage::Failed(_) | Stage::Open(_) | Stage::Ending(_) | Stage::Closed => {
                        return Err(FrameError::State("second answer to one question"));
                    }
                };
                match result {
                    Ok(bound) => {
                        entry.address = bound.address;
                        entry.policy = bound.policy;
                        entry.stage = Stage::Open(Some(bound.handle));
                        if abandoned {
                            self.forget(listener);
                        }
                        return Ok(Some(listener));
                    }
                    Err(errno) => {
                        entry.stage = Stage::Failed(errno);
                        let key = entry.key.clone();
                        self.release(key.as_ref());
                    }
                }
            }
            ToWorker::ListenerClosed { handle, drain } => {
                if let Some(listener) = self.by_handle(handle) {
                    if drain {
                        self.end(listener);
                    } else {
                        self.close(listener);
                    }
                }
            }
            ToWorker::Disconnect => {
                self.told = true;
                let full: Vec<_> = self.left_to_others().collect();
                let mut alone = Vec::new();
                for (listener, entry) in self.listeners.iter_mut() {
                    if !entry.drops {
                        // Whatever is left comes to the last worker, however many it has.
                        entry.most = None;
                    }
                    match entry.stage {
                        // A worker that leaves gets no answer to what it has asked.
                        Stage::Asked => entry.stage = Stage::Abandoned,
                        Stage::Open(None) => alone.push(*listener),
                        Stage::Open(Some(_))
                        | Stage::Abandoned
                        | Stage::Failed(_)
                        | Stage::Ending(_)
                        | Stage::Closed => {}
                    }
                }
                for listener in alone {
                    self.actions.push_back(Action::AttachSynFilter(listener));
                    self.end(listener);
                }
                self.rebalance_deadline(full);
                if self.killed {
                    self.close_channel();
                }
            }
            ToWorker::Message(bytes) => self.message(Message::new(bytes, Vec::new())),
        }
        Ok(None)
    }

    // How it is decided.

    fn send(&mut self, frame: ToMaster) {
        if self.connected && !self.closing {
            self.actions.push_back(Action::Send(frame));
        }
    }

    fn by_handle(&self, handle: HandleId) -> Option<ListenerId> {
        let mut open = self.listeners.iter();
        open.find(|(_, entry)| entry.handle() == Some(handle))
            .map(|(id, _)| *id)
    }

    /// Nothing more comes. A listener is emptied before it closes.
    fn end(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if entry.kind == Kind::Udp {
            return self.close(listener);
        }
        if let Stage::Open(handle) = entry.stage {
            entry.stage = Stage::Ending(handle);
        }
        self.look(listener);
    }

    fn release(&mut self, key: Option<&HandleKey>) {
        let Some(HandleKey { endpoint, index }) = key else {
            return;
        };
        if let Some(used) = self.indices.get_mut(endpoint) {
            used.remove(index);
            if used.is_empty() {
                self.indices.remove(endpoint);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::endpoint::Place;
    use crate::wire::frame::Bound;

    const HANDLE: HandleId = HandleId(1);

    fn listener(core: &mut WorkerCore, handle: HandleId) -> ListenerId {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let endpoint = Endpoint::new(Kind::Tcp, Place::Ip(address));
        let listener = core.listen(endpoint, BindFlags::default());
        let result = Ok(Bound {
            handle,
            policy: SchedulingPolicy::RoundRobin,
            address: Some(address),
        });
        let reply = ToWorker::Reply {
            request: listener.0,
            result,
        };
        core.frame(reply).unwrap();
        core.serve(listener);
        listener
    }

    #[test]
    fn listener_numbers_begin_anew_and_skip_those_in_use() {
        let mut core = WorkerCore::new();
        let first = core.listen_alone(Kind::Tcp);
        core.last_listener = MAX_LISTENER - 1;
        let rest = [Kind::Tcp, Kind::Udp].map(|kind| core.listen_alone(kind));
        assert_eq!(first, ListenerId(1));
        assert_eq!(rest, [ListenerId(MAX_LISTENER), ListenerId(2)]);
        assert!(core.is_datagram(rest[1]) && !core.is_datagram(first));
    }

    fn sent(core: &mut WorkerCore) -> Vec<ToMaster> {
        let actions = std::iter::from_fn(|| core.next_action());
        let frames = actions.filter_map(|action| match action {
            Action::Send(frame) => Some(frame),
            Action::CloseListener(_) | Action::AttachSynFilter(_) | Action::CloseChannel => None,
        });
        frames.collect()
    }

    /// Whether the callback of the listener is to look into the queue, which turns out empty.
    fn looks(core: &mut WorkerCore, listener: ListenerId) -> bool {
        let events: Vec<_> = std::iter::from_fn(|| core.next_event()).collect();
        core.found_empty(listener);
        let is_look = |event: &Event| matches!(event, Event::Look(id) if *id == listener);
        events.iter().any(is_look)
    }

    fn ready(taken: u64, open: u32) -> ToMaster {
        let handle = HANDLE;
        ToMaster::Idle {
            handle,
            taken,
            open,
        }
    }

    const REVOKE: ToMaster = ToMaster::Pause { handle: HANDLE };

    #[test]
    fn the_master_is_told_once_that_the_queue_is_empty() {
        let mut core = WorkerCore::new();
        let listener = listener(&mut core, HANDLE);
        sent(&mut core);
        assert!(looks(&mut core, listener));
        assert_eq!(sent(&mut core), [ready(0, 0)]);
        assert!(!looks(&mut core, listener));
        assert_eq!(sent(&mut core), []);
        core.connection_opened(listener);
        core.connection_opened(listener);
        core.found_empty(listener);
        assert_eq!(sent(&mut core), [ready(2, 2)]);
    }

    #[test]
    fn a_full_worker_leaves_its_queue_to_others_until_it_has_room() {
        let mut core = WorkerCore::new();
        let listener = listener(&mut core, HANDLE);
        core.set_most(listener, Some(1));
        assert!(looks(&mut core, listener));
        sent(&mut core);
        core.connection_opened(listener);
        assert!(core.leaves_to_others(listener));
        assert_eq!(sent(&mut core), [REVOKE]);
        core.found_empty(listener);
        core.set_most(listener, Some(0));
        assert_eq!(sent(&mut core), [], "nothing new");
        core.set_most(listener, Some(1));
        core.connection_closed(Some(listener));
        assert!(looks(&mut core, listener));
        assert_eq!(sent(&mut core), [ready(1, 0)]);
    }

    #[test]
    fn a_limit_that_is_not_reached_takes_nothing_back() {
        let mut core = WorkerCore::new();
        let listener = listener(&mut core, HANDLE);
        looks(&mut core, listener);
        sent(&mut core);
        core.connection_opened(listener);
        for (most, full) in [
            (Some(8), false),
            (Some(1), true),
            (Some(1), true),
            (None, false),
        ] {
            core.set_most(listener, most);
            assert_eq!(core.leaves_to_others(listener), full, "{most:?}");
        }
        assert_eq!(sent(&mut core), [REVOKE]);
    }

    #[test]
    fn without_descriptors_queues_are_left_alone_for_a_while() {
        let mut core = WorkerCore::new();
        let (first, second) = (
            listener(&mut core, HANDLE),
            listener(&mut core, HandleId(2)),
        );
        for listener in [first, second] {
            looks(&mut core, listener);
        }
        sent(&mut core);
        core.descriptors_lack();
        assert_eq!(
            sent(&mut core),
            [
                REVOKE,
                ToMaster::Pause {
                    handle: HandleId(2)
                }
            ]
        );
        assert!(!looks(&mut core, first));
        assert_eq!(sent(&mut core), []);
        core.rested();
        assert!(looks(&mut core, first));
        assert_eq!(sent(&mut core), [ready(0, 0)]);
    }

    #[test]
    fn callbacks_leave_some_descriptors_to_the_program() {
        let mut core = WorkerCore::new();
        let listener = listener(&mut core, HANDLE);
        let blocking = core.listen_alone(Kind::Tcp);
        looks(&mut core, listener);
        core.connection_opened(listener);
        core.connection_opened(listener);
        core.descriptors_run_out();
        assert!(core.leaves_to_others(listener) && !core.leaves_to_others(blocking));
        core.connection_closed(Some(listener));
        assert!(
            !core.leaves_to_others(listener),
            "one may come for one that has gone"
        );
        assert!(looks(&mut core, listener));
        core.connection_opened(listener);
        core.descriptors_suffice();
        assert!(looks(&mut core, listener));
        core.connection_opened(listener);
        assert!(!core.leaves_to_others(listener));
    }

    #[test]
    fn a_listener_that_found_no_descriptor_is_given_back() {
        let mut core = WorkerCore::new();
        let place = Place::Path("/path".into());
        let listener = core.listen(Endpoint::new(Kind::Unix, place), BindFlags::default());
        sent(&mut core);
        core.listener_lost(listener.0, HANDLE).unwrap();
        assert_eq!(sent(&mut core), [ToMaster::Release { handle: HANDLE }]);
        let failed = Listen::Failed(errno::EMFILE);
        assert_eq!(core.listen_result(listener), failed);
    }

    #[test]
    fn who_leaves_serves_what_is_left_however_much_it_has() {
        let mut core = WorkerCore::new();
        let listener = listener(&mut core, HANDLE);
        looks(&mut core, listener);
        core.set_most(listener, Some(0));
        assert!(!looks(&mut core, listener));
        core.frame(ToWorker::Disconnect).unwrap();
        assert!(looks(&mut core, listener));
        let (handle, drain) = (HANDLE, true);
        core.frame(ToWorker::ListenerClosed { handle, drain })
            .unwrap();
        assert!(looks(&mut core, listener), "once more, for the last");
        assert!(!core.has_ended(listener));
        core.close(listener);
        assert!(core.has_ended(listener));
    }
}

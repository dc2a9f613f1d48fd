//! Every decision of the worker. Pure, like [`master_core`](crate::master_core): facts come in as
//! method calls, and [`Action`]s and [`Event`]s go out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;

use crate::endpoint::{BindFlags, Endpoint, Kind};
use crate::frame::{FrameError, HandleId, HandleKey, ToMaster, ToWorker};
use crate::message::Message;
use crate::settings::SchedulingPolicy;
use crate::sys::errno;

/// How many connections a listener with a callback takes ahead of its turn. Large enough to hand
/// over in batches under load, small enough that little waits behind a slow callback.
const CALLBACK_WINDOW: u32 = 8;

/// What the program calls a listener; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ListenerId(pub(crate) u32);

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Send(ToMaster),
    /// Close this worker's copy of a shared listener or socket.
    CloseListener(ListenerId),
    /// Let nobody new into the backlog of a listener of which the master knows nothing.
    ShutDoor(ListenerId),
    /// Close the channel once everything queued is written.
    CloseChannel,
}

#[derive(Debug)]
pub(crate) enum Event<C> {
    /// For the callback of a listener that is served by callbacks.
    Connection(ListenerId, C),
    /// The same, but there are as many already as the program allows.
    Drop(ListenerId, C),
    /// What is left in the backlog of this shared listener is for its callback; then it closes.
    AcceptRest(ListenerId),
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
struct Entry<C> {
    kind: Kind,
    /// What the master was asked for; `None` for the worker's own listeners.
    key: Option<HandleKey>,
    address: Option<SocketAddr>,
    policy: SchedulingPolicy,
    stage: Stage,
    /// Served by a callback.
    served: bool,
    /// The program waits in `accept`.
    wanted: bool,
    /// Granted and not yet used.
    credits: u32,
    /// Received, and nobody there to take it.
    pending: VecDeque<(u64, C)>,
    /// Ready for the program that waits in `accept`.
    arrived: VecDeque<C>,
    /// The callback has one and has not returned.
    delivering: bool,
    taken: u64,
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

impl<C> Entry<C> {
    fn handle(&self) -> Option<HandleId> {
        match self.stage {
            Stage::Open(handle) | Stage::Ending(handle) => handle,
            Stage::Asked | Stage::Abandoned | Stage::Failed(_) | Stage::Closed => None,
        }
    }

    fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Open(_) | Stage::Ending(_))
    }

    /// Whether it must not take more, with `coming` on their way to the program. One that ends has
    /// nobody else to leave them to.
    fn is_full(&self, coming: u64) -> bool {
        let full = self.most.is_some_and(|most| self.open + coming >= most);
        full && !self.drops && matches!(self.stage, Stage::Open(_))
    }

    /// How many more may be on their way to the callback, with `coming` there already.
    fn room(&self, coming: u64) -> u32 {
        let pending = u32::try_from(self.pending.len()).unwrap_or(u32::MAX);
        let under_way = self.credits.saturating_add(pending);
        let window = CALLBACK_WINDOW.saturating_sub(under_way);
        match self.most {
            Some(most) if !self.drops => {
                let others = self.open + coming + u64::from(under_way);
                let left = most.saturating_sub(others);
                window.min(u32::try_from(left).unwrap_or(u32::MAX))
            }
            _ => window,
        }
    }
}

#[derive(Debug)]
pub(crate) struct WorkerCore<C> {
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
    /// A connection found no descriptor: nothing more is asked for.
    resting: bool,
    last_listener: u32,
    listeners: BTreeMap<ListenerId, Entry<C>>,
    /// The indices in use, by the endpoint as it was asked for.
    indices: BTreeMap<Endpoint, BTreeSet<u32>>,
    /// Taken, but the master may not know it yet: until it does, another worker may be given the
    /// same connection, and so the program must not see it.
    unconfirmed: VecDeque<(ListenerId, C)>,
    /// Connections in the program's hands.
    open: u64,
    actions: VecDeque<Action>,
    events: VecDeque<Event<C>>,
}

impl<C> WorkerCore<C> {
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
            listeners: BTreeMap::new(),
            indices: BTreeMap::new(),
            unconfirmed: VecDeque::new(),
            open: 0,
            actions: VecDeque::from([Action::Send(ToMaster::Online)]),
            events: VecDeque::new(),
        }
    }

    // What the shell asks.

    pub(crate) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub(crate) fn next_event(&mut self) -> Option<Event<C>> {
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
        let listens = |entry: &Entry<C>| entry.referenced && entry.is_open();
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
            Some(entry) => match (entry.stage, entry.policy) {
                (Stage::Asked | Stage::Open(_), _) => false,
                // A shared listener ends when accepting finds it empty.
                (Stage::Ending(_), SchedulingPolicy::Shared) => false,
                (Stage::Ending(_), SchedulingPolicy::RoundRobin)
                | (Stage::Failed(_) | Stage::Abandoned | Stage::Closed, _) => {
                    let coming = self.is_coming(listener);
                    entry.pending.is_empty() && entry.arrived.is_empty() && !coming
                }
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

    /// Whether an empty backlog means the end of this shared listener.
    pub(crate) fn is_ending(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(|entry| matches!(entry.stage, Stage::Ending(_)))
    }

    // What the program does.

    /// Asks the master to listen, or to bind a socket for datagrams.
    pub(crate) fn listen(&mut self, endpoint: Endpoint, flags: BindFlags) -> ListenerId {
        let used = self.indices.entry(endpoint.clone()).or_default();
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

    /// A worker that leaves gets listeners that are closed already.
    fn add(
        &mut self,
        kind: Kind,
        key: Option<HandleKey>,
        stage: Stage,
        policy: SchedulingPolicy,
    ) -> ListenerId {
        self.last_listener += 1;
        let listener = ListenerId(self.last_listener);
        let gone = self.is_leaving();
        let entry = Entry {
            kind,
            key,
            address: None,
            policy,
            stage: if gone { Stage::Closed } else { stage },
            served: false,
            wanted: false,
            credits: 0,
            pending: VecDeque::new(),
            arrived: VecDeque::new(),
            delivering: false,
            taken: 0,
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

    /// The program waits for one connection: the master is to send one, unless one is here.
    pub(crate) fn want(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if !entry.arrived.is_empty() {
            return;
        }
        entry.wanted = true;
        self.ask(listener);
        self.take(listener);
    }

    /// Grants one for the program that waits in `accept`, unless one is on its way.
    fn ask(&mut self, listener: ListenerId) {
        let coming = u64::from(self.is_coming(listener));
        let Some(entry) = self.listeners.get(&listener) else {
            return;
        };
        let under_way = coming > 0 || entry.credits > 0 || !entry.pending.is_empty();
        let wants = entry.wanted && !entry.served && !entry.is_full(coming);
        if wants && !under_way && !self.resting {
            self.grant(listener, 1);
        }
    }

    /// Returns the connection that the program waits for.
    pub(crate) fn arrived(&mut self, listener: ListenerId) -> Option<C> {
        let entry = self.listeners.get_mut(&listener)?;
        let connection = entry.arrived.pop_front()?;
        entry.wanted = false;
        Some(connection)
    }

    /// Everything sent so far has been written.
    pub(crate) fn confirmed(&mut self) {
        while let Some((listener, connection)) = self.unconfirmed.pop_front() {
            let over = self.connection_opened(listener);
            match self.listeners.get_mut(&listener) {
                Some(entry) if over => {
                    entry.delivering = true;
                    self.events.push_back(Event::Drop(listener, connection));
                }
                Some(entry) if !entry.served => entry.arrived.push_back(connection),
                Some(entry) => {
                    entry.delivering = true;
                    let event = Event::Connection(listener, connection);
                    self.events.push_back(event);
                }
                None => {
                    let event = Event::Connection(listener, connection);
                    self.events.push_back(event);
                }
            }
        }
    }

    /// The callback has returned. Until then the next connection is not taken: if the program
    /// breaks down over this one, others can have it.
    pub(crate) fn delivered(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.delivering = false;
            self.take(listener);
        }
    }

    /// Whether the callback of this listener still has something to get.
    pub(crate) fn owes(&self, listener: ListenerId) -> bool {
        let queued = |event: &Event<C>| match event {
            Event::Connection(id, _) | Event::Drop(id, _) => *id == listener,
            Event::AcceptRest(_) | Event::Message(_) | Event::Disconnect => false,
        };
        self.is_coming(listener) || self.events.iter().any(queued)
    }

    /// From now on connections go to a callback.
    pub(crate) fn serve(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        entry.served = true;
        let arrived = std::mem::take(&mut entry.arrived);
        entry.delivering |= !arrived.is_empty();
        let arrived = arrived.into_iter().map(|c| Event::Connection(listener, c));
        self.events.extend(arrived);
        self.refill(listener);
        self.take(listener);
        self.accept_rest(listener);
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
        entry.drops && full
    }

    /// The program has a connection that comes from elsewhere.
    pub(crate) fn connection_adopted(&mut self) {
        self.open += 1;
    }

    /// Returns whether a shared listener need no longer be left to others.
    pub(crate) fn connection_closed(&mut self, listener: Option<ListenerId>) -> bool {
        self.open = self.open.saturating_sub(1);
        let mut has_room = false;
        if let Some(entry) = listener.and_then(|id| self.listeners.get_mut(&id)) {
            let was_full = entry.is_full(0);
            entry.open = entry.open.saturating_sub(1);
            has_room = was_full && !entry.is_full(0);
        }
        // Without a limit the next connection that is taken does all this, in the same frame.
        let limited = |(id, entry): (&ListenerId, &Entry<C>)| {
            let concerned = listener == Some(*id) && entry.most.is_some();
            (concerned || self.most.is_some()).then_some(*id)
        };
        let limited: Vec<_> = self.listeners.iter().filter_map(limited).collect();
        for listener in limited {
            self.ask(listener);
            self.refill(listener);
        }
        has_room
    }

    /// Grants what a callback can take.
    fn refill(&mut self, listener: ListenerId) {
        let coming = u64::from(self.is_coming(listener));
        let entry = self.listeners.get(&listener);
        let room = entry
            .filter(|entry| entry.served)
            .map(|entry| entry.room(coming));
        if let (Some(room @ 1..), false) = (room, self.resting) {
            self.grant(listener, room);
        }
    }

    /// From now on the program wants to have at most so many connections of this listener at a
    /// time.
    pub(crate) fn set_most(&mut self, listener: ListenerId, most: Option<u64>) {
        let coming = u64::from(self.is_coming(listener));
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if self.told && !entry.drops {
            return; // It serves what is left, however many it has.
        }
        entry.most = most;
        // What was granted before may be too much now. Only then: what is on its way when it is
        // revoked counts against the next credits, of which the master knows more than this worker.
        let under_way = u64::from(entry.credits) + entry.pending.len() as u64 + coming;
        let too_much = most.is_some_and(|most| entry.open + under_way > most);
        if too_much && !entry.drops && entry.credits > 0 {
            entry.credits = 0;
            if let Some(handle) = entry.handle() {
                self.send(ToMaster::Revoke { handle });
            }
        }
        self.take(listener);
        self.ask(listener);
        self.refill(listener);
    }

    /// What is beyond that is to be dropped.
    pub(crate) fn drop_beyond(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.drops = true;
            self.ask(listener);
            self.refill(listener);
        }
    }

    /// Whether a shared listener is better left to others now.
    pub(crate) fn leaves_to_others(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(|entry| entry.is_full(0))
    }

    /// The descriptors are running out: from now on no more connections are asked for than are
    /// held at this moment.
    pub(crate) fn descriptors_run_out(&mut self) {
        // One at a time must do where there is hardly any to begin with.
        let held = self.open.max(1);
        self.most = Some(self.most.map_or(held, |most| most.min(held)));
    }

    /// There are plenty of descriptors again.
    pub(crate) fn descriptors_suffice(&mut self) {
        if self.most.take().is_some() {
            self.ask_for_all();
        }
    }

    /// How many more connections callbacks may be given.
    fn spare(&self) -> u32 {
        let Some(most) = self.most else {
            return u32::MAX;
        };
        let under_way = |entry: &Entry<C>| u64::from(entry.credits) + entry.pending.len() as u64;
        let under_way: u64 = self.listeners.values().map(under_way).sum();
        let taken = self.open + self.unconfirmed.len() as u64;
        u32::try_from(most.saturating_sub(taken + under_way)).unwrap_or(u32::MAX)
    }

    /// A connection came without its descriptor, for which there was no room. The master has its
    /// own, and gives it to somebody else.
    fn connection_lost(&mut self, listener: ListenerId, handle: HandleId, number: u64) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.credits = entry.credits.saturating_sub(1);
        }
        self.resting = true;
        self.send(ToMaster::Refused { handle, number });
    }

    /// Some time has passed since a connection was lost, and there may be room again.
    pub(crate) fn rested(&mut self) {
        self.resting = false;
        self.ask_for_all();
    }

    /// Grants whatever the program is ready to take.
    fn ask_for_all(&mut self) {
        let all: Vec<_> = self.listeners.keys().copied().collect();
        for listener in all {
            self.ask(listener);
            self.refill(listener);
        }
    }

    /// The answer to a `Listen` came without the listener, for which there was no room.
    pub(crate) fn listener_lost(
        &mut self,
        request: u32,
        handle: HandleId,
    ) -> Result<(), FrameError> {
        let result = Err(errno::EMFILE);
        self.frame(ToWorker::Reply { request, result }, None, None)?;
        self.send(ToMaster::Close { handle });
        Ok(())
    }

    /// Closes a listener and refuses what it still holds.
    pub(crate) fn close(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        match (entry.stage, entry.handle()) {
            // The index stays taken: the master may have bound it.
            (Stage::Asked, _) => entry.stage = Stage::Abandoned,
            (_, Some(handle)) => {
                entry.stage = Stage::Closed;
                entry.credits = 0;
                let key = entry.key.clone();
                let pending = std::mem::take(&mut entry.pending);
                for (number, _) in pending {
                    self.send(ToMaster::Refused { handle, number });
                }
                self.send(ToMaster::Close { handle });
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
        let answered = |entry: &Entry<C>| entry.stage != Stage::Abandoned;
        if self.listeners.get(&listener).is_some_and(answered) {
            if let Some(entry) = self.listeners.remove(&listener) {
                // Nobody is going to ask for these.
                self.open -= entry.arrived.len() as u64;
            }
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
            let unserved = |(_, entry): &(&ListenerId, &Entry<C>)| !entry.served && entry.is_open();
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
        let busy = self.open > 0 || !self.unconfirmed.is_empty();
        let idle = !busy && !self.listeners.values().any(Entry::is_open);
        self.told && self.connected && !self.closing && idle
    }

    pub(crate) fn disconnect(&mut self) {
        if self.connected && !self.asked && !self.told {
            self.asked = true;
            self.send(ToMaster::Leaving);
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
            entry.pending.clear();
        }
        // The master never heard of these: it gives them to somebody else.
        self.unconfirmed.clear();
        let all = self.listeners.keys().copied().map(Action::CloseListener);
        self.actions.extend(all);
        self.events.push_back(Event::Disconnect);
    }

    /// A frame of the master. Returns the listener that its descriptor, if it is one, belongs to.
    pub(crate) fn frame(
        &mut self,
        frame: ToWorker,
        connection: Option<C>,
        message: Option<Message>,
    ) -> Result<Option<ListenerId>, FrameError> {
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
            ToWorker::Connection { handle, number } => {
                let listener = self.by_handle(handle);
                match (listener, connection) {
                    (Some(listener), Some(connection)) => {
                        if let Some(entry) = self.listeners.get_mut(&listener) {
                            entry.credits = entry.credits.saturating_sub(1);
                            entry.pending.push_back((number, connection));
                            self.take(listener);
                        }
                    }
                    // Closed while it was under way: `Close` has told the master.
                    (None, _) => {}
                    (Some(listener), None) => self.connection_lost(listener, handle, number),
                }
            }
            ToWorker::End { handle, drain } => {
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
                let mut alone = Vec::new();
                for (listener, entry) in &mut self.listeners {
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
                    self.actions.push_back(Action::ShutDoor(listener));
                    self.end(listener);
                }
                self.ask_for_all();
                if self.killed {
                    self.close_channel();
                }
            }
            ToWorker::Message(_) => self.events.extend(message.map(Event::Message)),
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

    fn grant(&mut self, listener: ListenerId, credits: u32) {
        let spare = self.spare();
        // An idle listener must not keep another one from serving at all.
        let idle = self.open == 0 && self.unconfirmed.is_empty();
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if entry.policy != SchedulingPolicy::RoundRobin {
            return; // Nobody gives it anything.
        }
        let credits = match entry.stage {
            Stage::Open(_) if entry.served => {
                let nothing = idle && entry.credits == 0 && entry.pending.is_empty();
                credits.min(spare.max(u32::from(nothing)))
            }
            Stage::Open(_) => credits,
            Stage::Asked
            | Stage::Abandoned
            | Stage::Failed(_)
            | Stage::Ending(_)
            | Stage::Closed => 0,
        };
        entry.credits += credits;
        let taken = entry.taken;
        if credits > 0 || taken > 0 {
            if let Some(handle) = entry.handle() {
                self.send(ToMaster::Ready {
                    handle,
                    credits,
                    taken,
                });
            }
        }
    }

    fn is_coming(&self, listener: ListenerId) -> bool {
        self.unconfirmed.iter().any(|(id, _)| *id == listener)
    }

    /// Takes one that is pending if the program is there for it, and tells the master. If it wants
    /// no more, others get what is pending.
    fn take(&mut self, listener: ListenerId) {
        let coming = self.is_coming(listener);
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if let (true, Some(handle)) = (entry.is_full(u64::from(coming)), entry.handle()) {
            let pending = std::mem::take(&mut entry.pending);
            for (number, _) in pending {
                self.send(ToMaster::Refused { handle, number });
            }
            return;
        }
        let wanted = if entry.served {
            !entry.delivering
        } else {
            entry.wanted && entry.arrived.is_empty()
        };
        if !wanted || coming || self.closing {
            return;
        }
        let Some((number, connection)) = entry.pending.pop_front() else {
            return;
        };
        entry.taken = number;
        self.unconfirmed.push_back((listener, connection));
        let asks = entry.served && !self.resting;
        let credits = if asks { entry.room(1) } else { 0 };
        self.grant(listener, credits);
        self.end_if_empty(listener);
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
            entry.credits = 0;
        }
        self.end_if_empty(listener);
        self.accept_rest(listener);
    }

    /// Closes a listener that gets nothing more and holds nothing more.
    fn end_if_empty(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get(&listener) {
            let empty = entry.pending.is_empty();
            let round_robin = entry.policy == SchedulingPolicy::RoundRobin;
            if matches!(entry.stage, Stage::Ending(_)) && empty && round_robin {
                self.close(listener);
            }
        }
    }

    /// Lets the callback of a shared listener that is ending have what is left.
    pub(crate) fn accept_rest(&mut self, listener: ListenerId) {
        let shared = |entry: &Entry<C>| entry.served && entry.policy == SchedulingPolicy::Shared;
        if self.is_ending(listener) && self.listeners.get(&listener).is_some_and(shared) {
            self.events.push_back(Event::AcceptRest(listener));
        }
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
    use crate::endpoint::Place;
    use crate::frame::Bound;

    fn listener(core: &mut WorkerCore<u32>, handle: u32) -> ListenerId {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let endpoint = Endpoint::new(Kind::Tcp, Place::Ip(address));
        let listener = core.listen(endpoint, BindFlags::default());
        let result = Ok(Bound {
            handle: HandleId(handle),
            policy: SchedulingPolicy::RoundRobin,
            address: Some(address),
        });
        let reply = ToWorker::Reply {
            request: listener.0,
            result,
        };
        core.frame(reply, None, None).unwrap();
        core.serve(listener);
        listener
    }

    /// Plays the program and the master's part for the second of two listeners. Returns how many
    /// connections it is ready for after each.
    fn serve(core: &mut WorkerCore<u32>, number: u64) -> u32 {
        let handle = HandleId(2);
        let frame = ToWorker::Connection { handle, number };
        core.frame(frame, Some(0), None).unwrap();
        core.confirmed();
        while let Some(event) = core.next_event() {
            if let Event::Connection(listener, _) = event {
                core.delivered(listener);
                core.connection_closed(Some(listener));
            }
        }
        core.listeners[&ListenerId(2)].credits
    }

    #[test]
    fn an_idle_listener_does_not_starve_another_when_descriptors_run_out() {
        let mut core = WorkerCore::new();
        listener(&mut core, 1);
        listener(&mut core, 2);
        core.descriptors_run_out();
        for number in 1..100 {
            assert!(serve(&mut core, number) > 0, "after {number}");
        }
        core.descriptors_suffice();
        assert_eq!(serve(&mut core, 100), CALLBACK_WINDOW);
    }

    fn sent(core: &mut WorkerCore<u32>) -> Vec<ToMaster> {
        let actions = std::iter::from_fn(|| core.next_action());
        let frames = actions.filter_map(|action| match action {
            Action::Send(frame) => Some(frame),
            Action::CloseListener(_) | Action::ShutDoor(_) | Action::CloseChannel => None,
        });
        frames.collect()
    }

    #[test]
    fn a_connection_that_found_no_descriptor_is_for_others() {
        let mut core = WorkerCore::new();
        listener(&mut core, 1);
        sent(&mut core);
        let (handle, number) = (HandleId(1), 1);
        let lost = ToWorker::Connection { handle, number };
        core.frame(lost, None, None).unwrap();
        assert_eq!(sent(&mut core), [ToMaster::Refused { handle, number }]);
        let second = ToWorker::Connection { handle, number: 2 };
        core.frame(second, Some(7), None).unwrap();
        let taken = |credits, taken| ToMaster::Ready {
            handle,
            credits,
            taken,
        };
        assert_eq!(sent(&mut core), [taken(0, 2)], "and asks for nothing more");
        core.rested();
        assert_eq!(sent(&mut core), [taken(2, 2)]);
    }

    #[test]
    fn a_listener_that_found_no_descriptor_is_given_back() {
        let mut core = WorkerCore::<u32>::new();
        let place = Place::Path("/path".into());
        let listener = core.listen(Endpoint::new(Kind::Unix, place), BindFlags::default());
        sent(&mut core);
        let handle = HandleId(1);
        core.listener_lost(listener.0, handle).unwrap();
        assert_eq!(sent(&mut core), [ToMaster::Close { handle }]);
        let failed = Listen::Failed(errno::EMFILE);
        assert_eq!(core.listen_result(listener), failed);
    }

    #[test]
    fn a_limit_that_is_no_less_takes_nothing_back() {
        let revoked = |core: &mut WorkerCore<u32>| {
            let actions = std::iter::from_fn(|| core.next_action());
            let revokes = actions.filter(|a| matches!(a, Action::Send(ToMaster::Revoke { .. })));
            revokes.count()
        };
        let mut core = WorkerCore::new();
        let listener = listener(&mut core, 1);
        for (most, times) in [
            (None, 0),
            (Some(8), 0),
            (Some(3), 1),
            (Some(3), 0),
            (None, 0),
        ] {
            core.set_most(listener, most);
            assert_eq!(revoked(&mut core), times, "{most:?}");
        }
        assert_eq!(core.listeners[&listener].credits, CALLBACK_WINDOW);
    }

    #[test]
    fn what_is_not_handed_over_needs_no_credit() {
        let mut core = WorkerCore::new();
        let alone = core.listen_alone(Kind::Tcp);
        core.serve(alone);
        let listener = listener(&mut core, 2);
        for _ in 0..CALLBACK_WINDOW {
            core.connection_opened(listener);
        }
        core.descriptors_run_out();
        core.connection_closed(Some(listener));
        core.descriptors_suffice();
        assert_eq!(core.listeners[&alone].credits, 0);
        assert_eq!(core.listeners[&listener].credits, CALLBACK_WINDOW);
    }

    #[test]
    fn a_callback_gets_one_connection_at_a_time() {
        let mut core = WorkerCore::new();
        let listener = listener(&mut core, 1);
        let handle = HandleId(1);
        for number in 1..=3 {
            let frame = ToWorker::Connection { handle, number };
            core.frame(frame, Some(0), None).unwrap();
        }
        core.confirmed();
        assert!(matches!(core.next_event(), Some(Event::Connection(..))));
        // Whatever happens inside the callback, the second is not taken before it returns.
        core.serve(listener);
        core.confirmed();
        assert!(core.next_event().is_none());
        core.close(listener);
        let refused = std::iter::from_fn(|| core.next_action());
        let refused = refused.filter(|a| matches!(a, Action::Send(ToMaster::Refused { .. })));
        assert_eq!(refused.count(), 2);
    }
}

//! Represents listeners, queues, connections and clients as plain data.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;

use crate::core::dispatch::Sequenced;
use crate::core::master::{HandOff, Resumed};
use crate::types::endpoint::{BindAddress, Endpoint, Kind};
use crate::types::handle::HandleId;
use crate::types::time::Time;
use crate::types::user::User;
use crate::types::worker_id::WorkerId;

/// The number of connections that fit into a queue.
pub(crate) const QUEUE_CAPACITY: usize = 40;

/// A connection, which closes when its last descriptor is dropped.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The client's number.
    pub(crate) client: u32,
    closed: Rc<RefCell<Vec<u32>>>,
}

/// A descriptor of a client's connection.
pub(crate) type Client = Rc<Connection>;

impl Connection {
    /// Creates a connection. When the connection closes, the client's number is added to `closed`.
    pub(crate) fn new(client: u32, closed: &Rc<RefCell<Vec<u32>>>) -> Client {
        let closed = Rc::clone(closed);
        Rc::new(Self { client, closed })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.closed.borrow_mut().push(self.client);
    }
}

/// The outcome of a client's connection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Fate {
    /// The master's listener to which the client connected, or `None` for a private listener.
    pub(crate) port: Option<HandleId>,
    /// Whether a worker has received the client's connection.
    pub(crate) served: bool,
    /// The user of the worker that had the connection last.
    pub(crate) had_by: Option<User>,
    /// Whether only a worker has the connection, because it holds or has held the connection while
    /// the client was silent, or because the connection is on its way to a worker that will.
    pub(crate) is_in_worker: bool,
    /// Whether the client has ever sent a request.
    pub(crate) has_sent: bool,
    /// Whether the client has sent a request that no worker has read.
    pub(crate) is_pending: bool,
    /// Whether the client has hung up.
    pub(crate) left: bool,
    /// Whether the connection is closed on this side.
    pub(crate) is_closed: bool,
}

impl Fate {
    /// Makes the client send a request, unless the connection is closed.
    pub(crate) fn send_request(&mut self) {
        if !self.left && !self.is_closed {
            (self.has_sent, self.is_pending) = (true, true);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortState {
    /// Clients can connect.
    Open,
    /// No new connections arrive, because the socket has a SYN filter, its file is gone or it was
    /// shut down.
    Closing,
    /// The master has closed its descriptor. A shared listener stays open while a worker has a
    /// copy.
    Unbound,
}

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Port {
    endpoint: Endpoint,
    pub(crate) backlog: VecDeque<u32>,
    pub(crate) state: PortState,
    pub(crate) is_watched: bool,
}

impl Port {
    pub(crate) fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            backlog: VecDeque::new(),
            state: PortState::Open,
            is_watched: false,
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.endpoint.kind
    }

    /// Returns whether the listener prevents another listener from binding to `endpoint`.
    pub(crate) fn occupies(&self, endpoint: &Endpoint) -> bool {
        let has_address = match self.state {
            PortState::Open => true,
            PortState::Closing => self.kind() == Kind::Tcp,
            PortState::Unbound => false,
        };
        let is_fixed = !endpoint.is_any_port() && !endpoint.is_borrowed();
        has_address && is_fixed && self.endpoint == *endpoint
    }

    /// Returns whether clients can connect.
    pub(crate) fn is_open(&self) -> bool {
        self.state == PortState::Open && self.kind() != Kind::Udp
    }

    pub(crate) fn is_unbound(&self) -> bool {
        self.state == PortState::Unbound
    }

    /// Returns whether the master's poller reports the listener: the master watches it, and
    /// connections are in its backlog.
    pub(crate) fn is_ready(&self) -> bool {
        self.is_watched && !self.is_unbound() && !self.backlog.is_empty()
    }
}

/// A connection that the master holds.
#[derive(Debug)]
pub(crate) struct Held {
    /// The master's copy. `None` if the master could not keep the connection.
    pub(crate) copy: Option<Client>,
    /// Whether the master's poller reports the connection when the client sends something or hangs
    /// up. `false` after each report, because the poller reports a connection only once.
    pub(crate) is_awaited: bool,
    /// Whether the poller could not watch the connection.
    pub(crate) is_unwatched: bool,
    pub(crate) location: Location,
    /// The time at which the master began to wait for the client.
    pub(crate) since: Time,
}

impl Held {
    /// Returns the client's number. Returns `None` if the master could not keep the connection.
    pub(crate) fn client(&self) -> Option<u32> {
        Some(self.copy.as_ref()?.client)
    }
}

/// The location of a connection of which the master holds a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// Only the master has the connection.
    Master,
    /// The connection is in the worker's queue, or the worker has received it.
    Worker(WorkerId),
    /// The worker has reported that it keeps the connection or has closed it.
    Detached,
}

/// A connection in a worker's queue.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) sequence: u64,
    pub(crate) connection: Client,
    /// The connection's id, and the number of times that it has been parked, if the master holds a
    /// copy.
    pub(crate) resumed: Option<Resumed>,
}

impl Queued {
    /// Returns the connection in the form in which the master reclaims it.
    pub(crate) fn reclaim(self) -> Sequenced<HandOff<Client>> {
        let connection = match self.resumed {
            Some(resumed) => HandOff::Held(resumed),
            None => HandOff::New(self.connection),
        };
        Sequenced {
            sequence: self.sequence,
            connection,
        }
    }
}

/// The connections of one listener that are dispatched to one worker. The master keeps both ends of
/// the queue, and the worker has a copy of one end.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    pub(crate) connections: VecDeque<Queued>,
    /// The number of connections that the worker has received.
    pub(crate) received: u64,
    /// Whether the worker has shut its end down, so that nothing can be added to the queue.
    pub(crate) is_shut: bool,
}

/// Returns the endpoint for `number`. The endpoint's form depends on `number` modulo 8. The
/// endpoint's port, path or descriptor depends on `number` divided by 8.
pub(crate) fn endpoint(number: u32) -> Endpoint {
    let port = u16::try_from(number / 8).unwrap_or(u16::MAX);
    let ip = BindAddress::Ip(SocketAddr::from(([127, 0, 0, 1], port)));
    match number % 8 {
        0..=2 => Endpoint::new(Kind::Tcp, ip),
        3 => Endpoint::new(Kind::Tcp, BindAddress::Port(port)),
        4 => Endpoint::new(Kind::Unix, BindAddress::Path(format!("/{port}").into())),
        5 => Endpoint::new(Kind::Tcp, BindAddress::Fd(port.into())),
        6 => Endpoint::new(Kind::Unix, BindAddress::Fd(port.into())),
        _ => Endpoint::new(Kind::Udp, ip),
    }
}

//! Listeners, queues, connections and clients, as plain data.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;

use crate::core::dispatch::Sequenced;
use crate::types::endpoint::{Endpoint, Kind, Place};
use crate::wire::frame::HandleId;

/// The number of connections for which the kernel has space in a queue.
pub(crate) const QUEUE_CAPACITY: usize = 40;

/// All descriptors of one connection together. The connection closes with the last of them.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The number of the client.
    pub(crate) client: u32,
    closed: Rc<RefCell<Vec<u32>>>,
}

/// A descriptor of a connection.
pub(crate) type Client = Rc<Connection>;

impl Connection {
    /// When it closes, the number of the client is added to `closed`.
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

/// The fate of a client.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Fate {
    /// The master's listener to which it connected; `None` for a private listener.
    pub(crate) port: Option<HandleId>,
    /// A worker has received its connection.
    pub(crate) served: bool,
    /// It has hung up.
    pub(crate) left: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortState {
    Open,
    /// New connections are kept out, by a SYN filter or because the file is gone.
    Filtered,
    /// The master has closed its descriptor. A worker's copy keeps a shared listener open.
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

    /// Whether another listener cannot be bound to this endpoint.
    pub(crate) fn occupies(&self, endpoint: &Endpoint) -> bool {
        let has_address = match self.state {
            PortState::Open => true,
            PortState::Filtered => self.kind() == Kind::Tcp,
            PortState::Unbound => false,
        };
        let is_fixed = !endpoint.is_any_port() && !endpoint.is_borrowed();
        has_address && is_fixed && self.endpoint == *endpoint
    }

    /// Whether clients can connect.
    pub(crate) fn is_open(&self) -> bool {
        self.state == PortState::Open && self.kind() != Kind::Udp
    }

    pub(crate) fn is_unbound(&self) -> bool {
        self.state == PortState::Unbound
    }

    /// Whether the poller reports it.
    pub(crate) fn is_ready(&self) -> bool {
        self.is_watched && !self.is_unbound() && !self.backlog.is_empty()
    }
}

/// The connections that are dispatched to one worker. The master has both ends, the worker one.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    pub(crate) connections: VecDeque<Sequenced<Client>>,
    /// How many the worker has received.
    pub(crate) received: u64,
    /// The worker has shut its end down: nothing can be put in any more.
    pub(crate) is_shut: bool,
}

/// The endpoints that workers ask for: of all forms, many with small numbers.
pub(crate) fn endpoint(number: u32) -> Endpoint {
    let port = u16::try_from(number / 8).unwrap_or(u16::MAX);
    let ip = Place::Ip(SocketAddr::from(([127, 0, 0, 1], port)));
    match number % 8 {
        0..=2 => Endpoint::new(Kind::Tcp, ip),
        3 => Endpoint::new(Kind::Tcp, Place::Port(port)),
        4 => Endpoint::new(Kind::Unix, Place::Path(format!("/{port}").into())),
        5 => Endpoint::new(Kind::Tcp, Place::Fd(port.into())),
        6 => Endpoint::new(Kind::Unix, Place::Fd(port.into())),
        _ => Endpoint::new(Kind::Udp, ip),
    }
}

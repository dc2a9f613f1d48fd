//! The parts that the master's and the worker's tables of parked connections share.

use crate::types::connection_id::ConnectionId;
use crate::types::ordered_set::{Key, OrderedSet, low_number};
use crate::types::poll_number::POLL_NUMBER_MAX;
use crate::types::time::Time;

/// The maximum number of connections in one table.
pub(crate) const CONNECTIONS_MAX: usize = POLL_NUMBER_MAX as usize;

/// A table that assigns numbers to connections.
#[derive(Debug)]
pub(super) struct Slab<T> {
    /// The connection with the number `n` at the index `n`, or `None` for a free number.
    entries: Vec<Option<T>>,
    /// The free numbers below the length of `entries`.
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) const fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(super) fn get(&self, connection: ConnectionId) -> Option<&T> {
        self.entries.get(connection.0 as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, connection: ConnectionId) -> Option<&mut T> {
        self.entries.get_mut(connection.0 as usize)?.as_mut()
    }

    /// Adds a connection under a free number, and returns the number.
    pub(super) fn insert(&mut self, entry: T) -> Option<ConnectionId> {
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                self.entries.push(None);
                u32::try_from(self.entries.len() - 1).ok()?
            }
        };
        *self.entries.get_mut(number as usize)? = Some(entry);
        Some(ConnectionId(number))
    }

    pub(super) fn remove(&mut self, connection: ConnectionId) -> Option<T> {
        let entry = self.entries.get_mut(connection.0 as usize)?.take()?;
        self.free.push(connection.0);
        if self.len() == 0 {
            // Return the memory after a peak.
            *self = Self::new();
        }
        Some(entry)
    }

    /// Returns the connections for which `is_wanted` returns true, in the order of their numbers.
    pub(super) fn filter(&self, is_wanted: impl Fn(&T) -> bool) -> Vec<ConnectionId> {
        let used = self.entries.iter().zip(0..);
        let wanted = used.filter(|(entry, _)| entry.as_ref().is_some_and(&is_wanted));
        wanted.map(|(_, number)| ConnectionId(number)).collect()
    }
}

/// The time at which an idle connection expires, in whole seconds. The granularity of a second
/// lets one wake-up of the process close many connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Expiry {
    second: u32,
    /// Orders the connections that expire in the same second by the time at which they became idle.
    order: u32,
}

impl Expiry {
    /// Returns the time at which the connection is closed.
    pub(super) fn time(self) -> Time {
        Time::from_secs(u64::from(self.second))
    }
}

impl Key for (Expiry, ConnectionId) {
    fn pack(self) -> u128 {
        let (Expiry { second, order }, connection) = self;
        (u128::from(second) << 32 | u128::from(order)) << 32 | connection.pack()
    }

    fn unpack(packed: u128) -> Self {
        let (second, order) = (low_number(packed >> 64), low_number(packed >> 32));
        (Expiry { second, order }, ConnectionId::unpack(packed))
    }
}

/// The idle connections, in the order in which they expire.
#[derive(Debug)]
pub(super) struct Expiries {
    idle: OrderedSet<(Expiry, ConnectionId)>,
    last_order: u32,
}

impl Expiries {
    pub(super) const fn new() -> Self {
        Self {
            idle: OrderedSet::new(),
            last_order: 0,
        }
    }

    /// Returns the expiry of a connection that becomes idle now.
    pub(super) fn next_expiry(&mut self, now: Time, timeout: Time) -> Expiry {
        let at = now.saturating_add(timeout);
        let seconds = at.as_secs() + u64::from(at.subsec_nanos() > 0);
        self.last_order = self.last_order.wrapping_add(1);
        Expiry {
            second: u32::try_from(seconds).unwrap_or(u32::MAX),
            order: self.last_order,
        }
    }

    pub(super) fn insert(&mut self, expiry: Expiry, connection: ConnectionId) {
        self.idle.insert((expiry, connection));
    }

    pub(super) fn remove(&mut self, expiry: Expiry, connection: ConnectionId) {
        self.idle.remove((expiry, connection));
    }

    /// Returns the connection that expires first.
    pub(super) fn first(&self) -> Option<(Expiry, ConnectionId)> {
        self.idle.first()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = ConnectionId> + '_ {
        self.idle.iter().map(|(_, connection)| connection)
    }

    /// Returns the connections that expire by the time `now`.
    pub(super) fn due(&self, now: Time) -> impl Iterator<Item = ConnectionId> + '_ {
        let idle = self.idle.iter();
        let due = idle.take_while(move |(expiry, _)| expiry.time() <= now);
        due.map(|(_, connection)| connection)
    }

    pub(super) fn len(&self) -> usize {
        self.idle.len()
    }
}

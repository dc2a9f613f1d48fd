//! Finished connections whose clients may still be sending.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

use super::WorkerShell;
use super::parked::Origin;
use crate::core::worker::LINGER_TIMEOUT;
use crate::runtime::token::Token;
use crate::sys::poll::{Poller, Ready, ReadyList};
use crate::types::connection_id::ConnectionId;
use crate::worker::finish::{Discarded, discard};

/// Maximum number of reads, of 4 KiB each, from one connection in one iteration of the loop.
///
/// A larger number delays the worker's other clients while one sends fast: 64 reads take about
/// 0.1 ms (see `DISCARD_MAX`). A smaller number takes more iterations for a large request. No
/// benchmark chose this value.
const READS_MAX: u32 = 64;

/// A connection that this worker reads until its client closes it.
pub(super) struct Lingering {
    stream: Box<dyn AsFd>,
    /// The number of bytes that may still be discarded.
    bytes_left: Cell<usize>,
}

impl Lingering {
    /// Discards bytes that have arrived, and makes the poller report the next ones. Returns `false`
    /// if nothing more will be read: the client has closed the connection, the limit of bytes is
    /// reached, or an error has occurred.
    fn advance(&self, poller: &Poller, key: usize) -> bool {
        let stream = self.stream.as_fd();
        let mut bytes_left = self.bytes_left.get();
        let mut reads = (0..READS_MAX).map(|_| discard(stream, &mut bytes_left));
        let last = reads.find(|discarded| *discarded != Discarded::Bytes);
        self.bytes_left.set(bytes_left);
        last != Some(Discarded::Last) && poller.await_once(stream, key, true).is_ok()
    }
}

impl WorkerShell {
    /// Returns whether `linger` can wait for the end of a connection.
    pub(crate) fn can_linger(&self) -> bool {
        self.poller.is_own() && self.core.borrow().can_linger()
    }

    /// Reads from a connection that the application has finished, while the worker waits for
    /// something else, until the client closes it. The connection is no longer counted. At most
    /// `bytes_left` bytes are discarded.
    pub(crate) fn linger(&self, stream: Box<dyn AsFd>, origin: &Origin, bytes_left: usize) {
        self.connection_closed(origin.listener);
        self.detach(origin);
        let id = self.core.borrow_mut().linger(self.now());
        let Some(id) = id else {
            return self.poller.forget_dormant(stream.as_fd().as_raw_fd());
        };
        let was_awaited = origin.registration.is_some();
        if let Some(registration) = origin.registration {
            registration.stop_interrupts();
        }
        let key = Token::Parked(id.0).key();
        let awaited = self.poller.await_once(stream.as_fd(), key, was_awaited);
        if awaited.is_err() {
            self.core.borrow_mut().hung_up(id);
        }
        let bytes_left = Cell::new(bytes_left);
        let connection = Lingering { stream, bytes_left };
        self.lingering.borrow_mut().insert(id, connection);
        self.act();
    }

    /// Returns whether this worker reads from finished connections. The worker then waits with
    /// poll(2) instead of in accept(2). If arrivals on these connections interrupted accept(2),
    /// their clients could keep the worker from accepting.
    pub(crate) fn is_lingering(&self) -> bool {
        !self.lingering.borrow().is_empty()
    }

    /// Handles a lingering connection that the poller has reported.
    pub(crate) fn lingering_ready(&self, id: ConnectionId) {
        let all = self.lingering.borrow();
        let Some(connection) = all.get(id) else {
            return;
        };
        let (poller, key) = (&self.poller, Token::Parked(id.0).key());
        let is_awaited = connection.advance(poller, key);
        drop(all);
        if !is_awaited {
            self.core.borrow_mut().hung_up(id);
            self.act();
        }
    }

    pub(super) fn close_lingering(&self, id: ConnectionId) {
        let removed = self.lingering.borrow_mut().remove(id);
        if let Some(connection) = removed {
            // See `close_parked`.
            self.poller.delete(connection.stream.as_fd());
        }
    }

    /// Waits until the lingering connections have ended, for at most `LINGER_TIMEOUT`, or until the
    /// channel closes. The process may exit afterwards, which would reset the connections.
    pub(super) fn wait_for_lingering(&self) -> io::Result<()> {
        let deadline = self.now().saturating_add(LINGER_TIMEOUT);
        let mut all: Vec<_> = self.lingering.take().into_values().map(Some).collect();
        let mut open = all.len();
        if open == 0 {
            return Ok(());
        }
        // Use another poller, because the worker's poller also has the listeners, which no callback
        // serves any more.
        let poller = Poller::new()?;
        for (key, connection) in all.iter().flatten().enumerate() {
            poller.await_once(connection.stream.as_fd(), key, false)?;
        }
        let channel = all.len();
        self.await_channel(&poller, channel, false)?;
        let mut left = LINGER_TIMEOUT;
        while open > 0 && !left.is_zero() && self.core.borrow().is_connected() {
            let mut ready = ReadyList::new();
            poller.wait(Some(left), &mut ready)?;
            for Ready { key, .. } in ready.iter() {
                let Some(connection) = all.get_mut(*key) else {
                    self.receive();
                    self.await_channel(&poller, channel, true)?;
                    continue;
                };
                let has_ended = |own: &mut Lingering| !own.advance(&poller, *key);
                open -= usize::from(connection.take_if(has_ended).is_some());
            }
            left = deadline.saturating_sub(self.now());
        }
        Ok(())
    }

    fn await_channel(&self, poller: &Poller, key: usize, was_awaited: bool) -> io::Result<()> {
        let awaited = self
            .channel
            .with(|channel| poller.await_once(channel.as_fd(), key, was_awaited));
        awaited.unwrap_or(Ok(()))
    }
}

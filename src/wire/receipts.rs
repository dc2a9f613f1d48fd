//! Tracks whether the application's messages were written to the channel.

use std::cell::{Cell, RefCell};

use crate::error::{Error, Result, SendError};
use crate::types::number_map::NumberMap;
use crate::types::worker_id::WorkerId;

/// Identifies an application's message until the message is written or lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ReceiptId(u64);

impl ReceiptId {
    /// Returns an id that this thread has not used yet. Receipts never leave their thread.
    pub(crate) fn next() -> Self {
        thread_local! {
            static LAST: Cell<u64> = const { Cell::new(0) };
        }
        LAST.set(LAST.get() + 1);
        Self(LAST.get())
    }
}

/// The outcome of sending a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Receipt {
    pub(crate) id: ReceiptId,
    /// Whether the whole message was written. A message that was not written is lost.
    pub(crate) is_written: bool,
}

impl Receipt {
    /// Returns the result that the application sees. `worker` is the receiver, or `None` if the
    /// receiver is the master.
    pub(crate) fn outcome(self, worker: Option<WorkerId>) -> Result<()> {
        if self.is_written {
            return Ok(());
        }
        let reason = SendError::ChannelClosed;
        Err(Error::Send { worker, reason })
    }
}

/// The callbacks that wait for receipts, by the id of their receipt.
pub(crate) struct ReceiptCallbacks<F>(RefCell<NumberMap<F>>);

impl<F> ReceiptCallbacks<F> {
    /// Calls `send` with a new receipt id for `callback`, or with `None` if there is no callback.
    /// If `send` fails, drops the callback without calling it.
    pub(crate) fn send_with<T>(
        &self,
        callback: Option<F>,
        send: impl FnOnce(Option<ReceiptId>) -> Result<T>,
    ) -> Result<T> {
        let Some(callback) = callback else {
            return send(None);
        };
        let id = ReceiptId::next();
        self.0.borrow_mut().insert(id.0, callback);
        let sent = send(Some(id));
        if sent.is_err() {
            drop(self.take(id));
        }
        sent
    }

    /// Removes and returns the callback that waits for the receipt `id`.
    pub(crate) fn take(&self, id: ReceiptId) -> Option<F> {
        self.0.borrow_mut().remove(id.0)
    }

    /// Drops all callbacks without calling them.
    pub(crate) fn clear(&self) {
        drop(self.0.take());
    }
}

impl<F> Default for ReceiptCallbacks<F> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

impl<F> std::fmt::Debug for ReceiptCallbacks<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} receipts", self.0.borrow().len())
    }
}

//! Receipts: whether a message of the application was written to the channel.

use std::cell::{Cell, RefCell};

use crate::error::{Error, Result, SendError};
use crate::types::sorted_map::SortedMap;
use crate::types::worker_id::WorkerId;

/// Identifies a message of the application until it is written or lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ReceiptId(u64);

impl ReceiptId {
    /// Returns an id that this process has not used before.
    pub(crate) fn next() -> Self {
        thread_local! {
            static LAST: Cell<u64> = const { Cell::new(0) };
        }
        LAST.set(LAST.get() + 1);
        Self(LAST.get())
    }
}

/// States what became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Receipt {
    pub(crate) id: ReceiptId,
    /// The whole message was written; otherwise it is lost.
    pub(crate) is_written: bool,
}

impl Receipt {
    /// Returns the outcome for the application; `worker` is the receiver, `None` for the master.
    pub(crate) fn outcome(self, worker: Option<WorkerId>) -> Result<()> {
        if self.is_written {
            return Ok(());
        }
        let reason = SendError::ChannelClosed;
        Err(Error::Send { worker, reason })
    }
}

/// Callbacks of type `F`, each of which waits for the receipt of its message.
pub(crate) struct ReceiptCallbacks<F>(RefCell<SortedMap<ReceiptId, F>>);

impl<F> ReceiptCallbacks<F> {
    /// Calls `send` with the id of the receipt that `callback` waits for. If there is no callback, no
    /// receipt is needed. If `send` fails, the callback is dropped without a call.
    pub(crate) fn send_with<T>(
        &self,
        callback: Option<F>,
        send: impl FnOnce(Option<ReceiptId>) -> Result<T>,
    ) -> Result<T> {
        let Some(callback) = callback else {
            return send(None);
        };
        let id = ReceiptId::next();
        self.0.borrow_mut().insert(id, callback);
        let sent = send(Some(id));
        if sent.is_err() {
            drop(self.take(id));
        }
        sent
    }

    /// Removes the callback that waits for this receipt.
    pub(crate) fn take(&self, id: ReceiptId) -> Option<F> {
        self.0.borrow_mut().remove(&id)
    }

    /// Drops all callbacks.
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

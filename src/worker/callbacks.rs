//! The callbacks of a worker.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use crate::core::worker::ListenerId;
use crate::error::{Error, Result};
use crate::runtime::callback_methods::callback_methods;
use crate::runtime::callbacks::{CallbackId, Callbacks, Shared};
use crate::types::message::Message;
use crate::types::signal::Signal;
use crate::worker::connection::Connection;
use crate::worker::{Inner, Worker};

type OnMessage = dyn FnMut(&Worker, &Message);
type OnDisconnect = dyn FnMut(&Worker);
type OnError = dyn FnMut(&Worker, &Error);
pub(super) type OnConnection = dyn FnMut(&Worker, Connection<OwnedFd>);
pub(super) type OnDatagram = dyn FnMut(&Worker, &[u8], SocketAddr);

/// The callbacks of the worker, except those of its listeners and for signals.
#[derive(Debug, Default)]
pub(super) struct WorkerCallbacks {
    pub(super) message: Callbacks<OnMessage>,
    pub(super) disconnect: Callbacks<OnDisconnect>,
    pub(super) error: Callbacks<OnError>,
}

impl WorkerCallbacks {
    fn remove(&self, id: CallbackId) {
        self.message.remove(id);
        self.disconnect.remove(id);
        self.error.remove(id);
    }

    pub(super) fn clear(&self) {
        self.message.clear();
        self.disconnect.clear();
        self.error.clear();
    }
}

/// The callbacks of one listener or UDP socket.
#[derive(Default)]
pub(super) struct ListenerCallbacks {
    pub(super) connection: Option<Shared<OnConnection>>,
    /// For connections beyond the application's limit.
    pub(super) drop: Option<Shared<OnConnection>>,
    pub(super) datagram: Option<Shared<OnDatagram>>,
}

/// Callbacks. Each method adds one to those that are there, and returns its id for
/// [`remove_callback`](Worker::remove_callback).
impl Worker {
    callback_methods! {
        /// Calls back when a message from the master arrives. A message that arrives while there is no
        /// callback is dropped.
        ///
        /// Node: `process.on('message')` or `worker.on('message')`. See [`send`](Self::send) for an
        /// example.
        on_message, on_message_once(worker: &Self, message: &Message)
            of |this| this.inner.callbacks.message;

        /// Calls back when the channel to the master has closed. The callback is called in
        /// [`run`](Self::run), `dispatch` or `accept`; an application that returns from `main` before
        /// does not see the event.
        ///
        /// Node: `process.on('disconnect')` or `worker.on('disconnect')`. See
        /// [`is_connected`](Self::is_connected) for an example.
        on_disconnect, on_disconnect_once(worker: &Self) of |this| this.inner.callbacks.disconnect;

        /// Calls back for an error that no call of the application can return.
        ///
        /// Node: `process.on('error')`.
        ///
        /// ```no_run
        /// # fn f(worker: &cluster::Worker) {
        /// worker.on_error(|_, error| eprintln!("{error}"));
        /// # }
        /// ```
        on_error, on_error_once(worker: &Self, error: &Error) of |this| this.inner.callbacks.error;
    }

    /// Calls back when the process gets `signal`. The callback runs in the loop and not in a signal
    /// handler.
    ///
    /// Node: `process.on(signal)`. The signal loses its default effect until the worker is dropped; see
    /// [`Master::on_signal`](crate::Master::on_signal) for the rest. A terminal sends `INT` to the master
    /// and the workers alike, and some supervisors do so with `TERM`. A worker that should finish its work
    /// ignores these signals and lets the master react.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the signal cannot be handled, such as `KILL` and `STOP`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.on_signal(cluster::Signal::INT, |_, _| {})?;
    /// # Ok(()) }
    /// ```
    pub fn on_signal(
        &self,
        signal: Signal,
        callback: impl FnMut(&Self, Signal) + 'static,
    ) -> Result<CallbackId> {
        self.inner.event_loop.on_signal(signal, callback)
    }

    /// Calls back as [`on_signal`](Self::on_signal) does, but for the next signal only. The signal does
    /// not get its default effect back afterwards.
    ///
    /// Node: `once`.
    ///
    /// # Errors
    ///
    /// As [`on_signal`](Self::on_signal).
    #[doc(alias = "once")]
    pub fn on_signal_once(
        &self,
        signal: Signal,
        callback: impl FnOnce(&Self, Signal) + 'static,
    ) -> Result<CallbackId> {
        self.inner.event_loop.on_signal_once(signal, callback)
    }

    /// Removes a callback. Nothing happens if it has been removed already.
    ///
    /// Node: `worker.removeListener()`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// let id = worker.on_message(|_, _| {});
    /// worker.remove_callback(id);
    /// # }
    /// ```
    #[doc(alias = "off")]
    #[doc(alias = "removeListener")]
    pub fn remove_callback(&self, id: CallbackId) {
        self.inner.callbacks.remove(id);
        self.inner.event_loop.remove_signal_callback(id);
    }
}

/// The callbacks of listeners.
impl Inner {
    /// Passes the connections of a listener to a callback from now on.
    pub(super) fn serve(&self, listener: ListenerId, callback: Shared<OnConnection>) {
        self.set_callback(listener, |callbacks| callbacks.connection.replace(callback));
        self.shell.serve(listener);
        self.forget_callbacks(listener);
    }

    /// Leaves the connections of a listener to `accept` from now on.
    pub(super) fn remove_connection_callback(&self, listener: ListenerId) {
        self.set_callback(listener, |callbacks| callbacks.connection.take());
        self.stop_serving(listener);
    }

    /// Passes the datagrams of a socket to a callback from now on.
    pub(super) fn serve_datagrams(&self, listener: ListenerId, callback: Shared<OnDatagram>) {
        self.set_callback(listener, |callbacks| callbacks.datagram.replace(callback));
        self.shell.serve(listener);
        self.forget_callbacks(listener);
    }

    /// Leaves the datagrams of a socket to `recv_from` from now on.
    pub(super) fn remove_message_callback(&self, listener: ListenerId) {
        self.set_callback(listener, |callbacks| callbacks.datagram.take());
        self.stop_serving(listener);
    }

    fn stop_serving(&self, listener: ListenerId) {
        self.shell.core.borrow_mut().remove_callback(listener);
        self.shell.act();
        self.shell.update_watch(listener);
        self.forget_callbacks(listener);
    }

    /// Passes the connections beyond the application's limit to a callback from now on.
    pub(super) fn drop_excess(&self, listener: ListenerId, callback: Shared<OnConnection>) {
        self.set_callback(listener, |callbacks| callbacks.drop.replace(callback));
        self.shell.core.borrow_mut().drop_excess(listener);
        self.limit_changed(listener);
        self.forget_callbacks(listener);
    }

    /// Leaves the connections beyond the application's limit to other workers from now on.
    pub(super) fn remove_drop_callback(&self, listener: ListenerId) {
        self.set_callback(listener, |callbacks| callbacks.drop.take());
        self.shell.core.borrow_mut().keep_excess(listener);
        self.limit_changed(listener);
        self.forget_callbacks(listener);
    }

    /// Sets how many connections of a listener the application wants at most.
    pub(super) fn set_connection_limit(&self, listener: ListenerId, limit: Option<u64>) {
        self.shell
            .core
            .borrow_mut()
            .set_connection_limit(listener, limit);
        self.limit_changed(listener);
    }

    fn limit_changed(&self, listener: ListenerId) {
        self.shell.act();
        self.shell.update_watch(listener);
    }

    fn set_callback<T>(
        &self,
        listener: ListenerId,
        set: impl FnOnce(&mut ListenerCallbacks) -> Option<T>,
    ) {
        let mut all = self.listener_callbacks.borrow_mut();
        let replaced = set(all.get_or_insert_with(listener, ListenerCallbacks::default));
        // Dropping a closure may run code of the application that calls this method again.
        drop(all);
        drop(replaced);
    }

    /// Drops the callbacks of a listener that has been closed.
    pub(super) fn forget_callbacks(&self, listener: ListenerId) {
        let core = self.shell.core.borrow();
        if !core.is_known(listener) {
            drop(core);
            let callbacks = self.listener_callbacks.borrow_mut().remove(&listener);
            drop(callbacks);
        }
    }
}

//! The callbacks of a worker.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use crate::core::worker::ListenerId;
use crate::error::{Error, Result};
use crate::runtime::callback_methods::callback_methods;
use crate::runtime::callbacks::{CallbackId, Callbacks, Shared};
use crate::types::signal::Signal;
use crate::wire::message::Message;
use crate::worker::connection::Connection;
use crate::worker::{Inner, Worker};

type OnMessage = dyn FnMut(&Worker, &Message);
type OnDisconnect = dyn FnMut(&Worker);
type OnError = dyn FnMut(&Worker, &Error);
pub(super) type OnConnection = dyn FnMut(&Worker, Connection<OwnedFd>);
pub(super) type OnDatagram = dyn FnMut(&Worker, &[u8], SocketAddr);

/// The worker's callbacks, except those for its listeners and for signals.
#[derive(Debug, Default)]
pub(super) struct WorkerCallbacks {
    pub(super) message: Callbacks<OnMessage>,
    pub(super) disconnecting: Callbacks<OnDisconnect>,
    pub(super) disconnect: Callbacks<OnDisconnect>,
    pub(super) error: Callbacks<OnError>,
}

impl WorkerCallbacks {
    fn remove(&self, id: CallbackId) {
        self.message.remove(id);
        self.disconnecting.remove(id);
        self.disconnect.remove(id);
        self.error.remove(id);
    }

    pub(super) fn clear(&self) {
        self.message.clear();
        self.disconnecting.clear();
        self.disconnect.clear();
        self.error.clear();
    }
}

/// The callbacks of one listener or UDP socket.
#[derive(Default)]
pub(super) struct ListenerCallbacks {
    pub(super) connection: Option<Shared<OnConnection>>,
    /// The callback for connections beyond the application's limit.
    pub(super) drop: Option<Shared<OnConnection>>,
    pub(super) datagram: Option<Shared<OnDatagram>>,
    /// Passes connections or datagrams to their callback when the socket is ready. The linker
    /// removes this function from programs without such callbacks, because nothing else refers to
    /// it.
    pub(super) ready: Option<fn(&Worker, ListenerId)>,
}

/// The methods that add and remove callbacks.
///
/// Each `on_…` method adds a callback to the existing ones, and returns the id of the callback for
/// [`remove_callback`](Worker::remove_callback).
impl Worker {
    callback_methods! {
        /// Calls `callback` when a message from the master arrives. A message is dropped if it
        /// arrives while there is no callback.
        ///
        /// Node: `process.on('message')` or `worker.on('message')`.
        ///
        /// See [`send`](Self::send) for an example.
        on_message, on_message_once(worker: &Self, message: &Message)
            of |this| this.inner.callbacks.message;

        /// Calls `callback` once, when the worker begins to disconnect. This is when the master has
        /// requested a disconnect, the worker has called [`disconnect`](Self::disconnect) or
        /// [`kill`](Self::kill), or the channel closes for another reason. The worker still has its
        /// connections.
        ///
        /// Node has no counterpart. The example in Node's documentation of `worker.disconnect()`
        /// sends a message `shutdown` for this purpose.
        ///
        /// The callback runs in [`run`](Self::run), `dispatch`, `accept` or `recv_from`, before the
        /// callbacks of [`on_disconnect`](Self::on_disconnect). While the application does
        /// something else, [`is_disconnecting`](Self::is_disconnecting) already returns `true`.
        ///
        /// ```no_run
        /// # fn f(worker: &cluster::Worker) {
        /// use std::{cell::RefCell, io::Write, rc::Rc};
        ///
        /// let chats: Rc<RefCell<Vec<cluster::Connection>>> = Rc::default();
        /// let open = Rc::clone(&chats);
        /// worker.on_disconnecting(move |_| {
        ///     for mut chat in open.take() {
        ///         let _ = chat.write_all(b"server restarts, please connect again\n");
        ///     }
        /// });
        /// # }
        /// ```
        on_disconnecting, on_disconnecting_once(worker: &Self)
            of |this| this.inner.callbacks.disconnecting;

        /// Calls `callback` when the channel to the master has closed.
        ///
        /// Node: `process.on('disconnect')` or `worker.on('disconnect')`.
        ///
        /// The callback runs in [`run`](Self::run), `dispatch`, `accept` or `recv_from`. An
        /// application that returns from `main` before such a call does not receive the event. See
        /// [`is_connected`](Self::is_connected) for an example.
        on_disconnect, on_disconnect_once(worker: &Self) of |this| this.inner.callbacks.disconnect;

        /// Calls `callback` for an error that no call of the application can return.
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

    /// Calls `callback` when the process receives `signal`. The callback runs in the loop, not in a
    /// signal handler.
    ///
    /// Node: `process.on(signal)`.
    ///
    /// The signal loses its default action until the worker is dropped. A terminal sends `INT` to
    /// both the master and its workers, and some supervisors send `TERM` to all of them. A worker
    /// that should finish its work handles these signals with an empty callback, and lets the
    /// master react. See [`Master::on_signal`](crate::Master::on_signal) for other handlers,
    /// repeated, ignored and blocked signals, and the signals of a terminal.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Io`] if the signal cannot be handled, for instance `KILL` or `STOP`.
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

    /// Calls `callback` once, when the process next receives `signal`. As with
    /// [`on_signal`](Self::on_signal), the signal loses its default action until the worker is
    /// dropped.
    ///
    /// Node: `once`.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`on_signal`](Self::on_signal).
    #[doc(alias = "once")]
    pub fn on_signal_once(
        &self,
        signal: Signal,
        callback: impl FnOnce(&Self, Signal) + 'static,
    ) -> Result<CallbackId> {
        self.inner.event_loop.on_signal_once(signal, callback)
    }

    /// Removes a callback that was added for an event of the worker or for a signal.
    ///
    /// Node: `worker.removeListener()`.
    ///
    /// Nothing happens if the callback has already been removed.
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

// Callbacks of listeners and UDP sockets.
impl Inner {
    /// Passes a listener's connections to `callback` from now on.
    pub(super) fn serve(&self, listener: ListenerId, callback: Shared<OnConnection>) {
        self.set_callback(listener, |callbacks| {
            callbacks.ready = Some(Worker::accept_all);
            callbacks.connection.replace(callback)
        });
        self.shell.serve(listener);
        self.forget_callbacks(listener);
    }

    /// Leaves a listener's connections to `accept` from now on.
    pub(super) fn remove_connection_callback(&self, listener: ListenerId) {
        self.set_callback(listener, |callbacks| callbacks.connection.take());
        self.stop_serving(listener);
    }

    /// Passes a socket's datagrams to `callback` from now on.
    pub(super) fn serve_datagrams(&self, listener: ListenerId, callback: Shared<OnDatagram>) {
        self.set_callback(listener, |callbacks| {
            callbacks.ready = Some(Worker::receive_datagrams);
            callbacks.datagram.replace(callback)
        });
        self.shell.serve(listener);
        self.forget_callbacks(listener);
    }

    /// Leaves a socket's datagrams to `recv_from` from now on.
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

    /// Passes the connections beyond the application's limit to `callback` from now on.
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

    /// Sets the maximum number of a listener's connections that the application has at a time.
    /// `None` means no limit.
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
        // Drop the closure only after the borrow has ended, because its `Drop` may run code of the
        // application that calls this method again.
        drop(all);
        drop(replaced);
    }

    /// Drops a listener's callbacks if the listener has ended.
    pub(super) fn forget_callbacks(&self, listener: ListenerId) {
        let core = self.shell.core.borrow();
        if core.has_ended(listener) {
            drop(core);
            let callbacks = self.listener_callbacks.borrow_mut().remove(&listener);
            drop(callbacks);
        }
    }
}

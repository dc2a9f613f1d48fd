//! The worker's loop: timers, the application's descriptors, and one iteration of the loop.

use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::time::Duration;

use crate::core::worker::{Event, ListenerId};
use crate::error::{Error, Result, WatchError};
use crate::runtime::event_loop::{LoopId, WatchId};
use crate::runtime::timers::TimerId;
use crate::runtime::token::Token;
use crate::sys::poll::{Interest, Ready, ReadyList};
use crate::types::time::earlier;
use crate::wire::message::Message;
use crate::worker::Worker;
use crate::worker::connection::Connection;
use crate::worker::shell::Accepted;

/// Maximum number of one listener's connections or datagrams that are delivered in one iteration.
///
/// A higher limit would delay the other listeners, messages and timers. With a lower limit, a busy
/// listener needs more iterations.
const ACCEPT_BATCH: u32 = 16;
/// Time for which a listener or UDP socket is not watched after accepting or receiving has failed,
/// for instance for lack of descriptors.
///
/// The socket stays readable, so the loop would spin without the pause. A longer pause would delay
/// connections and datagrams after a brief lack of resources.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

// Timers, watches, and waiting.
impl Worker {
    /// Calls `callback` once, when the time `after` has passed.
    ///
    /// Node: `setTimeout`.
    ///
    /// See [`Master::set_timeout`](crate::Master::set_timeout) for an example.
    #[doc(alias = "setTimeout")]
    pub fn set_timeout(&self, after: Duration, callback: impl FnOnce(&Self) + 'static) -> TimerId {
        self.inner.event_loop.set_timeout(after, callback)
    }

    /// Calls `callback` repeatedly, each time when the interval `every` has passed. The interval is
    /// at least 1 ms.
    ///
    /// Node: `setInterval`.
    ///
    /// If the loop is so late that several calls are due, `callback` is called only once for them.
    /// See [`Master::set_interval`](crate::Master::set_interval) for an example.
    #[doc(alias = "setInterval")]
    pub fn set_interval(&self, every: Duration, callback: impl FnMut(&Self) + 'static) -> TimerId {
        self.inner.event_loop.set_interval(every, callback)
    }

    /// Cancels a timer.
    ///
    /// Node: `clearTimeout` and `clearInterval`.
    ///
    /// Nothing happens if the timer has already ended. See
    /// [`Master::clear_timer`](crate::Master::clear_timer) for an example.
    #[doc(alias = "clearTimeout")]
    #[doc(alias = "clearInterval")]
    pub fn clear_timer(&self, timer: TimerId) {
        self.inner.event_loop.clear_timer(timer);
    }

    /// Watches a descriptor in the worker's loop. `callback` is called whenever `source` is ready
    /// for `interest`.
    ///
    /// Node has no counterpart: in Node, every socket is in the loop.
    ///
    /// The callback returns the next interest, or `None` to end the watch and drop the source. If
    /// the source is still ready when the callback returns, the loop calls the callback again in
    /// its next iteration.
    ///
    /// # Errors
    ///
    /// Returns a [`WatchError`] if the descriptor is of a kind that cannot be waited for, such as a
    /// regular file. The error contains the source and an [`Error::Io`]. The operator `?` converts
    /// it into an [`Error`] and drops the source.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker, connection: cluster::Connection) -> cluster::Result<()> {
    /// use std::io::{Read, Write};
    /// use cluster::Interest;
    ///
    /// worker.watch(connection, Interest::Readable, |_, mut connection| {
    ///     let mut buffer = [0; 1024];
    ///     let length = connection.read(&mut buffer).ok().filter(|length| *length > 0)?;
    ///     connection.write_all(&buffer[..length]).ok()?;
    ///     Some(Interest::Readable)
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn watch<S: AsFd + 'static>(
        &self,
        source: S,
        interest: Interest,
        callback: impl FnMut(&Self, &S) -> Option<Interest> + 'static,
    ) -> std::result::Result<WatchId, WatchError<S>> {
        self.inner.event_loop.watch(source, interest, callback)
    }

    /// Ends a watch and drops its source.
    ///
    /// Node has no counterpart.
    ///
    /// Nothing happens if the watch has already ended.
    pub fn unwatch(&self, watch: WatchId) {
        self.inner.event_loop.unwatch(watch);
    }

    /// Lets [`run`](Self::run) return although this timer or watch exists.
    ///
    /// Node: `timer.unref()` and `socket.unref()`.
    ///
    /// Nothing happens if the timer or watch has already ended. See
    /// [`Master::unreference`](crate::Master::unreference) for an example.
    #[doc(alias = "unref")]
    pub fn unreference(&self, id: impl Into<LoopId>) {
        self.inner.event_loop.set_referenced(id.into(), false);
    }

    /// Undoes [`unreference`](Self::unreference).
    ///
    /// Node: `timer.ref()` and `socket.ref()`.
    ///
    /// See [`Master::unreference`](crate::Master::unreference) for an example of the opposite call.
    #[doc(alias = "ref")]
    pub fn reference(&self, id: impl Into<LoopId>) {
        self.inner.event_loop.set_referenced(id.into(), true);
    }

    /// Runs the loop until the worker has disconnected and no connection, timer or watch is left.
    /// The loop does not wait for timers, watches and listeners that were released with
    /// `unreference`.
    ///
    /// Node: a worker runs until it has nothing left to wait for.
    ///
    /// If the channel closes without a disconnect request, for instance because the master has
    /// exited, `run` returns at once. When `run` returns, the channel is closed, so no message can
    /// be sent any more, unless [`OwnProcess::unreference`](crate::OwnProcess::unreference) has let
    /// `run` return earlier. Send the last message in a callback, for example in reply to another
    /// message, or use the worker in the blocking way (see [`Worker`]).
    ///
    /// # Errors
    ///
    /// Returns:
    ///
    /// - [`Error::AlreadyRunning`] if a callback calls this method;
    /// - [`Error::ForeignProcess`] in a process that did not create this value, such as a forked
    ///   child;
    /// - [`Error::Io`] if waiting fails.
    ///
    /// See [`send`](Self::send) for an example.
    pub fn run(&self) -> Result<()> {
        drop(self.inner.event_loop.enter()?);
        loop {
            let core = self.inner.shell.core.borrow();
            let events = core.has_events() || self.inner.shell.has_notifications();
            let busy = self.inner.event_loop.has_work() || self.inner.shell.is_writing();
            let idle = core.is_finished() && !busy && !events;
            let must_exit = core.must_exit() && !events;
            drop(core);
            if idle || must_exit {
                return Ok(());
            }
            self.dispatch(None)?;
        }
    }

    /// Runs one iteration of the loop. The call waits until something happens or `timeout` has
    /// passed, and then calls the callbacks.
    ///
    /// Node has no counterpart.
    ///
    /// With a timeout of `None`, the call waits without a limit; with a timeout of zero, it does
    /// not wait.
    ///
    /// Use this method in an application that runs its own event loop. The application should exit
    /// when [`is_connected`](Self::is_connected) returns `false`. See
    /// [`Master::dispatch`](crate::Master::dispatch) for an example.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`run`](Self::run).
    pub fn dispatch(&self, timeout: Option<Duration>) -> Result<()> {
        drop(self.inner.event_loop.enter()?);
        self.inner.shell.watch_channel(true)?;
        self.inner.shell.core.borrow_mut().waiting_for_events();
        self.iterate(timeout)?;
        // Close the listeners without a callback if a disconnect request arrived in this iteration.
        // An application with its own event loop may call `dispatch` again only after another
        // event, so the listeners could otherwise stay open forever.
        self.inner.shell.core.borrow_mut().close_unused_listeners();
        self.inner.shell.act();
        Ok(())
    }

    /// Returns how long the application may wait before it calls [`dispatch`](Self::dispatch) if
    /// the descriptor of [`AsFd`] does not become readable earlier.
    ///
    /// Node has no counterpart.
    ///
    /// `None` means that the application may wait without a limit. Zero means that events are
    /// pending or timers are due. See [`Master::time_left`](crate::Master::time_left) for an
    /// example.
    #[must_use]
    pub fn time_left(&self) -> Option<Duration> {
        let shell = &self.inner.shell;
        let core = shell.core.borrow();
        let is_deferring = !self.inner.deferred.borrow().is_empty();
        if is_deferring || core.has_events() || core.is_drained() || shell.has_notifications() {
            return Some(Duration::ZERO);
        }
        self.inner.event_loop.time_left(shell.deadline())
    }
}

/// Gives access to a descriptor that becomes readable when a socket or a signal needs a call of
/// [`dispatch`](Worker::dispatch). Timers and pending events do not make the descriptor readable.
/// See [`time_left`](Worker::time_left) for them.
impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // Ignore the error, because `watch_channel` fails only if the poller is unusable. The next
        // call of `dispatch` then reports the error.
        let _ = self.inner.shell.watch_channel(true);
        self.inner.event_loop.as_fd()
    }
}

impl Worker {
    /// Runs one iteration of the loop.
    pub(super) fn iterate(&self, timeout: Option<Duration>) -> Result<()> {
        let event_loop = &self.inner.event_loop;
        let _running = event_loop.enter()?;
        self.count_dropped_guards();
        self.inner.shell.act();
        // Compute the limit before events are delivered. If an event is pending, the limit is zero,
        // so the iteration does not wait after the delivery. A limit from after the delivery could
        // be `None`, and the poller would wait although the caller may now have something to do.
        let limit = self.time_left();
        self.serve_deferred();
        // Settle only if there is a limit, because `None` means that no event is pending.
        if limit.is_some() {
            self.settle();
        }
        let mut list = ReadyList::new();
        let ready = event_loop.wait(earlier(limit, timeout), &mut list)?;
        self.inner.shell.tick();
        for (token, ready) in ready {
            // A callback may have forked a child and returned in it. Such a child must not continue
            // the loop.
            event_loop.check_own()?;
            match token {
                Token::Channel(_) => self.channel_ready(ready),
                Token::Listener(number) => self.listener_ready(ListenerId(number)),
                Token::Watch(number) => event_loop.watch_ready(self, number),
                Token::Signals => {
                    let signals = event_loop.take_signals();
                    self.count_dropped_guards();
                    for signal in signals {
                        event_loop.call_signal(self, signal);
                    }
                }
                Token::Parked(number) => {
                    if let Some(listener) = self.inner.shell.parked_ready(number) {
                        self.deliver_resumed(listener);
                    }
                }
                Token::Process(_) | Token::Selector(_) | Token::Log(_) | Token::Successor => {}
            }
            self.settle();
        }
        if list.is_full() {
            self.inner.wait_state.poller_reported(true);
        }
        event_loop.fire_timers(self, || self.settle());
        Ok(())
    }

    fn channel_ready(&self, ready: &Ready) {
        if ready.writable {
            self.inner.shell.flush_channel();
        }
        if ready.readable {
            self.inner.shell.receive();
        }
    }

    /// Carries out the core's decisions and delivers events until none is left.
    fn settle(&self) {
        while self.inner.event_loop.check_own().is_ok() {
            self.inner.shell.act();
            self.deliver_notifications();
            let event = self.inner.shell.core.borrow_mut().next_event();
            match event {
                None => break,
                Some(Event::Message { bytes, fds }) => {
                    let message = Message::new(bytes, fds);
                    self.inner.callbacks.message.each(|f| f(self, &message));
                }
                Some(Event::ListenerReady(listener)) => {
                    self.inner.shell.update_watch(listener);
                    self.call_ready(listener);
                }
                Some(Event::Disconnecting) => self.inner.callbacks.disconnecting.each(|f| f(self)),
                Some(Event::Disconnect) => self.inner.callbacks.disconnect.each(|f| f(self)),
            }
        }
    }

    /// Delivers the errors and receipts that are currently pending, but not those that arise in the
    /// meantime. The method removes these notifications one by one, so that the remaining ones stay
    /// pending if a callback panics.
    fn deliver_notifications(&self) {
        let shell = &self.inner.shell;
        let (errors, receipts) = (shell.count_errors(), shell.count_receipts());
        for error in std::iter::from_fn(|| shell.next_error()).take(errors) {
            self.inner.callbacks.error.each(|f| f(self, &error));
        }
        for receipt in std::iter::from_fn(|| shell.next_receipt()).take(receipts) {
            if let Some(callback) = self.inner.receipts.take(receipt.id) {
                callback(self, receipt.outcome(None));
            }
        }
    }

    /// Passes a connection to the connection callback, or to the drop callback if the connection
    /// exceeds the application's limit.
    pub(super) fn deliver(&self, listener: ListenerId, accepted: Accepted) {
        self.inner.shell.fault("worker.after_receive");
        let Accepted {
            fd,
            origin,
            is_excess,
        } = accepted;
        let connection = Connection::new(fd, &self.inner, origin);
        let all = self.inner.listener_callbacks.borrow();
        let callback = all.get(&listener).and_then(|callbacks| {
            let callback = if is_excess {
                &callbacks.drop
            } else {
                &callbacks.connection
            };
            callback.as_ref().map(Rc::clone)
        });
        drop(all);
        if let Some(callback) = callback {
            if let Ok(mut callback) = callback.try_borrow_mut() {
                callback(self, connection);
            }
        }
    }

    fn listener_ready(&self, listener: ListenerId) {
        // Check the watch, because a callback of this iteration may have ended the watch after the
        // poller reported the listener.
        let socket = self.inner.shell.socket(listener);
        if socket.is_some_and(|socket| !socket.is_watched()) {
            return;
        }
        self.call_ready(listener);
    }

    /// Lets a listener or UDP socket with a callback pass what has arrived to the callback.
    fn call_ready(&self, listener: ListenerId) {
        let all = self.inner.listener_callbacks.borrow();
        let ready = all.get(&listener).and_then(|callbacks| callbacks.ready);
        drop(all);
        if let Some(ready) = ready {
            ready(self, listener);
        }
    }

    /// Passes the next parked connection whose client has sent something to the callback, if there
    /// is one and the listener is not paused.
    fn deliver_resumed(&self, listener: ListenerId) {
        if self.inner.has_callback(listener) {
            if let Some(resumed) = self.inner.shell.resume(listener) {
                self.deliver(listener, resumed);
            }
        }
    }

    /// Lets the listeners accept that had a full batch in the previous iteration.
    fn serve_deferred(&self) {
        let deferred = &self.inner.deferred;
        let count = deferred.borrow().len();
        for _ in 0..count {
            // Remove the listeners one by one, so that the remaining ones stay in the list if a
            // callback panics.
            let listener = deferred.borrow_mut().remove(0);
            self.call_ready(listener);
        }
    }

    /// Accepts up to `ACCEPT_BATCH` waiting connections of a listener with a callback. Parked
    /// connections whose clients have sent something count too. Does nothing if the listener has had
    /// a full batch in this iteration, because timers, signals and messages would otherwise wait as
    /// long as clients keep coming.
    pub(super) fn accept_all(&self, listener: ListenerId) {
        let shell = &self.inner.shell;
        if self.inner.deferred.borrow().contains(&listener) {
            return;
        }
        for _ in 0..ACCEPT_BATCH {
            // Check each time, because a callback may have removed itself.
            if !self.inner.has_callback(listener) {
                return;
            }
            if shell.core.borrow().is_paused(listener) {
                return shell.watch(listener, false);
            }
            match shell.try_next(listener) {
                Ok(Some(accepted)) => self.deliver(listener, accepted),
                Ok(None) => return,
                Err(error) => return self.back_off(listener, error),
            }
        }
        // The batch may have emptied the listener or queue, which the poller then does not report
        // again. Make another attempt in the next iteration. If that attempt finds no connection, it
        // closes a draining listener, or reports to the master that the queue is empty.
        self.inner.deferred.borrow_mut().push(listener);
    }

    /// Receives up to `ACCEPT_BATCH` datagrams. If a callback closes the socket or removes itself,
    /// other workers receive the remaining datagrams.
    pub(super) fn receive_datagrams(&self, listener: ListenerId) {
        for _ in 0..ACCEPT_BATCH {
            let all = self.inner.listener_callbacks.borrow();
            let callback = all.get(&listener).and_then(|c| c.datagram.as_ref());
            let callback = callback.map(Rc::clone);
            drop(all);
            let Some(callback) = callback else {
                return;
            };
            match self.inner.shell.try_receive_vec(listener) {
                Ok(Some((bytes, from))) => {
                    if let Ok(mut callback) = callback.try_borrow_mut() {
                        callback(self, &bytes, from);
                    }
                }
                Ok(None) => return,
                Err(error) => return self.back_off(listener, error),
            }
        }
    }

    /// Reports an error and stops watching the listener for `ACCEPT_RETRY`. The listener stays
    /// readable after the error, so the loop would otherwise spin.
    fn back_off(&self, listener: ListenerId, error: Error) {
        let shell = &self.inner.shell;
        shell.report(error);
        shell.watch(listener, false);
        let retry = move |worker: &Self| {
            worker.inner.shell.update_watch(listener);
            // Try at once, because a draining listener may have no connection left that would make
            // it readable.
            worker.listener_ready(listener);
        };
        let timer = self.inner.event_loop.set_timeout(ACCEPT_RETRY, retry);
        self.inner.event_loop.set_referenced(timer.into(), false);
    }
}

//! How a worker's loop turns: for a program that lives in it, or one that waits for a connection.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::core::worker::{Event, ListenerId};
use crate::error::{Error, Result};
use crate::runtime::event_loop::Token;
use crate::sys::poll::ReadyList;
use crate::types::message::Message;
use crate::types::time::earlier;
use crate::worker::listener::Connection;
use crate::worker::shell::Accepted;
use crate::worker::{Inner, Worker};

/// How many connections one listener gets in a turn.
const ACCEPT_BATCH: u32 = 16;
/// How long a program that waits in `accept` may have one connection after the other before the
/// rest is looked at: messages, timers, signals.
const WAIT_EVERY: Duration = Duration::from_millis(1);
/// How long a worker waits at first for the master to make a listener listen again that another process
/// has shut down: the master needs microseconds. The time doubles with each attempt.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// Instead of a pause that is as long as this, accepting fails: the master cannot do it. The pauses before
/// add up to a second.
const LAST_PAUSE: Duration = Duration::from_millis(1024);
/// How long a shared listener rests when accepting failed, for instance without descriptors left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

impl Worker {
    /// Turns the loop once.
    pub(super) fn turn(&self, timeout: Option<Duration>) -> Result<()> {
        let event_loop = &self.inner.event_loop;
        let _running = event_loop.enter()?;
        self.inner.shell.act();
        // Before anything is delivered: after the last event nothing wakes the poller any more.
        let limit = self.time_left();
        // Without a limit nothing was left to tell.
        if limit.is_some() {
            self.settle();
        }
        let mut ready = ReadyList::new();
        let ready = event_loop.wait(earlier(limit, timeout), &mut ready)?;
        self.inner.shell.tick();
        for (token, ready) in ready {
            // A callback may return in a child that it has forked.
            event_loop.check_own()?;
            match token {
                Token::Channel(_) => {
                    if ready.writable {
                        self.inner.shell.flush_channel();
                    }
                    if ready.readable {
                        self.inner.shell.receive();
                    }
                }
                Token::Listener(number) => self.listener_ready(ListenerId(number)),
                Token::Watch(number) => event_loop.watch_ready(self, number),
                Token::Signals => {
                    for signal in event_loop.take_signals() {
                        event_loop.call_signal(self, signal);
                    }
                }
                Token::Process(_) | Token::Selector(_) => {}
            }
            self.settle();
        }
        event_loop.fire_timers(self, || self.settle());
        Ok(())
    }

    /// Carries out what the core decided and calls the program, until nothing is left to do.
    fn settle(&self) {
        while self.inner.event_loop.check_own().is_ok() {
            self.inner.shell.act();
            self.tell_news();
            let event = self.inner.shell.core.borrow_mut().next_event();
            match event {
                None => break,
                Some(Event::Message { bytes, fds }) => {
                    let message = Message::new(bytes, fds);
                    self.inner.on_message.each(|f| f(self, &message));
                }
                Some(Event::ListenerReady(listener)) => {
                    self.inner.shell.update_watch(listener);
                    self.accept_all(listener);
                }
                Some(Event::Disconnect) => self.inner.on_disconnect.each(|f| f(self)),
            }
        }
    }

    /// Tells what there is now, and not what comes of that. One by one: whoever panics here and goes
    /// on gets the rest later.
    fn tell_news(&self) {
        let shell = &self.inner.shell;
        let (errors, receipts) = (shell.count_errors(), shell.count_receipts());
        for error in std::iter::from_fn(|| shell.next_error()).take(errors) {
            self.inner.on_error.each(|f| f(self, &error));
        }
        for receipt in std::iter::from_fn(|| shell.next_receipt()).take(receipts) {
            if let Some(callback) = self.inner.receipts.take(receipt.id) {
                callback(self, receipt.outcome(None));
            }
        }
    }

    /// Gives a connection to the callback for it, or for those that are one too many.
    fn deliver(&self, listener: ListenerId, fd: OwnedFd, is_excess: bool) {
        self.inner.shell.fault("worker.after_receive");
        let connection = Connection::new(fd, &self.inner.shell, Some(listener));
        let callbacks = self.inner.of_listener.borrow();
        let callback = callbacks.get(&listener).and_then(|callbacks| {
            let callback = if is_excess {
                &callbacks.drop
            } else {
                &callbacks.connection
            };
            callback.as_ref().map(Rc::clone)
        });
        drop(callbacks);
        if let Some(callback) = callback {
            if let Ok(mut callback) = callback.try_borrow_mut() {
                callback(self, connection);
            }
        }
    }

    fn listener_ready(&self, listener: ListenerId) {
        // It may have been put to rest since the poller was asked.
        let socket = self.inner.shell.socket(listener);
        if socket.is_some_and(|socket| !socket.is_watched()) {
            return;
        }
        if self.inner.shell.core.borrow().is_datagram(listener) {
            self.receive_datagrams(listener);
        } else {
            self.accept_all(listener);
        }
    }

    /// Accepts what a listener with a callback has.
    fn accept_all(&self, listener: ListenerId) {
        let shell = &self.inner.shell;
        for _ in 0..ACCEPT_BATCH {
            if shell.core.borrow().is_paused(listener) {
                return shell.watch(listener, false);
            }
            match shell.try_accept(listener) {
                Ok(Some(accepted)) => self.deliver(listener, accepted.fd, accepted.is_excess),
                Ok(None) => return,
                Err(error) => return self.rest(listener, error),
            }
        }
        // It may have nothing more that could make it readable: then it ends, or is idle.
        let mut core = shell.core.borrow_mut();
        if core.is_draining(listener) || core.has_queue(listener) {
            core.notify_ready(listener);
        }
    }

    /// Receives one datagram after the other: what the callback does not want, because it closes
    /// the socket, is for others.
    fn receive_datagrams(&self, listener: ListenerId) {
        for _ in 0..ACCEPT_BATCH {
            let callbacks = self.inner.of_listener.borrow();
            let callback = callbacks.get(&listener).and_then(|c| c.datagram.as_ref());
            let callback = callback.map(Rc::clone);
            drop(callbacks);
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
                Err(error) => return self.rest(listener, error),
            }
        }
    }

    /// Leaves a shared listener alone for a while: it stays readable, and would keep the loop.
    fn rest(&self, listener: ListenerId, error: Error) {
        let shell = &self.inner.shell;
        shell.report(error);
        shell.watch(listener, false);
        let again = move |worker: &Self| {
            worker.inner.shell.update_watch(listener);
            // One that is ending may have nothing more that could make it readable.
            worker.listener_ready(listener);
        };
        let timer = self.inner.event_loop.set_timeout(ACCEPT_RETRY, again);
        self.inner.event_loop.set_referenced(timer.into(), false);
    }

    /// Waits for the next connection of a listener without a callback.
    pub(crate) fn accept(
        inner: &Rc<Inner>,
        listener: ListenerId,
    ) -> Result<Option<Connection<OwnedFd>>> {
        inner.event_loop.check_own()?;
        if inner.shell.is_blocking(listener) {
            let prepare = || {
                let signals = inner.event_loop.open_signal_pipe()?;
                inner.shell.prepare_to_block(signals.as_fd())
            };
            match prepare() {
                Ok(false) => {}
                Ok(true) => {
                    inner.looks_around.set(true);
                    inner.poller_waits.set(true);
                }
                Err(_) => inner.shell.unblock(listener)?,
            }
        }
        let mut pause = FIRST_PAUSE;
        Self::wait_for(inner, listener, |worker| {
            let shell = &inner.shell;
            if shell.core.borrow().is_paused(listener) {
                return Ok(None);
            }
            let accepted = if worker.may_block(listener)? {
                worker.accept_blocking(listener)
            } else {
                shell.try_accept(listener)
            };
            let accepted = match accepted {
                Err(error) if pause < LAST_PAUSE && shell.will_listen_again(listener, &error) => {
                    worker.wait_without(pause)?;
                    pause *= 2;
                    return Ok(None);
                }
                accepted => accepted?,
            };
            pause = FIRST_PAUSE;
            Ok(match accepted {
                Some(accepted) if accepted.is_excess => {
                    let _running = inner.event_loop.enter()?;
                    worker.deliver(listener, accepted.fd, true);
                    None
                }
                Some(accepted) => {
                    shell.fault("worker.after_receive");
                    Some(Connection::new(accepted.fd, shell, Some(listener)))
                }
                None => None,
            })
        })
    }

    /// Whether the worker can wait in `accept` itself: then it has its place in the kernel's queue of
    /// those who wait. If it has something else to wait for, the listener is made not to block, for all
    /// who have it.
    fn may_block(&self, listener: ListenerId) -> Result<bool> {
        let (shell, event_loop) = (&self.inner.shell, &self.inner.event_loop);
        if !shell.is_blocking(listener) {
            return Ok(false);
        }
        let core = shell.core.borrow();
        let alone =
            !core.is_draining(listener) && !core.has_any_callback() && !event_loop.has_watches();
        drop(core);
        if !alone {
            shell.unblock(listener)?;
        }
        Ok(alone)
    }

    /// Accepts a connection, and waits for it. Whatever else there is to do comes first.
    fn accept_blocking(&self, listener: ListenerId) -> Result<Option<Accepted>> {
        let (shell, event_loop) = (&self.inner.shell, &self.inner.event_loop);
        let looks = self.inner.looks_around.get() || shell.is_writing();
        if looks && shell.service_channel()? {
            self.inner.has_waited.set(true);
            return Ok(None);
        }
        self.inner.looks_around.set(false);
        let deadline = event_loop.deadline(shell.deadline());
        let accepted = shell.accept_blocking(listener, deadline)?;
        if accepted.is_none() {
            self.inner.has_waited.set(true);
            self.inner.looks_around.set(true);
            self.inner.poller_waits.set(true);
        }
        Ok(accepted)
    }

    /// Waits for the next datagram of a socket without a callback.
    pub(crate) fn receive(
        inner: &Rc<Inner>,
        listener: ListenerId,
        buffer: &mut [u8],
    ) -> Result<Option<(usize, SocketAddr)>> {
        Self::wait_for(inner, listener, |_| {
            inner.shell.try_receive(listener, buffer)
        })
    }

    /// Turns the loop until `look` finds something, or the listener has ended.
    fn wait_for<T>(
        inner: &Rc<Inner>,
        listener: ListenerId,
        mut look: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        drop(inner.event_loop.enter()?);
        let shell = &inner.shell;
        shell.watch_channel(false)?;
        let worker = Self {
            inner: Rc::clone(inner),
            is_owner: false,
        };
        // However fast connections come, the rest has its turn.
        if !shell.is_blocking(listener) && inner.waited.get().elapsed() >= WAIT_EVERY {
            worker.wait(listener, Some(Duration::ZERO))?;
        }
        loop {
            // What the program is to be told comes before it is kept waiting.
            if inner.poller_waits.take() || worker.time_left() == Some(Duration::ZERO) {
                worker.turn(Some(Duration::ZERO))?;
            }
            let found = look(&worker)?;
            if found.is_some() {
                return Ok(found);
            }
            let core = shell.core.borrow();
            let (ended, events) = (core.has_ended(listener), core.has_events());
            drop(core);
            if ended && !events {
                return Ok(None);
            }
            if !inner.has_waited.take() {
                worker.wait(listener, worker.time_left())?;
            }
        }
    }

    /// Waits for anything but a listener, at most for `limit`.
    fn wait_without(&self, limit: Duration) -> Result<()> {
        let limit = earlier(self.time_left(), Some(limit));
        let poller = self
            .inner
            .shell
            .wait(self.inner.event_loop.as_fd(), None, limit)?;
        self.inner.poller_waits.set(poller);
        self.inner.has_waited.set(true);
        Ok(())
    }

    /// Waits for anything at all; what has come by the channel is read.
    fn wait(&self, listener: ListenerId, limit: Option<Duration>) -> Result<()> {
        let shell = &self.inner.shell;
        let left = shell.core.borrow().is_paused(listener);
        let socket = shell.socket(listener).filter(|_| !left);
        let socket = socket.as_deref().map(|registered| &**registered);
        let poller = shell.wait(self.inner.event_loop.as_fd(), socket, limit)?;
        self.inner.poller_waits.set(poller);
        self.inner.waited.set(Instant::now());
        Ok(())
    }
}

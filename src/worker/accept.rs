//! The blocking way to use a worker: how `accept` and `recv_from` wait.

use std::cell::Cell;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::core::worker::ListenerId;
use crate::error::{Error, Result};
use crate::runtime::backoff::Backoff;
use crate::sys::listen::is_permanent_error;
use crate::types::time::earlier;
use crate::worker::connection::Connection;
use crate::worker::shell::{Accepted, Blocked};
use crate::worker::{Inner, Worker};

/// Maximum time for which `accept` returns connections without handling messages, timers and
/// signals.
///
/// A longer interval delays messages, timers and signals by the same time. A much shorter interval
/// would cost one call of poll(2) for nearly every connection.
const CHECK_INTERVAL: Duration = Duration::from_millis(1);
/// The first pause of a worker whose listener another process has shut down.
///
/// During the pause, the master makes the listener listen again, which takes microseconds. The
/// pause doubles with each attempt.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// Limit of the pauses. When the pause has doubled to this value, `accept` fails instead of
/// pausing, because the master has not made the listener listen again in all that time.
///
/// The shorter pauses add up to about one second.
const LAST_PAUSE: Duration = Duration::from_millis(1024);

/// Maximum time that a worker waits in accept(2) for a connection that it has found in the backlog,
/// while the client of a parked connection waits for the worker.
///
/// Another worker may accept the connection first, so this worker may wait in vain. A longer time
/// would delay the parked connection. A shorter time could end before accept(2) begins.
const TURN_WAIT: Duration = Duration::from_millis(1);
/// Maximum number of calls of accept(2) for a new connection while parked connections are ready.
///
/// Each arrival on a parked connection interrupts the call. With one attempt, busy parked
/// connections could make new ones wait forever. Two attempts almost always suffice. Each attempt
/// first discards a pending interrupt. While the backlog has a connection, the attempt fails only
/// if the next arrival comes before accept(2) begins.
const TURN_ATTEMPTS: u32 = 3;

/// The sources, besides the listener itself, that may have unhandled input.
///
/// The sources are the channel and the poller, which reports signals and parked connections. Input
/// on the channel, input on parked connections and signals interrupt a worker that waits in
/// accept(2). Input that arrived before the interrupts were set up does not interrupt the worker,
/// and one interrupt may stand for several inputs. In both cases, the worker checks both sources
/// before it waits in accept(2).
///
/// | state | event | next state |
/// |---|---|---|
/// | any | interrupts were set up or discarded | `Both` |
/// | any | the shell's `accept_blocking` returned neither a connection nor an error | `Both` |
/// | `Both` | the poller was checked, and reported less than a full list | `Channel` |
/// | `Poller` | the poller was checked, and reported less than a full list | `Nothing` |
/// | `Channel` | the channel was read and found empty | `Nothing` |
/// | `Both`, `Channel` | poll(2) reported that the poller is ready | `Both` |
/// | `Both`, `Channel` | poll(2) reported that the poller is not ready | `Channel` |
/// | `Poller`, `Nothing` | poll(2) reported that the poller is ready | `Poller` |
/// | `Poller`, `Nothing` | poll(2) reported that the poller is not ready | `Nothing` |
///
/// The poller is always checked before the channel. A worker waits in accept(2) only in the state
/// `Nothing`, except in `accept_new_first`, where it waits for at most `TURN_WAIT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unchecked {
    Nothing,
    Poller,
    Channel,
    Both,
}

impl Unchecked {
    fn includes_poller(self) -> bool {
        matches!(self, Self::Poller | Self::Both)
    }

    fn includes_channel(self) -> bool {
        matches!(self, Self::Channel | Self::Both)
    }

    fn set_poller(self, is_unchecked: bool) -> Self {
        match (self, is_unchecked) {
            (Self::Nothing | Self::Poller, false) => Self::Nothing,
            (Self::Nothing | Self::Poller, true) => Self::Poller,
            (Self::Channel | Self::Both, false) => Self::Channel,
            (Self::Channel | Self::Both, true) => Self::Both,
        }
    }

    fn channel_checked(self) -> Self {
        match self {
            Self::Nothing | Self::Channel => Self::Nothing,
            Self::Poller | Self::Both => Self::Poller,
        }
    }
}

/// The state that a blocking worker keeps between calls.
#[derive(Debug)]
pub(super) struct WaitState {
    unchecked: Cell<Unchecked>,
    /// The time of the last wait with poll(2), of the last interrupt of accept(2), or of the last
    /// check of the channel in `accept_in_turn`, whichever is latest.
    last_wait: Cell<Instant>,
    /// Whether the worker has handled a parked connection, reported by the poller, whose interrupt is
    /// probably still pending. The interrupt would end the next accept(2) in vain, and discarding it
    /// first costs less.
    has_stale_interrupt: Cell<bool>,
}

impl WaitState {
    pub(super) fn new() -> Self {
        Self {
            unchecked: Cell::new(Unchecked::Both),
            last_wait: Cell::new(Instant::now()),
            has_stale_interrupt: Cell::new(false),
        }
    }

    fn interrupted(&self) {
        self.unchecked.set(Unchecked::Both);
    }

    /// Returns whether the poller must be checked, and marks it as checked.
    fn take_poller(&self) -> bool {
        let unchecked = self.unchecked.get();
        self.unchecked.set(unchecked.set_poller(false));
        unchecked.includes_poller()
    }

    /// Records whether the poller may have something to report.
    pub(super) fn poller_reported(&self, is_ready: bool) {
        let unchecked = self.unchecked.get();
        self.unchecked.set(unchecked.set_poller(is_ready));
    }

    fn channel_checked(&self) {
        self.unchecked.set(self.unchecked.get().channel_checked());
    }
}

/// The sources of one attempt to receive a connection or datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sources {
    /// The socket, and the parked connections whose clients have sent something.
    All,
    Parked,
}

/// The result of one attempt to receive a connection or datagram.
enum Attempt<T> {
    Received(T),
    /// Nothing was available for the application, and the attempt did not wait.
    Nothing,
    /// Nothing was available for the application, but the attempt waited or handled other input, so
    /// try again.
    Retry,
    /// The attempt failed with a temporary error, such as a lack of descriptors.
    Failed(Error),
}

impl<T> Attempt<T> {
    /// Returns the result of an attempt that failed with a temporary error.
    ///
    /// # Errors
    ///
    /// Returns the error if it is permanent.
    fn failed(error: Error) -> Result<Self> {
        match error.raw_os_error() {
            Some(errno) if !is_permanent_error(errno) => Ok(Self::Failed(error)),
            Some(_) | None => Err(error),
        }
    }
}

impl<T> From<Option<T>> for Attempt<T> {
    fn from(received: Option<T>) -> Self {
        received.map_or(Self::Nothing, Self::Received)
    }
}

impl Worker {
    /// Waits for the next connection of a listener without a callback.
    pub(super) fn accept(
        inner: &Rc<Inner>,
        listener: ListenerId,
    ) -> Result<Option<Connection<OwnedFd>>> {
        inner.event_loop.check_own()?;
        inner.prepare_accept(listener)?;
        let mut pause = FIRST_PAUSE;
        Self::wait_for(inner, listener, |worker, sources| {
            let shell = &inner.shell;
            if shell.core.borrow().is_paused(listener) {
                return Ok(Attempt::Nothing);
            }
            if sources == Sources::Parked {
                return match shell.resume(listener) {
                    Some(resumed) => worker.accepted(listener, resumed),
                    None => Ok(Attempt::Nothing),
                };
            }
            let attempt = if worker.may_block(listener)? {
                worker.accept_in_turn(listener)
            } else if shell.take_empty_at_park(listener) {
                Ok(Attempt::Nothing)
            } else {
                shell.try_next(listener).map(Attempt::from)
            };
            match attempt {
                Err(error) if pause < LAST_PAUSE && shell.will_listen_again(listener, &error) => {
                    worker.wait_without_listener(pause)?;
                    pause *= 2;
                    Ok(Attempt::Retry)
                }
                Err(error) => Attempt::failed(error),
                Ok(attempt) => {
                    pause = FIRST_PAUSE;
                    match attempt {
                        Attempt::Received(accepted) => worker.accepted(listener, accepted),
                        Attempt::Nothing => Ok(Attempt::Nothing),
                        Attempt::Retry => Ok(Attempt::Retry),
                        Attempt::Failed(error) => Ok(Attempt::Failed(error)),
                    }
                }
            }
        })
    }

    /// Returns the connection for the application. If it exceeds the application's limit, passes it
    /// to the drop callback instead.
    fn accepted(
        &self,
        listener: ListenerId,
        accepted: Accepted,
    ) -> Result<Attempt<Connection<OwnedFd>>> {
        let shell = &self.inner.shell;
        if accepted.is_excess {
            let _running = self.inner.event_loop.enter()?;
            self.deliver(listener, accepted);
            return Ok(Attempt::Nothing);
        }
        shell.fault("worker.after_receive");
        let connection = Connection::new(accepted.fd, &self.inner, accepted.origin);
        Ok(Attempt::Received(connection))
    }

    /// Returns whether the worker can wait in accept(2). The kernel then lets the waiting workers
    /// take strict turns. If the listener is draining, or if the worker also has callbacks or
    /// watches, the method makes the listener non-blocking in all processes that have a copy. A
    /// listener that serves only parked connections accepts nothing.
    fn may_block(&self, listener: ListenerId) -> Result<bool> {
        let (shell, event_loop) = (&self.inner.shell, &self.inner.event_loop);
        if !shell.is_blocking(listener) {
            return Ok(false);
        }
        let core = shell.core.borrow();
        // Leave the listener blocking for the workers that accept from it.
        if core.is_serving_parked(listener) {
            return Ok(false);
        }
        let alone =
            !core.is_draining(listener) && !core.has_any_callback() && !event_loop.has_watches();
        drop(core);
        if !alone {
            shell.unblock(listener)?;
        }
        Ok(alone)
    }

    /// Returns a parked connection whose client has sent something. If there is none, or if it is
    /// the turn of a new connection and the backlog has one, accepts a new connection. Does not
    /// wait for a new connection while the worker reads from finished ones.
    fn accept_in_turn(&self, listener: ListenerId) -> Result<Attempt<Accepted>> {
        let shell = &self.inner.shell;
        let has_resumed = shell.has_resumed(listener);
        if !has_resumed && !shell.is_lingering() {
            return self.accept_blocking(listener);
        }
        // Without a wait in accept(2), nothing else would check the channel.
        let last_wait = &self.inner.wait_state.last_wait;
        if last_wait.get().elapsed() >= CHECK_INTERVAL {
            last_wait.set(Instant::now());
            shell.expect_backlog();
            if shell.service_channel()? {
                return Ok(Attempt::Retry);
            }
            self.inner.wait_state.channel_checked();
        }
        if !has_resumed || shell.is_new_next() {
            if shell.has_input(listener) {
                match self.accept_new_first(listener)? {
                    // A parked connection already has a descriptor, so a lack of descriptors must
                    // not delay it.
                    Some(Attempt::Failed(_)) if has_resumed => shell.mark_backlog_empty(),
                    Some(attempt) => return Ok(attempt),
                    None => {}
                }
            } else {
                shell.mark_backlog_empty();
            }
        }
        Ok(shell.resume(listener).into())
    }

    /// Accepts a new connection although parked connections are ready. Returns `None` if another
    /// worker has accepted the connection from the backlog, if the worker holds the connection until
    /// its client sends something, or if each attempt was interrupted.
    fn accept_new_first(&self, listener: ListenerId) -> Result<Option<Attempt<Accepted>>> {
        let (shell, wait_state) = (&self.inner.shell, &self.inner.wait_state);
        let deadline = shell.now().saturating_add(TURN_WAIT);
        for _ in 0..TURN_ATTEMPTS {
            // The interrupts of parked connections do not matter here. Check all sources later.
            shell.discard_interrupt();
            wait_state.interrupted();
            match shell.accept_blocking(listener, Some(deadline)) {
                Ok(Blocked::Accepted(accepted)) => return Ok(Some(Attempt::Received(accepted))),
                Ok(Blocked::Held) => return Ok(None),
                Ok(Blocked::Nothing) => {}
                Err(error) => return self.accept_failed(listener, error).map(Some),
            }
        }
        Ok(None)
    }

    fn accept_failed(&self, listener: ListenerId, error: Error) -> Result<Attempt<Accepted>> {
        let failed = Attempt::failed(error)?;
        // Without a free descriptor, accept(2) fails even if no connection waits. In that case,
        // `Nothing` makes the caller poll until a connection arrives.
        let has_input = self.inner.shell.has_input(listener);
        Ok(if has_input { failed } else { Attempt::Nothing })
    }

    /// Handles pending input on the channel. If there was none, waits for a connection in
    /// accept(2), at most until the next deadline of the loop or the shell.
    fn accept_blocking(&self, listener: ListenerId) -> Result<Attempt<Accepted>> {
        let (shell, event_loop) = (&self.inner.shell, &self.inner.event_loop);
        let wait_state = &self.inner.wait_state;
        if wait_state.unchecked.get().includes_poller() {
            // The last check filled its list, so more parked connections may be ready.
            return Ok(Attempt::Retry);
        }
        let must_check = wait_state.unchecked.get().includes_channel() || shell.is_writing();
        if must_check && shell.service_channel()? {
            return Ok(Attempt::Retry);
        }
        wait_state.channel_checked();
        if wait_state.has_stale_interrupt.take() && shell.discard_interrupt() {
            wait_state.interrupted();
            return Ok(Attempt::Retry);
        }
        let deadline = event_loop.deadline(shell.deadline());
        match shell.accept_blocking(listener, deadline) {
            Ok(Blocked::Accepted(accepted)) => Ok(Attempt::Received(accepted)),
            Ok(blocked @ (Blocked::Held | Blocked::Nothing)) => {
                wait_state.interrupted();
                // An interrupt does not prove that the backlog is empty. If it is not, `Turn` delays
                // a new connection for at most `CHECK_INTERVAL`.
                if let Blocked::Nothing = blocked {
                    shell.mark_backlog_empty();
                }
                wait_state.last_wait.set(Instant::now());
                Ok(Attempt::Retry)
            }
            Err(error) => self.accept_failed(listener, error),
        }
    }

    /// Waits for the next datagram of a socket without a callback.
    pub(super) fn receive(
        inner: &Rc<Inner>,
        listener: ListenerId,
        buffer: &mut [u8],
    ) -> Result<Option<(usize, SocketAddr)>> {
        Self::wait_for(inner, listener, |_, sources| {
            if sources == Sources::Parked {
                return Ok(Attempt::Nothing);
            }
            let received = inner.shell.try_receive(listener, buffer);
            received.map_or_else(Attempt::failed, |received| Ok(received.into()))
        })
    }

    /// Repeats `attempt`, and runs the loop in between, until the attempt receives something or the
    /// listener has ended. Reports a temporary error to the error callbacks, and makes the next
    /// attempt after `BACKOFF`.
    fn wait_for<T>(
        inner: &Rc<Inner>,
        listener: ListenerId,
        mut attempt: impl FnMut(&Self, Sources) -> Result<Attempt<T>>,
    ) -> Result<Option<T>> {
        drop(inner.event_loop.enter()?);
        let (shell, wait_state) = (&inner.shell, &inner.wait_state);
        shell.watch_channel(false)?;
        let worker = Self {
            inner: Rc::clone(inner),
            is_owner: false,
        };
        // Handle everything else once per `CHECK_INTERVAL`. A busy listener always has a
        // connection, so the loop below would otherwise return each time without handling anything
        // else.
        if !shell.is_blocking(listener) && wait_state.last_wait.get().elapsed() >= CHECK_INTERVAL {
            worker.wait(listener, Some(Duration::ZERO))?;
        }
        let mut backoff = Backoff::default();
        loop {
            // Check the poller and deliver pending notifications first, because the attempt may
            // wait. Skip the check for newly parked connections while earlier ones are resumed,
            // because the earlier ones come first.
            // Call `take_newly_parked` last, because another listener may need the check otherwise.
            let has_newly_parked = !shell.has_resumed(listener)
                && shell.is_blocking(listener)
                && shell.take_newly_parked();
            let must_check = wait_state.take_poller();
            if must_check || has_newly_parked || worker.time_left() == Some(Duration::ZERO) {
                worker.iterate(Some(Duration::ZERO))?;
            }
            if has_newly_parked && !must_check && shell.has_resumed(listener) {
                wait_state.has_stale_interrupt.set(true);
            }
            let may_wait = match worker.attempt_after(&mut backoff, &mut attempt)? {
                Attempt::Received(received) => return Ok(Some(received)),
                Attempt::Nothing => true,
                Attempt::Retry => false,
                Attempt::Failed(error) => {
                    shell.report(error);
                    backoff.start(shell.now());
                    false
                }
            };
            let core = shell.core.borrow();
            let (ended, events) = (core.has_ended(listener), core.has_events());
            drop(core);
            if ended && !events {
                return Ok(None);
            }
            if may_wait {
                worker.wait(listener, worker.time_left())?;
            }
        }
    }

    /// Makes an attempt. During the back-off after a failed attempt, only tries to resume a parked
    /// connection, and otherwise waits for the end of the back-off or for other input.
    fn attempt_after<T>(
        &self,
        backoff: &mut Backoff,
        attempt: &mut impl FnMut(&Self, Sources) -> Result<Attempt<T>>,
    ) -> Result<Attempt<T>> {
        if let Some(deadline) = backoff.deadline() {
            let left = deadline.saturating_sub(self.inner.shell.now());
            if !left.is_zero() {
                let resumed = attempt(self, Sources::Parked)?;
                if let Attempt::Received(_) = resumed {
                    return Ok(resumed);
                }
                self.wait_without_listener(left)?;
                return Ok(Attempt::Retry);
            }
            *backoff = Backoff::default();
        }
        attempt(self, Sources::All)
    }

    /// Waits for the channel and the poller, but not for a listener, for at most `limit`. Reads
    /// from the channel if it is ready.
    fn wait_without_listener(&self, limit: Duration) -> Result<()> {
        let limit = earlier(self.time_left(), Some(limit));
        let (shell, event_loop) = (&self.inner.shell, &self.inner.event_loop);
        let is_ready = shell.wait(event_loop.as_fd(), None, limit)?;
        self.inner.wait_state.poller_reported(is_ready);
        Ok(())
    }

    /// Waits for the channel, the poller, and the listener unless it is paused, for at most
    /// `limit`. Reads from the channel if it is ready.
    fn wait(&self, listener: ListenerId, limit: Option<Duration>) -> Result<()> {
        let (shell, event_loop) = (&self.inner.shell, &self.inner.event_loop);
        let left = shell.core.borrow().is_paused(listener);
        let socket = shell.socket(listener).filter(|_| !left);
        let socket = socket.as_deref().map(|registered| &**registered);
        let is_ready = shell.wait(event_loop.as_fd(), socket, limit)?;
        self.inner.wait_state.poller_reported(is_ready);
        self.inner.wait_state.last_wait.set(Instant::now());
        shell.expect_backlog();
        Ok(())
    }
}

impl Inner {
    /// Sets up the interrupts of accept(2) for a listener that blocks. If the system cannot set up
    /// the interrupts, the method makes the listener non-blocking.
    fn prepare_accept(&self, listener: ListenerId) -> Result<()> {
        if !self.shell.is_blocking(listener) {
            return Ok(());
        }
        let prepare = || {
            let signals = self.event_loop.open_signal_pipe()?;
            self.shell.prepare_to_block(signals.as_fd())
        };
        match prepare() {
            Ok(true) => self.wait_state.interrupted(),
            Ok(false) => {}
            Err(_) => self.shell.unblock(listener)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unchecked_is_a_set_of_two_sources() {
        for (poller, channel, state) in [
            (false, false, Unchecked::Nothing),
            (true, false, Unchecked::Poller),
            (false, true, Unchecked::Channel),
            (true, true, Unchecked::Both),
        ] {
            let facts = |state: Unchecked| (state.includes_poller(), state.includes_channel());
            assert_eq!(facts(state), (poller, channel));
            assert_eq!(facts(state.set_poller(true)), (true, channel));
            assert_eq!(facts(state.set_poller(false)), (false, channel));
            assert_eq!(facts(state.channel_checked()), (poller, false));
        }
    }
}

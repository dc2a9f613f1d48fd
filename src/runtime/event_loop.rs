//! Implements the event loop of both roles, with one poller, timers, signals and watched
//! descriptors.
//!
//! `R` is the role, `Master` or `Worker`. Each callback receives a reference to the role.

use std::cell::{Cell, RefCell};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result, WatchError};
use crate::runtime::callbacks::{CallbackId, Callbacks, Shared};
use crate::runtime::timers::{TimerId, Timers};
use crate::runtime::token::Token;
use crate::sys::poll::{Interest, Poller, Ready, ReadyList, Registered};
use crate::sys::signal::{self, InstalledHandler, SignalPipe};
use crate::types::number_map::NumberMap;
use crate::types::poll_number::next_poll_number;
use crate::types::signal::Signal;
use crate::types::sorted_map::SortedMap;
use crate::types::time::{Time, earlier};

/// Identifies a watched descriptor, so that [`Worker::unwatch`](crate::Worker::unwatch) can remove
/// it.
///
/// Node has no counterpart.
///
/// See [`Worker::watch`](crate::Worker::watch) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WatchId(u32);

/// Identifies a timer or a watched descriptor, so that
/// [`Master::unreference`](crate::Master::unreference) can unreference it. See that method for an
/// example.
///
/// Node: the object that has a method `unref()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LoopId {
    /// The id of a timer, as returned by `set_timeout` or `set_interval`.
    Timer(TimerId),
    /// The id of a watched descriptor, as returned by `watch`.
    Watch(WatchId),
}

impl From<TimerId> for LoopId {
    fn from(id: TimerId) -> Self {
        Self::Timer(id)
    }
}

impl From<WatchId> for LoopId {
    fn from(id: WatchId) -> Self {
        Self::Watch(id)
    }
}

/// A watched descriptor and its callback, with erased types.
trait Watched<R> {
    /// Calls the callback. Returns whether the event loop should continue to watch the descriptor.
    fn ready(&mut self, role: &R) -> bool;
}

struct Watch<S: AsFd, F> {
    source: Registered<S>,
    interest: Interest,
    callback: F,
}

impl<R, S, F> Watched<R> for Watch<S, F>
where
    S: AsFd,
    F: FnMut(&R, &S) -> Option<Interest>,
{
    fn ready(&mut self, role: &R) -> bool {
        match (self.callback)(role, &self.source) {
            None => false,
            Some(interest) if interest == self.interest => true,
            Some(interest) => {
                self.interest = interest;
                self.source.set_interest(Some(interest)).is_ok()
            }
        }
    }
}

/// The event loop's entry for a watched descriptor.
struct WatchEntry<R> {
    watched: Shared<dyn Watched<R>>,
    number: RawFd,
    /// Whether the descriptor keeps `run` from returning.
    referenced: bool,
}

type OnTimer<R> = Shared<dyn FnMut(&R)>;
type OnSignal<R> = dyn FnMut(&R, Signal);

struct SignalInterest<R> {
    callbacks: Callbacks<OnSignal<R>>,
    /// The guard that restores the previous handler when it is dropped.
    installed: InstalledHandler,
}

pub(crate) struct EventLoop<R> {
    poller: Poller,
    start_time: Instant,
    timers: RefCell<Timers<OnTimer<R>>>,
    watches: RefCell<NumberMap<WatchEntry<R>>>,
    /// The watches that a forked child has inherited from its parent. The watches are never
    /// dropped, because a drop would close descriptors or run the application's code. The watches
    /// stay reachable, because LeakSanitizer would otherwise report them as leaks.
    abandoned: RefCell<ManuallyDrop<Vec<NumberMap<WatchEntry<R>>>>>,
    last_watch: Cell<u32>,
    /// The number of referenced entries in `watches`.
    referenced_watches: Cell<usize>,
    signal_pipe: RefCell<Option<Registered<SignalPipe>>>,
    signals: RefCell<SortedMap<Signal, Rc<SignalInterest<R>>>>,
    /// Whether the event loop is running. A callback that runs the event loop again gets an error.
    running: Cell<bool>,
}

impl<R> std::fmt::Debug for EventLoop<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoop").finish_non_exhaustive()
    }
}

impl<R> EventLoop<R> {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            poller: Poller::new().map_err(Error::io("create a poller"))?,
            start_time: Instant::now(),
            timers: RefCell::new(Timers::new()),
            watches: RefCell::default(),
            abandoned: RefCell::default(),
            last_watch: Cell::new(0),
            referenced_watches: Cell::new(0),
            signal_pipe: RefCell::default(),
            signals: RefCell::default(),
            running: Cell::new(false),
        })
    }

    pub(crate) fn poller(&self) -> &Poller {
        &self.poller
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    pub(crate) fn start_time(&self) -> Instant {
        self.start_time
    }

    fn now(&self) -> Time {
        self.start_time.elapsed()
    }

    /// Checks that this process created the event loop.
    ///
    /// # Errors
    ///
    /// Returns `Error::ForeignProcess` if this process did not create the event loop.
    pub(crate) fn check_own(&self) -> Result<()> {
        if self.poller.is_own() {
            Ok(())
        } else {
            Err(Error::ForeignProcess)
        }
    }

    /// Marks the event loop as running until the returned guard is dropped.
    ///
    /// # Errors
    ///
    /// Returns `Error::ForeignProcess` if this process did not create the event loop, and
    /// `Error::AlreadyRunning` if the event loop is running.
    pub(crate) fn enter(&self) -> Result<Running<'_>> {
        self.check_own()?;
        if self.running.replace(true) {
            return Err(Error::AlreadyRunning);
        }
        Ok(Running(&self.running))
    }

    /// Returns whether the event loop is running in this process, and the caller is therefore one
    /// of its callbacks. The result is `false` in a child that a callback has forked.
    pub(crate) fn is_running(&self) -> bool {
        self.running.get() && self.poller.is_own()
    }

    /// Returns the time left until the first timer is due or until `other`, whichever is earlier.
    /// Returns `None` if there is neither.
    pub(crate) fn time_left(&self, other: Option<Time>) -> Option<Duration> {
        let first = self.deadline(other)?;
        Some(first.saturating_sub(self.now()))
    }

    /// Returns the time at which the first timer is due or `other`, whichever is earlier. Returns
    /// `None` if there is neither.
    pub(crate) fn deadline(&self, other: Option<Time>) -> Option<Time> {
        earlier(self.timers.borrow().deadline(), other)
    }

    /// Waits until a descriptor is ready or the timeout expires. Returns the ready descriptors.
    pub(crate) fn wait<'a>(
        &self,
        timeout: Option<Duration>,
        ready: &'a mut ReadyList,
    ) -> Result<impl Iterator<Item = (Token, &'a Ready)> + use<'a, R>> {
        let waited = self.poller.wait(timeout, ready);
        waited.map_err(Error::io("wait for events"))?;
        Ok(ready.iter().filter_map(|ready| {
            let token = Token::from_key(ready.key)?;
            Some((token, ready))
        }))
    }

    /// Returns whether a timer or a watched descriptor keeps `run` from returning.
    pub(crate) fn has_work(&self) -> bool {
        self.timers.borrow().has_referenced() || self.referenced_watches.get() > 0
    }

    /// Returns whether the application watches any descriptor.
    pub(crate) fn has_watches(&self) -> bool {
        !self.watches.borrow().is_empty()
    }

    /// Sets whether a timer or a watched descriptor keeps `run` from returning.
    pub(crate) fn set_referenced(&self, id: LoopId, referenced: bool) {
        match id {
            LoopId::Timer(id) => self.timers.borrow_mut().set_referenced(id, referenced),
            LoopId::Watch(id) => {
                if let Some(entry) = self.watches.borrow_mut().get_mut(id.0.into()) {
                    let was_referenced = std::mem::replace(&mut entry.referenced, referenced);
                    self.count_referenced(was_referenced, referenced);
                }
            }
        }
    }

    /// Updates the number of referenced watches after a watch has changed.
    fn count_referenced(&self, before: bool, now: bool) {
        let count = self.referenced_watches.get() + usize::from(now) - usize::from(before);
        self.referenced_watches.set(count);
    }

    /// Drops all closures. This breaks the reference cycle that exists if a closure owns the owner
    /// of the event loop.
    pub(crate) fn clear(&self) {
        let timers = self.timers.replace(Timers::new());
        let watches = self.watches.take();
        self.referenced_watches.set(0);
        let signals = self.signals.take();
        drop((timers, watches, signals));
    }

    /// Moves all watches to `abandoned` in a forked child that executes no other program. Returns
    /// the numbers of the watched descriptors, so that the caller can close them. Omits 0, 1 and 2,
    /// because the child still needs its standard input, output and error.
    pub(crate) fn abandon_watches(&self) -> Vec<RawFd> {
        let watches = self.watches.take();
        self.referenced_watches.set(0);
        let numbers = watches.iter().map(|(_, entry)| entry.number);
        let numbers = numbers.filter(|number| *number > 2).collect();
        self.abandoned.borrow_mut().push(watches);
        numbers
    }

    pub(crate) fn set_timeout(
        &self,
        after: Duration,
        callback: impl FnOnce(&R) + 'static,
    ) -> TimerId {
        let mut callback = Some(callback);
        let once = move |role: &R| {
            if let Some(callback) = callback.take() {
                callback(role);
            }
        };
        self.set_timer(after, None, Rc::new(RefCell::new(once)))
    }

    pub(crate) fn set_interval(
        &self,
        every: Duration,
        callback: impl FnMut(&R) + 'static,
    ) -> TimerId {
        self.set_timer(every, Some(every), Rc::new(RefCell::new(callback)))
    }

    fn set_timer(
        &self,
        after: Duration,
        interval: Option<Duration>,
        callback: OnTimer<R>,
    ) -> TimerId {
        let now = self.now();
        self.timers.borrow_mut().set(now, after, interval, callback)
    }

    pub(crate) fn clear_timer(&self, id: TimerId) {
        // Drop the closure only after the borrow has ended, because the `Drop` of a captured value
        // may call the event loop.
        let cleared = self.timers.borrow_mut().clear(id);
        drop(cleared);
    }

    /// Calls the callbacks of the timers that are due now. Timers that become due during these
    /// calls wait for the next call of this function. Calls `settle` after each callback.
    pub(crate) fn fire_timers(&self, role: &R, mut settle: impl FnMut()) {
        if self.deadline(None).is_none() {
            return;
        }
        let now = self.now();
        loop {
            let due = self.timers.borrow_mut().next_due(now);
            // Stop in a forked child, because a callback may fork and then return in both
            // processes.
            let Some(callback) = due.filter(|_| self.poller.is_own()) else {
                break;
            };
            (callback.borrow_mut())(role);
            drop(callback);
            settle();
        }
    }

    pub(crate) fn watch<S: AsFd + 'static>(
        &self,
        source: S,
        interest: Interest,
        callback: impl FnMut(&R, &S) -> Option<Interest> + 'static,
    ) -> std::result::Result<WatchId, WatchError<S>>
    where
        R: 'static,
    {
        if let Err(error) = self.check_own() {
            return Err(WatchError::new(source, error));
        }
        let id = self.next_watch();
        let key = Token::Watch(id.0).key();
        let added = self.poller.try_add(source, key, Some(interest));
        let source = added.map_err(|(source, reason)| {
            WatchError::new(source, Error::io("watch a descriptor")(reason))
        })?;
        let number = source.as_fd().as_raw_fd();
        let watch = Watch {
            source,
            interest,
            callback,
        };
        let entry = WatchEntry {
            watched: Rc::new(RefCell::new(watch)),
            number,
            referenced: true,
        };
        self.watches.borrow_mut().insert(id.0.into(), entry);
        self.count_referenced(false, true);
        Ok(id)
    }

    /// Returns an unused id.
    fn next_watch(&self) -> WatchId {
        let watches = self.watches.borrow();
        let is_used = |number: u32| watches.get(number.into()).is_some();
        let number = next_poll_number(self.last_watch.get(), is_used);
        self.last_watch.set(number);
        WatchId(number)
    }

    pub(crate) fn unwatch(&self, id: WatchId) {
        let removed = self.watches.borrow_mut().remove(id.0.into());
        if let Some(entry) = &removed {
            self.count_referenced(entry.referenced, false);
        }
        // Drop the entry only after the borrow has ended, because the source's `Drop` may call the
        // event loop.
        drop(removed);
    }

    /// Calls the callback of a watched descriptor that is ready. Stops watching the descriptor if
    /// the callback returns `None`, or if the poller rejects the interest that it returns.
    pub(crate) fn watch_ready(&self, role: &R, number: u32) {
        let id = WatchId(number);
        let watches = self.watches.borrow();
        let watch = watches
            .get(number.into())
            .map(|entry| Rc::clone(&entry.watched));
        drop(watches);
        let Some(watch) = watch else {
            return;
        };
        let stays = watch.borrow_mut().ready(role);
        if !stays {
            self.unwatch(id);
        }
    }

    /// Makes the event loop wait for the signal pipe. Returns the pipe, which becomes readable
    /// after any signal that [`install`](Self::install) has been called for.
    pub(crate) fn open_signal_pipe(&self) -> io::Result<SignalPipe> {
        let mut pipe = self.signal_pipe.borrow_mut();
        if pipe.is_none() {
            let key = Token::Signals.key();
            let new = SignalPipe::new()?;
            *pipe = Some(self.poller.add(new, key, Some(Interest::Readable))?);
        }
        SignalPipe::new()
    }

    /// Makes `signal` wake the event loop until the returned guard is dropped. Once the signal has
    /// arrived, `take_signals` returns it.
    pub(crate) fn install(&self, signal: Signal) -> io::Result<InstalledHandler> {
        self.open_signal_pipe()?;
        signal::install(signal.number())
    }

    pub(crate) fn on_signal(
        &self,
        signal: Signal,
        callback: impl FnMut(&R, Signal) + 'static,
    ) -> Result<CallbackId> {
        let interest = self.signal_interest(signal)?;
        Ok(interest.callbacks.add(Rc::new(RefCell::new(callback))))
    }

    pub(crate) fn on_signal_once(
        &self,
        signal: Signal,
        callback: impl FnOnce(&R, Signal) + 'static,
    ) -> Result<CallbackId> {
        let interest = self.signal_interest(signal)?;
        let mut callback = Some(callback);
        let once = move |role: &R, signal| {
            if let Some(callback) = callback.take() {
                callback(role, signal);
            }
        };
        Ok(interest.callbacks.add_once(Rc::new(RefCell::new(once))))
    }

    /// Returns the callbacks for a signal, and installs a handler if the signal has none yet.
    fn signal_interest(&self, signal: Signal) -> Result<Rc<SignalInterest<R>>> {
        self.check_own()?;
        let known = self.signals.borrow().get(&signal).map(Rc::clone);
        if let Some(interest) = known {
            return Ok(interest);
        }
        let installed = self.install(signal);
        let interest = Rc::new(SignalInterest {
            callbacks: Callbacks::default(),
            installed: installed.map_err(Error::io("handle a signal"))?,
        });
        let mut signals = self.signals.borrow_mut();
        signals.insert(signal, Rc::clone(&interest));
        Ok(interest)
    }

    pub(crate) fn remove_signal_callback(&self, id: CallbackId) {
        let signals: Vec<_> = self.signals.borrow().values().map(Rc::clone).collect();
        for interest in signals {
            interest.callbacks.remove(id);
        }
    }

    /// Returns the signals that have arrived since the last call.
    ///
    /// In a background job, a handler may have made the process ignore SIGTTIN or SIGTTOU (see
    /// `suspend` in `sys::signal`). This function then installs that handler again.
    pub(crate) fn take_signals(&self) -> Vec<Signal> {
        let pipe = self.signal_pipe.borrow();
        let numbers = pipe.as_ref().map(|pipe| pipe.take()).unwrap_or_default();
        for interest in self.signals.borrow().values() {
            interest.installed.resume();
        }
        numbers.into_iter().map(Signal::from_number).collect()
    }

    pub(crate) fn call_signal(&self, role: &R, signal: Signal) {
        let interest = self.signals.borrow().get(&signal).map(Rc::clone);
        if let Some(interest) = interest {
            interest.callbacks.each(|callback| callback(role, signal));
        }
    }
}

/// A guard that marks the event loop as running until the guard is dropped.
#[derive(Debug)]
pub(crate) struct Running<'a>(&'a Cell<bool>);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::poll_number::POLL_NUMBER_MAX;

    #[test]
    fn watch_callback_chooses_the_next_interest() {
        use std::io::{Read as _, Write as _};
        use std::os::unix::net::UnixStream;

        let event_loop = EventLoop::<RefCell<Vec<u8>>>::new().unwrap();
        let seen = RefCell::new(Vec::new());
        let (mut here, there) = UnixStream::pair().unwrap();
        let id = event_loop
            .watch(there, Interest::Readable, |seen: &RefCell<_>, mut there| {
                let mut byte = [0];
                there.read_exact(&mut byte).unwrap();
                seen.borrow_mut().push(byte[0]);
                (byte[0] < 2).then_some(Interest::Readable)
            })
            .unwrap();
        for byte in [1, 2] {
            assert!(event_loop.has_work());
            event_loop.set_referenced(id.into(), false);
            assert!(!event_loop.has_work());
            event_loop.set_referenced(id.into(), true);
            here.write_all(&[byte]).unwrap();
            let mut ready = ReadyList::new();
            let (token, _) = event_loop.wait(None, &mut ready).unwrap().next().unwrap();
            assert_eq!(token, Token::Watch(id.0));
            event_loop.watch_ready(&seen, id.0);
        }
        assert_eq!(seen.take(), [1, 2]);
        assert!(!event_loop.has_work(), "the callback returned `None`");
        assert_eq!(
            here.read(&mut [0]).unwrap(),
            0,
            "the watched descriptor is closed"
        );
    }

    #[test]
    fn watch_ids_start_again_and_skip_those_in_use() {
        use std::os::unix::net::UnixStream;

        let event_loop = EventLoop::<()>::new().unwrap();
        let mut others = Vec::new();
        let mut watch = || {
            let (here, there) = UnixStream::pair().unwrap();
            others.push(there);
            event_loop
                .watch(here, Interest::Readable, |(), _| Some(Interest::Readable))
                .unwrap()
        };
        let first = watch();
        event_loop.last_watch.set(POLL_NUMBER_MAX - 1);
        let rest = [watch(), watch()];
        assert_eq!(first, WatchId(1));
        assert_eq!(rest, [WatchId(POLL_NUMBER_MAX), WatchId(2)]);
        for WatchId(number) in [first].into_iter().chain(rest) {
            let token = Token::Watch(number);
            assert_eq!(Token::from_key(token.key()), Some(token));
        }
        assert_eq!(event_loop.watches.borrow().len(), 3);
    }

    #[test]
    fn referenced_watches_are_counted() {
        use std::os::unix::net::UnixStream;

        let event_loop = EventLoop::<()>::new().unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let watch = |source: UnixStream| {
            event_loop
                .watch(source, Interest::Readable, |(), _| None)
                .unwrap()
        };
        let (one, other) = (watch(one), watch(other));
        for referenced in [false, false, true, true, false] {
            event_loop.set_referenced(one.into(), referenced);
        }
        assert!(event_loop.has_work(), "the other watch is referenced");
        event_loop.unwatch(other);
        assert!(!event_loop.has_work());
        event_loop.set_referenced(one.into(), true);
        assert!(event_loop.has_work());
        event_loop.clear();
        assert!(!event_loop.has_work());
    }

    #[test]
    fn loop_cannot_run_inside_itself() {
        let event_loop = EventLoop::<()>::new().unwrap();
        let running = event_loop.enter().unwrap();
        assert!(matches!(event_loop.enter(), Err(Error::AlreadyRunning)));
        drop(running);
        assert!(event_loop.enter().is_ok());
    }

    #[test]
    fn signal_wakes_the_loop_and_clear_restores_the_old_handler() {
        let event_loop = EventLoop::<RefCell<u32>>::new().unwrap();
        let count = RefCell::new(0);
        event_loop
            .on_signal(Signal::USR1, |count: &RefCell<u32>, signal| {
                assert_eq!(signal, Signal::USR1);
                *count.borrow_mut() += 1;
            })
            .unwrap();
        crate::sys::signal::raise(Signal::USR1.number());
        let mut ready = ReadyList::new();
        let (token, _) = event_loop.wait(None, &mut ready).unwrap().next().unwrap();
        assert_eq!(token, Token::Signals);
        for signal in event_loop.take_signals() {
            event_loop.call_signal(&count, signal);
        }
        assert_eq!(count.take(), 1);
        assert!(event_loop.take_signals().is_empty());
        assert!(crate::sys::signal::is_handled(Signal::USR1.number()));
        event_loop.clear();
        assert!(!crate::sys::signal::is_handled(Signal::USR1.number()));
    }

    #[test]
    fn unhandleable_signal_is_an_error() {
        let event_loop = EventLoop::<()>::new().unwrap();
        let error = event_loop.on_signal(Signal::KILL, |(), _| {}).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(22));
    }
}

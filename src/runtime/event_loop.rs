//! What master and worker have in common: one poller, timers, signals and watched descriptors.
//! Knows nothing of clusters; `R` is the role that callbacks get handed in.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::runtime::callbacks::{CallbackId, Callbacks, Shared};
use crate::runtime::timers::{TimerId, Timers};
use crate::sys::poll::{Interest, Poller, Ready, ReadyList, Registered};
use crate::sys::signal::{self, InstalledHandler, SignalPipe};
use crate::types::signal::Signal;
use crate::types::sorted_map::SortedMap;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;

/// Names a watched descriptor, for [`Worker::unwatch`](crate::Worker::unwatch).
///
/// Node has no counterpart. See [`Worker::watch`](crate::Worker::watch) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WatchId(u32);

/// A timer or a watched descriptor, for [`Master::unref`](crate::Master::unref), which has an
/// example.
///
/// Node: the object that has a method `unref()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LoopId {
    /// What `set_timeout` and `set_interval` return.
    Timer(TimerId),
    /// What `watch` returns.
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

/// Who a ready descriptor belongs to. It travels through the poller as a number; one of a source
/// that is gone finds nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Channel(u32),
    Process(u32),
    Listener(u32),
    /// The socket that selects among the shards of a listener.
    Selector(u32),
    Watch(u32),
    Signals,
}

/// The highest number that a token can have, which is that of a worker.
const MAX_NUMBER: u32 = WorkerId::MAX;

impl Token {
    pub(crate) fn key(self) -> usize {
        let (tag, number) = match self {
            Self::Channel(number) => (0, number),
            Self::Process(number) => (1, number),
            Self::Listener(number) => (2, number),
            Self::Watch(number) => (3, number),
            Self::Signals => (4, 0),
            Self::Selector(number) => (5, number),
        };
        // Every number is at most `MAX_NUMBER`, so that none of its bits is lost.
        (number as usize) << 3 | tag
    }

    fn from_key(key: usize) -> Option<Self> {
        let number = u32::try_from(key >> 3).ok()?;
        match key & 7 {
            0 => Some(Self::Channel(number)),
            1 => Some(Self::Process(number)),
            2 => Some(Self::Listener(number)),
            3 => Some(Self::Watch(number)),
            4 => Some(Self::Signals),
            5 => Some(Self::Selector(number)),
            _ => None,
        }
    }
}

/// A watched descriptor and its callback, whatever their types.
trait Watched<R> {
    /// Calls the callback. Returns whether the descriptor stays.
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

/// A watched descriptor in the loop.
struct Place<R> {
    watched: Shared<dyn Watched<R>>,
    number: RawFd,
    /// It keeps the program running.
    referenced: bool,
}

type OnTimer<R> = Shared<dyn FnMut(&R)>;
type OnSignal<R> = dyn FnMut(&R, Signal);

struct SignalInterest<R> {
    callbacks: Callbacks<OnSignal<R>>,
    /// Held for its `Drop`.
    _installed: InstalledHandler,
}

pub(crate) struct EventLoop<R> {
    poller: Poller,
    began: Instant,
    timers: RefCell<Timers<OnTimer<R>>>,
    watches: RefCell<BTreeMap<WatchId, Place<R>>>,
    /// The watches that a forked child has from its parent. They are never dropped, because a drop
    /// would close descriptors or run code of the application. They stay reachable, because
    /// LeakSanitizer would report them otherwise.
    abandoned: RefCell<ManuallyDrop<BTreeMap<WatchId, Place<R>>>>,
    last_watch: Cell<u32>,
    /// How many of them keep the program running.
    referenced_watches: Cell<usize>,
    signal_pipe: RefCell<Option<Registered<SignalPipe>>>,
    signals: RefCell<SortedMap<Signal, Rc<SignalInterest<R>>>>,
    /// Whether the loop is turning, so that a callback that turns it gets an error.
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
            began: Instant::now(),
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

    pub(crate) fn began(&self) -> Instant {
        self.began
    }

    fn now(&self) -> Time {
        self.began.elapsed()
    }

    /// # Errors
    ///
    /// This process has not created the loop.
    pub(crate) fn check_own(&self) -> Result<()> {
        if self.poller.is_own() {
            Ok(())
        } else {
            Err(Error::ForeignProcess)
        }
    }

    /// Marks the loop as turning while the guard lives.
    pub(crate) fn enter(&self) -> Result<Running<'_>> {
        self.check_own()?;
        if self.running.replace(true) {
            return Err(Error::AlreadyRunning);
        }
        Ok(Running(&self.running))
    }

    /// The time until the first timer, or `other` if that comes first.
    pub(crate) fn time_left(&self, other: Option<Time>) -> Option<Duration> {
        let first = self.deadline(other)?;
        Some(first.saturating_sub(self.now()))
    }

    /// When the first timer is due, or `other` if that comes first.
    pub(crate) fn deadline(&self, other: Option<Time>) -> Option<Time> {
        earlier(self.timers.borrow().deadline(), other)
    }

    /// Waits until something is ready or the time is over. Returns what is ready, and for what.
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

    /// Whether the program has something here that is still to happen. Signals do not count.
    pub(crate) fn has_work(&self) -> bool {
        self.timers.borrow().has_referenced() || self.referenced_watches.get() > 0
    }

    /// Whether the program watches a descriptor.
    pub(crate) fn has_watches(&self) -> bool {
        !self.watches.borrow().is_empty()
    }

    /// Whether this keeps the program running.
    pub(crate) fn reference(&self, id: LoopId, referenced: bool) {
        match id {
            LoopId::Timer(id) => self.timers.borrow_mut().reference(id, referenced),
            LoopId::Watch(id) => {
                if let Some(place) = self.watches.borrow_mut().get_mut(&id) {
                    let was_referenced = std::mem::replace(&mut place.referenced, referenced);
                    self.count_referenced(was_referenced, referenced);
                }
            }
        }
    }

    /// A watched descriptor that kept the program running, or not, does or does not from now on.
    fn count_referenced(&self, before: bool, now: bool) {
        let count = self.referenced_watches.get() + usize::from(now) - usize::from(before);
        self.referenced_watches.set(count);
    }

    /// Drops every closure: they may own what owns this loop.
    pub(crate) fn clear(&self) {
        let timers = self.timers.replace(Timers::new());
        let watches = self.watches.take();
        self.referenced_watches.set(0);
        let signals = self.signals.take();
        drop((timers, watches, signals));
    }

    /// In a child that goes on with the memory of its parent: forgets what is watched, and returns the
    /// descriptors. Standard input and so on are the child's, too.
    pub(crate) fn abandon_watches(&self) -> Vec<RawFd> {
        let watches = self.watches.take();
        self.referenced_watches.set(0);
        let numbers = watches.values().map(|place| place.number);
        let numbers = numbers.filter(|number| *number > 2).collect();
        self.abandoned.borrow_mut().extend(watches);
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
        // Dropped when nothing is borrowed: what a closure owns may come back here.
        let cleared = self.timers.borrow_mut().clear(id);
        drop(cleared);
    }

    /// Calls what is due now, and not what falls due meanwhile.
    pub(crate) fn fire_timers(&self, role: &R, mut settle: impl FnMut()) {
        if self.deadline(None).is_none() {
            return;
        }
        let now = self.now();
        loop {
            let due = self.timers.borrow_mut().next_due(now);
            // A callback may return in a child that it has forked.
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
    ) -> Result<WatchId>
    where
        R: 'static,
    {
        self.check_own()?;
        let id = self.next_watch();
        let source = self
            .poller
            .add(source, Token::Watch(id.0).key(), Some(interest))
            .map_err(Error::io("watch a descriptor"))?;
        let number = source.as_fd().as_raw_fd();
        let watch = Watch {
            source,
            interest,
            callback,
        };
        let place = Place {
            watched: Rc::new(RefCell::new(watch)),
            number,
            referenced: true,
        };
        self.watches.borrow_mut().insert(id, place);
        self.count_referenced(false, true);
        Ok(id)
    }

    /// A number that no watched descriptor has. Numbers begin anew when all have been used.
    fn next_watch(&self) -> WatchId {
        let watches = self.watches.borrow();
        loop {
            let id = WatchId(self.last_watch.get() % MAX_NUMBER + 1);
            self.last_watch.set(id.0);
            if !watches.contains_key(&id) {
                return id;
            }
        }
    }

    pub(crate) fn unwatch(&self, id: WatchId) {
        let removed = self.watches.borrow_mut().remove(&id);
        if let Some(place) = &removed {
            self.count_referenced(place.referenced, false);
        }
        // Dropped when nothing is borrowed: its source may come back here.
        drop(removed);
    }

    pub(crate) fn watch_ready(&self, role: &R, number: u32) {
        let id = WatchId(number);
        let watches = self.watches.borrow();
        let watch = watches.get(&id).map(|place| Rc::clone(&place.watched));
        drop(watches);
        let Some(watch) = watch else {
            return;
        };
        let stays = watch.borrow_mut().ready(role);
        if !stays {
            self.unwatch(id);
        }
    }

    /// Makes the loop wake up for signals. Returns what becomes readable then.
    pub(crate) fn open_signal_pipe(&self) -> io::Result<SignalPipe> {
        let mut pipe = self.signal_pipe.borrow_mut();
        if pipe.is_none() {
            let key = Token::Signals.key();
            let new = SignalPipe::new()?;
            *pipe = Some(self.poller.add(new, key, Some(Interest::Readable))?);
        }
        SignalPipe::new()
    }

    /// Wakes the loop when `signal` comes; `take_signals` tells that it came.
    pub(crate) fn install(&self, signal: Signal) -> io::Result<InstalledHandler> {
        self.open_signal_pipe()?;
        signal::install(signal.number())
    }

    pub(crate) fn on_signal(
        &self,
        signal: Signal,
        callback: impl FnMut(&R, Signal) + 'static,
    ) -> Result<CallbackId> {
        self.check_own()?;
        let known = self.signals.borrow().get(&signal).map(Rc::clone);
        let interest = match known {
            Some(interest) => interest,
            None => {
                let installed = self.install(signal);
                let interest = Rc::new(SignalInterest {
                    callbacks: Callbacks::default(),
                    _installed: installed.map_err(Error::io("handle a signal"))?,
                });
                let mut signals = self.signals.borrow_mut();
                signals.insert(signal, Rc::clone(&interest));
                interest
            }
        };
        Ok(interest.callbacks.add(Rc::new(RefCell::new(callback))))
    }

    pub(crate) fn remove_signal_callback(&self, id: CallbackId) {
        let signals: Vec<_> = self.signals.borrow().values().map(Rc::clone).collect();
        for interest in signals {
            interest.callbacks.remove(id);
        }
    }

    pub(crate) fn signal_callback_once(&self, id: CallbackId) {
        for interest in self.signals.borrow().values() {
            interest.callbacks.once(id);
        }
    }

    pub(crate) fn take_signals(&self) -> Vec<Signal> {
        let pipe = self.signal_pipe.borrow();
        let numbers = pipe.as_ref().map(|pipe| pipe.take()).unwrap_or_default();
        numbers.into_iter().map(Signal::from_number).collect()
    }

    pub(crate) fn call_signal(&self, role: &R, signal: Signal) {
        let interest = self.signals.borrow().get(&signal).map(Rc::clone);
        if let Some(interest) = interest {
            interest.callbacks.each(|callback| callback(role, signal));
        }
    }
}

/// While it lives, the loop is turning.
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

    #[test]
    fn tokens_survive_the_poller() {
        let all = [
            Token::Channel(1),
            Token::Process(2),
            Token::Listener(3),
            Token::Watch(MAX_NUMBER),
            Token::Signals,
            Token::Selector(0x1fff_ffff),
        ];
        for token in all {
            assert_eq!(Token::from_key(token.key()), Some(token));
        }
    }

    #[test]
    fn a_watch_says_what_it_waits_for_next() {
        use std::io::{Read as _, Write as _};
        use std::os::unix::net::UnixStream;

        let home = EventLoop::<RefCell<Vec<u8>>>::new().unwrap();
        let seen = RefCell::new(Vec::new());
        let (mut here, there) = UnixStream::pair().unwrap();
        let id = home
            .watch(there, Interest::Readable, |seen: &RefCell<_>, mut there| {
                let mut byte = [0];
                there.read_exact(&mut byte).unwrap();
                seen.borrow_mut().push(byte[0]);
                (byte[0] < 2).then_some(Interest::Readable)
            })
            .unwrap();
        for byte in [1, 2] {
            assert!(home.has_work());
            home.reference(id.into(), false);
            assert!(!home.has_work());
            home.reference(id.into(), true);
            here.write_all(&[byte]).unwrap();
            let mut ready = ReadyList::new();
            let (token, _) = home.wait(None, &mut ready).unwrap().next().unwrap();
            assert_eq!(token, Token::Watch(id.0));
            home.watch_ready(&seen, id.0);
        }
        assert_eq!(seen.take(), [1, 2]);
        assert!(!home.has_work(), "let go");
        assert_eq!(here.read(&mut [0]).unwrap(), 0, "and closed");
    }

    #[test]
    fn watch_numbers_begin_anew_and_skip_those_in_use() {
        use std::os::unix::net::UnixStream;

        let home = EventLoop::<()>::new().unwrap();
        let mut others = Vec::new();
        let mut watch = || {
            let (here, there) = UnixStream::pair().unwrap();
            others.push(there);
            home.watch(here, Interest::Readable, |(), _| Some(Interest::Readable))
                .unwrap()
        };
        let first = watch();
        home.last_watch.set(MAX_NUMBER - 1);
        let rest = [watch(), watch()];
        assert_eq!(first, WatchId(1));
        assert_eq!(rest, [WatchId(MAX_NUMBER), WatchId(2)]);
        for WatchId(number) in [first].into_iter().chain(rest) {
            let token = Token::Watch(number);
            assert_eq!(Token::from_key(token.key()), Some(token));
        }
        assert_eq!(home.watches.borrow().len(), 3);
    }

    #[test]
    fn referenced_watches_are_counted() {
        use std::os::unix::net::UnixStream;

        let home = EventLoop::<()>::new().unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let watch = |source: UnixStream| {
            home.watch(source, Interest::Readable, |(), _| None)
                .unwrap()
        };
        let (one, other) = (watch(one), watch(other));
        for referenced in [false, false, true, true, false] {
            home.reference(one.into(), referenced);
        }
        assert!(home.has_work(), "the other one");
        home.unwatch(other);
        assert!(!home.has_work());
        home.reference(one.into(), true);
        assert!(home.has_work());
        home.clear();
        assert!(!home.has_work());
    }

    #[test]
    fn only_one_turn_at_a_time() {
        let home = EventLoop::<()>::new().unwrap();
        let running = home.enter().unwrap();
        assert!(matches!(home.enter(), Err(Error::AlreadyRunning)));
        drop(running);
        assert!(home.enter().is_ok());
    }

    #[test]
    fn a_signal_wakes_the_loop_and_the_old_handler_comes_back() {
        let home = EventLoop::<RefCell<u32>>::new().unwrap();
        let count = RefCell::new(0);
        home.on_signal(Signal::USR1, |count: &RefCell<u32>, signal| {
            assert_eq!(signal, Signal::USR1);
            *count.borrow_mut() += 1;
        })
        .unwrap();
        crate::sys::signal::raise(Signal::USR1.number());
        let mut ready = ReadyList::new();
        let (token, _) = home.wait(None, &mut ready).unwrap().next().unwrap();
        assert_eq!(token, Token::Signals);
        for signal in home.take_signals() {
            home.call_signal(&count, signal);
        }
        assert_eq!(count.take(), 1);
        assert!(home.take_signals().is_empty());
        assert!(crate::sys::signal::is_handled(Signal::USR1.number()));
        home.clear();
        assert!(!crate::sys::signal::is_handled(Signal::USR1.number()));
    }

    #[test]
    fn some_signals_cannot_be_handled() {
        let home = EventLoop::<()>::new().unwrap();
        let error = home.on_signal(Signal::KILL, |(), _| {}).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(22));
    }
}

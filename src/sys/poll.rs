//! Waits for descriptors. A [`Poller`] waits for many descriptors. Each of them is owned by a
//! [`Registered`], or is passed to [`Poller::await_once`].
//!
//! The functions at the end of this file wait for a few descriptors without a poller.

use std::cell::{Cell, RefCell};
use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use polling::{Event, Events, PollMode};

use super::fd;
use super::owner::Owner;
use super::platform::epoll;
use crate::types::ordered_set::OrderedSet;

/// Maximum number of events of one wait. The next wait returns the remaining events.
///
/// A larger number needs more stack space in each wait. A smaller number takes more waits when many
/// descriptors are ready. On x86-64, 32 events take 384 bytes.
pub(super) const MAX_EVENTS: NonZeroUsize = NonZeroUsize::new(32).unwrap();

/// The readiness that a watch waits for.
///
/// See [`Worker::watch`](crate::Worker::watch) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Interest {
    /// Bytes can be read, or a connection can be accepted, or the peer has hung up.
    Readable,
    /// Bytes can be written, or the peer has hung up.
    Writable,
    /// The descriptor is readable or writable.
    Both,
}

/// A handle to a poller that waits for many descriptors. Clones share the same poller.
#[derive(Clone, Debug)]
pub(crate) struct Poller(Rc<Owned>);

/// A poller that is dropped only in its owner's process. A forked child shares the epoll instance,
/// so deleting a descriptor in one process would delete it for both.
#[derive(Debug)]
struct Owned {
    poller: ManuallyDrop<polling::Poller>,
    owner: Owner,
    /// Whether `epoll::wait` replaces the poller's own wait.
    waits_directly: bool,
    /// The descriptors that stay registered although no event is awaited. See
    /// [`Poller::keep_dormant`].
    dormant: RefCell<OrderedSet<RawFd>>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        if self.owner.is_current() {
            // SAFETY: the poller is not used again.
            unsafe { ManuallyDrop::drop(&mut self.poller) };
        }
    }
}

/// A descriptor that is registered with the poller while an event is awaited. The registration is
/// deleted before the descriptor can be closed.
///
/// While no event is awaited, the descriptor is not registered, except after
/// [`await_once`](Self::await_once). The reason is that each registration costs time in the
/// processes that make the descriptor ready. If 1,000 workers registered one listener, each
/// connection would notify 1,000 pollers, even those without interest.
#[derive(Debug)]
pub(crate) struct Registered<S: AsFd> {
    poller: Poller,
    key: usize,
    awaited: Cell<Option<Awaited>>,
    source: S,
}

/// The events that the poller reports for a registered descriptor.
#[derive(Clone, Copy, Debug)]
enum Awaited {
    Interest(Interest),
    /// Bytes that can be read, or the peer's hang-up, but only once.
    Once,
    /// The hang-up of a connection, or the shutdown of a listener. The system always reports these
    /// events, and no other event wakes the poller.
    HangUp,
}

/// The key and the readiness of a ready descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) key: usize,
    /// Whether the descriptor is readable, or the peer has hung up.
    pub(crate) readable: bool,
    /// Whether the descriptor is writable, or the peer has hung up.
    pub(crate) writable: bool,
}

/// The result of one wait. Each wait needs a list, so the list lives on the caller's stack to save
/// an allocation.
#[derive(Debug)]
pub(crate) struct ReadyList {
    /// The ready descriptors. The first `count` elements are initialized.
    list: [MaybeUninit<Ready>; MAX_EVENTS.get()],
    count: usize,
}

impl ReadyList {
    pub(crate) fn new() -> Self {
        Self {
            list: [const { MaybeUninit::uninit() }; MAX_EVENTS.get()],
            count: 0,
        }
    }

    pub(super) fn push(&mut self, ready: Ready) {
        if let Some(next) = self.list.get_mut(self.count) {
            next.write(ready);
            self.count += 1;
        }
    }

    /// Returns whether the list has no space left, so that more descriptors may be ready.
    pub(crate) fn is_full(&self) -> bool {
        self.count == self.list.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Ready> {
        let written = self.list.iter().take(self.count);
        // SAFETY: the first `count` elements are initialized.
        written.map(|ready| unsafe { ready.assume_init_ref() })
    }
}

fn event(key: usize, awaited: Awaited) -> Event {
    match awaited {
        Awaited::Interest(Interest::Readable) | Awaited::Once => Event::readable(key),
        Awaited::Interest(Interest::Writable) => Event::writable(key),
        Awaited::Interest(Interest::Both) => Event::all(key),
        Awaited::HangUp => Event::none(key),
    }
}

fn mode(awaited: Awaited) -> PollMode {
    match awaited {
        Awaited::Once => PollMode::Oneshot,
        Awaited::Interest(_) | Awaited::HangUp => PollMode::Level,
    }
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        let poller = polling::Poller::new()?;
        Ok(Self(Rc::new(Owned {
            waits_directly: epoll::reports_keys(&poller)?,
            poller: ManuallyDrop::new(poller),
            owner: Owner::current(),
            dormant: RefCell::default(),
        })))
    }

    /// Closes the poller's descriptors in a forked child that executes no program. A copy of
    /// `inert` takes over the descriptor number that the application may know.
    pub(crate) fn abandon(&self, inert: BorrowedFd<'_>) -> io::Result<()> {
        let number = self.0.poller.as_raw_fd();
        // Replace the descriptor before dropping the poller. Dropping the poller would otherwise
        // delete the poller's own descriptors from the epoll instance that the parent also uses.
        fd::replace(number, inert)?;
        // SAFETY: the pointer is valid for reads. `Owned::drop` does not drop the poller again,
        // because its owner is another process. For the same reason, `check_own` and `is_own` keep
        // every later call away from the poller, except `as_fd`. `as_fd` only returns the number,
        // which then belongs to a copy of `inert`.
        drop(unsafe { std::ptr::read(&raw const *self.0.poller) });
        // Dropping the poller has closed the descriptor with this number, so put a copy of `inert`
        // there again.
        fd::replace(number, inert)
    }

    /// Returns whether this process created the poller.
    pub(crate) fn is_own(&self) -> bool {
        self.0.owner.is_current()
    }

    fn check_own(&self) -> io::Result<()> {
        if self.is_own() {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EBADF))
        }
    }

    /// Takes ownership of a descriptor. If `interest` is not `None`, registers the descriptor in
    /// level-triggered mode. Its events carry `key`.
    pub(crate) fn add<S: AsFd>(
        &self,
        source: S,
        key: usize,
        interest: Option<Interest>,
    ) -> io::Result<Registered<S>> {
        self.try_add(source, key, interest)
            .map_err(|(_, error)| error)
    }

    /// Adds a descriptor like [`add`](Self::add), but returns the source together with an error.
    pub(crate) fn try_add<S: AsFd>(
        &self,
        source: S,
        key: usize,
        interest: Option<Interest>,
    ) -> Result<Registered<S>, (S, io::Error)> {
        let awaited = interest.map(Awaited::Interest);
        let inserted = match awaited {
            Some(new) => self.insert(&source, key, new),
            None => self.check_own(),
        };
        if let Err(error) = inserted {
            return Err((source, error));
        }
        Ok(Registered {
            poller: self.clone(),
            key,
            awaited: Cell::new(awaited),
            source,
        })
    }

    fn insert(&self, source: &impl AsFd, key: usize, new: Awaited) -> io::Result<()> {
        self.check_own()?;
        let number = source.as_fd().as_raw_fd();
        // SAFETY: the caller moves the source into a `Registered`, which exposes it only as a
        // shared reference. The `Drop` of `Registered` deletes the source from this poller before
        // the source itself is dropped.
        let added = unsafe {
            self.0
                .poller
                .add_with_mode(number, event(key, new), mode(new))
        };
        match added {
            Err(error)
                if error.kind() == io::ErrorKind::AlreadyExists
                    && self.0.dormant.borrow_mut().remove(number) =>
            {
                self.0
                    .poller
                    .modify_with_mode(source.as_fd(), event(key, new), mode(new))
            }
            added => added,
        }
    }

    /// Waits until a descriptor is ready, or until the timeout has passed. A signal does not end
    /// the wait.
    pub(crate) fn wait(&self, timeout: Option<Duration>, ready: &mut ReadyList) -> io::Result<()> {
        ready.count = 0;
        self.check_own()?;
        if self.0.waits_directly {
            return epoll::wait(&self.0.poller, timeout, ready);
        }
        let mut events = Events::with_capacity(MAX_EVENTS);
        self.0.poller.wait(&mut events, timeout)?;
        for event in events.iter() {
            ready.push(Ready {
                key: event.key,
                readable: event.readable,
                writable: event.writable,
            });
        }
        Ok(())
    }
}

// Descriptors that are awaited repeatedly, and that the application uses in between.
impl Poller {
    /// Reports once, with `key`, that bytes can be read or that the peer has hung up.
    ///
    /// After the report, the descriptor is still registered, so that the next call costs less. If
    /// the descriptor was awaited before, set `was_awaited`.
    ///
    /// The caller keeps the descriptor open until the report, or calls
    /// [`delete`](Self::delete) first.
    pub(crate) fn await_once(
        &self,
        fd: BorrowedFd<'_>,
        key: usize,
        was_awaited: bool,
    ) -> io::Result<()> {
        self.check_own()?;
        let poller = &self.0.poller;
        let event = event(key, Awaited::Once);
        if was_awaited {
            self.0.dormant.borrow_mut().remove(fd.as_raw_fd());
            match poller.modify_with_mode(fd, event, PollMode::Oneshot) {
                // A watch of the application has deleted the registration.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                modified => return modified,
            }
        }
        // SAFETY: the kernel deletes the registration when the last copy of the descriptor is
        // closed. If a process that the application forked has a copy, the registration stays, and
        // its event carries a key whose owner checks the descriptor that it has now.
        unsafe { poller.add_with_mode(fd.as_raw_fd(), event, PollMode::Oneshot) }
    }

    /// Records that the application uses a descriptor that stays registered after
    /// [`await_once`](Self::await_once). If the application watches it, [`add`](Self::add) replaces
    /// the registration.
    pub(crate) fn keep_dormant(&self, fd: BorrowedFd<'_>) {
        self.0.dormant.borrow_mut().insert(fd.as_raw_fd());
    }

    /// Deletes the registration of a dormant descriptor, which must be open. Does nothing if
    /// another registration has replaced the dormant one.
    pub(crate) fn delete_dormant(&self, number: RawFd) {
        if self.0.dormant.borrow().contains(number) {
            // SAFETY: the descriptor is open, because `forget_dormant` is called for every dormant
            // descriptor that the application closes.
            self.delete(unsafe { BorrowedFd::borrow_raw(number) });
        }
    }

    /// Forgets a dormant descriptor that the application has closed.
    pub(crate) fn forget_dormant(&self, number: RawFd) {
        self.0.dormant.borrow_mut().remove(number);
    }

    /// Deletes the registration that [`await_once`](Self::await_once) has made.
    pub(crate) fn delete(&self, fd: BorrowedFd<'_>) {
        if self.is_own() {
            self.0.dormant.borrow_mut().remove(fd.as_raw_fd());
            // Ignore an error, because deleting fails only if the registration no longer exists.
            let _ = self.0.poller.delete(fd);
        }
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.poller.as_fd()
    }
}

impl<S: AsFd> Registered<S> {
    /// Sets the awaited readiness. With `None`, the poller no longer reports the descriptor.
    ///
    /// # Errors
    ///
    /// Returns an error if the system rejects the change, or if another process owns the poller.
    pub(crate) fn set_interest(&self, interest: Option<Interest>) -> io::Result<()> {
        self.set_awaited(interest.map(Awaited::Interest))
    }

    /// Makes the poller report once that bytes can be read or that the peer has hung up. The
    /// descriptor stays registered after the report, so that the next call costs less.
    pub(crate) fn await_once(&self) -> io::Result<()> {
        self.set_awaited(Some(Awaited::Once))
    }

    /// Makes the poller report only that the descriptor hangs up.
    pub(crate) fn watch_hang_up(&self) -> io::Result<()> {
        self.set_awaited(Some(Awaited::HangUp))
    }

    fn set_awaited(&self, awaited: Option<Awaited>) -> io::Result<()> {
        self.poller.check_own()?;
        let poller = &self.poller.0.poller;
        match (self.awaited.get(), awaited) {
            (None, None) => {}
            (None, Some(new)) => {
                let number = self.source.as_fd().as_raw_fd();
                // SAFETY: `self` owns the source and exposes it only as a shared reference. The
                // `Drop` of `self` deletes the source from this poller before the source itself is
                // dropped.
                unsafe { poller.add_with_mode(number, event(self.key, new), mode(new))? };
            }
            (Some(_), Some(new)) => {
                let event = event(self.key, new);
                poller.modify_with_mode(&self.source, event, mode(new))?;
            }
            (Some(_), None) => poller.delete(&self.source)?,
        }
        self.awaited.set(awaited);
        Ok(())
    }

    /// Returns the descriptor, which is no longer registered.
    pub(crate) fn into_source(self) -> S {
        self.deregister();
        let this = ManuallyDrop::new(self);
        // SAFETY: the pointer is valid for reads. Each field is moved out once, and `this` is never
        // dropped.
        let poller = unsafe { std::ptr::read(&raw const this.poller) };
        // SAFETY: as for `poller`.
        let source = unsafe { std::ptr::read(&raw const this.source) };
        drop(poller);
        source
    }

    fn deregister(&self) {
        if self.is_watched() && self.is_own() {
            // Ignore an error, because deleting fails only if the registration no longer exists.
            let _ = self.poller.0.poller.delete(self.source.as_fd());
        }
    }

    /// Returns whether this process registered the descriptor.
    pub(crate) fn is_own(&self) -> bool {
        self.poller.is_own()
    }

    /// Returns whether any event of the descriptor is awaited.
    pub(crate) fn is_watched(&self) -> bool {
        self.awaited.get().is_some()
    }
}

impl<S: AsFd> Deref for Registered<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.source
    }
}

impl<S: AsFd> Drop for Registered<S> {
    fn drop(&mut self) {
        self.deregister();
    }
}

/// Returns a timeout in milliseconds, in the form that the system expects. Rounds up, because a
/// wait that ends too early would have to be repeated.
pub(super) fn timeout_millis(timeout: Option<Duration>) -> libc::c_int {
    timeout.map_or(-1, |timeout| {
        let millis = timeout.as_nanos().div_ceil(1_000_000);
        libc::c_int::try_from(millis).unwrap_or(libc::c_int::MAX)
    })
}

/// Waits until one of the descriptors is readable, the timeout has passed, or a signal has arrived.
/// Returns for each descriptor whether it is readable, including an error or a hang-up.
pub(crate) fn wait_readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    poll_fds(fds.map(|fd| (fd, libc::POLLIN)), timeout)
}

/// Waits until the descriptor is readable or writable, or a signal has arrived.
pub(crate) fn wait_readable_or_writable(fd: BorrowedFd<'_>) -> io::Result<()> {
    poll_fds([(fd, libc::POLLIN | libc::POLLOUT)], None).map(drop)
}

/// Returns whether a socket has been shut down. For a TCP listener, the shutdown of the receiving
/// direction suffices. For other sockets, both directions must be shut down.
pub(crate) fn has_hung_up(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let [hung_up] = poll_fds([(fd, 0)], Some(Duration::ZERO))?;
    Ok(hung_up)
}

/// Returns whether the descriptor is writable at this moment. An error or a hang-up also counts,
/// because a write then fails immediately.
pub(crate) fn is_writable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let [writable] = poll_fds([(fd, libc::POLLOUT)], Some(Duration::ZERO))?;
    Ok(writable)
}

fn poll_fds<const N: usize>(
    fds: [(BorrowedFd<'_>, libc::c_short); N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut fds = fds.map(|(fd, events)| libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    });
    let millis = timeout_millis(timeout);
    let count = libc::nfds_t::try_from(N).unwrap_or(0);
    // SAFETY: the pointer is valid for reads and writes of `count` elements.
    let result = unsafe { libc::poll(fds.as_mut_ptr(), count, millis) };
    match super::check(result) {
        // Report no ready descriptor, because a signal has ended the wait. If the loop handles this
        // signal, its handler has made the signal pipe readable, so the loop's next wait returns at
        // once.
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok([false; N]),
        // poll(2) reports EINVAL if the number of descriptors exceeds RLIMIT_NOFILE, which is a
        // temporary shortage. Return EMFILE, because EINVAL from accept(2) means that the listener
        // was shut down.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            Err(io::Error::from_raw_os_error(libc::EMFILE))
        }
        Err(error) => Err(error),
        Ok(_) => Ok(fds.map(|fd| fd.revents != 0)),
    }
}

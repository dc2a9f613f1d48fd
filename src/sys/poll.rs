//! The poller, and the one way to put something into it.

use std::cell::Cell;
use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::rc::Rc;
use std::time::Duration;

use polling::{Event, Events, PollMode};

use super::fd;
use super::owner::Owner;

/// How many events one wait returns at most; the rest come with the next one.
const EVENTS: NonZeroUsize = NonZeroUsize::new(32).unwrap();

/// What a watched descriptor is waited for.
///
/// See [`Worker::watch`](crate::Worker::watch) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Interest {
    /// Something can be read, or a connection accepted, or the other side is gone.
    Readable,
    /// Something can be written, or the other side is gone.
    Writable,
    /// Either of both.
    Both,
}

/// Waits for many descriptors.
#[derive(Clone, Debug)]
pub(crate) struct Poller(Rc<Owned>);

/// In another process than its owner, it is still the owner's: a descriptor that is removed there is
/// removed for both.
#[derive(Debug)]
struct Owned {
    poller: ManuallyDrop<polling::Poller>,
    owner: Owner,
    /// The system can be asked for events without the poller.
    is_direct: bool,
}

impl Drop for Owned {
    fn drop(&mut self) {
        if self.owner.is_current() {
            // SAFETY: it is not used again.
            unsafe { ManuallyDrop::drop(&mut self.poller) };
        }
    }
}

/// A descriptor that is in the poller as long as it is waited for. Whatever is in there, be it for
/// nothing, costs those who make it ready: of a listener that a thousand workers have, each connection
/// would look at a thousand pollers. It is taken out before it can be closed.
#[derive(Debug)]
pub(crate) struct Registered<S: AsFd> {
    poller: Poller,
    key: usize,
    awaited: Cell<Option<Awaited>>,
    source: S,
}

/// The events that the poller reports of a registered descriptor.
#[derive(Clone, Copy, Debug)]
enum Awaited {
    Interest(Interest),
    /// That a connection is gone, or a listener shut down. The system reports it in any case, and
    /// whatever else happens to the descriptor wakes nothing.
    HangUp,
}

/// One descriptor that is ready.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) key: usize,
    /// Or the other side is gone.
    pub(crate) readable: bool,
    /// Likewise.
    pub(crate) writable: bool,
}

/// All that one wait found. Whoever waits has it on the stack: it is needed for each message.
#[derive(Debug)]
pub(crate) struct ReadyList {
    /// The first `count` have been written.
    list: [MaybeUninit<Ready>; EVENTS.get()],
    count: usize,
}

impl ReadyList {
    pub(crate) fn new() -> Self {
        Self {
            list: [const { MaybeUninit::uninit() }; EVENTS.get()],
            count: 0,
        }
    }

    fn push(&mut self, ready: Ready) {
        if let Some(next) = self.list.get_mut(self.count) {
            next.write(ready);
            self.count += 1;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Ready> {
        let written = self.list.iter().take(self.count);
        // SAFETY: these have been written.
        written.map(|ready| unsafe { ready.assume_init_ref() })
    }
}

fn event(key: usize, awaited: Awaited) -> Event {
    match awaited {
        Awaited::Interest(Interest::Readable) => Event::readable(key),
        Awaited::Interest(Interest::Writable) => Event::writable(key),
        Awaited::Interest(Interest::Both) => Event::all(key),
        Awaited::HangUp => Event::none(key),
    }
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        let poller = polling::Poller::new()?;
        Ok(Self(Rc::new(Owned {
            is_direct: epoll::tells_keys(&poller)?,
            poller: ManuallyDrop::new(poller),
            owner: Owner::current(),
        })))
    }

    /// In a child that goes on with the memory of its parent: closes the poller's descriptors, and puts
    /// `inert` in the place of the one that the application may know.
    pub(crate) fn abandon(&self, inert: BorrowedFd<'_>) -> io::Result<()> {
        let number = self.0.poller.as_raw_fd();
        // Before it is dropped: it removes its own descriptors then, which would be the parent's loss.
        fd::replace(number, inert)?;
        // SAFETY: it lives, and is not used again: `owner` is another process.
        drop(unsafe { std::ptr::read(&raw const *self.0.poller) });
        fd::replace(number, inert)
    }

    /// Whether this process has created it.
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

    /// Adds a descriptor, level-triggered; events carry `key`.
    pub(crate) fn add<S: AsFd>(
        &self,
        source: S,
        key: usize,
        interest: Option<Interest>,
    ) -> io::Result<Registered<S>> {
        let registered = Registered {
            poller: self.clone(),
            key,
            awaited: Cell::new(None),
            source,
        };
        registered.set_interest(interest)?;
        Ok(registered)
    }

    /// Waits until something is ready or the time is over.
    pub(crate) fn wait(&self, timeout: Option<Duration>, ready: &mut ReadyList) -> io::Result<()> {
        ready.count = 0;
        self.check_own()?;
        if self.0.is_direct {
            return epoll::wait(&self.0.poller, timeout, ready);
        }
        let mut events = Events::with_capacity(EVENTS);
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

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.poller.as_fd()
    }
}

impl<S: AsFd> Registered<S> {
    /// # Errors
    ///
    /// The system refuses it, or the poller is another process's.
    pub(crate) fn set_interest(&self, interest: Option<Interest>) -> io::Result<()> {
        self.wait_for(interest.map(Awaited::Interest))
    }

    /// Reports nothing but that the descriptor has hung up.
    pub(crate) fn watch_hang_up(&self) -> io::Result<()> {
        self.wait_for(Some(Awaited::HangUp))
    }

    fn wait_for(&self, awaited: Option<Awaited>) -> io::Result<()> {
        self.poller.check_own()?;
        let poller = &self.poller.0.poller;
        match (self.awaited.get(), awaited) {
            (None, None) => {}
            (None, Some(new)) => {
                let number = self.source.as_fd().as_raw_fd();
                // SAFETY: this owns the source, lends it out only as a shared reference, and
                // deletes it from this poller in its `Drop`, before the source itself is dropped.
                unsafe { poller.add_with_mode(number, event(self.key, new), PollMode::Level)? };
            }
            (Some(_), Some(new)) => {
                let event = event(self.key, new);
                poller.modify_with_mode(&self.source, event, PollMode::Level)?;
            }
            (Some(_), None) => poller.delete(&self.source)?,
        }
        self.awaited.set(awaited);
        Ok(())
    }

    /// Whether this process has put it there.
    pub(crate) fn is_own(&self) -> bool {
        self.poller.is_own()
    }

    /// Whether it is waited for.
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
        if self.is_watched() && self.is_own() {
            // It can fail only if it is out already.
            let _ = self.poller.0.poller.delete(self.source.as_fd());
        }
    }
}

/// Waiting by one call to the system, where a wait of the poller takes five: it sets a timer of its own
/// and clears a notification, of which there are none here. The poller registers; its events carry the
/// key that it was given, which is tried out before anything relies on it.
#[cfg(target_os = "linux")]
mod epoll {
    use std::io;
    use std::mem::MaybeUninit;
    use std::os::fd::AsRawFd as _;
    use std::time::{Duration, Instant};

    use polling::{Event, PollMode, Poller};

    use super::{EVENTS, Ready, ReadyList};
    use crate::sys::{check, fd};

    /// Whether the number that the system stores with a descriptor is the key.
    pub(super) fn tells_keys(poller: &Poller) -> io::Result<bool> {
        const KEY: usize = 0x1234_5678;
        // SAFETY: eventfd takes two integers. This one is readable from the beginning.
        let ready = fd::adopt(check(unsafe { libc::eventfd(1, libc::EFD_CLOEXEC) })?);
        // SAFETY: it is taken out again below, before it is closed.
        unsafe { poller.add_with_mode(ready.as_raw_fd(), Event::all(KEY), PollMode::Level)? };
        let mut told = ReadyList::new();
        let waited = wait(poller, Some(Duration::ZERO), &mut told);
        poller.delete(&ready)?;
        waited?;
        Ok(told.count == 1 && told.iter().all(|told| told.key == KEY && told.writable))
    }

    pub(super) fn wait(
        poller: &Poller,
        timeout: Option<Duration>,
        ready: &mut ReadyList,
    ) -> io::Result<()> {
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut events = [const { MaybeUninit::<libc::epoll_event>::uninit() }; EVENTS.get()];
        let most = libc::c_int::try_from(EVENTS.get()).unwrap_or(1);
        let count = loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let millis = super::millis(left);
            // SAFETY: so many events are writable.
            let count = check(unsafe {
                libc::epoll_wait(poller.as_raw_fd(), events.as_mut_ptr().cast(), most, millis)
            });
            match count {
                // Its handler has made the poller readable if it matters.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                count => break usize::try_from(count?).unwrap_or(0),
            }
        };
        let gone = libc::EPOLLHUP | libc::EPOLLERR;
        let (readable, writable) = (
            libc::EPOLLIN | libc::EPOLLRDHUP | gone,
            libc::EPOLLOUT | gone,
        );
        for event in &events[..count] {
            // SAFETY: so many have been written.
            let libc::epoll_event { events, u64: key } = unsafe { event.assume_init() };
            ready.push(Ready {
                key: usize::try_from(key).unwrap_or(usize::MAX),
                readable: events & readable.unsigned_abs() != 0,
                writable: events & writable.unsigned_abs() != 0,
            });
        }
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
mod epoll {
    use std::io;
    use std::time::Duration;

    use polling::Poller;

    use super::ReadyList;

    pub(super) fn tells_keys(_poller: &Poller) -> io::Result<bool> {
        Ok(false)
    }

    pub(super) fn wait(
        _poller: &Poller,
        _timeout: Option<Duration>,
        _ready: &mut ReadyList,
    ) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A time as the system takes it, rounded up: waking too early would mean waking twice.
fn millis(timeout: Option<Duration>) -> libc::c_int {
    timeout.map_or(-1, |timeout| {
        let millis = timeout.as_nanos().div_ceil(1_000_000);
        libc::c_int::try_from(millis).unwrap_or(libc::c_int::MAX)
    })
}

/// Waits until one of the descriptors is readable, or the time is over, or a signal has come.
/// Returns which are.
pub(crate) fn wait_readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    wait_for(fds.map(|fd| (fd, libc::POLLIN)), timeout)
}

/// Waits until the descriptor is readable or writable.
pub(crate) fn wait_readable_or_writable(fd: BorrowedFd<'_>) -> io::Result<()> {
    wait_for([(fd, libc::POLLIN | libc::POLLOUT)], None).map(drop)
}

/// Whether a listener has been shut down: of TCP in any direction, of a Unix socket in both.
pub(crate) fn has_hung_up(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let [hung_up] = wait_for([(fd, 0)], Some(Duration::ZERO))?;
    Ok(hung_up)
}

/// Whether the descriptor is writable at this moment.
pub(crate) fn is_writable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let [writable] = wait_for([(fd, libc::POLLOUT)], Some(Duration::ZERO))?;
    Ok(writable)
}

fn wait_for<const N: usize>(
    fds: [(BorrowedFd<'_>, libc::c_short); N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut fds = fds.map(|(fd, events)| libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    });
    let millis = millis(timeout);
    let count = libc::nfds_t::try_from(N).unwrap_or(0);
    // SAFETY: the array lives through the call, and its length is given.
    let result = unsafe { libc::poll(fds.as_mut_ptr(), count, millis) };
    match super::check(result) {
        // Its handler has made the poller readable if it matters.
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok([false; N]),
        Err(error) => Err(error),
        Ok(_) => Ok(fds.map(|fd| fd.revents != 0)),
    }
}

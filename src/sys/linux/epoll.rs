//! Waits on a `polling::Poller` by epoll_wait(2) itself.
//!
//! One call waits, where `Poller::wait` makes five: it also sets a timer of its own and clears a
//! notification, which this crate never uses. The poller still registers descriptors. Its events carry
//! the key that it was given; `reports_keys` checks that before anything relies on it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use polling::{Event, PollMode, Poller};

use crate::sys::poll::{MAX_EVENTS, Ready, ReadyList, timeout_millis};
use crate::sys::{check, fd};

/// Returns whether the kernel's events of this poller carry the key of a descriptor.
pub(in crate::sys) fn reports_keys(poller: &Poller) -> io::Result<bool> {
    const KEY: usize = 0x1234_5678;
    // SAFETY: eventfd takes two integers. This one is readable from the beginning.
    let readable = fd::adopt(check(unsafe { libc::eventfd(1, libc::EFD_CLOEXEC) })?);
    // SAFETY: the descriptor is deleted below, before it is closed.
    unsafe { poller.add_with_mode(readable.as_raw_fd(), Event::all(KEY), PollMode::Level)? };
    let mut ready = ReadyList::new();
    let waited = wait(poller, Some(Duration::ZERO), &mut ready);
    poller.delete(&readable)?;
    waited?;
    let is_expected = |ready: &Ready| ready.key == KEY && ready.writable;
    Ok(ready.iter().count() == 1 && ready.iter().all(is_expected))
}

pub(in crate::sys) fn wait(
    poller: &Poller,
    timeout: Option<Duration>,
    ready: &mut ReadyList,
) -> io::Result<()> {
    let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut events = [const { MaybeUninit::<libc::epoll_event>::uninit() }; MAX_EVENTS.get()];
    let capacity = libc::c_int::try_from(MAX_EVENTS.get()).unwrap_or(1);
    let count = loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let millis = timeout_millis(left);
        // SAFETY: `capacity` events are writable.
        let count = check(unsafe {
            libc::epoll_wait(
                poller.as_raw_fd(),
                events.as_mut_ptr().cast(),
                capacity,
                millis,
            )
        });
        match count {
            // The signal's handler has made the poller readable if the loop handles this signal.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            count => break usize::try_from(count?).unwrap_or(0),
        }
    };
    let hung_up = libc::EPOLLHUP | libc::EPOLLERR;
    let readable = libc::EPOLLIN | libc::EPOLLRDHUP | hung_up;
    let writable = libc::EPOLLOUT | hung_up;
    for event in &events[..count] {
        // SAFETY: the kernel has written the first `count` events.
        let libc::epoll_event { events, u64: key } = unsafe { event.assume_init() };
        ready.push(Ready {
            key: usize::try_from(key).unwrap_or(usize::MAX),
            readable: events & readable.unsigned_abs() != 0,
            writable: events & writable.unsigned_abs() != 0,
        });
    }
    Ok(())
}

//! Waits on a `polling::Poller` by calling epoll_wait(2) directly.
//!
//! A direct wait is one system call. `Poller::wait` makes five, because it also sets its own timer
//! and clears a notification that this crate never uses. The poller still registers descriptors,
//! and its events carry their keys. `reports_keys` checks this before anything relies on it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use polling::{Event, PollMode, Poller};

use crate::sys::check;
use crate::sys::poll::{MAX_EVENTS, Ready, ReadyList, timeout_millis};

/// Returns whether the kernel's events of this poller carry the descriptor's key.
pub(in crate::sys) fn reports_keys(poller: &Poller) -> io::Result<bool> {
    /// An arbitrary key, which the kernel must return unchanged.
    const KEY: usize = 0x1234_5678;
    // Start the counter at 1, so that the descriptor is readable immediately.
    // SAFETY: eventfd accesses no memory of this process.
    let number = check(unsafe { libc::eventfd(1, libc::EFD_CLOEXEC) })?;
    // SAFETY: the kernel has just opened the descriptor for this call.
    let readable = unsafe { OwnedFd::from_raw_fd(number) };
    // SAFETY: the poller deletes the descriptor below, before the descriptor is closed.
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
        // SAFETY: the pointer is valid for writes of `capacity` events.
        let count = check(unsafe {
            libc::epoll_wait(
                poller.as_raw_fd(),
                events.as_mut_ptr().cast(),
                capacity,
                millis,
            )
        });
        match count {
            // Repeat the wait. If the loop handles this signal, its handler has made the signal
            // pipe readable, so the next wait returns at once.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            count => break usize::try_from(count?).unwrap_or(0),
        }
    };
    let hung_up = libc::EPOLLHUP | libc::EPOLLERR;
    let readable = libc::EPOLLIN | libc::EPOLLRDHUP | hung_up;
    let writable = libc::EPOLLOUT | hung_up;
    for event in &events[..count] {
        // SAFETY: the kernel has initialized the first `count` events.
        let libc::epoll_event { events, u64: key } = unsafe { event.assume_init() };
        ready.push(Ready {
            key: usize::try_from(key).unwrap_or(usize::MAX),
            readable: events & readable.unsigned_abs() != 0,
            writable: events & writable.unsigned_abs() != 0,
        });
    }
    Ok(())
}

//! Provides a timer that sends a signal to a thread (timer_create(2)).
//!
//! The system calls are made directly, because musl's `timer_create` links the code that starts
//! threads, which only `SIGEV_THREAD` needs.

use std::io;
use std::marker::PhantomData;
use std::time::Duration;

use crate::sys::platform::child::check;

/// A timer. It exists until it is deleted, or until the process ends or executes a program. A child
/// process does not inherit it.
///
/// The type is `!Send`, because each caller passes its own thread.
#[derive(Clone, Copy)]
pub(super) struct Timer(libc::c_int, PhantomData<*const ()>);

/// `struct itimerspec` as the kernel reads it in `SYS_timer_settime`: on 32-bit systems with 32-bit
/// times, even if the C library uses 64-bit times.
#[repr(C)]
struct TimerSpec {
    interval: [libc::c_long; 2],
    value: [libc::c_long; 2],
}

impl Timer {
    /// Creates a timer that sends `signal` to `thread`.
    pub(super) fn new(signal: libc::c_int, thread: libc::pid_t) -> io::Result<Self> {
        // SAFETY: all zeroes is a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        event.sigev_notify_thread_id = thread;
        let mut id: libc::c_int = 0;
        let (call, clock) = (libc::SYS_timer_create, libc::CLOCK_MONOTONIC);
        // SAFETY: `event` is valid for reads, and `id` is valid for writes of a timer ID.
        check(unsafe { libc::syscall(call, clock, &raw const event, &raw mut id) })?;
        Ok(Self(id, PhantomData))
    }

    /// Makes the timer expire after `left`, or never if `left` is `None`. `left` must not be zero,
    /// because the kernel would disarm the timer.
    pub(super) fn set(self, left: Option<Duration>) -> io::Result<()> {
        let value = left.map_or([0, 0], |left| {
            // If the seconds do not fit, because they have only 32 bits on some systems, wait for
            // 68 years instead.
            let seconds = left.as_secs().try_into().unwrap_or(0x7fff_ffff);
            [seconds, left.subsec_nanos() as _]
        });
        let interval = [0, 0];
        let time = TimerSpec { interval, value };
        let (call, old) = (libc::SYS_timer_settime, std::ptr::null_mut::<TimerSpec>());
        // SAFETY: `time` is valid for reads, and the old time is not requested.
        check(unsafe { libc::syscall(call, self.0, 0, &raw const time, old) })
    }

    pub(super) fn delete(self) {
        // SAFETY: timer_delete accesses no memory of this process.
        unsafe { libc::syscall(libc::SYS_timer_delete, self.0) };
    }
}

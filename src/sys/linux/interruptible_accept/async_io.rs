//! Enables signals for arrivals on a descriptor (`O_ASYNC` in fcntl(2)).

use std::io;
use std::os::fd::RawFd;

use crate::sys::check;
use crate::sys::fd::{set_status_flag, status_flags};

// `libc` lacks these constants of fcntl(2). Their values are the same on all architectures that
// Rust supports.
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const F_GETOWN_EX: libc::c_int = 16;
const F_OWNER_TID: libc::c_int = 0;

/// `struct f_owner_ex` of fcntl(2). With `F_OWNER_TID`, `number` is a thread id.
#[repr(C)]
struct OwnerEx {
    kind: libc::c_int,
    number: libc::pid_t,
}

/// Makes the kernel send `signal` to a thread for each arrival.
///
/// # Errors
///
/// Returns an error if the descriptor is not open, or `Unsupported` if the descriptor cannot signal
/// arrivals.
pub(super) fn enable(source: RawFd, signal: libc::c_int, thread: libc::pid_t) -> io::Result<()> {
    set_signal(source, signal)?;
    set_owner(source, thread)?;
    set_status_flag(source, libc::O_ASYNC, true)?;
    // Check the flag, because the kernel reports no error if the descriptor cannot signal arrivals.
    if status_flags(source)? & libc::O_ASYNC == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(())
}

/// Undoes [`enable`], unless the number was closed and now belongs to another descriptor.
pub(super) fn disable(source: RawFd, thread: libc::pid_t) {
    if owner(source).is_ok_and(|owner| owner == thread) {
        let _ = set_status_flag(source, libc::O_ASYNC, false);
        let _ = set_owner(source, 0);
        let _ = set_signal(source, 0);
    }
}

/// Sets a descriptor's signal. The value 0 selects the default signal.
fn set_signal(source: RawFd, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: F_SETSIG accesses no memory of this process.
    check(unsafe { libc::fcntl(source, F_SETSIG, signal) })?;
    Ok(())
}

/// Sets the thread that receives the signals. The value 0 selects no thread.
fn set_owner(source: RawFd, thread: libc::pid_t) -> io::Result<()> {
    let owner = OwnerEx {
        kind: F_OWNER_TID,
        number: thread,
    };
    // SAFETY: the pointer is valid for reads of an `OwnerEx`.
    check(unsafe { libc::fcntl(source, F_SETOWN_EX, &raw const owner) })?;
    Ok(())
}

/// Returns the thread that receives a descriptor's signals.
pub(super) fn owner(source: RawFd) -> io::Result<libc::pid_t> {
    let mut owner = OwnerEx { kind: 0, number: 0 };
    // SAFETY: the pointer is valid for writes of an `OwnerEx`.
    check(unsafe { libc::fcntl(source, F_GETOWN_EX, &raw mut owner) })?;
    Ok(owner.number)
}

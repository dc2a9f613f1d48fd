//! The signal that a process gets when its parent exits: prctl(2), `PR_SET_PDEATHSIG`.
//!
//! A child requests it between `fork` and `execve`. A worker requests it again, because `execve` drops
//! the request if the program has file capabilities or a set-user-ID bit.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use crate::sys::{check, option};

/// Makes the kernel kill this child when the thread that forked it exits. Async-signal-safe.
///
/// # Errors
///
/// The parent has exited already, or a sandbox refuses the request.
pub(in crate::sys) fn request(parent: u32) -> io::Result<()> {
    request_kill()?;
    let now = parent_pid();
    // If the parent exited before the request, no signal comes. A parent in another PID namespace has
    // the number 0 here, which proves nothing.
    if now == 0 || now.unsigned_abs() == parent {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ESRCH))
    }
}

/// Makes the kernel kill this worker when its master exits. If the master has exited already, kills
/// this process.
///
/// The signal follows the parent. So nothing is requested unless the parent is the master, whose
/// process id the kernel stores with the channel. A process outside this PID namespace has the number
/// 0: two zeroes are treated as the same process.
pub(crate) fn renew(channel: BorrowedFd<'_>) {
    let Some(master) = creator(channel) else {
        return;
    };
    if parent_pid() != master {
        return;
    }
    // If a sandbox refuses the request, the worker still exits when the channel ends.
    let _ = request_kill();
    if parent_pid() != master {
        // SAFETY: raise takes an integer.
        unsafe { libc::raise(libc::SIGKILL) };
    }
}

fn request_kill() -> io::Result<()> {
    let signal = libc::c_ulong::from(libc::SIGKILL.unsigned_abs());
    // SAFETY: PR_SET_PDEATHSIG takes a signal number.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) })?;
    Ok(())
}

fn parent_pid() -> libc::pid_t {
    // SAFETY: always callable.
    unsafe { libc::getppid() }
}

/// Returns the process that created a socketpair: unix(7), `SO_PEERCRED`.
fn creator(end: BorrowedFd<'_>) -> Option<libc::pid_t> {
    // SAFETY: any bytes are a valid ucred.
    let peer: io::Result<libc::ucred> =
        unsafe { option::get(end.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED) };
    peer.ok().map(|peer| peer.pid)
}

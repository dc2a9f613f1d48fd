//! Requests the signal that a process receives when its parent exits (`PR_SET_PDEATHSIG` in
//! prctl(2)).
//!
//! A child requests the signal between `fork` and `execve`. A worker repeats the request, because
//! `execve` drops the request if the program has file capabilities or a set-user-ID bit.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use crate::sys::{check, option};

/// Makes the kernel kill this child when the thread that forked it exits. Async-signal-safe.
///
/// # Errors
///
/// Returns an error if the parent has already exited, or if a sandbox rejects the request.
pub(in crate::sys) fn request(parent: u32) -> io::Result<()> {
    request_kill()?;
    let now = parent_pid();
    // Check the parent, because no signal comes if the parent exited before the request. For a
    // parent in another PID namespace, getppid(2) returns 0, so no check is possible.
    if now == 0 || now.unsigned_abs() == parent {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ESRCH))
    }
}

/// Makes the kernel kill this worker when its master exits. Kills this process if the master exits
/// during the request.
///
/// The kernel sends the signal when the parent exits, whichever process that is. So this function
/// requests nothing unless the parent is the master. The kernel stores the master's process id with
/// the channel. Both that id and the parent's id are 0 for a process outside this PID namespace. If
/// both are 0, this function treats the parent as the master.
pub(crate) fn renew(channel: BorrowedFd<'_>) {
    let Some(master) = creator(channel) else {
        return;
    };
    if parent_pid() != master {
        return;
    }
    // Ignore an error from a sandbox, because the worker also exits when the channel ends.
    let _ = request_kill();
    if parent_pid() != master {
        // SAFETY: raise accesses no memory of this process.
        unsafe { libc::raise(libc::SIGKILL) };
    }
}

/// Returns whether this process has requested that the kernel kill it when its parent exits. The
/// request persists when the process executes another program, unless the program has file
/// capabilities or a set-user-ID bit. A child of the process does not inherit the request.
pub(crate) fn is_requested() -> bool {
    let mut signal: libc::c_int = 0;
    // SAFETY: the pointer is valid for writes of one `c_int`.
    let result = unsafe { libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal) };
    result == 0 && signal == libc::SIGKILL
}

fn request_kill() -> io::Result<()> {
    let signal = libc::c_ulong::from(libc::SIGKILL.unsigned_abs());
    // SAFETY: PR_SET_PDEATHSIG accesses no memory of this process.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) })?;
    Ok(())
}

fn parent_pid() -> libc::pid_t {
    // SAFETY: getppid has no preconditions.
    unsafe { libc::getppid() }
}

/// Returns the id of the process that created a socketpair (`SO_PEERCRED` in unix(7)).
fn creator(end: BorrowedFd<'_>) -> Option<libc::pid_t> {
    // SAFETY: every bit pattern is a valid `ucred`.
    let peer: io::Result<libc::ucred> =
        unsafe { option::get(end.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED) };
    peer.ok().map(|peer| peer.pid)
}

//! A worker's tie to the life of its master.

use std::os::fd::BorrowedFd;

/// Makes the kernel kill this process when its master ends. Between `fork` and `execve` that has been
/// requested already, but `execve` clears the request if the program has file capabilities or a set-user-ID
/// bit: prctl(2), `PR_SET_PDEATHSIG`.
///
/// If the master has ended before the request, the signal that it would have caused is sent here.
///
/// The signal follows the parent. So nothing is requested if the master, whose process id the kernel has
/// stored with the channel that it created, is known and is not the parent. What has no number in this
/// PID namespace is 0: then it is the parent if that has no number either.
#[cfg(target_os = "linux")]
pub(crate) fn die_with_master(channel: BorrowedFd<'_>) {
    let Some(master) = creator(channel) else {
        return;
    };
    if parent() != master {
        return;
    }
    let signal = libc::c_ulong::from(libc::SIGKILL.unsigned_abs());
    // If a sandbox refuses it, the end of the channel still tells that the master has ended.
    // SAFETY: PR_SET_PDEATHSIG takes a signal number.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) };
    if parent() != master {
        // SAFETY: raise takes a signal number.
        unsafe { libc::raise(libc::SIGKILL) };
    }
}

/// The end of the channel has to do.
#[cfg(not(target_os = "linux"))]
pub(crate) fn die_with_master(_channel: BorrowedFd<'_>) {}

#[cfg(target_os = "linux")]
fn parent() -> libc::pid_t {
    // SAFETY: always callable.
    unsafe { libc::getppid() }
}

/// The process that has made the socketpair: unix(7), `SO_PEERCRED`.
#[cfg(target_os = "linux")]
fn creator(end: BorrowedFd<'_>) -> Option<libc::pid_t> {
    use std::os::fd::AsRawFd as _;

    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut size = libc::socklen_t::try_from(size_of_val(&peer)).ok()?;
    let (value, length) = ((&raw mut peer).cast(), &raw mut size);
    let (level, option) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
    // SAFETY: value and size are writable, and the size is that of the value.
    let got = unsafe { libc::getsockopt(end.as_raw_fd(), level, option, value, length) };
    (got == 0).then_some(peer.pid)
}

//! Process descriptors (pidfd_open(2), since Linux 5.3).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::is_unavailable;
use super::wait::KernelUsage;
use crate::sys::process::pid::{Exit, Usage};
use crate::sys::{check, retry};

/// Opens a process's descriptor, which becomes readable when the process exits. Returns `None` if
/// the call fails.
pub(in crate::sys) fn open(number: libc::pid_t) -> Option<OwnedFd> {
    // The kernel makes the new descriptor closed on exec.
    // SAFETY: pidfd_open accesses no memory of this process.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, number, 0) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just opened the descriptor for this call.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits for a process by its descriptor. Waiting by process id is not safe, because another child
/// may have the same id after the application has waited for this child. Returns `None` if the
/// kernel does not support this call, or if a sandbox rejects it. The inner result is `None` if
/// `options` contains WNOHANG and the process is still running.
///
/// The system call is made directly, because the C library's `waitid` does not return the usage.
pub(in crate::sys) fn wait(
    process: BorrowedFd<'_>,
    options: libc::c_int,
) -> Option<io::Result<Option<Exit>>> {
    // SAFETY: all zeroes is a valid `siginfo_t`.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let mut used = KernelUsage::default();
    let (kind, number) = (libc::P_PIDFD, process.as_raw_fd());
    let options = libc::WEXITED | options;
    let waited = retry(|| {
        let (info, used) = (&raw mut info, &raw mut used);
        // SAFETY: both pointers are valid for writes of their structures.
        let waited = unsafe { libc::syscall(libc::SYS_waitid, kind, number, info, options, used) };
        check(libc::c_int::try_from(waited).unwrap_or(-1))
    });
    if let Err(error) = waited {
        return (!is_unavailable(&error)).then_some(Err(error));
    }
    // SAFETY: the call has filled in the structure for a child, or left it zero.
    let pid = unsafe { info.si_pid() };
    // SAFETY: the call has filled in the structure for a child, or left it zero.
    let status = unsafe { info.si_status() };
    let status = match info.si_code {
        libc::CLD_EXITED => status << 8,
        libc::CLD_DUMPED => status | 0x80,
        _ => status,
    };
    Some(Ok((pid != 0).then(|| Exit {
        status: ExitStatus::from_raw(status),
        usage: Some(Usage::from(&used)),
    })))
}

/// Returns the exit status of a process that other code has waited for. Returns `None` if the
/// kernel does not report the status, as before Linux 6.15.
pub(in crate::sys) fn exit_status(process: BorrowedFd<'_>) -> Option<ExitStatus> {
    /// The first version of `struct pidfd_info`.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    /// `_IOWR(0xff, 11, Info)`, which has this value on every architecture.
    const PIDFD_GET_INFO: u32 = 0xc040_ff0b;
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    let mut info = Info {
        mask: PIDFD_INFO_EXIT,
        ..Info::default()
    };
    let number = process.as_raw_fd();
    // SAFETY: the pointer is valid for writes of the structure, whose size is part of the request.
    let got = unsafe { libc::ioctl(number, PIDFD_GET_INFO as _, &raw mut info) };
    let is_known = got == 0 && info.mask & PIDFD_INFO_EXIT != 0;
    is_known.then(|| ExitStatus::from_raw(info.exit_code))
}

/// Sends a signal. Returns `None` if the kernel lacks the call, or if a sandbox rejects it.
pub(in crate::sys) fn signal(
    process: BorrowedFd<'_>,
    signal: libc::c_int,
) -> Option<io::Result<()>> {
    send_signal(process, signal, 0)
}

/// Sends a signal to the process group that the process leads, even if the process has been reaped.
/// Returns `None` if the kernel does not support this (before Linux 6.9), or if a sandbox rejects
/// it.
pub(in crate::sys) fn signal_group(
    process: BorrowedFd<'_>,
    signal: libc::c_int,
) -> Option<io::Result<()>> {
    const PIDFD_SIGNAL_PROCESS_GROUP: libc::c_uint = 1 << 2;
    send_signal(process, signal, PIDFD_SIGNAL_PROCESS_GROUP)
}

fn send_signal(
    process: BorrowedFd<'_>,
    signal: libc::c_int,
    flags: libc::c_uint,
) -> Option<io::Result<()>> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    let (call, number) = (libc::SYS_pidfd_send_signal, process.as_raw_fd());
    // SAFETY: the call accepts a null pointer, and then accesses no memory of this process.
    let sent = unsafe { libc::syscall(call, number, signal, no_info, flags) };
    if sent == 0 {
        return Some(Ok(()));
    }
    let error = io::Error::last_os_error();
    // EPERM may also mean that this process may not signal the other one. The caller then uses
    // kill(2), which returns the same error.
    (!is_unavailable(&error)).then_some(Err(error))
}

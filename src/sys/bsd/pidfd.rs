//! Replaces Linux's process descriptors with functions that return `None`. The caller uses the
//! process id instead.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitStatus;

use crate::sys::process::Exit;

pub(in crate::sys) fn open(_number: libc::pid_t) -> Option<OwnedFd> {
    None
}

pub(in crate::sys) fn wait(
    _process: BorrowedFd<'_>,
    _options: libc::c_int,
) -> Option<io::Result<Option<Exit>>> {
    None
}

pub(in crate::sys) fn exit_status(_process: BorrowedFd<'_>) -> Option<ExitStatus> {
    None
}

pub(in crate::sys) fn signal(
    _process: BorrowedFd<'_>,
    _signal: libc::c_int,
) -> Option<io::Result<()>> {
    None
}

pub(in crate::sys) fn signal_group(
    _process: BorrowedFd<'_>,
    _signal: libc::c_int,
) -> Option<io::Result<()>> {
    None
}

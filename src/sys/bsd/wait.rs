//! Waits for a child by its process id.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use crate::sys::process::pid::{Exit, Usage, cpu_time, max_rss};
use crate::sys::{check, retry};

/// Waits for a child with wait4(2). The result is `None` if `options` contains WNOHANG and the child is
/// still running.
pub(in crate::sys) fn by_number(
    number: libc::pid_t,
    options: libc::c_int,
) -> io::Result<Option<Exit>> {
    let mut status = 0;
    // SAFETY: all zeroes is a valid `rusage`.
    let mut used: libc::rusage = unsafe { std::mem::zeroed() };
    let pid = retry(|| {
        // SAFETY: both pointers are valid for writes. The call waits only for this child.
        check(unsafe { libc::wait4(number, &raw mut status, options, &raw mut used) })
    })?;
    let usage = Usage {
        user_cpu_time: cpu_time(used.ru_utime.tv_sec, used.ru_utime.tv_usec),
        system_cpu_time: cpu_time(used.ru_stime.tv_sec, used.ru_stime.tv_usec),
        max_rss: max_rss(used.ru_maxrss),
    };
    Ok((pid != 0).then(|| Exit {
        status: ExitStatus::from_raw(status),
        usage: Some(usage),
    }))
}

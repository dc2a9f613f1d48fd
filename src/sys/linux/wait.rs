//! Waits for a child by its process id, and reads the resources that a child has used.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use crate::sys::process::pid::{Exit, Usage, cpu_time, max_rss};
use crate::sys::{check, retry};

/// The fields of `rusage` that the kernel writes. On 32-bit systems the C library's structure may
/// be longer.
#[repr(C)]
#[derive(Default)]
pub(super) struct KernelUsage {
    user: [libc::c_long; 2],
    system: [libc::c_long; 2],
    max_rss: libc::c_long,
    others: [libc::c_long; 13],
}

impl From<&KernelUsage> for Usage {
    fn from(used: &KernelUsage) -> Self {
        Self {
            user_cpu_time: cpu_time(used.user[0], used.user[1]),
            system_cpu_time: cpu_time(used.system[0], used.system[1]),
            max_rss: max_rss(used.max_rss),
        }
    }
}

/// Waits for a child with wait4(2). The result is `None` if `options` contains WNOHANG and the child is
/// still running.
///
/// The system call is made directly. For programs with 32-bit times, as those of Rust, `wait4` of musl
/// 1.2 does not return the usage on 32-bit systems.
pub(in crate::sys) fn by_number(
    number: libc::pid_t,
    options: libc::c_int,
) -> io::Result<Option<Exit>> {
    let mut status: libc::c_int = 0;
    let mut used = KernelUsage::default();
    let pid = retry(|| {
        let (status, used) = (&raw mut status, &raw mut used);
        // SAFETY: both pointers are valid for writes. The call waits only for this child.
        let pid = unsafe { libc::syscall(libc::SYS_wait4, number, status, options, used) };
        check(libc::c_int::try_from(pid).unwrap_or(-1))
    })?;
    Ok((pid != 0).then(|| Exit {
        status: ExitStatus::from_raw(status),
        usage: Some(Usage::from(&used)),
    }))
}

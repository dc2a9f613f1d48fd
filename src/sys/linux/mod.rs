//! Implements, for Linux, the parts that differ between systems, including the abilities that only
//! Linux has.
//!
//! A function that uses a Linux system call, flag or file belongs here. Differences between Linux's
//! architectures and C libraries also belong here. `bsd` has a counterpart of each item.

pub(super) mod blocked_threads;
pub(super) mod child;
pub(super) mod clone;
pub(super) mod epoll;
pub(super) mod file;
pub(crate) mod filter;
pub(crate) mod interruptible_accept;
pub(super) mod own_program;
pub(crate) mod parent_death_signal;
pub(super) mod pidfd;
pub(super) mod proc;
pub(crate) mod shared_number;
pub(super) mod socket;
pub(super) mod threads;
mod uapi;
pub(super) mod wait;
pub(super) mod zeroed_on_fork;

/// The highest signal number of the architecture.
pub(super) const MAX_SIGNAL: u8 = if cfg!(any(target_arch = "mips", target_arch = "mips64")) {
    128
} else {
    64
};

/// The `si_code` of a signal that the kernel itself sends (sigaction(2)), for instance to a
/// background job that reads from its terminal.
pub(super) const SI_KERNEL: libc::c_int = 0x80;

/// The number of bytes in one unit of `ru_maxrss`.
pub(super) const MAX_RSS_UNIT: u64 = 1024;

/// Returns whether an error may mean that the kernel lacks a system call or does not know its flags,
/// or that a sandbox rejects the call. Sandboxes use different error numbers. The caller falls back
/// to an older call, which returns the real error if there is another one.
pub(super) fn is_unavailable(error: &std::io::Error) -> bool {
    let number = error.raw_os_error();
    [libc::ENOSYS, libc::EINVAL, libc::EPERM, libc::EACCES]
        .map(Some)
        .contains(&number)
}

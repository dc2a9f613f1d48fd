//! Makes a child by clone(2), with its process descriptor and without a copy of the memory.

use std::io;
use std::os::fd::RawFd;

use crate::sys::check;
use crate::sys::fd::adopt;
use crate::sys::process::child::{Child, ParentWait};
use crate::sys::process::{Pid, Started};

/// Size of the child's stack in bytes: about twice what the child needs.
const STACK: usize = 64 << 10;

/// Makes a child that executes its program. Returns `None` if a sandbox does not know the call or its
/// flags.
///
/// The descriptor exists from the beginning. If the host ignores SIGCHLD, the number of a child that
/// exits at once may soon belong to another process.
///
/// A child that stays the same user runs while the kernel suspends the parent, until it has executed its
/// program or reported a failure. Meanwhile it uses the memory of its parent, so that nothing is copied.
/// Only the child, or a signal that kills the parent, ends this wait.
///
/// A child that changes its user is not waited for here, because processes of that user may stop it. It
/// gets its own memory, because a process that traces it could reach the parent.
pub(in crate::sys) fn clone(child: &Child<'_>) -> Option<io::Result<Started>> {
    match try_clone(child) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOSYS | libc::EINVAL | libc::EPERM)
            ) =>
        {
            None
        }
        cloned => Some(cloned),
    }
}

fn parent_wait(child: &Child<'_>) -> ParentWait {
    if child.changes_identity() {
        ParentWait::Polling
    } else {
        ParentWait::Suspended
    }
}

fn try_clone(child: &Child<'_>) -> io::Result<Started> {
    extern "C" fn exec(child: *mut libc::c_void) -> libc::c_int {
        // SAFETY: the frame of the parent has the value, and the parent waits, or this is a copy.
        let child = unsafe { &*child.cast::<Child<'_>>() };
        child.exec(parent_wait(child))
    }
    let wait = parent_wait(child);
    let flags = match wait {
        ParentWait::Suspended if can_share_memory() => libc::CLONE_VFORK | libc::CLONE_VM,
        ParentWait::Suspended => libc::CLONE_VFORK,
        ParentWait::Polling => 0,
    };
    let flags = flags | libc::CLONE_PIDFD | libc::SIGCHLD;
    // The element type aligns the end of the stack.
    let mut stack = Vec::<u128>::with_capacity(STACK / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let argument = std::ptr::from_ref(child).cast_mut().cast();
    let mut process: RawFd = -1;
    // SAFETY: while a child shares this memory, stack and argument stay valid: this thread is suspended
    // until the child has executed its program or exited. The child writes to its own stack, and has its
    // own table of signal handlers; the C library may note that some signals are handled. It makes only
    // async-signal-safe calls that do not need the C library's preparations for a fork. Any other child
    // has a copy of the memory. The kernel writes the descriptor to `process`.
    let number = unsafe { libc::clone(exec, top.cast(), flags, argument, &raw mut process) };
    let pid = Pid::from_raw(check(number)?);
    // Linux before 5.2 ignores the flag.
    let process = (process >= 0).then(|| adopt(process));
    Ok(Started {
        pid,
        process: process.or_else(|| pid.open()),
        wait,
    })
}

/// Returns whether the C library's `clone` does not change memory that a child shares with its parent.
///
/// glibc before 2.25 caches the process and thread ids in the memory of the thread, and its `clone`
/// writes -1 there in a child with CLONE_VM (bug 19957; on some architectures until 2.24). Then `raise`,
/// `abort` and `pthread_kill` fail in the parent.
fn can_share_memory() -> bool {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: always callable.
        let version = unsafe { libc::gnu_get_libc_version() };
        // SAFETY: the result is a zero-terminated string that never changes.
        let version = unsafe { std::ffi::CStr::from_ptr(version) };
        glibc_caches_no_ids(version.to_str().unwrap_or_default())
    }
    #[cfg(not(target_env = "gnu"))]
    true
}

#[cfg(any(target_env = "gnu", test))]
fn glibc_caches_no_ids(version: &str) -> bool {
    let mut numbers = version.split('.').map_while(|number| number.parse().ok());
    (numbers.next(), numbers.next()) >= (Some(2u32), Some(25u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_not_shared_if_glibc_caches_thread_ids() {
        for old in ["2.17", "2.19", "2.23", "2.24", "2", "", "unknown"] {
            assert!(!glibc_caches_no_ids(old), "{old:?}");
        }
        for new in ["2.25", "2.36", "2.40.9000", "3.0"] {
            assert!(glibc_caches_no_ids(new), "{new:?}");
        }
    }
}

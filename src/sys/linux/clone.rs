//! Creates a child and its process descriptor with clone(2), if possible without a copy of the
//! memory.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

use super::is_unavailable;
use crate::sys::check;
use crate::sys::process::child::{Child, ParentWait};
use crate::sys::process::{Pid, Started};

/// Size of the child's stack in bytes, which is about twice what the child needs.
const STACK: usize = 64 << 10;

/// Creates a child that executes its program. Returns `None` if the kernel or a sandbox rejects the
/// call or its flags.
///
/// The kernel creates the process descriptor together with the child. A later call could open the
/// descriptor of another process: if the application ignores SIGCHLD, the process id of a child
/// that exits at once may be reused before the call.
///
/// If the child keeps its user and group, the kernel suspends the parent until the child has
/// executed its program or exited. In the meantime, the child uses its parent's memory, so nothing
/// is copied, unless an old glibc prevents this (see [`can_share_memory`]). Only the child, or a
/// signal that kills the parent, ends the suspension.
///
/// If the child changes its user or group, the parent is not suspended, because processes of
/// another user may stop the child. The child receives its own memory, because a process that
/// traces the child could otherwise reach the parent.
pub(in crate::sys) fn clone(child: &Child<'_>) -> Option<io::Result<Started>> {
    match try_clone(child) {
        Err(error) if is_unavailable(&error) => None,
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
        // SAFETY: the argument points to a `Child` in the parent's frame. Either the parent waits,
        // or this process has a copy of the frame.
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
    // `u128` aligns the stack's end as the ABI requires (16 bytes on x86-64 and AArch64).
    let mut stack = Vec::<u128>::with_capacity(STACK / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let argument = std::ptr::from_ref(child).cast_mut().cast();
    let mut process: RawFd = -1;
    // SAFETY: while a child shares this memory, stack and argument stay valid, because this thread
    // is suspended until the child has executed its program or exited. The child has its own stack
    // and its own table of signal handlers. Its other writes are harmless: it writes its process id
    // into variables that were made for it, and the C library may note that some signals are
    // handled. The child makes only async-signal-safe calls that do not need the C library's
    // preparations for a fork. Any other child has a copy of the memory. `process` is valid for the
    // write of the descriptor.
    let number = unsafe { libc::clone(exec, top.cast(), flags, argument, &raw mut process) };
    let pid = Pid::from_raw(check(number)?);
    // Linux before 5.2 ignores CLONE_PIDFD and leaves `process` at -1.
    let is_open = process >= 0;
    // SAFETY: the kernel has just opened the descriptor for this call.
    let process = is_open.then(|| unsafe { OwnedFd::from_raw_fd(process) });
    Ok(Started {
        pid,
        process: process.or_else(|| pid.open()),
        wait,
    })
}

/// Returns whether a CLONE_VM child may be started with the C library's `clone`, that is, whether
/// `clone` does not write to the shared memory.
///
/// glibc before 2.25 caches the process and thread ids in the thread's memory. Before 2.24, and on
/// some architectures before 2.25, its `clone` overwrites this cache with -1 if the child shares
/// the memory (bug 19957). `raise`, `abort` and `pthread_kill` then fail in the parent.
fn can_share_memory() -> bool {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: gnu_get_libc_version has no preconditions.
        let version = unsafe { libc::gnu_get_libc_version() };
        // SAFETY: the result points to a zero-terminated string that never changes.
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

//! Identifies the process that created a handle.
//!
//! A child that the application forks has copies of all handles. The objects behind the handles
//! (the epoll instance, the channel, listeners, files) are shared with the parent. So each handle
//! stores its owner, and does nothing in another process.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::platform::zeroed_on_fork;

/// The identifier of a process. It differs from the identifiers of all ancestors and descendants of
/// the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner(usize);

impl Owner {
    /// Returns the identifier of the calling process.
    pub(crate) fn current() -> Self {
        /// The highest number among this process and its ancestors.
        static LAST: AtomicUsize = AtomicUsize::new(0);
        let Some(number) = number() else {
            return Self(own_pid());
        };
        if number.load(Ordering::Relaxed) == 0 {
            let next = LAST.fetch_add(1, Ordering::Relaxed) + 1;
            // Ignore a failure, because another thread has then already stored this process's
            // number.
            let _ = number.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed);
        }
        Self(number.load(Ordering::Relaxed))
    }

    /// Returns whether this is the calling process. Async-signal-safe.
    ///
    /// The check runs for each connection and message, so it must be fast. The check makes no
    /// system call if the kernel can zero a page at a fork.
    pub(crate) fn is_current(self) -> bool {
        self.0 == number().map_or_else(own_pid, |number| number.load(Ordering::Relaxed))
    }
}

/// An owner that can change, for a static that a signal handler reads.
#[derive(Debug)]
pub(super) struct AtomicOwner(AtomicUsize);

impl AtomicOwner {
    pub(super) fn current() -> Self {
        Self(AtomicUsize::new(Owner::current().0))
    }

    pub(super) fn is_current(&self) -> bool {
        Owner(self.0.load(Ordering::Relaxed)).is_current()
    }

    /// Makes the calling process the owner.
    pub(super) fn claim(&self) {
        self.0.store(Owner::current().0, Ordering::Relaxed);
    }
}

/// Returns this process's number. After a fork, the number is 0 until `Owner::current` assigns one.
/// Returns `None` if the system cannot zero memory at a fork. The callers then use the process id.
fn number() -> Option<&'static AtomicUsize> {
    static NUMBER: OnceLock<Option<&'static AtomicUsize>> = OnceLock::new();
    *NUMBER.get_or_init(zeroed_on_fork::allocate)
}

fn own_pid() -> usize {
    // SAFETY: getpid has no preconditions.
    let number = unsafe { libc::getpid() };
    usize::try_from(number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// Forks a child that runs `child`, and returns the child's exit code.
    fn in_child(child: impl FnOnce() -> i32) -> i32 {
        // SAFETY: the child allocates nothing and exits at once.
        match unsafe { fork() }.unwrap() {
            // SAFETY: _exit has no preconditions.
            ForkResult::Child => unsafe { libc::_exit(child()) },
            ForkResult::Parent { child } => {
                let end = waitpid(child, None).unwrap();
                let WaitStatus::Exited(_, code) = end else {
                    panic!("{end:?}");
                };
                code
            }
        }
    }

    #[test]
    fn parent_child_and_grandchild_are_distinct_owners() {
        let parent = Owner::current();
        let code = in_child(|| {
            let is_parent = parent.is_current();
            let child = Owner::current();
            let code = in_child(|| i32::from(parent.is_current() || child.is_current()));
            i32::from(is_parent || !child.is_current() || parent == child || code != 0)
        });
        assert_eq!(code, 0);
        assert!(parent.is_current());
        assert_eq!(parent, Owner::current());
    }
}

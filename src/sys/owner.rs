//! Which process created a handle.
//!
//! A child that the application forks has copies of all handles, and shares with its parent what they
//! refer to: the epoll instance, the channel, listeners, files. Every handle remembers its creator, and
//! acts on nothing of this in another process.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A process, distinct from all its ancestors and descendants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner(usize);

impl Owner {
    /// The calling process.
    pub(crate) fn current() -> Self {
        /// The number of the last process in this line of descent.
        static LAST: AtomicUsize = AtomicUsize::new(0);
        let Some(mark) = mark() else {
            return Self(own_pid());
        };
        if mark.load(Ordering::Relaxed) == 0 {
            let next = LAST.fetch_add(1, Ordering::Relaxed) + 1;
            // If another thread is faster, its number is used.
            let _ = mark.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed);
        }
        Self(mark.load(Ordering::Relaxed))
    }

    /// Whether this is the calling process. Async-signal-safe, and without a system call where the
    /// kernel can wipe a page at a fork: it is asked for each connection and message.
    pub(crate) fn is_current(self) -> bool {
        self.0 == mark().map_or_else(own_pid, |mark| mark.load(Ordering::Relaxed))
    }
}

/// An owner that can change, for statics that a signal handler reads.
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

/// The number of this process, which is 0 after a fork until `Owner::current` assigns one; `None` where
/// the system cannot do this, and the process id is used instead.
fn mark() -> Option<&'static AtomicUsize> {
    static MARK: OnceLock<Option<&'static AtomicUsize>> = OnceLock::new();
    *MARK.get_or_init(wiped_on_fork)
}

fn own_pid() -> usize {
    // SAFETY: always callable.
    let number = unsafe { libc::getpid() };
    usize::try_from(number).unwrap_or(0)
}

/// A number in a page of its own, which is zero in a child: madvise(2), Linux 4.14. Miri does not
/// implement it.
#[cfg(all(target_os = "linux", not(miri)))]
fn wiped_on_fork() -> Option<&'static AtomicUsize> {
    const NO_ADVICE: libc::c_int = -1;
    // SAFETY: sysconf takes an integer.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let size = usize::try_from(size).ok()?;
    let (access, kind) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: new memory is mapped, wherever there is room.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), size, access, kind, -1, 0) };
    if page == libc::MAP_FAILED {
        return None;
    }
    // Some emulators accept any advice and follow none.
    // SAFETY: the page is mapped; the kernel refuses this advice.
    let accepts_any = unsafe { libc::madvise(page, size, NO_ADVICE) } == 0;
    // SAFETY: the page is mapped, private and anonymous.
    let wiped = unsafe { libc::madvise(page, size, libc::MADV_WIPEONFORK) } == 0;
    if accepts_any || !wiped {
        // SAFETY: nothing refers to the page.
        unsafe { libc::munmap(page, size) };
        return None;
    }
    // SAFETY: the page is zero, aligned, and stays mapped for the life of the process.
    Some(unsafe { &*page.cast::<AtomicUsize>() })
}

#[cfg(any(not(target_os = "linux"), miri))]
fn wiped_on_fork() -> Option<&'static AtomicUsize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// Returns the exit code of a forked child.
    fn in_child(child: impl FnOnce() -> i32) -> i32 {
        // SAFETY: the child allocates nothing and ends at once.
        match unsafe { fork() }.unwrap() {
            // SAFETY: always callable.
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
    fn a_child_is_not_its_parent_and_a_grandchild_is_neither() {
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

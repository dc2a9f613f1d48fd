//! Implements the items of `linux` for the BSDs and macOS by portable means. An item that only Linux
//! can provide does nothing, or reports that it is unsupported.
//!
//! The crate is made for Linux first. On other systems the crate works with fewer abilities.
//! Workers poll instead of blocking in `accept`, and no filter protects a backlog. A worker notices
//! its master's exit only by its channel. `freebsd` and `apple` contain the differences between the
//! BSDs and macOS.

#[cfg_attr(target_vendor = "apple", path = "apple.rs")]
#[cfg_attr(not(target_vendor = "apple"), path = "freebsd.rs")]
mod system;

pub(super) mod child;
pub(crate) mod filter;
pub(crate) mod interruptible_accept;
pub(super) mod own_program;
pub(super) mod pidfd;
pub(super) mod socket;
pub(super) mod wait;

pub(super) use system::{MAX_RSS_UNIT, SI_KERNEL};

/// The highest signal number that the crate handles.
pub(super) const MAX_SIGNAL: u8 = 64;

pub(super) mod blocked_threads {
    use std::os::fd::RawFd;

    /// Returns `false`, because the system does not tell what threads wait for. A thread that waits
    /// in `accept` then leaves the call when the next connection arrives.
    pub(in crate::sys) fn interrupt(_number: RawFd) -> bool {
        false
    }
}

pub(super) mod proc {
    use crate::sys::process::GroupSearch;

    /// Returns `None`, because there is no portable call that lists children.
    pub(in crate::sys) fn children() -> Option<Vec<libc::pid_t>> {
        None
    }

    /// Finds nothing, because there is no portable call that lists the members of a group.
    pub(in crate::sys) fn find_group_member(_leader: libc::pid_t) -> GroupSearch {
        GroupSearch::Impossible
    }

    pub(in crate::sys) fn is_running_member(_process: libc::pid_t, _leader: libc::pid_t) -> bool {
        false
    }
}

pub(super) mod clone {
    use std::io;

    use crate::sys::process::Started;
    use crate::sys::process::child::Child;

    /// Returns `None`, so the caller forks instead.
    pub(in crate::sys) fn clone(_child: &Child<'_>) -> Option<io::Result<Started>> {
        None
    }
}

pub(super) mod epoll {
    use std::io;
    use std::time::Duration;

    use polling::Poller;

    use crate::sys::poll::ReadyList;

    /// Returns `false`, so the caller waits with the poller.
    pub(in crate::sys) fn reports_keys(_poller: &Poller) -> io::Result<bool> {
        Ok(false)
    }

    pub(in crate::sys) fn wait(
        _poller: &Poller,
        _timeout: Option<Duration>,
        _ready: &mut ReadyList,
    ) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

pub(super) mod file {
    use std::ffi::OsStr;
    use std::io;
    use std::os::fd::{AsRawFd as _, OwnedFd};

    use crate::sys::check;
    use crate::sys::file::{FileStatus, c_string};

    /// The flag for opening a directory relative to which files are named.
    pub(in crate::sys) const NAME_ONLY: libc::c_int = libc::O_RDONLY;

    /// The flag that selects a symbolic link's own status.
    pub(in crate::sys) const STATUS_FLAGS: libc::c_int = libc::AT_SYMLINK_NOFOLLOW;

    /// Changes a file's mode without following a symbolic link.
    pub(crate) fn change_mode_at(
        directory: &OwnedFd,
        name: &OsStr,
        _status: FileStatus,
        mode: libc::mode_t,
    ) -> io::Result<()> {
        let name = c_string(name)?;
        let flags = libc::AT_SYMLINK_NOFOLLOW;
        // SAFETY: the name is zero-terminated and lives through the call.
        check(unsafe { libc::fchmodat(directory.as_raw_fd(), name.as_ptr(), mode, flags) })?;
        Ok(())
    }
}

pub(crate) mod parent_death_signal {
    use std::io;
    use std::os::fd::BorrowedFd;

    /// Does nothing, because the child notices end-of-file on its channel.
    pub(in crate::sys) fn request(_parent: u32) -> io::Result<()> {
        Ok(())
    }

    /// Returns `true`, although these systems have no such request. The caller must distinguish a
    /// worker from the worker's children. Its comparison of process ids suffices, because without
    /// PID namespaces no other process has the same id.
    pub(crate) fn is_requested() -> bool {
        true
    }

    /// Does nothing, because the worker notices end-of-file on its channel.
    pub(crate) fn renew(_channel: BorrowedFd<'_>) {}
}

pub(crate) mod shared_number {
    use std::os::fd::OwnedFd;

    /// A type without values, because macOS cannot prevent other processes from changing the size
    /// of a file in memory.
    #[derive(Debug)]
    pub(crate) enum SharedNumber {}

    impl SharedNumber {
        pub(crate) fn create() -> Option<(Self, OwnedFd)> {
            None
        }

        pub(crate) fn get(&self) -> u32 {
            match *self {}
        }
    }

    #[derive(Debug)]
    pub(crate) enum Writer {}

    impl Writer {
        pub(crate) fn new(_file: OwnedFd) -> Option<Self> {
            None
        }

        pub(crate) fn set(&self, _value: u32) {
            match *self {}
        }
    }
}

pub(super) mod threads {
    /// Returns `None`, because the system does not report the number of threads.
    pub(in crate::sys) fn has_others_now() -> Option<bool> {
        None
    }
}

pub(super) mod zeroed_on_fork {
    use std::sync::atomic::AtomicUsize;

    /// Returns `None`, so the caller uses the process id.
    pub(in crate::sys) fn allocate() -> Option<&'static AtomicUsize> {
        None
    }
}

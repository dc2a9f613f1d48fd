//! The identity of a child, by which the parent waits for the child and signals it.
//!
//! Where the kernel has process descriptors, they identify the child. The process id may belong to
//! another process if the application has waited for the child.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::Duration;

use crate::sys::platform::{self, MAX_RSS_UNIT, pidfd, wait};
use crate::sys::{check, poll, retry};
use crate::types::ordered_set::Id;

/// Number of attempts to reap a killed child. With [`REAP_INTERVAL`], the attempts take 100 ms in
/// total.
///
/// A killed process exits within about a millisecond, unless it waits in the kernel for a device or
/// for a processor. A longer time would delay the master's loop. With a shorter time, more children
/// would stay unreaped until the next fork.
const REAP_ATTEMPTS: u32 = 100;
const REAP_INTERVAL: Duration = Duration::from_millis(1);

/// The resources that a process has used.
///
/// Node: the fields of `process.resourceUsage()` with the same meaning.
///
/// The values describe a process that has exited, and include the children that the process has
/// waited for. See [`Process::usage`](crate::Process::usage) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// The CPU time in user mode, in whole microseconds. Its precision depends on the system.
    pub user_cpu_time: Duration,
    /// The CPU time in kernel mode.
    pub system_cpu_time: Duration,
    /// The peak of resident memory, in bytes. On Linux, this is at least the memory that the master
    /// had when it forked the worker. The kernel also counts the memory that a worker has before it
    /// executes its program.
    pub max_rss: u64,
}

/// Whether a child has exited and has not been reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChildState {
    Running,
    Exited,
    /// The process is not a child, for instance because other code has reaped it, or the system does
    /// not tell.
    Unknown,
}

/// The exit status of a process, and its usage if the crate itself has waited for the process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exit {
    pub(crate) status: ExitStatus,
    pub(crate) usage: Option<Usage>,
}

impl Exit {
    /// Returns an exit with the code 255, for a process whose status is lost. The code is not 0, so
    /// that the application does not mistake the exit for a success.
    pub(crate) fn unknown() -> Self {
        Self {
            status: ExitStatus::from_raw(255 << 8),
            usage: None,
        }
    }
}

/// Returns the sum of seconds and microseconds, which have different types on different systems.
pub(in crate::sys) fn cpu_time(seconds: impl TryInto<u64>, micros: impl TryInto<u64>) -> Duration {
    let seconds = Duration::from_secs(seconds.try_into().unwrap_or(0));
    seconds + Duration::from_micros(micros.try_into().unwrap_or(0))
}

/// Converts `ru_maxrss`, whose unit depends on the system, to bytes.
pub(in crate::sys) fn max_rss(units: libc::c_long) -> u64 {
    let units = u64::try_from(units).unwrap_or(0);
    units.saturating_mul(MAX_RSS_UNIT)
}

/// The process id of a child. The id is valid until this process has waited for the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Pid(libc::pid_t);

impl Id for Pid {
    fn number(self) -> u32 {
        Self::number(self)
    }

    fn from_number(number: u32) -> Self {
        Self(libc::pid_t::try_from(number).unwrap_or(libc::pid_t::MAX))
    }
}

impl Pid {
    pub(in crate::sys) fn from_raw(number: libc::pid_t) -> Self {
        Self(number)
    }

    /// Returns the id of the calling process.
    pub(crate) fn own() -> Self {
        // SAFETY: getpid has no preconditions.
        Self(unsafe { libc::getpid() })
    }

    pub(crate) fn number(self) -> u32 {
        self.0.unsigned_abs()
    }

    /// Returns a descriptor that becomes readable when the child exits. Returns `None` if the
    /// kernel has no process descriptors, or if opening one fails.
    pub(in crate::sys) fn open(self) -> Option<OwnedFd> {
        pidfd::open(self.0)
    }

    /// Reaps the child if it has exited. Returns `None` if the child is still running.
    ///
    /// # Errors
    ///
    /// Returns an error if the status is lost: other code of this process has waited for the child,
    /// or the process ignores SIGCHLD, and the kernel does not report the status again.
    pub(crate) fn try_wait(self, process: Option<&impl AsFd>) -> io::Result<Option<Exit>> {
        let options = libc::WNOHANG;
        let by_fd = process.and_then(|process| pidfd::wait(process.as_fd(), options));
        let waited = by_fd.unwrap_or_else(|| wait::by_number(self.0, options));
        // If waiting fails, read the status from the process descriptor. Waiting fails if the
        // application ignores SIGCHLD or has already waited for this child, but the kernel keeps
        // the status since Linux 6.15.
        waited.or_else(|error| {
            let status = process.and_then(|process| pidfd::exit_status(process.as_fd()));
            let exit = status.map(|status| Exit {
                status,
                usage: None,
            });
            exit.map(Some).ok_or(error)
        })
    }

    /// Returns the child's state without reaping the child.
    pub(crate) fn child_state(self, process: Option<&impl AsFd>) -> ChildState {
        let options = libc::WNOHANG | libc::WNOWAIT;
        let has_exited = match process.and_then(|process| pidfd::wait(process.as_fd(), options)) {
            Some(waited) => waited.map(|exit| exit.is_some()),
            None => self.wait_without_reaping(),
        };
        match (has_exited, process) {
            (Ok(true), _) => ChildState::Exited,
            (Ok(false), _) => ChildState::Running,
            (Err(error), _) if error.raw_os_error() == Some(libc::ECHILD) => ChildState::Unknown,
            // A sandbox rejects waitid(2). The descriptor is readable once the child has exited.
            (Err(_), Some(process)) => {
                match poll::wait_readable([process.as_fd()], Some(Duration::ZERO)) {
                    Ok([true]) => ChildState::Exited,
                    Ok([false]) => ChildState::Running,
                    Err(_) => ChildState::Unknown,
                }
            }
            (Err(_), None) => ChildState::Unknown,
        }
    }

    /// Returns whether the child has exited.
    ///
    /// # Errors
    ///
    /// Returns ECHILD if this process has no such child, for instance because it has been reaped.
    fn wait_without_reaping(self) -> io::Result<bool> {
        // SAFETY: all zeroes is a valid `siginfo_t`.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // On FreeBSD, `id_t` has 64 bits.
        #[allow(clippy::useless_conversion)]
        let id = libc::id_t::from(self.number());
        let waited = retry(|| {
            // SAFETY: the pointer is valid for writes.
            check(unsafe { libc::waitid(libc::P_PID, id, &raw mut info, options) })
        });
        // SAFETY: the call has filled in the structure for a child, or left it zero.
        waited.map(|_| unsafe { info.si_pid() } == self.0)
    }

    /// Reaps a child that has exited, and discards its status.
    pub(crate) fn reap(self) {
        let _ = wait::by_number(self.0, libc::WNOHANG);
    }

    /// Kills and reaps a child that cannot become a worker. If the child has not exited after 100
    /// ms, adds it to `unreaped`.
    pub(crate) fn discard(self, process: Option<OwnedFd>, unreaped: &Unreaped) {
        // Do not kill a child that is no longer running. If the application ignores SIGCHLD, the
        // process id of an exited child may already belong to another process.
        if !matches!(self.try_wait(process.as_ref()), Ok(None)) {
            return;
        }
        let _ = self.signal(process.as_ref().map(AsFd::as_fd), libc::SIGKILL);
        for _ in 0..REAP_ATTEMPTS {
            if !matches!(self.try_wait(process.as_ref()), Ok(None)) {
                return;
            }
            std::thread::sleep(REAP_INTERVAL);
        }
        unreaped.0.borrow_mut().push((self, process));
    }

    /// Sends a signal, through the process descriptor if there is one. The caller must not have
    /// reaped the child. Without a descriptor, the signal may reach another process if other code
    /// has reaped the child.
    pub(crate) fn signal(
        self,
        process: Option<BorrowedFd<'_>>,
        signal: libc::c_int,
    ) -> io::Result<()> {
        if let Some(sent) = process.and_then(|process| pidfd::signal(process, signal)) {
            return sent;
        }
        // SAFETY: kill accesses no memory of this process.
        check(unsafe { libc::kill(self.0, signal) })?;
        Ok(())
    }
}

/// The result of a search for a process of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GroupSearch {
    /// This process of the group has not exited.
    Found(Pid),
    /// The group has no process besides its leader.
    #[allow(dead_code, reason = "only Linux shows the processes of a group")]
    Empty,
    /// The search has failed, for instance because no descriptor is free. A later one may succeed.
    #[allow(dead_code, reason = "only Linux shows the processes of a group")]
    Failed,
    /// The system does not show the processes of a group, for instance because `/proc` is not
    /// mounted, belongs to another PID namespace, or hides processes.
    Impossible,
}

impl Pid {
    /// Searches for a process of the group that the child leads, besides the child. Checks first
    /// whether the process `last` is still one, because a complete search takes longer.
    pub(crate) fn find_group_member(self, last: Option<Self>) -> GroupSearch {
        let is_left = |last: &Self| platform::proc::is_running_member(last.0, self.0);
        match last.filter(is_left) {
            Some(last) => GroupSearch::Found(last),
            None => platform::proc::find_group_member(self.0),
        }
    }

    /// Sends a signal to the process group that the child leads.
    ///
    /// # Errors
    ///
    /// Returns ESRCH if the group has no process. Also returns ESRCH if the child has been reaped
    /// and the kernel cannot find the group by the process descriptor (before Linux 6.9), because
    /// the child's id may then belong to another group.
    pub(crate) fn signal_group(
        self,
        process: Option<&impl AsFd>,
        signal: libc::c_int,
    ) -> io::Result<()> {
        let by_fd = process.and_then(|process| pidfd::signal_group(process.as_fd(), signal));
        if let Some(sent) = by_fd {
            return sent;
        }
        match self.wait_without_reaping() {
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(_) | Err(_) => {}
        }
        // SAFETY: kill accesses no memory of this process.
        check(unsafe { libc::kill(-self.0, signal) })?;
        Ok(())
    }
}

/// Killed children that had not exited after 100 ms. They are reaped before the next fork.
#[derive(Debug, Default)]
pub(crate) struct Unreaped(RefCell<Vec<(Pid, Option<OwnedFd>)>>);

impl Unreaped {
    pub(crate) fn reap(&self) {
        let is_running = |(pid, process): &(Pid, Option<OwnedFd>)| {
            matches!(pid.try_wait(process.as_ref()), Ok(None))
        };
        self.0.borrow_mut().retain(is_running);
    }

    pub(crate) fn contains(&self, child: Pid) -> bool {
        self.0.borrow().iter().any(|(pid, _)| *pid == child)
    }

    /// Removes all children and returns their descriptors. A forked child that executes no program
    /// must call this function, because these processes are its parent's children.
    pub(crate) fn abandon(&self) -> Vec<RawFd> {
        let children = self.0.take().into_iter();
        let processes = children.filter_map(|(_, process)| process);
        processes.map(IntoRawFd::into_raw_fd).collect()
    }
}

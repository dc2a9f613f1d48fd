//! The program of a child, and how the parent starts the child.

use std::cell::Cell;
use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::child::{Child, Leads, ParentWait, PidVariable, pid_variable};
use super::pid::{Pid, Unreaped};
use super::report::{read_failure, wait_for_start};
use crate::sys::check;
use crate::sys::fd::duplicate;
use crate::sys::platform::clone::clone;
use crate::sys::signal_mask::SignalSet;
use crate::sys::socket;
use crate::types::fork_step::ForkStep;

/// How long a child that changes its user or group may take to start, before the child is killed.
/// To start, a child must execute its program, or become a worker if it executes none.
///
/// The master's loop waits for the child. Without a limit, another process of the child's user
/// could block the master by stopping the child. With this limit and the time for reaping, such a
/// fork takes at most one second. With a shorter limit, a healthy child could be killed while a
/// busy machine reads the program from a disk. A longer limit would block the master for longer.
const START_TIMEOUT: Duration = Duration::from_millis(START_TIMEOUT_MS);

/// [`START_TIMEOUT`] in milliseconds.
pub(super) const START_TIMEOUT_MS: u64 = 900;

/// Everything that `execve` needs, prepared before the fork because the child must not allocate.
/// For a child that executes no program, path, arguments and environment are empty.
#[derive(Debug, Default)]
pub(crate) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    cwd: Option<CString>,
    /// The child's descriptors 0, 1 and so on, with `None` for those that it inherits.
    stdio: Vec<Option<OwnedFd>>,
    /// Names of variables whose value is the child's process id.
    pid_variables: Vec<&'static str>,
    is_detached: bool,
    leads: Leads,
    ignored: SignalSet,
    uid: Option<libc::uid_t>,
    gid: Option<libc::gid_t>,
}

/// The step that failed, and the system's reason.
pub(crate) type Failure = (ForkStep, io::Error);

/// A process that has started.
#[derive(Debug)]
pub(crate) struct ForkedProcess {
    pub(crate) pid: Pid,
    /// The process descriptor, which is readable once the process has exited, or `None` if the kernel
    /// has no process descriptors.
    pub(crate) process: Option<OwnedFd>,
}

/// A new child, which may not have executed its program yet.
pub(in crate::sys) struct Started {
    pub(in crate::sys) pid: Pid,
    pub(in crate::sys) process: Option<OwnedFd>,
    pub(in crate::sys) wait: ParentWait,
}

impl Started {
    /// Returns the child with the process id that `fork` has returned, and opens its process
    /// descriptor if possible.
    fn forked(number: libc::pid_t) -> Self {
        let pid = Pid::from_raw(number);
        Self {
            pid,
            process: pid.open(),
            wait: ParentWait::Polling,
        }
    }
}

fn c_string(text: OsString) -> io::Result<CString> {
    CString::new(text.into_vec()).map_err(io::Error::from)
}

fn c_strings(texts: Vec<OsString>) -> io::Result<Vec<CString>> {
    texts.into_iter().map(c_string).collect()
}

/// Returns an array of pointers to the strings, with a null pointer at the end, as `execve`
/// requires.
fn null_terminated(strings: &[CString]) -> Vec<*const libc::c_char> {
    let pointers = strings.iter().map(|string| string.as_ptr());
    pointers.chain([std::ptr::null()]).collect()
}

impl Program {
    /// Creates a program. `args` must begin with the program's name.
    ///
    /// # Errors
    ///
    /// Returns an error if one of the strings contains a zero byte.
    pub(crate) fn new(
        path: OsString,
        args: Vec<OsString>,
        env: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> io::Result<Self> {
        let pair = |(mut name, value): (OsString, OsString)| {
            name.push("=");
            name.push(value);
            name
        };
        let env = env.into_iter().map(pair).collect();
        Ok(Self {
            path: c_string(path)?,
            args: c_strings(args)?,
            env: c_strings(env)?,
            ..Self::default()
        })
    }

    /// Sets the child's directory.
    pub(crate) fn cwd(&mut self, directory: OsString) -> io::Result<()> {
        self.cwd = Some(c_string(directory)?);
        Ok(())
    }

    /// Sets the child's descriptors 0, 1 and so on. The numbers of the given descriptors must be
    /// higher than the numbers that they replace.
    pub(crate) fn stdio(&mut self, stdio: Vec<Option<OwnedFd>>) {
        self.stdio = stdio;
    }

    /// Adds an environment variable whose value is the child's process id.
    pub(crate) fn pid_variable(&mut self, name: &'static str) {
        self.pid_variables.push(name);
    }

    /// Lets the child outlive this process. The child then has no channel.
    pub(crate) fn detach(&mut self) {
        self.is_detached = true;
    }

    /// Makes the child lead its own session and process group, without a terminal.
    pub(crate) fn setsid(&mut self) {
        self.leads = Leads::Session;
    }

    /// Makes the child lead its own process group.
    pub(crate) fn setpgid(&mut self) {
        self.leads = Leads::Group;
    }

    /// Makes the child ignore these signals.
    pub(crate) fn ignore(&mut self, signals: SignalSet) {
        self.ignored = signals;
    }

    /// Sets the child's user and group.
    pub(crate) fn identity(&mut self, uid: Option<u32>, gid: Option<u32>) {
        (self.uid, self.gid) = (uid, gid);
    }

    /// Starts the program in a child. Also returns a descriptor that becomes readable when the
    /// child exits, if the system has one.
    ///
    /// The child inherits only the descriptors of `stdio` (or 0, 1 and 2 of this process) and
    /// `channel`. The number of `channel` must be higher than the numbers that `stdio` sets. A
    /// detached child does not inherit `channel`. The child's signals have their default
    /// dispositions, except those that [`ignore`](Self::ignore) sets, and no signal is blocked.
    ///
    /// On Linux, a child that is not detached is killed when the calling thread exits.
    ///
    /// # Errors
    ///
    /// Returns an error if the process cannot be forked, or if the program cannot be executed. Also
    /// fails if a child that changes its user or group has not executed the program within
    /// [`START_TIMEOUT`]. A child that cannot be reaped at once is added to `unreaped`.
    pub(crate) fn spawn(
        &self,
        channel: RawFd,
        unreaped: &Unreaped,
    ) -> Result<ForkedProcess, Failure> {
        self.start(channel, unreaped, |child, _| clone_or_fork(child))
    }

    /// Forks a child that executes no program, and runs the closure that `begin` returns in the
    /// child.
    ///
    /// The child has a copy of all memory. Its descriptors, signals, directory and user are the
    /// same as after `spawn`. However, the child keeps other open descriptors unless `abandon`
    /// returns them. This function never returns in the child.
    ///
    /// # Errors
    ///
    /// Returns an error if the process cannot be forked, or if one of the child's steps fails. The
    /// last step is the call of `begin`. Also fails if a child that changes its user or group has
    /// not completed the steps within [`START_TIMEOUT`]. A child that cannot be reaped at once is
    /// added to `unreaped`.
    pub(crate) fn fork<M: FnOnce() -> i32>(
        &self,
        channel: RawFd,
        unreaped: &Unreaped,
        abandon: impl FnOnce() -> io::Result<Vec<RawFd>>,
        begin: impl FnOnce() -> io::Result<M>,
    ) -> Result<ForkedProcess, Failure> {
        self.start(channel, unreaped, |child, parents_end| {
            // Use the C library's `fork`, because it makes the library's own locks usable in the
            // child.
            // SAFETY: the child continues with a copy of this thread. No other thread holds a lock:
            // the master does not fork such a child if `has_other_threads` reports another thread.
            // If the system does not report the number of threads, the application must ensure this.
            match check(unsafe { libc::fork() })? {
                0 => child.run(parents_end.as_raw_fd(), abandon, begin),
                number => {
                    let started = Started::forked(number);
                    // Let the child continue only now that its process descriptor is open. If the
                    // application ignores SIGCHLD, the process id of a child that has exited may
                    // already belong to another process.
                    let _ = socket::send(parents_end, &[0], &[]);
                    Ok(started)
                }
            }
        })
    }

    /// Starts a child with the closure `fork`, and waits until the child has started or failed to
    /// start.
    fn start(
        &self,
        channel: RawFd,
        unreaped: &Unreaped,
        fork: impl FnOnce(&Child<'_>, &UnixStream) -> io::Result<Started>,
    ) -> Result<ForkedProcess, Failure> {
        let forking = |error| (ForkStep::MakeProcess, error);
        let pid_variables = self.pid_variables.iter().copied();
        let pid_variables: Vec<_> = pid_variables.map(pid_variable).map(Cell::new).collect();
        let (args, env) = (
            null_terminated(&self.args),
            self.environment(&pid_variables),
        );
        // Move the child's end beyond the numbers that the child's other descriptors receive. A
        // successful `execve` closes this end.
        let (reports, low) = UnixStream::pair().map_err(forking)?;
        let beyond = RawFd::try_from(self.stdio.len()).unwrap_or(RawFd::MAX);
        let child_end = duplicate(low.as_raw_fd(), beyond).map_err(forking)?;
        drop(low);
        let child = Child {
            path: self.path.as_ptr(),
            args: args.as_ptr(),
            env: env.as_ptr(),
            pid_variables: &pid_variables,
            cwd: self.cwd.as_deref().map_or(std::ptr::null(), CStr::as_ptr),
            stdio: &self.stdio,
            uid: self.uid,
            gid: self.gid,
            channel,
            is_detached: self.is_detached,
            leads: self.leads,
            ignored: self.ignored,
            reports: Cell::new(child_end.as_raw_fd()),
            parent: std::process::id(),
        };

        // Deliver no signal until the child has default dispositions. A handler of this crate or of
        // the application would otherwise act on the master's descriptors in the child.
        let mask = SignalSet::all().set_as_mask();
        let started = fork(&child, &reports);
        mask.set_as_mask();
        // Close the parent's copy of the child's end, because the stream would not end while this
        // copy is open.
        drop(child_end);
        let Started { pid, process, wait } = started.map_err(forking)?;

        let outcome = match wait {
            ParentWait::Suspended => read_failure(&reports).map_or(Ok(()), Err),
            ParentWait::Polling => {
                let limit = child.changes_identity().then_some(START_TIMEOUT);
                wait_for_start(reports, process.as_ref(), limit)
            }
        };
        if let Err(failure) = outcome {
            pid.discard(process, unreaped);
            return Err(failure);
        }
        Ok(ForkedProcess { pid, process })
    }

    /// Returns the child's environment as a null-terminated array. The array begins with the
    /// variables to which the child appends its process id.
    fn environment(&self, pid_variables: &[Cell<PidVariable>]) -> Vec<*const libc::c_char> {
        let own = pid_variables
            .iter()
            .map(|text| text.as_ptr().cast_const().cast());
        own.chain(null_terminated(&self.env)).collect()
    }
}

/// Creates a child that executes its program, by clone(2) if possible.
fn clone_or_fork(child: &Child<'_>) -> io::Result<Started> {
    if let Some(cloned) = clone(child) {
        return cloned;
    }
    // SAFETY: the child makes only async-signal-safe calls until `execve`.
    match check(unsafe { libc::fork() })? {
        0 => child.exec(ParentWait::Polling),
        number => Ok(Started::forked(number)),
    }
}

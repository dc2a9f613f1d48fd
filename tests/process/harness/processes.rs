//! Observes, stops and starts processes, and returns the commands of built programs.

use std::fs::{File, Permissions};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use cluster::{Error, ForkStep, WorkerProcess};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, getppid};
use tempfile::TempDir;

use super::waiting::wait_until;

/// User and group id of `nobody`, which owns no files.
pub const NOBODY: u32 = 65534;

/// Path through which every user can execute this test binary.
pub const OWN_PROGRAM: &str = "/proc/self/exe";

/// Does nothing. Tests call this function in loops that keep a core busy.
///
/// They do not call [`std::hint::spin_loop`], because it executes `pause` on x86-64. An emulator with
/// one core leaves its translated code at each `pause`, and takes 16 times as long for one second of
/// emulated time.
pub fn spin() {
    std::hint::black_box(());
}

/// Waits until `/proc/PID/stat` contains `state`, for example `") T "` for a stopped process.
pub fn wait_for_state(pid: u32, state: &str) {
    let stat = format!("/proc/{pid}/stat");
    wait_until(state, || {
        let stat = std::fs::read_to_string(&stat).unwrap();
        stat.contains(state).then_some(())
    });
}

/// Forks a worker with another user. Forks again if the child was killed because it had not started
/// in time, because on a busy machine it may wait for a core for longer than `fork` waits for it.
pub fn fork_patiently(fork: impl FnMut() -> cluster::Result<WorkerProcess>) -> WorkerProcess {
    try_patiently(fork).unwrap()
}

/// Does the same as [`fork_patiently`], but returns other errors.
pub fn try_patiently(
    mut fork: impl FnMut() -> cluster::Result<WorkerProcess>,
) -> cluster::Result<WorkerProcess> {
    loop {
        match fork() {
            Err(Error::Fork {
                step: ForkStep::WaitForStart,
                ..
            }) => {}
            forked => return forked,
        }
    }
}

/// Returns whether the process sleeps in the kernel.
pub fn sleeps(pid: impl std::fmt::Display) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.contains(") S ")
}

/// Waits until the worker's process sleeps in the kernel.
pub fn wait_until_asleep(worker: &WorkerProcess) {
    wait_for_state(worker.process().id(), ") S ");
}

/// Waits until a worker sleeps, stops it with SIGSTOP, and waits until it has stopped.
pub fn stop(worker: &WorkerProcess) {
    wait_until_asleep(worker);
    worker.process().kill(cluster::Signal::STOP);
    wait_for_state(worker.process().id(), ") T ");
}

/// Environment variable of a process that another process in the scenario observes.
pub const WATCHED: (&str, &str) = ("WATCHED", "1");

/// Returns a command that runs this scenario in another process, which this process observes.
pub fn watched() -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.env(WATCHED.0, WATCHED.1);
    command
}

/// Returns whether this process, or the master that forked it, was started with [`watched`].
pub fn is_watched() -> bool {
    std::env::var_os(WATCHED.0).is_some()
}

/// A guard that keeps this worker's master stopped until the guard is dropped.
///
/// A stopped master answers no frames, so the worker must act without its help.
pub struct StoppedMaster(Pid);

impl StoppedMaster {
    pub fn new() -> Self {
        let stopped = Self(getppid());
        kill(stopped.0, Signal::SIGSTOP).unwrap();
        wait_for_state(stopped.0.as_raw().unsigned_abs(), ") T ");
        stopped
    }
}

impl Drop for StoppedMaster {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGCONT).unwrap();
    }
}

/// Environment variable with a command that runs the examples, such as a tool that observes
/// processes (`tests/checks/valgrind`).
const WRAPPER: &str = "CLUSTER_TEST_WRAPPER";

/// Returns the command for an example that `cargo test` has built, run by [`WRAPPER`] if it is set.
pub fn example(name: &str) -> Command {
    built(&Path::new("examples").join(name))
}

/// Returns the command for the tool `cluster-serve`, like [`example`].
pub fn cluster_serve() -> Command {
    built(Path::new("cluster-serve"))
}

/// Returns the command for a program in the directory of the build's results.
fn built(program: &Path) -> Command {
    let own = std::env::current_exe().expect("own path");
    let target = own.parent().and_then(|deps| deps.parent());
    let path = target.expect("target").join(program);
    assert!(
        path.exists(),
        "{} is built by a plain `cargo test`",
        path.display()
    );
    let wrapper = std::env::var(WRAPPER).unwrap_or_default();
    let words = wrapper.split_whitespace().map(PathBuf::from);
    let mut words = words.chain([path]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    command
}

/// Returns the children of this process's main thread, including zombies.
pub fn children() -> Vec<u32> {
    let own = std::process::id();
    let numbers = std::fs::read_to_string(format!("/proc/self/task/{own}/children")).unwrap();
    let numbers = numbers.split_whitespace();
    numbers.map(|number| number.parse().unwrap()).collect()
}

/// Returns whether the process exists, and its line in `/proc/PID/stat` contains `state`, for example
/// `) S `.
pub fn has_state(pid: u32, state: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| stat.contains(state))
}

/// Returns whether the process exists and is not a zombie.
pub fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// A program that no process can open until this process releases its lease on the file, or until
/// the kernel removes the lease, usually after 45 s.
///
/// A child that executes the program blocks in `execve` until then (see `F_SETLEASE` in fcntl(2)).
pub struct LeasedProgram {
    directory: TempDir,
    lease: File,
}

impl LeasedProgram {
    /// Creates the program, and blocks SIGIO, which reports that a child tries to open the program.
    ///
    /// Call this function before other threads start. They must inherit the blocked signal, so that
    /// [`Self::with_child`] can wait for it in any thread.
    pub fn new() -> Self {
        SigSet::from(Signal::SIGIO).thread_block().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let executable = || Permissions::from_mode(0o755);
        std::fs::set_permissions(directory.path(), executable()).unwrap();
        let path = directory.path().join("program");
        std::fs::write(&path, "#!/bin/sh\nexit 0\n").unwrap();
        std::fs::set_permissions(&path, executable()).unwrap();
        let lease = File::open(path).unwrap();
        set_lease(&lease, nix::libc::F_WRLCK).unwrap();
        Self { directory, lease }
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("program")
    }

    /// Waits until a child sleeps in `execve` of the program, calls `act` with the child's pid, and
    /// returns the result. Repeats this if `act` returns `None`, because the child has exited: on a
    /// busy machine, `fork` may kill the child before this thread has found it.
    pub fn with_child<T>(&self, mut act: impl FnMut(Pid) -> Option<T>) -> T {
        // Only the first child raises the signal, because the kernel then waits for the lease's end.
        SigSet::from(Signal::SIGIO).wait().unwrap();
        wait_until("a child in execve", || {
            let mut children = children().into_iter();
            let child = children.rfind(|child| has_state(*child, ") S "))?;
            act(Pid::from_raw(i32::try_from(child).unwrap()))
        })
    }

    pub fn release_lease(&self) {
        set_lease(&self.lease, nix::libc::F_UNLCK).unwrap();
    }
}

fn set_lease(file: &File, kind: i32) -> nix::Result<i32> {
    #[allow(unsafe_code)]
    // SAFETY: `F_SETLEASE` takes an integer, and the descriptor is open and owned by `file`.
    nix::Error::result(unsafe { nix::libc::fcntl(file.as_raw_fd(), nix::libc::F_SETLEASE, kind) })
}

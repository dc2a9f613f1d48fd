//! Runs a program with its descendants, and checks that no process and no file remains.

use std::cell::RefCell;
use std::fs::{File, Permissions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;
use wait_timeout::ChildExt as _;

use super::waiting::wait_until;
use super::{DEADLINE, rounds, scaled};

/// Maximum time that a descendant may outlive the process that the test started.
///
/// The promise that orphans exit within a second has its own tests. Here, 1 s is too short: on a
/// machine with two cores and a load of 20, a process that was killed got no core for more than a
/// second.
const GRACE: Duration = Duration::from_secs(10);

/// A process and its descendants, in their own process group.
pub struct Group {
    child: RefCell<Child>,
    log: RefCell<File>,
    /// The group's directory for temporary files. Every user may write to the directory.
    temporary: TempDir,
}

impl Group {
    /// Starts a program, and records its output. [`Group::finish`] prints the output if the program
    /// fails.
    pub fn start(command: &mut Command) -> std::io::Result<Self> {
        let log = tempfile::tempfile()?;
        Self::start_in(command, log.try_clone()?, log.try_clone()?, log)
    }

    /// Starts a program whose output goes to `stdout` and `stderr`, and is not recorded.
    pub fn start_with(
        command: &mut Command,
        stdout: impl Into<Stdio>,
        stderr: impl Into<Stdio>,
    ) -> std::io::Result<Self> {
        Self::start_in(command, stdout, stderr, tempfile::tempfile()?)
    }

    fn start_in(
        command: &mut Command,
        stdout: impl Into<Stdio>,
        stderr: impl Into<Stdio>,
        log: File,
    ) -> std::io::Result<Self> {
        let temporary = tempfile::tempdir()?;
        std::fs::set_permissions(temporary.path(), Permissions::from_mode(0o1777))?;
        let child = command
            .env("TMPDIR", temporary.path())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()?;
        let (child, log) = (RefCell::new(child), RefCell::new(log));
        Ok(Self {
            child,
            log,
            temporary,
        })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.borrow().id()).unwrap())
    }

    /// Returns everything that the program has printed so far.
    pub fn output(&self) -> String {
        let path = format!("/proc/self/fd/{}", self.log.borrow().as_raw_fd());
        let mut text = String::new();
        File::open(path).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Waits until a complete line of the output begins with `prefix`, and returns the rest of the
    /// line. Panics if the program exits without such a line.
    pub fn line(&self, prefix: &str) -> String {
        let find = || {
            let output = self.output();
            let complete = output
                .rsplit_once('\n')
                .map_or("", |(lines, _)| lines)
                .to_owned();
            let found = complete.lines().find_map(|line| line.strip_prefix(prefix));
            found.map(str::to_owned)
        };
        wait_until(&format!("a line that starts with {prefix:?}"), || {
            // Check whether the program is running before reading its output. In the opposite
            // order, the program could print the line and exit between the two steps.
            let status = self.child.borrow_mut().try_wait().unwrap();
            let found = find();
            assert!(
                found.is_some() || status.is_none(),
                "exited ({status:?}) without a line that starts with {prefix:?}:\n{}",
                self.output()
            );
            found
        })
    }

    /// Does the same as [`Group::end`], and also prints the output if the program failed.
    pub fn finish(&self) -> Result<ExitStatus, Failed> {
        let status = self.end()?;
        if !status.success() {
            let mut stderr = std::io::stderr().lock();
            let _ = writeln!(stderr, "{}", self.output());
        }
        Ok(status)
    }

    /// Waits for the program, and returns its exit status. Returns an error if the program hangs,
    /// if a descendant does not exit within [`GRACE`], or if a temporary file remains.
    pub fn end(&self) -> Result<ExitStatus, Failed> {
        let ended = self
            .child
            .borrow_mut()
            .wait_timeout(scaled(DEADLINE) * rounds())?;
        let Some(status) = ended else {
            return Err(format!("hangs:\n{}", self.output()).into());
        };
        self.assert_no_process_left()?;
        self.assert_no_file_left()?;
        Ok(status)
    }

    /// Waits until every process in the group has exited. Returns an error if a process still
    /// exists after [`GRACE`].
    ///
    /// This process is a subreaper, so processes that outlive their parents become its children and
    /// `waitpid` finds them.
    fn assert_no_process_left(&self) -> Result<(), Failed> {
        let group = Pid::from_raw(-self.pid().as_raw());
        let end = Instant::now() + scaled(GRACE);
        loop {
            match waitpid(group, Some(WaitPidFlag::WNOHANG)) {
                Err(nix::Error::ECHILD) => return Ok(()),
                Ok(WaitStatus::StillAlive) if Instant::now() < end => {
                    // Check again, because `waitpid` has no time limit.
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(WaitStatus::StillAlive) => {
                    return Err(format!("left a process behind:\n{}", self.output()).into());
                }
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn assert_no_file_left(&self) -> Result<(), Failed> {
        let left: Vec<_> = std::fs::read_dir(self.temporary.path())?.collect::<Result<_, _>>()?;
        if left.is_empty() {
            return Ok(());
        }
        Err(format!("left files behind: {left:?}\n{}", self.output()).into())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = killpg(self.pid(), Signal::SIGKILL);
        let _ = self.child.borrow_mut().wait();
    }
}

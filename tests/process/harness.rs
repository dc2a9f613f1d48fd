//! Runs each test in its own processes, and checks that no process, file or descriptor remains.
//!
//! A *scenario* is a function that calls `cluster::init` and runs as the master or as a worker. The
//! driver starts this test binary with the scenario's name in its environment. The started process
//! becomes the master. The master executes this binary for its workers, which inherit the
//! environment and run the same scenario.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cluster::{
    Error, Interest, ListenOptions, Listener, Master, Role, SchedulingPolicy, Worker, WorkerProcess,
};
use libtest_mimic::{Failed, Trial};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, SigSet, Signal, kill, killpg, signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getppid};
use tempfile::TempDir;
use wait_timeout::ChildExt as _;

/// Environment variable that names the scenario of a process.
pub const SCENARIO: &str = "SCENARIO";

/// Time for one round of a test, after which the test is treated as hanging. No test takes nearly
/// as long.
const DEADLINE: Duration = Duration::from_secs(120);

/// Returns how many times a repeatable test runs: the value of `CLUSTER_TEST_ROUNDS`, or 1 if the
/// variable is not set.
pub fn rounds() -> u32 {
    let wanted = std::env::var("CLUSTER_TEST_ROUNDS").ok();
    wanted.map_or(1, |wanted| wanted.parse().expect("a number"))
}

/// Returns `limit` multiplied by `CLUSTER_TEST_TIME_FACTOR`, which is 1 if the variable is not set.
///
/// A test's time limits are for a machine of usual speed. An emulator needs about ten times as long.
pub fn scaled(limit: Duration) -> Duration {
    let factor = std::env::var("CLUSTER_TEST_TIME_FACTOR").ok();
    limit * factor.map_or(1, |factor| factor.parse().expect("a number"))
}

/// Resets all signals except SIGPIPE to their default actions. This process may have been started
/// with ignored signals, for example by nohup(1) or in the background of a script, and the
/// processes that it starts would inherit them.
#[allow(unsafe_code)]
pub fn reset_ignored_signals() {
    let is_fixed = |signal: &Signal| {
        // Leave SIGPIPE ignored, as Rust's runtime has set it. `Command` resets it in every child.
        matches!(signal, Signal::SIGKILL | Signal::SIGSTOP | Signal::SIGPIPE)
    };
    for number in Signal::iterator().filter(|signal| !is_fixed(signal)) {
        // SAFETY: the default action runs no code in this process, which has no handlers yet.
        unsafe { signal(number, SigHandler::SigDfl) }.unwrap();
    }
}

/// Maximum time that a descendant may outlive the process that the test started.
///
/// The promise that orphans exit within a second has its own tests. Here, 1 s is too short: on a
/// machine with two cores and a load of 20, a process that was killed got no core for more than a
/// second.
const GRACE: Duration = Duration::from_secs(10);

pub struct Scenario {
    pub name: &'static str,
    pub play: fn(),
    /// Requirement that some machines do not meet. `None` if the scenario runs on every machine.
    pub need: Option<&'static Need>,
}

/// Requirement of a scenario. On a machine that does not meet the requirement, the scenario is
/// ignored.
pub struct Need {
    name: &'static str,
    is_met: fn() -> bool,
}

pub const ROOT: Need = Need {
    name: "root",
    is_met: is_root,
};
pub const SETPRIV: Need = Need {
    name: "root and setpriv",
    is_met: || {
        // BusyBox has a program with this name that knows fewer options.
        let version = Command::new("setpriv").arg("--version").output();
        is_root() && version.is_ok_and(|run| run.status.success())
    },
};
pub const FILE_CAPABILITIES: Need = Need {
    name: "root, setcap, and files with capabilities",
    is_met: || {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut setcap = Command::new("setcap");
        setcap.arg("cap_net_bind_service=+ep").arg(file.path());
        is_root()
            && setcap.output().is_ok_and(|set| set.status.success())
            && files_can_grant_privileges()
    },
};
pub const SET_USER_ID: Need = Need {
    name: "root, and set-user-ID bits that take effect",
    is_met: || is_root() && files_can_grant_privileges(),
};
pub const USER_NAMESPACE: Need = Need {
    name: "unshare and user namespaces",
    is_met: || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "true"]);
        unshare.output().is_ok_and(|run| run.status.success())
    },
};
pub const MOUNT_NAMESPACE: Need = Need {
    name: "unshare and mount namespaces",
    is_met: || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "true"]);
        unshare.output().is_ok_and(|run| run.status.success())
    },
};
pub const PID_NAMESPACE: Need = Need {
    name: "PID namespace",
    is_met: has_pid_namespaces,
};

/// A dynamic loader that a test can start with this program as its argument.
pub const LOADER: Need = Need {
    name: "a dynamically linked test program",
    is_met: || loader().is_some(),
};

pub const SYSTEMD: Need = Need {
    name: "systemd-socket-activate and systemd-notify",
    is_met: || {
        let tools = ["systemd-socket-activate", "systemd-notify"];
        let runs = |tool| Command::new(tool).arg("--version").output().is_ok();
        tools.into_iter().all(runs)
    },
};
pub const PYTHON: Need = Need {
    name: "python3",
    is_met: || Command::new("python3").arg("--version").output().is_ok(),
};

pub const CURL: Need = Need {
    name: "curl",
    is_met: || Command::new("curl").arg("--version").output().is_ok(),
};
pub const PROMTOOL: Need = Need {
    name: "promtool",
    is_met: || Command::new("promtool").arg("--version").output().is_ok(),
};

pub const NETWORKS: Need = Need {
    name: "root, ip and haproxy",
    is_met: || is_root() && has_networks() && Command::new("haproxy").arg("-v").output().is_ok(),
};

pub const SYSTEMD_ANALYZE: Need = Need {
    name: "systemd-analyze",
    is_met: || runs("systemd-analyze", "--version"),
};
pub const STRACE: Need = Need {
    name: "systemd-analyze and strace",
    is_met: || {
        let trace = Command::new("strace")
            .args(["-qq", "-o", "/dev/null", "true"])
            .output();
        runs("systemd-analyze", "--version") && trace.is_ok_and(|run| run.status.success())
    },
};
pub const HAPROXY: Need = Need {
    name: "haproxy",
    is_met: || runs("haproxy", "-v"),
};
pub const NGINX: Need = Need {
    name: "nginx",
    is_met: || runs("nginx", "-v"),
};
pub const BUSYBOX: Need = Need {
    name: "busybox",
    is_met: || runs("busybox", "--help"),
};
/// The program nice(1), which some builds of BusyBox lack.
pub const NICE: Need = Need {
    name: "nice",
    is_met: || runs("nice", "true"),
};
pub const KUBECTL: Need = Need {
    name: "kubectl",
    is_met: || runs("kubectl", "--help"),
};

pub const ROOT_AND_FAULT_POINTS: Need = Need {
    name: "root and debug assertions",
    is_met: || is_root() && cfg!(debug_assertions),
};

/// Kernel that allows a process to trace another process of the same user.
pub const TRACING: Need = Need {
    name: "ptrace",
    is_met: || {
        let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        let scope = scope.map_or(0, |scope| scope.trim().parse::<u32>().unwrap());
        scope < 2 || (is_root() && scope < 3)
    },
};

/// A build with fault points, which make the library fail on request.
pub const FAULT_POINTS: Need = Need {
    name: "debug assertions",
    is_met: || cfg!(debug_assertions),
};
/// Kernel that lets the master read a child's exit status even if another thread, a signal handler
/// or the kernel itself has already reaped the child.
pub const EXIT_OF_REAPED_CHILDREN: Need = Need {
    name: "Linux 6.15",
    is_met: reports_exit_of_reaped_children,
};

/// The package's sources at the path where they were when this program was built.
pub const SOURCES: Need = Need {
    name: "the sources",
    is_met: || Path::new(env!("CARGO_MANIFEST_DIR")).exists(),
};

/// A kernel that has IPv6, which may be disabled.
pub const IPV6: Need = Need {
    name: "IPv6",
    is_met: || TcpListener::bind("[::1]:0").is_ok(),
};

/// Builds the table of scenarios from function names. A function with a requirement is followed by
/// a colon and the requirement's name.
#[macro_export]
macro_rules! scenarios {
    ($($name:ident $(: $need:ident)?)*) => {
        pub const SCENARIOS: &[$crate::harness::Scenario] = &[
            $($crate::harness::Scenario {
                name: stringify!($name),
                play: $name,
                need: $crate::scenarios!(@need $($need)?),
            },)*
        ];
    };
    (@need) => { None };
    (@need $need:ident) => { Some(&$crate::harness::$need) };
}

/// Returns the test that runs a scenario.
pub fn trial(scenario: &'static Scenario) -> Trial {
    let test = Trial::test(scenario.name, || run(scenario.name));
    match scenario.need {
        Some(need) => need.of(test),
        None => test,
    }
}

impl Need {
    pub fn of(&self, test: Trial) -> Trial {
        test.with_kind(format!("needs {}", self.name))
            .with_ignored_flag(!(self.is_met)())
    }
}

fn runs(program: &str, argument: &str) -> bool {
    Command::new(program).arg(argument).output().is_ok()
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Returns the path of this process's dynamic loader, or `None` if the program is statically
/// linked.
pub fn loader() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let files = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5));
    files.map(PathBuf::from).find(|file| {
        let name = file.file_name().unwrap_or_default();
        name.as_encoded_bytes().starts_with(b"ld-")
    })
}

/// Returns whether executing a file in the temporary directory can grant privileges to its user.
fn files_can_grant_privileges() -> bool {
    use nix::sys::statvfs::{FsFlags, statvfs};

    let temporary = statvfs(&std::env::temp_dir());
    let no_new_privileges = nix::sys::prctl::get_no_new_privs();
    temporary.is_ok_and(|fs| !fs.flags().contains(FsFlags::ST_NOSUID))
        && no_new_privileges == Ok(false)
}

fn has_pid_namespaces() -> bool {
    let mut command = Command::new("true");
    let enter = || unshare(CloneFlags::CLONE_NEWPID).map_err(std::io::Error::from);
    #[allow(unsafe_code)]
    // SAFETY: the closure makes one system call and does not allocate, so it is safe between `fork`
    // and `execve`.
    unsafe {
        command.pre_exec(enter)
    };
    command.status().is_ok_and(|status| status.success())
}

/// Returns whether this process may create network namespaces and veth pairs.
fn has_networks() -> bool {
    let probe = || {
        let ip = || {
            Command::new("ip")
                .args(["link", "add", "type", "veth"])
                .output()
        };
        unshare(CloneFlags::CLONE_NEWNET).is_ok() && ip().is_ok_and(|made| made.status.success())
    };
    std::thread::spawn(probe).join().is_ok_and(|may| may)
}

fn reports_exit_of_reaped_children() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split('.')
        .map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(15))
}

/// User and group id of `nobody`, which owns no files.
pub const NOBODY: u32 = 65534;

/// Path through which every user can execute this test binary.
pub const OWN_PROGRAM: &str = "/proc/self/exe";

fn run(name: &str) -> Result<(), Failed> {
    run_with(name, &[])
}

/// Runs a scenario with additional environment variables, and fails if its process fails.
pub fn run_with(name: &str, env: &[(&str, &str)]) -> Result<(), Failed> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(SCENARIO, name).envs(env.iter().copied());
    let group = Group::start(&mut command)?;
    let status = group.finish()?;
    status
        .success()
        .then_some(())
        .ok_or_else(|| status.to_string().into())
}

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
            let is_running = matches!(self.child.borrow_mut().try_wait(), Ok(None));
            let found = find();
            assert!(
                found.is_some() || is_running,
                "exited without a line that starts with {prefix:?}:\n{}",
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

/// Calls `ask` every millisecond until `ask` returns a value, and returns this value.
///
/// Use this function for conditions whose change causes no event. Panics if the wait takes longer
/// than half of [`DEADLINE`], so that the panic names the condition before the test is treated as
/// hanging.
#[track_caller]
pub fn wait_until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + scaled(DEADLINE) / 2;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs a scenario as the master or as a worker, and returns only in the master.
///
/// The master runs until no work remains. Its process then asserts that no worker and no connection
/// in flight remain, and that the master has closed its descriptors.
pub fn cluster(master: impl FnOnce(&Master), worker: impl FnOnce(Worker)) {
    let before = open_fds();
    match cluster::init().expect("init") {
        Role::Master(role) => {
            master(&role);
            role.run().expect("run");
            assert!(role.workers().is_empty());
            assert_eq!(role.ledger().in_flight(), 0);
            drop(role);
            let after = open_fds();
            let left: Vec<_> = after.iter().filter(|fd| !before.contains(fd)).collect();
            // The signal socketpair stays open until the process exits, because a signal handler
            // may use it at any time.
            let pair = if SIGNALS.load(Ordering::SeqCst) { 2 } else { 0 };
            assert_eq!(left.len(), pair, "descriptors left open: {left:?}");
        }
        Role::Worker(role) => {
            worker(role);
            // Exit here, because the scenario's code after this call checks events that only the
            // master has recorded.
            std::process::exit(0);
        }
    }
}

/// Whether the master handles signals in this scenario, so that [`cluster`] expects the signal
/// socketpair to stay open. Scenarios set this flag themselves.
pub static SIGNALS: AtomicBool = AtomicBool::new(false);

/// Returns the sorted link targets of the open descriptors, except those of files in `/proc`.
pub fn open_fds() -> Vec<PathBuf> {
    let fds = std::fs::read_dir("/proc/self/fd").expect("/proc");
    let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let mut links: Vec<_> = links.filter(|link| !link.starts_with("/proc")).collect();
    links.sort();
    links
}

/// Runs blocking work on a thread while the master's loop continues, and then calls `then` with the
/// result.
pub fn in_background<T: Send + 'static>(
    master: &Master,
    work: impl FnOnce() -> T + Send + 'static,
    then: impl FnOnce(&Master, T) + 'static,
) {
    let (done, signal) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let result = work();
        drop(signal);
        result
    });
    let mut rest = Some((thread, then));
    let finish = move |master: &Master, _: &UnixStream| {
        let (thread, then) = rest.take().unwrap();
        then(master, thread.join().unwrap());
        None
    };
    master.watch(done, Interest::Readable, finish).unwrap();
}

/// Calls `then` with the listener's address once `workers` workers have reported that they listen.
pub fn when_listening(
    master: &Master,
    workers: usize,
    then: impl FnOnce(&Master, SocketAddr) + 'static,
) {
    let mut then = Some(then);
    let mut count = 0;
    master.on_listening(move |master, _, address| {
        count += 1;
        if count == workers {
            let address = address.to_string().parse().unwrap();
            then.take().unwrap()(master, address);
        }
    });
}

/// Checks the condition every millisecond, and calls `then` when it is true.
///
/// Use this function for conditions whose change causes no event, while the master's loop
/// continues.
pub fn when(
    master: &Master,
    condition: impl Fn(&Master) -> bool + 'static,
    then: impl FnOnce(&Master) + 'static,
) {
    master.set_timeout(Duration::from_millis(1), move |master| {
        if condition(master) {
            then(master);
        } else {
            when(master, condition, then);
        }
    });
}

/// Calls `then` once every worker has answered two pings, one after the other. Workers must call
/// `answer_pings`, and no client may connect in the meantime.
///
/// A worker that enters `accept` handles messages before it reports to the master that it is idle.
/// The answer to the first ping may therefore precede the report, but the answer to the second ping
/// follows it. When the master calls `then`, it has thus received the reports of all workers.
pub fn when_all_wait(master: &Master, then: impl FnOnce(&Master) + 'static) {
    let workers = master.workers();
    let mut unanswered: BTreeMap<_, _> = workers.iter().map(|worker| (worker.id(), 2)).collect();
    let mut then = Some(then);
    let own = Rc::new(Cell::new(None));
    let id = Rc::clone(&own);
    own.set(Some(master.on_message(move |master, worker, _| {
        match unanswered.get_mut(&worker.id()) {
            Some(2) => {
                unanswered.insert(worker.id(), 1);
                ping(worker);
            }
            Some(_) | None => drop(unanswered.remove(&worker.id())),
        }
        if unanswered.is_empty() {
            master.remove_callback(id.get().unwrap());
            then.take().unwrap()(master);
        }
    })));
    workers.iter().for_each(ping);
}

fn ping(worker: &WorkerProcess) {
    let _ = worker.send(b"ping").unwrap();
}

/// Returns the number of connections that went back to the master because a worker had not received
/// them.
///
/// A worker that does not receive its connection within 20 ms, for instance because it has to wait
/// for a core, loses its turn in the rotation. Tests therefore check the exact rotation only if
/// this number has not grown.
pub fn count_returned(master: &Master) -> u64 {
    master
        .loads()
        .workers
        .iter()
        .map(|load| load.returned)
        .sum()
}

pub fn answer_pings(worker: &Worker) {
    worker.on_message(|worker, _| {
        let _ = worker.send(b"pong").unwrap();
    });
}

/// Answers each connection with the worker's id, until the listener is closed.
pub fn serve_id(worker: &Worker, address: &str) {
    for connection in worker.listen(address).unwrap().incoming() {
        let id = worker.id().to_string();
        let _ = connection.unwrap().write_all(id.as_bytes());
    }
}

/// Serves connections and reads one byte before each answer, which is the worker's id. A client
/// that sends nothing therefore keeps its worker busy.
pub fn serve_after_one_byte(worker: &Worker) {
    answer_pings(worker);
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        let mut connection = connection.unwrap();
        if connection.read_exact(&mut [0]).is_ok() {
            let id = worker.id().to_string();
            let _ = connection.write_all(id.as_bytes());
        }
    }
}

/// Sets a callback of the listener that answers each connection with `text`.
pub fn answer(listener: &Listener, text: impl ToString) {
    let text = text.to_string();
    listener.set_connection_callback(move |_, mut connection| {
        connection.write_all(text.as_bytes()).unwrap();
    });
}

/// Connects a client to `address`, runs the worker's loop until the client has an answer, and
/// returns the answer.
pub fn read_answer(worker: &Worker, address: SocketAddr) -> String {
    let client = std::thread::spawn(move || talk(address, b"").unwrap());
    wait_until("an answer", || {
        worker.dispatch(Some(Duration::from_millis(1))).unwrap();
        client.is_finished().then_some(())
    });
    client.join().unwrap()
}

/// Waits until `/proc/PID/stat` contains `state`, for example `") T "` for a stopped process.
pub fn wait_for_state(pid: u32, state: &str) {
    let stat = format!("/proc/{pid}/stat");
    wait_until(state, || {
        let stat = std::fs::read_to_string(&stat).unwrap();
        stat.contains(state).then_some(())
    });
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

/// Runs the worker's loop, and then waits for a signal that kills the process.
///
/// Use this function for workers that the master kills. Such a worker never returns from `main`, so
/// its exit status always names the signal.
pub fn run_until_killed(worker: &Worker) -> ! {
    worker.run().unwrap();
    loop {
        nix::unistd::pause();
    }
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

/// A scenario's events, in order.
#[derive(Clone, Default)]
pub struct Log(Rc<RefCell<Vec<String>>>);

impl Log {
    pub fn add(&self, entry: impl Into<String>) {
        self.0.borrow_mut().push(entry.into());
    }

    pub fn take(&self) -> Vec<String> {
        self.0.take()
    }

    pub fn len(&self) -> usize {
        self.0.borrow().len()
    }
}

/// Logs the workers' events and the errors in the master, but no messages. Entries are, for
/// example, "1 online" or "2 exit Some(true) exit status: 0". Errors are logged without a worker's
/// id.
pub fn note_events(master: &Master, log: &Log) {
    let note = |event: &'static str| {
        let log = log.clone();
        move |_: &Master, worker: &WorkerProcess| log.add(format!("{} {event}", worker.id()))
    };
    master.on_fork(note("fork"));
    master.on_online(note("online"));
    let listening = note("listening");
    master.on_listening(move |master, worker, _| listening(master, worker));
    let at_disconnect = log.clone();
    master.on_disconnect(move |_, worker| {
        let flag = worker.exited_after_disconnect();
        at_disconnect.add(format!("{} disconnect {flag:?}", worker.id()));
    });
    let at_exit = log.clone();
    master.on_exit(move |_, worker, status| {
        let flag = worker.exited_after_disconnect();
        at_exit.add(format!("{} exit {flag:?} {status}", worker.id()));
    });
    let at_error = log.clone();
    master.on_error(move |_, _, error| at_error.add(error.to_string()));
}

/// Logs every worker's messages in the master, for example "1 ready".
pub fn note_messages(master: &Master, log: &Log) {
    let log = log.clone();
    master.on_message(move |_, worker, message| {
        let text = String::from_utf8_lossy(message.bytes());
        log.add(format!("{} {text}", worker.id()));
    });
}

/// Returns the entries of one worker in their order, without the worker's id.
pub fn of(worker: u32, entries: &[String]) -> Vec<&str> {
    let prefix = format!("{worker} ");
    let own = entries
        .iter()
        .filter_map(|entry| entry.strip_prefix(&prefix));
    own.collect()
}

/// Asserts that each of `workers` workers has exactly the expected entries, in order, and that no
/// other entries exist.
#[track_caller]
pub fn assert_each(workers: u32, entries: &[String], expected: &[&str]) {
    for worker in 1..=workers {
        assert_eq!(of(worker, entries), expected, "worker {worker}");
    }
    let all = expected.len() * workers as usize;
    assert_eq!(entries.len(), all, "{entries:?}");
}

pub fn share_listeners(master: &Master) {
    let policy = SchedulingPolicy::Shared;
    master.set_scheduling_policy(policy).unwrap();
}

/// Opens a non-blocking listener on a free port without the crate, and returns the listener and its
/// address.
pub fn idle_server() -> (TcpListener, SocketAddr) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let address = server.local_addr().unwrap();
    (server, address)
}

/// Closes the listener when the worker exits, after asserting that no client has connected to it.
pub fn close_at_exit(worker: &WorkerProcess, server: TcpListener) {
    let server = RefCell::new(Some(server));
    worker.on_exit(move |_, _, _| {
        let error = server.take().unwrap().accept().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    });
}

/// Asserts that `listen` fails with `errno`, and returns the error.
pub fn expect_listen_error<S: std::fmt::Debug>(
    worker: &Worker,
    options: impl Into<ListenOptions<S>>,
    errno: i32,
) -> Error {
    let error = worker.listen(options).unwrap_err();
    assert!(matches!(error, Error::Listen { .. }), "{error}");
    assert_eq!(error.raw_os_error(), Some(errno), "{error}");
    error
}

/// Starts this program again as a child with one additional environment variable, and runs `play`
/// in that child. The child's workers inherit the variable.
///
/// The child runs the same scenario and calls this function again. That call finds the variable
/// set, and runs `play`. Use this function for behaviour that is decided before `main` begins.
pub fn with_env(name: &str, value: &str, play: impl FnOnce()) {
    if std::env::var_os(name).is_some_and(|own| own == value) {
        return play();
    }
    let own = std::env::current_exe().expect("own path");
    let status = Command::new(own).env(name, value).status().expect("child");
    assert!(status.success(), "with {name}={value}: {status}");
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

/// Connects to `address`, sends `request`, and reads until the end of the stream.
pub fn talk(address: SocketAddr, request: &[u8]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(scaled(DEADLINE) / 2))?;
    stream.write_all(request)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Reserves a free port until the returned socket is dropped.
///
/// The socket is bound but does not listen. Other sockets with SO_REUSEADDR can therefore listen on
/// the port, and the kernel does not choose the port for another socket.
pub fn reserve_port() -> (OwnedFd, SocketAddr) {
    reserve("127.0.0.1:0".parse().unwrap()).unwrap()
}

/// Reserves an address until the returned socket is dropped. An IPv6 address does not reserve the
/// IPv4 port.
pub fn reserve(address: SocketAddr) -> nix::Result<(OwnedFd, SocketAddr)> {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, getsockname, setsockopt, socket,
        sockopt::{Ipv6V6Only, ReuseAddr},
    };
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, ReuseAddr, &true)?;
    if address.is_ipv6() {
        setsockopt(&socket, Ipv6V6Only, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    let bound = getsockname::<SockaddrStorage>(socket.as_raw_fd())?;
    let v4 = bound.as_sockaddr_in().map(|v4| v4.port());
    let port = v4.or_else(|| bound.as_sockaddr_in6().map(|v6| v6.port()));
    Ok((socket, SocketAddr::new(address.ip(), port.unwrap())))
}

/// Runs `play` with the default scheduling policy and with the policy `none`. The second run is in
/// a child process, because a process has one cluster.
pub fn for_both_policies(play: impl Fn()) {
    const POLICY: &str = "CLUSTER_SCHED_POLICY";
    if std::env::var_os(POLICY).is_none() {
        play();
    }
    with_env(POLICY, "none", play);
}

/// Runs `play` with each scheduling policy. All runs but the first are in child processes.
pub fn for_all_policies(play: impl Fn()) {
    if std::env::var_os("CLUSTER_SCHED_POLICY").is_none() {
        play();
    }
    for_policies_without_dispatch(play);
}

/// Runs `play` with the policies `none` and `sharded`, each in a child process.
pub fn for_policies_without_dispatch(play: impl Fn()) {
    const POLICY: &str = "CLUSTER_SCHED_POLICY";
    if std::env::var_os(POLICY).is_some() {
        return play();
    }
    for policy in ["none", "sharded"] {
        with_env(POLICY, policy, &play);
    }
}

/// Returns the children of this process's main thread, including zombies.
pub fn children() -> Vec<u32> {
    let own = std::process::id();
    let numbers = std::fs::read_to_string(format!("/proc/self/task/{own}/children")).unwrap();
    let numbers = numbers.split_whitespace();
    numbers.map(|number| number.parse().unwrap()).collect()
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
    /// [`Self::wait_for_child`] can wait for it in any thread.
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

    /// Waits until a child sleeps in `execve` of the program, and returns the child's pid.
    pub fn wait_for_child(&self) -> Pid {
        SigSet::from(Signal::SIGIO).wait().unwrap();
        let child = children().into_iter().rfind(|child| is_alive(*child));
        let child = child.expect("a child");
        wait_for_state(child, ") S ");
        Pid::from_raw(i32::try_from(child).unwrap())
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

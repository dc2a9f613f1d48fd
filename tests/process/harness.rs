//! Runs each test in processes of its own, and looks that nothing is left of them.
//!
//! A *scenario* is a function that calls `cluster::init` and plays whichever role it gets. The
//! driver starts this very binary with the scenario's name in its environment; that process becomes
//! the master, and forks this binary again for its workers, which find the same name.

use std::cell::{Cell, RefCell};
use std::fs::{File, Permissions};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cluster::{
    Error, Interest, ListenOptions, Listener, Master, Role, SchedulingPolicy, Worker, WorkerProcess,
};
use libtest_mimic::{Failed, Trial};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getppid};
use tempfile::TempDir;
use wait_timeout::ChildExt as _;

/// Names the scenario to a process that is to play it.
pub const SCENARIO: &str = "SCENARIO";

/// Far beyond what any test needs; it is there to end one that hangs.
const DEADLINE: Duration = Duration::from_secs(120);
/// How often the tests repeat what they can play again and again: `CLUSTER_TEST_ROUNDS`, or once.
pub fn rounds() -> u32 {
    let wanted = std::env::var("CLUSTER_TEST_ROUNDS").ok();
    wanted.map_or(1, |wanted| wanted.parse().expect("a number"))
}

/// How long a process may outlive its master.
const GRACE: Duration = Duration::from_secs(1);

pub struct Scenario {
    pub name: &'static str,
    pub play: fn(),
    /// What not every machine has.
    pub need: Option<&'static Need>,
}

/// What a scenario needs: where it is missing, the scenario counts as ignored.
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
    is_met: || is_root() && Command::new("setpriv").arg("--version").output().is_ok(),
};
pub const FILE_CAPABILITIES: Need = Need {
    name: "root, setcap, and files with capabilities",
    is_met: || {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut setcap = Command::new("setcap");
        setcap.arg("cap_net_bind_service=+ep").arg(file.path());
        is_root() && setcap.output().is_ok_and(|set| set.status.success()) && has_rights_by_file()
    },
};
pub const SET_USER_ID: Need = Need {
    name: "root, and set-user-ID bits that count",
    is_met: || is_root() && has_rights_by_file(),
};
pub const PID_NAMESPACE: Need = Need {
    name: "PID namespace",
    is_met: has_pid_namespaces,
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

pub const NETWORKS: Need = Need {
    name: "root, ip and haproxy",
    is_met: || is_root() && has_networks() && Command::new("haproxy").arg("-v").output().is_ok(),
};

pub const ROOT_AND_FAULT_POINTS: Need = Need {
    name: "root and debug assertions",
    is_met: || is_root() && cfg!(debug_assertions),
};

/// A process of the same user may trace another one that allows it.
pub const TRACING: Need = Need {
    name: "ptrace",
    is_met: || {
        let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        let scope = scope.map_or(0, |scope| scope.trim().parse::<u32>().unwrap());
        scope < 2 || (is_root() && scope < 3)
    },
};

/// The library fails where tests want it to.
pub const FAULT_POINTS: Need = Need {
    name: "debug assertions",
    is_met: || cfg!(debug_assertions),
};
/// The kernel tells how a process ended whom somebody else has waited for.
pub const EXITS_OF_THE_REAPED: Need = Need {
    name: "Linux 6.15",
    is_met: tells_exits_of_the_reaped,
};

/// A table of scenarios from the functions of that name, with what they need.
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

/// A test that plays a scenario.
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

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Whether programs in the directory of temporary files may have more rights than their users.
fn has_rights_by_file() -> bool {
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
    // SAFETY: one system call, which is async-signal-safe.
    unsafe {
        command.pre_exec(enter)
    };
    command.status().is_ok_and(|status| status.success())
}

/// Whether this process may have network namespaces with cables between them.
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

fn tells_exits_of_the_reaped() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split('.')
        .map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(15))
}

/// A user and group that own nothing.
pub const NOBODY: u32 = 65534;

/// This program by a way that every user may go, wherever it is.
pub const OWN_PROGRAM: &str = "/proc/self/exe";

fn run(name: &str) -> Result<(), Failed> {
    run_with(name, &[])
}

/// Plays a scenario in an environment of its own.
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

/// A process, and all that it leads to, in a process group of its own.
pub struct Group {
    child: RefCell<Child>,
    log: RefCell<File>,
    /// Where it makes its temporary files, whatever users it has.
    temporary: TempDir,
}

impl Group {
    /// Starts a program whose output is shown if the test fails.
    pub fn start(command: &mut Command) -> std::io::Result<Self> {
        let log = tempfile::tempfile()?;
        let temporary = tempfile::tempdir()?;
        std::fs::set_permissions(temporary.path(), Permissions::from_mode(0o1777))?;
        let child = command
            .env("TMPDIR", temporary.path())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
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

    /// What the program has printed so far.
    pub fn output(&self) -> String {
        let path = format!("/proc/self/fd/{}", self.log.borrow().as_raw_fd());
        let mut text = String::new();
        File::open(path).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Waits until a line of the output begins with `prefix`, and returns the rest of it.
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
        wait_until(&format!("a line {prefix:?}"), || {
            assert!(
                find().is_some() || matches!(self.child.borrow_mut().try_wait(), Ok(None)),
                "ended without a line {prefix:?}:\n{}",
                self.output()
            );
            find()
        })
    }

    /// Waits for the program, then for everything that it started, and shows what it printed if
    /// it failed.
    pub fn finish(&self) -> Result<ExitStatus, Failed> {
        let status = self.end()?;
        if !status.success() {
            let mut stderr = std::io::stderr().lock();
            let _ = writeln!(stderr, "{}", self.output());
        }
        Ok(status)
    }

    /// Waits for the program, then for everything that it started.
    pub fn end(&self) -> Result<ExitStatus, Failed> {
        let ended = self.child.borrow_mut().wait_timeout(DEADLINE * rounds())?;
        let Some(status) = ended else {
            return Err(format!("hangs:\n{}", self.output()).into());
        };
        self.assert_nobody_left()?;
        self.assert_no_file_left()?;
        Ok(status)
    }

    /// Whoever is left was inherited by this process, which is a subreaper.
    fn assert_nobody_left(&self) -> Result<(), Failed> {
        let group = Pid::from_raw(-self.pid().as_raw());
        let end = Instant::now() + GRACE;
        loop {
            match waitpid(group, Some(WaitPidFlag::WNOHANG)) {
                Err(nix::Error::ECHILD) => return Ok(()),
                Ok(WaitStatus::StillAlive) if Instant::now() < end => {
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

/// Asks again and again, where the system has no event for it.
#[track_caller]
pub fn wait_until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE / 2;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Plays both roles of a scenario; returns in the master only. The master runs until nothing is left to wait for, and must
/// have given back all descriptors and accounted for all connections then.
pub fn cluster(master: impl FnOnce(&Master), worker: impl FnOnce(Worker)) {
    let before = open_fds();
    match cluster::init().expect("init") {
        Role::Master(role) => {
            master(&role);
            role.run().expect("run");
            assert!(role.workers().is_empty());
            assert_eq!(role.ledger().in_hand(), 0);
            drop(role);
            let after = open_fds();
            let left: Vec<_> = after.iter().filter(|fd| !before.contains(fd)).collect();
            // The pair by which signals arrive stays for the life of the process, because a
            // handler may be using it at any time.
            let pair = if SIGNALS.load(Ordering::SeqCst) { 2 } else { 0 };
            assert_eq!(left.len(), pair, "descriptors left open: {left:?}");
        }
        Role::Worker(role) => {
            worker(role);
            // What follows in the scenario is about the master.
            std::process::exit(0);
        }
    }
}

/// Set by scenarios that handle signals.
pub static SIGNALS: AtomicBool = AtomicBool::new(false);

/// The open descriptors, as what they are.
pub fn open_fds() -> Vec<PathBuf> {
    let fds = std::fs::read_dir("/proc/self/fd").expect("/proc");
    let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let mut links: Vec<_> = links.filter(|link| !link.starts_with("/proc")).collect();
    links.sort();
    links
}

/// Does work that blocks on a thread, so that the master can go on, and then calls back.
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

/// Calls back with the address when as many workers listen.
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

/// Calls back when every worker waits in `accept`: they answer messages there, and have told the
/// master before that they can take a connection. Workers must call `answer_pings`.
pub fn when_all_wait(master: &Master, then: impl FnOnce(&Master) + 'static) {
    let mut missing = master.workers().len();
    let mut then = Some(then);
    let own = Rc::new(Cell::new(None));
    let id = Rc::clone(&own);
    own.set(Some(master.on_message(move |master, _, _| {
        missing -= 1;
        if missing == 0 {
            master.off(id.get().unwrap());
            then.take().unwrap()(master);
        }
    })));
    for worker in master.workers() {
        worker.send(b"ping").unwrap();
    }
}

pub fn answer_pings(worker: &Worker) {
    worker.on_message(|worker, _| {
        worker.send(b"pong").unwrap();
    });
}

/// Answers each connection with the worker's id.
pub fn serve_id(worker: &Worker, address: &str) {
    for connection in worker.listen(address).unwrap().incoming() {
        let id = worker.id().to_string();
        let _ = connection.unwrap().write_all(id.as_bytes());
    }
}

/// Answers each connection of a listener with `text`.
pub fn answer(listener: &Listener, text: impl ToString) {
    let text = text.to_string();
    listener.on_connection(move |_, mut connection| {
        connection.write_all(text.as_bytes()).unwrap();
    });
}

/// What this worker, whose loop it turns, answers to a client.
pub fn hear(worker: &Worker, address: SocketAddr) -> String {
    let client = std::thread::spawn(move || talk(address, b"").unwrap());
    wait_until("an answer", || {
        worker.dispatch(Some(Duration::from_millis(1))).unwrap();
        client.is_finished().then_some(())
    });
    client.join().unwrap()
}

/// Waits until the process is in a state, as `") T "` for one that has stopped.
pub fn wait_for_state(pid: u32, state: &str) {
    let stat = format!("/proc/{pid}/stat");
    wait_until(state, || {
        let stat = std::fs::read_to_string(&stat).unwrap();
        stat.contains(state).then_some(())
    });
}

/// Waits until a worker sleeps.
pub fn rest(worker: &WorkerProcess) {
    wait_for_state(worker.process().id(), ") S ");
}

/// Stops a worker that has come to rest, and waits until it has stopped.
pub fn stop(worker: &WorkerProcess) {
    rest(worker);
    worker.process().kill(cluster::Signal::STOP);
    wait_for_state(worker.process().id(), ") T ");
}

/// Serves events until a signal ends the process. After `worker.kill` in the master it is so
/// certain to be the signal that ends the worker, and not its own way out of `main`.
pub fn run_until_killed(worker: &Worker) -> ! {
    worker.run().unwrap();
    loop {
        nix::unistd::pause();
    }
}

/// Set for a process that plays a scenario under the eyes of another one that plays it.
pub const WATCHED: (&str, &str) = ("WATCHED", "1");

/// The scenario of this process, for another one that this one watches from outside.
pub fn watched() -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.env(WATCHED.0, WATCHED.1);
    command
}

/// Whether this process, or the master that forked it, was started by way of [`watched`].
pub fn is_watched() -> bool {
    std::env::var_os(WATCHED.0).is_some()
}

/// The master of this worker, which answers nothing as long as this lives: what a worker can do
/// meanwhile, it does alone.
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

/// What happened, in order.
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

/// Notes every event of every worker at cluster level, except messages: "1 online", "2 disconnect
/// Some(true)", "2 exit Some(true) exit status: 0".
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

/// Notes every message of every worker, as "1 ready".
pub fn note_messages(master: &Master, log: &Log) {
    let log = log.clone();
    master.on_message(move |_, worker, message| {
        let text = String::from_utf8_lossy(message.bytes());
        log.add(format!("{} {text}", worker.id()));
    });
}

/// The entries of one worker, as they follow its id.
pub fn of(worker: u32, entries: &[String]) -> Vec<&str> {
    let prefix = format!("{worker} ");
    let own = entries
        .iter()
        .filter_map(|entry| entry.strip_prefix(&prefix));
    own.collect()
}

/// The entries are those of so many workers, each of which has these.
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

/// A server of the master's own program, which keeps its port from the workers.
pub fn idle_server() -> (TcpListener, SocketAddr) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let address = server.local_addr().unwrap();
    (server, address)
}

/// Closes the server, to which nobody may have come, when the worker exits.
pub fn close_at_exit(worker: &WorkerProcess, server: TcpListener) {
    let server = RefCell::new(Some(server));
    worker.on_exit(move |_, _, _| {
        let nobody = server.take().unwrap().accept().unwrap_err();
        assert_eq!(nobody.kind(), std::io::ErrorKind::WouldBlock);
    });
}

/// Listens where the system refuses it.
pub fn listen_in_vain<S: std::fmt::Debug>(
    worker: &Worker,
    options: impl Into<ListenOptions<S>>,
    errno: i32,
) -> Error {
    let error = worker.listen(options).unwrap_err();
    assert!(matches!(error, Error::Listen { .. }), "{error}");
    assert_eq!(error.raw_os_error(), Some(errno), "{error}");
    error
}

/// Plays in a child of this process, which has one more environment variable: for what is decided
/// before a program begins. Workers have the variable, too.
pub fn with_env(name: &str, value: &str, play: impl FnOnce()) {
    if std::env::var_os(name).is_some_and(|own| own == value) {
        return play();
    }
    let own = std::env::current_exe().expect("own path");
    let status = Command::new(own).env(name, value).status().expect("child");
    assert!(status.success(), "with {name}={value}: {status}");
}

/// A command in words, under which the examples run: for programs that look at others from
/// outside, as in `tests/checks/valgrind`.
const WRAPPER: &str = "CLUSTER_TEST_WRAPPER";

/// An example, which `cargo test` builds.
pub fn example(name: &str) -> Command {
    let own = std::env::current_exe().expect("own path");
    let built = own.parent().and_then(|deps| deps.parent()).expect("target");
    let path = built.join("examples").join(name);
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

/// Connects, says `request`, and reads until the end.
pub fn talk(address: SocketAddr, request: &[u8]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE / 2))?;
    stream.write_all(request)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A port that somebody may listen on and that nobody gets by chance, for as long as the socket
/// lives: it is bound to the port, and does not listen.
pub fn reserve_port() -> (OwnedFd, SocketAddr) {
    reserve("127.0.0.1:0".parse().unwrap()).unwrap()
}

/// Reserves an address; of IPv6 it takes nothing but IPv6.
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

/// Plays twice, with each policy: a process has one cluster, and the second one is a child's.
pub fn for_both_policies(play: impl Fn()) {
    const POLICY: &str = "CLUSTER_SCHED_POLICY";
    if std::env::var_os(POLICY).is_none() {
        play();
    }
    with_env(POLICY, "none", play);
}

/// The children of this process's main thread, zombies included.
pub fn children() -> Vec<u32> {
    let own = std::process::id();
    let numbers = std::fs::read_to_string(format!("/proc/self/task/{own}/children")).unwrap();
    let numbers = numbers.split_whitespace();
    numbers.map(|number| number.parse().unwrap()).collect()
}

/// Whether the process exists and is not a zombie.
pub fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// A program that cannot be opened until this process gives back its lease of the file: a child that
/// executes the program waits in `execve` (`F_SETLEASE`, fcntl(2)).
pub struct LeasedProgram {
    directory: TempDir,
    lease: File,
}

impl LeasedProgram {
    /// To be called before there are other threads: one of them waits for the kernel's signal.
    pub fn new() -> Self {
        SigSet::from(Signal::SIGIO).thread_block().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let everybody = || Permissions::from_mode(0o755);
        std::fs::set_permissions(directory.path(), everybody()).unwrap();
        let path = directory.path().join("program");
        std::fs::write(&path, "#!/bin/sh\nexit 0\n").unwrap();
        std::fs::set_permissions(&path, everybody()).unwrap();
        let lease = File::open(path).unwrap();
        set_lease(&lease, nix::libc::F_WRLCK).unwrap();
        Self { directory, lease }
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("program")
    }

    /// Waits until a child executes the program, and returns the child as soon as it sleeps.
    pub fn wait_for_child(&self) -> Pid {
        SigSet::from(Signal::SIGIO).wait().unwrap();
        let child = children().into_iter().rfind(|child| is_alive(*child));
        let child = child.expect("a child");
        wait_for_state(child, ") S ");
        Pid::from_raw(i32::try_from(child).unwrap())
    }

    pub fn give_back(&self) {
        set_lease(&self.lease, nix::libc::F_UNLCK).unwrap();
    }
}

fn set_lease(file: &File, kind: i32) -> nix::Result<i32> {
    #[allow(unsafe_code)]
    // SAFETY: the call takes integers.
    nix::Error::result(unsafe { nix::libc::fcntl(file.as_raw_fd(), nix::libc::F_SETLEASE, kind) })
}

/// From now on these calls fail, in this process and in those it starts.
#[allow(clippy::useless_conversion, reason = "not one type everywhere")]
pub fn refuse_calls(calls: &[impl Into<i64> + Copy], errno: i32) {
    use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

    let mut rules: Vec<_> = calls
        .iter()
        .map(|call| ((*call).into(), Vec::new()))
        .collect();
    // What an old kernel or sandbox does not know as a call it does not know as a flag either.
    let knows = |call: libc::c_long| !rules.iter().any(|(refused, _)| *refused == i64::from(call));
    if !knows(libc::SYS_clone3) && knows(libc::SYS_clone) {
        let pidfd = u64::from(libc::CLONE_PIDFD.unsigned_abs());
        let (flags, length) = (0, SeccompCmpArgLen::Dword);
        let has_flag = SeccompCondition::new(flags, length, SeccompCmpOp::MaskedEq(pidfd), pidfd);
        let rule = SeccompRule::new(vec![has_flag.unwrap()]).unwrap();
        rules.push((i64::from(libc::SYS_clone), vec![rule]));
    }
    refuse_some(rules, errno);
}

/// The same, where one of the rules about the arguments of a call is met.
pub fn refuse_some(
    calls: impl IntoIterator<Item = (impl Into<i64>, Vec<seccompiler::SeccompRule>)>,
    errno: i32,
) {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

    let calls = calls.into_iter().map(|(call, rules)| (call.into(), rules));
    let filter = SeccompFilter::new(
        calls.collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.unsigned_abs()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    seccompiler::apply_filter(&BpfProgram::try_from(filter.unwrap()).unwrap()).unwrap();
}

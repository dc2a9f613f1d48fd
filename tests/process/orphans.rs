//! Tests workers whose master has ended, for each way in which a master can end.

use std::fs::Permissions;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cluster::{ListenOptions, Master, Role, Settings, Signal, Worker};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pause};
use tempfile::TempDir;

use crate::harness::{
    NOBODY, OWN_PROGRAM, cluster, fork_patiently, is_alive, is_watched, scaled, spin,
    wait_for_state, wait_until, watched,
};

crate::scenarios! {
    orphans_exit_within_a_second
    orphans_of_another_user_exit_within_a_second: ROOT
    orphans_without_exec_exit_within_a_second
    orphans_with_file_capabilities_exit_within_a_second: FILE_CAPABILITIES
    orphans_with_a_set_user_id_bit_exit_within_a_second: SET_USER_ID
    worker_with_file_capabilities_exits_if_its_master_exited_before_init: FILE_CAPABILITIES
    unix_socket_file_stays_if_its_owner_is_killed
}

/// Maximum time that a worker may outlive its master.
const GRACE: Duration = Duration::from_secs(1);

/// Environment variable that tells a master how to end.
const END: &str = "MASTERS_END";

/// The activity of each worker when its master ends, and its process state in `/proc/PID/stat`.
const KINDS: &[(&str, &str)] = &[
    ("accepting", ") S "),
    ("running", ") S "),
    ("serving", ") S "),
    ("calling", ") S "),
    ("looping", ") R "),
    ("looping in a callback", ") R "),
    ("stopped", ") T "),
    ("disconnected", ") R "),
    ("ignoring signals", ") S "),
    ("starting slowly", ") S "),
    ("starting busily", ") R "),
];

/// Number of kinds at the end of the list that do not reach `init`.
const BEFORE_INIT: usize = 2;

fn print_ready() {
    let mut output = std::io::stdout().lock();
    let line = format!("{} {}\n", std::process::id(), kind());
    // Write the whole line with one call, because all workers share this output and their lines
    // must not mix.
    output.write_all(line.as_bytes()).unwrap();
    output.flush().unwrap();
}

fn kind() -> String {
    std::env::var("KIND").unwrap()
}

fn loop_for_ever() -> ! {
    loop {
        spin();
    }
}

/// Blocks in a read from a client that sends nothing.
fn read_for_ever(mut stream: &TcpStream) {
    print_ready();
    let _ = stream.read(&mut [0]);
}

/// Simulates a long start-up of the application before it calls `init`.
fn start_up() {
    match kind().as_str() {
        "starting slowly" => {
            print_ready();
            loop {
                pause();
            }
        }
        "starting busily" => {
            print_ready();
            loop_for_ever();
        }
        _ => {}
    }
}

fn work(worker: &Worker) {
    // Each worker has its own address, so no other worker receives its connection.
    let address = format!("127.0.0.{}:0", worker.id());
    let listen = || worker.listen(&address).unwrap();
    match kind().as_str() {
        "accepting" => {
            let listener = listen();
            print_ready();
            let _ = listener.accept();
        }
        "serving" => {
            let listener = listen();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            read_for_ever(&listener.accept().unwrap().unwrap());
            loop_for_ever();
        }
        "calling" => {
            let listener = listen();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            listener.set_connection_callback(|_, connection| read_for_ever(&connection));
            worker.run().unwrap();
        }
        "looping" => {
            print_ready();
            loop_for_ever();
        }
        "looping in a callback" => {
            worker.set_timeout(Duration::ZERO, |_| {
                print_ready();
                loop_for_ever();
            });
            worker.run().unwrap();
        }
        "disconnected" => {
            worker.disconnect().run().unwrap();
            print_ready();
            loop_for_ever();
        }
        "ignoring signals" => {
            ignore_signals();
            print_ready();
            loop {
                pause();
            }
        }
        _ => {
            print_ready();
            worker.run().unwrap();
        }
    }
}

fn ignore_signals() {
    use nix::sys::signal::{SigHandler, signal};

    for number in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        let number = nix::sys::signal::Signal::try_from(number.number()).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: SIG_IGN installs no handler, so no code runs in a signal context.
        unsafe { signal(number, SigHandler::SigIgn) }.unwrap();
    }
}

fn end(master: Master, how: &str) {
    // Run the loop, and keep the workers running, until SIGTERM arrives.
    let mut is_requested = false;
    while !is_requested {
        master.dispatch(None).unwrap();
        is_requested = END_REQUESTED.load(std::sync::atomic::Ordering::SeqCst);
    }
    match how {
        "panic" => panic!("requested by the test"),
        "exit" => std::process::exit(3),
        "abort" => std::process::abort(),
        "forget" => std::mem::forget(master),
        _ => drop(master),
    }
}

static END_REQUESTED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

fn play_master(master: Master, settings: Settings) {
    // The callback only sets a flag, so the master ends without disconnecting its workers.
    let request_end =
        |_: &Master, _| END_REQUESTED.store(true, std::sync::atomic::Ordering::SeqCst);
    master.on_signal(Signal::TERM, request_end).unwrap();
    master.setup_master(settings);
    let has_privileges = std::env::var_os(PRIVILEGES).is_some();
    let kinds = KINDS
        .iter()
        .take(KINDS.len() - usize::from(has_privileges) * BEFORE_INIT);
    for (kind, _) in kinds {
        fork_patiently(|| master.fork_with([("KIND", *kind)]));
    }
    end(master, &std::env::var(END).unwrap());
}

/// Starts a master with one worker of each kind and waits until all workers have reached their
/// state.
fn start_master(command: &mut Command, how: &str) -> (Child, Vec<Pid>) {
    let mut master = command
        .env(END, how)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(master.stdout.take().unwrap()).lines();
    let mut pids = Vec::new();
    let kinds = usize::from(command.get_envs().any(|(name, _)| name == PRIVILEGES));
    let kinds = KINDS.len() - kinds * BEFORE_INIT;
    for line in lines.take(kinds) {
        let line = line.unwrap();
        let (pid, kind) = line.split_once(' ').unwrap();
        let pid = Pid::from_raw(pid.parse().unwrap());
        let (_, state) = KINDS.iter().find(|(name, _)| *name == kind).unwrap();
        if kind == "stopped" {
            nix::sys::signal::kill(pid, nix::sys::signal::SIGSTOP).unwrap();
        }
        wait_for_state(pid.as_raw().unsigned_abs(), state);
        pids.push(pid);
    }
    assert_eq!(pids.len(), kinds, "the master ended too early");
    (master, pids)
}

fn end_from_outside(master: &mut Child, how: &str) -> ExitStatus {
    let pid = Pid::from_raw(i32::try_from(master.id()).unwrap());
    let signal = match how {
        "kill" => nix::sys::signal::SIGKILL,
        _ => nix::sys::signal::SIGTERM,
    };
    nix::sys::signal::kill(pid, signal).unwrap();
    master.wait().unwrap()
}

/// Ends a master by the method `how` and returns how long its last worker outlived it.
fn end_and_measure(command: &mut Command, how: &str) -> Duration {
    let (mut master, pids) = start_master(command, how);
    let status = end_from_outside(&mut master, how);
    let ended_at = Instant::now();
    let expected = match how {
        "kill" => (None, Some(9)),
        "abort" => (None, Some(6)),
        "panic" => (Some(101), None),
        "exit" => (Some(3), None),
        _ => (Some(0), None),
    };
    assert_eq!((status.code(), status.signal()), expected, "{how}");
    wait_until("the exit of all workers", || {
        pids.iter()
            .all(|pid| has_exited_or_is_killed(*pid))
            .then_some(())
    });
    let longest = ended_at.elapsed();
    for pid in pids {
        // The workers have been reparented to this process, so reap them here.
        let end = waitpid(pid, None).unwrap();
        assert!(
            matches!(end, WaitStatus::Exited(..) | WaitStatus::Signaled(..)),
            "{end:?}"
        );
    }
    longest
}

/// Returns whether the process has exited or has a pending SIGKILL. On a busy machine, a killed
/// process may still wait for a processor.
fn has_exited_or_is_killed(pid: Pid) -> bool {
    const KILL: u64 = 1 << 8;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status.lines().filter_map(|line| {
        let own = line.strip_prefix("SigPnd:");
        own.or_else(|| line.strip_prefix("ShdPnd:"))
    });
    let mut sets = pending.map(|set| u64::from_str_radix(set.trim(), 16).unwrap());
    sets.any(|set| set & KILL != 0) || !is_alive(pid.as_raw().unsigned_abs())
}

/// Plays the master, a worker, or the process that observes them.
fn play_orphans(settings: Settings) {
    if std::env::var_os("KIND").is_some() {
        start_up();
    }
    if std::env::var_os(END).is_some() {
        match cluster::init().unwrap() {
            Role::Master(master) => return play_master(master, settings),
            Role::Worker(worker) => return work(&worker),
        }
    }
    end_in_all_ways(&mut Command::new(std::env::current_exe().unwrap()));
}

fn end_in_all_ways(command: &mut Command) {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let ways = ["kill", "panic", "exit", "abort", "drop", "forget"];
    let longest = ways
        .map(|how| (end_and_measure(command, how), how))
        .into_iter()
        .max();
    println!("longest: {longest:?}");
    assert!(longest.unwrap().0 < scaled(GRACE), "{longest:?}");
}

fn orphans_exit_within_a_second() {
    play_orphans(Settings::default());
}

fn orphans_of_another_user_exit_within_a_second() {
    let settings = Settings::default().exec(OWN_PROGRAM);
    play_orphans(settings.uid(NOBODY).gid(NOBODY));
}

fn orphans_without_exec_exit_within_a_second() {
    play_orphans(Settings::default().main(|worker| {
        start_up();
        work(&worker);
        0
    }));
}

/// Environment variable of processes whose program has more privileges than their user. The value
/// is the line in `/proc/self/status` that shows these privileges.
const PRIVILEGES: &str = "WORKERS_RIGHTS";

/// Returns a command that runs a copy of this program as the user `NOBODY`. The copy plays this
/// scenario.
fn program_with_privileges(privileges: &str, grant: impl FnOnce(&Path)) -> (TempDir, Command) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    grant(&program);
    let mut command = Command::new(program);
    command.uid(NOBODY).gid(NOBODY).env(PRIVILEGES, privileges);
    (directory, command)
}

fn grant_capability(program: &Path) {
    let mut setcap = Command::new("setcap");
    let status = setcap.arg("cap_net_bind_service=+ep").arg(program).status();
    assert!(status.unwrap().success());
}

fn set_user_id(program: &Path) {
    std::fs::set_permissions(program, Permissions::from_mode(0o4755)).unwrap();
}

/// The status line of a process whose only effective capability is `CAP_NET_BIND_SERVICE`.
const CAPABILITY: &str = "CapEff:\t0000000000000400";
/// The status line of a process whose effective and saved users are root.
const ROOT_BY_BIT: &str = "Uid:\t65534\t0\t0\t0";

/// Checks before `init` that the process has the expected privileges, and that `execve` has cleared
/// the parent-death signal.
fn check_privileges() {
    let privileges = std::env::var(PRIVILEGES).unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    assert!(status.lines().any(|line| line == privileges), "{status}");
    assert_eq!(nix::sys::prctl::get_pdeathsig(), Ok(None));
}

fn play_orphans_with_privileges(privileges: &str, grant: fn(&Path)) {
    if std::env::var_os(END).is_some() {
        check_privileges();
        return play_orphans(Settings::default());
    }
    let (_directory, mut command) = program_with_privileges(privileges, grant);
    end_in_all_ways(&mut command);
}

fn orphans_with_file_capabilities_exit_within_a_second() {
    play_orphans_with_privileges(CAPABILITY, grant_capability);
}

fn orphans_with_a_set_user_id_bit_exit_within_a_second() {
    play_orphans_with_privileges(ROOT_BY_BIT, set_user_id);
}

/// Checks that a worker exits if its master was killed before the worker called `init`. Before
/// `init`, no parent-death signal reports the master's exit, because `execve` of a program with
/// file capabilities has cleared it. The worker itself kills its master.
fn worker_with_file_capabilities_exits_if_its_master_exited_before_init() {
    if std::env::var_os(PRIVILEGES).is_none() {
        // Become a subreaper. The worker is then reparented to this process, so that this process
        // can wait for it.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let (_directory, mut command) = program_with_privileges(CAPABILITY, grant_capability);
        let mut master = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = String::new();
        // Read until both the master and the worker have closed the output.
        master
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut output)
            .unwrap();
        assert_eq!(master.wait().unwrap().signal(), Some(9));
        assert_eq!(output, "no connection\nno event\n");
        let worker = waitpid(None, None).unwrap();
        assert!(matches!(worker, WaitStatus::Exited(_, 0)), "{worker:?}");
        return;
    }
    if cluster::is_worker() {
        check_privileges();
        let master = nix::unistd::getppid();
        nix::sys::signal::kill(master, nix::sys::signal::SIGKILL).unwrap();
        wait_until("another parent", || {
            (nix::unistd::getppid() != master).then_some(())
        });
    }
    match cluster::init().unwrap() {
        Role::Master(master) => {
            master.fork().unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            // The master has been killed, so it sends no reply.
            let listener = worker.listen("127.0.0.1:0");
            assert!(listener.is_err() || listener.unwrap().accept().unwrap().is_none());
            println!("no connection");
            worker.run().unwrap();
            println!("no event");
        }
    }
}

/// Environment variable with the role of the process that owns a socket file and is killed.
const OWNER: &str = "OWNER";
const OWNERS: [&str; 2] = ["master", "worker"];

/// Listens on the path of the owner, and prints the process id.
fn own_a_socket_file(owner: &str) {
    let path = std::env::temp_dir().join(owner);
    let wait = || {
        println!("{}", std::process::id());
        loop {
            pause();
        }
    };
    match cluster::init().unwrap() {
        Role::Master(master) if owner == "master" => {
            let _listener = master.listen(path.as_path()).unwrap();
            wait();
        }
        Role::Master(master) => {
            master.fork().unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            let options = ListenOptions::from(path.as_path()).exclusive(true);
            let _listener = worker.listen(options).unwrap();
            wait();
        }
    }
}

fn unix_socket_file_stays_if_its_owner_is_killed() {
    if is_watched() {
        return own_a_socket_file(&std::env::var(OWNER).unwrap());
    }
    for owner in OWNERS {
        let mut command = watched();
        let mut master = command
            .env(OWNER, owner)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(master.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let process = Pid::from_raw(line.trim().parse().unwrap());
        nix::sys::signal::kill(process, nix::sys::signal::SIGKILL).unwrap();
        master.wait().unwrap();
    }
    cluster(
        |master| {
            for path in OWNERS.map(|owner| std::env::temp_dir().join(owner)) {
                let error = master.listen(path.as_path()).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(nix::libc::EADDRINUSE), "{error}");
                std::fs::remove_file(&path).unwrap();
                drop(master.listen(path.as_path()).unwrap());
            }
        },
        |_| unreachable!("no worker is forked"),
    );
}

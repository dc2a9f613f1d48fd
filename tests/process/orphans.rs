//! Workers whose master is gone, in whatever way it went.

use std::fs::Permissions;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cluster::{Master, Role, Settings, Signal, Worker};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pause};
use tempfile::TempDir;

use crate::harness::{NOBODY, OWN_PROGRAM, is_alive, wait_for_state, wait_until};

crate::scenarios! {
    orphans_leave_within_a_second
    orphans_of_another_user_leave_within_a_second: ROOT
    orphans_without_exec_leave_within_a_second
    orphans_with_file_capabilities_leave_within_a_second: FILE_CAPABILITIES
    orphans_with_a_set_user_id_bit_leave_within_a_second: SET_USER_ID
    worker_with_file_capabilities_whose_master_has_ended_finds_its_end: FILE_CAPABILITIES
}

/// How long a worker may outlive its master.
const GRACE: Duration = Duration::from_secs(1);

/// Set for the master that is to end, to the way in which it does.
const END: &str = "MASTERS_END";

/// What a worker is doing when its master ends, and the state in which the system has it then.
const KINDS: &[(&str, &str)] = &[
    ("accepting", ") S "),
    ("running", ") S "),
    ("serving", ") S "),
    ("calling", ") S "),
    ("looping", ") R "),
    ("looping in a callback", ") R "),
    ("stopped", ") T "),
    ("disconnected", ") R "),
    ("deaf", ") S "),
    ("starting slowly", ") S "),
    ("starting busily", ") R "),
];

/// How many kinds at the end of the list do not come to `init`.
const BEFORE_INIT: usize = 2;

fn say_ready() {
    let mut output = std::io::stdout().lock();
    let line = format!("{} {}\n", std::process::id(), part());
    // In one piece: all workers write here.
    output.write_all(line.as_bytes()).unwrap();
    output.flush().unwrap();
}

fn part() -> String {
    std::env::var("KIND").unwrap()
}

fn loop_for_ever() -> ! {
    loop {
        std::hint::spin_loop();
    }
}

/// Waits for what nobody ever says.
fn read_for_ever(mut stream: &TcpStream) {
    say_ready();
    let _ = stream.read(&mut [0]);
}

/// Played before `init`, as by a program that has much to do first.
fn start() {
    match part().as_str() {
        "starting slowly" => {
            say_ready();
            loop {
                pause();
            }
        }
        "starting busily" => {
            say_ready();
            loop_for_ever();
        }
        _ => {}
    }
}

fn work(worker: &Worker) {
    // Each to one of its own, where nobody else takes its connection.
    let address = format!("127.0.0.{}:0", worker.id());
    let listen = || worker.listen(&address).unwrap();
    match part().as_str() {
        "accepting" => {
            let listener = listen();
            say_ready();
            let _ = listener.accept();
        }
        "serving" => {
            let listener = listen();
            let _client = TcpStream::connect(listener.local_addr()).unwrap();
            read_for_ever(&listener.accept().unwrap().unwrap());
            loop_for_ever();
        }
        "calling" => {
            let listener = listen();
            let _client = TcpStream::connect(listener.local_addr()).unwrap();
            listener.on_connection(|_, connection| read_for_ever(&connection));
            worker.run().unwrap();
        }
        "looping" => {
            say_ready();
            loop_for_ever();
        }
        "looping in a callback" => {
            worker.set_timeout(Duration::ZERO, |_| {
                say_ready();
                loop_for_ever();
            });
            worker.run().unwrap();
        }
        "disconnected" => {
            worker.disconnect().run().unwrap();
            say_ready();
            loop_for_ever();
        }
        "deaf" => {
            ignore_what_can_be_ignored();
            say_ready();
            loop {
                pause();
            }
        }
        _ => {
            say_ready();
            worker.run().unwrap();
        }
    }
}

fn ignore_what_can_be_ignored() {
    use nix::sys::signal::{SigHandler, signal};

    for number in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        let number = nix::sys::signal::Signal::try_from(number.number()).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: ignoring a signal installs no handler.
        unsafe { signal(number, SigHandler::SigIgn) }.unwrap();
    }
}

fn end(master: Master, how: &str) {
    // The workers go on living, and so does this process, until it is told to end.
    let mut told = false;
    while !told {
        master.dispatch(None).unwrap();
        told = TOLD.load(std::sync::atomic::Ordering::SeqCst);
    }
    match how {
        "panic" => panic!("as told"),
        "exit" => std::process::exit(3),
        "abort" => std::process::abort(),
        "forget" => std::mem::forget(master),
        _ => drop(master),
    }
}

static TOLD: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

fn play_master(master: Master, settings: Settings) {
    // Those that lose their master are no longer anybody's business.
    let told = |_: &Master, _| TOLD.store(true, std::sync::atomic::Ordering::SeqCst);
    master.on_signal(Signal::TERM, told).unwrap();
    master.setup_master(settings);
    let has_rights = std::env::var_os(RIGHTS).is_some();
    let kinds = KINDS
        .iter()
        .take(KINDS.len() - usize::from(has_rights) * BEFORE_INIT);
    for (kind, _) in kinds {
        master.fork_with([("KIND", *kind)]).unwrap();
    }
    end(master, &std::env::var(END).unwrap());
}

/// A master with one worker of each kind, all of which are where they should be.
fn start_master(command: &mut Command, how: &str) -> (Child, Vec<Pid>) {
    let mut master = command
        .env(END, how)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(master.stdout.take().unwrap()).lines();
    let mut pids = Vec::new();
    let kinds = usize::from(command.get_envs().any(|(name, _)| name == RIGHTS));
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

/// Ends a master in this way; how long its last worker outlived it.
fn outlived(command: &mut Command, how: &str) -> Duration {
    let (mut master, pids) = start_master(command, how);
    let status = end_from_outside(&mut master, how);
    let gone = Instant::now();
    let expected = match how {
        "kill" => (None, Some(9)),
        "abort" => (None, Some(6)),
        "panic" => (Some(101), None),
        "exit" => (Some(3), None),
        _ => (Some(0), None),
    };
    assert_eq!((status.code(), status.signal()), expected, "{how}");
    wait_until("the end of all", || {
        pids.iter().all(|pid| is_doomed(*pid)).then_some(())
    });
    let longest = gone.elapsed();
    for pid in pids {
        // They are this process's children now.
        let end = waitpid(pid, None).unwrap();
        assert!(
            matches!(end, WaitStatus::Exited(..) | WaitStatus::Signaled(..)),
            "{end:?}"
        );
    }
    longest
}

/// Whether it has ended, or will as soon as it gets a processor, for which it may have to wait on a
/// busy machine.
fn is_doomed(pid: Pid) -> bool {
    const KILL: u64 = 1 << 8;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status.lines().filter_map(|line| {
        let own = line.strip_prefix("SigPnd:");
        own.or_else(|| line.strip_prefix("ShdPnd:"))
    });
    let mut sets = pending.map(|set| u64::from_str_radix(set.trim(), 16).unwrap());
    sets.any(|set| set & KILL != 0) || !is_alive(pid.as_raw().unsigned_abs())
}

/// Plays the master, a worker, or the one that looks at them from outside.
fn orphans(settings: Settings) {
    if std::env::var_os("KIND").is_some() {
        start();
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
        .map(|how| (outlived(command, how), how))
        .into_iter()
        .max();
    println!("the longest: {longest:?}");
    assert!(longest.unwrap().0 < GRACE, "{longest:?}");
}

fn orphans_leave_within_a_second() {
    orphans(Settings::default());
}

fn orphans_of_another_user_leave_within_a_second() {
    let settings = Settings::default().exec(OWN_PROGRAM);
    orphans(settings.uid(NOBODY).gid(NOBODY));
}

fn orphans_without_exec_leave_within_a_second() {
    orphans(Settings::default().main(|worker| {
        start();
        work(&worker);
        0
    }));
}

/// Set for workers whose program has more rights than their master: what it has, as in its
/// `/proc/self/status`.
const RIGHTS: &str = "WORKERS_RIGHTS";

/// A copy of this program that another user may execute, as a process of user `NOBODY` that plays this
/// scenario.
fn program_with_rights(rights: &str, give: impl FnOnce(&Path)) -> (TempDir, Command) {
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), Permissions::from_mode(0o755)).unwrap();
    let program = home.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    give(&program);
    let mut command = Command::new(program);
    command.uid(NOBODY).gid(NOBODY).env(RIGHTS, rights);
    (home, command)
}

fn give_capability(program: &Path) {
    let mut setcap = Command::new("setcap");
    let status = setcap.arg("cap_net_bind_service=+ep").arg(program).status();
    assert!(status.unwrap().success());
}

fn set_user_id(program: &Path) {
    std::fs::set_permissions(program, Permissions::from_mode(0o4755)).unwrap();
}

/// `CAP_NET_BIND_SERVICE` in effect, and nothing else.
const CAPABILITY: &str = "CapEff:\t0000000000000400";
/// The effective user and the saved one are root.
const ROOT_BY_BIT: &str = "Uid:\t65534\t0\t0\t0";

/// The kernel has cleared the request that this process be killed with its parent, and `init` has not
/// been called.
fn check_rights() {
    let rights = std::env::var(RIGHTS).unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    assert!(status.lines().any(|line| line == rights), "{status}");
    assert_eq!(nix::sys::prctl::get_pdeathsig(), Ok(None));
}

fn orphans_with_rights(rights: &str, give: fn(&Path)) {
    if std::env::var_os(END).is_some() {
        check_rights();
        return orphans(Settings::default());
    }
    let (_home, mut command) = program_with_rights(rights, give);
    end_in_all_ways(&mut command);
}

fn orphans_with_file_capabilities_leave_within_a_second() {
    orphans_with_rights(CAPABILITY, give_capability);
}

fn orphans_with_a_set_user_id_bit_leave_within_a_second() {
    orphans_with_rights(ROOT_BY_BIT, set_user_id);
}

/// The master is killed before its worker calls `init`, which the kernel does not tell the worker.
fn worker_with_file_capabilities_whose_master_has_ended_finds_its_end() {
    if std::env::var_os(RIGHTS).is_none() {
        // So the worker becomes a child of this process, which waits for its end.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let (_home, mut command) = program_with_rights(CAPABILITY, give_capability);
        let mut master = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = String::new();
        // Until the worker has ended, too.
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
        check_rights();
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
            // The master is gone: its answer will not come.
            let listener = worker.listen("127.0.0.1:0");
            assert!(listener.is_err() || listener.unwrap().accept().unwrap().is_none());
            println!("no connection");
            worker.run().unwrap();
            println!("no event");
        }
    }
}

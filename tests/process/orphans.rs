//! Workers whose master is gone, in whatever way it went.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cluster::{Master, Role, Settings, Signal, Worker};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pause};

use crate::harness::{NOBODY, OWN_PROGRAM, is_alive, wait_for_state, wait_until};

crate::scenarios! {
    orphans_leave_within_a_second
    orphans_of_another_user_leave_within_a_second: ROOT
    orphans_without_exec_leave_within_a_second
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
    for (kind, _) in KINDS {
        master.fork_with([("KIND", *kind)]).unwrap();
    }
    end(master, &std::env::var(END).unwrap());
}

/// A master with one worker of each kind, all of which are where they should be.
fn start_master(how: &str) -> (Child, Vec<Pid>) {
    let mut master = Command::new(std::env::current_exe().unwrap())
        .env(END, how)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(master.stdout.take().unwrap()).lines();
    let mut pids = Vec::new();
    for line in lines.take(KINDS.len()) {
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
    assert_eq!(pids.len(), KINDS.len(), "the master ended too early");
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
fn outlived(how: &str) -> Duration {
    let (mut master, pids) = start_master(how);
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
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let ways = ["kill", "panic", "exit", "abort", "drop", "forget"];
    let longest = ways.map(|how| (outlived(how), how)).into_iter().max();
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

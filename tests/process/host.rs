//! Tests of the host, which is the application whose process the master runs in.
//!
//! The crate must not affect the host's own children, signal handlers and descriptors.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cluster::{Master, Role, Settings, Signal, Stdio, WorkerProcess};
use nix::libc;
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, Signal as Number, raise, sigaction,
};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, pause};

use crate::harness::{
    LeasedProgram, Log, SIGNALS, cluster, for_both_policies, in_background, note_events,
    note_messages, of, run_until_killed, scaled, stop, wait_for_state, wait_until, with_env,
};
use crate::refused::refuse_calls;

crate::scenarios! {
    master_reaps_no_child_of_the_host
    host_that_waits_for_any_child_gets_its_own_children: EXIT_OF_REAPED_CHILDREN
    signal_handlers_of_the_host_run_and_are_restored
    signal_handlers_of_the_host_run_and_are_restored_on_old_kernels
    signal_handlers_of_the_host_run_with_their_masks
    signal_handler_installed_later_is_kept
    signal_handler_installed_later_hides_no_exit_on_old_kernels
    exits_are_reported_though_the_host_ignores_its_children: EXIT_OF_REAPED_CHILDREN
    reused_process_id_is_not_signalled: PID_NAMESPACE
    workers_and_concurrent_children_share_no_descriptors
    terminal_stop_does_not_stop_a_child_before_execve
    children_are_reaped_though_the_host_ignores_them_on_old_kernels
    handler_with_nocldstop_is_not_called_for_stops_on_old_kernels
    forked_child_of_the_host_delays_no_fork
    forked_child_of_the_host_delays_no_fork_on_old_kernels
    forked_child_of_the_host_keeps_no_worker_alive
    forked_child_of_the_host_keeps_no_worker_of_a_dropped_master_alive
    dropping_the_master_in_a_child_does_not_affect_the_parent
    worker_inherits_only_its_own_descriptors
    worker_inherits_only_its_own_descriptors_on_old_kernels
    process_1_can_be_a_master: PID_NAMESPACE
    workers_exit_with_a_master_that_is_process_1: PID_NAMESPACE
}

/// Makes the system calls that return process descriptors fail, to simulate an old kernel.
pub fn without_process_descriptors() {
    let calls = [libc::SYS_clone3, libc::SYS_pidfd_open];
    refuse_calls(&calls, libc::ENOSYS);
    SIGNALS.store(true, Ordering::SeqCst);
}

/// Starts a child of the host that exits with `code`.
fn child(code: i32) -> Child {
    let exit = format!("exit {code}");
    Command::new("sh").args(["-c", &exit]).spawn().unwrap()
}

/// Exits with the code in the environment variable `CODE`.
fn exit_with_requested_code() -> ! {
    std::process::exit(std::env::var("CODE").unwrap().parse().unwrap())
}

fn fork_to_end_with(master: &Master, code: i32) {
    master.fork_with([("CODE", code.to_string())]).unwrap();
}

fn panic_on_errors(master: &Master) {
    master.on_error(|_, _, error| panic!("{error}"));
}

fn master_reaps_no_child_of_the_host() {
    let log = Log::default();
    let entries = log.clone();
    let children = Rc::new(RefCell::new(Vec::new()));
    let started_by_host = Rc::clone(&children);
    let early = child(11);
    wait_for_state(early.id(), ") Z ");
    children.borrow_mut().push(early);
    cluster(
        |master| {
            panic_on_errors(master);
            let started = Rc::clone(&children);
            master.on_online(move |_, _| {
                let child = child(12);
                wait_for_state(child.id(), ") Z ");
                started.borrow_mut().push(child);
            });
            master.on_exit(move |master, worker, status| {
                log.add(format!("{} {:?}", worker.id(), status.code()));
                children.borrow_mut().push(child(13));
                if worker.id().get() < 5 {
                    fork_to_end_with(master, 2);
                }
            });
            fork_to_end_with(master, 1);
        },
        |_| exit_with_requested_code(),
    );
    let codes = [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2)];
    let expected = codes.map(|(worker, code)| format!("{worker} Some({code})"));
    assert_eq!(entries.take(), expected);
    let wait = |mut child: Child| child.wait().unwrap().code().unwrap();
    let mut codes: Vec<_> = started_by_host.take().into_iter().map(wait).collect();
    codes.sort_unstable();
    assert_eq!(codes, [11, 12, 12, 12, 12, 12, 13, 13, 13, 13, 13]);
}

type ExitCodes = Arc<Mutex<BTreeMap<i32, i32>>>;

fn note_exit(exit_codes: &ExitCodes, status: nix::Result<WaitStatus>) -> bool {
    let Ok(WaitStatus::Exited(pid, code)) = status else {
        return false;
    };
    let previous = exit_codes.lock().unwrap().insert(pid.as_raw(), code);
    assert_eq!(previous, None);
    true
}

/// Starts a thread that waits for any child, as a host may do, and notes the exit codes. The thread
/// ends when `stop` is set and no child remains.
fn wait_for_any_child(exit_codes: &ExitCodes, stop: &Arc<AtomicBool>) -> JoinHandle<()> {
    let (exit_codes, stop) = (Arc::clone(exit_codes), Arc::clone(stop));
    std::thread::spawn(move || {
        loop {
            let stopping = stop.load(Ordering::SeqCst);
            if !note_exit(&exit_codes, waitpid(None, None)) && stopping {
                return;
            }
            std::thread::yield_now();
        }
    })
}

#[expect(clippy::zombie_processes, reason = "all are waited for at once")]
fn host_that_waits_for_any_child_gets_its_own_children() {
    const ROUNDS: i32 = 30;
    let (exit_codes, stop) = (ExitCodes::default(), Arc::new(AtomicBool::new(false)));
    let started = Rc::new(RefCell::new(BTreeMap::new()));
    let started_by_host = Rc::clone(&started);
    let exits = Rc::new(Cell::new(0));
    let seen = Rc::clone(&exits);
    let waiting = cluster::is_master().then(|| wait_for_any_child(&exit_codes, &stop));
    let by_callbacks = Arc::clone(&exit_codes);
    cluster(
        |master| {
            panic_on_errors(master);
            master.on_exit(move |master, worker, status| {
                let round = i32::try_from(worker.id().get()).unwrap();
                assert_eq!(status.code(), Some(round));
                exits.set(round);
                let host_child = child(100 + round);
                let pid = i32::try_from(host_child.id()).unwrap();
                started.borrow_mut().insert(pid, 100 + round);
                if round < ROUNDS {
                    fork_to_end_with(master, round + 1);
                }
                note_exit(&by_callbacks, waitpid(None, Some(WaitPidFlag::WNOHANG)));
            });
            fork_to_end_with(master, 1);
        },
        |_| exit_with_requested_code(),
    );
    stop.store(true, Ordering::SeqCst);
    waiting.unwrap().join().unwrap();
    assert_eq!(seen.get(), ROUNDS);
    // Leave out the workers that the host has reaped before the master could. Their exit events
    // were not lost: the master reported all rounds.
    let mut waited_for = exit_codes.lock().unwrap();
    let expected = started_by_host.take();
    waited_for.retain(|pid, _| expected.contains_key(pid));
    assert_eq!(*waited_for, expected);
}

/// Number of calls of the host's handlers, indexed by signal number.
static RUNS: [AtomicU32; 32] = [const { AtomicU32::new(0) }; 32];
/// Whether SIGUSR2 was unblocked during the last call of SIGUSR1's handler.
static INTERRUPTIBLE: AtomicBool = AtomicBool::new(false);

extern "C" fn count(number: libc::c_int) {
    RUNS[usize::try_from(number).unwrap_or(0)].fetch_add(1, Ordering::SeqCst);
    if let (Number::SIGUSR1, Ok(mask)) = (
        Number::try_from(number).unwrap_or(Number::SIGHUP),
        SigSet::thread_get_mask(),
    ) {
        INTERRUPTIBLE.store(!mask.contains(Number::SIGUSR2), Ordering::SeqCst);
    }
}

extern "C" fn count_with_reason(
    number: libc::c_int,
    info: *mut libc::siginfo_t,
    _: *mut libc::c_void,
) {
    #[allow(unsafe_code)]
    // SAFETY: the handler is installed with SA_SIGINFO, so the kernel passes a valid pointer.
    let signal = unsafe { (*info).si_signo };
    if signal == number {
        count(number);
    }
}

fn runs(number: Number) -> u32 {
    RUNS[number as usize].load(Ordering::SeqCst)
}

fn mask(numbers: &[Number]) -> SigSet {
    numbers.iter().copied().collect()
}

fn handle(number: Number, handler: SigHandler, flags: SaFlags, mask: SigSet) {
    let action = SigAction::new(handler, flags, mask);
    #[allow(unsafe_code)]
    // SAFETY: each handler is SIG_IGN, SIG_DFL or a function that makes only async-signal-safe
    // calls.
    unsafe { sigaction(number, &action) }.unwrap();
}

/// Installs handlers with and without `SA_SIGINFO`, ignores one signal, and gives another signal
/// its default disposition.
fn install_handlers_of_the_host() {
    let (simple, full) = (
        SigHandler::Handler(count),
        SigHandler::SigAction(count_with_reason),
    );
    let none = SigSet::empty();
    let restart = SaFlags::SA_RESTART | SaFlags::SA_NODEFER;
    handle(Number::SIGTERM, simple, restart, mask(&[Number::SIGHUP]));
    let stack = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
    handle(Number::SIGUSR1, full, stack, mask(&[Number::SIGUSR2]));
    handle(Number::SIGCHLD, simple, SaFlags::SA_NOCLDSTOP, none);
    handle(Number::SIGINT, SigHandler::SigIgn, SaFlags::empty(), none);
    handle(
        Number::SIGHUP,
        SigHandler::SigDfl,
        SaFlags::SA_RESTART,
        none,
    );
}

const HANDLED: [(Number, Signal); 4] = [
    (Number::SIGTERM, Signal::TERM),
    (Number::SIGUSR1, Signal::USR1),
    (Number::SIGINT, Signal::INT),
    (Number::SIGHUP, Signal::HUP),
];

fn dispositions() -> Vec<(usize, i32, Vec<i32>)> {
    let handled = HANDLED.map(|(number, _)| number).into_iter();
    handled.chain([Number::SIGCHLD]).map(disposition).collect()
}

/// Returns a signal's disposition: the handler's address, the flags, and the signals in the mask.
fn disposition(number: Number) -> (usize, i32, Vec<i32>) {
    #[allow(unsafe_code)]
    // SAFETY: `sigaction` is a C struct for which all zeroes are a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    #[allow(unsafe_code)]
    // SAFETY: a null pointer installs no action, and `action` is valid for writes of one
    // `sigaction`.
    let read = unsafe { libc::sigaction(number as i32, std::ptr::null(), &raw mut action) };
    assert_eq!(read, 0);
    #[allow(unsafe_code)]
    // SAFETY: the kernel has initialized the set, which is valid for reads.
    let is_in =
        |number: &i32| unsafe { libc::sigismember(&raw const action.sa_mask, *number) } == 1;
    let mask = (1..=64).filter(is_in).collect();
    (action.sa_sigaction, action.sa_flags, mask)
}

/// Raises signals while the master handles them, and checks that the host's handlers also run and
/// are restored later.
fn assert_handlers_run_and_are_restored() {
    SIGNALS.store(true, Ordering::SeqCst);
    install_handlers_of_the_host();
    let before = dispositions();
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            panic_on_errors(master);
            for (number, signal) in HANDLED {
                let log = log.clone();
                let note = move |master: &Master, _: Signal| {
                    log.add(number.as_str());
                    if number == Number::SIGHUP {
                        master.workers()[0].disconnect();
                    }
                };
                master.on_signal(signal, note).unwrap();
            }
            let during = dispositions();
            let replaced = before
                .iter()
                .zip(&during)
                .filter(|(host, ours)| host.0 != ours.0);
            assert_eq!(replaced.count(), HANDLED.len());
            master.on_online(|_, _| {
                let numbers = HANDLED.map(|(number, _)| number);
                let all = numbers.into_iter().chain([Number::SIGCHLD]);
                all.for_each(|number| raise(number).unwrap());
            });
            fork_to_end_with(master, 0);
        },
        |worker| run_to_completion(&worker),
    );
    assert_eq!(dispositions(), before);
    let mut entries = entries.take();
    entries.sort();
    assert_eq!(entries, ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1"]);
    assert_eq!(runs(Number::SIGTERM), 1);
    assert_eq!(runs(Number::SIGUSR1), 1);
    assert!(runs(Number::SIGCHLD) >= 1);
    assert_eq!((runs(Number::SIGINT), runs(Number::SIGHUP)), (0, 0));
    raise(Number::SIGTERM).unwrap();
    raise(Number::SIGINT).unwrap();
    assert_eq!(runs(Number::SIGTERM), 2, "the host's handler is restored");
}

fn run_to_completion(worker: &cluster::Worker) {
    worker.run().unwrap();
}

fn signal_handlers_of_the_host_run_and_are_restored() {
    assert_handlers_run_and_are_restored();
}

/// Repeats the test without process descriptors. SIGCHLD then arrives for the worker's exit and for
/// `raise`, so the host's handler runs at least twice.
fn signal_handlers_of_the_host_run_and_are_restored_on_old_kernels() {
    if cluster::is_master() {
        without_process_descriptors();
    }
    assert_handlers_run_and_are_restored();
    assert!(runs(Number::SIGCHLD) >= 2);
}

/// Checks that SIGUSR2 does not interrupt SIGUSR1's handler, whose mask blocks it.
fn signal_handlers_of_the_host_run_with_their_masks() {
    SIGNALS.store(true, Ordering::SeqCst);
    INTERRUPTIBLE.store(true, Ordering::SeqCst);
    install_handlers_of_the_host();
    raise(Number::SIGUSR1).unwrap();
    assert!(
        !INTERRUPTIBLE.load(Ordering::SeqCst),
        "before the master handles the signal"
    );
    cluster(
        |master| {
            master.on_signal(Signal::USR1, |_, _| {}).unwrap();
            INTERRUPTIBLE.store(true, Ordering::SeqCst);
            raise(Number::SIGUSR1).unwrap();
        },
        |_| unreachable!(),
    );
    assert_eq!(runs(Number::SIGUSR1), 2);
    assert!(
        !INTERRUPTIBLE.load(Ordering::SeqCst),
        "while the master handles the signal"
    );
}

fn signal_handler_installed_later_is_kept() {
    SIGNALS.store(true, Ordering::SeqCst);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            panic_on_errors(master);
            note_events(master, &log);
            let never = |_: &Master, _| panic!("the host has replaced the handler");
            master.on_signal(Signal::TERM, never).unwrap();
            install_handlers_of_the_host();
            master.on_online(|_, worker| {
                raise(Number::SIGTERM).unwrap();
                worker.disconnect();
            });
            master.fork().unwrap();
        },
        |worker| run_to_completion(&worker),
    );
    assert_eq!(runs(Number::SIGTERM), 1);
    assert_eq!(
        of(1, &entries.take()).last(),
        Some(&"exit Some(true) exit status: 0")
    );
    raise(Number::SIGTERM).unwrap();
    assert_eq!(runs(Number::SIGTERM), 2, "the host's handler is kept");
}

/// Installs a SIGCHLD handler in the host that does not call the master's handler. The master must
/// notice its workers' exits nevertheless.
fn signal_handler_installed_later_hides_no_exit_on_old_kernels() {
    if cluster::is_master() {
        without_process_descriptors();
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            panic_on_errors(master);
            note_events(master, &log);
            let workers = [(); 2].map(|()| master.fork().unwrap());
            install_handlers_of_the_host();
            let mut online = 0;
            master.on_online(move |_, _| {
                online += 1;
                if online == 2 {
                    workers[0].disconnect();
                    workers[1].process().kill(Signal::KILL);
                }
            });
        },
        |worker| run_to_completion(&worker),
    );
    let entries = entries.take();
    assert_eq!(
        of(1, &entries).last(),
        Some(&"exit Some(true) exit status: 0")
    );
    assert_eq!(
        of(2, &entries).last(),
        Some(&"exit Some(false) signal: 9 (SIGKILL)")
    );
    assert!(runs(Number::SIGCHLD) >= 1, "the host's handler runs");
}

/// Makes the kernel reap children as soon as they exit. `how` chooses the disposition of SIGCHLD.
/// With `ignored`, the host ignores the signal. `default` and `handled` set SA_NOCLDWAIT, with the
/// default action and with a handler.
fn ignore_children(how: &str) {
    let none = SigSet::empty();
    let reap = SaFlags::SA_NOCLDWAIT;
    match how {
        "ignored" => handle(Number::SIGCHLD, SigHandler::SigIgn, SaFlags::empty(), none),
        "default" => handle(Number::SIGCHLD, SigHandler::SigDfl, reap, none),
        _ => handle(Number::SIGCHLD, SigHandler::Handler(count), reap, none),
    }
}

fn exits_are_reported_though_the_host_ignores_its_children() {
    const HOW: &str = "HOW";
    let Ok(how) = std::env::var(HOW) else {
        for how in ["ignored", "default", "handled"] {
            with_env(HOW, how, || unreachable!());
        }
        return;
    };
    if cluster::is_master() {
        ignore_children(&how);
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            panic_on_errors(master);
            note_events(master, &log);
            (0..3).for_each(|code| fork_to_end_with(master, code));
            let killed = master.fork_with([("CODE", "none")]).unwrap();
            killed.on_online(|_, worker| worker.process().kill(Signal::KILL));
        },
        |worker| match std::env::var("CODE").unwrap().as_str() {
            "none" => run_until_killed(&worker),
            _ => exit_with_requested_code(),
        },
    );
    let entries = entries.take();
    for (worker, expected) in [
        (1, "exit status: 0"),
        (2, "exit status: 1"),
        (3, "exit status: 2"),
        (4, "signal: 9 (SIGKILL)"),
    ] {
        let last = format!("exit Some(false) {expected}");
        assert_eq!(of(worker, &entries).last(), Some(&last.as_str()), "{how}");
    }
}

/// Simulates an old kernel with a host that ignores its children, so that the kernel reaps the
/// workers. The master cannot get their exit status, and must report an error and the status 255.
fn children_are_reaped_though_the_host_ignores_them_on_old_kernels() {
    const HOW: &str = "HOW";
    let Ok(how) = std::env::var(HOW) else {
        for how in ["ignored", "default", "handled"] {
            with_env(HOW, how, || unreachable!());
        }
        return;
    };
    if cluster::is_master() {
        without_process_descriptors();
        ignore_children(&how);
    }
    let before = disposition(Number::SIGCHLD);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.fork().unwrap().on_online(|_, worker| {
                let child = child(0).id();
                let child = Pid::from_raw(i32::try_from(child).unwrap());
                wait_until("the exit of a child", || has_ended(child).then_some(()));
                worker.disconnect();
            });
        },
        |worker| run_to_completion(&worker),
    );
    // Get the error's text from the C library, because C libraries use different texts.
    let no_child = std::io::Error::from(nix::errno::Errno::ECHILD);
    let expected = [
        "1 fork".to_owned(),
        "1 online".to_owned(),
        "1 disconnect Some(true)".to_owned(),
        format!("cannot get the exit status of worker 1: {no_child}"),
        "1 exit Some(true) exit status: 255".to_owned(),
    ];
    assert_eq!(entries.take(), expected, "{how}");
    assert_eq!(disposition(Number::SIGCHLD), before, "{how}");
    let is_called = how == "handled";
    assert_eq!(runs(Number::SIGCHLD) > 0, is_called, "{how}");
}

/// Checks that Ctrl-Z at a terminal does not stop a child before `execve`, although the child also
/// receives SIGTSTP.
///
/// If the child stopped, the master would block in `fork` until the child continues.
fn terminal_stop_does_not_stop_a_child_before_execve() {
    let program = Arc::new(LeasedProgram::new());
    let log = Log::default();
    let entries = log.clone();
    let mut state = None;
    cluster(
        |master| {
            note_events(master, &log);
            let leased = Arc::clone(&program);
            let terminal = std::thread::spawn(move || {
                let child = leased.wait_for_child();
                nix::sys::signal::kill(child, Number::SIGTSTP).unwrap();
                let stat = format!("/proc/{child}/stat");
                // `kill` wakes the child. The child has handled the signal when it sleeps again or
                // is stopped.
                let state = wait_until("a state", || {
                    let stat = std::fs::read_to_string(&stat).unwrap();
                    [") S ", ") T "]
                        .into_iter()
                        .find(|state| stat.contains(state))
                });
                leased.release_lease();
                nix::sys::signal::kill(child, Number::SIGCONT).unwrap();
                state
            });
            master.setup_master(Settings::default().exec(program.path()));
            master.fork().unwrap();
            state = Some(terminal.join().unwrap());
        },
        |_| unreachable!("the worker executes another program"),
    );
    assert_eq!(state, Some(") S "));
    let entries = entries.take();
    assert_eq!(
        of(1, &entries).last(),
        Some(&"exit Some(false) exit status: 0")
    );
}

fn handler_with_nocldstop_is_not_called_for_stops_on_old_kernels() {
    if cluster::is_master() {
        without_process_descriptors();
        let counting = SigHandler::Handler(count);
        let none = SigSet::empty();
        handle(Number::SIGCHLD, counting, SaFlags::SA_NOCLDSTOP, none);
    }
    cluster(
        |master| {
            panic_on_errors(master);
            master.fork().unwrap().on_online(|_, worker| {
                stop(worker);
                worker.process().kill(Signal::CONT);
                worker.disconnect();
            });
        },
        |worker| run_to_completion(&worker),
    );
    assert_eq!(runs(Number::SIGCHLD), 1, "only for the exit");
}

/// Environment variable that is set only for process 1 of a new PID namespace.
const PROCESS_1: &str = "FIRST";

/// Starts this scenario again as process 1 of a new PID namespace, with `how` as the value of
/// [`PROCESS_1`].
pub fn start_as_process_1(how: &str) -> Child {
    use nix::sched::{CloneFlags, setns, unshare};

    let namespace = File::open("/proc/self/ns/pid").unwrap();
    unshare(CloneFlags::CLONE_NEWPID).unwrap();
    let first = Command::new(std::env::current_exe().unwrap())
        .env(PROCESS_1, how)
        .stdout(std::process::Stdio::piped())
        .spawn();
    setns(namespace, CloneFlags::CLONE_NEWPID).unwrap();
    first.unwrap()
}

pub fn is_process_1() -> bool {
    std::env::var_os(PROCESS_1).is_some()
}

/// Signals a worker that has exited and whose process ID a child of the host reuses. The signal
/// must not reach that child.
///
/// The master has not processed the worker's exit yet.
fn reused_process_id_is_not_signalled() {
    if !is_process_1() {
        // Test both `clone3` and the fallback to `fork`.
        for how in ["cloned", "forked"] {
            let status = start_as_process_1(how).wait().unwrap();
            assert!(status.success(), "{how}: {status}");
        }
        return;
    }
    if cluster::is_master() {
        ignore_children("ignored");
        if std::env::var(PROCESS_1).unwrap() == "forked" {
            refuse_calls(&[libc::SYS_clone3], libc::ENOSYS);
        }
    }
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            worker.on_online(|_, worker| signal_reused_process_id(worker));
        },
        |worker| {
            worker.on_message(|_, _| std::process::exit(0));
            worker.run().unwrap();
        },
    );
}

fn signal_reused_process_id(worker: &WorkerProcess) {
    let _ = worker.send(b"end").unwrap();
    let number = Pid::from_raw(i32::try_from(worker.process().id()).unwrap());
    wait_until("the exit of the worker", || has_ended(number).then_some(()));
    handle(
        Number::SIGCHLD,
        SigHandler::SigDfl,
        SaFlags::empty(),
        SigSet::empty(),
    );
    let mut foreign = wait_until("a child with the worker's process ID", || {
        child_with_pid(number)
    });
    worker.process().kill(Signal::KILL);
    let number = Pid::from_raw(i32::try_from(foreign.id()).unwrap());
    nix::sys::signal::kill(number, Number::SIGTERM).unwrap();
    let status = foreign.wait().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGTERM), "{status}");
}

/// Starts a child of the host with this process ID. Returns `None` if the ID is not free.
fn child_with_pid(number: Pid) -> Option<Child> {
    let last = (number.as_raw() - 1).to_string();
    std::fs::write("/proc/sys/kernel/ns_last_pid", last).unwrap();
    let mut child = Command::new("sleep").arg("600").spawn().unwrap();
    if i32::try_from(child.id()) == Ok(number.as_raw()) {
        return Some(child);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

fn has_ended(pid: Pid) -> bool {
    nix::sys::signal::kill(pid, None) == Err(nix::Error::ESRCH)
}

/// Returns the numbers of the open descriptors, except those of files in `/proc`.
fn fd_numbers() -> BTreeSet<RawFd> {
    let entries = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(Result::unwrap);
    // Leave out the descriptor that reads this directory.
    let others = entries
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|to| !to.starts_with("/proc")));
    let numbers = others.map(|entry| entry.file_name().to_string_lossy().parse().unwrap());
    numbers.collect()
}

/// Compares the descriptors of a worker before `init` with the expected ones, which are its channel
/// and all numbers below `standard`. Returns the additional and the missing ones.
fn unexpected_fds(standard: RawFd) -> Vec<RawFd> {
    let channel = std::env::var("CLUSTER_CHANNEL_FD").unwrap();
    let mut expected: BTreeSet<_> = (0..standard).collect();
    assert!(expected.insert(channel.parse().unwrap()));
    fd_numbers()
        .symmetric_difference(&expected)
        .copied()
        .collect()
}

/// Returns a list of the descriptors that a program has when the host executes it.
fn list_in_a_child() -> String {
    let output = Command::new("ls").arg("/proc/self/fd").output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Starts a thread that executes programs repeatedly until `stop` is set, and asserts that all of
/// them have the same descriptors. The thread returns the number of programs.
fn execute_until(stop: &Arc<AtomicBool>) -> JoinHandle<u32> {
    let stop = Arc::clone(stop);
    let before = list_in_a_child();
    std::thread::spawn(move || {
        let mut times = 0;
        while !stop.load(Ordering::SeqCst) {
            assert_eq!(list_in_a_child(), before);
            times += 1;
        }
        times
    })
}

fn workers_and_concurrent_children_share_no_descriptors() {
    const WORKERS: u32 = 30;
    let unexpected_fds = cluster::is_worker().then(|| unexpected_fds(3));
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = cluster::is_master().then(|| [(); 4].map(|()| execute_until(&stop)));
    let times = Rc::new(Cell::new([0; 4]));
    let counted = Rc::clone(&times);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            panic_on_errors(master);
            note_messages(master, &log);
            master.on_exit(move |master, worker, status| {
                assert_eq!(status.code(), Some(0));
                match worker.id().get() {
                    1 => {}
                    id if id < WORKERS => drop(master.fork().unwrap()),
                    _ => {
                        stop.store(true, Ordering::SeqCst);
                        let threads = threads.take().unwrap();
                        counted.set(threads.map(|thread| thread.join().unwrap()));
                    }
                }
            });
            // Start with a worker that listens, so that the master has a channel, a listener and a
            // queue when it forks the other workers.
            let first = master.fork_with([("FIRST_OF_ALL", "1")]).unwrap();
            first.on_listening(|master, _, _| drop(master.fork().unwrap()));
            master.on_message(move |_, worker, _| {
                if worker.id().get() == WORKERS {
                    first.disconnect();
                }
            });
        },
        |worker| {
            let _ = worker
                .send(format!("{unexpected_fds:?}").as_bytes())
                .unwrap();
            if std::env::var_os("FIRST_OF_ALL").is_some() {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                assert!(listener.accept().unwrap().is_none());
            }
        },
    );
    let times = times.get();
    println!("programs executed meanwhile: {times:?}");
    assert!(times.iter().all(|times| *times > 0));
    let entries = entries.take();
    assert_eq!(entries.len(), WORKERS as usize);
    assert!(
        entries.iter().all(|entry| entry.ends_with(" Some([])")),
        "{entries:?}"
    );
}

/// Forks a child of the host that does not call `execve` and keeps all descriptors that were open
/// at the fork.
fn forked_child() -> Pid {
    match fork_of_the_host() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => loop {
            pause();
        },
    }
}

pub fn end_child(pid: Pid) {
    nix::sys::signal::kill(pid, Number::SIGKILL).unwrap();
    waitpid(pid, None).unwrap();
}

/// Repeats the test without process descriptors. The master then waits without a time limit for the
/// end of a stream, which shows that a worker's program has started. The host's children may hold
/// this stream open.
fn forked_child_of_the_host_delays_no_fork_on_old_kernels() {
    if cluster::is_master() {
        without_process_descriptors();
    }
    forked_child_of_the_host_delays_no_fork();
}

/// Forks children of the host while the master forks workers. These children inherit the master's
/// descriptors, but `fork` must not wait until they exit.
fn forked_child_of_the_host_delays_no_fork() {
    const CHILDREN: usize = 100;
    let stop = Arc::new(AtomicBool::new(false));
    // The threads start to fork children at the master's first fork. The master forks workers until
    // both threads have forked their children.
    let (begin, forking_threads) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU32::new(2)),
    );
    let make_children = |stop: Arc<AtomicBool>| {
        let (begin, forking_threads) = (Arc::clone(&begin), Arc::clone(&forking_threads));
        std::thread::spawn(move || {
            let mut children = Vec::new();
            while !begin.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            while children.len() < CHILDREN && !stop.load(Ordering::SeqCst) {
                children.push(forked_child());
            }
            forking_threads.fetch_sub(1, Ordering::SeqCst);
            // Keep the children alive for up to 20 s. The master must set `stop` before that time.
            // If `fork` waited for these children, the master would set it too late.
            let end = Instant::now() + scaled(Duration::from_secs(20));
            while !stop.load(Ordering::SeqCst) && Instant::now() < end {
                std::thread::park_timeout(Duration::from_millis(100));
            }
            let in_time = stop.load(Ordering::SeqCst);
            children.into_iter().for_each(end_child);
            in_time
        })
    };
    let threads = cluster::is_master().then(|| [(); 2].map(|()| make_children(Arc::clone(&stop))));
    cluster(
        |master| {
            panic_on_errors(master);
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            begin.store(true, Ordering::SeqCst);
            while forking_threads.load(Ordering::SeqCst) > 0 {
                fork_to_end_with(master, 0);
            }
            stop.store(true, Ordering::SeqCst);
        },
        |_| exit_with_requested_code(),
    );
    let in_time = threads.unwrap().map(|thread| {
        thread.thread().unpark();
        thread.join().unwrap()
    });
    assert_eq!(in_time, [true, true]);
}

/// Forks a child of the host that has copies of the master's ends of all channels. The workers must
/// exit although these copies stay open.
fn forked_child_of_the_host_keeps_no_worker_alive() {
    let log = Log::default();
    let entries = log.clone();
    let child = Rc::new(Cell::new(None));
    let made = Rc::clone(&child);
    cluster(
        |master| {
            panic_on_errors(master);
            note_events(master, &log);
            let workers = [(); 3].map(|()| master.fork().unwrap());
            let mut online = 0;
            master.on_online(move |_, _| {
                online += 1;
                if online == 3 {
                    made.set(Some(forked_child()));
                    workers[0].disconnect();
                    workers[1].process().disconnect();
                    workers[2].process().kill(Signal::KILL);
                }
            });
        },
        |worker| run_to_completion(&worker),
    );
    end_child(child.get().unwrap());
    let entries = entries.take();
    let last = |worker| of(worker, &entries).last().copied();
    assert_eq!(last(1), Some("exit Some(true) exit status: 0"));
    assert_eq!(last(2), Some("exit Some(false) exit status: 0"));
    assert_eq!(last(3), Some("exit Some(false) signal: 9 (SIGKILL)"));
}

fn forked_child_of_the_host_keeps_no_worker_of_a_dropped_master_alive() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let worker = master.fork().unwrap();
            let online = Rc::new(Cell::new(false));
            let set = Rc::clone(&online);
            worker.on_online(move |_, _| set.set(true));
            while !online.get() {
                master.dispatch(None).unwrap();
            }
            let child = forked_child();
            drop(master);
            let pid = Pid::from_raw(i32::try_from(worker.process().id()).unwrap());
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
            let end = wait_until("the exit of the worker", || {
                let end = waitpid(pid, Some(flags)).unwrap();
                (end != WaitStatus::StillAlive).then_some(end)
            });
            assert_eq!(end, WaitStatus::Exited(pid, 0));
            end_child(child);
        }
        Role::Worker(worker) => run_to_completion(&worker),
    }
}

/// Opens descriptors with low and high numbers, all without close-on-exec.
fn inheritable_descriptors() -> Vec<OwnedFd> {
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::sys::resource::{Resource, getrlimit};
    use std::os::fd::FromRawFd as _;

    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let last = RawFd::try_from(limit.min(60_000)).unwrap() - 1;
    let null = File::open("/dev/null").unwrap();
    let lows = (0..47).map(|number| 3 + number * 11);
    let numbers = lows.chain([last - 300, last - 1, last]);
    let copy = |number| {
        let copy = fcntl(&null, FcntlArg::F_DUPFD(number)).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: `fcntl` has just created the descriptor, so it is open and has no other owner.
        unsafe {
            OwnedFd::from_raw_fd(copy)
        }
    };
    numbers.map(copy).collect()
}

fn assert_no_unexpected_descriptors() {
    const STANDARD: &str = "STANDARD";
    let standard = std::env::var(STANDARD).map(|standard| standard.parse().unwrap());
    let unexpected_fds = standard.ok().map(unexpected_fds);
    let open = cluster::is_master().then(inheritable_descriptors);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            assert_eq!(open.as_ref().unwrap().len(), 50);
            note_messages(master, &log);
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            let file = tempfile::tempfile().unwrap();
            let inherit = [(); 3].map(|()| Stdio::inherit());
            let more = [Stdio::null(), Stdio::pipe(), Stdio::fd(file)];
            let cases = [
                (3, Settings::default()),
                (3, Settings::default().silent(true)),
                (3, Settings::default().silent(false).stdio(inherit.clone())),
                (
                    6,
                    Settings::default().stdio(inherit.into_iter().chain(more)),
                ),
            ];
            for (standard, settings) in cases {
                master.setup_master(settings);
                master
                    .fork_with([(STANDARD, standard.to_string())])
                    .unwrap();
            }
        },
        |worker| {
            let _ = worker
                .send(format!("{unexpected_fds:?}").as_bytes())
                .unwrap();
        },
    );
    let mut entries = entries.take();
    entries.sort();
    let expected = [1, 2, 3, 4].map(|worker| format!("{worker} Some([])"));
    assert_eq!(entries, expected);
    let open = open.unwrap();
    let numbers = fd_numbers();
    assert!(
        open.iter().all(|fd| numbers.contains(&fd.as_raw_fd())),
        "the host's descriptors stay open"
    );
}

fn worker_inherits_only_its_own_descriptors() {
    for_both_policies(assert_no_unexpected_descriptors);
}

fn worker_inherits_only_its_own_descriptors_on_old_kernels() {
    if cluster::is_master() {
        refuse_calls(&[libc::SYS_close_range, libc::SYS_clone3], libc::ENOSYS);
    }
    assert_no_unexpected_descriptors();
}

/// Returns the output of the process and its workers, which share a pipe.
pub fn output_of(process: &mut Child) -> BufReader<ChildStdout> {
    BufReader::new(process.stdout.take().unwrap())
}

/// Kills a worker that has a child of its own. The child becomes an orphan and then the host's
/// child, because the host is process 1.
///
/// The host then forks another worker. That worker must disconnect when the host receives SIGTERM,
/// as from a container runtime.
#[expect(clippy::zombie_processes, reason = "it is left behind")]
fn process_1_can_be_a_master() {
    if !is_process_1() {
        let mut first = start_as_process_1("1");
        let mut lines = output_of(&mut first).lines();
        let line = lines.next().unwrap().unwrap();
        assert_eq!(line, "ready");
        let number = Pid::from_raw(i32::try_from(first.id()).unwrap());
        nix::sys::signal::kill(number, Number::SIGTERM).unwrap();
        let status = first.wait().unwrap();
        assert!(status.success(), "{status}");
        return;
    }
    SIGNALS.store(true, Ordering::SeqCst);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            assert_eq!(std::process::id(), 1);
            panic_on_errors(master);
            note_events(master, &log);
            let end = |master: &Master, _| master.disconnect();
            master.on_signal(Signal::TERM, end).unwrap();
            master.on_message(|_, worker, message| kill_parent_of_orphan(worker, message.bytes()));
            master.fork_with([("PART", "parent")]).unwrap();
        },
        |worker| match std::env::var("PART").unwrap().as_str() {
            "parent" => {
                let mut command = Command::new("sh");
                command.args(["-c", "read line; exit 7"]);
                let child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
                let _ = worker.send(&child.id().to_ne_bytes()).unwrap();
                run_until_killed(&worker);
            }
            _ => run_to_completion(&worker),
        },
    );
    let entries = entries.take();
    assert_eq!(
        of(1, &entries).last(),
        Some(&"exit Some(false) signal: 9 (SIGKILL)")
    );
    assert_eq!(
        of(2, &entries).last(),
        Some(&"exit Some(true) exit status: 0")
    );
}

/// Kills the orphan's parent, and checks that the host can reap the orphan, because the master has
/// not done so.
///
/// The orphan exits at end-of-file on its input.
fn kill_parent_of_orphan(parent: &WorkerProcess, orphan: &[u8]) {
    let orphan = u32::from_ne_bytes(orphan.try_into().unwrap());
    let orphan = Pid::from_raw(i32::try_from(orphan).unwrap());
    parent.process().kill(Signal::KILL);
    let end = Ok(WaitStatus::Exited(orphan, 7));
    parent.on_exit(move |master, _, _| {
        // Check that the orphan is a zombie, but do not reap it before the other worker has exited.
        // The master must not mistake the zombie for that worker's exit.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        assert_eq!(waitid(Id::Pid(orphan), flags), end);
        let other = master.fork_with([("PART", "other")]).unwrap();
        other.on_online(|_, _| println!("ready"));
        other.on_exit(move |_, _, _| assert_eq!(waitpid(orphan, None), end));
    });
}

fn workers_exit_with_a_master_that_is_process_1() {
    if !is_process_1() {
        let mut first = start_as_process_1("1");
        let mut output = output_of(&mut first);
        for _ in 0..3 {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            assert_eq!(line, "ready\n");
        }
        first.kill().unwrap();
        assert_eq!(first.wait().unwrap().signal(), Some(libc::SIGKILL));
        let killed_at = Instant::now();
        let mut rest = String::new();
        // Read to end-of-file. All processes have the pipe as standard output, so end-of-file
        // arrives when the last of them has exited.
        output.read_to_string(&mut rest).unwrap();
        assert!(killed_at.elapsed() < scaled(Duration::from_secs(1)));
        assert_eq!(rest, "");
        return;
    }
    match cluster::init().unwrap() {
        Role::Master(master) => {
            for part in ["idle", "looping", "stopped"] {
                master.fork_with([("PART", part)]).unwrap();
            }
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            println!("ready");
            match std::env::var("PART").unwrap().as_str() {
                "looping" => loop {
                    std::hint::spin_loop();
                },
                "stopped" => raise(Number::SIGSTOP).unwrap(),
                _ => {}
            }
            worker.run().unwrap();
        }
    }
}

/// Forks a child that drops its copy of the master, as a child that returns from `main` does. The
/// parent's worker and the path of its Unix socket must remain.
fn dropping_the_master_in_a_child_does_not_affect_the_parent() {
    let path = std::env::temp_dir().join(format!("cluster-test-{}", std::process::id()));
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let worker = master.fork_with([("SOCKET", &path)]).unwrap();
            let listening = Rc::new(Cell::new(false));
            let seen = Rc::clone(&listening);
            worker.on_listening(move |_, _, _| seen.set(true));
            while !listening.get() {
                master.dispatch(None).unwrap();
            }
            match fork_of_the_host() {
                ForkResult::Child => {
                    drop(master);
                    std::process::exit(0);
                }
                ForkResult::Parent { child } => {
                    assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
                }
            }
            let address = path.clone();
            let ask = move || {
                let mut answer = String::new();
                let mut client = UnixStream::connect(address).unwrap();
                client.read_to_string(&mut answer).unwrap();
                answer
            };
            in_background(&master, ask, |master, answer| {
                assert_eq!(answer, "served");
                master.disconnect();
            });
            master.run().unwrap();
            drop(master);
            assert!(!path.exists());
        }
        Role::Worker(worker) => {
            let path = PathBuf::from(std::env::var_os("SOCKET").unwrap());
            let listener = worker.listen(path.as_path()).unwrap();
            for connection in listener.incoming() {
                connection.unwrap().write_all(b"served").unwrap();
            }
        }
    }
}

pub fn fork_of_the_host() -> ForkResult {
    #[allow(unsafe_code)]
    // SAFETY: after `fork`, the child makes only async-signal-safe calls, or its parent had one
    // thread and so no lock is held.
    unsafe { nix::unistd::fork() }.unwrap()
}

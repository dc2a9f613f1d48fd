//! Tests that the host's signal handlers run, keep their settings and are restored.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cluster::{Master, Settings, Signal};
use nix::libc;
use nix::sys::signal::{SaFlags, SigHandler, SigSet, Signal as Number, raise};

use super::{
    INTERRUPTIBLE, count, disposition, fork_to_end_with, handle, mask, panic_on_errors,
    run_to_completion, runs, without_process_descriptors,
};
use crate::harness::{LeasedProgram, Log, SIGNALS, cluster, note_events, of, stop, wait_until};

crate::scenarios! {
    signal_handlers_of_the_host_run_and_are_restored
    signal_handlers_of_the_host_run_and_are_restored_on_old_kernels
    signal_handlers_of_the_host_run_with_their_masks
    signal_handler_installed_later_is_kept
    signal_handler_installed_later_hides_no_exit_on_old_kernels
    terminal_stop_does_not_stop_a_child_before_execve
    handler_with_nocldstop_is_not_called_for_stops_on_old_kernels
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
                let child = leased.with_child(|child| {
                    nix::sys::signal::kill(child, Number::SIGTSTP).ok()?;
                    Some(child)
                });
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

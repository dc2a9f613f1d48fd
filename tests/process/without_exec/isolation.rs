//! Tests what a copy shares with the master and what not: handles, signals, memory and output.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Stdio as ChildStdio;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cluster::{Interest, Master, Role, Signal, Worker, WorkerProcess};
use nix::sys::signal::{SigHandler, signal};

use super::{cluster_without_exec, set_main};
use crate::harness::{Log, SIGNALS, is_watched, note_messages, watched};

crate::scenarios! {
    copy_cannot_affect_other_workers
    master_handle_is_inert_in_a_copy
    copy_starts_with_no_signal_blocked_handled_or_pending
    signal_to_a_copy_does_not_reach_the_master
    copy_shares_memory_with_the_master
    buffered_output_is_printed_once
}

fn copy_cannot_affect_other_workers() {
    cluster_without_exec(|master| {
        set_main(master, |worker| worker.run().unwrap());
        let others: Rc<RefCell<Vec<WorkerProcess>>> = Rc::default();
        let victim = master.fork().unwrap();
        others.borrow_mut().push(victim.clone());
        victim.on_message(|_, _, _| panic!("the victim received a message"));
        victim.on_online(move |master, victim| {
            let others = Rc::clone(&others);
            set_main(master, move |worker| {
                let others = others.borrow();
                let victim = &others[0];
                assert!(victim.send(b"from a copy").is_err());
                victim.disconnect();
                victim.kill(Signal::KILL);
                victim.process().kill(Signal::KILL);
                victim.process().disconnect();
                assert!(victim.process().take_stdio(1).is_none());
                worker.disconnect();
            });
            let copy = master.fork().unwrap();
            let victim = victim.clone();
            copy.on_exit(move |_, _, status| {
                assert!(status.success(), "{status}");
                assert!(!victim.is_dead());
                victim.disconnect();
            });
        });
        victim.on_exit(|_, victim, status| {
            assert!(status.success(), "{status}");
            assert_eq!(victim.exited_after_disconnect(), Some(true));
        });
    });
}

fn master_handle_is_inert_in_a_copy() {
    let Role::Master(master) = cluster::init().unwrap() else {
        unreachable!("the workers execute no program");
    };
    let master = Rc::new(master);
    let copied = Rc::downgrade(&master);
    set_main(&master, move |worker| {
        let copied = copied.upgrade().unwrap();
        let listener = worker.listen("127.0.0.1:0").unwrap();
        assert!(copied.workers().is_empty());
        assert!(copied.fork().is_err());
        assert!(copied.dispatch(Some(Duration::ZERO)).is_err());
        let input = UnixStream::pair().unwrap().0;
        assert!(
            copied
                .watch(input, Interest::Readable, |_, _| None)
                .is_err()
        );
        copied.disconnect();
        drop(listener);
        worker.disconnect().run().unwrap();
    });
    let statuses = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&statuses);
    master.on_exit(move |_, _, status| seen.borrow_mut().push(status.code()));
    for _ in 0..2 {
        master.fork().unwrap();
    }
    master.run().unwrap();
    assert_eq!(statuses.take(), [Some(0), Some(0)]);
}

/// Returns the set of signals in a field of `/proc/self/status`.
fn signals(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mut sets = status.lines().filter_map(|line| line.strip_prefix(field));
    let set = u64::from_str_radix(sets.next().unwrap().trim(), 16).unwrap();
    // Ignore signals above 31. They are real-time signals, and the C library uses some of them.
    set & ((1 << 31) - 1)
}

fn bit(signal: nix::sys::signal::Signal) -> u64 {
    1 << (signal as u32 - 1)
}

fn copy_starts_with_no_signal_blocked_handled_or_pending() {
    use nix::sys::signal::{SigSet, SigmaskHow, Signal as Number, raise, sigprocmask};

    SIGNALS.store(true, Ordering::SeqCst);
    let log = Log::default();
    let entries = log.clone();
    cluster_without_exec(|master| {
        note_messages(master, &log);
        let mut blocked = SigSet::empty();
        blocked.add(Number::SIGUSR2);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&blocked), None).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: ignoring a signal installs no handler, so no code can run in signal context.
        unsafe { signal(Number::SIGHUP, SigHandler::SigIgn) }.unwrap();
        master.on_signal(Signal::USR1, |_, _| {}).unwrap();
        // Raise a signal that is still pending in the crate at the fork: the handler has recorded
        // it, but the loop does not run before the fork. The copy must not report it.
        raise(Number::SIGUSR1).unwrap();
        set_main(master, |worker| {
            // Like every Rust program, the copy ignores SIGPIPE, so that a client that disconnects
            // does not kill its server.
            assert_eq!(signals("SigIgn:"), bit(Number::SIGPIPE));
            assert_eq!(signals("SigBlk:"), 0);
            assert_eq!(signals("SigCgt:"), 0);
            let (mut here, there) = UnixStream::pair().unwrap();
            drop(there);
            assert!(here.write_all(b"!").is_err());
            for signal in [Signal::USR1, Signal::USR2] {
                let report = move |worker: &Worker, number: Signal| {
                    let _ = worker.send(format!("{number}").as_bytes()).unwrap();
                };
                worker.on_signal(signal, report).unwrap();
            }
            raise(Number::SIGUSR2).unwrap();
            worker.dispatch(Some(Duration::ZERO)).unwrap();
            worker.disconnect().run().unwrap();
        });
        master.fork().unwrap();
        sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&blocked), None).unwrap();
    });
    let report = entries.take();
    assert_eq!(report.len(), 1, "{report:?}");
    assert!(
        report[0].contains("USR2") || report[0].contains("12"),
        "{report:?}"
    );
}

/// Checks that a signal that a copy raises does not reach the master. After each signal, the copy
/// waits until a faulty master that also received the signal would have processed it.
fn signal_to_a_copy_does_not_reach_the_master() {
    use nix::sys::signal::{Signal as Number, raise};

    SIGNALS.store(true, Ordering::SeqCst);
    let received = Rc::new(Cell::new(0));
    let of_master = Rc::clone(&received);
    cluster_without_exec(|master| {
        let count = move |_: &Master, _| of_master.set(of_master.get() + 1);
        master.on_signal(Signal::USR1, count).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        set_main(master, move |worker| {
            let received = Rc::new(Cell::new(0));
            let of_worker = Rc::clone(&received);
            let count = move |_: &Worker, _| of_worker.set(of_worker.get() + 1);
            worker.on_signal(Signal::USR1, count).unwrap();
            for times in 1..=10 {
                raise(Number::SIGUSR1).unwrap();
                let _ = worker.send(b"raised").unwrap();
                (&there).read_exact(&mut [0]).unwrap();
                worker.dispatch(Some(Duration::ZERO)).unwrap();
                assert_eq!(received.get(), times);
            }
            worker.disconnect();
        });
        // Reply at the iteration's end, after the master has processed all events that became ready
        // with the message.
        let here = Rc::new(RefCell::new(here));
        master.on_message(move |master, _, _| {
            let here = Rc::clone(&here);
            let go_on = move |_: &Master| here.borrow_mut().write_all(b"!").unwrap();
            master.set_timeout(Duration::ZERO, go_on);
        });
        let worker = master.fork().unwrap();
        worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
    });
    assert_eq!(received.get(), 0);
}

/// Returns a process's private dirty memory, in KiB.
fn private_memory(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let mut values = rollup
        .lines()
        .filter_map(|line| line.strip_prefix("Private_Dirty:"));
    let value = values.next().unwrap().trim_end_matches("kB");
    value.trim().parse().unwrap()
}

fn copy_shares_memory_with_the_master() {
    const LOADED: usize = 64 << 20;
    let log = Log::default();
    let entries = log.clone();
    cluster_without_exec(|master| {
        note_messages(master, &log);
        let loaded = vec![1u8; LOADED];
        set_main(master, move |worker| {
            let sum: usize = loaded.iter().map(|byte| usize::from(*byte)).sum();
            let own = private_memory(std::process::id()) < 8 << 10;
            let _ = worker.send(format!("{sum} {own}").as_bytes()).unwrap();
        });
        for _ in 0..3 {
            master.fork().unwrap();
        }
    });
    let expected = (1..=3).map(|worker| format!("{worker} {LOADED} true"));
    let mut report = entries.take();
    report.sort();
    assert_eq!(report, expected.collect::<Vec<_>>());
}

fn buffered_output_is_printed_once() {
    if !is_watched() {
        let output = watched().stdout(ChildStdio::piped()).output().unwrap();
        assert!(output.status.success(), "{}", output.status);
        let printed = String::from_utf8(output.stdout).unwrap();
        assert_eq!(printed, "master worker 1 1 worker 2 2 worker 3 3 ");
        return;
    }
    cluster_without_exec(|master| {
        print!("master ");
        set_main(master, |worker| print!("worker {} ", worker.id()));
        master.fork().unwrap();
        // Fork one worker after another, because all workers write to one pipe and their order must
        // be certain.
        master.on_exit(|master, worker, _| {
            print!("{} ", worker.id());
            if worker.id().get() < 3 {
                master.fork().unwrap();
            }
        });
    });
}

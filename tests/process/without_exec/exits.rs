//! Tests how a copy exits, and what the master then knows about it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Master, Settings, Signal};
use nix::sys::signal::{SigHandler, signal};

use super::{cluster_without_exec, set_main};
use crate::harness::{Log, cluster, note_events, of, scaled};

crate::scenarios! {
    return_value_of_a_copy_is_its_exit_code
    copy_that_panics_exits_with_101
    exits_of_copies_are_reported_though_the_host_ignores_sigchld: EXIT_OF_REAPED_CHILDREN
    resource_usage_is_known_after_exit
    resource_usage_is_unknown_if_the_host_reaped_the_worker
}

fn return_value_of_a_copy_is_its_exit_code() {
    let log = Log::default();
    let entries = log.clone();
    cluster_without_exec(|master| {
        note_events(master, &log);
        master.setup_master(Settings::default().main(|_| 7));
        master.fork().unwrap();
        set_main(master, |_| std::process::exit(8));
        master.fork().unwrap();
        set_main(master, |_| {
            nix::sys::signal::raise(nix::sys::signal::SIGKILL).unwrap()
        });
        master.fork().unwrap();
    });
    let entries = entries.take();
    let codes = ["exit status: 7", "exit status: 8", "signal: 9 (SIGKILL)"];
    for (worker, code) in (1..).zip(codes) {
        let last = format!("exit Some(false) {code}");
        assert_eq!(of(worker, &entries).last(), Some(&last.as_str()));
    }
}

/// Checks that a panic in a worker does not run the guards in the master's stack frames, which the
/// copy inherits.
fn copy_that_panics_exits_with_101() {
    struct Guard(u32);

    impl Drop for Guard {
        fn drop(&mut self) {
            assert_eq!(
                std::process::id(),
                self.0,
                "the worker ran a guard of the master"
            );
        }
    }

    /// A panic payload that panics when it is dropped.
    struct Payload;

    impl Drop for Payload {
        fn drop(&mut self) {
            panic!("the payload is dropped");
        }
    }

    let ended = Rc::new(Cell::new(0));
    let counted = Rc::clone(&ended);
    cluster_without_exec(|master| {
        master.on_exit(move |_, _, status| {
            assert_eq!(status.code(), Some(101));
            counted.set(counted.get() + 1);
        });
        set_main(master, |_| panic!("expected"));
        let fork = |master: &Master| {
            let _guard = Guard(std::process::id());
            master.fork().unwrap();
        };
        fork(master);
        set_main(master, |_| std::panic::panic_any(Payload));
        master.set_timeout(Duration::ZERO, fork);
    });
    assert_eq!(ended.get(), 2);
}

fn exits_of_copies_are_reported_though_the_host_ignores_sigchld() {
    #[allow(unsafe_code)]
    // SAFETY: ignoring a signal installs no handler, so no code can run in signal context.
    unsafe { signal(nix::sys::signal::SIGCHLD, SigHandler::SigIgn) }.unwrap();
    let ended = Rc::new(Cell::new(0));
    let counted = Rc::clone(&ended);
    cluster_without_exec(|master| {
        master.on_error(|_, _, error| panic!("{error}"));
        master.on_exit(move |_, _, status| {
            assert_eq!(status.code(), Some(9));
            counted.set(counted.get() + 1);
        });
        master.setup_master(Settings::default().main(|_| 9));
        for _ in 0..20 {
            master.fork().unwrap();
        }
    });
    assert_eq!(ended.get(), 20);
}

/// Spins until this process has used `time` more CPU time.
fn use_cpu_time(time: Duration) {
    let clock = nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID;
    let own = || Duration::from(nix::time::clock_gettime(clock).unwrap());
    let begun = own();
    while own() < begun + time {
        std::hint::spin_loop();
    }
}

/// Checks the resource usage of a worker that executes a program and of a worker that does not.
fn resource_usage_is_known_after_exit() {
    const TIME: Duration = Duration::from_millis(50);
    const MEMORY: usize = 64 << 20;
    fn work() {
        use_cpu_time(TIME);
        let memory = vec![1u8; MEMORY];
        assert_eq!(memory.iter().filter(|byte| **byte == 1).count(), MEMORY);
    }
    let ended = Rc::new(Cell::new(0));
    let counted = Rc::clone(&ended);
    cluster(
        |master| {
            master.on_online(|_, worker| assert_eq!(worker.process().usage(), None));
            master.on_exit(move |_, worker, status| {
                assert!(status.success(), "{status}");
                let usage = worker.process().usage().unwrap();
                let time = usage.user_cpu_time + usage.system_cpu_time;
                assert!((TIME..scaled(TIME * 40)).contains(&time), "{usage:?}");
                assert!(usage.user_cpu_time > Duration::ZERO, "{usage:?}");
                let memory = MEMORY as u64;
                assert!((memory..memory * 4).contains(&usage.max_rss), "{usage:?}");
                counted.set(counted.get() + 1);
            });
            master.fork().unwrap();
            set_main(master, |_| work());
            master.fork().unwrap();
        },
        |_| work(),
    );
    assert_eq!(ended.get(), 2);
}

fn resource_usage_is_unknown_if_the_host_reaped_the_worker() {
    cluster_without_exec(|master| {
        set_main(master, |worker| worker.run().unwrap());
        let worker = master.fork().unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(worker.process().id()).unwrap());
        worker.on_online(move |_, worker| {
            worker.process().kill(Signal::KILL);
            nix::sys::wait::waitpid(pid, None).unwrap();
        });
        worker.on_exit(|_, worker, _| assert_eq!(worker.process().usage(), None));
    });
}

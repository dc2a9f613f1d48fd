//! Tests loops and signals with callbacks in a forked child.

use std::time::Duration;

use cluster::{Master, Role, Signal, Worker};
use nix::sys::signal::{Signal as Number, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::ForkResult;

use super::{expect_foreign, expect_success, fork, in_child};
use crate::harness::cluster;

crate::scenarios! {
    signal_with_a_callback_does_nothing_in_a_forked_child_that_has_the_handle
    loop_ends_in_a_child_forked_by_a_callback
}

/// Checks that the worker's `run` returns an error in a child that a callback forks, and delivers
/// no more events there.
fn loop_ends_in_a_child_forked_by_a_callback() {
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            let mut received = 0;
            master.on_message(move |_, worker, message| {
                assert_eq!(message.bytes(), b"in the parent");
                received += 1;
                if received == 2 {
                    worker.disconnect();
                }
            });
            let worker = master.fork().unwrap();
            worker.on_online(|_, worker| {
                let _ = worker.send(b"first").unwrap();
                let _ = worker.send(b"second").unwrap();
            });
        },
        |worker| {
            let own = std::process::id();
            worker.on_message(move |worker, message| {
                assert_eq!(std::process::id(), own, "{message:?}");
                if message.bytes() == b"first" {
                    // Add another event that is due in this iteration. The loop must deliver this
                    // event only in the parent.
                    worker.set_timeout(Duration::ZERO, move |_| {
                        assert_eq!(std::process::id(), own);
                    });
                    if let ForkResult::Parent { child } = fork() {
                        expect_success(child);
                    }
                }
                if std::process::id() == own {
                    let _ = worker.send(b"in the parent").unwrap();
                }
            });
            let ended = worker.run();
            if std::process::id() == own {
                ended.unwrap();
            } else {
                expect_foreign(ended);
            }
        },
    );
}

/// Raises a signal, for which this process has a callback, in a child that has a copy of the handle,
/// and in a child that drops the copy.
fn raise_in_children<T>(handle: T) -> T {
    in_child(|| raise(Number::SIGUSR1).unwrap());
    match fork() {
        ForkResult::Child => {
            drop(handle);
            raise(Number::SIGUSR1).unwrap();
            std::process::exit(0);
        }
        ForkResult::Parent { child } => {
            let killed = WaitStatus::Signaled(child, Number::SIGUSR1, false);
            assert_eq!(waitpid(child, None), Ok(killed));
            handle
        }
    }
}

fn signal_with_a_callback_does_nothing_in_a_forked_child_that_has_the_handle() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let own = |_: &Master, _| panic!("the signal was for a child");
            master.on_signal(Signal::USR1, own).unwrap();
            let master = raise_in_children(master);
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.fork().unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            let own = |_: &Worker, _| panic!("the signal was for a child");
            worker.on_signal(Signal::USR1, own).unwrap();
            let worker = raise_in_children(worker);
            worker.dispatch(Some(Duration::ZERO)).unwrap();
        }
    }
}

//! Tests that a master with threads cannot be copied.

use std::cell::Cell;

use cluster::{Error, InspectPort, Master, Settings};
use nix::libc;

use super::{cluster_without_exec, set_main};
use crate::refused::refuse_calls;

crate::scenarios! {
    master_with_threads_cannot_be_copied
    thread_started_by_the_inspect_port_closure_is_detected
    master_with_threads_cannot_be_copied_in_a_sandbox
}

/// Asserts that `error` comes from a `fork` that cannot copy the master, because the master has
/// more than one thread.
fn expect_threads_found(error: Error) {
    match error {
        Error::Fork { step, reason, .. } => {
            assert_eq!(step.to_string(), "copy the master");
            assert_eq!(reason.kind(), std::io::ErrorKind::Deadlock);
        }
        error => panic!("{error}"),
    }
}

/// Asserts that `fork` fails while the master has a second thread, and succeeds after that thread
/// has exited.
///
/// A copy would have only one thread, and locks that the missing threads hold would never be
/// released.
fn expect_one_thread(master: &Master) {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || stopped.recv());
    expect_threads_found(master.fork().unwrap_err());
    assert!(master.workers().is_empty());
    let result = nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::__WALL));
    assert_eq!(result, Err(nix::Error::ECHILD), "no zombie is left");
    drop(stop);
    thread.join().unwrap().unwrap_err();
    // Provoke a race: the kernel may still be releasing an exited thread when `fork` is called.
    // Such a thread must not make `fork` fail.
    for _ in 0..20 {
        std::thread::spawn(|| {}).join().unwrap();
        master.fork().unwrap();
    }
}

fn master_with_threads_cannot_be_copied() {
    cluster_without_exec(|master| {
        master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        set_main(master, |_| {});
        expect_one_thread(master);
    });
}

/// Checks that `fork` detects a thread even if it starts as late as possible: in the closure that
/// chooses the inspect port, which `fork` calls.
fn thread_started_by_the_inspect_port_closure_is_detected() {
    cluster_without_exec(|master| {
        set_main(master, |_| {});
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let stopped = Cell::new(Some(stopped));
        let port = InspectPort::new(move || {
            let stopped = stopped.take().unwrap();
            std::thread::spawn(move || stopped.recv());
            9000
        });
        master.setup_master(Settings::default().inspect_port(port));
        expect_threads_found(master.fork().unwrap_err());
        drop(stop);
    });
}

/// Checks that threads are also detected in a sandbox that rejects `unshare`, the usual way to
/// detect them.
fn master_with_threads_cannot_be_copied_in_a_sandbox() {
    cluster_without_exec(|master| {
        master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        set_main(master, |_| {});
        refuse_calls(&[libc::SYS_unshare], libc::EPERM);
        expect_one_thread(master);
    });
}

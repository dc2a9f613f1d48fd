//! Tests settings of copies, and that a step that fails is an error of `fork`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use cluster::{Error, Master, Settings};
use nix::libc;
use nix::unistd::{Gid, Uid};

use super::{cluster_without_exec, set_main};
use crate::harness::{NOBODY, cluster, fork_patiently, try_patiently};
use crate::refused::{self, refuse_calls};

crate::scenarios! {
    settings_change_from_closure_to_program_and_back
    copy_runs_as_the_user_of_the_settings: ROOT
    failed_step_in_a_copy_is_an_error_of_fork
    failed_user_change_in_a_copy_is_an_error_of_fork: ROOT
}

fn settings_change_from_closure_to_program_and_back() {
    let codes = Rc::new(RefCell::new(BTreeMap::new()));
    let found = Rc::clone(&codes);
    let own = std::env::current_exe().unwrap();
    cluster(
        |master| {
            master.on_exit(move |_, worker, status| {
                let id = worker.id().get();
                codes.borrow_mut().insert(id, status.code());
            });
            master.setup_master(Settings::default().main(|_| 1));
            master.fork().unwrap();
            master.setup_master(Settings::default().cwd("/"));
            assert!(master.settings().has_main());
            master.fork().unwrap();
            master.setup_master(Settings::default().exec(own));
            assert!(!master.settings().has_main());
            master.fork().unwrap();
            master.setup_master(Settings::default().main(|_| 2));
            master.fork().unwrap();
        },
        |_| std::process::exit(5),
    );
    let expected = [(1, Some(1)), (2, Some(1)), (3, Some(5)), (4, Some(2))];
    assert_eq!(found.take(), BTreeMap::from(expected));
}

fn copy_runs_as_the_user_of_the_settings() {
    cluster_without_exec(|master| {
        master.setup_master(Settings::default().uid(NOBODY).gid(NOBODY));
        set_main(master, |worker| {
            assert_eq!(
                (Uid::current(), Uid::effective()),
                (NOBODY.into(), NOBODY.into())
            );
            assert_eq!(
                (Gid::current(), Gid::effective()),
                (NOBODY.into(), NOBODY.into())
            );
            assert_eq!(nix::unistd::getgroups().unwrap(), []);
            assert!(nix::unistd::setuid(Uid::from_raw(0)).is_err());
            drop(worker.listen("127.0.0.1:0").unwrap());
        });
        let worker = fork_patiently(|| master.fork());
        worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
    });
}

#[track_caller]
fn assert_fails(master: &Master, expected: &str, errno: Option<i32>) {
    match try_patiently(|| master.fork()).unwrap_err() {
        Error::Fork { step, reason, .. } => {
            let found = (step.to_string(), reason.raw_os_error());
            assert_eq!(found, (expected.to_owned(), errno));
        }
        error => panic!("{error}"),
    }
    assert!(master.workers().is_empty());
    let result = nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::__WALL));
    assert_eq!(result, Err(nix::Error::ECHILD), "no zombie is left");
}

fn failed_step_in_a_copy_is_an_error_of_fork() {
    cluster_without_exec(|master| {
        master.on_fork(|_, _| panic!("a worker was forked"));
        set_main(master, |_| unreachable!("fork has failed"));
        for (name, value) in [("", "empty"), ("A=B", "C"), ("A", "B\0C"), ("A\0B", "C")] {
            let error = master.fork_with([(name, value)]).unwrap_err();
            assert!(matches!(error, Error::Fork { .. }), "{error}");
        }
        master.setup_master(Settings::default().cwd("/nowhere/at/all"));
        assert_fails(master, "enter its directory", Some(libc::ENOENT));
        master.setup_master(Settings::default().cwd("/"));
        // Seccomp filters accumulate. Reject the last step first, because each new filter then
        // makes an earlier step fail.
        refuse_calls(
            &[libc::SYS_timerfd_create, libc::SYS_eventfd2],
            libc::EMFILE,
        );
        assert_fails(master, "make it a worker", Some(libc::EMFILE));
        refuse_calls(&[libc::SYS_socket], libc::ENFILE);
        assert_fails(master, "prepare its descriptors", Some(libc::ENFILE));
    });
}

fn failed_user_change_in_a_copy_is_an_error_of_fork() {
    cluster_without_exec(|master| {
        master.on_fork(|_, _| panic!("a worker was forked"));
        set_main(master, |_| unreachable!("fork has failed"));
        master.setup_master(Settings::default().uid(NOBODY).gid(NOBODY));
        refuse_calls(&[refused::SETRESUID], libc::EACCES);
        assert_fails(master, "change its user", Some(libc::EACCES));
        refuse_calls(&[refused::SETGROUPS], libc::EDOM);
        assert_fails(master, "change its groups", Some(libc::EDOM));
    });
}

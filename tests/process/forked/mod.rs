//! Tests of children that the application forks, for example to serve each connection in a child.
//!
//! The children have copies of all the crate's handles, and must not affect the process that
//! created the handles.

mod callbacks;
mod master_handles;
mod per_connection;
mod worker_handles;

use std::cell::Cell;
use std::os::fd::AsFd;

use cluster::Error;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use crate::harness::Scenario;

/// The scenarios of all modules.
pub const SCENARIOS: &[&[Scenario]] = &[
    callbacks::SCENARIOS,
    master_handles::SCENARIOS,
    per_connection::SCENARIOS,
    worker_handles::SCENARIOS,
];

fn fork() -> ForkResult {
    #[allow(unsafe_code)]
    // SAFETY: the parent has one thread, so no other thread can hold a lock that the child needs.
    unsafe { nix::unistd::fork() }.unwrap()
}

/// Runs `play` in a child and asserts that the child succeeds. The child calls `exit`, so that exit
/// handlers run.
fn in_child(play: impl FnOnce()) {
    match fork() {
        ForkResult::Child => {
            play();
            std::process::exit(0);
        }
        ForkResult::Parent { child } => expect_success(child),
    }
}

#[track_caller]
fn expect_success(child: Pid) {
    assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
}

/// Returns whether the loop has nothing to process, that is, whether its poller reports no ready
/// descriptor.
fn is_idle(poller: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(poller.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 0
}

#[track_caller]
fn expect_foreign<T, E: Into<Error>>(result: std::result::Result<T, E>) {
    match result.map_err(Into::into) {
        Err(Error::ForeignProcess) => {}
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("the call succeeded"),
    }
}

/// A list of names and functions. Each function uses the handles in a child.
type Uses<H> = [(&'static str, fn(&H))];

fn count(counter: &Cell<u32>) {
    counter.set(counter.get() + 1);
}

//! Tests a worker that forks a child for each connection.

use std::cell::Cell;
use std::io::Write as _;
use std::rc::Rc;

use cluster::{Role, SchedulingPolicy};
use nix::unistd::ForkResult;

use super::{expect_success, fork};
use crate::harness::{in_background, talk, when_listening};

crate::scenarios! {
    child_per_connection_leaves_its_worker_alone_rr
    child_per_connection_leaves_its_worker_alone_none
    child_per_connection_leaves_its_worker_alone_sharded
}

/// Connects clients one after another. The worker forks a child for each client, and the child
/// answers the client and returns from `main`.
fn child_per_connection(policy: SchedulingPolicy) {
    const CLIENTS: usize = 5;
    let served = Rc::new(Cell::new(0));
    let counted = Rc::clone(&served);
    match cluster::init().unwrap() {
        Role::Master(master) => {
            master.set_scheduling_policy(policy).unwrap();
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(|_, worker, status| {
                assert!(status.success(), "{status}");
                assert_eq!(worker.exited_after_disconnect(), Some(true));
            });
            when_listening(&master, 1, move |master, address| {
                let ask = move || [(); CLIENTS].map(|()| talk(address, b"").unwrap());
                in_background(master, ask, move |master, answers| {
                    assert_eq!(answers, ["served"; CLIENTS]);
                    counted.set(answers.len());
                    master.disconnect();
                });
            });
            master.fork().unwrap();
            master.run().unwrap();
            assert_eq!(served.get(), CLIENTS);
        }
        Role::Worker(worker) => {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                match fork() {
                    ForkResult::Child => return connection.write_all(b"served").unwrap(),
                    ForkResult::Parent { child } => expect_success(child),
                }
            }
        }
    }
}

fn child_per_connection_leaves_its_worker_alone_rr() {
    child_per_connection(SchedulingPolicy::RoundRobin);
}

fn child_per_connection_leaves_its_worker_alone_none() {
    child_per_connection(SchedulingPolicy::Shared);
}

fn child_per_connection_leaves_its_worker_alone_sharded() {
    child_per_connection(SchedulingPolicy::Sharded);
}

//! Tests with workers that never read their channel, close it, or stop themselves.

use std::os::fd::AsRawFd as _;

use cluster::{Error, Master, SendError, WorkerProcess};

use super::attacker::{
    Attacker, OTHER_INDEX, OWN_INDEX, RELEASE, SHARED_INDEX, handle_frame, listen,
};
use super::{
    BYTES_IN, BYTES_OUT, Case, FDS_OUT, FDS_PER_LISTENER, FDS_PER_WORKER, FDS_WITH_TWO_LISTENERS,
    LISTENERS, Outcome, attack_beside_honest_worker,
};

crate::scenarios! {
    worker_that_never_reads_uses_bounded_memory
    worker_that_requests_and_never_reads_is_disconnected
    worker_that_binds_and_never_reads_is_disconnected
    worker_that_stops_itself_does_not_delay_other_workers
    worker_that_closes_its_channel_is_disconnected
}

/// Sends messages until `send` reports that the queue is full.
fn send_until_refused(_: &Master, attacker: &WorkerProcess) {
    let refused = loop {
        if let Err(error) = attacker.send(&[0; 64 << 10]) {
            break error;
        }
    };
    let Error::Send { worker, reason, .. } = refused else {
        panic!("{refused}");
    };
    assert_eq!(
        (worker, reason),
        (Some(attacker.id()), SendError::QueueFull)
    );
}

fn worker_that_never_reads_uses_bounded_memory() {
    let case = Case::tolerated(Attacker::start_clients);
    let bytes = BYTES_IN + BYTES_OUT;
    let reply = send_until_refused;
    attack_beside_honest_worker(Case {
        bytes,
        reply,
        ..case
    });
}

fn worker_that_requests_and_never_reads_is_disconnected() {
    let attack = |attacker: &Attacker| {
        attacker.start_clients();
        for n in 0.. {
            let many: Vec<_> = (n * 1000..(n + 1) * 1000).flat_map(listen).collect();
            attacker.send(&many);
        }
    };
    // Expect "out of memory": the master has no space for more replies, and a worker that does not
    // read them breaks no rule of the protocol. The application has already filled most of the
    // outgoing queue, so few replies fit.
    let case = Case::new(attack, Outcome::Disconnected("out of memory"));
    let fds = FDS_PER_WORKER + LISTENERS * FDS_PER_LISTENER + FDS_OUT;
    let bytes = BYTES_IN + BYTES_OUT;
    let reply = send_until_refused;
    attack_beside_honest_worker(Case {
        bytes,
        fds,
        reply,
        ..case
    });
}

/// Opens and releases listeners without reading the replies.
///
/// The attacker never exceeds the limit on listeners, but the replies and their descriptors
/// accumulate in the master.
fn worker_that_binds_and_never_reads_is_disconnected() {
    let attack = |attacker: &Attacker| {
        let first = attacker.listen(OWN_INDEX).handle;
        attacker.start_clients();
        for n in 0.. {
            let one = |n| [listen(OTHER_INDEX), handle_frame(RELEASE, first + 1 + n)].concat();
            let many: Vec<_> = (n * 1000..(n + 1) * 1000).flat_map(one).collect();
            attacker.send(&many);
        }
    };
    // Once the outgoing queue is full, later requests open no listener. The next frame then
    // releases a listener that does not exist.
    let outcome = Outcome::DisconnectedTwice(
        "out of memory",
        "release of a listener that the worker does not have",
    );
    let case = Case::new(attack, outcome);
    let (bytes, fds) = (BYTES_IN + BYTES_OUT, FDS_WITH_TWO_LISTENERS + FDS_OUT);
    let reply = send_until_refused;
    attack_beside_honest_worker(Case {
        bytes,
        fds,
        reply,
        ..case
    });
}

fn worker_that_stops_itself_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::tolerated(|attacker| {
        let shared = attacker.listen(SHARED_INDEX);
        shared.idle(0);
        attacker.start_clients();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).unwrap();
    }));
}

fn worker_that_closes_its_channel_is_disconnected() {
    attack_beside_honest_worker(Case::tolerated(|attacker| {
        attacker.start_clients();
        nix::unistd::close(attacker.channel.as_raw_fd()).unwrap();
        attacker.wait_to_be_killed();
    }));
}

//! Tests that floods of frames and unfinished frames do not delay other workers.

use std::cell::Cell;
use std::rc::Rc;

use cluster::Signal;
use nix::libc;

use super::attacker::{
    ATTACKER, Attacker, DISCONNECT_REQUEST, LISTENING, OTHER_INDEX, OWN_INDEX, PAUSE, RELEASE,
    SHARED_INDEX, frame, handle_frame, idle, listen, message, online,
};
use super::{
    Case, FDS_OUT, FDS_PER_LISTENER, FDS_PER_WORKER, FDS_WITH_TWO_LISTENERS, LISTENERS, Outcome,
    attack_beside_honest_worker,
};
use crate::refused::refuse_calls;

crate::scenarios! {
    dispatch_processes_at_most_64_messages_of_a_worker
    exits_without_pidfds_do_not_lift_the_limit_of_64_messages
    flood_of_messages_does_not_delay_other_workers
    flood_of_longer_messages_does_not_delay_other_workers
    flood_of_empty_frames_does_not_delay_other_workers
    flood_of_listen_frames_does_not_delay_other_workers
    flood_of_binds_does_not_delay_other_workers
    flood_of_idle_and_pause_frames_does_not_delay_other_workers
    flood_of_listening_frames_disconnects_the_worker
    worker_that_returns_every_connection_does_not_delay_other_workers
    unfinished_frame_does_not_delay_other_workers
    unfinished_header_does_not_delay_other_workers
}

/// Number of requests that `flood_and_read` sends at once. The master disconnects a worker that
/// leaves more than 256 replies with descriptors unread.
const BATCH: u32 = 100;

/// Floods the master with requests, and discards the replies. Fewer than 256 replies are unread,
/// because the attacker sends a batch only when it has read all replies but those of the last one.
fn flood_and_read(attacker: &Attacker, next: impl Fn(u32) -> Vec<u8>) -> ! {
    let send_batch = |first: u32| {
        let batch: Vec<_> = (first..first + BATCH).flat_map(&next).collect();
        attacker.send(&batch);
    };
    send_batch(0);
    let mut first = BATCH;
    loop {
        send_batch(first);
        first += BATCH;
        for _ in 0..BATCH {
            attacker.receive_reply();
        }
        attacker.discard_descriptors();
    }
}

/// A read returns fewer messages of this length than the master processes in an iteration. The
/// master therefore reads twice, and often leaves frames pending while the channel is readable.
fn dispatch_processes_at_most_64_messages_of_a_worker() {
    count_messages_in_an_iteration(0);
}

/// Without process descriptors, the master checks all workers after SIGCHLD.
fn exits_without_pidfds_do_not_lift_the_limit_of_64_messages() {
    refuse_calls(&[libc::SYS_clone3, libc::SYS_pidfd_open], libc::ENOSYS);
    count_messages_in_an_iteration(20);
}

/// Runs a worker that floods the master until at least 20,000 messages have arrived and `others`
/// workers have exited, one after another. Checks the number of messages in each iteration.
fn count_messages_in_an_iteration(others: u32) {
    if let Some(attacker) = Attacker::of_this_process() {
        attacker.send(&online());
        attacker.flood(&message(&[b'x'; 1032]));
    }
    let master = match cluster::init().unwrap() {
        cluster::Role::Master(master) => master,
        // This worker is one of the others.
        cluster::Role::Worker(_) => std::process::exit(0),
    };
    let attacker = master.fork_with([(ATTACKER, "1")]).unwrap();
    let messages = Rc::new(Cell::new(0));
    let counter = Rc::clone(&messages);
    attacker.on_message(move |_, _, _| counter.set(counter.get() + 1));
    let left = Rc::new(Cell::new(others));
    if others > 0 {
        master.fork().unwrap();
    }
    let uncounted = Rc::clone(&left);
    master.on_exit(move |master, _, _| {
        uncounted.set(uncounted.get().saturating_sub(1));
        if uncounted.get() > 0 {
            master.fork().unwrap();
        }
    });
    let (mut total, mut most) = (0, 0);
    while total < 20_000 || left.get() > 0 {
        master.dispatch(None).unwrap();
        let count = messages.take();
        total += count;
        most = most.max(count);
    }
    attacker.process().kill(Signal::KILL);
    master.run().unwrap();
    assert!(most <= 64, "{most} messages in one iteration");
}

fn flood_of_messages_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        attacker.start_clients();
        attacker.flood(&message(&[b'x'; 100]));
    }));
}

/// Floods the master with longer messages. A read returns fewer of them than the master processes
/// in an iteration (`FRAMES_PER_ITERATION`).
fn flood_of_longer_messages_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        attacker.start_clients();
        attacker.flood(&message(&[b'x'; 1032]));
    }));
}

/// Floods with the shortest possible frames.
fn flood_of_empty_frames_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        attacker.start_clients();
        attacker.flood(&frame(DISCONNECT_REQUEST, 0, &[]));
    }));
}

fn flood_of_listen_frames_does_not_delay_other_workers() {
    let case = Case::flood(|attacker| {
        attacker.start_clients();
        flood_and_read(attacker, listen);
    });
    let fds = FDS_PER_WORKER + LISTENERS * FDS_PER_LISTENER;
    attack_beside_honest_worker(Case { fds, ..case });
}

/// Opens and releases listeners repeatedly, and therefore never exceeds the limit on listeners.
fn flood_of_binds_does_not_delay_other_workers() {
    let case = Case::flood(|attacker| {
        // Calculate the handles of later listeners: the master assigns handles in sequence, and no
        // other worker opens listeners now.
        let first = attacker.listen(OWN_INDEX).handle;
        attacker.start_clients();
        flood_and_read(attacker, |n| {
            [listen(OTHER_INDEX), handle_frame(RELEASE, first + 1 + n)].concat()
        });
    });
    let fds = FDS_WITH_TWO_LISTENERS + FDS_OUT;
    attack_beside_honest_worker(Case { fds, ..case });
}

/// Makes the master dispatch and reclaim one connection repeatedly.
fn flood_of_idle_and_pause_frames_does_not_delay_other_workers() {
    let case = Case::flood(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(1);
        attacker.start_clients();
        attacker.flood(&[idle(own.handle, 0), handle_frame(PAUSE, own.handle)].concat());
    });
    let fds = FDS_PER_WORKER + FDS_PER_LISTENER + 1;
    attack_beside_honest_worker(Case { fds, ..case });
}

fn flood_of_listening_frames_disconnects_the_worker() {
    let attack = |attacker: &Attacker| {
        let own = attacker.listen(OWN_INDEX);
        attacker.start_clients();
        attacker.flood(&handle_frame(LISTENING, own.handle));
    };
    let why = Outcome::Disconnected("second report that the worker is listening");
    attack_beside_honest_worker(Case::new(attack, why));
}

/// Shares the well-behaved worker's listener, and returns each connection that the master
/// dispatches to the attacker.
fn worker_that_returns_every_connection_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        let shared = attacker.listen(SHARED_INDEX);
        attacker.start_clients();
        attacker.flood(&[idle(shared.handle, 0), handle_frame(PAUSE, shared.handle)].concat());
    }));
}

/// Sends a frame that lacks one byte. The last 64 KiB are sent one byte at a time.
fn unfinished_frame_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        attacker.start_clients();
        let long = message(&[0; 1 << 20]);
        let (most, rest) = long.split_at(long.len() - (64 << 10));
        attacker.send(most);
        for byte in &rest[1..] {
            attacker.send(&[*byte]);
        }
    }));
}

fn unfinished_header_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::tolerated(|attacker| {
        attacker.start_clients();
        attacker.send(&online()[..4]);
    }));
}

//! Tests with workers that misuse their queue of connections or report false counts.

use std::os::fd::AsRawFd as _;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, shutdown};

use super::attacker::{Attacker, Listener, OWN_INDEX, SHARED_INDEX, idle};
use super::{
    Case, FDS_PER_LISTENER, FDS_PER_WORKER, FDS_WITH_TWO_LISTENERS, Outcome, WINDOW,
    attack_beside_honest_worker,
};

crate::scenarios! {
    absurd_receive_count_disconnects_the_worker
    worker_that_receives_nothing_gets_at_most_its_window
    worker_that_receives_nothing_does_not_delay_other_workers
    worker_that_overstates_its_count_queues_at_most_64_connections
    worker_that_overstates_its_count_and_pauses_does_not_delay_other_workers
    worker_that_never_answers_clients_does_not_delay_other_workers
    worker_that_shuts_down_its_queue_does_not_delay_other_workers
    worker_that_closes_its_queue_does_not_delay_other_workers
    blocking_queue_does_not_block_the_master
    queue_with_a_socket_filter_does_not_confuse_the_master
    queue_that_adds_pidfds_leaks_none_in_the_master
}

/// Maximum number of connections in a queue if the worker overstates how many it has received. The
/// queue's send buffer then limits the number (`SEND_BUFFER` in `src/sys/queue.rs`).
const QUEUED_MAX: usize = 64;

fn absurd_receive_count_disconnects_the_worker() {
    let attack = |attacker: &Attacker| {
        let own = attacker.listen(OWN_INDEX);
        attacker.start_clients();
        own.idle(1 << 40);
    };
    let why = Outcome::Disconnected("more connections received than were dispatched");
    attack_beside_honest_worker(Case::new(attack, why));
}

fn worker_that_receives_nothing_gets_at_most_its_window() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(3 * WINDOW);
        for _ in 0..10 {
            own.idle(0);
            // The master accepts the first connection after it has processed the report.
            own.wait();
            own.wait_for_the_master();
            assert_eq!(own.queued(), 1);
        }
        assert!(own.receive().is_some());
        own.idle(1);
        own.wait();
        own.wait_for_the_master();
        assert!((1..=2).contains(&own.queued()), "{}", own.queued());
        attacker.start_clients();
        attacker.wait_to_be_killed();
    });
    let fds = FDS_WITH_TWO_LISTENERS;
    attack_beside_honest_worker(Case { fds, ..case });
}

fn worker_that_receives_nothing_does_not_delay_other_workers() {
    let case = Case::tolerated(|attacker| {
        let shared = attacker.listen(SHARED_INDEX);
        shared.idle(0);
        attacker.start_clients();
        attacker.wait_to_be_killed();
    });
    attack_beside_honest_worker(case);
}

/// Reports queued connections as received, repeatedly. Returns how many connections are then in the
/// queue.
fn overstate(own: &Listener<'_>) -> usize {
    for _ in 0..50 {
        own.idle(own.queued() as u64);
        own.wait_for_the_master();
    }
    own.queued()
}

fn worker_that_overstates_its_count_queues_at_most_64_connections() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(3 * QUEUED_MAX);
        let queued = overstate(&own);
        assert!((WINDOW + 1..=QUEUED_MAX).contains(&queued), "{queued}");
        attacker.start_clients();
        loop {
            overstate(&own);
        }
    });
    // The master holds up to one window of connections that do not fit in the queue.
    let fds = FDS_WITH_TWO_LISTENERS + WINDOW;
    attack_beside_honest_worker(Case { fds, ..case });
}

/// Checks that the master reclaims queued connections even if the attacker has reported them as
/// received.
fn worker_that_overstates_its_count_and_pauses_does_not_delay_other_workers() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(3 * QUEUED_MAX);
        for _ in 0..3 {
            assert!(overstate(&own) > 0);
            own.pause();
            own.wait_for_the_master();
            assert_eq!(own.queued(), 0);
            own.idle(0);
            own.wait();
        }
        attacker.start_clients();
        attacker.wait_to_be_killed();
    });
    let fds = FDS_WITH_TWO_LISTENERS + QUEUED_MAX + WINDOW;
    attack_beside_honest_worker(Case { fds, ..case });
}

fn worker_that_never_answers_clients_does_not_delay_other_workers() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(3 * WINDOW);
        attacker.start_clients();
        own.idle(0);
        let mut received = Vec::new();
        loop {
            own.wait();
            received.extend(std::iter::from_fn(|| own.receive()));
            own.idle(received.len() as u64);
        }
    });
    let fds = FDS_PER_WORKER + FDS_PER_LISTENER + WINDOW;
    attack_beside_honest_worker(Case { fds, ..case });
}

/// Requests connections repeatedly, although the master cannot dispatch any to the attacker.
fn worker_that_shuts_down_its_queue_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        let shared = attacker.listen(SHARED_INDEX);
        shutdown(shared.queue.as_raw_fd(), Shutdown::Both).unwrap();
        attacker.start_clients();
        attacker.flood(&idle(shared.handle, 0));
    }));
}

fn worker_that_closes_its_queue_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::tolerated(|attacker| {
        let shared = attacker.listen(SHARED_INDEX);
        shared.idle(0);
        drop(shared.queue);
        attacker.start_clients();
        attacker.wait_to_be_killed();
    }));
}

/// Makes the queue's receiving end blocking. The master also reads from this end to reclaim
/// connections, and shares its file status flags.
fn blocking_queue_does_not_block_the_master() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        fcntl(&own.queue, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        attacker.start_clients();
        own.pause();
        attacker.wait_to_be_killed();
    });
    attack_beside_honest_worker(case);
}

/// Sets a socket option on a queue's receiving end, which the master shares. Ignores an error,
/// because not every system permits the option.
fn set_option<T>(own: &Listener<'_>, option: nix::libc::c_int, value: &T) {
    let size = nix::libc::socklen_t::try_from(size_of::<T>()).unwrap();
    let (queue, value) = (own.queue.as_raw_fd(), std::ptr::from_ref(value).cast());
    #[allow(unsafe_code)]
    // SAFETY: `value` points to a `T` that is valid for reads of `size` bytes during the call.
    let set = unsafe { nix::libc::setsockopt(queue, nix::libc::SOL_SOCKET, option, value, size) };
    println!("option {option}: {set}");
}

/// Requests 100 connections, one after another. Pauses after each, so that the master reclaims
/// the connection. Then starts the clients and waits to be killed.
fn pause_repeatedly(own: &Listener<'_>) -> ! {
    for _ in 0..100 {
        own.idle(0);
        own.wait();
        own.pause();
        own.wait_for_the_master();
        assert_eq!(own.queued(), 0);
    }
    own.attacker.start_clients();
    own.attacker.wait_to_be_killed();
}

/// Attaches a socket filter that truncates each message to one byte. The master also reads from
/// this queue, to reclaim connections.
fn queue_with_a_socket_filter_does_not_confuse_the_master() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(WINDOW);
        let mut filter = nix::libc::sock_filter {
            code: 6, // BPF_RET returns the number of bytes to keep.
            jt: 0,
            jf: 0,
            k: 1,
        };
        let program = nix::libc::sock_fprog {
            len: 1,
            filter: &raw mut filter,
        };
        set_option(&own, nix::libc::SO_ATTACH_FILTER, &program);
        pause_repeatedly(&own);
    });
    let fds = FDS_WITH_TWO_LISTENERS + WINDOW;
    attack_beside_honest_worker(Case { fds, ..case });
}

/// Makes the kernel add the sender's pidfd to each message (`SO_PASSPIDFD`). The master also
/// receives the pidfds when it reclaims connections, and must close them.
fn queue_that_adds_pidfds_leaks_none_in_the_master() {
    const SO_PASSPIDFD: nix::libc::c_int = 76;
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(1);
        set_option(&own, SO_PASSPIDFD, &1i32);
        pause_repeatedly(&own);
    });
    let fds = FDS_WITH_TWO_LISTENERS + 1;
    attack_beside_honest_worker(Case { fds, ..case });
}

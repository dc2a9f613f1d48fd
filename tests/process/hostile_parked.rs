//! Tests with hostile workers that park connections, and with hostile clients of parked
//! connections.
//!
//! After each attack, the master still serves, has closed the attacker's descriptors and does not
//! spin, and the idle connections of the other workers are open.

mod attacks;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use cluster::{
    Connection, Master, MasterListener, SchedulingPolicy, Signal, Worker, WorkerProcess,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socket};

use crate::harness::{
    Log, answer_pings, cluster, in_background, when, when_all_wait, when_listening,
};
use crate::hostile::attacker::{ATTACKER, Attacker, SHARED_INDEX, message, online};
use crate::hostile::measurements::{count_fds, cpu_time, thread_cpu_time};
use crate::hostile::{FDS_IN, note_attacker_events};
use crate::parked::Client;
use crate::passing;
use attacks::Outcome::{Ignored, Killed};
use attacks::{Attack, Play, attacks, park};

crate::scenarios! {
    worker_that_parks_nonsense_harms_no_connection_rr
    worker_that_parks_nonsense_harms_no_connection_none
    worker_that_parks_too_much_is_bounded_rr
    worker_that_parks_too_much_is_bounded_none
    worker_that_parks_without_free_descriptors_is_bounded
    worker_that_floods_parked_connections_starves_no_client_rr
    worker_that_floods_parked_connections_starves_no_client_none
    master_that_passes_nonsense_is_bounded
    master_that_passes_without_end_is_bounded
    urgent_data_of_a_parked_client_does_not_spin_rr
    urgent_data_of_a_parked_client_does_not_spin_none





}

/// Number of clients whose connections are idle during the attacks.
const IDLE: u64 = 6;
const HONEST: usize = 2;
/// Maximum number of descriptors that an attack may open in the master at once: those of the
/// worker and of its queue, and some parked connections.
const FDS_MAX: usize = 40;
/// The time for which the test measures CPU time.
const QUIET: Duration = Duration::from_millis(100);
/// Maximum CPU time of a master and its workers that have nothing to do for [`QUIET`]. A process
/// that spins uses all of that time.
const QUIET_CPU_MAX: Duration = Duration::from_millis(25);

/// Request after whose answer the worker parks the connection.
const REQUEST: u8 = b'p';
/// Request after whose first answer the worker keeps the connection until the next request.
const HOLD: u8 = b'h';

fn serve(worker: Worker) {
    answer_pings(&worker);
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        answer(&worker, connection.unwrap());
    }
}

/// Answers requests of one byte, and parks the connection after the first one that is not [`HOLD`].
fn answer(worker: &Worker, mut connection: Connection) {
    let line = format!("{} {}\n", worker.id(), connection.requests());
    let mut request = [0];
    loop {
        if !matches!(connection.read(&mut request), Ok(1)) {
            return;
        }
        if connection.write_all(line.as_bytes()).is_err() {
            return;
        }
        if request[0] != HOLD {
            return connection.park();
        }
    }
}

/// The clients of the well-behaved workers.
struct Clients {
    address: SocketAddr,
    /// A client whose connection a worker holds during the attacks. The other policies have none,
    /// because its worker's idle clients would wait.
    held: Option<Client>,
    idle: Vec<Client>,
    /// Number of requests of each client.
    requests: u64,
}

impl Clients {
    fn connect(address: SocketAddr, policy: SchedulingPolicy) -> Self {
        let is_held = policy == SchedulingPolicy::RoundRobin;
        // The first connection that a worker parks gets the number 0 in the master.
        let held = is_held.then(|| {
            let mut client = Client::connect(address);
            assert_eq!(client.ask(REQUEST).1, 1);
            assert_eq!(client.ask(HOLD).1, 2);
            client
        });
        let connect = |_| {
            let mut client = Client::connect(address);
            assert_eq!(client.ask(REQUEST).1, 1);
            assert_eq!(client.ask(REQUEST).1, 2);
            client
        };
        Self {
            address,
            held,
            idle: (0..IDLE).map(connect).collect(),
            requests: 2,
        }
    }

    /// Sends a request from each client and from a new one. Panics if a connection was closed.
    fn ask(&mut self) {
        if let Some(held) = &mut self.held {
            // The worker has answered this request with the number of the previous one.
            assert_eq!(held.ask(REQUEST).1, self.requests);
            assert_eq!(held.ask(HOLD).1, self.requests + 1);
        }
        self.requests += 1;
        for client in &mut self.idle {
            assert_eq!(client.ask(REQUEST).1, self.requests);
        }
        assert_eq!(Client::connect(self.address).ask(REQUEST).1, 1);
    }

    /// Returns how many connections the master counts as in flight.
    fn in_flight(&self) -> u64 {
        self.held.as_ref().map_or(0, |_| self.idle.len() as u64)
    }
}

fn fork_honest_workers(master: &Master, then: impl FnOnce(&Master, SocketAddr) + 'static) {
    when_listening(master, HONEST, then);
    for _ in 0..HONEST {
        let honest = master.fork().unwrap();
        honest.on_error(|_, _, error| panic!("{error}"));
        honest.on_exit(|_, _, status| assert!(status.success()));
    }
}

/// Returns the number of open descriptors of the master and of its workers.
fn count_all_fds(master: &Master) -> usize {
    let count = |worker: &WorkerProcess| {
        let fds = format!("/proc/{}/fd", worker.process().id());
        std::fs::read_dir(fds).unwrap().count()
    };
    master.workers().iter().map(count).sum::<usize>() + count_fds()
}

fn worker_that_parks_nonsense_harms_no_connection_rr() {
    play_attacks(SchedulingPolicy::RoundRobin);
}

fn worker_that_parks_nonsense_harms_no_connection_none() {
    play_attacks(SchedulingPolicy::Shared);
}

fn play_attacks(policy: SchedulingPolicy) {
    if let Some(attacker) = Attacker::of_this_process() {
        let which: usize = std::env::var(ATTACKER).unwrap().parse().unwrap();
        attacker.send(&online());
        let shared = attacker.listen(SHARED_INDEX);
        let _open = (attacks()[which].play)(&attacker, &shared);
        attacker.send(&message(b"done"));
        attacker.wait_to_be_killed();
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            fork_honest_workers(master, move |master, address| {
                // Only a worker that has waited in `accept` has opened all its descriptors.
                when_all_wait(master, move |master| {
                    let connect = move || Clients::connect(address, policy);
                    in_background(master, connect, move |master, clients| {
                        next_attack(master, clients, 0, log);
                    });
                });
            });
        },
        serve,
    );
    let expected = |attack: &Attack| match attack.outcome {
        Killed(why) => vec![attack.name, why, "disconnect", "killed"],
        Ignored => vec![attack.name, "disconnect", "killed"],
    };
    let expected: Vec<_> = attacks().iter().flat_map(expected).collect();
    assert_eq!(entries.take(), expected);
}

/// Starts the attacker with this number. After its end, checks the connections and continues with
/// the next attacker.
fn next_attack(master: &Master, clients: Clients, which: usize, log: Log) {
    let Some(&attack) = attacks().get(which) else {
        drop(clients);
        return master.disconnect();
    };
    println!("{}", attack.name);
    log.add(attack.name);
    let (fds, all_fds) = (count_fds(), count_all_fds(master));
    let attacker = master.fork_with([(ATTACKER, which.to_string())]).unwrap();
    note_attacker_events(&attacker, &log);
    let bound = master.set_interval(Duration::from_millis(1), move |_| {
        assert!(count_fds() <= fds + FDS_MAX, "{}: descriptors", attack.name);
    });
    attacker.on_message(move |master, attacker, _| {
        master.clear_timer(bound);
        let attacker = attacker.clone();
        when_quiet(master, attack.name, move |_| {
            attacker.process().kill(Signal::KILL);
        });
    });
    let mut rest = Some((clients, log));
    attacker.on_exit(move |master, _, _| {
        master.clear_timer(bound);
        let (mut clients, log) = rest.take().unwrap();
        let ask = move || {
            clients.ask();
            clients
        };
        in_background(master, ask, move |master, clients| {
            // If several workers hold copies of one connection, only one of them is notified when
            // the peer hangs up. A message makes the others check, too.
            let workers = master.workers();
            workers
                .iter()
                .for_each(|worker| drop(worker.send(b"check")));
            let in_flight = clients.in_flight();
            let is_clean = move |master: &Master| {
                count_all_fds(master) <= all_fds && master.ledger().in_flight() == in_flight
            };
            when(master, is_clean, move |master| {
                when_quiet(master, attack.name, move |master| {
                    next_attack(master, clients, which + 1, log);
                });
            });
        });
    });
}

/// Checks that neither the master nor a worker spins, and then calls `then`.
///
/// No timer may count descriptors in the meantime, because in an emulator this work alone takes too
/// much CPU time.
fn when_quiet(master: &Master, name: &'static str, then: impl FnOnce(&Master) + 'static) {
    let workers = master.workers();
    let used = move || {
        let ids = workers.iter().map(|worker| worker.process().id());
        thread_cpu_time() + ids.map(cpu_time).sum::<Duration>()
    };
    let before = used();
    let mut then = Some(then);
    master.set_timeout(QUIET, move |master| {
        let used = used() - before;
        assert!(used < QUIET_CPU_MAX, "{name}: {used:?} of {QUIET:?}");
        then.take().unwrap()(master);
    });
}

fn worker_that_parks_too_much_is_bounded_rr() {
    play_flood(SchedulingPolicy::RoundRobin, PARKS);
}

fn worker_that_parks_too_much_is_bounded_none() {
    play_flood(SchedulingPolicy::Shared, PARKS);
}

fn worker_that_parks_without_free_descriptors_is_bounded() {
    let free = Some(30);
    play_flood(SchedulingPolicy::RoundRobin, Flood { free, ..PARKS });
}

fn worker_that_floods_parked_connections_starves_no_client_rr() {
    play_flood(SchedulingPolicy::RoundRobin, REQUESTS);
}

fn worker_that_floods_parked_connections_starves_no_client_none() {
    play_flood(SchedulingPolicy::Shared, REQUESTS);
}

#[derive(Clone, Copy)]
struct Flood {
    /// Returns the descriptors that stay open until the attacker is killed.
    play: Play,
    /// The number of free descriptors in the master, if the test limits it.
    free: Option<u64>,
    /// Whether the flood continues until the attacker is killed.
    is_continuous: bool,
}

/// Parks copies of one connection without waiting.
const PARKS: Flood = Flood {
    play: |attacker, shared| {
        let (here, there) = UnixStream::pair().unwrap();
        for _ in 0..5000 {
            park(attacker, shared, &here);
        }
        vec![there.into()]
    },
    free: None,
    is_continuous: false,
};

/// Parks connections, and sends requests on them without a pause.
const REQUESTS: Flood = Flood {
    play: |attacker, shared| {
        for _ in 0..20 {
            let (here, there) = UnixStream::pair().unwrap();
            park(attacker, shared, &here);
            let answers = there.try_clone().unwrap();
            std::thread::spawn(move || std::io::copy(&mut &answers, &mut std::io::sink()));
            std::thread::spawn(move || while (&there).write_all(&[REQUEST; 100]).is_ok() {});
        }
        vec![]
    },
    free: None,
    is_continuous: true,
};

/// Maximum number of connections that the master holds during a flood.
const PARKED_MAX: usize = 50;
/// Maximum number of connections that wait in the master until a well-behaved worker reads its
/// channel (`MAX_BATCH` in `src/wire/frame`).
const UNREAD_MAX: usize = 64;
/// Maximum number of descriptors that a flood may open in the master at once.
const FLOOD_FDS_MAX: usize = PARKED_MAX + HONEST * UNREAD_MAX + FDS_IN + FDS_MAX;

/// Lets an attacker flood the master, and then connects clients.
///
/// The attacker's connections may displace idle ones, as the connections of a client may. So no
/// client stays idle here.
fn play_flood(policy: SchedulingPolicy, flood: Flood) {
    if let Some(attacker) = Attacker::of_this_process() {
        attacker.send(&online());
        let shared = attacker.listen(SHARED_INDEX);
        let _open = (flood.play)(&attacker, &shared);
        attacker.send(&message(b"done"));
        attacker.wait_to_be_killed();
    }
    cluster(
        move |master| {
            master.set_scheduling_policy(policy).unwrap();
            master.set_max_parked(PARKED_MAX);
            master.on_error(move |_, _, error| {
                let text = error.to_string();
                let is_shortage = ["descriptor", "Too many open files"];
                let is_shortage = is_shortage.iter().any(|what| text.contains(what));
                assert!(flood.free.is_some() && is_shortage, "{text}");
            });
            fork_honest_workers(master, move |master, address| {
                begin_flood(master, flood, address);
            });
        },
        serve,
    );
}

fn begin_flood(master: &Master, flood: Flood, address: SocketAddr) {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let attacker = master.fork_with([(ATTACKER, "0")]).unwrap();
    let fds = count_fds();
    if let Some(free) = flood.free {
        setrlimit(Resource::RLIMIT_NOFILE, fds as u64 + free, hard).unwrap();
    }
    let bound = master.set_interval(Duration::from_millis(1), move |_| {
        // Without a free descriptor, the descriptors cannot be counted.
        let is_bounded = flood.free.is_some() || count_fds() <= fds + FLOOD_FDS_MAX;
        assert!(is_bounded, "descriptors");
    });
    attacker.on_message(move |master, attacker, _| {
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        let attacker = attacker.clone();
        let ask = move || {
            for _ in 0..5 {
                assert_eq!(Client::connect(address).ask(REQUEST).1, 1);
            }
        };
        in_background(master, ask, move |master, ()| {
            let kill = move |_: &Master| attacker.process().kill(Signal::KILL);
            match flood.is_continuous {
                true => kill(master),
                false => {
                    master.clear_timer(bound);
                    when_quiet(master, "flood", kill);
                }
            }
        });
    });
    attacker.on_exit(move |master, _, _| {
        let is_empty = |master: &Master| master.ledger().in_flight() == 0;
        when(master, is_empty, move |master| {
            master.clear_timer(bound);
            master.disconnect();
        });
    });
}

/// Returns descriptors that no listener has accepted, each with whether its hang-up closes it.
fn nonsense() -> Vec<(OwnedFd, bool)> {
    let new = |family, kind| socket(family, kind, SockFlag::empty(), None).unwrap();
    let (inet, unix) = (AddressFamily::Inet, AddressFamily::Unix);
    vec![
        (nix::unistd::pipe().unwrap().0, false),
        (File::open("/proc/self/exe").unwrap().into(), false),
        (TcpListener::bind("127.0.0.1:0").unwrap().into(), false),
        (new(inet, SockType::Datagram), false),
        (new(unix, SockType::Datagram), false),
        (new(unix, SockType::SeqPacket), false),
        (new(inet, SockType::Stream), true),
        (new(unix, SockType::Stream), true),
        (UnixStream::pair().unwrap().0.into(), true),
    ]
}

/// Connects a client to the listener in the name of a predecessor, and returns the client's end and
/// the predecessor's end of the stream that passes connections.
fn pass_one(master: &Master, listener: &MasterListener) -> (TcpStream, UnixStream) {
    let address: SocketAddr = listener.address().to_string().parse().unwrap();
    let client = TcpStream::connect(address).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    master.receive_parked(ours, |_| {}).unwrap();
    let bytes = passing::message(passing::VERSION, 1, &listener.as_fd(), &[1]);
    // The master cannot tell the client's end from the end that a listener has accepted.
    passing::send(&theirs, &bytes, &[client.as_raw_fd()]);
    (client, theirs)
}

/// Passes each descriptor in its own message, and all of them in one message.
fn master_that_passes_nonsense_is_bounded() {
    cluster(
        |master| {
            let listener = master.listen("127.0.0.1:0").unwrap();
            let fds = count_fds();
            let (client, theirs) = pass_one(master, &listener);
            let (mut closed, mut hung_up) = (0, 0);
            let all = nonsense();
            let one = passing::message(passing::VERSION, 1, &listener.as_fd(), &[1]);
            for (fd, is_stream) in &all {
                passing::send(&theirs, &one, &[fd.as_raw_fd()]);
                match is_stream {
                    true => hung_up += 2,
                    false => closed += 2,
                }
            }
            let count = u8::try_from(all.len()).unwrap();
            let parked = vec![1; all.len()];
            let together = passing::message(passing::VERSION, count, &listener.as_fd(), &parked);
            let numbers: Vec<_> = all.iter().map(|(fd, _)| fd.as_raw_fd()).collect();
            passing::send(&theirs, &together, &numbers);
            drop((all, theirs));
            let is_done = move |master: &Master| {
                let ledger = master.ledger();
                let expected = (1 + closed + hung_up, closed, hung_up);
                (ledger.parked, ledger.idle_closed, ledger.closed_by_peer) == expected
            };
            when(master, is_done, move |master| {
                assert_eq!(
                    master.ledger().in_flight(),
                    1,
                    "the first connection is held"
                );
                when_quiet(master, "nonsense", move |_| {
                    // The client's descriptor and the master's copy of it are left.
                    assert_eq!(count_fds(), fds + 2);
                    drop((client, listener));
                });
            });
        },
        |_| unreachable!("no worker"),
    );
}

/// Passes descriptors after a message that is not valid.
fn master_that_passes_without_end_is_bounded() {
    const MESSAGES: usize = 300;
    const FDS: usize = 250;
    cluster(
        |master| {
            let listener = master.listen("127.0.0.1:0").unwrap();
            let (client, theirs) = pass_one(master, &listener);
            let fds = count_fds();
            let bound = master.set_interval(Duration::from_millis(1), move |_| {
                assert!(count_fds() <= fds + FDS_MAX, "descriptors");
            });
            let flood = move || {
                let null = File::open("/dev/null").unwrap();
                for _ in 0..MESSAGES {
                    passing::send(&theirs, &[9; 300], &[null.as_raw_fd(); FDS]);
                }
            };
            in_background(master, flood, move |master, ()| {
                let lost = (MESSAGES * FDS) as u64;
                let is_done = move |master: &Master| master.ledger().idle_closed == lost;
                when(master, is_done, move |master| {
                    assert_eq!(master.ledger().parked, lost + 1);
                    master.clear_timer(bound);
                    drop((client, listener));
                });
            });
        },
        |_| unreachable!("no worker"),
    );
}

fn urgent_data_of_a_parked_client_does_not_spin_rr() {
    urgent_data_of_a_parked_client_does_not_spin(SchedulingPolicy::RoundRobin);
}

fn urgent_data_of_a_parked_client_does_not_spin_none() {
    urgent_data_of_a_parked_client_does_not_spin(SchedulingPolicy::Shared);
}

fn urgent_data_of_a_parked_client_does_not_spin(policy: SchedulingPolicy) {
    cluster(
        move |master| {
            master.set_scheduling_policy(policy).unwrap();
            fork_honest_workers(master, move |master, address| {
                let connect = move || {
                    let mut client = Client::connect(address);
                    assert_eq!(client.ask(REQUEST).1, 1);
                    let stream = client.0.get_ref().as_raw_fd();
                    send(stream, b"!", MsgFlags::MSG_OOB).unwrap();
                    client
                };
                in_background(master, connect, move |master, mut client| {
                    when_quiet(master, "urgent data", move |master| {
                        let ask = move || assert_eq!(client.ask(REQUEST).1, 2);
                        in_background(master, ask, |master, ()| master.disconnect());
                    });
                });
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            // With a callback, the worker polls its parked connections.
            listener.set_connection_callback(answer);
            worker.run().unwrap();
        },
    );
}

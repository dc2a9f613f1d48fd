//! Tests that a worker resumes the connections that it has parked.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use cluster::pool::ignore_pool_signals;
use cluster::{Connection, Interest, ListenOptions, Master, Worker};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{
    BUSY, MS, ask_in_turn, disconnect, only, serve_slowly, serve_slowly_on, serve_with_callback,
};
use crate::exhaustion::leave_free;
use crate::harness::{
    cluster, for_policies_without_dispatch, in_background, scaled, wait_for_state, wait_until,
    when_listening,
};
use crate::parked::{CLOSE, Client, PARK, TAKE, answer, serve, with_clients};

crate::scenarios! {
    parked_client_returns_to_its_worker
    blocking_worker_is_woken_by_a_parked_client
    callback_receives_connections_parked_in_the_worker
    pipelined_request_is_found_after_parking
    parked_and_new_connections_take_turns
    half_closed_client_of_a_worker_receives_its_answer
    unix_connections_can_be_parked_in_a_worker
    options_of_a_connection_parked_in_a_worker_are_reset
    blocking_worker_serves_many_requests_that_arrive_while_it_is_busy
    blocking_worker_closes_many_connections_that_end_while_it_is_busy
    blocking_worker_finds_data_that_arrived_before_a_datagram
    parked_clients_are_served_while_no_descriptor_is_free
    interrupted_reads_continue
    taken_stream_interrupts_no_accept
    resumed_connection_can_be_watched
}

fn parked_client_returns_to_its_worker() {
    let then = |master: &Master, ()| {
        let ledger = master.ledger();
        assert_eq!((ledger.parked, ledger.received), (0, 0));
        master.disconnect();
    };
    for_policies_without_dispatch(|| {
        cluster(|master| with_clients(master, 2, ask_in_turn, then), serve);
    });
}

/// Does the same as [`with_clients`] for one worker, and also passes the worker's process id. Then
/// disconnects the worker.
fn with_clients_of_a_process(
    master: &Master,
    clients: impl FnOnce(SocketAddr, u32) + Send + 'static,
) {
    when_listening(master, 1, move |master, address| {
        let worker = only(master, 1).process().id();
        in_background(master, move || clients(address, worker), disconnect);
    });
    drop(master.fork().unwrap());
}

fn blocking_worker_is_woken_by_a_parked_client() {
    let clients = |address, worker| {
        let mut client = Client::connect(address);
        for requests in 1..=20 {
            assert_eq!(client.ask(PARK), (1, requests));
            // Send the next request while the worker waits in `accept`.
            wait_for_state(worker, ") S ");
        }
    };
    for_policies_without_dispatch(|| {
        cluster(|master| with_clients_of_a_process(master, clients), serve);
    });
}

fn callback_receives_connections_parked_in_the_worker() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 2, ask_in_turn, disconnect),
            serve_with_callback,
        );
    });
}

fn pipelined_request_is_found_after_parking() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.0.get_mut().write_all(&[PARK; 10]).unwrap();
        for requests in 1..=10 {
            assert_eq!(client.line(), format!("1 {requests}"));
        }
        client.ask(PARK);
    };
    for_policies_without_dispatch(|| {
        cluster(|master| with_clients(master, 1, clients, disconnect), serve);
    });
}

/// The state of the threads of `under_load`.
#[derive(Default)]
struct Load {
    answers: AtomicUsize,
    is_over: AtomicBool,
}

impl Load {
    /// Calls `ask` until the load is over, and counts the answers.
    fn repeat(&self, mut ask: impl FnMut() -> (u32, u64)) {
        while !self.is_over.load(Ordering::SeqCst) {
            let _ = ask();
            self.answers.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Runs `load` on 8 threads until `work` has returned. Begins `work` after 8 answers.
fn under_load(address: SocketAddr, load: fn(SocketAddr, &Load), work: impl FnOnce()) {
    let state = Arc::new(Load::default());
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let state = Arc::clone(&state);
            std::thread::spawn(move || load(address, &state))
        })
        .collect();
    wait_until("8 answers", || {
        (state.answers.load(Ordering::SeqCst) >= 8).then_some(())
    });
    work();
    state.is_over.store(true, Ordering::SeqCst);
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
}

fn parked_and_new_connections_take_turns() {
    let parked = |address, load: &Load| {
        let mut client = Client::connect(address);
        load.repeat(|| client.ask(PARK));
    };
    let new = |address, load: &Load| {
        load.repeat(|| Client::connect(address).ask(CLOSE));
    };
    let clients = move |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        under_load(address, parked, || {
            for _ in 0..20 {
                Client::connect(address).ask(CLOSE);
            }
        });
        under_load(address, new, || {
            for _ in 0..20 {
                client.ask(PARK);
            }
        });
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, clients, disconnect),
            |worker| {
                for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                    // Serve slowly, so that parked and new connections always wait.
                    std::thread::sleep(MS);
                    answer(&worker, connection.unwrap());
                }
            },
        );
    });
}

fn half_closed_client_of_a_worker_receives_its_answer() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        client.send(PARK);
        client.0.get_ref().shutdown(Shutdown::Write).unwrap();
        assert!(client.line().ends_with(" 2"));
        // The worker parks the connection, and finds the end-of-file.
        assert_eq!(client.line(), "", "end-of-file");
    };
    for_policies_without_dispatch(|| {
        cluster(|master| with_clients(master, 1, clients, disconnect), serve);
    });
}

fn unix_connections_can_be_parked_in_a_worker() {
    for_policies_without_dispatch(|| {
        let path = std::env::temp_dir().join("parked");
        let bound = path.clone();
        cluster(
            |master| {
                master.on_listening(move |master, _, _| {
                    let path = bound.clone();
                    let ask = move || {
                        let mut client = std::os::unix::net::UnixStream::connect(path).unwrap();
                        for _ in 0..5 {
                            client.write_all(b"x").unwrap();
                            client.read_exact(&mut [0]).unwrap();
                        }
                    };
                    in_background(master, ask, disconnect);
                });
                drop(master.fork().unwrap());
            },
            |worker| {
                for connection in worker.listen(path.as_path()).unwrap().incoming() {
                    let mut connection = connection.unwrap();
                    if let Ok(1) = connection.read(&mut [0]) {
                        connection.write_all(b"y").unwrap();
                        connection.park();
                    }
                }
            },
        );
    });
}

fn flags(connection: &impl std::os::fd::AsFd) -> OFlag {
    OFlag::from_bits_retain(fcntl(connection.as_fd(), FcntlArg::F_GETFL).unwrap())
}

fn options_of_a_connection_parked_in_a_worker_are_reset() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        client.ask(PARK);
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, clients, disconnect),
            |worker| {
                for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                    let mut connection = connection.unwrap();
                    assert_eq!(connection.read_timeout().unwrap(), None);
                    assert!(!flags(&connection).contains(OFlag::O_NONBLOCK));
                    let timeout = Some(scaled(Duration::from_secs(50)));
                    connection.set_read_timeout(timeout).unwrap();
                    if connection.read_exact(&mut [0]).is_ok() {
                        let line = format!("{} {}\n", worker.id(), connection.requests());
                        connection.write_all(line.as_bytes()).unwrap();
                        connection.set_nonblocking(true).unwrap();
                        connection.park();
                    }
                }
            },
        );
    });
}

/// Parks the connections of `count` clients, makes the worker busy, calls `use_clients`, and then
/// lets the worker go on.
fn beside_busy_worker<T>(
    address: SocketAddr,
    count: usize,
    use_clients: impl FnOnce(Vec<Client>) -> T,
) -> T {
    let clients = (0..count).map(|_| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        client
    });
    let clients = clients.collect();
    let mut slow = Client::connect(address);
    slow.send(BUSY);
    let result = use_clients(clients);
    slow.ask(CLOSE);
    result
}

/// More connections than the poller reports at once.
const MANY: usize = 100;

fn blocking_worker_serves_many_requests_that_arrive_while_it_is_busy() {
    let clients = |address| {
        let mut clients = beside_busy_worker(address, MANY, |mut clients| {
            // The worker parks no connection afterwards, so nothing makes it check the poller again.
            clients.iter_mut().for_each(|client| client.send(CLOSE));
            clients
        });
        for client in &mut clients {
            assert_eq!(client.line(), "1 2");
        }
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, clients, disconnect),
            serve_slowly,
        );
    });
}

fn blocking_worker_closes_many_connections_that_end_while_it_is_busy() {
    let clients = |address, worker: u32| {
        let count_open = || {
            let open = std::fs::read_dir(format!("/proc/{worker}/fd")).unwrap();
            open.count()
        };
        let before = beside_busy_worker(address, MANY, |clients| {
            let before = count_open();
            drop(clients);
            before
        });
        wait_until("closed connections", || {
            (count_open() < before - MANY + 2).then_some(())
        });
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients_of_a_process(master, clients),
            |worker| {
                let options = ListenOptions::from("127.0.0.1:0");
                // The worker's alarm would also make it check the poller.
                serve_slowly_on(&worker, options.idle_timeout(Duration::from_secs(3600)));
            },
        );
    });
}

/// Checks that a call for another listener does not use up the check for data that has arrived before
/// a connection was parked.
fn blocking_worker_finds_data_that_arrived_before_a_datagram() {
    const ADDRESS: &str = "ADDRESS";
    let clients = |server, socket: SocketAddr| {
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut client = Client::connect(server);
        client.0.get_mut().write_all(&[PARK; 2]).unwrap();
        // The worker receives one datagram before each connection.
        for _ in 0..3 {
            datagrams.send_to(b"x", socket).unwrap();
        }
        assert_eq!([client.line(), client.line()], ["1 1", "1 2"]);
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| {
                let free = UdpSocket::bind("127.0.0.1:0").unwrap();
                let socket = free.local_addr().unwrap();
                // The worker first listens on its datagram socket.
                when_listening(master, 2, move |master, server| {
                    in_background(master, move || clients(server, socket), disconnect);
                });
                let env = [(ADDRESS, socket.to_string())];
                drop((free, master.fork_with(env).unwrap()));
            },
            |worker| {
                let address = std::env::var(ADDRESS).unwrap();
                let socket = worker.bind(address.as_str()).unwrap();
                let listener = worker.listen("127.0.0.1:0").unwrap();
                while socket.recv_from(&mut [0]).unwrap().is_some() {
                    let Some(connection) = listener.accept().unwrap() else {
                        break;
                    };
                    answer(&worker, connection);
                }
            },
        );
    });
}

/// Request after whose answer the worker uses up its descriptors, until a client has gone.
const EXHAUST: u8 = b'e';

fn parked_clients_are_served_while_no_descriptor_is_free() {
    let clients = |address| {
        let mut clients = [(); 4].map(|()| {
            let mut client = Client::connect(address);
            client.ask(PARK);
            client
        });
        clients[0].ask(EXHAUST);
        // This client waits in the backlog.
        let mut waiting = Client::connect(address);
        waiting.send(CLOSE);
        for _ in 0..3 {
            for client in &mut clients[1..] {
                client.ask(PARK);
            }
        }
        for client in &mut clients[1..] {
            assert_eq!(client.ask(CLOSE).1, 5);
        }
        assert_eq!(waiting.line(), "1 1");
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, clients, disconnect),
            |worker| {
                for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                    let connection = connection.unwrap();
                    let mut request = [0];
                    let exhausts = connection.peek(&mut request).is_ok() && request[0] == EXHAUST;
                    if !exhausts {
                        answer(&worker, connection);
                        continue;
                    }
                    let mut connection = connection;
                    connection.read_exact(&mut request).unwrap();
                    let line = format!("{} {}\n", worker.id(), connection.requests());
                    connection.write_all(line.as_bytes()).unwrap();
                    connection.park();
                    // The limit of this process does not matter any more.
                    let _ = leave_free(0);
                }
            },
        );
    });
}

/// Request of which the worker reads the first byte before it answers the second one.
const HALF: u8 = b'h';

/// Checks that signals and SIGCONT do not end a read with a timeout.
fn interrupted_reads_continue() {
    let clients = |address, worker: u32| {
        let mut client = Client::connect(address);
        let pid = Pid::from_raw(worker.try_into().unwrap());
        for signals in [&[Signal::SIGTERM][..], &[Signal::SIGSTOP, Signal::SIGCONT]] {
            client.send(HALF);
            assert_eq!(client.line(), "reading");
            wait_for_state(worker, ") S ");
            for signal in signals {
                kill(pid, *signal).unwrap();
            }
            // The worker reads on.
            wait_for_state(worker, ") S ");
            client.ask(PARK);
        }
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients_of_a_process(master, clients),
            |worker| {
                ignore_pool_signals(&worker).unwrap();
                for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                    let mut connection = connection.unwrap();
                    let timeout = Some(scaled(Duration::from_secs(50)));
                    connection.set_read_timeout(timeout).unwrap();
                    let mut request = [0];
                    if matches!(connection.read(&mut request), Ok(1)) && request[0] == HALF {
                        connection.write_all(b"reading\n").unwrap();
                    } else {
                        continue;
                    }
                    answer(&worker, connection);
                }
            },
        );
    });
}

fn taken_stream_interrupts_no_accept() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        assert_eq!(client.ask(TAKE).1, 2);
        assert_eq!(client.line(), "taken");
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, clients, disconnect),
            |worker| {
                for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                    let mut connection = connection.unwrap();
                    let is_parked = connection.requests() > 1;
                    assert_eq!(flags(&connection).contains(OFlag::O_ASYNC), is_parked);
                    let mut request = [0];
                    if connection.read_exact(&mut request).is_err() {
                        continue;
                    }
                    let line = format!("{} {}\n", worker.id(), connection.requests());
                    connection.write_all(line.as_bytes()).unwrap();
                    if request[0] == PARK {
                        connection.park();
                        continue;
                    }
                    let mut stream: TcpStream = connection.into_stream();
                    assert!(!flags(&stream).contains(OFlag::O_ASYNC));
                    let watched = stream.try_clone().unwrap();
                    let watch = worker.watch(watched, Interest::Readable, |_, _| None);
                    worker.unwatch(watch.unwrap());
                    stream.write_all(b"taken\n").unwrap();
                }
            },
        );
    });
}

fn resumed_connection_can_be_watched() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        // The worker watches a copy, parks the connection, and later watches the connection itself.
        for request in *b"cw" {
            client.send(request);
            assert_eq!(client.line(), "watched");
            client.send(b'x');
            assert_eq!(client.line(), "again");
        }
        assert_eq!(client.line(), "", "end-of-file");
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, clients, disconnect),
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                listener.set_connection_callback(answer_or_watch);
                worker.run().unwrap();
            },
        );
    });
}

fn answer_or_watch(worker: &Worker, mut connection: Connection) {
    let mut request = [0];
    connection.read_exact(&mut request).unwrap();
    match request[0] {
        PARK => {
            let line = format!("{} {}\n", worker.id(), connection.requests());
            connection.write_all(line.as_bytes()).unwrap();
            connection.park();
        }
        b'c' => {
            connection.write_all(b"watched\n").unwrap();
            let copy = connection.try_clone().unwrap();
            let mut connection = Some(connection);
            let again = move |_: &Worker, _: &TcpStream| {
                let mut connection = connection.take().unwrap();
                connection.read_exact(&mut [0]).unwrap();
                connection.write_all(b"again\n").unwrap();
                connection.park();
                None
            };
            worker.watch(copy, Interest::Readable, again).unwrap();
        }
        _ => {
            connection.write_all(b"watched\n").unwrap();
            let again = |_: &Worker, mut connection: &Connection| {
                connection.read_exact(&mut [0]).unwrap();
                connection.write_all(b"again\n").unwrap();
                None
            };
            worker.watch(connection, Interest::Readable, again).unwrap();
        }
    }
}

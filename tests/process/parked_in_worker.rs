//! Tests connections that a worker holds itself while they are parked: with the policies `none` and
//! `sharded`, and on private listeners.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cluster::pool::{Pool, PoolEvent};
use cluster::{
    Connection, Interest, ListenOptions, Listener, Master, Signal, Worker, WorkerProcess,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::harness::{
    cluster, for_policies_without_dispatch, in_background, open_fds, scaled, wait_for_state,
    wait_until, when_listening,
};
use crate::parked::{CLOSE, Client, PARK, TAKE, answer, serve, serve_with, with_clients};
use crate::pool::quick;

crate::scenarios! {
    parked_client_returns_to_its_worker
    blocking_worker_is_woken_by_a_parked_client
    callback_receives_connections_parked_in_the_worker
    pipelined_request_is_found_after_parking
    parked_and_new_connections_take_turns
    paused_listener_resumes_no_connection
    paused_listener_with_a_callback_resumes_no_connection
    remaining_worker_receives_parked_connections_of_a_disconnecting_one
    remaining_worker_receives_parked_connections_with_its_callback
    master_holds_parked_connections_until_a_worker_listens
    parked_connections_of_a_killed_worker_close
    idle_connections_survive_a_reload
    connection_parked_after_its_listener_closed_goes_to_another_worker
    only_worker_resumes_a_connection_of_its_closed_listener_on_its_next_one
    worker_closes_parked_clients_that_hang_up
    worker_closes_silent_clients_after_the_idle_timeout
    worker_closes_the_first_to_expire_beyond_its_maximum
    half_closed_client_of_a_worker_receives_its_answer
    unix_connections_can_be_parked_in_a_worker
    options_of_a_connection_parked_in_a_worker_are_reset
    taken_stream_interrupts_no_accept
    resumed_connection_can_be_watched
    private_connections_can_be_parked
    private_connections_can_be_parked_with_a_callback
    private_parked_connections_close_at_the_disconnect
}

const MS: Duration = Duration::from_millis(1);

fn disconnect<T>(master: &Master, _: T) {
    master.disconnect();
}

fn serve_with_callback(worker: Worker) {
    let listener = worker.listen("127.0.0.1:0").unwrap();
    listener.set_connection_callback(answer);
    worker.run().unwrap();
}

fn ask_in_turn(address: SocketAddr) {
    let mut clients: Vec<_> = (0..100).map(|_| Client::connect(address)).collect();
    let first: Vec<_> = clients.iter_mut().map(|client| client.ask(PARK)).collect();
    for requests in 2..=5 {
        for (client, (id, _)) in clients.iter_mut().zip(&first) {
            assert_eq!(client.ask(PARK), (*id, requests));
        }
    }
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
        cluster(
            |master| {
                when_listening(master, 1, move |master, address| {
                    let worker = only(master, 1).process().id();
                    in_background(master, move || clients(address, worker), disconnect);
                });
                drop(master.fork().unwrap());
            },
            serve,
        );
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

/// Request that makes the worker send a line, keep the connection for 200 ms, and then send another
/// line.
const HOLD: u8 = b'h';

fn answer_or_hold(worker: &Worker, mut connection: Connection) {
    let mut request = [0];
    match connection.read(&mut request) {
        Ok(1) if request[0] == HOLD => {
            connection.write_all(b"holding\n").unwrap();
            let held = Cell::new(Some(connection));
            worker.set_timeout(200 * MS, move |_| {
                let _ = held.take().unwrap().write_all(b"held\n");
            });
        }
        Ok(1) => {
            let line = format!("{} {}\n", worker.id(), connection.requests());
            connection.write_all(line.as_bytes()).unwrap();
            connection.park();
        }
        _ => {}
    }
}

fn hold_and_park(address: SocketAddr) {
    let mut parked = Client::connect(address);
    parked.ask(PARK);
    let mut held = Client::connect(address);
    held.send(HOLD);
    assert_eq!(held.line(), "holding");
    let start = Instant::now();
    assert_eq!(parked.ask(PARK).1, 2);
    assert!(start.elapsed() > 50 * MS, "{:?}", start.elapsed());
    assert_eq!(held.line(), "held");
}

fn listen_with_limit(worker: &Worker) -> Listener {
    let listener = worker.listen("127.0.0.1:0").unwrap();
    listener.set_max_connections(Some(1));
    listener
}

fn paused_listener_resumes_no_connection() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, hold_and_park, disconnect),
            |worker| {
                for connection in listen_with_limit(&worker).incoming() {
                    answer_or_hold(&worker, connection.unwrap());
                }
            },
        );
    });
}

fn paused_listener_with_a_callback_resumes_no_connection() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, hold_and_park, disconnect),
            |worker| {
                listen_with_limit(&worker).set_connection_callback(answer_or_hold);
                worker.run().unwrap();
            },
        );
    });
}

fn only(master: &Master, id: u32) -> WorkerProcess {
    let mut workers = master.workers().into_iter();
    workers.find(|worker| worker.id().get() == id).unwrap()
}

fn ask_all(clients: &mut [Client]) -> Vec<(u32, u64)> {
    clients.iter_mut().map(|client| client.ask(PARK)).collect()
}

/// Connects clients until each of the two workers has parked at least five connections.
fn clients_of_both(address: SocketAddr) -> Vec<(Client, u32)> {
    let mut clients = Vec::new();
    loop {
        let mut client = Client::connect(address);
        let (id, _) = client.ask(PARK);
        clients.push((client, id));
        let count = |wanted| clients.iter().filter(|(_, id)| *id == wanted).count();
        if count(1) >= 5 && count(2) >= 5 {
            return clients;
        }
    }
}

fn assert_given_to_the_remaining_worker(serve: fn(Worker)) {
    let then = |master: &Master, clients: Vec<(Client, u32)>| {
        only(master, 1).disconnect();
        let clients = Cell::new(Some(clients));
        master.on_exit_once(move |master, worker, _| {
            assert_eq!(worker.id().get(), 1);
            let mut clients = clients.take().unwrap();
            let count = clients.iter().filter(|(_, id)| *id == 1).count() as u64;
            let ask = move || {
                for (client, id) in &mut clients {
                    assert_eq!(client.ask(PARK), (2, 2), "first served by {id}");
                }
            };
            in_background(master, ask, move |master, ()| {
                let ledger = master.ledger();
                assert_eq!((ledger.parked, ledger.received), (count, count));
                master.disconnect();
            });
        });
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 2, clients_of_both, then),
            serve,
        );
    });
}

fn remaining_worker_receives_parked_connections_of_a_disconnecting_one() {
    assert_given_to_the_remaining_worker(serve);
}

fn remaining_worker_receives_parked_connections_with_its_callback() {
    assert_given_to_the_remaining_worker(serve_with_callback);
}

fn master_holds_parked_connections_until_a_worker_listens() {
    let first = |address| {
        let mut clients: Vec<_> = (0..20).map(|_| Client::connect(address)).collect();
        ask_all(&mut clients);
        clients
    };
    let then = |master: &Master, clients: Vec<Client>| {
        only(master, 1).disconnect();
        let clients = Cell::new(Some(clients));
        master.on_exit_once(move |master, _, _| {
            let mut clients = clients.take().unwrap();
            assert_eq!(master.ledger().in_flight(), 20);
            // Send a request while no worker runs. The next worker must answer it.
            clients[0].send(PARK);
            drop(master.fork().unwrap());
            let ask = move || {
                assert_eq!(clients[0].line(), "2 2");
                assert!(
                    ask_all(&mut clients[1..])
                        .iter()
                        .all(|answer| *answer == (2, 2))
                );
                clients
            };
            in_background(master, ask, |master, clients| {
                drop(clients);
                assert_eq!(master.ledger().in_flight(), 0);
                master.disconnect();
            });
        });
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| {
                let listener = master.listen("127.0.0.1:0").unwrap();
                with_clients(master, 1, first, then);
                master.on_all_disconnected_once(move |_| drop(listener));
            },
            serve,
        );
    });
}

fn parked_connections_of_a_killed_worker_close() {
    let first = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        client
    };
    let then = |master: &Master, mut client: Client| {
        only(master, 1).process().kill(Signal::KILL);
        in_background(master, move || assert_eq!(client.line(), ""), disconnect);
    };
    for_policies_without_dispatch(|| {
        cluster(|master| with_clients(master, 1, first, then), serve);
    });
}

fn idle_connections_survive_a_reload() {
    const CLIENTS: usize = 200;
    let play = || {
        let pool = |master: &Master| {
            let pool = Pool::new(master, quick());
            pool.listen(master, "127.0.0.1:0").unwrap();
            let idle: Rc<RefCell<Option<Vec<Client>>>> = Rc::default();
            let clients = Rc::clone(&idle);
            let own = pool.clone();
            when_listening(master, 2, move |master, address| {
                let connect = move || {
                    let clients = (0..CLIENTS).map(|_| Client::connect(address));
                    let mut clients: Vec<_> = clients.collect();
                    ask_all(&mut clients);
                    clients
                };
                in_background(master, connect, move |master, idle| {
                    clients.replace(Some(idle));
                    own.reload(master);
                });
            });
            pool.on_event(move |pool, master, event| match event {
                PoolEvent::Reloaded { .. } => {
                    let mut clients = idle.take().unwrap();
                    let own = pool.clone();
                    let ask = move || {
                        let answers = ask_all(&mut clients);
                        assert!(answers.iter().all(|(id, _)| [3, 4].contains(id)));
                        assert!(answers.iter().all(|(_, requests)| *requests == 2));
                        let ids: BTreeSet<_> = answers.iter().map(|(id, _)| *id).collect();
                        assert_eq!(ids.len(), 2, "both workers have received some");
                    };
                    in_background(master, ask, move |master, ()| own.stop(master));
                }
                PoolEvent::WorkerShutDown { killed, .. } => assert!(!killed),
                _ => {}
            });
        };
        cluster(pool, serve);
    };
    for_policies_without_dispatch(play);
}

fn connection_parked_after_its_listener_closed_goes_to_another_worker() {
    let clients = |address| {
        let mut client = Client::connect(address);
        let (first, _) = client.ask(PARK);
        let (second, requests) = client.ask(PARK);
        assert_eq!(requests, 2);
        assert_ne!(first, second, "the first worker has closed its listener");
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 2, clients, disconnect),
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                if let Some(connection) = listener.accept().unwrap() {
                    if connection.requests() == 1 {
                        listener.close();
                    }
                    answer(&worker, connection);
                }
                worker.run().unwrap();
            },
        );
    });
}

/// Checks that a connection which is parked after its listener has closed returns to the same worker,
/// if this worker is the only one and listens again.
fn only_worker_resumes_a_connection_of_its_closed_listener_on_its_next_one() {
    let clients = |address| {
        let mut client = Client::connect(address);
        assert_eq!(client.ask(PARK), (1, 1));
        assert_eq!(client.ask(PARK), (1, 2));
        assert_eq!(client.ask(CLOSE), (1, 3));
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| {
                let listener = master.listen("127.0.0.1:0").unwrap();
                with_clients(master, 1, clients, disconnect);
                master.on_all_disconnected_once(move |_| drop(listener));
            },
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                let connection = listener.accept().unwrap().unwrap();
                listener.close();
                drop(listener);
                let next = worker.listen("127.0.0.1:0").unwrap();
                answer(&worker, connection);
                for connection in next.incoming() {
                    answer(&worker, connection.unwrap());
                }
            },
        );
    });
}

/// Calls `then` with the number of open sockets of the only worker once `is_expected` returns true
/// for it. The worker must call `report_sockets`.
fn when_sockets(
    master: &Master,
    is_expected: impl Fn(u8) -> bool + 'static,
    then: impl FnOnce(&Master, u8) + 'static,
) {
    let then = Cell::new(Some(then));
    let own = Rc::new(Cell::new(None));
    let id = Rc::clone(&own);
    own.set(Some(master.on_message(move |master, worker, message| {
        let sockets = message.bytes()[0];
        if is_expected(sockets) {
            master.remove_callback(id.get().unwrap());
            then.take().unwrap()(master, sockets);
        } else {
            // Ask again, because the worker cannot report the moment at which a socket closes.
            std::thread::sleep(MS);
            let _ = worker.send(b"count").unwrap();
        }
    })));
    let _ = only(master, 1).send(b"count").unwrap();
}

fn report_sockets(worker: &Worker) {
    worker.on_message(|worker, _| {
        let fds = open_fds();
        let is_socket = |fd: &&PathBuf| fd.to_string_lossy().starts_with("socket:");
        let count = fds.iter().filter(is_socket).count();
        let _ = worker.send(&[u8::try_from(count).unwrap()]).unwrap();
    });
}

fn worker_closes_parked_clients_that_hang_up() {
    let connect = |address| {
        let mut clients: Vec<_> = (0..10).map(|_| Client::connect(address)).collect();
        ask_all(&mut clients);
        clients
    };
    let then = |master: &Master, clients: Vec<Client>| {
        let is_any = |_| true;
        when_sockets(master, is_any, move |master, all| {
            drop(clients);
            let is_less = move |count| count + 10 == all;
            when_sockets(master, is_less, disconnect);
        });
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, connect, then),
            |worker| {
                report_sockets(&worker);
                serve(worker);
            },
        );
    });
}

fn worker_closes_silent_clients_after_the_idle_timeout() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        let start = Instant::now();
        assert_eq!(client.line(), "", "end-of-file");
        let elapsed = start.elapsed();
        assert!(elapsed >= 900 * MS, "{elapsed:?}");
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, clients, disconnect),
            |worker| {
                let options = ListenOptions::from("127.0.0.1:0");
                serve_with(&worker, options.idle_timeout(MS));
            },
        );
    });
}

fn worker_closes_the_first_to_expire_beyond_its_maximum() {
    let clients = |address| {
        let mut clients = Vec::new();
        for _ in 0..60 {
            let mut client = Client::connect(address);
            client.ask(PARK);
            clients.push(client);
        }
        let (closed, open) = clients.split_at_mut(10);
        assert!(closed.iter_mut().all(|client| client.line().is_empty()));
        assert!(ask_all(open).iter().all(|(_, requests)| *requests == 2));
    };
    for_policies_without_dispatch(|| {
        // With this limit, a worker holds at most 50 parked connections, half of the limit.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 100, hard).unwrap();
        cluster(|master| with_clients(master, 1, clients, disconnect), serve);
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

fn serve_privately(worker: Worker, callback: bool) {
    let options = ListenOptions::from("127.0.0.1:0").exclusive(true);
    let listener: Listener = worker.listen(options).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let _ = worker.send(address.as_bytes()).unwrap();
    if callback {
        listener.set_connection_callback(answer);
        worker.run().unwrap();
        return;
    }
    for connection in listener.incoming() {
        answer(&worker, connection.unwrap());
    }
}

/// Runs `clients` with the address that the worker sends.
fn with_private_clients<T: Send + 'static>(
    master: &Master,
    clients: impl FnOnce(SocketAddr) -> T + Send + 'static,
    then: impl FnOnce(&Master, T) + 'static,
) {
    let work = Cell::new(Some((clients, then)));
    master.on_message(move |master, _, message| {
        let text = String::from_utf8(message.bytes().to_vec()).unwrap();
        let address = text.parse().unwrap();
        let (clients, then) = work.take().unwrap();
        in_background(master, move || clients(address), then);
    });
    drop(master.fork().unwrap());
}

fn private_connections_can_be_parked() {
    cluster(
        |master| with_private_clients(master, ask_in_turn, disconnect),
        |worker| serve_privately(worker, false),
    );
}

fn private_connections_can_be_parked_with_a_callback() {
    cluster(
        |master| with_private_clients(master, ask_in_turn, disconnect),
        |worker| serve_privately(worker, true),
    );
}

fn private_parked_connections_close_at_the_disconnect() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        client
    };
    let then = |master: &Master, mut client: Client| {
        master.disconnect();
        in_background(master, move || assert_eq!(client.line(), ""), |_, ()| {});
    };
    cluster(
        |master| with_private_clients(master, clients, then),
        |worker| serve_privately(worker, false),
    );
}

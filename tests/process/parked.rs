//! Tests parked connections: idle clients occupy no worker, and their connections outlive the
//! workers that served them.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Connection, Ledger, ListenOptions, Master, Signal, Worker, WorkerProcess};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::harness::{
    answer_pings, cluster, count_returned, in_background, scaled, share_listeners, when_all_wait,
    when_listening,
};

crate::scenarios! {
    many_clients_share_two_workers
    parked_connection_goes_to_workers_in_turn
    parked_connection_survives_the_disconnect_of_its_worker
    parked_connection_survives_the_death_of_its_worker
    connection_callback_receives_parked_connections
    closed_connection_ends_although_the_master_has_a_copy
    stream_taken_out_of_a_parked_connection_belongs_to_the_application
    client_that_hangs_up_while_parked_is_forgotten
    silent_client_is_closed_after_the_idle_timeout
    silent_new_client_is_closed_after_the_timeout_for_first_data
    silent_clients_occupy_no_worker_if_the_listener_waits_for_data
    silent_clients_occupy_no_worker_if_the_kernel_waits_for_data
    kernel_waits_for_data_of_a_private_listener
    longest_idle_connection_is_closed_beyond_the_maximum
    half_closed_client_receives_its_answer
    unix_connections_can_be_parked
    connection_is_parked_after_its_listener_is_closed
    parked_connection_loses_its_timeouts_and_non_blocking_mode
}

/// Requests after whose answer the worker parks the connection or closes it.
pub const PARK: u8 = b'p';
pub const CLOSE: u8 = b'c';
/// Request after whose answer the worker takes the stream out of the connection, sends a second
/// line, and closes the stream.
pub const TAKE: u8 = b't';

/// Answers a request of one byte with the worker's id and the connection's number of requests.
pub fn answer(worker: &Worker, mut connection: Connection) {
    let mut request = [0];
    if !matches!(connection.read(&mut request), Ok(1)) {
        return;
    }
    let line = format!("{} {}\n", worker.id(), connection.requests());
    if connection.write_all(line.as_bytes()).is_err() {
        return;
    }
    match request[0] {
        PARK => connection.park(),
        TAKE => {
            let mut stream = connection.into_stream();
            let _ = stream.write_all(b"taken\n");
        }
        _ => drop(connection),
    }
}

pub fn serve_with(worker: &Worker, options: ListenOptions) {
    for connection in worker.listen(options).unwrap().incoming() {
        answer(worker, connection.unwrap());
    }
}

pub fn serve(worker: Worker) {
    serve_with(&worker, "127.0.0.1:0".into());
}

/// A client that keeps its connection open.
pub struct Client(pub BufReader<TcpStream>);

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        Self(BufReader::new(TcpStream::connect(address).unwrap()))
    }

    pub fn send(&mut self, request: u8) {
        self.0.get_mut().write_all(&[request]).unwrap();
    }

    /// Returns the next line, or an empty string at end-of-file.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Sends a request. Returns the id of the worker that answers, and the connection's number of
    /// requests.
    pub fn ask(&mut self, request: u8) -> (u32, u64) {
        self.send(request);
        self.answer()
    }

    /// Returns the id of the worker that answers, and the connection's number of requests.
    pub fn answer(&mut self) -> (u32, u64) {
        let line = self.line();
        let (id, requests) = line.split_once(' ').expect("an answer");
        (id.parse().unwrap(), requests.parse().unwrap())
    }
}

/// Forks `workers` workers, runs `clients` on a thread once they listen, and then calls `then` with
/// the result.
pub fn with_clients<T: Send + 'static>(
    master: &Master,
    workers: usize,
    clients: impl FnOnce(SocketAddr) -> T + Send + 'static,
    then: impl FnOnce(&Master, T) + 'static,
) {
    when_listening(master, workers, move |master, address| {
        in_background(master, move || clients(address), then);
    });
    (0..workers).for_each(|_| drop(master.fork().unwrap()));
}

fn many_clients_share_two_workers() {
    const CLIENTS: u64 = 100;
    const REQUESTS: u64 = 5;
    let clients = |address| {
        let clients = (0..CLIENTS).map(|_| Client::connect(address));
        let mut clients: Vec<_> = clients.collect();
        for number in 1..=REQUESTS {
            for client in &mut clients {
                assert_eq!(client.ask(PARK).1, number);
            }
        }
        clients
    };
    let then = |master: &Master, clients: Vec<Client>| {
        let all = CLIENTS * REQUESTS;
        let is_complete = move |ledger: &Ledger| (ledger.parked, ledger.received) == (all, all);
        when_ledger(master, is_complete, move |master| {
            let ledger = master.ledger();
            assert_eq!(ledger.accepted, CLIENTS);
            assert_eq!(ledger.resumed, all - CLIENTS);
            assert_eq!(ledger.in_flight(), CLIENTS);
            drop(clients);
            master.disconnect();
        });
    };
    cluster(|master| with_clients(master, 2, clients, then), serve);
}

fn parked_connection_goes_to_workers_in_turn() {
    let clients = |address| {
        let mut client = Client::connect(address);
        (0..6).map(|_| client.ask(PARK).0).collect::<Vec<_>>()
    };
    cluster(
        |master| {
            when_listening(master, 3, move |master, address| {
                when_all_wait(master, move |master| {
                    let work = move || clients(address);
                    in_background(master, work, |master, ids: Vec<u32>| {
                        if count_returned(master) == 0 {
                            assert_eq!(ids[..3], ids[3..]);
                            assert_eq!(BTreeSet::from_iter(ids), BTreeSet::from([1, 2, 3]));
                        }
                        master.disconnect();
                    });
                });
            });
            (0..3).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            answer_pings(&worker);
            serve(worker);
        },
    );
}

fn only(master: &Master) -> WorkerProcess {
    master.workers().into_iter().next().unwrap()
}

/// Lets one worker serve a connection, ends the worker by `end`, and lets another worker serve the
/// connection.
fn survives(end: fn(&Master)) {
    let first = |address| {
        let mut client = Client::connect(address);
        assert_eq!(client.ask(PARK), (1, 1));
        client
    };
    let then = move |master: &Master, client: Client| {
        // Disconnecting or killing the only worker must not close the connection. The listener
        // stays open, because the master retains it.
        when_ledger(master, |ledger| ledger.parked == 1, end);
        let mut client = Some(client);
        master.on_exit_once(move |master, _, _| {
            let mut client = client.take().unwrap();
            drop(master.fork().unwrap());
            let ask = move || {
                let answer = client.ask(PARK);
                (client, answer)
            };
            in_background(master, ask, |master, (client, answer)| {
                assert_eq!(answer, (2, 2));
                drop(client);
                master.disconnect();
            });
        });
    };
    cluster(
        |master| {
            let listener = master.listen("127.0.0.1:0").unwrap();
            with_clients(master, 1, first, then);
            master.on_all_disconnected_once(move |_| drop(listener));
        },
        serve,
    );
}

fn parked_connection_survives_the_disconnect_of_its_worker() {
    survives(|master| {
        only(master).disconnect();
    });
}

fn parked_connection_survives_the_death_of_its_worker() {
    survives(|master| {
        only(master).process().kill(Signal::KILL);
    });
}

fn connection_callback_receives_parked_connections() {
    let clients = |address| {
        let mut clients: Vec<_> = (0..20).map(|_| Client::connect(address)).collect();
        for number in 1..=5 {
            clients.iter_mut().for_each(|client| client.send(PARK));
            for client in &mut clients {
                assert!(client.line().ends_with(&format!(" {number}")));
            }
        }
    };
    cluster(
        |master| with_clients(master, 2, clients, |master, ()| master.disconnect()),
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(answer);
            worker.run().unwrap();
        },
    );
}

fn closed_connection_ends_although_the_master_has_a_copy() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        assert_eq!(client.ask(CLOSE).1, 2);
        assert_eq!(client.line(), "", "end-of-file");
    };
    let then = |master: &Master, ()| {
        let ledger = master.ledger();
        assert_eq!((ledger.parked, ledger.resumed), (1, 1));
        master.disconnect();
    };
    cluster(|master| with_clients(master, 1, clients, then), serve);
}

fn stream_taken_out_of_a_parked_connection_belongs_to_the_application() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        assert_eq!(client.ask(TAKE).1, 2);
        assert_eq!(client.line(), "taken");
        assert_eq!(client.line(), "", "end-of-file");
    };
    cluster(
        |master| with_clients(master, 1, clients, |master, ()| master.disconnect()),
        serve,
    );
}

/// Calls `then` once the condition on the ledger holds.
pub fn when_ledger(
    master: &Master,
    condition: impl Fn(&Ledger) -> bool + 'static,
    then: impl FnOnce(&Master) + 'static,
) {
    let mut then = Some(then);
    let own = Rc::new(Cell::new(None));
    let id = Rc::clone(&own);
    own.set(Some(master.set_interval(
        Duration::from_millis(1),
        move |master| {
            if condition(&master.ledger()) {
                master.clear_timer(id.get().unwrap());
                then.take().unwrap()(master);
            }
        },
    )));
}

fn client_that_hangs_up_while_parked_is_forgotten() {
    let clients = |address| {
        Client::connect(address).ask(PARK);
    };
    let then = |master: &Master, ()| {
        when_ledger(
            master,
            |ledger| ledger.closed_by_peer == 1,
            |master| {
                assert_eq!(master.ledger().in_flight(), 0);
                master.disconnect();
            },
        );
    };
    cluster(|master| with_clients(master, 1, clients, then), serve);
}

fn silent_client_is_closed_after_the_idle_timeout() {
    let clients = |address| {
        let mut client = Client::connect(address);
        let start = Instant::now();
        client.ask(PARK);
        assert_eq!(client.line(), "", "end-of-file");
        let elapsed = start.elapsed();
        assert!(elapsed >= Duration::from_millis(900), "{elapsed:?}");
    };
    let then = |master: &Master, ()| {
        assert_eq!(master.ledger().expired, 1);
        master.disconnect();
    };
    cluster(
        |master| with_clients(master, 1, clients, then),
        |worker| {
            let options = ListenOptions::from("127.0.0.1:0");
            serve_with(&worker, options.idle_timeout(Duration::from_millis(1)));
        },
    );
}

fn silent_new_client_is_closed_after_the_timeout_for_first_data() {
    let clients = |address| {
        let mut parked = Client::connect(address);
        parked.ask(PARK);
        let start = Instant::now();
        assert_eq!(Client::connect(address).line(), "", "end-of-file");
        let elapsed = start.elapsed();
        assert!(elapsed >= Duration::from_millis(900), "{elapsed:?}");
        assert_eq!(parked.ask(PARK).1, 2);
    };
    let then = |master: &Master, ()| {
        assert_eq!(master.ledger().expired, 1);
        master.disconnect();
    };
    cluster(
        |master| with_clients(master, 1, clients, then),
        |worker| {
            let options = waiting_for_data().first_data_timeout(Duration::from_millis(1));
            serve_with(&worker, options);
        },
    );
}

fn silent_clients_occupy_no_worker_if_the_listener_waits_for_data() {
    let clients = |address| {
        let silent: Vec<_> = (0..50).map(|_| Client::connect(address)).collect();
        let mut client = Client::connect(address);
        for number in 1..=3 {
            assert_eq!(client.ask(PARK).1, number);
        }
        let mut silent = silent;
        for client in &mut silent {
            assert_eq!(client.ask(PARK).1, 1);
        }
        (silent, client)
    };
    let then = |master: &Master, (silent, client)| {
        let clients: (Vec<Client>, Client) = (silent, client);
        let is_complete = |ledger: &Ledger| (ledger.parked, ledger.received) == (53, 53);
        when_ledger(master, is_complete, move |master| {
            let ledger = master.ledger();
            assert_eq!((ledger.accepted, ledger.resumed), (51, 2));
            drop(clients);
            master.disconnect();
        });
    };
    cluster(
        |master| with_clients(master, 2, clients, then),
        |worker| {
            let options = ListenOptions::from("127.0.0.1:0");
            serve_with(&worker, options.wait_for_data(true));
        },
    );
}

/// More clients than workers connect and send nothing. Without `wait_for_data`, they would occupy
/// all workers, which read without a timeout.
fn silent_clients_occupy_no_worker_if_the_kernel_waits_for_data() {
    let clients = |address| {
        let mut silent: Vec<_> = (0..10).map(|_| Client::connect(address)).collect();
        for _ in 0..10 {
            assert_eq!(Client::connect(address).ask(CLOSE).1, 1);
        }
        for client in &mut silent {
            assert_eq!(client.ask(CLOSE).1, 1);
        }
    };
    cluster(
        |master| {
            share_listeners(master);
            with_clients(master, 2, clients, |master, ()| master.disconnect());
        },
        |worker| serve_with(&worker, waiting_for_data()),
    );
}

fn waiting_for_data() -> ListenOptions {
    ListenOptions::from("127.0.0.1:0").wait_for_data(true)
}

fn kernel_waits_for_data_of_a_private_listener() {
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        },
        |worker| {
            let options = waiting_for_data().exclusive(true);
            let listener = worker.listen(options).unwrap();
            let address = listener.local_addr().unwrap();
            let silent = TcpStream::connect(address).unwrap();
            let mut client = TcpStream::connect(address).unwrap();
            client.write_all(b"x").unwrap();
            let connection = listener.accept().unwrap().unwrap();
            assert_eq!(
                connection.peer_addr().unwrap(),
                client.local_addr().unwrap()
            );
            drop(silent);
            worker.disconnect();
        },
    );
}

fn longest_idle_connection_is_closed_beyond_the_maximum() {
    let clients = |address| {
        let mut clients: Vec<_> = (0..3).map(|_| Client::connect(address)).collect();
        for client in &mut clients {
            client.ask(PARK);
        }
        assert_eq!(clients[0].line(), "", "end-of-file");
        assert_eq!(clients[1].ask(PARK).1, 2);
        assert_eq!(clients[2].ask(PARK).1, 2);
    };
    let then = |master: &Master, ()| {
        assert_eq!(master.ledger().idle_closed, 1);
        master.disconnect();
    };
    cluster(
        |master| {
            master.set_max_parked(2);
            with_clients(master, 1, clients, then);
        },
        serve,
    );
}

fn half_closed_client_receives_its_answer() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        client.send(PARK);
        client.0.get_ref().shutdown(Shutdown::Write).unwrap();
        assert!(client.line().ends_with(" 2"));
        // The worker parks the connection, and the master finds the end-of-file.
        assert_eq!(client.line(), "", "end-of-file");
    };
    cluster(
        |master| with_clients(master, 1, clients, |master, ()| master.disconnect()),
        serve,
    );
}

fn unix_connections_can_be_parked() {
    let path = std::env::temp_dir().join(format!("cluster-parked-{}", std::process::id()));
    let bound = path.clone();
    cluster(
        |master| {
            master.on_listening(move |master, _, _| {
                let path = bound.clone();
                let ask = move || {
                    let mut client = UnixStream::connect(path).unwrap();
                    for _ in 0..5 {
                        client.write_all(b"x").unwrap();
                        client.read_exact(&mut [0]).unwrap();
                    }
                };
                in_background(master, ask, |master, ()| {
                    when_ledger(
                        master,
                        |ledger| ledger.parked == 5,
                        |master| {
                            master.disconnect();
                        },
                    );
                });
            });
            let path = path.to_str().unwrap().to_owned();
            master.fork_with([("SOCKET", path)]).unwrap();
        },
        |worker| {
            let path = PathBuf::from(std::env::var_os("SOCKET").unwrap());
            for connection in worker.listen(path.as_path()).unwrap().incoming() {
                let mut connection = connection.unwrap();
                if let Ok(1) = connection.read(&mut [0]) {
                    connection.write_all(b"y").unwrap();
                    connection.park();
                }
            }
        },
    );
}

fn connection_is_parked_after_its_listener_is_closed() {
    let clients = |address| {
        let mut client = Client::connect(address);
        let (first, _) = client.ask(PARK);
        let (second, requests) = client.ask(PARK);
        assert_eq!(requests, 2);
        assert_ne!(first, second, "the first worker has closed its listener");
    };
    cluster(
        |master| with_clients(master, 2, clients, |master, ()| master.disconnect()),
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
}

fn parked_connection_loses_its_timeouts_and_non_blocking_mode() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        client.ask(PARK);
    };
    cluster(
        |master| with_clients(master, 1, clients, |master, ()| master.disconnect()),
        |worker| {
            for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                let connection = connection.unwrap();
                assert_eq!(connection.read_timeout().unwrap(), None);
                let flags = fcntl(connection.as_fd(), FcntlArg::F_GETFL).unwrap();
                assert!(!OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
                let timeout = Some(scaled(Duration::from_secs(50)));
                connection.set_read_timeout(timeout).unwrap();
                answer_and_park_non_blocking(&worker, connection);
            }
        },
    );
}

fn answer_and_park_non_blocking(worker: &Worker, mut connection: Connection) {
    if connection.read_exact(&mut [0]).is_ok() {
        let line = format!("{} {}\n", worker.id(), connection.requests());
        connection.write_all(line.as_bytes()).unwrap();
        connection.set_nonblocking(true).unwrap();
        connection.park();
    }
}

//! Tests workers that serve each connection on a thread.

use std::cell::Cell;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use cluster::pool::{Pool, PoolEvent, PoolOptions};
use cluster::{Connection, DisconnectToken, Listener, Master, Worker};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::ForkResult;

use crate::harness::{Log, cluster, for_both_policies, in_background, scaled, when_listening};

crate::scenarios! {
    reloads_of_threaded_workers_lose_no_request
    disconnect_waits_for_connections_on_threads
    dropped_guard_frees_capacity_at_the_connection_limit
    master_sees_guards_dropped_while_the_worker_waits
    panic_on_a_thread_drops_the_guard_and_spares_the_worker
    guard_dropped_in_a_forked_child_or_after_the_worker_has_no_effect
}

/// The answers to a request. After `LAST`, the server closes the connection.
const KEEP: [u8; 1] = *b"k";
const LAST: [u8; 1] = *b"l";

/// Time in milliseconds that a server waits for a client's last request after the disconnect.
const LAST_REQUEST: u16 = 10_000;

/// Waits until the stream is readable, or for at most `LAST_REQUEST` once the worker disconnects.
fn wait_for_request(stream: &TcpStream, token: &DisconnectToken) -> bool {
    let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let mut fds = [readable(stream.as_fd()), readable(token.as_fd())];
    poll(&mut fds, PollTimeout::NONE).unwrap();
    fds[0].any() == Some(true) || poll(&mut fds[..1], LAST_REQUEST).unwrap() > 0
}

/// Answers one-byte requests until the client closes the connection or the worker disconnects.
fn serve(mut stream: &TcpStream, token: &DisconnectToken) -> io::Result<()> {
    while wait_for_request(stream, token) && stream.read(&mut [0])? > 0 {
        let is_last = token.is_disconnecting();
        stream.write_all(if is_last { &LAST } else { &KEEP })?;
        if is_last {
            break;
        }
    }
    Ok(())
}

fn serve_on_thread(worker: &Worker, connection: Connection) {
    let token = worker.disconnect_token();
    let (stream, guard) = connection.into_parts();
    std::thread::spawn(move || {
        let _guard = guard;
        let _ = serve(&stream, &token);
        drop(stream);
    });
}

fn serve_all_on_threads(worker: Worker) {
    let listener = worker.listen("127.0.0.1:0").unwrap();
    for connection in listener.incoming() {
        serve_on_thread(&worker, connection.unwrap());
    }
    worker.run().unwrap();
}

fn ask(mut stream: &TcpStream) -> io::Result<[u8; 1]> {
    let mut answer = [0];
    stream.write_all(b"?")?;
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

/// Sends requests until `stop` is set. Opens a new connection after each `LAST` answer, because the
/// server then closes the old one.
fn ask_until(stop: &AtomicBool, address: SocketAddr, answers: &AtomicU32) -> io::Result<()> {
    loop {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(scaled(Duration::from_secs(30))))?;
        while ask(&stream)? == KEEP {
            answers.fetch_add(1, Ordering::SeqCst);
            if stop.load(Ordering::SeqCst) {
                return Ok(());
            }
        }
    }
}

/// Reloads the pool once the clients have received 100 more answers.
fn reload_after_requests(pool: &Pool, master: &Master, answers: &Arc<AtomicU32>) {
    let (pool, answers) = (pool.clone(), Arc::clone(answers));
    let end = answers.load(Ordering::SeqCst) + 100;
    let timer = Rc::new(Cell::new(None));
    let own = Rc::clone(&timer);
    let check = move |master: &Master| {
        if answers.load(Ordering::SeqCst) >= end {
            master.clear_timer(own.get().unwrap());
            pool.reload(master);
        }
    };
    timer.set(Some(master.set_interval(Duration::from_millis(1), check)));
}

fn reloads_of_threaded_workers_lose_no_request() {
    const CLIENTS: usize = 50;
    const RELOADS: u64 = 10;
    for_both_policies(|| {
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicU32::new(0));
        cluster(
            |master| {
                let options = PoolOptions::default().workers(2);
                let pool = Pool::new(master, options.min_ready_time(Duration::ZERO));
                let address = pool.listen(master, "127.0.0.1:0").unwrap();
                let address = address.socket_addr().unwrap();
                let clients = {
                    let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
                    move || {
                        let client = |_| {
                            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
                            std::thread::spawn(move || ask_until(&stop, address, &answers))
                        };
                        let clients: Vec<_> = (0..CLIENTS).map(client).collect();
                        let ends = clients.into_iter().map(|client| client.join().unwrap());
                        ends.filter_map(Result::err).collect::<Vec<_>>()
                    }
                };
                let own = pool.clone();
                in_background(master, clients, move |master, errors| {
                    own.stop(master);
                    assert!(errors.is_empty(), "{errors:?}");
                });
                pool.on_event(move |pool, master, event| match event {
                    PoolEvent::QuorumReached => reload_after_requests(pool, master, &answers),
                    PoolEvent::Reloaded { generation, .. } if *generation < RELOADS => {
                        reload_after_requests(pool, master, &answers);
                    }
                    PoolEvent::Reloaded { .. } => stop.store(true, Ordering::SeqCst),
                    PoolEvent::WorkerShutDown { killed, .. } => assert!(!killed),
                    PoolEvent::WorkerFailed(failure) => panic!("{failure}"),
                    _ => {}
                });
            },
            serve_all_on_threads,
        );
    });
}

fn disconnect_waits_for_connections_on_threads() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            move |master| disconnect_while_a_thread_serves(master, log),
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                for connection in listener.incoming() {
                    serve_on_thread(&worker, connection.unwrap());
                }
                // If the worker did not count the connection on the thread, the first iteration
                // would close the channel.
                for _ in 0..3 {
                    worker.dispatch(Some(Duration::from_millis(1))).unwrap();
                    assert!(worker.is_connected(), "the worker does not wait");
                }
                let _ = worker.send(b"waiting").unwrap();
                worker.run().unwrap();
            },
        );
        // The worker may exit before the client's thread has reported the answer.
        let mut entries = entries.take();
        entries.sort();
        assert_eq!(entries, ["answered", "exit status: 0"]);
    });
}

/// Disconnects a worker while one of its threads serves a client. When the worker only waits for
/// the thread, the client sends its last request. Logs the answer, and the exit.
fn disconnect_while_a_thread_serves(master: &Master, log: Log) {
    let at_exit = log.clone();
    master.on_exit(move |_, _, status| at_exit.add(status.to_string()));
    let connect = |address| {
        let stream = TcpStream::connect(address).unwrap();
        assert_eq!(ask(&stream).unwrap(), KEEP);
        stream
    };
    when_listening(master, 1, move |master, address| {
        in_background(
            master,
            move || connect(address),
            move |master, stream| {
                let forked = &master.workers()[0];
                forked.disconnect();
                forked.on_message_once(move |master, _, message| {
                    assert_eq!(message.bytes(), b"waiting");
                    let last = move || ask(&stream).unwrap();
                    in_background(master, last, move |_, answer| {
                        assert_eq!(answer, LAST);
                        log.add("answered");
                    });
                });
            },
        );
    });
    master.fork().unwrap();
}

fn disconnect_master(master: &Master, (): ()) {
    master.disconnect();
}

fn dropped_guard_frees_capacity_at_the_connection_limit() {
    let clients = |address| {
        let clients = [(); 3].map(|()| TcpStream::connect(address).unwrap());
        // The worker accepts the next client only when the previous client's thread has ended.
        for client in clients {
            assert_eq!(ask(&client).unwrap(), KEEP);
        }
    };
    for_both_policies(|| {
        cluster(
            |master| {
                when_listening(master, 1, move |master, address| {
                    in_background(master, move || clients(address), disconnect_master);
                });
                master.fork().unwrap();
            },
            |worker| {
                let listener: Listener = worker.listen("127.0.0.1:0").unwrap();
                listener.set_max_connections(Some(1));
                for connection in listener.incoming() {
                    serve_on_thread(&worker, connection.unwrap());
                }
                worker.run().unwrap();
            },
        );
    });
}

/// Checks a worker that serves one client at a time. The thread of the first client panics.
fn panic_on_a_thread_drops_the_guard_and_spares_the_worker() {
    const PANIC: [u8; 1] = *b"!";
    let clients = |address| {
        let [mut first, second] = [(); 2].map(|()| TcpStream::connect(address).unwrap());
        first.write_all(&PANIC).unwrap();
        assert_eq!(first.read(&mut [0]).unwrap(), 0);
        assert_eq!(ask(&second).unwrap(), KEEP);
    };
    for_both_policies(|| {
        cluster(
            |master| {
                master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
                when_listening(master, 1, move |master, address| {
                    in_background(master, move || clients(address), disconnect_master);
                });
                master.fork().unwrap();
            },
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                listener.set_max_connections(Some(1));
                for connection in listener.incoming() {
                    let (mut stream, guard) = connection.unwrap().into_parts();
                    std::thread::spawn(move || {
                        let _guard = guard;
                        let mut request = [0];
                        stream.read_exact(&mut request).unwrap();
                        assert_ne!(request, PANIC, "this panic is expected");
                        stream.write_all(&KEEP).unwrap();
                    });
                }
                worker.run().unwrap();
            },
        );
    });
}

fn master_sees_guards_dropped_while_the_worker_waits() {
    const CLIENTS: usize = 8;
    cluster(
        |master| {
            let timer = Rc::new(Cell::new(None));
            when_listening(master, 1, move |master, address| {
                let connect = move || {
                    let clients = [(); CLIENTS].map(|()| TcpStream::connect(address).unwrap());
                    for client in &clients {
                        assert_eq!(ask(client).unwrap(), KEEP);
                    }
                    clients
                };
                in_background(master, connect, move |master, clients| {
                    drop(clients);
                    // Check repeatedly, because the number changes without an event.
                    let own = Rc::clone(&timer);
                    let check = move |master: &Master| {
                        let loads = master.loads();
                        if loads.workers.iter().all(|worker| worker.open == 0) {
                            master.clear_timer(own.get().unwrap());
                            master.disconnect();
                        }
                    };
                    timer.set(Some(master.set_interval(Duration::from_millis(1), check)));
                });
            });
            master.fork().unwrap();
        },
        serve_all_on_threads,
    );
}

fn guard_dropped_in_a_forked_child_or_after_the_worker_has_no_effect() {
    cluster(
        |master| {
            when_listening(master, 1, |master, address| {
                let client = move || ask(&TcpStream::connect(address).unwrap()).unwrap();
                in_background(master, client, |_, answer| assert_eq!(answer, LAST));
            });
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.fork().unwrap();
        },
        |worker| {
            let token = worker.disconnect_token();
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let (stream, guard) = listener.accept().unwrap().unwrap().into_parts();
            let late = worker.adopt(stream.try_clone().unwrap()).into_parts().1;
            #[allow(unsafe_code)]
            // SAFETY: this process has one thread.
            match unsafe { nix::unistd::fork() }.unwrap() {
                ForkResult::Child => {
                    drop((guard, late));
                    std::process::exit(0);
                }
                ForkResult::Parent { child } => {
                    nix::sys::wait::waitpid(child, None).unwrap();
                }
            }
            worker.disconnect();
            assert!(listener.accept().unwrap().is_none());
            for _ in 0..5 {
                worker.dispatch(Some(Duration::from_millis(1))).unwrap();
                assert!(worker.is_connected(), "the worker does not wait");
            }
            drop(guard);
            for _ in 0..5 {
                worker.dispatch(Some(Duration::from_millis(1))).unwrap();
                assert!(worker.is_connected(), "the worker does not wait");
            }
            drop((listener, worker));
            drop(late);
            serve(&stream, &token).unwrap();
        },
    );
}

//! Tests when a worker knows that it is disconnecting: while it works, on its threads, and before
//! its own callbacks run.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsFd as _;

use cluster::{DisconnectToken, Master, Sent, Settings, Worker, WorkerProcess};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::harness::{Log, cluster, for_both_policies, in_background, when_listening};

crate::scenarios! {
    busy_worker_knows_that_it_is_disconnecting
    busy_worker_knows_it_though_its_channel_is_full
    thread_of_a_blocked_worker_knows_that_it_is_disconnecting
    worker_that_executes_no_program_knows_that_it_is_disconnecting
    worker_knows_of_its_own_disconnect_at_once
    worker_knows_of_the_loss_of_its_channel
    disconnecting_callbacks_run_once_before_the_disconnect
}

/// Waits until the token is readable.
fn wait_for(token: &DisconnectToken) {
    let mut fds = [PollFd::new(token.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::NONE), Ok(1));
    assert_eq!(fds[0].any(), Some(true));
}

fn disconnect(worker: &WorkerProcess) {
    worker.disconnect();
}

fn is_readable(token: &DisconnectToken) -> bool {
    let mut fds = [PollFd::new(token.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
}

/// Forks a worker, and connects a client once the worker listens. When the worker has answered the
/// client's first byte, the master calls `disconnect`. Asserts that the client then reads
/// `goodbye`.
fn assert_says_goodbye(disconnect: fn(&WorkerProcess), worker: fn(Worker)) {
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                let connect = move || {
                    let mut client = TcpStream::connect(address).unwrap();
                    client.write_all(b"x").unwrap();
                    client.read_exact(&mut [0]).unwrap();
                    client
                };
                in_background(master, connect, move |master, client| {
                    disconnect(&master.workers()[0]);
                    in_background(
                        master,
                        move || read_all(client),
                        |_, answer| {
                            assert_eq!(answer, "goodbye");
                        },
                    );
                });
            });
            expect_success(master);
            master.fork().unwrap();
        },
        worker,
    );
}

fn expect_success(master: &Master) {
    master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
}

fn read_all(mut client: TcpStream) -> String {
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

/// Answers the first byte of a client, waits for the disconnect without running the event loop, and
/// says goodbye.
fn serve_until_disconnecting(worker: &Worker) {
    let token = worker.disconnect_token();
    let listener = worker.listen("127.0.0.1:0").unwrap();
    let mut connection = listener.accept().unwrap().unwrap();
    connection.read_exact(&mut [0]).unwrap();
    assert!(!worker.is_disconnecting() && !token.is_disconnecting());
    connection.write_all(b"x").unwrap();
    wait_for(&token);
    assert!(worker.is_disconnecting() && token.is_disconnecting());
    connection.write_all(b"goodbye").unwrap();
    drop(connection);
    assert!(listener.accept().unwrap().is_none());
    assert!(worker.is_disconnecting() && is_readable(&token));
}

fn busy_worker_knows_that_it_is_disconnecting() {
    for_both_policies(|| {
        assert_says_goodbye(disconnect, |worker| serve_until_disconnecting(&worker));
    });
}

fn busy_worker_knows_it_though_its_channel_is_full() {
    let flood = |worker: &WorkerProcess| {
        while worker.send(&[0; 4096]).unwrap() == Sent::Continue {}
        worker.disconnect();
    };
    assert_says_goodbye(flood, |worker| serve_until_disconnecting(&worker));
}

fn thread_of_a_blocked_worker_knows_that_it_is_disconnecting() {
    assert_says_goodbye(disconnect, |worker| {
        let token = worker.disconnect_token();
        let listener = worker.listen("127.0.0.1:0").unwrap();
        let mut connection = listener.accept().unwrap().unwrap();
        connection.read_exact(&mut [0]).unwrap();
        connection.write_all(b"x").unwrap();
        let mut stream = connection.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            wait_for(&token);
            assert!(token.is_disconnecting());
            stream.write_all(b"goodbye").unwrap();
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        });
        assert_eq!(connection.read(&mut [0]).unwrap(), 0);
        thread.join().unwrap();
    });
}

fn worker_that_executes_no_program_knows_that_it_is_disconnecting() {
    let main = |worker: Worker| {
        let _ = worker.send(b"ready").unwrap();
        wait_for(&worker.disconnect_token());
        assert!(worker.is_disconnecting());
        worker.run().unwrap();
        0
    };
    cluster(
        |master| {
            master.setup_master(Settings::default().main(main));
            expect_success(master);
            // Both workers must notice their disconnects, although the second worker begins with
            // copies of the descriptors that the master has for the first worker.
            let workers = [(); 2].map(|()| master.fork().unwrap());
            let [first, second] = workers;
            first.on_message(|_, worker, _| disconnect(worker));
            first.on_exit(move |_, _, _| disconnect(&second));
        },
        |_| unreachable!("the workers execute no program"),
    );
}

fn worker_knows_of_its_own_disconnect_at_once() {
    cluster(
        |master| {
            expect_success(master);
            for _ in 0..2 {
                master.fork().unwrap();
            }
        },
        |worker| {
            let token = worker.disconnect_token();
            assert!(!worker.is_disconnecting() && !is_readable(&token));
            if worker.id().get() == 1 {
                worker.disconnect();
            } else {
                worker.process().disconnect();
            }
            assert!(worker.is_disconnecting() && is_readable(&token));
            worker.run().unwrap();
            drop(worker);
            assert!(token.is_disconnecting() && is_readable(&token));
        },
    );
}

fn worker_knows_of_the_loss_of_its_channel() {
    cluster(
        |master| {
            expect_success(master);
            master.on_message(|_, worker, _| worker.process().disconnect());
            master.fork().unwrap();
        },
        |worker| {
            let _ = worker.send(b"ready").unwrap();
            wait_for(&worker.disconnect_token());
            assert!(worker.is_disconnecting() && worker.is_connected());
            worker.run().unwrap();
        },
    );
}

fn disconnecting_callbacks_run_once_before_the_disconnect() {
    cluster(
        |master| {
            master.on_message(|_, worker, _| match worker.id().get() {
                1 => {
                    worker.disconnect().disconnect();
                }
                2 => worker.process().disconnect(),
                _ => {}
            });
            expect_success(master);
            for _ in 0..4 {
                master.fork().unwrap();
            }
        },
        |worker| {
            let log = Log::default();
            let note = |entry: &'static str| {
                let log = log.clone();
                move |worker: &Worker| {
                    assert!(worker.is_disconnecting());
                    log.add(entry);
                }
            };
            worker.on_disconnecting(note("disconnecting"));
            worker.on_disconnecting_once(note("once"));
            let removed = worker.on_disconnecting(note("removed"));
            worker.remove_callback(removed);
            worker.on_disconnect(note("disconnect"));
            match worker.id().get() {
                3 => {
                    worker.disconnect().disconnect();
                }
                4 => worker.kill(),
                _ => {
                    let _ = worker.send(b"ready").unwrap();
                }
            }
            assert_eq!(log.len(), 0, "inside the call");
            worker.run().unwrap();
            assert_eq!(log.take(), ["disconnecting", "once", "disconnect"]);
        },
    );
}

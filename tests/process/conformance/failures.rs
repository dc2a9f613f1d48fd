//! Tests a panic in the master, and failures of `accept`.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::panic::{catch_unwind, panic_any, set_hook};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cluster::{Error, Interest, Master, Worker};
use nix::errno::Errno;
use nix::libc::{self, c_int};

use super::events::Events;
use crate::harness::{Log, cluster, is_watched, watched, when_listening};
use crate::scenarios;

scenarios! {
    uncaught_exception
    accept_fail
    accept_recovers_after_running_out_of_descriptors
}

/// Checks that a panic in the master unwinds to the caller. A panic is the closest counterpart of
/// Node's uncaught exception.
fn uncaught_exception() {
    struct Thrown;
    if !is_watched() {
        for location in ["main", "callback"] {
            let status = watched().env("LOCATION", location).status().unwrap();
            assert_eq!(status.code(), Some(42), "thrown in {location}");
        }
        return;
    }
    let hooked = Arc::new(AtomicBool::new(false));
    let hook = Arc::clone(&hooked);
    set_hook(Box::new(move |_| hook.store(true, Ordering::SeqCst)));
    let play = || {
        cluster(
            |master| {
                master.fork().unwrap();
                if std::env::var("LOCATION").unwrap() == "main" {
                    panic_any(Thrown);
                }
                master.on_fork(|_, _| panic_any(Thrown));
            },
            |_| {},
        );
    };
    let thrown = catch_unwind(play).unwrap_err();
    assert!(thrown.is::<Thrown>() && hooked.load(Ordering::SeqCst));
    std::process::exit(42);
}

/// Whether `accept4` fails with `ECONNABORTED` and closes the connection.
static LOSE_CONNECTIONS: AtomicBool = AtomicBool::new(false);

/// Replaces the C library's `accept4`, because a test cannot make the kernel return `ECONNABORTED`.
/// The linker prefers this function, so the crate calls it.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
unsafe extern "C" fn accept4(
    listener: c_int,
    address: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
    flags: c_int,
) -> c_int {
    // SAFETY: the caller guarantees that the arguments are valid for `accept4`, and they are passed
    // on unchanged.
    let accepted = unsafe { libc::syscall(libc::SYS_accept4, listener, address, length, flags) };
    let accepted = c_int::try_from(accepted).unwrap_or(-1);
    if accepted >= 0 && LOSE_CONNECTIONS.load(Ordering::SeqCst) {
        // SAFETY: the descriptor is open, and no other code knows its number yet.
        unsafe { libc::close(accepted) };
        Errno::ECONNABORTED.set();
        return -1;
    }
    accepted
}

fn accept_fail() {
    const CLIENTS: usize = 3;
    let events = Events::default();
    cluster(
        |master| {
            LOSE_CONNECTIONS.store(true, Ordering::SeqCst);
            let worker = master.fork().unwrap();
            events.log(master, &worker);
            worker.on_exit(|master, _, _| assert_eq!(master.ledger().accepted, 0));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|_, _| panic!("no connection is accepted"));
            let log = Log::default();
            let all = log.clone();
            // Connect the clients one after another, to check that the master continues to accept
            // after a failure.
            for _ in 0..CLIENTS {
                let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let log = log.clone();
                let read = move |_: &Worker, mut client: &TcpStream| {
                    log.add(client.read(&mut [0]).unwrap().to_string());
                    None
                };
                worker.watch(client, Interest::Readable, read).unwrap();
                let before = all.len();
                while all.len() == before {
                    worker.dispatch(None).unwrap();
                }
            }
            assert_eq!(all.take(), ["0"; CLIENTS], "each client reads end-of-file");
            listener.close();
            assert!(listener.accept().unwrap().is_none(), "closed");
            worker.disconnect().run().unwrap();
        },
    );
    let expected = [
        "listening Listening",
        "disconnect Some(true) Disconnected",
        "exit exit status: 0 Dead",
    ];
    assert_eq!(events.take(), expected);
}

/// Checks that a connection is served as soon as a descriptor is free. Without a free descriptor,
/// `accept` fails and the connection stays in the kernel's backlog.
fn accept_recovers_after_running_out_of_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    let log = Log::default();
    cluster(
        |master| {
            let limits = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            let limit = move |soft| setrlimit(Resource::RLIMIT_NOFILE, soft, limits.1).unwrap();
            let errors = log.clone();
            master.on_error(move |_, worker, error| {
                assert!(worker.is_none());
                let Error::Accept { reason, .. } = error else {
                    panic!("{error}");
                };
                assert_eq!(reason.raw_os_error(), Some(libc::EMFILE));
                errors.add("no descriptors");
                limit(limits.0);
            });
            let answers = log.clone();
            when_listening(master, 1, move |master, address| {
                let client = TcpStream::connect(address).unwrap();
                limit(0);
                let read = move |master: &Master, mut client: &TcpStream| {
                    let mut answer = String::new();
                    client.read_to_string(&mut answer).unwrap();
                    answers.add(answer);
                    master.disconnect();
                    None
                };
                master.watch(client, Interest::Readable, read).unwrap();
            });
            let worker = master.fork().unwrap();
            let exits = log.clone();
            worker.on_exit(move |_, _, status| exits.add(status.to_string()));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|_, mut connection| {
                connection.write_all(b"served").unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(log.take(), ["no descriptors", "served", "exit status: 0"]);
}

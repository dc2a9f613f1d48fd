//! Tests processes whose limit of descriptors is lowered below the descriptors that they use.
//!
//! In the two drain scenarios, the worker has no free descriptor and reports nothing, so the master
//! must check the waiting client itself. The client belongs to the worker's process, so its reset
//! or half-close does not wake the master. In the last scenario, the master lacks descriptors.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use cluster::{Error, Ledger, ListenOptions, Listener, Master, Worker};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt,
};

use crate::exhaustion::read_all;
use crate::harness::{cluster, when_listening};

crate::scenarios! {
    reset_of_the_last_waiting_client_ends_a_drain
    half_closed_client_is_served_after_a_shortage_in_a_drain
    accepting_with_a_limit_of_0_descriptors_waits_and_goes_on
}

/// Time for which the worker lacks descriptors after its client has stopped sending. It is longer
/// than the interval at which the master checks a waiting client.
const SHORTAGE: Duration = Duration::from_millis(500);
const REQUEST: &[u8] = b"request";

/// Lowers the limit of descriptors. Returns a closure that restores it.
fn lower_limit(limit: u64) -> impl Fn() + 'static {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
    move || setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap()
}

/// Returns an unconnected TCP socket, with which a client can connect while no descriptor is free.
fn unconnected() -> OwnedFd {
    let (family, kind) = (AddressFamily::Inet, SockType::Stream);
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap()
}

fn connect_to(socket: OwnedFd, address: SocketAddr) -> TcpStream {
    connect(socket.as_raw_fd(), &SockaddrStorage::from(address)).unwrap();
    socket.into()
}

/// Connects to the worker's own listener and sends a request, while no descriptor is free. Once the
/// worker has received a disconnect request, returns the client and a closure that ends the
/// shortage.
fn connect_and_disconnect(
    worker: &Worker,
    listener: &Listener,
) -> (TcpStream, impl Fn() + 'static) {
    let socket = unconnected();
    let address = listener.local_addr().unwrap();
    // `accept` on the private listener returns when the worker receives the disconnect request.
    let options = ListenOptions::from("127.0.0.1:0").exclusive(true);
    let private: Listener = worker.listen(options).unwrap();
    worker.on_error(|worker, error| {
        assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "{error}");
        let _ = worker.send(b"out of descriptors").unwrap();
    });
    // Set the limit to 3 descriptors, because poll(2) fails if it is given more descriptors than
    // the limit.
    let restore = lower_limit(3);
    let mut client = connect_to(socket, address);
    client.write_all(REQUEST).unwrap();
    assert!(private.accept().unwrap().is_none());
    (client, restore)
}

/// Answers each client after its request.
fn serve(listener: &Listener) {
    listener.set_connection_callback(|_, mut connection| {
        let length = connection.read(&mut [0; 16]).unwrap();
        assert_eq!(length, REQUEST.len());
        connection.write_all(b"served").unwrap();
    });
}

/// Forks a worker, disconnects it at its first message, and checks the ledger when it has exited.
fn disconnect_at_message(master: &Master, check: impl Fn(Ledger) + 'static) {
    master.on_message(|master, _, _| master.disconnect());
    let worker = master.fork().unwrap();
    worker.on_exit(move |master, _, status| {
        assert!(status.success(), "{status}");
        check(master.ledger());
    });
}

/// Resets a client whose request has not been read, after the master has begun to drain.
fn reset_of_the_last_waiting_client_ends_a_drain() {
    cluster(
        |master| {
            disconnect_at_message(master, |ledger| {
                assert_eq!((ledger.closed_by_peer, ledger.dropped), (1, 0));
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            serve(&listener);
            let (client, _) = connect_and_disconnect(&worker, &listener);
            let (l_onoff, l_linger) = (1, 0);
            let reset = libc::linger { l_onoff, l_linger };
            setsockopt(&client, sockopt::Linger, &reset).unwrap();
            drop(client);
            worker.run().unwrap();
        },
    );
}

/// A client that has only stopped sending still waits for its answer. The drain must therefore go
/// on until the worker can serve the client.
fn half_closed_client_is_served_after_a_shortage_in_a_drain() {
    cluster(
        |master| {
            disconnect_at_message(master, |ledger| {
                assert_eq!((ledger.received, ledger.closed_by_peer), (1, 0));
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            serve(&listener);
            let (mut client, restore) = connect_and_disconnect(&worker, &listener);
            client.shutdown(Shutdown::Write).unwrap();
            worker.set_timeout(SHORTAGE, move |_| restore());
            worker.run().unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "served");
        },
    );
}

/// Makes poll(2) fail before the master accepts. The master polls a listener first if another
/// process may have a copy. The failure must not be mistaken for a shutdown of the listener, which
/// accept(2) reports with the same error number.
fn accepting_with_a_limit_of_0_descriptors_waits_and_goes_on() {
    cluster(
        |master| {
            let listener = master.listen("127.0.0.1:0").unwrap();
            // The call makes the master assume that another process has a copy.
            let _ = listener.as_fd();
            let listener = Cell::new(Some(listener));
            let shortage = Rc::new(Cell::new(None));
            let begun = Rc::clone(&shortage);
            when_listening(master, 1, move |_, address| {
                let socket = unconnected();
                let restore = lower_limit(0);
                let mut client = connect_to(socket, address);
                client.write_all(REQUEST).unwrap();
                begun.set(Some((client, restore)));
            });
            master.on_error(move |master, _, error| {
                assert!(matches!(error, Error::Accept { .. }), "{error}");
                assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "{error}");
                let (client, restore) = shortage.take().unwrap();
                restore();
                let listener = listener.take();
                read_all(master, vec![client], move |master, answers| {
                    assert_eq!(answers, ["served"]);
                    drop(listener);
                    master.disconnect();
                });
            });
            let worker = master.fork().unwrap();
            worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        },
        |worker| {
            serve(&worker.listen("127.0.0.1:0").unwrap());
            worker.run().unwrap();
        },
    );
}

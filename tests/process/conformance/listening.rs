//! What workers listen on.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Master, SchedulingPolicy, Worker};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::harness::{
    Log, close_at_exit, cluster, idle_server, listen_in_vain, note_events, note_messages, open_fds,
    reserve_port, serve_id, share_listeners, with_env,
};

crate::scenarios! {
    eaddrinuse
    shared_handle_bind_error
    bind_privileged_port
    shared_handle_bind_privileged_port
    server_restart_none
    worker_handle_close
}

/// Listens in vain, and tells the master.
fn refused(worker: &Worker, address: &str, errno: i32) {
    listen_in_vain(worker, address, errno);
    worker.send(b"refused").unwrap();
}

/// Closes the channel without a word, which ends the worker.
fn cut_the_channel(worker: &Worker) {
    worker.process().disconnect();
    worker.run().unwrap();
    assert!(!worker.is_connected());
}

/// What the master is told of a worker that closes the channel without a word.
const REFUSED: [&str; 5] = [
    "1 fork",
    "1 online",
    "1 refused",
    "1 disconnect Some(false)",
    "1 exit Some(false) exit status: 0",
];

fn eaddrinuse() {
    let log = Log::default();
    let entries = log.clone();
    let (_reserved, address) = reserve_port();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let holder = RefCell::new(Some(TcpListener::bind(address).unwrap()));
            let worker = master
                .fork_with([("ADDRESS", address.to_string())])
                .unwrap();
            worker.on_message(move |_, worker, _| {
                drop(holder.take().unwrap());
                worker.send(b"free").unwrap();
            });
        },
        |worker| {
            let address = std::env::var("ADDRESS").unwrap();
            refused(&worker, &address, nix::libc::EADDRINUSE);
            worker.on_message(move |worker, message| {
                assert_eq!(message.bytes(), b"free");
                let listener = worker.listen(address.as_str()).unwrap();
                assert_eq!(listener.local_addr().to_string(), address);
                listener.close();
                worker.disconnect();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 refused",
        "1 listening",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn shared_handle_bind_error() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            note_events(master, &log);
            note_messages(master, &log);
            let (server, address) = idle_server();
            let worker = master
                .fork_with([("ADDRESS", address.to_string())])
                .unwrap();
            close_at_exit(&worker, server);
        },
        |worker| {
            let address = std::env::var("ADDRESS").unwrap();
            refused(&worker, &address, nix::libc::EADDRINUSE);
            cut_the_channel(&worker);
        },
    );
    assert_eq!(entries.take(), REFUSED);
}

/// Plays where nobody may listen on port 42, whoever runs the tests.
fn unprivileged(play: impl FnOnce()) {
    const CAP_NET_BIND_SERVICE: nix::libc::c_ulong = 10;
    // What root's programs are allowed, from the next one on. Others may not change that, and need
    // not.
    #[allow(unsafe_code)]
    // SAFETY: this call takes numbers only.
    unsafe {
        nix::libc::prctl(nix::libc::PR_CAPBSET_DROP, CAP_NET_BIND_SERVICE, 0, 0, 0)
    };
    with_env("UNPRIVILEGED", "1", || {
        let may_bind = || match TcpListener::bind("127.0.0.1:42") {
            Err(error) => error.kind() != ErrorKind::PermissionDenied,
            Ok(_) => true,
        };
        if may_bind() {
            // Everybody may on this system: then the refusal has to be played.
            refuse_to_bind();
            assert!(!may_bind());
        }
        play();
    });
}

/// From now on nobody may bind, in this process and in those it starts.
fn refuse_to_bind() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

    let filter = SeccompFilter::new(
        BTreeMap::from([(nix::libc::SYS_bind, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(nix::libc::EACCES.unsigned_abs()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    seccompiler::apply_filter(&BpfProgram::try_from(filter.unwrap()).unwrap()).unwrap();
}

fn privileged_port(before: impl FnOnce(&Master)) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            before(master);
            note_events(master, &log);
            note_messages(master, &log);
            master.fork().unwrap();
        },
        |worker| {
            refused(&worker, "127.0.0.1:42", nix::libc::EACCES);
            cut_the_channel(&worker);
        },
    );
    assert_eq!(entries.take(), REFUSED);
}

fn bind_privileged_port() {
    unprivileged(|| {
        privileged_port(|master| {
            assert_eq!(master.scheduling_policy(), SchedulingPolicy::RoundRobin);
        });
    });
}

fn shared_handle_bind_privileged_port() {
    unprivileged(|| privileged_port(share_listeners));
}

fn server_restart_none() {
    let log = Log::default();
    let entries = log.clone();
    let ports = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&ports);
    cluster(
        |master| {
            share_listeners(master);
            note_events(master, &log);
            master.on_listening(move |_, _, address| ports.borrow_mut().push(address.port));
            let first = master.fork().unwrap();
            first.on_listening(|master, first, _| {
                let first = first.clone();
                let second = master.fork().unwrap();
                second.on_exit(move |_, _, _| drop(first.disconnect().clone()));
            });
        },
        |worker| {
            if worker.id().get() == 1 {
                return serve_id(&worker, "127.0.0.1:0");
            }
            for _ in 0..2 {
                worker.listen("127.0.0.1:0").unwrap().close();
            }
            cut_the_channel(&worker);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "2 fork",
        "2 online",
        "2 listening",
        "2 listening",
        "2 disconnect Some(false)",
        "2 exit Some(false) exit status: 0",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
    let ports = seen.take();
    assert_eq!(ports.len(), 3);
    assert!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
}

fn worker_handle_close() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.on_exit(move |master, _, _| {
                let ledger = master.ledger();
                let sums = (ledger.accepted, ledger.taken, ledger.dropped);
                log.add(format!("{sums:?}"));
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.on_connection(|_, _| panic!("it has closed"));
            let mut client = TcpStream::connect(listener.local_addr()).unwrap();
            let before = open_fds();
            // Nothing but the connection can come from the master now; it stays unread.
            let mut fds = [PollFd::new(worker.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE).unwrap();
            listener.close();
            worker.dispatch(Some(Duration::ZERO)).unwrap();
            assert_eq!(open_fds(), before);
            // Its copy and the master's are closed.
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            worker.disconnect().run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 disconnect Some(true)",
        "(1, 0, 1)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

//! Tests sockets that the master does not bind: the worker's own sockets and borrowed descriptors.

use std::cell::Cell;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::rc::Rc;

use cluster::{Interest, ListenOptions, Master, Settings, Stdio};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{
    Log, StoppedMaster, answer, cluster, in_background, is_alive, note_events, note_messages,
    read_answer, reserve_port, talk, wait_until,
};

crate::scenarios! {
    net_reuseport
    exclusive_listener_belongs_to_the_worker
    net_listen_handle_in_cluster_1
    net_listen_handle_in_cluster_2
    listen_fd_cluster
    borrowed_listener_stays_with_the_master
}

/// Returns the expected events of a worker whose listeners the master does not know: there is no
/// `listening` event.
fn events_without_listening(exited_after_disconnect: bool) -> [String; 4] {
    let flag = Some(exited_after_disconnect);
    [
        "1 fork".to_owned(),
        "1 online".to_owned(),
        format!("1 disconnect {flag:?}"),
        format!("1 exit {flag:?} exit status: 0"),
    ]
}

fn net_reuseport() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.fork().unwrap();
        },
        |worker| {
            let stopped = StoppedMaster::new();
            let any = ListenOptions::from("127.0.0.1:0").reuse_port(true);
            let first = worker.listen(any).unwrap();
            let address = first.local_addr().unwrap();
            let same = ListenOptions::from(address).reuse_port(true);
            let second = worker.listen(same).unwrap();
            assert_eq!(second.local_addr().unwrap(), address);
            // Both listeners send the same answer, because the kernel chooses which one receives
            // the client.
            answer(&first, worker.id());
            answer(&second, worker.id());
            assert_eq!(read_answer(&worker, address), "1");
            first.close();
            assert_eq!(read_answer(&worker, address), "1");
            second.close();
            drop(stopped);
            // Check that the port is free after both listeners have been closed.
            drop(TcpListener::bind(address).unwrap());
            worker.disconnect().run().unwrap();
        },
    );
    assert_eq!(entries.take(), events_without_listening(true));
}

fn exclusive_listener_belongs_to_the_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.fork().unwrap();
        },
        |worker| {
            let stopped = StoppedMaster::new();
            let any = || ListenOptions::from("127.0.0.1:0").exclusive(true);
            let listener = worker.listen(any()).unwrap();
            let other = worker.listen(any()).unwrap();
            assert_ne!(listener.local_addr().unwrap(), other.local_addr().unwrap());
            answer(&listener, worker.id());
            assert_eq!(read_answer(&worker, listener.local_addr().unwrap()), "1");
            drop(stopped);
            worker.disconnect().run().unwrap();
        },
    );
    assert_eq!(entries.take(), events_without_listening(true));
}

fn net_listen_handle_in_cluster_1() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = server.local_addr().unwrap();
            let worker = master.fork().unwrap();
            let _ = worker
                .send_with_fds(b"listen", vec![server.into()])
                .unwrap();
            let log = log.clone();
            worker.on_message(move |master, worker, _| {
                let (log, worker) = (log.clone(), worker.clone());
                in_background(
                    master,
                    move || talk(address, b"").unwrap(),
                    move |_, text| {
                        log.add(format!("answered by {text}"));
                        worker.disconnect();
                    },
                );
            });
        },
        |worker| {
            worker.on_message(|worker, message| {
                assert_eq!(message.bytes(), b"listen");
                let fds = message.take_fds();
                let [fd] = <[OwnedFd; 1]>::try_from(fds).unwrap();
                let listener = worker.listen(TcpListener::from(fd)).unwrap();
                answer(&listener, worker.id());
                let _ = worker.send(b"listens").unwrap();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listens",
        "answered by 1",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn net_listen_handle_in_cluster_2() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.fork().unwrap();
        },
        |worker| {
            let stopped = StoppedMaster::new();
            // `reserve_port` binds the socket, but only `listen` makes it listen.
            let (socket, address) = reserve_port();
            let listener = worker.listen(TcpListener::from(socket)).unwrap();
            assert_eq!(listener.local_addr().unwrap(), address);
            answer(&listener, worker.id());
            assert_eq!(read_answer(&worker, address), "1");
            drop(stopped);
            std::process::exit(0);
        },
    );
    assert_eq!(entries.take(), events_without_listening(false));
}

/// Plays a master whose standard input is the listener. Its standard output is a socket to the
/// driver, the test process that starts the master. The master disconnects when the driver closes
/// its end of the socket.
fn master_with_a_listener() {
    cluster(
        |master| {
            // Workers receive `/dev/null` as descriptor 0, so they must request the listener from
            // the master.
            master.setup_master(Settings::default().stdio([Stdio::null()]));
            master.on_listening(|_, worker, address| {
                assert!(matches!(address, cluster::Address::Fd { number: 0, .. }));
                println!("{}", worker.process().id());
            });
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            let driver = std::io::stdout().as_fd().try_clone_to_owned().unwrap();
            let closed = move |master: &Master, driver: &UnixStream| {
                assert_eq!((&*driver).read(&mut [0]).unwrap(), 0);
                master.disconnect();
                None
            };
            let driver = UnixStream::from(driver);
            master.watch(driver, Interest::Readable, closed).unwrap();
            master.fork().unwrap();
        },
        |worker| {
            let own = std::fs::read_link("/proc/self/fd/0").unwrap();
            assert_eq!(own.to_str(), Some("/dev/null"));
            let listener = worker.listen(ListenOptions::fd(0)).unwrap();
            assert_eq!(listener.local_addr().unwrap().to_string(), env_address());
            answer(&listener, "hello from worker");
            worker.run().unwrap();
        },
    );
}

fn env_address() -> String {
    std::env::var("ADDRESS").unwrap()
}

fn listen_fd_cluster() {
    if std::env::var_os("ADDRESS").is_some() {
        return master_with_a_listener();
    }
    for is_killed in [true, false] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut master = Command::new(std::env::current_exe().unwrap())
            .env("ADDRESS", address.to_string())
            .stdin(OwnedFd::from(listener))
            .stdout(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        let mut output = BufReader::new(&ours);
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let worker = line.trim_end().parse().unwrap();
        assert_eq!(talk(address, b"").unwrap(), "hello from worker");
        assert!(is_alive(worker));
        if is_killed {
            let pid = Pid::from_raw(i32::try_from(master.id()).unwrap());
            kill(pid, Signal::SIGTERM).unwrap();
        } else {
            ours.shutdown(Shutdown::Write).unwrap();
        }
        // End-of-file means that both master and worker have closed the output.
        assert_eq!(output.read_line(&mut line).unwrap(), 0, "{line}");
        let status = master.wait().unwrap();
        let killed = is_killed.then_some(nix::libc::SIGTERM);
        assert_eq!(status.signal(), killed, "{status}");
        assert!(is_killed || status.success(), "{status}");
        wait_until("the worker's exit", || (!is_alive(worker)).then_some(()));
    }
}

fn borrowed_listener_stays_with_the_master() {
    const ROUNDS: u32 = 2;
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_messages(master, &log);
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = server.local_addr().unwrap();
            let number = std::os::fd::AsRawFd::as_raw_fd(&server).to_string();
            let env = [("NUMBER", number)];
            let server = Cell::new(Some(server));
            let rounds = Rc::new(Cell::new(0));
            let answers = log.clone();
            master.on_listening(move |master, _, _| {
                let answers = answers.clone();
                in_background(
                    master,
                    move || talk(address, b"").unwrap(),
                    move |master, text| {
                        answers.add(format!("answered by {text}"));
                        master.disconnect();
                    },
                );
            });
            master.fork_with(env.clone()).unwrap();
            master.on_exit(move |master, _, status| {
                log.add(status.to_string());
                rounds.set(rounds.get() + 1);
                if rounds.get() < ROUNDS {
                    drop(master.fork_with(env.clone()).unwrap());
                } else {
                    // Check that the listener still listens and that the master can accept from it.
                    let server = server.take().unwrap();
                    let _client = std::net::TcpStream::connect(address).unwrap();
                    server.accept().unwrap();
                }
            });
        },
        |worker| {
            let number = std::env::var("NUMBER").unwrap().parse().unwrap();
            let listener = worker.listen(ListenOptions::fd(number)).unwrap();
            answer(&listener, worker.id());
            worker.run().unwrap();
        },
    );
    let expected = [
        "answered by 1",
        "exit status: 0",
        "answered by 2",
        "exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

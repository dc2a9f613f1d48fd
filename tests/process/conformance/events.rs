//! Tests which events are emitted, when, how often and in which order.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::rc::Rc;

use cluster::{
    Address, Interest, Master, Sent, Settings, Signal, Worker, WorkerProcess, WorkerState,
};

use crate::harness::{
    Log, cluster, is_alive, is_watched, run_until_killed, watched, when_listening,
};
use crate::scenarios;

scenarios! {
    cluster_preload_test
    cluster_preload
    app
    basic
    message
    worker_constructor
    worker_death
    worker_events
    worker_exit
    worker_init
}

/// The events of a test's only worker, logged twice: by callbacks on the master, and by callbacks
/// on the worker's handle.
#[derive(Default)]
pub struct Events {
    by_cluster: Log,
    by_worker: Log,
}

/// Registers callbacks with `$reason`, the master or the worker's handle, for all events that both
/// emit. The callbacks log the content of messages, and other events with the worker's state. They
/// assert that the event is about `$worker`.
macro_rules! listen_to {
    ($reason:expr, $log:expr, $worker:expr) => {{
        let (log, own) = ($log.clone(), $worker.clone());
        let note = move |worker: &WorkerProcess, event: &str| {
            assert_eq!(*worker, own);
            log.add(format!("{event} {:?}", worker.state()));
        };
        let online = note.clone();
        $reason.on_online(move |_, worker| online(worker, "online"));
        let listening = note.clone();
        $reason.on_listening(move |_, worker, _| listening(worker, "listening"));
        let (log, own) = ($log.clone(), $worker.clone());
        $reason.on_message(move |_, worker, message| {
            assert_eq!(*worker, own);
            log.add(String::from_utf8_lossy(message.bytes()));
        });
        let disconnect = note.clone();
        $reason.on_disconnect(move |master, worker| {
            assert!(!worker.is_connected());
            assert!(master.worker(worker.id()).is_some(), "in the table");
            let flag = worker.exited_after_disconnect();
            disconnect(worker, &format!("disconnect {flag:?}"));
        });
        let exit = note;
        $reason.on_exit(move |master, worker, status| {
            assert_eq!(worker.process().exit_status(), Some(status));
            assert!(worker.is_dead() && !is_alive(worker.process().id()));
            assert!(master.workers().is_empty());
            exit(worker, &format!("exit {status}"));
        });
    }};
}

impl Events {
    /// Registers the callbacks that log all events. Call this method before the loop runs, so that
    /// no event is missed.
    pub fn log(&self, master: &Master, worker: &WorkerProcess) {
        let (log, own) = (self.by_cluster.clone(), worker.clone());
        master.on_fork(move |_, worker| {
            assert_eq!(*worker, own);
            log.add(format!("fork {:?}", worker.state()));
        });
        listen_to!(master, self.by_cluster, worker);
        listen_to!(worker, self.by_worker, worker);
        master.on_error(|_, _, error| panic!("{error}"));
    }

    /// Returns the events that follow `fork` and `online`. Asserts that both logs contain the same
    /// events, except `fork`, because only the master emits `fork`.
    #[track_caller]
    pub fn take(&self) -> Vec<String> {
        let (mut by_cluster, by_worker) = (self.by_cluster.take(), self.by_worker.take());
        assert_eq!(by_cluster[..2], ["fork None", "online Online"]);
        assert_eq!(by_cluster[1..], by_worker);
        by_cluster.split_off(2)
    }
}

/// Exits with the code 42 plus the worker's ID. The ID must be known as soon as `init` returns.
fn exit_with_own_id(worker: Worker) {
    assert!(cluster::is_worker());
    std::process::exit(42 + i32::try_from(worker.id().get()).unwrap());
}

fn cluster_preload_test() {
    if !is_watched() {
        let path = std::env::current_exe().unwrap();
        std::env::set_current_dir(path.parent().unwrap()).unwrap();
        let relative = Path::new(".").join(path.file_name().unwrap());
        for program in [&path, &relative] {
            let mut master = watched();
            master.env("PROGRAM", program).stderr(Stdio::inherit());
            let output = master.output().unwrap();
            assert!(output.status.success());
            assert_eq!(output.stdout, b"a worker exited with 43\n", "{program:?}");
        }
        return;
    }
    cluster(
        |master| {
            let program = std::env::var_os("PROGRAM").unwrap();
            master.setup_master(Settings::default().exec(program));
            master.on_exit(|_, _, status| {
                println!("a worker exited with {}", status.code().unwrap());
            });
            master.fork().unwrap();
        },
        exit_with_own_id,
    );
}

fn cluster_preload() {
    let events = Events::default();
    // Determine the role before `init`, because an application may call `is_worker` at any time.
    let is_worker = cluster::is_worker();
    cluster(
        |master| {
            assert!(!is_worker && cluster::is_master());
            let worker = master.fork().unwrap();
            assert_eq!(worker.id().get(), 1);
            events.log(master, &worker);
        },
        |worker| {
            assert!(is_worker);
            exit_with_own_id(worker);
        },
    );
    let expected = [
        "disconnect Some(false) Disconnected",
        "exit exit status: 43 Dead",
    ];
    assert_eq!(events.take(), expected);
}

/// Checks an application whose master receives requests. Node's master receives requests over HTTP,
/// and this master reads requests from its standard input.
fn app() {
    if !is_watched() {
        let mut master = watched()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(master.stderr.take().unwrap()).lines();
        assert_eq!(stderr.next().unwrap().unwrap(), "all workers are running");
        let mut stdin = master.stdin.take().unwrap();
        stdin.write_all(b"getpids\n").unwrap();
        let mut answer = String::new();
        let mut stdout = BufReader::new(master.stdout.take().unwrap());
        stdout.read_line(&mut answer).unwrap();
        let pids: Vec<u32> = answer
            .split_whitespace()
            .map(|pid| pid.parse().unwrap())
            .collect();
        assert_eq!(pids.len(), 3);
        assert_eq!(pids[0], master.id());
        assert_eq!(pids.iter().collect::<BTreeSet<_>>().len(), 3, "{pids:?}");
        assert!(pids.iter().all(|pid| is_alive(*pid)));
        drop(stdin);
        assert!(master.wait().unwrap().success());
        let rest: Vec<_> = stderr.map(Result::unwrap).collect();
        assert_eq!(rest, [""; 0]);
        return;
    }
    let log = Log::default();
    cluster(
        |master| {
            let online = log.clone();
            master.on_online(move |_, _| {
                online.add("online");
                if online.len() == 2 {
                    eprintln!("all workers are running");
                }
            });
            when_listening(master, 2, |master, _| {
                let answer = |master: &Master, stdin: &std::io::Stdin| {
                    let mut request = String::new();
                    if stdin.read_line(&mut request).unwrap() == 0 {
                        master.disconnect();
                        return None;
                    }
                    assert_eq!(request, "getpids\n");
                    let pids = master
                        .workers()
                        .into_iter()
                        .map(|worker| worker.process().id());
                    let pids = std::iter::once(std::process::id()).chain(pids);
                    let pids: Vec<_> = pids.map(|pid| pid.to_string()).collect();
                    println!("{}", pids.join(" "));
                    Some(Interest::Readable)
                };
                master
                    .watch(std::io::stdin(), Interest::Readable, answer)
                    .unwrap();
            });
            master.on_exit(|_, _, status| assert!(status.success()));
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert!(listener.accept().unwrap().is_none(), "no client connects");
        },
    );
    assert_eq!(log.take(), ["online"; 2]);
}

fn basic() {
    fn expect_ours(address: &Address) {
        assert_eq!(address.socket_addr().unwrap().ip().to_string(), "127.0.0.1");
        assert!(matches!(
            address,
            cluster::Address::Tcp(std::net::SocketAddr::V4(_))
        ));
        assert!(address.port().is_some_and(|port| port > 0));
        assert!(!matches!(address, cluster::Address::Fd { .. }));
    }
    let events = Events::default();
    let has_id = std::env::var_os("CLUSTER_UNIQUE_ID").is_some();
    assert_eq!(cluster::is_worker(), has_id);
    cluster(
        |master| {
            assert!(!has_id && cluster::is_master());
            let worker = master.fork().unwrap();
            assert_eq!(worker.id().get(), 1);
            events.log(master, &worker);
            worker.on_listening(|_, _, address| expect_ours(address));
            master.on_listening(|_, worker, address| {
                expect_ours(address);
                worker.kill(Signal::TERM);
            });
        },
        |worker| {
            assert!(has_id && cluster::is_worker());
            let named = std::env::var("CLUSTER_WORKER_PID").unwrap();
            assert_eq!(named, std::process::id().to_string());
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|_, _| panic!("no client connects"));
            run_until_killed(&worker);
        },
    );
    let expected = [
        "listening Listening",
        "disconnect Some(true) Disconnected",
        "exit signal: 15 (SIGTERM) Dead",
    ];
    assert_eq!(events.take(), expected);
}

fn message() {
    const TO_WORKER: &str = "message from primary";
    const TO_MASTER: &str = "message from worker";
    let events = Events::default();
    let receipts = Log::default();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            events.log(master, &worker);
            let receipts = receipts.clone();
            worker.on_listening(move |master, worker, address| {
                let address: SocketAddr = address.to_string().parse().unwrap();
                let client = Rc::new(TcpStream::connect(address).unwrap());
                assert_eq!(worker.send(TO_WORKER.as_bytes()).unwrap(), Sent::Continue);
                let (all, other_end) = (receipts.clone(), Rc::clone(&client));
                let receive = move |what: String| {
                    all.add(what);
                    if all.len() == 3 {
                        other_end.shutdown(Shutdown::Write).unwrap();
                    }
                };
                let (at_cluster, at_worker) = (receive.clone(), receive.clone());
                master.on_message(move |_, _, _| at_cluster("cluster".to_owned()));
                worker.on_message(move |_, _, _| at_worker("worker".to_owned()));
                let worker = worker.clone();
                let read = move |_: &Master, client: &Rc<TcpStream>| {
                    let mut buffer = [0; 64];
                    let length = (&**client).read(&mut buffer).unwrap();
                    if length == 0 {
                        worker.kill(Signal::TERM);
                        return None;
                    }
                    receive(String::from_utf8_lossy(&buffer[..length]).into_owned());
                    Some(Interest::Readable)
                };
                master.watch(client, Interest::Readable, read).unwrap();
            });
        },
        |worker| {
            let received = Rc::new(RefCell::new(None));
            let message = Rc::clone(&received);
            worker.on_message(move |_, text| {
                let before = message.replace(Some(text.bytes().to_owned()));
                assert_eq!(before, None);
            });
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let mut connection = listener.accept().unwrap().unwrap();
            assert_eq!(worker.send(TO_MASTER.as_bytes()).unwrap(), Sent::Continue);
            while received.borrow().is_none() {
                worker.dispatch(None).unwrap();
            }
            let text = received.borrow().clone().unwrap();
            connection.write_all(&text).unwrap();
            assert_eq!(connection.read(&mut [0]).unwrap(), 0);
            drop(connection);
            run_until_killed(&worker);
        },
    );
    // Sort the entries, because the echo travels over the client's connection and may arrive first.
    let mut receipts = receipts.take();
    receipts.sort();
    assert_eq!(receipts, ["cluster", TO_WORKER, "worker"]);
    let expected = [
        "listening Listening",
        TO_MASTER,
        "disconnect Some(true) Disconnected",
        "exit signal: 15 (SIGTERM) Dead",
    ];
    assert_eq!(events.take(), expected);
}

/// Checks a new worker's properties. Node's test calls the constructor, but only `fork` creates
/// workers in this crate.
fn worker_constructor() {
    let log = Log::default();
    cluster(
        |master| {
            let workers: Vec<_> = (0..3).map(|_| master.fork().unwrap()).collect();
            for (id, worker) in (1..).zip(&workers) {
                assert_eq!(worker.id().get(), id);
                assert_eq!(worker.state(), WorkerState::None);
                assert_eq!(worker.exited_after_disconnect(), None);
                assert_eq!(worker.process().exit_status(), None);
                assert!(is_alive(worker.process().id()));
            }
            let pids = workers.iter().map(|worker| worker.process().id());
            assert_eq!(pids.collect::<BTreeSet<_>>().len(), 3);
            master.on_online(|_, worker| {
                assert_eq!(worker.state(), WorkerState::Online);
                assert_eq!(worker.exited_after_disconnect(), None);
            });
            let (messages, exits) = (log.clone(), log.clone());
            master.on_message(move |_, worker, message| {
                assert_eq!(worker.exited_after_disconnect(), None);
                let text = String::from_utf8_lossy(message.bytes());
                messages.add(format!("{} {} {text}", worker.id(), worker.process().id()));
                worker.disconnect();
            });
            let pids: Vec<_> = workers.iter().map(|worker| worker.process().id()).collect();
            master.on_exit(move |_, worker, status| {
                let index = usize::try_from(worker.id().get()).unwrap() - 1;
                assert_eq!(pids[index], worker.process().id());
                exits.add(format!("{} {status}", worker.id()));
            });
        },
        |worker| {
            assert_eq!(worker.exited_after_disconnect(), None);
            let text = format!("{} {}", worker.id(), std::process::id());
            let _ = worker.send(text.as_bytes()).unwrap();
            worker.run().unwrap();
        },
    );
    let mut entries = log.take();
    entries.sort();
    assert_eq!(entries.len(), 6);
    for (id, entries) in (1..).zip(entries.chunks(2)) {
        let known: Vec<_> = entries[0].split(' ').collect();
        assert_eq!(
            known[..2],
            known[2..],
            "the same id and process id in master and worker"
        );
        assert_eq!(entries[1], format!("{id} exit status: 0"));
    }
}

fn worker_death() {
    let events = Events::default();
    cluster(
        |master| events.log(master, &master.fork().unwrap()),
        |_| std::process::exit(42),
    );
    let expected = [
        "disconnect Some(false) Disconnected",
        "exit exit status: 42 Dead",
    ];
    assert_eq!(events.take(), expected);
}

/// Checks that all message callbacks of a worker run. The worker registers two, because Node emits
/// the event on both the process and the worker object.
fn worker_events() {
    let events = Events::default();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            events.log(master, &worker);
            assert_eq!(worker.state(), WorkerState::None);
            assert_eq!(worker.send(b"a text").unwrap(), Sent::Continue);
            // The worker waits for this message. If the master sent the first message twice, the
            // duplicate would arrive before this message.
            assert_eq!(worker.send(b"end").unwrap(), Sent::Continue);
        },
        |worker| {
            let log = Log::default();
            for name in ["first", "second"] {
                let log = log.clone();
                worker.on_message(move |_, message| {
                    log.add(format!(
                        "{name}: {}",
                        String::from_utf8_lossy(message.bytes())
                    ));
                });
            }
            worker.on_message(move |_, message| {
                if message.bytes() == b"end" {
                    let expected = [
                        "first: a text",
                        "second: a text",
                        "first: end",
                        "second: end",
                    ];
                    assert_eq!(log.take(), expected);
                    std::process::exit(2);
                }
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "disconnect Some(false) Disconnected",
        "exit exit status: 2 Dead",
    ];
    assert_eq!(events.take(), expected);
}

fn worker_exit() {
    let events = Events::default();
    cluster(
        |master| events.log(master, &master.fork().unwrap()),
        |worker| {
            let _listener = worker.listen("127.0.0.1:0").unwrap();
            std::process::exit(42);
        },
    );
    let expected = [
        "listening Listening",
        "disconnect Some(false) Disconnected",
        "exit exit status: 42 Dead",
    ];
    assert_eq!(events.take(), expected);
}

fn worker_init() {
    let events = Events::default();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            events.log(master, &worker);
            worker.on_online(|_, worker| assert_eq!(worker.send(b"foo").unwrap(), Sent::Continue));
            worker.on_message(|_, worker, _| assert_eq!(worker.disconnect(), worker));
        },
        |worker| {
            worker.on_message(|worker, message| {
                let is_foo = message.bytes() == b"foo";
                let _ = worker.send(is_foo.to_string().as_bytes()).unwrap();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "true",
        "disconnect Some(true) Disconnected",
        "exit exit status: 0 Dead",
    ];
    assert_eq!(events.take(), expected);
}

//! Tests workers that block in `accept`. Only a signal interrupts this call, and the worker must
//! nevertheless process messages, timers, signals and end-of-file while it blocks.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt as _;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cluster::{Master, SendOptions, Sent, Signal, Worker, WorkerProcess};
use nix::libc;
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, Signal as Number, kill, raise, sigaction,
};
use nix::unistd::Pid;

use crate::harness::{
    Group, Log, StoppedMaster, answer, answer_pings, cluster, in_background, is_watched, scaled,
    serve_id, share_listeners, spin, talk, wait_for_state, wait_until_asleep, watched,
    when_all_wait, when_listening,
};

crate::scenarios! {
    sequential_connections_rotate_among_workers_that_block
    messages_are_delivered_in_accept
    messages_are_delivered_in_accept_under_load
    timers_fire_in_accept
    signals_are_delivered_in_accept
    signal_just_before_the_first_accept_is_delivered
    disconnect_request_is_handled_in_accept
    exit_of_the_master_is_noticed_in_accept
    messages_queued_before_accept_are_sent_in_accept
    messages_queued_in_accept_are_sent_in_accept
    reads_of_the_application_are_not_interrupted
    callbacks_and_accept_share_a_listener
    signal_handler_of_the_application_runs
    connection_wakes_no_poller_of_a_worker
}

/// Number of repetitions in the tests that repeat their event.
const ROUNDS: u32 = 200;
/// Maximum delay of a reaction. A longer delay means that a later, unrelated event woke the worker.
const PROMPT: Duration = Duration::from_secs(5);

/// Threads that keep the processors busy until this value is dropped.
struct Stress {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Stress {
    fn new() -> Self {
        let stop = Arc::<AtomicBool>::default();
        let spin = |_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    spin();
                }
            })
        };
        let threads = (0..3).map(spin).collect();
        Self { stop, threads }
    }
}

impl Drop for Stress {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

fn sequential_connections_rotate_among_workers_that_block() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            when_listening(master, 4, move |master, address| {
                when_all_wait(master, move |master| connect_next(master, address, log));
            });
            (0..4).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            answer_pings(&worker);
            serve_id(&worker, "127.0.0.1:0");
        },
    );
    let entries = entries.take();
    for round in entries.chunks(4) {
        assert_eq!(round, &entries[..4]);
    }
    let distinct: BTreeSet<_> = entries[..4].iter().collect();
    assert_eq!((entries.len(), distinct.len()), (200, 4));
}

/// Checks that only the master's poller has the listener registered, and only for errors and
/// hang-ups.
///
/// When a client connects, the kernel runs the wait callback of every poller in which the listener
/// is registered, even with an empty interest. With 1,000 workers, the kernel would run 1,000
/// callbacks.
fn connection_wakes_no_poller_of_a_worker() {
    cluster(
        |master| {
            share_listeners(master);
            when_listening(master, 2, |master, address| {
                when_all_wait(master, move |master| {
                    let listener = inode(address);
                    for worker in master.workers() {
                        for line in polled(worker.process().id()) {
                            assert!(!line.contains(&listener), "{worker:?}: {line}");
                        }
                    }
                    let own = polled(std::process::id());
                    let own: Vec<_> = own.iter().filter(|l| l.contains(&listener)).collect();
                    // 0x18 is EPOLLERR and EPOLLHUP, which the kernel adds to an empty interest.
                    let events = own[0].split_whitespace().nth(3);
                    assert_eq!((own.len(), events), (1, Some("18")), "{own:?}");
                    master.disconnect();
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            answer_pings(&worker);
            serve_id(&worker, "127.0.0.1:0");
        },
    );
}

/// Returns the inode of the socket that listens on the address, in the format of an epoll
/// descriptor's `fdinfo`.
fn inode(address: SocketAddr) -> String {
    let port = format!(":{:04X} 00000000:0000 0A ", address.port());
    let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let line = sockets.lines().find(|line| line.contains(&port)).unwrap();
    let inode: u64 = line.split_whitespace().nth(9).unwrap().parse().unwrap();
    format!(" ino:{inode:x} ")
}

/// Returns one line for each descriptor that any poller of the process has registered.
fn polled(pid: u32) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let infos = entries.map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap());
    let infos: String = infos.collect();
    let lines = infos.lines().filter(|line| line.starts_with("tfd:"));
    lines.map(str::to_owned).collect()
}

/// Connects clients one after another. Before each client, waits until all workers block in
/// `accept`.
///
/// To see that a worker blocks, the master checks the process's state. It sends no message, because
/// a message would interrupt `accept`, and the worker would lose its position in the kernel's queue
/// of waiting processes.
fn connect_next(master: &Master, address: SocketAddr, log: Log) {
    master.workers().iter().for_each(wait_until_asleep);
    in_background(
        master,
        move || talk(address, b"").unwrap(),
        move |master, id| {
            log.add(id);
            if log.len() < 200 {
                return connect_next(master, address, log);
            }
            master.disconnect();
        },
    );
}

/// Runs `worker` in one worker process while all processors are busy. Calls `next` when the worker
/// listens, and after each message from the worker. Asserts that each message arrives promptly, and
/// disconnects the worker at the end.
fn repeatedly(next: impl Fn(&WorkerProcess) + 'static, worker: impl FnOnce(Worker)) {
    let log = Log::default();
    let entries = log.clone();
    let stress = cluster::is_master().then(Stress::new);
    cluster(
        |master| {
            share_listeners(master);
            let only = master.fork().unwrap();
            let next = Rc::new(next);
            let first = Rc::clone(&next);
            let began = Rc::new(Cell::new(Instant::now()));
            only.on_listening(move |_, worker, _| first(worker));
            let mut times = 0;
            only.on_message(move |_, worker, message| {
                assert_eq!(message.bytes(), b"noticed");
                let took = began.replace(Instant::now()).elapsed();
                assert!(took < scaled(PROMPT), "{took:?}");
                times += 1;
                if times < ROUNDS {
                    return next(worker);
                }
                log.add("all");
                worker.disconnect();
            });
            only.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        },
        worker,
    );
    drop(stress);
    assert_eq!(entries.take(), ["all"]);
}

fn noticed(worker: &Worker) {
    let _ = worker.send(b"noticed").unwrap();
}

fn messages_are_delivered_in_accept() {
    repeatedly(
        |worker| assert_eq!(worker.send(b"notice").unwrap(), Sent::Continue),
        |worker| {
            worker.on_message(|worker, _| noticed(worker));
            serve_id(&worker, "127.0.0.1:0");
        },
    );
}

/// Checks that messages are delivered while connections arrive.
fn messages_are_delivered_in_accept_under_load() {
    let stop = Arc::<AtomicBool>::default();
    let clients = Arc::clone(&stop);
    repeatedly(
        |worker| assert_eq!(worker.send(b"notice").unwrap(), Sent::Continue),
        move |worker| {
            // Connect from a thread of this worker, so that connections arrive whenever the worker
            // waits in `accept`.
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let thread = std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    match talk(address, b"") {
                        Ok(answer) => assert_eq!(answer, "served"),
                        // Clients may fail once `stop` is set, because the master then disconnects
                        // the worker.
                        Err(error) => assert!(stop.load(Ordering::SeqCst), "{error}"),
                    }
                }
            });
            let mut times = 0;
            worker.on_message(move |worker, _| {
                times += 1;
                clients.store(times == ROUNDS, Ordering::SeqCst);
                noticed(worker);
            });
            for connection in listener.incoming() {
                connection.unwrap().write_all(b"served").unwrap();
            }
            thread.join().unwrap();
        },
    );
}

fn timers_fire_in_accept() {
    repeatedly(
        |worker| assert_eq!(worker.send(b"start a timer").unwrap(), Sent::Continue),
        |worker| {
            let mut micros = 0;
            worker.on_message(move |worker, _| {
                micros = (micros + 37) % 2000;
                worker.set_timeout(Duration::from_micros(micros), noticed);
            });
            serve_id(&worker, "127.0.0.1:0");
        },
    );
}

fn signals_are_delivered_in_accept() {
    repeatedly(
        |worker| worker.process().kill(Signal::USR1),
        |worker| {
            worker
                .on_signal(Signal::USR1, |worker, _| noticed(worker))
                .unwrap();
            serve_id(&worker, "127.0.0.1:0");
        },
    );
}

/// Checks that a signal is delivered if it arrives between the last timer and `accept`. A due timer
/// raises the signal before the worker blocks for the first time. A worker that checked for signals
/// only before its timers would miss the signal.
fn signal_just_before_the_first_accept_is_delivered() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            let only = master.fork().unwrap();
            only.on_message(move |_, worker, message| {
                assert_eq!(message.bytes(), b"noticed");
                log.add("delivered");
                worker.disconnect();
            });
        },
        |worker| {
            let delivered = |worker: &Worker, _| noticed(worker);
            worker.on_signal(Signal::USR1, delivered).unwrap();
            worker.set_timeout(Duration::ZERO, |_| raise(Number::SIGUSR1).unwrap());
            serve_id(&worker, "127.0.0.1:0");
        },
    );
    assert_eq!(entries.take(), ["delivered"]);
}

fn disconnect_request_is_handled_in_accept() {
    let log = Log::default();
    let entries = log.clone();
    let stress = cluster::is_master().then(Stress::new);
    cluster(
        |master| {
            share_listeners(master);
            // The first worker only keeps the listener open. The later workers are disconnected one
            // after another, each as soon as it listens.
            master.fork().unwrap();
            let requested = Rc::new(Cell::new(None));
            let at = Rc::clone(&requested);
            when_listening(master, 1, move |master, _| {
                master.on_listening(move |_, worker, _| {
                    at.set(Some(Instant::now()));
                    worker.disconnect();
                });
                master.fork().unwrap();
            });
            master.on_exit(move |master, _, status| {
                assert!(status.success(), "{status}");
                if log.len() < ROUNDS as usize {
                    let took = requested.take().unwrap().elapsed();
                    assert!(took < scaled(PROMPT), "{took:?}");
                    log.add("exited");
                    if log.len() < ROUNDS as usize {
                        master.fork().unwrap();
                    } else {
                        master.disconnect();
                    }
                }
            });
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    drop(stress);
    assert_eq!(entries.len(), ROUNDS as usize);
}

/// Checks that a worker in `accept` notices that its master was killed, by the end-of-file on its
/// channel. The worker clears its parent-death signal, because the kernel would otherwise kill it
/// with the master.
fn exit_of_the_master_is_noticed_in_accept() {
    if is_watched() {
        return cluster(
            |master| {
                share_listeners(master);
                when_listening(master, 1, |master, _| {
                    wait_until_asleep(&master.workers()[0]);
                    println!("listening");
                });
                master.fork().unwrap();
            },
            |worker| {
                set_pdeathsig(None).unwrap();
                serve_id(&worker, "127.0.0.1:0");
            },
        );
    }
    set_child_subreaper(true).unwrap();
    let _stress = Stress::new();
    for _ in 0..ROUNDS {
        let group = Group::start(&mut watched()).unwrap();
        group.line("listening");
        kill(group.pid(), Number::SIGKILL).unwrap();
        // The kernel reparents the killed master's worker to this process, so `end` finds the
        // worker and fails if the worker does not exit.
        let status = group.end().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL));
    }
}

const MESSAGES: usize = 200;
const LENGTH: usize = 20_000;

/// Stops the master, and sends more than the socket buffer holds. A thread lets the master continue
/// once this worker sleeps in `accept`.
fn send_beyond_the_buffer(worker: &Worker) {
    let master = StoppedMaster::new();
    let mut is_queued = false;
    for number in 0..MESSAGES {
        is_queued |= worker.send(&numbered(number, LENGTH)).unwrap() == Sent::Pause;
    }
    assert!(is_queued, "the socket buffer holds all messages");
    let written = |worker: &Worker, outcome: cluster::Result<()>| {
        outcome.unwrap();
        let _ = worker.send(b"written").unwrap();
    };
    let last = SendOptions::default().on_written(written);
    let _ = worker.send_with(&numbered(MESSAGES, LENGTH), last).unwrap();
    std::thread::spawn(move || {
        wait_for_state(std::process::id(), ") S ");
        drop(master);
    });
}

fn messages_queued_before_accept_are_sent_in_accept() {
    assert_all_is_sent(false, |worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        send_beyond_the_buffer(&worker);
        assert!(listener.accept().unwrap().is_none());
    });
}

fn messages_queued_in_accept_are_sent_in_accept() {
    assert_all_is_sent(true, |worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        worker.on_message(|worker, _| send_beyond_the_buffer(worker));
        assert!(listener.accept().unwrap().is_none());
    });
}

/// Checks that the master receives all of the worker's messages in order. If `requested` is set,
/// the master sends a message that makes the worker start sending. Otherwise the master sends no
/// message, because a message would wake the worker.
fn assert_all_is_sent(requested: bool, worker: impl FnOnce(Worker)) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            let only = master.fork().unwrap();
            let mut number = 0;
            only.on_listening(move |_, worker, _| {
                if requested {
                    wait_until_asleep(worker);
                    let _ = worker.send(b"now").unwrap();
                }
            });
            only.on_message(move |_, worker, message| match message.bytes() {
                b"written" => {
                    log.add(format!("{number} and all written"));
                    worker.disconnect();
                }
                bytes => {
                    assert_eq!(bytes, numbered(number, LENGTH));
                    number += 1;
                }
            });
            only.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        },
        worker,
    );
    assert_eq!(entries.take(), ["201 and all written"]);
}

fn numbered(number: usize, length: usize) -> Vec<u8> {
    let mut message = vec![b'x'; length];
    message[..8].copy_from_slice(&(number as u64).to_le_bytes());
    message
}

/// Checks that messages do not interrupt the application's reads. The worker reads with a timeout
/// from clients that send nothing.
fn reads_of_the_application_are_not_interrupted() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            let only = master.fork().unwrap();
            when_listening(master, 1, move |master, address| {
                let often = only.clone();
                let messages = master.set_interval(Duration::from_millis(1), move |_| {
                    let _ = often.send(b"message").unwrap();
                });
                let clients = move || {
                    for _ in 0..ROUNDS / 4 {
                        let mut silent = TcpStream::connect(address).unwrap();
                        let mut answer = String::new();
                        silent.read_to_string(&mut answer).unwrap();
                        assert_eq!(answer, "WouldBlock");
                    }
                };
                in_background(master, clients, move |master, ()| {
                    master.clear_timer(messages);
                    log.add("no read was interrupted");
                    only.disconnect();
                });
            });
        },
        |worker| {
            let received = Rc::new(Cell::new(0));
            let count = Rc::clone(&received);
            worker.on_message(move |_, _| count.set(count.get() + 1));
            let mut expected = 0;
            for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                let mut connection = connection.unwrap();
                let patience = Duration::from_millis(10);
                connection.set_read_timeout(Some(patience)).unwrap();
                let error = connection.read(&mut [0]).unwrap_err();
                assert_ne!(error.kind(), ErrorKind::Interrupted);
                let _ = connection.write_all(format!("{:?}", error.kind()).as_bytes());
                expected += 1;
            }
            assert!(received.get() > expected, "fewer messages than clients");
        },
    );
    assert_eq!(entries.take(), ["no read was interrupted"]);
}

/// Checks that both workers serve a shared listener if one uses callbacks and the other waits in
/// `accept`.
fn callbacks_and_accept_share_a_listener() {
    const CALLED_BACK: &str = "CALLED_BACK";
    const CLIENTS: usize = 2000;
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            // Fork the worker with callbacks only when the other worker already sleeps in `accept`.
            // The callbacks make the shared listener non-blocking, so a later `accept` call would
            // not block.
            let blocking = master.fork().unwrap();
            blocking.on_listening(|master, worker, _| {
                wait_until_asleep(worker);
                drop(master.fork_with([(CALLED_BACK, "1")]).unwrap());
            });
            when_listening(master, 2, move |master, address| {
                let part = move || {
                    let answers = (0..CLIENTS / 4).map(|_| talk(address, b"").unwrap());
                    answers.collect::<Vec<_>>()
                };
                let work = move || {
                    let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(part)).collect();
                    let parts = threads.into_iter().map(|thread| thread.join().unwrap());
                    parts.flatten().collect::<Vec<_>>()
                };
                in_background(master, work, move |master, answers| {
                    let by = |id: &str| answers.iter().filter(|answer| *answer == id).count();
                    let (first, second) = (by("1"), by("2"));
                    assert!(first > 0 && second > 0, "{first} and {second}");
                    log.add((first + second).to_string());
                    // Ping both workers before the disconnect. A worker may still be in an `accept`
                    // call for a connection that the other worker accepted first, and its answer
                    // shows that this call has ended.
                    when_all_wait(master, |master| master.disconnect());
                });
            });
        },
        |worker| {
            answer_pings(&worker);
            if std::env::var_os(CALLED_BACK).is_some() {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                answer(&listener, worker.id());
                return worker.run().unwrap();
            }
            serve_id(&worker, "127.0.0.1:0");
        },
    );
    assert_eq!(entries.take(), [CLIENTS.to_string()]);
}

/// Number of received SIGURG signals that were sent with `kill`. The SIGURG signals that the crate
/// uses are sent by the kernel itself and are not counted.
static SENT: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_sent(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    #[allow(unsafe_code)]
    // SAFETY: the handler is installed with SA_SIGINFO, so the kernel passes a valid pointer.
    let code = unsafe { (*info).si_code };
    if code == libc::SI_USER {
        SENT.fetch_add(1, Ordering::SeqCst);
    }
}

fn signal_handler_of_the_application_runs() {
    repeatedly(
        |worker| {
            let pid = i32::try_from(worker.process().id()).unwrap();
            kill(Pid::from_raw(pid), Number::SIGURG).unwrap();
        },
        |worker| {
            let handler = SigHandler::SigAction(count_sent);
            let action = SigAction::new(handler, SaFlags::SA_SIGINFO, SigSet::empty());
            #[allow(unsafe_code)]
            // SAFETY: the handler only increments an atomic counter, which is async-signal-safe.
            unsafe { sigaction(Number::SIGURG, &action) }.unwrap();
            let reported = RefCell::new(0);
            let report = move |worker: &Worker| {
                let sent = SENT.load(Ordering::SeqCst);
                while *reported.borrow() < sent {
                    *reported.borrow_mut() += 1;
                    noticed(worker);
                }
            };
            worker.set_interval(Duration::from_millis(1), report);
            serve_id(&worker, "127.0.0.1:0");
        },
    );
}
